"""Behaviour from real recordings: MtM as it is and fine-tuned, beside the counts. One command.

    python benchmarks/behaviour.py FOLDER [--recordings NAME ...]

FOLDER is that of real_data.py. Each recording has models of its own, trained with the recipe and
kept in --work: one for each seed, where real_data.py has several, else one. Penalties, weights of
decoders and when to stop are chosen on training and validation trials; scores are of the test
trials. Results: results/behaviour.json and .md.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import numpy as np
import pandas as pd

import mtm
from mtm.decoding import decodable
from mtm.report import Mean

COLUMNS = ("MtM", "MtM, fine-tuned", "raw counts", "smoothed counts", "no activity")


def scores_of(session: mtm.Session, model: mtm.MtM, seed: int) -> list[dict[str, Any]]:
    """A row for each behaviour of a session."""
    rows = []
    for name in decodable(session):
        read = mtm.decode(model, session, name)[name]
        tuned = mtm.fit_behaviour(session, model, name, seed=seed)[name].decoded
        row: dict[str, Any] = {"recording": session.name, "behaviour": name, "seed": seed}
        nothing = read.others["majority" if read.kind == "classes" else "time_course"]
        counts = read.others["raw_counts"], read.others["smoothed_counts"]
        row |= dict(zip(COLUMNS, (read.score, tuned.score, *counts, nothing), strict=True))
        rows.append(row | {"read": read.features, "test_trials": read.n_test})
        print(row, flush=True)
    return rows


def main() -> None:
    """Read the command line, run, write the tables."""
    options = common.parser(__doc__, "behaviour").parse_args()
    rows = []
    sessions = common.recordings(options.folder, options.recordings)
    several = {session.name for session in common.recordings(options.folder)}
    for session in sessions:
        for seed in options.seeds[: None if session.name in several else 1]:
            if not (kept := options.work / f"{session.name}-{seed}").exists():
                how = {"depth": options.depth, "epochs": options.epochs, "progress": False}
                mtm.save(mtm.fit(session, seed=seed, **how), kept)
            rows += scores_of(session, mtm.load(kept), seed)
    write(pd.DataFrame(rows), sessions, options)


def write(table: pd.DataFrame, sessions: list[mtm.Session], options: argparse.Namespace) -> None:
    """Write and print the scores, their means over seeds, and those over recordings."""
    each = table.groupby(["recording", "behaviour"], sort=False)[list(COLUMNS)].mean()
    means = each.groupby("behaviour").mean()
    facts = common.described(sessions, options)
    facts |= {"mean": means.to_dict("index"), "scores": table.to_dict("records")}
    common.write_json(options.out / "behaviour.json", facts)
    lines = ["# Behaviour of real recordings", "", *__doc__.strip().split("\n\n")[2].splitlines()]
    lines += ["The choice: accuracy; traces: R2.", "", as_markdown("Mean over recordings", means)]
    for name, part in each.groupby("recording", sort=False):
        n = table[table.recording == name].seed.nunique()
        lines.append(as_markdown(f"{name}, {n} seeds" if n > 1 else name, part.droplevel(0)))
    (options.out / "behaviour.md").write_text("\n".join(lines))
    print("\n".join(lines))


def as_markdown(title: str, rows: pd.DataFrame) -> str:
    """A table with a column for each behaviour."""
    means = rows.map(lambda value: Mean(value, np.nan, 1))
    return common.markdown(title, means.to_dict("index"))


if __name__ == "__main__":
    main()
