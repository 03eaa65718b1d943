"""The command line: python -m mtm simulate | prepare | train | evaluate.

Each command is a function of the parsed arguments. What goes wrong with the input is said in one
line, with exit status 1; a wrong command line ends with 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mtm import alf, hub
from mtm.decode import Decoded, decodable, decode
from mtm.evaluate import Report, checked_split_seed, evaluate, mean_rates, oracle, score_table
from mtm.masks import SCHEMES
from mtm.model import CHOICES as MODEL_CHOICES
from mtm.model import MtMConfig
from mtm.session import Session, SessionError
from mtm.simulate import simulate
from mtm.train import CHOICES as TRAIN_CHOICES
from mtm.train import RECIPES, fit, pick_device, recipe

EXAMPLE = """example, from nothing to scores in a few minutes:
  python -m mtm simulate sessions --sessions 3
  python -m mtm train sessions/*.npz --out model --depth 1
  python -m mtm evaluate model sessions/sim-0.npz --json scores.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parse(arguments)
    try:
        options.run(options)
    except (ValueError, KeyError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        # The text of a KeyError is its argument, quoted; show the argument itself.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"mtm {options.command}: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mtm {options.command}: stopped", file=sys.stderr)
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
    """Every session of a ONE cache to .npz."""
    from mtm.sources import ibl

    if not options.alf_root.is_dir():
        raise FileNotFoundError(f"{options.alf_root} is not a folder")
    one = ibl.connect(options.alf_root)
    eids = [str(eid) for eid in one.search()]
    if not eids:
        raise SessionError(
            f"{options.alf_root} holds no session that ONE knows; a cache has a sessions.pqt, "
            "which ONE writes when it downloads, and mtm.alf.index_alf for a tree of your own"
        )
    failed = {}
    for eid in eids:
        try:
            session = ibl.load_session(
                one,
                eid,
                atlas=options.atlas,
                trial_filter=options.trial_filter,
                units=options.units,
            )
        except SessionError as error:
            failed[eid] = error
            continue
        print(session.save(options.out / f"{eid}.npz"))
    for eid, error in failed.items():
        print(f"left out {eid}: {error}", file=sys.stderr)
    if len(failed) == len(eids):
        raise SessionError(f"none of the {len(eids)} sessions could be read")


def run_train(options: argparse.Namespace) -> None:
    """Train a model and save it with its settings and history."""
    sessions = [Session.load(path) for path in options.sessions]
    flags = ("epochs", "lr", "batch_size", "seed", "schemes", "tune")
    changes = {key: getattr(options, key) for key in flags if getattr(options, key) is not None}
    config = recipe(options.recipe, **changes)
    device = options.device or pick_device()
    start = sizes = _sizes(options, sessions[0].n_bins)
    if options.start:
        start = hub.load(options.start)
        sizes = start.config
    print(
        f"training on {len(sessions)} sessions, {sum(s.n_neurons for s in sessions)} neurons; "
        f"recipe {options.recipe}, {sizes.tokenizer}, depth {sizes.depth} (width {sizes.width}), "
        f"{config.epochs} epochs, {device}"
    )
    options.out.mkdir(parents=True, exist_ok=True)  # what cannot be written should fail now
    if (options.out / hub.CONFIG).exists():
        print(f"the model in {options.out} will be replaced")
    result = fit(sessions, start, config=config, device=device)
    best = result.best
    hub.save(result.model, options.out, info=result.to_dict())
    print(f"best validation, epoch {best['epoch']}, bits per spike on hidden entries:")
    for name, value in best["validation"].items():
        print(f"  {name:<14} {value:7.3f}")
    n_parameters = sum(parameter.numel() for parameter in result.model.parameters())
    print(f"model of {n_parameters:,} parameters in {options.out}")


def _sizes(options: argparse.Namespace, n_bins: int) -> MtMConfig:
    """Of a new model."""
    fields = ("depth", "tokenizer", "patch_size")
    given = {key: getattr(options, key) for key in fields if getattr(options, key) is not None}
    if options.start and given:
        raise ValueError(
            f"--{min(given).replace('_', '-')}: a model that is gone on with has its sizes already"
        )
    if options.tune and not options.start:
        raise ValueError("--tune: there is no trained model to tune; name one with --start")
    if options.patch_size and options.tokenizer != "ndt2":
        raise ValueError("--patch-size: only --tokenizer ndt2 has patches")
    depth = given.pop("depth", 5 if options.recipe == "paper" else 2)
    return MtMConfig.from_depth(depth, n_bins=n_bins, **given)


def run_evaluate(options: argparse.Namespace) -> None:
    """Print the scores of a model on a session's test trials, beside the null and the oracle."""
    model = hub.load(options.model).to(options.device or pick_device())
    session = Session.load(options.session)
    if session.name not in model.session_names:
        raise SessionError(
            f"{options.session}: the model was not trained on session {session.name!r}; it knows: "
            + ", ".join(model.session_names)
        )
    seed = checked_split_seed(model, session, None)
    predictors: dict[str, Any] = {"MtM": model, "mean rate": mean_rates(session, seed)}
    if session.rates is not None:
        predictors["oracle"] = oracle(session)
    reports = {
        name: evaluate(predictor, session, split_seed=seed, progress=True)
        for name, predictor in predictors.items()
    }
    print(f"session {session.name!r}, {reports['MtM'].n_trials} test trials\n")
    print("bits per spike, mean over neurons, against each neuron's mean in the scored entries:")
    print(score_table(reports))
    print("\nthe same against its mean in the training trials:")
    print(score_table(reports, "bits_per_spike_train_null"))
    left_out = dict(reports["MtM"].left_out)
    decoded = {}
    for name in decodable(session):
        try:
            decoded |= decode(model, session, behaviours=[name])
        except SessionError as error:
            left_out[name] = str(error)
            continue
        others = ", ".join(f"{key} {value:.3f}" for key, value in decoded[name].others.items())
        print(f"\n{name}: {decoded[name].metric} {decoded[name].score:.3f}  ({others})")
    for name, reason in left_out.items():
        print(f"\n{name}: left out, {reason}")
    if options.json:
        scores = _scores(reports, decoded)
        scores["details"] |= {"model": str(options.model), "left_out": left_out}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")
        print(f"\nscores in {options.json}")


def _scores(reports: dict[str, Report], decoded: dict[str, Decoded]) -> dict[str, Any]:
    """One number a task and behaviour, and all else under "details"; NaN becomes None."""
    activity = {name: report.to_dict() for name, report in reports.items()}
    scores: dict[str, Any] = {
        task: summary["bits_per_spike"] for task, summary in activity["MtM"].items()
    }
    scores |= {name: round(float(result.score), 6) for name, result in decoded.items()}
    scores["details"] = {
        "session": reports["MtM"].session,
        "test_trials": reports["MtM"].n_trials,
        "activity": activity,
        "behaviour": {name: result.to_dict() for name, result in decoded.items()},
    }
    return scores


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
    return parser.parse_args(arguments)


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
        help="turn the recordings of a ONE cache into session files",
        description="Read every session of a local ONE cache, align it to stimulus onset "
        "(-0.5 to 1.5 s, 20 ms bins) and write OUT/<eid>.npz.",
    )
    sub.add_argument("alf_root", type=Path, metavar="ALF_ROOT", help="the folder with sessions.pqt")
    sub.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write to")
    sub.add_argument(
        "--atlas",
        choices=("Allen", "Beryl", "Cosmos"),
        default="Allen",
        help="how finely regions are named (default %(default)s, as the paper)",
    )
    sub.add_argument(
        "--trial-filter",
        choices=("reaction-time",),
        help="keep only trials that pass the paper's reaction-time filter (default: all)",
    )
    sub.add_argument(
        "--units",
        choices=("good",),
        help="keep only units that pass quality control (default: all)",
    )
    sub.set_defaults(run=run_prepare)


def _train_options(commands: Any) -> None:
    sub = commands.add_parser(
        "train",
        help="train a model on session files",
        description="Train on the training trials of all sessions, keep the weights that predict "
        "hidden entries of the validation trials best, and save them in DIR.",
    )
    sub.add_argument("sessions", type=Path, nargs="+", metavar="SESSION.npz")
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
        "--tune",
        choices=TRAIN_CHOICES["tune"],
        help="what learns of a model to go on with (default all)",
    )
    sub.add_argument(
        "--epochs",
        type=_positive,
        help="passes over the training trials (default: "
        f"{RECIPES['mtm'].epochs}, or {RECIPES['paper'].epochs} with --recipe paper)",
    )
    sub.add_argument("--lr", type=float, help="peak learning rate")
    sub.add_argument("--batch-size", type=_positive, help="trials in a step")
    sub.add_argument("--seed", type=int, help="of weights, masks and the order of batches")
    sub.add_argument(
        "--schemes",
        nargs="+",
        choices=tuple(SCHEMES),
        metavar="SCHEME",
        help=f"masking schemes to alternate, of {', '.join(SCHEMES)} (default: the four of MtM)",
    )
    sub.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)"
    )
    sub.set_defaults(run=run_train)


def _evaluate_options(commands: Any) -> None:
    sub = commands.add_parser(
        "evaluate",
        help="score a model on a session's test trials",
        description="Score hidden activity in the four tasks and decode behaviour, beside the "
        "mean-rate model and, for simulated sessions, the true rates. The JSON has one number for "
        "each of co-smoothing, forward-prediction, inter-region, intra-region (bits per spike), "
        "choice (accuracy) and each continuous behaviour (R2), and all else under 'details'.",
    )
    sub.add_argument("model", type=Path, metavar="DIR", help="folder that train wrote")
    sub.add_argument("session", type=Path, metavar="SESSION.npz")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the scores here as well")
    sub.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)"
    )
    sub.set_defaults(run=run_evaluate)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not available here: {reason}") from None
    return device
