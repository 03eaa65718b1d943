"""Files as those of the Neural Latents Benchmark, and what NWB says of when units were observed."""

from datetime import UTC, datetime

import numpy as np
import pytest

pynwb = pytest.importorskip("pynwb")
pytest.importorskip("h5py")
import mtm  # noqa: E402
from mtm.data import nwb  # noqa: E402

K, N = 40, 6
START = 2.0 * np.arange(K)
SPLIT = np.array(["train", "val", "none", "test", "train"] * (K // 5))
WINDOW = (0.2, 1.2)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Units 4 and 5 are held out: observed in training trials only. Trial 7 is invalid."""
    rng = np.random.default_rng(0)
    file = pynwb.NWBFile("test", "nlb", datetime(2024, 5, 1, tzinfo=UTC))
    file.add_trial_column("split", "part")
    for start, part in zip(START, SPLIT, strict=True):
        file.add_trial(start_time=start, stop_time=start + 2, split=part)
    file.add_unit_column("heldout", "not observed in test trials")
    whole = [[start, start + 2] for start in START]  # as there, a trial each; they touch
    for n in range(N):
        seen = [one for one, part in zip(whole, SPLIT, strict=True) if n < 4 or part == "train"]
        times = np.sort(rng.uniform(0, 2 * K, 1000))
        file.add_unit(spike_times=times, heldout=n >= 4, obs_intervals=np.array(seen))
    file.add_invalid_time_interval(start_time=14.9, stop_time=15.0)
    t = np.arange(0, 2 * K, 0.01)
    data = np.stack([np.sin(t), t], axis=1)
    series = pynwb.TimeSeries(name="hand_vel", data=data, unit="m/s", rate=100.0, starting_time=0.0)
    file.create_processing_module("behavior", "b").add(series)
    out = tmp_path_factory.mktemp("nlb") / "file.nwb"
    with pynwb.NWBHDF5IO(out, "w") as io:
        io.write(file)
    return out


def test_a_file_of_the_benchmark_is_one_call(path):
    how = {"window": WINDOW, "traces": ["hand_vel"], "behaviour": ["split"], "split": "split"}
    session = nwb.load_session(path, **how)
    kept = np.setdiff1d(np.flatnonzero(SPLIT != "none"), 7)
    np.testing.assert_array_equal(session.trial_ids, kept)
    for part, trials in session.split()._asdict().items():
        assert set(session.behaviour["split"][trials]) == {part}
    assert {"hand_vel[0]", "hand_vel[1]"} < set(session.behaviour)
    middle = START[kept, None] + 0.2 + 0.02 * np.arange(50) + 0.01
    np.testing.assert_allclose(session.behaviour["hand_vel[1]"], middle, atol=1e-3)
    held_out = session.neurons["heldout"].astype(bool)
    expected = ~held_out | (SPLIT[kept] == "train")[:, None]
    np.testing.assert_array_equal(session.observed, expected)
    assert not session.counts[:, :, held_out][SPLIT[kept] != "train"].any()


def test_a_recording_without_trials_keeps_its_blocks(path):
    starts, split = mtm.continuous_windows(0, 2 * K, 1.0, block=10, gap=1.0)
    session = nwb.load_session(path, starts, window=(0, 1), split=split)
    kept = np.setdiff1d(np.arange(len(starts)), np.flatnonzero(starts == 14.0))  # invalid
    np.testing.assert_array_equal(starts[session.trial_ids], starts[kept])
    for part, members in zip(session.split(), split, strict=True):
        np.testing.assert_array_equal(session.trial_ids[part], np.intersect1d(members, kept))


def test_a_window_must_lie_within_what_was_observed(path):
    across = nwb.load_session(path, window=(-0.5, 1.0), behaviour=())
    # A held-out unit was not observed before its trial, unless the one before was of training.
    before = np.append("", SPLIT[:-1])[across.trial_ids]
    expected = (SPLIT[across.trial_ids] == "train") & (before == "train")
    np.testing.assert_array_equal(across.observed[:, 5], expected)
    with pytest.raises(ValueError, match="not observed"):
        nwb.load_session(path, [500.0, 600.0], window=WINDOW)
