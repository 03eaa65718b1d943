"""Fuzzing: whatever comes in is refused by name, or what comes out is right.

    python tests/drills/fuzz.py --json benchmarks/results/fuzz.json
    python tests/drills/fuzz.py --only schemes scores --examples 200 --seed 7

Not part of the tests, which hold what was found, case by case. Each target is a function that draws
an input and hands it to the package. A finding is

- an exception that is no refusal: not raised by a line of this package, or not naming the thing;
- a result other than one computed by hand, or nonsense that is taken for data;
- a case that takes more than `LONGEST` seconds.

Every target runs twice: on what hypothesis draws at random, and guided by coverage, where
atheris is installed (`pip install atheris`; Linux only). It mutates the bytes that hypothesis draws
from and keeps those that reach new branches of the package. Exit status 1 = something was found.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import io
import json
import linecache
import math
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, datetime
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that the script runs from a checkout that is not installed

try:
    import atheris
except ImportError:
    atheris = None
instrumented = atheris.instrument_imports if atheris else lambda **_: contextlib.nullcontext()
with contextlib.redirect_stderr(io.StringIO()), instrumented(include=["mtm"]):  # it lists modules
    import mtm
    from mtm import binning, cli, hub, masks, metrics, official, recipes, run
    from mtm.data import huggingface

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as hnp  # noqa: E402
from scipy.stats import poisson  # noqa: E402
from sklearn.metrics import d2_tweedie_score, r2_score  # noqa: E402

LONGEST = 5.0  # seconds of CPU time for one case
MEMORY = 4 << 30  # bytes that a case may ask for on top of what the libraries take
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

Draw = Callable[[st.SearchStrategy], Any]


# ------------------------------------------------------------------------------ the judge


class Refused(Exception):
    """The package refused the case, as it should: the case is over."""


class Wrong(Exception):
    """The package accepted the case, and what it made of it is wrong."""


class Hang(BaseException):
    """The case takes too long. No `except Exception` keeps it."""


@contextlib.contextmanager
def refusing(*names: str) -> Iterator[None]:
    """Here the package may refuse, on purpose and naming one of these; the case then ends."""
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if on_purpose(error) and any(name in str(error) for name in names):
            raise Refused from error
        raise


def on_purpose(error: BaseException) -> bool:
    """Whether a `raise` of the package is where the error comes from."""
    frame = last_frame(error)
    line = linecache.getline(frame.tb_frame.f_code.co_filename, frame.tb_lineno)
    return inside(frame) and line.strip().startswith("raise ")


def last_frame(error: BaseException, within: Callable[[Any], bool] = lambda frame: True) -> Any:
    """The innermost frame of an error; of those within the package, if so asked."""
    frame, last = error.__traceback__, error.__traceback__
    while frame is not None:
        last = frame if within(frame) else last
        frame = frame.tb_next
    return last


def inside(frame: Any) -> bool:
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(ROOT / "mtm")


def check(fine: Any, what: str) -> None:
    if not fine:
        raise Wrong(what)


class Target:
    """A function that draws a case, and what became of its cases."""

    def __init__(self, function: Callable[[Draw], None], share: float) -> None:
        self.name, self.function, self.share = function.__name__.replace("_", "-"), function, share
        self.inputs = self.refused = 0
        self.findings: dict[str, dict[str, str]] = {}

    def __call__(self, data: st.DataObject) -> None:
        """One case."""
        drawn: list[Any] = []

        def draw(strategy: st.SearchStrategy) -> Any:
            drawn.append(data.draw(strategy))
            return copy.deepcopy(drawn[-1])

        signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
        try:
            self.function(draw)
        except Refused:
            self.refused += 1
        except hypothesis.errors.HypothesisException:  # the draw came to nothing
            raise
        except (Exception, Hang) as error:
            self.found(error, drawn)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        self.inputs += 1

    def found(self, error: BaseException, drawn: list[Any]) -> None:
        """Keep the shortest case of each kind of error and place."""
        frame = last_frame(error, inside)
        file = Path(frame.tb_frame.f_code.co_filename)
        place = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
        where = f"{place}:{frame.tb_lineno} in {frame.tb_frame.f_code.co_name}"
        case, key = (
            repr(drawn),
            f"{type(error).__name__} {where} {error if type(error) is Wrong else ''}",
        )
        if key not in self.findings or len(case) < len(self.findings[key]["case"]):
            said = f"{type(error).__name__}: {error}"[:300]
            self.findings[key] = {"error": said, "where": where, "case": case[:600]}


TARGETS: dict[str, Target] = {}


def target(share: float = 1.0) -> Callable[[Callable[[Draw], None]], Callable[[Draw], None]]:
    """Register a function as a target, run on this share of the examples."""

    def register(function: Callable[[Draw], None]) -> Callable[[Draw], None]:
        made = Target(function, share)
        TARGETS[made.name] = made
        return function

    return register


# ------------------------------------------------------------------------------ what is drawn

TEXT = st.text(max_size=5)
ODD_TEXT = st.sampled_from(["", "/", "a/b", "a.npy", "\0", "x\0y", "..", "é\n", "\ud800", "name"])
BIG = st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30])
NUMBER = st.integers(-3, 5) | BIG | st.floats() | st.sampled_from([0.02, 0.5, 1.0, 1e308, 1e-308])
JUNK = st.one_of(
    NUMBER,
    st.none() | st.booleans() | TEXT | ODD_TEXT,
    st.lists(NUMBER | TEXT | st.none(), max_size=3),
    st.sampled_from([np.float32(0.5), np.int64(3), np.array([1.0]), np.bool_(True), b"x", {}, ()]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | BIG | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
LABEL = TEXT | st.sampled_from(["CA1", "DG", "root", "void", "", None])
DTYPE = hnp.scalar_dtypes() | st.sampled_from(["O", "f8", "i8", "u1", "S3", "U2"]).map(np.dtype)


def arrays(shape: Any) -> st.SearchStrategy:
    """Arrays of any type."""
    anything = st.none() | NUMBER | TEXT
    return DTYPE.flatmap(
        lambda dtype: hnp.arrays(dtype, shape, elements=anything if dtype.kind == "O" else None)
    )


SHAPE = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)


def sizes(draw: Draw, most: int = 4) -> tuple[int, int, int]:
    """Numbers of trials, bins and neurons."""
    return draw(st.tuples(*[st.integers(1, most)] * 3))


def small_counts(draw: Draw, shape: tuple[int, ...], most: int = 3) -> np.ndarray:
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, most)))


def changes(draw: Draw, odd: dict[str, st.SearchStrategy], most: int = 3) -> dict[str, Any]:
    """Some of these, drawn."""
    names = draw(st.lists(st.sampled_from(sorted(odd)), max_size=most, unique=True))
    return {name: draw(odd[name]) for name in names}


# ------------------------------------------------------------------------------ sessions


@target()
def session(draw: Draw) -> None:
    """Session(...): any field may hold anything. What is accepted comes back from its file."""
    k, t, n = sizes(draw)
    key = TEXT | ODD_TEXT
    whole = st.lists(st.integers(-1, k) | NUMBER, max_size=k)
    fields = {
        "counts": small_counts(draw, (k, t, n)),
        "name": "any",
        "regions": draw(st.none() | st.lists(LABEL, min_size=n, max_size=n)),
        "bin_size": 0.02,
    }
    odd = {
        "counts": arrays((k, t, n)) | arrays(SHAPE) | JUNK,
        "regions": arrays((n,)) | JUNK,
        "name": TEXT | ODD_TEXT | JUNK,
        "subject": TEXT | JUNK,
        "bin_size": JUNK,
        "window": st.tuples(NUMBER, NUMBER) | JUNK,
        "behaviour": st.dictionaries(key, arrays((k,)) | arrays((k, t)), max_size=2),
        "neurons": st.dictionaries(key, arrays((n,)) | arrays((n, 2)), max_size=2),
        "rates": hnp.arrays(np.float64, (k, t, n)) | arrays(SHAPE) | JUNK,
        "given_split": st.tuples(whole, whole, whole) | JUNK,
        "trial_ids": st.permutations(range(k)) | whole | arrays((k,)) | JUNK,
        "n_recorded": st.integers(k, 9) | JUNK,
        "provenance": st.dictionaries(TEXT, JSON, max_size=2) | JUNK,
    }
    fields |= changes(draw, odd)
    with refusing("session ", "session name"):
        made = mtm.Session(**fields)
    check(np.array_equal(made.counts, fields["counts"]), "counts differ")
    check(type(made.bin_size) is float and 0 < made.bin_size < math.inf, "bin_size is no width")
    check(isinstance(made.subject, str), "subject is no text")
    if fields.get("trial_ids") is not None:
        check(np.array_equal(made.trial_ids, fields["trial_ids"]), "trial_ids differ")
    if fields.get("n_recorded") is not None:
        check(made.n_recorded == fields["n_recorded"], "n_recorded differs")
    if fields.get("given_split") is not None:
        for part, given in zip(made.given_split, fields["given_split"], strict=True):
            check(set(part.tolist()) == set(given), "given_split differs")
    repr(made)
    again = mtm.Session.load(made.save(FOLDER / "any.npz"), mmap=draw(st.booleans()))
    same_session(made, again)
    listed = mtm.Sessions(FOLDER / "any.npz")
    check(listed.names == [made.name], "listed under another name")
    repr(listed)
    with refusing("session "):
        made.split()


def same_session(one: mtm.Session, other: mtm.Session) -> None:
    """Everything that a file keeps is the same."""
    for what in ("name", "subject", "bin_size", "window", "n_recorded"):
        check(getattr(one, what) == getattr(other, what), f"{what} does not come back")
    for what in ("counts", "regions", "trial_ids", "rates"):
        check(same(getattr(one, what), getattr(other, what)), f"{what} does not come back")
    for what in ("behaviour", "neurons"):
        mine, theirs = getattr(one, what), getattr(other, what)
        check([*mine] == [*theirs], f"names of {what} do not come back")
        check(all(same(mine[key], theirs[key]) for key in mine), f"{what} does not come back")
    check(json.dumps(one.provenance) == json.dumps(other.provenance), "provenance")


def same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


def valid_file() -> bytes:
    """A session file with something in every place."""
    rng = np.random.default_rng(0)
    made = mtm.Session(
        rng.poisson(1.0, (4, 3, 2)),
        ["CA1", ""],
        "any",
        behaviour={"x": np.arange(4), "y": np.ones((4, 3))},
        neurons={"depth": np.arange(2.0)},
        rates=np.ones((4, 3, 2)),
        given_split=mtm.Split([0, 1], [2], [3]),
    )
    return made.save(FOLDER / "valid.npz").read_bytes()


VALID = valid_file()


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def read_session_file(draw: Draw, path: Path, damaged: bool) -> None:
    """Each way to read a file refuses it, naming it, or reads the same."""
    read: dict[str, Any] = {}
    for how, reader in {
        "load": mtm.Session.load,
        "mmap": lambda path: mtm.Session.load(path, mmap=True),
        "list": mtm.Sessions,
    }.items():
        with contextlib.suppress(Refused), refusing(path.name, "session "):
            read[how] = reader(path)
    if "load" in read and "mmap" in read and not damaged:  # nobody sums up what stays on disk
        same_session(read["load"], read["mmap"])
    if "list" in read:
        repr(read["list"])
        read["list"].summary()
        rule = draw(st.none() | st.just({"depth": 1.0}) | st.just({"absent": 1}))
        with refusing("session ", path.name):
            for chosen in read["list"].filter(min_rate=draw(st.floats()), units=rule):
                repr(chosen)
    if not read:
        raise Refused


@target()
def session_file(draw: Draw) -> None:
    """A `.npz` of any arrays under any names, and any text in `meta` and `listed`."""
    parts: dict[str, Any] = {}
    with np.load(io.BytesIO(VALID)) as file:
        parts |= {name: file[name] for name in file.files}
    for name in draw(st.lists(st.sampled_from(sorted(parts)), max_size=3, unique=True)):
        if draw(st.booleans()):
            del parts[name]
        elif name in ("meta", "listed"):
            told = json.loads(str(parts[name]))
            key = draw(st.sampled_from(sorted(told)))
            told |= {draw(st.just(key) | TEXT): draw(JSON)}
            parts[name] = np.array(json.dumps(draw(st.just(told) | JSON)))
        else:
            parts[name] = draw(arrays(parts[name].shape) | arrays(SHAPE))
    known = st.sampled_from(["x", "a/b", "split/x", "neurons/", "behaviour/z", "name", "meta/x"])
    for _ in range(draw(st.integers(0, 2))):
        parts[draw(known | st.text(max_size=5))] = draw(arrays(SHAPE))
    path = FOLDER / "members.npz"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        warnings.simplefilter("ignore")  # two members of one name
        for name, content in parts.items():
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(content))
    read_session_file(draw, path, damaged=False)


EDIT = st.tuples(
    st.floats(0, 1), st.sampled_from(["set", "cut", "drop", "copy"]), st.binary(max_size=4)
)


def edited(draw: Draw, content: bytes) -> bytes:
    """Bytes changed, left out, said twice, or cut off."""
    changed = bytearray(content)
    for place, kind, new in draw(st.lists(EDIT, min_size=1, max_size=4)):
        at = int(place * len(changed))
        if kind == "set":
            changed[at : at + len(new)] = new
        elif kind == "cut":
            del changed[at:]
        elif kind == "drop":
            del changed[at : at + 7]
        else:
            changed[at:at] = changed[at : at + 40]
    return bytes(changed)


@target()
def session_bytes(draw: Draw) -> None:
    """A valid file, edited: as it lies on disk, or within a member, whose checksum is right."""
    path = FOLDER / "bytes.npz"
    raw = draw(st.booleans())
    if raw:
        path.write_bytes(edited(draw, VALID))
    else:
        inner = members(VALID)
        name = draw(st.sampled_from(sorted(inner)))
        head = draw(st.booleans())  # of the array: its type and shape
        end = inner[name].find(b"\n") if head else len(inner[name])
        inner[name] = edited(draw, inner[name][:end]) + inner[name][end:]
        how = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        with zipfile.ZipFile(path, "w", how) as file:
            for name, content in inner.items():
                file.writestr(name, content)
    read_session_file(draw, path, damaged=raw)


# ------------------------------------------------------------------------------ spikes and bins

TICKS = st.integers(-40, 40) | st.integers(0, 400)
UNITS = st.sampled_from([(0.001, 20), (1 / 64, 4), (0.01, 2)])  # a tick in seconds, ticks a bin


@target()
def spike_times(draw: Draw) -> None:
    """Session.from_spike_times against a count of integers, whatever stands for times and ids."""
    tick, per_bin = draw(UNITS)
    offset = draw(st.sampled_from([0, 10**6]))
    events = [offset + e for e in draw(st.lists(TICKS, min_size=1, max_size=4))]
    start, bins = draw(st.integers(-9, 9)), draw(st.integers(1, 5))
    window = (start * tick, (start + bins * per_bin) * tick)
    spikes = draw(
        st.lists(st.tuples(TICKS.map(lambda x: x + offset), st.integers(0, 5)), max_size=30)
    )
    ids = draw(
        st.lists(st.integers(-128, 127), min_size=6, max_size=6, unique=True)
        | st.lists(st.integers(-128, 127), min_size=6, max_size=6, unique=True)
        | st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6, unique=True)
        | st.lists(TEXT, min_size=6, max_size=6, unique=True)
        | st.lists(JUNK, min_size=6, max_size=6)
    )
    kinds = [None, None, np.int8, np.int8, np.int16, np.uint64, np.float64, object]
    kind = draw(st.sampled_from(kinds))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ids = np.array(ids, dtype=kind)
            fired = ids[[cell for _, cell in spikes]] if spikes else ids[:0]
    except (ValueError, TypeError, OverflowError, RuntimeWarning):
        raise Refused from None  # not an array
    fields = {
        "spike_times": [s * tick for s, _ in spikes],
        "spike_clusters": fired,
        "align_times": [e * tick for e in events],
        "clusters": ids,
        "window": window,
        "bin_size": per_bin * tick,
        "name": "any",
    }
    odd = {
        "spike_times": st.lists(NUMBER, min_size=len(spikes), max_size=len(spikes)) | JUNK,
        "spike_clusters": arrays((len(spikes),)) | JUNK,
        "align_times": st.lists(NUMBER, max_size=3) | JUNK,
        "clusters": arrays((6,)) | arrays(SHAPE),
        "regions": st.dictionaries(st.integers(-3, 3) | TEXT, LABEL) | st.lists(LABEL),
        "window": st.tuples(NUMBER, NUMBER) | JUNK,
        "bin_size": JUNK,
        "traces": st.just({"x": ([0.0, 1.0], [1.0, 2.0])})
        | st.dictionaries(
            TEXT, st.tuples(st.lists(NUMBER, max_size=3), st.lists(NUMBER, max_size=3)), max_size=1
        ),
    }
    changed = changes(draw, odd, 1) if draw(st.booleans()) else {}
    with refusing("session 'any', "):
        made = mtm.Session.from_spike_times(**{**fields, **changed})
    if set(changed) & {*fields}:
        check(made.counts.any(), "a session without a spike")
        return
    expected = np.zeros((len(events), bins, 6), dtype=int)
    for k, event in enumerate(events):
        for spike, cell in spikes:
            place = (spike - event - start) // per_bin
            if 0 <= place < bins:
                expected[k, place, cell] += 1
    check(np.array_equal(made.counts, expected), "counts differ from those by hand")


@target()
def traces(draw: Draw) -> None:
    """bin_trace against integrals in exact fractions, gaps and missing samples included."""
    tick, per_bin = Fraction(1, 64), draw(st.integers(1, 6))
    times = sorted(draw(st.sets(st.integers(0, 60), max_size=12)))
    value = st.integers(-5, 5) | st.just(math.nan)
    values = draw(st.lists(value, min_size=len(times), max_size=len(times)))
    events = draw(st.lists(st.integers(-20, 70), max_size=3))
    start, bins, gap = draw(st.integers(-9, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 30))
    given = {
        "times": [float(i * tick) for i in times],
        "values": values,
        "align_times": [float(e * tick) for e in events],
        "window": (float(start * tick), float((start + bins * per_bin) * tick)),
        "bin_size": float(per_bin * tick),
        "max_gap": float(gap * tick),
    }
    odd = {
        "times": st.lists(NUMBER, max_size=4) | JUNK,
        "values": st.lists(NUMBER, min_size=len(times), max_size=len(times)) | JUNK,
        "align_times": st.lists(NUMBER, max_size=3) | JUNK,
        "window": st.tuples(NUMBER, NUMBER) | JUNK,
        "bin_size": JUNK,
        "max_gap": JUNK,
    }
    changed = changes(draw, odd, 1)
    with refusing(*given):
        found = binning.bin_trace(**{**given, **changed})
    check(found.ndim == 2 and found.dtype == np.float32 and not np.isinf(found).any(), "no trace")
    if changed:
        return
    known = [(i, v) for i, v in zip(times, values, strict=True) if not math.isnan(v)]
    for k, event in enumerate(events):
        for b in range(bins):
            left = event + start + b * per_bin
            expected = mean_of_lines(known, left, left + per_bin, gap)
            close = np.isclose(found[k, b], expected, rtol=1e-5, atol=1e-5, equal_nan=True)
            check(close, "the mean of a bin is not that by hand")


def mean_of_lines(known: list[tuple[int, float]], left: int, right: int, gap: int) -> float:
    """Mean from left to right of the straight lines between samples; NaN where not known."""
    if len(known) < 2 or left < known[0][0] or right > known[-1][0]:
        return math.nan
    total = Fraction(0)
    for (a, v), (b, w) in zip(known, known[1:], strict=False):
        low, high = max(a, left), min(b, right)
        if low < high:
            if b - a > gap:
                return math.nan
            middle = Fraction(low + high, 2)
            total += (high - low) * (Fraction(v) + Fraction(w - v) * (middle - a) / (b - a))
    return float(total / (right - left))


@target()
def bins(draw: Draw) -> None:
    """n_bins, bin_spikes, ordered_samples and wheel_speed on anything."""
    window, width = draw(st.tuples(NUMBER, NUMBER) | JUNK), draw(JUNK)
    with contextlib.suppress(Refused), refusing("window", "bin_size"):
        n = binning.n_bins(window, width)
        check(
            type(n) is int and math.isclose(n * width, window[1] - window[0], rel_tol=1e-5), "bins"
        )
    times = draw(st.lists(NUMBER, max_size=5) | JUNK)
    neurons = draw(st.lists(st.integers(-1, 3), max_size=5) | arrays(SHAPE) | JUNK)
    n_neurons = draw(st.integers(-1, 4) | JUNK.filter(lambda n: not isinstance(n, int) or n < 99))
    with contextlib.suppress(Refused), refusing("spike_times", "spike_neurons", "n_neurons"):
        found = binning.bin_spikes(
            times, neurons, [0.0, 1.0], n_neurons=n_neurons, window=(0.0, 0.5), bin_size=0.1
        )
        check(found.shape == (2, 5, n_neurons), "shape")
        inside = sum(0 <= float(x) < 0.5 or 1 <= float(x) < 1.5 for x in times)
        check(found.sum() == inside, "spikes were lost")
    values = draw(st.lists(NUMBER, max_size=5) | JUNK)
    with contextlib.suppress(Refused), refusing("times", "values"):
        t, v = binning.ordered_samples(times, values)
        check(t.shape == v.shape and (np.diff(t) > 0).all() and np.isfinite([t, v]).all(), "order")
        with refusing("wheel times"):
            binning.wheel_speed(t, v)


# ------------------------------------------------------------------------------ masks


@target()
def schemes(draw: Draw) -> None:
    """Every scheme on any sizes, regions and ratio: it hides something, or says why it cannot."""
    name = draw(st.sampled_from(sorted(masks.SCHEMES)))
    kind = masks.scheme(name)
    shape = draw(st.tuples(*[st.integers(0, 4)] * 3))
    counts = torch.zeros(shape, dtype=draw(st.sampled_from([torch.uint8, torch.float32])))
    codes = draw(st.lists(st.integers(-2, 3), min_size=shape[2], max_size=shape[2]))
    regions = torch.tensor(codes, dtype=torch.int64)
    if draw(st.integers(0, 9)) == 0:
        regions = draw(
            st.sampled_from([regions[1:], regions.float(), regions[None], torch.zeros(9)])
        )
    ratio = draw(st.sampled_from([1.0, 1, 0.5, 1e-9, 0, 5e-324, 1 - 1e-9]) | JUNK)
    extra = {"patch_size": draw(st.integers(1, 9) | JUNK)} if kind.patches else {}
    seed = draw(st.integers(0, 99))
    drawn = []
    for _ in range(2):
        with refusing("ratio", "region", "counts", "patch_size", "neuron"):
            generator = torch.Generator().manual_seed(seed)
            drawn.append(kind.draw(counts, regions, ratio, generator, **extra))
    mask, again = drawn
    hidden, scored, real = mask.hidden, mask.target, regions > masks.PADDING
    check(hidden.shape == scored.shape == counts.shape, "shape")
    check(hidden.dtype == scored.dtype == torch.bool, "dtype")
    check(scored.any(), "nothing is scored")
    check(not (scored & ~hidden).any(), "a target is shown")
    check(not hidden[..., ~real].any(), "padding is hidden")
    check(
        torch.equal(hidden, again.hidden) and torch.equal(scored, again.target),
        "not the same twice",
    )
    check(mask.causal == kind.causal, "causal")
    if ratio == 1 and name != "intra-region":
        share = (
            hidden if name != "inter-region" else hidden[..., regions == regions[scored[0, 0]][0]]
        )
        check(
            share[..., real if name != "inter-region" else slice(None)].all(), "ratio 1 shows some"
        )


@target()
def samplers(draw: Draw) -> None:
    """MaskSampler with any arguments."""
    known = st.lists(st.sampled_from(sorted(masks.SCHEMES)), max_size=3)
    given = {
        "schemes": draw(known | known | st.lists(TEXT, max_size=2) | TEXT),
        "ratios": draw(
            st.none() | st.dictionaries(st.sampled_from(sorted(masks.SCHEMES)), NUMBER, max_size=1)
        ),
        "seed": draw(st.integers(-3, 9) | JUNK),
        "patch_size": draw(st.integers(1, 9) | JUNK),
    }
    with refusing("scheme", "ratio", "seed", "patch_size", "masking"):
        sampler = masks.MaskSampler(**given)
        name, mask = sampler(torch.zeros(2, 3, 4), torch.tensor([0, 0, 1, -1]))
    check(name in given["schemes"] and mask.target.any(), "no mask")


def tiny_model(draw: Draw) -> tuple[mtm.MtM, int, int]:
    """A model of some tokenizer and options, with its numbers of bins and neurons."""
    n_bins, n = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    options = {
        key: draw(st.sampled_from(mtm.model.CHOICES[key]))
        for key in ("tokenizer", "positions", "hidden_input", "input_transform")
    }
    sizes = {"width": 8, "depth": 2, "heads": 2, "mlp_width": 8, "stitch_width": 5, "patch_size": 3}
    torch.manual_seed(draw(st.integers(0, 9)))
    model = mtm.MtM(mtm.MtMConfig(n_bins=n_bins, **sizes, **options))
    model.add_session("any", n, torch.rand(n) + 0.1)
    return model.eval(), n_bins, n


@target(0.3)
def hidden_values(draw: Draw) -> None:
    """Whatever stands where an entry is hidden, the model's output is the same to the last bit."""
    model, n_bins, n = tiny_model(draw)
    name = draw(st.sampled_from(sorted(masks.SCHEMES)))
    counts = torch.from_numpy(small_counts(draw, (2, n_bins, n))).float()
    regions = torch.from_numpy(draw(hnp.arrays(np.int64, n, elements=st.integers(0, 2))))
    mask = masks.MaskSampler([name], seed=draw(st.integers(0, 99)), patch_size=3).draw(
        name, counts, regions
    )
    value = draw(st.sampled_from([0.0, 1.0, 65535.0, math.inf, math.nan]))
    other = torch.where(mask.hidden, value, counts)
    shown, changed = (model.predict_log_rates(x, name, mask, "any") for x in (counts, other))
    check(torch.equal(shown, changed), "hidden values reach the output")
    if mask.causal:
        bin_ = draw(st.integers(0, n_bins - 1))
        later = counts.clone()
        later[:, bin_ + 1 :] += 3
        ahead = model.predict_log_rates(later, name, mask, "any")
        check(
            torch.equal(shown[:, : bin_ + 1], ahead[:, : bin_ + 1]), "the future reaches the past"
        )


# ------------------------------------------------------------------------------ scores


@target()
def scores(draw: Draw) -> None:
    """Every score against scipy, scikit-learn and loops, entry by entry."""
    k, t, n = sizes(draw, 4)
    most = draw(st.sampled_from([0, 1, 3, 60]))
    counts = draw(hnp.arrays(np.int64, (k, t, n), elements=st.integers(0, most)))
    log_rates = draw(hnp.arrays(np.float64, (k, t, n), elements=st.floats(-12, 6)))
    null = draw(st.none() | hnp.arrays(np.float64, (n,), elements=st.floats(-6, 3)))
    groups = draw(hnp.arrays(np.float64, (k,), elements=st.sampled_from([0.0, 1.0, math.nan])))
    bits = metrics.bits_per_spike(log_rates, counts, null)
    d2, r2 = metrics.poisson_d2(log_rates, counts, null), metrics.trial_r2(log_rates, counts)
    psth = metrics.psth_r2(log_rates, counts, groups)
    gains, spikes = [], counts.sum(axis=(0, 1))
    for i in range(n):
        y, rate = counts[:, :, i].ravel(), np.exp(log_rates[:, :, i]).ravel()
        base = np.full(y.shape, y.mean() if null is None else np.exp(null[i]))
        fine = [poisson.logpmf(y, rate).sum(), poisson.logpmf(y, np.maximum(base, 1e-9)).sum()]
        gains.append((fine[0] - fine[1]) / math.log(2))
        near(bits[i], gains[i] / spikes[i] if spikes[i] else math.nan, "bits per spike")
        varies = np.ptp(y) > 0
        if null is None:
            near(d2[i], d2_tweedie_score(y, rate, power=1) if varies else math.nan, "D2")
        near(r2[i], r2_score(y, rate) if varies else math.nan, "R2")
        likes = [np.flatnonzero(groups == g) for g in (0.0, 1.0) if (groups == g).any()]
        means = [
            np.concatenate([x[g][:, :, i].mean(0) for g in likes]) if likes else np.zeros(1)
            for x in (counts, np.exp(log_rates))
        ]
        varies = np.ptp(means[0]) > 1e-9
        near(psth[i], r2_score(*means) if varies else math.nan, "R2 of PSTHs")
    total = sum(gains) / spikes.sum() if spikes.sum() else math.nan
    near(metrics.pooled_bits_per_spike(log_rates, counts, null), total, "pooled bits per spike")


def near(found: float, expected: float, what: str) -> None:
    close = np.isclose(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    check(close, f"{what}: {found} instead of {expected}")


@target()
def odd_scores(draw: Draw) -> None:
    """Scores of anything: a number or NaN for each neuron, and only for numbers that make sense."""
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=3) | SHAPE)
    number = st.sampled_from([0, 1, 3]) | st.floats() | st.sampled_from([-1.0, 710.0, 1e300, 65535])
    counts = draw(hnp.arrays(np.float64, shape, elements=number) | arrays(shape) | JUNK)
    log_rates = draw(hnp.arrays(np.float64, shape, elements=number) | JUNK)
    null = draw(st.none() | hnp.arrays(np.float64, SHAPE, elements=number) | JUNK)
    groups = draw(hnp.arrays(np.float64, SHAPE, elements=number) | JUNK)
    names = ("log-rates", "counts", "null", "conditions")
    for score in (
        lambda: metrics.bits_per_spike(log_rates, counts, null),
        lambda: metrics.pooled_bits_per_spike(log_rates, counts, null),
        lambda: metrics.poisson_d2(log_rates, counts, null),
        lambda: metrics.trial_r2(log_rates, counts),
        lambda: metrics.psth_r2(log_rates, counts, groups),
        lambda: metrics.log_mean(counts),
    ):
        with np.errstate(all="ignore"):  # huge rates overflow to a score of minus infinity
            with contextlib.suppress(Refused), refusing(*names):
                found = np.atleast_1d(score())
                check(found.shape in ((1,), (np.shape(counts)[-1],)), "shape")
                given = np.asarray(counts, dtype=np.float64)
                check(np.isfinite(given).all() and np.min(given) >= 0, "no counts, but a score")
                check(not np.isposinf(found).any(), "a score of infinity")


# ------------------------------------------------------------------------------ settings


def setting(name: str, plain: Any, odd: bool = True) -> st.SearchStrategy:
    """Values for a setting: near its own, or anything."""
    near = {int: st.integers(-odd, 9), float: st.floats(-odd, 1.5), bool: st.booleans()}
    known = (recipes.CHOICES | mtm.model.CHOICES).get(name)
    close = st.sampled_from(known) if known else near.get(type(plain), st.none() | st.floats(0, 2))
    schemes = st.sampled_from(sorted(masks.SCHEMES))
    if isinstance(plain, tuple):
        close = st.lists(schemes | TEXT, max_size=4)
    if isinstance(plain, dict):
        close = st.dictionaries(schemes, st.floats(0, 1) | NUMBER, max_size=2)
    return st.integers(0, 2).flatmap(lambda i: JUNK if odd and i == 0 else close)


def settings_of(kind: type, odd: bool = True) -> dict[str, st.SearchStrategy]:
    return {name: setting(name, plain, odd) for name, plain in vars(kind()).items()}


def same_settings(made: Any, given: dict[str, Any]) -> None:
    """What was accepted is kept as it is, is of the type that belongs there, and goes into JSON."""
    kinds = {field.name: str(field.type) for field in fields(made)}
    for name, value in given.items():
        kept = getattr(made, name)
        expected = tuple(value) if isinstance(value, list) else value
        rounded = isinstance(kept, float) and math.isclose(kept, value)
        check(kept == expected or rounded, f"{name} differs")
        wanted = kinds[name].removesuffix(" | None")
        right = type(kept).__name__ == wanted.partition("[")[0]
        right |= kept is None and wanted != kinds[name]
        check(right, f"{name} is a {type(kept).__name__}, not {kinds[name]}")
        check(not isinstance(kept, float) or math.isfinite(kept), f"{name} is {kept}")
    json.dumps({name: getattr(made, name) for name in kinds}, allow_nan=False)


@target()
def train_config(draw: Draw) -> None:
    """TrainConfig(...), and the same by way of `recipe`."""
    given = changes(draw, settings_of(mtm.TrainConfig))
    with refusing(*given, "unknown masking scheme"):
        made = mtm.TrainConfig(**given)
    same_settings(made, given)
    check(recipes.recipe("mtm", **given) == made, "recipe")


@target()
def model_config(draw: Draw) -> None:
    """MtMConfig(...) and from_depth; a small one that is accepted makes a model that runs."""
    given = changes(draw, settings_of(mtm.MtMConfig), 4)
    base = {"n_bins": 3, "width": 8, "depth": 1, "heads": 2, "mlp_width": 8, "stitch_width": 4}
    with refusing(*given):
        made = mtm.MtMConfig(**{**base, "patch_size": 2, "n_patches": 2, **given})
    same_settings(made, given)
    with contextlib.suppress(Refused), refusing("depth"):
        depth = draw(st.integers(-1, 9) | JUNK.filter(lambda x: type(x) is not int or x < 999))
        check(mtm.MtMConfig.from_depth(depth).depth == depth, "depth")
    if max(getattr(made, name) for name in (*base, "patch_size", "n_patches")) > 99:
        return
    with refusing("session 'any'"):  # the authors' NDT2 takes no fewer than a patch
        model = mtm.MtM(made, {"any": 3}).train(draw(st.booleans()))
    prompt = draw(st.none() | TEXT)
    out = model(torch.ones(2, made.n_bins, 3), prompt, None, "any")
    check(out.shape == (2, made.n_bins, 3) and out.isfinite().all(), "output")


TINY = mtm.Session(
    np.random.default_rng(0).poisson(1.0, (14, 3, 4)), ["A", "A", "B", ""], "tiny", bin_size=0.02
)
FAST = {"epochs": 1, "validations": 1, "batch_size": 4, "components": 2}
SMALL = {"n_bins": 3, "width": 8, "depth": 1, "heads": 2, "mlp_width": 8, "stitch_width": 4}


@target(0.1)
def training(draw: Draw) -> None:
    """Settings that are accepted train a model, or are refused before anything is trained."""
    odd = settings_of(mtm.TrainConfig, odd=False)
    odd |= {"epochs": st.integers(1, 3), "compile": st.just("none")}  # compiling takes a minute
    given = changes(draw, odd, 4)
    every = draw(st.floats())
    options = {"progress": False, "folder": FOLDER / "trained", "restart": True}
    with refusing(*given, "save_every", "scheme", "ratio", "session", "lr", "the model"):
        options |= {**FAST, **given, "save_every": every}
        fitted = mtm.fit(TINY, mtm.MtMConfig(**SMALL), **options)
    check(every >= 0, "save_every is no time")
    check(all(p.isfinite().all() for p in fitted.model.parameters()), "weights")
    json.dumps(fitted.to_dict(), allow_nan=False)
    repr(fitted)


# ------------------------------------------------------------------------------ command line


def run_command(arguments: list[str]) -> tuple[int, str]:
    """Exit status and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main(arguments)
        except SystemExit as stop:
            status = stop.code or 0
    return int(status), said.getvalue()


WORD = TEXT | st.sampled_from(
    ["0", "-1", "1", "2", "nan", "inf", "none", "1e400", "9" * 5000, "cpu"]
)
FLAG = st.sampled_from(
    [f"--{name.replace('_', '-')}" for name in vars(mtm.TrainConfig())]
    + ["--depth", "--tokenizer", "--patch-size", "--start", "--restart", "--save-every", "--device"]
)
DEVICE = st.sampled_from(["cpu", "meta", "cuda:99", "cpu:-1", "mps", "xla", "privateuseone", "\0"])


@target(0.15)
def command_line(draw: Draw) -> None:
    """`python -m mtm` with any flags and words ends with a status and a line that says why."""
    where = FOLDER / "command"
    source = TINY.save(where / "tiny.npz")
    out = str(where / f"model-{os.getpid()}")
    command = draw(
        st.sampled_from(["train", "train", "train", "simulate", "prepare", "evaluate", "export"])
    )
    start = {
        "train": [str(source), "--out", out, "--restart", "--epochs", "1", "--validations", "1"]
        + ["--depth", "1", "--device", "cpu"],
        "simulate": [str(where / "sims"), "--sessions", "1", "--trials", "2", "--neurons", "6"],
        "prepare": [
            draw(st.sampled_from(["nwb", "bwb", "steinmetz", "huggingface", "ibl"])),
            str(source),
        ]
        + ["--out", str(where / "prepared"), "--workers", "1"],
        "evaluate": [out, str(source)],
        "export": [out, str(source), "--out", str(where), "--label", "x"],
    }[command]
    more = []
    for _ in range(draw(st.integers(0, 3))):
        flag = draw(FLAG if command == "train" else st.just("--seed") | st.just("--window") | TEXT)
        more += [flag, *(draw(st.lists(DEVICE if flag == "--device" else WORD, max_size=2)))]
    if "--epochs" in more or "--compile" in more or "--depth" in more:
        raise Refused  # an hour, a minute, and all memory, as asked for
    status, said = run_command([command, *start, *more])
    check(status in (0, 1, 2), f"status {status}")
    if status:
        check("error:" in said and "Traceback" not in said, f"no reason given: {said[-200:]}")
        raise Refused


# ------------------------------------------------------------------------------ models on disk


def saved_model() -> Path:
    model = mtm.MtM(mtm.MtMConfig(**SMALL), {"any": 4})
    model.seen["any"] = np.arange(3)
    return hub.save(model, FOLDER / "model")


MODEL = saved_model()
MODEL_CONFIG, MODEL_WEIGHTS = ((MODEL / name).read_bytes() for name in (hub.CONFIG, hub.WEIGHTS))


def changed_json(draw: Draw, value: Any) -> Any:
    """The value with another in one place, deep inside."""
    if not isinstance(value, dict) or not value or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    key = draw(st.sampled_from(sorted(value)))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "gone", "more"]))
    if kind == "gone":
        return {k: v for k, v in value.items() if k != key}
    if kind == "more":
        return {**value, draw(TEXT): draw(JSON)}
    return {**value, key: changed_json(draw, value[key])}


@target()
def model_folder(draw: Draw) -> None:
    """A saved model whose config.json is any other, or whose weights have other bytes."""
    folder = FOLDER / "damaged"
    folder.mkdir(exist_ok=True)
    config, weights = MODEL_CONFIG, MODEL_WEIGHTS
    kind = draw(st.sampled_from(["json", "json", "text", "weights", "header"]))
    if kind == "json":
        config = json.dumps(changed_json(draw, json.loads(config))).encode()
    elif kind == "text":
        config = edited(draw, config)
    elif kind == "weights":
        weights = edited(draw, weights)
    else:  # the header alone, with its length put right
        size = int.from_bytes(weights[:8], "little")
        header = json.loads(weights[8 : 8 + size])
        text = json.dumps(changed_json(draw, header))
        for old, new in (("F32", draw(st.sampled_from(["F32", "I32", "BOOL", "F64", "F16"]))),):
            text = text.replace(old, new, draw(st.integers(0, 3)))
        weights = len(text.encode()).to_bytes(8, "little") + text.encode() + weights[8 + size :]
    (folder / hub.CONFIG).write_bytes(config)
    (folder / hub.WEIGHTS).write_bytes(weights)
    with refusing(str(folder)):
        model = mtm.load(folder)
    model.summary()
    for name in model.session_names:
        n = model._maps(name).n_neurons
        out = model(torch.ones(1, model.config.n_bins, n), name)
        check(out.shape == (1, model.config.n_bins, n) and out.dtype == torch.float32, "output")
    hub.save(model, FOLDER / "again")
    mtm.load(FOLDER / "again")


def saved_run() -> Path:
    folder = FOLDER / "run"
    mtm.fit(TINY, mtm.MtMConfig(**SMALL), folder=folder, progress=False, **FAST)
    return folder


RUN = saved_run()
RUN_STATE = run.states(RUN)[-1]


@target(0.3)
def run_folder(draw: Draw) -> None:
    """The state of a run, edited: training goes on as it was, or says that the state is damaged."""
    content = RUN_STATE.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if draw(st.booleans()):
        facts = json.loads(header["__metadata__"][run.HEADER])
        header["__metadata__"][run.HEADER] = json.dumps(changed_json(draw, facts))
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + size :]
    else:
        content = edited(draw, content)
    folder = FOLDER / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / RUN_STATE.name).write_bytes(content)
    with refusing(str(folder)):
        mtm.fit(TINY, mtm.MtMConfig(**SMALL), folder=folder, progress=False, **FAST)


# ------------------------------------------------------------------------------ other origins


def authors_weights(tokenizer: str) -> dict[str, torch.Tensor]:
    """A state dict as the authors' code has it, of one session."""
    sizes = {**SMALL, "tokenizer": tokenizer, "patch_size": 2, "n_patches": 2}
    config = mtm.MtMConfig(**sizes, leak=True, split_seed=None, **mtm.model.AS_PUBLISHED)
    model, found = mtm.MtM(config, {"any": 4}), {}
    for key, value in model.state_dict().items():
        name, row = official._their_key(key, model, ["any"])
        found[name] = value if row is None else value[None]
    return found


OFFICIAL = {name: authors_weights(name) for name in ("ndt1", "ndt2")}


@target()
def authors_checkpoint(draw: Draw) -> None:
    """from_official of weights that are missing, misshapen, of other types, or too many."""
    weights = dict(OFFICIAL[draw(st.sampled_from(["ndt1", "ndt2"]))])
    shape = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
    for name in draw(st.lists(st.sampled_from(sorted(weights)), max_size=2, unique=True)):
        kind = draw(st.sampled_from(["gone", "shape", "shape", "type"]))
        value = weights.pop(name)
        if kind == "shape":
            weights[name] = torch.zeros(draw(shape))
        elif kind == "type":
            weights[name] = value.to(
                draw(st.sampled_from([torch.int64, torch.float16, torch.bool]))
            )
    if draw(st.booleans()):
        stem = st.sampled_from(["encoder.layers.", "encoder.layers.1.", "stitch_decoder.", ""])
        weights[draw(stem) + draw(TEXT)] = torch.zeros(draw(shape))
    options = {"sessions": {"any": 4}, "eids": ["any"], "heads": 2}
    odd = {
        "sessions": st.dictionaries(st.just("any") | TEXT, st.integers(-1, 9) | JUNK, max_size=2),
        "eids": st.lists(st.just("any") | TEXT, max_size=2),
        "heads": st.none() | st.integers(-1, 9) | JUNK,
        "causal": st.none() | JUNK,
    }
    options |= changes(draw, odd, 1)
    names = ("checkpoint", "authors", "embed_session", "session ", "heads", "causal", "eids")
    with refusing(*names):
        try:
            model = official.from_official(weights, **options)
        except KeyError as error:  # of a session that is not among the eids
            raise Refused from error
    for name, n in options["sessions"].items():
        out = model(torch.ones(1, 3, n), name)
        check(out.shape == (1, 3, n) and out.isfinite().all(), "output")


@target(0.05)
def alf_folder(draw: Draw) -> None:
    """write_alf of sessions whose names, labels and behaviour may be anything."""
    k, t, n = sizes(draw, 3)
    number = st.sampled_from([-1.0, 0.0, 0.5, 1.0]) | st.sampled_from([math.nan, 1e9, -1e9])
    each, label = (
        hnp.arrays(np.float64, k, elements=number),
        st.sampled_from(["CA1", "root", "VISp"]),
    )
    names = ("choice", "block", "reward", "contrast", "reaction-time")
    behaviour = {name: draw(each) for name in names}
    behaviour["wheel-speed"] = draw(hnp.arrays(np.float64, (k, t), elements=number))
    behaviour = {name: behaviour[name] for name in behaviour if draw(st.integers(0, 19))}
    made = mtm.Session(
        small_counts(draw, (k, t, n)),
        draw(st.lists(label | label | LABEL, min_size=n, max_size=n)),
        "any",
        draw(st.just("mouse") | TEXT | ODD_TEXT),
        behaviour=behaviour,
        neurons={"probe": draw(st.lists(st.just("probe00") | TEXT, min_size=n, max_size=n))},
    )
    with refusing("session 'any', "):
        folder = mtm.data.synthetic.write_alf(
            made, FOLDER / "alf" / str(draw(st.integers(0, 10**9)))
        )
    spikes = np.load(next(folder.rglob("spikes.times.npy")))
    check((np.diff(spikes) >= 0).all() and np.isfinite(spikes).all(), "spike times")
    shutil.rmtree(folder)


@target(0.5)
def authors_rows(draw: Draw) -> None:
    """Rows of the authors' datasets, any column of which may hold anything."""
    k, t, n = sizes(draw, 3)
    rows = []
    for trial in small_counts(draw, (k, t, n)):
        at = [np.flatnonzero(row) for row in trial]
        rows.append(
            {
                "spikes_sparse_data": [int(c) for c in trial[trial > 0]],
                "spikes_sparse_indices": [int(i) for row in at for i in row],
                "spikes_sparse_indptr": np.cumsum([0, *map(len, at)]).tolist(),
                "spikes_sparse_shape": [t, n],
                "binsize": 0.02,
                "interval_len": 0.02 * t,
                "eid": "any",
                "choice": 1.0,
                "wheel-speed": [0.0] * t,
                "cluster_regions": ["CA1"] * n,
            }
        )
    whole = len(rows)
    for name in draw(st.lists(st.sampled_from(sorted(rows[0])), max_size=2)):
        for row in rows[: draw(st.integers(1, whole))]:
            row[name] = draw(JSON | st.lists(st.integers(-1, 9), max_size=4))
    with refusing("session "):
        made = huggingface.from_rows(rows)
    check(made.n_trials == whole and made.counts.dtype.kind == "u", "rows were lost")


# ------------------------------------------------------------------------------ the runs


def run_random(target: Target, examples: int, seed: int) -> int:
    """What hypothesis draws; returns the number of cases."""
    before = target.inputs
    as_test(target, examples, seed)()
    return target.inputs - before


def as_test(target: Target, examples: int, seed: int) -> Any:
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def case(data: st.DataObject) -> None:
        target(data)

    return hypothesis.seed(seed)(settings(hypothesis.given(st.data())(case)))


def run_guided(target: Target, examples: int, seed: int) -> tuple[int, int]:
    """What atheris finds, in a process of its own; returns numbers of cases and of branches."""
    corpus, result, log = (FOLDER / f"{target.name}.{end}" for end in ("corpus", "pickle", "log"))
    corpus.mkdir()
    generator = random.Random(seed)
    for i in range(40):  # random bytes, as long as hypothesis needs them
        (corpus / str(i)).write_bytes(generator.randbytes(generator.choice([99, 500, 2500])))
    before = target.inputs
    child = os.fork()
    if child == 0:
        explore(target, examples, seed, corpus, result, log)
    _, status = os.waitpid(child, 0)
    said = log.read_text(errors="replace")
    if status or not result.exists():
        target.findings["died"] = {"error": f"the process died ({status})", "where": said[-500:]}
        return 0, 0
    target.inputs, target.refused, target.findings = pickle.loads(result.read_bytes())
    return target.inputs - before, max(map(int, re.findall(r"cov: (\d+)", said)), default=0)


def explore(
    target: Target, examples: int, seed: int, corpus: Path, result: Path, log: Path
) -> None:
    """Fuzz in this process, and leave it: libFuzzer does not return."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    one = as_test(target, 1, seed).hypothesis.fuzz_one_input
    enough, runs = target.inputs + examples, 0

    def step(content: bytes) -> None:
        nonlocal runs
        runs += 1
        one(content)
        if target.inputs >= enough or runs >= 20 * examples:
            state = (target.inputs, target.refused, target.findings)
            result.write_bytes(pickle.dumps(state))
            os._exit(0)

    flags = ["-len_control=0", "-max_len=4096", "-rss_limit_mb=0", "-timeout=600", f"-seed={seed}"]
    atheris.Setup(["fuzz", *flags, str(corpus)], step)
    atheris.Fuzz()


def limit() -> None:
    """What takes too much time or memory is stopped by an error."""

    def stop(*_: Any) -> None:
        raise Hang(f"more than {LONGEST} s")

    signal.signal(signal.SIGVTALRM, stop)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the package; see the top of this file.")
    parser.add_argument("--json", type=Path, help="write what was run and found here")
    parser.add_argument("--only", nargs="+", choices=sorted(TARGETS), metavar="NAME",
                        help="of " + ", ".join(sorted(TARGETS)))  # fmt: skip
    parser.add_argument("--examples", type=int, default=1000, help="a target and kind of run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    limit()
    warnings.simplefilter("ignore", UserWarning)
    warnings.simplefilter("error", RuntimeWarning)  # of numpy: a cast or a sum that went wrong
    start, table = time.perf_counter(), {}
    for name in options.only or TARGETS:
        one, since = TARGETS[name], time.perf_counter()
        examples = max(1, round(one.share * options.examples))
        row = {"random": run_random(one, examples, options.seed), "guided": 0, "branches": 0}
        if atheris:
            row["guided"], row["branches"] = run_guided(one, examples, options.seed)
        row |= {"refused": one.refused, "findings": list(one.findings.values())}
        table[name] = row
        said = {**row, "findings": len(one.findings)}
        print(f"{name:<18} {time.perf_counter() - since:5.1f} s ", said, flush=True)
        for finding in one.findings.values():
            print("   ", finding, flush=True)
    found = sum(len(row["findings"]) for row in table.values())
    inputs = sum(row["random"] + row["guided"] for row in table.values())
    print(f"{inputs} inputs, {found} findings, {time.perf_counter() - start:.0f} s")
    if options.json:
        modules = {"hypothesis": hypothesis, "numpy": np, "torch": torch, "mtm": mtm}
        versions = {key: module.__version__ for key, module in modules.items()}
        versions |= {"python": platform.python_version()}
        if atheris:
            versions["atheris"] = version("atheris")
        facts = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "seed": options.seed,
            "versions": versions,
        }
        facts |= {"inputs": inputs, "findings": found, "targets": table}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
