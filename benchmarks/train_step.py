"""Training steps of the paper's size, and of one layer, beside their matrix products alone.

    python benchmarks/train_step.py [--device cuda] [--batches 16 64]

Batches of trials of 100 bins, or of 20 with one layer, sessions of 548, 601 and 652 neurons and the
four schemes in turn. "ours" has direct paths, and stands beside the same model without them. A step
is what `fit` does: gather the counts, draw a mask, forward, Poisson loss, backward, clip, AdamW.
Beside it stand

- the floor: the time of the matrix products of linear layers and attention alone, in turn with the
  steps: forward, and both gradients, attention without regard to causality;
- the ceiling: the rate of one large matrix product, and the share of it that the step reaches.

Every model and batch is measured in a process of its own; the largest batches take hours on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from typing import Any

import numpy as np
import torch
from common import in_process, machine, peak_bytes, speed_parser, speed_path, timed, write_json
from torch import Tensor, nn

from mtm.masks import MTM_SCHEMES, MaskSampler
from mtm.model import PUBLISHED, Batch, MtM, MtMConfig
from mtm.recipes import RECIPES
from mtm.training import accumulate, make_optimizer

NEURONS = (548, 601, 652)
N_REGIONS = 8
NO_PATHS = {"own_history": False, "latents": 0}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {  # bins, and what a model has
    "ndt1": (100, PUBLISHED),
    "ndt2": (100, {"tokenizer": "ndt2", **PUBLISHED}),
    "ours": (100, {}),
    "ours, no direct paths": (100, NO_PATHS),
    "ours, depth 1": (20, {"depth": 1}),
    "ours, depth 1, no direct paths": (20, {"depth": 1, **NO_PATHS}),
}
SMALL = {"depth": 1, "width": 32, "heads": 2, "mlp_width": 64, "stitch_width": 40}
RECIPE = RECIPES["mtm"]


def main() -> None:
    """Measure every model and batch in a process of its own, print and write the JSON."""
    options = parse()
    if options.cell:
        model, batch = options.cell
        print(json.dumps(measure(Bench(options, model, int(batch)))))
        return
    report = machine(options.device) | {
        "bins": {name: bins for name, (bins, _) in MODELS.items()},
        "neurons": NEURONS,
        "repeats": options.repeats,
        "small": options.small,
        "ceiling_tflops": round(ceiling(torch.device(options.device), options.small), 3),
        "models": {name: {} for name in MODELS},
    }
    path = speed_path("train_step", options)
    for name in MODELS:
        for batch in options.batches:
            numbers = in_process(__file__, *sys.argv[1:], "--cell", name, batch)
            share = numbers["step_tflop"] / numbers["step_s"] / report["ceiling_tflops"]
            report["models"][name][str(batch)] = numbers | {"share_of_ceiling": round(share, 4)}
            print(json.dumps(numbers, indent=1), flush=True)
            if options.json or not options.small:  # each time: a run can take hours
                write_json(path, report)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = speed_parser(__doc__)
    parser.add_argument("--batches", nargs="+", type=int, help="trials")
    parser.add_argument("--repeats", type=int, default=8, help="of each session; 4 = each scheme")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)  # model, batch
    options = parser.parse_args()
    options.batches = options.batches or (16, 64, 512)
    return options


class Bench:
    """A model, sessions of counts, and the step that is measured."""

    def __init__(self, options: argparse.Namespace, name: str, batch: int) -> None:
        torch.manual_seed(0)
        self.options, self.name, self.batch = options, name, batch
        self.device = torch.device(options.device)
        self.n_bins, fields = MODELS[name]
        fields = {"depth": 5, **fields, **(SMALL if options.small else {})}
        self.config = MtMConfig.from_depth(**fields)
        model = MtM(self.config, self.n_bins, {str(n): n for n in NEURONS})
        self.model = model.to(self.device).train()
        self.optimizer = make_optimizer(self.model, RECIPE)
        self.sampler = MaskSampler(MTM_SCHEMES, device=self.device)
        self.trials = torch.randperm(batch, device=self.device)
        self.regions = {n: torch.arange(n, device=self.device) % N_REGIONS for n in NEURONS}
        self.data = {
            n: torch.poisson(torch.full((batch, self.n_bins, n), 0.1)).to(self.device, torch.uint8)
            for n in NEURONS
        }

    def step(self, n: int, scheme: str) -> Tensor:
        """As `fit` does it."""
        counts = self.data[n][self.trials].float()
        mask = self.sampler.draw(scheme, counts, self.regions[n])
        loss = accumulate(self.model, [Batch(counts, scheme, mask, str(n))], RECIPE)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), RECIPE.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def measure(bench: Bench) -> dict[str, Any]:
    """Peak of memory, and seconds of steps in turn with their matrix products alone.

    Medians over the repeats, means over the sessions; ratios are taken pair by pair.
    """
    device, made = bench.device, {n: products(bench, n) for n in NEURONS}
    for n in NEURONS:  # untimed, with full and with causal attention
        for scheme in ("neuron", "causal"):
            bench.step(n, scheme)
    peak = peak_bytes(device)  # before the products take memory
    pairs = []  # wall and CPU seconds
    for repeat in range(bench.options.repeats):
        scheme = MTM_SCHEMES[repeat % len(MTM_SCHEMES)]
        for n in NEURONS:
            step = timed(lambda n=n, scheme=scheme: bench.step(n, scheme), device)[1]
            pairs.append((step, alone(made[n], device)))
    found = np.array(pairs).reshape(-1, len(NEURONS), 2, 2)  # repeats, sessions, step or floor
    (step_s, step_cpu), (floor_s, floor_cpu) = np.median(found, axis=0).mean(axis=0)
    ratio, ratio_cpu = np.median(found[:, :, 0] / found[:, :, 1], axis=0).mean(axis=0)
    causal = found[MTM_SCHEMES.index("causal") :: len(MTM_SCHEMES), :, 0, 0]
    tokens = bench.batch * np.mean([bench.model.n_tokens(str(n)) + 2 for n in NEURONS])
    sums = [sum(2 * math.prod(s) * k for s, k in step.items()) for step in made.values()]
    numbers = {
        "step_s": step_s,
        "step_cpu_s": step_cpu,
        "step_floor_s": floor_s,
        "step_floor_cpu_s": floor_cpu,
        "step_over_floor": ratio,
        "step_over_floor_cpu": ratio_cpu,
        "causal_step_s": np.median(causal, axis=0).mean(),
        "steps_per_s": 1 / step_s,
        "tokens_per_s": tokens / step_s,
        "step_tflop": np.mean(sums) / 1e12,
        "peak_gb": peak / 1e9,
    }
    rounded = {key: float(f"{value:.5g}") for key, value in numbers.items()}
    return {"model": bench.name, "batch": bench.batch} | rounded


Shape = tuple[int, int, int, int]  # matrices, rows, inner, columns


def products(bench: Bench, n_neurons: int) -> Counter[Shape]:
    """Matrix products of a step, with how often each is made."""
    step: Counter[Shape] = Counter()
    model, config, batch = bench.model, bench.config, bench.batch

    def note(shape: Shape, left_needs_gradient: bool = True) -> None:
        many, rows, inner, columns = shape
        step[shape] += 1
        step[many, inner, rows, columns] += 1  # gradient of the right factor, a weight
        step[many, rows, columns, inner] += left_needs_gradient

    def note_linear(module: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> None:
        rows = batch * inputs[0].numel() // module.in_features
        note((1, rows, module.in_features, module.out_features), inputs[0].requires_grad)

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(note_linear) for module in linear]
    counts = torch.zeros(1, bench.n_bins, n_neurons, device=bench.device)
    model(counts, "neuron", None, str(n_neurons))
    for hook in hooks:
        hook.remove()
    length, d = model.n_tokens(str(n_neurons)) + 2, config.width // config.heads
    for _ in range(config.depth):
        note((batch * config.heads, length, d, length))  # queries with keys
        note((batch * config.heads, length, length, d))  # weights with values
    return step


def alone(made: Counter[Shape], device: torch.device) -> np.ndarray:
    """Wall and CPU seconds of the matrix products, one after the other."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return sum(seconds(shape, dtype, device) * n for shape, n in made.items() if n)


def seconds(shape: Shape, dtype: torch.dtype, device: torch.device, repeats: int = 1) -> np.ndarray:
    """Median wall and CPU seconds of one (batched) matrix product, after one that is not timed."""
    many, rows, inner, columns = shape
    a = torch.randn(many, rows, inner, dtype=dtype, device=device)
    b = torch.randn(many, inner, columns, dtype=dtype, device=device)
    out = torch.empty(many, rows, columns, dtype=dtype, device=device)
    found = [timed(lambda: torch.bmm(a, b, out=out), device)[1] for _ in range(repeats + 1)]
    return np.median(found[1:], axis=0)


def ceiling(device: torch.device, small: bool) -> float:
    """Rate of one large square matrix product, 10^12 operations a second."""
    n = 256 if small else 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return 2 * n**3 / float(seconds((1, n, n, n), dtype, device, 15)[0]) / 1e12


if __name__ == "__main__":
    main()
