"""One call for a GPU: steps, evaluation, a whole training run, agreement with the CPU.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--small] [--json FILE]

No network is needed, and no recordings. In order:

- steps: `mtm.fit` with the paper's NDT1 and NDT2 on 600 neurons x 100 bins, batches of 16, 128 and
  512 trials; in float32, bf16 and compiled bf16. Speeds are those of the last of three epochs,
  beside their share of the ceiling, the rate of a large bf16 matrix product;
- evaluation: co-smoothing of 700 neurons in 120 trials of 100 bins;
- training: recipe `paper` on a simulated animal, and when it first was within 0.005 bits per spike
  of its last validation;
- agreement: the largest difference of log-rates from those of the CPU, in float32.

What no longer fits in the minutes is left out and listed. The results go to
results/gpu_DEVICE.json; `--small` is a tiny run, to try the script.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from typing import Any

import evaluate
import numpy as np
import torch
from common import machine, peak_bytes, speed_parser, speed_path, timed, write_json
from torch.utils.flop_counter import FlopCounterMode
from train_step import SMALL, ceiling

import mtm
from mtm.masks import MTM_SCHEMES, MaskSampler
from mtm.model import Batch, MtM, MtMConfig
from mtm.recipes import RECIPES
from mtm.training import accumulate

TOKENIZERS, BATCHES = ("ndt1", "ndt2"), (16, 128, 512)
PRECISIONS = {  # settings of `fit`
    "float32": {"precision": "float32"},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": "default"},
}
STEPS = 8  # in an epoch


def main() -> None:
    """Measure, print a table, write the JSON after each part."""
    parser = speed_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    device, end = torch.device(options.device), time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = machine(device) | {"small": options.small, "left_out": []}
    path = speed_path("gpu", options)
    report["ceiling_tflops"] = [ceiling(device, options.small)]
    parts = {part.__name__: part for part in (agreement, evaluation, training)}
    for tokenizer, batch, precision in product(TOKENIZERS, BATCHES, PRECISIONS):
        size = batch // 16 if options.small else batch
        name = f"{tokenizer}, {size} trials, {precision}"
        parts[name] = partial(steps, tokenizer, size, precision)
    for name, measure in parts.items():
        if time.monotonic() > end:
            report["left_out"].append(name)
            continue
        try:
            report[name] = measure(device, options.small)
        except torch.OutOfMemoryError:
            report[name] = {"out_of_memory": True}
        print(f"{name}: {report[name]}", flush=True)
        write_json(path, report)
    report["ceiling_tflops"].append(ceiling(device, options.small))
    for numbers in report.values():
        if isinstance(numbers, dict) and "tflops" in numbers:
            numbers["share_of_ceiling"] = numbers["tflops"] / max(report["ceiling_tflops"])
    write_json(path, report)
    print(table(report))


def recording(n_trials: int, n_neurons: int, n_bins: int) -> mtm.Session:
    """Poisson counts of 8 regions, with as many training trials as asked for."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.1, (n_trials + 8, n_bins, n_neurons)).astype(np.uint8)
    parts = np.split(np.arange(n_trials + 8), [n_trials, n_trials + 4])  # train, validation, test
    regions = [f"region {n % 8}" for n in range(n_neurons)]
    return mtm.Session(counts, regions, "poisson", given_split=parts)


def published(tokenizer: str, small: bool) -> MtMConfig:
    """The paper's model, or a tiny one."""
    return MtMConfig.published(tokenizer=tokenizer, **(SMALL if small else {}))


def steps(
    tokenizer: str, batch: int, precision: str, device: torch.device, small: bool
) -> dict[str, Any]:
    """Speed of training steps in the last of three epochs, and the peak of memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    session = recording(STEPS * batch, *((40, 10) if small else (600, 100)))
    how = {"batch_size": batch, "batches_per_step": 1, "epochs": 3, "validations": 3}
    how |= PRECISIONS[precision] | {"device": device, "progress": False}
    config = published(tokenizer, small)
    fit = mtm.fit(session, config, config="paper", **how)
    last = fit.history[-1]
    step = batch / last["trials_per_second"]
    return {
        "step_s": step,
        "trials_per_s": last["trials_per_second"],
        "tokens_per_s": last["tokens_per_second"],
        "peak_gb": peak_bytes(device) / 1e9,  # here, of what ran before as well on a CPU
        "tflops": flops_of_trial(session, config) * batch / step / 1e12,
    }


def flops_of_trial(session: mtm.Session, config: MtMConfig) -> float:
    """Floating-point operations of a training step for one trial; all schemes have the same."""
    model = MtM(config, session.n_bins, {session.name: session.n_neurons}).train()
    counts = torch.as_tensor(session.counts[:1]).float()
    mask = MaskSampler(("neuron",)).draw("neuron", counts, torch.as_tensor(session.region_codes))
    with FlopCounterMode(display=False) as counter:
        accumulate(model, [Batch(counts, "neuron", mask, session.name)], RECIPES["paper"])
    return counter.get_total_flops()


def evaluation(device: torch.device, small: bool) -> dict[str, float]:
    """Seconds of co-smoothing, every neuron left out once, with the paper's model in float32."""
    session = evaluate.recording(small)
    model = evaluate.untrained(session, 2 if small else 5, str(device))
    how: dict[str, Any] = {"tasks": ["co-smoothing"], "trials": np.arange(session.n_trials)}
    wall = [timed(lambda: mtm.evaluate(model, session, **how), device)[1][0] for _ in range(2)]
    return {"neurons": session.n_neurons, "trials": session.n_trials, "seconds": wall[-1]}


def training(device: torch.device, small: bool) -> dict[str, float]:
    """Seconds of recipe `paper` on a simulated animal until it was as good as at its end."""
    [session] = mtm.simulate(1, 60 if small else 300, 12 if small else 96, seed=0)
    model = published("ndt1", small)
    epochs = {"epochs": 4} if small else {}
    fit = mtm.fit(session, model, config="paper", device=device, progress=False, **epochs)
    last = fit.history[-1]
    enough = next(entry for entry in fit.history if entry["mean"] >= last["mean"] - 0.005)
    return {
        "seconds": enough["seconds"],
        "seconds_in_all": last["seconds"],
        "steps": last["step"],
        "validation_bits_per_spike": last["mean"],
    }


def agreement(device: torch.device, small: bool) -> dict[str, float]:
    """Largest difference of log-rates between device and CPU, for full and causal attention."""
    session, found = recording(8, *((40, 10) if small else (600, 100))), {}
    for tokenizer, scheme in product(TOKENIZERS, MTM_SCHEMES[:2]):
        torch.manual_seed(0)
        sessions = {session.name: session.n_neurons}
        model = MtM(published(tokenizer, small), session.n_bins, sessions).eval()
        counts = torch.as_tensor(session.counts[:8]).float()
        codes = torch.as_tensor(session.region_codes)
        mask = MaskSampler((scheme,)).draw(scheme, counts, codes)
        with torch.no_grad():
            here = model.predict_log_rates(counts, scheme, mask, session.name)
            model, moved = model.to(device), [x.to(device) for x in (mask.hidden, mask.target)]
            there = model.predict_log_rates(
                counts.to(device), scheme, mtm.Mask(*moved, mask.causal), session.name
            )
        found[f"{tokenizer}, {scheme}"] = float((here - there.cpu()).abs().max())
    return found


def table(report: dict[str, Any]) -> str:
    """The steps as a Markdown table."""
    lines = [
        f"{report['device']}; ceiling {max(report['ceiling_tflops']):.3g} TFLOP/s",
        "",
        "| | ms a step | trials a second | memory (GB) | share of the ceiling |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in report.items():
        if isinstance(row, dict) and "step_s" in row:
            lines.append(
                f"| {name} | {1000 * row['step_s']:.1f} | {row['trials_per_s']:.0f} | "
                f"{row['peak_gb']:.1f} | {row['share_of_ceiling']:.1%} |"
            )
    return "\n".join([*lines, *(f"left out: {name}" for name in report["left_out"])])


if __name__ == "__main__":
    main()
