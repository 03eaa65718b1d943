"""Training steps at the paper's size, beside their matrix products alone.

    python benchmarks/train_step.py [--device cuda] [--batches 16 64] [--compile]

Batches of trials of 100 bins, sessions of 548, 601 and 652 neurons and the four schemes in turn. A
step is what `fit` does: gather the counts, draw a mask, forward, Poisson loss, backward, clip,
AdamW. Beside it stand

- the floor: the time that its matrix products alone take, one after the other and in turn with the
  steps, in the same precision: forward, and both gradients, attention without regard to causality;
- the ceiling: the rate of one large square matrix product, and the share of it that the step's
  floating-point operations reach.

Every model and batch is measured in a process of its own. A batch whose steps would take longer
than the budget, or that runs out of memory, is left out and listed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine, peak_bytes, timed, write_json
from torch import Tensor, nn

from mtm.masks import MTM_SCHEMES, SCHEMES, MaskSampler
from mtm.model import PUBLISHED, Batch, MtM, MtMConfig
from mtm.recipes import RECIPES
from mtm.training import accumulate, make_optimizer

NEURONS = (548, 601, 652)
N_BINS, N_REGIONS = 100, 8
MODELS = {"ndt1": PUBLISHED, "ndt2": {"tokenizer": "ndt2", **PUBLISHED}}
SMALL = {"depth": 1, "width": 32, "heads": 2, "mlp_width": 64, "stitch_width": 40}
RECIPE = RECIPES["mtm"]


def main() -> None:
    """Measure every model and batch in a process of its own, print and write the JSON."""
    options = parse()
    if options.cell:
        model, batch = options.cell
        print(json.dumps(measure(Bench(options, model, int(batch)))))
        return
    cuda = options.device.startswith("cuda")
    report = machine(options.device) | {
        "bins": N_BINS,
        "neurons": NEURONS,
        "repeats": options.repeats,
        "budget_s": options.budget if math.isfinite(options.budget) else None,
        "small": options.small,
        "compile": options.compile,
        "ceiling_tflops": round(ceiling(torch.device(options.device), options.small), 3),
        "models": {},
        "left_out": [],
    }
    name = f"_{report['device'].replace(' ', '_').lower()}.json" if cuda else ".json"
    path = options.json or RESULTS / f"train_step{name}"
    for name in options.models:
        report["models"][name] = {}
        for numbers in cells(name, options, report["left_out"]):
            share = numbers["step_tflop"] / numbers["step_s"] / report["ceiling_tflops"]
            numbers["share_of_ceiling"] = round(share, 4)
            report["models"][name][str(numbers["batch"])] = numbers
            print(json.dumps(numbers, indent=1), flush=True)
            if options.json or not options.small:  # each time: a run can take hours
                write_json(path, report)
    print("left out:", report["left_out"])


def parse() -> argparse.Namespace:
    """Options; those that differ between a CPU and a GPU are filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, help="trials; ascending")
    parser.add_argument("--repeats", type=int, default=8, help="of each session; 4 = each scheme")
    parser.add_argument("--budget", type=float, help="seconds for the steps of a model and batch")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead", "max-autotune"),
        help="measure with the encoder compiled, too; reduce-overhead: CUDA graphs",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)  # model, batch
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    options.batches = sorted(options.batches or ((16, 64, 256, 512) if cuda else (16, 64, 512)))
    options.budget = options.budget or (math.inf if cuda else 300.0)
    return options


def cells(name: str, options: argparse.Namespace, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Numbers of one model, batch by batch. What does not fit is added to ``left_out``."""
    last: dict[str, Any] = {}
    for batch in options.batches:
        if last and len(NEURONS) * last["step_s"] * batch / last["batch"] > options.budget:
            left_out.append(f"{name}, {batch} trials: more than the budget of seconds")
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--cell", name, str(batch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            last = json.loads(done.stdout.splitlines()[-1])
            yield last
            continue
        why = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        if done.returncode > 0 and "OutOfMemory" not in why:
            sys.exit(done.stderr)
        left_out.append(f"{name}, {batch} trials: {why}")


# ------------------------------------------------------------------------------------- the steps


class Bench:
    """A model, sessions of counts, and the steps that are compared."""

    def __init__(self, options: argparse.Namespace, name: str, batch: int) -> None:
        torch.manual_seed(0)
        self.options, self.name, self.batch = options, name, batch
        self.device = torch.device(options.device)
        self.config = MtMConfig(**MODELS[name], **(SMALL if options.small else {}))
        self.model = MtM(self.config, N_BINS, {str(n): n for n in NEURONS}).to(self.device).train()
        self.optimizer = make_optimizer(self.model, RECIPE)
        self.sampler = MaskSampler(MTM_SCHEMES, device=self.device)
        self.trials = torch.randperm(batch, device=self.device)
        self.regions = {n: torch.arange(n, device=self.device) % N_REGIONS for n in NEURONS}
        self.data = {
            n: torch.poisson(torch.full((batch, N_BINS, n), 0.1)).to(self.device, torch.uint8)
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

    def compiled_step(self) -> Callable[[int, str], None]:
        """The step with the encoder compiled."""
        compiled = torch.compile(self.model.encode, mode=self.options.compile)

        def step(n: int, scheme: str) -> None:
            torch.compiler.cudagraph_mark_step_begin()
            self.model.encode = compiled
            self.step(n, scheme)
            del self.model.encode  # the class's own again

        return step


# --------------------------------------------------------------------------------- the measurements

Act = Callable[[int, str], Any]  # of a session's number of neurons and a scheme: (wall, CPU) s


def measure(bench: Bench) -> dict[str, Any]:
    """Peak of memory, and seconds of steps in turn with their matrix products alone."""
    options, device = bench.options, bench.device
    for scheme in ("neuron", "causal"):
        bench.step(NEURONS[-1], scheme)
    peak = round(peak_bytes(device) / 1e9, 3)  # before anything else takes memory
    made = {n: products(bench, n) for n in NEURONS}

    def clock(act: Callable[[int, str], object]) -> Act:
        return lambda n, scheme: timed(lambda: act(n, scheme), device)[1]

    acts = {"step": clock(bench.step), "step_floor": lambda n, _: alone(made[n], device)}
    if options.compile:
        acts["compiled_step"] = clock(bench.compiled_step())
    found = rounds(acts, options)
    numbers: dict[str, Any] = {"model": bench.name, "batch": bench.batch, "rounds": found.shape[2]}
    numbers |= compare(acts, found)
    causal = found[0, :, MTM_SCHEMES.index("causal") :: len(MTM_SCHEMES), 0]
    numbers["causal_step_s"] = float(np.median(causal, axis=1).mean()) if causal.size else None
    if device.type == "cuda":
        numbers["waits_for_no_device"] = never_waits(bench)
    tokens = bench.batch * np.mean([bench.model.n_tokens(str(n)) + 2 for n in NEURONS])
    operations = np.mean(
        [sum(2 * math.prod(s) * k for s, k in step.items()) for step in made.values()]
    )
    numbers |= {
        "steps_per_s": 1 / numbers["step_s"],
        "tokens_per_s": tokens / numbers["step_s"],
        "step_tflop": operations / 1e12,
        "peak_gb": peak,
    }
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in numbers.items()}


def rounds(acts: dict[str, Act], options: argparse.Namespace) -> np.ndarray:
    """Wall and CPU seconds, (acts, sessions, repeats, 2): acts and sessions in turn, then schemes.

    Before, untimed acts with full and with causal attention, of each session where shapes are new
    to the compiler or the device. Repeats end, after two or more, when the budget is spent.
    """
    everywhere = options.compile or options.device.startswith("cuda")
    for n in NEURONS if everywhere else NEURONS[:1]:
        for act in acts.values():
            for scheme in ("neuron", "causal"):
                act(n, scheme)
    start, found = time.perf_counter(), []
    for repeat in range(options.repeats):
        scheme = MTM_SCHEMES[repeat % len(MTM_SCHEMES)]
        by_session = [[act(n, scheme) for act in acts.values()] for n in NEURONS]
        found.append(np.array(by_session).transpose(1, 0, 2))
        spent = time.perf_counter() - start
        if repeat > 0 and spent * (repeat + 2) / (repeat + 1) > options.budget:
            break
    return np.stack(found, axis=2)


def compare(acts: dict[str, Act], found: np.ndarray) -> dict[str, float]:
    """Seconds of each act, and its ratio to the first, taken pair by pair.

    What slows two acts that follow each other leaves their ratio alone.
    """
    numbers, first = {}, next(iter(acts))
    for name, taken in zip(acts, found, strict=True):
        numbers[f"{name}_s"], numbers[f"{name}_cpu_s"] = typical(taken).tolist()
        if name.endswith("floor"):
            ratio, key = typical(found[0] / taken), f"{first}_over_floor"
            numbers[key], numbers[f"{key}_cpu"] = ratio.tolist()
        elif name != first:
            ratio, key = typical(taken / found[0]), f"{name}_over_ours"
            numbers[key], numbers[f"{key}_cpu"] = ratio.tolist()
    return numbers


def typical(found: np.ndarray) -> np.ndarray:
    """Medians over the repeats, for schemes with full attention and with causal, weighed as drawn.

    (sessions, repeats, ...) -> (...), means over the sessions.
    """
    is_causal = np.resize([SCHEMES[name].causal for name in MTM_SCHEMES], found.shape[1])
    full = np.median(found[:, ~is_causal], axis=1).mean(axis=0)
    if not is_causal.any():
        return full
    share = np.mean([SCHEMES[name].causal for name in MTM_SCHEMES])
    return (1 - share) * full + share * np.median(found[:, is_causal], axis=1).mean(axis=0)


def never_waits(bench: Bench) -> bool:
    """Whether the host does not wait for the device in a step of any scheme."""
    torch.cuda.set_sync_debug_mode("error")  # then, waiting is an error
    try:
        for scheme in MTM_SCHEMES:
            bench.step(NEURONS[0], scheme)
        return True
    except RuntimeError as error:
        print(f"{scheme}: {error}", file=sys.stderr)
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -------------------------------------------------------------------------- matrix products alone

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
    model(torch.zeros(1, N_BINS, n_neurons, device=bench.device), "neuron", None, str(n_neurons))
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
