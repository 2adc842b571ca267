"""The host time of a step: the exact number of operations that it dispatches."""

import pytest
import torch
from benchmarks.host import STEPS, Scene, main, operations

#: The maximum number of operations of a step beyond a hand-written one, for any number of parameter
#: tensors: gradient norms, finiteness, the report, the selection of samples.
EXTRA = {"SAM": ("SAM by hand", 27), "half of the work": ("half of the work by hand", 53)}


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("tensors", [8, 40])
def test_operations_beyond_those_written_by_hand(name, tensors):
    by_hand, extra = EXTRA[name]
    ours, theirs = (operations(STEPS[n](Scene(tensors))) for n in (name, by_hand))
    perturbed = tensors if name == "SAM" else tensors // 2  # copied in a single call
    assert ours <= theirs - perturbed + extra


@pytest.mark.parametrize("name", ["SAM by hand, as a loss", "SAM"])
def test_a_step_of_sam_is_that_written_by_hand(name):
    scenes = [Scene(8), Scene(8)]
    for scene, step in zip(scenes, (STEPS["SAM by hand"], STEPS[name]), strict=True):
        scene.base.param_groups[0]["lr"] = 0.1
        run = step(scene)
        for _ in range(3):
            run()
    ours, theirs = (torch.cat([p.flatten() for p in s.model.parameters()]) for s in scenes)
    torch.testing.assert_close(ours, theirs)
    start = torch.cat([p.flatten() for p in Scene(8).model.parameters()])
    assert not torch.allclose(ours, start, atol=1e-3)


def test_an_empty_mask_dispatches_an_ordinary_step():
    ours, theirs = (operations(STEPS[n](Scene(40))) for n in ("empty mask", "SGD"))
    assert ours <= theirs + 5


@pytest.mark.parametrize("name", ["SAM", "half of the work", "empty mask"])
def test_operations_grow_linearly_with_the_number_of_tensors(name):
    short, middle, long = (operations(STEPS[name](Scene(t))) for t in (20, 40, 60))
    assert long - middle == middle - short


def test_the_command_runs(tmp_path, capsys):
    main(["--quick", "--out", str(tmp_path)])
    assert "SAM by hand" in capsys.readouterr().out
    assert (tmp_path / "host.md").exists() and (tmp_path / "host.json").exists()
