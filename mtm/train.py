"""Training: one explicit loop over batches of one session each, with a scheme drawn for each batch.

Validation hides the same entries every time (its masks are seeded) and scores hidden entries only,
for each scheme apart; the model kept is the one with the best mean over the schemes.
"""

from __future__ import annotations

import copy
import heapq
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mtm.masks import MTM_SCHEMES, NO_REGION, Mask, MaskSampler, scheme
from mtm.metrics import LOG2, log_mean
from mtm.model import MtM, MtMConfig
from mtm.session import Session, SessionError

VALIDATION_SEED = 1_000_003
VALIDATION_BATCH = 64  # trials under one mask, whatever the batch size of training
CPU_TOKENS = 5000  # that pass through a model at once; more take more memory, and no less time

CHOICES = {
    "loss": ("mean", "sum"),
    "tune": ("all", "maps", "maps-then-all"),
    "token": ("new", "mean"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides how a model is trained. ``RECIPES`` holds two sets of values.

    Args:
        epochs: passes over the training trials.
        batch_size: trials of a session in a batch.
        sessions_per_step: batches in a step, of different sessions as far as there are that many,
            each with its own mask. An epoch then has that many times fewer steps.
        micro_batch: trials that pass at once, for small memories; the loss of a step, and but for
            dropout's draws its gradient, stay the same.
        tune: what learns: "all", "maps" (those of the sessions at hand, with their tokens) or
            "maps-then-all".
        maps_share: of the epochs, in which "maps-then-all" trains the maps only.
        token: where the session token of a new session starts, see ``MtM.add_session``.
        lr: peak of the one-cycle schedule.
        warmup: share of the steps in which the rate rises to its peak.
        div_factor: the rate starts at ``lr / div_factor``.
        weight_decay: of AdamW, on weight matrices.
        decay_all: weight decay on biases, norms and tokens as well.
        loss: "mean" or "sum" over the targets of a batch.
        clip: largest norm of the gradient, or None.
        schemes: alternated at random.
        ratios: scheme -> share hidden, if not the scheme's own.
        prompt: tell the model which scheme is on, where there are several.
        validations: how often to validate, spread evenly over the epochs.
        seed: of weights, masks, dropout and the order of batches.
        split_seed: of ``Session.split``.
        init: how a new model starts, see ``MtMConfig``.

    Raises:
        ValueError: for a value that cannot be; the message names the field.
    """

    epochs: int = 100
    batch_size: int = 16
    sessions_per_step: int = 1
    micro_batch: int | None = None
    tune: str = "all"
    maps_share: float = 0.2
    token: str = "new"
    lr: float = 1e-3
    warmup: float = 0.15
    div_factor: float = 10.0
    weight_decay: float = 0.01
    decay_all: bool = False
    loss: str = "mean"
    clip: float | None = 1.0
    schemes: tuple[str, ...] = MTM_SCHEMES
    ratios: dict[str, float] = field(default_factory=dict)
    prompt: bool = True
    validations: int = 20
    seed: int = 0
    split_seed: int = 0
    init: str = "mtm"

    def __post_init__(self) -> None:
        if isinstance(self.schemes, str):
            raise ValueError(f"schemes must be a list of names, got {self.schemes!r}")
        object.__setattr__(self, "schemes", tuple(self.schemes))
        for name in self.schemes:
            scheme(name)
        for name in ("epochs", "batch_size", "sessions_per_step", "lr", "validations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.maps_share < 1:
            raise ValueError(f"maps_share must be between 0 and 1, got {self.maps_share}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 or None, got {self.micro_batch}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}"
                )


RECIPES = {
    "mtm": TrainConfig(),
    "paper": TrainConfig(
        epochs=1000, lr=1e-4, decay_all=True, loss="sum", clip=None, seed=42, init="paper"
    ),
}
"""Settings by name, ``mtm`` for ours and ``paper`` for those of the authors' code."""


def recipe(name: str, **changes: Any) -> TrainConfig:
    """A recipe's settings, some of them changed.

    Raises:
        ValueError: for an unknown recipe or setting; the message lists the known ones.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    known = [f.name for f in fields(TrainConfig)]
    if strangers := [key for key in changes if key not in known]:
        raise ValueError(f"unknown setting {strangers[0]!r}; known: {', '.join(known)}")
    return replace(RECIPES[name], **changes)


@dataclass(repr=False)
class Fit:
    """What training leaves behind.

    Attributes:
        model: with the weights of the best validation, on the device it was trained on.
        history: one entry a validation: ``epoch``, ``step``, ``lr``, ``loss`` (mean over the steps
            since the last), ``seconds``, ``validation`` (scheme -> bits per spike over the training
            mean rates, pooled over hidden entries of all sessions) and their ``mean``.
        config: the settings.
    """

    model: MtM
    history: list[dict[str, Any]]
    config: TrainConfig

    def __repr__(self) -> str:
        sizes, best = self.model.n_parameters(), self.best
        total = sizes["core"] + sum(sizes["sessions"].values())
        return (
            f"Fit of {len(sizes['sessions'])} sessions, {total:,} parameters\n"
            f"  best of {self.config.epochs} epochs: {best['epoch']}, "
            f"{best['mean']:.3f} bits per spike"
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def predict(self, counts: Tensor, scheme: str, mask: Mask, session: str) -> Tensor:
        """As :meth:`mtm.model.MtM.predict`: a fit can be evaluated as its model."""
        return self.model.predict(counts, scheme, mask, session)

    @property
    def best(self) -> dict[str, Any]:
        """The entry of the history whose weights the model has."""
        return max(self.history, key=lambda entry: entry["mean"])

    def to_dict(self) -> dict[str, Any]:
        """Settings and history as JSON can hold them."""
        return {"train": asdict(self.config), "history": self.history}


def fit(
    sessions: Session | Sequence[Session],
    model: MtM | MtMConfig | Fit | None = None,
    *,
    config: TrainConfig | None = None,
    depth: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **changes: Any,
) -> Fit:
    """Train a model on the training trials of one or many sessions.

    Args:
        sessions: with distinct names and equally many bins.
        model: a model to go on with (it is changed: sessions it does not know are added, and those
            it knows may be forgotten), or the sizes of a new one, whose ``prompts``, ``causal``,
            ``init``, ``split_seed`` and ``bin_size`` follow the settings and the data. Default:
            ``MtMConfig.from_depth(depth)``.
        config: settings; default ``RECIPES["mtm"]``.
        depth: of a new model; default 2.
        device: default: a GPU where there is one.
        progress: a progress bar in a terminal, one live line in a notebook.
        **changes: single settings of :class:`TrainConfig`.

    Returns:
        the trained model and its history.

    Raises:
        SessionError: when the sessions do not go together, or lack what a scheme needs.
        FloatingPointError: when the loss stops being finite.

    Example:
        >>> result = fit(sessions, depth=2, epochs=30)
        >>> result.model, result.best["mean"]
    """
    sessions = [sessions] if isinstance(sessions, Session) else list(sessions)
    if strangers := [type(s).__name__ for s in sessions if not isinstance(s, Session)]:
        raise TypeError(f"fit needs Sessions, got {strangers[0]}; see mtm.Session, Session.load")
    config = config or RECIPES["mtm"]
    if changes:
        known = {f.name for f in fields(TrainConfig)}
        if strangers := set(changes) - known:
            raise ValueError(
                f"unknown setting {min(strangers)!r}; known: {', '.join(sorted(known))}"
            )
        config = replace(config, **changes)
    _check_sessions(sessions, config)
    model = model.model if isinstance(model, Fit) else model
    if depth is not None and model is not None:
        raise ValueError("depth is of a new model; this one has its sizes, pass one or the other")
    if not isinstance(model, MtM | MtMConfig | None):
        raise TypeError(f"fit goes on with an MtM or starts from an MtMConfig, got {model!r}; a "
                        "folder is read by mtm.load")  # fmt: skip
    device = torch.device(device) if device else pick_device()
    home = _home(sessions, device)
    data = [_Data(session, config, device, home) for session in sessions]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # weights and dropout; the caller's generator is left alone
        model = _build(model, data, config, depth).to(device)
        learns = [parameter.requires_grad for parameter in model.parameters()]
        try:
            history = _loop(model, data, config, Progress(config.epochs, progress))
        finally:
            for parameter, learned in zip(model.parameters(), learns, strict=True):
                parameter.requires_grad_(learned)
            model.eval()
    return Fit(model, history, config)


def pick_device() -> torch.device:
    """The GPU where torch sees one (CUDA, else Apple's MPS), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def masked_loss(log_rates: Tensor, counts: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Poisson negative log-likelihood over the target entries, without its constant term.

    Args:
        log_rates: (B, T, N).
        counts: (B, T, N).
        target: (B, T, N) bool.
        reduction: ``"mean"`` or ``"sum"`` over the targets.
    """
    nll = F.poisson_nll_loss(log_rates, counts, log_input=True, full=False, reduction="none")
    total = torch.where(target, nll, 0.0).sum()
    return total / target.sum().clamp(min=1) if reduction == "mean" else total


def accumulate(model: MtM, batches: Sequence[Batch], config: TrainConfig) -> Tensor:
    """Add the gradient of one step's loss to the parameters, and return the loss.

    The loss of a step is the mean over its batches (with ``loss="sum"``, the sum), each of one
    session, as if they were steps of their own whose gradients add up.
    """
    loss = torch.zeros((), device=model.device)
    for pieces in _passes(model, batches, config):
        with _autocast(model.device):
            log_rates = model.forward_many([tuple(piece) for piece, _ in pieces])
        part = sum(
            weight * masked_loss(out.float(), piece.counts, piece.mask.target, "sum")
            for out, (piece, weight) in zip(log_rates, pieces, strict=True)
        )
        part.backward()
        loss += part.detach()
    return loss


def _passes(
    model: MtM, batches: Sequence[Batch], config: TrainConfig
) -> Iterator[list[tuple[Batch, Tensor | float]]]:
    """Pieces of the batches that pass through the model together, with weights in the loss."""
    limit = CPU_TOKENS if model.device.type == "cpu" else sys.maxsize
    together, n_tokens = [], 0
    for batch in batches:
        weight: Tensor | float = 1.0
        if config.loss == "mean":
            weight = 1 / batch.mask.target.sum().clamp(min=1) / len(batches)
        each = model.n_tokens(batch.session)
        size = config.micro_batch or min(len(batch.counts), max(1, limit // each))
        for piece in batch.split(size):
            n_new = len(piece.counts) * each
            if together and (config.micro_batch or n_tokens + n_new > limit):
                yield together
                together, n_tokens = [], 0
            together.append((piece, weight))
            n_tokens += n_new
    yield together


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


# ------------------------------------------------------------------------------- inside


class _Data:
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
        null = torch.from_numpy(log_mean(session.counts[split.train]))  # (N,)
        self.null = null.float().to(device)

    def batch(self, trials: Tensor) -> Tensor:
        counts = self.counts[trials].to(self.device)  # (B, T, N)
        return (counts.int() & 0xFFFF if self.wide else counts).float()


def _home(sessions: list[Session], device: torch.device) -> torch.device:
    """Where counts are while a model trains: on its device, if they fill at most half of it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(session.counts.nbytes for session in sessions) > free / 2:
            return torch.device("cpu")
    return device


def _check_sessions(sessions: list[Session], config: TrainConfig) -> None:
    if not sessions:
        raise SessionError("no session to train on")
    names = [session.name for session in sessions]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise SessionError(f"two sessions are named {min(repeated)!r}; names must differ")
    if len({session.n_bins for session in sessions}) > 1:
        listing = ", ".join(f"{s.name!r} {s.n_bins}" for s in sessions)
        raise SessionError(f"sessions must have equally many bins, got {listing}")
    for what in ("bin_size", "window"):
        values = {tuple(np.round(np.atleast_1d(getattr(s, what)), 9)) for s in sessions}
        if len(values) > 1:
            listing = ", ".join(f"{s.name!r} {getattr(s, what)}" for s in sessions)
            raise SessionError(f"sessions must have the same {what} (s), got {listing}")
    regional = [name for name in config.schemes if scheme(name).needs_regions]
    for session in sessions:
        if regional and not session.region_names:
            rest = [name for name in config.schemes if name not in regional]
            raise SessionError(
                f"session {session.name!r}, regions: no neuron has a label, but "
                f"{' and '.join(regional)} masking needs regions; pass regions, or train with "
                f"schemes={tuple(rest)}"
            )


def _build(
    model: MtM | MtMConfig | None, data: list[_Data], config: TrainConfig, depth: int | None
) -> MtM:
    if not isinstance(model, MtM):
        if config.tune != "all":
            raise ValueError(f"tune={config.tune!r} needs a trained model to start from")
        if model is None:
            model = MtMConfig.from_depth(depth or 2, n_bins=data[0].n_bins)
        if model.n_bins != data[0].n_bins:
            raise SessionError(
                f"session {data[0].name!r} has {data[0].n_bins} bins, the model's sizes say "
                f"{model.n_bins}; pass n_bins={data[0].n_bins} to MtMConfig"
            )
        if model.init not in ("mtm", config.init):
            raise ValueError(
                f"how a model starts is a setting of training: pass init={model.init!r} to fit"
            )
        sizes = replace(model, bin_size=data[0].bin_size)
        model = MtM(_fit_to_schemes(sizes, config))
    else:
        _check_model(model, config)
        if config.tune == "maps" and model.config.tokenizer == "ndt2":
            warnings.warn(
                "tune='maps' with ndt2 trains next to nothing: a session has a bias for each "
                "neuron and a token, and places in the row that the model did not know stay as "
                "they start; use 'all' or 'maps-then-all'",
                stacklevel=3,
            )
        if abs(model.config.bin_size - data[0].bin_size) > 1e-9:
            raise SessionError(
                f"session {data[0].name!r} has bins of {data[0].bin_size} s, the model was trained "
                f"on bins of {model.config.bin_size} s"
            )
    for session in data:
        if session.name not in model.session_names:
            model.add_session(session.name, session.n_neurons, session.null.exp(), config.token)
    return model


def _fit_to_schemes(sizes: MtMConfig, config: TrainConfig) -> MtMConfig:
    """Prompts for the schemes that are trained, none where there is but one to tell apart."""
    prompted = tuple(name for name in config.schemes if scheme(name).prompt)
    use = config.prompt and len(config.schemes) > 1
    causal = any(scheme(name).causal for name in config.schemes)
    return replace(
        sizes,
        prompts=prompted if use else (),
        causal=causal,
        split_seed=config.split_seed,
        init=config.init,
    )


def _check_model(model: MtM, config: TrainConfig) -> None:
    """A model that is trained on must be able to do what the new settings ask."""
    wanted = _fit_to_schemes(model.config, config)
    if missing := set(wanted.prompts) - set(model.config.prompts):
        raise ValueError(
            f"the model has no prompt for {', '.join(sorted(missing))}; train it with the schemes "
            f"it knows ({', '.join(model.config.prompts) or 'no prompts'}), or with prompt=False"
        )
    if wanted.causal and not model.config.causal:
        raise ValueError("the model was never trained causally; train a new one for that scheme")
    if model.config.split_seed not in (None, config.split_seed):
        raise ValueError(
            f"the model was trained on the split of seed {model.config.split_seed}, not "
            f"{config.split_seed}: its training trials would become test trials"
        )


def _loop(
    model: MtM, data: list[_Data], config: TrainConfig, progress: Progress
) -> list[dict[str, Any]]:
    device = model.device
    optimizer = _optimizer(model, config)
    n_batches = sum(math.ceil(len(s.train) / config.batch_size) for s in data)
    steps_per_epoch = math.ceil(n_batches / config.sessions_per_step)
    sampler = _sampler(model, config, config.seed)
    order = np.random.default_rng(config.seed)
    learning = [p for p in model.parameters() if p.requires_grad]  # the caller may have frozen some
    maps = {id(p) for session in data for p in model._maps(session.name).parameters()}
    maps_epochs = _maps_epochs(config)
    history: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    loss_sum, n_steps, step, start = torch.zeros((), device=device), 0, 0, time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        model.train()
        if epoch in (1, maps_epochs + 1):  # a schedule for the maps, one for what follows
            for parameter in learning:
                parameter.requires_grad_(epoch > maps_epochs or id(parameter) in maps)
            epochs = maps_epochs if epoch <= maps_epochs else config.epochs - maps_epochs
            schedule = _schedule(optimizer, config, epochs * steps_per_epoch)
        for chosen in _steps(data, config, order):
            batches = []
            for session, trials in chosen:
                counts = session.batch(torch.from_numpy(trials).to(session.counts.device))
                name, mask = sampler(counts, session.regions)
                batches.append(Batch(counts, session.name, mask, name))
            loss_sum += accumulate(model, batches, config)
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # before the next pass needs the memory
            schedule.step()
            n_steps, step = n_steps + 1, step + 1
        if _validation_due(epoch, config):
            mean_loss = float(loss_sum) / n_steps  # the only point where the host waits
            if not math.isfinite(mean_loss):
                progress.close(f"loss is {mean_loss} in epoch {epoch}")
                raise FloatingPointError(
                    f"the loss became {mean_loss} by epoch {epoch}, step {step}; lower lr "
                    f"(now {config.lr:g}) or set clip"
                )
            validation = validate(model, data, config)
            entry = {"epoch": epoch, "step": step, "lr": schedule.get_last_lr()[0]}
            entry |= {"loss": mean_loss, "seconds": time.perf_counter() - start}
            entry |= {"validation": validation, "mean": float(np.nanmean([*validation.values()]))}
            if not history or entry["mean"] > max(e["mean"] for e in history):
                best = copy.deepcopy(model.state_dict())
            history.append(entry)
            loss_sum.zero_()
            n_steps = 0
        progress.update(epoch, history)
    model.load_state_dict(best)
    seconds = time.perf_counter() - start
    top = max(history, key=lambda entry: entry["mean"])
    progress.close(
        f"{step} steps in {seconds:.0f} s on {device.type}; "
        f"best: epoch {top['epoch']}, {top['mean']:.3f} bits per spike"
    )
    return history


def _optimizer(model: MtM, config: TrainConfig) -> torch.optim.AdamW:
    fused = model.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(_parameter_groups(model, config), lr=config.lr, fused=fused)


def _schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, n_steps: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=n_steps,
        pct_start=_warmup(config.warmup, n_steps),
        div_factor=config.div_factor,
    )


def _warmup(share: float, n_steps: int) -> float:
    """The share of warm-up steps, moved a little where torch's schedule would divide by zero."""
    return share * 1.01 if abs(share * n_steps - 1) < 1e-6 else share


def _validation_due(epoch: int, config: TrainConfig) -> bool:
    """True ``config.validations`` times, evenly spread, the last at the last epoch."""
    done = [e * config.validations // config.epochs for e in (epoch - 1, epoch)]
    return done[0] < done[1]


def _maps_epochs(config: TrainConfig) -> int:
    """Number of epochs, from the first, in which only the sessions' maps and tokens learn."""
    some = max(1, round(config.maps_share * config.epochs))
    return {"all": 0, "maps": config.epochs, "maps-then-all": some}[config.tune]


def _sampler(model: MtM, config: TrainConfig, seed: int) -> MaskSampler:
    return MaskSampler(
        config.schemes, config.ratios, seed, model.device, patch_size=model.config.patch_size
    )


def _steps(
    data: list[_Data], config: TrainConfig, order: np.random.Generator
) -> Iterator[list[tuple[_Data, np.ndarray]]]:
    """One epoch: every training trial once, in batches of one session, composed anew each time.

    A step takes ``sessions_per_step`` batches, of different sessions as long as there are any.
    """
    batches = []
    for session in data:
        trials = order.permutation(session.train)
        cuts = range(config.batch_size, len(trials), config.batch_size)
        batches += [(session, batch) for batch in np.split(trials, cuts)]
    queues: dict[str, deque[tuple[int, tuple[_Data, np.ndarray]]]] = {s.name: deque() for s in data}
    for place, i in enumerate(order.permutation(len(batches))):
        queues[batches[i][0].name].append((place, batches[i]))
    heads = [(queue[0][0], name) for name, queue in queues.items() if queue]
    heapq.heapify(heads)
    while heads:
        chosen, others = [], []
        while len(chosen) < config.sessions_per_step and (heads or others):
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


def _parameter_groups(model: MtM, config: TrainConfig) -> list[dict[str, Any]]:
    """Weight decay on weight matrices, and on everything where ``decay_all`` says so."""
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)
    }
    decayed = [p for p in model.parameters() if config.decay_all or id(p) in matrices]
    taken = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    return groups + ([{"params": rest, "weight_decay": 0.0}] if rest else [])


@torch.no_grad()
def validate(
    model: MtM, data: Sequence[_Data], config: TrainConfig, rounds: int = 4
) -> dict[str, float]:
    """Bits per spike on hidden entries of the validation trials, scheme -> value.

    The null model is each neuron's training mean. Masks are drawn with a seed of their own, so
    every call scores the same entries: ``rounds`` masks for each batch of trials, or, where a
    scheme masks regions, one for each region. NaN where no hidden entry has a spike.
    """
    model.eval()
    scores = {}
    for name in config.schemes:
        sampler = _sampler(model, config, VALIDATION_SEED)
        gain = torch.zeros((), device=model.device)
        spikes = torch.zeros((), device=model.device)
        for session in data:
            # Only one region labelled at a time, so that each has its turn.
            turns = [session.regions] * rounds
            if scheme(name).needs_regions:
                codes = range(session.n_regions)
                turns = [torch.where(session.regions == c, 0, NO_REGION) for c in codes]
            for trials in session.val.split(VALIDATION_BATCH):
                counts = session.batch(trials)
                null = session.null.expand_as(counts)
                for regions in turns:
                    mask = sampler.draw(name, counts, regions)
                    with _autocast(model.device):
                        log_rates = model(counts, session.name, mask, prompt=name).float()
                    gain += masked_loss(null, counts, mask.target, "sum")
                    gain -= masked_loss(log_rates, counts, mask.target, "sum")
                    spikes += (counts * mask.target).sum()
        scores[name] = float(gain / (spikes * LOG2)) if spikes > 0 else math.nan
    if all(math.isnan(value) for value in scores.values()):
        raise SessionError(
            "no hidden entry of the validation trials has a spike; use more trials, and check that "
            "the schemes hide something, and that spikes and events are on one clock, in seconds"
        )
    return scores


def _autocast(device: torch.device) -> torch.autocast:
    """bf16 on GPUs that compute in it (Ampere and later; older ones only emulate it, slowly)."""
    usable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=usable)


class Progress:
    """A bar in a terminal; in a notebook one line that is written over; silent in logs.

    A notebook that was run for a book then shows that one line, with the result.
    """

    def __init__(self, epochs: int, show: bool) -> None:
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        self.line = None
        if show and shell is not None and type(shell).__name__ != "TerminalInteractiveShell":
            from IPython.display import display

            self.line = display({"text/plain": "training ..."}, raw=True, display_id=True)
        quiet = self.line is not None or not show or not sys.stderr.isatty()
        self.bar = tqdm(total=epochs, unit="epoch", disable=quiet, leave=False)

    def update(self, epoch: int, history: list[dict[str, Any]]) -> None:
        """Say how far training is."""
        score = f"validation {history[-1]['mean']:.3f} bits per spike" if history else ""
        self.bar.update(1)
        self.bar.set_postfix_str(score)
        self._write(f"epoch {epoch} of {self.bar.total}  {score}")

    def close(self, summary: str) -> None:
        """Leave the summary in the place of the bar."""
        self.bar.close()
        if not self.bar.disable:
            print(summary, file=sys.stderr)
        self._write(summary)

    def _write(self, text: str) -> None:
        if self.line is not None:
            self.line.update({"text/plain": text}, raw=True)
