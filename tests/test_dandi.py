"""IBL's recordings in DANDI, in files written to the layout of their converter."""

import json
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from conftest import Handler

pynwb = pytest.importorskip("pynwb")

from mtm import SessionError  # noqa: E402
from mtm.data import dandi  # noqa: E402

EID = "0802ced5-33a3-405e-8336-b65ebc5cb07c"
K, RATE = 30, 100.0
ON = 5.0 + 3.0 * np.arange(K)
CHOICE, LEFT = np.arange(K) % 3 - 1, np.arange(K) % 2 == 0
BLOCK, CONTRAST = np.repeat([0.5, 0.8, 0.2], K // 3), np.resize([1.0, 0.25, 0.0], K)
WORDS, STOP = np.array(["left", "no_go", "right"]), np.array([100, 50])
COLUMNS = {
    "now": {
        "gabor_stimulus_onset_time": ON,
        "wheel_movement_onset_time": ON + 0.3,
        "mouse_wheel_choice": WORDS[CHOICE + 1],
        "is_mouse_rewarded": CHOICE == 1,
        "gabor_stimulus_contrast": 100 * CONTRAST,
        "gabor_stimulus_side": np.where(LEFT, "left", "right"),
    },
    "before": {
        "stim_on_time": ON,
        "first_movement_time": ON + 0.3,
        "choice": CHOICE.astype(float),
        "feedback_type": np.where(CHOICE == 1, 1.0, -1.0),
        "contrast_left": np.where(LEFT, CONTRAST, np.nan),
        "contrast_right": np.where(LEFT, np.nan, CONTRAST),
    },
}


def write(path, layout):
    """Units, trials, wheel velocity -2 and motion energy of the left camera."""
    file = pynwb.NWBFile("IBL", EID, datetime(2024, 5, 1, tzinfo=UTC))
    group = file.create_electrode_group("NeuropixelsProbe00", "g", "?", file.create_device("p"))
    for level in ("beryl_location", "cosmos_location") if layout == "now" else ():
        file.add_electrode_column(level, "region")
    for allen, beryl, cosmos in (("CA1", "CA1", "HPF"), ("VISp2/3", "VISp", "Isocortex")):
        more = {"beryl_location": beryl, "cosmos_location": cosmos} if layout == "now" else {}
        file.add_electrode(location=allen, group=group, **more)
    for name in ("ibl_quality_score", "max_electrode", "probe_name") if layout == "now" else ():
        file.add_unit_column(name, "q")
    for n in range(4):
        more = {"ibl_quality_score": 1.0, "max_electrode": n % 2, "probe_name": "ab"[n % 2]}
        more, stop = (more, STOP[n % 2]) if layout == "now" else ({}, 100)
        spikes = np.sort(np.random.default_rng(n).uniform(0, stop, 4000))
        file.add_unit(spike_times=spikes, electrodes=[n % 2], **more)
    columns = COLUMNS[layout] | {"probability_left": BLOCK}
    for name in columns:
        file.add_trial_column(name, "c")
    for k in range(K):
        row = {name: values[k] for name, values in columns.items()}
        file.add_trial(start_time=ON[k] - 0.5, stop_time=ON[k] + 2, **row)
    wheel = file.create_processing_module("wheel", "w")
    data = np.full(int(100 * RATE), -2.0)
    wheel.add(pynwb.TimeSeries(name="WheelVelocity", data=data, rate=RATE, unit="rad/s"))
    times, video = np.arange(0, 100, 0.02), file.create_processing_module("video", "v")
    for side, value in (("Right", 9.0), ("Left", 5.0)):
        how = {"data": np.full(len(times), value), "timestamps": times, "unit": "a.u."}
        video.add(pynwb.TimeSeries(name=f"TimeSeries{side}MotionEnergy", **how))
    with pynwb.NWBHDF5IO(path, "w") as io:
        io.write(file)
    return path


@pytest.mark.parametrize("layout", ["now", "before"])
def test_behaviours_have_the_names_of_our_readers(layout, tmp_path):
    path = write(tmp_path / "a.nwb", layout)
    session = dandi.load_session(path, window=(0.0, 1.0))
    assert session.counts.shape == (K, 50, 4) and session.name == EID
    assert session.regions.tolist() == ["CA1", "VISp2/3"] * 2
    if layout == "now":  # a probe stops in the middle, and its neurons only seem silent
        assert np.array_equal(session.observed[:, :2], ON[:, None] + 1 < STOP)
    read = session.behaviour
    assert np.array_equal(read["choice"], CHOICE) and np.array_equal(read["reward"], CHOICE == 1)
    assert np.array_equal(read["block"], BLOCK)
    np.testing.assert_allclose(read["contrast"], np.where(LEFT, -CONTRAST, CONTRAST))
    assert np.all(read["wheel-speed"] == 2) and np.all(read["whisker-motion-energy"] == 5)
    moved = dandi.load_session(path, "wheel_movement_onset_time", window=(0.0, 1.0))
    later = dandi.load_session(path, window=(0.3, 1.3))
    assert np.array_equal(moved.counts, later.counts)
    if layout == "now":
        assert dandi.load_session(path, atlas="Cosmos").region_names == ["HPF", "Isocortex"]
    else:
        with pytest.raises(SessionError, match="regions from electrodes/cosmos_location"):
            dandi.load_session(path, atlas="Cosmos")


def test_the_file_with_sorted_spikes_is_found(serve):
    stem, asked = f"sub-A/sub-A_ses-{EID}", []
    names = ("_desc-raw_ecephys", "_behavior+ecephys+image", "_desc-processed_behavior+ecephys")
    paths = [f"{stem}{name}.nwb" for name in names]

    class Archive(Handler):
        def do_GET(self):
            asked.append(parse_qs(urlsplit(self.path).query)["glob"][0])
            listed = [{"path": p, "asset_id": f"id-{i}"} for i, p in enumerate(paths)]
            self.answer(json.dumps({"results": listed}).encode())

    api = serve(Archive)
    assert dandi.find("0802ced5", api=api) == f"{api}/assets/id-2/download/"
    assert asked == ["*ses-0802ced5*.nwb"]
    del paths[1:]
    with pytest.raises(SessionError, match="not one session with sorted spikes"):
        dandi.find(EID, api=api)
