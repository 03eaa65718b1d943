"""The command line from recordings to a JSON of scores; messages, not tracebacks, for bad input."""

import dataclasses
import json

import numpy as np
import pytest

from mtm import Session, TrainConfig, checkpoint, load
from mtm.cli import main, parse
from mtm.data import synthetic
from mtm.recipes import RECIPES

KEYS = ["co-smoothing", "forward-prediction", "inter-region", "intra-region", "choice"]
KEYS += ["wheel-speed", "whisker-motion-energy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Simulated files, and a model trained on two of them."""
    root = tmp_path_factory.mktemp("cli")
    sizes = ["--sessions", "2", "--trials", "40", "--neurons", "12", "--seed", "0"]
    assert main(["simulate", str(root), *sizes]) == 0
    train = ["train", str(root / "sim-0.npz"), str(root / "sim-1.npz"), "--out", str(root / "m")]
    assert main([*train, "--depth", "1", "--epochs", "2"]) == 0
    return root


def test_from_simulation_to_scores(folder, capsys):
    out = folder / "deep" / "scores.json"
    assert main(["evaluate", str(folder / "m"), str(folder / "sim-0.npz"), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    scores = json.loads(out.read_text())
    for key in KEYS:
        assert isinstance(scores[key], float) and np.isfinite(scores[key]) and key in printed
    reports = scores["details"]["reports"]
    assert set(reports) == {"MtM", "mean rate", "oracle"}
    assert reports["MtM"]["co-smoothing"]["bits_per_spike"] == pytest.approx(scores[KEYS[0]])
    assert "mean rate" in printed and "oracle" in printed and "stimulus only" in printed


def test_many_sessions_beside_a_baseline(folder, capsys):
    evaluate = ["evaluate", str(folder / "m"), *(str(folder / f"sim-{i}.npz") for i in range(2))]
    what = ["--tasks", "co-smoothing", "--baselines", "PSTH", "--batch-size", "5"]
    assert main([*evaluate, *what, "--json", str(folder / "s.json")]) == 0
    printed = capsys.readouterr().out
    scores = json.loads((folder / "s.json").read_text())
    assert set(scores) == {"co-smoothing", "details"} and "± over sessions" in printed
    details = scores["details"]
    assert set(details["sessions"]) == {"sim-0", "sim-1"} and "PSTH" in details["reports"]
    assert "of the oracle's: co-smoothing" in printed


def test_a_model_of_unknown_split_and_single_regions(folder, tmp_path, capsys):
    model = load(folder / "m")
    model.split_seed, model.seen = None, {}  # as of an imported checkpoint
    checkpoint.save(model, tmp_path / "imported")
    session = Session.load(folder / "sim-0.npz")
    session.regions = np.resize(["CA1", "LP"], 12)  # few, for speed
    session.behaviour["side"] = np.resize(["left", "left", "right"], session.n_trials)
    evaluate = ["evaluate", str(tmp_path / "imported"), str(session.save(tmp_path / "sim-0.npz"))]
    evaluate += ["--tasks", "co-smoothing", "side", "--json", str(tmp_path / "s.json")]
    assert main(evaluate) == 1 and "pass split_seed=0" in capsys.readouterr().err
    assert main([*evaluate, "--split-seed", "0", "--by-region", "side"]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert {"co-smoothing", "side"} < set(scores)
    assert set(scores["details"]["by_region"]["sim-0"]) == {"CA1", "LP"}


def test_a_model_of_patches_and_one_to_fine_tune(folder, capsys):
    new = [str(folder / "sim-0.npz"), "--out", str(folder / "patches"), "--epochs", "1"]
    assert main(["train", *new, "--depth", "1", "--tokenizer", "ndt2", "--patch-size", "4"]) == 0
    model = load(folder / "patches")
    assert model.config.tokenizer == "ndt2" and model.config.patch_size == 4
    further = [str(folder / "sim-1.npz"), "--out", str(folder / "further"), "--epochs", "1"]
    start = ["--start", str(folder / "patches"), "--token", "mean"]
    assert main(["train", *further, *start]) == 0
    assert load(folder / "further").session_names == ["sim-0", "sim-1"]
    for wrong in (["--tune", "session-layers"], ["--patch-size", "4"], [*start, "--depth", "2"]):
        assert main(["train", *further, *wrong]) == 1
        assert wrong[-2][2:] in capsys.readouterr().err


def test_prepare_reads_an_alf_tree(folder):
    for i in range(2):
        synthetic.write_alf(Session.load(folder / f"sim-{i}.npz"), folder / "alf")
    synthetic.index_alf(folder / "alf")
    command = ["prepare", "ibl", str(folder / "alf"), "--out", str(folder / "prepared")]
    assert main([*command, "--workers", "1", "--atlas", "none"]) == 0
    files = sorted((folder / "prepared").iterdir())
    prepared = {s.subject: s for s in map(Session.load, files)}
    for i in range(2):
        original = Session.load(folder / f"sim-{i}.npz")
        np.testing.assert_array_equal(prepared[original.subject].counts, original.counts)


def test_prepare_from_files(tmp_path, capsys):
    steinmetz = tmp_path / "Mouse_2017-01-02"
    steinmetz.mkdir()
    columns = {
        "spikes.times": np.arange(0, 40, 0.05),
        "spikes.clusters": np.arange(800) % 4,
        "clusters.peakChannel": np.arange(4) + 1,
        "trials.visualStim_times": np.arange(2, 38, 2.0),
        "trials.goCue_times": np.arange(2, 38, 2.0) + 0.5,
    }
    for name, values in columns.items():
        np.save(steinmetz / f"{name}.npy", values)
    (steinmetz / "channels.brainLocation.tsv").write_text("allen_ontology\n" + "CA1\n" * 4)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    how = ["--out", str(out), "--workers", "1", "--window", "0", "1", "--bin-size", "0.1"]
    folders = [str(steinmetz), str(tmp_path / "empty")]
    assert main(["prepare", "steinmetz", *folders, *how, "--align", "goCue_times"]) == 0
    text = capsys.readouterr().out
    assert "2 recordings: 1 written, 0 there already, 1 skipped" in text and "empty" in text
    session = Session.load(out / f"{steinmetz.name}.npz")
    assert session.counts.shape == (18, 10, 4) and session.window == (0, 1)
    options = {"align": "goCue_times", "window": [0, 1], "bin_size": 0.1}
    assert session.provenance["prepared"]["options"] == options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.npz", "--out", "x"], "absent.npz"),
        (["evaluate", "{root}/m", "{root}/other.npz"], "other"),
        (["evaluate", "{root}/m", "{root}/sim-0.npz", "--tasks", "cosmoothing"], "cosmoothing"),
        (["evaluate", "{root}/m", "{root}/sim-0.npz", "--device", "nonsense"], "nonsense"),
        (["train", "{root}/sim-0.npz", "--out", "x", "--lr", "-1"], "lr must be above 0"),
        (["train", "{root}/sim-0.npz", "{root}/sim-0.npz", "--out", "x"], "both hold a session"),
    ],
)
def test_bad_input_is_one_line_and_status_1(folder, capsys, arguments, message, monkeypatch):
    monkeypatch.chdir(folder)
    Session(np.ones((5, 100, 2)), ["CA1"] * 2, "other").save(folder / "other.npz")
    assert main([a.format(root=folder) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"mtm {arguments[0]}: error: ")
    assert error.count("\n") == 1 and "Traceback" not in error


def test_every_setting_of_training_can_be_given():
    flags, expected = [], {}
    for setting in dataclasses.fields(TrainConfig):
        value = getattr(RECIPES["paper"], setting.name)
        expected[setting.name] = value
        flag = "--" + setting.name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag if value else "--no-" + flag[2:]]
        elif isinstance(value, dict):
            expected[setting.name] = [("neuron", 0.2), ("causal", 0.5)]
            flags += [flag, "neuron=0.2", "causal=0.5"]
        elif isinstance(value, tuple):
            flags += [flag, *value]
            expected[setting.name] = list(value)
        else:
            flags += [flag, str(value).lower()]
    options = vars(parse(["train", "s.npz", "--out", "x", *flags]))
    assert {name: options[name] for name in expected} == expected
    none = parse(["train", "s.npz", "--out", "x", "--input-dropout", "none"])
    assert dict(filter(None, none.input_dropout)) == {}
