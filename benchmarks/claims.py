"""What the paper claims, tested on recordings: does MtM win, what for, and do other animals help?

    python benchmarks/claims.py FOLDER [--part PART] [--recordings NAME ...]

FOLDER is that of real_data.py, or the word "simulated". Two parts:

- schemes: on every session alone, MtM, temporal masking (with its own settings, see
  `mtm.baselines`, and with MtM's), each of MtM's schemes by itself, and MtM without its prompt.
- animals: one animal after the other is left out. A model learns from 1, 3 and all sessions of the
  others, is fine-tuned to a session of the one left out, and is compared with a model of that
  session alone; also with a quarter of its training trials. Activity tasks only.

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
from scipy import stats

import mtm
from mtm.baselines import SETTINGS, temporal_ndt1
from mtm.masks import MTM_SCHEMES
from mtm.model import PUBLISHED
from mtm.plots import BLUE, RED
from mtm.prediction import TASKS
from mtm.report import Mean, Report, mean_of

ALONE = "this session alone"
AFTER = {"after 1 of others": 1, "after 3 of others": 3, "after all of others": 99}  # sessions
FEW, FEW_AFTER = "a quarter of this session", "a quarter, after all of others"
FEW_LR = 3e-4  # after others. Of 1e-3 and this, each was better so on validation trials of 01_Cori
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

    def learner(n: int = 0, every: int = 1, **settings: Any) -> common.Method:
        def make(sessions: list[mtm.Session], seed: int) -> mtm.Fit:
            start = pretrained(others[:n], seed, depth, epochs, work) if n else None
            size = {} if n else {"depth": depth}
            some = [fewer(session, every) for session in sessions]
            how = {"epochs": epochs, "progress": False, **size, **settings}
            return mtm.fit(some, start, seed=seed, **how)

        names = [session.name for session in others[:n]]
        told = {"epochs": epochs, "depth": depth, "every": every, "others": names, **settings}
        return common.Method(make, told, seeded=True)

    found = {ALONE: learner()} | {name: learner(n) for name, n in AFTER.items()}
    slowly = learner(max(AFTER.values()), every=4, lr=FEW_LR)
    return found | {FEW: learner(every=4), FEW_AFTER: slowly}


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
        "other animals help where trials are few": [(FEW_AFTER, FEW, task) for task in common.FOUR],
        "more of them help more": [
            (more, fewer, task) for fewer, more in pairwise(AFTER) for task in common.FOUR
        ],
    }
    part = dict.fromkeys((*AFTER, FEW_AFTER), "animals")
    return {text: [Claim(part.get(c[0], "schemes"), *c) for c in of] for text, of in pairs.items()}


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
    scores = measured(sessions, options)
    judged = judge(scores)
    facts = common.described(sessions, options) | {"scores": scores}
    facts["claims"] = {
        text: [[*claim, *mean, verdict(mean)] for claim, mean in comparisons]
        for text, comparisons in judged.items()
    }
    out = options.out / ("claims_simulated" if simulated else "claims")
    common.write_json(out.with_suffix(".json"), facts)
    draw(judged).savefig(options.pictures / f"{out.name}.png", dpi=110)
    who = "simulated animals" if simulated else "recordings"
    out.with_suffix(".md").write_text(
        f"# The paper's claims, on {who}\n\nTest trials; differences session by session, ± "
        "standard error over sessions. Made by `python benchmarks/claims.py`.\n\n" + table(judged)
    )
    print(table(judged))


def measured(sessions: list[mtm.Session], options: argparse.Namespace) -> dict[str, Scores]:
    """Both parts' scores; of a part that was not asked for, what is done already."""
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
    for part, (methods, tasks) in parts.items():
        scores[part] = {}
        for name in [n for n in methods if n in (options.recordings or methods)]:
            session, rows = by_name[name], methods[name] | oracle
            if options.part in (None, part):
                common.run([session], rows, options.seeds, options.work / part, tasks=tasks)
            scores[part][name] = collected(session, rows, options.seeds, options.work / part)
    return scores


def judge(scores: dict[str, Scores]) -> dict[str, list[tuple[Claim, Mean]]]:
    """Each claim's comparisons, as far as they were measured."""
    judged = {}
    for text, comparisons in claims().items():
        pairs = [(claim, difference(claim, scores[claim.part])) for claim in comparisons]
        judged[text] = [(claim, mean) for claim, mean in pairs if mean is not None]
    return {text: pairs for text, pairs in judged.items() if pairs}


if __name__ == "__main__":
    main()
