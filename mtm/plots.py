"""Figures of recordings, masks and scores. Functions take and return Axes, or return a Figure.

Colours mean the same in all figures: dark grey is a visible spike, white a visible silence, orange
is hidden, blue hidden and scored; each region and each method has one colour. The palette is that
of Okabe and Ito, which colour-blind readers can tell apart.

Arguments in common: ``neuron`` and ``trial`` are indices; ``rates`` (K', T, N) are the predicted
counts of ``trials`` (K',); ``by`` is a behaviour with one value per trial; ``ax`` is where to draw,
by default the current Axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from mtm.masks import Mask, MaskSampler
from mtm.prediction import PredictorLike, predict_masked, unobserved
from mtm.report import Mean, Report
from mtm.session import Session, has_region

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, RED, PINK = "#0072B2", "#D55E00", "#CC79A7"
PALE_ORANGE, PALE_BLUE = "#FBE3B5", "#BFDDF0"
REGION_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)
METHOD_COLOURS = {
    "MtM": BLUE,
    "oracle": GREEN,
    "mean rate": "0.6",
    "PSTH": ORANGE,
    "ridge": PINK,
    "low-rank GLM": SKY,
    "reduced-rank regression": YELLOW,
    "temporal NDT1": RED,
    "random-token NDT2": "0.3",
}
TIME = "time from the event (s)"
IMAGE: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}


def region_colours(session: Session) -> dict[str, str]:
    """Region -> colour, the same in every figure of a session; grey for unlabelled neurons."""
    names = session.region_names
    colours = dict(zip(names, _palette(len(names)), strict=False))
    return {label: colours.get(label, "0.5") for label in np.unique(session.regions).tolist()}


def raster(session: Session, trial: int, ax: Axes | None = None) -> Axes:
    """Spike counts of a trial, neurons sorted by region; light blue: not observed in the trial."""
    ax = ax or plt.gca()
    counts = _observed(session, [trial])[0]
    highest = max(3, np.nanquantile(counts, 0.99))
    greys = plt.colormaps["Greys"].with_extremes(bad="lightblue")
    _image(session, counts, ax, cmap=greys, vmin=0, vmax=highest)
    ax.axvline(0, color=RED, lw=1)
    _mark_regions(session, ax)
    ax.set(xlabel=TIME, title=f"trial {trial}")
    return ax


def psth(session: Session, neuron: int, by: str = "choice", ax: Axes | None = None) -> Axes:
    """Mean firing rate of a neuron around the event, for each value of a behaviour."""
    ax = ax or plt.gca()
    trials = np.arange(session.n_trials)
    _draw_psth(session, _observed(session, trials)[..., neuron], by, trials, ax)
    ax.axvline(0, color="0.7", lw=1, zorder=0)
    ax.set(xlabel=TIME, ylabel="firing rate (Hz)", title=_name(session, neuron))
    ax.legend(frameon=False)
    return ax


def psth_grid(
    session: Session,
    rates: np.ndarray,
    neurons: Sequence[int],
    trials: np.ndarray,
    by: str = "choice",
) -> Figure:
    """PSTHs of several neurons, observed (thin) and predicted (thick), for each value of ``by``."""
    columns, rows = min(4, len(neurons)), -(-len(neurons) // 4)
    figure = plt.figure(figsize=(2.6 * columns, 2.2 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for ax, neuron in zip(axes.flat, neurons, strict=False):
        observed = _observed(session, trials)[..., neuron]
        _draw_psth(session, observed, by, trials, ax, lw=0.8, alpha=0.6)
        _draw_psth(session, rates[..., neuron], by, trials, ax, lw=2)
        ax.set_title(_name(session, neuron), fontsize=9)
    for ax in axes.flat[len(neurons) :]:
        ax.set_visible(False)
    figure.supxlabel(TIME, fontsize=10)
    figure.supylabel("firing rate (Hz)", fontsize=10)
    thick = axes.flat[0].lines[len(axes.flat[0].lines) // 2 :]
    figure.legend(handles=thick, loc="outside upper right", ncols=9, frameon=False)
    return figure


def before_and_after(
    session: Session, rates: np.ndarray, neuron: int, trials: np.ndarray, by: str = "choice"
) -> Figure:
    """Trials of one neuron, sorted by ``by``: spikes, and rates predicted while it was hidden."""
    figure = plt.figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    order = np.argsort(session.behaviour[by][trials], kind="stable")
    style = IMAGE | {"cmap": "Greys", "extent": (*session.window, len(trials), 0), "vmin": 0}
    images = {"spikes": _observed(session, trials), "predicted while hidden": rates}
    for ax, (title, source) in zip(axes, images.items(), strict=True):
        image = source[order, :, neuron] / session.bin_size
        shown = ax.imshow(image, vmax=max(np.nanquantile(image, 0.995), 1e-9), **style)
        ax.axvline(0, color=RED, lw=1)
        ax.set(title=title, xlabel=TIME)
        figure.colorbar(shown, ax=ax, label="Hz")
    axes[0].set_ylabel(f"trials, sorted by {by}")
    figure.suptitle(_name(session, neuron), fontsize=10)
    return figure


def mask(
    session: Session,
    name: str,
    trials: Sequence[int] = (0,),
    ax: Axes | None = None,
    seed: int = 0,
    patch_size: int = 128,
    bins: int | None = None,
) -> Axes:
    """Draw a mask over the spikes of a few trials, side by side: what is hidden, what is scored.

    One mask is drawn for all trials, as for a batch in training. Arrows lead from the attended bins
    to the bin in the middle. ``patch_size`` is for schemes that hide patches of neurons; ``bins``
    shows the first bins of each trial only.
    """
    ax = ax or plt.gca()
    drawn = _draw_mask(session, name, trials, seed, patch_size)
    shown = Mask(drawn.hidden[:, :bins], drawn.target[:, :bins])
    _show_mask(session, session.counts[list(trials), :bins], shown, ax, 0, len(trials))
    for i in range(len(trials)):
        _show_attention(ax, drawn.causal, i / len(trials), (i + 1) / len(trials))
        if i:
            ax.axvline(i, color="black", lw=2)
    ax.set_xticks(np.arange(len(trials)) + 0.5, [f"trial {t}" for t in trials])
    ax.tick_params(axis="x", length=0)
    _mark_regions(session, ax)
    ax.set_title(name, pad=14)
    return ax


def mask_legend(figure: Figure) -> None:
    """Legend of :func:`mask`, at the foot of a figure with constrained layout."""
    labels = {
        "0.35": "visible spike",
        "white": "visible, no spike",
        PALE_BLUE: "hidden and scored",
        PALE_ORANGE: "hidden, not scored",
    }
    patches = [Patch(facecolor=c, edgecolor="0.5", label=label) for c, label in labels.items()]
    arrow = Line2D([0, 1], [0, 0], color="black", marker=">", markevery=[1])
    arrow.set_label("attention: reads these bins")
    figure.legend(handles=[*patches, arrow], loc="outside lower center", ncols=3, frameon=False)


def filled_in(
    session: Session, name: str, trial: int, predictor: PredictorLike, seed: int = 0
) -> Figure:
    """One trial in four panels: recorded, input, prediction and (if known) the true rates.

    The input shows hidden entries without their spikes, as the model sees them. The last two panels
    show only the scored entries. ``predictor`` is a model or a function, see :func:`mtm.evaluate`;
    ``seed`` is of the mask.
    """
    drawn = _draw_mask(session, name, [trial], seed)
    counts = torch.from_numpy(session.counts[[trial]].astype(np.float32))
    log_rates = predict_masked(predictor, counts, drawn, name, session.name)
    images = {"3. prediction": torch.exp(log_rates[0]).cpu().numpy()}  # (T, N)
    if session.rates is not None:
        images["4. true rate"] = session.rates[trial]
    target = drawn.target[0].numpy()
    highest = max(np.quantile(image[target], 0.99) for image in images.values())
    norm = PowerNorm(0.5, 0, highest / session.bin_size)
    figure = plt.figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    raster(session, trial, axes[0, 0]).set_title("1. recorded", pad=16)
    visible = np.where(drawn.hidden.numpy(), 0, session.counts[[trial]])
    _show_mask(session, visible, drawn, axes[0, 1])
    axes[0, 1].set_title("2. input: what the model sees", pad=16)
    _show_attention(axes[0, 1], drawn.causal)
    for ax, (title, image) in zip(axes[1], images.items(), strict=False):
        scored = np.where(target, image / session.bin_size, np.nan)
        picture = _image(session, scored, ax, norm=norm)
        ax.set(title=title, xlabel=TIME, facecolor="0.9")  # grey: not scored
    axes[1, 1].set_visible(len(images) > 1)
    axes[0, 0].set_xlabel("")
    _mark_regions(session, axes[1, 0])
    figure.colorbar(picture, ax=axes[1], label="firing rate (Hz)")
    return figure


def predicted(
    session: Session, trial: int, neuron: int, log_rates: np.ndarray, ax: Axes | None = None
) -> Axes:
    """Spikes, predicted rate (``log_rates`` (T,)) and, if known, true rate in one trial."""
    ax = ax or plt.gca()
    times, width = session.times + session.bin_size / 2, session.bin_size
    ax.bar(times, session.counts[trial, :, neuron] / width, width, color="0.85", label="spikes")
    if session.rates is not None:
        true = session.rates[trial, :, neuron] / width
        ax.plot(times, true, color=GREEN, label="true rate")
    ax.plot(times, np.exp(log_rates) / width, color=BLUE, label="predicted rate")
    ax.set(xlabel=TIME, ylabel="firing rate (Hz)")
    ax.set_title(f"{_name(session, neuron)}, trial {trial}")
    return _tidy(ax)


def history(entries: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Validation scores of each scheme over epochs, from ``Fit.history``."""
    ax = ax or plt.gca()
    epochs = [entry["epoch"] for entry in entries]
    for colour, name in zip(cycle(REGION_COLOURS), entries[0]["validation"], strict=False):
        ax.plot(epochs, [e["validation"][name] for e in entries], color=colour, label=name)
    ax.plot(epochs, [e["mean"] for e in entries], color="black", lw=2, label="mean")
    ax.axhline(0, color="0.7", lw=1, zorder=0)
    ax.set(xlabel="epoch", ylabel="bits per spike on hidden entries\n(validation trials)")
    ax.legend(frameon=False)
    return _tidy(ax)


def live() -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """Callback that redraws :func:`history` in a notebook: ``fit(..., on_validation=live())``."""
    from IPython.display import display

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    plt.close(figure)  # or the notebook would show it again when the cell ends
    shown = display(figure, display_id=True)

    def draw(entries: Sequence[Mapping[str, Any]]) -> None:
        ax.clear()
        history(entries, ax)
        if shown is not None:  # None outside notebooks
            shown.update(figure)

    return draw


def score_bars(
    reports: Mapping[str, Report], column: str = "bits_per_spike", ax: Axes | None = None
) -> Axes:
    """Mean of each predictor in each task, with its error over sessions or, of one, neurons."""
    ax = ax or plt.gca()
    several = any(len(report.sessions) > 1 for report in reports.values())
    bars: dict[str, dict[str, Mean]] = {name: {} for name in reports}
    for name, report in reports.items():
        for task, scores in report.tasks.items():
            if column in scores.table:
                over = "sessions" if several or not scores.per_neuron else "neurons"
                bars[name][task.replace("-", "-\n", 1)] = scores.over(over, column)
    _draw_bars(bars, ax)
    ax.set_ylabel(f"{column.replace('_', ' ')}\n(± over {'sessions' if several else 'neurons'})")
    return _tidy(ax)


def region_bars(
    reports: Mapping[str, Report],
    task: str = "co-smoothing",
    column: str = "bits_per_spike",
    ax: Axes | None = None,
) -> Axes:
    """Mean over the neurons of each region, with the standard error over them."""
    ax = ax or plt.gca()
    bars: dict[str, dict[str, Mean]] = {}
    for name, report in reports.items():
        means = report.tasks[task].by_region(column)
        named = sorted(filter(has_region, means))
        bars[name] = {f"{region}\n{means[region].n}": means[region] for region in named}
    _draw_bars(bars, ax)
    ax.tick_params(axis="x", rotation=90 if len(ax.get_xticks()) > 10 else 0)
    ax.set(xlabel="region and its number of neurons", ylabel=f"{task}, {column.replace('_', ' ')}")
    return _tidy(ax)


def score_scatter(
    across: Report,
    up: Report,
    task: str = "co-smoothing",
    column: str = "bits_per_spike",
    ax: Axes | None = None,
    names: tuple[str, str] = ("one", "other"),
) -> Axes:
    """Each neuron's score in one report against that in another, coloured by region.

    Scores are averaged over seeds; ``names`` are those of the two predictors.
    """
    ax = ax or plt.gca()
    keys = ["session", "neuron", "region"]
    one, two = (r.tasks[task].table.groupby(keys)[column].mean() for r in (across, up))
    if not one.index.equals(two.index):
        raise ValueError("the two reports scored different neurons")
    x, y = one.to_numpy(), two.to_numpy()
    labels = one.index.get_level_values("region").map(lambda name: name if has_region(name) else "")
    regions = [name for name in labels.unique().sort_values() if name]
    for region, colour in [("", "0.5"), *zip(regions, _palette(len(regions)), strict=False)]:
        some = labels == region
        ax.scatter(x[some], y[some], s=14, color=colour, label=region, lw=0, alpha=0.8)
    ends = [np.nanmin([x, y]), np.nanmax([x, y])]
    ax.plot(ends, ends, "--", color="0.6", lw=1, zorder=0)
    better, unit = np.mean((y > x)[~np.isnan(x + y)]), column.replace("_", " ")
    ax.set_title(f"{task}: {names[1]} better for {better:.0%} of neurons", fontsize=10)
    ax.set(xlabel=f"{names[0]} ({unit})", ylabel=f"{names[1]} ({unit})")
    if len(regions) <= 10:
        ax.legend(frameon=False, fontsize=8)  # leaves out empty labels
    return _tidy(ax)


def _draw_bars(bars: Mapping[str, Mapping[str, Mean]], ax: Axes) -> None:
    """Draw bars side by side: method -> group -> mean and error."""
    groups = list(dict.fromkeys(group for means in bars.values() for group in means))
    taken = {METHOD_COLOURS.get(name) for name in bars}
    spare = cycle(colour for colour in REGION_COLOURS if colour not in taken)
    width = 0.8 / len(bars)
    for i, (name, means) in enumerate(bars.items()):
        places = np.arange(len(groups)) + (i - (len(bars) - 1) / 2) * width
        each = np.array([means.get(group, (np.nan,) * 3) for group in groups])
        colour = METHOD_COLOURS.get(name) or next(spare)
        ax.bar(places, each[:, 0], width, yerr=np.nan_to_num(each[:, 1]), color=colour, label=name)
    ax.axhline(0, color="black", lw=0.8)
    ax.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    ax.set_xticks(np.arange(len(groups)), groups)


def _palette(n: int) -> list[str]:
    """At least n different colours."""
    many = [to_hex(colour) for colour in plt.get_cmap("turbo")(np.linspace(0.05, 0.95, n))]
    return many if n > len(REGION_COLOURS) else list(REGION_COLOURS)


def _draw_psth(
    session: Session, counts: np.ndarray, by: str, trials: np.ndarray, ax: Axes, **style: Any
) -> None:
    """Draw the mean rate of counts (K', T) of ``trials`` (K',) for each value of a behaviour."""
    values = session.behaviour[by][trials]
    levels = [value for value in np.unique(values).tolist() if value == value and value != ""]
    centres = session.times + session.bin_size / 2
    for level, colour in zip(levels, _palette(len(levels)), strict=False):
        some = counts[values == level]
        mean = some[~np.isnan(some).any(axis=1)].mean(axis=0) / session.bin_size
        label = f"{by} {level if isinstance(level, str) else f'{level:g}'}"
        ax.plot(centres, mean, color=colour, label=label, **style)
    ax.set_ylim(bottom=0)
    _tidy(ax)


def _observed(session: Session, trials: Any) -> np.ndarray:
    """Counts (K', T, N) of some trials, NaN where a neuron was not observed."""
    return np.where(unobserved(session, trials), np.nan, session.counts[trials])


def _name(session: Session, neuron: int) -> str:
    return f"neuron {neuron}, {session.regions[neuron] or 'no region'}"


def _draw_mask(
    session: Session, name: str, trials: Sequence[int], seed: int, patch_size: int = 128
) -> Mask:
    """A mask for some trials, as for a batch of them in training."""
    counts = torch.from_numpy(session.counts[list(trials)].astype(np.int64))
    sampler = MaskSampler([name], {}, seed, patch_size=patch_size)
    drawn = sampler.draw(name, counts, torch.from_numpy(session.region_codes))
    return drawn.leave_out(torch.from_numpy(unobserved(session, np.asarray(trials))))


def _show_mask(session: Session, counts: np.ndarray, drawn: Mask, ax: Axes, *edges: float) -> None:
    """Show a mask over counts (K', T, N), trials side by side."""
    state = (drawn.hidden.long() + drawn.target.long()).numpy()  # 0 visible, 1 hidden, 2 scored
    codes = np.concatenate(list(2 * state + (counts > 0)))
    palette = ListedColormap(["white", "0.35", PALE_ORANGE, ORANGE, PALE_BLUE, BLUE])
    _image(session, codes, ax, *edges, cmap=palette, vmin=-0.5, vmax=5.5)


def _image(
    session: Session, values: np.ndarray, ax: Axes, *edges: float, **style: Any
) -> AxesImage:
    """Show values (T, N) with neurons down, sorted by region; edges are left and right."""
    order = np.argsort(session.regions, kind="stable")
    extent = (*(edges or session.window), session.n_neurons, 0)
    return ax.imshow(values[:, order].T, extent=extent, **IMAGE, **style)


def _show_attention(ax: Axes, causal: bool, left: float = 0.0, right: float = 1.0) -> None:
    """Draw arrows above the axes, which lead from the attended bins to the bin in the middle."""
    middle, margin, height = (left + right) / 2, 0.03 * (right - left), 1.035
    style = {"arrowstyle": "-|>", "color": "black", "lw": 1.3, "shrinkA": 0, "shrinkB": 1}
    for start in (left + margin, right - margin)[: 1 if causal else 2]:
        ends = (middle, height), (start, height)
        ax.annotate("", *ends, "axes fraction", "axes fraction", style, annotation_clip=False)
    ax.plot(middle, height, "|k", ms=8, mew=2, transform=ax.transAxes, clip_on=False)


def _mark_regions(session: Session, ax: Axes) -> None:
    """Mark the regions of sorted neurons by a coloured strip and their names at the left."""
    labels, sizes = np.unique(session.regions, return_counts=True)
    stops, colours = np.cumsum(sizes), region_colours(session)
    starts = stops - sizes
    ax.set_yticks((starts + stops) / 2, [label or "no region" for label in labels])
    ax.tick_params(axis="y", length=0, pad=9)
    strip = ax.get_yaxis_transform() + ScaledTranslation(-5 / 72, 0, ax.figure.dpi_scale_trans)
    pieces = [[(0, start), (0, stop)] for start, stop in zip(starts, stops, strict=True)]
    shown = [colours[label] for label in labels]
    ax.add_artist(LineCollection(pieces, colors=shown, lw=4, transform=strip, clip_on=False))


def _tidy(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
