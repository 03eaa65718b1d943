"""How good a prediction of spike counts is.

All scores take log-rates (the log of the expected count of a bin) and counts of the same shape
(K, T, N), scored trials x scored bins x neurons, and return one number a neuron, (N,) float64.

A neuron without a spike among the scored entries has no score: NaN, to be counted, never averaged
in. Nor is there a share of variance to explain, or of deviance from its own mean, where a neuron's
counts never vary: NaN too.
Sources: Pei et al. 2021 (bits per spike); arXiv 2407.14668, section 4 and Figure 7 (both R2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mtm.checks import numbers

LOG2 = np.log(2.0)
LARGEST = 700.0  # log-rate; little more is beyond float64 as a rate


def poisson_nll(log_rates: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each entry under a Poisson distribution, in nats.

    Without the term log(count!), which depends on the data alone and cancels in every score.
    """
    log_rates, counts = _check(log_rates, counts)
    return np.exp(log_rates) - counts * log_rates


def log_mean(counts: np.ndarray) -> np.ndarray:
    """Log of each neuron's mean count a bin over trials and bins: (K, T, N) -> (N,).

    The null model. A silent neuron counts as half a spike, which keeps the logarithm finite.
    """
    counts = _check_counts(counts)
    n_entries = counts.shape[0] * counts.shape[1]
    return np.log(np.maximum(counts.sum(axis=(0, 1), dtype=np.float64), 0.5) / n_entries)


def gain(
    log_rates: np.ndarray, counts: np.ndarray, null_log_rates: np.ndarray | None = None
) -> np.ndarray:
    """Gain in log-likelihood over a null model, in bits; (N,). Arguments as below."""
    log_rates, counts = _check(log_rates, counts)
    null = _null(counts, null_log_rates)
    return (poisson_nll(null, counts) - poisson_nll(log_rates, counts)).sum(axis=(0, 1)) / LOG2


def bits_per_spike(
    log_rates: np.ndarray, counts: np.ndarray, null_log_rates: np.ndarray | None = None
) -> np.ndarray:
    """Gain in log-likelihood over a null model, in bits a spike; (N,).

    Args:
        log_rates: (K, T, N).
        counts: (K, T, N).
        null_log_rates: the null model's, broadcastable to (K, T, N). Default: each neuron's mean
            over these very entries, the convention of the Neural Latents Benchmark and of the
            paper. It knows the scored data, so a model that only knows the training mean scores
            below 0. The honest alternative is ``log_mean(training counts)``.
    """
    bits = gain(log_rates, counts, null_log_rates)
    return _ratio(bits, np.asarray(counts).sum(axis=(0, 1), dtype=np.float64))


def pooled_bits_per_spike(
    log_rates: np.ndarray, counts: np.ndarray, null_log_rates: np.ndarray | None = None
) -> float:
    """As :func:`bits_per_spike` for the whole population: total gain over total spikes.

    Busy neurons weigh more here; the mean over neurons treats all alike. They are two numbers.
    """
    bits = gain(log_rates, counts, null_log_rates)
    return float(_ratio(bits.sum(), np.asarray(counts).sum(dtype=np.float64)))


def poisson_d2(
    log_rates: np.ndarray, counts: np.ndarray, null_log_rates: np.ndarray | None = None
) -> np.ndarray:
    """Share of the null model's Poisson deviance that is explained, (N,): 1 = perfect, 0 = null.

    Arguments: see :func:`bits_per_spike`.
    """
    log_rates, counts = _check(log_rates, counts)
    nats = gain(log_rates, counts, null_log_rates) * LOG2
    log_counts = np.log(np.maximum(counts, 1.0))  # count 0 contributes 0 to count * log(count)
    saturated = (counts - counts * log_counts).sum(axis=(0, 1))
    null = poisson_nll(_null(counts, null_log_rates), counts).sum(axis=(0, 1)) - saturated
    spikes = counts.sum(axis=(0, 1))
    varies = (spikes > 0) & (null > 1e-9 * (np.abs(saturated) + spikes))  # but for rounding
    return _ratio(nats, np.where(varies, null, 0.0))


def trial_r2(log_rates: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Share of the variance of single-trial counts that the rates explain, (N,)."""
    log_rates, counts = _check(log_rates, counts)
    flat = (-1, counts.shape[-1])
    return _r2(np.exp(log_rates).reshape(flat), counts.reshape(flat))


def psth_r2(log_rates: np.ndarray, counts: np.ndarray, conditions: np.ndarray) -> np.ndarray:
    """As :func:`trial_r2` for peri-stimulus time histograms, i.e. averages over like trials; (N,).

    Args:
        log_rates: (K, T, N).
        counts: (K, T, N).
        conditions: (K,) or (K, C); trials with equal rows are averaged. Rows with NaN are left out.
    """
    log_rates, counts = _check(log_rates, counts)
    conditions = numbers("conditions", conditions).astype(np.float64)
    if conditions.ndim not in (1, 2) or len(conditions) != len(counts):
        raise ValueError(
            f"conditions must be ({len(counts)},) or ({len(counts)}, C), one row a trial; got "
            f"{conditions.shape}"
        )
    conditions = conditions.reshape(len(counts), -1)
    known = ~np.isnan(conditions).any(axis=1)
    if not known.any():
        return np.full(counts.shape[-1], np.nan)
    groups, member = np.unique(conditions[known], axis=0, return_inverse=True)
    average = np.equal.outer(np.arange(len(groups)), member.reshape(-1)).astype(np.float64)
    average /= average.sum(axis=1, keepdims=True)  # (conditions, trials)
    psths = [
        np.tensordot(average, x[known], axes=1).reshape(-1, counts.shape[-1])
        for x in (np.exp(log_rates), counts)
    ]
    return _r2(*psths)


def _null(counts: np.ndarray, null_log_rates: np.ndarray | None) -> np.ndarray:
    if null_log_rates is None:
        return np.broadcast_to(np.log(np.maximum(counts.mean(axis=(0, 1)), 1e-9)), counts.shape)
    null = _check_rates("null log-rates", null_log_rates)
    try:
        return np.broadcast_to(null, counts.shape)
    except ValueError as error:
        raise ValueError(f"null log-rates do not fit the counts: {error}") from error


def _r2(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    residual = ((observed - predicted) ** 2).sum(axis=0)
    total = ((observed - observed.mean(axis=0)) ** 2).sum(axis=0)
    constant = total <= 1e-12 * (observed**2).sum(axis=0)  # but for rounding
    return 1.0 - _ratio(residual, np.where(constant, 0.0, total))


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator), np.asarray(denominator)
    return np.where(
        denominator != 0, numerator / np.where(denominator != 0, denominator, 1), np.nan
    )


def _check(log_rates: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log_rates = _check_rates("log-rates", log_rates)
    counts = np.asarray(_check_counts(counts), dtype=np.float64)
    if log_rates.shape != counts.shape:
        raise ValueError(
            f"log-rates {log_rates.shape} and counts {counts.shape} must have the same shape "
            "(trials, bins, neurons)"
        )
    return log_rates, counts


def _check_rates(what: str, log_rates: np.ndarray) -> np.ndarray:
    log_rates = np.asarray(numbers(what, log_rates), dtype=np.float64)
    if not np.isfinite(log_rates).all():
        raise ValueError(f"{what} must be finite; a rate of 0 makes any spike impossible")
    if log_rates.max(initial=0) > LARGEST:
        raise ValueError(
            f"{what} reach {log_rates.max():.3g}; above {LARGEST:g} rates are infinite, and a "
            "model that predicts them has diverged"
        )
    return log_rates


def _check_counts(counts: np.ndarray) -> np.ndarray:
    counts = numbers("counts", counts)
    if counts.ndim != 3 or 0 in counts.shape:
        raise ValueError(f"counts must be trials x bins x neurons, none 0; got {counts.shape}")
    if counts.dtype.kind not in "bu":  # which are always valid
        least, most = counts.min(), counts.max()  # NaN where there is one
        if not (least >= 0 and np.isfinite(most)):
            raise ValueError(f"counts must be finite and not negative, got {least} to {most}")
    return counts
