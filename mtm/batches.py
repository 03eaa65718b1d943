"""A session as training needs it, and the batches of an epoch: each of one session."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtm.masks import Mask
from mtm.metrics import log_mean
from mtm.model import SOFTENING
from mtm.recipes import TrainConfig
from mtm.session import Session

COMPONENT_BINS = 20_000  # of training trials from which they are taken


class Batch(NamedTuple):
    """What a model is shown of one session in a step: the arguments of ``MtM.forward``."""

    counts: Tensor
    session: str
    mask: Mask
    prompt: str | None

    def split(self, size: int) -> list[Batch]:
        """Pieces of ``size`` trials."""
        parts = zip(
            *(x.split(size) for x in (self.counts, self.mask.hidden, self.mask.target)), strict=True
        )
        return [
            Batch(counts, self.session, Mask(hidden, target, self.mask.causal), self.prompt)
            for counts, hidden, target in parts
        ]


class SessionData:
    """A session as training needs it: counts as small integers, trials of each part, the null."""

    def __init__(
        self,
        session: Session,
        config: TrainConfig,
        device: torch.device,
        home: torch.device | None = None,
    ) -> None:
        split, home = session.split(config.split_seed), home or device
        self.name, self.device = session.name, device
        self.n_bins, self.bin_size = session.n_bins, session.bin_size
        self.n_neurons = session.n_neurons
        # Shared with the session, not copied, unless its home is another device: counts that are
        # on disk stay there. torch cannot index uint16; int16 holds the same bits.
        self.wide = session.counts.dtype == np.uint16
        counts = np.require(session.counts, requirements=["C", "W", "A"])
        self.counts = torch.from_numpy(counts.view(np.int16 if self.wide else np.uint8))
        self.counts = self.counts.to(home)
        self.regions = torch.from_numpy(session.region_codes).to(device)
        self.n_regions = len(session.region_names)
        self.train, self.val = split.train, torch.from_numpy(split.val).to(home)
        null = log_mean(session.counts[split.train])  # (N,)
        spikes = np.rint(np.exp(null) * len(split.train) * session.n_bins).astype(np.int64)
        prints = session.fingerprints(split.train)
        self.prints = prints[prints != 0]
        told = (spikes, split.train, split.val)  # whole numbers, the same on every machine
        self.digest = hashlib.sha256(b"".join(x.tobytes() for x in told)).hexdigest()[:16]
        self.null = torch.from_numpy(null).float().to(device)

    def batch(self, trials: Tensor | np.ndarray) -> Tensor:
        """Counts of some trials, (B, T, N) float32, on the device."""
        trials = torch.as_tensor(trials)
        counts = _sent(self.counts[_sent(trials, self.counts.device)], self.device)
        return (counts.int() & 0xFFFF if self.wide else counts).float()

    def components(self, n: int) -> Tensor:
        """Principal components of the scaled counts of training trials, (N, n), or as there are.

        Smoothed over time, as what neurons share is slower than their spikes.
        """
        some = self.train[:: math.ceil(len(self.train) * self.n_bins / COMPONENT_BINS)]
        mean = self.null.exp()
        x = (self.batch(some) - mean) * (mean + SOFTENING).rsqrt()  # (K', T, N)
        x = F.avg_pool1d(x.transpose(1, 2), 5, 1, 2, count_include_pad=False)  # over 5 bins
        x = x.transpose(1, 2).flatten(0, 1)
        return torch.pca_lowrank(x, min(n, *x.shape), niter=4)[2]


Trials = tuple[SessionData, np.ndarray]
"""A session, and indices of some of its trials."""


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for what the device has to do before."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def home_of(sessions: list[Session], device: torch.device) -> torch.device:
    """Where counts are while a model trains: on its device, if they fill at most half of it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(session.counts.nbytes for session in sessions) > free / 2:
            return torch.device("cpu")
    return device


def steps_per_epoch(data: Sequence[SessionData], config: TrainConfig) -> int:
    """Steps that show every training trial once."""
    n_batches = sum(math.ceil(len(session.train) / config.batch_size) for session in data)
    return math.ceil(n_batches / config.batches_per_step)


def steps_of(
    data: list[SessionData], config: TrainConfig, order: np.random.Generator
) -> Iterator[list[Trials]]:
    """One epoch: every training trial once, in batches of one session, composed anew each time.

    A step takes ``batches_per_step`` batches, of different sessions as long as there are any.
    """
    batches = []
    for session in data:
        trials = order.permutation(session.train)
        cuts = range(config.batch_size, len(trials), config.batch_size)
        batches += [(session, batch) for batch in np.split(trials, cuts)]
    queues: dict[str, deque[tuple[int, Trials]]] = {session.name: deque() for session in data}
    for place, i in enumerate(order.permutation(len(batches))):
        queues[batches[i][0].name].append((place, batches[i]))
    heads = [(queue[0][0], name) for name, queue in queues.items() if queue]
    heapq.heapify(heads)
    while heads:
        chosen: list[Trials] = []
        others: list[tuple[int, str]] = []
        while len(chosen) < config.batches_per_step and (heads or others):
            if not heads:  # fewer sessions are left than a step takes: again the first of each
                heads, others = others, []
                heapq.heapify(heads)
            name = heapq.heappop(heads)[1]
            chosen.append(queues[name].popleft()[1])
            if queues[name]:
                others.append((queues[name][0][0], name))
        for head in others:
            heapq.heappush(heads, head)
        yield chosen
