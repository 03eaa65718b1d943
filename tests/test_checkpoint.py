"""Models come back the same, and runs that were killed end as if they had not been."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as to_bytes

from mtm import Mask, MtM, MtMConfig, Session, checkpoint, evaluate, fit, simulate
from mtm.checkpoint import MODEL, RUN, describe, from_pretrained, load, save, settings
from mtm.model import CheckpointError
from mtm.official import OfficialMtM
from mtm.training import Trainer

SHORT = {"epochs": 4, "validations": 3, "progress": False, "device": "cpu"}
SHORT |= {"batch_size": 8, "batches_per_step": 1}
DEPTH1 = {"depth": 1, **SHORT}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = MtM(MtMConfig.from_depth(1), 6, {"a.b": 3, "a": 3, "c/d": 5})
    return save(model, tmp_path / "model", info={"note": [1]}), model


@pytest.fixture(scope="module")
def sessions():
    """Two animals, 28 training trials each: 4 batches, and 4 steps an epoch for one or for two."""
    return simulate(2, 40, 12, seed=3, mean_rate=30.0, bin_size=0.1)


@pytest.fixture(scope="module")
def whole(sessions):
    """A run that was never stopped."""
    return fit(sessions[0], **DEPTH1)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------ models


def test_round_trip_in_one_file_beside_a_description_for_people(folder):
    path, model = folder
    model.seen["a"], model.split_seed, model.window = torch.arange(3).numpy(), 7, (-1.0, 2.0)
    save(model, path, info={"note": [1]})
    assert sorted(p.name for p in path.iterdir()) == ["config.json", MODEL]
    readable = json.loads((path / "config.json").read_text())
    assert readable["info"] == {"note": [1]} and readable["model"]["config"]["depth"] == 1
    (path / "config.json").write_text("not read")
    before = torch.get_rng_state()
    again = load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert settings(again) == settings(model) and not again.training and same(again, model)
    assert describe(path)["info"] == {"note": [1]}


@pytest.mark.parametrize("kind", [MtM, OfficialMtM])
@pytest.mark.parametrize(
    "fields",
    [{"tokenizer": "ndt2", "patch_size": 3}, {"positions": "learned", "session_token": False}],
    ids=str,
)
def test_every_variant_comes_back_the_same(kind, fields, tmp_path):
    model = kind(MtMConfig.published(1, width=16, heads=2, **fields), 6, {"a": 7})
    again = load(save(model.eval(), tmp_path))
    assert type(again) is kind and again.summary() == model.summary()
    counts = torch.poisson(torch.ones(2, 6, 7))
    mask = Mask(counts > 1, counts > 1, causal=True)
    assert torch.equal(again(counts, "causal", mask, "a"), model(counts, "causal", mask, "a"))


def test_damaged_and_foreign_files_are_refused(folder):
    path, good = folder[0], (folder[0] / MODEL).read_bytes()
    for content, problem in (
        (good[:-1], "damaged or cut short"),
        (pickle.dumps({"x": 1}), "damaged or cut short"),
        (to_bytes({"x": torch.ones(1)}), "was not written by mtm"),
        (to_bytes({"x": torch.ones(1)}, {"mtm": '{"version": 99}'}), "format version 99"),
    ):
        (path / MODEL).write_bytes(content)
        with pytest.raises(CheckpointError, match=problem):
            load(path)
    (path / MODEL).unlink()
    with pytest.raises(CheckpointError, match="holds no model: there is no .*model.safetensors"):
        load(path)


def test_the_shipped_model_belongs_to_todays_simulation():
    """A change of the simulation that leaves the weights behind would show here."""
    model = load(checkpoint.SHIPPED / "simulated")
    (session, *_) = sessions = simulate(n_sessions=3, n_trials=200, n_neurons=96, seed=0)
    assert model.session_names == [s.name for s in sessions]
    scores = evaluate(model, session, tasks=["inter-region", "forward-prediction"]).tasks
    assert all(s.mean("bits_per_spike_train_null") > 0.08 for s in scores.values())
    files = (path for path in checkpoint.SHIPPED.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) < 3e6


@pytest.mark.parametrize("scheme", ["temporal", "neuron", "causal", "intra-region", "inter-region"])
def test_the_shipped_specialists_belong_to_todays_code(scheme):
    """They still score what benchmarks/weights.py wrote down, which the book shows."""
    results = Path(__file__).parents[1] / "benchmarks/results/specialists.json"
    measured = json.loads(results.read_text("utf-8"))["scores"][scheme]
    (session,) = simulate(n_sessions=1, n_trials=200, n_neurons=96, seed=0)
    model = load(checkpoint.SHIPPED / "specialists" / scheme)
    scores = evaluate(model, session, tasks=["inter-region", "forward-prediction"]).tasks
    for task, found in scores.items():
        assert found.mean() == pytest.approx(measured[task], abs=0.005)


# ----------------------------------------------------------------------------- the Hugging Face Hub


def test_push_and_pull(folder, tmp_path, monkeypatch):
    """With a folder in the place of the Hub: user/name -> files."""
    hub = pytest.importorskip("huggingface_hub")
    (path, model), root, made = folder, tmp_path / "server", []

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, root / repo_id)
        return f"https://example.org/{repo_id}"

    def snapshot_download(repo_id, allow_patterns, revision=None):
        return str(root / repo_id)

    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, *a, **how: made.append((*a, how)))
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    address = checkpoint.push_to_hub(model, "lab/model", private=True)
    assert address == "https://example.org/lab/model"
    assert made == [("lab/model", {"exist_ok": True, "private": True})]
    page = (root / "lab/model/README.md").read_text()
    assert 'mtm.from_pretrained("lab/model")' in page
    assert same(from_pretrained("lab/model", revision="main"), model)
    assert same(from_pretrained(path), model)


# ------------------------------------------------------------------------------- runs that go on


class Killed(BaseException):
    """Not an Exception: nothing on the way may catch it."""


def resumed(monkeypatch, folder, step, call):
    """The result of ``call`` if the run is killed before a step and started again."""
    take = Trainer.step

    def watched(trainer, batches):
        if trainer.run.step == step:
            raise Killed
        return take(trainer, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", watched)
        with pytest.raises(Killed):
            call(folder, save_every=0.0)
    return call(folder, save_every=1e9)


def test_a_run_that_was_cut_ends_with_the_same_weights(sessions, tmp_path, monkeypatch):
    """Within an epoch, at its end (4 steps), before and after validations; with dropout."""

    def call(folder, **how):
        sizes = MtMConfig.from_depth(2, width=32, heads=2, mlp_width=32, stitch_width=16)
        return fit(sessions, sizes, **SHORT | {"batches_per_step": 2}, folder=folder, **how)

    whole = call(None)
    for step in (3, 4, 8, 15):
        found = resumed(monkeypatch, tmp_path / str(step), step, call)
        assert same(found.model, whole.model) and same(load(tmp_path / str(step)), whole.model)
        for one, other in zip(found.history, whole.history, strict=True):
            for key in ("epoch", "step", "lr", "loss", "losses", "validation", "mean"):
                assert one[key] == other[key]


def test_phases_of_fine_tuning_resume_too(sessions, tmp_path, monkeypatch, whole):
    """4 steps an epoch; the session layers are trained in the first of four."""
    save(whole, tmp_path / "start")

    def call(folder, **how):
        how |= SHORT | {"tune": "session-layers-then-all", "folder": folder}
        return fit(sessions[1], load(tmp_path / "start"), **how)

    expected = call(None)
    for step in (3, 4, 14):
        assert same(resumed(monkeypatch, tmp_path / f"{step}", step, call).model, expected.model)


@pytest.mark.filterwarnings("ignore:.*same neurons")
def test_a_folder_of_another_run_is_refused(sessions, tmp_path, whole):
    a = whole.model
    fit(sessions[0], a, **SHORT, folder=tmp_path)
    before = contents(tmp_path)
    grid = {"bin_size": 0.1, "window": sessions[0].window}
    louder = Session(sessions[0].counts + 1, sessions[0].regions, sessions[0].name, **grid)
    relabelled = Session(sessions[0].counts, sessions[0].regions[::-1], sessions[0].name, **grid)
    b = fit(sessions[0], **DEPTH1, seed=1).model  # the same settings, other weights
    for session, start, changes, problem in (
        (sessions[0], a, {"lr": 0.1}, "train lr was 0.001 and is now 0.1"),
        (sessions[1], a, {}, "sessions sim-3-0 was .* and is now None"),
        (louder, a, {}, "sessions sim-3-0 was .* and is now"),
        (relabelled, a, {}, "sessions sim-3-0 was .* and is now"),
        (sessions[0], b, {}, "initial weights was"),
    ):
        with pytest.raises(CheckpointError, match=f"another run: {problem}.* restart=True"):
            fit(session, start, **SHORT | changes, folder=tmp_path)
    assert contents(tmp_path) == before


def test_restarting_deletes_the_old_model_at_once(sessions, tmp_path):
    fit(sessions[0], **DEPTH1, folder=tmp_path)
    (tmp_path / RUN).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged or cut short .* restart=True"):
        fit(sessions[0], **DEPTH1, folder=tmp_path)
    with pytest.raises(FloatingPointError, match="lower lr .now 1e.30. or set clip"):
        fit(sessions[0], **DEPTH1, lr=1e30, clip=None, folder=tmp_path, restart=True)
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path)
    fit(sessions[1], **DEPTH1, folder=tmp_path, restart=True)
    assert load(tmp_path).session_names == ["sim-3-1"]


@pytest.mark.parametrize("problem", ["the loss became nan", "weights became infinite or NaN"])
def test_what_is_not_finite_stops_the_run_and_is_never_saved(
    sessions, tmp_path, monkeypatch, problem, whole
):
    """A finite loss may have a gradient that is not. The state before stays, the run resumes."""
    step = Trainer.step

    def poisoned(trainer, batches):
        step(trainer, batches)
        if trainer.run.step == 14 and "loss" in problem:
            trainer.pending[-1][2][0] = float("nan")
        elif trainer.run.step == 14:
            trainer.model.norm.weight.data.fill_(float("inf"))

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", poisoned)
        with pytest.raises(FloatingPointError, match=f"{problem} in step 14.*; lower lr"):
            fit(sessions[0], **DEPTH1, folder=tmp_path, save_every=0.0)
    assert same(fit(sessions[0], **DEPTH1, folder=tmp_path).model, whole.model)


def test_patience(sessions, tmp_path):
    settings = {**DEPTH1, "epochs": 40, "validations": 40, "lr": 0.05, "patience": 3}
    result = fit(sessions[0], **settings, folder=tmp_path)
    means = [entry["mean"] for entry in result.history]
    assert len(means) == means.index(max(means)) + 1 + 3 < 40
    assert fit(sessions[0], **settings, folder=tmp_path).history == result.history
