"""The command line: python -m mtm simulate | prepare | train | evaluate | export.

Each command is a function. Its parameters are the arguments of the command line: keyword-only ones
are flags, and their annotations and defaults say what they take.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import Any

import torch

from mtm import bwb, checkpoint, distributed, official, recipes
from mtm.baselines import BASELINES, fit_baseline
from mtm.bwb import submission
from mtm.data import huggingface, ibl, kilosort, nwb, steinmetz
from mtm.data.collection import Sessions, prepare
from mtm.decoding import decode_by_region
from mtm.evaluation import evaluate
from mtm.inputs import SessionError
from mtm.masks import SCHEMES
from mtm.model import CHOICES as MODEL_CHOICES
from mtm.prediction import mean_rates, oracle
from mtm.recipes import RECIPES, TrainConfig
from mtm.report import Report, score_table
from mtm.simulation import simulate
from mtm.training import fit, model_config

GRID = ("align", "window", "bin_size")
READERS: dict[str, tuple[str, Any, tuple[str, ...]]] = {  # what is read, module, its options
    "ibl": ("IBL recordings through ONE", ibl, (*GRID, "atlas", "trial_filter", "units")),
    "kilosort": ("folders of Kilosort or phy", kilosort, ("align_times", *GRID, "units")),
    "nwb": ("NWB files, on disk or by URL", nwb, (*GRID, "traces")),
    "steinmetz": ("folders of Steinmetz et al. 2019", steinmetz, (*GRID, "trial_filter", "units")),
    "huggingface": ("folders of the authors' rows", huggingface, ()),
    "bwb": ("files of BrainWideBench", bwb, (*GRID, "atlas", "trial_filter", "split")),
}
EIDS = {
    "paper": official.PAPER_EIDS,
    "held-out": official.HELD_OUT_EIDS,
    "repeated-site": official.REPEATED_SITE_EIDS,
}
HELP = {  # of the arguments of all commands
    "build": "of the sessions to download: selected_units (default) or all_units",
    "download": "download these (ids, or their beginnings) to OUT/downloads; it resumes",
    "align": "the event in each trial at which the window has its 0",
    "align_times": "file of event times (.npy, or .csv of trials), in each folder or for all",
    "atlas": "how finely regions are named: Allen, Beryl or Cosmos",
    "baselines": f"fit and score these too: {', '.join(map(repr, BASELINES))}",
    "batch_size": "trials predicted at once (default by the device)",
    "bin_size": "length of a bin, seconds",
    "by_region": "a behaviour to decode from one region at a time as well",
    "depth": "layers, which set width, heads and dropout (default 2; paper 5)",
    "deterministic": "one model will do, having no random part",
    "device": "cpu, cuda, cuda:1, mps (default a GPU if there is one)",
    "eids": f"{', '.join(EIDS)}, or a file of session ids (default all that ONE finds)",
    "inputs": "folders that train wrote, one for each seed, and session files (.h5)",
    "json": "file for the scores",
    "label": "name of the model at the benchmark",
    "model": "folder that train wrote",
    "neurons": "of each session",
    "out": "folder to write to",
    "overwrite": "make again what is there",
    "patch_size": "neurons in a patch of ndt2 (default 128)",
    "recipe": "ours, or the paper's settings",
    "recordings": "files, folders or URLs; for ibl, ONE's folder",
    "restart": "begin anew, and replace what OUT holds",
    "save_every": "seconds between two saved states of the run",
    "seed": "same seed, same data; for export, of each model, else 43, 44, ...",
    "sessions": "session files or folders of them; for simulate, how many",
    "split": "ts1, ts2 or pretrain: of the file's splits; auto is the one that scores its units",
    "split_seed": "of the split whose test trials are scored (default that of the training)",
    "start": "folder of a model to fine-tune; sessions it does not know get their own layers",
    "tasks": "some tasks and behaviours (default all)",
    "tokenizer": "a token per bin, stitched (ndt1), or per patch of neurons (default ndt1)",
    "traces": "continuous behaviour, by name",
    "trial_filter": "only trials that pass: reaction-time (ibl), included (steinmetz), valid (bwb)",
    "trials": "of each session",
    "units": "good keeps only well isolated units",
    "window": "start and stop, seconds",
    "username": "download from IBL's public server, with a saved log-in",
    "workers": "processes (default one per core, up to 4)",
}
CHOICES: dict[str, Any] = {"recipe": RECIPES, "baselines": BASELINES, "schemes": SCHEMES}
CHOICES |= {"units": ("good",), "tokenizer": MODEL_CHOICES["tokenizer"], **recipes.CHOICES}
ERRORS = (ValueError, KeyError, OSError, ImportError, ArithmeticError, RuntimeError, AssertionError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 for an error in the input, printed in a line."""
    options = vars(parse(arguments))
    command, run, traceback = map(options.pop, ("command", "run", "traceback"))

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"mtm {command}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn  # without file name and line of code
            run(**options)
    except ERRORS as error:  # torch asserts that a device is there
        if traceback:
            raise
        # The text of a KeyError is its argument, quoted; show the argument itself.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"mtm {command}: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resume = "; the same command resumes it" * (command == "train")
        print(f"mtm {command}: stopped{resume}", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line; a wrong one ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mtm",
        description="Multi-task masking: recordings in, a trained model and honest scores out.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run in (run_simulate, run_train, run_evaluate, run_export):
        _command(commands, run.__name__[4:], run)
    prepare = commands.add_parser("prepare", help="turn recordings into session files")
    origins = prepare.add_subparsers(dest="origin", required=True, metavar="ORIGIN")
    for origin, (what, module, names) in READERS.items():
        command = _command(origins, origin, run_prepare, f"From {what}.")
        known = inspect.signature(module.load_session).parameters
        for name in names:
            _add(command, known[name], HELP[name])
        for name in {"ibl": ("username", "eids"), "bwb": ("build",)}.get(origin, ()):
            command.add_argument(f"--{name}", default=argparse.SUPPRESS, help=HELP[name])
        if origin == "bwb":
            command.add_argument("--sessions", nargs="+", help=HELP["download"])
    return parser.parse_args(arguments)


def _command(commands: Any, name: str, run: Callable[..., None], what: str = "") -> Any:
    """A parser of one command, from the signature and the docstring of its function."""
    text = f"{what} {inspect.getdoc(run)}".strip().replace("%", "%%")
    parser = commands.add_parser(name, help=what or text.partition(".")[0], description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    for argument in inspect.signature(run).parameters.values():
        if argument.name in HELP:
            _add(parser, argument, HELP[argument.name], argument.kind is not argument.KEYWORD_ONLY)
    if run is run_train:
        group = parser.add_argument_group("settings of training", "'none' stands for no value.")
        docs = str(inspect.getdoc(TrainConfig)).replace("``", "").replace("%", "%%")
        texts = dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", docs, re.M))
        for name, setting in inspect.signature(TrainConfig).parameters.items():
            text = " ".join(texts[name].split()).rstrip(".")
            ours, paper = (_shown(getattr(RECIPES[key], name)) for key in ("mtm", "paper"))
            default = ours if ours == paper else f"{ours}, paper {paper}"
            _add(group, setting.replace(default=None), f"{text} (default {default})")
    return parser


def _add(parser: Any, argument: inspect.Parameter, text: str, positional: bool = False) -> None:
    """Add an argument by its annotation. Where it is not given, it is left out."""
    name, kind = argument.name, str(argument.annotation).removesuffix(" | None")
    flag: dict[str, Any] = {"default": argparse.SUPPRESS}
    if argument.default is argument.empty:
        flag |= {} if positional else {"required": True}
    elif argument.default not in (None, False, ()):
        text += f" (default {_shown(argument.default)})"
    if name in CHOICES:
        flag["choices"] = CHOICES[name]
    types: dict[str, Any] = {"int": int, "float": float, "Path": Path}
    if kind == "bool":
        flag["action"] = argparse.BooleanOptionalAction
    elif kind.startswith("dict"):
        flag |= {"nargs": "+", "type": _pair, "metavar": "NAME=VALUE"}
    elif many := re.match(r"(?:list|tuple|Collection|Sequence)\[(\w+)", kind):
        n = {"window": 2, "recordings": "*"}.get(name, "+")
        flag |= {"nargs": n, "type": types.get(many[1], str)}
    elif kind in ("int", "float", "str") and kind != argument.annotation:
        flag["type"] = _optional(types.get(kind, str))
    else:
        flag["type"] = types.get(kind, str)
    parser.add_argument(name if positional else f"--{name.replace('_', '-')}", help=text, **flag)


def run_simulate(
    out: Path,
    *,
    sessions: int = 3,
    trials: int = 200,
    neurons: int = 96,
    seed: int = 0,
) -> None:
    """Make sessions of simulated animals, with known firing rates.

    Write OUT/sim-0.npz, OUT/sim-1.npz, ...: animals that share a circuit and a task but have their
    own neurons. Their true rates are kept, so scores have a ceiling.
    """
    for session in simulate(sessions, trials, neurons, seed=seed):
        print(session.save(out / f"{session.name}.npz"))


def run_prepare(
    origin: str,
    recordings: Sequence[str] = (),
    *,
    out: Path,
    workers: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Align recordings to an event, bin them and write OUT/<name>.npz, in parallel.

    Files that are there already, made with the same options, stay as they are; recordings that
    cannot be read are skipped and listed.
    """
    how: dict[str, Any] = {"workers": workers, "overwrite": overwrite}
    if origin == "ibl":
        if len(recordings) != 1:
            raise ValueError("name one folder, the one that ONE keeps its files in")
        one = ibl.connect(Path(*recordings), username=options.pop("username", None))
        eids: Sequence[str] = EIDS.get(listed := options.pop("eids", ""), ())
        if not eids:
            eids = Path(listed).read_text().split() if listed else ibl.search(one)
        if not eids:
            raise SessionError(f"ONE finds no such session with spikes in {recordings[0]}")
        done = ibl.prepare(one, eids, out, **how, **options)
    else:
        listed = [each if "://" in each else Path(each) for each in recordings]
        build = options.pop("build", "selected_units")
        if wanted := options.pop("sessions", None):
            listed += bwb.fetch(wanted, out / "downloads", build)
        if not listed:
            raise ValueError("name files, or with --sessions what to download")
        done = prepare(READERS[origin][1].load_session, listed, out, **how, **options)
    print(done)
    if not done.paths:
        raise SessionError(f"none of the {len(done.outcomes)} recordings could be read")
    print(f"session files in {out}")


def run_train(
    sessions: list[Path],
    *,
    out: Path,
    recipe: str = "mtm",
    depth: int | None = None,
    tokenizer: str | None = None,
    patch_size: int | None = None,
    start: Path | None = None,
    restart: bool = False,
    save_every: float = 300.0,
    device: str | None = None,
    **settings: Any,
) -> None:
    """Train a model on session files.

    Train on the training trials of all sessions, and keep in OUT the weights that predict hidden
    entries of the validation trials best. The same command resumes a run that was stopped. To train
    with several processes, at most --batches-per-step: torchrun --nproc-per-node N -m mtm train ...
    """
    for name in recipes.SHARES:
        if name in settings:
            settings[name] = dict(filter(None, settings[name]))
    config = recipes.recipe(recipe, **settings)
    sizes: dict[str, Any] = {"depth": depth, "tokenizer": tokenizer, "patch_size": patch_size}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    if start and sizes:
        raise ValueError("--start: a trained model keeps its --depth, --tokenizer and --patch-size")
    if patch_size and tokenizer != "ndt2":
        raise ValueError("--patch-size: only --tokenizer ndt2 has patches")
    with distributed.process_group(torch.device(device) if device else None) as place:
        if distributed.rank() > 0:  # process 0 prints for all
            sys.stdout = open(os.devnull, "w")
        data = Sessions(sessions)
        print(data, flush=True)
        model = checkpoint.load(start) if start else model_config(config, **sizes)
        how: dict[str, Any] = {"folder": out, "restart": restart, "save_every": save_every}
        result = fit(data, model, config=config, device=place, **how)
        print(f"best validation, epoch {result.best['epoch']}, bits per spike on hidden entries:")
        for name, value in result.best["validation"].items():
            print(f"  {name:<14} {value:7.3f}")
        n_parameters = sum(parameter.numel() for parameter in result.model.parameters())
        print(f"model of {n_parameters:,} parameters in {out}")


def run_evaluate(
    model: Path,
    sessions: list[Path],
    *,
    tasks: list[str] | None = None,
    baselines: list[str] | None = None,
    by_region: str | None = None,
    split_seed: int | None = None,
    batch_size: int | None = None,
    json: Path | None = None,
    device: str | None = None,
) -> None:
    """Score a model on the test trials of sessions.

    Score hidden activity in the four activity tasks and decode behaviour, beside the mean-rate
    model and, for simulated sessions, the true rates. The JSON has the mean over sessions of each
    task and behaviour (bits per spike, accuracy, R2), and everything else under 'details'.
    """
    trained, data = checkpoint.load(model).to(_device(device)), Sessions(sessions)
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.open("a").close()  # what cannot be written should fail now
    how: dict[str, Any] = {"split_seed": split_seed, "batch_size": batch_size}
    reports = {"MtM": evaluate(trained, data, tasks=tasks, progress=True, **how)}
    how["split_seed"] = seed = split_seed if split_seed is not None else trained.split_seed or 0
    others: dict[str, Any] = {"mean rate": {each.name: mean_rates(each, seed) for each in data}}
    if all(session.rates is not None for session in data):
        others["oracle"] = {session.name: oracle(session) for session in data}
    for name in baselines or ():
        print(f"fitting {name} to the training trials", flush=True)
        others[name] = fit_baseline(name, list(data), split_seed=seed)
    for name, predictor in others.items():
        reports[name] = evaluate(predictor, data, tasks=tasks, progress=True, **how)
    _print(reports)
    regions: dict[str, Any] = {}
    for session in data if by_region else ():
        print(f"\n{by_region} in {session.name!r} from one region at a time:")
        decoded = decode_by_region(trained, session, str(by_region), **how)
        print("\n".join(f"  {region:<12} {result}" for region, result in decoded.items()))
        regions[session.name] = {region: result.to_dict() for region, result in decoded.items()}
    if json:
        ours, found = reports["MtM"], {name: each.to_dict() for name, each in reports.items()}
        details: dict[str, Any] = {"model": str(model), "by_region": regions}
        details |= {"sessions": ours.sessions, "test_trials": ours.n_trials}
        details |= {"reports": found, "left_out": ours.left_out}
        scores = {task: found["MtM"][task][s.score] for task, s in ours.tasks.items()}
        json.write_text(dumps(scores | {"details": details}, indent=1, allow_nan=False) + "\n")
        print(f"\nscores in {json}")


def _print(reports: dict[str, Report]) -> None:
    """Print the model's report, and the tables of all."""
    null = "bits_per_spike_train_null"
    print(f"\n{reports['MtM']}\n")
    print("beside others (activity: over each neuron's mean in the scored test entries):")
    print(score_table(reports))
    if any("spikes" in scores.table for scores in reports["MtM"].tasks.values()):
        print("\nactivity over each neuron's mean in the training trials:")
        print(score_table(reports, null))
        if "oracle" in reports:
            ours, best = (reports[name].means(null) for name in ("MtM", "oracle"))
            print("\nof the oracle's: " + ", ".join(f"{t} {ours[t] / best[t]:.0%}" for t in ours))


def run_export(
    inputs: list[Path],
    *,
    out: Path,
    label: str,
    tasks: list[str] | None = None,
    seed: list[int] | None = None,
    deterministic: bool = False,
    device: str | None = None,
) -> None:
    """Write predictions for BrainWideBench, check and zip them.

    Predict the test parts of session files of BrainWideBench with models trained on them, write
    OUT/predictions/LABEL/..., check it against the session files, and zip it to OUT/LABEL.zip.
    Tasks on single units (ts2) need the build of selected units, tasks on behaviour (ts1) that of
    all units, and a model for each build; both may be given at once. Models trained on the test
    part of a file are refused. Regions of units (ts3) are not among the tasks.
    """
    folders = [path for path in inputs if path.is_dir()]
    files = [path for path in inputs if not path.is_dir()]
    if not folders or not files:
        raise ValueError("name one or more folders of models, and one or more session files (.h5)")
    models = [checkpoint.load(folder).to(_device(device)) for folder in folders]
    predictions = out / "predictions"
    submission.export(models, files, predictions, label, tasks=tasks, seeds=seed, progress=True)
    path = out / f"{label}.zip"
    submission.pack(predictions, label, path, files, deterministic=deterministic)
    print(f"{path} can be uploaded")


def _device(name: str | None) -> torch.device:
    return torch.device(name) if name else distributed.pick_device()


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        value = [f"{name}={number:g}" for name, number in value.items()]
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else str(value).lower()


def _pair(text: str) -> tuple[str, float] | None:
    """``name=0.3``, or "none"."""
    name, _, number = text.partition("=")
    return None if text == "none" else (name, float(number))


def _optional(number: Any) -> Callable[[str], Any]:
    """A type of argument: a number, or "none"."""

    def read(text: str) -> Any:
        return None if text == "none" else number(text)

    read.__name__ = number.__name__  # in error messages
    return read
