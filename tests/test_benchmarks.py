"""Each benchmark at a tiny size: it runs, keeps what is done, and judges rightly."""

import argparse
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mtm import fit, simulate
from mtm.masks import SCHEMES
from mtm.report import Mean

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
import behaviour  # noqa: E402
import claims  # noqa: E402
import common  # noqa: E402
import evaluate  # noqa: E402
import gpu  # noqa: E402
import real_data  # noqa: E402
import recipe  # noqa: E402
import train_step  # noqa: E402
import weights  # noqa: E402


@pytest.fixture(scope="module")
def small():
    """Two animals, so small that every method takes a moment."""
    sessions = simulate(2, 36, 7, seed=0, mean_rate=40.0, bin_size=0.2)
    for session in sessions:
        del session.behaviour["wheel-speed"], session.behaviour["whisker-motion-energy"]
    return sessions


def options(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])


def test_steps_and_evaluation_are_timed(monkeypatch):
    options(monkeypatch, train_step, "--small", "--device", "cpu", "--repeats", 4)
    found = train_step.measure(train_step.Bench(train_step.parse(), "ndt1", 2))
    assert found["step_s"] > 0 and found["step_tflop"] > 0
    args = argparse.Namespace(small=True, model="small", device="cpu", neurons_timed=2)
    assert evaluate.measure(args)["co-smoothing"]["passes"] == 24


def test_the_script_for_a_gpu_runs_at_tiny_sizes_on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "BATCHES", (32,))
    monkeypatch.setattr(gpu, "PRECISIONS", {"float32": {}})
    options(monkeypatch, gpu, "--small", "--device", "cpu", "--json", tmp_path / "gpu.json")
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["agreement"].values()) == {0.0} and not found["left_out"]
    assert 0 < found["training"]["seconds"] <= found["training"]["seconds_in_all"]
    steps = found["ndt1, 2 trials, float32"]
    assert 0 < steps["share_of_ceiling"] < 1 and steps["step_s"] * steps["trials_per_s"] > 1.99


def test_a_study_resumes_where_it_was_stopped(small, tmp_path):
    some = {"MtM": claims.schemes(1, 1)["MtM"]}
    common.run(small[:1], some, [0], tmp_path)
    [kept] = common.kept(tmp_path, "MtM", some["MtM"], small[:1], 0)
    before = kept.stat().st_mtime_ns
    common.run(small, some, [0, 1], tmp_path)
    assert (
        kept.stat().st_mtime_ns == before and len(list(tmp_path.glob("*/MtM-?-????????.json"))) == 4
    )
    other = small[0].select(trials=np.arange(35))  # other data of the same name
    assert common.kept(tmp_path, "MtM", some["MtM"], [other], 0) != [kept]
    longer = claims.schemes(1, 2)  # other settings
    assert not common.table(small, {"MtM": longer["MtM"]}, [0, 1], tmp_path)[small[0].name]
    whole = common.table(small, some, [0, 1], tmp_path)
    assert whole[small[0].name]["choice"]["MtM"].n == 2
    of_each = [whole[session.name]["co-smoothing"]["MtM"].value for session in small]
    means = common.averages(whole)
    assert means["co-smoothing"]["MtM"].value == pytest.approx(np.mean(of_each))


def test_every_method_is_one_command(small, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "recordings", lambda *_: small)
    places = ["--seeds", 0, "--epochs", 1, "--out", tmp_path, "--pictures", tmp_path, "--work"]
    names = ["mean rate", "MtM", "MtM, sessions together"]
    options(monkeypatch, real_data, *places, tmp_path / "a", "--methods", *names, "--", tmp_path)
    real_data.main()
    scores = json.loads((tmp_path / "real_data.json").read_text())["mean"]
    assert list(scores["co-smoothing"]) == names
    monkeypatch.setattr(common, "recordings", lambda *_: small[:1])
    options(monkeypatch, behaviour, *places, tmp_path / "e", "folder")
    behaviour.main()
    rows = json.loads((tmp_path / "behaviour.json").read_text())["scores"]
    assert rows and all(set(behaviour.COLUMNS) <= set(row) for row in rows)
    changes = recipe.variants()
    chosen = [recipe.BASE, "twice the epochs"]
    few = {name: changes[name] | {"epochs": 1 + i} for i, name in enumerate(chosen)}
    monkeypatch.setattr(recipe, "variants", lambda: few)
    monkeypatch.setattr(recipe, "contest", lambda: {
        name: recipe.trained({"epochs": 1 + i}) for i, name in enumerate((recipe.OURS, "paper"))
    })  # fmt: skip
    options(monkeypatch, recipe, *places, tmp_path / "c", "folder")
    recipe.main()
    SCHEMES.pop(recipe.AGAIN)
    assert "| twice the epochs |" in (tmp_path / "recipe.md").read_text()
    card = weights.card(fit(small, depth=1, epochs=1, progress=False), small, weights.SIMULATED, 1)
    assert "| oracle |" in card and "epochs 1" in card


def test_claims_come_out_either_way():
    claim = claims.Claim("schemes", "MtM", "temporal", "co-smoothing")
    scores = {
        "s": {"MtM": {"co-smoothing": [0.3, 0.5]}, "temporal": {"co-smoothing": [0.2]}},
        "t": {"MtM": {"co-smoothing": [0.5]}, "temporal": {"co-smoothing": [0.5, 0.5]}},
        "u": {"MtM": {"co-smoothing": [0.5]}},
    }
    mean = claims.difference(claim, scores)
    assert mean.value == pytest.approx(0.1) and mean.n == 2 and claims.verdict(mean) == "open"
    verdicts = [claims.verdict(Mean(v, 0.1, 3)) for v in (0.44, 0.42, 0.0, -0.42, -0.44)]
    assert verdicts == ["holds", "open", "open", "open", "fails"]  # t of two degrees: 4.30


def test_the_paper_is_put_to_the_test(small, tmp_path, monkeypatch):
    quick = lambda sessions, seed, **how: fit(sessions, depth=1, epochs=1, seed=seed)  # noqa: E731
    monkeypatch.setattr(claims, "temporal_ndt1", quick)
    how = {"part": None, "recordings": ["sim-0"], "depth": 1, "epochs": 1, "seeds": [0]}
    how = argparse.Namespace(work=tmp_path, **how)
    animals = [session.select() for session in small]
    for session in animals:
        session.behaviour.clear()
    scores = claims.measured(animals, how)
    assert len(scores["schemes"]["sim-0"]) == 9 and len(scores["animals"]["sim-0"]) == 16
    judged = claims.judge(scores)
    assert len(judged) == len(claims.claims()) - 1  # but for the behaviours
    plt.close(claims.draw(judged))
    one, few = (s.counts[s.split().test] for s in (small[0], claims.fewer(small[0], 4)))
    np.testing.assert_array_equal(few, one)


def test_the_papers_tables_were_copied_without_a_slip():
    facts = Path(__file__).parents[2] / "shared/reference/paper.md"
    if not facts.exists():
        pytest.skip(f"the paper's numbers, to compare with, are not at {facts}")
    text = facts.read_text("utf-8").replace("*", "")
    tables = json.loads((FOLDER / "paper.json").read_text())["tables"]
    for number in ("1", "2", "4", "5"):
        for name, row in tables[number]["scores"].items():
            assert "| " + " | ".join(f"{v:.2f}" for v in row.values()) + " |" in text, name
    for name, row in tables["7"]["scores"].items():
        short = "/".join(re.sub(r"^(-?)0\.", r"\1.", f"{v:.2f}") for v in row.values())
        assert short in text, name
