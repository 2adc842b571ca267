"""Budgets: the rules, in cases with simple costs."""

import pytest

from esam_core import (
    All,
    ESAMTypeError,
    ESAMValueError,
    Everything,
    Part,
    Previous,
    Proportional,
    Suffix,
    Unit,
)
from esam_core.budget import make_plan
from esam_core.cost import base_cost, expected_cost

# A hundred equal layers in ten equal blocks.
UNITS = [Unit(f"{i}", (1,), cost=1.0, block=f"block{i // 10}", depth=i // 10) for i in range(100)]


@pytest.mark.parametrize("budget", [0.95, 1.0, 1.05, 1.15, 1.3, 1.5, 1.9, 2.0, 3.0])
def test_no_choice_costs_more_than_the_budget(budget):
    chosen = make_plan(UNITS, budget).chosen
    cost = expected_cost(chosen.perturb, UNITS, chosen.select)
    assert cost.ratio <= budget * (1 + 1e-9)
    assert chosen.ratio <= budget * (1 + 1e-9)


def test_a_budget_for_sam_gives_sam():
    assert make_plan(UNITS, 2.0).chosen.perturb == Everything()
    assert make_plan(UNITS, 2.0).chosen.select == All()


@pytest.mark.parametrize("select", [Proportional(0.5), All()])
def test_with_equal_samples_a_larger_budget_never_perturbs_less(select):
    budgets = (0.95, 1.02, 1.1, 1.2, 1.3, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)
    plans = [make_plan(UNITS, budget).chosen for budget in budgets]
    shares = [chosen.share for chosen in plans if chosen.select == select]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize("budget", [1.41, 1.5, 1.68, 1.8, 1.95, 2.0])
def test_all_samples_are_kept_if_any_suffix_fits(budget):
    plan = make_plan(UNITS, budget)
    assert plan.chosen.select == All()
    # Two base steps less the weight gradients of the share 1 - s.
    assert plan.chosen.share == pytest.approx(int(10 * (3 * budget - 4) / 2 + 1e-9) / 10)
    assert (plan.warning is None) == (plan.chosen.share >= 0.25)


@pytest.mark.parametrize("budget", [1.41, 1.5])
def test_a_short_suffix_warns(budget):
    text = make_plan(UNITS, budget).warning
    assert f"budget={budget} is only enough to perturb" in text
    least = float(text.split("at least ")[1].split(":")[0])
    assert make_plan(UNITS, least).warning is None
    assert make_plan(UNITS, least - 0.001).warning is not None
    assert text.endswith(f"{make_plan(UNITS, least).chosen.perturb!r}.")


def test_half_of_the_samples_warns():
    text = make_plan(UNITS, 1.2).warning
    assert "budget=1.2 is too small to keep all samples" in text
    least = float(text.split("at least ")[1].split(";")[0])
    assert make_plan(UNITS, least).chosen.select == All()
    assert make_plan(UNITS, least - 0.001).chosen.select == Proportional(0.5)
    assert text.endswith("with ascend=Part(0.25), less is enough.")
    assert "Part" not in make_plan(UNITS, 1.0, ascend=Part(0.25)).warning


@pytest.mark.parametrize("budget", [0.9, 1.1, 1.3])
def test_half_of_the_samples_if_no_suffix_fits_with_all(budget):
    chosen = make_plan(UNITS, budget).chosen
    assert chosen.select == Proportional(0.5)
    # A forward, the backward of a share s, and a base step on half: (1 + 2 s + 1.5) / 3.
    assert chosen.share == pytest.approx(min(1.0, int(10 * (3 * budget - 2.5) / 2 + 1e-9) / 10))


def test_the_table_marks_the_choice():
    plan = make_plan(UNITS, 1.15)
    (marked,) = [line for line in str(plan).splitlines() if line.startswith("->")]
    assert repr(plan.chosen.perturb) in marked
    assert plan.chosen in plan.options


def test_the_direction_affects_costs_but_is_not_chosen():
    plan = make_plan(UNITS, 1.25, ascend=Part(0.25))
    assert plan.chosen.perturb == Everything()
    assert plan.chosen.select == All()
    assert plan.chosen.ratio == pytest.approx(1.25, abs=2e-3)
    assert str(plan).startswith("budget: 1.25 x the base optimizer's step, ascend=Part(share=0.25)")
    # The setting of the study: the same direction, all samples, the last part of the network.
    plan = make_plan(UNITS, 1.2, ascend=Part(0.25))
    assert plan.chosen.perturb == Suffix("block3")  # 1 + (1 + 2 * 0.7) / 12
    assert plan.chosen.select == All()
    free = make_plan(UNITS, 1.0, ascend=Previous())
    assert (free.chosen.perturb, free.chosen.select) == (Everything(), All())
    assert make_plan(UNITS, 1.25).chosen.share < 0.7  # the same budget with the whole batch
    assert "ascend" not in str(make_plan(UNITS, 1.25))
    with pytest.raises(ESAMValueError, match=r"`budget` must be at least 0\.83"):
        make_plan(UNITS, 0.5, ascend=Previous())


def test_bad_input():
    with pytest.raises(ESAMValueError, match=r"`budget` must be at least 0\.\d+ for this model"):
        make_plan(UNITS, 0.1)
    with pytest.raises(ESAMValueError, match="`budget` must be finite and > 0"):
        make_plan(UNITS, 0.0)
    with pytest.raises(ESAMTypeError, match="`budget` must be a finite number > 0"):
        make_plan(UNITS, "cheap")


def test_only_perturbable_units_are_perturbed():
    units = [Unit(f"{i}", (1,), cost=1.0, block=f"b{i}", depth=i) for i in range(8)]
    plan = make_plan(units, 1.9, perturbable=[i < 4 for i in range(8)])
    assert all(option.share > 0.0 for option in plan.options)
    with pytest.raises(ESAMValueError, match="must include a perturbable one"):
        make_plan(units, 1.9, perturbable=[False] * 8)
    message = r"`perturbable` must be 8 booleans, one per unit\. Received: perturbable=\[True\]"
    with pytest.raises(ESAMValueError, match=message):
        make_plan(units, 1.9, perturbable=[True])


def test_frozen_units_are_not_perturbed():
    units = [Unit(f"{i}", (1,), cost=1.0, block=f"b{i}", depth=i, trained=i >= 2) for i in range(4)]
    plan = make_plan(units, 2.0, perturbable=[True] * 4)
    assert plan == make_plan(units, 2.0)
    assert plan.chosen.share == 0.5
    with pytest.raises(ESAMValueError, match="must include a perturbable one"):
        make_plan(units, 2.0, perturbable=[True, True, False, False])


@pytest.mark.parametrize("n", range(2, 30))
def test_the_budget_that_the_message_names_fits(n):
    units = [Unit(f"{i}", (1,), cost=1.0 + i, block=f"b{i}", depth=i) for i in range(n)]
    with pytest.raises(ESAMValueError, match="`budget` must be at least") as raised:
        make_plan(units, 0.1)
    make_plan(units, float(str(raised.value).split()[5]))


def test_frozen_units_cost_only_a_forward():
    units = [
        Unit(f"{i}", (1,), cost=1.0, block=f"b{i}", depth=i, trained=i >= 6) for i in range(10)
    ]
    assert base_cost(units) == pytest.approx(1.0 + 0.3 + 0.4)
    sam = expected_cost(Everything(), units, All())
    # Two forwards, each with a backward that stops at the first trained unit.
    assert sam.total == pytest.approx(2 * 1.7)
    with pytest.raises(ESAMValueError, match="all are frozen"):
        base_cost(units[:6])
