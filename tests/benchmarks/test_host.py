"""The host time of a step: the exact number of operations that it dispatches."""

import pytest
import torch
from benchmarks.host import BATCH, RHO, STEPS, Scene, main, operations, ours

from esam_core.directions import climbing_indices
from esam_torch import ESAM, Everything, Part, Suffix

#: The maximum number of operations of a step beyond a hand-written one, for any number of parameter
#: tensors: gradient norms, finiteness, the report, the selection of samples.
EXTRA = {
    "SAM": ("SAM by hand", 27),
    "half of the work": ("half of the work by hand", 53),
    "Suffix with Part": ("Suffix with Part by hand", 27),
}

#: The default with a mask of all tensors.
ALL = ours(perturb=Everything())


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("tensors", [8, 40])
def test_operations_beyond_those_written_by_hand(name, tensors):
    by_hand, extra = EXTRA[name]
    mine, theirs = (operations(STEPS[n](Scene(tensors))) for n in (name, by_hand))
    perturbed = tensors if name == "SAM" else tensors // 2  # copied in a single call
    assert mine <= theirs - perturbed + extra


@pytest.mark.parametrize("tensors", [8, 40])
def test_operations_of_the_default(tensors):
    """At most those of SAM and a forward pass that selects samples, whatever the mask."""
    most = operations(ALL(Scene(tensors)))
    forward = 2 * tensors // 2  # a transposition and a product in each layer
    assert most <= operations(STEPS["SAM by hand"](Scene(tensors))) - tensors + forward + 45
    masks = [operations(STEPS["ESAM"](Scene(tensors)), warmup=steps) for steps in (4, 5, 6, 9)]
    assert max(masks) <= most and len(set(masks)) > 1


@pytest.mark.parametrize("name", ["SAM by hand, as a loss", "SAM"])
def test_a_step_of_sam_is_that_written_by_hand(name):
    scenes = [Scene(8), Scene(8)]
    for scene, step in zip(scenes, (STEPS["SAM by hand"], STEPS[name]), strict=True):
        scene.base.param_groups[0]["lr"] = 0.1
        run = step(scene)
        for _ in range(3):
            run()
    mine, theirs = (torch.cat([p.flatten() for p in s.model.parameters()]) for s in scenes)
    torch.testing.assert_close(mine, theirs)
    start = torch.cat([p.flatten() for p in Scene(8).model.parameters()])
    assert not torch.allclose(mine, start, atol=1e-3)


def test_a_step_of_suffix_with_part_is_that_written_by_hand(monkeypatch):
    by_hand, scene = Scene(8), Scene(8)
    optimizer = ESAM(
        scene.base, scene.model, rho=RHO, perturb=Suffix(0.5), gamma=1.0, ascend=Part(0.25)
    )
    parts = [climbing_indices(Part(0.25), BATCH, seed=0, count=count) for count in range(3)]
    drawn = iter(parts)
    monkeypatch.setattr(torch, "randperm", lambda _, device: torch.from_numpy(next(drawn)))
    step = STEPS["Suffix with Part by hand"](by_hand)
    for each in (by_hand, scene):
        each.base.param_groups[0]["lr"] = 0.1
    for part in parts:
        step()
        report = optimizer.step(scene.losses, *scene.batch)
        assert report.part.tolist() == part.tolist() and len(report.perturbed) == 4
    for mine, theirs in zip(scene.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_empty_mask_dispatches_an_ordinary_step():
    mine, theirs = (operations(STEPS[n](Scene(40))) for n in ("empty mask", "SGD"))
    assert mine <= theirs + 5


@pytest.mark.parametrize(
    "name", ["SAM", "half of the work", "Suffix with Part", "empty mask", "default"]
)
def test_operations_grow_linearly_with_the_number_of_tensors(name):
    make = STEPS.get(name, ALL)
    short, middle, long = (operations(make(Scene(t))) for t in (20, 40, 60))
    assert long - middle == middle - short


def test_the_command_runs(tmp_path, capsys):
    main(["--quick", "--out", str(tmp_path)])
    assert "SAM by hand" in capsys.readouterr().out
    assert (tmp_path / "host.md").exists() and (tmp_path / "host.json").exists()
