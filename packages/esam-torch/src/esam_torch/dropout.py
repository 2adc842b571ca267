"""Forwards without dropout, whichever function computes it, and in evaluation mode."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from esam_torch.compat import eager_code, is_active
from esam_torch.guards import Evaluation

__all__ = ["NoiselessEvaluation", "WithoutDropout"]

#: The functions that drop entries of their first argument, `input`.
_DROPOUTS = frozenset(
    [
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
        *(F.feature_alpha_dropout, torch.dropout, torch.feature_dropout, torch.alpha_dropout),
    ]
)


class WithoutDropout(TorchFunctionMode):
    """Switches dropout off inside the context, also in functions such as `F.dropout`.

    Attributes:
        switched_off: whether it does nothing any more. After an interrupt, torch may activate again
            what was left, when the interrupted frames are deleted.

    Example:
        >>> with WithoutDropout():
        ...     F.dropout(torch.ones(3), 0.5)
        tensor([1., 1., 1.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.switched_off = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch without dropout."""
        kwargs = dict(kwargs or {})
        if self.switched_off:
            return func(*args, **kwargs)
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward and "training" in kwargs:
            kwargs["training"] = False
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


class NoiselessEvaluation:
    """Evaluation mode of some layers, without dropout and compiled code, once.

    `end` restores everything, whichever line an interrupt has come at.
    """

    def __init__(self) -> None:
        self._layers = Evaluation()
        self._mode: Any = WithoutDropout()
        self._stance: Any = None

    def begin(self, layers: Iterable[nn.Module]) -> None:
        """Begin, for some layers in training mode."""
        self._layers.begin(layers)
        self._stance = eager_code()
        self._mode.__enter__()

    def end(self) -> None:
        """Restore everything, if it has begun."""
        self._mode.switched_off = True
        if is_active(self._mode):
            self._mode.__exit__(None, None, None)
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        self._layers.end()
