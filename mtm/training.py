"""Training: :func:`fit` is one explicit loop over batches, in :meth:`Trainer.train`.

A batch has trials of one session, and a masking scheme drawn for it. Validation hides the same
entries every time; the weights with the best mean score over the schemes are kept. Random numbers
have seeds made of the settings' seed and their place in the run (epoch, step, batch), so a stopped
run resumes exactly and several processes draw the masks that one would.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR

from mtm import distributed
from mtm.batches import SessionData, Step, counts_device, steps_of, steps_per_epoch
from mtm.checkpoint import History, Run, best_entry, describe_run, without_nan
from mtm.direct_paths import init_direct_paths
from mtm.distributed import autocast, compiled, peak_memory, pick_device, setup_line
from mtm.inputs import SessionError
from mtm.masks import scheme
from mtm.metrics import masked_nll
from mtm.model import Batch, MtM, MtMConfig
from mtm.prediction import require_same_bins
from mtm.progress import Progress, TensorBoard
from mtm.recipes import TrainConfig, recipe
from mtm.session import Session, require_alike
from mtm.validation import calibrate, make_sampler, seed_of, validate


def accumulate(
    model: MtM, batches: list[Batch], config: TrainConfig, n_batches: int | None = None
) -> Tensor:
    """Add the gradients of a step's loss; return what each of ``batches`` contributes to it.

    The loss sums over all targets or, with ``loss="mean"``, averages the batches' means over
    targets. The whole step has ``n_batches``, of which ``batches`` may be this process's share.
    """
    if not batches:
        return torch.zeros(0, device=model.device)
    with autocast(model.device, config.precision):
        log_rates = model.forward_many(batches)
    losses = []
    for out, batch in zip(log_rates, batches, strict=True):
        loss = masked_nll(out.float(), batch.counts, batch.mask.target)
        if config.loss == "mean":
            loss = 1 / batch.mask.target.sum().clamp(min=1) / (n_batches or len(batches)) * loss
        losses.append(loss)
    found = torch.stack(losses)
    found.sum().backward()
    return found.detach()


def make_optimizer(model: MtM, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on weight matrices, or on everything with ``decay_all``."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    decayed = [p for p in model.parameters() if config.decay_all or id(p) in matrices]
    rest = [p for p in model.parameters() if not (config.decay_all or id(p) in matrices)]
    pairs = [(decayed, config.weight_decay), (rest, 0.0)]
    groups = [{"params": part, "weight_decay": decay} for part, decay in pairs if part]
    return torch.optim.AdamW(groups, lr=config.lr, fused=model.device.type in ("cpu", "cuda"))


class Trainer:
    """The training loop, with what all its steps use."""

    def __init__(self, model: MtM, data: list[SessionData], config: TrainConfig, run: Run) -> None:
        self.model, self.data, self.config, self.run = model, data, config, run
        self.optimizer, self.sampler = make_optimizer(model, config), make_sampler(model, config)
        self.per_epoch = steps_per_epoch(data, config)
        # What the caller has frozen stays frozen.
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        fifth = max(1, round(config.epochs / 5))
        phases = {"all": 0, "session-layers": config.epochs, "session-layers-then-all": fifth}
        self.first_phase = phases[config.tune]  # epochs that train session layers only
        # Losses still on the device: step, session and scheme of each batch, losses (batches,).
        self.pending: list[tuple[int, list[tuple[str, str]], Tensor]] = []

    def train(self, progress: Progress, on_validation: Callable[[History], Any] | None) -> None:
        """Train, and leave the model with the weights of the best validation."""
        model, config, run = self.model, self.config, self.run
        distributed.broadcast(model.state_dict().values())
        run.restore(model, self.optimizer)  # does nothing in a new run
        board = TensorBoard(run)
        epochs_done, steps_done = divmod(run.step, self.per_epoch)
        started, since = time.perf_counter() - run.seconds, (run.step, time.perf_counter())
        for epoch in range(epochs_done + 1, config.epochs + 1):
            if out_of_patience(run.history, config):
                break
            # Each phase has a learning-rate schedule of its own.
            if epoch in (epochs_done + 1, self.first_phase + 1):
                schedule = self.begin_phase(epoch)
            model.train()
            # The order depends on the epoch alone, so a resumed run can skip the steps taken.
            order = np.random.default_rng(seed_of(config.seed, "order", epoch))
            for batches in islice(steps_of(self.data, config, order), steps_done, None):
                if run.due():
                    run.seconds = time.perf_counter() - started
                    self.save()
                self.step(batches)
                schedule.step()
            steps_done = 0
            # Validations are spread evenly over the epochs; the last one follows the last epoch.
            before, now = (e * config.validations // config.epochs for e in (epoch - 1, epoch))
            if now > before:
                entry: dict[str, Any] = {"epoch": epoch, "step": run.step}
                entry["lr"] = schedule.get_last_lr()[0]
                self.read_losses()  # here the host waits for the device
                sums, run.losses = run.losses, {}
                total, number = (sum(column) for column in zip(*sums.values(), strict=True))
                entry["loss"] = total / number
                entry["losses"] = {name: part / n for name, (part, n) in sorted(sums.items())}
                entry |= self.speed(run.step - since[0], time.perf_counter() - since[1])
                entry["validation"] = validate(model, self.data, config)
                entry["mean"] = float(np.nanmean([*entry["validation"].values()]))
                run.seconds = entry["seconds"] = time.perf_counter() - started
                is_best = run.add(entry, model)
                self.save()
                if is_best:
                    run.save_model(model)
                board.add(entry)
                if on_validation is not None and distributed.rank() == 0:
                    on_validation(run.history)
                since = run.step, time.perf_counter()
            progress.update(epoch, run.history)
        model.load_state_dict(run.best)
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        model.eval()

    def begin_phase(self, epoch: int) -> OneCycleLR:
        """Choose what is trained from this epoch on, and return its learning-rate schedule."""
        config, first = self.config, epoch <= self.first_phase
        layers = [self.model.session_layers(one.name) for one in self.data]
        own = {id(parameter) for part in layers for parameter in part.parameters()}
        for parameter in self.trainable:
            parameter.requires_grad_(not first or id(parameter) in own)
        start, stop = (0, self.first_phase) if first else (self.first_phase, config.epochs)
        n_steps, warmup = (stop - start) * self.per_epoch, config.warmup
        if abs(warmup * n_steps - 1) < 1e-6:  # torch's schedule would divide by zero
            warmup *= 1.01
        # Steps of the phase that a resumed run has taken already; -1 starts the schedule.
        last = self.run.step - start * self.per_epoch - 1
        how: dict[str, Any] = dict(pct_start=float(warmup), div_factor=10.0, last_epoch=last)
        return OneCycleLR(self.optimizer, config.lr, n_steps, **how)

    def step(self, batches: Step) -> None:
        """Take one optimizer step. Of several processes, each computes a share of the batches."""
        model, config, step = self.model, self.config, self.run.step
        rank, processes = distributed.rank(), distributed.processes()
        torch.manual_seed(seed_of(config.seed, "dropout", step, rank))
        if config.compile != "none":
            torch.compiler.cudagraph_mark_step_begin()  # memory of the last step's graphs is free
        places, drawn = [], []
        for i, (session, trials) in enumerate(batches):
            # Every process draws all schemes, so that all know which parameters have gradients.
            self.sampler.reseed(seed_of(config.seed, "masks", step, i))
            name = self.sampler.choose()
            places.append((session.name, name))
            if i % processes == rank:  # this process's share
                counts = session.batch(trials)
                mask = session.training_mask(self.sampler, name, counts, trials, config)
                drawn.append(Batch(counts, name, mask, session.name))
        losses = torch.zeros(len(batches), device=model.device)
        losses[rank::processes] = accumulate(model, drawn, config, len(batches))
        used = parameters_of(model, places)
        distributed.all_reduce_gradients(used, losses)
        if config.clip is not None:
            clip_grad_norm_(used, config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # frees memory before the next forward pass
        self.run.step += 1
        losses = losses * len(batches) if config.loss == "mean" else losses  # of each batch
        self.pending.append((self.run.step, places, losses))

    def read_losses(self) -> None:
        """Add the pending losses to ``run.losses``; raise FloatingPointError if not finite."""
        for step, places, losses in self.pending:
            for (session, name), loss in zip(places, losses.tolist(), strict=True):
                if not math.isfinite(loss):
                    where = f"step {step}, session {session!r}, scheme {name!r}"
                    raise diverged(f"the loss became {loss} in {where}", self.config)
                total, number = self.run.losses.get(name, [0.0, 0])
                self.run.losses[name] = [total + loss, number + 1]
        self.pending = []

    def speed(self, n_steps: int, seconds: float) -> dict[str, Any]:
        """Return the speed of some steps, and the peak memory."""
        trials = {one.name: len(one.train) * n_steps / self.per_epoch for one in self.data}
        tokens = sum(n * self.model.n_tokens(name) for name, n in trials.items())
        return {
            "trials_per_second": sum(trials.values()) / seconds,
            "tokens_per_second": tokens / seconds,
            "memory_gb": peak_memory(self.model.device),
        }

    def save(self) -> None:
        """Save the state of the run; raise FloatingPointError if it is not finite."""
        self.read_losses()
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise diverged(f"weights became infinite or NaN in step {self.run.step}", self.config)
        self.run.save(self.model, self.optimizer)


def diverged(problem: str, config: TrainConfig) -> FloatingPointError:
    """Return the error of a run whose numbers are no longer finite, with the remedy."""
    return FloatingPointError(f"{problem}; lower lr (now {config.lr:g}) or set clip")


def out_of_patience(history: History, config: TrainConfig) -> bool:
    """Return whether the last ``patience`` validations brought no improvement."""
    best = history.index(best_entry(history)) if history else 0
    return config.patience is not None and len(history) - 1 - best >= config.patience


def parameters_of(model: MtM, places: Sequence[tuple[str, str]]) -> list[torch.nn.Parameter]:
    """Return the parameters that get a gradient from batches of these (session, scheme)."""
    layers = [model.session_layers(name) for name in sorted({session for session, _ in places})]
    parts = [model.tokenizer, model.layers, model.norm, *layers]
    found = [parameter for part in parts for parameter in part.parameters()]
    found += [model.prompt_tokens] * any(name in model.prompts for _, name in places)
    return [parameter for parameter in found if parameter.requires_grad]


@dataclass(repr=False)
class Fit:
    """Result of training.

    An entry of the history has ``epoch``, ``step``, ``lr``, ``loss`` (mean over the batches since
    the last entry), ``losses`` (the same per scheme), ``validation`` (scheme -> bits per spike over
    the training mean rates, pooled over the hidden entries of all sessions, see
    :func:`mtm.validation.validate`), their ``mean``, ``seconds`` since the start, and speed.
    """

    model: MtM  # with the weights of the best validation, on the device it was trained on
    history: History  # an entry for each validation
    config: TrainConfig

    def __repr__(self) -> str:
        epochs = f"best epoch {self.best['epoch']} of {self.config.epochs}"
        return f"Fit, {epochs}: {self.best['mean']:.3f} bits per spike on validation trials"

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def best(self) -> dict[str, Any]:
        """The history entry whose weights the model has."""
        return best_entry(self.history)

    @property
    def predict_log_rates(self) -> Callable[..., Tensor]:
        """The model's :meth:`mtm.MtM.predict_log_rates`."""
        return self.model.predict_log_rates

    def to_dict(self) -> dict[str, Any]:
        """Return settings and history as JSON can hold them."""
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
    """Train a model on the training trials of one or several sessions.

    Args:
        sessions: with different names, and the same bins and window.
        model: to fine-tune; it is copied, and new sessions are added. Or the sizes of a new model.
        config: settings, or the name of a recipe: "mtm" (default) or "paper".
        depth: number of layers of a new model. Default: 2, or 5 with ``config="paper"``.
        device: default: a GPU if there is one.
        folder: for the best model (see ``mtm.load``), ``history.jsonl`` and the state of the run.
            A run that was stopped resumes when ``fit`` is called again with the same arguments; on
            a CPU it ends with exactly the weights of a run that was not stopped.
        restart: delete the run in the folder and start anew.
        save_every: seconds between saves within an epoch, each four times the model's size.
        progress: show progress.
        on_validation: called with the history after each validation, as ``mtm.plots.live()``.
        **changes: single settings of :class:`TrainConfig`.

    Raises:
        SessionError: the sessions do not go together, lack what a scheme needs, or hold the same
            trial in training and in another part of the split.
        FloatingPointError: the loss is no longer finite.
        CheckpointError: the folder holds another run, or a model without a run.
    """
    sessions = [sessions] if isinstance(sessions, Session) else list(sessions)
    config = _settings(sessions, config or "mtm", changes)
    start = model.model if isinstance(model, Fit) else model
    device = torch.device(device) if device else pick_device()
    counts_on = counts_device(sessions, device)
    data = [SessionData(session, config, device, counts_on) for session in sessions]
    setup = setup_line(device, counts_on, config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # the caller's generators keep their state
        network = _build(start, data, config, depth).to(device)
        run = Run(folder, describe_run(network, start, data, config), save_every, restart)
        setup += f", resuming after step {run.step}" if run.step else ""
        with Progress(config.epochs, progress and distributed.rank() == 0, setup) as display:
            with compiled(network, config.compile):
                Trainer(network, data, config, run).train(display, on_validation)
                if config.calibrate:
                    calibrate(network, data, config)
    run.save_model(network)
    result = Fit(network, run.history, config)
    display.print(f"{run.step} steps in {run.seconds:.0f} s on {device.type}; {result}")
    return result


def model_config(config: TrainConfig, depth: int | None = None, **fields: Any) -> MtMConfig:
    """Return the sizes of a new model: the authors' (depth 5) with ``init="paper"``, else ours."""
    if config.init == "paper":
        return MtMConfig.published(5 if depth is None else depth, **fields)
    return MtMConfig.from_depth(2 if depth is None else depth, **fields)


def _settings(sessions: list[Session], start: TrainConfig | str, changes: Any) -> TrainConfig:
    """Return the settings of sessions that go together; without regions, without their schemes."""
    if not sessions:
        raise SessionError("no session to train on")
    if others := [type(each).__name__ for each in sessions if not isinstance(each, Session)]:
        raise TypeError(f"fit needs Sessions, got {others[0]}; see mtm.Session, Session.load")
    require_alike(sessions)
    config = recipe(start, **changes)
    if (n := distributed.processes()) > config.batches_per_step:
        problem = f"batches_per_step={config.batches_per_step} leaves some of {n} processes"
        raise ValueError(f"{problem} without a batch; use a multiple of {n}")
    regional = [name for name in config.schemes if scheme(name).needs_regions]
    rest = tuple(name for name in config.schemes if name not in regional)
    lacking = [session.name for session in sessions if regional and not session.region_names]
    if rest and len(lacking) == len(sessions) and "schemes" not in changes:
        text = f"no neuron has a region: training without {', '.join(regional)}"
        warnings.warn(text, stacklevel=3)
        return replace(config, schemes=rest)
    if lacking:
        problem = f"no neuron has a label, but masking by {' and '.join(regional)} needs regions"
        remedy = f"pass regions, or train with schemes={rest}"
        raise SessionError(f"session {lacking[0]!r}, regions: {problem}; {remedy}")
    return config


def _build(
    start: MtM | MtMConfig | None, data: list[SessionData], config: TrainConfig, depth: int | None
) -> MtM:
    """Make a new model or copy the one to fine-tune, and add the sessions it does not know."""
    first = data[0].session
    several = config.prompt and len(config.schemes) > 1  # else there is nothing to tell apart
    prompts = tuple(name for name in config.schemes if scheme(name).prompt and several)
    causal = any(scheme(name).causal for name in config.schemes)
    if not isinstance(start, MtM | MtMConfig | None):
        raise TypeError(f"model must be a model, see mtm.load, or sizes; got {start!r}")
    if start is not None and depth is not None:
        raise ValueError("depth is for a new model; the given one has its depth already")
    if isinstance(start, MtM):
        _check_start(start, prompts, causal, config)
        model = copy.deepcopy(start)
        for one in data:
            require_same_bins(start, one.session)
            if start.split_seed is None and one.name in start.session_names:
                doubt = "it is not known which of its trials the model has seen, test trials too"
                warnings.warn(f"session {one.name!r}: {doubt}", stacklevel=3)
            model.calibration.pop(one.name, None)  # to be calibrated anew
    else:
        if config.tune != "all":
            raise ValueError(f"tune={config.tune!r} needs a trained model to start from")
        kind: dict[str, Any] = {"prompts": prompts, "causal": causal, "init": config.init}
        sizes = start or model_config(config, depth)
        model = MtM(sizes, first.n_bins, bin_size=first.bin_size, **kind)
    # By the split and the fingerprints, evaluation knows which trials the model has seen.
    model.split_seed, model.window = config.split_seed, first.window
    for one in data:
        counts = one.session.filled(one.train)
        if one.name not in model.session_names or model.session_layers(one.name).blank:
            model.add_session(one.name, one.session.n_neurons, counts, config.token)
        else:
            init_direct_paths(model.session_layers(one.name), counts)
        known = model.seen.get(one.name, one.fingerprints)
        model.seen[one.name] = np.union1d(known, one.fingerprints)
    return model


def _check_start(model: MtM, prompts: tuple[str, ...], causal: bool, config: TrainConfig) -> None:
    """Check that a model can be fine-tuned with these settings."""
    if missing := ", ".join(sorted(set(prompts) - set(model.prompts))):
        known = f"the schemes it knows ({', '.join(model.prompts) or 'none'})"
        problem = f"the model has no prompt for {missing}"
        raise ValueError(f"{problem}; train it with {known}, or with prompt=False")
    if causal and not model.causal and model.config.causal:
        raise ValueError("the model was never trained causally; train a new one for that scheme")
    if model.split_seed not in (None, config.split_seed):
        seeds = f"split_seed={model.split_seed}, not {config.split_seed}"
        risk = "its training trials would become test trials"
        raise ValueError(f"the model was trained with {seeds}: {risk}")
