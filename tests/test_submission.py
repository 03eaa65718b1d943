"""BrainWideBench predictions: windows, targets, what is hidden, the scorer's numbers, the check."""

import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score

pytest.importorskip("h5py")
from bwb_files import NORMALIZE, WINDOWS, counted, write_session  # noqa: E402

import mtm  # noqa: E402
from mtm import bwb, decoding, metrics  # noqa: E402
from mtm.bwb import submission  # noqa: E402
from mtm.bwb.submission import TASKS, BenchmarkSession, Trials  # noqa: E402
from mtm.cli import main  # noqa: E402
from mtm.session import SessionError  # noqa: E402

SMALL = {"duration": 190.0, "chunk": 40.0, "gap": 4.0, "units": 12, "rate": 6.0}
NO_SCORER = "the benchmark's scorer is missing; `make test` installs it"
TS1 = [task for task in TASKS if task.startswith("ts1")]
TS2 = [task for task in TASKS if task.startswith("ts2")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Build -> a file of random spikes, and what is in it."""
    paths = {build: tmp_path_factory.mktemp("files") / f"{build}.h5" for build in bwb.BUILDS}
    how = {"seed": 3, **SMALL}
    return {b: (path, write_session(path, filtering=b, **how)) for b, path in paths.items()}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Files of a simulated animal in both builds: all units, selected units."""
    animal = mtm.simulate(1, 60, 24, window=(-1.0, 2.5), seed=1)[0]
    folder = tmp_path_factory.mktemp("simulated")
    return [bwb.write_session(animal, folder / f"{build}.h5", build) for build in bwb.BUILDS]


def smooth(counts, *_):
    """A predictor: the visible population's smoothed rate, shared by all units."""
    rate = torch.nn.functional.avg_pool1d(counts.mean(dim=2), 11, 1, 5)
    own = counts.mean(dim=1, keepdim=True)  # of each unit, where it is visible
    return torch.log(0.05 + 0.5 * rate[..., None] + 0.5 * own)


@pytest.fixture(scope="module")
def exported(simulated, tmp_path_factory):
    """All tasks of both files by one predictor, with three seeds; not to be changed."""
    folder = tmp_path_factory.mktemp("exported")
    paths = submission.export(smooth, simulated, folder, "toy")
    for path in list(paths):  # the predictor has no seed: the other two are copies
        with safe_open(path, framework="np") as file:
            said = file.metadata()
        for seed in ("44", "45"):
            paths.append(path.with_name(f"seed_{seed}.safetensors"))
            save_file(load_file(path), paths[-1], said | {"seed": seed})
    return folder, paths


@pytest.mark.parametrize("task", TS2)
def test_what_is_hidden_and_what_is_scored(written, task):
    """The counts that a predictor gets, and the place of its answers in the file."""
    path, made = written["selected_units"]
    recording, given = BenchmarkSession(path), []
    held = made["units"]["ts2_co_smoothing_is_held_out_test"]

    def predict(counts, scheme, mask, session):
        given.append((counts.clone(), scheme, mask, session))
        t, n = torch.arange(50.0)[:, None], torch.arange(12.0)
        return (counts.sum(dim=(1, 2))[:, None, None] / 64 + t + 64 * n).expand(counts.shape)

    tensors = submission.predict_task(predict, recording, task)
    starts, truth = bwb.ts2_windows(path, "test"), recording.truth(task)
    np.testing.assert_array_equal(tensors["window_timestamps"], starts)
    hidden = np.zeros((50, 12), dtype=bool)
    hidden[:, held] = task == "ts2-co_smoothing"
    hidden[45:] |= task == "ts2-forecasting"
    bins, units = (slice(0, 50), held) if task == "ts2-co_smoothing" else (slice(45, 50), slice(12))
    visible = torch.cat([counts for counts, *_ in given])
    t, n = np.arange(50.0)[:, None], np.arange(12.0)
    for k in (0, 1, 700, -1):
        counts = counted(made, starts[[k]], 1.0)[0]
        np.testing.assert_array_equal(visible[k], np.where(hidden, 0, counts))
        np.testing.assert_array_equal(truth["targets"][k], counts[bins][:, units])
        answer = np.where(hidden, 0, counts).sum() / 64 + t + 64 * n
        expected = answer[bins][:, units].astype(np.float16)
        np.testing.assert_array_equal(tensors["predictions"][k], expected)
    for counts, scheme, mask, session in given:
        assert (scheme, mask.causal) == (TASKS[task].prompt, task == "ts2-forecasting")
        assert session == made["id"]
        assert torch.equal(mask.hidden, torch.from_numpy(hidden).expand(counts.shape))
    ids = [row.tobytes().decode() for row in tensors["unit_ids"]]  # uint8
    assert ids == [f"{made['id']}/{unit}" for unit in made["units"]["id"][units]]


def brute_trials(made, task, part):
    """Rows and window starts of the trials of a behaviour task."""
    name, columns = task.removeprefix("ts1-"), made["trials"]
    event, offset = WINDOWS[TASKS[task].events]
    [[begin, end]] = made["splits"][f"ts1_{part}"]
    for row in np.flatnonzero(columns["is_valid"]):
        start = columns[event][row] + offset
        if begin <= start and start + 1.0 <= end:
            if TASKS[task].group:
                table = made["series"][TASKS[task].group]
                times, trust = table["times"], f"is_{name.removesuffix('_speed')}_confident"
                inside = (times >= start) & (times < start + 1.0)
                if start < times[0] or start + 1.0 > times[-1]:
                    continue
                if trust in table and not table[trust][inside].any():
                    continue
            yield row, start


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("task", TS1)
def test_targets_of_behaviour(written, task, part):
    path, made = written["all_units"]
    found, name = BenchmarkSession(path).trials(task, part), task.removeprefix("ts1-")
    rows, starts = zip(*brute_trials(made, task, part), strict=True)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.starts, starts)
    if TASKS[task].classes:
        np.testing.assert_array_equal(found.values[:, 0], made["trials"][name][found.rows])
        return
    table = made["series"][TASKS[task].group]
    trust = table.get(f"is_{name.removesuffix('_speed')}_confident", np.ones(10**5, dtype=bool))
    mean, std = NORMALIZE.get(f"{TASKS[task].group}/{name}", (0, 1))
    for k, start in enumerate(starts):
        inside = np.flatnonzero((table["times"] >= start) & (table["times"] < start + 1.0))
        trusted = trust[inside]
        values = (table[name][inside] - mean) / std / (50 if name == "licking_rate" else 1)
        np.testing.assert_array_equal(found.trusted[k], trusted)
        np.testing.assert_allclose(found.values[k, trusted, 0], values[trusted], rtol=1e-5)


def test_a_behaviour_that_is_absent_or_too_rare(tmp_path):
    path = tmp_path / "s.h5"
    write_session(path, filtering="all_units", **SMALL, leave_out=("licks", "paws"))
    recording = BenchmarkSession(path)
    assert recording.truth("ts1-left_paw_speed") is None
    tasks = ["ts1-wheel_speed", "ts1-licking_rate"]
    [written] = submission.export(smooth, [path], tmp_path / "p", "x", tasks=tasks)
    assert written.parts[-3] == "ts1-wheel_speed"
    assert submission.check(tmp_path / "p", [path], deterministic=True) == []
    with pytest.raises(SessionError, match="none is held out; co-smoothing needs an eval file"):
        recording.scored("ts2-co_smoothing")


def test_decoders_of_traces_and_classes():
    rng = np.random.default_rng(1)
    x, x_test = rng.normal(size=(80, 5)), rng.normal(size=(30, 5))
    weights = rng.normal(size=(5, 50))
    y, trusted = x @ weights, rng.random((80, 50)) < 0.7

    def decode(values, trusted, task):
        fit = Trials(np.arange(80), np.arange(80.0), values, trusted)
        return submission.decode_trials(x, x_test, fit, TASKS[task])

    whole = decode(y[..., None], np.ones_like(trusted), "ts1-left_paw_speed")
    ridge = Ridge(alpha=decoding.RIDGE_PENALTIES[0]).fit(x, y)
    np.testing.assert_allclose(whole, ridge.predict(x_test))
    spoiled = np.where(trusted, y, 1e3)  # what is not trusted is not used
    part = decode(spoiled[..., None], trusted, "ts1-left_paw_speed")
    assert r2_score((x_test @ weights).ravel(), part.ravel()) > 0.7
    found = decode((x[:, :1] > 0.8) * 3, trusted, "ts1-stimulus_contrast")
    assert found.shape == (30, 5) and (found[:, [1, 2, 4]] == submission.LOWEST).all()
    assert balanced_accuracy_score((x_test[:, 0] > 0.8) * 3, found.argmax(axis=1)) > 0.8


@pytest.fixture(scope="module")
def scores(exported, simulated):
    pytest.importorskip("ibl_bwb_eval", reason=NO_SCORER)
    return submission.score(exported[0], simulated)


def test_the_scorer_agrees_with_our_metrics_and_scikit_learn(exported, simulated, scores):
    """What the scorer makes of the exported files, against formulas of others: to 1e-5."""
    recordings = {recording.build: recording for recording in map(BenchmarkSession, simulated)}
    assert len(scores) == 3 * len(TASKS) and len({session for _, session, _ in scores}) == 1
    for path in exported[1]:
        task, session, seed = path.parts[-3], path.parts[-2], int(path.stem[5:])
        truth, found = recordings[TASKS[task].build].truth(task), load_file(path)
        theirs, guess = scores[task, session, seed], found["predictions"].astype(np.float64)
        if task in TS2:
            d2 = np.nanmean(metrics.poisson_d2(guess, truth["targets"]))
            bps = metrics.pooled_bits_per_spike(guess, truth["targets"])
            assert theirs == pytest.approx({"poisson_d2": d2, "bps": bps}, abs=1e-5)
        elif TASKS[task].classes:
            bacc = balanced_accuracy_score(truth["values"][:, 0], guess[:, 0].argmax(axis=1))
            assert theirs["bacc"] == pytest.approx(bacc, abs=1e-5)
        elif "licking" in task:
            d2 = metrics.poisson_d2(guess.reshape(1, -1, 1), truth["values"].reshape(1, -1, 1))
            assert theirs["poisson_d2"] == pytest.approx(d2[0], abs=1e-5)
        else:
            mask = truth.get("mask", np.ones(guess.shape[:2], dtype=bool))
            r2 = r2_score(truth["values"][mask], guess[mask])
            assert theirs["r2"] == pytest.approx(r2, abs=1e-5)
    assert scores["ts1-wheel_speed", session, 43]["r2"] > 0.5


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
    """The same change of everything that has a row for each window or trial."""

    def damage(tensors):
        for name in tensors.keys() - {"unit_ids"}:
            tensors[name] = np.ascontiguousarray(edit(tensors[name]))

    return damage


def reverse_units(tensors):
    tensors["predictions"] = np.ascontiguousarray(tensors["predictions"][..., ::-1])
    tensors["unit_ids"] = np.ascontiguousarray(tensors["unit_ids"][::-1])


CASES = [  # task, change of its tensors, finding
    (TS2[1], numpy_windows, r": [1-9]\d* of .* are missing, [1-9].* to the last bit"),
    (TS2[1], change("window_timestamps", np.float32), "is float32 .* need float64"),
    (TS2[1], cut(lambda v: np.r_[v, v[:1]]), ": 0 of .* missing, 0 .* each once"),
    (TS2[1], reverse_units, "unit_ids are not the scored units in the order"),
    (TS2[1], change("predictions", lambda v: v * np.nan), "NaN or infinite"),
    (TS2[1], change("predictions", lambda v: v.repeat(10, axis=1)), r"not .* \(\d+, 5, 24\)"),
    (TS2[1], change("predictions", np.exp), r"no log-rates \(their mean rate"),
    (TS2[1], change("predictions", lambda v: np.r_[v[:1], v[1:] + 4]), "log-rates .*mean rate"),
    ("ts1-choice", cut(lambda v: v[1:]), ": 1 of .* missing, 0 are not"),
    ("ts1-licking_rate", change("predictions", np.exp), "natural log"),
]


@pytest.fixture
def spoil(exported, simulated, tmp_path):
    """A function that spoils one file of a copy, and returns it and the findings."""

    def run(task, damage=None, said=None):
        folder = shutil.copytree(exported[0], tmp_path / "predictions")
        [path] = (folder / "toy" / task).glob("*/seed_44.safetensors")
        content = load_file(path)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() | (said or {})
        if damage:
            damage(content)
        save_file(content, path, metadata)
        return path, submission.check(folder, simulated)

    return run


@pytest.mark.parametrize(("task", "damage", "message"), CASES)
def test_the_check_finds(spoil, task, damage, message):
    path, [finding] = spoil(task, damage)
    assert finding.startswith(f"{path}: ") and re.search(message, finding)


@pytest.mark.parametrize("key", submission.METADATA)
def test_the_check_reads_metadata(spoil, key):
    path, [finding] = spoil("ts1-choice", said={key: "7"})
    assert finding.startswith(f"{path}: says {key} '7'")


def test_the_check_compares_files(exported, simulated, tmp_path):
    """Sessions, seeds, labels and other files; the remedies are followed one after the other."""
    folder = shutil.copytree(exported[0], tmp_path / "p")
    toy, session = folder / "toy", BenchmarkSession(simulated[0]).name

    def findings(**options):
        return submission.check(folder, simulated, **options)

    (toy / "ts3-unit_cosmos").mkdir()  # made elsewhere, not checked
    shutil.copy(exported[1][0], toy / "ts3-unit_cosmos" / "seed_43.safetensors")
    assert findings() == []
    broken = toy / "ts2-forecasting" / session / "seed_43.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    assert [f.partition(" (")[0] for f in findings()] == [f"{broken}: cannot be read"]
    broken.unlink()
    assert "has seeds [44, 45], others have [43, 44, 45]" in findings()[0]
    for path in toy.glob("*/*/seed_43*"):
        path.unlink()
    assert "seeds [44, 45]; 3 are needed" in findings()[0] and findings(deterministic=True) == []
    with pytest.raises(ValueError, match=r"is not ready to be uploaded:\n- "):
        submission.pack(folder, "toy", tmp_path / "x.zip", simulated)
    shutil.copytree(toy, folder / "other")
    with pytest.raises(ValueError, match="name one as label"):
        submission.score(folder, simulated)


def test_from_session_files_to_the_zip(tmp_path, capsys):
    """prepare, train and export, for both builds at once, which have different units."""
    animals = [mtm.simulate(1, 30, n, window=(-1.0, 2.5), seed=1)[0] for n in (26, 24)]
    pairs, models = zip(animals, bwb.BUILDS, strict=True), []
    files = [bwb.write_session(animal, tmp_path / f"{b}.h5", b) for animal, b in pairs]
    for path in files:
        out, model = str(tmp_path / path.stem), str(tmp_path / f"{path.stem}-model")
        prepare = ["prepare", "bwb", str(path), "--out", out, "--align", "ts2", "--workers", "1"]
        assert main(prepare) == 0
        train = ["train", out, "--out", model, "--depth", "1", "--epochs", "1", "--device", "cpu"]
        assert main(train) == 0
        models.append(model)
    tasks = ["ts1-choice", *TS2]
    common = ["--label", "mtm-1", "--device", "cpu", "--out", str(tmp_path / "out")]
    export = ["export", *models, *map(str, files), *common, "--tasks", *tasks]
    capsys.readouterr()
    assert main([*export, "--deterministic"]) == 0
    with zipfile.ZipFile(tmp_path / "out" / "mtm-1.zip") as packed:
        names = sorted(packed.namelist())
    ids = [BenchmarkSession(files[task in TS2]).name for task in tasks]
    expected = [f"mtm-1/{t}/{i}/seed_43.safetensors" for t, i in zip(tasks, ids, strict=True)]
    assert names == sorted(expected)
    for arguments, message in (
        ([models[1], files[0]], "no model knows this session with 26 units"),
        ([*models, *files, "--seed", "1", "2"], "different seeds"),
    ):
        assert main(["export", *map(str, arguments), *common]) == 1
        assert re.search(message, capsys.readouterr().err)


def test_models_trained_on_the_test_part_are_refused(tmp_path):
    """The split of one suite is not that of the other."""
    path = tmp_path / "s.h5"
    for build, suite, other in zip(bwb.BUILDS, ("ts1", "ts2"), ("ts2", "ts1"), strict=True):
        write_session(path, seed=3, filtering=build, **SMALL | {"chunk": 25.0})
        for align in ("ts2", *["feedback_time"] * (build == "all_units")):
            predict, how = lambda counts, *_: counts - 3.0, {"align": align, "window": (0, 1)}
            session = bwb.load_session(path, split=suite, **how)
            predict.seen = {"elsewhere": session.fingerprints(session.split().train)}
            submission.require_untrained({43: predict}, BenchmarkSession(path))
            session = bwb.load_session(path, split=other, **how)
            predict.seen = {"elsewhere": session.fingerprints(session.split().train)}
            with pytest.raises(SessionError, match=f"seed 7 was trained on .*--split {suite}"):
                submission.export(predict, [path], tmp_path / "x", "x", seeds=[7])


def test_simulated_files_are_what_was_simulated(simulated):
    animal = mtm.simulate(1, 60, 24, window=(-1.0, 2.5), seed=1)[0]
    session = bwb.load_session(simulated[1], window=(-1.0, 2.5))
    np.testing.assert_array_equal(session.counts, animal.counts)
    for key in ("choice", "reward", "contrast", "block"):
        np.testing.assert_array_equal(session.behaviour[key], animal.behaviour[key])
    np.testing.assert_array_equal(session.regions, animal.regions)
