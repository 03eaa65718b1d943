"""Neuromatch's bundles against brute-force adding, and ways to break them."""

import io
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steinmetz import NAME, K, write_folder

from mtm.session import SessionError
from mtm.data import steinmetz
from mtm.data.neuromatch import load_bundle

REAL = Path(__file__).parents[2] / "shared/data/steinmetz2019"


def make_entry(name="Cori", date="2016-12-14", k=5, n=4):
    """A session as steinmetz_NMA.ipynb makes one."""
    rng = np.random.default_rng(1)
    return {
        "spks": rng.poisson(0.1, (n, k, 250)).astype(np.int8),
        "wheel": rng.integers(-9, 10, (1, k, 250)).astype(np.int8),
        "pupil": rng.normal(size=(3, k, 250)),
        "face": rng.normal(size=(1, k, 250)).astype(np.float32),
        "response": np.resize([-1.0, 1, 0], k),
        "response_time": rng.uniform(0.5, 2, (k, 1)),
        "bin_size": 0.01,
        "stim_onset": 0.5,
        "contrast_right": np.resize([1.0, 0, 0], k),
        "contrast_left": np.resize([0.5, 0.25, 0], k),
        "brain_area": np.array(["VISp", "CA1", "root", "CA1"])[:n],
        "feedback_time": rng.uniform(0.5, 2, (k, 1)),
        "feedback_type": np.resize([1.0, -1], k),
        "gocue": rng.uniform(0.5, 1, (k, 1)),
        "mouse_name": name,
        "date_exp": date,
        "trough_to_peak": np.arange(n, dtype=np.int8),
        "reaction_time": np.column_stack([[170, np.inf, *[200] * (k - 2)], np.ones(k)]),
        "brain_area_lfp": ["VISp", "CA1"],
    }


def write_bundle(path, *entries):
    np.savez_compressed(path, dat=np.array(entries, dtype=object))
    return path


def write_pickle(path, content):
    """An npz whose dat.npy goes on, after its header, with these bytes."""
    header = io.BytesIO()
    kind = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    np.lib.format.write_array_header_1_0(header, kind)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dat.npy", header.getvalue() + content)
    return path


def test_bundle_gives_sessions(tmp_path):
    entries = [make_entry(), make_entry("Hench", "2017-06-15", k=7)]
    path = write_bundle(tmp_path / "steinmetz_part0.npz", *entries)
    sessions = load_bundle(path)
    assert [s.name for s in sessions] == [NAME, "Hench_2017-06-15"]
    assert [s.subject for s in sessions] == ["Cori", "Hench"]
    for session, entry in zip(sessions, entries, strict=True):
        k = len(entry["response"])
        expected = entry["spks"][..., :200].reshape(4, k, 100, 2).sum(-1).transpose(1, 2, 0)
        np.testing.assert_array_equal(session.counts, expected)
        assert session.window == (-0.5, 1.5) and session.regions.tolist() == list(
            entry["brain_area"]
        )
        found = session.behaviour
        turned = np.abs(entry["wheel"][0, :, :200].reshape(k, 100, 2).sum(-1, dtype=int))
        np.testing.assert_allclose(found["wheel-speed"], turned * 2 * np.pi / 1440 / 0.02)
        face = entry["face"][0, :, :200].reshape(k, 100, 2).mean(-1)
        np.testing.assert_allclose(found["face-motion-energy"], face, atol=1e-6)
        np.testing.assert_array_equal(found["choice"], entry["response"])
        contrast = entry["contrast_right"] - entry["contrast_left"]
        np.testing.assert_array_equal(found["contrast"], contrast)
        np.testing.assert_array_equal(found["reward"], entry["feedback_type"] > 0)
        np.testing.assert_array_equal(found["go-cue-time"], entry["gocue"][:, 0])
        np.testing.assert_array_equal(found["response-time"], entry["response_time"][:, 0])
        reaction = [0.17, np.nan, *[0.2] * (k - 2)]
        np.testing.assert_allclose(found["reaction-time"], reaction)
    grid = {"window": (0.0, 0.4), "bin_size": 0.04}
    (second,) = load_bundle(path, index=1, **grid)
    expected = entries[1]["spks"][..., 50:90].reshape(4, 7, 10, 4).sum(-1).transpose(1, 2, 0)
    np.testing.assert_array_equal(second.counts, expected)
    assert [s.name for s in load_bundle(path, index=[1, 0])] == [second.name, NAME]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_pickles_of_every_age(tmp_path, protocol):
    entry = make_entry()
    entry["mouse_name"] = str(entry["mouse_name"])
    entry["bin_size"] = np.float64(0.01)
    entry["brain_area"] = entry["brain_area"].astype(object)
    content = pickle.dumps(np.array([entry], dtype=object), protocol=protocol)
    (expected,) = load_bundle(write_bundle(tmp_path / "b.npz", make_entry()))
    olds = [content]
    if protocol < 4:  # NumPy 1 called its modules so; in protocol 4, names have a length before
        olds.append(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    for old in olds:
        (read,) = load_bundle(write_pickle(tmp_path / "a.npz", old))
        np.testing.assert_array_equal(read.counts, expected.counts)
        np.testing.assert_array_equal(read.regions, expected.regions)


def test_big_endian_and_fortran_order(tmp_path):
    entry = make_entry()
    (expected,) = load_bundle(write_bundle(tmp_path / "a.npz", entry))
    entry["spks"] = np.asfortranarray(entry["spks"].astype(">i4"))
    entry["response"] = entry["response"].astype(">f4")
    (read,) = load_bundle(write_bundle(tmp_path / "b.npz", entry))
    np.testing.assert_array_equal(read.counts, expected.counts)
    np.testing.assert_array_equal(read.behaviour["choice"], expected.behaviour["choice"])


def test_bundle_with_its_folder(tmp_path):
    """The same recording from both origins: same name, same counts, same signs."""
    folder = write_folder(tmp_path / NAME)
    archive = steinmetz.load_session(folder, units="good", bin_size=0.01, window=(-0.5, 2.0))
    entry = make_entry(k=K, n=archive.n_neurons)
    entry["spks"] = archive.counts.transpose(2, 0, 1).astype(np.int8)
    entry["brain_area"] = archive.regions
    for key in ("response", "contrast_left", "contrast_right"):
        name = key if "contrast" not in key else "visualStim_contrast" + key[9:].title()
        name = "response_choice" if key == "response" else name
        entry[key] = np.load(folder / f"trials.{name}.npy")[:, 0]
    (bundled,) = load_bundle(write_bundle(tmp_path / "b.npz", entry))
    again = steinmetz.load_session(folder, units="good")
    assert (bundled.name, bundled.subject) == (again.name, again.subject)
    np.testing.assert_array_equal(bundled.counts, again.counts)
    for key in ("choice", "contrast"):
        np.testing.assert_array_equal(bundled.behaviour[key], again.behaviour[key])
    assert set(bundled.behaviour) == set(again.behaviour)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")
def test_real_recording(tmp_path):
    """As Neuromatch has it; counts are known from 0 to 0.4 s, the wheel from -0.5 to 2 s."""
    file = sorted(REAL.glob("*.npz"))[0]
    with np.load(file) as real:
        real = dict(real)
    spikes = real["spikes_10ms"]
    k, n = spikes.shape[:2]
    entry = make_entry(*file.stem.split("_")[1:], k=k, n=1) | {
        "spks": np.zeros((n, k, 250), np.int8),
        "wheel": real["wheel_10ms"][None],
        "brain_area": real["region"],
        "response": real["choice"].astype(float),
        "contrast_left": real["contrast_left"],
        "contrast_right": real["contrast_right"],
        "feedback_type": real["feedback"].astype(float),
        "reaction_time": np.column_stack([real["reaction_time_ms"], real["choice"]]),
        "gocue": real["gocue"][:, None],
    }
    entry["spks"][..., 50:90] = spikes.transpose(1, 0, 2)
    path = tmp_path / "part0.npz"
    np.savez(path, dat=[entry])
    (session,) = load_bundle(path, window=(0, 0.4))
    assert session.name == "Cori_2016-12-14" and session.counts.dtype == np.uint8
    recipe = spikes.reshape(k, n, 20, 2).sum(-1).transpose(0, 2, 1)
    np.testing.assert_array_equal(session.counts, recipe)
    wheel = np.abs(real["wheel_10ms"][:, 50:90].reshape(k, 20, 2).sum(-1, dtype=int))
    speed = session.behaviour["wheel-speed"]
    np.testing.assert_allclose(speed, wheel * 2 * np.pi / 1440 / 0.02)
    assert 1 < np.percentile(speed, 99) < 50  # rad/s, as of a mouse
    np.testing.assert_array_equal(session.regions, real["region"])
    found = session.behaviour
    went = (found["choice"] != 0) & (found["contrast"] != 0)
    correct = (found["choice"] == -np.sign(found["contrast"]))[went]
    np.testing.assert_array_equal(correct, found["reward"][went] == 1)
    moved = np.isfinite(real["reaction_time_ms"])
    assert np.array_equal(np.isfinite(found["reaction-time"]), moved)
    assert 0.1 < np.nanmedian(found["reaction-time"]) < 1


SPIKES = make_entry()["spks"]
BAD_ENTRIES = {
    "no spikes": ({"spks": None}, "b.npz: cannot be read"),
    "two axes": ({"spks": SPIKES[0]}, "b.npz: cannot be read"),
    "too short": ({"spks": SPIKES[..., :200]}, "b.npz: cannot be read .*reshape"),
    "no trials": ({"spks": SPIKES[:, :0]}, "b.npz: cannot be read"),
    "no neurons": ({"spks": SPIKES[:0]}, "counts: no neurons"),
    "rates": ({"spks": SPIKES / 2}, "counts: not whole"),
    "texts": ({"spks": SPIKES.astype(str)}, "b.npz: cannot be read"),
    "objects": ({"spks": SPIKES.astype(object)}, "counts: need numbers"),
    "negative": ({"spks": SPIKES - 1}, "counts: negative"),
    "too many": ({"spks": SPIKES + np.int64(40000)}, "counts: largest .* above 65535"),
    "other areas": ({"brain_area": np.array(["CA1"])}, "regions: need one label"),
    "short": ({"response": np.zeros(4)}, "b.npz: cannot be read .*reshape"),
    "text": ({"response": ["left"] * 5}, "b.npz: cannot be read .*left"),
    "choice 2": ({"response": np.full(5, 2)}, "response: values other"),
    "infinite choice": ({"response": np.full(5, np.inf)}, "response: values other"),
    "contrast": ({"contrast_left": np.full(5, 2)}, "contrast_left: values other"),
    "feedback": ({"feedback_type": np.full(5, 3)}, "feedback_type: values other"),
    "wheel": ({"wheel": np.zeros((5, 200))}, "b.npz: cannot be read .*reshape"),
    "reaction": ({"reaction_time": np.zeros(5)}, "b.npz: cannot be read .*reshape"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entries_are_named(tmp_path, case):
    changes, message = BAD_ENTRIES[case]
    path = write_bundle(tmp_path / "b.npz", make_entry("Hench"), make_entry() | changes)
    with pytest.raises(SessionError, match=f"session '.*', {message}"):
        load_bundle(path)
    assert len(load_bundle(path, index=0)) == 1


def test_bad_bundles_and_options_are_named(tmp_path):
    path = write_bundle(tmp_path / "b.npz", make_entry())
    for options, message in (
        ({"index": 1}, "index 1 is not among 0..0"),
        ({"index": "Cori"}, "index 'Cori'"),
        ({"index": -1}, "index -1 is not among"),
        ({"bin_size": 0.015}, "bins of bin_size"),
        ({"bin_size": 0.005}, "multiples of 0.01"),
        ({"window": (-0.505, 1.495)}, "multiples of 0.01"),
        ({"window": (-0.6, 1.4)}, "not within"),
        ({"window": (0.2, 2.2)}, "not within"),
        ({"window": (1, 1)}, "window must be"),
    ):
        with pytest.raises(ValueError, match=message):
            load_bundle(path, **options)
    np.savez(tmp_path / "numbers.npz", dat=np.arange(3))
    np.savez(tmp_path / "other.npz", data=np.arange(3))
    np.savez(tmp_path / "empty.npz", dat=np.array([], dtype=object))
    np.savez(tmp_path / "none.npz", dat=np.array([None]))
    (tmp_path / "text.npz").write_text("hello")
    nameless = make_entry()
    del nameless["mouse_name"]
    write_bundle(tmp_path / "nameless.npz", nameless)
    for name in ("nameless", "numbers", "other", "empty", "none", "text", "absent", "a\0b"):
        with pytest.raises(SessionError, match="download|no such file"):
            load_bundle(tmp_path / f"{name}.npz")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_no_pickle_runs_anything(tmp_path):
    mark = tmp_path / "ran"
    evil = [
        Evil(os.system, f"touch {mark}"),
        Evil(exec, f"open({str(mark)!r}, 'w')"),
        Evil(eval, f"open({str(mark)!r}, 'w')"),
        Evil(open, str(mark), "w"),
        Evil(Path.touch, mark),
        Evil(getattr, "text", "format"),
        Evil(np.save, str(mark), np.zeros(1)),
        Evil(np.memmap, str(mark), "u1", "w+", 0, (9,)),
        Evil(np.load, str(mark)),
        Evil(pickle.loads, b"N."),
        Evil(__import__, "os"),
    ]
    for number, bad in enumerate(evil):
        for place in (bad, make_entry() | {"spks": bad}, {"x": [np.array([bad], dtype=object)]}):
            path = tmp_path / f"{number}.npz"
            np.savez(path, dat=np.array([place, None], dtype=object))
            with pytest.raises(SessionError, match="asks for .*, which no array needs"):
                load_bundle(path)
            assert not mark.exists()


def test_handmade_pickles_are_refused(tmp_path):
    """Names asked for by other ways, attributes of functions, lengths that lie."""
    rebuild = b"cnumpy._core.multiarray\n_reconstruct\n"
    for content in (
        rebuild + b".",
        rebuild + b"}X\x08\x00\x00\x00__code__Nsb.",  # attributes of a function
        rebuild + b"N}X\x08\x00\x00\x00__code__Ns\x86b.",
        b"cnumpy.lib.format\nopen_memmap\n.",
        b"cnumpy\ndtype.__class__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
        b"c__main__\nx\n.",
        b"\x80\x02\x82\x01.",  # the extension registry
        b"P1\n.",
        b"(" * 10 + b".",
        b"N.",
        b"",
        b"]" * 200_000 + b"a" * 199_999 + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",  # 4 EB of bytes
    ):
        with pytest.raises(SessionError, match="dat: cannot be read"):
            load_bundle(write_pickle(tmp_path / "a.npz", content))


ODD_VALUES = {
    "short": lambda v: v[:-1],
    "none": lambda v: v[:0],
    "backwards": lambda v: v[::-1],
    "twice": lambda v: np.stack([v, v]),
    "turned": lambda v: v.T,
    "text": lambda v: np.full(v.shape, "é/\n\0漢"),
    "objects": lambda v: v.astype(object),
    "complex": lambda v: np.full(v.shape, 1j),
    "a word": lambda v: "é/\n\0漢",
    "empty": lambda v: "",
    "nothing": lambda v: None,
    "a dictionary": lambda v: {},
    **{
        str(x): lambda v, x=x: np.full(v.shape, x)
        for x in (np.nan, np.inf, -np.inf, -1.0, 0.5, 300, 70_000, 1e300)
    },
}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(make_entry())), st.sampled_from(sorted(ODD_VALUES))),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_is_in_a_field_a_session_or_an_error(tmp_path_factory, changes):
    entry = make_entry()
    for field, kind in changes:
        entry[field] = ODD_VALUES[kind](np.atleast_1d(make_entry()[field]))
    path = write_bundle(tmp_path_factory.getbasetemp() / "odd.npz", entry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            (session,) = load_bundle(path)
        except SessionError as error:
            assert str(error).startswith("session ")
            return
    assert session.counts.dtype in (np.uint8, np.uint16)
    if "spks" not in dict(changes):
        (expected,) = load_bundle(write_bundle(path, make_entry()))
        np.testing.assert_array_equal(session.counts, expected.counts)


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), flip=st.none() | st.integers(1, 255))
def test_damaged_bundles_are_named(tmp_path_factory, share, flip):
    root = tmp_path_factory.getbasetemp()
    whole = root / "whole.npz"
    if not whole.exists():
        write_bundle(whole, make_entry())
    content = bytearray(whole.read_bytes())
    place = int(share * len(content))
    damaged = root / "damaged.npz"
    if flip is None:
        damaged.write_bytes(content[:place])
        with pytest.raises(SessionError, match="dat: cannot be read"):
            load_bundle(damaged)
        return
    content[place] ^= flip  # changes no number unnoticed: the zip has a checksum
    damaged.write_bytes(content)
    try:
        (session,) = load_bundle(damaged)
    except SessionError:
        return
    (expected,) = load_bundle(whole)
    np.testing.assert_array_equal(session.counts, expected.counts)
