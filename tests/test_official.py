"""Checkpoints of the authors' code: read as what they compute, and never run."""

import contextlib
import os
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from mtm import from_official
from mtm.checkpoint import settings
from mtm.masks import Mask
from mtm.model import CheckpointError, MtMConfig
from mtm.official import ABLATION_EID, HELD_OUT_EIDS, PAPER_EIDS, REPEATED_SITE_EIDS, OfficialMtM


def theirs(tokens=True, ndt2=False):
    """The modules of a small NDT1 (stitched) or NDT2 as the authors' code nests and names them."""
    attention = {name: nn.Linear(8, 8) for name in ("query", "key", "value", "out_proj")}
    mlp = {"up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 8)}
    layer = {"ln1": nn.LayerNorm(8), "ln2": nn.LayerNorm(8)}
    layer |= {"attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)}
    layer["attn"].n_heads = 4
    layer["attn"].register_buffer("cos", torch.ones(3), persistent=False)
    size = 2 if ndt2 else 6
    embedder = {"embed_spikes": nn.Linear(size, 2 * size), "projection": nn.Linear(2 * size, 8)}
    if ndt2:
        for name, rows in (("space", 3), ("time", 5)):
            both = nn.Sequential(nn.Embedding(rows, 8), nn.LayerNorm(8))
            embedder[f"embed_{name}_pos"] = both
    else:
        embedder["embed_pos"] = nn.Embedding(5, 8)
    if tokens:
        embedder |= {"embed_prompt": nn.Embedding(4, 8), "embed_session": nn.Embedding(40, 8)}
    encoder = {
        "embedder": nn.ModuleDict(embedder),
        "layers": nn.ModuleList([nn.ModuleDict(layer)]),
        "out_norm": nn.LayerNorm(8),
    }
    whole = {"decoder": nn.Sequential(nn.Linear(8, size))}
    if not ndt2:
        stitchers = nn.ModuleDict({"3": nn.Linear(3, 6), "4": nn.Linear(4, 6)})
        readouts = nn.ModuleDict({"3": nn.Linear(8, 3), "4": nn.Linear(8, 4)})
        encoder["stitcher"] = nn.ModuleDict({"stitcher_dict": stitchers})
        whole["stitch_decoder"] = nn.ModuleDict({"stitch_decoder_dict": readouts})
    return nn.ModuleDict({"encoder": nn.ModuleDict(encoder), **whole})


TWO = dict(zip(PAPER_EIDS[:2], (3, 4), strict=True))


def quietly(checkpoint, sessions=TWO, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return from_official(checkpoint, sessions, **options)


def test_a_state_dict_and_a_pickled_module_give_the_same_model(tmp_path, monkeypatch):
    """The module's classes exist only when it is written, as for somebody without their code."""
    module = theirs()
    expected = quietly(module.state_dict(), heads=4)
    code = types.ModuleType("models.ndt1")

    for name, base in (("NDT1", nn.ModuleDict), ("DictConfig", dict)):
        setattr(code, name, type(name, (base,), {"__module__": "models.ndt1"}))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "models", types.ModuleType("models"))
        patched.setitem(sys.modules, "models.ndt1", code)
        whole = code.NDT1(dict(module.items()))
        whole.config = code.DictConfig(depth=1, encoder=code.DictConfig(causal=True))
        whole.activation = nn.functional.softsign
        torch.save({"model": whole, "epoch": 3}, tmp_path / "model_best.pt")
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    pickled = quietly(tmp_path / "model_best.pt")  # knows its heads
    assert settings(pickled) == settings(expected) and pickled.config.heads == 4
    assert isinstance(pickled, OfficialMtM) and not pickled.training
    for model in (pickled, quietly(tmp_path / "weights.pt", heads=4)):
        found, wanted = model.state_dict(), expected.state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_their_ndt2_with_prefix():
    module = theirs(ndt2=True)
    with torch.no_grad():
        for parameter in module.parameters():  # norms and biases too
            parameter.normal_()
    model = from_official(module.state_dict(), TWO, heads=4)
    assert (model.config.tokenizer, model.config.patch_size, model.n_places) == ("ndt2", 2, 3)
    assert model.causal and model.config.session_token and len(model.prompts) == 4
    embedder = module["encoder"]["embedder"]
    counts = torch.poisson(torch.ones(2, 5, 3))
    for row, name in enumerate(TWO):
        shown = torch.cat([counts, counts[..., :1]], dim=2)[..., : TWO[name]]
        tokens = model.embed(shown, "inter-region", None, name).x
        assert torch.equal(tokens[0, 0], embedder["embed_session"].weight[row])
        assert torch.equal(tokens[0, 1], embedder["embed_prompt"].weight[2])
        filled = torch.cat([counts, counts[..., [0 if TWO[name] == 4 else 1]]], dim=2)
        for t in range(5):
            for place in range(2):
                x = embedder["embed_spikes"](filled[:, t, 2 * place : 2 * place + 2])
                x = embedder["projection"](nn.functional.softsign(x))
                x = x + embedder["embed_space_pos"](torch.tensor(place))
                x = x + embedder["embed_time_pos"](torch.tensor(t))
                torch.testing.assert_close(tokens[:, 2 + 3 * t + place], x)
    log_rates = model.read_out(torch.ones(1, 17, 8), list(TWO)[1])
    expected = module["decoder"](torch.ones(8))
    torch.testing.assert_close(log_rates[0, 0], torch.cat([expected, expected]))


@pytest.mark.parametrize("tokenizer", ["ndt1", "ndt2"])
@pytest.mark.parametrize("n_prefix", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_their_attention_against_a_loop(tokenizer, n_prefix, causal):
    """A token's number modulo T stands for its bin, the prefix is open both ways, padding attends
    to and is attended to by itself alone. Trial 0 lacks its last two bins."""
    n_bins, n_places, n_neurons, size = 5, 3, 7, 4
    sizes = {"width": 8, "heads": 2, "depth": 1, "mlp_width": 8, "stitch_width": 6}
    sizes |= {"tokenizer": tokenizer, "patch_size": size, "session_token": n_prefix > 0}
    prompts = ("causal",) if n_prefix == 2 else ()
    config = MtMConfig.published(**sizes)
    model = OfficialMtM(config, n_bins, {"a": n_neurons}, n_places=n_places, prompts=prompts)
    counts = torch.ones(2, n_bins, n_neurons)
    counts[0, -2:] = -1
    nothing = torch.zeros_like(counts, dtype=torch.bool)
    found = model.embed(counts, "causal", Mask(nothing, nothing, causal), "a").allowed
    per_bin = n_places if tokenizer == "ndt2" else 1
    length = n_prefix + n_bins * per_bin
    assert found.shape == (2, 1, length, length)
    for trial in range(2):
        for query in range(length):
            for key in range(length):
                q, k = query - n_prefix, key - n_prefix
                absent = k >= 0 and (
                    (trial == 0 and k // per_bin >= n_bins - 2)
                    or (tokenizer == "ndt2" and size * (k % per_bin) >= n_neurons)
                )
                future = causal and min(q, k) >= 0 and k % n_bins > q % n_bins
                expected = query == key or not (absent or future)
                assert bool(found[trial, 0, query, key]) == expected, (trial, query, key)


class Bomb:
    """Runs a function where it is unpickled the usual way."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def test_no_code_of_a_checkpoint_runs(tmp_path):
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "trace"
    state = theirs().state_dict()
    bomb = Bomb(os.mkdir, str(trace))
    for found in (bomb, {"model": bomb}, {**state, "x": bomb}, {"model": theirs(), "y": bomb}):
        torch.save(found, path)
        with contextlib.suppress(CheckpointError):
            quietly(path, heads=4)
        assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the bomb is a real one
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="checkpoint.pt is not a readable"):
        from_official(path, TWO)


def test_weights_that_do_not_fit_are_named():
    state = theirs().state_dict()
    up, norm = "encoder.layers.0.mlp.up_proj.bias", "encoder.layers.0.ln1.weight"
    for key, value, message in [
        (up, None, f"no NDT1 .*{up}"),
        (norm, torch.ones(9), r"size mismatch for layers.0.norm1.weight"),
        ("encoder.masker.extra", torch.ones(1), "encoder.masker.extra unknown"),
        ("encoder.embedder.embed_spikes.weight", None, "no NDT1 .*embed_spikes.weight"),
    ]:
        broken = {k: v for k, v in (state | {key: value}).items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            quietly(broken, heads=4)
    with pytest.raises(KeyError, match="'mine' has no row in .*embed_session"):
        quietly(state, {"mine": 3}, heads=4)
    eids = ["mine", *PAPER_EIDS[1:]]
    assert quietly(state, {"mine": 3}, heads=4, eids=eids).session_names == ["mine"]


def test_the_papers_sessions():
    assert len(set(PAPER_EIDS)) == 40 and all(len(eid) == 36 for eid in PAPER_EIDS)
    assert PAPER_EIDS[:5] == HELD_OUT_EIDS and ABLATION_EID in PAPER_EIDS
    assert len(set(REPEATED_SITE_EIDS)) == 83 and set(PAPER_EIDS) <= set(REPEATED_SITE_EIDS)
