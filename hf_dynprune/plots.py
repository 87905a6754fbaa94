"""Pictures of runs, drawn from their reports and from how often each sample was kept.

```python
reports = {"full run": PruningReport.load("full.json"), "UCB": PruningReport.load("ucb.json")}
plot_runs(reports).savefig("comparison.png", dpi=150)
```

Each function returns a figure that belongs to no window and changes no global state. Without
matplotlib it raises ImportError. `hf-dynprune plot` draws the same from files.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from .checks import missing
from .escape import printable
from .files import atomic
from .report import PruningReport, by_seed, in_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Against = Literal["passes", "seconds", "rollouts"]
Reports = Mapping[str, PruningReport | Sequence[PruningReport]]

_AXES: dict[str, str] = {
    "passes": "passes over the data (passes / N)",
    "seconds": "seconds without evaluation",
    "rollouts": "rollouts (completions generated)",
}
# Okabe and Ito's colours, which colour-blind people can tell apart. Their yellow is left out: it is
# pale on white. Each has a marker, for print without colour. From the eighth run on the colours
# repeat with other markers.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_MARKERS = "os^DvPX"
_GREY = "#555555"
_MAX_NAMED = 40  # classes that have room for their names
_EXTREMES = 12  # of more classes, how many are named at either end
_MAX_NAME = 60  # characters; of longer names the picture would have no room for the drawing
_THUMBNAIL = 160  # pixels
_SCORES = ("q05", "q25", "q50", "q75", "q95", "mean")  # of an epoch, in a report


class _Curve(NamedTuple):
    """Runs of one name with R seeds and E evaluations: x (E,), mean cost of the seeds; y (R, E)."""

    x: np.ndarray
    y: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.y.mean(axis=0)


# ---- runs ----------------------------------------------------------------------------------------


def plot_runs(
    reports: Reports,
    metric: str = "eval_accuracy",
    against: Against | Sequence[Against] | None = None,
) -> "Figure":
    """Draw a metric of runs against their cost so far.

    Each run is a line, or a point if it was evaluated only once. The legend shows the last values.
    The cost includes charged scores of [`StaticPruning`]. The vertical axis spans the second halves
    of the runs. A hollow triangle at its end marks each value that lies beyond.

    Args:
        reports: name -> report. Several reports of a name are runs that differ only in their seed:
            the line is their mean, the band reaches from the lowest to the highest.
        metric: a name in the `metrics` of the reports' epochs. Epochs without it are left out. A
            value stands at the end of its epoch. An accuracy is shown in per cent.
        against: `"passes"` for passes / N, `"seconds"` for wall-clock without evaluation,
            `"rollouts"` for completions that were generated, or several, one panel each. By default
            `"rollouts"` and `"seconds"` if all runs have rollouts, else `"passes"` and `"seconds"`.

    Raises:
        ValueError: If there are no reports, if a report has no finite value of the metric, if it
            has no rollouts and they are asked for, or if the reports of a name differ in more than
            the seed.
    """
    runs = _by_name(reports)
    without = [name for name, seeds in runs.items() if not all(run.rolled_out for run in seeds)]
    usual: list[Against] = ["passes" if without else "rollouts", "seconds"]
    panels = [against] if isinstance(against, str) else usual if against is None else list(against)
    if not panels or any(panel not in _AXES for panel in panels):
        raise ValueError(f"against={against!r}: expected one or several of {list(_AXES)}.")
    if "rollouts" in panels and without:
        raise ValueError(
            f"against={against!r}: the run {without[0]!r} has no rollouts. Draw runs of "
            "reinforcement learning alone, or draw against 'passes'."
        )
    curves = {
        panel: {name: _curve(name, seeds, metric, panel) for name, seeds in runs.items()}
        for panel in panels
    }
    first = curves[panels[0]]
    percent = in_percent(metric, np.concatenate([curve.y.ravel() for curve in first.values()]))
    figure = _new_figure((3 + 3.7 * len(panels), max(4, 0.8 + 0.2 * len(runs))))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    beyond: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=True):
        lines = _draw_curves(_plain(ax), curves[panel], 100 if percent else 1)
        ax.set_xlabel(_AXES[panel])
        if panel == "rollouts":  # their long numbers would touch
            ax.xaxis.set_major_formatter(_thousands())
    for ax, panel in zip(axes, panels, strict=True):  # the panels share one vertical axis
        beyond |= _mark_beyond(ax, curves[panel], lines, 100 if percent else 1)
    axes[0].set_ylabel(_label(metric.replace("_", " ")) + (" (%)" if percent else ""))
    names = sorted(runs, key=lambda name: -first[name].mean[-1])  # from top to bottom, as the lines
    several = any(len(seeds) > 1 for seeds in runs.values())
    figure.legend(
        [*(lines[name] for name in names), *beyond.values()],
        [*(f"{_entry(name)}: {_last_value(first[name], percent)}" for name in names), *beyond],
        title="last value" + ("\nmean of the seeds (lowest to highest)" if several else ""),
        loc="outside right upper",
        alignment="left",
        frameon=False,
        fontsize=9,
    )
    return figure


def plot_selection(reports: Reports) -> "Figure":
    """Draw how many samples were kept how often, one panel per run.

    A dashed line shows what uniformly random choices would give.

    Args:
        reports: name -> report. Several reports of a name are runs that differ only in their seed,
            and are averaged. Runs whose choices keep everything are left out.

    Raises:
        ValueError: If no choice of any run left samples out, or if the reports of a name differ in
            more than the seed.
    """
    runs = _by_name(reports)
    choosing = {}
    for name, seeds in runs.items():
        selection, n = seeds[0].selection, seeds[0].num_samples
        if selection.get("choices", 0) > 0 and selection["always"] < 1:
            choosing[name] = [
                100 * np.mean([run.selection[kind] for run in seeds], axis=0) / n
                for kind in ("histogram", "chance")
            ]
    if not choosing:
        raise ValueError(
            f"No choice of the runs {', '.join(runs)} left samples out: there is no selection to "
            "plot."
        )
    columns = min(3, len(choosing))
    rows = -(-len(choosing) // columns)
    figure = _new_figure((max(5.0, 3.3 * columns), 0.5 + max(2.8 * rows, 3.2)))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for ax in axes[len(choosing) :]:
        ax.remove()
    for ax, (name, (histogram, chance)) in zip(axes, choosing.items(), strict=False):
        edges = np.arange(len(histogram) + 1) - 0.5  # bars are centred on 0, 1, ...
        _plain(ax).stairs(histogram, edges, fill=True, color=_COLORS[0], alpha=0.35)
        ax.stairs(histogram, edges, color=_COLORS[0], linewidth=1.5, label="this run")
        ax.stairs(chance, edges, color=_GREY, linewidth=1.5, linestyle="--", label="by chance")
        ax.set_title(_label(name), fontsize=10)
        ax.set_xlabel("times kept (choices)")
        ax.locator_params(axis="x", integer=True)
    for ax in axes[::columns]:
        ax.set_ylabel("samples (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    return figure


def plot_scores(report: PruningReport) -> "Figure":
    """Draw how the scores of the observed samples were distributed at each choice.

    Raises:
        ValueError: If the run has no scores: its policy has none, or it made no choice after an
            observation.
    """
    records = [record for record in report.epochs if record.scores]
    if not records:
        raise ValueError(
            f"The report of {report.policy['name']!r} holds no scores: expected a run of a policy "
            "that scores samples, such as ucb, with a choice after its first epoch."
        )
    figure = _new_figure((6.5, 4))
    ax = _plain(figure.subplots())
    epochs = [record.epoch for record in records]
    missing = [name for name in _SCORES if any(name not in record.scores for record in records)]
    if missing:
        raise ValueError(
            f"The scores of a report's epochs lack {missing[0]!r}: expected {_SCORES}."
        )
    values = {name: [record.scores[name] for record in records] for name in _SCORES}
    blue, orange = _COLORS[:2]
    for low, high, share, alpha in (("q05", "q95", 90, 0.15), ("q25", "q75", 50, 0.3)):
        band: dict[str, Any] = {"color": blue, "alpha": alpha, "linewidth": 0}
        label = f"{share} % of the samples"
        ax.fill_between(epochs, values[low], values[high], label=label, **band)
    for name, label, color, style in (
        ("q50", "median", blue, "o-"),
        ("mean", "mean", orange, "s--"),
    ):
        ax.plot(epochs, values[name], style, color=color, markersize=4.5, label=label)
    ax.set_xlabel("epoch for which samples were chosen (counted from 0)")
    ax.set_ylabel(f"score of {_label(report.policy['name'])}")
    ax.locator_params(axis="x", integer=True)
    figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return figure


def plot_potential(reports: Reports) -> "Figure":
    """Draw the effective share at the end of each epoch: what part of the data still matters.

    The legend shows G, the mean over the epochs of 1 / effective share. Epochs without a share are
    left out.

    Args:
        reports: name -> report. Several reports of a name are runs that differ only in their seed:
            the line is their mean, the band reaches from the lowest to the highest.

    Raises:
        ValueError: If a run has no effective share, or if the reports of a name differ in more than
            the seed.
    """
    curves = {name: _shares(name, seeds) for name, seeds in _by_name(reports).items()}
    figure = _new_figure((6.5, max(4, 0.8 + 0.2 * len(curves))))
    ax = _plain(figure.subplots())
    _draw_curves(ax, curves, 100)
    ax.set_ylim(0, 105)
    ax.set_xlabel("epochs")
    ax.set_ylabel("effective share of the data (%)")
    gains = {name: float((1 / curve.y).mean()) for name, curve in curves.items()}
    lines, names = ax.get_legend_handles_labels()
    labels = [f"{_entry(name)}: {gains[name]:.2f}" for name in names]
    ax.legend(lines, labels, title="mean G", frameon=False, fontsize=9)
    return figure


def _shares(name: str, seeds: Sequence[PruningReport]) -> _Curve:
    """Effective shares over the epochs in which every seed has one."""
    found = [
        {rec.epoch + 1: rec.effective_share for rec in report.epochs if rec.effective_share}
        for report in seeds
    ]
    epochs = sorted(set.intersection(*map(set, found)))
    if not epochs:
        raise ValueError(
            f"The report of {name!r} has no effective share: expected a run of this version, in "
            "which the loss of one sample is known."
        )
    shares = [[values[epoch] for epoch in epochs] for values in found]
    return _Curve(np.array(epochs), np.array(shares))


# ---- samples -------------------------------------------------------------------------------------


def plot_classes(
    times_kept: Any, choices: int, labels: Any, names: Sequence[str] | None = None
) -> "Figure":
    """Draw the kept share of each class in ascending order, and that of all samples as a line.

        share of class c = mean over its samples of times_kept / choices

    A grey band shows where 95 % of the shares would lie by chance, if each of the C choices drew
    its samples uniformly. With p the share of all samples and n_c the samples of the class, the
    band is

        p ± 1.96 sqrt(p (1 - p) (N - n_c) / ((N - 1) n_c C))

    The axis begins at 0. If there are more than 40 classes, only the twelve highest and the twelve
    lowest are named.

    Args:
        times_kept: (N,) number of choices that kept the sample, such as
            `trainer.pruner.table["times_kept"]`.
        choices: number of choices of the run, `report.selection["choices"]`.
        labels: (N,) integers, the class of each sample.
        names: names of the classes 0, 1, ..., *optional*, defaults to the numbers.

    Raises:
        ValueError: If shapes or ranges do not fit.
    """
    times, labels = _checked(times_kept, choices), np.asarray(labels)
    _check_length(times, labels, "labels")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(
            f"The labels are {labels.dtype}, such as {labels[:3].tolist()}: expected classes 0, 1, "
            "..."
        )
    if names is not None and labels.max() >= len(names):
        raise ValueError(
            f"There are {len(names)} names and a label {labels.max()}: expected a name per class."
        )
    sizes = np.bincount(labels)
    present = np.flatnonzero(sizes)
    shares = 100 * np.bincount(labels, weights=times)[present] / (sizes[present] * choices)
    order = np.argsort(shares, kind="stable")
    shown = [_short(str(c) if names is None else names[c], 24) for c in present[order]]
    overall = times.mean() / choices
    others = (len(times) - sizes[present]) / max(1, len(times) - 1)
    variance = overall * (1 - overall) * others / (sizes[present] * choices)
    band = 1.96 * 100 * np.sqrt(variance)
    return _draw_classes(shares[order], band[order], shown, 100 * overall, choices)


def _draw_classes(
    shares: np.ndarray, band: np.ndarray, names: Sequence[str], overall: float, choices: int
) -> "Figure":
    few, rows = len(shares) <= _MAX_NAMED, np.arange(len(shares))
    width, size = (1.5, 5.0) if few else (0.6, 2.5)
    figure = _new_figure((6.5, 1.2 + 0.2 * max(8, len(shares)) if few else 5))
    ax = _plain(figure.subplots())
    above = shares > overall
    for chosen, color, marker in ((above, _COLORS[0], "o"), (~above, _COLORS[4], "v")):
        ax.hlines(rows[chosen], overall, shares[chosen], color=color, linewidth=width)
        ax.plot(shares[chosen], rows[chosen], marker, color=color, markersize=size)
    ax.axvline(overall, color=_GREY, linestyle="--", label=f"all samples: {overall:.1f} %")
    chance: dict[str, Any] = {"color": _GREY, "alpha": 0.25, "linewidth": 0, "zorder": 0.5}
    ax.barh(rows, 2 * band, 1, overall - band, label="95 % by chance", **chance)
    ax.set_xlim(0, min(100, 1.08 * max(shares.max(), (overall + band).max())) or 1)
    ax.set_ylim(-0.7, len(shares) - 0.3)
    plural = "s" if choices > 1 else ""
    ax.set_xlabel(f"kept share of the class (%), mean of {choices} choice{plural}")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    if few:
        ax.set_yticks(rows, names)
    else:
        ax.set_ylabel(f"{len(shares)} classes, by kept share")
        ax.set_yticks([])
        lines = [f"{name}  {share:.1f} %" for name, share in zip(names, shares, strict=True)][::-1]
        text = ["kept most", *lines[:_EXTREMES], "", "kept least", *lines[-_EXTREMES:]]
        ax.text(1.03, 1, "\n".join(text), transform=ax.transAxes, va="top", fontsize=8)
    return figure


def plot_samples(
    times_kept: Any,
    choices: int,
    data: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    columns: int = 8,
) -> "Figure":
    """Draw images that a run always, sometimes and never kept, one row each.

    Each image has its class, index and number of choices. If no sample was always (never) kept, the
    row shows those kept most (least) often. Of more samples than fit, a row shows a random draw,
    the same each time; of those sometimes kept, evenly spaced ones from often to seldom.

    Args:
        times_kept: (N,) number of choices that kept the sample, such as
            `trainer.pruner.table["times_kept"]`.
        choices: number of choices of the run, `report.selection["choices"]`.
        data: the training data in their order: a `datasets.Dataset` with a column of images, or an
            [`hf_dynprune.vision.ImageCache`].
        image_column, label_column: columns of a `datasets.Dataset`, *optional*, found by
            [`hf_dynprune.data.find_column`].
        columns: images in a row.

    Raises:
        TypeError: If `data` has another type.
        ValueError: If columns are missing or ambiguous, or shapes or ranges do not fit.
    """
    times = _checked(times_kept, choices)
    _check_length(times, data, "in the dataset")
    rows = _sheet(times, choices, columns)
    every = np.concatenate([index for _, index in rows])
    images, labels = _images(data, every, image_column, label_column)
    pictures = dict(zip(every.tolist(), zip(images, labels, strict=True), strict=True))
    figure = _new_figure((0.6 + 1.05 * columns, 1.45 * len(rows)))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (title, index) in zip(grid, rows, strict=True):
        axes[0].set_ylabel(title, fontsize=9)
        for ax in axes:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
        for ax, i in zip(axes, index.tolist(), strict=False):
            image, label = pictures[i]
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            ax.set_title(f"{_short(label, 16)}\n#{i}: {times[i]} of {choices}", fontsize=7)
    return figure


def _sheet(times: np.ndarray, choices: int, count: int) -> list[tuple[str, np.ndarray]]:
    """The rows of a sheet: title, and indices of at most `count` samples, most kept first."""
    drawn = np.random.default_rng(0).permutation(len(times))  # breaks ties
    often = drawn[np.argsort(-times[drawn], kind="stable")]
    always, never = often[times[often] == choices], often[times[often] == 0]
    between = often[len(always) : len(often) - len(never)]
    spaced = ((np.arange(count) + 0.5) / count * len(between)).astype(int)

    def title(kind: str, group: np.ndarray) -> str:
        return f"{kind} kept\n({100 * len(group) / len(times):.1f} %)"

    rows = [
        (title("always", always), always[:count]),
        (title("sometimes", between), between[np.unique(spaced)] if len(between) else between),
        (title("never", never), never[:count]),
    ]
    if not len(always):
        rows[0] = ("most often kept\n(none always)", often[:count])
    if not len(never):
        rows[2] = ("least often kept\n(none never)", often[-count:])
    return [(name, index) for name, index in rows if len(index)]


def _images(
    data: Any, index: np.ndarray, image_column: str | None, label_column: str | None
) -> tuple[list[Any], list[str]]:
    """Thumbnails, and the names of their classes."""
    import datasets

    from .data import class_names, find_column

    if isinstance(data, datasets.Dataset):
        image_column = find_column(data.features, "image", image_column)
        label_column = find_column(data.features, "label", label_column)
        names = class_names(data, label_column)
        rows = data.with_format(None).select_columns([image_column, label_column])[index.tolist()]
        images, labels = [image.convert("RGB") for image in rows[image_column]], rows[label_column]
        for image in images:
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    elif hasattr(data, "images") and hasattr(data, "labels"):
        names = data.label_names
        pixels, labels = data.images.numpy()[index], data.labels.numpy()[index]
        images = [np.squeeze(image.transpose(1, 2, 0)) for image in pixels]
    else:
        raise TypeError(
            f"data is a {type(data).__name__}: expected a datasets.Dataset with images, or an "
            "ImageCache."
        )
    return images, [str(label) if names is None else names[label] for label in labels]


def _checked(times_kept: Any, choices: int) -> np.ndarray:
    times = np.asarray(times_kept)
    if times.ndim != 1 or len(times) == 0 or not np.issubdtype(times.dtype, np.integer):
        raise ValueError(
            f"times_kept is {times.dtype} {times.shape}: expected integers (N,), one per sample."
        )
    if choices < 1 or times.min() < 0 or times.max() > choices:
        raise ValueError(
            f"times_kept goes from {times.min()} to {times.max()}, with {choices} choices: "
            "expected counts from 0 to the number of choices, and at least one choice."
        )
    return times


def _check_length(times: np.ndarray, other: Any, what: str) -> None:
    if len(other) != len(times):
        raise ValueError(
            f"The run trained on {len(times):,} samples, and there are {len(other):,} {what}: "
            "expected the split, or the part of it, that the run trained on, in its order."
        )


# ---- drawing -------------------------------------------------------------------------------------


def _new_figure(size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("hf_dynprune.plots", "matplotlib", "recipes", error) from error
    return Figure(figsize=size, layout="constrained")


def _thousands() -> Any:
    """Writes 20000 as 20k."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def save_picture(figure: "Figure", path: str | os.PathLike[str], dpi: int = 100) -> None:
    """Write a picture in the format that its suffix says, whole or not at all."""
    suffix = Path(path).suffix.removeprefix(".")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=suffix)


def _plain(ax: "Axes") -> "Axes":
    """Remove the frame above and on the right, and add a pale grid behind the drawing."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def _by_name(reports: Reports) -> dict[str, list[PruningReport]]:
    """The reports of each name. ValueError unless they differ only in their seed."""
    if not reports:
        raise ValueError("reports is empty: expected name -> report with at least one run.")
    runs = {name: by_seed(f"the run {name!r}", given) for name, given in reports.items()}
    if empty := [name for name, seeds in runs.items() if not seeds]:
        raise ValueError(f"There is no report of the run {empty[0]!r}: expected at least one.")
    return runs


def _curve(name: str, seeds: Sequence[PruningReport], metric: str, against: Against) -> _Curve:
    """The curve over the epochs in which every seed has a finite value of the metric."""
    reached = []  # of each seed: epoch -> (cost, value)
    for report in seeds:
        costs = zip(report.spent(against), report.epochs, strict=True)
        values = {rec.epoch: (cost, rec.metrics.get(metric, math.nan)) for cost, rec in costs}
        reached.append({epoch: pair for epoch, pair in values.items() if math.isfinite(pair[1])})
    epochs = sorted(set.intersection(*map(set, reached)))
    if not epochs:
        records = [record for report in seeds for record in report.epochs]
        known = sorted({key for record in records for key in record.metrics})
        raise ValueError(
            f"The report of {name!r} has no finite {metric!r}: expected a metric of its epochs, "
            f"one of {known}."
        )
    points = np.array([[values[epoch] for epoch in epochs] for values in reached])  # (R, E, 2)
    return _Curve(points[..., 0].mean(axis=0), points[..., 1])


def _draw_curves(ax: "Axes", curves: Mapping[str, _Curve], scale: float) -> dict[str, Any]:
    """Draw the curves, with values times `scale`. Returns the lines by name."""
    lines = {}
    for i, (name, curve) in enumerate(curves.items()):
        color, marker = _COLORS[i % 7], _MARKERS[(i + i // 7) % 7]
        low, high = scale * curve.y.min(axis=0), scale * curve.y.max(axis=0)
        style: dict[str, Any] = {"markersize": 4.5}
        if len(curve.x) == 1:
            ax.vlines(curve.x, low, high, color=color, linewidth=1.5)
            style = {"markersize": 7, "linestyle": "none"}
        elif len(curve.y) > 1:
            ax.fill_between(curve.x, low, high, color=color, alpha=0.2, linewidth=0)
        style |= {"color": color, "marker": marker, "label": name}
        (lines[name],) = ax.plot(curve.x, scale * curve.mean, **style)
    ax.set_xlim(0, 1.05 * max(curve.x[-1] for curve in curves.values()))
    # The first epochs are far from the others and would press these into a line.
    late = [scale * curve.y[:, len(curve.x) // 2 :].ravel() for curve in curves.values()]
    low, high = np.concatenate(late).min(), np.concatenate(late).max()
    margin = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(low - margin if low < 0 else max(0, low - margin), high + margin)
    return lines


def _mark_beyond(
    ax: "Axes", curves: Mapping[str, _Curve], lines: Mapping[str, Any], scale: float
) -> dict[str, Any]:
    """Mark the values beyond the vertical axis at its ends. Returns marks for the legend."""
    from matplotlib.lines import Line2D

    low, high = ax.get_ylim()
    found = {}
    for label, marker, end in (("below the axis", "v", low), ("above the axis", "^", high)):
        for name, curve in curves.items():
            values = scale * curve.mean
            x = curve.x[values < low] if end == low else curve.x[values > high]
            if len(x):
                style = {"facecolors": "white", "edgecolors": lines[name].get_color()}
                ax.scatter(x, np.full(len(x), end), 40, marker=marker, clip_on=False, **style)
                own: dict[str, Any] = {
                    "markerfacecolor": "white",
                    "markeredgecolor": _GREY,
                    "linestyle": "none",
                }
                found[label] = Line2D([], [], marker=marker, markersize=6.5, **own)
    return found


def _last_value(curve: _Curve, percent: bool) -> str:
    """The last value; for several seeds the mean, the lowest and the highest."""

    def show(value: float) -> str:
        return f"{100 * value:.2f}" if percent else f"{value:.4g}"

    last, unit = curve.y[:, -1], " %" if percent else ""
    seeds = f" ({show(last.min())} to {show(last.max())})" if len(last) > 1 else ""
    return f"{show(last.mean())}{unit}{seeds}"


def _short(name: str, width: int) -> str:
    """The first of a class's several names, cut if it is too long."""
    name = printable(name.partition(",")[0])
    return _label(name if len(name) <= width else name[: width - 1] + "…")


def _label(name: str) -> str:
    """The name, cut if it is too long, as matplotlib shows it as it is.

    Between two `$` it would read a formula.
    """
    name = printable(name)
    return (name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}…").replace("$", r"\$")


def _entry(name: str) -> str:
    """A name in a legend, which would leave out what begins with an underscore."""
    return ("\u200b" if name.startswith("_") else "") + _label(name)
