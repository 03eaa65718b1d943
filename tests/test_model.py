"""What may influence what, the parts against independent references, and the sizes."""

import numpy as np
import pytest
import torch
from torch import nn

from mtm import direct_paths
from mtm.masks import MTM_SCHEMES, SCHEMES, Mask, scheme
from mtm.model import Attention, Batch, MtM, MtMConfig, Tokens, rotate, rotation

N_BINS, N_NEURONS = 12, 10
REGIONS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, -1])
NDT2 = {"tokenizer": "ndt2", "patch_size": 4}  # 10 neurons fill two patches and a half
VARIANTS = [
    {},
    NDT2,
    {"positions": "rotary"},
    {"input_counts": "scaled"},
    {"input_counts": "scaled", "own_history": True, "latents": 3},
    {**NDT2, "positions": "rotary", "input_counts": "scaled", "own_history": True, "latents": 3},
]
variants = pytest.mark.parametrize("fields", VARIANTS, ids=str)


def small(depth=2, **fields):
    """Weights of the authors' initialisation, whose outputs depend on every input."""
    options = {"prompts": fields.pop("prompts", MTM_SCHEMES), "init": fields.pop("init", "paper")}
    options["causal"] = fields.pop("causal", True)
    sizes = {"width": 16, "heads": 2, "mlp_width": 32, "stitch_width": 12, "depth": depth}
    torch.manual_seed(0)
    config = MtMConfig.published(**(sizes | fields))
    model = MtM(config, N_BINS, {"a": N_NEURONS, "b": N_NEURONS}, **options).eval().double()
    if config.input_counts == "scaled":
        model.session_layers("a").mean += torch.linspace(0.1, 2.0, N_NEURONS)
    if config.latents:  # their maps start at 0
        for path in (model.session_layers(name).direct for name in "ab"):
            torch.nn.init.normal_(path.own)
            torch.nn.init.normal_(path.readout.weight)
    return model


def counts_of(seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.ones(batch, N_BINS, N_NEURONS), generator=generator).double()


def nothing_hidden(counts, causal=False):
    nothing = torch.zeros(counts.shape, dtype=torch.bool)
    return Mask(nothing, nothing, causal)


# ---------------------------------------------------------------- what may influence what


@variants
@pytest.mark.parametrize("name", SCHEMES)
def test_hidden_entries_cannot_influence_any_output(name, fields):
    model, counts = small(**fields), counts_of()
    mask = scheme(name).draw(counts, REGIONS, scheme(name).ratio, torch.Generator().manual_seed(1))
    changed = torch.where(mask.hidden, counts + 7, counts)
    same, other = (model(x, name, mask, "a") for x in (counts, changed))
    assert torch.equal(same, other)
    if not bool(mask.hidden.all()):  # and the visible ones do
        visible = torch.where(mask.hidden, counts, counts + 7)
        assert not torch.equal(same, model(visible, name, mask, "a"))


@pytest.mark.parametrize(
    "fields",
    [*VARIANTS, {"session_token": False}, {"prompts": ()}, {"prompts": (), "session_token": False}],
    ids=str,
)
def test_causal_mode_lets_no_future_input_reach_a_past_output(fields):
    model, counts = small(5, **fields), counts_of()
    mask = nothing_hidden(counts, causal=True)
    base = model(counts, "causal", mask, "a")
    for t in range(1, N_BINS):
        future = counts.clone()
        future[:, t:] += 5
        moved = (model(future, "causal", mask, "a") - base).abs().amax(dim=(0, 2))
        assert bool((moved[:t] == 0).all()), f"output before bin {t} moved"
        assert bool((moved[t:] > 0).all()), f"bins from {t} on must see their own input"
    assert not torch.equal(base, model(counts, "causal", None, "a"))  # full attention differs


def test_prompt_and_session_change_the_output_and_equal_sizes_stay_apart():
    model, counts = small(), counts_of()
    outs = [model(counts, p, None, s) for s in "ab" for p in (*model.prompts, None)]
    for i, one in enumerate(outs):
        assert not any(torch.allclose(one, other) for other in outs[i + 1 :])
    assert torch.equal(model(counts, "temporal", None, "a"), model(counts, None, None, "a"))


# ---------------------------------------------------------------- parts against references


@pytest.mark.parametrize("causal", [False, True])
def test_attention_against_torchs_own(causal):
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4, 0.0), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        parts = (ours.query, ours.key, ours.value)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    theirs.out_proj = ours.out
    x, bins = torch.randn(2, 7, 16), torch.arange(7)
    blocked = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=blocked)
    torch.testing.assert_close(ours(Tokens(x, bins, causal)), expected)
    allowed = None if blocked is None else ~blocked
    torch.testing.assert_close(ours(Tokens(x, bins, allowed=allowed)), expected)


def test_rotation_tells_how_far_bins_are_apart_and_not_when():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    turns = [rotation(torch.tensor([bin]), 8) for bin in range(-1, 30)]
    products = torch.tensor([[(rotate(q, *a) * rotate(k, *b)).sum() for b in turns] for a in turns])
    for distance in (-9, 0, 4):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=0)
    pairs = torch.view_as_complex(torch.stack([q[..., :4], q[..., 4:]], dim=-1))
    angle = 7 * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotate(q, *rotation(torch.tensor([7]), 8)), expected)


def test_patches_against_a_loop():
    """Tokens in order of time, then place; what is left of the last patch is empty."""
    model, counts = small(**NDT2), counts_of()
    tokenizer = model.tokenizer
    found = tokenizer(counts, model.session_layers("a"))
    assert found.shape == (3, N_BINS * 3, 16)
    for t in range(N_BINS):
        for place in range(3):
            patch = torch.zeros(3, 4, dtype=torch.float64)
            inside = counts[:, t, 4 * place : 4 * place + 4]
            patch[:, : inside.shape[1]] = inside
            x = tokenizer.embed_spikes(patch)
            x = tokenizer.project(x / (1 + x.abs()))
            x = x + tokenizer.space_norm(tokenizer.space[place])
            x = x + tokenizer.time_norm(tokenizer.time[t])
            torch.testing.assert_close(found[:, 3 * t + place], x)


@variants
def test_one_neuron_of_each_trial_is_read_out_as_from_all(fields):
    model, counts = small(**fields), counts_of()
    mask, neurons = nothing_hidden(counts, causal=True), torch.tensor([9, 0, 4])
    every = model.predict_log_rates(counts, "causal", mask, "a")
    found = model.predict_log_rates(counts, "causal", mask, "a", neurons)
    torch.testing.assert_close(found, every[torch.arange(3), :, neurons])


def test_dropout_acts_in_training_alone():
    model, counts = small(dropout=0.3, embed_dropout=0.3).float().train(), counts_of().float()
    tokens = torch.stack([model.embed(counts, "neuron", None, "a").x for _ in range(100)])
    assert (tokens == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    given = (counts, "neuron", nothing_hidden(counts), "a")
    assert not torch.equal(model(*given), model(*given))
    first, second = (model.predict_log_rates(*given) for _ in range(2))
    assert torch.equal(first, second) and model.training and not first.requires_grad


@pytest.mark.parametrize("fields", [{}, VARIANTS[-1]], ids=str)
def test_autocast_keeps_residuals_exact_and_a_model_compiles_in_one_piece(fields):
    model, counts = small(**fields).float(), counts_of().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.embed(counts, "neuron", None, "a").x.dtype == torch.float32
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    given = (counts, "causal", nothing_hidden(counts, causal=True), "a")
    torch.testing.assert_close(compiled(*given), model(*given))


# ---------------------------------------------------------------- direct paths


@pytest.mark.parametrize("causal", [False, True])
def test_own_history_against_a_loop(causal):
    path = direct_paths.DirectPaths(N_NEURONS, True, 0, 0.0).double()
    torch.nn.init.normal_(path.own)
    hidden = torch.rand(1, N_BINS, 1).lt(0.4).expand(1, N_BINS, N_NEURONS)
    x = counts_of(batch=1).masked_fill(hidden, 0)
    found = path.terms(x, hidden, torch.tensor([causal]))
    for t in range(N_BINS):
        others = [s for s in range(N_BINS) if not hidden[0, s, 0] and (s < t if causal else s != t)]
        expected = torch.zeros(N_NEURONS, dtype=torch.float64)
        for weight, scale in zip(path.own, (1, 3, 10, np.inf), strict=True):
            kernel = [np.exp(-abs(t - s) / scale) for s in others]
            total = sum(k * x[0, s] for k, s in zip(kernel, others, strict=True))
            expected = expected + weight * total / (sum(kernel) + 1)
        torch.testing.assert_close(found[0, t], expected)


def test_latents_are_the_posterior_mean_given_the_visible_neurons():
    """From the covariances of the joint Gaussian, of counts = loadings' z + noise."""
    path = direct_paths.DirectPaths(N_NEURONS, False, 3, 0.7).double().eval()
    with torch.no_grad():  # the readout hands on the latents of the bin itself
        path.readout.weight.zero_()
        path.readout.weight[:3, :3] = torch.eye(3)
        path.log_noise[0] = np.log(0.7)
    hidden = torch.rand(4, 1, N_NEURONS).lt(0.5).expand(4, N_BINS, N_NEURONS)
    x = torch.randn(4, N_BINS, N_NEURONS).double().masked_fill(hidden, 0)
    found = path.terms(x, hidden, torch.zeros(4, dtype=torch.bool))[..., :3]
    for trial in range(4):
        seen = ~hidden[trial, 0]
        loadings = path.loadings[:, seen]
        covariance = loadings.T @ loadings + 0.7 * torch.eye(int(seen.sum()))
        expected = x[trial][:, seen] @ torch.linalg.inv(covariance) @ loadings.T
        torch.testing.assert_close(found[trial], expected)


def test_latents_of_the_model_are_those_of_the_path_or_of_the_encoder():
    model, counts = small(**VARIANTS[-1]), counts_of()
    found, direct = model.latents(counts, "a"), model.session_layers("a").direct
    with torch.no_grad():  # the readout hands on the latents of the bin itself
        direct.own.zero_()
        direct.readout.weight.copy_(torch.eye(N_NEURONS, direct.readout.in_features))
    [added] = model.direct_log_rates([Batch(counts, None, nothing_hidden(counts), "a")])
    torch.testing.assert_close(found, added[..., :3])
    x = model.encode(model.embed(counts, None, None, "a"))[:, 1:].unflatten(1, (N_BINS, 3))
    found = model.latents(counts, "a", encoder=True)
    torch.testing.assert_close(found[..., 3:], x.mean(dim=2))


# ---------------------------------------------------------------- how a model starts, and sessions


@variants
def test_a_new_model_predicts_the_mean_counts(fields):
    means = np.linspace(0.05, 2.0, N_NEURONS)
    training = np.random.default_rng(0).poisson(means, (200, N_BINS, N_NEURONS)).astype(np.uint8)
    training[:, :, 3] = 0  # a silent neuron counts as half a spike
    model = small(**fields, init="mtm").float()
    model.add_session("new", N_NEURONS, training)
    rates = model(counts_of().float(), "neuron", None, "new").exp().mean((0, 1))
    expected = np.maximum(training.sum((0, 1)), 0.5) / (200 * N_BINS)
    np.testing.assert_allclose(rates.detach(), expected, rtol=0.3)
    assert model.prompt_tokens.std() < 0.1 and small().prompt_tokens.std() > 0.5


def test_components_are_what_the_neurons_share():
    """Two slow signals, seen by all neurons; directions and variances are those of numpy's SVD."""
    rng = np.random.default_rng(0)
    weights, signals = rng.normal(size=(2, 30)), rng.normal(size=(40, 4, 2))
    shared = np.repeat(signals, 10, axis=1) @ weights  # (40, 40, 30)
    counts = rng.poisson(np.exp(0.5 + 0.3 * shared))
    mean = counts.mean(axis=(0, 1))
    found = direct_paths.principal_components(counts, torch.from_numpy(mean).float())
    found, variances = (part.numpy() for part in found)
    assert found.shape == (30, 30)
    scaled = (counts - mean) / np.sqrt(mean + 0.1)
    smooth = np.stack([scaled[:, max(0, t - 2) : t + 3].mean(axis=1) for t in range(40)], axis=1)
    _, singular, expected = np.linalg.svd(smooth.reshape(-1, 30), full_matrices=False)
    np.testing.assert_allclose(np.linalg.svd(expected[:2] @ found[:, :2])[1], 1, atol=1e-3)
    centred = np.linalg.svd(smooth.reshape(-1, 30) - smooth.mean((0, 1)), compute_uv=False)
    np.testing.assert_allclose(variances[:2], centred[:2] ** 2 / 1600, rtol=1e-3)


def test_places_grow_with_the_largest_session():
    model = small(**NDT2)
    assert model.tokenizer.space.shape == (3, 16)
    parameter, before = model.tokenizer.space, model.tokenizer.space.detach().clone()
    for n_neurons in (1, 3, 4, 5, 41):
        model.add_session(str(n_neurons), n_neurons)
        counts = torch.ones(2, N_BINS, n_neurons, dtype=torch.float64)
        assert model(counts, None, None, str(n_neurons)).shape == counts.shape
    assert model.tokenizer.space.shape == (11, 16)
    assert torch.equal(model.tokenizer.space[:3], before) and model.tokenizer.space is parameter
    assert {p.dtype for p in model.parameters()} == {torch.float64}  # added in its precision


# ---------------------------------------------------------------- sizes, settings, errors


def test_paper_sizes():
    eids = {f"session {i}": 1 for i in range(37)} | {"a": 548, "b": 601, "c": 652}
    with torch.device("meta"):
        ndt1 = MtM(MtMConfig.published(), 100, eids)
        ndt2 = MtM(MtMConfig.published(tokenizer="ndt2"), 100, eids)
    assert ndt1.n_parameters()["core"] == 12_167_000
    sizes = ndt1.n_parameters()["sessions"]
    for name in "abc":
        assert sizes[name] == eids[name] * (668 + 512) + 668 + eids[name]
    # the authors' state dict: these three sessions, and a decoder that gets no gradient
    assert 12_167_000 + sum(sizes[name] for name in "abc") + 668 * 512 + 668 == 14_638_669
    assert ndt2.n_parameters()["core"] == 10_824_064
    assert ndt2.n_parameters()["sessions"] == eids  # a bias for each neuron


def test_session_names_of_any_kind():
    names = ["a.b", "a%2Eb", "keys", "core", "näme mit / allem", "a" * 200, "sub-01/ses 2"]
    model = small()
    for name in names:
        model.add_session(name, 4)
    assert model.session_names == ["a", "b", *names]
    assert list(model.n_parameters()["sessions"]) == ["a", "b", *names]


def test_errors_name_the_session_and_the_remedy():
    model = small()
    with pytest.raises(KeyError, match="does not know session 'c'; it knows: a, b"):
        model(counts_of(), None, None, "c")
    with pytest.raises(ValueError, match="session 'a': counts have shape"):
        model(counts_of()[:, :5], None, None, "a")
    with pytest.raises(ValueError, match="unknown masking scheme 'causl'; known: neuron"):
        model(counts_of(), "causl", None, "a")


def test_each_part_keeps_its_mode():
    model = MtM(MtMConfig.from_depth(1), 6, {"a": 3}).train()
    model.layers.eval()
    counts = np.ones((2, 6, 3))
    model.predict_log_rates(counts, None, None, "a")
    model.latents(counts, "a", encoder=True)
    with pytest.raises(KeyError, match="'nobody'"):
        model.predict_log_rates(counts, None, None, "nobody")
    assert model.training and model.norm.training and not model.layers[0].training
