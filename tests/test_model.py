"""What may influence what, the parts against independent references, and the sizes."""

import numpy as np
import pytest
import torch
from torch import nn

from mtm.masks import SCHEMES, Mask, scheme
from mtm.model import Attention, MtM, MtMConfig, waves

N_BINS, N_NEURONS = 12, 10
REGIONS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, -1])


def small(depth=2, **fields):
    sizes = {"width": 16, "heads": 2, "mlp_width": 32, "stitch_width": 12, "embed_width": 24}
    torch.manual_seed(0)
    config = MtMConfig(n_bins=N_BINS, depth=depth, **(sizes | {"init": "paper"} | fields))
    return MtM(config, {"a": N_NEURONS, "b": N_NEURONS}).eval().double()


def counts_of(seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.ones(batch, N_BINS, N_NEURONS), generator=generator).double()


@pytest.mark.parametrize("name", SCHEMES)
def test_hidden_entries_cannot_influence_any_output(name):
    model, counts = small(), counts_of()
    mask = scheme(name).draw(counts, REGIONS, scheme(name).ratio, torch.Generator().manual_seed(1))
    changed = torch.where(mask.hidden, counts + 7, counts)
    same, other = (model(x, "a", mask, prompt=name) for x in (counts, changed))
    assert torch.equal(same, other)
    if not bool(mask.hidden.all()):  # and the visible ones do
        visible = torch.where(mask.hidden, counts, counts + 7)
        assert not torch.equal(same, model(visible, "a", mask, prompt=name))


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize(
    "fields",
    [{}, {"session_token": False}, {"prompts": ()}, {"prompts": (), "session_token": False}],
)
def test_causal_mode_lets_no_future_input_reach_a_past_output(depth, fields):
    model, counts = small(depth, **fields), counts_of()
    nothing = torch.zeros_like(counts, dtype=torch.bool)
    mask = Mask(nothing, nothing, causal=True)
    base = model(counts, "a", mask, prompt="causal")
    for t in range(1, N_BINS):
        future = counts.clone()
        future[:, t:] += 5
        moved = (model(future, "a", mask, prompt="causal") - base).abs().amax(dim=(0, 2))
        assert bool((moved[:t] == 0).all()), f"output before bin {t} moved"
        assert bool((moved[t:] > 0).all()), f"bins from {t} on must see their own input"
    assert not torch.equal(
        base, model(counts, "a", None, prompt="causal")
    )  # full attention differs


def test_gradients_agree_that_causal_mode_is_causal():
    model, counts = small(5), counts_of(batch=1).requires_grad_()
    nothing = torch.zeros(counts.shape, dtype=torch.bool)
    out = model(counts, "a", Mask(nothing, nothing, causal=True), prompt="causal")
    for t in (0, 4, N_BINS - 1):
        (gradient,) = torch.autograd.grad(out[0, t].sum(), counts, retain_graph=True)
        reach = gradient[0].abs().sum(dim=1)
        assert bool((reach[t + 1 :] == 0).all()) and bool((reach[: t + 1] > 0).all())


def test_prompt_and_session_change_the_output_and_equal_sizes_stay_apart():
    model, counts = small(), counts_of()
    outs = [model(counts, s, None, prompt=p) for s in "ab" for p in (*model.config.prompts, None)]
    for i, one in enumerate(outs):
        assert not any(torch.allclose(one, other) for other in outs[i + 1 :])
    assert torch.equal(
        model(counts, "a", None, prompt="temporal"), model(counts, "a", None, prompt=None)
    )


def test_trials_of_a_batch_do_not_see_each_other():
    model, counts = small(), counts_of()
    alone = torch.cat([model(x[None], "a", None, prompt="neuron") for x in counts])
    torch.testing.assert_close(model(counts, "a", None, prompt="neuron"), alone)


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
    torch.testing.assert_close(ours(x, causal), expected)


def test_a_new_model_predicts_the_mean_counts():
    means = np.linspace(0.01, 2.0, N_NEURONS)
    model = small(init="mtm").float()
    model.add_session("new", N_NEURONS, means)
    rates = model(counts_of().float(), "new", None, prompt="neuron").exp().mean((0, 1))
    np.testing.assert_allclose(rates.detach(), means, rtol=0.2)
    assert model.prompt.std() < 0.1 and small(init="paper").position.std() > 0.5


def test_time_embeddings_start_with_neighbours_alike():
    start = waves(100, 64)
    similar = start @ start.T / (start @ start.T).diagonal()[0]
    assert bool((similar.diagonal(1) > 0.8).all())
    assert bool((similar.diagonal(1) > similar.diagonal(5).max()).all())
    assert bool((similar.diagonal(60).abs() < 0.8).all())


def test_paper_sizes():
    model = MtM(MtMConfig(), {"eid": 676})
    sizes = model.n_parameters()
    assert sizes["eid"] == 676 * (668 + 512) + 668 + 676 + 512  # maps, and the session's token
    # the published core counts 40 session tokens as shared; here each belongs to its session
    assert sizes["core"] + 40 * 512 == 12_167_000
    assert MtMConfig.from_depth(5) == MtMConfig()


def test_predict_leaves_the_model_as_it_was(sessions):
    model = small(dropout=0.5).train()
    counts = counts_of()
    nothing = torch.zeros(counts.shape, dtype=torch.bool)
    first, second = (model.predict(counts, "neuron", Mask(nothing, nothing), "a") for _ in range(2))
    assert torch.equal(first, second) and model.training and not first.requires_grad


def test_a_model_never_trained_causally_is_not_used_causally():
    model, counts = small(causal=False), counts_of()
    nothing = torch.zeros(counts.shape, dtype=torch.bool)
    full, causal = (
        model.predict(counts, "causal", Mask(nothing, nothing, causal=c), "a")
        for c in (False, True)
    )
    assert torch.equal(full, causal)


def test_session_names_of_any_kind():
    names = ["a.b", "a%2Eb", "keys", "näme mit / allem", "a" * 200, "sub-01/ses 2"]
    model = small()
    for name in names:
        model.add_session(name, 4)
    assert model.session_names == ["a", "b", *names]


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
    with pytest.raises(ValueError, match="depth must be at least 1"):
        MtMConfig.from_depth(0)
