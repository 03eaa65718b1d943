"""One training step and one forward pass at the paper's size, beside their matrix products alone.

    python benchmarks/step.py [--device cuda] [--repeats 9] [--small]

Batches of 16 trials of 100 bins, sessions of 548, 601 and 652 neurons in turn. A step is what `fit`
does: gather the counts, draw a mask, forward, Poisson loss, backward, clip, AdamW. The floor is the
time that its matrix products alone take here, in the same precision: forward, and both gradients.
Every model is measured in a process of its own, so that the peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mtm.masks import MTM_SCHEMES, MaskSampler
from mtm.model import MtM, MtMConfig
from mtm.train import RECIPES, Batch, _autocast, _optimizer, accumulate

NEURONS = (548, 601, 652)
N_BINS, BATCH, N_REGIONS = 100, 16, 8
MODELS = {
    "ndt1": {},
    "ndt2": {"tokenizer": "ndt2"},
}


def main() -> None:
    """Measure every model in a process of its own, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9, help="of each session")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", choices=MODELS, help="measure this one here, and print JSON")
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measure(options)))
        return
    results = {}
    for name in MODELS:
        command = [sys.executable, __file__, *sys.argv[1:], "--model", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name)
        for what, value in results[name].items():
            print(f"  {what:<34} {value}")
    cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    report = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": BATCH,
        "bins": N_BINS,
        "neurons": NEURONS,
        "repeats": options.repeats,
        "small": options.small,
        "models": results,
    }
    name = f"step_{device.replace(' ', '_').lower()}.json" if cuda else "step.json"
    path = options.json or Path(__file__).parent / "results" / name
    if options.json or not options.small:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Mean over the sessions of their medians over the repeats: seconds; peak memory in GB."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    fields = MODELS[options.model]
    if options.small:
        fields = {**fields, "depth": 1, "width": 32, "heads": 2, "mlp_width": 64}
    config, recipe = MtMConfig(**fields), RECIPES["mtm"]
    model = MtM(config, {str(n): n for n in NEURONS}).to(device).train()
    optimizer = _optimizer(model, recipe)
    sampler = MaskSampler(MTM_SCHEMES, device=device)
    data = {
        n: torch.poisson(torch.full((BATCH, N_BINS, n), 0.1)).to(device, torch.uint8)
        for n in NEURONS
    }
    trials = torch.randperm(BATCH, device=device)
    regions = {n: torch.arange(n, device=device) % N_REGIONS for n in NEURONS}

    def step(n: int) -> None:
        counts = data[n][trials].float()
        name, mask = sampler(counts, regions[n])
        accumulate(model, [Batch(counts, str(n), mask, name)], recipe)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(n: int) -> None:
        counts = data[n][trials].float()
        name, mask = sampler(counts, regions[n])
        with _autocast(device):
            model(counts, str(n), mask, prompt=name)

    steps = times(step, NEURONS, options.repeats, device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    model.eval()
    forwards = times(forward, NEURONS, options.repeats, device)
    floors = [floor(model, config, n, device) for n in NEURONS]
    step_floor, forward_floor = (float(np.mean(values)) for values in zip(*floors, strict=True))
    wall, cpu = np.median(steps, axis=1).mean(axis=0)
    forward_wall, forward_cpu = np.median(forwards, axis=1).mean(axis=0)
    numbers = {
        "step_s": wall,
        "step_cpu_s": cpu,
        "step_floor_s": step_floor,
        "step_over_floor": wall / step_floor,
        "step_peak_gb": peak / 1e9,
        "forward_s": forward_wall,
        "forward_cpu_s": forward_cpu,
        "forward_floor_s": forward_floor,
        "forward_over_floor": forward_wall / forward_floor,
    }
    return {key: round(float(value), 6) for key, value in numbers.items()}


def times(
    act: Callable[[int], None], sessions: tuple[int, ...], repeats: int, device: torch.device
) -> np.ndarray:
    """Wall and CPU seconds, (sessions, repeats, 2), sessions in turn, after two rounds untimed."""
    found = np.zeros((len(sessions), repeats, 2))
    for repeat in range(-2, repeats):
        for i, n in enumerate(sessions):
            wall, cpu = time.perf_counter(), time.process_time()
            act(n)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                found[i, repeat] = time.perf_counter() - wall, time.process_time() - cpu
    return found


def floor(
    model: MtM, config: MtMConfig, n_neurons: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of the matrix products of a step, and of a forward pass, one after the other."""
    forward: Counter[tuple[int, ...]] = Counter()  # (matrices, rows, inner, columns)
    step: Counter[tuple[int, ...]] = Counter()

    def note(shape: tuple[int, ...], left_needs_gradient: bool = True) -> None:
        many, rows, inner, columns = shape
        forward[shape] += 1
        step[shape] += 1
        step[many, inner, rows, columns] += 1  # gradient of the right factor, a weight
        step[many, rows, columns, inner] += left_needs_gradient

    def note_linear(module: torch.nn.Linear, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        rows = inputs[0].numel() // module.in_features
        note((1, rows, module.in_features, module.out_features), inputs[0].requires_grad)

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_hook(note_linear) for module in linear]
    model(torch.zeros(BATCH, N_BINS, n_neurons, device=device), str(n_neurons), prompt="neuron")
    for hook in hooks:
        hook.remove()
    length, d = model.n_tokens(str(n_neurons)) + 2, config.width // config.heads
    for _ in range(config.depth):
        note((BATCH * config.heads, length, d, length))  # queries with keys
        note((BATCH * config.heads, length, length, d))  # weights with values
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return tuple(
        sum(seconds(shape, dtype, device) * n for shape, n in made.items())
        for made in (step, forward)
    )


def seconds(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Median time of one (batched) matrix product."""
    many, rows, inner, columns = shape
    a = torch.randn(many, rows, inner, dtype=dtype, device=device)
    b = torch.randn(many, inner, columns, dtype=dtype, device=device)
    out = torch.empty(many, rows, columns, dtype=dtype, device=device)

    def product(_: int) -> None:
        torch.bmm(a, b, out=out)

    return float(np.median(times(product, (0,), 7, device)[0, :, 0]))


if __name__ == "__main__":
    main()
