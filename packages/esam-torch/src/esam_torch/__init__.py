"""esam-torch: efficient sharpness-aware minimisation for PyTorch.

In a training script, wrap the optimizer::

    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.05)

and compute the loss as `optimizer.loss(losses, inputs, targets)`. The call of `backward()` stays.
"""

from esam_core import (
    All,
    Batch,
    Bernoulli,
    Between,
    Every,
    Everything,
    Momentum,
    Only,
    Part,
    Previous,
    Proportional,
    Random,
    RandomSuffix,
    RunningMeans,
    Sometimes,
    StepReport,
    Suffix,
    TopIncrease,
    TopLoss,
)
from esam_core import (
    __version__ as __version__,
)
from esam_torch.bases import SideBySide
from esam_torch.distributed_state import DistributedState
from esam_torch.fitting import History, accuracy, evaluate, fit
from esam_torch.marks import Rows, Whole
from esam_torch.optimizer import ESAM

__all__ = [
    "ESAM",
    "All",
    "Batch",
    "Bernoulli",
    "Between",
    "DistributedState",
    "Every",
    "Everything",
    "History",
    "Momentum",
    "Only",
    "Part",
    "Previous",
    "Proportional",
    "Random",
    "RandomSuffix",
    "Rows",
    "RunningMeans",
    "SideBySide",
    "Sometimes",
    "StepReport",
    "Suffix",
    "TopIncrease",
    "TopLoss",
    "Whole",
    "accuracy",
    "evaluate",
    "fit",
]
