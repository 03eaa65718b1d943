"""Rows of the authors' sets against the counts they were made of, and every way to break them."""

import json
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from mtm.session import Session, SessionError
from mtm.data import huggingface

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

K, T, N = 12, 10, 7
SIZES = {"train": 8, "val": 1, "test": 3}


def make_counts(seed=0):
    return np.random.default_rng(seed).poisson(0.4, (K, T, N)).astype(np.uint8)


def make_row(counts, number):
    """One trial as the authors' create_dataset has it."""
    sparse = csr_array(counts)
    return {
        "spikes_sparse_data": sparse.data.tolist(),
        "spikes_sparse_indices": sparse.indices.tolist(),
        "spikes_sparse_indptr": sparse.indptr.tolist(),
        "spikes_sparse_shape": list(sparse.shape),
        "choice": [float([-1, 1, 0][number % 3])],
        "reward": [float(number % 2)],
        "block": [0.5],
        "wheel-speed": (number + np.arange(T) / T).tolist(),
        "whisker-motion-energy": [np.nan, *range(T - 1)],
        "binsize": 0.02,
        "interval_len": 0.2,
        "eid": "an-eid",
        "probe_name": "probe01",
        "subject": "MOUSE-1",
        "lab": "a lab",
        "sampling_freq": 30000.0,
        "cluster_regions": ["CA1", "CA1", "LP", "PO", "void", "root", "VISa2/3"],
        "cluster_channels": list(range(N)),
        "cluster_depths": [20.0, None, 40.0, 60.0, 80.0, 100.0, 120.0],
        "good_clusters": [1, 0, 1, 0, 1, 0, 1],
        "cluster_uuids": [f"uuid-{i}" for i in range(N)],
        "cluster_qc": {"label": [1.0, np.nan, *[0.5] * 5], "firing_rate": [2.5] * N},
    }


def make_rows(counts=None):
    counts = make_counts() if counts is None else counts
    rows = [make_row(trial, number) for number, trial in enumerate(counts)]
    stops = np.cumsum(list(SIZES.values()))
    return {s: rows[stop - n : stop] for (s, n), stop in zip(SIZES.items(), stops, strict=True)}


def write_arrow(folder, rows, parts=1):
    """As ``Dataset.save_to_disk`` of datasets 5.2 writes it."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    names = [f"data-{i:05d}-of-{parts:05d}.arrow" for i in range(parts)]
    size = -(-len(rows) // parts)
    for i, name in enumerate(names):
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table.slice(i * size, size), max_chunksize=2)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None})
    )
    (folder / "dataset_info.json").write_text("{}")


def write_dict(folder, rows):
    folder.mkdir(parents=True)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(rows)}))
    for split, part in rows.items():
        write_arrow(folder / split, part)


def write_snapshot(folder, rows, parts=1):
    (folder / "data").mkdir(parents=True)
    for split, part in rows.items():
        size = -(-len(part) // parts)
        for i in range(parts):
            path = folder / "data" / f"{split}-{i:05d}-of-{parts:05d}.parquet"
            parquet.write_table(pa.Table.from_pylist(part[i * size : (i + 1) * size]), path)


def check(session, counts=None):
    counts = make_counts() if counts is None else counts
    np.testing.assert_array_equal(session.counts, counts)
    assert session.counts.dtype == np.uint8
    assert (session.name, session.subject, session.bin_size) == ("an-eid", "MOUSE-1", 0.02)
    assert session.window == pytest.approx((-0.5, -0.3))
    assert session.region_names == ["CA1", "LP", "PO", "VISa2/3"]
    np.testing.assert_array_equal(session.behaviour["choice"], np.resize([-1, 1, 0], K))
    np.testing.assert_array_equal(session.behaviour["reward"], np.arange(K) % 2)
    speed = np.arange(K)[:, None] + np.arange(T) / T
    np.testing.assert_allclose(session.behaviour["wheel-speed"], speed)
    assert np.isnan(session.behaviour["whisker-motion-energy"][:, 0]).all()
    assert session.behaviour["whisker-motion-energy"].shape == (K, T)
    np.testing.assert_array_equal(session.neurons["channel"], range(N))
    np.testing.assert_array_equal(session.neurons["good"], [1, 0, 1, 0, 1, 0, 1])
    assert np.isnan(session.neurons["depth"]).tolist() == [False, True] + [False] * 5
    np.testing.assert_array_equal(session.neurons["label"], [1, np.nan, *[0.5] * 5])
    assert set(session.neurons) == {
        *("allen", "channel", "depth", "uuid", "good", "label", "qc-firing_rate")
    }
    assert session.provenance["probe_name"] == "probe01" and session.provenance["lab"] == "a lab"


# ------------------------------------------------------------------------------ what is right


def test_rows_folders_and_snapshots_give_the_session(tmp_path):
    rows = make_rows()
    write_dict(tmp_path / "disk", rows)
    write_snapshot(tmp_path / "hub", rows)
    write_snapshot(tmp_path / "flat", rows)
    for file in (tmp_path / "flat/data").iterdir():
        file.rename(tmp_path / "flat" / file.name)
    (tmp_path / "flat/data").rmdir()
    sessions = [huggingface.from_rows(rows)]
    sessions += [huggingface.load_session(tmp_path / name) for name in ("disk", "hub", "flat")]
    for session in sessions:
        check(session)
        for part, expected in zip(
            session.split(), (range(8), range(8, 9), range(9, 12)), strict=True
        ):
            np.testing.assert_array_equal(part, expected)
    read = Session.load(sessions[1].save(tmp_path / "session.npz"))
    assert read.provenance == sessions[1].provenance


def test_one_split_in_several_parts(tmp_path):
    rows = [row for part in make_rows().values() for row in part]
    write_arrow(tmp_path / "disk", rows, parts=3)
    write_snapshot(tmp_path / "hub", {"train": rows}, parts=4)
    for session in (
        huggingface.load_session(tmp_path / "disk"),
        huggingface.load_session(tmp_path / "hub"),
        huggingface.from_rows(rows),
        huggingface.from_rows(iter(rows)),
    ):
        check(session)
        assert session.given_split is None


def test_validation_is_val_whatever_the_order():
    rows = make_rows()
    shuffled = {"test": rows["test"], "validation": rows["val"], "train": rows["train"]}
    session = huggingface.from_rows(shuffled)
    check(session)
    assert session.given_split.val.tolist() == [8] and session.given_split.test[0] == 9


def test_rows_without_behaviour_are_chunks_that_start_at_0():
    rows = make_rows()["train"]
    for row in rows:
        for key in huggingface.BEHAVIOUR:
            del row[key]
    assert huggingface.from_rows(rows).window[0] == 0
    assert huggingface.from_rows(rows, start=-0.5).window[0] == -0.5
    for row in rows:
        del row["eid"], row["cluster_regions"], row["cluster_qc"]
    session = huggingface.from_rows(rows, name="mine")
    assert session.name == "mine" and session.region_names == []
    with pytest.raises(SessionError, match="'rows', eid: .*pass name"):
        huggingface.from_rows(rows)


def test_arrays_in_rows_and_entries_given_twice():
    row = make_row(make_counts()[0], 0)
    row = {key: np.array(v) if isinstance(v, list) else v for key, v in row.items()}
    np.testing.assert_array_equal(huggingface.from_rows([row]).counts[0], make_counts()[0])
    row["spikes_sparse_data"] = np.array([200, 100, 3.0])
    row["spikes_sparse_indices"] = np.array([2, 2, 0])  # unsorted, and 2 twice
    row["spikes_sparse_indptr"] = np.array([0, 3, *[3] * (T - 1)])
    session = huggingface.from_rows([row])
    assert session.counts.dtype == np.uint16 and session.counts.sum() == 303
    assert session.counts[0, 0, 2] == 300 and session.counts[0, 0, 0] == 3


@settings(max_examples=75, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.tuples(*[st.integers(0, 5)] * 3, st.integers(0, 400)), max_size=30),
    st.booleans(),
)
def test_counts_equal_brute_force(k, bins, n, entries, swap):
    dense = np.zeros((k, bins, n), int)
    cells = [[[] for _ in range(bins)] for _ in range(k)]
    for trial, time, neuron, count in entries:
        trial, time, neuron = trial % k, time % bins, neuron % n
        dense[trial, time, neuron] += count
        cells[trial][time].insert(0 if swap else len(cells[trial][time]), (neuron, count))
    rows = [
        {
            "spikes_sparse_data": [count for row in trial for _, count in row],
            "spikes_sparse_indices": [neuron for row in trial for neuron, _ in row],
            "spikes_sparse_indptr": np.cumsum([0, *map(len, trial)]).tolist(),
            "spikes_sparse_shape": (bins, n),
            "binsize": 0.02,
        }
        for trial in cells
    ]
    np.testing.assert_array_equal(huggingface.from_rows(rows, name="x").counts, dense)


# ------------------------------------------------------------------------------ what is wrong

SPARSE_DATA, INDICES, INDPTR, SHAPE = huggingface.SPARSE
BAD_IN_ONE_ROW = [
    (SPARSE_DATA, lambda v: [1.5, *v[1:]], "need whole numbers"),
    (SPARSE_DATA, lambda v: [np.nan, *v[1:]], "need whole numbers"),
    (SPARSE_DATA, lambda v: [2**70, *v[1:]], "need whole numbers"),
    (SPARSE_DATA, lambda v: [-9, *v[1:]], "negative counts"),
    (SPARSE_DATA, lambda v: [70_000, *v[1:]], "above 65535"),
    (SPARSE_DATA, [1], "spikes_sparse: .* 1 entries"),
    (SPARSE_DATA, [[1], [2, 3]], "spikes_sparse"),
    (SPARSE_DATA, None, "spikes_sparse"),
    (INDICES, [0], "same size"),
    (INDICES, lambda v: [N, *v[1:]], "indices must be < 7"),
    (INDICES, lambda v: [-1, *v[1:]], "indices must be >= 0"),
    (INDICES, lambda v: [0.5, *v[1:]], "need whole numbers"),
    (INDPTR, lambda v: v[:-1], "indptr to"),
    (INDPTR, lambda v: [1, *v[1:]], "should start with 0"),
    (INDPTR, lambda v: [v[0], v[2] + 1, v[1], *v[3:]], "non-decreasing"),
    (INDPTR, lambda v: [*v[:-1], v[-1] + 1], "indptr to"),
    (INDPTR, lambda v: [*v[:-1], v[-1] - 1], "indptr to"),
    (SHAPE, [T], "spikes_sparse"),
    (SHAPE, [T, N + 1], "must have the same shape"),
    ("binsize", 0.01, "binsize: differs"),
    ("eid", "another", "eid: differs"),
    ("subject", "another", "subject: differs"),
    ("choice", [2.0], "other than -1, 0 and 1"),
    ("choice", [1.0, 1.0], "choice: cannot be read"),
    ("choice", ["left"], "choice: cannot be read .*'left'"),
    ("reward", [np.inf], "reward: infinite"),
    ("wheel-speed", [1.0] * (T - 1), "wheel-speed: cannot be read"),
    ("cluster_regions", ["CA1"] * N, "cluster_regions: differs"),
    ("cluster_qc", {"label": [1.0] * N}, "cluster_qc: differs"),
]
BAD_IN_ALL_ROWS = [
    (SHAPE, [T, 0], "indices must be < 0"),
    (SHAPE, [0, N], "index pointer size"),
    (SHAPE, [T, 2**30], "shape .* entries"),
    ("binsize", 0.0, "10 bins of 0.0 s"),
    ("binsize", np.nan, "10 bins of nan s"),
    ("binsize", "20 ms", "binsize, interval_len: .*'20 ms'"),
    ("binsize", None, "binsize, interval_len: cannot be read"),
    ("interval_len", 2.0, "interval_len: .*2.0 s, but 10 bins"),
    ("interval_len", np.inf, "interval_len: .*inf s, but"),
    ("eid", "", "pass name"),
    ("wheel-speed", [1.0] * (T - 1), "'wheel-speed': need .*one a bin"),
    ("wheel-speed", [], "'wheel-speed': need .*one a bin"),
    ("cluster_regions", ["CA1"] * (N - 1), "one label for each of the 7"),
    ("cluster_regions", "CA1", "one label for each of the 7"),
    ("cluster_depths", [1.0] * (N + 1), "'depth': need 7 rows"),
    ("cluster_qc", {"label": [1.0]}, "'label': need 7 rows"),
    ("cluster_qc", [1.0] * N, "neurons: cannot be read"),
]


def is_refused(rows, message):
    with pytest.raises(SessionError, match=f"session '[^']+', .*{message}.*"):
        huggingface.from_rows(rows)


@pytest.mark.parametrize("key, value, message", BAD_IN_ONE_ROW)
def test_bad_values_in_a_row_are_named(key, value, message):
    rows = make_rows()
    row = rows["train"][3]
    row[key] = value(row[key]) if callable(value) else value
    is_refused(rows, message)


@pytest.mark.parametrize("key, value, message", BAD_IN_ALL_ROWS)
def test_bad_values_in_all_rows_are_named(key, value, message):
    is_refused([row | {key: value} for row in make_rows()["train"]], message)


def test_bad_tables_are_named():
    rows = make_rows()
    for bad, message in (
        ([], "rows: none"),
        ({}, "rows: none"),
        ({"train": [], "test": []}, "rows: none"),
        (rows | {"validation": rows["val"]}, "once each"),
        ({"train": rows["train"], "odd": rows["test"]}, "once each"),
        ([1, 2], "split 'train': cannot be read"),
        ({"train": 5}, "split 'train': cannot be read"),
        ([rows["val"][0], {"eid": "an-eid"}], "split 'train': cannot be read .KeyError"),
        ({"train": rows["train"], "test": [{"eid": "an-eid"}]}, "not the same in all splits"),
        ([{"eid": "an-eid"}], "spikes_sparse: cannot be read .KeyError: 'spikes_sparse_data'"),
    ):
        with pytest.raises(SessionError, match=message):
            huggingface.from_rows(bad)


def test_odd_texts_stay():
    odd = ["", "é/¿\n", "a" * 300, "nan", "漢", "'; DROP", "\\0"]
    rows = make_rows()["train"]
    for row in rows:
        row |= {"eid": "../e\n\t'\"漢", "cluster_regions": odd}
    session = huggingface.from_rows(rows)
    assert session.regions.tolist() == odd and session.name == "../e\n\t'\"漢"


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=75, deadline=None)
@given(st.data())
def test_whatever_is_in_a_column_a_session_or_an_error(data):
    rows = make_rows()["train"][: data.draw(st.integers(1, 3))]
    key = data.draw(st.sampled_from(sorted(rows[0])))
    value = data.draw(VALUE | st.lists(st.floats() | st.integers(), min_size=N, max_size=T + 1))
    for row in rows[: data.draw(st.integers(1, len(rows)))]:
        row[key] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            session = huggingface.from_rows(rows)
        except SessionError as error:
            assert str(error)
        else:
            assert session.counts.shape == (len(rows), T, N)


# ---------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    rows = make_rows()
    write_dict(root / "disk", rows)
    write_snapshot(root / "hub", rows)
    return root


@pytest.mark.parametrize(
    "file",
    [
        "disk/train/data-00000-of-00001.arrow",
        "hub/data/test-00000-of-00001.parquet",
        "disk/dataset_dict.json",
        "disk/val/state.json",
    ],
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_named(written, file, share):
    path = written / file
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(SessionError, match=f"{path.name}: cannot be read .*download"):
            huggingface.load_session(written / file.split("/")[0])
    finally:
        path.write_bytes(whole)


def test_broken_folders_are_named(written, tmp_path):
    def broken(kind, edit, message):
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(written / kind, folder)
        edit(folder)
        with pytest.raises(SessionError, match=message):
            huggingface.load_session(folder)

    arrow = "train/data-00000-of-00001.arrow"
    table = "data/train-00000-of-00001.parquet"
    broken("disk", lambda f: (f / arrow).unlink(), "cannot be read .*No such file")
    broken("disk", lambda f: shutil.rmtree(f / "val"), "val/state.json: cannot be read")
    broken("disk", lambda f: (f / arrow).write_bytes(b""), "its end is missing")
    broken("disk", lambda f: (f / arrow).write_bytes(b"x" * 99), "its end is missing")
    for content in ("[]", '{"splits": [1]}', '{"splits": []}', "[" * 99999):
        broken(
            "disk",
            lambda f, content=content: (f / "dataset_dict.json").write_text(content),
            "cannot be read|rows: none",
        )
    broken("hub", lambda f: (f / table).rename(f / "data/train-00001-of-00002.parquet"), "parts")
    broken("hub", lambda f: (f / table).rename(f / "data/a b.parquet"), "splits .*'a'")
    broken("hub", lambda f: shutil.rmtree(f / "data"), "no dataset_dict.json")
    for absent in (tmp_path / "absent", tmp_path / ("x" * 300), f"{tmp_path}/a\0b"):
        with pytest.raises(SessionError, match="no dataset_dict.json|cannot be read"):
            huggingface.load_session(absent)
