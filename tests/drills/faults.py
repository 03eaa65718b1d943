"""Fault drills: what is left when a process is killed, a disk is full, a file is damaged.

    python tests/drills/faults.py --json benchmarks/results/faults.json
    python tests/drills/faults.py --json faults.json --only damage memory --quick

Not part of the tests, which hold a case of each kind: a drill does the same many times, at random
moments and places, and counts. Every drill runs in processes of its own and writes to a temporary
folder. POSIX only. Each returns counts, and its ``problems``: sentences, none where all is well.

kills    SIGKILL while training (``fit`` and ``python -m mtm train``), saving, preparing: every file
         under its final name is whole, and what goes on ends like a run that nobody disturbed.
         Hidden ``.part`` files may stay: training removes them when it goes on, ``prepare`` after
         a day, ``save`` never.
disk     no room for what is saved: the old file stays, the error names file and remedy.
damage   files cut, with random bits turned over, of other kinds, of wrong content, and pickles that
         write a marker when they are opened: refused with a reason, or loaded as a whole object.
memory   evaluation for which a batch, or even a single trial, is too much.
network  servers that hang, refuse, fail (500) or hang up half way.
two      two processes that prepare the same sessions into the same folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import functools
import importlib.util
import io
import json
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mtm  # noqa: E402
from mtm import bwb, download, hub  # noqa: E402
from mtm import run as runs  # noqa: E402
from mtm.checkpoint import CheckpointError  # noqa: E402
from mtm.checkpoint import StateError  # noqa: E402
from mtm.session import SessionError  # noqa: E402

TIMINGS = ("seconds", "trials_per_second", "tokens_per_second", "memory_gb")  # differ run by run
SIZES = {"width": 32, "heads": 2, "mlp_width": 32, "stitch_width": 16}


class Tally:
    """Counts of a drill, and the problems it met."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def check(self, fine: bool, problem: str) -> None:
        """Note a problem, unless all is fine."""
        if not fine:
            self.problems.append(problem)

    def result(self, *names: str, **facts: Any) -> dict[str, Any]:
        """As JSON; counts of these names are there even if they are 0."""
        counts = {name: self.counts[name] for name in (*names, *self.counts)}
        return {**counts, **facts, "problems": self.problems}


# ------------------------------------------------------------------------------- processes


class Child:
    """A process, forked to do a job, or started with a command."""

    def __init__(self, job: Callable[[], Any] | list[str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.status: int | None = None
        if isinstance(job, list):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
            self.process = subprocess.Popen(job, **quiet)
            self.pid = self.process.pid
        elif (pid := os.fork()) == 0:
            try:
                job()
                code = 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stderr.flush()
            os._exit(code)
        else:
            self.pid = pid

    def ended(self) -> bool:
        """Whether it has ended by itself."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def kill(self) -> bool:
        """Kill it; whether it had not ended before."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitpid(self.pid, 0)[1]
        return self.status == signal.SIGKILL

    def within(self, seconds: float) -> bool:
        """Wait for its end; whether it came in time, and was a good one."""
        limit = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < limit:
            time.sleep(0.002)
        return not self.kill() and self.status == 0


def found_by(job: Callable[[], Any], limit: float) -> Any:
    """What a job returns, done by a process of its own; an error when it takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        if not Child(lambda: path.write_text(json.dumps(job()))).within(limit):
            raise RuntimeError(f"not done within {limit:g} s, or failed")
        return json.loads(path.read_text())


# ------------------------------------------------------------------------------- kills


def drill_kills(folder: Path, quick: bool) -> dict[str, Any]:
    """Kill at random moments, check what is there, go on."""
    share = 0.2 if quick else 1.0
    parts = {
        "fit": functools.partial(_kill_training, _fit, round(30 * share)),
        "python -m mtm train": functools.partial(_kill_training, _command, round(6 * share)),
        "save": functools.partial(_kill_saving, round(24 * share)),
        "prepare": functools.partial(_kill_preparing, round(20 * share)),
    }
    found = {}
    for name, part in parts.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        tally = Tally()
        part(place, tally)
        found[name] = tally.result("kills", "landed before the end", "landed while writing")
    names = ("kills", "landed before the end", "landed while writing", "files checked",
             "files compared with an undisturbed run", "hidden files left")  # fmt: skip
    total = {name: sum(f.get(name, 0) for f in found.values()) for name in names}
    problems = [f"{name}: {text}" for name, f in found.items() for text in f.pop("problems")]
    return {**total, "by": found, "problems": problems}


def _animals() -> list[mtm.Session]:
    return mtm.simulate(2, 40, 12, seed=3, mean_rate=30.0, bin_size=0.1)


def _fit(folder: Path, save_every: float) -> Child:
    def job() -> None:
        sizes = mtm.MtMConfig(depth=1, **SIZES)
        settings = {"epochs": 60, "validations": 20, "batch_size": 8, "batches_per_step": 1}
        how = {"progress": False, "device": "cpu", "save_every": save_every}
        mtm.fit(_animals(), sizes, folder=folder, **settings, **how)

    return Child(job)


def _command(folder: Path, save_every: float) -> Child:
    sessions = folder.parent / "sessions"
    if not sessions.exists():
        for session in _animals():
            session.save(sessions / f"{session.name}.npz")
    command = [sys.executable, "-m", "mtm", "train", str(sessions), "--out", str(folder)]
    command += ["--depth", "1", "--epochs", "30", "--validations", "10", "--device", "cpu"]
    return Child([*command, "--save-every", str(save_every)])


def _kill_training(
    start: Callable[[Path, float], Child], kills: int, folder: Path, tally: Tally
) -> None:
    chance, run = random.Random(0), folder / "run"

    def step() -> int:
        states = runs.states(run)
        return int(states[-1].stem.removeprefix("state-")) if states else -1

    for number in range(kills):
        last, parts = step(), _parts(run)
        child = start(run, 0.0)
        while step() <= last and not child.ended():  # until it has got further
            time.sleep(0.001)
        if number % 2:
            time.sleep(chance.uniform(0, 0.15))
        else:  # while it writes
            while _parts(run) <= parts and not child.ended():
                pass
        _kill(child, run, parts, tally)
        _check_run(run, tally)
    tally.counts["steps taken when the last was killed"] = step()
    for place in (run, folder / "whole"):
        tally.check(start(place, 1e9).within(240), f"{place.name}: did not end well")
    tally.check(not list(run.glob(".*")), "hidden files are left at the end")
    _compare_runs(run, folder / "whole", tally)


def _kill(child: Child, folder: Path, before: set[Path], tally: Tally) -> None:
    """Kill a process; ``before`` are the hidden files that were there when it began."""
    landed = child.kill()
    tally.check(landed or child.status == 0, "a process failed before it was killed")
    tally.counts["kills"] += 1
    tally.counts["landed before the end"] += landed
    tally.counts["landed while writing"] += landed and not _parts(folder) <= before


def _parts(folder: Path) -> set[Path]:
    """Files that are being written, or were when a process was killed."""
    return set(folder.rglob(".*.part"))


def _check_run(folder: Path, tally: Tally) -> None:
    """Every file under its final name is whole."""
    readers: dict[str, Callable[[Path], Any]] = {
        "state-*.safetensors": runs._read,
        hub.CONFIG: lambda path: mtm.load(path.parent),
        hub.WEIGHTS: lambda path: mtm.load(path.parent),
        "history.jsonl": lambda path: [json.loads(line) for line in path.open()],
    }
    for pattern, reader in readers.items():
        for path in folder.glob(pattern):
            tally.counts["files checked"] += 1
            try:
                reader(path)
            except Exception as error:
                tally.problems.append(f"{path.name} is not whole: {error}")
    known = {path for pattern in readers for path in folder.glob(pattern)}
    others = {path for path in folder.iterdir() if path.is_file() and path.name[0] != "."} - known
    tally.check(not others, f"unknown files {sorted(path.name for path in others)}")
    tally.check(any(folder.glob("state-*")), "no state is left")


def _compare_runs(one: Path, other: Path, tally: Tally) -> None:
    """Weights to the last bit; history and states but for the time that they took."""
    weights = [hub._read_weights(folder / hub.WEIGHTS)[0] for folder in (one, other)]
    tally.check(_equal(*weights), "other weights than those of the undisturbed run")
    configs = [hub.read_config(folder) for folder in (one, other)]
    histories = [config["info"].pop("history") for config in configs]
    tally.check(configs[0] == configs[1], "another config.json")
    for name in ("config.json", "history.jsonl"):
        if name == "history.jsonl":
            histories = [[json.loads(line) for line in (folder / name).open()]
                         for folder in (one, other)]  # fmt: skip
        plain = [[{k: v for k, v in entry.items() if k not in TIMINGS} for entry in history]
                 for history in histories]  # fmt: skip
        tally.check(plain[0] == plain[1] and plain[0] != [], f"another history in {name}")
    last = [runs._read(runs.states(folder)[-1]) for folder in (one, other)]
    tally.check(_equal(last[0].tensors, last[1].tensors), "another last state")
    tally.counts["files compared with an undisturbed run"] += 4


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Of arrays or tensors by name: the same to the last bit, and of the same kind."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].shape == other[key].shape
        and bool((one[key] == other[key]).all()) for key in one
    )  # fmt: skip


def _kill_saving(kills: int, folder: Path, tally: Tally) -> None:
    """Two models of different sizes, and two sessions, are saved in turn to the same places."""
    torch.manual_seed(0)
    models = [mtm.MtM(mtm.MtMConfig(depth=depth, **SIZES), 20, {"a": 12}) for depth in (1, 2)]
    sessions = _animals()

    def job() -> None:
        for turn in range(10**6):
            hub.save(models[turn % 2], folder / "model")
            sessions[turn % 2].save(folder / "session.npz")

    chance = random.Random(1)
    for _ in range(kills):
        parts, begun = _parts(folder), time.time_ns()
        child = Child(job)
        while not any(p.stat().st_mtime_ns > begun for p in folder.glob("*.npz")):
            tally.check(not child.ended(), "saving failed")
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        _kill(child, folder, parts, tally)
        tally.counts["files checked"] += 3
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            state = mtm.load(folder / "model").state_dict()
        between = [w for w in said if "is not that of the" in str(w.message)]
        tally.counts["landed between weights and config.json"] += len(between)
        same = any(_equal(state, one.state_dict()) for one in models)
        tally.check(same, "the model is neither the one nor the other")
        session = mtm.Session.load(folder / "session.npz")
        same = any(_equal(_arrays(session), _arrays(one)) for one in sessions)
        tally.check(same, "the session is neither the one nor the other")
    tally.counts["hidden files left"] = len(_parts(folder))


def _arrays(session: mtm.Session) -> dict[str, np.ndarray]:
    """Everything a session holds, by name."""
    arrays = {"counts": session.counts, "regions": session.regions, "trials": session.trial_ids}
    arrays |= {f"behaviour/{k}": np.nan_to_num(v) for k, v in session.behaviour.items()}
    arrays |= {f"neurons/{k}": v for k, v in session.neurons.items()}
    arrays |= {} if session.rates is None else {"rates": session.rates}
    facts = (session.name, session.subject, session.bin_size, session.window, session.n_recorded,
             session.provenance)  # fmt: skip
    return arrays | {"facts": np.array(repr(facts))}


def made_up(number: int) -> mtm.Session:
    """A recording to prepare."""
    counts = np.random.default_rng(number).poisson(1.0, (100, 50, 80))
    return mtm.Session(counts, name=str(number))


def _kill_preparing(kills: int, folder: Path, tally: Tally) -> None:
    n_recordings, out, whole = 4 * kills, folder / "out", folder / "whole"

    def start(place: Path) -> Child:
        how = {"workers": 1, "progress": False}
        return Child(lambda: mtm.prepare(made_up, range(n_recordings), place, **how))

    expected = [made_up(number) for number in range(n_recordings)]
    chance = random.Random(2)
    for number in range(kills):
        parts, made = _parts(out), len(list(out.glob("*.npz")))
        child = start(out)
        while len(list(out.glob("*.npz"))) <= made and not child.ended():
            time.sleep(0.0005)
        if number % 2:
            time.sleep(chance.uniform(0, 0.02))
        else:  # while it writes
            parts = _parts(out)
            while _parts(out) <= parts and not child.ended():
                pass
        _kill(child, out, parts, tally)
        for path in out.glob("*.npz"):
            tally.counts["files checked"] += 1
            same = _same_counts(path, expected[int(path.stem)])
            tally.check(same, f"{path.name} is not what it should be")
    tally.counts["hidden files left"] = len(_parts(out))
    for place in (out, whole):
        tally.check(start(place).within(60), "preparing did not end well")
    files = [{p.name: p.read_bytes() for p in place.glob("*.npz")} for place in (out, whole)]
    tally.check(files[0] == files[1] and len(files[0]) == n_recordings, "other files at the end")
    tally.counts["files compared with an undisturbed run"] += n_recordings


def _same_counts(path: Path, expected: mtm.Session) -> bool:
    return bool(np.array_equal(mtm.Session.load(path).counts, expected.counts))


# ------------------------------------------------------------------------------- disk


def drill_disk(folder: Path, quick: bool) -> dict[str, Any]:
    """Save what there is no room for, over what there was."""
    place = folder / "small"
    place.mkdir()
    how = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and not subprocess.run(how, capture_output=True).returncode
    try:
        found = found_by(lambda: _fill(place, mounted), 120)
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
    return {"how": "tmpfs of 1 MiB" if mounted else "RLIMIT_FSIZE of 0.5 MiB"} | found


def _fill(place: Path, mounted: bool) -> dict[str, Any]:
    tally = Tally()
    torch.manual_seed(0)
    small, large = (mtm.MtM(mtm.MtMConfig(depth=1, **SIZES | {"mlp_width": width}), 20, {"a": 12})
                    for width in (32, 20_000))  # fmt: skip
    session = mtm.simulate(1, 20, 12, bin_size=0.1)[0]
    counts = np.random.default_rng(0).poisson(1.0, (200, 100, 100))
    path, folder, run = place / "session.npz", place / "model", place / "run"
    run.mkdir()
    facts = {"settings": list(range(10))}
    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
        "session": (
            lambda: session.save(path),
            lambda: mtm.Session(counts).save(path),
            "session.npz",
        ),
        "model": (lambda: hub.save(small, folder), lambda: hub.save(large, folder), hub.WEIGHTS),
        "state": (
            lambda: runs.write_state(run, 1, small.state_dict(), facts),
            lambda: runs.write_state(run, 2, large.state_dict(), facts),
            "state-00000002.safetensors",
        ),
        "prepare": (
            lambda: mtm.prepare(made_up, [], place / "out", progress=False),
            lambda: mtm.prepare(
                lambda number: mtm.Session(counts), [1], place / "out", workers=1, progress=False
            ),
            "1.npz",
        ),
        "training": (lambda: None, lambda: _train_here(place / "train"), "state-00000000"),
        "download": (lambda: None, lambda: _fetch_here(place / "large.h5"), "large.h5"),
    }
    for fitting, _, _ in cases.values():
        fitting()
    before = _contents(place)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
    for name, (_, too_large, file) in cases.items():
        tally.counts["writes that did not fit"] += 1
        try:
            too_large()
            tally.problems.append(f"{name}: no error")
        except OSError as error:
            tally.counts["errors that name file and remedy"] += (
                error.errno in (errno.ENOSPC, errno.EFBIG)
                and file in str(error)
                and "free some space" in str(error)
            )
        after = _contents(place)
        tally.check(before.items() <= after.items(), f"{name}: an old file changed")
        tally.counts["old files that stayed whole"] += len(before)
        litter = [p.name for p in place.rglob("*") if p.name.endswith(".part")]
        if name == "download":
            tally.counts["parts of downloads kept, to go on from"] += len(litter)
            for part in place.glob(".*.part"):
                part.unlink()
        else:
            tally.check(not litter, f"{name}: {litter} is left")
        shutil.rmtree(place / "train", ignore_errors=True)
    wrong = tally.counts["writes that did not fit"]
    wrong -= tally.counts["errors that name file and remedy"]
    tally.check(wrong == 0, f"{wrong} errors do not name file and remedy")
    mtm.load(folder), mtm.Session.load(path), runs._read(run / "state-00000001.safetensors")
    return tally.result()


def _contents(place: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in place.rglob("*") if p.is_file() and p.name[0] != "."}


def _train_here(folder: Path) -> None:
    sizes = mtm.MtMConfig(depth=1, **SIZES | {"mlp_width": 20_000})
    mtm.fit(_animals(), sizes, epochs=1, progress=False, device="cpu", folder=folder)


def _fetch_here(path: Path) -> None:
    Files.body = bytes(1 << 22)
    url, _ = served(Files, None)
    wanted = {"size": len(Files.body), "etag": "x", "progress": False}
    download.download(f"{url}/large", path, **wanted)


# ------------------------------------------------------------------------------- damage


class Bomb:
    """Writes a marker where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "it ran")


def drill_damage(folder: Path, quick: bool) -> dict[str, Any]:
    """Damage files of every kind in every way, and open them."""
    every = 0.1 if quick else 1.0
    n_cut, n_flipped = max(3, round(15 * every)), max(3, round(40 * every))
    rng, tally, marker = np.random.default_rng(0), Tally(), folder / "marker"
    kinds = _kinds(folder)
    table: dict[str, Counter[str]] = {}
    for name, kind in kinds.items():
        whole = kind.path.read_bytes()
        foreign = _foreign(kinds, marker)
        damaged = [("cut", whole[: rng.integers(len(whole))]) for _ in range(n_cut)]
        damaged += [("flipped", _flipped(whole, rng)) for _ in range(n_flipped)]
        damaged += [("foreign", content) for content in foreign if content != whole]
        damaged += [("wrong content", content) for content in kind.wrong()]
        damaged += [("bomb", content) for content in _bombs(name, kind.path, marker)]
        for number, (how, content) in enumerate(damaged):
            kind.path.write_bytes(content)
            outcome = _opened(kind, f"{name}, {how} {number}", tally)
            table.setdefault(f"{name}, {how}", Counter())[outcome] += 1
            tally.check(not marker.exists(), f"{name}, {how} {number}: the pickle ran")
            marker.unlink(missing_ok=True)
        kind.path.write_bytes(whole)
        tally.check(kind.digest() == kind.original, f"{name}: the whole file is read otherwise")
    pickle.loads(pickle.dumps(Bomb(marker)))
    tally.check(marker.exists(), "the bomb is none, and shows nothing")
    for counts in table.values():
        tally.counts += counts
    total = sum(tally.counts.values())
    loaded = {key: n["another whole object"] for key, n in table.items()}
    has_checksum = ("session,", "state,", "model")
    unnoticed = {key: n for key, n in loaded.items() if n and key.startswith(has_checksum)}
    unnoticed = {key: n for key, n in unnoticed.items() if "wrong content" not in key}
    tally.check(not unnoticed, f"damage that a checksum should have shown: {unnoticed}")
    return tally.result("refused", "the same as before", "another whole object") | {
        "files": total,
        "note": "sessions (zip), weights and states have checksums; config.json is compared with "
        "what the weights say. Torch looks at no checksum of its own files (official checkpoint), "
        "and counts that stay on disk are not checked: there, bits turned over are other numbers",
        "by": {key: dict(n) for key, n in table.items()},
    }


class Kind:
    """A kind of file: how it is opened, and how it is damaged by hand."""

    def __init__(self, path: Path, read: Callable[[], Any], wrong: Callable[[], list[bytes]]):
        self.path, self.read, self.wrong = path, read, wrong
        self.original = self.digest()

    def digest(self) -> str:
        """What is read, as text by which it can be compared; an error if it is not whole."""
        return self.read()


REASONS = (SessionError, CheckpointError, StateError, FileNotFoundError)


def _opened(kind: Kind, what: str, tally: Tally) -> str:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            same = kind.digest() == kind.original
            return "the same as before" if same else "another whole object"
        except REASONS as error:
            text = " ".join([str(error), *(str(w.message) for w in said)])
            named = kind.path.name in text or str(kind.path.parent) in text
            tally.check(named, f"{what}: the file is not named: {error}")
            return "refused"
        except BaseException as error:
            tally.problems.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            return "problems"


def _kinds(folder: Path) -> dict[str, Kind]:
    import test_official

    torch.manual_seed(0)
    session = mtm.simulate(1, 30, 12, seed=3, mean_rate=30.0, bin_size=0.1)[0]
    model = mtm.MtM(mtm.MtMConfig(depth=1, **SIZES), 20, {session.name: 12})
    one = session.save(folder / "session" / "one.npz")
    disk = session.save(folder / "disk" / "one.npz")
    saved, config = (hub.save(model, folder / name) for name in ("weights", "config"))
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    (folder / "run").mkdir()
    state = runs.write_state(folder / "run", 7, tensors, {"step": 7, "history": [1.5]})
    official = folder / "official" / "checkpoint.pt"
    official.parent.mkdir()
    torch.save(test_official.theirs().state_dict(), official)

    def read_session(path: Path, mmap: bool) -> str:
        read = mtm.Sessions(path)[0] if mmap else mtm.Session.load(path)
        read.split()
        return repr([repr(read), *((k, v.dtype, v.tolist()) for k, v in _arrays(read).items())])

    def read_model(folder: Path) -> str:
        read = mtm.load(folder)
        counts = torch.ones(1, read.n_bins, 12)
        mask = mtm.Mask(counts < 0, counts < 0, causal=False)
        predicted = read.predict_log_rates(counts, "neuron", mask, read.session_names[0])
        whole = {k: (v.dtype, v.tolist()) for k, v in read.state_dict().items()}
        info = hub.read_config(folder).get("info")
        return repr([read.config, read.session_names, read.summary(), whole, info, predicted.shape])

    def read_official() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = mtm.from_official(official, test_official.TWO, heads=4)
        return repr([read.config, {k: v.tolist() for k, v in read.state_dict().items()}])

    def read_run() -> str:
        read = runs.read_state(folder / "run")
        return repr([read.facts, {k: (v.dtype, v.tolist()) for k, v in read.tensors.items()}])

    return {
        "session": Kind(one, lambda: read_session(one, False), lambda: _wrong_sessions(one)),
        "session on disk": Kind(
            disk, lambda: read_session(disk, True), lambda: _wrong_sessions(disk)
        ),
        "model weights": Kind(
            saved / hub.WEIGHTS,
            lambda: read_model(saved),
            lambda: _wrong_tensors(saved / hub.WEIGHTS),
        ),
        "model config": Kind(
            config / hub.CONFIG,
            lambda: read_model(config),
            lambda: _wrong_config(config / hub.CONFIG),
        ),
        "state": Kind(state, read_run, lambda: _wrong_tensors(state)),
        "official checkpoint": Kind(official, read_official, lambda: _wrong_official(official)),
    }


def _flipped(whole: bytes, rng: np.random.Generator) -> bytes:
    """Between one and eight bits turned over."""
    content = bytearray(whole)
    head = len(whole) if rng.random() < 0.7 else min(len(whole), 1500)  # names, shapes and sizes
    for _ in range(int(rng.integers(1, 9))):
        content[rng.integers(head)] ^= 1 << rng.integers(8)
    return bytes(content)


def _foreign(kinds: dict[str, Kind], marker: Path) -> list[bytes]:
    """Files of other kinds."""
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.arange(12.0))
    zipfile.ZipFile(archive, "w").close()
    contents = [b"", b"\n", b"hello\n", b"[1, 2]", b"{}", b"null", bytes(5000), b"[" * 100_000]
    contents += [b"\x89PNG\r\n\x1a\n" + bytes(100), b"\x89HDF\r\n\x1a\n" + bytes(100), b"PAR1PAR1"]
    contents += [pickle.dumps({"a": 1}), array.getvalue(), archive.getvalue()]
    contents += [kind.path.read_bytes() for kind in kinds.values()]
    return contents


def _wrong_sessions(path: Path) -> list[bytes]:
    """Well-formed archives that are no session, or not a whole one."""
    with np.load(path) as file:
        arrays = dict(file)

    def packed(**changes: Any) -> bytes:
        content = io.BytesIO()
        np.savez(content, **{k: v for k, v in (arrays | changes).items() if v is not None})
        return content.getvalue()

    def said(key: str, **changes: Any) -> bytes:
        meta = json.loads(str(arrays[key])) | changes
        return packed(**{key: np.array(json.dumps(meta))})

    found = [packed(**{key: None}) for key in arrays]
    counts = arrays["counts"]
    found += [packed(counts=wrong) for wrong in (
        counts[:-1], counts[:, :-1], counts[:, :, :-1], counts[0], counts - 0.5, counts * 1j,
        counts.astype(str), -counts.astype(int) - 1, counts[:0], np.float32(np.nan) * counts,
    )]  # fmt: skip
    found += [packed(**{key: value[:-1]}) for key, value in arrays.items() if value.ndim]
    found += [packed(**{key: value.astype("M8[s]")}) for key, value in arrays.items()
              if value.dtype.kind in "if"]  # fmt: skip
    found += [packed(**{key: np.arange(3)}) for key in ("else", "what/else", "neurons/else")]
    found += [packed(**{"split/train": np.arange(3)}), packed(meta=np.array("{")),
              packed(meta=np.arange(3)), packed(meta=np.array("[]"))]  # fmt: skip
    wrong = (None, "x", -1, [1], {}, 1e400)
    for key in ("name", "subject", "bin_size", "window", "n_recorded", "version", "format"):
        found += [said("meta", **{key: value}) for value in wrong]
    found += [
        said("listed", **{key: value}) for key in ("shape", "firing_rates") for value in wrong
    ]
    found += [said("meta", window=[0, 1, 2]), said("meta", more=1), said("meta", n_recorded=10**30)]
    return found


def _wrong_tensors(path: Path) -> list[bytes]:
    """Tensors missing, too many, renamed, of other shapes and kinds."""
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    found = [save(tensors), save({}), save({}, metadata=metadata)] if metadata else [save({})]
    for key in list(tensors)[:6]:
        one, rest = tensors[key], {k: v for k, v in tensors.items() if k != key}
        changes: list[dict[str, torch.Tensor]] = [{}, {f"{key}x": one}, {key: one[None].clone()}]
        changes += [{key: one.to(kind)} for kind in (torch.int32, torch.bool, torch.complex64)]
        changes += [{key: torch.full_like(one, float("nan"))}, {key: torch.zeros(0)}]
        changes += [{key: one, "more": one.clone()}]
        found += [save(rest | change, metadata=metadata) for change in changes]
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    return [*found, len(header).to_bytes(8, "little") + header.encode()]


def _wrong_config(path: Path) -> list[bytes]:
    """JSON that describes no model, or another."""
    description = json.loads(path.read_text())
    found: list[Any] = []
    for key in description:
        found += [{k: v for k, v in description.items() if k != key}]
        found += [description | {key: value} for value in (None, "x", -1, [1], {"a": 1}, 1.5)]
    model = description["model"]
    for key in model:
        for value in (None, "x", -1, [1], 10**30, 1e300):
            found += [description | {"model": model | {key: value}}]
    found += [description | {"sessions": {"a": n}} for n in (0, -1, "x", None, 10**30, 1.5)]
    found += [description | {"seen": {"a": text}} for text in (None, "x", 5, "AAAA")]
    return [json.dumps(one).encode() for one in found]


def _wrong_official(path: Path) -> list[bytes]:
    """Files of torch.save that hold something else."""
    state = torch.load(path, weights_only=True)
    found: list[Any] = [[1, 2], {"a": 1}, torch.ones(3), {"model": 3}, {}, None, "x", 5]
    for key in list(state)[:8]:
        rest = {k: v for k, v in state.items() if k != key}
        found += [rest, rest | {f"{key}x": state[key]}, rest | {key: state[key][None]}]
        found += [rest | {key: torch.tensor(1.0)}, rest | {key: "x"}, rest | {key: torch.zeros(0)}]
    contents = []
    for one in found:
        content = io.BytesIO()
        torch.save(one, content)
        contents.append(content.getvalue())
    return contents


def _bombs(name: str, path: Path, marker: Path) -> list[bytes]:
    """Files with a pickle in the place of something."""
    bomb = Bomb(marker)
    found = [pickle.dumps(bomb), pickle.dumps([bomb], protocol=0)]
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
        for key in arrays:
            content = io.BytesIO()
            np.savez(content, **arrays | {key: np.array([bomb], dtype=object)})
            found.append(content.getvalue())
    for one in (bomb, {"model": bomb}, {"state_dict": {"a": bomb}}, [bomb]):
        content = io.BytesIO()
        torch.save(one, content)
        found.append(content.getvalue())
    if path.suffix == ".pt":
        content = io.BytesIO()
        torch.save({**torch.load(path, weights_only=True), "x": bomb}, content)
        found.append(content.getvalue())
    return found


# ------------------------------------------------------------------------------- memory


NO_MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                        "allocate memory: you tried to allocate 8000000000 bytes. Error code 12"),
    "Windows": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"),
    "numpy": MemoryError("Unable to allocate 8.00 GiB for an array"),
}  # fmt: skip


def drill_memory(folder: Path, quick: bool) -> dict[str, Any]:
    """A model that runs out of memory above some number of trials is evaluated to the same end."""
    tally, differences = Tally(), [0.0]
    torch.manual_seed(0)
    session = mtm.simulate(1, 60, 12, seed=3, mean_rate=30.0, bin_size=0.1)[0]
    model = mtm.MtM(mtm.MtMConfig(depth=1, **SIZES), 20, {session.name: 12}, bin_size=0.1).eval()
    tasks = [*mtm.prediction.TASKS, "choice"]
    usual = mtm.evaluate(model, session, tasks=tasks)
    for fits in (1, 3, 7):
        plain = mtm.evaluate(model, session, tasks=tasks, batch_size=fits)
        differences.append(_difference(plain, usual))
        for name, error in NO_MEMORY.items():
            with _narrow(fits, error) as refusals:
                found = mtm.evaluate(model, session, tasks=tasks, batch_size=fits * 8)
            tally.counts["evaluations that ran out"] += 1
            tally.counts["batches that were too large"] += len(refusals)
            tally.check(refusals != [], f"{name}, {fits} trials: nothing ran out")
            same = str(found) == str(plain) and _difference(found, plain) == 0.0
            tally.counts["the same to the last bit"] += same
            tally.check(same, f"{name}, {fits} trials: other scores than without the fault")
    for name, error in NO_MEMORY.items():
        with _narrow(0, error):
            try:
                mtm.evaluate(model, session)
                tally.problems.append(f"{name}: no error where not even one trial fits")
            except MemoryError as refused:
                told = "another device or take a smaller model" in str(refused)
                tally.counts["a single trial too much: remedy named"] += told
                tally.check(told, f"{name}: no remedy: {refused}")
    return tally.result() | {
        "tasks": tasks,
        "how": "MtM.predict raises above a number of trials",
        "largest difference between batch sizes, without faults": max(differences),
    }


@contextlib.contextmanager
def _narrow(fits: int, error: Exception) -> Iterator[list[int]]:
    """Within, a model predicts at most so many trials at once; yields the sizes it refused."""
    whole, refused = mtm.MtM.predict_log_rates, []

    @functools.wraps(whole)
    def narrow(self: mtm.MtM, counts: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if len(counts) > fits:
            refused.append(len(counts))
            raise error
        return whole(self, counts, *rest, **options)

    mtm.MtM.predict_log_rates = narrow
    try:
        yield refused
    finally:
        mtm.MtM.predict_log_rates = whole


def _difference(one: mtm.Report, other: mtm.Report) -> float:
    """The largest between two tables of scores."""
    largest = 0.0
    for task, scores in one.tasks.items():
        for key, values in scores.table.items():
            if values.dtype.kind == "f":
                gap = np.nan_to_num(values) - np.nan_to_num(other.tasks[task].table[key])
                largest = max(largest, float(np.abs(gap).max(initial=0.0)))
    return largest


# ------------------------------------------------------------------------------- network


FAULTS = ("refuse", "hang", "hang half way", "500", "half")
PATIENCE = 0.4  # seconds that a server may be silent in this drill


class Files(BaseHTTPRequestHandler):
    """One file, served with a fault."""

    fault: str | None = None
    body = b""

    def do_GET(self) -> None:
        """Serve it, or a part of it."""
        first, last, headers = 0, len(self.body) - 1, {"ETag": '"x"'}
        if wish := self.headers.get("Range"):
            first, last = (int(n or last) for n in wish.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(self.body)}"
        answer(self, 206 if wish else 200, self.body[first : last + 1], self.fault, headers)

    def log_message(self, *_: Any) -> None:
        """Nothing is said."""


def answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    fault: str | None,
    headers: dict[str, str],
) -> None:
    """What a faulty server sends."""
    if fault == "hang":
        time.sleep(3600)
    if fault == "500":
        status, body = 500, b'{"detail": "broken"}'
    handler.send_response(status)
    for key, value in {**headers, "Content-Length": str(len(body))}.items():
        handler.send_header(key, value)
    handler.end_headers()
    half = fault in ("half", "hang half way")
    handler.wfile.write(body[: (len(body) + 1) // 2] if half else body)
    handler.wfile.flush()
    if fault == "hang half way":
        time.sleep(3600)


def served(handler: Any, fault: str | None) -> tuple[str, Callable[[], None]]:
    """Serve until this process ends: the address, and what takes the fault away."""

    def start(port: int) -> int:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client that has hung up
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server.server_address[1]

    def heal() -> None:
        handler.fault = None
        if fault == "refuse":
            start(port)

    handler.fault = fault
    if fault == "refuse":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    else:
        port = start(0)
    return f"http://127.0.0.1:{port}", heal


class Question(NamedTuple):
    """Something to ask a server.

    Attributes:
        ask: the call; an error where what it returns is not what it should be.
        silences: how often a server may be silent until the call gives up.
        heal: takes the fault away.
        place: folder of what is downloaded.
        sizes: path in that folder -> size of the whole file.
    """

    ask: Callable[[], Any]
    silences: int
    heal: Callable[[], None]
    place: Path
    sizes: dict[str, int]


def drill_network(folder: Path, quick: bool) -> dict[str, Any]:
    """Ask a faulty server for files, in a process that must be done in time."""
    tally, seconds = Tally(), {}
    cases: list[tuple[str, Callable[[str, Path], Question]]] = [("download", _ask_download)]
    cases += [("BrainWideBench's list", _ask_bwb)]
    if importlib.util.find_spec("remfile") and importlib.util.find_spec("h5py"):
        cases += [("NWB", _ask_nwb)]
    if importlib.util.find_spec("one"):
        import test_ibl  # noqa: F401, once for all processes

        for part in ("log-in", "lists", "files"):
            cases += [(f"ONE's {part}", functools.partial(_ask_one, part))]
    for name, question in cases:
        for fault in FAULTS:
            place = folder / f"{name}, {fault}"
            place.mkdir()
            try:
                found = found_by(functools.partial(_asked, question, fault, place), 60)
            except RuntimeError as error:
                tally.problems.append(f"{name}, {fault}: {error}")
                continue
            tally.counts["cases"] += 1
            tally.counts[found["outcome"]] += 1
            tally.counts["files of a broken download, hidden or ONE's"] += found["begun"]
            seconds[f"{name}, {fault}"] = found["seconds"]
            tally.problems += [f"{name}, {fault}: {problem}" for problem in found["problems"]]
    facts = {"silence allowed, s": PATIENCE, "asked": [name for name, _ in cases]}
    return tally.result() | facts | {"seconds until the end": seconds}


def _asked(question: Callable[[str, Path], Question], fault: str, place: Path) -> dict[str, Any]:
    """Outcome of one case: with the fault, and again without."""
    os.environ["HOME"] = str(place)
    download.WAIT = 0.01
    tally, asked = Tally(), question(fault, place)
    start = time.perf_counter()
    try:
        asked.ask()
        outcome = "mended by asking again"
    except (OSError, ValueError) as error:
        outcome = "refused with a reason"
        words = ("again", "later", "check")
        tally.check(any(word in str(error).lower() for word in words), f"no remedy: {error!r}")
        named = "127.0.0.1" in str(error) or str(error).startswith("session ")
        tally.check(named, f"neither server nor recording is named: {error!r}")
    seconds = time.perf_counter() - start
    limit = asked.silences * PATIENCE + 5
    tally.check(seconds < limit, f"took {seconds:.1f} s, more than {limit:.1f} s")
    _check_sizes(asked, tally)
    begun = {path for path in asked.place.rglob("*") if path.is_file() and _is_begun(path)}
    asked.heal()
    asked.ask()
    _check_sizes(asked, tally)
    there = [name for name in asked.sizes if (asked.place / name).exists()]  # not all are asked for
    tally.check(bool(there) or not asked.sizes, "no file is there in the end, so none was checked")
    return {
        "outcome": outcome,
        "seconds": round(seconds, 2),
        "begun": len(begun),
        "problems": tally.problems,
    }


def _is_begun(path: Path) -> bool:
    """Whether the name is not a final one: a hidden part, or ONE's with an id in it."""
    return path.name.endswith(".part") or re.search(r"\.[0-9a-f-]{36}\.\w+$", path.name) is not None


def _check_sizes(asked: Question, tally: Tally) -> None:
    """Files under their final names are whole."""
    for name, size in asked.sizes.items():
        if (path := asked.place / name).exists():
            tally.check(path.stat().st_size == size, f"{name} is there, and not whole")


def _ask_download(fault: str, place: Path) -> Question:
    Files.body = np.random.default_rng(0).bytes(100_000)
    url, heal = served(Files, fault)
    wanted = {"size": len(Files.body), "etag": "x", "timeout": PATIENCE, "progress": False}

    def ask() -> None:
        path = download.download(f"{url}/file", place / "big.h5", **wanted)
        if path.read_bytes() != Files.body:
            raise RuntimeError("other bytes")

    # Half of the rest at a time is 17 times something new.
    silences = 18 if fault == "hang half way" else download.ATTEMPTS
    return Question(ask, silences, heal, place, {"big.h5": len(Files.body)})


def _ask_bwb(fault: str, place: Path) -> Question:
    key = "brainsets/selected_units/ibl_brain_wide_bench_2026/eval/" + "0" * 36 + ".h5"
    item = f"<Contents><Key>{key}</Key><ETag>x</ETag><Size>5</Size></Contents>"
    Files.body = f"<ListBucketResult>{item}</ListBucketResult>".encode()
    url, heal = served(Files, fault)
    return Question(lambda: bwb.list_sessions(base_url=url, timeout=PATIENCE), 1, heal, place, {})


def _ask_nwb(fault: str, place: Path) -> Question:
    import h5py
    import remfile

    from mtm.data import nwb

    nwb.TIMEOUT = PATIENCE
    remfile.RemFile._num_request_retries = 1  # two tries of its nine, for the time
    with h5py.File(place / "made.nwb", "w") as file:
        file.attrs["nwb_version"] = "2.6.0"
        file["units/id"], file["units/spike_times_index"] = np.arange(2), np.array([300, 600])
        file["units/spike_times"] = np.sort(np.random.default_rng(0).uniform(0, 60, 600))
        file["intervals/trials/id"] = np.arange(20)
        file["intervals/trials/start_time"] = np.arange(20) * 2.5 + 1
    Files.body = (place / "made.nwb").read_bytes()
    url, heal = served(Files, fault)
    return Question(lambda: nwb.load_session(f"{url}/file"), 4, heal, place, {})


def _ask_one(part: str, fault: str, place: Path) -> Question:
    import one.params
    import test_ibl

    from mtm.data import ibl

    class Faulty(test_ibl.Alyx):
        """IBL's server, of which a part is faulty."""

        tree = place / "tree"
        fault: str | None = None

        def answer(self, status: int, body: Any) -> None:
            parts = {"/public": "files", "/auth-token": "log-in", "/me": "log-in"}
            mine = parts.get("/" + self.path.split("/")[1], "lists")
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer(self, status, body, self.fault if mine == part else None, {})

    written = test_ibl.make_session()
    test_ibl.write_alf(written, Faulty.tree)
    test_ibl.index_alf(Faulty.tree)
    url, heal = served(Faulty, fault)
    defaults = one.params.default().set("HTTP_DATA_SERVER", f"{url}/public")
    one.params.default = lambda: defaults
    ibl.TIMEOUT = PATIENCE
    log_in = {"username": "someone", "password": "secret", "base_url": url}

    def ask() -> None:
        session = ibl.load_session(ibl.connect(place / "cache", **log_in), test_ibl.EID)
        if not np.array_equal(session.counts, written.counts):
            raise RuntimeError("other counts")

    files = [path for path in Faulty.tree.rglob("alf/**/*.*") if path.is_file()]
    sizes = {str(path.relative_to(Faulty.tree)): path.stat().st_size for path in files}
    return Question(ask, 4, heal, place / "cache", sizes)


# ------------------------------------------------------------------------------- two


def drill_two(folder: Path, quick: bool) -> dict[str, Any]:
    """Two processes prepare the same recordings at the same time; every other time, again."""
    tally, n = Tally(), 4
    expected = [made_up(number) for number in range(n)]
    for turn in range(3 if quick else 20):
        out = folder / str(turn)
        start = time.monotonic() + 0.03
        how = {"workers": 1, "progress": False, "overwrite": turn % 2 == 1}

        def job(me: int, out: Path = out, start: float = start, how: Any = how) -> None:
            while time.monotonic() < start:
                pass
            done = mtm.prepare(made_up, range(n), out, **how)
            told = [outcome.status for outcome in done.outcomes]
            (folder / f"told-{me}.json").write_text(json.dumps(told))

        children = [Child(functools.partial(job, me)) for me in range(2)]
        tally.counts["turns"] += 1
        for me, child in enumerate(children):
            if not child.within(60):
                tally.problems.append(f"turn {turn}: a process failed")
                continue
            told = json.loads((folder / f"told-{me}.json").read_text())
            tally.counts += Counter(told)
            tally.check(set(told) <= {"written", "there already"}, f"turn {turn}: {told}")
        for number in range(n):
            tally.counts["files checked"] += 1
            same = _same_counts(out / f"{number}.npz", expected[number])
            tally.check(same, f"turn {turn}: {number}.npz is not what it should be")
        tally.check(len(list(out.iterdir())) == n, f"turn {turn}: other files are left")
    return tally.result("turns", "written", "there already", "files checked")


# ------------------------------------------------------------------------------- all


DRILLS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "kills": drill_kills,
    "disk": drill_disk,
    "damage": drill_damage,
    "memory": drill_memory,
    "network": drill_network,
    "two": drill_two,
}


def main() -> int:
    """Run the drills; 1 where there was a problem."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--only", nargs="+", choices=DRILLS, default=list(DRILLS))
    parser.add_argument("--quick", action="store_true", help="a small share of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "quick": options.quick,
        "drills": {},
    }
    for name in options.only:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                job = functools.partial(DRILLS[name], Path(folder), options.quick)
                result = found_by(job, 900)
            except RuntimeError as error:
                result = {"problems": [str(error)]}
        result = {"seconds": round(time.perf_counter() - start, 1), **result}
        found["drills"][name] = result
        print(f"{name}: {json.dumps(result, indent=1)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(result["problems"] for result in found["drills"].values()))


if __name__ == "__main__":
    sys.exit(main())
