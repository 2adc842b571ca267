"""The options of a training run, and a unique name for them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.methods import parse_method

__all__ = ["Run"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """All options of a run.

    Args:
        method: "NAME" or "NAME@RHO".
        data: as in `load_source`.
        model: a key of `MODELS`.
        width: width of the model; None is the published one.
        epochs: passes over the training images.
        batch: samples per step.
        lr: peak learning rate; a cosine decreases it to 0 over the run.
        warmup: epochs in which the learning rate rises linearly from 0.
        optimizer: the base optimizer, "sgd" (momentum .9) or "adamw".
        m: samples per perturbation, as with one shard per device; None is the batch.
        weight_decay: weight decay of the base optimizer.
        sharp_weight_decay: weight decay of methods other than the base optimizer, with or without
            averaged weights; None is the same.
        smoothing: label smoothing.
        rho: the radius if the method names none.
        beta: for random masks.
        gamma: for selectors.
        ema: share of the new weights in the average with which "sgd-ema" is tested.
        seed: the seed of weights, order, augmentation, masks and selections.
        images: number of training images; None is all.
        classes: number of classes; None is all.
        first_class: the first of these classes.
        spare: also test on the unused training images.
        size: size to downscale the images to; None keeps them.
        noise: share of wrong training labels.
        augment: crop and mirror the training images.
        device: the device of the run.
        bf16: autocast to bfloat16.
        channels_last: memory format.
        compile: compile the model's blocks.
        test_every: epochs between tests; there is always one after the last.
    """

    method: str
    data: str
    model: str
    width: int | None = None
    epochs: int = 200
    batch: int = 128
    lr: float = 0.05
    warmup: int = 0
    optimizer: str = "sgd"
    m: int | None = None
    weight_decay: float = 5e-4
    sharp_weight_decay: float | None = None
    smoothing: float = 0.0
    rho: float = 0.05
    beta: float = 0.6
    gamma: float = 0.5
    ema: float = 0.02
    seed: int = 0
    images: int | None = None
    classes: int | None = None
    first_class: int = 0
    spare: bool = False
    size: int | None = None
    noise: float = 0.0
    augment: bool = True
    device: str = "cpu"
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    test_every: int = 1

    @property
    def effective_rho(self) -> float:
        """The method's radius; 0 for the base optimizer."""
        method = parse_method(self.method)
        if method.family in ("base", "average"):
            return 0.0
        return self.rho if method.rho is None else method.rho

    def key(self, probe: Mapping[str, Any] | None = None) -> str:
        """Return a short name that is unique to these options and this probe.

        Args:
            probe: the options of the run's probe, or None.
        """
        whole = json.dumps([dataclasses.asdict(self), probe], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def file_name(self, probe: Mapping[str, Any] | None = None) -> str:
        """Return the stem of the run's files: a readable name and its key."""
        return f"{self.model}-{self.method}-seed{self.seed}-{self.key(probe)}"
