"""esam-core: the specification of ESAM, a NumPy reference, and a kit to check backends with.

ESAM is Efficient Sharpness-aware Minimization (Du et al., ICLR 2022, arXiv 2110.03141). Install
`esam-torch` or `esam-keras` to train with it; this package is what they share.
"""

from esam_core.config import ESAMConfig
from esam_core.errors import (
    ESAMError,
    ESAMRuntimeError,
    ESAMTypeError,
    ESAMValueError,
    NonFiniteError,
)
from esam_core.sds import All, Proportional, Random, Selector, TopIncrease, TopLoss
from esam_core.sharpness import RunningMeans, StepReport
from esam_core.swp import (
    Bernoulli,
    Between,
    Every,
    Everything,
    Mask,
    Only,
    RandomSuffix,
    Sampler,
    Sometimes,
    Suffix,
    Unit,
)

__version__ = "0.1.0"

__all__ = [
    "All",
    "Bernoulli",
    "Between",
    "ESAMConfig",
    "ESAMError",
    "ESAMRuntimeError",
    "ESAMTypeError",
    "ESAMValueError",
    "Every",
    "Everything",
    "Mask",
    "NonFiniteError",
    "Only",
    "Proportional",
    "Random",
    "RandomSuffix",
    "RunningMeans",
    "Sampler",
    "Selector",
    "Sometimes",
    "StepReport",
    "Suffix",
    "TopIncrease",
    "TopLoss",
    "Unit",
]
