"""Scores of predicted spike counts: Poisson likelihood, bits per spike, deviance, R2.

Predictions are log-rates: logs of the expected count of each bin. Scores take log-rates and counts
of the same shape (..., N), as arrays or tensors on the CPU, and return (N,) unless noted: bits per
spike are NaN without spikes, D2 and R2 where counts never vary.

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
Values = TypeVar("Values", np.ndarray, Tensor)


def poisson_nll(log_rates: Values, counts: Values) -> Values:
    """NLL of each count in nats without log(count!); arrays, or tensors with gradients."""
    exp = torch.exp if isinstance(log_rates, Tensor) else np.exp
    return exp(log_rates) - counts * log_rates


def masked_nll(log_rates: Tensor, counts: Tensor, target: Tensor) -> Tensor:
    """NLL summed over the entries of ``target``, bool; all are (B, T, N)."""
    return torch.where(target, poisson_nll(log_rates, counts), 0.0).sum()


def log_mean(counts: ArrayLike) -> np.ndarray:
    """Log of each neuron's mean count per bin, (..., N) -> (N,): the null model."""
    entries = np.asarray(counts).reshape(-1, np.shape(counts)[-1])
    # Half a spike of a silent neuron keeps the logarithm finite.
    return np.log(np.maximum(entries.sum(axis=0, dtype=np.float64), 0.5) / len(entries))


def gain(
    log_rates: ArrayLike, counts: ArrayLike, null_log_rates: ArrayLike | None = None
) -> np.ndarray:
    """Gain in log-likelihood over a null model in bits, (N,); see :func:`bits_per_spike`."""
    f, y = _check(log_rates, counts)
    null = _mean_nll(y)
    if null_log_rates is not None:
        given, _ = _check(np.broadcast_to(null_log_rates, np.shape(counts)), counts)
        null = poisson_nll(given, y).sum(axis=0)
    return (null - poisson_nll(f, y).sum(axis=0)) / LOG2


def bits_per_spike(
    log_rates: ArrayLike, counts: ArrayLike, null_log_rates: ArrayLike | None = None
) -> np.ndarray:
    """Gain in log-likelihood over a null model in bits per spike, (N,).

    ``null_log_rates`` are the null model's, broadcastable to (..., N). Default: each neuron's mean
    over these entries, as in the Neural Latents Benchmark and the paper, against which the training
    mean scores below 0. The honest alternative is ``log_mean(training counts)``.
    """
    total = gain(log_rates, counts, null_log_rates)
    spikes = np.asarray(counts, np.float64).reshape(-1, len(total)).sum(axis=0)
    return _share(total, spikes, spikes > 0)


def pooled_bits_per_spike(
    log_rates: ArrayLike, counts: ArrayLike, null_log_rates: ArrayLike | None = None
) -> float:
    """Bits per spike of the whole population: total gain over total spikes."""
    spikes = np.asarray(counts, np.float64).sum()
    total = gain(log_rates, counts, null_log_rates).sum()
    return float(total / spikes) if spikes else float("nan")


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

    A histogram is the mean over trials with equal ``conditions``, (K,) or (K, C) numbers or words;
    rows with NaN or '' are left out. Counts are (K, T, N).
    """
    f, y = (x.reshape(np.shape(counts)) for x in _check(log_rates, counts))
    labels = pd.DataFrame(conditions).replace("", np.nan)
    if len(labels) != len(y):
        raise ValueError(f"need one condition per trial, got {len(labels)} for {len(y)} trials")
    groups = labels.groupby(list(labels)).indices.values()  # without NaN
    if not groups:
        return np.full(np.shape(counts)[-1], np.nan)
    # Histograms, (groups x T, N):
    return _r2(*(np.concatenate([x[g].mean(axis=0) for g in groups]) for x in (np.exp(f), y)))


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
    f, y = np.asarray(log_rates, np.float64), np.asarray(counts, np.float64)
    if f.shape != y.shape or y.ndim < 2 or not y.size:
        raise ValueError(f"need the same (..., N), not log-rates {f.shape} and counts {y.shape}")
    if not (np.isfinite(f).all() and f.max() <= 700):  # exp overflows float64 shortly above
        raise ValueError(f"log-rates must be finite, at most 700; got {f.min():g} to {f.max():g}")
    if not (y.min() >= 0 and y.max() < np.inf):
        raise ValueError(f"counts must be from 0 up, got {y.min()} to {y.max()}")
    return f.reshape(-1, f.shape[-1]), y.reshape(-1, y.shape[-1])
