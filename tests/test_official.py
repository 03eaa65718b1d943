"""Checkpoints of the authors' code: read as what they compute, and never run."""

import os
import pickle
import sys
import types
import warnings
import zipfile

import pytest
import torch
from torch import nn

from mtm import from_official, checkpoint as hub, official
from mtm.official import PAPER_EIDS, OfficialMtM


def theirs(tokens=True, ndt2=False):
    """The modules of a small NDT1 (stitched) or NDT2 as the authors' code nests and names them."""
    attention = {name: nn.Linear(8, 8) for name in ("query", "key", "value", "out_proj")}
    layer = nn.ModuleDict(
        {
            "ln1": nn.LayerNorm(8),
            "ln2": nn.LayerNorm(8),
            "attn": nn.ModuleDict(attention),
            "mlp": nn.ModuleDict({"up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 8)}),
        }
    )
    layer["attn"].n_heads = 4
    layer["attn"].register_buffer("cos", torch.ones(3), persistent=False)
    embedder = {
        "embed_spikes": nn.Linear(6, 12),
        "projection": nn.Linear(12, 8),
        "embed_pos": nn.Embedding(5, 8),
    }
    if tokens:
        embedder |= {"embed_prompt": nn.Embedding(4, 8), "embed_session": nn.Embedding(40, 8)}
    stitches, readouts = (
        nn.ModuleDict({"3": nn.Linear(a, b), "4": nn.Linear(c, d)})
        for a, b, c, d in ((3, 6, 4, 6), (8, 3, 8, 4))
    )
    if ndt2:
        embedder |= {
            "embed_spikes": nn.Linear(2, 4),
            "projection": nn.Linear(4, 8),
            "embed_space_pos": nn.Sequential(nn.Embedding(3, 8), nn.LayerNorm(8)),
            "embed_time_pos": nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8)),
        }
        del embedder["embed_pos"]
    encoder = {
        "stitcher": nn.ModuleDict({"stitcher_dict": stitches}),
        "embedder": nn.ModuleDict(embedder),
        "layers": nn.ModuleList([layer]),
        "out_norm": nn.LayerNorm(8),
    }
    if ndt2:
        del encoder["stitcher"]
        decoder = nn.Sequential(nn.Linear(8, 2))
        return nn.ModuleDict({"encoder": nn.ModuleDict(encoder), "decoder": decoder})
    return nn.ModuleDict(
        {
            "encoder": nn.ModuleDict(encoder),
            "stitch_decoder": nn.ModuleDict({"stitch_decoder_dict": readouts}),
            "decoder": nn.Sequential(nn.Linear(8, 6)),
        }
    )


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

    class NDT1(nn.ModuleDict):
        """Their class, with an attribute that is a function of theirs."""

    NDT1.__module__, NDT1.__qualname__ = "models.ndt1", "NDT1"
    code.NDT1 = NDT1
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "models", types.ModuleType("models"))
        patched.setitem(sys.modules, "models.ndt1", code)
        whole = NDT1(dict(module.items()))
        whole.config = NDT1()
        torch.save({"model": whole, "epoch": 3}, tmp_path / "model_best.pt")
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    pickled = quietly(tmp_path / "model_best.pt")  # knows its heads
    assert pickled.config == expected.config and pickled.config.heads == 4
    assert isinstance(pickled, OfficialMtM) and not pickled.training
    for model in (pickled, quietly(tmp_path / "weights.pt", heads=4)):
        found, wanted = model.state_dict(), expected.state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_their_ndt2_with_tokens_in_front():
    module = theirs(ndt2=True)
    with torch.no_grad():
        for parameter in module.parameters():  # norms and biases too
            parameter.normal_()
    model = from_official(module, TWO, heads=4)
    config = model.config
    assert (config.tokenizer, config.patch_size, model.n_places) == ("ndt2", 2, 3)
    assert model.causal and config.session_token and len(model.prompts) == 4
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


def test_what_weights_do_not_tell_about_a_model():
    assert not quietly(theirs(tokens=False), {"x": 3}, heads=4).causal
    assert quietly(theirs(tokens=False), {"x": 3}, heads=4, causal=True).causal
    assert quietly(theirs(), heads=4).split_seed is None
    with pytest.raises(hub.CheckpointError, match="40 rows for 2 sessions; pass the names"):
        quietly(theirs(), {"a": 3}, heads=4, eids=["a", "b"])
    with pytest.raises(hub.CheckpointError, match="width 8 must be a multiple of heads 3"):
        quietly(theirs(), heads=3)


class Bomb:
    """Runs a command where it is unpickled the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_code_of_a_checkpoint_runs(tmp_path):
    bomb, trace = Bomb(tmp_path / "trace"), tmp_path / "trace"
    state = theirs().state_dict()
    for found in (bomb, {"model": bomb}, {**state, "x": bomb}, {"model": theirs(), "y": bomb}):
        torch.save(found, tmp_path / "checkpoint.pt")
        try:
            quietly(tmp_path / "checkpoint.pt", heads=4)
        except hub.CheckpointError as error:
            assert "checkpoint.pt" in str(error) or "no NDT1" in str(error)
        assert not trace.exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert trace.exists()  # the bomb is a real one


class Writes(nn.Module):
    """Its program writes a file where it is loaded as TorchScript."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.x = torch.zeros(4, dtype=torch.uint8)

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        self.x = torch.from_file(state[0], True, 4, dtype=torch.uint8).fill_(65)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
def test_no_program_of_torchscript_runs(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "checkpoint.pt"
    torch.jit.script(Writes(str(trace))).save(str(path))
    with pytest.raises(hub.CheckpointError, match="TorchScript program"):
        from_official(path, TWO)
    assert not trace.exists()
    torch.jit.load(str(path))
    assert trace.read_bytes() == b"AAAA"  # the program is a real one


def test_a_checkpoint_cannot_change_torch(tmp_path):
    rebuild = torch._utils._rebuild_tensor_v2
    before = rebuild.__defaults__, rebuild.__doc__, dict(rebuild.__dict__)
    # BUILD on the function itself, as no honest pickler would write it
    evil = (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__"
            b"X\x06\x00\x00\x00spoilt\x85stb.")  # fmt: skip
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoint.pt")
    with (
        zipfile.ZipFile(tmp_path / "checkpoint.pt") as honest,
        zipfile.ZipFile(tmp_path / "evil.pt", "w") as changed,
    ):
        for name in honest.namelist():
            content = evil if name.endswith("data.pkl") else honest.read(name)
            changed.writestr(name, content)
    with pytest.raises(hub.CheckpointError, match="evil.pt"):
        from_official(tmp_path / "evil.pt", TWO)
    assert (rebuild.__defaults__, rebuild.__doc__, dict(rebuild.__dict__)) == before


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(hub.CheckpointError, match="not a readable file .*No such file"):
        from_official(path, TWO)
    torch.save(theirs().state_dict(), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", pickle.dumps({"a": 1}), whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(hub.CheckpointError, match="not a readable file of torch.save"):
            from_official(path, TWO)
    for thing in ([1, 2], {"a": 1}, torch.ones(3), {"model": 3}, {}):
        torch.save(thing, path)
        with pytest.raises(hub.CheckpointError, match="checkpoint.pt"):
            from_official(path, TWO)


def test_keys_that_do_not_fit_are_named():
    state = theirs().state_dict()
    up, norm = "encoder.layers.0.mlp.up_proj.bias", "encoder.layers.0.ln1.weight"
    for key, value, message in [
        (up, None, f"{up} is missing, needed: .16,."),
        (norm, torch.ones(9), rf"{norm} has shape \(9,\), needed: \(8,\)"),
        ("encoder.masker.extra", torch.ones(1), "encoder.masker.extra is unknown"),
        ("encoder.out_norm.weight", None, "no NDT1 or NDT2 .*encoder.out_norm.weight missing"),
        ("encoder.embedder.embed_pos.weight", torch.tensor(1.0), "embed_pos.weight missing or mis"),
        (official.TOKENS, torch.tensor(1.0), "embed_session.weight missing or misshapen"),
        (official.SPACE, torch.tensor(1.0), "embed_space_pos.0.weight missing or misshapen"),
    ]:
        broken = {k: v for k, v in (state | {key: value}).items() if v is not None}
        with pytest.raises(hub.CheckpointError, match=message):
            quietly(broken, heads=4)
    with pytest.raises(hub.CheckpointError, match="stitcher_dict.5.weight is missing"):
        quietly(state, {PAPER_EIDS[0]: 5}, heads=4)
    with pytest.raises(KeyError, match="'mine' has no row in their session embedding"):
        quietly(state, {"mine": 3}, heads=4)
    eids = ["mine", *PAPER_EIDS[1:]]
    assert quietly(state, {"mine": 3}, heads=4, eids=eids).session_names == ["mine"]
    unstitched = {k: v for k, v in state.items() if "stitch" not in k}
    with pytest.raises(hub.CheckpointError, match="without stitching"):
        quietly(unstitched, heads=4)


def test_what_is_not_used_is_named():
    state = theirs(tokens=False).state_dict()
    with pytest.warns(UserWarning, match="not used of the checkpoint: ") as caught:
        model = from_official(state, {"mine": 3}, heads=4)
    assert model.prompts == () and not model.config.session_token
    named = str(caught[0].message).partition(": ")[2].split(", ")
    assert sorted(named) == sorted(
        f"{part}.{kind}"
        for part in (
            "encoder.stitcher.stitcher_dict.4",
            "stitch_decoder.stitch_decoder_dict.4",
            "decoder.0",
        )
        for kind in ("weight", "bias")
    )


def test_sessions_that_their_ndt2_cannot_take(parity):
    state = torch.load(parity / "ndt2_no_prefix.pt", weights_only=True)["state_dict"]
    for n_neurons in (3, 17):
        with pytest.raises(
            hub.CheckpointError, match=f"{n_neurons} neurons; the authors. NDT2 takes 4"
        ):
            from_official(state, {"a": n_neurons}, heads=4)


def test_the_papers_sessions():
    assert len(set(PAPER_EIDS)) == 40 and all(len(eid) == 36 for eid in PAPER_EIDS)
