"""Figures of recordings, masks and scores. Each takes Axes and returns them.

One visual language throughout: grey = visible, orange = hidden, blue = hidden and scored; one
colour a region, one a method. Colours are Okabe and Ito's, which colour-blind readers can tell
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from mtm.masks import Mask, MaskSampler
from mtm.prediction import predict_in_batches
from mtm.report import Mean, Report, TaskScores
from mtm.session import Session, has_region

ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
REGION_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)
METHOD_COLOURS = {
    "MtM": BLUE,
    "oracle": GREEN,
    "true rate": GREEN,
    "mean rate": "0.6",
    "PSTH": ORANGE,
    "ridge": PINK,
    "low-rank GLM": SKY,
    "reduced-rank regression": YELLOW,
    "temporal NDT1": RED,
    "random-token NDT2": "0.3",
}
"""One a method, in every figure."""


def region_colours(session: Session) -> dict[str, str]:
    """Region -> colour, the same in every figure of a session; unlabelled neurons are grey."""
    names = session.region_names
    colours = dict(zip(names, _palette(len(names)), strict=False))
    return {label: colours.get(label, "0.5") for label in np.unique(session.regions).tolist()}


def raster(session: Session, trial: int, ax: Axes | None = None) -> Axes:
    """Spike counts of one trial: time across, neurons down, sorted by region."""
    ax = ax or plt.gca()
    order = np.argsort(session.regions, kind="stable")
    counts = session.counts[trial][:, order].T  # (N, T)
    edges = (session.window[0], session.window[1], session.n_neurons, 0)
    ax.imshow(
        counts, aspect="auto", cmap="Greys", interpolation="nearest", extent=edges, vmin=0,
        vmax=max(3, np.quantile(counts, 0.99)),
    )  # fmt: skip
    ax.axvline(0, color=RED, lw=1)
    _region_labels(session, order, ax)
    ax.set(xlabel="time from the event (s)", title=f"trial {trial}")
    return ax


def psth(
    session: Session,
    neuron: int,
    by: str = "choice",
    ax: Axes | None = None,
    rates: np.ndarray | None = None,
) -> Axes:
    """Mean firing rate of a neuron around the event, for each value of a behaviour.

    Args:
        session: the recording.
        neuron: its index.
        by: a behaviour with one value a trial.
        ax: where to draw.
        rates: (K, T, N) expected counts to average instead of the counts.
    """
    ax = ax or plt.gca()
    source = session.counts if rates is None else rates
    values = np.asarray(session.behaviour[by], dtype=np.float64)
    levels = np.unique(values[~np.isnan(values)])
    for i, level in enumerate(levels):
        mean = source[values == level][:, :, neuron].mean(axis=0) / session.bin_size
        ax.plot(
            session.times + session.bin_size / 2,
            mean,
            color=REGION_COLOURS[i % len(REGION_COLOURS)],
            label=f"{by} {level:g}",
        )
    ax.axvline(0, color="0.7", lw=1, zorder=0)
    ax.set(xlabel="time from the event (s)", ylabel="firing rate (Hz)")
    ax.set_title(f"neuron {neuron}, {session.regions[neuron] or 'no region'}")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return _tidy(ax)


def mask(
    session: Session,
    name: str,
    trials: Sequence[int] = (0,),
    ax: Axes | None = None,
    seed: int = 0,
    ratio: float | None = None,
    patch_size: int = 128,
) -> Axes:
    """A drawn mask over the spikes of a few trials, side by side: what is hidden, what is scored.

    Args:
        session: the recording.
        name: of the masking scheme.
        trials: indices; one mask is drawn for all of them, as for a batch.
        ax: where to draw.
        seed: of the mask.
        ratio: share hidden; default the scheme's own.
        patch_size: neurons of a patch, for schemes that hide patches.
    """
    ax = ax or plt.gca()
    drawn = _draw(session, name, trials, seed, ratio, patch_size)
    order = _show_mask(session, trials, drawn, ax, (0, len(trials), session.n_neurons, 0))
    for i in range(1, len(trials)):
        ax.axvline(i, color="black", lw=1)
    ax.set_xticks(np.arange(len(trials)) + 0.5, [f"trial {t}" for t in trials])
    ax.tick_params(axis="x", length=0)
    _region_labels(session, order, ax)
    ax.set_title(name + (" (attends to the past)" if drawn.causal else ""))
    return ax


def filled_in(
    session: Session,
    name: str,
    trial: int,
    predictor: Any,
    figure: Figure | None = None,
    seed: int = 0,
    ratio: float | None = None,
) -> Figure:
    """One trial as it was, as a network is shown it, as it fills it in, and the true rates.

    The third and the fourth panel (where the truth is known) show the scored entries alone, in the
    same colours. Neurons are sorted by region.

    Args:
        session: the recording.
        name: of the masking scheme.
        trial: index of the trial.
        predictor: as in :func:`mtm.evaluate`, but for arrays.
        figure: where to draw.
        seed, ratio: of the mask, as in :func:`mask`.
    """
    mask = _draw(session, name, [trial], seed, ratio)
    counts = torch.from_numpy(session.counts[[trial]].astype(np.float32))
    ((_, log_rates),) = predict_in_batches(
        predictor, session.name, name, 1, lambda _: (counts, mask)
    )
    images = {"predicted": torch.exp(log_rates[0]).cpu().numpy() / session.bin_size}  # (T, N), Hz
    if session.rates is not None:
        images["true rate"] = session.rates[trial] / session.bin_size
    target = mask.target[0].numpy()
    highest = max(np.quantile(image[target], 0.99) for image in images.values())
    figure = figure or plt.figure(figsize=(11, 3.4), layout="constrained")
    recorded, shown, *rest = figure.subplots(1, 2 + len(images), sharey=True)
    raster(session, trial, recorded).set_title("recorded")
    edges = (session.window[0], session.window[1], session.n_neurons, 0)
    order = _show_mask(session, [trial], mask, shown, edges)
    shown.set_title("shown, but for the colours")
    for ax, (title, image) in zip(rest, images.items(), strict=True):
        image = np.where(target, image, np.nan)[:, order].T
        picture = ax.imshow(
            image, aspect="auto", extent=edges, interpolation="nearest", cmap="viridis",
            norm=PowerNorm(0.5, 0, highest),
        )  # fmt: skip
        ax.set_title(title)
    figure.colorbar(picture, ax=rest, label="Hz")
    for ax in (shown, *rest):
        ax.set_xlabel("time from the event (s)")
    return figure


def mask_legend(figure: Figure) -> None:
    """The key to :func:`mask`, at the foot of a figure with constrained layout."""
    patches = [
        Patch(facecolor="0.35", label="visible spikes"),
        Patch(facecolor=ORANGE, label="hidden, not scored"),
        Patch(facecolor=BLUE, label="hidden and scored"),
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)


def history(entries: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Validation scores of each scheme over the epochs of :class:`mtm.Fit`'s ``history``."""
    ax = ax or plt.gca()
    epochs = [entry["epoch"] for entry in entries]
    for colour, name in zip(REGION_COLOURS, entries[0]["validation"], strict=False):
        ax.plot(epochs, [e["validation"][name] for e in entries], color=colour, label=name)
    ax.plot(epochs, [e["mean"] for e in entries], color="black", lw=2, label="mean")
    ax.axhline(0, color="0.7", lw=1, zorder=0)
    ax.set(xlabel="epoch", ylabel="bits per spike on hidden entries\n(validation trials)")
    ax.legend(frameon=False)
    return _tidy(ax)


def live() -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """A drawing of :func:`history` in a notebook, which follows training: pass it to ``fit``.

    Example:
        >>> result = mtm.fit(sessions, on_validation=mtm.plots.live())
    """
    from IPython.display import display

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    plt.close(figure)  # or the notebook would show it once more when the cell ends
    shown = display(figure, display_id=True)

    def draw(entries: Sequence[Mapping[str, Any]]) -> None:
        ax.clear()
        history(entries, ax)
        if shown is not None:  # None outside notebooks
            shown.update(figure)

    return draw


def predicted(
    session: Session, trial: int, neuron: int, log_rates: np.ndarray, ax: Axes | None = None
) -> Axes:
    """Spikes, predicted rate and, where known, true rate of one neuron in one trial.

    Args:
        session: the recording.
        trial: index of the trial.
        neuron: index of the neuron.
        log_rates: (T,) predicted for it.
        ax: where to draw.
    """
    ax = ax or plt.gca()
    centres = session.times + session.bin_size / 2
    counts = session.counts[trial, :, neuron]
    ax.bar(centres, counts / session.bin_size, session.bin_size, color="0.85", label="spikes")
    if session.rates is not None:
        true = session.rates[trial, :, neuron] / session.bin_size
        ax.plot(centres, true, color=METHOD_COLOURS["true rate"], label="true rate")
    rate = np.exp(log_rates) / session.bin_size
    ax.plot(centres, rate, color=METHOD_COLOURS["MtM"], label="predicted rate")
    ax.set(xlabel="time from the event (s)", ylabel="firing rate (Hz)")
    ax.set_title(f"neuron {neuron}, {session.regions[neuron]}, trial {trial}")
    return _tidy(ax)


def rate_scatter(
    true: np.ndarray, log_rates: np.ndarray, bin_size: float, ax: Axes | None = None
) -> Axes:
    """Predicted against true firing rates of many entries, on logarithmic axes.

    Args:
        true: expected counts, any shape.
        log_rates: predicted, same shape.
        bin_size: seconds.
        ax: where to draw.
    """
    ax = ax or plt.gca()
    x, y = np.ravel(true) / bin_size, np.exp(np.ravel(log_rates)) / bin_size
    ax.hexbin(x, y, gridsize=60, bins="log", xscale="log", yscale="log", cmap="Blues", mincnt=1)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(ends, ends, color=RED, lw=1)
    ax.set(xlabel="true rate (Hz)", ylabel="predicted rate (Hz)")
    return _tidy(ax)


def score_bars(
    reports: Mapping[str, Report], column: str = "bits_per_spike", ax: Axes | None = None
) -> Axes:
    """Mean of each predictor in each activity task, with its standard error.

    The error is that over sessions where there are several, else that over neurons.
    """
    ax = ax or plt.gca()
    having = (t for r in reports.values() for t, s in r.tasks.items() if column in s.table)
    tasks = list(dict.fromkeys(having))
    rows = {
        name: [_mean(r.tasks[t], column) if t in r.tasks else None for t in tasks]
        for name, r in reports.items()
    }
    _bars(rows, ax)
    ax.set_xticks(np.arange(len(tasks)), [task.replace("-", "-\n", 1) for task in tasks])
    several = any(len(r.sessions) > 1 for r in reports.values())
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
    means = {name: r.tasks[task].by_region(column) for name, r in reports.items()}
    named = {region for parts in means.values() for region in parts}
    regions = sorted(region for region in named if has_region(region))
    _bars({name: [parts.get(region) for region in regions] for name, parts in means.items()}, ax)
    counts = [max(parts[r].n for parts in means.values() if r in parts) for r in regions]
    labels = [f"{region}\n{n}" for region, n in zip(regions, counts, strict=True)]
    ax.set_xticks(np.arange(len(regions)), labels, rotation=90 if len(regions) > 10 else 0)
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

    Args:
        across, up: reports on the same sessions.
        task, column: which score; it is averaged over seeds.
        ax: where to draw.
        names: of the two predictors.

    Raises:
        ValueError: when the reports scored other neurons.
    """
    ax = ax or plt.gca()
    both = across.tasks[task], up.tasks[task]
    for session in both[0].sessions:
        neurons = [scores.neurons[scores.session_of == session] for scores in both]
        if not np.array_equal(*neurons):
            raise ValueError(f"session {session!r}: the two reports scored other neurons")
    x, y = (
        np.concatenate([scores.by_neuron(name, column) for name in both[0].sessions])
        for scores in both
    )
    labels = np.array([r if has_region(r) else "" for r in both[0].regions])
    regions = [name for name in np.unique(labels).tolist() if name]
    for region, colour in [("", "0.5"), *zip(regions, _palette(len(regions)), strict=False)]:
        mine = labels == region
        ax.scatter(x[mine], y[mine], s=14, color=colour, label=region, lw=0, alpha=0.8)
    ends = [np.nanmin([x, y]), np.nanmax([x, y])]
    ax.plot(ends, ends, "--", color="0.6", lw=1, zorder=0)
    better, unit = np.mean((y > x)[~np.isnan(x + y)]), column.replace("_", " ")
    ax.set_title(f"{task}: {names[1]} better for {better:.0%} of neurons", fontsize=10)
    ax.set(xlabel=f"{names[0]} ({unit})", ylabel=f"{names[1]} ({unit})")
    if len(regions) <= 10:
        ax.legend(frameon=False, fontsize=8)  # labels of nothing are left out
    return _tidy(ax)


def psth_grid(
    session: Session,
    rates: np.ndarray,
    neurons: Sequence[int],
    trials: np.ndarray,
    by: str = "choice",
    figure: Figure | None = None,
) -> Figure:
    """PSTHs of several neurons, observed (thin) and predicted (thick), for each value of ``by``.

    Args:
        session: the recording.
        rates: (K', T, N) predicted expected counts of ``trials``.
        neurons: their indices.
        trials: (K',) indices.
        by: a behaviour with one value a trial.
        figure: where to draw.
    """
    columns = min(4, len(neurons))
    rows = -(-len(neurons) // columns)
    figure = figure or plt.figure(figsize=(2.6 * columns, 2.2 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    values = np.asarray(session.behaviour[by], dtype=np.float64)[trials]
    levels = np.unique(values[~np.isnan(values)])
    centres = session.times + session.bin_size / 2
    for ax, neuron in zip(axes.flat, neurons, strict=False):
        for level, colour in zip(levels, _palette(len(levels)), strict=False):
            like = values == level
            seen, told = (
                x[like][:, :, neuron].mean(axis=0) / session.bin_size
                for x in (session.counts[trials], rates)
            )
            ax.plot(centres, seen, color=colour, lw=0.8, alpha=0.6)
            ax.plot(centres, told, color=colour, lw=2, label=f"{by} {level:g}")
        ax.set_title(f"neuron {neuron}, {session.regions[neuron] or 'no region'}", fontsize=9)
        ax.set_ylim(bottom=0)
        _tidy(ax)
    for ax in axes.flat[len(neurons) :]:
        ax.set_visible(False)
    figure.supxlabel("time from the event (s)", fontsize=10)
    figure.supylabel("firing rate (Hz)", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    return figure


def before_and_after(
    session: Session,
    rates: np.ndarray,
    neuron: int,
    trials: np.ndarray,
    by: str | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Single trials of one neuron: its spikes at the left, what was predicted of them at the right.

    Args:
        session: the recording.
        rates: (K', T, N) expected counts of ``trials``, each predicted while it was hidden.
        neuron: its index.
        trials: (K',) indices.
        by: a behaviour to sort the trials by; default as they come.
        figure: where to draw.
    """
    figure = figure or plt.figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    order = np.arange(len(trials))
    if by is not None:
        order = np.argsort(np.asarray(session.behaviour[by])[trials], kind="stable")
    seen, told = (
        x[order][:, :, neuron] / session.bin_size for x in (session.counts[trials], rates)
    )
    edges = (session.window[0], session.window[1], len(trials), 0)
    style = {"aspect": "auto", "cmap": "Greys", "extent": edges, "interpolation": "nearest"}
    for ax, image, title in ((left, seen, "spikes"), (right, told, "predicted while hidden")):
        shown = ax.imshow(image, vmin=0, vmax=max(np.quantile(image, 0.995), 1e-9), **style)
        ax.axvline(0, color=RED, lw=1)
        ax.set(title=title, xlabel="time from the event (s)")
        figure.colorbar(shown, ax=ax, label="Hz")
    left.set_ylabel("test trials" + (f", sorted by {by}" if by else ""))
    figure.suptitle(f"neuron {neuron}, {session.regions[neuron] or 'no region'}", fontsize=10)
    return figure


def _mean(scores: TaskScores, column: str) -> Mean:
    return scores.over("sessions" if len(scores.sessions) > 1 else "neurons", column)


def _bars(rows: Mapping[str, Sequence[Mean | None]], ax: Axes) -> None:
    """Bars side by side, a colour for each row, lines for the standard errors."""
    taken = {METHOD_COLOURS.get(name) for name in rows}
    spare = cycle(c for c in REGION_COLOURS if c not in taken)
    width = 0.8 / len(rows)
    for i, (name, means) in enumerate(rows.items()):
        drawn = [Mean(np.nan, np.nan, 0) if mean is None else mean for mean in means]
        ax.bar(
            np.arange(len(drawn)) + (i - (len(rows) - 1) / 2) * width,
            [mean.value for mean in drawn],
            width,
            yerr=np.nan_to_num([mean.error for mean in drawn]),
            color=METHOD_COLOURS.get(name) or next(spare),
            label=name,
        )
    ax.axhline(0, color="black", lw=0.8)
    ax.legend(frameon=False, ncols=min(len(rows), 4), loc="lower left", bbox_to_anchor=(0, 1))


def _palette(n: int) -> list[str]:
    """Colours that one can tell apart at a glance; of more than seven, that are all different."""
    if n <= len(REGION_COLOURS):
        return list(REGION_COLOURS)
    return [to_hex(c) for c in plt.get_cmap("turbo")(np.linspace(0.05, 0.95, n))]


def _draw(
    session: Session,
    name: str,
    trials: Sequence[int],
    seed: int,
    ratio: float | None,
    patch_size: int = 128,
) -> Mask:
    """A mask for some trials, as for a batch of them in training."""
    ratios = {} if ratio is None else {name: ratio}
    sampler = MaskSampler([name], ratios, seed, patch_size=patch_size)
    counts = torch.from_numpy(session.counts[list(trials)].astype(np.int64))
    return sampler.draw(name, counts, torch.from_numpy(session.region_codes))


def _show_mask(
    session: Session,
    trials: Sequence[int],
    drawn: Mask,
    ax: Axes,
    edges: tuple[float, float, float, float],
) -> np.ndarray:
    """Spikes and mask of trials side by side, neurons sorted by region; returns their order."""
    order = np.argsort(session.regions, kind="stable")
    state = (drawn.hidden.long() + drawn.target.long()).numpy()  # 0 visible, 1 hidden, 2 scored
    codes = (2 * state + (session.counts[list(trials)] > 0))[:, :, order]
    palette = ListedColormap(["white", "0.35", "#FBE3B5", ORANGE, "#BFDDF0", BLUE])
    ax.imshow(
        np.concatenate(list(codes), axis=0).T, aspect="auto", cmap=palette, vmin=-0.5, vmax=5.5,
        interpolation="nearest", extent=edges,
    )  # fmt: skip
    return order


def _region_labels(session: Session, order: np.ndarray, ax: Axes) -> None:
    """Mark the regions of sorted neurons by a coloured strip and their names at the left."""
    labels = session.regions[order]
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    stops = np.r_[starts[1:], len(labels)]
    colours = region_colours(session)
    ax.set_yticks((starts + stops) / 2, [label or "no region" for label in labels[starts]])
    ax.tick_params(axis="y", length=0, pad=9)
    strip = ax.get_yaxis_transform() + ScaledTranslation(-5 / 72, 0, ax.figure.dpi_scale_trans)
    for start, stop in zip(starts, stops, strict=True):
        ax.plot(
            [0, 0], [start, stop], transform=strip, color=colours[labels[start]], lw=4,
            clip_on=False, solid_capstyle="butt",
        )  # fmt: skip


def _tidy(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
