"""Scores of predicted spike counts: Poisson likelihood, bits per spike, deviance, R2.

Predictions are log-rates: logs of the expected count of each bin. Scores take log-rates and counts
of the same shape (..., N), e.g. trials x bins x neurons, as arrays or tensors on the CPU, and
return one value per neuron, (N,) float64.

A score is NaN where it is undefined: without spikes, or, for D2 and R2, where counts never vary.

Sources: Pei et al. 2021 (bits per spike); arXiv 2407.14668, section 4 and Figure 7 (both R2).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy.special import xlogy
from torch import Tensor

LOG2 = np.log(2.0)
MAX_LOG_RATE = 700.0  # exp overflows float64 shortly above

Values = TypeVar("Values", np.ndarray, Tensor)


def poisson_nll(log_rates: Values, counts: Values) -> Values:
    """NLL of each count in nats without log(count!); arrays, or tensors with gradients."""
    exp = torch.exp if isinstance(log_rates, Tensor) else np.exp
    return exp(log_rates) - counts * log_rates


def log_mean(counts: ArrayLike) -> np.ndarray:
    """Log of each neuron's mean count per bin, (..., N) -> (N,): the null model.

    A silent neuron is given half a spike, which keeps the logarithm finite.
    """
    entries = _check_counts(counts)
    return np.log(np.maximum(entries.sum(axis=0, dtype=np.float64), 0.5) / len(entries))


def gain(
    log_rates: ArrayLike, counts: ArrayLike, null_log_rates: ArrayLike | None = None
) -> np.ndarray:
    """Gain in log-likelihood over a null model in bits, (N,); see :func:`bits_per_spike`."""
    f, y = _check(log_rates, counts)
    null = _mean_nll(y)
    if null_log_rates is not None:
        given = np.broadcast_to(null_log_rates, np.shape(counts))
        null = poisson_nll(*_check(given, counts)).sum(axis=0)
    return (null - poisson_nll(f, y).sum(axis=0)) / LOG2


def bits_per_spike(
    log_rates: ArrayLike, counts: ArrayLike, null_log_rates: ArrayLike | None = None
) -> np.ndarray:
    """Gain in log-likelihood over a null model in bits per spike, (N,).

    Args:
        log_rates: (..., N).
        counts: (..., N).
        null_log_rates: the null model's, broadcastable to (..., N). Default: each neuron's mean
            over these entries, the convention of the Neural Latents Benchmark and of the paper. It
            uses the scored data, so the training mean scores below 0 against it. The honest
            alternative is ``log_mean(training counts)``.
    """
    spikes = _check_counts(counts).sum(axis=0, dtype=np.float64)
    return _share(gain(log_rates, counts, null_log_rates), spikes, spikes > 0)


def pooled_bits_per_spike(
    log_rates: ArrayLike, counts: ArrayLike, null_log_rates: ArrayLike | None = None
) -> float:
    """Bits per spike of the whole population: total gain over total spikes."""
    spikes = float(_check_counts(counts).sum(dtype=np.float64))
    total = float(gain(log_rates, counts, null_log_rates).sum())
    return total / spikes if spikes else float("nan")


def poisson_d2(log_rates: ArrayLike, counts: ArrayLike) -> np.ndarray:
    """Fraction of the Poisson deviance explained, relative to each neuron's mean, (N,)."""
    f, y = _check(log_rates, counts)
    perfect = (y - xlogy(y, y)).sum(axis=0)  # NLL of rates equal to the counts
    null = _mean_nll(y)
    return _share(null - poisson_nll(f, y).sum(axis=0), null - perfect, np.ptp(y, axis=0) > 0)


def trial_r2(log_rates: ArrayLike, counts: ArrayLike) -> np.ndarray:
    """Share of the variance of single-trial counts that the rates explain, (N,)."""
    f, y = _check(log_rates, counts)
    return _r2(np.exp(f), y)


def psth_r2(log_rates: ArrayLike, counts: ArrayLike, conditions: ArrayLike) -> np.ndarray:
    """Share of the variance of peri-stimulus time histograms that the rates explain, (N,).

    Args:
        log_rates: (K, T, N).
        counts: (K, T, N).
        conditions: (K,) or (K, C) numbers or words; a histogram is the mean over trials with equal
            rows. Rows with NaN or '' are left out.
    """
    f, y = (x.reshape(np.shape(counts)) for x in _check(log_rates, counts))
    labels = pd.DataFrame(conditions).replace("", np.nan)
    if len(labels) != len(y):
        raise ValueError(f"need one condition per trial, got {len(labels)} for {len(y)} trials")
    groups = labels.groupby(list(labels)).indices.values()  # without NaN
    if not groups:
        return np.full(np.shape(counts)[-1], np.nan)
    rates = np.exp(f)
    # Histograms, (groups x T, N):
    predicted, observed = (np.concatenate([x[g].mean(0) for g in groups]) for x in (rates, y))
    return _r2(predicted, observed)


def _r2(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    residual = ((observed - predicted) ** 2).sum(axis=0)
    total = ((observed - observed.mean(axis=0)) ** 2).sum(axis=0)
    return 1.0 - _share(residual, total, np.ptp(observed, axis=0) > 0)


def _share(part: np.ndarray, whole: np.ndarray, defined: np.ndarray) -> np.ndarray:
    """Quotient, NaN where it is not defined."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=defined)


def _mean_nll(counts: np.ndarray) -> np.ndarray:
    """NLL of the model that predicts each neuron's mean over these entries, (M, N) -> (N,)."""
    rates = np.maximum(counts.mean(axis=0), 1e-9)
    return len(counts) * rates - counts.sum(axis=0) * np.log(rates)


def _check(log_rates: ArrayLike, counts: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Log-rates and counts as float64 arrays of M entries, (M, N)."""
    f, y = np.asarray(log_rates, np.float64), _check_counts(counts).astype(np.float64)
    if f.shape != np.shape(counts):
        shapes = f"log-rates {f.shape} and counts {np.shape(counts)}"
        raise ValueError(f"{shapes} must have the same shape")
    if not (np.isfinite(f).all() and f.max() <= MAX_LOG_RATE):
        extremes = f"{f.min():.3g} to {f.max():.3g}"
        raise ValueError(f"log-rates must be finite and at most {MAX_LOG_RATE:g}, got {extremes}")
    return f.reshape(y.shape), y


def _check_counts(counts: ArrayLike) -> np.ndarray:
    """Counts as an array of M entries, (M, N)."""
    counts = np.asarray(counts)
    if counts.ndim < 2 or 0 in counts.shape:
        raise ValueError(f"counts must be (..., neurons) and not empty, got shape {counts.shape}")
    if counts.dtype.kind not in "bu" and not (counts.min() >= 0 and np.isfinite(counts.max())):
        raise ValueError(f"counts must be from 0 up, got {counts.min()} to {counts.max()}")
    return counts.reshape(-1, counts.shape[-1])
