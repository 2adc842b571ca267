"""Hyperparameters: valid values, error messages, and the round trip through plain data."""

import dataclasses
import json
import re

import numpy as np
import pytest

from esam_core import (
    All,
    Bernoulli,
    Between,
    ESAMConfig,
    ESAMError,
    ESAMTypeError,
    ESAMValueError,
    Every,
    Everything,
    NonFiniteError,
    Only,
    Proportional,
    Random,
    RandomSuffix,
    Sometimes,
    Suffix,
    TopIncrease,
    TopLoss,
)
from esam_core.config import component_from_dict, component_to_dict


def test_defaults_are_the_papers():
    config = ESAMConfig.from_arguments()
    assert config.rho == 0.05
    assert config.perturb == Bernoulli(0.6)
    assert config.select == TopIncrease(0.5)
    assert config.norm == "masked"
    assert config.norm_eps == 1e-12
    assert config.on_nonfinite == "propagate"
    assert config == ESAMConfig()


def test_beta_and_gamma_are_shorthands():
    config = ESAMConfig.from_arguments(beta=0.25, gamma=1.0)
    assert config.perturb == Bernoulli(0.25)
    assert config.select == TopIncrease(1.0)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ESAMConfig().rho = 1.0


def test_integers_and_numpy_numbers_are_numbers():
    import numpy as np

    config = ESAMConfig.from_arguments(rho=1, beta=1, gamma=np.float32(0.5), seed=np.int64(3))
    assert (config.rho, config.seed) == (1.0, 3)
    assert type(config.rho) is float
    assert type(config.seed) is int
    assert config.select.gamma == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -0.1}, ESAMValueError, "`rho` must be finite and >= 0. Received: rho=-0.1."),
        (
            {"rho": float("inf")},
            ESAMValueError,
            "`rho` must be finite and >= 0.",
        ),
        ({"rho": float("nan")}, ESAMValueError, "rho=nan"),
        ({"rho": 10**400}, ESAMValueError, "`rho` must be finite and >= 0. Received: rho=1000"),
        ({"rho": -(10**400)}, ESAMValueError, "`rho` must be finite and >= 0. Received: rho=-100"),
        ({"rho": None}, ESAMTypeError, "`rho` must be a finite number >= 0. Received: rho=None."),
        ({"rho": True}, ESAMTypeError, "rho=True"),
        ({"beta": 0.0}, ESAMValueError, "`beta` must be in (0, 1]. Received: beta=0.0."),
        ({"beta": 1.1}, ESAMValueError, "`beta` must be in (0, 1]. Received: beta=1.1."),
        ({"gamma": 1.5}, ESAMValueError, "`gamma` must be in (0, 1]. Received: gamma=1.5."),
        ({"gamma": 0}, ESAMValueError, "`gamma` must be in (0, 1]. Received: gamma=0."),
        ({"norm": "l2"}, ESAMValueError, "`norm` must be one of 'masked', 'estimated', 'full'"),
        ({"norm": None}, ESAMValueError, "norm=None"),
        ({"norm_eps": 0.0}, ESAMValueError, "`norm_eps` must be finite and > 0."),
        ({"seed": -1}, ESAMValueError, "`seed` must be in [0, 9223372036854775807]"),
        ({"seed": 2**63}, ESAMValueError, "`seed` must be in [0, 9223372036854775807]"),
        ({"seed": 1.0}, ESAMTypeError, "`seed` must be an integer"),
        ({"seed": True}, ESAMTypeError, "seed=True"),
        ({"adaptive": 1}, ESAMTypeError, "`adaptive` must be True or False. Received: adaptive=1."),
        ({"on_nonfinite": "warn"}, ESAMValueError, "'propagate', 'skip', 'raise'"),
        ({"beta": 0.5, "perturb": Bernoulli()}, ESAMValueError, "`beta` is short for"),
        ({"gamma": 0.5, "select": TopLoss()}, ESAMValueError, "`gamma` is short for"),
        ({"perturb": 0.5}, ESAMTypeError, "`perturb` must be a sampler"),
        ({"perturb": Bernoulli}, ESAMTypeError, "`perturb` must be a sampler"),
        ({"select": TopIncrease}, ESAMTypeError, "`select` must be a selector"),
        ({"roh": 0.1}, ESAMTypeError, "`roh` is not a hyperparameter of ESAM. Known: adaptive,"),
    ],
)
def test_errors_name_the_requirement_and_the_value(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        ESAMConfig.from_arguments(**arguments)
    assert isinstance(caught.value, ESAMError)


def test_errors_subclass_the_built_in_ones():
    assert issubclass(ESAMValueError, ValueError)
    assert issubclass(ESAMTypeError, TypeError)
    assert issubclass(NonFiniteError, FloatingPointError)


COMPONENTS = [
    Bernoulli(0.3, unit="weight"),
    Everything(),
    Suffix("layer3"),
    Suffix(0.25),
    RandomSuffix(("a", 0.5), (0.25, 0.75)),
    Only("norm", Bernoulli(0.5)),
    Every(10, Only("*.bias", Suffix("b"))),
    Between(3, None, Everything()),
    Between(3, 7),
    Sometimes(0.5, Every(2)),
    TopIncrease(0.25),
    TopLoss(0.25),
    Random(0.75),
    Proportional(0.5, score="increase", floor=0.25),
    All(),
]


@pytest.mark.parametrize("component", COMPONENTS, ids=repr)
def test_components_go_through_json(component):
    data = json.loads(json.dumps(component_to_dict(component)))
    assert component_from_dict(data) == component


def test_configurations_go_through_json():
    config = ESAMConfig.from_arguments(
        rho=0.2,
        perturb=Every(2, RandomSuffix(("a", "b"))),
        select=Proportional(0.5),
        adaptive=True,
        norm="full",
        seed=2**63 - 1,
        on_nonfinite="skip",
    )
    assert ESAMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("sampler", [Only(lambda unit: True), Every(2, Only(lambda unit: True))])
def test_functions_cannot_be_saved(sampler):
    data = ESAMConfig(perturb=sampler).to_dict()
    assert data["perturb"] is None
    with pytest.raises(ESAMValueError, match="`perturb` is a custom sampler or holds a function"):
        ESAMConfig.from_dict(data)


def test_unknown_components_are_refused():
    with pytest.raises(ESAMValueError, match=re.escape("`name` must be one of 'Bernoulli'")):
        component_from_dict({"name": "Dirichlet"})


BOTH = {"perturb": {"name": "Everything"}, "select": {"name": "All"}}


@pytest.mark.parametrize(
    ("read", "data", "error", "message"),
    [
        (
            component_from_dict,
            {"name": "Suffix"},
            ESAMValueError,
            "`data` of a Suffix accepts 'start'; required: 'start'. Received: data with nothing.",
        ),
        (
            component_from_dict,
            {"name": "Bernoulli", "betta": 0.5},
            ESAMValueError,
            "accepts 'beta', 'unit'; required: none. Received: data with 'betta'.",
        ),
        (component_from_dict, {"name": "Every", "inner": None}, ESAMValueError, "required: 'n'."),
        (component_from_dict, {"name": "All", "gamma": 1}, ESAMValueError, "accepts nothing; req"),
        (component_from_dict, {"name": "Every", "n": "2"}, ESAMTypeError, "Received: n='2'."),
        (
            component_from_dict,
            {"name": "Every", "n": 2, "inner": None},
            ESAMTypeError,
            "`inner` must be a mapping, as `to_dict` writes it. Received: inner=None.",
        ),
        (
            component_from_dict,
            {"name": "Every", "n": 2, "inner": {"name": "Suffix"}},
            ESAMValueError,
            "`inner` of a Suffix accepts 'start'; required: 'start'.",
        ),
        (component_from_dict, {}, ESAMValueError, "Received: name=None."),
        (component_from_dict, {"name": ["Every"]}, ESAMValueError, "Received: name=['Every']."),
        (component_from_dict, None, ESAMTypeError, "Received: data=None."),
        (ESAMConfig.from_dict, {}, ESAMValueError, "required: 'perturb', 'select'. Received"),
        (ESAMConfig.from_dict, {"perturb": BOTH["perturb"]}, ESAMValueError, "data with 'perturb'"),
        (ESAMConfig.from_dict, {**BOTH, "roh": 0.1}, ESAMValueError, "'select', 'roh'."),
        (ESAMConfig.from_dict, {**BOTH, "perturb": 0.5}, ESAMTypeError, "perturb=0.5."),
        (ESAMConfig.from_dict, None, ESAMTypeError, "Received: data=None."),
    ],
)
def test_invalid_data_are_refused(read, data, error, message):
    with pytest.raises(error, match=re.escape(message)):
        read(data)


def test_data_may_omit_defaults():
    assert component_from_dict({"name": "Every", "n": 2}) == Every(2)
    assert ESAMConfig.from_dict(BOTH) == ESAMConfig(perturb=Everything(), select=All())


def test_strings_are_pythons_own():
    """A checkpoint with NumPy's could not be loaded."""
    text = np.str_
    found = [
        *(ESAMConfig(norm=text("full")).norm, ESAMConfig(on_nonfinite=text("skip")).on_nonfinite),
        *(Only(text("norm")).kind, Bernoulli(0.5, unit=text("weight")).unit),
        Proportional(0.5, score=text("increase")).score,
    ]
    assert found == ["full", "skip", "norm", "weight", "increase"]
    assert {type(value) for value in found} == {str}
