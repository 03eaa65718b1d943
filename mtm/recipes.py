"""Settings of training, and two sets of their values: ours, and those of the authors' code."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mtm.checks import check_types, one_of
from mtm.masks import MTM_SCHEMES, scheme

CHOICES = {
    "loss": ("mean", "sum"),
    "tune": ("all", "maps", "maps-then-all"),
    "token": ("new", "mean"),
    "init": ("mtm", "paper"),
    "precision": ("auto", "float32", "bf16"),
    "compile": ("none", "default", "reduce-overhead", "max-autotune"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides how a model is trained. ``RECIPES`` holds two sets of values.

    Args:
        epochs: passes over the training trials.
        batch_size: trials of a session in a batch, which share a masking scheme.
        batches_per_step: batches whose gradients add up to a step, of different sessions as far as
            there are that many, each with its own mask. Several processes (see ``mtm.distributed``)
            share them out.
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
        schemes: alternated at random; of neuron, causal, inter-region, intra-region, temporal,
            random-token and those that are registered.
        ratios: scheme -> share hidden; those that are not named hide the scheme's own share, and
            those that are not drawn may be named.
        prompt: tell the model which scheme is on, where there are several.
        validations: how often to validate, spread evenly over the epochs.
        patience: validations without a better one after which training stops, or None.
        seed: of weights, masks, dropout and the order of batches.
        split_seed: of ``Session.split``.
        init: how a new model starts, see ``MtMConfig``.
        precision: "float32", "bf16" (matrix products in bfloat16, weights in float32), or "auto":
            bf16 on GPUs that compute in it.
        compile: mode of ``torch.compile`` for the encoder, which all sessions share; or "none".
            "reduce-overhead" replays CUDA graphs.

    Raises:
        ValueError: for a value that cannot be; the message names the field.
    """

    epochs: int = 200
    batch_size: int = 4
    batches_per_step: int = 4
    micro_batch: int | None = None
    tune: str = "all"
    maps_share: float = 0.2
    token: str = "new"
    lr: float = 1e-3
    warmup: float = 0.15
    div_factor: float = 10.0
    weight_decay: float = 1.0
    decay_all: bool = False
    loss: str = "mean"
    clip: float | None = 1.0
    schemes: tuple[str, ...] = MTM_SCHEMES
    ratios: dict[str, float] = field(default_factory=lambda: {"neuron": 0.6, "intra-region": 0.6})
    prompt: bool = True
    validations: int = 20
    patience: int | None = None
    seed: int = 0
    split_seed: int = 0
    init: str = "mtm"
    precision: str = "auto"
    compile: str = "none"

    def __post_init__(self) -> None:
        check_types(self)  # and ratios become its own, not another recipe's
        if not self.schemes or len(set(self.schemes)) < len(self.schemes):
            raise ValueError(f"schemes must be different names, one or more; got {self.schemes}")
        for name in (*self.schemes, *self.ratios):
            scheme(name)
        for name, ratio in self.ratios.items():
            if not 0 < ratio <= 1:
                raise ValueError(f"ratios must be above 0 and at most 1, got {ratio} for {name}")
        for name in ("epochs", "batch_size", "batches_per_step", "lr", "validations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.maps_share < 1:
            raise ValueError(f"maps_share must be between 0 and 1, got {self.maps_share}")
        if not 0 < self.warmup < 1:
            raise ValueError(f"warmup must be between 0 and 1, got {self.warmup}")
        if not self.div_factor > 0:
            raise ValueError(f"div_factor must be above 0, got {self.div_factor}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0 or None, got {self.clip}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        for name in ("micro_batch", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {getattr(self, name)}")
        for name, known in CHOICES.items():
            one_of(name, getattr(self, name), known)


RECIPES = {
    "mtm": TrainConfig(),
    "paper": TrainConfig(
        epochs=1000,
        batch_size=16,
        batches_per_step=1,
        lr=1e-4,
        weight_decay=0.01,
        decay_all=True,
        loss="sum",
        clip=None,
        seed=42,
        ratios={},
        init="paper",
    ),
}
"""Settings by name, ``mtm`` for ours and ``paper`` for those of the authors' code."""


def recipe(name: str, **changes: Any) -> TrainConfig:
    """A recipe's settings, some of them changed.

    Raises:
        ValueError: for an unknown recipe or setting; the message names the nearest known one.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return changed(RECIPES[name], changes)


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """The settings with some of them changed.

    Raises:
        ValueError: for an unknown setting; the message names the nearest known one.
    """
    known = [field.name for field in fields(TrainConfig)]
    for name in changes:
        if name == "recipe":
            raise ValueError(f"pass the recipe as config={changes[name]!r}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown setting {name!r}; {hint}known: {', '.join(known)}")
    return replace(config, **changes)
