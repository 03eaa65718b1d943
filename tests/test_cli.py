"""The command line from recordings to a JSON of scores; messages, not tracebacks, for bad input."""

import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from mtm import Report, Session, checkpoint as hub
from mtm.cli import main
from mtm.recipes import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Simulated files, an ALF tree, and a model trained on two of the files."""
    root = tmp_path_factory.mktemp("cli")
    sizes = ["--sessions", "2", "--trials", "40", "--neurons", "12", "--seed", "0"]
    assert main(["simulate", str(root), *sizes, "--alf"]) == 0
    train = ["train", str(root / "sim-0.npz"), str(root / "sim-1.npz"), "--out", str(root / "m")]
    assert main([*train, "--depth", "1", "--epochs", "2"]) == 0
    return root


def test_from_simulation_to_scores(folder, capsys):
    assert main(["evaluate", str(folder / "m"), str(folder / "sim-0.npz"),
                 "--json", str(folder / "deep" / "scores.json")]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    scores = json.loads((folder / "deep" / "scores.json").read_text())
    keys = ["co-smoothing", "forward-prediction", "inter-region", "intra-region", "choice"]
    for key in [*keys, "wheel-speed", "whisker-motion-energy"]:
        assert isinstance(scores[key], float) and np.isfinite(scores[key])
        assert key in printed
    activity = scores["details"]["reports"]
    assert set(activity) == {"MtM", "mean rate", "oracle"}
    assert activity["MtM"]["co-smoothing"]["bits_per_spike"] == pytest.approx(
        scores["co-smoothing"], abs=1e-6
    )
    assert "mean rate" in printed and "oracle" in printed and "stimulus only" in printed


def test_many_sessions_beside_a_baseline(folder, capsys):
    files = [str(folder / f"sim-{i}.npz") for i in range(2)]
    what = ["--tasks", "co-smoothing", "--baselines", "PSTH", "--batch-size", "5"]
    where = ["--json", str(folder / "s.json"), "--report", str(folder / "r.json")]
    assert main(["evaluate", str(folder / "m"), *files, *what, *where]) == 0
    printed = capsys.readouterr().out
    scores = json.loads((folder / "s.json").read_text())
    assert set(scores) == {"co-smoothing", "details"} and "± over sessions" in printed
    details = scores["details"]
    assert set(details["sessions"]) == {"sim-0", "sim-1"} and "PSTH" in details["reports"]
    report = Report.from_json(folder / "r.json")
    assert report.tasks["co-smoothing"].mean() == pytest.approx(scores["co-smoothing"], abs=1e-5)
    assert "of the oracle's: co-smoothing" in printed
    assert main(["evaluate", str(folder / "m"), files[0], "--json", str(folder)]) == 1
    assert "is a folder; name a file in it" in capsys.readouterr().err
    trace = ["--tasks", "wheel-speed", "--by-region", "wheel-speed"]
    assert main(["evaluate", str(folder / "m"), files[0], *trace, *where[:2]]) == 0
    assert "training trials" not in capsys.readouterr().out  # there is no activity to score
    found = json.loads((folder / "s.json").read_text())["details"]["by_region"]["sim-0"]
    assert set(found) >= {"CA1", "LP"} and "R2" in found["LP"]
    assert main(["evaluate", str(folder / "m"), *files, "--by-region", "whisker"]) == 1
    said = capsys.readouterr()
    assert "no behaviour 'whisker' to decode by region; it has: choice" in said.err
    assert "beside others" not in said.out  # nothing was computed to be lost
    assert main(["evaluate", str(folder / "m"), *files, "--tasks", "cosmoothing"]) == 1
    assert "unknown task 'cosmoothing'" in capsys.readouterr().err


def test_training_leaves_settings_and_history(folder):
    info = hub.describe(folder / "m")["info"]
    assert info["train"]["epochs"] == 2 and info["history"][-1]["epoch"] == 2


def test_a_model_of_patches_and_one_to_go_on_with(folder, capsys):
    new = [str(folder / "sim-0.npz"), "--out", str(folder / "patches"), "--epochs", "1"]
    assert main(["train", *new, "--depth", "1", "--tokenizer", "ndt2", "--patch-size", "4"]) == 0
    model = hub.load(folder / "patches")
    assert model.config.tokenizer == "ndt2" and model.config.patch_size == 4
    further = [str(folder / "sim-1.npz"), "--out", str(folder / "further"), "--epochs", "1"]
    start = ["--start", str(folder / "patches"), "--tune", "session-layers"]
    assert main(["train", *further, *start]) == 0
    assert "mtm train: warning: tune='session-layers' with ndt2" in capsys.readouterr().err
    further_model = hub.load(folder / "further")
    assert further_model.session_names == ["sim-0", "sim-1"]
    assert further_model.tokenizer.readout.weight.equal(model.tokenizer.readout.weight)
    for wrong in (["--tune", "session-layers"], ["--patch-size", "4"]):
        assert main(["train", *further, *wrong]) != 0
        assert wrong[0] in capsys.readouterr().err
    assert main(["train", *further, *start, "--depth", "2"]) != 0
    assert "--depth: a model that is gone on with has its sizes" in capsys.readouterr().err


def test_prepare_reads_the_alf_tree_that_simulate_wrote(folder, capsys):
    assert (
        main(
            [
                "prepare",
                "ibl",
                str(folder / "alf"),
                "--out",
                str(folder / "prepared"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    files = sorted((folder / "prepared").iterdir())
    prepared = {s.subject: s for s in map(Session.load, files)}
    for i in range(2):
        original = Session.load(folder / f"sim-{i}.npz")
        np.testing.assert_array_equal(prepared[original.subject].counts, original.counts)
    assert main(["train", *map(str, files), "--out", str(folder / "p"), "--epochs", "1",
                 "--depth", "1"]) == 0  # fmt: skip
    assert main(["evaluate", str(folder / "p"), str(files[0])]) == 0
    assert "oracle" not in capsys.readouterr().out


def test_a_list_and_a_search_exclude_each_other(folder, tmp_path, capsys):
    ibl = ["prepare", "ibl", str(folder / "alf"), "--out", str(tmp_path)]
    assert main([*ibl, "--eids", "paper", "--lab", "x"]) == 1
    assert "--eids names the sessions" in capsys.readouterr().err and not any(tmp_path.iterdir())


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
    assert session.provenance["prepared"]["options"] == {
        "align": "goCue_times", "window": [0, 1], "bin_size": 0.1
    }  # fmt: skip
    assert main(["prepare", "steinmetz", str(tmp_path / "empty"), *how]) == 1
    assert "none of the 1 recordings could be read" in capsys.readouterr().err
    url = "http://user:secret@127.0.0.1:9/asset/download/?signature=secret"
    assert main(["prepare", "nwb", url, "--out", str(out), "--workers", "1"]) == 1
    text = "".join(capsys.readouterr())
    assert "http-127-0-0-1-9-asset-download" in text and "secret" not in text
    twice = ["prepare", "bwb", "a/x.h5", "b/x.h5", "--out", str(out)]
    assert main(twice) == 1 and "two recordings are named 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.npz", "--out", "x"], "absent.npz"),
        (["train", "{root}/m/config.json", "--out", "x"], "is not a readable session file"),
        (["evaluate", "{root}/nowhere", "{root}/sim-0.npz"], "holds no model"),
        (["evaluate", "{root}/m", "{root}/other.npz"], "was not trained on session 'other'"),
        (["prepare", "ibl", "{root}/nowhere", "--out", "x"], "is not a folder"),
        (["prepare", "ibl", "{root}/m", "--out", "x"], "sessions.pqt is missing"),
        (["simulate", "{root}/x", "--neurons", "3"], "a neuron for each of the 6 regions"),
        (["train", "{root}/sim-0.npz", "--out", "x", "--lr", "-1"], "lr must be above 0"),
        (
            ["train", "{root}/sim-0.npz", "{root}/sim-0.npz", "--out", "x"],
            "both hold a session named",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_1(folder, capsys, arguments, message, monkeypatch):
    monkeypatch.chdir(folder)
    Session(np.ones((5, 100, 2)), ["CA1"] * 2, "other").save(folder / "other.npz")
    assert main([a.format(root=folder) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"mtm {arguments[0]}: error: ")
    assert error.count("\n") == 1 and "Traceback" not in error


def test_what_cannot_be_decoded_costs_no_other_score(folder, capsys):
    session = Session.load(folder / "sim-0.npz")
    session.behaviour["choice"] = np.ones(40)
    session.behaviour["wheel-speed"] = np.full((40, 100), np.nan)
    session.save(folder / "odd" / "sim-0.npz")
    path = folder / "odd" / "scores.json"
    arguments = ["evaluate", str(folder / "m"), str(folder / "odd" / "sim-0.npz")]
    assert main([*arguments, "--json", str(path)]) == 0
    scores = json.loads(path.read_text())
    assert "co-smoothing" in scores and "whisker-motion-energy" in scores
    assert set(scores["details"]["left_out"]) == {"choice", "wheel-speed"}
    assert "choice: left out" in capsys.readouterr().out


def test_a_wrong_command_line_is_status_2(capsys):
    device = ["evaluate", "m", "s.npz", "--device"]
    absent = [*device, "nonsense"], [*device, "privateuseone"]  # the second is an import of torch's
    for arguments in ([], ["trian"], ["simulate"], *absent, ["simulate", "x", "--trials", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_every_setting_of_training_can_be_given(folder, tmp_path):
    other = {
        "epochs": 3, "batch_size": 5, "batches_per_step": 2, "micro_batch": 4, "tune": "all",
        "session_layers_share": 0.4, "token": "mean", "lr": 0.002, "warmup": 0.3, "div_factor": 5.0,
        "weight_decay": 0.1, "decay_all": True, "loss": "sum", "clip": None,
        "schemes": ["neuron", "causal"], "ratios": {"neuron": 0.2, "causal": 0.5},
        "prompt": False, "validations": 2, "patience": 1, "seed": 3, "split_seed": 4,
        "init": "paper", "precision": "bf16", "compile": "none",
    }  # fmt: skip
    assert set(other) == {field.name for field in fields(TrainConfig)}
    flags = []
    for name, value in other.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag if value else "--no-" + flag[2:]]
        elif isinstance(value, dict):
            flags += [flag, *(f"{key}={number}" for key, number in value.items())]
        else:
            values = value if isinstance(value, list) else [value]
            flags += [flag, *(str(v).lower() for v in values)]
    sessions = [str(folder / f"sim-{i}.npz") for i in range(2)]
    how = ["--depth", "1", "--out", str(tmp_path / "x"), *flags]
    how = [word for word in how if word not in ("--token", "mean")]  # there is no other session
    assert main(["train", *sessions, *how]) == 0
    found = hub.describe(tmp_path / "x")["info"]["train"]
    ratios = other["ratios"] | {"intra-region": 0.6}  # those that were not given stay
    assert found == other | {"token": "new", "ratios": ratios}
    assert main(["train", *sessions, *how]) == 0  # finished: nothing is done again
    assert hub.describe(tmp_path / "x")["info"]["train"] == found


def test_an_unknown_setting_is_refused_with_the_nearest_known(capsys):
    train = ["train", "s.npz", "--out", "x"]
    nearest_known = {
        "--epoch": "--epochs",
        "--batchsize": "--batch-size",
        "--weight_decay": "--weight-decay",
        "--learning-rate=3": None,
    }
    for wrong, nearest in nearest_known.items():
        with pytest.raises(SystemExit) as stop:
            main([*train, wrong, "3"])
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and wrong in error
        assert (f"did you mean {nearest}?" in error) == (nearest is not None)
    for wrong, problem in ((["--ratios", "neuron"], "need NAME=NUMBER, got neuron"),
                           (["--lr", "fast"], "invalid float value: 'fast'"),
                           (["--epochs", "none"], "invalid int value: 'none'"),
                           (["--loss", "median"], "invalid choice: 'median'")):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*train, *wrong])
        assert problem in capsys.readouterr().err


def test_a_folder_of_another_run_is_left_alone(folder, tmp_path, capsys):
    train = ["train", str(folder / "sim-0.npz"), "--out", str(tmp_path / "run"), "--depth", "1"]
    assert main([*train, "--epochs", "1", "--validations", "1"]) == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main([*train, "--epochs", "2", "--validations", "1"]) == 1
    assert "another run: train: epochs was 1 and is now 2" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert main([*train, "--epochs", "2", "--validations", "1", "--restart"]) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "mtm", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("simulate", "prepare", "train", "evaluate", "example"):
        assert word in done.stdout
