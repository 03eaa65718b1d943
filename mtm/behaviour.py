"""Fine-tuning on a behaviour: a model goes on learning, with a linear readout of the behaviour.

:func:`mtm.decode` reads a model as it is, as the paper does. Here the model learns to tell the
behaviour too, as the MtM of BrainWideBench does. The readout starts as a linear decoder of the
latents and the encoder's output.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA
from torch import Tensor, nn

from mtm.decoding import ENCODER_WIDTH, Decoded, Decoder, decodable, search, smoothed
from mtm.inputs import SessionError
from mtm.masks import Mask
from mtm.model import MtM
from mtm.prediction import as_predictor, unobserved
from mtm.session import Session
from mtm.training import Fit

BATCH = 16  # trials
LEARNING_RATE = 1e-4  # of Adam
CLIP = 1.0  # largest norm of the gradient of the model
PATIENCE = 8  # epochs without a lower validation loss after which training stops
HIDDEN_SHARE = 0.4  # the share of neurons hidden in a training trial is drawn between 0 and this


class BehaviourReadout(nn.Module):
    """A model, trained too, with a linear readout of a behaviour from all bins of a trial.

    There is an output for each of the ``classes``, or 1 for a number, or T for a trace.
    """

    smoothing: Tensor

    def __init__(self, model: MtM, session: str, classes: Sequence[object], n_outputs: int) -> None:
        super().__init__()
        self.model, self.session, self.classes = model, session, list(classes)
        smoothing = smoothed(np.eye(model.n_bins)[None], ENCODER_WIDTH)[0]
        self.register_buffer("smoothing", torch.from_numpy(smoothing).to(model.norm.weight))
        width = model.config.latents + model.config.width
        self.linear = nn.Linear(model.n_bins * width, n_outputs).to(model.norm.weight)
        self.scale = 1.0  # of the values, for which outputs are of order 1
        self.penalty = 0.0  # of the squared weights, as of the decoder that they start from

    def features(self, counts: Tensor, hidden: Tensor) -> Tensor:
        """Counts (B, T, N) to smoothed latents and output of the encoder, (B, T x F)."""
        mask = Mask(hidden, hidden)
        z = self.model.latents(counts, self.session, mask, encoder=True, train=True)
        return (self.smoothing @ z).flatten(1)

    def forward(self, counts: Tensor, hidden: Tensor) -> Tensor:
        """Counts (B, T, N) to logits (B, C), or values (B, 1) or (B, T) in units of the scale."""
        return self.linear(self.features(counts, hidden))

    def loss(self, output: Tensor, values: Tensor) -> Tensor:
        """Cross-entropy of classes (B,), or mean squared error of values."""
        return F.cross_entropy(output, values) if self.classes else F.mse_loss(output, values)

    @torch.no_grad()
    def init_from_decoder(self, counts: Tensor, hidden: Tensor, values: Tensor, kind: str) -> None:
        """Start at the linear decoder of counts (K, T, N) whose penalty cross-validates best."""
        self.eval()
        parts = map(self.features, counts.split(4 * BATCH), hidden.split(4 * BATCH))
        x, y = torch.cat([*parts]).cpu().double().numpy(), values.cpu().numpy()
        axes = PCA().fit(x)  # search in the dimensions that the trials span
        found = search(axes.transform(x), y, kind)
        decoder, [(name, penalty)] = found.best_estimator_, found.best_params_.items()
        weight, bias = decoder.coef_, decoder.intercept_
        if len(self.classes) == 2:  # scikit-learn has one output, the difference of two logits
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        weight = weight @ axes.components_
        self.linear.weight.copy_(torch.from_numpy(weight))
        self.linear.bias.copy_(torch.from_numpy(bias - weight @ axes.mean_))
        if name == "C":
            penalty = 1 / penalty if len(self.classes) == 2 else 0.5 / penalty
        self.penalty = penalty / y.size if name == "alpha" else penalty / len(y)

    @torch.no_grad()
    def predict(self, counts: ArrayLike, hidden: ArrayLike = False) -> np.ndarray:
        """Predict from counts (K, T, N) classes or numbers (K,), or a trace (K, T).

        ``hidden`` (K, T, N) bool, or what broadcasts to it, marks what is not known.
        """
        self.eval()
        given = torch.as_tensor(counts, dtype=torch.float32, device=self.model.device)
        hide = torch.as_tensor(hidden, device=given.device).expand_as(given)
        output = torch.cat([*map(self, given.split(4 * BATCH), hide.split(4 * BATCH))])
        if self.classes:
            return np.array(self.classes)[output.argmax(dim=1).cpu().numpy()]
        values = self.scale * output.cpu().double().numpy()
        return values[:, 0] if values.shape[1] == 1 else values


@dataclass
class BehaviourFit:
    """What :func:`fit_behaviour` returns of a behaviour."""

    readout: BehaviourReadout  # the fine-tuned model and its readout; `readout.predict(counts)`
    decoded: Decoded  # scores on the test trials, with the controls of `mtm.decode`
    val_loss: list[float]  # before training and after each epoch; weights are of its minimum


def fit_behaviour(
    session: Session,
    model: MtM | Fit,
    behaviours: str | Sequence[str] | None = None,
    *,
    epochs: int = 40,
    kinds: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, BehaviourFit]:
    """Fine-tune a model to decode a behaviour; of several, a copy for each.

    In each training trial some neurons, drawn anew, are hidden. Early stopping is on the validation
    trials, and the scores are of the test trials, both of the split the model was trained with.

    Args:
        session: a recording that the model was trained on.
        model: the model, which stays as it is.
        behaviours, kinds: as in :func:`mtm.decode`, which also says what is refused.
        epochs: passes over the training trials, at most.
        seed: of the order of the trials and of what is hidden.

    Returns:
        behaviour -> :class:`BehaviourFit`.
    """
    model = model.model if isinstance(model, Fit) else model
    decoder = Decoder(as_predictor(model, session), session, kinds=kinds)
    names = decodable(session) if behaviours is None else behaviours
    names = [names] if isinstance(names, str) else names
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the caller's generators keep their state
        return {name: _fit(decoder, copy.deepcopy(model), name, epochs, seed) for name in names}


def _fit(decoder: Decoder, model: MtM, behaviour: str, epochs: int, seed: int) -> BehaviourFit:
    """Fine-tune this model to decode one behaviour."""
    model.calibration.clear()  # it is of the weights before
    target = decoder.target(behaviour)
    kind, usable, classes, y, truth = target
    n_outputs = len(classes) or (y.shape[1] if kind == "trace" else 1)
    readout = BehaviourReadout(model, decoder.session.name, classes, n_outputs)
    trials, is_test = decoder.trials[usable], decoder.is_test[usable]
    counts = torch.from_numpy(decoder.session.counts[trials].astype(np.float32)).to(model.device)
    absent = torch.from_numpy(unobserved(decoder.session, trials)).to(model.device)
    absent = absent.expand_as(counts)
    values = torch.from_numpy(y)
    if not classes:
        readout.scale = float(y.std())
        values = (values / readout.scale).float().reshape(len(y), -1)
    values, n_train = values.to(model.device), int(usable[: decoder.n_train].sum())
    few = classes and np.bincount(y[:n_train], minlength=len(classes)).min() < 2
    if few or n_train == len(y):
        problem = "needs two training trials of each class, and a validation trial"
        raise SessionError(f"session {decoder.session.name!r}, behaviour {behaviour!r}: {problem}")
    train, val = slice(n_train), slice(n_train, len(y))
    readout.init_from_decoder(counts[train], absent[train], values[train], kind)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(readout.parameters(), lr=LEARNING_RATE)
    val_loss: list[float] = []
    for epoch in range(epochs + 1):
        readout.train()
        for some in torch.randperm(n_train).split(BATCH) if epoch > 0 else ():
            # Hide some neurons of each trial.
            share = HIDDEN_SHARE * torch.rand(len(some), 1, 1)
            hidden = torch.rand(len(some), 1, counts.shape[2]) < share
            hidden = hidden.to(counts.device) | absent[some]
            output = readout(counts[some].masked_fill(hidden, 0), hidden)
            penalty = readout.penalty * readout.linear.weight.square().sum()
            optimizer.zero_grad()
            (readout.loss(output, values[some]) + penalty).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        readout.eval()
        with torch.no_grad():
            output = readout(counts[val], absent[val])
            val_loss.append(float(readout.loss(output, values[val])))
        best_epoch = int(np.nanargmin(val_loss))
        if best_epoch == epoch:
            best = copy.deepcopy(readout.state_dict())
        if epoch - best_epoch >= PATIENCE:
            break
    readout.load_state_dict(best)
    guess = readout.predict(counts[is_test], absent[is_test])
    guess = np.searchsorted(classes, guess) if classes else guess
    decoded = decoder.scored(behaviour, target, guess.reshape(truth.shape), "fine-tuned", {})
    return BehaviourFit(readout, decoded, val_loss)
