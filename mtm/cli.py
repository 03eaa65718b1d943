"""The command line: python -m mtm simulate | prepare | train | evaluate | export.

Each command is a function of the parsed arguments. What goes wrong with the input is said in one
line, with exit status 1; a wrong command line ends with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
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

from mtm import checkpoint, distributed
from mtm.baselines import BASELINES, fit_baseline
from mtm.bwb import submission
from mtm.data import synthetic as alf
from mtm.data.collection import Prepared, Sessions, prepare
from mtm.data.recording import public
from mtm.data.regions import LEVELS
from mtm.decoding import decodable, decode_by_region
from mtm.evaluation import evaluate
from mtm.masks import SCHEMES
from mtm.model import CHOICES as MODEL_CHOICES
from mtm.model import MtM, MtMConfig
from mtm.prediction import mean_rates, oracle
from mtm.recipes import CHOICES as TRAIN_CHOICES
from mtm.recipes import RECIPES, TrainConfig, recipe
from mtm.report import Report, score_table
from mtm.session import SessionError
from mtm.simulation import simulate
from mtm.training import fit, model_config, pick_device

ORIGINS = {
    **{name: f"mtm.data.{name}" for name in ("nwb", "steinmetz", "huggingface")},
    "bwb": "mtm.bwb",
}
IBL_TERMS = ("project", "lab", "subject", "region", "quality")
LOAD_OPTIONS = ("align", "window", "bin_size", "atlas", "trial_filter", "units", "traces", "split")
KEEP = object()  # a setting that the command line does not name
EXAMPLE = """example, from nothing to scores in a few minutes:
  python -m mtm simulate sessions --sessions 3
  python -m mtm train sessions/*.npz --out model --depth 1
  python -m mtm evaluate model sessions/sim-0.npz --json scores.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parse(arguments)

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"mtm {options.command}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn  # without the line of code that says it
            options.run(options)
    except (ValueError, KeyError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        # The text of a KeyError is its argument, quoted; show the argument itself.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        who = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        print(f"mtm {options.command}{who}: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        on = "; the same command goes on from the last state" * (options.command == "train")
        print(f"mtm {options.command}: stopped{on}", file=sys.stderr)
        return 130
    return 0


def run_simulate(options: argparse.Namespace) -> None:
    """Write simulated sessions, as .npz and as an ALF tree."""
    sessions = simulate(options.sessions, options.trials, options.neurons, seed=options.seed)
    for session in sessions:
        print(session.save(options.out / f"{session.name}.npz"))
    if options.alf:
        for session in sessions:
            alf.write_alf(session, options.out / "alf")
        for eid, path in alf.index_alf(options.out / "alf").items():
            print(f"{path}  eid {eid}")


def run_prepare(options: argparse.Namespace) -> None:
    """Recordings of one origin to session files."""
    how = {"workers": options.workers, "overwrite": options.overwrite}
    given = {key: getattr(options, key, None) for key in LOAD_OPTIONS}
    how |= {key: value for key, value in given.items() if value is not None}
    done = options.prepare(options, how)
    print(done)
    if not done.paths:
        raise SessionError(f"none of the {len(done.outcomes)} recordings could be read")
    print(f"session files in {options.out}")


def _prepare_ibl(options: argparse.Namespace, how: dict[str, Any]) -> Prepared:
    """Sessions that ONE knows: all it finds, or those of a list."""
    from mtm import official
    from mtm.data import ibl

    if not options.username and not options.recordings.is_dir():
        raise FileNotFoundError(f"{options.recordings} is not a folder")
    one = ibl.connect(options.recordings, username=options.username)
    lists = {"paper": official.PAPER_EIDS, "held-out": official.HELD_OUT_EIDS}
    lists["repeated-site"] = official.REPEATED_SITE_EIDS
    terms = {key: getattr(options, key) for key in IBL_TERMS}
    if options.eids and any(terms.values()):
        raise ValueError("--eids names the sessions; it goes with no search for others")
    if options.eids is None:
        eids = ibl.search(one, **terms)
        if not eids:
            raise SessionError(
                f"{options.recordings} holds no such session with spikes that ONE knows; a cache "
                "has a sessions.pqt, which one.save_cache() writes of what was downloaded, and "
                "mtm.data.synthetic.index_alf for a tree of your own"
            )
    else:
        eids = [*lists.get(options.eids, ())] or Path(options.eids).read_text().split()
    return ibl.prepare(one, eids, options.out, **how)


def _prepare_files(options: argparse.Namespace, how: dict[str, Any]) -> Prepared:
    """Files or folders of any other origin."""
    module = importlib.import_module(ORIGINS[options.origin])
    named = {}
    for recording in map(str, options.recordings):
        url = "://" in recording
        # Of a URL without what may be secret in it, and not too long for a file's name.
        words = re.sub(r"\W+", "-", public(recording))
        name = words[-100:].strip("-") if url else Path(recording).stem
        if name in named:
            raise ValueError(f"two recordings are named {name!r}; prepare them into two folders")
        named[name] = recording if url else Path(recording)
    return prepare(module.load_session, named, options.out, **how)


def run_train(options: argparse.Namespace) -> None:
    """Train a model; it is kept with its settings, its history and the state of the run."""
    with distributed.process_group(options.device) as device:
        if distributed.rank() > 0:  # one process speaks for all
            sys.stdout = open(os.devnull, "w")
        _train(options, device or pick_device())


def _train(options: argparse.Namespace, device: torch.device) -> None:
    sessions = Sessions(options.sessions if len(options.sessions) > 1 else options.sessions[0])
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(TrainConfig)}
    changes = {key: value for key, value in given.items() if value is not KEEP}
    config = recipe(options.recipe, **changes)
    sizes = _sizes(options, config)
    start: MtM | MtMConfig = sizes
    if options.start:
        start = checkpoint.load(options.start)
        sizes = start.config
    print(
        f"{len(sessions)} sessions, "
        f"{sum(len(entry.neurons) for entry in sessions.entries)} neurons; "
        f"recipe {options.recipe}, {sizes.tokenizer}, depth {sizes.depth} (width {sizes.width}), "
        f"{config.epochs} epochs",
        flush=True,
    )
    result = fit(
        sessions,
        start,
        config=config,
        device=device,
        folder=options.out,
        restart=options.restart,
        save_every=options.save_every,
    )
    best = result.best
    print(f"best validation, epoch {best['epoch']}, bits per spike on hidden entries:")
    for name, value in best["validation"].items():
        print(f"  {name:<14} {value:7.3f}")
    n_parameters = sum(parameter.numel() for parameter in result.model.parameters())
    print(f"model of {n_parameters:,} parameters in {options.out}")


def _sizes(options: argparse.Namespace, config: TrainConfig) -> MtMConfig:
    """Of a new model."""
    fields = ("depth", "tokenizer", "patch_size")
    given = {key: getattr(options, key) for key in fields if getattr(options, key) is not None}
    if options.start and given:
        raise ValueError(
            f"--{min(given).replace('_', '-')}: a model that is gone on with has its sizes already"
        )
    if options.tune not in (KEEP, "all") and not options.start:
        raise ValueError("--tune: there is no trained model to tune; name one with --start")
    if options.patch_size and options.tokenizer != "ndt2":
        raise ValueError("--patch-size: only --tokenizer ndt2 has patches")
    return model_config(config, **given)


def run_evaluate(options: argparse.Namespace) -> None:
    """Print the scores of a model on test trials, beside the null, the oracle and baselines."""
    model = checkpoint.load(options.model).to(options.device or pick_device())
    sessions = Sessions(options.sessions if len(options.sessions) > 1 else options.sessions[0])
    for path in filter(None, (options.json, options.report)):
        path.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written should fail now
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file in it")
    _require_known(model, sessions, options.by_region)
    seed = model.split_seed or 0
    how = {"split_seed": seed, "tasks": options.tasks, "batch_size": options.batch_size}
    reports = {
        name: evaluate(predictor, sessions, progress=True, **how)
        for name, predictor in _predictors(model, sessions, seed, options.baselines).items()
    }
    _show(reports)
    regions = {}
    if options.by_region:
        regions = _by_region(model, sessions, options.by_region, options.batch_size)
    if options.report:
        reports["MtM"].to_json(options.report)
        print(f"\nneuron by neuron in {options.report}")
    if options.json:
        scores = _scores(reports)
        scores["details"] |= {"model": str(options.model), "by_region": regions}
        options.json.write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")
        print(f"\nscores in {options.json}")


def _require_known(model: MtM, sessions: Sessions, behaviour: str | None) -> None:
    """Refuse sessions that the model does not know, or that lack the behaviour to be decoded."""
    for session in sessions:
        if session.name not in model.session_names:
            raise SessionError(
                f"the model was not trained on session {session.name!r}; it knows: "
                + ", ".join(model.session_names)
                + "; python -m mtm train --start MODEL goes on with it on that session"
            )
        if behaviour and behaviour not in decodable(session):
            raise SessionError(
                f"session {session.name!r} has no behaviour {behaviour!r} to decode by region; it "
                f"has: {', '.join(decodable(session)) or 'none'}"
            )


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


def _show(reports: dict[str, Report]) -> None:
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
    model: MtM, sessions: Sessions, behaviour: str, batch_size: int | None
) -> dict[str, dict[str, Any]]:
    """A behaviour from one region at a time; printed and returned."""
    found = {}
    for session in sessions:
        print(f"\n{behaviour} in {session.name!r} from one region at a time:")
        decoded = decode_by_region(model, session, behaviour, batch_size=batch_size)
        for region, result in decoded.items():
            print(f"  {region:<12} {result}")
        found[session.name] = {region: result.to_dict() for region, result in decoded.items()}
    return found


def _scores(reports: dict[str, Report]) -> dict[str, Any]:
    """One number a task and behaviour, and all else under "details"; NaN becomes None."""
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


def run_export(options: argparse.Namespace) -> None:
    """Predictions for BrainWideBench of models and session files, checked and zipped."""
    folders = [path for path in options.inputs if path.is_dir()]
    files = [path for path in options.inputs if not path.is_dir()]
    if not folders or not files:
        raise ValueError("name one or more folders of models, and one or more session files (.h5)")
    tasks = submission.checked_tasks(options.tasks)
    device = options.device or pick_device()
    models = [checkpoint.load(folder).to(device) for folder in folders]
    submission.export(
        models,
        files,
        options.out / "predictions",
        options.label,
        tasks=tasks,
        seeds=options.seed,
        dtype=options.dtype,
        progress=True,
    )
    out = options.out / f"{options.label}.zip"
    how = {"deterministic": options.deterministic}
    place = submission.pack(options.out / "predictions", options.label, out, files, **how)
    print(f"{place} is ready to be uploaded")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line; a wrong one prints why and leaves with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mtm",
        description="Multi-task masking: recordings in, a trained model and honest scores out.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _simulate_options(commands)
    _prepare_options(commands)
    _train_options(commands)
    _evaluate_options(commands)
    _export_options(commands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        sub = commands.choices[options.command]
        flags = [flag for action in sub._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        sub.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return options


def _simulate_options(commands: Any) -> None:
    sub = commands.add_parser(
        "simulate",
        help="make sessions of simulated animals, with known firing rates",
        description="Write OUT/sim-0.npz, OUT/sim-1.npz, ...: animals that share a circuit and a "
        "task but have their own neurons. Their true rates are kept, so scores have a ceiling.",
    )
    sub.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    sub.add_argument("--sessions", type=_positive, default=3, help="how many (default %(default)s)")
    sub.add_argument(
        "--trials", type=_positive, default=200, help="of each session (default %(default)s)"
    )
    sub.add_argument(
        "--neurons", type=_positive, default=96, help="of each session (default %(default)s)"
    )
    sub.add_argument("--seed", type=int, default=0, help="same seed, same data (default 0)")
    sub.add_argument(
        "--alf",
        action="store_true",
        help="also write OUT/alf, a folder tree as the International Brain Laboratory publishes "
        "its recordings, which ONE can search and load",
    )
    sub.set_defaults(run=run_simulate)


def _prepare_options(commands: Any) -> None:
    sub = commands.add_parser(
        "prepare",
        help="turn recordings into session files",
        description="Read recordings, align them to an event, bin them and write OUT/<name>.npz, "
        "in distributed. What is there already, made with the same options, is left as it is; what "
        "cannot be read is skipped and said.",
    )
    origins = sub.add_subparsers(dest="origin", required=True, metavar="ORIGIN")
    ibl = _origin(origins, "ibl", "the International Brain Laboratory, through ONE", None)
    ibl.add_argument(
        "recordings", type=Path, metavar="CACHE", help="ONE's folder; with sessions.pqt, if local"
    )
    ibl.add_argument("--username", help="download from IBL's public server, with a saved log-in")
    ibl.add_argument(
        "--eids", metavar="LIST", help="paper, held-out, repeated-site, or a file of session ids"
    )
    helps = {name: "only sessions of it" for name in IBL_TERMS}
    helps["region"] = "only sessions with a probe through it"
    helps["quality"] = "only sessions whose spike times were graded so (PASS, WARNING) or better"
    for name, text in helps.items():
        ibl.add_argument(f"--{name}", help=text)
    nwb = _origin(origins, "nwb", "NWB files, on disk or by URL", "FILE")
    nwb.add_argument("--traces", nargs="+", metavar="SERIES", help="continuous behaviour, by name")
    steinmetz = _origin(origins, "steinmetz", "Steinmetz et al. 2019, folders", "FOLDER")
    _origin(origins, "huggingface", "rows of the authors' datasets, folders", "FOLDER")
    bwb = _origin(origins, "bwb", "session files of BrainWideBench", "FILE")
    bwb.add_argument("--split", choices=("ts1", "ts2", "pretrain"), help="of the file's splits "
                     "(default: ts1 for all units, ts2 for selected units, as they are scored; of "
                     "files to pretrain on, pretrain)")  # fmt: skip
    for each in (ibl, bwb):
        each.add_argument(
            "--atlas", choices=LEVELS, help="how finely regions are named (default Allen)"
        )
    choices = {ibl: ("reaction-time",), steinmetz: ("included",), bwb: ("valid",)}
    for each, filters in choices.items():
        each.add_argument("--trial-filter", choices=filters, help="keep only trials that pass")
    for each in (ibl, steinmetz):
        each.add_argument("--units", choices=("good",), help="keep only well isolated units")
    for each, event in ((ibl, "stimOn_times"), (nwb, "start_time"), (bwb, "stim_on_time"),
                        (steinmetz, "visualStim_times")):  # fmt: skip
        each.add_argument("--align", metavar="EVENT", help=f"to align to (default {event})")
        each.add_argument("--window", type=float, nargs=2, metavar=("START", "STOP"),
                          help="seconds around the event (default -0.5 1.5)")  # fmt: skip
        each.add_argument("--bin-size", type=float, help="seconds (default 0.02)")


def _origin(origins: Any, name: str, text: str, recordings: str | None) -> argparse.ArgumentParser:
    sub = origins.add_parser(name, help=text, description=f"From {text}.")
    if recordings:
        sub.add_argument("recordings", nargs="+", metavar=recordings)
    sub.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write to")
    sub.add_argument("--workers", type=_positive, help="processes (default: one a core, up to 4)")
    sub.add_argument("--overwrite", action="store_true", help="make again what is there")
    sub.set_defaults(run=run_prepare, prepare=_prepare_files if recordings else _prepare_ibl)
    return sub


def _train_options(commands: Any) -> None:
    sub = commands.add_parser(
        "train",
        usage="%(prog)s SESSION.npz [SESSION.npz ...] --out DIR [options]",
        allow_abbrev=False,
        help="train a model on session files",
        description="Train on the training trials of all sessions, and keep the weights that "
        "predict hidden entries of the validation trials best in DIR. A run that was stopped goes "
        "on when the same command is given again. Several processes train faster: start them with "
        "torchrun --nproc-per-node N -m mtm train ..., of at most --batches-per-step processes",
    )
    sub.add_argument(
        "sessions", type=Path, nargs="+", metavar="SESSION.npz", help="files, or one folder of them"
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the model")
    sub.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default="mtm",
        help="training settings: ours, or the paper's (default %(default)s)",
    )
    sub.add_argument(
        "--depth",
        type=_positive,
        help="layers, which set width, heads and dropout; 5 is the paper's model "
        "(default: 2, or 5 with --recipe paper)",
    )
    sub.add_argument(
        "--tokenizer",
        choices=MODEL_CHOICES["tokenizer"],
        help="a token a bin, stitched (ndt1, default), or a token a patch of neurons (ndt2)",
    )
    sub.add_argument(
        "--patch-size", type=_positive, help="neurons of a patch of ndt2 (default 128)"
    )
    sub.add_argument(
        "--start",
        type=Path,
        metavar="MODEL",
        help="folder of a model to go on with; sessions it does not know get maps of their own",
    )
    sub.add_argument(
        "--restart",
        action="store_true",
        help="begin anew, and replace what DIR holds; without it, a run that was stopped goes on "
        "where it was",
    )
    sub.add_argument(
        "--save-every",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="between two states of the run on disk (default %(default)g)",
    )
    _setting_options(sub)
    sub.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)"
    )
    sub.set_defaults(run=run_train)


def _setting_options(sub: argparse.ArgumentParser) -> None:
    """A flag for each field of TrainConfig, described by its docstring."""
    group = sub.add_argument_group(
        "settings of training", "Defaults are the recipe's. 'none' stands for no value."
    )
    text = inspect.getdoc(TrainConfig) or ""
    said = dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", text, re.M))
    for setting in dataclasses.fields(TrainConfig):
        name, kind = setting.name, str(setting.type)
        text = " ".join(said[name].split()).replace("``", "").replace("%", "%%").rstrip(".")
        ours, theirs = (_shown(getattr(RECIPES[key], name)) for key in ("mtm", "paper"))
        text += f" (default {ours}{'' if ours == theirs else f', paper {theirs}'})"
        flag: dict[str, Any] = {"default": KEEP, "help": text}
        if kind == "bool":
            flag["action"] = argparse.BooleanOptionalAction
        elif kind == "tuple[str, ...]":
            flag |= {"nargs": "+", "choices": tuple(SCHEMES), "metavar": "SCHEME"}
        elif kind == "dict[str, float]":
            flag |= {"nargs": "+", "action": _Pairs, "metavar": "SCHEME=RATIO"}
        elif name in TRAIN_CHOICES:
            flag["choices"] = TRAIN_CHOICES[name]
        else:
            flag |= {"type": _number(kind), "metavar": kind.partition(" ")[0].upper()}
        group.add_argument(f"--{name.replace('_', '-')}", **flag)


def _shown(value: Any) -> str:
    """The value of a setting, as it is written on the command line."""
    if isinstance(value, dict):
        value = [f"{name}={number:g}" for name, number in value.items()] or "none"
    return " ".join(value) if isinstance(value, list | tuple) else str(value).lower()


class _Pairs(argparse.Action):
    """``name=0.3 other=0.1`` to a dict."""

    def __call__(self, parser: Any, options: Any, values: Any, flag: str | None = None) -> None:
        try:
            pairs = {name: float(number) for name, number in (v.split("=") for v in values)}
        except ValueError:
            parser.error(f"argument {flag}: need NAME=NUMBER, got {' '.join(values)}")
        setattr(options, self.dest, pairs)


def _number(kind: str) -> Callable[[str], int | float | None]:
    """What reads a number of a field of this type; "none", where that is one of its values."""

    def read(text: str) -> int | float | None:
        if text == "none" and kind.endswith("None"):
            return None
        return int(text) if kind.startswith("int") else float(text)

    read.__name__ = kind.partition(" ")[0]  # argparse names it in its message
    return read


def _evaluate_options(commands: Any) -> None:
    sub = commands.add_parser(
        "evaluate",
        help="score a model on the test trials of sessions",
        description="Score hidden activity in the four activity tasks and decode behaviour, beside "
        "the mean-rate model and, for simulated sessions, the true rates. The JSON has a number "
        "for each of co-smoothing, forward-prediction, inter-region, intra-region (bits per "
        "spike), choice (accuracy) and each continuous behaviour (R2), mean over sessions, and "
        "all else under 'details'.",
    )
    sub.add_argument("model", type=Path, metavar="DIR", help="folder that train wrote")
    sub.add_argument(
        "sessions", type=Path, nargs="+", metavar="SESSION.npz", help="files, or a folder of them"
    )
    sub.add_argument("--tasks", nargs="+", help="some tasks and behaviours (default: all)")
    sub.add_argument(
        "--baselines",
        nargs="+",
        default=[],
        choices=BASELINES,
        metavar="NAME",
        help="fit and score these too: " + ", ".join(map(repr, BASELINES)),
    )
    sub.add_argument(
        "--by-region", metavar="BEHAVIOUR", help="decode it from one region at a time as well"
    )
    sub.add_argument(
        "--batch-size", type=_positive, help="trials predicted at once (default: by the device)"
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the scores here as well")
    sub.add_argument(
        "--report", type=Path, metavar="FILE", help="and the tables, by neuron, here, as JSON"
    )
    sub.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)"
    )
    sub.set_defaults(run=run_evaluate)


def _export_options(commands: Any) -> None:
    sub = commands.add_parser(
        "export",
        usage="%(prog)s MODEL [MODEL ...] SESSION.h5 [SESSION.h5 ...] --out FOLDER --label NAME",
        help="write predictions for BrainWideBench, check and zip them",
        description="Predict the test parts of session files of BrainWideBench with models trained "
        "on them, write FOLDER/predictions/NAME/..., check it against the session files, and zip "
        "it to FOLDER/NAME.zip. Tasks on single units (ts2) need the build of selected units, "
        "tasks on behaviour (ts1) that of all units, and a model for each build; both may be given "
        "at once: prepare bwb FILE --out DIR --align ts2, then train DIR. A model that has learned "
        "from the test part of a file is refused. Regions of units (ts3) are not among the tasks.",
    )
    sub.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="MODEL, SESSION.h5",
        help="folders that train wrote, one for each seed, and session files",
    )
    sub.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder of predictions and zip"
    )
    sub.add_argument("--label", required=True, metavar="NAME", help="of the model at the benchmark")
    sub.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="as ts2-co_smoothing or ts1-choice (default: all that the files serve)",
    )
    sub.add_argument(
        "--seed",
        type=int,
        nargs="+",
        metavar="N",
        help=f"of the models of a build, in their order (default {submission.FIRST_SEED}, "
        f"{submission.FIRST_SEED + 1}, ...)",
    )
    sub.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of ts2 predictions (default %(default)s)",
    )
    sub.add_argument(
        "--deterministic", action="store_true", help="one model will do, having no random part"
    )
    sub.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)"
    )
    sub.set_defaults(run=run_export)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # what a build lacks is an import
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not available here: {reason}") from None
    return device
