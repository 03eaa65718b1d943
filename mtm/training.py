"""Training: one explicit loop over batches of one session each, with a scheme drawn for each batch.

Validation hides the same entries every time (its masks are seeded) and scores hidden entries only,
for each scheme apart; the model kept is the one with the best mean over the schemes.

Everything random has a seed made of the settings' seed and of where it is: the epoch (order of the
batches), the step and the place in it (masks), the step (dropout), the session (validation masks).
So a run that was killed goes on as if nothing had been, and several processes draw the masks that
one would.
"""

from __future__ import annotations

import copy
import hashlib
import heapq
import importlib.util
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mtm import distributed
from mtm.checkpoint import History, Run, best_entry, without_nan, write_history
from mtm.masks import NO_REGION, Mask, MaskSampler, scheme
from mtm.metrics import LOG2, log_mean
from mtm.model import MtM, MtMConfig
from mtm.recipes import TrainConfig, changed, recipe
from mtm.session import Session, SessionError, require_alike


class Batch(NamedTuple):
    """What a model is shown of one session in a step: the arguments of ``MtM.forward``."""

    counts: Tensor
    scheme: str | None
    mask: Mask
    session: str

    def split(self, size: int) -> list[Batch]:
        """Pieces of ``size`` trials."""
        parts = zip(
            *(x.split(size) for x in (self.counts, self.mask.hidden, self.mask.target)), strict=True
        )
        return [
            Batch(counts, self.scheme, Mask(hidden, target, self.mask.causal), self.session)
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

    def training_counts(self) -> np.ndarray:
        """Counts of the training trials, (K', T, N)."""
        counts = self.counts[torch.from_numpy(self.train).to(self.counts.device)].cpu().numpy()
        return counts.view(np.uint16) if self.wide else counts


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


def pick_device() -> torch.device:
    """The GPU where torch sees one (CUDA, else Apple's MPS), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """bf16 on GPUs that compute in it (Ampere and later; older ones only emulate it, slowly)."""
    usable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    on = usable if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


def setup_of(device: torch.device, home: torch.device, config: TrainConfig) -> str:
    """What a run computes on and how, in a line."""
    bf16 = autocast(device, config.precision)._enabled
    parts = [f"training on {device}", "bf16" if bf16 else "float32"]
    if device.type == "cpu":
        parts.insert(1, f"threads: {torch.get_num_threads()}")
    if device.type == "cuda":
        parts[0] += f" ({torch.cuda.get_device_name(device)})"
        parts.append("counts " + ("on the GPU" if home == device else "sent batch by batch"))
    if config.compile != "none":
        parts.append(f"torch.compile {config.compile}")
    if distributed.processes() > 1:
        parts.append(f"{distributed.processes()} processes")
    return ", ".join(parts)


@contextmanager
def compiled(model: MtM, config: TrainConfig) -> Iterator[None]:
    """Within, the encoder is compiled, if the settings say so.

    Only the encoder: its shapes are those of all sessions, where the maps in and out have a width
    for each, and would be compiled for each.
    """
    if config.compile == "none":
        yield
        return
    vars(model)["encode"] = torch.compile(model.encode, mode=config.compile)  # of this one alone
    try:
        # Few graphs a model, but torch counts them for all models of a process together, and
        # silently stops compiling at 8. (Before torch 2.7 the limit had another name.)
        known = hasattr(torch._dynamo.config, "recompile_limit")
        limit = "recompile_limit" if known else "cache_size_limit"
        with torch._dynamo.config.patch({limit: 64}):
            yield
    finally:
        del model.encode


def peak_memory(device: torch.device) -> float | None:
    """Most memory in use so far, GB: of the GPU, else of this process; None where not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


SILENCE = 30.0  # seconds after which a log gets another line


class Progress:
    """A bar in a terminal; in a notebook one line that is written over; lines at times in logs.

    A notebook that was run for a book then shows that one line, with the result.

    Args:
        epochs: until the end.
        show: nothing is shown otherwise.
        setup: what the run computes on and how; the first line.
    """

    def __init__(self, epochs: int, show: bool, setup: str) -> None:
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        self.epochs, self.show, self.line = epochs, show, None
        self.spoken = time.monotonic()
        if show and shell is not None and type(shell).__name__ != "TerminalInteractiveShell":
            from IPython.display import display

            self.line = display({"text/plain": setup}, raw=True, display_id=True)
        elif show:
            print(setup, file=sys.stderr)
        quiet = self.line is not None or not show or not sys.stderr.isatty()
        self.bar = tqdm(total=epochs, unit="epoch", disable=quiet, leave=False)

    def update(self, epoch: int, history: History) -> None:
        """Say how far training is."""
        score = f"validation {history[-1]['mean']:.3f} bits per spike" if history else ""
        self.bar.update(epoch - self.bar.n)
        self.bar.set_postfix_str(score)
        said = f"epoch {epoch} of {self.epochs}  {score}"
        if self.line is not None:
            self.line.update({"text/plain": said}, raw=True)
        elif self.show and self.bar.disable and time.monotonic() - self.spoken > SILENCE:
            print(said, file=sys.stderr, flush=True)
            self.spoken = time.monotonic()

    def stop(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def close(self, summary: str) -> None:
        """Leave the summary in the place of the bar."""
        self.stop()
        if self.line is not None:
            self.line.update({"text/plain": summary}, raw=True)
        elif self.show:
            print(summary, file=sys.stderr)


class Watch:
    """Passes on what each validation found, to whatever looks on.

    Args:
        progress: the bar or line.
        folder: where ``history.jsonl`` is written, a line a validation, and, where the package
            tensorboard is installed, the same for TensorBoard in ``tensorboard/``; None = nowhere.
        history: of a run that goes on; it is written again, for the case that it was killed
            before it could write the last entry.
        listener: called with the history after each validation.
    """

    def __init__(
        self,
        progress: Progress,
        folder: Path | None = None,
        history: Sequence[dict[str, Any]] = (),
        listener: Callable[[History], Any] | None = None,
    ) -> None:
        self.progress, self.folder, self.listener, self.board = progress, folder, listener, None
        if folder is not None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=0)
        if folder is not None:
            write_history(folder, list(history))
        for entry in history:
            self._show(entry)

    def validated(self, history: History) -> None:
        """Pass on the history, whose last entry is new."""
        if self.folder is not None:
            write_history(self.folder, history)
        self._show(history[-1])
        if self.listener is not None:
            self.listener(history)

    def _show(self, entry: dict[str, Any]) -> None:
        if self.board is not None:
            for name, value in flat(entry).items():
                self.board.add_scalar(name, value, entry["step"])
            self.board.flush()

    def close(self, summary: str) -> None:
        """The end of the run."""
        self.progress.close(summary)
        if self.board is not None:
            self.board.close()


def flat(entry: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a history entry under one name each, as ``validation/neuron``."""
    found: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif value is not None:
            found[prefix + key] = value
    return found


VALIDATION_BATCH = 64  # trials under one mask, whatever the batch size of training
VALIDATION_MASKS = 4  # of a batch, where the regions do not say how many
CPU_TOKENS = 5000  # that pass through a model at once; more take more memory, and no less time


@dataclass(repr=False)
class Fit:
    """What training leaves behind.

    Attributes:
        model: with the weights of the best validation, on the device it was trained on.
        history: one entry a validation: ``epoch``, ``step``, ``lr``, ``loss`` (mean over the
            batches since the last) and ``losses`` (the same for each scheme), ``validation``
            (scheme -> bits per spike over the training mean rates, pooled over hidden entries of
            all sessions) and their ``mean``, ``seconds`` since the start, trials and tokens a
            second while training, and peak memory in GB.
        config: the settings.
    """

    model: MtM
    history: History
    config: TrainConfig

    def __repr__(self) -> str:
        sizes, best = self.model.n_parameters(), self.best
        total, n = sizes["core"] + sum(sizes["sessions"].values()), len(sizes["sessions"])
        return (
            f"Fit of {n} session{'s' * (n != 1)}, {total:,} parameters\n"
            f"  best of {self.config.epochs} epochs: {best['epoch']}, "
            f"{best['mean']:.3f} bits per spike"
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def predict_log_rates(self, counts: Tensor, scheme: str, mask: Mask, session: str) -> Tensor:
        """As :meth:`mtm.model.MtM.predict`: a fit can be evaluated as its model."""
        return self.model.predict_log_rates(counts, scheme, mask, session)

    @property
    def best(self) -> dict[str, Any]:
        """The entry of the history whose weights the model has."""
        return best_entry(self.history)

    def to_dict(self) -> dict[str, Any]:
        """Settings and history as JSON can hold them."""
        return {"train": asdict(self.config), "history": without_nan(self.history)}


def fit(
    sessions: Session | Sequence[Session],
    model: MtM | MtMConfig | Fit | None = None,
    *,
    config: TrainConfig | str | None = None,
    depth: int | None = None,
    device: str | torch.device | None = None,
    folder: str | Path | None = None,
    restart: bool = False,
    save_every: float = 300.0,
    progress: bool = True,
    on_validation: Callable[[History], Any] | None = None,
    **changes: Any,
) -> Fit:
    """Train a model on the training trials of one or many sessions.

    Args:
        sessions: with distinct names, and the same bins and window.
        model: a model to go on with, which stays as it is: a copy learns, sessions it does not know
            are added, and what it knows of others may get worse. Or the sizes of a new one.
            Default: ``MtMConfig.from_depth(depth)``.
        config: settings, or the name of a recipe: "mtm" (default) or "paper".
        depth: of a new model; default 2.
        device: default: a GPU where there is one.
        folder: where the best model so far, ``history.jsonl`` and the state of the run are kept;
            without one, what is interrupted is lost. A run that was killed goes on there when the
            same is called again, and on a CPU (with the same torch and number of threads) ends with
            the very weights it would have ended with. ``mtm.load`` reads the model.
        restart: begin anew, and replace what the folder holds.
        save_every: seconds between two states on disk. A state has four times the model's size.
        progress: a progress bar in a terminal, one live line in a notebook.
        on_validation: called with the history after each validation, as ``mtm.plots.live()``.
        **changes: single settings of :class:`TrainConfig`.

    Returns:
        the trained model and its history.

    Raises:
        SessionError: when the sessions do not go together, or lack what a scheme needs.
        FloatingPointError: when the loss stops being finite, naming step, session and scheme; the
            folder then has the best weights so far, where there was a validation.
        StateError: when the folder holds another run, or a model that is not of a run.

    Example:
        >>> result = fit(sessions, depth=2, epochs=30)
        >>> result.model, result.best["mean"]
    """
    sessions = [sessions] if isinstance(sessions, Session) else list(sessions)
    if strangers := [type(s).__name__ for s in sessions if not isinstance(s, Session)]:
        raise TypeError(f"fit needs Sessions, got {strangers[0]}; see mtm.Session, Session.load")
    config = changed(
        config if isinstance(config, TrainConfig) else recipe(config or "mtm"), changes
    )
    _check_sessions(sessions, config)
    model = _start(model, depth)
    device = torch.device(device) if device else pick_device()
    home = home_of(sessions, device)
    data = [SessionData(session, config, device, home) for session in sessions]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Of new weights; the caller's generators, of the CPU and of this GPU, are left alone.
        torch.manual_seed(config.seed)
        model = _build(model, data, config, depth).to(device)
        run = Run(folder, _description(model, data, config), save_every, restart)
        setup, per_epoch = setup_of(device, home, config), steps_per_epoch(data, config)
        watch = _watch(run, setup, config, per_epoch, progress, on_validation)
        _train(model, data, config, run, watch)
    run.save_model(model)
    return Fit(model, run.history, config)


def _start(model: MtM | MtMConfig | Fit | None, depth: int | None) -> MtM | MtMConfig | None:
    """A copy of a model to go on with, or the sizes of a new one; refuses what is neither."""
    model = model.model if isinstance(model, Fit) else model
    if depth is not None and model is not None:
        raise ValueError("depth is of a new model; this one has its sizes, pass one or the other")
    if not isinstance(model, MtM | MtMConfig | None):
        raise TypeError(f"fit goes on with an MtM or starts from an MtMConfig, got {model!r}; a "
                        "folder is read by mtm.load")  # fmt: skip
    return copy.deepcopy(model)


def _watch(
    run: Run,
    setup: str,
    config: TrainConfig,
    per_epoch: int,
    progress: bool,
    listener: Callable[[History], Any] | None,
) -> Watch:
    """What looks on; of several processes, at the first alone."""
    if distributed.rank() > 0:
        return Watch(Progress(config.epochs, False, setup))
    if run.step >= config.epochs * per_epoch or _patience_is_over(run.history, config):
        setup = f"the run in {run.folder} is finished already"
    elif run.step > 0:
        setup += f", going on after step {run.step} in {run.folder}"
    return Watch(Progress(config.epochs, progress, setup), run.folder, run.history, listener)


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


def accumulate(
    model: MtM, batches: Sequence[Batch], config: TrainConfig, n_batches: int | None = None
) -> Tensor:
    """Add the gradient of one step's loss to the parameters.

    The loss of a step is the mean over its batches (with ``loss="sum"``, the sum), each of one
    session, as if they were steps of their own whose gradients add up.

    Args:
        model: in training mode.
        batches: those of the step, or a share of them.
        config: settings.
        n_batches: of the whole step, where ``batches`` are a share.

    Returns:
        what each of the ``batches`` contributes to the loss, whose sum is the loss; on the device.
    """
    losses = torch.zeros(len(batches), device=model.device)
    for pieces in _passes(model, batches, config, n_batches or len(batches)):
        with autocast(model.device, config.precision):
            log_rates = model.forward_many([piece for _, piece, _ in pieces])
        parts = [
            weight * masked_loss(out.float(), piece.counts, piece.mask.target, "sum")
            for out, (_, piece, weight) in zip(log_rates, pieces, strict=True)
        ]
        torch.stack(parts).sum().backward()
        for (place, _, _), part in zip(pieces, parts, strict=True):
            losses[place] += part.detach()
    return losses


def _passes(
    model: MtM, batches: Sequence[Batch], config: TrainConfig, n_batches: int
) -> Iterator[list[tuple[int, Batch, Tensor | float]]]:
    """Pieces that pass through the model together: number of the batch, piece, weight in loss."""
    limit = CPU_TOKENS if model.device.type == "cpu" else sys.maxsize
    together: list[tuple[int, Batch, Tensor | float]] = []
    n_tokens = 0
    for place, batch in enumerate(batches):
        weight: Tensor | float = 1.0
        if config.loss == "mean":
            weight = 1 / batch.mask.target.sum().clamp(min=1) / n_batches
        each = model.n_tokens(batch.session)
        size = config.micro_batch or min(len(batch.counts), max(1, limit // each))
        for piece in batch.split(size):
            n_new = len(piece.counts) * each
            if together and (config.micro_batch or n_tokens + n_new > limit):
                yield together
                together, n_tokens = [], 0
            together.append((place, piece, weight))
            n_tokens += n_new
    if together:
        yield together


# ------------------------------------------------------------------------------- inside


def _check_sessions(sessions: list[Session], config: TrainConfig) -> None:
    if not sessions:
        raise SessionError("no session to train on")
    if config.batches_per_step < distributed.processes():
        raise ValueError(
            f"batches_per_step={config.batches_per_step} leaves some of "
            f"{distributed.processes()} processes without a batch; set it to a multiple of "
            f"{distributed.processes()}, or start fewer"
        )
    require_alike(sessions)
    regional = [name for name in config.schemes if scheme(name).needs_regions]
    for session in sessions:
        if regional and not session.region_names:
            rest = [name for name in config.schemes if name not in regional]
            raise SessionError(
                f"session {session.name!r}, regions: no neuron has a label, but "
                f"masking by {' and '.join(regional)} needs regions; pass regions, or train with "
                f"schemes={tuple(rest)}"
            )


def _build(
    model: MtM | MtMConfig | None, data: list[SessionData], config: TrainConfig, depth: int | None
) -> MtM:
    if not isinstance(model, MtM):
        if config.tune != "all":
            raise ValueError(f"tune={config.tune!r} needs a trained model to start from")
        if model is None:
            paper = {"positions": "learned", "input_counts": "raw"}
            theirs = paper if config.init == "paper" else {}
            model = MtMConfig.from_depth(depth or 2, **theirs)
        prompts, causal = _needs_of(config)
        options: dict[str, Any] = {"prompts": prompts, "causal": causal, "init": config.init}
        model = MtM(model, data[0].n_bins, bin_size=data[0].bin_size, **options)
    else:
        _check_model(model, config)
        if config.tune == "maps" and model.config.tokenizer == "ndt2":
            warnings.warn(
                "tune='maps' with ndt2 trains next to nothing: a session has a bias for each "
                "neuron and a token, and places in the row that the model did not know stay as "
                "they start; use 'all' or 'maps-then-all'",
                stacklevel=3,
            )
        if abs(model.bin_size - data[0].bin_size) > 1e-9:
            raise SessionError(
                f"session {data[0].name!r} has bins of {data[0].bin_size} s, the model was trained "
                f"on bins of {model.bin_size} s"
            )
    model.split_seed = config.split_seed
    for session in data:
        if session.name not in model.session_names:
            counts = session.training_counts()
            model.add_session(session.name, session.n_neurons, counts, config.token)
        known = model.seen.get(session.name, session.prints)
        model.seen[session.name] = np.union1d(known, session.prints)
    return model


def _needs_of(config: TrainConfig) -> tuple[tuple[str, ...], bool]:
    """Prompts for the schemes that are trained, none where there is but one; causal attention."""
    prompted = tuple(name for name in config.schemes if scheme(name).prompt)
    use = config.prompt and len(config.schemes) > 1
    return prompted if use else (), any(scheme(name).causal for name in config.schemes)


def _check_model(model: MtM, config: TrainConfig) -> None:
    """A model that is trained on must be able to do what the new settings ask."""
    prompts, causal = _needs_of(config)
    if missing := set(prompts) - set(model.prompts):
        raise ValueError(
            f"the model has no prompt for {', '.join(sorted(missing))}; train it with the schemes "
            f"it knows ({', '.join(model.prompts) or 'no prompts'}), or with prompt=False"
        )
    if causal and not model.causal:
        raise ValueError("the model was never trained causally; train a new one for that scheme")
    if model.split_seed not in (None, config.split_seed):
        raise ValueError(
            f"the model was trained on the split of seed {model.split_seed}, not "
            f"{config.split_seed}: its training trials would become test trials"
        )


def _train(
    model: MtM, data: list[SessionData], config: TrainConfig, run: Run, watch: Watch
) -> None:
    """Train, and leave the best weights; what the caller had frozen is frozen again."""
    learns = [parameter.requires_grad for parameter in model.parameters()]
    try:
        with compiled(model, config):
            _loop(model, data, config, run, watch)
    finally:
        watch.progress.stop()
    model.load_state_dict(run.best)
    for parameter, learned in zip(model.parameters(), learns, strict=True):
        parameter.requires_grad_(learned)
    model.eval()


def _loop(model: MtM, data: list[SessionData], config: TrainConfig, run: Run, watch: Watch) -> None:
    optimizer, sampler = _optimizer(model, config), _sampler(model, config)
    per_epoch = steps_per_epoch(data, config)
    phases = _Phases(model, data, config, per_epoch)
    distributed.spread(model.state_dict().values())
    run.restore(model, optimizer)
    distributed.agree("steps taken", run.step, model.device)
    start, speed = time.perf_counter() - run.seconds, Speed(model)
    first, done = divmod(run.step, per_epoch)
    for epoch in range(first + 1, config.epochs + 1):
        if _patience_is_over(run.history, config):
            break
        model.train()
        if epoch == first + 1 or phases.begins(epoch):
            schedule = phases.begin(epoch, optimizer)
            if run.step > phases.first_step(epoch):
                run.restore_schedule(optimizer, schedule)
        order = np.random.default_rng(seed_of(config.seed, "order", epoch))
        for chosen in islice(steps_of(data, config, order), done, None):
            if run.due():
                run.seconds = time.perf_counter() - start
                run.save(model, optimizer, schedule)
            run.taken(*_take_step(model, optimizer, chosen, sampler, config, run.step))
            schedule.step()
            speed.taken(chosen)
        done = 0
        if _validation_due(epoch, config):
            place = {"epoch": epoch, "step": run.step, "lr": schedule.get_last_lr()[0]}
            losses = run.mean_losses()  # the only point where the host waits
            entry: dict[str, Any] = place | losses | speed.measured()
            scores = validate(model, data, config)
            entry |= {"validation": scores, "mean": float(np.nanmean([*scores.values()]))}
            run.seconds = time.perf_counter() - start
            entry |= {"seconds": run.seconds, "memory_gb": peak_memory(model.device)}
            better = run.validated(entry, model)
            run.save(model, optimizer, schedule)
            if better:
                run.save_model(model)
            watch.validated(run.history)
            speed = Speed(model)
        watch.progress.update(epoch, run.history)
    watch.close(_summary(run, model.device))


def _summary(run: Run, device: torch.device) -> str:
    best = best_entry(run.history)
    return (
        f"{run.step} steps in {run.seconds:.0f} s on {device.type}; "
        f"best: epoch {best['epoch']}, {best['mean']:.3f} bits per spike"
    )


def _take_step(
    model: MtM,
    optimizer: torch.optim.Optimizer,
    chosen: Sequence[Trials],
    sampler: MaskSampler,
    config: TrainConfig,
    step: int,
) -> tuple[list[tuple[str, str]], Tensor]:
    """One step of the optimizer; returns session and scheme, and the loss, of each batch.

    With several processes, each computes the gradient of every so many-th batch.
    """
    torch.manual_seed(seed_of(config.seed, "dropout", step, distributed.rank()))
    if config.compile != "none":
        torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs hold is free
    mine = range(distributed.rank(), len(chosen), distributed.processes())
    places, batches = [], []
    for place, (session, trials) in enumerate(chosen):
        sampler.reseed(seed_of(config.seed, "masks", step, place))
        name = sampler.choose()
        places.append((session.name, name))
        if place in mine:
            counts = session.batch(trials)
            mask = sampler.draw(name, counts, session.regions)
            batches.append(Batch(counts, name, mask, session.name))
    losses = torch.zeros(len(chosen), device=model.device)
    losses[mine.start :: mine.step] = accumulate(model, batches, config, len(chosen))
    learning = _learning(model, places)
    distributed.add_up(learning, losses)
    if config.clip is not None:
        torch.nn.utils.clip_grad_norm_(learning, config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # before the next pass needs the memory
    return places, losses * len(chosen) if config.loss == "mean" else losses


def _learning(model: MtM, places: Sequence[tuple[str, str]]) -> list[torch.nn.Parameter]:
    """Parameters that a step on these sessions and schemes gives a gradient."""
    sessions = sorted({session for session, _ in places})
    parts = [model.tokenizer, model.layers, model.norm, *map(model.session_layers, sessions)]
    found = [parameter for part in parts for parameter in part.parameters()]
    if any(name in model.prompts for _, name in places):
        found.append(model.prompt_tokens)
    return [parameter for parameter in found if parameter.requires_grad]


def seed_of(*place: int | str) -> int:
    """A seed that belongs to these numbers and words, and to no others."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Speed:
    """Trials and tokens a second, from when it is made until it is measured."""

    def __init__(self, model: MtM) -> None:
        self.model, self.start, self.trials, self.tokens = model, time.perf_counter(), 0, 0

    def taken(self, chosen: Sequence[tuple[SessionData, np.ndarray]]) -> None:
        """A step on these batches was taken."""
        for session, trials in chosen:
            self.trials += len(trials)
            self.tokens += len(trials) * self.model.n_tokens(session.name)

    def measured(self) -> dict[str, float]:
        """For the history; the device must be done with the steps."""
        seconds = time.perf_counter() - self.start
        rates = {"trials_per_second": self.trials, "tokens_per_second": self.tokens}
        return {name: number / seconds for name, number in rates.items()}


class _Phases:
    """What learns when: all from the start, or the sessions' maps and tokens first.

    Each phase has a learning-rate schedule of its own.
    """

    def __init__(
        self, model: MtM, data: Sequence[SessionData], config: TrainConfig, per_epoch: int
    ) -> None:
        self.config, self.per_epoch = config, per_epoch
        # The caller may have frozen some.
        self.learning = [p for p in model.parameters() if p.requires_grad]
        self.maps = {id(p) for s in data for p in model.session_layers(s.name).parameters()}
        some = max(1, round(config.maps_share * config.epochs))
        self.maps_epochs = {"all": 0, "maps": config.epochs, "maps-then-all": some}[config.tune]

    def begins(self, epoch: int) -> bool:
        """Whether the epoch is the first of a phase."""
        return epoch in (1, self.maps_epochs + 1)

    def first_step(self, epoch: int) -> int:
        """Steps that were taken before the epoch's phase began."""
        return 0 if epoch <= self.maps_epochs else self.maps_epochs * self.per_epoch

    def begin(
        self, epoch: int, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.OneCycleLR:
        """Let learn what learns in the epoch's phase, and make the phase's schedule."""
        maps_only = epoch <= self.maps_epochs
        for parameter in self.learning:
            parameter.requires_grad_(not maps_only or id(parameter) in self.maps)
        n_epochs = self.maps_epochs if maps_only else self.config.epochs - self.maps_epochs
        return _schedule(optimizer, self.config, n_epochs * self.per_epoch)


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


def _patience_is_over(history: History, config: TrainConfig) -> bool:
    if config.patience is None or not history:
        return False
    means = [entry["mean"] for entry in history]
    return len(means) - 1 - int(np.argmax(means)) >= config.patience


def _sampler(model: MtM, config: TrainConfig) -> MaskSampler:
    patch = {"patch_size": model.config.patch_size}
    ratios = {name: share for name, share in config.ratios.items() if name in config.schemes}
    return MaskSampler(config.schemes, ratios, config.seed, model.device, **patch)


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
def validate(model: MtM, data: Sequence[SessionData], config: TrainConfig) -> dict[str, float]:
    """Bits per spike on hidden entries of the validation trials, scheme -> value.

    The null model is each neuron's training mean. Masks are drawn with a seed of their own for
    each session and scheme, so every call scores the same entries: :data:`VALIDATION_MASKS` for
    each batch of trials, or, where a scheme masks regions, one for each region. NaN where no hidden
    entry has a spike. Several processes share out the sessions.
    """
    model.eval()
    found = torch.zeros(len(config.schemes), len(data), 2, device=model.device)  # gain, spikes
    for i in range(distributed.rank(), len(data), distributed.processes()):
        for s, name in enumerate(config.schemes):
            found[s, i] = _validation_gain(model, data[i], name, config)
    found = distributed.total(found).cpu().double()
    for s, i in (~torch.isfinite(found).all(dim=2)).nonzero().tolist():
        raise FloatingPointError(
            f"predictions of session {data[i].name!r}, scheme {config.schemes[s]!r}, in the "
            f"validation trials are not finite; lower lr (now {config.lr:g}) or set clip"
        )
    if not bool((found[..., 1] > 0).any()):
        raise SessionError(
            "no hidden entry of the validation trials has a spike; use more trials, and check that "
            "the schemes hide something, and that spikes and events are on one clock, in seconds"
        )
    gain, spikes = found.sum(dim=1).unbind(dim=1)
    return dict(zip(config.schemes, (gain / (spikes * LOG2)).tolist(), strict=True))


def _validation_gain(model: MtM, session: SessionData, name: str, config: TrainConfig) -> Tensor:
    """Nats over the null model in a session's hidden validation entries, and spikes there; (2,)."""
    sampler = _sampler(model, config)
    sampler.reseed(seed_of("validation", session.name, name))
    # Only one region labelled at a time, so that each has its turn.
    turns = [session.regions] * VALIDATION_MASKS
    if scheme(name).needs_regions:
        codes = range(session.n_regions)
        turns = [torch.where(session.regions == c, 0, NO_REGION) for c in codes]
    found = torch.zeros(2, device=model.device)
    for trials in session.val.split(VALIDATION_BATCH):
        counts = session.batch(trials)
        null = session.null.expand_as(counts)
        for regions in turns:
            mask = sampler.draw(name, counts, regions)
            with autocast(model.device, config.precision):
                log_rates = model(counts, name, mask, session.name).float()
            found[0] += masked_loss(null, counts, mask.target, "sum")
            found[0] -= masked_loss(log_rates, counts, mask.target, "sum")
            found[1] += (counts * mask.target).sum()
    return found


def _description(model: MtM, data: Sequence[SessionData], config: TrainConfig) -> dict[str, Any]:
    """What a run is; one that was killed goes on only as the same."""
    sessions = {s.name: [len(s.train), s.n_bins, s.n_neurons, s.digest] for s in data}
    described = {"train": asdict(config), "model": _settings_of(model), "sessions": sessions}
    # Of a model that was trained before, what tells it from others and stays so while it trains.
    known = sorted(model.session_names)
    return described | {"order of sessions": list(sessions), "known sessions": known}


def _settings_of(model: MtM) -> dict[str, Any]:
    """The model's settings, without what training changes."""
    return {k: v for k, v in model.settings().items() if k not in ("sessions", "seen")}
