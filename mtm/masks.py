"""Masking schemes as pure functions of a batch, and the sampler that alternates them.

A scheme decides which entries of a batch of counts (B, T, N) are *hidden*, and which of these are
*targets*, to be scored. Source: arXiv 2407.14668, section 3.1 and appendix A.4.

============  ==============================================  =================  =========
scheme        hidden                                          target             attention
============  ==============================================  =================  =========
temporal      whole bins                                      the hidden         full
random-token  whole patches (P neurons x 1 bin)               the hidden         full
neuron        whole neurons, drawn anew for each trial        the hidden         full
causal        whole bins                                      the hidden         causal
inter-region  all neurons of one region                       the hidden         full
intra-region  all outside one region, and a share of inside   only those inside  full
============  ==============================================  =================  =========
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

Random = Generator | None  # None: torch's global generator
NO_REGION = -1
"""Region code of a neuron without a region, hidden and scored like any other."""
PADDING = -2
"""Region code that marks padding: never hidden, never scored."""


@dataclass(frozen=True)
class Mask:
    """What is hidden from the model, and what it is scored on."""

    hidden: Tensor  # (B, T, N) bool, True = zeroed in the input
    target: Tensor  # (B, T, N) bool, True = scored; a subset of hidden
    causal: bool = False  # attention to the same and earlier bins only

    def leave_out(self, unobserved: Tensor) -> Mask:
        """Hide entries that were not observed, and do not score them."""
        return Mask(self.hidden | unobserved, self.target & ~unobserved, self.causal)


def neuron(counts: Tensor, regions: Tensor, ratio: float = 0.3, generator: Random = None) -> Mask:
    """Hide whole neurons, independently in each trial: co-smoothing.

    Args:
        counts: (B, T, N), of which only shape and device matter.
        regions: (N,) int64 region codes; see :data:`NO_REGION` and :data:`PADDING`.
        ratio: probability that a neuron is hidden, 0 < ratio <= 1.
        generator: on the counts' device.
    """
    n_trials, _, n_neurons = counts.shape
    chosen = _choose((n_trials, 1, n_neurons), regions > PADDING, ratio, generator)
    return Mask(chosen.expand(counts.shape), chosen.expand(counts.shape))


def temporal(counts: Tensor, regions: Tensor, ratio: float = 0.3, generator: Random = None) -> Mask:
    """Hide whole bins of all neurons, independently in each trial: the scheme of NDT1."""
    n_trials, n_bins, _ = counts.shape
    real = regions > PADDING
    chosen = _choose((n_trials, n_bins, 1), real.any(), ratio, generator) & real
    return Mask(chosen, chosen)


def causal(counts: Tensor, regions: Tensor, ratio: float = 0.6, generator: Random = None) -> Mask:
    """Hide bins as :func:`temporal`, with attention to the same and earlier bins only."""
    return replace(temporal(counts, regions, ratio, generator), causal=True)


def inter_region(
    counts: Tensor, regions: Tensor, ratio: float = 1.0, generator: Random = None
) -> Mask:
    """Hide all neurons of one region, the same in the whole batch; regions are equally likely."""
    if ratio != 1:
        raise ValueError(f"inter-region masking hides a region whole; ratio must be 1, got {ratio}")
    inside = _choose_region(regions, generator).expand(counts.shape)
    return Mask(inside, inside)


def intra_region(
    counts: Tensor, regions: Tensor, ratio: float = 0.3, generator: Random = None
) -> Mask:
    """Hide all neurons outside one region, and a share of those inside, drawn for each trial."""
    n_trials, _, n_neurons = counts.shape
    inside = _choose_region(regions, generator)
    chosen = _choose((n_trials, 1, n_neurons), inside, ratio, generator)
    outside = ~inside & (regions > PADDING)
    return Mask((chosen | outside).expand(counts.shape), chosen.expand(counts.shape))


def random_token(
    counts: Tensor,
    regions: Tensor,
    ratio: float = 0.3,
    generator: Random = None,
    patch_size: int = 128,
) -> Mask:
    """Hide patches of ``patch_size`` neurons (the last: what is left) x 1 bin: NDT2's scheme."""
    n_trials, n_bins, n_neurons = counts.shape
    patch = torch.arange(n_neurons, device=counts.device) // patch_size  # (N,) of each neuron
    real = torch.zeros(-(-n_neurons // patch_size), device=counts.device)  # (patches,)
    real = real.index_add(0, patch, (regions > PADDING).float()) > 0  # not of padding alone
    chosen = _choose((n_trials, n_bins, len(real)), real, ratio, generator)
    chosen = chosen[:, :, patch] & (regions > PADDING)
    return Mask(chosen, chosen)


def _choose(shape: tuple[int, ...], allowed: Tensor, ratio: float, generator: Random) -> Tensor:
    """Bernoulli(ratio) draws of ``shape`` where ``allowed``; at least one entry is chosen."""
    if not 0 < ratio <= 1:
        raise ValueError(f"mask ratio must be above 0 and at most 1, got {ratio}")
    draws = torch.rand(shape, generator=generator, device=allowed.device)
    draws = draws.masked_fill(~allowed, 2.0)
    # The smallest draw is chosen even when it is above the ratio. Drawing again until something is
    # hidden would make the host wait for the GPU at every step.
    return ((draws < ratio) | (draws <= draws.amin())) & allowed


def _choose_region(regions: Tensor, generator: Random) -> Tensor:
    """Neurons of one labelled region, (N,) bool; each equally likely whatever its size."""
    codes = regions.sort().values
    first = torch.cat([codes[:1] >= 0, (codes[1:] != codes[:-1]) & (codes[1:] >= 0)])  # of a region
    # Not checked on a GPU: reading the result would force a synchronization. `fit` has checked.
    if regions.device.type == "cpu" and not first.any():
        raise ValueError("no neuron has a region label; set Session.regions, or mask otherwise")
    # Pick the region with the largest draw; torch.multinomial would synchronize as well. Draw i is
    # of region i, so that the choice does not depend on the sizes of regions.
    draws = torch.rand(len(codes), generator=generator, device=regions.device)
    place = torch.where(first, draws[first.cumsum(0) - 1], -1.0).argmax()
    return (regions == codes.index_select(0, place[None])) & (regions >= 0)


@dataclass(frozen=True)
class Scheme:
    """A named way of masking."""

    draw: Callable[..., Mask]  # function of (counts, regions, ratio, generator)
    ratio: float  # share hidden unless another is asked for
    needs_regions: bool = False  # it cannot be drawn where no neuron has a region
    causal: bool = False  # attention to the same and earlier bins only
    prompt: bool = True  # a model trained with it and others has a prompt token for it
    patches: bool = False  # it hides patches, and takes the model's patch_size


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


def register(name: str, draw: Callable[..., Mask], ratio: float = 0.3, **kind: bool) -> None:
    """Make a scheme of your own known by a new ``name``; the rest are fields of :class:`Scheme`.

    ``draw`` is a function of (counts (B, T, N), regions (N,), ratio, generator) -> :class:`Mask`.
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

    ``ratios`` (name -> share hidden) are those that differ from the schemes' own, ``device`` is
    that of the batches, and ``patch_size`` (neurons) is for schemes that hide patches.
    """

    def __init__(
        self,
        schemes: Sequence[str] = MTM_SCHEMES,
        ratios: Mapping[str, float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        patch_size: int = 128,
    ) -> None:
        ratios, self.patch_size = ratios or {}, patch_size
        known = {name: scheme(name).ratio for name in (*schemes, *ratios)}
        self.ratios = {name: ratios.get(name, known[name]) for name in schemes}
        # The scheme is chosen on the host, so that no step waits for the device with the masks.
        self.host_generator, self.generator = Generator(), Generator(device)
        self.reseed(seed)

    def __call__(self, counts: Tensor, regions: Tensor) -> tuple[str, Mask]:
        """The name of a scheme, and a mask of it for ``counts`` (B, T, N), ``regions`` (N,)."""
        name = self.choose()
        return name, self.draw(name, counts, regions)

    def reseed(self, seed: int) -> None:
        """Begin again, as if made with this seed."""
        self.host_generator.manual_seed(seed)
        self.generator.manual_seed(seed)

    def choose(self) -> str:
        """Name of a scheme, each equally likely."""
        names = list(self.ratios)
        return names[int(torch.randint(len(names), (1,), generator=self.host_generator))]

    def draw(self, name: str, counts: Tensor, regions: Tensor) -> Mask:
        """A mask of this scheme for ``counts`` (B, T, N), ``regions`` (N,)."""
        kind = SCHEMES[name]
        patch = {"patch_size": self.patch_size} if kind.patches else {}
        mask = kind.draw(counts, regions, self.ratios[name], self.generator, **patch)
        if not isinstance(mask, Mask):
            raise TypeError(f"scheme {name!r} must return a Mask(hidden, target), got {type(mask)}")
        if not mask.hidden.shape == mask.target.shape == counts.shape:
            raise ValueError(f"scheme {name!r}: hidden and target must have the shape of counts")
        if mask.causal and not kind.causal:  # training and evaluation ask the scheme, not the mask
            raise ValueError(f"scheme {name!r} drew a causal mask; register it with causal=True")
        # A target that the scheme left visible could be copied.
        return Mask(mask.hidden, mask.target & mask.hidden, kind.causal)
