"""Fine-tuning on a behaviour: a model goes on learning, with a linear readout of the behaviour.

:func:`mtm.decode` reads a model as it is, as the paper does. Here the model learns to tell the
behaviour too, as the MtM of BrainWideBench does. The readout starts as a linear decoder of
:mod:`mtm.decoding`, so fine-tuning begins where decoding ends.
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
from mtm.masks import Mask
from mtm.model import MtM
from mtm.session import Session
from mtm.training import Fit

BATCH = 16  # trials
CLIP = 1.0  # largest norm of the gradient of the model


class BehaviourReadout(nn.Module):
    """A model with a linear readout of a behaviour, from all bins of a trial.

    Args:
        model: it is trained, too.
        session: name of the recording.
        classes: the classes; empty for numbers and traces.
        n_outputs: number of classes; 1 for a number; T for a trace.
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

    def features(self, counts: Tensor, mask: Mask | None = None) -> Tensor:
        """Counts (B, T, N) to smoothed latents and output of the encoder, (B, T x F)."""
        z = self.model.encode_latents(counts, self.session, mask, encoder=True)
        return (self.smoothing @ z).flatten(1)

    def forward(self, counts: Tensor, mask: Mask | None = None) -> Tensor:
        """Counts (B, T, N) to logits (B, C), or values (B, 1) or (B, T) in units of the scale."""
        output: Tensor = self.linear(self.features(counts, mask))
        return output

    def loss(self, output: Tensor, values: Tensor) -> Tensor:
        """Cross-entropy of classes (B,), or mean squared error of values."""
        return F.cross_entropy(output, values) if self.classes else F.mse_loss(output, values)

    @torch.no_grad()
    def init_from_decoder(self, counts: Tensor, values: Tensor, kind: str) -> None:
        """Start at the linear decoder of counts (K, T, N) whose penalty cross-validates best."""
        self.eval()
        x = torch.cat([self.features(part) for part in counts.split(4 * BATCH)])
        axes = PCA().fit(x.double().cpu().numpy())  # search in the dimensions that the trials span
        y = values.cpu().numpy()
        found = search(axes.transform(x.double().cpu().numpy()), y, kind)
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
    def predict(self, counts: ArrayLike | Tensor) -> np.ndarray:
        """Predict from counts (K, T, N) classes or numbers (K,), or a trace (K, T)."""
        self.eval()
        given = torch.as_tensor(counts, dtype=torch.float32, device=self.model.device)
        output = torch.cat([self(part) for part in given.split(4 * BATCH)])
        if self.classes:
            return np.array(self.classes)[output.argmax(dim=1).cpu().numpy()]
        values: np.ndarray = self.scale * output.double().cpu().numpy()
        return values[:, 0] if values.shape[1] == 1 else values


@dataclass
class BehaviourFit:
    """What :func:`fit_behaviour` returns.

    Attributes:
        readout: the fine-tuned model and its readout; ``readout.predict(counts)``.
        decoded: scores on the test trials, with the controls of :func:`mtm.decode`.
        val_loss: on the validation trials, before training and after each epoch. The weights are
            those of its minimum.
    """

    readout: BehaviourReadout
    decoded: Decoded
    val_loss: list[float]


def fit_behaviour(
    session: Session,
    model: MtM | Fit,
    behaviours: str | Sequence[str] | None = None,
    *,
    epochs: int = 40,
    patience: int = 8,
    learning_rate: float = 1e-4,
    hidden_share: float = 0.4,
    kinds: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, BehaviourFit]:
    """Fine-tune a model to decode a behaviour; of several, a copy for each.

    In each training trial some neurons, drawn anew, are hidden. Early stopping is on the validation
    trials, and the scores are of the test trials, both of the split the model was trained with.

    Args:
        session: a recording that the model was trained on.
        model: the model, which stays as it is.
        behaviours, kinds: as in :func:`mtm.decode`.
        epochs: passes over the training trials, at most.
        patience: epochs without a lower validation loss after which training stops.
        learning_rate: of Adam.
        hidden_share: the share of hidden neurons is drawn between 0 and this.
        seed: of the order of the trials and of what is hidden.

    Returns:
        behaviour -> :class:`BehaviourFit`.

    Raises:
        SessionError: as from :func:`mtm.decode`.
    """
    model = model.model if isinstance(model, Fit) else model
    decoder = Decoder(model, session, kinds=kinds)
    names = decodable(session) if behaviours is None else behaviours
    names = [names] if isinstance(names, str) else names
    settings = epochs, patience, learning_rate, hidden_share, seed
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the caller's generators keep their state
        return {name: _fit(decoder, copy.deepcopy(model), name, *settings) for name in names}


def _fit(
    decoder: Decoder,
    model: MtM,
    behaviour: str,
    epochs: int,
    patience: int,
    learning_rate: float,
    hidden_share: float,
    seed: int,
) -> BehaviourFit:
    """Fine-tune this model to decode one behaviour."""
    target = decoder.target(behaviour)
    kind, usable, classes, y, truth = target
    n_outputs = len(classes) or (y.shape[1] if kind == "trace" else 1)
    readout = BehaviourReadout(model, decoder.session.name, classes, n_outputs)
    trials, is_test = decoder.trials[usable], decoder.is_test[usable]
    counts = torch.from_numpy(decoder.session.counts[trials].astype(np.float32)).to(model.device)
    values = torch.from_numpy(y).to(model.device)
    if not classes:
        readout.scale = float(y.std())
        values = (values / readout.scale).float().reshape(len(y), -1)
    n_train = int(usable[: decoder.n_train].sum())  # before the validation trials
    if not n_train < len(y):
        raise ValueError(f"behaviour {behaviour!r}: it is known in no validation trial")
    train, val, test = counts[:n_train], counts[n_train : len(y)], counts[is_test]
    readout.init_from_decoder(train, values[:n_train], kind)

    def validate() -> float:
        readout.eval()
        with torch.no_grad():
            return float(readout.loss(readout(val), values[n_train:]))

    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(readout.parameters(), lr=learning_rate)
    val_loss, best, best_epoch = [validate()], copy.deepcopy(readout.state_dict()), 0
    for epoch in range(1, epochs + 1):
        _train_epoch(readout, optimizer, train, values[:n_train], hidden_share)
        val_loss.append(validate())
        if val_loss[-1] < val_loss[best_epoch]:
            best, best_epoch = copy.deepcopy(readout.state_dict()), epoch
        if epoch - best_epoch >= patience:
            break
    readout.load_state_dict(best)
    guess = readout.predict(test)
    guess = np.searchsorted(classes, guess) if classes else guess
    decoded = decoder.scored(behaviour, target, guess.reshape(truth.shape), "fine-tuned", {})
    return BehaviourFit(readout, decoded, val_loss)


def _train_epoch(
    readout: BehaviourReadout,
    optimizer: torch.optim.Optimizer,
    counts: Tensor,
    values: Tensor,
    hidden_share: float,
) -> None:
    """Pass over the training trials (K, T, N) once, hiding some neurons of each."""
    readout.train()
    for trials in torch.randperm(len(counts)).split(BATCH):
        share = hidden_share * torch.rand(len(trials), 1, 1)
        hidden = torch.rand(len(trials), 1, counts.shape[2]) < share
        hidden = hidden.to(counts.device).expand_as(counts[trials])
        output = readout(counts[trials].masked_fill(hidden, 0), Mask(hidden, hidden))
        penalty = readout.penalty * readout.linear.weight.square().sum()
        optimizer.zero_grad()
        (readout.loss(output, values[trials]) + penalty).backward()
        nn.utils.clip_grad_norm_(readout.model.parameters(), CLIP)
        optimizer.step()
