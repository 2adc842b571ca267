"""Find out whether `losses` runs compiled code, and whether its ascent pass can be pruned."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esam_core import ESAMRuntimeError, Sampler, Unit
from esam_torch.ascent import graph_nodes
from esam_torch.compat import (
    COMPILED_MODELS_SEE_REQUIRES_GRAD,
    COMPILED_NODE,
    count_compiled_frames,
    is_compiled_function,
)
from esam_torch.losses import LossFunction
from esam_torch.wrappers import holds_compiled

__all__ = ["Compilation"]

#: With more masks than this, the model is not compiled once for each mask.
_MOST_COMPILED_MASKS = 4


class Compilation:
    """What is known about compiled code in the passes of a run.

    The compiled model may be unknown to ESAM: `losses` can call a wrapper that trainers made, or
    compiled functions. So the first step looks whether anything is compiled. Before torch 2.13,
    where pruned graphs would be used for all passes, that step is not pruned.
    """

    def __init__(self) -> None:
        self._found = False
        self._looked = COMPILED_MODELS_SEE_REQUIRES_GRAD

    def look_at(self, model: nn.Module) -> None:
        """Note whether the model or a part of it is compiled."""
        self._found = self._found or holds_compiled(model)

    def look_at_pass(self, loss: Tensor, frames_before: int) -> None:
        """Note whether a pass has run compiled code.

        Args:
            loss: what the pass has computed.
            frames_before: `count_compiled_frames()` before the pass.
        """
        compiled = count_compiled_frames() > frames_before
        earlier = frames_before > 0 and not self._looked
        self._found = self._found or compiled or (earlier and _ran_compiled(loss))
        self._looked = True

    def check(self, *, pruned: bool) -> None:
        """Raise if code was compiled in a pruned pass and would be used for other passes.

        Raises:
            ESAMRuntimeError: torch is older than 2.13, and the pass was pruned.
        """
        if pruned and not COMPILED_MODELS_SEE_REQUIRES_GRAD and self._found:
            torch.compiler.reset()
            raise ESAMRuntimeError(
                "With torch before 2.13, code that `losses` calls must be compiled before or in "
                "the first step, which computes all gradients in the ascent pass. Received: code "
                "that was compiled in a later step. It has been discarded; call the step again, or "
                "pass the compiled model to `ESAM`."
            )

    def suspects(self, losses: LossFunction) -> bool:
        """Return whether `losses` runs compiled code, or may do so."""
        return self._found or is_compiled_function(losses)

    def prunes(self, losses: LossFunction, sampler: Sampler, units: Sequence[Unit]) -> bool | str:
        """Return whether the ascent pass can be pruned, or a warning that says why not."""
        if not self.suspects(losses):
            return self._looked
        masks = sampler.masks(units)
        few = masks is not None and len(masks) <= _MOST_COMPILED_MASKS
        if few and COMPILED_MODELS_SEE_REQUIRES_GRAD:
            return True
        return compilation_warning(few)


def _ran_compiled(loss: Tensor) -> bool:
    """Return whether compiled code has computed a loss; True if it has no graph that tells."""
    nodes, _ = graph_nodes(loss)
    return not nodes or any(node.name() == COMPILED_NODE for node in nodes)


def compilation_warning(few_masks: bool) -> str:
    """Return why the ascent pass of a compiled model computes all gradients, and what to do."""
    why, way_out = (
        ("torch before 2.13 does not recompile it for other weights", "Use torch 2.13")
        if few_masks
        else (
            "the sampler has too many masks to compile one version for each",
            "Use a sampler with few masks, such as Suffix,",
        )
    )
    return (
        f"The model or code that `losses` calls is compiled, and {why}, so the ascent pass "
        f"computes all gradients and masks them afterwards. {way_out} to avoid this."
    )
