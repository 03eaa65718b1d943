"""Predictions for BrainWideBench: exact windows and targets, a check that finds what is spoiled,
scores that are the scorer's own, and one command from session files to the zip."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import PoissonRegressor, Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score

pytest.importorskip("h5py")
import h5py  # noqa: E402
from bwb_files import NORMALIZE, write_session  # noqa: E402

import mtm  # noqa: E402
from mtm import bwb, metrics  # noqa: E402
from mtm.bwb import decoders, submission  # noqa: E402
from mtm.bwb.tasks import (  # noqa: E402
    TASKS,
    mean_recall,
    poisson_scores,
    read,
    trials,
    truth,
)
from mtm.cli import main  # noqa: E402
from mtm.session import SessionError  # noqa: E402

SMALL = {"duration": 190.0, "chunk": 40.0, "gap": 4.0, "units": 12, "rate": 6.0}
NO_SCORER = "the benchmark's scorer is missing: pip install --no-deps ibl-bwb-eval==0.1.0"
TS1 = [task for task in TASKS if task.startswith("ts1")]
TS2 = [task for task in TASKS if task.startswith("ts2")]
TRACES = {  # task without its prefix -> group, event, and column of the samples to trust
    "whisker_motion_energy": ("whisker", "movement_onset_time", None),
    "wheel_speed": ("wheel", "movement_onset_time", None),
    "left_paw_speed": ("paws", "movement_onset_time", "is_left_paw_confident"),
    "right_paw_speed": ("paws", "movement_onset_time", "is_right_paw_confident"),
    "licking_rate": ("licks", "feedback_time", None),
}


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """A file of random selected units, and what is in it."""
    path = tmp_path_factory.mktemp("files") / "selected.h5"
    return path, write_session(path, seed=3, **SMALL)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "all.h5"
    return path, write_session(path, seed=3, filtering="all_units", **SMALL)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Files of a simulated animal in both builds."""
    animal = mtm.simulate(1, 80, 24, window=(-1.0, 2.5), seed=1)[0]
    folder = tmp_path_factory.mktemp("simulated")
    return [bwb.write_session(animal, folder / f"{build}.h5", build) for build in bwb.BUILDS]


def fitted(path):
    """A predictor: each unit's mean rate, which follows the visible population."""
    rates = torch.from_numpy(read(path).rates).float()
    kernel = torch.exp(-0.5 * (torch.arange(-12.0, 13) / 5) ** 2)
    kernel = (kernel / kernel.sum())[None, None]

    def smooth(counts):
        return torch.nn.functional.conv1d(counts[:, None], kernel, padding=12)[:, 0]

    def predict(counts, scheme, mask, session):
        seen = smooth(counts.sum(dim=2)) + 1.0
        expected = smooth((rates * ~mask.hidden).sum(dim=2)) + 1.0
        return rates.log() + 0.5 * torch.log(seen / expected)[..., None]

    return predict


@pytest.fixture(scope="module")
def exported(simulated, tmp_path_factory):
    """All tasks of both files by one predictor, three seeds of each; not to be changed."""
    folder, recording = tmp_path_factory.mktemp("exported"), read(simulated[0])
    predictor = fitted(simulated[0])  # all units are selected ones here
    slow = ["ts1-stimulus_contrast", "ts1-licking_rate"]  # predicted once: seeds are all the same
    quick = [task for task in TASKS if task not in slow]
    paths = submission.export([predictor] * 3, simulated, folder, "toy", tasks=quick)
    for task, path in zip(slow, submission.export(predictor, simulated, folder, "toy",
                                                      tasks=slow), strict=True):  # fmt: skip
        more = [submission.save(folder, "toy", task, seed, recording, load_file(path))
                for seed in (44, 45)]  # fmt: skip
        paths += [path, *more]
    return folder, paths


# --------------------------------------------------------------------- what the files hold


def brute_counts(made, start):
    """The benchmark's formula, spike by spike."""
    counts = np.zeros((50, len(made["units"]["id"])), dtype=int)
    spikes = made["spikes"]
    for time, unit in zip(spikes["timestamps"], spikes["unit_index"], strict=True):
        if start <= time < start + 1.0:
            counts[int(np.floor((time - start) * 50)), unit] += 1
    return counts


def test_counts_are_the_benchmarks(selected):
    path, made = selected
    recording = read(path)
    starts = recording.windows()[[0, 1, 2, 700, -1]]
    counts = recording.counts(starts)
    for k, start in enumerate(starts):
        np.testing.assert_array_equal(counts[k], brute_counts(made, start))
    assert counts.sum() > 100
    length = np.ptp(made["spikes"]["timestamps"])
    rates = np.bincount(made["spikes"]["unit_index"]) / length
    np.testing.assert_allclose(recording.rates, rates / 50)


def test_counts_at_the_edges(tmp_path):
    """Spikes on a window's start, its end, and the edges of its bins."""
    edges = np.array([9.5, 10.0, 10.02, 10.5, np.nextafter(11.0, 0), 11.0, 11.5])

    def edit(file):
        del file["spikes/timestamps"], file["spikes/unit_index"]
        file["spikes/timestamps"], file["spikes/unit_index"] = edges, np.zeros(7, dtype=int)

    write_session(tmp_path / "s.h5", **SMALL, edit=edit)
    counts = read(tmp_path / "s.h5").counts(np.array([10.0, 30.0]))
    expected = np.floor((edges[1:5] - 10.0) * 50).astype(int)
    np.testing.assert_array_equal(np.flatnonzero(counts[0, :, 0]), np.unique(expected))
    assert counts.sum() == 4


@pytest.mark.parametrize("task", TS2)
def test_predictor_sees_and_is_asked_for_the_right_entries(selected, task):
    path, made = selected
    recording, shown = read(path), []
    held = made["units"]["ts2_co_smoothing_is_held_out_test"]

    def predict(counts, scheme, mask, session):
        shown.append((counts.clone(), scheme, mask, session))
        t, n = torch.arange(50.0)[:, None], torch.arange(12.0)
        return (counts.sum(dim=(1, 2))[:, None, None] / 64 + t + 64 * n).expand(counts.shape)

    made_of = submission.predict_task(predict, recording, task, dtype="float32")
    starts = bwb.ts2_windows(path, "test")
    np.testing.assert_array_equal(made_of["window_timestamps"], starts)
    true = torch.from_numpy(recording.counts(starts))
    hidden = np.zeros((50, 12), dtype=bool)
    hidden[:, held] = task == "ts2-co_smoothing"
    hidden[45:] |= task == "ts2-forecasting"
    visible = true.masked_fill(torch.from_numpy(hidden), 0)
    assert torch.equal(torch.cat([counts for counts, *_ in shown]), visible.float())
    for counts, scheme, mask, session in shown:
        assert (scheme, mask.causal) == (TASKS[task].prompt, task == "ts2-forecasting")
        assert session == made["id"] and len(counts) <= 256 and len(shown) > 3
        assert torch.equal(mask.hidden, torch.from_numpy(hidden).expand(counts.shape))
    bins, units = (slice(0, 50), held) if "co" in task[:7] else (slice(45, 50), slice(None))
    t, n = np.arange(50.0)[:, None], np.arange(12.0)
    answer = visible.sum(dim=(1, 2)).numpy()[:, None, None] / 64 + t + 64 * n
    np.testing.assert_array_equal(made_of["predictions"], answer[:, bins][:, :, units])
    ids = [row.tobytes().rstrip(b"\0").decode() for row in made_of["unit_ids"]]
    assert ids == [f"{made['id']}/{unit}" for unit in made["units"]["id"][units]]
    assert made_of["unit_ids"].shape[1] == 73 and made_of["unit_ids"].dtype == np.uint8


def test_rates_of_zero_are_floored_and_nonsense_is_refused(selected):
    recording = read(selected[0])

    def constant(value):
        return lambda counts, *_: torch.full(counts.shape, value)

    made = submission.predict_task(constant(-np.inf), recording, TS2[0])
    assert made["predictions"].dtype == np.float16
    np.testing.assert_allclose(made["predictions"].astype(float), np.log(1e-9), rtol=1e-3)
    for value in (np.nan, np.inf, 1e5):  # the last is infinite as float16
        with pytest.raises(ValueError, match="NaN or infinite log-rates"):
            submission.predict_task(constant(value), recording, TS2[1])
    with pytest.raises(ValueError, match="returned shape"):
        submission.predict_task(lambda counts, *_: counts[:, :5], recording, TS2[1])


# -------------------------------------------------------------------------------- behaviour


def brute_trials(made, task, part):
    """Rows, window starts of the trials of a behaviour task."""
    name, columns = task.removeprefix("ts1-"), made["trials"]
    event, offset = {
        "choice": ("movement_onset_time", -1.0),
        "reward": ("feedback_time", 0.0),
        "stimulus_contrast": ("stim_on_time", -0.9),
    }.get(name, (TRACES.get(name, (0, 0))[1], 0.0))
    [[begin, end]] = made["splits"][f"ts1_{part}"]
    rows, starts = [], []
    for row in np.flatnonzero(columns["is_valid"]):
        start = columns[event][row] + offset
        if begin <= start and start + 1.0 <= end:
            if name in TRACES:
                group, _, trust = TRACES[name]
                table = made["series"][group]
                times = table["times"]
                if start < times[0] or start + 1.0 > times[-1]:
                    continue
                inside = (times >= start) & (times < start + 1.0)
                if trust and not table[trust][inside].any():
                    continue
            rows.append(row)
            starts.append(start)
    return np.array(rows), np.array(starts)


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("task", TS1)
def test_targets_of_behaviour(everything, task, part):
    path, made = everything
    found, name = trials(read(path), task, part), task.removeprefix("ts1-")
    rows, starts = brute_trials(made, task, part)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.starts, starts)
    assert len(rows) and found.rows.dtype == np.int64
    if name not in TRACES:
        np.testing.assert_array_equal(found.values[:, 0], made["trials"][name][rows])
        return
    group, _, trust = TRACES[name]
    table = made["series"][group]
    assert found.values.shape == (len(rows), 50, 1) and found.values.dtype == np.float32
    for k, start in enumerate(starts):
        inside = (table["times"] >= start) & (table["times"] < start + 1.0)
        values = table[name][inside]
        if f"{group}/{name}" in NORMALIZE:
            mean, std = NORMALIZE[f"{group}/{name}"]
            values = (values - mean) / std
        trusted = table[trust][inside] if trust else np.ones(50, dtype=bool)
        if name == "licking_rate":
            values = values / 50
        np.testing.assert_array_equal(found.trusted[k], trusted)
        np.testing.assert_allclose(found.values[k, trusted, 0], values[trusted], rtol=1e-5)


def test_samples_with_times_of_their_own(tmp_path, everything):
    write_session(tmp_path / "s.h5", seed=3, filtering="all_units", **SMALL,
                  irregular=("whisker", "paws", "licks", "wheel"))  # fmt: skip
    for task in TS1:
        one, other = (trials(read(p), task, "test") for p in (everything[0], tmp_path / "s.h5"))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_decoder_of_counts_is_a_poisson_regression():
    """Against scikit-learn's, to which the offset is an exposure."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 7))
    x -= x.mean(axis=0)
    counts = rng.poisson(np.exp(x[:, :3]))
    fits = decoders.poisson_regressions(x, counts, [10.0, 1.0])
    for alpha, (offset, weights) in zip([10.0, 1.0], fits, strict=True):
        for t in range(3):
            exposure = np.full(60, np.exp(offset[t]))
            theirs = PoissonRegressor(alpha=alpha / exposure.sum(), fit_intercept=False, tol=1e-9,
                                      max_iter=2000)  # fmt: skip
            theirs.fit(x, counts[:, t] / exposure, sample_weight=exposure)
            np.testing.assert_allclose(weights[:, t], theirs.coef_, atol=2e-3)
    x_test = np.vstack([rng.normal(size=(20, 7)), np.full((1, 7), 1e4)])
    found = decoders.decode_counts(x, x_test, counts)
    assert found.shape == (21, 3) and np.exp(found.max()) <= counts.max() + 1 + 1e-9
    true = rng.poisson(np.exp(x_test[:20, :3]))
    guess = poisson_scores([(found[:20, :, None], true[:, :, None])])
    assert guess["poisson_d2"] > 0.1
    silent = decoders.decode_counts(x, x_test, np.zeros((60, 3)))
    assert np.isfinite(silent).all() and silent.max() < -4


def test_decoders_of_traces_and_classes():
    rng = np.random.default_rng(1)
    x, x_test = rng.normal(size=(80, 5)), rng.normal(size=(30, 5))
    weights = rng.normal(size=(5, 4))
    y, trusted = x @ weights, rng.random((80, 4)) < 0.7
    whole = decoders.decode_traces(x, x_test, y, np.ones((80, 4), dtype=bool))
    np.testing.assert_allclose(
        whole, Ridge(alpha=decoders.TRACE_PENALTIES[0]).fit(x, y).predict(x_test)
    )
    spoiled = np.where(trusted, y, np.nan)  # what is not trusted is not looked at
    part = decoders.decode_traces(x, x_test, spoiled, trusted)
    assert r2_score((x_test @ weights).ravel(), part.ravel()) > 0.7
    labels = (x[:, 0] > 0.8) * 3
    found = decoders.decode_classes(x, x_test, labels, 5)
    assert found.shape == (30, 5) and (found[:, [1, 2, 4]] == decoders.LOWEST).all()
    assert mean_recall(found.argmax(axis=1), (x_test[:, 0] > 0.8) * 3) > 0.8


def test_a_behaviour_that_is_absent_or_too_rare(tmp_path):
    path = tmp_path / "s.h5"
    write_session(path, filtering="all_units", **SMALL, leave_out=("licks", "paws"))
    recording, smooth = read(path), fitted(path)
    assert submission.predict_task(smooth, recording, "ts1-licking_rate") is None
    assert truth(recording, "ts1-left_paw_speed") is None
    with pytest.raises(SessionError, match=r"ts1-stimulus_contrast: classes .* leave the task out"):
        submission.predict_task(smooth, recording, "ts1-stimulus_contrast")
    paths = submission.export(smooth, [path], tmp_path / "p", "x", tasks=["ts1-wheel_speed",
                              "ts1-licking_rate"])  # fmt: skip
    assert [p.parts[-3] for p in paths] == ["ts1-wheel_speed"]
    assert submission.check(tmp_path / "p", [path], deterministic=True) == []


# ------------------------------------------------------------------------- the scorer's word


@pytest.fixture(scope="module")
def scored(exported, simulated, tmp_path_factory):
    """Where the ground truth is, and what the scorer says of the exported predictions."""
    ts1 = pytest.importorskip("ibl_bwb_eval.scoring.ts1", reason=NO_SCORER)
    ts2 = pytest.importorskip("ibl_bwb_eval.scoring.ts2", reason=NO_SCORER)
    folder = tmp_path_factory.mktemp("truth")
    submission.write_truth(simulated, folder)
    theirs = ts1.score_dir(exported[0], folder) | ts2.score_dir(exported[0], folder)
    return folder, {key[1:]: value for key, value in theirs.items()}


def test_scores_are_the_scorers(exported, simulated, scored):
    ours, (_, theirs) = submission.score(exported[0], simulated), scored
    assert ours.keys() == theirs.keys() and len(ours) == 3 * len(TASKS)
    for key, scores in ours.items():
        for metric, value in scores.items():
            assert value == pytest.approx(theirs[key][metric], abs=1e-5), (key, metric)
    session = read(simulated[0]).name
    d2 = [ours[task, session, 43]["poisson_d2"] for task in TS2]
    assert max(d2) > 0 and min(d2) > -0.05  # not far from the null, which knows the test part
    assert ours["ts1-wheel_speed", session, 43]["r2"] > 0.5


def test_the_scorer_agrees_with_our_metrics_and_scikit_learn(exported, simulated, scored):
    paths, (_, theirs) = exported[1], scored
    recordings = {recording.build: recording for recording in map(read, simulated)}
    for path in paths[:: 3 * len(TASKS) // len(paths)]:
        task, session, seed = path.parts[-3], path.parts[-2], 43
        if path.stem != "seed_43":
            continue
        expected, found = truth(recordings[TASKS[task].build], task), load_file(path)
        scores, guess = theirs[task, session, seed], found["predictions"].astype(np.float64)
        if task in TS2:
            target = expected["targets"]
            d2 = np.nanmean(metrics.poisson_d2(guess, target))
            assert scores["poisson_d2"] == pytest.approx(d2, abs=1e-5)
            bps = metrics.pooled_bits_per_spike(guess, target)
            assert scores["bps"] == pytest.approx(bps, abs=1e-5)
        elif TASKS[task].classes:
            labels = expected["values"][:, 0]
            bacc = balanced_accuracy_score(labels, guess[:, 0].argmax(axis=1))
            assert scores["bacc"] == pytest.approx(bacc, abs=1e-5)
        elif "licking" in task:
            d2 = metrics.poisson_d2(guess.reshape(1, -1, 1), expected["values"].reshape(1, -1, 1))
            assert scores["poisson_d2"] == pytest.approx(d2[0], abs=1e-5)
        else:
            mask = expected.get("mask", np.ones(guess.shape[:2], dtype=bool))
            r2 = r2_score(expected["values"][mask], guess[mask])
            assert scores["r2"] == pytest.approx(r2, abs=1e-5)


def test_the_scorers_command_line(exported, simulated, scored):
    """What it prints of the tasks on single units is what we compute; that of ts1 takes as long."""
    command = [sys.executable, "-m", "ibl_bwb_eval.scoring.ts2", "--pred_dir", exported[0],
               "--gt_dir", scored[0]]  # fmt: skip
    table = subprocess.run(command, capture_output=True, text=True, check=True,
                           env=os.environ | {"COLUMNS": "250"}).stdout  # fmt: skip
    assert "Error" not in table and "not found" not in table
    scores, session = submission.score(exported[0], simulated), read(simulated[1]).name
    for task in TS2:
        [row] = [line for line in table.splitlines() if task in line]
        printed = re.findall(r"(-?\d+\.\d{4}) ± 0\.0000", row)  # three seeds of the same
        ours = [scores[task, session, 43][metric] for metric in ("poisson_d2", "bps")]
        np.testing.assert_allclose([float(value) for value in printed], ours, atol=6e-5)


def test_the_scorers_ids_and_seeds(exported):
    ids = pytest.importorskip("ibl_bwb_eval.entity_ids", reason=NO_SCORER)
    from ibl_bwb_eval import EVAL_SEEDS, __version__

    [path] = [p for p in exported[1] if "forecasting" in str(p) and p.stem == "seed_43"]
    rows = load_file(path)["unit_ids"]
    encoded = ids.encode_entity_ids(ids.decode_entity_ids(torch.from_numpy(rows)))
    np.testing.assert_array_equal(encoded, rows)
    assert (submission.FIRST_SEED, submission.SCORER) == (EVAL_SEEDS[0], __version__)


def test_what_the_scorer_lets_pass(exported, scored, tmp_path):
    """The traps are real: other windows are dropped without a word, other orders scored.

    That windows are dropped shows where NaN in them, which would spoil any score, changes nothing.
    """
    from ibl_bwb_eval.scoring.ts2 import score_file

    [path] = [p for p in exported[1] if "forecasting" in str(p) and p.stem == "seed_43"]
    task, session = path.parts[-3], path.parts[-2]
    target, (folder, theirs) = tmp_path / "seed_43.safetensors", scored
    gt = folder / task / session / "ground_truth.safetensors"
    right, starts = theirs[task, session, 43]["poisson_d2"], load_file(gt)["window_timestamps"]
    damages = {name: DAMAGES[name][0] for name in ("numpy windows", "NaN", "rates")}
    damages["units reversed"] = change("predictions", lambda v: v[..., ::-1])
    for name, damage in damages.items():
        tensors = load_file(path)
        damage(tensors)
        save_file(tensors, target, {"task": task})
        wrong = score_file(target, gt)["poisson_d2"]
        if name == "NaN":
            assert np.isnan(wrong)
        elif name != "numpy windows":
            assert wrong < right - 1e-3
        else:
            left = np.isin(tensors["window_timestamps"], starts)
            assert 0.5 < left.mean() < 0.95
            tensors["predictions"][~left] = np.nan
            save_file(tensors, target, {"task": task})
            assert np.isfinite(wrong) and score_file(target, gt)["poisson_d2"] == wrong


# ---------------------------------------------------------------------------------- the check


def numpy_windows(tensors):
    starts = tensors["window_timestamps"]
    first = np.flatnonzero(np.diff(starts, prepend=-np.inf) > 0.03)  # of each trial's windows
    for begin, end in zip(first, [*first[1:], len(starts)], strict=True):
        theirs = starts[begin] + 0.02 * np.arange(end - begin)
        near = np.abs(theirs - starts[begin:end]) < 1e-9  # but for the last, which ends a trial
        starts[begin:end] = np.where(near, theirs, starts[begin:end])


def change(name, edit):
    return lambda tensors: tensors.__setitem__(name, np.ascontiguousarray(edit(tensors[name])))


def cut(edit):
    """The same change of everything that has a row a window or a trial."""

    def damage(tensors):
        for name in tensors.keys() - {"unit_ids"}:
            tensors[name] = np.ascontiguousarray(edit(tensors[name]))

    return damage


def put(value):
    def damage(tensors):
        tensors["predictions"][3, 0, 0] = value

    return damage


DAMAGES = {  # name -> change of the tensors of a forecasting file, and the finding
    "numpy windows": (numpy_windows, r"\d+ windows are missing and \d+ .*only the last bits"),
    "float32 windows": (change("window_timestamps", np.float32), "float32 .*, not float64"),
    "shifted": (change("window_timestamps", lambda v: v + 0.01), r"\d+ windows are missing"),
    "a window less": (cut(lambda v: v[1:]), "1 windows are missing and 0"),
    "a window more": (cut(lambda v: np.concatenate([v, v[-1:] + 7])), "0 windows .* and 1 are not"),
    "a window twice": (cut(lambda v: np.concatenate([v, v[:1]])), "some windows are there twice"),
    "units reversed": (change("unit_ids", lambda v: v[::-1]), "units are in another order"),
    "a unit less": (change("unit_ids", lambda v: v[1:]), "unit_ids are not those of the 24"),
    "other units": (change("unit_ids", lambda v: v.clip(max=90)), "unit_ids are not those"),
    "NaN": (put(np.nan), "NaN or infinite"),
    "infinite": (put(-np.inf), "NaN or infinite"),
    "all bins": (change("predictions", lambda v: v.repeat(10, axis=1)), r"not .* \(\d+, 5, 24\)"),
    "float64": (change("predictions", np.float64), "predictions are float64"),
    "rates": (change("predictions", np.exp), "log-rates of .* natural log"),
    "Hz": (change("predictions", lambda v: v + np.float16(np.log(50))), "log-rates of .* where"),
    "no ids": (lambda tensors: tensors.pop("unit_ids"), "lacks unit_ids"),
}


@pytest.fixture
def spoil(exported, simulated, tmp_path):
    """A function that spoils one file of a copy, and returns it and what the check finds."""
    folder = tmp_path / "predictions"

    def run(task, tensors=None, metadata=None):
        shutil.copytree(exported[0], folder)
        [path] = (folder / "toy" / task).glob("*/seed_44.safetensors")
        with submission.safe_open(path, framework="np") as file:
            said = file.metadata()
        content = load_file(path)
        if tensors:
            tensors(content)
        save_file(content, path, metadata(said) if metadata else said)
        return path, submission.check(folder, simulated)

    return run


def test_good_predictions_pass(exported, simulated):
    assert submission.check(exported[0], simulated) == []


def test_windows_of_numpy_are_others(simulated):
    starts = read(simulated[1]).windows().copy()
    mine = {"window_timestamps": starts.copy()}
    numpy_windows(mine)
    np.testing.assert_allclose(mine["window_timestamps"], starts, rtol=0, atol=1e-9)
    assert 0 < (mine["window_timestamps"] != starts).sum() < len(starts)


@pytest.mark.parametrize("case", DAMAGES)
def test_the_check_finds(spoil, case):
    damage, message = DAMAGES[case]
    path, findings = spoil("ts2-forecasting", damage)
    assert len(findings) == 1 or case == "numpy windows"  # where two may become one
    assert re.search(message, findings[0])
    for finding in findings:
        assert finding.startswith(f"{path}: ") and finding.endswith("; export it again")


TRIAL_DAMAGES = {
    "a trial less": ("ts1-choice", cut(lambda v: v[1:]), "1 trials are missing and 0"),
    "a trial twice": ("ts1-reward", cut(lambda v: v[[0, *range(len(v))]]), "there twice"),
    "int32": ("ts1-choice", change("trial_id", np.int32), "trial_id is int32"),
    "a class less": ("ts1-stimulus_contrast", change("predictions", lambda v: v[..., 1:]), "1, 5"),
    "no steps": ("ts1-wheel_speed", change("predictions", lambda v: v[:, :1]), "50, 1"),
    "float16": ("ts1-wheel_speed", change("predictions", np.float16), "not float32"),
    "NaN": ("ts1-left_paw_speed", put(np.nan), "NaN or infinite"),
    "counts": ("ts1-licking_rate", change("predictions", np.exp), "natural log"),
}


@pytest.mark.parametrize("case", TRIAL_DAMAGES)
def test_the_check_finds_in_behaviour(spoil, case):
    task, damage, message = TRIAL_DAMAGES[case]
    path, [finding] = spoil(task, damage)
    assert finding.startswith(f"{path}: ") and message in finding


@pytest.mark.parametrize("key", ["label", "task", "seed", "recording_id", "unit_filtering",
                                 "dataset_version"])  # fmt: skip
def test_the_check_reads_metadata(spoil, key):
    path, findings = spoil("ts2-co_smoothing", metadata=lambda said: {**said, key: "7"})
    assert [f.partition(",")[0] for f in findings] == [f"{path}: says {key} '7'"]


def test_the_check_needs_metadata(spoil):
    path, findings = spoil("ts1-choice", metadata=lambda said: {"seed": said["seed"]})
    assert len(findings) == 5 and all(f.startswith(f"{path}: says ") for f in findings)


def test_the_check_compares_files(exported, simulated, tmp_path):
    """Sessions, seeds, labels and strangers; the remedies are followed one after the other."""
    folder = tmp_path / "p"
    shutil.copytree(exported[0], folder)
    toy, session = folder / "toy", read(simulated[0]).name

    def findings(**options):
        return submission.check(folder, simulated, **options)

    (toy / "ts1-choice" / "notes.txt").write_text("mine")
    (toy / "ts2-all").mkdir()
    shutil.copy(exported[1][0], toy / "ts2-all" / "seed_43.safetensors")
    assert [f.partition(": ")[0] for f in findings()] == [
        str(toy / "ts1-choice" / "notes.txt"), str(toy / "ts2-all" / "seed_43.safetensors")
    ]  # fmt: skip
    (toy / "ts1-choice" / "notes.txt").unlink()
    shutil.rmtree(toy / "ts2-all")
    (folder / "other").mkdir()
    assert "holds other, toy, an upload has one label" in findings()[0]
    assert findings(label="toy") == [] and "holds no" in findings(label="none")[0]
    (folder / "other").rmdir()
    broken = toy / "ts2-forecasting" / session / "seed_43.safetensors"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    assert [f.partition(" (")[0] for f in findings()] == [f"{broken}: cannot be read"]
    broken.unlink()
    [finding] = findings()
    assert "has seeds [44, 45] where others have [43, 44, 45]" in finding
    for path in toy.glob("*/*/seed_43*"):
        path.unlink()
    assert "seeds [44, 45], 3 are needed" in findings()[0] and findings(deterministic=True) == []
    for path in toy.glob("*/*/seed_44*"):
        path.rename(path.with_name("seed_40.safetensors"))
    assert any("seeds [40, 45] leave some out" in f for f in findings())
    shutil.rmtree(toy / "ts1-reward" / session)
    (toy / "ts1-reward" / "another").mkdir()
    shutil.copy(next(toy.glob("ts1-choice/*/seed_45*")), toy / "ts1-reward" / "another")
    found = findings()
    assert any(f"{toy / 'ts1-reward' / 'another'}" in f and "no session file" in f for f in found)
    (toy / "ts1-wheel_speed" / session).rename(toy / "ts1-wheel_speed" / "gone")
    with pytest.raises(ValueError, match=r"is not ready to be uploaded:\n- .*\n- "):
        submission.pack(folder, "toy", tmp_path / "x.zip", simulated)
    assert not (tmp_path / "x.zip").exists()
    assert "holds no predictions" in submission.check(tmp_path / "nothing", simulated)[0]


def test_a_session_without_predictions(exported, simulated, tmp_path):
    write_session(tmp_path / "other.h5", seed=9, filtering="all_units", **SMALL,
                  leave_out=("licks",))  # fmt: skip
    found = submission.check(exported[0], [*simulated, tmp_path / "other.h5"])
    missing = {f.split("/")[-2] for f in found if "no predictions for this session" in f}
    assert missing == set(TS1) - {"ts1-licking_rate"} and len(found) == len(missing)


# --------------------------------------------------------------------------- one command


def test_from_session_files_to_the_zip(tmp_path, simulated, capsys):
    """prepare, train and export, for both builds at once."""
    models = []
    for path, build in zip(simulated, bwb.BUILDS, strict=True):
        if build == "all_units":  # another number of units, so that models can be told apart
            animal = mtm.simulate(1, 50, 26, window=(-1.0, 2.5), seed=1)[0]
            path = simulated[0].with_name("more.h5")
            more = bwb.write_session(animal, path, build)
        out = str(tmp_path / build)
        assert main(["prepare", "bwb", str(path), "--out", out, "--align", "ts2",
                     "--workers", "1"]) == 0  # fmt: skip
        models.append(str(tmp_path / f"{build}-model"))
        train = ["train", out, "--out", models[-1], "--depth", "1", "--epochs", "1"]
        assert main([*train, "--device", "cpu"]) == 0
    files = [str(more), str(simulated[1])]
    options = ["--label", "mtm-1", "--device", "cpu", "--out", str(tmp_path / "out"), "--tasks",
               "ts1-choice"]  # fmt: skip
    capsys.readouterr()
    assert main(["export", models[0], files[0], *options]) == 1  # one seed is too few, that is all
    said = capsys.readouterr().err
    assert said.count("\n- ") == 1 and "seeds [43], 3 are needed" in said
    command = ["export", *models, *files, *options, "ts1-licking_rate", *TS2, "--deterministic"]
    assert main(command) == 0
    assert "ready to be uploaded" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "out" / "mtm-1.zip") as packed:
        names = sorted(packed.namelist())
        assert packed.testzip() is None
    ids = {task: read(files[task in TS2]).name for task in ["ts1-choice", "ts1-licking_rate", *TS2]}
    assert names == sorted(f"mtm-1/{t}/{i}/seed_43.safetensors" for t, i in ids.items())
    scores = submission.score(tmp_path / "out" / "predictions", files)
    assert len(scores) == 4 and json.dumps([*scores.values()])

    def error(*arguments):
        assert main([*map(str, arguments), "--label", "x", "--out", str(tmp_path / "no"),
                     "--device", "cpu"]) == 1  # fmt: skip
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("mtm export: error: ")
        return said

    assert "26 units" in error("export", models[1], more)
    assert "model 1 of 2 serves none" in error("export", *models, files[1])
    assert "one or more session files" in error("export", *models)
    assert "unknown task 'ts2-x'; known" in error("export", *models, *files, "--tasks", "ts2-x")
    assert "different seeds" in error("export", *models, *files, "--seed", "1", "2")
    assert "no such file" in error("export", *models, tmp_path / "gone.h5")
    tasks = ("--tasks", "ts2-forecasting")
    assert "download that build" in error("export", models[0], more, *tasks)
    write_session(tmp_path / "unknown.h5", **SMALL)
    assert "does not know session" in error("export", models[1], tmp_path / "unknown.h5", *tasks)
    assert "holds no model" in error("export", tmp_path, more)


# ---------------------------------------------------------------- which models, of which parts


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """Files of both builds whose splits cross: chunks of ts2 are short beside the parts of ts1."""
    paths = {build: tmp_path_factory.mktemp("chunks") / f"{build}.h5" for build in bwb.BUILDS}
    for build, path in paths.items():
        write_session(path, seed=3, filtering=build, **SMALL | {"chunk": 25.0})
    return paths


def knows(path, log_rates=-3.0, **options):
    """A predictor that has learned from the training part of a file."""
    session = bwb.load_session(path, atlas=None, **options)

    def predict(counts, *_):
        return counts + log_rates

    predict.seen = {"elsewhere": session.fingerprints(session.split().train)}
    return predict


def test_a_model_trained_on_the_other_split_is_refused(chunks, tmp_path):
    """Both are of all units and look alike; one has learned from what TS1 scores."""
    files, models = [chunks["all_units"]], {}
    for split in ("ts1", "ts2"):
        session = bwb.load_session(files[0], align="ts2", split=split)
        models[split] = mtm.fit(session, depth=1, epochs=1, progress=False)
    name = session.name
    with pytest.raises(SessionError) as caught:
        submission.export(models["ts2"], files, tmp_path, "x", tasks=["ts1-choice"])
    said = str(caught.value)
    start, number, end = re.split(r"(\d+ of \d+)", said)
    assert start == f"session '{name}', ts1_test_domain: the model of seed 43 has learned from "
    assert end.startswith(" windows of the test part of ts1; ") and end.endswith(" --split ts1")
    assert not list(tmp_path.iterdir())
    learned, all_of_it = map(int, number.split(" of "))
    begin, end = read_intervals(files[0], "ts1_test_domain")[0]
    starts = bwb.ts2_windows(files[0], "train", 1.0)
    inside = (starts + 1.0 > begin) & (starts < end)
    assert learned == inside.sum() > 10 and all_of_it > learned
    both = [models["ts1"], models["ts2"]]
    with pytest.raises(SessionError, match="the model of seed 8 has learned"):
        submission.export(both, files, tmp_path, "x", tasks=["ts1-choice"], seeds=[7, 8])
    for tasks in (["ts1-choice"], ["ts1-reward"]):  # accepted, and a folder may be added to
        submission.export(models["ts1"], files, tmp_path, "x", tasks=tasks)
    assert submission.check(tmp_path, files, deterministic=True) == []
    with torch.no_grad():
        next(models["ts1"].model.parameters()).add_(1e-3)  # another model, then, of the same seed
    submission.export(models["ts1"], files, tmp_path, "x", tasks=["ts1-reward"])
    [finding] = submission.check(tmp_path, files, deterministic=True)
    assert "made by another model than" in finding and "export all of it with one" in finding


def read_intervals(path, name):
    with h5py.File(path) as file:
        return np.stack([file[f"{name}/start"][()], file[f"{name}/end"][()]], axis=1)


OTHER = {"all_units": "ts2", "selected_units": "ts1"}


@pytest.mark.parametrize("build", bwb.BUILDS)
@pytest.mark.parametrize("stride", [1.0, 0.37, 0.02])
def test_whatever_the_stride_what_was_learned_is_found(chunks, build, stride):
    path, recording = chunks[build], read(chunks[build])
    submission.require_untaught({43: fitted(path)}, recording)
    submission.require_untaught({43: knows(path, align="ts2", stride=stride)}, recording)
    other = knows(path, align="ts2", stride=stride, split=OTHER[build])
    with pytest.raises(SessionError, match=r"has learned from [1-9]\d* of"):
        submission.require_untaught({43: other}, recording)


def test_the_windows_of_the_behaviour_tasks_are_found(chunks):
    path, recording = chunks["all_units"], read(chunks["all_units"])
    for event, start in (("movement_onset_time", -1.0), ("feedback_time", 0.0)):
        where = {"align": event, "window": (start, start + 1.0)}
        submission.require_untaught({43: knows(path, **where)}, recording)
        with pytest.raises(SessionError, match="has learned from"):
            submission.require_untaught({43: knows(path, **where, split="ts2")}, recording)


def test_models_are_told_apart():
    """One for all sessions of a seed and a build, or each session its own."""

    def found(*made):
        return len(submission._check_models({pair: "/".join(pair) for pair in made}))

    assert not found(("s1", "A")) and not found(("s1", "A"), ("s2", "A"))
    assert not found(("s1", "A"), ("s2", "B"), ("s3", "C"))
    assert found(("s1", "A"), ("s1", "B")) == found(("s1", "A"), ("s2", "A"), ("s3", "B")) == 1
    assert submission.fingerprint(lambda: None) == ""
    one, other = (torch.nn.Linear(2, 3).to(torch.bfloat16) for _ in range(2))
    prints = [submission.fingerprint(model) for model in (one, other)]
    assert prints[0] != prints[1] and len(prints[0]) == 64
    other.load_state_dict(one.state_dict())
    assert submission.fingerprint(other) == prints[0]


def test_windows_are_predicted_once(simulated, tmp_path):
    asked, smooth = [], fitted(simulated[0])

    def predict(counts, scheme, mask, session):
        asked.append(len(counts))
        return smooth(counts, scheme, mask, session)

    tasks = [task for task, spec in TASKS.items() if spec.events == "movement_window"]
    submission.export(predict, simulated[:1], tmp_path / "once", "x", tasks=tasks)
    recording = read(simulated[0])
    starts = {s for t in tasks for p in ("train", "val", "test")
              for s in trials(recording, t, p).starts}  # fmt: skip
    assert len(tasks) == 4 and sum(asked) == len(starts)
    for task in tasks:
        [path] = (tmp_path / "once" / "x" / task).glob("*/*")
        alone = submission.predict_task(smooth, recording, task)
        np.testing.assert_allclose(load_file(path)["predictions"], alone["predictions"], atol=1e-5)


def test_an_animal_that_stops_licking(exported, simulated, tmp_path):
    """A decoder cannot foresee it; nor is a file of another suite a mistake."""
    files = [shutil.copy(path, tmp_path) for path in simulated]
    begin = read_intervals(files[0], "ts1_test_domain")[0, 0]
    with h5py.File(files[0], "r+") as file:
        rate = file["licks/licking_rate"]
        late = np.arange(len(rate)) / 50 >= begin
        rate[np.flatnonzero(late)] = 0.0
        rate[-200:-150] = 0.0
        first = int(np.flatnonzero(late)[0])
        starts = file["task_aligned_intervals/licking_window/start"][()]
        at = int(np.ceil(starts[starts >= begin][0] * 50)) + 3
        assert at >= first
        rate[at] = 50.0
    folder = shutil.copytree(exported[0], tmp_path / "predictions")
    test = truth(read(files[0]), "ts1-licking_rate")["values"]
    [path] = folder.glob("toy/ts1-licking_rate/*/seed_43*")
    guess = load_file(path)["predictions"]
    assert np.exp(guess).mean() > 10 * test.mean() > 0
    other = folder / "toy" / "ts3-unit_cosmos" / "seed_43.safetensors"
    other.parent.mkdir()
    shutil.copy(path, other)
    assert submission.check(folder, files) == []
    out = submission.pack(folder, "toy", tmp_path / "x.zip", files)
    with zipfile.ZipFile(out) as packed:
        assert "toy/ts3-unit_cosmos/seed_43.safetensors" in packed.namelist()
    other.rename(other.with_name("seed_43.npz"))
    assert [f.partition(": ")[0] for f in submission.check(folder, files)] == [
        str(other.with_name("seed_43.npz"))
    ]


def test_a_model_with_other_bins_is_refused(simulated):
    recording = read(simulated[1])
    config = mtm.MtMConfig.from_depth(1)
    model = mtm.MtM(config, 100, {recording.name: len(recording.units)})
    with pytest.raises(SessionError, match="takes 100 bins of 0.02 s.*--align ts2"):
        submission.predict_task(model, recording, TS2[0])
    with pytest.raises(ValueError, match="label 'a/b': use letters"):
        submission.export(fitted(simulated[0]), simulated, ".", "a/b")


DAMAGED = {
    "no build": (lambda f: f["brainset"].attrs.__setitem__("unit_filtering", "few"), "'few', not"),
    "no units": (lambda f: f.__delitem__("units"), "units/id: no such column"),
    "row too large": (lambda f: f["spikes/unit_index"].__setitem__(0, 99), "spikes: not finite"),
    "NaN": (lambda f: f["spikes/timestamps"].__setitem__(0, np.nan), "spikes: not finite"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named(tmp_path, selected, case):
    path = shutil.copy(selected[0], tmp_path / "s.h5")
    damage, message = DAMAGED[case]
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(SessionError, match=message):
        read(path)


def test_files_without_what_a_task_needs(tmp_path, everything):
    write_session(tmp_path / "s.h5", regime="pretrain", **SMALL)
    with pytest.raises(SessionError, match="no unit is held out"):
        read(tmp_path / "s.h5").scored("ts2-co_smoothing")
    for name, message in (
        ("ts1_normalize/whisker", "cannot be read"),
        ("ts1_test_domain", "no such"),
    ):
        path = shutil.copy(everything[0], tmp_path / "t.h5")
        with h5py.File(path, "r+") as file:
            del file[name]
        with pytest.raises(SessionError, match=message):
            trials(read(path), "ts1-whisker_motion_energy", "test")


def test_simulated_files_are_what_was_simulated(simulated):
    animal = mtm.simulate(1, 80, 24, window=(-1.0, 2.5), seed=1)[0]
    session = bwb.load_session(simulated[1], window=(-1.0, 2.5))
    np.testing.assert_array_equal(session.counts, animal.counts)
    for key in ("choice", "reward", "contrast", "block"):
        np.testing.assert_array_equal(session.behaviour[key], animal.behaviour[key])
    np.testing.assert_array_equal(session.regions, animal.regions)
