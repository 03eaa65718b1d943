"""The book's pages, their twins, and what the project says about itself agree with each other."""

import itertools
import json
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jupytext
import numpy as np
import pandas as pd
import pytest
import yaml
from markdown_it import MarkdownIt

import mtm
from mtm import cli

ROOT = Path(__file__).resolve().parent.parent
BOOK, PACKAGE = ROOT / "book", Path(mtm.__file__).parent  # which may be installed elsewhere
LONGEST_CELL = 15  # lines
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
PAGES = sorted(BOOK.glob("*.md"))
TEXTS = [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/**/*.md"), *PACKAGE.glob("**/*.md")]
OWN = {  # task -> the scheme that hides as it does
    **{"co-smoothing": "neuron", "forward-prediction": "causal"},
    **{"inter-region": "inter-region", "intra-region": "intra-region"},
}
NOTEBOOKS = [page for page in PAGES if "```{code-cell}" in page.read_text("utf-8")]


def results(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))


def test_twins_are_in_step_with_their_pages():
    check = [sys.executable, str(BOOK / "_pair.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_readme_example_runs(capsys):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    times = np.arange(0, 60, 0.01)
    yours = {
        "spike_times": times,
        "spike_clusters": np.resize([3, 7], len(times)),
        "align_times": np.arange(2.0, 56.0, 3.0),
        "sample_times": times,
        "speed": np.sin(times),
        "choice": np.resize([-1, 1], 18),
    }
    for example in examples:
        quick = example.replace("epochs=200", "epochs=3").replace("n_trials=100", "n_trials=50")
        exec(compile(quick, "README.md", "exec"), yours)
    assert "co-smoothing" in capsys.readouterr().out and len(examples) == 2
    made = yours["session"]
    assert made.region_names == ["CA1", "DG"] and set(made.behaviour) == {"choice", "wheel"}


def test_readme_command_lines_are_understood():
    """Every `-m mtm ...` of the README and the book parses, whatever files it names."""
    texts = [page.read_text("utf-8") for page in [ROOT / "README.md", *PAGES]]
    # A shell's longer lines and variables, of which the one that has to be known is a scheme.
    texts = [re.sub(r"\$\w+", "neuron", re.sub(r"\\\n\s*", "", text)) for text in texts]
    commands = [line.split("#")[0] for t in texts for line in t.splitlines() if " -m mtm" in line]
    found = [re.search(r" -m mtm ((?:(?! 2>|[`|]).)*)", command)[1] for command in commands]
    lines = [shlex.split(words) for words in found]
    assert len(lines) >= 5
    for words in lines:
        cli.parse(words)


def test_step_times_are_quoted_as_measured():
    models = results("train_step")["models"]
    for name, ratio in (("ours, depth 1", 1.4), ("ours", 1.0)):
        pair = models[name]["16"]["step_s"], models[f"{name}, no direct paths"]["16"]["step_s"]
        assert round(pair[0] / pair[1], 1) == ratio, name


def test_what_is_said_of_real_recordings_was_measured():
    found = results("real_data")
    assert len(found["scores"]) == 4 and len(found["one_seed"]) == 8
    behind, gains = {}, []
    for session, tasks in (found["scores"] | found["one_seed"]).items():
        for task in OWN:
            score = {name: mean[0] for name, mean in tasks[task].items()}
            lead = score.pop("MtM") - max(score.values())
            assert found["two_layers"][session][task][0] > max(score.values())
            gains.append(found["two_layers"][session][task][0] - tasks[task]["MtM"][0])
            behind |= {(session, task): round(lead, 3)} if lead < 0 else {}
    known = {("03_Cori_2016-12-18", "forward-prediction"): -0.004}
    assert behind == known | {("05_Forssmann_2017-11-02", "inter-region"): -0.003}
    assert round(np.mean(gains), 3) == 0.007 and len(gains) == 48
    mean = {t: {name: m[0] for name, m in row.items()} for t, row in found["mean"].items()}
    for task in OWN:
        assert max(mean[task], key=mean[task].get) == "MtM", task
        together = found["mean_with_the_same_bins"][task]  # reduced-rank regression, too
        assert max(together, key=lambda name: together[name][0]) == "MtM", task
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| ([\w -]+) \| (-?\d.*) \|$", readme, re.M))
    assert len(rows) == 6
    for name, cells in rows.items():
        assert cells.split(" | ") == [f"{mean[task][name]:.3f}" for task in OWN], name
    assert len(set(results("recipe")["searched"]) & set(found["scores"])) == 2
    tuned, found = "MtM, fine-tuned", results("behaviour")["mean"]
    for each in (mean, found):
        assert each["choice"]["raw counts"] < each["choice"]["MtM"]
        assert each["choice"]["MtM"] < each["choice"]["smoothed counts"]
        assert abs(each["wheel-speed"]["MtM"] - each["wheel-speed"]["smoothed counts"]) < 0.003
    choice, wheel, whisker = (found[k] for k in ("choice", "wheel-speed", "whisker-motion-energy"))
    assert (round(choice["MtM"], 3), round(choice["smoothed counts"], 3)) == (0.798, 0.815)
    assert choice[tuned] < choice["raw counts"]
    each = pd.DataFrame(results("behaviour")["scores"]).groupby(["behaviour", "recording"])
    lead = each[["MtM", tuned, "raw counts", "smoothed counts"]].mean().loc["choice"]
    lead = lead.rsub(lead.pop("MtM"), axis=0)
    assert lead.shape == (12, 3) and (lead.mean().abs() < 2.2 * lead.sem()).all()
    assert abs(wheel[tuned] - wheel["MtM"]) < 0.006
    assert 0.02 > whisker[tuned] - whisker["MtM"] > 0 < whisker["MtM"] - whisker["smoothed counts"]


def test_what_is_said_of_the_recipe_was_measured():
    """The sentences of the README and of the training chapter, against the results."""
    found = results("recipe")
    assert len(found["tested"]) == 3 and not set(found["tested"]) & set(found["searched"])
    for session, tasks in found["tested"].items():
        for task, row in tasks.items():
            ours, *theirs = (row[name][0] for name in row)
            assert next(iter(row)) == "ours" and len(theirs) == 2
            assert ours > max(theirs), (session, task)
        assert max(found["races"][session]["shares"]) < 1 / 20
    changes = {name: gains["mean"][0] for name, gains in found["differences"].items()}
    theirs = {name: changes.pop(name) for name in list(changes) if "authors" in name}
    leak, same = (theirs[f"the authors' options, two layers{x}"] for x in (" and leak", ""))
    assert len(theirs) == 3 and max(theirs.values()) < -0.1 and abs(leak - same) < 0.02
    costly = ["learned time embedding", "hide 0.1", "half the epochs", "hidden: an indicator",
              "maps start at random", "log(1 + count)", "counts as they are",
              "loss summed"]  # fmt: skip
    by_loss = sorted(changes, key=changes.get)
    assert set(by_loss[:8]) == set(costly) and by_loss[7] == "loss summed"
    for name in ("hidden: a learned number", "weights averaged", "neurons weigh alike",
                 "half as wide", "twice as wide", "no session token", "no prompt"):  # fmt: skip
        assert abs(changes[name]) < 0.006, name
    assert all(gain[0] > 0 for gain in found["differences"]["hide 0.6"].values())


def test_what_is_said_of_the_claims_was_measured():
    """The sentences of the chapters on the results and on the scoreboard, against the results."""
    scores, judged = (results("claims")[key] for key in ("scores", "claims"))
    gains = {(better, than, task): (mean, verdict) for rows in judged.values()
             for _, better, than, task, mean, _, _, verdict in rows}  # fmt: skip
    for task, own in OWN.items():  # temporal masking is behind everywhere, less so at the future
        assert gains["MtM", "temporal", task][0] > 0
        same = gains["MtM", "temporal, as MtM", task][0] - gains["MtM", "temporal", task][0]
        assert same > 0.05 if task in ("co-smoothing", "inter-region") else same < 0
        assert gains["MtM", f"{own} alone", task][0] > -0.005  # as good or better
    failed = [key for key, (_, verdict) in gains.items() if verdict == "fails"]
    assert failed == [("MtM", "MtM, no prompt", "inter-region")]
    assert round(gains[failed[0]][0], 3) == -0.002
    future = gains["MtM", "temporal", "forward-prediction"][0]
    assert future == min(gains["MtM", "temporal", task][0] for task in OWN)
    for methods in scores["schemes"].values():  # it does not fall below the mean rate
        lonely = np.mean(methods["intra-region alone"]["co-smoothing"])
        assert 0 < lonely < np.mean(methods["MtM"]["co-smoothing"])


def test_what_is_said_of_other_animals_was_measured():
    scores = results("claims")["scores"]["animals"]

    def gains(share, name, task):
        pair = f"{share}{name}", f"{share}this session alone"
        return [one[pair[0]][task][0] - one[pair[1]][task][0] for one in scores.values()]

    future = {"": 0.01, "half, ": 0.015, "a quarter, ": 0.02}  # bits per spike, about
    for share, name in itertools.product(future, ("1", "3", "all")):
        found = {task: gains(share, f"after {name} of others", task) for task in OWN}
        mean = {task: np.mean(each) for task, each in found.items()}
        assert min(found["forward-prediction"]) > 0 and len(found["forward-prediction"]) == 3
        assert abs(mean["forward-prediction"] - future[share]) < 0.005
        assert 0.004 < mean["intra-region"] < 0.011
        for task in ("co-smoothing", "inter-region"):
            assert mean[task] < (0.0055 if share == "" else 0.002)
    for task in OWN:
        fixed, own, all_of = (
            np.mean(gains("a quarter, ", name, task))
            for name in ("the encoder of others fixed", "only the own history of others",
                         "after all of others")
        )  # fmt: skip
        assert fixed < all_of
        if task == "forward-prediction":
            assert 0.4 < fixed / all_of < 0.6 and 0.25 < own / all_of < 0.4
        else:
            assert fixed < 0 and abs(own) < 0.001


def test_what_is_said_of_one_generalist_was_measured():
    """The end of the chapter on multi-task masking, against the results."""
    scores, judged = (results("claims_simulated")[key] for key in ("scores", "claims"))
    for _, _, _, _, gain, *_ in judged["other animals help"]:
        assert 0 < gain < 0.02

    def mean(method, task):
        return np.mean([np.mean(one[method][task]) for one in scores["schemes"].values()])

    for task, best in OWN.items():
        lead = mean("MtM", task) - mean(f"{best} alone", task)
        assert -0.03 < lead < 0 if task == "co-smoothing" else abs(lead) < 0.01, task
        others = {name: mean(f"{name} alone", task) for name in OWN.values() if name != best}
        for name, score in others.items():
            keeps_up = (name, task) == ("neuron", "inter-region")
            assert abs(mean("MtM", task) - score) < 0.02 if keeps_up else mean("MtM", task) > score
        assert abs(mean("MtM", task) - mean("MtM, no prompt", task)) < 0.01, task


def links(markdown: str) -> list[str]:
    """Targets of the links, those within directives included."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "fence" and token.info.startswith("{") and "code-cell" not in token.info:
            found += links(token.content)
        parts = token.children or []
        found += [part.attrs["href"] for part in parts if part.type == "link_open"]
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Those to the project's own files, and the files that are named `like/this.py`."""
    url, branch = CONFIG["repository"]["url"], CONFIG["repository"]["branch"]
    text = page.read_text("utf-8")
    for target in links(text):
        place = page.parent / target
        if target.startswith(f"{url}/blob/"):
            place = ROOT / target.removeprefix(f"{url}/blob/{branch}/")
        elif "://" in target:
            continue
        assert place.exists() or place.with_suffix(".md").exists(), target
    for named in re.findall(r"`((?:benchmarks|book|mtm|tests)/[\w./*-]+)`", text):
        place = PACKAGE.parent if named.startswith("mtm/") else ROOT
        assert any(place.glob(named.replace("NN_name", "*"))), named


def test_the_tests_that_a_page_names_exist():
    for page in PAGES:
        for file, name in re.findall(r"`(test_\w+)::(test_\w+)`", page.read_text("utf-8")):
            code = (ROOT / f"tests/{file}.py").read_text("utf-8")
            assert f"def {name}(" in code, f"{page.name}: {file}::{name}"


@pytest.mark.parametrize("path", [*TEXTS, *PACKAGE.glob("**/*.py")], ids=lambda path: path.stem)
def test_names_of_the_package_exist(path):
    """Every `mtm.this.that` that a text or a docstring names."""
    for name in re.findall(r"`~?(mtm(?:\.[A-Za-z]\w*)+)[`(]", path.read_text("utf-8")):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_code_cells_are_short(page):
    for cell in jupytext.read(page, fmt="md:myst").cells:
        if cell.cell_type == "code" and "hide-input" not in cell.metadata.get("tags", []):
            size = len(cell.source.strip().splitlines())
            assert size <= LONGEST_CELL, f"{page.name}: {size} lines, from {cell.source[:60]!r}"


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_models_that_are_called_by_hand_are_on_the_cpu(page):
    """On Colab `fit` trains on the GPU, and counts that a cell hands to a model are not there."""
    text = page.read_text("utf-8")
    trained = re.findall(r"^(\w+) = (?:mtm\.fit\(.*|\w+)\.model(\.cpu\(\))?$", text, re.M)
    for name, moved in trained:
        if re.search(rf"\b{name}(\.eval\(\))?(\.predict_log_rates)?\(", text):
            assert moved, name


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    changes = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert project["version"] == citation["version"] == mtm.__version__ == changes[1]
    assert str(citation["date-released"]) == changes[2]
