"""Many recordings to files: resumed, in processes, and nothing lost or hidden."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import mtm
from mtm import Session, SessionError, Sessions, prepare


def load(number, scale=1):
    """A recording: a module-level function, so that it can be sent to another process."""
    if number == 3:
        raise SessionError(f"session {number}, spikes: none; choose another")
    if number == 4:
        raise KeyError("whatever")
    if number == 5:
        warnings.warn(f"session {number}: no wheel", UserWarning, stacklevel=1)
    if number == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    counts = np.random.default_rng(number).poisson(scale, (20, 4, 3))
    return Session(counts, name=str(number), provenance={"number": number})


@pytest.mark.parametrize("workers", [1, 2])
def test_every_recording_ends_as_a_file_or_with_a_reason(tmp_path, workers):
    done = prepare(load, range(6), tmp_path, workers=workers, progress=False)
    assert [o.status for o in done.outcomes] == ["written"] * 3 + ["skipped"] * 2 + ["written"]
    assert done.skipped == {
        "3": "session 3, spikes: none; choose another",
        "4": "KeyError: 'whatever'",
    }
    assert [path.name for path in done.paths] == ["0.npz", "1.npz", "2.npz", "5.npz"]
    assert Sessions(done.paths).names == ["0", "1", "2", "5"]
    made = Session.load(done.paths[3]).provenance
    how = made["prepared"]
    assert made["number"] == 5 and how["options"] == {} and how["mtm"]
    assert how["notes"] == ["session 5: no wheel"] and how["load"].endswith("test_prepare.load")
    assert str(done).splitlines() == [
        "skipped: 3",
        "    session 3, spikes: none; choose another",
        "skipped: 4",
        "    KeyError: 'whatever'",
        "written: 5",
        "    session 5: no wheel",
        "6 recordings: 4 written, 0 there already, 2 skipped",
    ]


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    options = {"workers": 1, "progress": False, "scale": 1}
    prepare(load, [0, 1], tmp_path, **options)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    done = prepare(load, [0, 1, 2], tmp_path, **options)
    assert [o.status for o in done.outcomes] == ["there already", "there already", "written"]
    assert (tmp_path / "0.npz").stat().st_mtime_ns == before["0.npz"]
    # other options, other files
    done = prepare(load, [0], tmp_path, **options | {"scale": 5})
    assert done.outcomes[0].status == "written"
    assert Session.load(tmp_path / "0.npz").provenance["prepared"]["options"] == {"scale": 5}
    assert prepare(load, [2], tmp_path, overwrite=True, **options).outcomes[0].status == "written"


def test_options_of_every_kind_are_told_apart(tmp_path):
    def anything(number, **options):
        return load(number)

    for options, status in (
        ({"align": np.arange(2000.0)}, "written"),
        ({"align": np.arange(2000.0)}, "there already"),
        ({"align": np.r_[np.arange(1999.0), 0]}, "written"),
        ({"window": (0, 1), "where": Path("x")}, "written"),
        ({"window": (0, 1), "where": Path("x")}, "there already"),
        ({"pick": load}, "written"),
        ({"pick": load}, "written"),  # what it does may have changed
    ):
        done = prepare(anything, [0], tmp_path, workers=1, progress=False, **options)
        assert done.outcomes[0].status == status, options


def from_file(path):
    with np.load(path) as file:
        return Session(file["counts"], provenance={"sum": int(file["counts"].sum())})


def from_folder(path):
    return from_file(path / "x.npz")


def test_a_recording_that_changed_is_made_again(tmp_path):
    def write(folder, value):
        (tmp_path / folder).mkdir(exist_ok=True)
        np.savez(tmp_path / folder / "x.npz", counts=np.full((20, 2, 3), value))
        return [tmp_path / folder / "x.npz"]

    out, how = tmp_path / "out", {"workers": 1, "progress": False}
    for folder, value, status in (("a", 1, "written"), ("a", 1, "there already"),
                                  ("b", 2, "written")):  # fmt: skip
        if status == "written":
            recordings = write(folder, value)
        done = prepare(from_file, recordings, out, **how)
        assert done.outcomes[0].status == status
        assert Session.load(out / "x.npz").provenance["sum"] == 120 * value
    assert prepare(lambda path: from_file(path), recordings, out, **how).outcomes[0].status == (
        "written"  # by another function
    )
    assert Session.load(out / "x.npz").name == "x"  # which it was not given


def test_a_folder_in_which_a_file_changed_is_made_again(tmp_path):
    folder, out = tmp_path / "recording", tmp_path / "out"
    folder.mkdir()
    for value, status in ((1, "written"), (1, "there already"), (2, "written")):
        if status == "written":  # in place, and of the same size: the folder itself stays the same
            np.savez(folder / "x.npz", counts=np.full((20, 2, 3), value))
        done = prepare(from_folder, [folder], out, workers=1, progress=False)
        assert done.outcomes[0].status == status
        assert Session.load(out / "recording.npz").provenance["sum"] == 120 * value


def test_nothing_but_sessions_is_written_over(tmp_path):
    for name in ("raw", "other"):
        np.savez(tmp_path / f"{name}.npz", counts=np.ones((9, 2, 3)), precious=np.arange(3))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    how = {"workers": 1, "progress": False, "overwrite": True}
    done = prepare(from_file, [tmp_path / "raw.npz"], tmp_path, **how)
    assert "is the recording itself" in done.skipped["raw"]
    done = prepare(from_file, {"other": tmp_path / "raw.npz"}, tmp_path, **how)
    assert "is no session file or damaged; move it away" in done.skipped["other"]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_load_must_take_and_give(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'bin_sise'"):
        prepare(load, [0], tmp_path, bin_sise=0.1)
    done = prepare(lambda number: None, [0], tmp_path, workers=1, progress=False)
    assert done.skipped == {"0": "load returned NoneType, not a Session"}
    same = {"a": 1, "b": 1}
    done = prepare(load, same, tmp_path, workers=1, progress=False)
    assert "b\n    its session is named '1', as that of a;" in str(done)


def test_names(tmp_path):
    paths = [tmp_path / "a" / "x.nwb", tmp_path / "b" / "x.nwb"]
    with pytest.raises(ValueError, match="two recordings are named 'x'"):
        prepare(load, paths, tmp_path)
    named = {"first": 0, "second": 1}
    done = prepare(load, named, tmp_path / "out", workers=1, progress=False)
    assert [path.stem for path in done.paths] == ["first", "second"]
    for name in ("a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="cannot be the name of a file"):
            prepare(load, {name: 0}, tmp_path)
    assert str(prepare(load, [], tmp_path)).startswith("0 recordings")


def test_what_concerns_every_recording_stops_the_run(tmp_path):
    def needs(number):
        raise ImportError("pip install something")

    with pytest.raises(ImportError, match="pip install"):
        prepare(needs, [0, 1], tmp_path, workers=1, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        prepare(load, [0], tmp_path / "file", workers=1, progress=False)


def test_a_process_that_is_killed(tmp_path):
    with pytest.raises(RuntimeError, match="was killed, .* fewer workers and start again"):
        prepare(load, [0, 1, 99], tmp_path, workers=2, progress=False)
    done = prepare(load, [0, 1], tmp_path, workers=1, progress=False)
    assert Sessions(done.paths).names == ["0", "1"]


def test_killed_at_any_moment_nothing_is_half_written(tmp_path):
    """The whole run is killed, again and again, until it gets through."""
    code = (
        "import sys, types, numpy as np\n"
        "sys.modules['mtm'] = stub = types.ModuleType('mtm')\n"  # no torch: it takes seconds
        f"stub.__path__, stub.__version__ = {list(mtm.__path__)}, '0'\n"
        "from mtm.data.collection import prepare\n"
        "from mtm.session import Session\n"
        "def load(i):\n"
        "    return Session(np.random.default_rng(i).poisson(1, (200, 50, 200)), name=str(i))\n"
        "print('ready', flush=True)\n"
        "prepare(load, range(30), sys.argv[1], workers=1, progress=False)\n"
    )
    rng, kills = np.random.default_rng(0), 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        process.stdout.readline()
        if attempt < 3:
            time.sleep(rng.uniform(0.05, 0.5))
            kills += process.poll() is None
            process.kill()
        assert process.wait() in (0, -9)
        for path in tmp_path.glob("*.npz"):
            assert Session.load(path).n_trials == 200
    assert kills and len(Sessions(tmp_path)) == 30


def test_what_killed_writers_left_behind_goes_after_a_day(tmp_path):
    for name, age in ((".a.npz.1.part", 25), (".b.npz.2.part", 1)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - 3600 * age,) * 2)
    prepare(load, [0], tmp_path, workers=1, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.npz.2.part", "0.npz"]


def test_the_options_are_json(tmp_path):
    done = prepare(load, [0], tmp_path, workers=1, progress=False, scale=2)
    with np.load(done.paths[0]) as file:
        assert json.loads(str(file["meta"]))["provenance"]["prepared"]["options"] == {"scale": 2}
