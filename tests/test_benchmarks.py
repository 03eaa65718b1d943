"""The benchmarks that compare methods: what they keep, how they go on, what they say of it."""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mtm import Session, fit, simulate, training as train
from mtm.training import SessionData
from mtm.masks import SCHEMES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import claims  # noqa: E402
import real_data  # noqa: E402
import recipe  # noqa: E402
import studies  # noqa: E402

from mtm.report import Mean  # noqa: E402


@pytest.fixture(scope="module")
def small():
    """Two animals, so small that every method takes a moment."""
    sessions = simulate(2, 40, 12, seed=0, mean_rate=40.0, bin_size=0.1)
    for session in sessions:
        del session.behaviour["wheel-speed"], session.behaviour["whisker-motion-energy"]
    return sessions


def test_a_study_goes_on_where_it_was_stopped(small, tmp_path):
    chosen = claims.schemes(depth=1, epochs=1)
    some = {name: chosen[name] for name in ("MtM, no prompt", "MtM")}
    seconds = real_data.run(small[:1], {"MtM": some["MtM"]}, [0], tmp_path)
    assert len(seconds) == 1
    [kept] = real_data.kept(tmp_path, "MtM", some["MtM"], small[:1], 0)
    before = kept.read_text()
    seconds = real_data.run(small, some, [0, 1], tmp_path)
    assert len(seconds) == 8 and kept.read_text() == before
    longer = claims.schemes(depth=1, epochs=2)  # other settings are other runs
    assert not real_data.table(small, {"MtM": longer["MtM"]}, [0, 1], tmp_path)[small[0].name]
    other = small[0].select(trials=np.arange(39))  # and so are other data of the same name
    assert real_data.kept(tmp_path, "MtM", some["MtM"], [other], 0) != [kept]
    whole = real_data.table(small, some, [0, 1], tmp_path)
    assert whole[small[0].name]["choice"]["MtM"].n == 2
    assert real_data.table(small, some, [0], tmp_path)[small[0].name]["choice"]["MtM"].n == 1
    assert set(whole) == {session.name for session in small}
    means = real_data.averages(whole)
    of_each = [whole[session.name]["co-smoothing"]["MtM"].value for session in small]
    assert means["co-smoothing"]["MtM"].value == pytest.approx(np.mean(of_each))
    figure = studies.draw(means, "title")
    assert [ax.get_title() for ax in figure.axes[:4]] == list(real_data.FOUR)
    plt.close(figure)
    facts = json.dumps(real_data._without_nan(means), allow_nan=False)
    assert json.loads(facts)["co-smoothing"]["MtM"][2] == 2


def test_each_prompt_is_shown_to_the_same_model(small):
    methods = studies.prompt(depth=1, epochs=1)
    made = {name: method.make(small[:1], 0) for name, method in methods.items()}
    assert len({id(prompted.model) for prompted in made.values()}) == 1
    assert [prompted.prompt for prompted in made.values()] == list(studies.MTM_SCHEMES)
    ratios = studies.ratio(depth=1, epochs=1)
    assert len(ratios) == 12 and "MtM 0.1" in ratios


def test_rows_of_methods_that_were_not_run_stay_as_they_were():
    rest = real_data.methods(1, 1)
    del rest["MtM"]
    whole = {"s": {"choice": {"MtM": Mean(0.5, 0.1, 3)}}}
    row = {"MtM": [0.1, 0.1, 3], "ridge": [0.2, None, 1], "gone": [0.3, 0.1, 3]}
    earlier = {"s": {"choice": row, "forward-prediction": {"ridge": [0.4, 0.1, 9]}}, "t": {}}
    real_data.carry_over(whole, rest, earlier)
    assert whole["s"]["forward-prediction"] == {"ridge": Mean(0.4, 0.1, 9)}
    ridge, ours = whole["s"]["choice"].items()  # in the order of the methods
    assert ridge[0] == "ridge" and ridge[1].value == 0.2 and np.isnan(ridge[1].error)
    assert ours == ("MtM", Mean(0.5, 0.1, 3))


def test_a_single_task_and_scores_below_zero_can_be_drawn():
    means = {"causal": {"a": Mean(-0.2, 0.1, 3), "b": Mean(-0.1, np.nan, 1)}}
    figure = real_data.draw(means, "title")
    low, high = figure.axes[0].get_xlim()
    assert low < -0.2 and high >= 0
    plt.close(figure)
    assert real_data.winners({"s": {"causal": means["causal"]}}) == ["s, causal: b -0.100"]
    nothing = {"s": {"causal": {"a": Mean(np.nan, np.nan, 0)}}}
    assert real_data.winners(nothing) == []


def test_who_wins_is_said_for_ties_and_losses_alike():
    scores = {"a": {"choice": {"ridge": Mean(0.5, 0.1, 3), "MtM": Mean(0.4, 0.1, 3)}},
              "b": {"choice": {"ridge": Mean(0.2, 0.1, 3), "MtM": Mean(0.3, 0.1, 3)}}}  # fmt: skip
    first, second = real_data.winners(scores)
    assert first == "a, choice: ridge 0.500; the best of MtM (MtM) is behind by 0.100"
    assert second == "b, choice: MtM 0.300; ahead of ridge by 0.100"


def test_controls_that_see_no_activity_do_not_win():
    scores = {"ridge": Mean(0.5, 0.1, 3), "MtM": Mean(0.7, np.nan, 1)}
    scores["no activity: stimulus"] = Mean(0.9, 0.1, 3)
    text = real_data.markdown("title", {"choice": scores})
    assert "| ridge | 0.500 ± 0.100 |" in text and "| MtM | **0.700** |" in text
    assert "| no activity: stimulus | 0.900 ± 0.100 |" in text
    assert real_data.winners({"a": {"choice": scores}}) == [
        "a, choice: MtM 0.700; ahead of ridge by 0.200"
    ]


def test_every_variant_of_the_recipe_changes_something(small):
    told = {n: recipe.trained(*v).settings for n, v in recipe.variants().items()}
    assert len({json.dumps(settings, sort_keys=True) for settings in told.values()}) == len(told)
    SCHEMES.pop(recipe.AGAIN)  # of this process alone
    paper = list(recipe.contest().values())[-1].settings
    assert paper["train"]["epochs"] == 1000 and paper["model"]["input_counts"] == "raw"


def test_a_trick_changes_training_and_ends_with_it(small):
    quick = {"epochs": 2, "validations": 2}
    found = {}
    for name in (recipe.BASE, "neurons weigh alike", "weights averaged"):
        changes, trick = recipe.variants()[name]
        fit = recipe.trained(changes | quick, trick).make(small[:1], 0)
        found[name] = fit.best["mean"]
        scores = train.validate(
            fit.model, [SessionData(small[0], fit.config, fit.device)], fit.config
        )
        assert np.mean(list(scores.values())) == pytest.approx(fit.best["mean"], abs=1e-6), name
    SCHEMES.pop(recipe.AGAIN)
    assert len(set(found.values())) == len(found)
    again = recipe.trained({"ratios": {}} | quick).make(small[:1], 0).best["mean"]
    assert again == found[recipe.BASE]


def test_a_race_ends_where_ours_is_as_good(small, tmp_path):
    curves = {"paper": [0.1, 0.3, 0.2], "soon": [0.2, 0.4], "never": [0.1, 0.2]}
    for name, curve in curves.items():
        history = [{"step": 10 * (i + 1), "mean": mean} for i, mean in enumerate(curve)]
        text = json.dumps({"history": history})
        (tmp_path / name).with_suffix(real_data.HISTORY).write_text(text)
    ours, theirs = [tmp_path / "soon", tmp_path / "never"], tmp_path / "paper"
    found = recipe.race(small[0], ours, theirs)
    assert found["goal"] == 0.3 and found["steps"] == [20, None]
    assert found["shares"] == [pytest.approx(2 / 3), None]


def test_differences_are_taken_session_by_session():
    def of(*values):
        return {recipe.BASE: Mean(values[0], 0.1, 9), "b": Mean(values[1], 0.1, 9)}

    whole = {
        "s": dict.fromkeys(real_data.FOUR, of(0.2, 0.3)),
        "t": dict.fromkeys(real_data.FOUR, of(0.5, 0.4)) | {"co-smoothing": of(0.5, 0.9)},
    }
    found = recipe.differences(whole, [recipe.BASE, "b", "not run"])
    assert list(found) == ["b", recipe.BASE]
    assert found["b"]["co-smoothing"].value == pytest.approx(0.25)
    assert found["b"]["mean"].value == pytest.approx((0.1 + (0.4 - 0.3) / 4) / 2)
    assert "| b | +0.062 ± " in recipe.search_table(found)
    plt.close(recipe.draw(found, 2))


def test_the_papers_tables_were_copied_without_a_slip():
    facts = Path(__file__).parents[2] / "shared/reference/paper.md"
    if not facts.exists():
        pytest.skip(f"the paper's numbers, to compare with, are not at {facts}")
    text = facts.read_text("utf-8").replace("*", "")
    tables = json.loads((Path(claims.__file__).parent / "paper.json").read_text())["tables"]
    for number in ("1", "2", "4", "5"):
        for name, row in tables[number]["scores"].items():
            assert "| " + " | ".join(f"{v:.2f}" for v in row.values()) + " |" in text, name
    for name, row in tables["7"]["scores"].items():
        short = "/".join(re.sub(r"^(-?)0\.", r"\1.", f"{v:.2f}") for v in row.values())
        assert short in text, name


def test_an_animal_is_left_out_entirely():
    sessions = [mtm_session(name, animal) for name, animal in
                [("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")]]  # fmt: skip
    found = {name: [s.name for s in others] for name, others in claims.held_out(sessions).items()}
    assert found == {
        "a1": ["b1", "c1", "b2"],  # one of each animal first
        "b1": ["a1", "c1", "a2"],
        "c1": ["a1", "b1", "a2", "b2"],
    }


def test_a_quarter_of_the_training_trials_leaves_the_others_alone(small):
    split, some = small[0].split(), claims.fewer(small[0], 4)
    assert claims.fewer(small[0], 1) is small[0]
    kept = some.split()
    assert len(kept.train) == len(split.train[::4])
    for part in ("val", "test"):
        now, then = getattr(kept, part), getattr(split, part)
        np.testing.assert_array_equal(some.counts[now], small[0].counts[then])


def mtm_session(name, animal):
    return Session(np.zeros((5, 4, 3)), name=name, subject=animal)


def test_claims_come_out_either_way():
    claim = claims.Claim("schemes", "MtM", "temporal", "co-smoothing")
    scores = {
        "s": {"MtM": {"co-smoothing": [0.3, 0.5]}, "temporal": {"co-smoothing": [0.2]}},
        "t": {"MtM": {"co-smoothing": [0.5]}, "temporal": {"co-smoothing": [0.5, 0.5]}},
        "u": {"MtM": {"co-smoothing": [0.5]}},
    }
    mean = claims.difference(claim, scores)
    assert mean.value == pytest.approx(0.1) and mean.n == 2 and claims.verdict(mean) == "open"
    assert claims.difference(claim._replace(task="choice"), scores) is None
    verdicts = [claims.verdict(Mean(v, 0.1, 3)) for v in (0.44, 0.42, 0.0, -0.42, -0.44)]
    assert verdicts == ["holds", "open", "open", "open", "fails"]  # t of two degrees: 4.30
    assert claims.verdict(Mean(0.0, 0.0, 3)) == "open"
    assert claims.verdict(Mean(0.3, np.nan, 1)) == "one session"
    claims.check(["a"], ["a", "b"])
    with pytest.raises(SystemExit, match="'c' is none of: a, b"):
        claims.check(["c"], ["a", "b"])


def test_the_paper_is_put_to_the_test(small, tmp_path, monkeypatch):
    """Both parts on two animals, one epoch each: one of them alone, one left out."""
    quick = lambda sessions, seed, **how: fit(sessions, depth=1, epochs=1, seed=seed)  # noqa: E731
    monkeypatch.setattr(claims, "temporal_ndt1", quick)
    options = argparse.Namespace(
        depth=1, epochs=1, seeds=[0], work=tmp_path, part=None, alone=["sim-0"], left_out=["sim-1"]
    )
    assert [s.name for s in claims.held_out(small)["sim-1"]] == ["sim-0"]
    scores = claims.measured([dataclasses.replace(s, behaviour={}) for s in small], options)
    assert {part: list(found) for part, found in scores.items()} == {
        "schemes": ["sim-0"], "animals": ["sim-1"],
    }  # fmt: skip
    assert len(scores["schemes"]["sim-0"]) == 9 and len(scores["animals"]["sim-1"]) == 7
    assert all("oracle" in methods for found in scores.values() for methods in found.values())
    assert len(list((tmp_path / "pretrained").iterdir())) == 1  # made once, for all rows
    judged = claims.judge(scores)
    assert len(judged) == len(claims.claims()) - 1  # but for the behaviours
    assert "| MtM minus temporal | co-smoothing |" in claims.table(judged)
    plt.close(claims.draw(judged))
