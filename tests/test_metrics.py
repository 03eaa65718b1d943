"""Scores against loops, closed forms, scikit-learn and the authors' code."""

import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from scipy.stats import poisson
from sklearn.metrics import d2_tweedie_score, r2_score

from mtm import metrics


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    log_rates = rng.normal(-1.5, 0.6, (20, 15, 6))
    counts = rng.poisson(np.exp(log_rates + rng.normal(0, 0.3, log_rates.shape)))
    counts[:, :, 2] = 0  # a silent neuron
    return log_rates, counts


def bits_by_loop(log_rates, counts, null):
    """Log-likelihoods of scipy's Poisson distribution, one entry at a time."""
    gains = np.zeros(counts.shape[2])
    for (k, t, n), c in np.ndenumerate(counts):
        gains[n] += poisson.logpmf(c, math.exp(log_rates[k, t, n])) - poisson.logpmf(c, null[n])
    spikes = counts.sum(axis=(0, 1))
    return np.where(spikes, gains / np.maximum(spikes, 1) / math.log(2), np.nan)


def test_bits_per_spike_against_a_loop(example):
    log_rates, counts = example
    means, null = np.maximum(counts.mean(axis=(0, 1)), 1e-9), np.linspace(0.1, 0.6, 6)
    for rates, given in ((means, None), (null, np.log(null))):
        expected = bits_by_loop(log_rates, counts, rates)
        ours = metrics.bits_per_spike(log_rates, counts, given)
        np.testing.assert_allclose(ours, expected, rtol=1e-9)
    assert np.isnan(expected[2])


def test_pooled_is_the_neural_latents_benchmark_s_definition(example):
    """Pei et al. 2021, section 3: (NLL of the null - NLL of the model) / spikes / ln 2."""
    log_rates, counts = example

    def nll(rates):
        rates = np.where(rates == 0, 1e-9, rates)
        return (rates - counts * np.log(rates) + gammaln(counts + 1.0)).sum()

    null = np.tile(counts.mean(axis=(0, 1)), (*counts.shape[:2], 1))
    expected = (nll(null) - nll(np.exp(log_rates))) / counts.sum() / np.log(2)
    assert metrics.pooled_bits_per_spike(log_rates, counts) == pytest.approx(expected, rel=1e-9)


def test_metrics_equal_the_authors(parity):
    theirs = torch.load(parity / "metrics.pt", weights_only=True)
    counts = theirs["spikes"].numpy().astype(int)
    log_rates = np.log(np.maximum(theirs["pred_rates"].double().numpy(), 1e-9))
    each = theirs["bits_per_spike_each"].numpy()
    spiking = np.isfinite(each)
    ours = metrics.bits_per_spike(log_rates, counts)
    np.testing.assert_allclose(ours[spiking], each[spiking], rtol=1e-5)
    assert np.isnan(ours[~spiking]).all() and (~spiking).sum() == 1
    pooled = metrics.pooled_bits_per_spike(log_rates, counts)
    assert pooled == pytest.approx(theirs["bits_per_spike_pooled"], rel=1e-6)
    r2 = theirs["r2_psth_trial"].numpy()
    psth = metrics.psth_r2(log_rates, counts, theirs["behaviour_choice_reward_block"].numpy())
    ours = np.stack([psth, metrics.trial_r2(log_rates, counts)], 1)
    np.testing.assert_allclose(ours[spiking], r2[spiking], rtol=1e-4, atol=1e-6)


def test_d2_and_r2_against_scikit_learn(example):
    log_rates, counts = example
    d2, r2 = metrics.poisson_d2(log_rates, counts), metrics.trial_r2(log_rates, counts)
    for n in (0, 1, 3, 4, 5):
        y, rate = counts[:, :, n].ravel(), np.exp(log_rates[:, :, n]).ravel()
        assert d2[n] == pytest.approx(d2_tweedie_score(y, rate, power=1), abs=1e-10)
        assert r2[n] == pytest.approx(r2_score(y, rate), abs=1e-10)
    assert np.isnan(d2[2]) and np.isnan(r2[2])


def test_psth_r2_against_a_loop(example):
    log_rates, counts = example
    conditions = np.arange(20) % 3 * 1.0
    conditions[4] = np.nan
    expected = []
    for n in range(6):
        groups = [np.flatnonzero(conditions == c) for c in range(3)]
        y = np.concatenate([counts[g, :, n].mean(0) for g in groups])
        rate = np.concatenate([np.exp(log_rates[g, :, n]).mean(0) for g in groups])
        expected.append(r2_score(y, rate) if y.any() else np.nan)
    ours = metrics.psth_r2(log_rates, counts, conditions)
    np.testing.assert_allclose(ours, expected, atol=1e-10)
    two_columns = np.stack([conditions, np.zeros(20)], 1)
    np.testing.assert_allclose(metrics.psth_r2(log_rates, counts, two_columns), ours)


@pytest.mark.parametrize("score", [metrics.bits_per_spike, metrics.trial_r2])
def test_bad_input_is_refused(score):
    log_rates, counts = np.zeros((2, 3, 1)), np.ones((2, 3, 1))
    for f, y in [(log_rates[:, :-1], counts), (log_rates[:0], counts[:0])]:
        with pytest.raises(ValueError, match="need the same .* not log-rates .* and counts"):
            score(f, y)
    for bad in (np.nan, -np.inf, 710.0):  # 710 averaged with other trials would look like NaN
        with pytest.raises(ValueError, match="log-rates must be finite, at most 700"):
            score(np.where([[[True]], [[False]]], bad, log_rates), counts)
    for bad in (np.nan, np.inf, -1):
        with pytest.raises(ValueError, match="counts must be from 0 up"):
            score(log_rates, np.where([[[True]], [[False]]], bad, counts))


def test_tensors_and_entries_in_any_shape(example):
    log_rates, counts = example
    f, y = (torch.from_numpy(x.reshape(-1, 6)) for x in (log_rates, counts.astype(float)))
    expected = metrics.bits_per_spike(log_rates, counts)
    np.testing.assert_allclose(metrics.bits_per_spike(f, y), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.log_mean(y), metrics.log_mean(counts))
    loss = torch.nn.functional.poisson_nll_loss(f, y, reduction="none")
    torch.testing.assert_close(metrics.poisson_nll(f, y), loss)
