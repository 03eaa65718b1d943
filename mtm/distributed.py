"""Training with several processes: each computes the gradients of a share of every step's batches.

All processes hold the same weights, add up their gradients and take the same optimizer step, so the
number of processes does not change what is trained (up to rounding, and dropout, which each process
draws by itself). Only the parameters used in a step are sent: the shared layers and the layers of
the step's sessions. DistributedDataParallel would send those of all sessions in every step.

Start the processes with ``torchrun``::

    torchrun --nproc-per-node 4 -m mtm train sessions --out model
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def processes() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process. Process 0 writes the files."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def process_group(device: torch.device | None = None) -> Iterator[torch.device | None]:
    """Join the other processes if ``torchrun`` started this one, and yield the device to use."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield device
        return
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # each process uses the GPU of its own number
        if device.index is not None and os.environ["LOCAL_WORLD_SIZE"] != "1":
            raise ValueError(f"all processes would use {device}; pass cuda without a number")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for the other processes


def all_reduce_gradients(parameters: Sequence[nn.Parameter], losses: Tensor) -> None:
    """Sum the gradients of ``parameters``, and ``losses``, over all processes, in place.

    Every process must pass the same parameters; a missing gradient counts as 0.
    """
    if processes() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    parts = [losses, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
    flat = all_reduce(torch.cat([part.reshape(-1) for part in parts]))  # one message for all
    for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(summed.view_as(part))


def all_reduce(numbers: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if processes() > 1:
        dist.all_reduce(numbers)
    return numbers


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy the tensors of process 0 to all processes, in place."""
    if processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def broadcast_object(value: Any) -> Any:
    """Return the value that process 0 passed; others may pass anything."""
    values = [value]
    if processes() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
