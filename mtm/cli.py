"""The command line: python -m mtm simulate | prepare | train | evaluate | export.

Each command is a function of the parsed arguments. An error in the input is printed in one line,
with exit status 1; a wrong command line ends with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mtm import bwb, checkpoint, distributed, official
from mtm.baselines import BASELINES, fit_baseline
from mtm.bwb import submission
from mtm.data import huggingface, ibl, nwb, steinmetz, synthetic
from mtm.data.collection import Prepared, Sessions, prepare
from mtm.data.recording import public
from mtm.decoding import decode_by_region
from mtm.evaluation import evaluate
from mtm.masks import SCHEMES
from mtm.model import CHOICES as MODEL_CHOICES
from mtm.model import MtM
from mtm.prediction import mean_rates, oracle
from mtm.recipes import CHOICES, RECIPES, TrainConfig, recipe
from mtm.report import Report, score_table
from mtm.session import SessionError
from mtm.simulation import simulate
from mtm.training import fit, model_config

EXAMPLE = """example, from nothing to scores in a few minutes:
  python -m mtm simulate sessions --sessions 3
  python -m mtm train sessions/*.npz --out model --depth 1
  python -m mtm evaluate model sessions/sim-0.npz --json scores.json
"""
GRID = ("align", "window", "bin_size")
READERS: dict[str, tuple[str, Any, tuple[str, ...]]] = {  # what is read, module, its options
    "ibl": ("IBL recordings through ONE", ibl, (*GRID, "atlas", "trial_filter", "units")),
    "nwb": ("NWB files, on disk or by URL", nwb, (*GRID, "traces")),
    "steinmetz": ("folders of Steinmetz et al. 2019", steinmetz, (*GRID, "trial_filter", "units")),
    "huggingface": ("folders of the authors' rows", huggingface, ()),
    "bwb": ("files of BrainWideBench", bwb, (*GRID, "atlas", "trial_filter", "split")),
}
READER_OPTIONS: dict[str, dict[str, Any]] = {
    "align": {"metavar": "EVENT", "help": "the event in each trial at which the window has its 0"},
    "window": {"type": float, "nargs": 2, "metavar": ("START", "STOP"), "help": "seconds"},
    "bin_size": {"type": float, "metavar": "SECONDS", "help": "length of a bin"},
    "atlas": {"help": "how finely regions are named: Allen, Beryl or Cosmos"},
    "trial_filter": {"metavar": "NAME", "help": "only trials that pass: reaction-time (ibl), "
                     "included (steinmetz), valid (bwb)"},
    "units": {"choices": ("good",), "help": "keep only well isolated units"},
    "traces": {"nargs": "+", "metavar": "SERIES", "help": "continuous behaviour, by name"},
    "split": {"choices": ("ts1", "ts2", "pretrain"), "help": "of the file's splits; auto is the "
              "one by which the file's units are scored"},
}  # fmt: skip
EIDS = {
    "paper": official.PAPER_EIDS,
    "held-out": official.HELD_OUT_EIDS,
    "repeated-site": official.REPEATED_SITE_EIDS,
}
SEARCH = {  # terms of ibl.search
    "project": "only sessions of it",
    "lab": "only sessions of it",
    "subject": "only sessions of it",
    "region": "only sessions with a probe through it",
    "quality": "only sessions whose spike times were graded so (PASS, WARNING) or better",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parse(arguments)

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"mtm {options.command}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn  # without file name and line of code
            options.run(options)
    except (
        ValueError,
        KeyError,
        OSError,
        ImportError,
        ArithmeticError,
        RuntimeError,
        AssertionError,
    ) as error:  # torch asserts that a device is there
        # The text of a KeyError is its argument, quoted; show the argument itself.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        who = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        print(f"mtm {options.command}{who}: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resume = "; the same command resumes it" * (options.command == "train")
        print(f"mtm {options.command}: stopped{resume}", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line; a wrong one ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mtm",
        description="Multi-task masking: recordings in, a trained model and honest scores out.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_simulate, _add_prepare, _add_train, _add_evaluate, _add_export):
        add(commands)
    return parser.parse_args(arguments)


class _Help(argparse.HelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        unset = any(action.default is x for x in (None, False, argparse.SUPPRESS))
        shown = action.option_strings and not unset
        return (action.help or "") + " (default %(default)s)" * bool(shown)


def _command(
    commands: Any, name: str, run: Callable[..., None], short: str, long: str, **options: Any
) -> argparse.ArgumentParser:
    """A parser of one command, with a short and a long description."""
    options |= {"help": short, "description": long, "formatter_class": _Help}
    parser = commands.add_parser(name, **options)
    parser.set_defaults(run=run)
    return parser


def _add_simulate(commands: Any) -> None:
    add = _command(
        commands,
        "simulate",
        run_simulate,
        "make sessions of simulated animals, with known firing rates",
        "Write OUT/sim-0.npz, OUT/sim-1.npz, ...: animals that share a circuit and a "
        "task but have their own neurons. Their true rates are kept, so scores have a ceiling.",
    ).add_argument
    add("out", type=Path, metavar="OUT", help="folder to write to")
    add("--sessions", type=int, default=3, help="how many")
    add("--trials", type=int, default=200, help="of each session")
    add("--neurons", type=int, default=96, help="of each session")
    add("--seed", type=int, default=0, help="same seed, same data")
    add("--alf", action="store_true", help="also write OUT/alf, a folder tree as the International "
        "Brain Laboratory publishes its recordings, which ONE can search and load")  # fmt: skip


def run_simulate(options: argparse.Namespace) -> None:
    """Write simulated sessions, as .npz and as an ALF tree."""
    sessions = simulate(options.sessions, options.trials, options.neurons, seed=options.seed)
    for session in sessions:
        print(session.save(options.out / f"{session.name}.npz"))
    if options.alf:
        for session in sessions:
            synthetic.write_alf(session, options.out / "alf")
        for eid, path in synthetic.index_alf(options.out / "alf").items():
            print(f"{path}  eid {eid}")


def _add_prepare(commands: Any) -> None:
    sub = commands.add_parser(
        "prepare",
        help="turn recordings into session files",
        description="Read recordings, align them to an event, bin them and write OUT/<name>.npz, "
        "in parallel. Files that are there already, made with the same options, stay as they are; "
        "recordings that cannot be read are skipped and listed.",
    )
    origins = sub.add_subparsers(dest="origin", required=True, metavar="ORIGIN")
    for origin, (what, module, names) in READERS.items():
        add = _command(origins, origin, run_prepare, what, f"From {what}.").add_argument
        if origin == "ibl":
            add("recordings", type=Path, metavar="CACHE", help="ONE's folder")
            add("--username", help="download from IBL's public server, with a saved log-in")
            add("--eids", metavar="LIST", help=f"{', '.join(EIDS)}, or a file of session ids")
            for term, text in SEARCH.items():
                add(f"--{term}", help=text)
        else:
            add("recordings", nargs="+", metavar="RECORDING", help="files, folders or URLs")
        add("--out", type=Path, required=True, metavar="OUT", help="folder to write to")
        add("--workers", type=int, help="processes (default one per core, up to 4)")
        add("--overwrite", action="store_true", help="make again what is there")
        defaults = inspect.signature(module.load_session).parameters
        for name in names:
            flag: dict[str, Any] = {"default": argparse.SUPPRESS, **READER_OPTIONS[name]}
            flag["help"] += f" (default {_shown(defaults[name].default)})"
            add(f"--{name.replace('_', '-')}", **flag)


def run_prepare(options: argparse.Namespace) -> None:
    """Turn recordings of one origin into session files."""
    given = {name: value for name, value in vars(options).items() if name in READER_OPTIONS}
    given |= {"workers": options.workers, "overwrite": options.overwrite}
    by_origin = _prepare_ibl if options.origin == "ibl" else _prepare_files
    done = by_origin(options, given)
    print(done)
    if not done.paths:
        raise SessionError(f"none of the {len(done.outcomes)} recordings could be read")
    print(f"session files in {options.out}")


def _prepare_ibl(options: argparse.Namespace, given: dict[str, Any]) -> Prepared:
    """Sessions that ONE knows: all it finds, or those of a list."""
    terms = {key: getattr(options, key) for key in SEARCH}
    if options.eids and any(terms.values()):
        raise ValueError("--eids names the sessions; it does not go with a search for others")
    one = ibl.connect(options.recordings, username=options.username)
    eids: Sequence[str]
    if options.eids in EIDS:
        eids = EIDS[options.eids]
    elif options.eids:
        eids = Path(options.eids).read_text().split()
    elif not (eids := ibl.search(one, **terms)):
        raise SessionError(f"ONE finds no such session with spikes in {options.recordings}")
    return ibl.prepare(one, eids, options.out, **given)


def _prepare_files(options: argparse.Namespace, given: dict[str, Any]) -> Prepared:
    """Files, folders or URLs of any other origin."""
    named: dict[str, Any] = {}
    for recording in options.recordings:
        url = "://" in recording
        # The name of a URL is what is public of it, and not too long for a file.
        words = re.sub(r"\W+", "-", public(recording))[-100:].strip("-")
        name = words if url else Path(recording).stem
        if name in named:
            raise ValueError(f"two recordings are named {name!r}; prepare them into two folders")
        named[name] = recording if url else Path(recording)
    return prepare(READERS[options.origin][1].load_session, named, options.out, **given)


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        run_train,
        "train a model on session files",
        "Train on the training trials of all sessions, and keep in DIR the weights "
        "that predict hidden entries of the validation trials best. The same command resumes a run "
        "that was stopped. To train with several processes, at most --batches-per-step: torchrun "
        "--nproc-per-node N -m mtm train ...",
        usage="%(prog)s SESSION.npz [SESSION.npz ...] --out DIR [options]",
    )
    add = parser.add_argument
    _add_sessions(add)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the model")
    add("--recipe", choices=tuple(RECIPES), default="mtm", help="ours, or the paper's settings")
    add("--depth", type=int, help="layers, which set width, heads and dropout (default 2, "
        "or 5 with --recipe paper)")  # fmt: skip
    add("--tokenizer", choices=MODEL_CHOICES["tokenizer"], help="a token per bin, stitched (ndt1), "
        "or per patch of neurons (ndt2) (default ndt1)")  # fmt: skip
    add("--patch-size", type=int, help="neurons in a patch of ndt2 (default 128)")
    add("--start", type=Path, metavar="MODEL", help="folder of a model to fine-tune; sessions it "
        "does not know get layers of their own")  # fmt: skip
    add("--restart", action="store_true", help="begin anew, and replace what DIR holds")
    add("--save-every", type=float, default=300.0, metavar="SECONDS", help="between two saved "
        "states of the run")  # fmt: skip
    _add_device(add)
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of TrainConfig, described by its docstring."""
    group = parser.add_argument_group(
        "settings of training", "Defaults are the recipe's. 'none' stands for no value."
    )
    docs = inspect.getdoc(TrainConfig) or ""
    described = dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", docs, re.M))
    for setting in dataclasses.fields(TrainConfig):
        name, kind = setting.name, str(setting.type)
        text = " ".join(described[name].split()).replace("``", "").replace("%", "%%").rstrip(".")
        ours, paper = (_shown(getattr(RECIPES[key], name)) for key in ("mtm", "paper"))
        text += f" (default {ours}{'' if ours == paper else f', paper {paper}'})"
        flag: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind == "bool":
            flag["action"] = argparse.BooleanOptionalAction
        elif kind == "tuple[str, ...]":
            flag |= {"nargs": "+", "choices": tuple(SCHEMES), "metavar": "SCHEME"}
        elif kind == "dict[str, float]":
            flag |= {"nargs": "+", "type": _pair, "metavar": "SCHEME=SHARE"}
        elif name in CHOICES:
            flag["choices"] = CHOICES[name]
        else:
            flag |= {"type": _number(kind), "metavar": kind.partition(" ")[0].upper()}
        group.add_argument(f"--{name.replace('_', '-')}", **flag)


def run_train(options: argparse.Namespace) -> None:
    """Train a model, alone or as one of several processes."""
    with distributed.process_group(_device(options)) as device:
        if distributed.rank() > 0:  # process 0 prints for all
            sys.stdout = open(os.devnull, "w")
        _train(options, device or distributed.pick_device())


def _train(options: argparse.Namespace, device: torch.device) -> None:
    sessions = _sessions(options)
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    changes = {name: value for name, value in vars(options).items() if name in names}
    if "ratios" in changes:
        changes["ratios"] = dict(changes["ratios"])
    config = recipe(options.recipe, **changes)
    sizes = {key: getattr(options, key) for key in ("depth", "tokenizer", "patch_size")}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    if options.start and sizes:
        flag = min(sizes).replace("_", "-")
        raise ValueError(f"--{flag}: the model of --start has its sizes already")
    if config.tune != "all" and not options.start:
        raise ValueError("--tune: there is no trained model to tune; name one with --start")
    if options.patch_size and options.tokenizer != "ndt2":
        raise ValueError("--patch-size: only --tokenizer ndt2 has patches")
    start = checkpoint.load(options.start) if options.start else model_config(config, **sizes)
    model = start.config if isinstance(start, MtM) else start
    print(
        f"{len(sessions)} sessions, {sessions.to_frame()['neurons'].sum()} neurons; recipe "
        f"{options.recipe}, {model.tokenizer}, depth {model.depth} (width {model.width}), "
        f"{config.epochs} epochs",
        flush=True,
    )
    run = {"folder": options.out, "restart": options.restart, "save_every": options.save_every}
    result = fit(sessions, start, config=config, device=device, **run)
    print(f"best validation, epoch {result.best['epoch']}, bits per spike on hidden entries:")
    for name, value in result.best["validation"].items():
        print(f"  {name:<14} {value:7.3f}")
    n_parameters = sum(parameter.numel() for parameter in result.model.parameters())
    print(f"model of {n_parameters:,} parameters in {options.out}")


def _add_evaluate(commands: Any) -> None:
    add = _command(
        commands,
        "evaluate",
        run_evaluate,
        "score a model on the test trials of sessions",
        "Score hidden activity in the four activity tasks and decode behaviour, beside "
        "the mean-rate model and, for simulated sessions, the true rates. The JSON has a number "
        "for each of co-smoothing, forward-prediction, inter-region, intra-region (bits per "
        "spike), choice (accuracy) and each continuous behaviour (R2), mean over sessions, and "
        "everything else under 'details'.",
    ).add_argument
    add("model", type=Path, metavar="DIR", help="folder that train wrote")
    _add_sessions(add)
    add("--tasks", nargs="+", help="some tasks and behaviours (default all)")
    add("--baselines", nargs="+", choices=BASELINES, metavar="NAME", help="fit and "
        "score these too: " + ", ".join(map(repr, BASELINES)))  # fmt: skip
    add("--by-region", metavar="BEHAVIOUR", help="decode it from one region at a time as well")
    add("--split-seed", type=int, help="of the split whose test trials are scored (default the one "
        "that the model was trained with; imported checkpoints do not know it)")  # fmt: skip
    add("--batch-size", type=int, help="trials predicted at once (default by the device)")
    add("--json", type=Path, metavar="FILE", help="write the scores here as well")
    add("--report", type=Path, metavar="FILE", help="and the tables, by neuron, here, as JSON")
    _add_device(add)


def run_evaluate(options: argparse.Namespace) -> None:
    """Print the scores of a model on test trials, beside the null, the oracle and baselines."""
    model = checkpoint.load(options.model).to(_device(options) or distributed.pick_device())
    sessions = _sessions(options)
    for path in filter(None, (options.json, options.report)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # what cannot be written should fail now
    if unknown := [name for name in sessions.names if name not in model.session_names]:
        raise SessionError(
            f"the model was not trained on session {unknown[0]!r}; it knows: "
            f"{', '.join(model.session_names)}; python -m mtm train --start MODEL adds a session"
        )
    seed = model.split_seed if options.split_seed is None else options.split_seed
    if seed is None:
        raise ValueError(
            "it is not known which trials this model was trained on; --split-seed 0 scores it on "
            "the test trials of that split, some of which may be its training trials"
        )
    how = {"split_seed": seed, "batch_size": options.batch_size}
    regions = {}
    if options.by_region:
        regions = _by_region(model, sessions, options.by_region, **how)
    reports = {
        name: evaluate(predictor, sessions, tasks=options.tasks, progress=True, **how)
        for name, predictor in _predictors(model, sessions, seed, options.baselines or []).items()
    }
    _print(reports)
    if options.report:
        reports["MtM"].to_json(options.report)
        print(f"\nneuron by neuron in {options.report}")
    if options.json:
        scores = _scores(reports)
        scores["details"] |= {"model": str(options.model), "by_region": regions}
        options.json.write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")
        print(f"\nscores in {options.json}")


def _predictors(
    model: MtM, sessions: Sessions, seed: int, baselines: Sequence[str]
) -> dict[str, Any]:
    """The model, the null, the oracle where true rates are known, and fitted baselines."""
    predictors: dict[str, Any] = {
        "MtM": model,
        "mean rate": {session.name: mean_rates(session, seed) for session in sessions},
    }
    if all(session.rates is not None for session in sessions):
        predictors["oracle"] = {session.name: oracle(session) for session in sessions}
    for name in baselines:
        print(f"fitting {name} to the training trials", flush=True)
        predictors[name] = fit_baseline(name, list(sessions), split_seed=seed)
    return predictors


def _print(reports: dict[str, Report]) -> None:
    """Print the model's report, and the tables of all."""
    print(f"\n{reports['MtM']}\n")
    print("beside others (activity: over each neuron's mean in the scored test entries):")
    print(score_table(reports))
    if any("spikes" in scores.table for scores in reports["MtM"].tasks.values()):
        print("\nactivity over each neuron's mean in the training trials:")
        print(score_table(reports, "bits_per_spike_train_null"))
        if "oracle" in reports:
            shares = reports["MtM"].share(reports["oracle"]).items()
            print("\nof the oracle's: " + ", ".join(f"{t} {share:.0%}" for t, share in shares))


def _by_region(
    model: MtM, sessions: Sessions, behaviour: str, **how: Any
) -> dict[str, dict[str, Any]]:
    """Decode a behaviour from one region at a time; printed and returned."""
    found = {}
    for session in sessions:
        print(f"\n{behaviour} in {session.name!r} from one region at a time:")
        decoded = decode_by_region(model, session, behaviour, **how)
        for region, result in decoded.items():
            print(f"  {region:<12} {result}")
        found[session.name] = {region: result.to_dict() for region, result in decoded.items()}
    return found


def _scores(reports: dict[str, Report]) -> dict[str, Any]:
    """One number per task and behaviour, and everything else under "details"; NaN = None."""
    details = {name: report.to_dict() for name, report in reports.items()}
    ours = reports["MtM"]
    scores: dict[str, Any] = {t: details["MtM"][t][s.score] for t, s in ours.tasks.items()}
    scores["details"] = {
        "sessions": ours.sessions,
        "test_trials": ours.n_trials,
        "reports": details,
        "left_out": ours.left_out,
    }
    return scores


def _add_export(commands: Any) -> None:
    add = _command(
        commands,
        "export",
        run_export,
        "write predictions for BrainWideBench, check and zip them",
        "Predict the test parts of session files of BrainWideBench with models trained "
        "on them, write FOLDER/predictions/NAME/..., check it against the session files, and zip "
        "it to FOLDER/NAME.zip. Tasks on single units (ts2) need the build of selected units, "
        "tasks on behaviour (ts1) that of all units, and a model for each build; both may be given "
        "at once: prepare bwb FILE --out DIR --align ts2, then train DIR. Models trained on the "
        "test part of a file are refused. Regions of units (ts3) are not among the tasks.",
        usage="%(prog)s MODEL [MODEL ...] SESSION.h5 [SESSION.h5 ...] --out FOLDER --label NAME",
    ).add_argument
    add("inputs", type=Path, nargs="+", metavar="MODEL, SESSION.h5", help="folders that train "
        "wrote, one for each seed, and session files")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER", help="of predictions and zip")
    add("--label", required=True, metavar="NAME", help="of the model at the benchmark")
    add("--tasks", nargs="+", metavar="TASK", help="as ts2-co_smoothing or ts1-choice (default all "
        "that the files serve)")  # fmt: skip
    first = submission.FIRST_SEED
    add("--seed", type=int, nargs="+", metavar="N", help="of the models of a build, in their order "
        f"(default {first}, {first + 1}, ...)")  # fmt: skip
    add("--dtype", choices=("float16", "float32"), default="float16", help="of ts2 predictions")
    add("--deterministic", action="store_true", help="one model will do, having no random part")
    _add_device(add)


def run_export(options: argparse.Namespace) -> None:
    """Predictions for BrainWideBench of models and session files, checked and zipped."""
    folders = [path for path in options.inputs if path.is_dir()]
    files = [path for path in options.inputs if not path.is_dir()]
    if not folders or not files:
        raise ValueError("name one or more folders of models, and one or more session files (.h5)")
    device = _device(options) or distributed.pick_device()
    predictions = options.out / "predictions"
    models = [checkpoint.load(folder).to(device) for folder in folders]
    how = {"tasks": options.tasks, "seeds": options.seed, "dtype": options.dtype, "progress": True}
    submission.export(models, files, predictions, options.label, **how)
    out = options.out / f"{options.label}.zip"
    how = {"deterministic": options.deterministic}
    print(f"{submission.pack(predictions, options.label, out, files, **how)} can be uploaded")


def _add_sessions(add: Callable[..., Any]) -> None:
    add("sessions", type=Path, nargs="+", metavar="SESSION.npz", help="files, or one folder")


def _sessions(options: argparse.Namespace) -> Sessions:
    """The session files of a command line."""
    return Sessions(options.sessions if len(options.sessions) > 1 else options.sessions[0])


def _device(options: argparse.Namespace) -> torch.device | None:
    return torch.device(options.device) if options.device else None


def _add_device(add: Callable[..., Any]) -> None:
    add("--device", help="cpu, cuda, cuda:1, mps (default a GPU if there is one)")


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        value = [f"{name}={number:g}" for name, number in value.items()]
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else str(value).lower()


def _pair(text: str) -> tuple[str, float]:
    """``name=0.3``."""
    name, _, number = text.partition("=")
    return name, float(number)


def _number(kind: str) -> Callable[[str], int | float | None]:
    """A parser of numbers of this type; "none" where the type has it."""
    number = int if kind.startswith("int") else float
    if not kind.endswith("None"):
        return number
    return lambda text: None if text == "none" else number(text)
