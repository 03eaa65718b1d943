"""Every masking scheme, as a pure function of a batch, and the sampler that alternates them.

A scheme answers two questions about each entry of a batch of counts (B, T, N): is it *hidden*
(zeroed in the model's input), and is it a *target* (scored by the loss)? Targets are always hidden,
or the model could copy them.

============  =======================================  =================  =========
scheme        hidden                                   target             attention
============  =======================================  =================  =========
temporal      whole bins                               the hidden         full
random-token  whole patches (P neurons x 1 bin)        the hidden         full
neuron        whole neurons, drawn anew for each       the hidden         full
              trial
causal        whole bins                               the hidden         causal
inter-region  all neurons of one region                the hidden         full
intra-region  all neurons outside one region, and a    only those inside  full
              share of those inside                    the region
============  =======================================  =================  =========

Source: arXiv 2407.14668, section 3.1 and appendix A.4. Ratios: the authors' released settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from mtm.checks import checked

NO_REGION = -1
"""Region code of a neuron without a region, hidden and scored like any other."""
PADDING = -2
"""Region code of a neuron that is not there, and so is never hidden and never scored."""


@dataclass(frozen=True)
class Mask:
    """What is hidden from the model, and what it is scored on.

    Attributes:
        hidden: (B, T, N) bool, True = zeroed in the input.
        target: (B, T, N) bool, True = scored; a subset of ``hidden``.
        causal: attention may look at the same and at earlier bins only.
    """

    hidden: Tensor
    target: Tensor
    causal: bool = False


DrawFunction = Callable[..., Mask]


def neuron(
    counts: Tensor, regions: Tensor, ratio: float = 0.3, generator: torch.Generator | None = None
) -> Mask:
    """Whole neurons, each hidden with probability ``ratio``, independently in each trial.

    Teaches: predict a cell from the rest of the population (co-smoothing).

    Args:
        counts: (B, T, N), any dtype; gives the shape and the device, its values are not looked at.
        regions: (N,) int64 region codes; see :data:`NO_REGION` and :data:`PADDING`.
        ratio: share hidden, 0 < ratio <= 1.
        generator: on the counts' device.
    """
    n_trials, _, n_neurons = _sizes(counts, regions)
    chosen = _choose((n_trials, 1, n_neurons), regions > PADDING, ratio, generator, counts)
    return _spread(chosen, chosen, counts)


def temporal(
    counts: Tensor, regions: Tensor, ratio: float = 0.3, generator: torch.Generator | None = None
) -> Mask:
    """Whole bins of all neurons, each hidden with probability ``ratio``, in each trial anew.

    The scheme of the Neural Data Transformer, and the baseline of the paper. Arguments: see
    :func:`neuron`.
    """
    n_trials, n_bins, _ = _sizes(counts, regions)
    anywhere = torch.ones(1, dtype=torch.bool, device=counts.device)
    chosen = _choose((n_trials, n_bins, 1), anywhere, ratio, generator, counts)
    chosen = chosen & (regions > PADDING)
    return _spread(chosen, chosen, counts)


def causal(
    counts: Tensor, regions: Tensor, ratio: float = 0.6, generator: torch.Generator | None = None
) -> Mask:
    """As :func:`temporal`, with attention to past bins only.

    Teaches: predict the future from the past (forward prediction).
    """
    bins = temporal(counts, regions, ratio, generator)
    return Mask(bins.hidden, bins.target, causal=True)


def inter_region(
    counts: Tensor, regions: Tensor, ratio: float = 1.0, generator: torch.Generator | None = None
) -> Mask:
    """All neurons of one region, the same in the whole batch; regions are equally likely.

    Teaches: predict a region from the others. ``ratio`` must be 1: the region is hidden whole.
    """
    if ratio != 1.0:
        raise ValueError(f"inter-region masking hides a region whole; ratio must be 1, got {ratio}")
    _sizes(counts, regions)
    inside = _choose_region(regions, generator)[None, None, :]
    return _spread(inside, inside, counts)


def intra_region(
    counts: Tensor, regions: Tensor, ratio: float = 0.3, generator: torch.Generator | None = None
) -> Mask:
    """All neurons outside one region, and a share ``ratio`` of those inside, drawn for each trial.

    Scored are only the hidden neurons inside. Teaches: predict a neuron from its own region.
    """
    n_trials, _, n_neurons = _sizes(counts, regions)
    inside = _choose_region(regions, generator)
    chosen = _choose((n_trials, 1, n_neurons), inside, ratio, generator, counts)
    outside = ~inside & (regions > PADDING)
    return _spread(chosen | outside, chosen, counts)


def random_token(
    counts: Tensor,
    regions: Tensor,
    ratio: float = 0.3,
    generator: torch.Generator | None = None,
    patch_size: int = 128,
) -> Mask:
    """Patches of ``patch_size`` neurons in a row x 1 bin, each hidden with probability ``ratio``.

    The scheme of NDT2, and the paper's baseline for that tokenizer. The last patch of a bin holds
    what neurons are left. Other arguments: see :func:`neuron`.
    """
    n_trials, n_bins, n_neurons = _sizes(counts, regions)
    if not isinstance(patch_size, Integral) or patch_size < 1:
        raise ValueError(f"patch_size must be a whole number from 1, got {patch_size!r}")
    patch_size = min(patch_size, n_neurons)
    n_patches = -(-n_neurons // patch_size)
    patch = torch.arange(n_neurons, device=counts.device) // patch_size  # (N,)
    real = torch.zeros(n_patches, device=counts.device)
    real = real.index_add(0, patch, (regions > PADDING).float()) > 0  # not padding alone
    chosen = _choose((n_trials, n_bins, n_patches), real, ratio, generator, counts)
    chosen = chosen[:, :, patch] & (regions > PADDING)
    return _spread(chosen, chosen, counts)


def _sizes(counts: Tensor, regions: Tensor) -> tuple[int, int, int]:
    """Trials, bins and neurons of a batch whose counts and regions go together."""
    if counts.ndim != 3 or 0 in counts.shape:
        raise ValueError(f"counts must be trials x bins x neurons, got {tuple(counts.shape)}")
    if regions.shape != counts.shape[2:] or regions.is_floating_point():
        raise ValueError(
            f"regions must be a whole number for each of the {counts.shape[2]} neurons, got "
            f"{regions.dtype} of {tuple(regions.shape)}"
        )
    # On a GPU the look at the data would stop the queue; there, the caller has checked the session.
    if regions.device.type == "cpu" and not regions.max() > PADDING:
        raise ValueError(f"no neuron to hide: all regions are {PADDING}, which means padding")
    return counts.shape[0], counts.shape[1], counts.shape[2]


def _choose(
    shape: tuple[int, ...],
    allowed: Tensor,
    ratio: float,
    generator: torch.Generator | None,
    counts: Tensor,
) -> Tensor:
    """Bernoulli(ratio) draws of ``shape`` where ``allowed``; at least one entry is always chosen.

    The entry with the smallest draw is chosen even when it is above the ratio. That takes the place
    of drawing again until something is hidden, and needs no look at the result from the host, which
    would make a GPU wait.
    """
    if not (isinstance(ratio, Real) and 0 < ratio <= 1):
        raise ValueError(f"mask ratio must be above 0 and at most 1, got {ratio}")
    draws = torch.rand(shape, generator=generator, device=counts.device)
    draws = draws.masked_fill(~allowed, 2.0)
    return ((draws < ratio) | (draws <= draws.amin())) & allowed


def _choose_region(regions: Tensor, generator: torch.Generator | None) -> Tensor:
    """Neurons of one labelled region, (N,) bool; each equally likely whatever its size."""
    codes = regions.sort().values
    first = torch.cat([codes[:1] >= 0, (codes[1:] != codes[:-1]) & (codes[1:] >= 0)])  # of a region
    if regions.device.type == "cpu" and not first.any():
        raise ValueError(
            "no neuron has a region label, and this scheme masks regions; label the neurons "
            "(Session.regions) or leave the region schemes and tasks out"
        )
    # The largest of independent draws; torch.multinomial would make a GPU's queue wait for a check.
    draws = torch.rand(len(codes), generator=generator, device=regions.device)
    place = torch.where(first, draws[first.cumsum(0) - 1], -1.0).argmax()
    chosen = codes.index_select(0, place[None])  # codes[place] would ask the GPU where
    return (regions == chosen) & (regions >= 0)  # none, where a GPU was not asked for labels


def _spread(hidden: Tensor, target: Tensor, counts: Tensor) -> Mask:
    return Mask(hidden.expand(counts.shape), target.expand(counts.shape))


# ----------------------------------------------------------------------- the table of schemes


@dataclass(frozen=True)
class Scheme:
    """A named way of masking.

    Attributes:
        draw: function of (counts, regions, ratio, generator), returning a :class:`Mask`.
        ratio: share hidden unless another is asked for.
        needs_regions: it cannot be drawn where no neuron has a region.
        causal: attention looks at past bins only.
        prompt: a model trained with it and others has a prompt token for it.
        patches: it hides patches, and takes the model's ``patch_size``.
    """

    draw: DrawFunction
    ratio: float
    needs_regions: bool = False
    causal: bool = False
    prompt: bool = True
    patches: bool = False


SCHEMES: dict[str, Scheme] = {
    "neuron": Scheme(neuron, 0.3),
    "causal": Scheme(causal, 0.6, causal=True),
    "inter-region": Scheme(inter_region, 1.0, needs_regions=True),
    "intra-region": Scheme(intra_region, 0.3, needs_regions=True),
    "temporal": Scheme(temporal, 0.3, prompt=False),
    "random-token": Scheme(random_token, 0.3, prompt=False, patches=True),
}
"""All schemes by name; add yours with :func:`register`."""

MTM_SCHEMES = ("neuron", "causal", "inter-region", "intra-region")
"""The four that multi-task masking alternates; each has a prompt token of its name."""


def register(name: str, draw: DrawFunction, ratio: float = 0.3, **kind: bool) -> None:
    """Make a scheme of your own known by ``name`` to training, validation and plots.

    Args:
        name: a new name.
        draw: function of (counts (B, T, N), regions (N,), ratio, generator) -> :class:`Mask`.
        ratio: its default share hidden.
        **kind: ``needs_regions``, ``causal``, ``prompt``, ``patches``, as in :class:`Scheme`.
    """
    if name in SCHEMES:
        raise ValueError(f"masking scheme {name!r} exists already; choose another name")
    SCHEMES[name] = Scheme(draw, ratio, **kind)


def scheme(name: str) -> Scheme:
    """The scheme of this name; raises ValueError that lists the known ones."""
    if name not in SCHEMES:
        raise ValueError(f"unknown masking scheme {name!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


class MaskSampler:
    """Draws a scheme, uniformly, and a mask of it for each batch: multi-task masking.

    Args:
        schemes: names to alternate.
        ratios: name -> share hidden, where it should differ from the scheme's own.
        seed: of both the choice of the scheme and the masks.
        device: where the batches live.
        patch_size: neurons of a patch, for schemes that hide patches.

    Example:
        >>> sampler = MaskSampler(seed=0)
        >>> name, mask = sampler(counts, regions)
    """

    def __init__(
        self,
        schemes: Sequence[str] = MTM_SCHEMES,
        ratios: Mapping[str, float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        patch_size: int = 128,
    ) -> None:
        if isinstance(schemes, str) or not schemes:
            raise ValueError(
                f"need a list of masking schemes, got {schemes!r}; known: {', '.join(SCHEMES)}"
            )
        ratios = dict(ratios or {})
        if strangers := set(ratios) - set(schemes):
            raise ValueError(f"ratios for schemes that are not drawn: {', '.join(strangers)}")
        self.patch_size, seed = patch_size, checked("seed", seed, "int")
        self.ratios = {name: ratios.get(name, scheme(name).ratio) for name in schemes}
        # The scheme is chosen on the host, so that no step waits for the device with the masks.
        self.host_generator = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, counts: Tensor, regions: Tensor) -> tuple[str, Mask]:
        """The name of the scheme drawn, and its mask for ``counts`` (B, T, N), ``regions`` (N,)."""
        name = self.choose()
        return name, self.draw(name, counts, regions)

    def reseed(self, seed: int) -> None:
        """Begin again, as if made with this seed."""
        self.host_generator.manual_seed(seed)
        self.generator.manual_seed(seed)

    def choose(self) -> str:
        """The name of a scheme, each equally likely."""
        names = list(self.ratios)
        return names[int(torch.randint(len(names), (1,), generator=self.host_generator))]

    def draw(self, name: str, counts: Tensor, regions: Tensor) -> Mask:
        """A mask of the scheme ``name`` for ``counts`` (B, T, N), ``regions`` (N,).

        Targets that the scheme left visible are taken out: a model could copy them.
        """
        kind = SCHEMES[name]
        patch = {"patch_size": self.patch_size} if kind.patches else {}
        mask = kind.draw(counts, regions, self.ratios[name], self.generator, **patch)
        if not isinstance(mask, Mask):
            raise ValueError(f"scheme {name!r} must return a Mask, got {type(mask).__name__}")
        for part in (mask.hidden, mask.target):
            if part.shape != counts.shape or part.dtype != torch.bool:
                raise ValueError(
                    f"scheme {name!r}: hidden and target must be bool of shape "
                    f"{tuple(counts.shape)}, got {part.dtype} of {tuple(part.shape)}"
                )
        if mask.causal != kind.causal:
            raise ValueError(
                f"scheme {name!r} draws masks with causal={mask.causal} but was registered with "
                f"causal={kind.causal}; they must agree"
            )
        return Mask(mask.hidden, mask.target & mask.hidden, mask.causal)
