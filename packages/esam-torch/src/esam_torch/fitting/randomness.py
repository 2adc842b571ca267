"""The random state of a training run: torch, Python, NumPy and the loader."""

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["generators_of", "load_random_state", "parts_of", "random_state"]


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the global generators, as data for a checkpoint."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def load_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the state of the global generators."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)


def generators_of(loaders: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators from which loaders draw their order, except the global ones."""
    parts = (part for loader in loaders for part in parts_of(loader))
    found = [getattr(part, "generator", None) for part in parts]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def parts_of(loader: Any) -> list[Any]:
    """Return a loader and its samplers, each once."""
    batches = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return list({id(part): part for part in parts if part is not None}.values())
