"""Pictures of runs, drawn from their reports and from how often each sample was kept.

```python
reports = {"full run": PruningReport.load("full.json"), "UCB 30 %": PruningReport.load("report.json")}
plot_runs(reports).savefig("comparison.png", dpi=150)
```

Each function returns a figure that belongs to no window and no global state, and raises ImportError without matplotlib.
`hf-dynprune plot` draws the same from files.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from .report import PruningReport, differences, in_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Against = Literal["passes", "seconds"]
Reports = Mapping[str, PruningReport | Sequence[PruningReport]]

_AXES: dict[str, str] = {
    "passes": "passes over the data (passes / N)",
    "seconds": "seconds of training, choosing and scoring\n(not of evaluation)",
}
# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, which is pale on white; each with a
# marker, for print without colour. Beyond seven runs the colours come again with other markers.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_MARKERS = "os^DvPX"
_GREY = "#555555"
_HISTOGRAMS = ("histogram", "chance")  # of a report's selection
_NAMED = 40  # classes that have room for their names
_EXTREMES = 12  # classes that are named at either end, where there are more
_THUMBNAIL = 160  # pixels


class _Curve(NamedTuple):
    """What runs of one name, R seeds, reached at E evaluations: x (E,), the mean of the seeds, and y (R, E)."""

    x: np.ndarray
    y: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.y.mean(axis=0)


# ---- runs ----------------------------------------------------------------------------------------


def plot_runs(
    reports: Reports,
    metric: str = "eval_accuracy",
    against: Against | Sequence[Against] = ("passes", "seconds"),
) -> "Figure":
    """Draws what runs reached against what they had cost until then: a line for each, or a point where it was evaluated
    only once; the legend has their last values.

    What was spent before a run for the scores of [`StaticPruning`] counts where its report charges it. The vertical axis
    spans the second halves of the runs.

    Args:
        reports: the runs by their names; several reports of a name are runs that differ in their seed: the line is their
            mean, the band about it reaches from the lowest to the highest.
        metric: a name in the `metrics` of the reports' epochs; epochs without it are left out, an accuracy is in per cent.
            It stands at the end of the epoch in which it was evaluated.
        against: `"passes"`, in passes over the data (passes / N); `"seconds"`, wall-clock without evaluation; or both, a
            panel for each.

    Raises:
        ValueError: without reports, where a report has no finite value of the metric, and where the reports of a name
            differ in policy, number of samples or number of epochs.
    """
    panels = [against] if isinstance(against, str) else list(against)
    unknown = [panel for panel in panels if panel not in _AXES]
    if unknown or not panels:
        raise ValueError(
            f"against={against!r}: wanted are 'passes' and 'seconds', one of them or both."
        )
    runs = _seeds(reports)
    curves = {
        panel: {name: _curve(name, seeds, metric, panel) for name, seeds in runs.items()}
        for panel in panels
    }
    values = np.concatenate([curve.y.ravel() for curve in curves[panels[0]].values()])
    percent = in_percent(metric, values)
    if percent:
        curves = {
            p: {n: curve._replace(y=100 * curve.y) for n, curve in of.items()}
            for p, of in curves.items()
        }
    figure = _new_figure((3 + 3.7 * len(panels), max(4, 0.8 + 0.2 * len(runs))))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, panel in zip(axes, panels, strict=True):
        lines = _draw_metric(_plain(ax), curves[panel])
        ax.set_xlabel(_AXES[panel])
    axes[0].set_ylabel(metric.replace("_", " ") + (" (%)" if percent else ""))
    labels = {name: f"{name}: {_ends(curve, percent)}" for name, curve in curves[panels[0]].items()}
    names = sorted(
        runs, key=lambda name: -curves[panels[0]][name].mean[-1]
    )  # as the lines end, from top to bottom
    several = (
        "\nmean of the seeds (lowest to highest)"
        if any(len(seeds) > 1 for seeds in runs.values())
        else ""
    )
    figure.legend(
        [lines[name] for name in names],
        [labels[name] for name in names],
        title=f"last value{several}",
        loc="outside right upper",
        alignment="left",
        frameon=False,
        fontsize=9,
    )
    return figure


def plot_costs(
    runs: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    metric: str = "eval_accuracy",
    *,
    full: Sequence[float] = (),
    baseline: str = "short run",
    lower_is_better: bool = False,
) -> "Figure":
    """Draws what methods reached at what they cost: a point for each cost, the mean of the seeds, with a bar from the lowest
    to the highest; points of a method are joined. The legend is in the order of the methods' best means. Points of several
    methods at one cost stand side by side.

    Args:
        runs: for each method pairs (cost, values): the share of the full run's passes that was spent; of each seed a value.
        metric: what the values are; an accuracy is drawn in per cent.
        full: the values of the full run, a line across and a band from the lowest to the highest; empty: none.
        baseline: the method that the others are to beat, which is drawn in black.
        lower_is_better: of the metric.

    Raises:
        ValueError: where there is nothing to draw, or a value is not finite.
    """
    values = {name: [list(of) for _, of in points] for name, points in runs.items()}
    scale, unit = _scale(
        [v for of in values.values() for each in of for v in each] + list(full), values, metric
    )
    figure = _new_figure((8, max(4, 0.8 + 0.2 * len(runs))))
    ax = _plain(figure.subplots())
    best = {
        name: (min if lower_is_better else max)(np.mean(of) for of in each)
        for name, each in values.items()
    }
    names = sorted(runs, key=lambda name: best[name], reverse=not lower_is_better)
    step = 0.006 * max(cost for points in runs.values() for cost, _ in points)
    lines = {}
    for name, (color, marker) in zip(names, _styles(names, baseline), strict=True):
        points = sorted(runs[name])
        costs = np.array([cost for cost, _ in points]) + step * (
            names.index(name) - (len(names) - 1) / 2
        )
        lows, highs, means = (
            scale * np.array([f(of) for _, of in points]) for f in (min, max, np.mean)
        )
        ax.vlines(costs, lows, highs, color=color, linewidth=1.5)
        (lines[name],) = ax.plot(
            costs, means, color=color, marker=marker, markersize=6, linewidth=1.2
        )
    if full:
        names = ["full run", *names]
        lines["full run"] = _draw_full(ax.axhline, ax.axhspan, scale * np.array(full))
    ax.set_xlim(left=0)
    ax.set_xlabel("cost: passes, of those of the full run")
    ax.set_ylabel(metric.replace("_", " ") + unit)
    figure.legend(
        [lines[name] for name in names], names, loc="outside right upper", frameon=False, fontsize=9
    )
    return figure


def plot_methods(
    values: Mapping[str, Sequence[float]],
    metric: str = "eval_accuracy",
    *,
    full: Sequence[float] = (),
    baseline: str = "short run",
    lower_is_better: bool = False,
) -> "Figure":
    """Draws what methods reached at one cost: a row for each, the best above, with a dot for each seed and a bar at their
    mean; a line down from the mean of the baseline. Of a method that is further behind the baseline than twice the full
    run's lead its mean alone is told, at the border, lest the others be drawn on a heap.

    Args: those of [`plot_costs`], of each method the values of its seeds.

    Raises:
        ValueError: where there is nothing to draw, or a value is not finite.
    """
    each = {name: [list(of)] for name, of in values.items()}
    scale, unit = _scale([*(v for of in values.values() for v in of), *full], each, metric)
    names = sorted(
        values, key=lambda name: float(np.mean(values[name])), reverse=lower_is_better
    )  # from below
    figure, ax = _rows(names)
    base = scale * float(np.mean(values[baseline])) if baseline in values else math.nan
    far = (
        2 * abs(scale * float(np.mean(full)) - base) if full else math.nan
    )  # nothing is further than nan
    for row, name in enumerate(names):
        color = "black" if name == baseline else _COLORS[0]
        own = scale * np.array(values[name])
        mean = float(own.mean())
        if (mean - base if lower_is_better else base - mean) > far:
            x, side, words = (
                (0.99, "right", f"{mean:.4g} →")
                if lower_is_better
                else (0.01, "left", f"← {mean:.4g}")
            )
            ax.text(
                x,
                row,
                words,
                transform=ax.get_yaxis_transform(),
                ha=side,
                va="center",
                fontsize=9,
                color=color,
            )
            continue
        ax.plot(
            own,
            np.full(len(own), row),
            "o",
            color=color,
            markersize=5,
            alpha=0.45,
            markeredgewidth=0,
        )
        ax.vlines(mean, row - 0.3, row + 0.3, color=color, linewidth=2.5)
    if baseline in values:
        ax.axvline(base, color="black", linewidth=1, linestyle="--", zorder=0)
    if full:
        line = _draw_full(ax.axvline, ax.axvspan, scale * np.array(full))
        figure.legend([line], ["full run"], loc="outside upper right", frameon=False, fontsize=9)
    ax.set_xlabel(f"{metric.replace('_', ' ')}{unit}: each seed, and the mean")
    return figure


def plot_targets(
    costs: Mapping[float, Mapping[str, tuple[float, bool] | None]],
    metric: str = "eval_accuracy",
    *,
    baseline: str = "short run",
) -> "Figure":
    """Draws what methods cost that reach a value: a row for each, the cheapest above, with a point for each value; lines
    down from the points of the baseline. An arrow to the left is a cost that was enough, where less was not tried.

    Args:
        costs: of each value to reach and each method the share of the full run's passes at which it does, and whether
            that is its least tried; None: it does not.
        metric: what the values are; an accuracy is drawn in per cent.
        baseline: the method that the others are to beat.

    Raises:
        ValueError: where no method reaches any of the values, or a number is not finite.
    """
    found = {
        name: [of.get(name) for of in costs.values()]
        for name in {name: None for of in costs.values() for name in of}
    }
    numbers = [*costs, *(each[0] for of in found.values() for each in of if each)]
    if len(numbers) == len(costs):
        raise ValueError(
            "There is nothing to plot: wanted is a method that reaches one of the values."
        )
    if not all(map(math.isfinite, numbers)):
        wrong = next(number for number in numbers if not math.isfinite(number))
        raise ValueError(f"{wrong} among values and costs: wanted are finite ones.")
    percent = in_percent(metric, list(costs))
    first = {name: [each[0] if each else math.inf for each in of] for name, of in found.items()}
    names = sorted(found, key=first.__getitem__, reverse=True)  # from below
    figure, ax = _rows(names)
    words = [f"{100 * value:.1f} %" if percent else f"{value:.4g}" for value in costs]
    points = []
    for column, (color, marker) in enumerate(_styles(words, baseline)):
        points.append(ax.plot([], [], marker, color=color, markersize=7)[0])
        for row, name in enumerate(names):
            if each := found[name][column]:
                ax.plot(each[0], row, "<" if each[1] else marker, color=color, markersize=7)
                if name == baseline:
                    ax.axvline(each[0], color=color, linewidth=1, linestyle="--", zorder=0)
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("cost: passes, of those of the full run")
    figure.legend(
        points,
        words,
        title=metric.replace("_", " "),
        loc="outside right upper",
        alignment="left",
        frameon=False,
        fontsize=9,
    )
    return figure


def _scale(
    numbers: Sequence[float], values: Mapping[str, list[list[float]]], metric: str
) -> tuple[float, str]:
    """100 and the words for per cent, of an accuracy.

    Raises:
        ValueError: without values of each method at each cost, and where one of the numbers is not finite.
    """
    if not values or not all(each and all(each) for each in values.values()):
        raise ValueError(
            "There is nothing to plot: wanted is a value of each method at a cost at least."
        )
    if not all(map(math.isfinite, numbers)):
        wrong = [
            name
            for name, each in values.items()
            if not all(math.isfinite(v) for of in each for v in of)
        ]
        raise ValueError(f"{(wrong or ['the full run'])[0]!r} has a {metric} that is not finite.")
    return (100, " (%)") if in_percent(metric, numbers) else (1, "")


def _styles(names: Sequence[str], baseline: str) -> Iterator[tuple[str, str]]:
    """A colour and a marker for each; black for the baseline."""
    others = 0
    for name in names:
        if name == baseline:
            yield "black", "X"
        else:
            yield _COLORS[others % 6], _MARKERS[(others + others // 6) % 6]
            others += 1


def _draw_full(
    line: Callable[..., "Line2D"], band: Callable[..., Any], values: np.ndarray
) -> "Line2D":
    band(values.min(), values.max(), color=_GREY, alpha=0.15, linewidth=0)
    return line(values.mean(), color=_GREY, linewidth=1.2, linestyle=":")


def spent(report: PruningReport, against: Against) -> list[float]:
    """What a run had cost at the end of each of its epochs: passes / N, or seconds without those of evaluation; with what
    was spent before it, where that is charged (and known: scores of one's own may not tell their seconds)."""
    before = report.preparation.get(against, 0.0) if report.preparation.get("charged") else 0.0
    if against == "passes":
        costs = [record.passes / report.num_samples for record in report.epochs]
        before /= report.num_samples
    else:
        costs = [
            sum(s for phase, s in record.seconds.items() if phase != "evaluation")
            for record in report.epochs
        ]
    return list(accumulate(costs, initial=before))[1:]


def plot_selection(reports: Reports) -> "Figure":
    """Draws how many samples were kept how often, beside what choices by chance would give (dashed): a panel for each run.

    Args:
        reports: the runs by their names; several reports of a name, runs that differ in their seed, are averaged. Runs
            that keep everything in each choice are left out.

    Raises:
        ValueError: where no choice of any run left samples out, or the reports of a name differ in more than the seed.
    """
    runs = _seeds(reports)
    choosing = {
        name: [
            100 * np.mean([run.selection[kind] for run in seeds], axis=0) / seeds[0].num_samples
            for kind in _HISTOGRAMS
        ]
        for name, seeds in runs.items()
        if seeds[0].selection.get("choices", 0) > 0 and seeds[0].selection["always"] < 1
    }
    if not choosing:
        raise ValueError(
            f"No choice of the runs {', '.join(runs)} left samples out: there is no selection to plot."
        )
    columns = min(3, len(choosing))
    rows = -(-len(choosing) // columns)
    figure = _new_figure((max(5.0, 3.3 * columns), 0.5 + max(2.8 * rows, 3.2)))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for ax in axes[len(choosing) :]:
        ax.remove()
    for ax, (name, (histogram, chance)) in zip(axes, choosing.items(), strict=False):
        borders = np.arange(len(histogram) + 1) - 0.5  # a bar about each whole number from 0
        _plain(ax).stairs(histogram, borders, fill=True, color=_COLORS[0], alpha=0.35)
        ax.stairs(histogram, borders, color=_COLORS[0], linewidth=1.5, label="this run")
        ax.stairs(chance, borders, color=_GREY, linewidth=1.5, linestyle="--", label="by chance")
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("times kept (choices)")
        ax.locator_params(axis="x", integer=True)
    for ax in axes[::columns]:
        ax.set_ylabel("samples (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    return figure


def plot_scores(report: PruningReport) -> "Figure":
    """Draws how the scores of the observed samples were spread at each choice: median, mean, and bands between quantiles.

    Raises:
        ValueError: for a run without scores: its policy has none, or no choice was made after an observation.
    """
    records = [record for record in report.epochs if record.scores]
    if not records:
        raise ValueError(
            f"The report of {report.policy['name']!r} holds no scores: wanted is a run of a policy that scores samples, "
            "such as ucb, with a choice after its first epoch."
        )
    figure = _new_figure((6.5, 4))
    ax = _plain(figure.subplots())
    epochs = [record.epoch for record in records]
    of = {name: [record.scores[name] for record in records] for name in records[0].scores}
    blue, orange = _COLORS[:2]
    ax.fill_between(
        epochs,
        of["q05"],
        of["q95"],
        color=blue,
        alpha=0.15,
        linewidth=0,
        label="90 % of the samples",
    )
    ax.fill_between(
        epochs,
        of["q25"],
        of["q75"],
        color=blue,
        alpha=0.3,
        linewidth=0,
        label="50 % of the samples",
    )
    ax.plot(epochs, of["q50"], color=blue, marker="o", markersize=4.5, label="median")
    ax.plot(
        epochs, of["mean"], color=orange, marker="s", markersize=4.5, linestyle="--", label="mean"
    )
    ax.set_xlabel("epoch whose samples are chosen (the first is 0)")
    ax.set_ylabel(f"score by {report.policy['name']}")
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False)
    return figure


# ---- samples -------------------------------------------------------------------------------------


def plot_classes(
    times_kept: Any, choices: int, labels: Any, names: Sequence[str] | None = None
) -> "Figure":
    """Draws the kept share of each class, in order, and the share of all samples as a line.

        share of class c = mean over its samples of times_kept / choices

    Of more than 40 classes the twelve highest and the twelve lowest are named.

    Args:
        times_kept: (N,) number of choices that kept the sample: `trainer.pruner.table["times_kept"]`.
        choices: number of choices of the run: `report.selection["choices"]`.
        labels: (N,) integers, the class of each sample.
        names: of the classes 0, 1, ..., *optional*, defaults to the numbers.

    Raises:
        ValueError: for shapes and ranges that do not fit.
    """
    times, labels = _checked(times_kept, choices), np.asarray(labels)
    _check_length(times, labels, "labels")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(
            f"The labels are {labels.dtype}, such as {labels[:3].tolist()}: wanted are classes 0, 1, ..."
        )
    if names is not None and labels.max() >= len(names):
        raise ValueError(
            f"There are {len(names)} names, and a label {labels.max()}: wanted is a name for each class."
        )
    sizes = np.bincount(labels)
    present = np.flatnonzero(sizes)
    shares = 100 * np.bincount(labels, weights=times)[present] / (sizes[present] * choices)
    overall = 100 * times.mean() / choices
    order = np.argsort(shares, kind="stable")
    shares = shares[order]
    shown = [_short(str(c) if names is None else names[c], 24) for c in present[order]]
    few, rows = len(shares) <= _NAMED, np.arange(len(shares))
    figure = _new_figure((6.5, 1.2 + 0.2 * max(8, len(shares)) if few else 5))
    ax = _plain(figure.subplots())
    above = shares > overall
    for chosen, color, marker in ((above, _COLORS[0], "o"), (~above, _COLORS[4], "v")):
        ax.hlines(rows[chosen], overall, shares[chosen], color=color, linewidth=1.5 if few else 0.6)
        ax.plot(
            shares[chosen],
            rows[chosen],
            color=color,
            marker=marker,
            markersize=5 if few else 2.5,
            linestyle="none",
        )
    ax.axvline(overall, color=_GREY, linestyle="--", label=f"all samples: {overall:.1f} %")
    ax.set_xlabel(
        f"kept share of the class (%), mean of {choices} choice{'s' if choices > 1 else ''}"
    )
    ax.legend(frameon=False, loc="upper left")
    if few:
        ax.set_yticks(rows, shown)
    else:
        ax.set_ylabel(f"{len(shares)} classes, by kept share")
        ax.set_yticks([])
        lines = [f"{name}  {share:.1f} %" for name, share in zip(shown, shares, strict=True)][::-1]
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
    """Draws a contact sheet: images that were kept always, sometimes and never, a row each, with index, class, times kept.

    Where no sample was always (or never) kept, the row shows those that were kept most (or least) often. Of more samples
    than fit, some are shown: of those sometimes kept the quantiles, else a random draw, the same each time.

    Args:
        times_kept: (N,) number of choices that kept the sample: `trainer.pruner.table["times_kept"]`.
        choices: number of choices of the run: `report.selection["choices"]`.
        data: what the run was trained on, in its order: a `datasets.Dataset` with a column of images, or an
            [`hf_dynprune.vision.ImageCache`].
        image_column, label_column: of a `datasets.Dataset`; found where they are not named, see
            [`hf_dynprune.data.find_column`].
        columns: images in a row.

    Raises:
        TypeError: for data of another kind.
        ValueError: for columns that are missing or ambiguous, and for shapes and ranges that do not fit.
    """
    times = _checked(times_kept, choices)
    _check_length(times, data, "in the dataset")
    rows = _sheet(times, choices, columns)
    wanted = np.concatenate([index for _, index in rows])
    images, labels = _images(data, wanted, image_column, label_column)
    pictures = dict(zip(wanted.tolist(), zip(images, labels, strict=True), strict=True))
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
    """The rows of a contact sheet: title, and the indices of at most `count` samples, from often to seldom."""
    drawn = np.random.default_rng(0).permutation(len(times))  # breaks ties
    often = drawn[np.argsort(-times[drawn], kind="stable")]
    always, never = often[times[often] == choices], often[times[often] == 0]
    between = often[len(always) : len(often) - len(never)]
    quantiles = ((np.arange(count) + 0.5) / count * len(between)).astype(int)

    def title(kind: str, group: np.ndarray) -> str:
        return f"{kind} kept\n({100 * len(group) / len(times):.1f} %)"

    rows = [
        (title("always", always), always[:count])
        if len(always)
        else ("most often kept\n(none always)", often[:count]),
        (title("sometimes", between), between[np.unique(quantiles)] if len(between) else between),
        (title("never", never), never[:count])
        if len(never)
        else ("least often kept\n(none never)", often[-count:]),
    ]
    return [(name, index) for name, index in rows if len(index)]


def _images(
    data: Any, index: np.ndarray, image_column: str | None, label_column: str | None
) -> tuple[list[Any], list[str]]:
    """The images, small, and the names of their classes."""
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
            f"data is a {type(data).__name__}: wanted is a datasets.Dataset with images, or an ImageCache."
        )
    return images, [str(label) if names is None else names[label] for label in labels]


def _checked(times_kept: Any, choices: int) -> np.ndarray:
    times = np.asarray(times_kept)
    if times.ndim != 1 or len(times) == 0 or not np.issubdtype(times.dtype, np.integer):
        raise ValueError(
            f"times_kept is {times.dtype} {times.shape}: wanted is a count for each sample, integers (N,)."
        )
    if choices < 1 or times.min() < 0 or times.max() > choices:
        raise ValueError(
            f"times_kept is from {times.min()} to {times.max()}, with {choices} choices: wanted are counts from 0 to the "
            "number of choices, of a run that made at least one."
        )
    return times


def _check_length(times: np.ndarray, other: Any, what: str) -> None:
    if len(other) != len(times):
        raise ValueError(
            f"The run trained on {len(times):,} samples, and there are {len(other):,} {what}: wanted is the split, or the "
            "part of it, that was trained on, in its order."
        )


# ---- drawing -------------------------------------------------------------------------------------


def _new_figure(size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "hf_dynprune.plots needs matplotlib: pip install hf-dynprune[recipes]"
        ) from error
    return Figure(figsize=size, layout="constrained")


def _plain(ax: "Axes") -> "Axes":
    """No frame above and to the right, and a pale grid behind what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def _rows(names: Sequence[str]) -> tuple["Figure", "Axes"]:
    """A figure with a row for each name, from below."""
    figure = _new_figure((8, max(2.2, 1 + 0.32 * len(names))))
    ax = _plain(figure.subplots())
    ax.grid(visible=False, axis="y")
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_yticks(range(len(names)), names)
    return figure, ax


def _seeds(reports: Reports) -> dict[str, list[PruningReport]]:
    """The reports of each name, of which all but the seed must be alike."""
    if not reports:
        raise ValueError(
            "There is nothing to plot: reports is empty; wanted is a report for each run, by name."
        )
    runs = {
        name: [given] if isinstance(given, PruningReport) else list(given)
        for name, given in reports.items()
    }
    for name, seeds in runs.items():
        if not seeds:
            raise ValueError(f"There is no report of the run {name!r}: wanted is at least one.")
        if differing := differences(seeds):
            raise ValueError(
                f"The runs called {name!r} differ in more than the seed ({differing}): give them names of their own."
            )
    return runs


def _curve(name: str, seeds: Sequence[PruningReport], metric: str, against: Against) -> _Curve:
    """At the epochs in which every seed has a finite value of the metric."""
    reached = [
        {
            record.epoch: (cost, record.metrics[metric])
            for cost, record in zip(spent(report, against), report.epochs, strict=True)
            if math.isfinite(record.metrics.get(metric, math.nan))
        }
        for report in seeds
    ]
    epochs = sorted(set.intersection(*map(set, reached)))
    if not epochs:
        known = sorted(
            {key for report in seeds for record in report.epochs for key in record.metrics}
        )
        raise ValueError(
            f"The report of {name!r} has no finite {metric!r}: wanted is a metric of its epochs, one of {known}."
        )
    points = np.array([[of[epoch] for epoch in epochs] for of in reached])  # (R, E, 2)
    return _Curve(points[..., 0].mean(axis=0), points[..., 1])


def _draw_metric(ax: "Axes", curves: Mapping[str, _Curve]) -> dict[str, Any]:
    """The lines, by name."""
    lines = {}
    for i, (name, curve) in enumerate(curves.items()):
        color, marker = _COLORS[i % 7], _MARKERS[(i + i // 7) % 7]
        low, high = curve.y.min(axis=0), curve.y.max(axis=0)
        if len(curve.x) == 1:
            ax.vlines(curve.x, low, high, color=color, linewidth=1.5)
        elif len(curve.y) > 1:
            ax.fill_between(curve.x, low, high, color=color, alpha=0.2, linewidth=0)
        line = {"markersize": 7, "linestyle": "none"} if len(curve.x) == 1 else {"markersize": 4.5}
        (lines[name],) = ax.plot(
            curve.x, curve.mean, color=color, marker=marker, label=name, **line
        )
    ax.set_xlim(0, 1.05 * max(curve.x[-1] for curve in curves.values()))
    # The first epochs are far from the others, and would press these into a line: the second halves fill the axis.
    late = np.concatenate([curve.y[:, len(curve.x) // 2 :].ravel() for curve in curves.values()])
    low, high = late.min(), late.max()
    margin = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(low - margin if low < 0 else max(0, low - margin), high + margin)
    return lines


def _ends(curve: _Curve, percent: bool) -> str:
    """The last value: of several seeds the mean, the lowest and the highest."""

    def show(value: float) -> str:
        return f"{value:.2f}" if percent else f"{value:.4g}"

    last, unit = curve.y[:, -1], " %" if percent else ""
    seeds = f" ({show(last.min())} to {show(last.max())})" if len(last) > 1 else ""
    return f"{show(last.mean())}{unit}{seeds}"


def _short(name: str, width: int) -> str:
    """The first of a class's several names, cut where it is long."""
    name = name.partition(",")[0]
    return name if len(name) <= width else name[: width - 1] + "…"
