"""The paper's tables and figures: each runs in its smallest form and writes its files."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from benchmarks.__main__ import BENCHMARKS
from benchmarks.paper.fig7 import _zeta
from benchmarks.paper.gradients import Point, cosine, length, shift
from benchmarks.paper.landscape import filter_normalised_direction
from benchmarks.recipes import RECIPES
from torch import nn

PAPER = sorted(name for name in BENCHMARKS if name.startswith(("table", "fig")))

#: Options that make each as small as possible, in addition to --quick.
SMALLEST = {
    "table1": ["--epochs", "1", "--width", "2", "--seeds", "0"],
    "table2": ["--methods", "sgd", "esam", "--width", "2"],
    "table3": ["--epochs", "1", "--width", "2", "--methods", "sgd", "sam", "swp"],
    "table4": ["--layers", "1", "2", "--repeats", "1", "--masks", "5", "--width", "16"],
    "table5": ["--layers", "1", "2", "--repeats", "1", "--masks", "5", "--width", "16"],
    "table6": ["--methods", "sgd", "esam", "--width", "6"],
    "fig3": ["--epochs", "1", "--width", "2", "--values", "0.5"],
    "fig4": ["--epochs", "1", "--width", "2", "--points", "3", "--methods", "sgd"],
    "fig5": ["--epochs", "1", "--width", "2"],
    "fig6": ["--epochs", "1", "--width", "2"],
    "fig7": ["--epochs", "1", "--width", "2", "--betas", "0.5"],
    "fig8": ["--epochs", "1", "--width", "2", "--points", "3", "--methods", "sgd"],
}


@pytest.mark.parametrize("name", PAPER)
def test_smallest_form_writes_json_table_and_figure(name: str, tmp_path: Path) -> None:
    module, _, function = BENCHMARKS[name].partition(":")
    run = getattr(importlib.import_module(module), function)
    threads = torch.get_num_threads()
    try:
        run(["--quick", *SMALLEST[name], "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"machine", "versions", "command", "revision"} <= record.keys()
    assert "|" in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_all_tables_and_figures_exist() -> None:
    assert sorted(SMALLEST) == PAPER


def test_recipes_take_rho_beta_gamma_from_the_presets() -> None:
    fields = RECIPES["wrn28-10"].fields()
    assert (fields["rho"], fields["beta"], fields["gamma"]) == (0.1, 0.5, 0.5)
    assert fields["sharp_weight_decay"] == 2 * fields["weight_decay"]
    assert RECIPES["wrn28-10"].fields(same_weight_decay=True)["sharp_weight_decay"] is None


def test_filters_have_the_networks_norms_and_vectors_are_zero() -> None:
    parameters = [torch.randn(4, 3, 2, 2), torch.randn(4), torch.randn(5, 7)]
    direction = filter_normalised_direction(parameters, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        direction[0].flatten(1).norm(dim=1), parameters[0].flatten(1).norm(dim=1)
    )
    torch.testing.assert_close(direction[2].norm(dim=1), parameters[2].norm(dim=1))
    assert not direction[1].any()


def _line() -> tuple[Point, torch.Tensor, torch.Tensor]:
    """Return a model whose loss is linear in its weights: the score of one class."""
    model = nn.Linear(3, 2, bias=False)

    class Linear(Point):
        def losses(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.model(x).gather(1, y[:, None])[:, 0]

    return Linear(model, [model.weight]), torch.randn(5, 3), torch.randint(2, (5,))


def test_zeta_is_0_for_a_linear_loss_and_the_square_for_a_square() -> None:
    point, x, y = _line()
    epsilon = [torch.randn(2, 3)]
    assert _zeta(point, x, y, point.gradient(x, y), epsilon) == pytest.approx(0.0, abs=1e-6)

    class Square(Point):
        def losses(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return 0.5 * self.parameters[0].square().sum() * torch.ones(len(y))

    square = Square(point.model, point.parameters)
    expected = 0.5 * float(epsilon[0].square().sum())
    got = _zeta(square, x, y, square.gradient(x, y), epsilon)
    assert got == pytest.approx(expected, rel=1e-5)


def test_shifted_restores_the_weights_even_after_an_error() -> None:
    point, *_ = _line()
    before = point.parameters[0].detach().clone()
    seen: list[torch.Tensor] = []

    def fail() -> None:
        with shift(point, [torch.ones(2, 3)]):
            seen.append(point.parameters[0].detach() - before)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    torch.testing.assert_close(seen[0], torch.ones(2, 3))
    assert torch.equal(point.parameters[0].detach(), before)


def test_cosine_and_length_of_lists() -> None:
    a, b = (
        [torch.tensor([3.0, 0.0]), torch.tensor([4.0])],
        [torch.tensor([0.0, 1.0]), torch.zeros(1)],
    )
    assert length(a) == pytest.approx(5.0)
    assert cosine(a, b) == pytest.approx(0.0)
    assert cosine(a, [2 * t for t in a]) == pytest.approx(1.0)
