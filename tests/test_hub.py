"""Saved models come back the same; anything else is refused with a reason."""

import json
import pickle
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtm import (
    Mask,
    MtM,
    MtMConfig,
    evaluate,
    from_pretrained,
    checkpoint as hub,
    load,
    save,
    simulate,
)
from mtm.official import OfficialMtM


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = MtM(MtMConfig.from_depth(1), 6, {"a.b": 3, "a": 3, "c/d": 5})
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


def test_precision_comes_back_too(tmp_path):
    model = MtM(MtMConfig.from_depth(1), 6, {"a": 3}).double()
    again = load(save(model, tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in again.parameters())
    assert {p.device.type for p in again.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer": "ndt2", "patch_size": 2},
        {"session_token": False},
        {"positions": "learned", "input_counts": "raw"},
    ],
    ids=str,
)
def test_every_variant_comes_back_the_same(fields, tmp_path):
    for kind in (MtM, OfficialMtM):
        _comes_back(kind(MtMConfig.from_depth(1, **fields), 6, {"a": 7, "b": 3}).eval(), tmp_path)


def _comes_back(model, tmp_path):
    again = load(save(model, tmp_path))
    assert type(again) is type(model) and again.settings() == model.settings()
    assert again.summary() == model.summary()
    counts = torch.poisson(torch.ones(2, 6, 7))
    mask = Mask(counts > 1, counts > 1, causal=True)
    assert torch.equal(again(counts, "causal", mask, "a"), model(counts, "causal", mask, "a"))


def test_damaged_and_foreign_files_are_refused(folder, tmp_path):
    path, _ = folder
    weights, config = path / hub.WEIGHTS, path / hub.CONFIG
    save_file(load_file(weights), weights)  # which say nothing of themselves
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
        (text.replace('"version": 3', '"version": 99'), "format version 99"),
        (text.replace('"depth": 1', '"depth": "1"'), "config.json|depth|str"),
        (text.replace('"depth": 1', '"depth": 1000000000'), "has 1 layers, but config.json says"),
        (text.replace('"mlp_width": 256', '"mlp_width": 999999999'), "another shape"),
        (text.replace('"a": 3', '"a": "x"'), "model"),
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


def test_a_changed_bit_is_noticed(folder):
    path, _ = folder
    weights = path / hub.WEIGHTS
    whole = weights.read_bytes()
    for place in range(8, len(whole), len(whole) // 60):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        weights.write_bytes(flipped)
        with pytest.raises(hub.CheckpointError, match="weights.safetensors"):
            load(path)


def test_a_save_that_was_killed_between_its_files_leaves_a_model(folder, tmp_path):
    path, old = folder
    new = MtM(MtMConfig.from_depth(2), 6, {"b": 4})
    save(new, tmp_path / "new")
    shutil.copytree(path, tmp_path / "mixed")
    for model, weights, config in ((new, tmp_path / "new", path), (old, path, tmp_path / "new")):
        shutil.copy(weights / hub.WEIGHTS, tmp_path / "mixed")
        shutil.copy(config / hub.CONFIG, tmp_path / "mixed")
        with pytest.warns(UserWarning, match="config.json is not that of the weights.*is taken"):
            again = load(tmp_path / "mixed")
        assert again.config == model.config and again.session_names == model.session_names
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_weights_that_are_no_finite_numbers_are_refused(folder):
    """Of files without a checksum: a bit of a dtype's name or an exponent may have changed."""
    path, _ = folder
    tensors = load_file(path / hub.WEIGHTS)
    key = next(key for key in tensors if key.endswith("readout.weight"))
    for wrong in (tensors[key].int(), torch.full_like(tensors[key], float("nan"))):
        save_file({**tensors, key: wrong}, path / hub.WEIGHTS)
        with pytest.raises(hub.CheckpointError, match="safetensors: .*readout.weight is not all"):
            load(path)


def test_json_of_any_depth_is_refused(folder):
    path, _ = folder
    (path / hub.CONFIG).write_text("[" * 100_000)
    with pytest.raises(hub.CheckpointError, match="config.json is not readable: .*recursion"):
        load(path)


def test_a_model_is_replaced_as_a_whole_or_not_at_all(folder, monkeypatch):
    path, model = folder
    before = {file: file.read_bytes() for file in path.iterdir()}

    def full(file, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)  # of config.json: the weights had room
    larger = MtM(MtMConfig.from_depth(2), 6, {"a": 3})
    with pytest.raises(OSError, match="free some space there.*weights.* and .*config.json"):
        save(larger, path)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


# ----------------------------------------------------------------------------- the Hugging Face Hub


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder in the place of the Hub: user/name -> files."""
    hub_module = pytest.importorskip("huggingface_hub")
    root, made = tmp_path / "server", []

    def create_repo(self, repo_id, exist_ok=False, private=None):
        made.append((repo_id, exist_ok, private))
        (root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://example.org/{repo_id}"

    def snapshot_download(repo_id, allow_patterns, revision=None):
        hub_module.utils.validate_repo_id(repo_id)
        copy = tmp_path / "cache"
        copy.mkdir(exist_ok=True)
        for name in allow_patterns:
            shutil.copy(root / repo_id / name, copy / name)
        return str(copy)

    monkeypatch.setattr(hub_module.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub_module.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub_module, "snapshot_download", snapshot_download)
    return root, made


def test_push_and_pull(folder, server):
    (root, made), (_, model) = server, folder
    assert hub.push_to_hub(model, "lab/model", private=True) == "https://example.org/lab/model"
    assert made == [("lab/model", True, True)]
    page = (root / "lab/model/README.md").read_text()
    assert 'mtm.from_pretrained("lab/model")' in page and model.summary() in page
    (root / "lab/model/evil.pkl").write_bytes(b"not fetched")
    again = from_pretrained("lab/model", revision="main")
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_from_pretrained_takes_a_folder_too(folder):
    path, model = folder
    assert from_pretrained(path).config == model.config
    with pytest.raises(hub.CheckpointError, match="no such folder is neither a folder nor a name"):
        from_pretrained("no such folder")


def test_without_huggingface_hub_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install"):
        from_pretrained("lab/model")


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


def test_a_description_is_compared_as_what_it_says(tmp_path):
    """Not as text: an editor may sort its keys, and the info is the user's own."""
    model = MtM(MtMConfig.from_depth(1), 5, {"a": 3})
    save(model, tmp_path, {1: "a", "1": "b"})
    path = tmp_path / "config.json"
    description = json.loads(path.read_text()) | {"info": {"note": "mine"}}
    path.write_text(json.dumps(description, sort_keys=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path).session_names == ["a"]
