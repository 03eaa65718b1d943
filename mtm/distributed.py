"""What a run computes on: device, precision, compiler, several processes.

Processes that ``torchrun`` starts hold the same weights; each computes the gradients of a share of
every step's batches. They add these up and take the same optimizer step, so their number does not
change what is trained (up to rounding and dropout).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from mtm.model import MtM
from mtm.recipes import TrainConfig


def pick_device() -> torch.device:
    """Return the GPU if there is one (CUDA, else Apple's MPS), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def uses_bf16(device: torch.device, precision: str) -> bool:
    """Return whether to compute in bfloat16; "auto" does on GPUs since Ampere, which support it."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return precision == "bf16" or (precision == "auto" and able)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of forward passes, with matrix products in bfloat16 if it is used."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


@contextmanager
def compiled(model: MtM, mode: str) -> Iterator[None]:
    """Compile the model's encoder, whose shapes are the same for all sessions, in the context."""
    if mode == "none":
        yield
        return
    vars(model)["encode"] = torch.compile(model.encode, mode=mode)
    try:
        # By default torch stops compiling after 8 graphs, counted over all models of a process.
        with torch._dynamo.config.patch(cache_size_limit=64):
            yield
    finally:
        del model.encode


def setup_line(device: torch.device, counts_on: torch.device, config: TrainConfig) -> str:
    """Return a line that says on what a run computes."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    precision = "bf16" if uses_bf16(device, config.precision) else "float32"
    run = f"{precision}, compile={config.compile}, processes={processes()}"
    return f"training on {device} ({name}), counts on {counts_on}, {run}"


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory in GB: of the GPU, else of this process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def processes() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process. Process 0 writes the files."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def process_group(device: torch.device | None = None) -> Iterator[torch.device | None]:
    """Join the other processes if ``torchrun`` started this one, and yield the device to use."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        if device.index is None:  # each process uses the GPU of its own number
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
    parts = [losses]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parts.append(parameter.grad)
    vector_to_parameters(all_reduce(parameters_to_vector(parts)), parts)  # one message for all


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
