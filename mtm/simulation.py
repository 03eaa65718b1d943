"""Simulated animals at a decision task, with the true firing rates kept.

All animals share one circuit of regions and one task; each has its own neurons. A region has two
latent variables that decay, receive those of upstream regions after a delay and task signals, and
fluctuate on their own:

    z_r(t) = k_r z_r(t-1) + (1 - k_r) (sum_s A_rs z_s(t - delay_rs) + B_r u(t)) + noise
    counts ~ Poisson(bin_size * base * exp(w . z_r(t) + w' arousal(t))),  at most 200 Hz

with k_r = exp(-bin_size / decay_r). The task is the International Brain Laboratory's: a grating of
some contrast left or right, a block prior for its side, a wheel turned to report it. A choice of -1
is to the right, a contrast above 0 is on the right.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.signal import lfilter

from mtm.binning import n_bins
from mtm.inputs import SessionError
from mtm.session import Session

CONTRASTS = np.array([0.0, 0.0625, 0.125, 0.25, 1.0])
INPUTS = ("stimulus left", "stimulus right", "evidence", "turn", "movement", "reward")
MOVEMENT = 0.4  # seconds that a turn of the wheel lasts
DECISION_DELAY = 0.12  # seconds from stimulus to the start, and from the bound to the movement
DECISION_TIME = 0.8  # seconds after which an animal decides at the latest
BOUND = 0.7  # of the evidence
N_LATENTS = 2  # of a region
BURN_IN = 1.0  # seconds simulated before the window, so that the latents have forgotten their start
# Of trials laid end to end as one recording, seconds:
BEFORE, BETWEEN = 2.0, 1.0  # before the first trial, and at least between two trials
RESPONSE = 0.2  # from the first movement to the response
EDGE = 0.02  # distance of spikes from the edges of their bin, as a share of the bin


@dataclass(frozen=True)
class Region:
    """One region of the circuit."""

    name: str  # Allen acronym
    decay: float  # time constant of its latents, seconds
    upstream: dict[str, tuple[float, float]]  # region -> (delay in seconds, strength)
    inputs: dict[str, float]  # task signal (see INPUTS) -> strength
    own: float  # standard deviation of its own fluctuations


CIRCUIT = (
    Region("LP", 0.15, {}, {"stimulus left": 1.5, "stimulus right": 1.5}, 0.8),
    Region("VISa5", 0.15, {"LP": (0.04, 0.9)}, {"stimulus left": 0.5, "stimulus right": 0.5}, 0.4),
    Region("MOs5", 0.30, {"VISa5": (0.06, 0.9)}, {"evidence": 1.5}, 0.5),
    Region("CA1", 0.60, {"MOs5": (0.10, 0.6)}, {"reward": 1.5}, 0.7),
    Region("SCig", 0.12, {"MOs5": (0.04, 0.9)}, {"turn": 2.0}, 0.35),
    Region("PO", 0.12, {"SCig": (0.06, 0.9)}, {"movement": 2.5}, 0.35),
)
"""The circuit, from thalamus over cortex to the movement and back."""


def simulate(
    n_sessions: int = 3,
    n_trials: int = 200,
    n_neurons: int = 96,
    *,
    seed: int = 0,
    bin_size: float = 0.02,
    window: tuple[float, float] = (-0.5, 1.5),
    mean_rate: float = 10.0,
) -> list[Session]:
    """Simulate sessions, one animal each, named ``sim-0``, ``sim-1``, ... (seed 7: ``sim-7-0``).

    The first sessions stay the same when more are simulated.

    Args:
        n_sessions, n_trials, n_neurons: animals; trials and neurons of each, the latter spread
            evenly over the six regions.
        seed: of everything random.
        bin_size: seconds, below 0.8.
        window: (start, stop) around stimulus onset, seconds.
        mean_rate: geometric mean of the neurons' base rates, Hz.

    Returns:
        sessions with true ``rates`` (K, T, N); behaviour ``choice``, ``contrast``, ``block``,
        ``reward``, ``reaction-time`` (K,), ``wheel-speed``, ``whisker-motion-energy`` (K, T).
    """
    before = int(np.ceil(BURN_IN / bin_size - 1e-9))  # bins
    grid = window[0] + bin_size * np.arange(-before, n_bins(window, bin_size))  # bin starts
    names = [region.name for region in CIRCUIT]
    regions = np.repeat(names, [len(part) for part in np.array_split(range(n_neurons), len(names))])
    fields: dict[str, Any] = {"bin_size": bin_size, "window": window}
    fields["neurons"] = {"probe": np.where(np.isin(regions, names[:3]), "probe00", "probe01")}
    sessions = []
    for i in range(n_sessions):
        # The circuit is the same for all animals.
        circuit, rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1, i])
        behaviour, inputs = _task(n_trials, grid, bin_size, rng)
        log_rates, arousal = _log_rates(regions, inputs, bin_size, mean_rate, circuit, rng)
        rates = (np.exp(log_rates[:, before:]) * bin_size).astype(np.float32)
        whisking = 0.6 * behaviour["wheel-speed"] + 0.5 * np.exp(0.5 * arousal)
        whisking = whisking * np.exp(0.15 * rng.standard_normal(whisking.shape))
        behaviour["whisker-motion-energy"] = whisking[:, before:]
        behaviour["wheel-speed"] = behaviour["wheel-speed"][:, before:]
        name = f"sim-{i}" if seed == 0 else f"sim-{seed}-{i}"
        fields |= {"rates": rates, "behaviour": behaviour, "subject": f"SIM_{i:03d}"}
        fields["provenance"] = {"origin": "mtm.simulate", "seed": seed, "session": i}
        sessions.append(Session(rng.poisson(rates), regions, name, **fields))
    return sessions


def _task(
    n_trials: int, grid: np.ndarray, bin_size: float, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Behaviour of one animal, and the task signals (K, L, inputs) that reach its brain."""
    # Probability of a stimulus on the left: a 0.5 block, then 0.2 and 0.8 in turn.
    lengths = [min(90, max(1, n_trials // 4))]
    while sum(lengths) < n_trials:
        lengths.append(int(rng.integers(20, 60)))
    first = rng.integers(2)
    levels = [0.5] + [(0.2, 0.8)[(first + i) % 2] for i in range(len(lengths) - 1)]
    block = np.repeat(levels, lengths)[:n_trials]
    side = np.where(rng.random(n_trials) < block, -1.0, 1.0)  # -1 left, +1 right
    strength = rng.choice(CONTRASTS, n_trials)

    # Evidence for "right" drifts from the block's prior to a bound, where it stays; (K, S).
    steps = np.arange(bin_size, DECISION_TIME, bin_size)
    drift = 6.0 * side * np.sqrt(strength)
    noise = rng.standard_normal((n_trials, len(steps))) * np.sqrt(bin_size)
    evidence = np.cumsum(drift[:, None] * bin_size + noise, axis=1)
    evidence += 0.25 * np.log((1 - block) / block)[:, None]
    crossed = np.abs(evidence) >= BOUND
    stop = np.where(crossed.any(axis=1), crossed.argmax(axis=1), len(steps) - 1)
    decided = np.arange(len(steps)) > stop[:, None]
    evidence = np.where(decided, evidence[np.arange(n_trials), stop][:, None], evidence)
    right = evidence[:, -1] > 0
    reaction_time = 2 * DECISION_DELAY + steps[stop]
    correct = right == (side > 0)

    since = grid[None, :] - reaction_time[:, None]  # (K, L) seconds since the movement began
    movement = _bump(since, MOVEMENT)
    speed = rng.uniform(2.0, 4.0, (n_trials, 1)) * movement  # rad/s
    index = np.round((grid - DECISION_DELAY) / bin_size).astype(int) - 1
    carried = evidence.clip(-1, 1)[:, index.clip(0, len(steps) - 1)] * (index >= 0)
    carried = carried * np.exp(-np.maximum(since - 0.2, 0) / 0.2)  # forgotten after the report
    shown = (grid >= 0)[None, :] * (0.4 + 0.6 * np.exp(-np.maximum(grid, 0) / 0.15))
    shown = shown * np.where(since < 0.1, 1.0, 0.0)  # the stimulus goes with the response
    drive = shown * (strength**0.5)[:, None]
    left_and_right = [drive * (side == each)[:, None] for each in (-1, 1)]
    turn = np.where(right, 1.0, -1.0)[:, None] * movement
    reward = correct[:, None] * _bump(since - 0.15, 0.5)
    signals = [*left_and_right, carried, turn, movement, reward]  # as INPUTS
    behaviour = {
        "choice": np.where(right, -1, 1),
        "contrast": side * strength,
        "block": block,
        "reward": correct.astype(int),
        "reaction-time": reaction_time,
        "wheel-speed": speed,
    }
    return behaviour, np.stack(signals, axis=-1)


def _bump(since: np.ndarray, width: float) -> np.ndarray:
    """A raised cosine of ``width`` seconds that begins at 0."""
    phase = since / width
    return np.where((phase > 0) & (phase < 1), 0.5 - 0.5 * np.cos(2 * np.pi * phase), 0.0)


def _log_rates(
    regions: np.ndarray,
    inputs: np.ndarray,
    bin_size: float,
    mean_rate: float,
    circuit: np.random.Generator,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Log rates in Hz of an animal's neurons, (K, L, N), and its arousal, (K, L)."""
    n_trials, n_steps, _ = inputs.shape
    latents: dict[str, np.ndarray] = {}  # region -> (K, L, N_LATENTS)
    for region in CIRCUIT:
        keep = np.exp(-bin_size / region.decay)
        drive = np.zeros((n_trials, n_steps, N_LATENTS))
        for name, (delay, strength) in region.upstream.items():
            rotation = np.linalg.qr(circuit.standard_normal((N_LATENTS, N_LATENTS)))[0]
            shift = round(delay / bin_size)
            drive[:, shift:] += latents[name][:, : n_steps - shift] @ (strength * rotation).T
        for name, strength in region.inputs.items():
            direction = circuit.standard_normal(N_LATENTS)
            direction = strength * direction / np.linalg.norm(direction)
            drive += inputs[..., INPUTS.index(name), None] * direction
        drive *= 1 - keep  # so that a constant drive of 1 settles at 1
        drive += region.own * np.sqrt(1 - keep**2) * rng.standard_normal(drive.shape)
        # z(t) = keep z(t-1) + drive(t), from 0
        latents[region.name] = lfilter([1.0], [1.0, -keep], drive, axis=1)
    keep = np.exp(-bin_size / 0.8)
    noise = np.sqrt(1 - keep**2) * rng.standard_normal((n_trials, n_steps))
    arousal = lfilter([1.0], [1.0, -keep], noise, axis=1)
    arousal += rng.standard_normal((n_trials, 1)) * 0.5

    log_rates = np.empty((n_trials, n_steps, len(regions)))
    for name, z in latents.items():
        mine = np.flatnonzero(regions == name)
        loadings = rng.standard_normal((N_LATENTS, len(mine)))
        loadings *= 1.0 / np.linalg.norm(loadings, axis=0) * rng.uniform(0.5, 1.2, len(mine))
        base = np.log(mean_rate) + 0.7 * rng.standard_normal(len(mine))
        shared = 0.3 * rng.standard_normal(len(mine))
        log_rates[:, :, mine] = base + z @ loadings + arousal[..., None] * shared
    return np.minimum(log_rates, np.log(200.0)), arousal  # no neuron fires faster than 200 Hz


def generator_of(session: Session, *stream: str) -> np.random.Generator:
    """Random numbers that depend on the session's name and on their purpose alone."""
    digest = hashlib.sha256("|".join((session.name, *stream)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def layout(session: Session) -> tuple[np.ndarray, float]:
    """Stimulus onset of each trial (K,) and the end of the recording, seconds on its clock."""
    start, stop = session.window
    reaction = session.behaviour.get("reaction-time", np.zeros(session.n_trials))
    ends = np.maximum(stop, np.nan_to_num(reaction) + RESPONSE + 0.3)  # after stimulus onset
    pauses = BETWEEN + generator_of(session, "layout").uniform(0, 0.2, session.n_trials)
    begins = BEFORE + np.concatenate([[0], np.cumsum(ends + pauses - min(start, 0))])
    return begins[:-1] - min(start, 0), float(begins[-1])


def bin_edges(session: Session, stimulus: np.ndarray) -> np.ndarray:
    """Bin edges of every trial, (K, T + 1) seconds."""
    offsets = session.window[0] + session.bin_size * np.arange(session.n_bins + 1)
    return stimulus[:, None] + offsets


def spike_times(
    session: Session, mine: np.ndarray, stimulus: np.ndarray, stop: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Spike times (S,), sorted, and their cluster (S,), an index into ``mine``."""
    if session.observed is not None:
        raise SessionError(f"session {session.name!r}: files cannot say what was not observed")
    counts = session.counts[:, :, mine]
    trial, time_bin, cluster = (np.repeat(i, counts[counts > 0]) for i in np.nonzero(counts))
    edges = bin_edges(session, stimulus)
    inside = edges[trial, time_bin] + session.bin_size * rng.uniform(EDGE, 1 - EDGE, len(trial))

    # Between the windows, neurons fire at their mean rates.
    begins = np.append(0, edges[:, -1]) + 0.001  # of the pauses, (K + 1,)
    lengths = np.append(edges[:, 0], stop) - 0.001 - begins
    more = rng.poisson(lengths[:, None] * session.firing_rates[mine])
    pause, neuron = (np.repeat(i, more[more > 0]) for i in np.nonzero(more))
    between = begins[pause] + lengths[pause] * rng.random(len(pause))

    times = np.concatenate([inside, between])
    order = np.argsort(times, kind="stable")
    return times[order], np.concatenate([cluster, neuron])[order]
