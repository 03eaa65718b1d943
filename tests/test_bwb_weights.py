"""BrainWideBench's public MtM: read as what it computes, never run, and gone on with."""

import os

import numpy as np
import pytest
import torch
from bwb_model import MODES, Theirs

from mtm import evaluate, fit, from_pretrained, load, save, simulate
from mtm.inputs import SessionError
from mtm.masks import Mask
from mtm.model import CheckpointError, MtMConfig

N = {"first": 7, "second": 9}
QUICK = {"epochs": 2, "validations": 1, "progress": False, "calibrate": False}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return Theirs(N).eval()


@pytest.fixture(scope="module")
def path(theirs, tmp_path_factory):
    return theirs.write(tmp_path_factory.mktemp("hub") / "NerDSLab/ibl-bwb-mtm/best.pt")


@pytest.fixture(scope="module")
def session():
    """1 s windows of 20 ms, as the model needs them."""
    (made,) = simulate(1, 60, 12, window=(0.0, 1.0), seed=2, mean_rate=30.0)
    return made


@torch.no_grad()
def compare(model, cases):
    """Log-rates and latents of (session, mode, counts, hidden, latents, log-rates)."""
    for name, mode, counts, hidden, latents, log_rates in cases:
        scheme = mode and mode.replace("_", "-")
        mask = Mask(hidden, hidden, causal=mode == "causal")  # a mask that asks for causality
        found = model(counts, scheme, mask, name)
        assert torch.allclose(found, log_rates, rtol=0, atol=1e-5), (name, mode)
        assert torch.equal(model.predict_log_rates(counts, scheme, mask, name), found)
        x = model.encode(model.embed(counts, scheme, mask, name))[:, -model.n_bins :]
        assert torch.allclose(x, latents, rtol=0, atol=1e-5), (name, mode)
        if mode is None:
            assert torch.equal(model.latents(counts, name, mask), x)


def test_equals_the_reference_in_every_mode(parity, tmp_path):
    file = torch.load(parity / "bwb_mtm.pt", weights_only=True)
    keys = ("session", "mode", "spikes", "hidden", "latents", "log_rates")
    cases = [tuple(case[key] for key in keys) for case in file["cases"]]
    assert {case[1] for case in cases} == {*MODES, None}
    torch.save(file["checkpoint"], tmp_path / "best.pt")
    how = {"heads": file["heads"], "activation": file["activation"]}
    compare(from_pretrained(tmp_path / "best.pt", **how), cases)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_equals_torchs_own_modules(activation, tmp_path):
    theirs = Theirs(N, activation=activation).eval()
    model = from_pretrained(theirs.write(tmp_path / "mtm.pt"), heads=4, activation=activation)
    assert not model.config.causal and not model.training and model.n_bins == 50
    cases = []
    for name, n in N.items():
        for mode in (None, *MODES):
            counts = torch.poisson(torch.ones(3, 50, n))
            hidden = torch.rand(counts.shape) < 0.3
            latents, log_rates = theirs(counts.masked_fill(hidden, 0), mode, name)
            cases.append((name, mode, counts, hidden, latents.detach(), log_rates.detach()))
    compare(model, cases)
    again = load(save(model, tmp_path / "ours"))
    compare(again, cases)
    assert again.config == model.config


def make_folder(place):
    os.mkdir(place)


class Boom:
    """Makes a folder where it is unpickled the usual way."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return make_folder, (str(self.place),)


def test_runs_nothing_of_the_file_and_reads_whatever_a_trainer_saves(theirs, tmp_path):
    extra = {
        "bad": Boom(tmp_path / "ran"),
        "metrics": {"loss": np.float64(0.1), "array": np.ones(3)},
        "config": {"path": tmp_path, "model": MtMConfig()},
    }
    path = theirs.write(tmp_path / "best.pt", **extra)
    assert from_pretrained(path, heads=4).session_names == list(N)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="best.pt is not a readable checkpoint"):
        from_pretrained(path)


def test_sessions_that_are_kept_and_what_does_not_fit(path, monkeypatch):
    assert from_pretrained(path, sessions=["second"]).session_names == ["second"]
    assert from_pretrained(path.parent, sessions=[]).session_names == []
    with pytest.raises(KeyError, match=r"'third' is not among the 2 .*fit\(session, model\)"):
        from_pretrained(path, sessions=["third"])
    with pytest.raises(CheckpointError, match="is no MtM of BrainWideBench: width 16 must be"):
        from_pretrained(path, heads=3)
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append(allow_patterns)
        return str(path.parents[2] / repo_id)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    model = from_pretrained("NerDSLab/ibl-bwb-mtm", sessions=["first"])
    assert model.session_names == ["first"] and "best.pt" in asked[0]


@pytest.mark.parametrize("tune", ["all", "session-layers", "session-layers-then-all"])
def test_fit_goes_on_with_it(path, session, tune):
    start = from_pretrained(path, sessions=["first"], heads=4)
    model = fit(session, start, tune=tune, **QUICK).model
    same = torch.equal(model.layers[0].up.weight, start.layers[0].up.weight)
    assert same == (tune == "session-layers") and not model.config.causal
    assert "co-smoothing" in evaluate(model, session, tasks=["co-smoothing"]).tasks
    (wrong,) = simulate(1, 60, 12, seed=2)
    with pytest.raises(SessionError, match=r"has 100 bins.*window=\(-0.5, 0.5\), bin_size=0.02\)"):
        fit(wrong, start, **QUICK)


def test_direct_paths_on_top(path, session):
    """They add nothing at first, and help a core that has learned nothing."""
    plain = from_pretrained(path, heads=4)
    model = from_pretrained(path, heads=4, direct_paths=True)
    counts = torch.poisson(torch.ones(2, 50, 7))
    hidden = torch.zeros_like(counts, dtype=torch.bool)
    batch = (counts, "causal", Mask(hidden, hidden, True), "first")
    assert torch.equal(model.predict_log_rates(*batch), plain.predict_log_rates(*batch))
    long = QUICK | {"epochs": 8, "calibrate": True}
    scores = [fit(session, start, **long).best["mean"] for start in (plain, model)]
    assert scores[1] > scores[0]
    known = session.select(neurons=np.arange(7))
    known.name = "first"  # one that the file knows: its paths start at the means
    means = fit(known, model, **QUICK).model.session_layers("first").mean
    train = known.counts[known.split().train]
    assert torch.allclose(means, torch.as_tensor(train.mean(axis=(0, 1))).float(), rtol=0.01)
