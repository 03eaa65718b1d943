"""Training steps at the paper's size: beside their matrix products alone, and a plain step.

    python benchmarks/train_step.py [--device cuda] [--batches 16 64] [--compile] [--profile]

Batches of trials of 100 bins, sessions of 548, 601 and 652 neurons and the four schemes in turn. A
step is what `fit` does: gather the counts, draw a mask, forward, Poisson loss, backward, clip,
AdamW. Beside it stand

- the floor: the time that its matrix products alone take, one after the other and in turn with the
  steps, in the same precision: forward, and both gradients, attention without regard to causality;
- the ceiling: the rate of one large square matrix product, and the share of it that the step's
  floating-point operations reach;
- the plain step, in turn with ours: the same parameters and arithmetic in single precision, a
  boolean mask for attention, masks drawn on the CPU, torch's own dropout, AdamW a tensor at a time,
  and a look at the loss in every step.

Every model and batch is measured in a process of its own, and every peak of memory in another. What
the budget of seconds, or half of the machine's memory, cannot hold is left out and listed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtm.training import Batch
from mtm.training import autocast
from mtm.masks import MTM_SCHEMES, SCHEMES, Mask, MaskSampler
from mtm.model import MtM, MtMConfig
from mtm.recipes import RECIPES
from mtm.training import accumulate, make_optimizer, masked_loss

NEURONS = (548, 601, 652)
N_BINS, N_REGIONS = 100, 8
THEIR_INPUT = {"positions": "learned", "input_counts": "raw"}
MODELS = {"ndt1": THEIR_INPUT, "ndt2": {"tokenizer": "ndt2", **THEIR_INPUT}}
SMALL = {"depth": 1, "width": 32, "heads": 2, "mlp_width": 64, "stitch_width": 40}
RECIPE = RECIPES["mtm"]


def main() -> None:
    """Measure every model and batch in a process of its own, print and write the JSON."""
    options = parse()
    if options.cell:
        model, batch, what = options.cell
        act = peak if what in ("ours", "plain") else measure
        print(json.dumps(act(Bench(options, model, int(batch)), what)))
        return
    cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    report = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
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
    name = f"train_step_{device.replace(' ', '_').lower()}.json" if cuda else "train_step.json"
    path = options.json or Path(__file__).parent / "results" / name
    for name in options.models:
        report["models"][name] = {}
        for numbers in cells(name, options, report["left_out"]):
            share = numbers["step_tflop"] / numbers["step_s"] / report["ceiling_tflops"]
            numbers["share_of_ceiling"] = round(share, 4)
            report["models"][name][str(numbers["batch"])] = numbers
            for key, value in numbers.items():
                print(f"{key:<26} {value}", flush=True)
            if options.json or not options.small:  # each time: a run can take hours
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(report, indent=1) + "\n")
    for line in report["left_out"]:
        print("left out:", line)
    if options.json or not options.small:
        path.write_text(json.dumps(report, indent=1) + "\n")


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
    parser.add_argument("--profile", action="store_true", help="what a step of 16 trials does")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)  # model, batch, what
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    options.batches = sorted(options.batches or ((16, 64, 256, 512) if cuda else (16, 64, 512)))
    options.budget = options.budget or (math.inf if cuda else 300.0)
    return options


def cells(name: str, options: argparse.Namespace, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Numbers of one model, batch by batch; foretold from the one before whether it fits.

    What does not fit, or runs out of memory, is added to ``left_out``, with the reason.
    """
    last: dict[str, Any] = {}
    for batch in options.batches:
        what = "both"
        if last:
            grows = batch / last["batch"]
            ours = len(NEURONS) * last["step_s"] * grows
            if ours > options.budget:
                left_out.append(f"{name}, {batch} trials: a round would take {ours:.0f} s")
                continue
            plain = grows * last.get("plain_step_s", math.inf) * len(NEURONS)
            memory = grows * last.get("plain_peak_gb", math.inf)
            if ours + plain > options.budget or memory > largest_gb(options.device):
                what = "ours alone"
                foretold = f"a round would take {plain:.0f} s and {memory:.0f} GB"
                why = foretold if math.isfinite(plain) else f"as with {last['batch']}"
                left_out.append(f"{name}, {batch} trials, plain: {why}")
        numbers, why = run(name, batch, what, options)
        if numbers is None and what == "both":
            left_out.append(f"{name}, {batch} trials, plain: {why}")
            what = "ours alone"
            numbers, why = run(name, batch, what, options)
        if numbers is None:
            left_out.append(f"{name}, {batch} trials: {why}")
            continue
        for step in ("ours", "plain") if what == "both" else ("ours",):
            most, _ = run(name, batch, step, options)
            prefix = "" if step == "ours" else "plain_"
            numbers |= {f"{prefix}peak_gb": most["peak_gb"]} if most else {}
        last = numbers
        yield numbers


def largest_gb(device: str) -> float:
    """Memory that the plain step may fill: half of a CPU's; a GPU says itself when it is full."""
    if device.startswith("cuda"):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2e9


def run(
    name: str, batch: int, what: str, options: argparse.Namespace
) -> tuple[dict[str, Any] | None, str]:
    """What a process of its own finds, or None and the last line of its error."""
    command = [sys.executable, __file__, *sys.argv[1:], "--cell", name, str(batch), what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), ""
    why = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
    if done.returncode > 0 and "OutOfMemory" not in why:
        sys.exit(done.stderr)
    return None, why


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

    @torch.no_grad()
    def forward(self, n: int, scheme: str) -> None:
        """A pass without dropout and gradients."""
        counts = self.data[n][self.trials].float()
        mask = self.sampler.draw(scheme, counts, self.regions[n])
        with autocast(self.device):
            self.model(counts, scheme, mask, str(n))

    def compiled_step(self) -> Callable[[int, str], None]:
        """The step with the encoder compiled."""
        compiled = torch.compile(self.model.encode, mode=self.options.compile)

        def step(n: int, scheme: str) -> None:
            torch.compiler.cudagraph_mark_step_begin()
            self.model.encode = compiled
            self.step(n, scheme)
            del self.model.encode  # the class's own again

        return step


class Plain(nn.Module):
    """The same model, written as one writes it first."""

    def __init__(self, model: MtM) -> None:
        super().__init__()
        self.model = model
        self.dropout = nn.Dropout(model.config.dropout)
        self.embed_dropout = nn.Dropout(model.config.embed_dropout)

    def forward(self, counts: Tensor, session: str, mask: Mask, prompt: str) -> Tensor:
        """Log-rates (B, T, N) of counts (B, T, N)."""
        model, layers = self.model, self.model.session_layers(session)
        x = model.tokenizer(counts.masked_fill(mask.hidden, 0), layers)
        prefix = torch.stack([layers.token, model.prompt_tokens[model.prompts.index(prompt)]])
        x = self.embed_dropout(torch.cat([prefix.expand(len(x), -1, -1), x], dim=1))
        bins = torch.arange(N_BINS).repeat_interleave(layers.n_patches)
        bins = torch.cat([torch.tensor([-1, -1]), bins])
        allowed = bins[:, None] >= bins if mask.causal else torch.ones(len(bins), len(bins)).bool()
        if mask.causal and model.config.tokenizer == "ndt1":
            allowed = allowed.tril()  # the session token does not look at the prompt
        allowed = allowed.to(x.device)
        for layer in model.layers:
            x = x + self.attend(layer.norm1(x), layer.attention, allowed)
            x = x + self.dropout(layer.down(F.gelu(layer.up(layer.norm2(x)))))
        return model.tokenizer.read_out(model.norm(x)[:, 2:], layers)

    def attend(self, x: Tensor, attention: nn.Module, allowed: Tensor) -> Tensor:
        """Self-attention of (B, L, D)."""
        n_trials, length, width = x.shape
        shape = (n_trials, length, attention.heads, width // attention.heads)
        q = attention.query(x).reshape(shape).transpose(1, 2)
        k = attention.key(x).reshape(shape).transpose(1, 2)
        v = attention.value(x).reshape(shape).transpose(1, 2)
        p = self.dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)
        return attention.out(self.dropout(x.transpose(1, 2).reshape(n_trials, length, width)))


def plain_step(bench: Bench) -> Callable[[int, str], float]:
    """The plain step on a copy of the model, after a look that it computes the same loss."""
    model = Plain(copy.deepcopy(bench.model)).to(bench.device).train()
    groups = [
        {key: group[key] for key in ("params", "weight_decay")}
        for group in make_optimizer(model.model, RECIPE).param_groups
    ]
    optimizer = torch.optim.AdamW(groups, lr=RECIPE.lr, foreach=False, fused=False)
    sampler = MaskSampler(MTM_SCHEMES)
    regions = {n: codes.cpu() for n, codes in bench.regions.items()}

    def loss_of(counts: Tensor, n: int, mask: Mask, scheme: str) -> Tensor:
        log_rates = model(counts, scheme, mask, str(n))
        nll = F.poisson_nll_loss(log_rates, counts, reduction="none")
        return nll[mask.target].mean()

    def step(n: int, scheme: str) -> float:
        counts = bench.data[n][bench.trials].float()
        mask = sampler.draw(scheme, counts.cpu(), regions[n])
        hidden, target = mask.hidden.to(counts.device), mask.target.to(counts.device)
        loss = loss_of(counts, n, Mask(hidden, target, mask.causal), scheme)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model.eval(), bench.model.eval()
    with torch.no_grad():
        for scheme in MTM_SCHEMES:
            counts = bench.data[NEURONS[0]][:4].float()
            mask = bench.sampler.draw(scheme, counts, bench.regions[NEURONS[0]])
            log_rates = bench.model(counts, scheme, mask, str(NEURONS[0]))
            ours = masked_loss(log_rates, counts, mask.target, "mean")
            torch.testing.assert_close(loss_of(counts, NEURONS[0], mask, scheme), ours)
    model.train(), bench.model.train()
    return step


# --------------------------------------------------------------------------------- the measurements


def peak(bench: Bench, what: str) -> dict[str, float]:
    """Peak of memory of a step of the largest session, GB, in a process that does nothing else."""
    step = plain_step(bench) if what == "plain" else bench.step
    for scheme in ("neuron", "causal"):
        step(NEURONS[-1], scheme)
    if bench.device.type == "cuda":
        return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3)}
    return {"peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)}


def measure(bench: Bench, what: str) -> dict[str, Any]:
    """Seconds of ours, of what it is compared with in turn, and of its matrix products alone."""
    options, device = bench.options, bench.device
    made = {n: products(bench, n) for n in NEURONS}
    acts = {
        "step": clock(bench.step, device),
        "step_floor": lambda n, _: alone(made[n][0], device),
    }
    if what == "both":
        acts["plain_step"] = clock(plain_step(bench), device)
    if options.compile:
        acts["compiled_step"] = clock(bench.compiled_step(), device)
    found = rounds(acts, options)
    numbers: dict[str, Any] = {"model": bench.name, "batch": bench.batch, "rounds": found.shape[2]}
    numbers |= compare(acts, found)
    causal = found[0, :, MTM_SCHEMES.index("causal") :: len(MTM_SCHEMES), 0]
    numbers["causal_step_s"] = float(np.median(causal, axis=1).mean()) if causal.size else None
    if device.type == "cuda":
        numbers["waits_for_no_device"] = never_waits(bench)
    if options.profile and bench.batch == 16:
        numbers["profile"] = profile(bench)
    bench.model.eval()
    forward = {
        "forward": clock(bench.forward, device),
        "forward_floor": lambda n, _: alone(made[n][1], device),
    }
    numbers |= compare(forward, rounds(forward, options))
    tokens = bench.batch * np.mean([bench.model.n_tokens(str(n)) + 2 for n in NEURONS])
    operations = np.mean(
        [sum(2 * math.prod(s) * k for s, k in step.items()) for step, _ in made.values()]
    )
    numbers |= {
        "steps_per_s": 1 / numbers["step_s"],
        "tokens_per_s": tokens / numbers["step_s"],
        "step_tflop": operations / 1e12,
    }
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in numbers.items()}


Act = Callable[[int, str], Any]  # of a session's number of neurons and a scheme: (wall, CPU) s


def clock(act: Callable[[int, str], object], device: torch.device) -> Act:
    """An act that returns the wall and CPU seconds it took."""

    def timed(n: int, scheme: str) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        act(n, scheme)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    return timed


def rounds(acts: dict[str, Act], options: argparse.Namespace) -> np.ndarray:
    """Wall and CPU seconds, (acts, sessions, repeats, 2): acts and sessions in turn, then schemes.

    Before, steps with full attention and with causal: of each session where shapes are new to the
    compiler or the device, else of the first. There are fewer repeats, but two or more (one with
    causal attention), when the budget of seconds is spent.
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
    """Seconds of each act, and its ratio to the first.

    A ratio is taken for each pair, one after the other, so that what slows both leaves it alone.
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
    """Whether a step of every scheme gets by without the host waiting for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scheme in MTM_SCHEMES:
            bench.step(NEURONS[0], scheme)
    except RuntimeError as error:
        print(f"{scheme}: {error}", file=sys.stderr)
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def profile(bench: Bench) -> dict[str, float]:
    """The ten operations that take most of the steps' time themselves, and their shares."""
    cuda = bench.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for scheme in MTM_SCHEMES:
            bench.step(NEURONS[-1], scheme)
    spent = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    top = sorted(spent, key=spent.get, reverse=True)[:10]
    return {name: round(spent[name] / sum(spent.values()), 4) for name in top}


# -------------------------------------------------------------------------- matrix products alone

Shape = tuple[int, int, int, int]  # matrices, rows, inner, columns


def products(bench: Bench, n_neurons: int) -> tuple[Counter[Shape], Counter[Shape]]:
    """Matrix products of a step, and of a forward pass, with how often each is made."""
    forward: Counter[Shape] = Counter()
    step: Counter[Shape] = Counter()
    model, config, batch = bench.model, bench.config, bench.batch

    def note(shape: Shape, left_needs_gradient: bool = True) -> None:
        many, rows, inner, columns = shape
        forward[shape] += 1
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
    return step, forward


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
    found = []
    for _ in range(repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        torch.bmm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return np.median(found[1:], axis=0)


def ceiling(device: torch.device, small: bool) -> float:
    """Rate of one large square matrix product, 10^12 operations a second."""
    n = 256 if small else 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return 2 * n**3 / float(seconds((1, n, n, n), dtype, device, 15)[0]) / 1e12


if __name__ == "__main__":
    main()
