"""Pictures of runs, drawn from their reports. A tool: nothing in the package imports it.

```python
reports = {"full run": PruningReport.load("full.json"), "UCB 30 %": PruningReport.load("report.json")}
plot_runs(reports).savefig("comparison.png", dpi=150)
```
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from .report import PruningReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, which is pale on white; each with a
# marker, for print without colour.
_STYLES = (
    ("#0072B2", "o"),
    ("#E69F00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#D55E00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
_HEIGHT = 4  # of the figure, in inches
_AXES_HEIGHT = 0.75 * 72 * _HEIGHT  # in points, about
_LABEL_HEIGHT = 14


def plot_runs(reports: Mapping[str, PruningReport], metric: str = "eval_accuracy") -> "Figure":
    """Draws what runs reached against what they cost, and how often each run kept its samples.

    Left: the metric against the passes made until then, in passes over the data (passes / N), one line a run, the last
    value at its end; the axis spans the second halves of the runs. Right, where a run makes choices: how many samples were
    kept how often, beside what choices by chance would give (dashed).

    Args:
        reports: the runs by their names in the legend.
        metric: a name in the `metrics` of the reports' epochs; epochs without it are left out, an accuracy is in per cent.

    Returns:
        A figure that belongs to no window and no global state: call its `savefig`.

    Raises:
        ImportError: without matplotlib.
        ValueError: without reports, or if a report has no finite value of the metric.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("hf_dynprune.plots needs matplotlib: pip install hf-dynprune[recipes]") from error

    if not reports:
        raise ValueError("There is nothing to plot: reports is empty; wanted is a report for each run, by name.")
    choosing = {name: report for name, report in reports.items() if _has_choices(report)}
    styles = {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(reports)}
    figure = Figure(figsize=(10 if choosing else 5.5, _HEIGHT), layout="tight")
    axes = figure.subplots(1, 2 if choosing else 1, squeeze=False)[0]
    _draw_metric(axes[0], {name: _curve(name, report, metric) for name, report in reports.items()}, metric, styles)
    if choosing:
        _draw_selection(axes[1], choosing, styles)
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#E5E5E5", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure


def _has_choices(report: PruningReport) -> bool:
    """Whether a choice of the run left samples out."""
    return report.selection.get("choices", 0) > 0 and report.selection["always"] < 1


def _curve(name: str, report: PruningReport, metric: str) -> tuple[list[float], list[float]]:
    """Passes / N at the end of each epoch that has a finite value of the metric, and the values."""
    passes = accumulate(epoch.passes for epoch in report.epochs)
    points = [
        (done / report.num_samples, epoch.metrics[metric])
        for done, epoch in zip(passes, report.epochs, strict=True)
        if math.isfinite(epoch.metrics.get(metric, math.nan))
    ]
    if not points:
        known = sorted({key for epoch in report.epochs for key in epoch.metrics})
        raise ValueError(
            f"The report of {name!r} has no finite {metric!r}: wanted is a metric of its epochs, one of {known}."
        )
    return [x for x, _ in points], [y for _, y in points]


def _draw_metric(
    ax: "Axes", curves: Mapping[str, tuple[list[float], list[float]]], metric: str, styles: Mapping[str, tuple[str, str]]
) -> None:
    from matplotlib.patheffects import withStroke

    percent = metric.endswith("accuracy") and all(0 <= value <= 1 for _, y in curves.values() for value in y)
    if percent:
        curves = {name: (x, [100 * value for value in y]) for name, (x, y) in curves.items()}
    for name, (x, y) in curves.items():
        color, marker = styles[name]
        ax.plot(x, y, color=color, marker=marker, markersize=4.5, linewidth=1.5, label=name)
    ax.set_xlabel("passes over the data (passes / N)")
    ax.set_ylabel(metric.replace("_", " ") + (" (%)" if percent else ""))
    longest = max(x[-1] for x, _ in curves.values())
    ax.set_xlim(0, 1.15 * longest)  # room for the label of the longest run
    # The first epochs are far from the others, and would press these into a line: the second halves fill the axis.
    late = [value for _, y in curves.values() for value in y[len(y) // 2 :]]
    low, high = min(late), max(late)
    margin = 0.4 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = low - margin if low < 0 else max(0, low - margin)
    top = min(100.5, high + margin) if percent else high + margin
    ax.set_ylim(bottom, top)
    ax.legend(frameon=False)
    # Labels of runs that end nearby in x share a column, and must not cover each other.
    unit = _AXES_HEIGHT / (top - bottom)
    for names in _columns({name: x[-1] for name, (x, _) in curves.items()}, 0.15 * longest):
        names.sort(key=lambda name: curves[name][1][-1])
        ends = [curves[name][1][-1] for name in names]
        for name, end, place in zip(names, ends, _spread([unit * end for end in ends], _LABEL_HEIGHT), strict=True):
            ax.annotate(
                f"{end:.1f} %" if percent else f"{end:.4g}",
                (max(curves[name][0][-1] for name in names), end),
                xytext=(7, place - unit * end),
                textcoords="offset points",
                color=styles[name][0],
                va="center",
                path_effects=[withStroke(linewidth=3, foreground="white")],  # legible on another run's line
            )


def _columns(ends: Mapping[str, float], width: float) -> list[list[str]]:
    """Groups the runs whose ends (in x) lie within `width` of the first one's."""
    columns: list[list[str]] = []
    for name in sorted(ends, key=ends.__getitem__):
        if columns and ends[name] - ends[columns[-1][0]] <= width:
            columns[-1].append(name)
        else:
            columns.append([name])
    return columns


def _spread(places: list[float], gap: float) -> list[float]:
    """The nearest places (least squares) to these ascending ones that are at least `gap` apart."""
    # What is too close becomes a block, evenly spaced about its mean: isotonic regression, by pooling neighbours.
    blocks: list[tuple[float, int]] = []  # mean of place - index * gap, and length
    for i, place in enumerate(places):
        mean, length = place - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, n = blocks.pop()
            mean, length = (mean * length + other * n) / (length + n), length + n
        blocks.append((mean, length))
    levels = [mean for mean, length in blocks for _ in range(length)]
    return [level + i * gap for i, level in enumerate(levels)]


def _draw_selection(ax: "Axes", reports: Mapping[str, PruningReport], styles: Mapping[str, tuple[str, str]]) -> None:
    first: dict[tuple[float, ...], str] = {}  # runs whose choices are of the same sizes expect the same by chance
    for name, report in reports.items():
        color, histogram = styles[name][0], report.selection["histogram"]
        if len(reports) == 1:
            ax.stairs(histogram, _edges(histogram), fill=True, color=color, alpha=0.25)
        ax.stairs(histogram, _edges(histogram), color=color, linewidth=1.5, label=name)
        first.setdefault(tuple(report.selection["chance"]), name)
    for chance, name in first.items():
        color, label = ("#555555", "by chance") if len(first) == 1 else (styles[name][0], f"{name}, by chance")
        ax.stairs(chance, _edges(chance), color=color, linewidth=1.2, linestyle="--", label=label)
    ax.set_xlabel("times kept (choices)")
    ax.set_ylabel("number of samples")
    ax.legend(frameon=False)


def _edges(counts: Sequence[float]) -> list[float]:
    """The borders of a bar about each whole number from 0."""
    return [k - 0.5 for k in range(len(counts) + 1)]
