"""What a run computes on: the device, its precision, the compiler, memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtm import parallel
from mtm.model import MtM
from mtm.recipes import TrainConfig


def pick_device() -> torch.device:
    """The GPU where torch sees one (CUDA, else Apple's MPS), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """bf16 on GPUs that compute in it (Ampere and later; older ones only emulate it, slowly)."""
    usable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    on = usable if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


def setup_of(device: torch.device, home: torch.device, config: TrainConfig) -> str:
    """What a run computes on and how, in a line."""
    bf16 = autocast(device, config.precision)._enabled
    parts = [f"training on {device}", "bf16" if bf16 else "float32"]
    if device.type == "cpu":
        parts.insert(1, f"threads: {torch.get_num_threads()}")
    if device.type == "cuda":
        parts[0] += f" ({torch.cuda.get_device_name(device)})"
        parts.append("counts " + ("on the GPU" if home == device else "sent batch by batch"))
    if config.compile != "none":
        parts.append(f"torch.compile {config.compile}")
    if parallel.processes() > 1:
        parts.append(f"{parallel.processes()} processes")
    return ", ".join(parts)


@contextmanager
def compiled(model: MtM, config: TrainConfig) -> Iterator[None]:
    """Within, the encoder is compiled, if the settings say so.

    Only the encoder: its shapes are those of all sessions, where the maps in and out have a width
    for each, and would be compiled for each.
    """
    if config.compile == "none":
        yield
        return
    vars(model)["encode"] = torch.compile(model.encode, mode=config.compile)  # of this one alone
    try:
        # Few graphs a model, but torch counts them for all models of a process together, and
        # silently stops compiling at 8. (Before torch 2.7 the limit had another name.)
        known = hasattr(torch._dynamo.config, "recompile_limit")
        limit = "recompile_limit" if known else "cache_size_limit"
        with torch._dynamo.config.patch({limit: 64}):
            yield
    finally:
        del model.encode


def peak_memory(device: torch.device) -> float | None:
    """Most memory in use so far, GB: of the GPU, else of this process; None where not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
