"""What may influence what, the parts against independent references, and the sizes."""

import numpy as np
import pytest
import torch
from torch import nn

from mtm import model as model_module
from mtm.masks import SCHEMES, Mask, scheme
from mtm.model import (
    AS_PUBLISHED,
    Attention,
    MtM,
    MtMConfig,
    Pattern,
    SessionMaps,
    attend,
    dropout,
    keep_,
    rotate,
    rotation,
    waves,
)

N_BINS, N_NEURONS = 12, 10
REGIONS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, -1])
NDT2 = {"tokenizer": "ndt2", "patch_size": 4, "n_patches": 2}  # 10 neurons fill two and a half
VARIANTS = [
    {},
    NDT2,
    {"positions": "rotary"},
    {"hidden_input": "token"},
    {"hidden_input": "indicator"},
    {"input_transform": "log1p"},
    {"input_transform": "scaled"},
    {**NDT2, "input_transform": "scaled", "hidden_input": "token"},
    {**NDT2, "positions": "rotary", "hidden_input": "indicator"},
    {**NDT2, "input_transform": "log1p", "hidden_input": "token"},
]


def small(depth=2, **fields):
    sizes = {"width": 16, "heads": 2, "mlp_width": 32, "stitch_width": 12}
    torch.manual_seed(0)
    config = MtMConfig(n_bins=N_BINS, depth=depth, **(sizes | AS_PUBLISHED | fields))
    model = MtM(config, {"a": N_NEURONS, "b": N_NEURONS}).eval().double()
    if config.input_transform == "scaled":
        model._maps("a").mean += torch.linspace(0.1, 2.0, N_NEURONS)
    return model


def counts_of(seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.ones(batch, N_BINS, N_NEURONS), generator=generator).double()


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
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


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize(
    "fields",
    [*VARIANTS, {"session_token": False}, {"prompts": ()}, {"prompts": (), "session_token": False}],
    ids=str,
)
def test_causal_mode_lets_no_future_input_reach_a_past_output(depth, fields):
    model, counts = small(depth, **fields), counts_of()
    nothing = torch.zeros_like(counts, dtype=torch.bool)
    mask = Mask(nothing, nothing, causal=True)
    base = model(counts, "causal", mask, "a")
    for t in range(1, N_BINS):
        future = counts.clone()
        future[:, t:] += 5
        moved = (model(future, "causal", mask, "a") - base).abs().amax(dim=(0, 2))
        assert bool((moved[:t] == 0).all()), f"output before bin {t} moved"
        assert bool((moved[t:] > 0).all()), f"bins from {t} on must see their own input"
    assert not torch.equal(base, model(counts, "causal", None, "a"))  # full attention differs


@pytest.mark.parametrize("fields", [{}, NDT2], ids=str)
def test_gradients_agree_that_causal_mode_is_causal(fields):
    model, counts = small(5, **fields), counts_of(batch=1).requires_grad_()
    nothing = torch.zeros(counts.shape, dtype=torch.bool)
    out = model(counts, "causal", Mask(nothing, nothing, causal=True), "a")
    for t in (0, 4, N_BINS - 1):
        (gradient,) = torch.autograd.grad(out[0, t].sum(), counts, retain_graph=True)
        reach = gradient[0].abs().sum(dim=1)
        assert bool((reach[t + 1 :] == 0).all()) and bool((reach[: t + 1] > 0).all())


def test_prompt_and_session_change_the_output_and_equal_sizes_stay_apart():
    model, counts = small(), counts_of()
    outs = [model(counts, p, None, s) for s in "ab" for p in (*model.config.prompts, None)]
    for i, one in enumerate(outs):
        assert not any(torch.allclose(one, other) for other in outs[i + 1 :])
    assert torch.equal(model(counts, "temporal", None, "a"), model(counts, None, None, "a"))


def test_trials_of_a_batch_do_not_see_each_other():
    model, counts = small(), counts_of()
    alone = torch.cat([model(x[None], "neuron", None, "a") for x in counts])
    torch.testing.assert_close(model(counts, "neuron", None, "a"), alone)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_against_torchs_own(causal):
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4, 0.0), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        parts = (ours.query, ours.key, ours.value)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    theirs.out_proj = ours.out
    x = torch.randn(2, 7, 16)
    blocked = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=blocked)
    torch.testing.assert_close(ours(x, Pattern(causal=causal)), expected)
    allowed = None if blocked is None else ~blocked
    torch.testing.assert_close(ours(x, Pattern(allowed=allowed)), expected)


def test_a_new_model_predicts_the_mean_counts():
    means = np.linspace(0.01, 2.0, N_NEURONS)
    model = small(init="mtm").float()
    model.add_session("new", N_NEURONS, means)
    rates = model(counts_of().float(), "neuron", None, "new").exp().mean((0, 1))
    np.testing.assert_allclose(rates.detach(), means, rtol=0.2)
    assert model.prompt.std() < 0.1 and small(init="paper").tokenizer.time.std() > 0.5


@pytest.mark.parametrize("fields", [{}, {"hidden_input": "indicator"}], ids=str)
def test_a_map_can_start_with_directions_of_the_counts(fields):
    """12 outputs look at 5 directions, both ways, on top of what they look at anyway."""
    directions = torch.linalg.qr(torch.randn(N_NEURONS, 5))[0]
    weights = []
    for components in (None, directions):
        model = small(init="mtm", **fields)
        model.add_session("new", N_NEURONS, components=components)
        weights.append(model._maps("new").stitch.weight.detach())
    gained = (weights[1] - weights[0]).float()
    sign = [1] * 5 + [-1] * 5 + [1] * 2
    for i in range(12):
        torch.testing.assert_close(gained[i, :N_NEURONS], 3.0 * sign[i] * directions[:, i % 5])
    assert not gained[:, N_NEURONS:].any()
    elsewhere = SessionMaps(N_NEURONS, MtMConfig.from_depth(1)).to("meta")
    elsewhere.look_at(directions)  # directions come from the device of the counts
    with pytest.raises(ValueError, match="'more': components must be .11, any number.*10, 5"):
        model.add_session("more", 11, components=directions)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_variant_starts_at_the_mean_counts(fields):
    means = np.linspace(0.01, 2.0, N_NEURONS)
    model = small(**{**fields, "init": "mtm"}).float()
    model.add_session("new", N_NEURONS, means)
    rates = model(counts_of().float(), "neuron", None, "new").exp().mean((0, 1))
    np.testing.assert_allclose(rates.detach(), means, rtol=0.25)


def test_time_embeddings_start_with_neighbours_alike():
    start = waves(100, 64)
    similar = start @ start.T / (start @ start.T).diagonal()[0]
    assert bool((similar.diagonal(1) > 0.8).all())
    assert bool((similar.diagonal(1) > similar.diagonal(5).max()).all())
    assert bool((similar.diagonal(60).abs() < 0.8).all())


def test_paper_sizes():
    eids = {f"session {i}": 1 for i in range(37)} | {"a": 548, "b": 601, "c": 652}
    with torch.device("meta"):
        ndt1 = MtM(MtMConfig(**AS_PUBLISHED), eids)
        whole = {name: max(n, 128) for name, n in eids.items()}  # a patch at least
        ndt2 = MtM(MtMConfig(tokenizer="ndt2", leak=True, **AS_PUBLISHED), whole)
    assert ndt1.n_parameters()["core"] == 12_167_000
    sizes = ndt1.n_parameters()["sessions"]
    for name in "abc":
        assert sizes[name] == eids[name] * (668 + 512) + 668 + eids[name]
    # the authors' state dict: these three sessions, and a decoder that gets no gradient
    assert 12_167_000 + sum(sizes[name] for name in "abc") + 668 * 512 + 668 == 14_638_669
    assert ndt2.n_parameters()["core"] == 10_824_064
    assert set(ndt2.n_parameters()["sessions"].values()) == {0}
    assert MtMConfig.from_depth(5) == MtMConfig()


def test_the_summary_adds_up():
    model = small()
    lines = model.summary().splitlines()
    numbers = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in lines[1:]}
    numbers = {name: int(value.replace(",", "")) for name, value in numbers.items()}
    parts = ["tokenizer", "prompt tokens", "session tokens", "layers (2)", "final norm"]
    assert sum(numbers[part] for part in parts) == numbers["core, all of these"]
    sessions = [numbers[f"session {name!r}, 10 neurons"] for name in "ab"]
    assert numbers["core, all of these"] + sum(sessions) == numbers["total"]
    assert numbers["total"] == sum(p.numel() for p in model.parameters())
    assert numbers["prompt tokens"] == 4 * 16 and numbers["session tokens"] == 2 * 16


# ------------------------------------------------------------------------------------------ patches


def test_patches_against_a_loop():
    """Tokens in order of time, then place; what is left of the last patch is empty."""
    model, counts = small(**NDT2), counts_of()
    maps, tokenizer = model._maps("a"), model.tokenizer
    found = tokenizer(counts[:, :, None], maps)
    assert found.shape == (3, N_BINS * 3, 16)
    for t in range(N_BINS):
        for place in range(3):
            patch = torch.zeros(3, 4, dtype=torch.float64)
            inside = counts[:, t, 4 * place : 4 * place + 4]
            patch[:, : inside.shape[1]] = inside
            x = tokenizer.embed_spikes(patch)
            x = tokenizer.project(x / (1 + x.abs()))
            x = (
                x
                + tokenizer.space_norm(tokenizer.space[place])
                + tokenizer.time_norm(tokenizer.time[t])
            )
            torch.testing.assert_close(found[:, 3 * t + place], x)


def test_no_neuron_is_shown_twice():
    """A last patch that is not full: the same as with silent neurons that fill it."""
    model = small(**NDT2)
    model.add_session("filled", 12)
    model._maps("filled").token.data.copy_(model._maps("a").token)
    counts = counts_of()
    filled = torch.cat([counts, torch.zeros(3, N_BINS, 2, dtype=torch.float64)], dim=2)
    expected = model(filled, "neuron", None, "filled")[:, :, :10]
    torch.testing.assert_close(model(counts, "neuron", None, "a"), expected)


def test_places_grow_with_the_largest_session():
    model = small(**NDT2)
    assert model.tokenizer.space.shape == (3, 16)
    before = model.tokenizer.space.detach().clone()
    for n_neurons in (1, 3, 4, 5, 41):
        model.add_session(str(n_neurons), n_neurons)
        counts = torch.ones(2, N_BINS, n_neurons, dtype=torch.float64)
        assert model.double()(counts, str(n_neurons)).shape == counts.shape
    assert model.tokenizer.space.shape == (11, 16)
    assert torch.equal(model.tokenizer.space[:3], before)


# ---------------------------------------------------------------------------------- many sessions


@pytest.mark.parametrize("fields", [{}, NDT2, {**NDT2, "leak": True, "n_patches": 3}], ids=str)
def test_many_batches_in_one_pass_equal_one_after_the_other(fields):
    model = small(**fields)
    model.add_session("small", 5)
    model.double()
    draw = torch.Generator().manual_seed(0)
    batches = []
    for session, name, trials in [
        ("a", "neuron", 3),
        ("b", "causal", 2),
        ("small", "causal", 4),
        ("b", "temporal", 1),
        ("a", "causal", 2),
    ]:
        n_neurons = model._maps(session).n_neurons
        counts = counts_of(batch=trials)[..., :n_neurons]
        mask = scheme(name).draw(counts, REGIONS[:n_neurons], 0.5, draw)
        batches.append((counts, session, mask, name))
    together = model.forward_many(batches)
    for batch, log_rates in zip(batches, together, strict=True):
        torch.testing.assert_close(log_rates, model(*batch))


def test_a_new_token_can_start_at_the_mean_of_the_others():
    model = small()
    model.add_session("c", 4, token="mean")
    tokens = [model._maps(name).token for name in "abc"]
    torch.testing.assert_close(tokens[2].double(), (tokens[0] + tokens[1]) / 2)
    with pytest.raises(ValueError, match="no other session to take the mean token of"):
        MtM(MtMConfig.from_depth(1)).add_session("a", 3, token="mean")
    with pytest.raises(ValueError, match="session 'd': token must be 'new' or 'mean'"):
        model.add_session("d", 3, token="old")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, NDT2], ids=str)
def test_a_session_is_added_in_the_models_precision(dtype, fields):
    model = small(**fields).to(dtype)
    model.add_session("larger", 30, np.ones(30))
    assert model(torch.ones(2, N_BINS, 30), "larger").dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_residuals_stay_exact_under_autocast(fields):
    model = small(**fields).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.embed(counts_of().float(), "neuron", None, "a")
    assert tokens.x.dtype == torch.float32


def test_a_model_compiles_in_one_piece():
    model, counts = small().float(), counts_of().float()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(counts, "neuron", None, "a"), model(counts, "neuron", None, "a")
    )


# ------------------------------------------------------------------------ the authors' attention


@pytest.mark.parametrize("tokenizer", ["ndt1", "ndt2"])
@pytest.mark.parametrize("n_front", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_their_attention_against_a_loop(tokenizer, n_front, causal):
    """As their code is described: a token's number modulo T for its bin, tokens in front open both
    ways, padding looked at by itself alone. Trial 0 lacks its last two bins."""
    n_bins, n_patches, n_neurons, size = 5, 3, 7, 4
    fields = {"prompts": ("causal",) if n_front == 2 else (), "session_token": n_front > 0}
    model = MtM(
        MtMConfig(
            n_bins=n_bins, tokenizer=tokenizer, patch_size=size, n_patches=n_patches, leak=True,
            width=8, heads=2, depth=1, mlp_width=8, stitch_width=6, **AS_PUBLISHED, **fields,
        ),
        {"a": n_neurons},
    ).eval()  # fmt: skip
    counts = torch.ones(2, n_bins, n_neurons)
    counts[0, -2:] = -1
    tokens = model.embed(counts, "causal", None, "a")
    found = model_module.pattern_of(tokens, causal, model.config).allowed
    per_bin = n_patches if tokenizer == "ndt2" else 1
    length = n_front + n_bins * per_bin
    assert tokens.n_front == n_front and found.shape == (2, 1, length, length)
    for trial in range(2):
        for query in range(length):
            for key in range(length):
                i, j = query - n_front, key - n_front
                allowed = not causal or i < 0 or j < 0 or j % n_bins <= i % n_bins
                if j >= 0:
                    padded_bin = trial == 0 and j // per_bin >= n_bins - 2
                    empty_patch = tokenizer == "ndt2" and (j % per_bin) * size >= n_neurons
                    allowed = allowed and not padded_bin and not empty_patch
                assert bool(found[trial, 0, query, key]) == (allowed or query == key)


# ------------------------------------------------------------------------------- what is shown


def test_what_stands_where_an_entry_is_hidden():
    counts = counts_of()
    hidden = torch.rand(counts.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = Mask(hidden, hidden)
    zeros, token, indicator = (small(hidden_input=kind) for kind in ("zeros", "token", "indicator"))
    shown = zeros._show(counts, mask, zeros._maps("a"))
    assert torch.equal(shown[:, :, 0], counts * ~hidden)
    token._maps("a").fill.data.copy_(torch.arange(10.0))
    shown = token._show(counts, mask, token._maps("a"))[:, :, 0]
    assert torch.equal(shown, torch.where(hidden, torch.arange(10.0).double(), counts))
    shown = indicator._show(counts, mask, indicator._maps("a"))
    assert torch.equal(shown[:, :, 0], counts * ~hidden)
    assert torch.equal(shown[:, :, 1], hidden.double())
    assert not indicator._show(counts, None, indicator._maps("a"))[:, :, 1].any()
    scaled = small(input_transform="scaled")
    mean = scaled._maps("a").mean
    shown = scaled._show(counts, mask, scaled._maps("a"))[:, :, 0]
    expected = torch.where(hidden, 0.0, (counts - mean) / (mean + 0.1) ** 0.5)
    torch.testing.assert_close(shown, expected)
    log = small(input_transform="log1p")
    assert torch.equal(log._show(counts, mask, log._maps("a"))[:, :, 0], (counts * ~hidden).log1p())


def test_an_indicator_tells_hidden_from_silent():
    silent = torch.zeros(2, N_BINS, N_NEURONS, dtype=torch.float64)
    hidden = torch.zeros_like(silent, dtype=torch.bool)
    hidden[:, :, 3] = True
    for kind in ("zeros", "indicator"):
        model = small(hidden_input=kind)
        same = torch.equal(model(silent, "a", Mask(hidden, hidden)), model(silent, "a", None))
        assert same == (kind == "zeros")


# ------------------------------------------------------------------------------- rotary positions


def test_rotary_products_depend_on_the_time_between_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    products = {}
    for i in range(6):
        for j in range(6):
            turned = [rotate(x, *rotation(torch.tensor([t]), 8)) for x, t in ((q, i), (k, j))]
            products.setdefault(i - j, []).append(float((turned[0] * turned[1]).sum()))
    for values in products.values():
        np.testing.assert_allclose(values, values[0], atol=1e-5)
    assert len({round(values[0], 6) for values in products.values()}) == 11


def test_rotation_is_multiplication_of_complex_numbers():
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    bins = torch.arange(5)
    speeds = 10_000.0 ** (-np.arange(4) / 4)
    turn = torch.from_numpy(np.exp(1j * bins.numpy()[:, None] * speeds))
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    found = rotate(x, *rotation(bins.double(), 8))
    torch.testing.assert_close(found, torch.cat([expected.real, expected.imag], dim=-1))


def test_rotary_has_no_learned_time_and_knows_the_order():
    model, counts = small(positions="rotary"), counts_of()
    assert model.tokenizer.time is None
    forward = model(counts, "neuron", None, "a")
    backward = model(counts.flip(1), "neuron", None, "a").flip(1)
    assert not torch.allclose(forward, backward)


# -------------------------------------------------------------------------------------- dropout


def test_dropout_on_a_cpu():
    torch.manual_seed(0)
    x = torch.ones(401, 503, dtype=torch.float64, requires_grad=True)  # no multiple of four
    for p in (0.1, 0.4, 0.9):
        y = dropout(x, p, training=True)
        kept = y != 0
        assert kept.double().mean().item() == pytest.approx(1 - p, abs=4e-3)
        (factor,) = set(y[kept].tolist())
        dropped = 256 * (1 - 1 / factor)
        assert dropped == pytest.approx(round(dropped), abs=1e-9) and abs(dropped - 256 * p) < 1
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, y.detach())  # the same entries, the same factor
        neighbours = (kept[:, 1:] == kept[:, :-1]).double().mean().item()
        assert neighbours == pytest.approx(p**2 + (1 - p) ** 2, abs=5e-3)
    assert torch.equal(dropout(x, 0.4, training=False), x)
    torch.manual_seed(1)
    one = dropout(x, 0.4, training=True)
    torch.manual_seed(1)
    assert torch.equal(one, dropout(x, 0.4, training=True))
    assert not torch.equal(one, dropout(x, 0.4, training=True))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.4, 0.9985])
def test_dropout_drops_the_share_asked_for_on_average(p):
    generator = torch.Generator().manual_seed(0)
    draws = [keep_(torch.empty(1000), p, generator) for _ in range(3000)]
    dropped = torch.stack([(factors == 0).float().mean() for factors in draws])
    assert dropped.mean().item() == pytest.approx(p, abs=5e-4 if p < 0.99 else 3e-3)
    means = torch.stack([factors.mean() for factors in draws])  # what is kept makes up for it
    assert means.mean().item() == pytest.approx(1.0, abs=4 * (means.std() / 3000**0.5).item())


def looking(kind, length):
    """Who may look at whom, (length, length) or (3 trials, 1, length, length)."""
    blocks = torch.arange(length) // 2
    random = torch.rand(3, 1, length, length, generator=torch.Generator().manual_seed(0)) < 0.3
    return {
        "full": torch.ones(length, length, dtype=torch.bool),
        "causal": torch.ones(length, length, dtype=torch.bool).tril(),
        "allowed": blocks[:, None] >= blocks,
        "by trial": random | torch.eye(length, dtype=torch.bool),
    }[kind]


def dropped_attention(kind, q, k, v, seed):
    given = None if kind in ("full", "causal") else looking(kind, q.shape[2])
    torch.manual_seed(seed)
    return attend(q, k, v, Pattern(causal=kind == "causal", allowed=given), 0.4)


@pytest.mark.parametrize("queries", [1, 3, 4, 160])
@pytest.mark.parametrize("kind", ["full", "causal", "allowed", "by trial"])
def test_attention_with_dropout_against_autograd(kind, queries, monkeypatch):
    """Value and gradients, with the very factors that it draws, in blocks and all at once."""
    monkeypatch.setattr(model_module, "QUERIES", queries)
    torch.manual_seed(0)
    length = 11
    inputs = [
        torch.randn(3, 2, length, length, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    found = dropped_attention(kind, *inputs, seed=3)
    allowed = looking(kind, length)
    q, k, v = inputs
    # Where all scores are alike and the values tell the keys apart, what comes out are the factors.
    silent, telling = torch.zeros_like(q), torch.eye(length, dtype=torch.float64).expand_as(q)
    factors = dropped_attention(kind, silent, silent, telling, seed=3)
    factors = factors.detach() * allowed.sum(dim=-1, keepdim=True)
    assert not factors.masked_fill(allowed, 0).any()
    assert 0.3 < (factors.masked_select(allowed) == 0).double().mean() < 0.5
    scores = (q @ k.transpose(2, 3) / length**0.5).masked_fill(~allowed, -torch.inf)
    expected = (scores.softmax(dim=-1) * factors) @ v
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("queries", [2, 160])
@pytest.mark.parametrize("kind", ["full", "causal", "allowed", "by trial"])
def test_attention_with_dropout_against_differences(kind, queries, monkeypatch):
    monkeypatch.setattr(model_module, "QUERIES", queries)
    torch.manual_seed(0)
    inputs = [torch.randn(3, 2, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: dropped_attention(kind, *x, seed=3), inputs)


def test_attention_in_blocks_without_dropout_is_torchs_own(monkeypatch):
    """Every block of queries, through a dropout that all but never drops."""
    monkeypatch.setattr(model_module, "QUERIES", 5)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 23, 8) for _ in range(3))
    for pattern in (Pattern(), Pattern(causal=True), Pattern(allowed=looking("allowed", 23))):
        torch.manual_seed(0)
        found = attend(q, k, v, pattern, 1e-9)
        torch.testing.assert_close(found, attend(q, k, v, pattern, 0.0))


def test_training_never_keeps_the_attention_weights():
    """What is kept for the gradient grows with the number of tokens, not with its square."""
    kept = {}
    for n_bins in (32, 64):
        sizes = {"width": 16, "heads": 8, "depth": 1, "mlp_width": 16, "stitch_width": 8}
        model = MtM(MtMConfig(n_bins=n_bins, **sizes), {"a": 4}).train()
        total = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, total=total: total.append(x.numel()) or x, lambda x: x
        ):
            model(torch.ones(4, n_bins, 4), "a")
        kept[n_bins] = sum(total)
    assert kept[64] < 2 * kept[32]


@pytest.mark.parametrize(
    "fields", [*VARIANTS, {"leak": True}, {**NDT2, "n_patches": 4, "leak": True}], ids=str
)
@pytest.mark.parametrize("name", ["neuron", "causal"])
def test_one_neuron_of_each_trial_can_be_read_out(name, fields):
    model, counts = small(**fields), counts_of(batch=4)
    mask = scheme(name).draw(counts, REGIONS, 0.3, torch.Generator().manual_seed(1))
    neurons = torch.tensor([0, 9, 4, 9])
    whole = model.predict_log_rates(counts, name, mask, "a")
    one = model.predict_log_rates(counts, name, mask, "a", neurons)
    assert one.shape == (4, N_BINS)
    torch.testing.assert_close(one, whole[torch.arange(4), :, neurons], atol=1e-12, rtol=0)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_model_that_does_not_see_the_mask_takes_hidden_for_silent(fields):
    model, counts = small(**fields), counts_of()
    for maps in model.sessions.values():
        if model.config.hidden_input == "token":
            nn.init.ones_(maps.fill)
    counts[:, :, 3] = 0
    nobody = torch.zeros_like(counts, dtype=torch.bool)
    third = nobody.clone()
    third[:, :, 3] = True
    hidden, shown = (model(counts, "neuron", Mask(m, m), "a") for m in (third, nobody))
    assert torch.equal(hidden, shown) != model.sees_mask


def test_predict_leaves_the_model_as_it_was(sessions):
    model = small(dropout=0.5).train()
    counts = counts_of()
    nothing = torch.zeros(counts.shape, dtype=torch.bool)
    first, second = (
        model.predict_log_rates(counts, "neuron", Mask(nothing, nothing), "a") for _ in range(2)
    )
    assert torch.equal(first, second) and model.training and not first.requires_grad


def test_a_model_never_trained_causally_is_not_used_causally():
    model, counts = small(causal=False), counts_of()
    nothing = torch.zeros(counts.shape, dtype=torch.bool)
    full, causal = (
        model.predict_log_rates(counts, "causal", Mask(nothing, nothing, causal=c), "a")
        for c in (False, True)
    )
    assert torch.equal(full, causal)


def test_session_names_of_any_kind():
    names = ["a.b", "a%2Eb", "keys", "core", "näme mit / allem", "a" * 200, "sub-01/ses 2"]
    model = small()
    for name in names:
        model.add_session(name, 4)
    assert model.session_names == ["a", "b", *names]
    assert list(model.n_parameters()["sessions"]) == ["a", "b", *names]
    assert "session 'core', 4 neurons" in model.summary()


def test_errors_name_the_session_and_the_remedy():
    model = small()
    with pytest.raises(KeyError, match="no session 'c'; it knows: a, b"):
        model(counts_of(), "c")
    with pytest.raises(ValueError, match="session 'a': counts have shape"):
        model(counts_of()[:, :5], "a")
    with pytest.raises(ValueError, match="session 'a' is in the model already"):
        model.add_session("a", 3)
    with pytest.raises(ValueError, match="above 0"):
        MtM(MtMConfig.from_depth(1), {}).add_session("x", 2, np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="multiple of heads"):
        MtMConfig(width=10, heads=3)
    with pytest.raises(ValueError, match="tokenizer must be one of ndt1, ndt2; got 'ndt3'"):
        MtMConfig(tokenizer="ndt3")
    with pytest.raises(ValueError, match="prompts must be a list of names, got 'neuron'"):
        MtMConfig(prompts="neuron")
    with pytest.raises(ValueError, match="leak is for the authors' checkpoints only"):
        MtMConfig(leak=True)
    leaking = MtM(MtMConfig(tokenizer="ndt2", leak=True, **AS_PUBLISHED))
    for n_neurons in (127, 769):
        with pytest.raises(ValueError, match=rf"'a' has {n_neurons} neurons; the authors' NDT2"):
            leaking.add_session("a", n_neurons)
    with pytest.raises(ValueError, match="positions must be one of learned, rotary"):
        MtMConfig(positions="sines")
    with pytest.raises(ValueError, match="rotary positions need an even width for each head"):
        MtMConfig(width=24, heads=8, positions="rotary")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        MtMConfig(dropout=1)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        MtMConfig.from_depth(0)
