"""Batches of training: trials of a session with a mask, and the order in which they come."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtm.inputs import SessionError
from mtm.masks import MTM_SCHEMES, NO_REGION, Mask, MaskSampler, scheme
from mtm.metrics import log_mean
from mtm.recipes import TrainConfig
from mtm.session import Session


class SessionData:
    """A session prepared for training: counts (integers) on a device, split, null model."""

    def __init__(
        self, session: Session, config: TrainConfig, device: torch.device, counts_on: Any = None
    ) -> None:
        split = session.split(config.split_seed)
        self.session, self.name, self.device = session, session.name, device
        # torch can hold uint16, but not index it.
        counts = session.counts if session.counts.dtype == np.uint8 else session.counts.astype("i4")
        counts = np.require(counts, requirements=["C", "W", "A"])
        self.counts = torch.from_numpy(counts).to(counts_on or device)  # (K, T, N)
        self.regions = torch.from_numpy(session.region_codes).to(device)  # (N,)
        self.train, self.val = split.train, torch.from_numpy(split.val)
        # The null model of validation: each neuron's log mean count in the training trials, (N,).
        self.null = torch.from_numpy(log_mean(session.filled(split.train))).float().to(device)
        self.unobserved = None  # (K, 1, N)
        if session.observed is not None:
            self.unobserved = ~torch.from_numpy(session.observed).to(device)[:, None]
        fingerprints = session.fingerprints(split.train)
        self.fingerprints = fingerprints[fingerprints != 0]  # 0: too few spikes to tell
        held_out = session.fingerprints(np.concatenate([split.val, split.test]))
        if n := np.isin(held_out, self.fingerprints).sum():
            problem = f"{n} trials for validation or test have the spikes of a training trial"
            remedy = "drop duplicate trials, or pass given_split"
            raise SessionError(f"session {self.name!r}, split: {problem}; {remedy}")
        observed = [] if session.observed is None else [session.observed]
        marks = np.concatenate([fingerprints, held_out[: len(split.val)]])
        quiet = session.counts[np.concatenate([split.train, split.val])[marks == 0]]
        parts = (marks, quiet, session.region_codes, split.train, split.val, *observed)
        content = b"".join(part.tobytes() for part in parts)
        self.digest = hashlib.sha256(content).hexdigest()[:16]

    def batch(self, trials: Tensor | np.ndarray) -> Tensor:
        """Return the counts of some trials, (B, T, N) float32, on the training device."""
        counts = self.counts[torch.as_tensor(trials, device=self.counts.device)]
        return counts.to(self.device).float()

    def mask(
        self, sampler: MaskSampler, name: str, counts: Tensor, trials: Any, regions: Any = None
    ) -> Mask:
        """Return a mask for these counts of trials, without targets that were not observed."""
        mask = sampler.draw(name, counts, self.regions if regions is None else regions)
        if self.unobserved is None:
            return mask
        return mask.leave_out(self.unobserved[torch.as_tensor(trials, device=self.device)])

    def training_mask(
        self, sampler: MaskSampler, name: str, counts: Tensor, trials: Any, config: TrainConfig
    ) -> Mask:
        """Return a mask as training draws it: see ``regions_by_size`` and ``input_dropout``."""
        generator, regions = sampler.generator, self.regions
        if config.regions_by_size and name in MTM_SCHEMES and scheme(name).needs_regions:
            # The region of a neuron; the scheme then has no other to choose from.
            draws = torch.rand(len(regions), generator=generator, device=self.device)
            place = torch.where(regions > NO_REGION, draws, -1).argmax()
            drawn = regions.index_select(0, place[None])  # without waiting for a GPU
            regions = torch.where(regions == drawn, regions, NO_REGION)
        mask = self.mask(sampler, name, counts, trials, regions)
        if share := config.input_dropout.get(name):
            n_trials, _, n_neurons = counts.shape
            draws = torch.rand(n_trials, 1, n_neurons, generator=generator, device=self.device)
            mask = replace(mask, hidden=mask.hidden | (draws < share))
        return mask


Step = list[tuple[SessionData, np.ndarray]]  # its batches: a session, and some of its trials


def counts_device(sessions: Sequence[Session], device: torch.device) -> torch.device:
    """Return where counts stay during training: on a GPU if they fill at most half of it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(session.counts.nbytes for session in sessions) > free / 2:
            return torch.device("cpu")
    return device


def steps_per_epoch(data: Sequence[SessionData], config: TrainConfig) -> int:
    """Return the number of steps that use every training trial once."""
    n_batches = sum(math.ceil(len(session.train) / config.batch_size) for session in data)
    return math.ceil(n_batches / config.batches_per_step)


def steps_of(
    data: Sequence[SessionData], config: TrainConfig, order: np.random.Generator
) -> Iterator[Step]:
    """Yield the steps of an epoch, in which every training trial occurs once, in new batches."""
    # Cut each session's shuffled trials into batches, and shuffle the batches of all sessions.
    batches = []
    for session in data:
        trials = order.permutation(session.train)
        cuts = range(config.batch_size, len(trials), config.batch_size)
        batches += [(session, batch) for batch in np.split(trials, cuts)]
    waiting = deque(batches[i] for i in order.permutation(len(batches)))
    # A step takes the next batches in this order, but one per session while there are enough.
    while waiting:
        step: Step = []
        names: set[str] = set()  # sessions in the step
        skipped: deque[Any] = deque()  # their batches, for later steps
        while len(step) < config.batches_per_step and (waiting or skipped):
            if not waiting:  # too few sessions are left: use each of them once more
                waiting, skipped, names = skipped, deque(), set()
            batch = waiting.popleft()
            (skipped if batch[0].name in names else step).append(batch)
            names.add(batch[0].name)
        waiting.extendleft(reversed(skipped))
        yield step
