"""Training in several processes, started by torchrun."""

import atexit
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.devices import widest
from esam_torch.sharded import Shards, any_sharded

__all__ = [
    "SharedOrder",
    "broadcast_buffers",
    "join_processes",
    "replicate",
    "split",
    "sum_over_ranks",
    "world",
]


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) for a single process."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join_processes(device: torch.device) -> torch.device:
    """Join the other processes that torchrun started, and return this one's device.

    An existing process group is used. A new one lasts as long as the process: all calls of `fit`
    share it, because ranks that leave and join again can miss each other.
    """
    dist = torch.distributed
    if device.type != "cpu" and "LOCAL_RANK" in os.environ:
        if device.index is None:
            device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        module = torch.get_device_module(device)
        if hasattr(module, "set_device"):  # NCCL uses it for Python objects
            module.set_device(device)
    alone = not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return device


def _leave() -> None:
    """Destroy the process group, unless it is already destroyed."""
    if torch.distributed.is_initialized():
        # torch 2.6 waits for Gloo's threads without releasing Python's lock. One that still frees
        # a tensor of the last reduction needs the lock, so that both would wait forever.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model, wrapped in DistributedDataParallel if there are other ranks."""
    if Shards.of(model) is not None or any_sharded(model.parameters()):
        raise ESAMTypeError(
            "`model` must not be sharded: fit trains replicas. With fully_shard or tensor "
            "parallelism, write the loop around optimizer.step(losses, ...)."
        )
    if world()[1] == 1 or isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    places = None if device.type == "cpu" else [device]
    return nn.parallel.DistributedDataParallel(model, device_ids=places)


#: Samplers of torch that do not know about ranks, and whose order is not ours to choose.
_UNAWARE = (SubsetRandomSampler, WeightedRandomSampler)

#: Those that a DataLoader chooses itself.
_ORDERS = (RandomSampler, SequentialSampler)


class SharedOrder(DistributedSampler[Any]):
    """The order of the samples that all ranks share; a checkpoint contains its `seed`."""


class _Share(Sampler[int]):
    """Every n-th sample, starting with this rank's; none twice, so that means are exact."""

    def __init__(self, size: int) -> None:
        self._places = range(world()[0], size, world()[1])

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def split(loader: Any, *, training: bool) -> Any:
    """Return this rank's share of a loader, or the loader itself for a single process.

    A `DataLoader` over a data set in random or sequential order is split. One with another sampler
    (such as a DistributedSampler), and any other iterable, is already this rank's share.

    Raises:
        ESAMTypeError: the sampler is one of torch's that does not know about ranks, or samples come
            from an IterableDataset.
    """
    if world()[1] == 1 or not isinstance(loader, DataLoader):
        return loader
    if isinstance(loader.dataset, IterableDataset):
        if not training:  # means over the ranks are right if all of them see the same samples
            return loader
        raise ESAMTypeError(
            "`loader` must not be a DataLoader of an IterableDataset, because fit cannot split it "
            f"among the ranks. Received: one of {type(loader.dataset).__name__}, with which every "
            "rank would train on all samples. Yield only this rank's samples in the data set, and "
            "pass an iterable that is not a DataLoader, which fit takes for this rank's share: an "
            "object whose `__iter__` returns `iter(loader)`."
        )
    sampler, given = loader.sampler, loader.batch_sampler
    batches = loader.batch_size is None and given is not None  # a batch sampler of the user's
    if batches and type(given) is BatchSampler:
        sampler = given.sampler
    fixed = isinstance(sampler, _UNAWARE) or getattr(sampler, "replacement", False)
    unsplit = sampler is not loader.sampler and type(sampler) in _ORDERS
    if unsplit and not training:
        return loader
    if fixed or unsplit:
        raise ESAMTypeError(
            "`loader` must have a sampler that gives each rank its own samples, such as torch's "
            "DistributedSampler, or none: then it is split among the ranks. Received: a "
            f"{type(sampler).__name__}, with which every rank would train on all samples."
        )
    if type(sampler) not in _ORDERS or batches:
        return loader
    chosen: Any = _Share(len(loader.dataset))  # type: ignore[arg-type]
    if training:
        # Every rank uses the same number of batches: the last ones repeat some samples.
        shuffle = isinstance(sampler, RandomSampler)
        seed = _shared_seed(loader.generator) if shuffle else 0
        chosen = SharedOrder(loader.dataset, shuffle=shuffle, seed=seed, drop_last=loader.drop_last)
    if training and len(chosen) == 0:
        raise ESAMValueError(f"`loader` must contain a sample for each of {world()[1]} ranks.")
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=chosen,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _shared_seed(generator: torch.Generator | None) -> int:
    """Return a number that rank 0 draws.

    All ranks draw one, so that ranks with the same seed go on drawing the same numbers.
    """
    drawn = [int(torch.randint(2**31, (), generator=generator))]
    torch.distributed.broadcast_object_list(drawn, src=0)
    return drawn[0]


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sums of numbers over all ranks."""
    if world()[1] == 1:
        return list(values)
    total = torch.tensor(values, dtype=widest(device), device=device)
    torch.distributed.all_reduce(total)
    found: list[float] = total.tolist()
    return found


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast rank 0's buffers (BatchNorm's statistics), which its checkpoint contains."""
    if world()[1] > 1:
        for buffer in model.buffers():
            value: Tensor = buffer.data
            torch.distributed.broadcast(value, 0)
