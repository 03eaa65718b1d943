"""Training settings, and the two recipes: ours (``mtm``) and the authors' (``paper``)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mtm.masks import MTM_SCHEMES, scheme

CHOICES = {
    "loss": ("mean", "sum"),
    "tune": ("all", "session-layers", "session-layers-then-all"),
    "token": ("new", "mean"),
    "init": ("mtm", "paper"),
    "precision": ("auto", "float32", "bf16"),
    "compile": ("none", "default", "reduce-overhead", "max-autotune"),
}
POSITIVE = {"epochs", "batch_size", "batches_per_step", "validations", "patience"}
POSITIVE |= {"lr", "clip"}
SHARES = ("ratios", "input_dropout")  # settings for each scheme
KINDS: dict[Any, Any] = {"bool": bool, "int": int, "int | None": int | None, "float": int | float}
KINDS["float | None"] = int | float | None


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training. The defaults are the recipe ``mtm``.

    Args:
        epochs: passes over the training trials.
        batch_size: trials per batch. A batch has one session and one masking scheme.
        batches_per_step: batches per optimizer step, of different sessions where possible. With
            several processes (see ``mtm.distributed``), each computes a share of them.
        tune: parameters to train: "all", "session-layers" (the layers and tokens of the given
            sessions; the shared layers stay fixed, and with ndt2 also the random embeddings of
            patches that are new), or "session-layers-then-all", the first fifth of the epochs.
        token: initial session token of a new session, see ``MtM.add_session``.
        lr: peak learning rate of torch's one-cycle schedule, which also cycles Adam's beta1.
        warmup: share of the steps in which the learning rate rises to its peak.
        weight_decay: of AdamW, applied to weight matrices.
        decay_all: apply weight decay to biases, norms and tokens as well.
        loss: "mean" or "sum" over the targets of a batch.
        clip: maximum gradient norm, or None.
        schemes: masking schemes, drawn uniformly for each batch: neuron, causal, inter-region,
            intra-region, temporal, random-token or registered ones.
        ratios: scheme -> share hidden. Schemes that are not named use their own default.
        regions_by_size: draw the region of inter- and intra-region masking in proportion to its
            neurons, which scores count. If not, all regions are equally likely (the paper).
        input_dropout: scheme -> share of neurons that training hides as well, drawn for each trial,
            and does not score on their account. Schemes that are not named have none. With few
            regions, inter-region masking alone shows each trial in few versions, which a model
            learns by heart.
        prompt: give the schemes of a new model, if there are several, a prompt token each; temporal
            and random-token masking have none.
        validations: number of validations, evenly spread over the epochs; 1 keeps the last weights.
        patience: stop after this many validations without improvement, or None.
        calibrate: at the end, scale what encoder and direct paths add to the mean log-rates as
            suits the validation trials best, see ``mtm.validation.calibrate``. Validations in
            training try one common scale per session and scheme.
        seed: of initial weights, masks, dropout and the order of batches.
        split_seed: of ``Session.split``.
        init: preset of a new model, "mtm" or "paper": its initial weights and, unless a model is
            given, its sizes and options, see ``mtm.training.model_config``.
        precision: "float32", "bf16" (bfloat16 autocast, weights in float32), or "auto": bf16 on
            GPUs that support it.
        compile: mode of ``torch.compile`` for the encoder, or "none". "reduce-overhead" uses CUDA
            graphs.
    """

    epochs: int = 200
    batch_size: int = 4
    batches_per_step: int = 4
    tune: str = "all"
    token: str = "new"
    lr: float = 1e-3
    warmup: float = 0.15
    weight_decay: float = 1.0
    decay_all: bool = False
    loss: str = "mean"
    clip: float | None = 1.0
    schemes: tuple[str, ...] = MTM_SCHEMES
    ratios: dict[str, float] = field(default_factory=lambda: {"neuron": 0.6, "intra-region": 0.6})
    regions_by_size: bool = True
    input_dropout: dict[str, float] = field(default_factory=lambda: {"inter-region": 0.4})
    prompt: bool = True
    validations: int = 20
    patience: int | None = None
    calibrate: bool = True
    seed: int = 0
    split_seed: int = 0
    init: str = "mtm"
    precision: str = "auto"
    compile: str = "none"

    def __post_init__(self) -> None:
        if isinstance(self.schemes, str) or not 0 < len(self.schemes) == len(set(self.schemes)):
            raise ValueError(f"schemes must be a list of different names, got {self.schemes!r}")
        object.__setattr__(self, "schemes", tuple(self.schemes))
        for name in SHARES:
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a dict of schemes, got {getattr(self, name)!r}")
            shares = {of: float(share) for of, share in getattr(self, name).items()}
            object.__setattr__(self, name, shares)
        for name in (*self.schemes, *self.ratios, *self.input_dropout):
            scheme(name)  # raises for an unknown name
        if bad := [share for share in self.input_dropout.values() if not 0 <= share < 1]:
            raise ValueError(f"input_dropout must be at least 0 and below 1, got {bad[0]}")
        for setting in fields(self):  # numpy numbers become Python's, which JSON can hold
            value = getattr(self, setting.name)
            value = value.item() if isinstance(value, np.generic) else value
            object.__setattr__(self, setting.name, value)
            if not isinstance(value, KINDS.get(setting.type, object)):
                raise ValueError(f"{setting.name} must be {setting.type}, got {value!r}")
            if setting.name in POSITIVE and value is not None and not value > 0:
                raise ValueError(f"{setting.name} must be above 0, got {value}")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be at least 0 and below 1, got {self.warmup}")
        if self.tune == "session-layers-then-all" and self.epochs < 2:
            raise ValueError("tune='session-layers-then-all' needs 2 epochs or more")


# The settings of the authors' code.
_PAPER: dict[str, Any] = dict(batch_size=16, batches_per_step=1, epochs=1000, lr=1e-4, seed=42)
_PAPER |= dict(loss="sum", clip=None, weight_decay=0.01, decay_all=True, calibrate=False)
_PAPER |= dict(ratios={}, regions_by_size=False, input_dropout={}, init="paper")
RECIPES = {"mtm": TrainConfig(), "paper": TrainConfig(**_PAPER)}
"""Settings by name: ``mtm`` is ours, ``paper`` that of the authors' code."""


def recipe(start: str | TrainConfig, **changes: Any) -> TrainConfig:
    """Return settings, or those of the recipe of this name, with some of them changed.

    Of the ``ratios``, only the named ones change; other settings are replaced. Raises ValueError
    for an unknown recipe or setting, with the nearest known one.
    """
    if isinstance(start, str):
        if start not in RECIPES:
            raise ValueError(f"unknown recipe {start!r}; known: {', '.join(RECIPES)}")
        start = RECIPES[start]
    known = [setting.name for setting in fields(TrainConfig)]
    for name in changes:
        if name == "recipe":
            raise ValueError(f"pass the recipe as config={changes[name]!r}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown setting {name!r}; {hint}known: {', '.join(known)}")
    if isinstance(changes.get("ratios"), dict):
        changes["ratios"] = {**start.ratios, **changes["ratios"]}
    return replace(start, **changes)
