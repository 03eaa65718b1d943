"""Scores of what a masking scheme hides: in validation, by neuron; and calibration.

Every call hides the same entries, so scores can be compared over time and between models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from torch import Tensor

from mtm import distributed, metrics
from mtm.batches import SessionData
from mtm.distributed import autocast
from mtm.inputs import SessionError
from mtm.masks import MTM_SCHEMES, NO_REGION, Mask, MaskSampler, scheme
from mtm.metrics import LOG2, masked_nll
from mtm.model import Batch, MtM
from mtm.prediction import PredictorLike, predict_masked, unobserved
from mtm.recipes import TrainConfig
from mtm.session import Session

VALIDATION_BATCH = 64  # validation trials that share a mask, whatever the batch size of training
PRIOR = 0.3  # prior standard deviation of factors of calibration, around 1
SCALES = 0.4, 0.6, 0.8, 1.0, 1.2  # one for all that a model adds to mean log-rates, tried out
VALIDATION_MASKS = 4  # masks per validation batch, for schemes that do not mask each region in turn


def make_sampler(model: MtM, config: TrainConfig) -> MaskSampler:
    """Return the sampler of the schemes that are trained."""
    kind = config.schemes, config.ratios, config.seed, model.device, model.config.patch_size
    return MaskSampler(*kind)


def seed_of(*place: int | str) -> int:
    """Return a seed for a place in the run, which is given as numbers and words."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def validate(model: MtM, data: Sequence[SessionData], config: TrainConfig) -> dict[str, float]:
    """Return bits per spike of each scheme on hidden entries of the validation trials.

    The null model is each neuron's mean in the training trials. Every call scores the same entries;
    NaN where none of them has a spike. With ``calibrate``, predictions are scaled as suits each
    session and scheme best, much as they will be in the end: else weights that are only too sure
    would lose to those of an early epoch. Several processes share the sessions.
    """
    model.eval()
    found = torch.zeros(2, len(config.schemes), len(data), device=model.device)  # gain, spikes
    for i in range(distributed.rank(), len(data), distributed.processes()):
        scales = SCALES if config.calibrate and can_be_calibrated(model, data[i].name) else (1.0,)
        for s, name in enumerate(config.schemes):
            gain = torch.zeros(len(scales), device=model.device)
            # Summed on the device, without waiting for it.
            for counts, mask, encoded, direct in _predict_validation(model, data[i], name, config):
                null = data[i].null.expand_as(counts)
                change = encoded + direct - null
                nll = [masked_nll(null + x * change, counts, mask.target) for x in (0.0, *scales)]
                gain += nll[0] - torch.stack(nll[1:])
                found[1, s, i] += (counts * mask.target).sum()
            found[0, s, i] = gain.max()
    found = distributed.all_reduce(found).cpu().double()
    if not bool(found.isfinite().all()):
        raise FloatingPointError(f"predictions became infinite or NaN; lower lr ({config.lr:g})")
    gain, spikes = found.sum(dim=2)
    if not bool((spikes > 0).any()):
        remedy = "use more trials; a mask of your own must hide what it scores, and spikes and "
        remedy += "events must be on one clock, in seconds"
        raise SessionError(f"no hidden entry of the validation trials has a spike; {remedy}")
    return dict(zip(config.schemes, (gain / (spikes * LOG2)).tolist(), strict=True))


def can_be_calibrated(model: MtM, session: str) -> bool:
    """Return whether a model knows mean counts: not with raw counts and no direct paths."""
    return hasattr(model.session_layers(session), "mean")


@torch.no_grad()
def calibrate(model: MtM, data: Sequence[SessionData], config: TrainConfig) -> None:
    """Set ``model.calibration``: session -> scheme -> the two factors that suit validation best.

    Models that overfit are too sure of what they predict, those with much dropout not enough, and
    the encoder overfits more than the direct paths. The factors multiply what the two add to the
    mean log-rates. Sessions that are not in ``data`` keep theirs. Compare temperature scaling (Guo
    et al. 2017).
    """
    for one in data:
        if not can_be_calibrated(model, one.name):
            continue
        layers = model.session_layers(one.name)
        mean, model.calibration[one.name] = layers.mean.log(), {}
        for name in config.schemes:
            found = []
            for counts, mask, encoded, direct in _predict_validation(model, one, name, config):
                parts = (mean.expand_as(counts), counts, encoded - mean, direct + 0 * encoded)
                found.append(torch.stack([part[mask.target] for part in parts]).cpu().double())
            whole = torch.cat(found, dim=1).numpy()
            model.calibration[one.name][name] = fit_factors(whole[0], whole[2:], whole[1]).tolist()


def fit_factors(start: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fit factors f (2,) from 0 to 2 of terms x (2, n): counts y (n,) have rates exp(start + f x).

    They maximise the likelihood, times a normal prior around 1.
    """

    def loss(f: np.ndarray) -> tuple[float, np.ndarray]:
        log_rates, away = start + f @ x, (f - 1) / PRIOR**2
        rates = np.exp(log_rates)
        value = (rates - y * log_rates).sum() + 0.5 * away @ (f - 1)
        return value, x @ (rates - y) + away

    found: np.ndarray = minimize(loss, np.ones(2), jac=True, bounds=[(0, 2)] * 2, tol=1e-12).x
    return found


def _predict_validation(
    model: MtM, one: SessionData, name: str, config: TrainConfig
) -> Iterator[tuple[Tensor, Mask, Tensor, Tensor]]:
    """Yield counts, mask and both parts of log-rates of validation trials, the same each time."""
    sampler = make_sampler(model, config)
    sampler.reseed(seed_of("validation", one.name, name))
    labels = [one.regions] * VALIDATION_MASKS
    # Label one region at a time, so that each is masked once. Schemes of users may need several.
    if scheme(name).needs_regions and name in MTM_SCHEMES:
        codes = range(len(one.session.region_names))
        labels = [torch.where(one.regions == code, 0, NO_REGION) for code in codes]
    for trials in one.val.split(VALIDATION_BATCH):
        counts = one.batch(trials)
        for regions in labels:
            mask = one.mask(sampler, name, counts, trials, regions)
            with autocast(model.device, config.precision):
                encoded, direct = model.parts(Batch(counts, name, mask, one.name))
            yield counts, mask, encoded.float(), direct


def score_scheme(
    predictor: PredictorLike,
    session: Session,
    name: str,
    trials: np.ndarray,
    wanted: np.ndarray,
    null: np.ndarray,
) -> pd.DataFrame:
    """Score what a scheme hides of neurons ``wanted`` (N,): a row for each, as of other tasks.

    Each trial has a mask of its own, of the scheme's own ratio, so shuffled scores and ``visible``
    are NaN. ``null`` (N,) is each neuron's log mean in the training trials.
    """
    config = getattr(getattr(predictor, "model", predictor), "config", None)
    sampler = MaskSampler([name], patch_size=getattr(config, "patch_size", 128))
    codes = torch.from_numpy(session.region_codes)
    counts = torch.from_numpy(session.counts[trials].astype(np.float32))
    drawn = [sampler.draw(name, trial[None], codes) for trial in counts]
    hidden, target = (torch.cat([getattr(m, k) for m in drawn]) for k in ("hidden", "target"))
    mask = Mask(hidden, target, scheme(name).causal)
    mask = mask.leave_out(torch.from_numpy(unobserved(session, trials)))
    if isinstance(predictor, np.ndarray):
        log_rates = predictor[trials]
    else:
        parts = (x.split(VALIDATION_BATCH) for x in (counts, mask.hidden, mask.target))
        found = [
            predict_masked(predictor, x, Mask(h, t, mask.causal), name, session.name).cpu()
            for x, h, t in zip(*parts, strict=True)
        ]
        log_rates = torch.cat(found).double().numpy()
    rows = []
    for n in np.flatnonzero(mask.target.any(dim=(0, 1)).numpy() & wanted):
        scored = mask.target[..., n].numpy()
        pair = log_rates[scored, n, None], counts.numpy()[scored, n, None]
        row = {"session": session.name, "seed": 0, "neuron": n, "region": session.regions[n]}
        for end, given in (("", None), ("_train_null", null[[n]])):
            row["bits_per_spike" + end] = metrics.bits_per_spike(*pair, given)[0]
            row["gain" + end] = metrics.gain(*pair, given)[0]
        row |= {"poisson_d2": metrics.poisson_d2(*pair)[0], "trial_r2": metrics.trial_r2(*pair)[0]}
        rows.append(row | dict.fromkeys(("shuffled_trials", "shuffled_neurons", "visible"), np.nan))
        rows[-1]["spikes"] = int(pair[1].sum())
    if not rows:
        raise SessionError(f"session {session.name!r}: {name} hides nothing of the scored neurons")
    return pd.DataFrame(rows)
