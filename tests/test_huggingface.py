"""Rows of the authors' sets against the counts they were made of."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from mtm.data import huggingface
from mtm.inputs import SessionError

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

K, T, N = 12, 10, 7
SIZES = {"train": 8, "val": 1, "test": 3}
COUNTS = np.random.default_rng(0).poisson(0.4, (K, T, N)).astype(np.uint8)


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
        "eid": "an-eid",
        "probe_name": "probe01",
        "subject": "MOUSE-1",
        "lab": "a lab",
        "cluster_regions": ["CA1", "CA1", "LP", "PO", "void", "root", "VISa2/3"],
        "cluster_channels": list(range(N)),
        "cluster_depths": [20.0, None, 40.0, 60.0, 80.0, 100.0, 120.0],
        "good_clusters": [1, 0, 1, 0, 1, 0, 1],
        "cluster_uuids": [f"uuid-{i}" for i in range(N)],
        "cluster_qc": {"label": [1.0, np.nan, *[0.5] * 5], "firing_rate": [2.5] * N},
    }


def make_rows():
    """Split -> rows."""
    rows = [make_row(trial, number) for number, trial in enumerate(COUNTS)]
    stops = np.cumsum(list(SIZES.values()))
    return {s: rows[stop - n : stop] for (s, n), stop in zip(SIZES.items(), stops, strict=True)}


def from_rows(rows):
    return huggingface.from_tables({split: pd.DataFrame(part) for split, part in rows.items()})


def write_arrow(folder, rows, parts=1):
    """As ``Dataset.save_to_disk`` of datasets 5.2 writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{parts:05d}.arrow" for i in range(parts)]
    for name, part in zip(names, np.array_split(np.array(rows), parts), strict=True):
        table = pa.Table.from_pylist(part.tolist())
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


def write_dict(folder, rows):
    folder.mkdir(parents=True)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(rows)}))
    for split, part in rows.items():
        write_arrow(folder / split, part)


def write_snapshot(folder, rows, parts=1):
    folder.mkdir(parents=True)
    for split, part in rows.items():
        for i, some in enumerate(np.array_split(np.array(part), parts)):
            path = folder / f"{split}-{i:05d}-of-{parts:05d}.parquet"
            parquet.write_table(pa.Table.from_pylist(some.tolist()), path)


def check(session):
    np.testing.assert_array_equal(session.counts, COUNTS)
    assert session.counts.dtype == np.uint8
    assert (session.name, session.subject, session.bin_size) == ("an-eid", "MOUSE-1", 0.02)
    assert session.window == pytest.approx((-0.5, -0.3))
    assert session.region_names == ["CA1", "LP", "PO", "VISa2/3"]
    found, neurons = session.behaviour, session.neurons
    np.testing.assert_array_equal(found["choice"], np.resize([-1, 1, 0], K))
    np.testing.assert_array_equal(found["reward"], np.arange(K) % 2)
    np.testing.assert_allclose(found["wheel-speed"], np.arange(K)[:, None] + np.arange(T) / T)
    assert np.isnan(found["whisker-motion-energy"][:, 0]).all()
    assert np.isnan(neurons["depth"]).tolist() == [False, True] + [False] * 5
    np.testing.assert_array_equal(neurons["label"], [1, np.nan, *[0.5] * 5])
    assert {"allen", "uuid", "qc-firing_rate"} <= set(neurons)
    assert session.provenance["probe_name"] == "probe01" and session.provenance["lab"] == "a lab"


def test_rows_folders_and_snapshots_give_the_session(tmp_path):
    rows = make_rows()
    write_dict(tmp_path / "disk", rows)
    write_snapshot(tmp_path / "hub/data", rows)
    write_snapshot(tmp_path / "flat", rows)
    renamed = {"test": rows["test"], "validation": rows["val"], "train": rows["train"]}
    sessions = [from_rows(renamed)]
    sessions += [huggingface.load_session(tmp_path / name) for name in ("disk", "hub", "flat")]
    for session in sessions:
        check(session)
        assert [part.tolist() for part in session.split()] == [[*range(8)], [8], [9, 10, 11]]


def test_one_split_in_several_parts_and_rows_without_behaviour(tmp_path):
    rows = [row for part in make_rows().values() for row in part]
    write_arrow(tmp_path / "disk", rows, parts=3)
    write_snapshot(tmp_path / "hub/data", {"train": rows}, parts=4)
    sessions = [huggingface.load_session(tmp_path / name) for name in ("disk", "hub")]
    for session in (*sessions, from_rows({"train": rows})):
        check(session)
        assert session.given_split is None
    for row in rows:
        for key in (*huggingface.BEHAVIOUR, "cluster_regions", "cluster_qc"):
            del row[key]
    bare = from_rows({"train": rows})
    assert bare.window[0] == 0 and bare.region_names == []


@settings(max_examples=30, deadline=None)
@given(
    *(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    st.lists(st.tuples(*[st.integers(0, 5)] * 3, st.integers(0, 400)), max_size=30),
)
def test_counts_equal_brute_force(k, bins, n, entries):
    """Entries may be unsorted and given twice."""
    dense = np.zeros((k, bins, n), int)
    cells = [[[] for _ in range(bins)] for _ in range(k)]
    for trial, time, neuron, count in entries:
        trial, time, neuron = trial % k, time % bins, neuron % n
        dense[trial, time, neuron] += count
        cells[trial][time].append((neuron, count))
    rows = []
    for trial in cells:
        flat = np.array([pair for row in trial for pair in row], int).reshape(-1, 2)
        parts = flat[:, 1], flat[:, 0], np.cumsum([0, *map(len, trial)]), (bins, n)
        row = dict(zip(huggingface.SPARSE, parts, strict=True))
        rows.append(row | {"binsize": 0.02, "eid": "x"})
    np.testing.assert_array_equal(from_rows({"train": rows}).counts, dense)


def test_folders_that_are_incomplete(tmp_path):
    write_snapshot(tmp_path / "hub", make_rows(), parts=2)
    (tmp_path / "hub/train-00001-of-00002.parquet").unlink()
    with pytest.raises(SessionError, match="split 'train': 1 of its 2 files"):
        huggingface.load_session(tmp_path / "hub")
