"""Several processes that train one model: each takes a share of every step's batches.

Every process holds the same weights. It computes the gradient of its share, the gradients are added
up over the processes, and all take the same step. What a step consists of is decided by the
settings alone: as many processes as there are train the same model, only faster. (But for rounding,
and for dropout, which each process draws for itself.)

Only what learns in a step travels: the core, and the maps of the sessions in that step. (torch's
DistributedDataParallel would send the maps of every session each time: of the paper's 459 sessions,
that is some thirty times as much.)

Processes are started by ``torchrun``, which ends all of them when one of them dies::

    torchrun --nproc-per-node 4 -m mtm train sessions --out model
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def processes() -> int:
    """How many train together; 1 where no process group was made."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 writes the files."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def joined(device: torch.device | None = None) -> Iterator[torch.device | None]:
    """Be one of the processes that ``torchrun`` started; nothing where it did not.

    Args:
        device: to compute on. Default, and where it is "cuda" without a number: the GPU of this
            process's number, where there are GPUs.

    Yields:
        the device, or None for the default of a single process.

    Raises:
        ValueError: for a GPU with a number, which all processes would share.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield device
        return
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is not None and os.environ["LOCAL_WORLD_SIZE"] != "1":
        raise ValueError(
            f"all processes would compute on {device}; say cuda, and each takes its own"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for the others


def add_up(gradients: Sequence[nn.Parameter], losses: Tensor) -> None:
    """Sum the parameters' gradients, and ``losses``, over the processes, in one message.

    Args:
        gradients: the same parameters in every process. One without a gradient here (no batch of
            its session was in this process's share) counts as 0.
        losses: any shape; changed in place.
    """
    if processes() == 1:
        return
    together = [losses]
    for parameter in gradients:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        together.append(parameter.grad)
    message = torch.cat([x.reshape(-1) for x in together])
    dist.all_reduce(message)
    for part, sent in zip(together, message.split([x.numel() for x in together]), strict=True):
        part.copy_(sent.view_as(part))


def total(numbers: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if processes() > 1:
        dist.all_reduce(numbers)
    return numbers


def spread(tensors: Iterable[Tensor]) -> None:
    """Give every process what process 0 has, in place."""
    if processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def agree(what: str, number: int, device: torch.device) -> None:
    """Check that every process has the same number.

    Raises:
        RuntimeError: in every process, when they do not.
    """
    if processes() > 1:
        ends = torch.tensor([number, -number], device=device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        high, low = int(ends[0]), -int(ends[1])
        if high != low:
            raise RuntimeError(
                f"process {rank()} of {processes()}, {what}: {number}, but others have {low} to "
                f"{high}; all need the same command, session files and folder"
            )
