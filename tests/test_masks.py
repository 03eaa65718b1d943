"""Every masking scheme against its definition, entry by entry."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtm import masks
from mtm.masks import MTM_SCHEMES, PADDING, SCHEMES, MaskSampler, scheme


@st.composite
def batches(draw):
    """Counts and region codes: one region, one-neuron regions, no label, padding, silence."""
    n_trials, n_bins = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    codes = draw(st.lists(st.integers(-1, 3), min_size=1, max_size=9))
    present = sorted({c for c in codes if c >= 0})
    codes = [present.index(c) if c >= 0 else -1 for c in codes]
    codes += [PADDING] * draw(st.integers(0, 3))
    counts = torch.zeros(n_trials, n_bins, len(codes), dtype=torch.uint8)
    if draw(st.booleans()):  # else every neuron is silent
        counts += torch.randint(0, 4, counts.shape, dtype=torch.uint8)
    return counts, torch.tensor(codes)


def draw_mask(name, counts, regions, seed, ratio=None):
    kind = scheme(name)
    generator = torch.Generator().manual_seed(seed)
    return kind.draw(counts, regions, kind.ratio if ratio is None else ratio, generator)


def is_constant(x, axis):
    return bool((x == x.select(axis, 0).unsqueeze(axis)).all())


@given(batches(), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_each_scheme_hides_what_its_definition_says(batch, seed):
    counts, regions = batch
    real = regions != PADDING
    for name, kind in SCHEMES.items():
        if kind.needs_regions and not (regions >= 0).any():
            with pytest.raises(ValueError, match="no neuron has a region label"):
                draw_mask(name, counts, regions, seed)
            continue
        before = counts.clone()
        mask = draw_mask(name, counts, regions, seed)
        assert torch.equal(counts, before)  # never in place
        hidden, target = mask.hidden, mask.target
        assert hidden.shape == target.shape == counts.shape
        assert hidden.dtype == target.dtype == torch.bool
        assert target.any()
        assert not (target & ~hidden).any()
        assert not hidden[:, :, ~real].any()  # padding is neither hidden nor scored
        assert mask.causal == (name == "causal")
        for b in range(len(counts)):  # and now one trial at a time, against the words
            h, t = hidden[b], target[b]
            if name == "neuron":
                assert is_constant(h, 0) and torch.equal(h, t)
            elif name in ("temporal", "causal"):
                assert is_constant(h[:, real], 1) and torch.equal(h, t)
            elif name == "random-token":
                assert torch.equal(h, t) and is_constant(h[:, real][:, :128], 1)
            elif name == "inter-region":
                assert torch.equal(h, t) and is_constant(h, 0)
                (code,) = set(regions[h[0]].tolist())
                assert code >= 0 and torch.equal(h[0], regions == code)
            elif name == "intra-region":
                assert is_constant(h, 0) and is_constant(t, 0)
                codes = set(regions[target.any(0).any(0)].tolist())
                assert len(codes) == 1 and min(codes) >= 0
                outside = (regions != min(codes)) & real
                assert h[0, outside].all() and not t[0, outside].any()
                assert torch.equal(h[0, ~outside], t[0, ~outside])


@given(batches(), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_random_token_hides_whole_patches(batch, seed):
    counts, regions = batch
    generator = torch.Generator().manual_seed(seed)
    hidden = masks.random_token(counts, regions, 0.5, generator, patch_size=3).hidden
    for patch, codes in zip(hidden.split(3, dim=2), regions.split(3), strict=True):
        if (codes != PADDING).any():
            assert is_constant(patch[:, :, codes != PADDING], 2)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", ["neuron", "temporal", "causal", "random-token", "intra-region"])
def test_share_hidden_is_the_ratio(name, ratio):
    counts = torch.zeros(64, 50, 256)
    regions = torch.zeros(256, dtype=torch.int64)
    share = draw_mask(name, counts, regions, 1, ratio).target.float().mean().item()
    assert share == pytest.approx(ratio, abs=4 * (ratio * (1 - ratio) / (64 * 50)) ** 0.5 + 1e-6)


@pytest.mark.parametrize("name", ["inter-region", "intra-region"])
def test_regions_are_equally_likely_whatever_their_size(name):
    counts = torch.zeros(1, 2, 100)
    regions = torch.tensor([0] * 1 + [1] * 9 + [2] * 88 + [-1] * 2)
    generator = torch.Generator().manual_seed(0)
    kind = scheme(name)
    drawn = [
        regions[kind.draw(counts, regions, kind.ratio, generator).target[0, 0]][0].item()
        for _ in range(1500)
    ]
    shares = np.bincount(drawn, minlength=3) / 1500
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)


def test_a_target_is_drawn_even_where_the_ratio_would_leave_none():
    counts, regions = torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int64)
    for name in SCHEMES:
        ratio = 1.0 if name == "inter-region" else 1e-6
        assert draw_mask(name, counts, regions, 0, ratio).target.sum() == 1


def test_same_seed_same_masks_and_all_four_schemes_have_a_turn():
    counts, regions = torch.zeros(4, 6, 12), torch.arange(12) // 4
    first, second = (MaskSampler(seed=5) for _ in range(2))
    names = []
    for _ in range(200):
        (name, a), (other, b) = first(counts, regions), second(counts, regions)
        assert name == other and torch.equal(a.hidden, b.hidden) and torch.equal(a.target, b.target)
        names.append(name)
    shares = [names.count(name) / 200 for name in MTM_SCHEMES]
    assert sum(shares) == 1 and min(shares) > 0.15


def test_a_scheme_of_ones_own(monkeypatch):
    monkeypatch.setattr(masks, "SCHEMES", dict(SCHEMES))

    def first_bins(counts, regions, ratio, generator=None):
        hidden = torch.zeros(counts.shape, dtype=torch.bool)
        hidden[:, : max(1, int(ratio * counts.shape[1]))] = True
        return masks.Mask(hidden, torch.ones_like(hidden), causal=True)

    counts, regions = torch.zeros(2, 10, 3), torch.zeros(3, dtype=torch.int64)
    masks.register("first-bins", first_bins, ratio=0.5, causal=True)
    name, mask = MaskSampler(["first-bins"])(counts, regions)
    assert name == "first-bins" and mask.causal and mask.hidden.float().mean() == 0.5
    assert torch.equal(mask.target, mask.hidden)  # visible targets are taken out
    with pytest.raises(ValueError, match="exists already"):
        masks.register("first-bins", first_bins)
    masks.register("not causal", first_bins)
    with pytest.raises(ValueError, match="drew a causal mask; register it with causal=True"):
        MaskSampler(["not causal"])(counts, regions)
    with pytest.raises(ValueError, match="unknown masking scheme 'nueron'"):
        MaskSampler(["neuron"], {"nueron": 0.9})
