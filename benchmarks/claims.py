"""What the paper claims, tested on recordings: does MtM win, what for, and do other animals help?

    python benchmarks/claims.py FOLDER [--part PART] [--recordings NAME ...]

FOLDER is that of real_data.py, or the word "simulated". Two parts:

- schemes: on every session alone, MtM, temporal masking (with its own settings, see
  `mtm.baselines`, and with MtM's), each of MtM's schemes by itself, and MtM without its prompt.
- animals: one animal after the other is left out. A model learns from 1, 3 and all sessions of the
  others, is fine-tuned to a session of the one left out, and is compared with a model of that
  session alone; with all of its training trials, half of them and a quarter. With a quarter, also
  with parts of what the others' model knows. Activity tasks only.

Differences are taken session by session, on test trials and neurons of at least 1 Hz: a claim holds
if the 95 % interval of the mean difference over sessions (Student's t) lies above 0, and fails if
it lies below; else it is open. Out come results/claims.json and .md, and book/_assets/claims.png
(claims_simulated of simulated animals, where the oracle is scored too).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats

import mtm
from mtm.baselines import SETTINGS, temporal_ndt1
from mtm.masks import MTM_SCHEMES
from mtm.model import PUBLISHED
from mtm.plots import BLUE, RED
from mtm.prediction import TASKS
from mtm.report import Mean, Report, mean_of

ALONE, ALL = "this session alone", "after all of others"
AFTER = {"after 1 of others": 1, "after 3 of others": 3, ALL: 99}  # sessions
# Of the training trials, one of so many. All have the recipe's epochs: for a quarter, four times as
# many were worse on validation trials of 01_Cori and 04_Forssmann.
FEWER = {"half": 2, "a quarter": 4}
# For few trials the last weights: `fit` still chose them by predictions that were not scaled.
LAST = {"a quarter": {"validations": 1}}
OWN_HISTORY = "only the own history of others"  # a new model that starts with its mean
KEPT = {  # how else a model of others can be used
    "the encoder of others fixed": {"tune": "session-layers"},
    "the mean token of others": {"token": "mean"},
}
DECODING = ("choice", "wheel-speed", "whisker-motion-energy")


class Claim(NamedTuple):
    """Something that can be measured: ``better`` minus ``than``, in a task."""

    part: str
    better: str
    than: str
    task: str


def schemes(depth: int, epochs: int) -> dict[str, common.Method]:
    """Models that differ in what was hidden while they were trained."""
    rows: dict[str, dict[str, Any]] = {"MtM": {}, "MtM, no prompt": {"prompt": False}}
    rows |= {f"{name} alone": {"schemes": (name,), "prompt": False} for name in MTM_SCHEMES}
    rows["temporal, as MtM"] = {"schemes": ("temporal",), "prompt": False}

    def temporal(sessions: list[mtm.Session], seed: int) -> mtm.Fit:
        return temporal_ndt1(sessions, seed=seed, depth=depth, progress=False)

    settings = {"depth": depth, "baseline": "temporal", **PUBLISHED, **SETTINGS}
    found = {name: common.trained(depth=depth, epochs=epochs, **how) for name, how in rows.items()}
    return found | {"temporal": common.Method(temporal, settings, seeded=True)}


def held_out(sessions: list[mtm.Session]) -> dict[str, list[mtm.Session]]:
    """The first session of each animal -> all sessions of the others, animals in turn."""
    by_animal: dict[str, list[mtm.Session]] = {}
    for session in sessions:
        by_animal.setdefault(session.subject, []).append(session)
    found = {}
    for animal, own in by_animal.items():
        others = [theirs for name, theirs in by_animal.items() if name != animal]
        found[own[0].name] = [s for turn in zip_longest(*others) for s in turn if s is not None]
    return found


def animals(
    others: list[mtm.Session], depth: int, epochs: int, work: Path
) -> dict[str, common.Method]:
    """For a session of an animal left out: alone, and after some and all sessions of others."""

    def learner(
        n: int = 0, every: int = 1, history: bool = False, **settings: Any
    ) -> common.Method:
        def make(sessions: list[mtm.Session], seed: int) -> mtm.Fit:
            start = pretrained(others[:n], seed, depth, epochs, work) if n else None
            some = [fewer(session, every) for session in sessions]
            if history:
                start = with_own_history(start, some[0], seed)
            how = settings | ({} if n else {"depth": depth})
            return mtm.fit(some, start, seed=seed, epochs=epochs, progress=False, **how)

        told = {"epochs": epochs, "depth": depth, "every": every, "history": history, **settings}
        told["others"] = [session.name for session in others[:n]]
        return common.Method(make, told, seeded=True)

    found = {}
    for share, every in {"": 1, **FEWER}.items():
        for name, n in {ALONE: 0, **AFTER}.items():
            found[of(share, name)] = learner(n, every, **LAST.get(share, {}))
    for name, how in {**KEPT, OWN_HISTORY: {"history": True}}.items():
        few = learner(AFTER[ALL], FEWER["a quarter"], **LAST["a quarter"], **how)
        found[of("a quarter", name)] = few
    return found


def of(share: str, name: str) -> str:
    """The name of a method that has a share of the session's training trials."""
    return f"{share}, {name}" if share else name


def with_own_history(others: mtm.MtM, session: mtm.Session, seed: int) -> mtm.MtM:
    """A new model of the session, whose own history starts at its mean over others' neurons."""
    torch.manual_seed(seed)
    how = {"bin_size": others.bin_size, "prompts": others.prompts}
    new = mtm.MtM(others.config, others.n_bins, **how)
    new.add_session(session.name, session.n_neurons, session.counts[session.split().train])
    new.split_seed = others.split_seed
    known = [others.session_layers(name).direct.own for name in others.session_names]
    own = new.session_layers(session.name).direct.own
    own.data += torch.cat(known, dim=1).mean(dim=1, keepdim=True).detach()
    return new


def fewer(session: mtm.Session, every: int) -> mtm.Session:
    """One of ``every`` training trials; validation and test trials stay."""
    split = session.split()
    trials = np.concatenate([split.train[::every], split.val, split.test])
    return session if every == 1 else session.select(trials=np.sort(trials))


def pretrained(
    others: list[mtm.Session], seed: int, depth: int, epochs: int, work: Path
) -> mtm.MtM:
    """A model of other animals' sessions; made once, resumed where it was stopped."""
    told = json.dumps([[s.name for s in others], seed, depth, epochs])
    folder = work / f"{len(others)}-{seed}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    how = {"depth": depth, "epochs": epochs, "seed": seed, "folder": folder, "progress": False}
    return mtm.fit(others, **how).model


def claims() -> dict[str, list[Claim]]:
    """The paper's claims, each as comparisons that can come out either way."""
    own = {scheme: task for task, scheme in TASKS.items()}
    alone = {f"{scheme} alone": own[scheme] for scheme in MTM_SCHEMES}
    temporal = ("temporal", "temporal, as MtM")
    pairs: dict[str, list[tuple[str, str, str]]] = {
        "MtM predicts activity better than temporal masking": [
            ("MtM", than, task) for than in temporal for task in common.FOUR
        ],
        "MtM decodes behaviour better than temporal masking": [
            ("MtM", "temporal", task) for task in DECODING
        ],
        "a scheme alone is best at its own task": [
            (one, other, task) for one, task in alone.items() for other in alone if other != one
        ],
        "all schemes together are better than one, where it was not trained": [
            ("MtM", one, task) for one, its in alone.items() for task in common.FOUR if task != its
        ],
        "all schemes together are better than one even at its own task": [
            ("MtM", one, task) for one, task in alone.items()
        ],
        "the prompt helps": [("MtM", "MtM, no prompt", task) for task in (*common.FOUR, *DECODING)],
        "other animals help": [(after, ALONE, task) for after in AFTER for task in common.FOUR],
    }
    for share in FEWER:
        pairs[f"other animals help where only {share} of the trials is there"] = [
            (of(share, after), of(share, ALONE), task) for after in AFTER for task in common.FOUR
        ]
    pairs["the own history of others helps by itself"] = [
        (of("a quarter", OWN_HISTORY), of("a quarter", ALONE), task) for task in common.FOUR
    ]
    pairs["other animals help more if all weights are fine-tuned, and a session token is new"] = [
        (of("a quarter", ALL), of("a quarter", name), task) for name in KEPT for task in common.FOUR
    ]
    pairs["more of them help more"] = [
        (more, fewer, task) for fewer, more in pairwise(AFTER) for task in common.FOUR
    ]
    return {
        text: [Claim("animals" if "other" in c[0] else "schemes", *c) for c in comparisons]
        for text, comparisons in pairs.items()
    }


Scores = dict[str, dict[str, dict[str, list[float]]]]  # session -> method -> task -> seeds' means


def difference(claim: Claim, scores: Scores) -> Mean | None:
    """Mean over sessions, each the mean over seeds; None where nothing can be compared."""
    gains = []
    for methods in scores.values():
        pair = [methods.get(name, {}).get(claim.task, []) for name in (claim.better, claim.than)]
        if all(pair):
            gains.append(float(np.mean(pair[0]) - np.mean(pair[1])))
    return mean_of(gains) if gains else None


def verdict(mean: Mean) -> str:
    """Whether the difference is more than chance."""
    if mean.n < 2:
        return "one session"
    if abs(mean.value) <= half_width(mean):
        return "open"
    return "holds" if mean.value > 0 else "fails"


def half_width(mean: Mean) -> float:
    """Half of the 95 % interval of Student's t, which is wide where sessions are few."""
    return float(stats.t.ppf(0.975, mean.n - 1) * mean.error) if mean.n > 1 else 0.0


def collected(
    session: mtm.Session, methods: dict[str, common.Method], seeds: list[int], work: Path
) -> dict[str, dict[str, list[float]]]:
    """Method -> task -> the score of each seed that is done."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, method in methods.items():
        for seed in seeds:
            [path] = common.kept(work, name, method, [session], seed)
            if path.exists():
                for task, scores in Report.from_json(path).tasks.items():
                    value = scores.mean(scores.score)
                    found.setdefault(name, {}).setdefault(task, []).append(value)
    return found


def table(judged: dict[str, list[tuple[Claim, Mean]]]) -> str:
    """Markdown: each claim, each comparison, and what came out."""
    lines = []
    for text, comparisons in judged.items():
        lines += [f"### {text[0].upper()}{text[1:]}", ""]
        lines += ["| | task | difference | sessions | |", "| --- " * 5 + "|"]
        for claim, mean in comparisons:
            pair = f"{claim.better} minus {claim.than}"
            lines.append(f"| {pair} | {claim.task} | {mean} | {mean.n} | {verdict(mean)} |")
        lines.append("")
    return "\n".join(lines)


def draw(judged: dict[str, list[tuple[Claim, Mean]]]) -> plt.Figure:
    """A panel for each claim: differences with 95 % intervals, grey where they are open."""
    colours = {"holds": BLUE, "fails": RED}
    sizes = [len(comparisons) for comparisons in judged.values()]
    figure, axes = plt.subplots(
        len(judged), 1, sharex=True, squeeze=False, layout="constrained",
        figsize=(7.5, 0.8 * len(judged) + 0.2 * sum(sizes)), height_ratios=[n + 2 for n in sizes],
    )  # fmt: skip
    for ax, (text, comparisons) in zip(axes[:, 0], judged.items(), strict=True):
        for i, (claim, mean) in enumerate(comparisons):
            colour = colours.get(verdict(mean), "0.5")
            ax.errorbar(mean.value, i, xerr=half_width(mean), fmt="o", color=colour, ms=4)
            shown = f"{claim.better} - {claim.than}, {claim.task}"
            ax.text(1.01, i, shown, transform=ax.get_yaxis_transform(), fontsize=6.5, va="center")
        ax.axvline(0, color="0.7", lw=0.8)
        ax.set(yticks=[], ylim=(len(comparisons) - 0.3, -0.7))
        ax.set_title(text, fontsize=9, loc="left")
        ax.spines[["top", "right", "left"]].set_visible(False)
    axes[-1, 0].set_xlabel("difference, with its 95 % interval")
    return figure


def main() -> None:
    """Read the command line, run, judge, write."""
    made = common.parser(__doc__, "claims")
    made.add_argument("--part", choices=("schemes", "animals"), help="default: both")
    options = made.parse_args()
    simulated = options.folder == Path("simulated")
    if simulated:
        sessions = mtm.simulate(5, 120, 48, seed=1, bin_size=0.1)
    else:
        sessions = common.recordings(options.folder, "steinmetz")
    if unknown := set(options.recordings) - {session.name for session in sessions}:
        raise SystemExit(f"no recording is named {min(unknown)!r}")
    out = options.out / ("claims_simulated" if simulated else "claims")
    path = out.with_suffix(".json")
    before = json.loads(path.read_text()) if path.exists() else {}
    facts = {"measured": {}, "scores": {}} | before
    for part, scores in measured(sessions, options).items():  # the other part stays as it was
        facts["measured"][part] = common.described(sessions, options)
        facts["scores"][part] = scores
    judged = judge(facts["scores"])
    facts["claims"] = {
        text: [[*claim, *mean, verdict(mean)] for claim, mean in comparisons]
        for text, comparisons in judged.items()
    }
    common.write_json(path, facts)
    shown = {text: pairs for text, pairs in judged.items() if pairs[0][0].part == "schemes"}
    if shown:  # those of animals are a figure of the book's chapter
        draw(shown).savefig(options.pictures / f"{out.name}.png", dpi=110)
    who = "simulated animals" if simulated else "recordings"
    out.with_suffix(".md").write_text(
        f"# The paper's claims, on {who}\n\nTest trials; differences session by session, ± "
        "standard error over sessions. Made by `python benchmarks/claims.py`.\n\n" + table(judged)
    )
    print(table(judged))


def measured(sessions: list[mtm.Session], options: argparse.Namespace) -> dict[str, Scores]:
    """Scores of both parts, or of the one that was asked for."""
    how = {"depth": options.depth, "epochs": options.epochs}
    by_name = {session.name: session for session in sessions}
    others, models = held_out(sessions), options.work / "pretrained"
    of_animals = {name: animals(others[name], **how, work=models) for name in others}
    parts = {
        "schemes": (dict.fromkeys(by_name, schemes(**how)), None),
        "animals": (of_animals, common.FOUR),
    }
    known = all(session.rates is not None for session in sessions)
    oracle = {"oracle": common.Method(lambda some, seed: mtm.oracle(some[0]), {})} if known else {}
    scores: dict[str, Scores] = {}
    for part in [options.part] if options.part else parts:
        (methods, tasks), scores[part] = parts[part], {}
        for name in [n for n in methods if n in (options.recordings or methods)]:
            session, rows = by_name[name], methods[name] | oracle
            common.run([session], rows, options.seeds, options.work / part, tasks=tasks)
            scores[part][name] = collected(session, rows, options.seeds, options.work / part)
    return scores


def judge(scores: dict[str, Scores]) -> dict[str, list[tuple[Claim, Mean]]]:
    """Each claim's comparisons, as far as they were measured."""
    judged = {}
    for text, comparisons in claims().items():
        pairs = [(claim, difference(claim, scores.get(claim.part, {}))) for claim in comparisons]
        judged[text] = [(claim, mean) for claim, mean in pairs if mean is not None]
    return {text: pairs for text, pairs in judged.items() if pairs}


if __name__ == "__main__":
    main()
