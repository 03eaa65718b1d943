"""Saved models come back the same; anything else is refused with a reason."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtm import MtM, MtMConfig, evaluate, hub, load, save, simulate


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = MtM(MtMConfig.from_depth(1, n_bins=6), {"a.b": 3, "a": 3, "c/d": 5})
    return save(model, tmp_path / "model", info={"note": [1]}), model


def test_round_trip(folder):
    path, model = folder
    again = load(path)
    assert again.config == model.config and again.session_names == ["a.b", "a", "c/d"]
    assert not again.training
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert hub.read_config(path)["info"] == {"note": [1]}
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "weights.safetensors"]


def test_damaged_and_foreign_files_are_refused(folder, tmp_path):
    path, _ = folder
    weights, config = path / hub.WEIGHTS, path / hub.CONFIG
    whole, text = weights.read_bytes(), config.read_text()
    with pytest.raises(hub.CheckpointError, match="holds no model"):
        load(tmp_path / "nowhere")
    for size in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(hub.CheckpointError, match="model"):
            load(path)
    weights.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(hub.CheckpointError):
        load(path)
    weights.unlink()
    with pytest.raises(hub.CheckpointError, match="weights"):
        load(path)
    weights.write_bytes(whole)
    for broken, message in [
        ("{", "not readable"),
        ("[]", "does not describe"),
        (json.dumps({"format": "other"}), "does not describe"),
        (text.replace('"version": 1', '"version": 99'), "format version 99"),
        (text.replace('"width"', '"widht"'), "widht"),
        (text.replace('"a": 3', '"a": 4'), "another shape: .*readout"),
    ]:
        config.write_text(broken)
        with pytest.raises(hub.CheckpointError, match=message):
            load(path)
    config.write_text(text)
    tensors = load_file(weights)
    save_file({**tensors, "extra": torch.zeros(1)}, weights)
    with pytest.raises(hub.CheckpointError, match="extra"):
        load(path)


def test_the_shipped_model_belongs_to_todays_simulation():
    """A change of the simulation that leaves the weights behind would show here."""
    model = load(hub.SHIPPED / "simulated")
    sessions = simulate(n_sessions=3, n_trials=200, n_neurons=96, seed=0)
    assert model.session_names == [s.name for s in sessions]
    for session in sessions:
        scores = evaluate(model, session, tasks=["inter-region", "forward-prediction"]).tasks
        assert all(s.mean("bits_per_spike_train_null") > 0.08 for s in scores.values())
    size = sum(p.stat().st_size for p in (hub.SHIPPED / "simulated").iterdir())
    assert size < 3_000_000
