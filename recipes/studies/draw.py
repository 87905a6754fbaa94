"""The pictures of a study: what methods reached at what they cost, and how often samples were kept.

Each plot_* function returns a figure that belongs to no window and no global state.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_dynprune import PruningReport
from hf_dynprune.plots import plot_selection
from hf_dynprune.report import in_percent

from .plan import FULL, SHORT, Key

PANELS = 9  # of a picture of selections

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow, which is
# pale on white. Black is the short run's. Markers also tell the methods apart in print without
# colour. From the seventh method on the colours come again with other markers.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = "os^DvP"
GREY = "#555555"
COST = "cost: passes, of those of the full run"
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9}
TITLE: dict[str, Any] = {"fontsize": 11, "loc": "left"}


def draw(
    folder: Path, summary: Mapping[str, Any], reports: Mapping[Key, Sequence[PruningReport]]
) -> None:
    """Write the pictures of a summary into the folder of its study.

    picture_0.3.png and selection_0.3.png show one cost, picture.png and targets.png all costs.
    """
    metric, rows, study = summary["metric"], summary["rows"], folder.resolve().name
    values = {(row["name"], row["wanted"]): list(row["values"].values()) for row in rows}
    full = values.pop((FULL, 1.0), [])
    options = {"full": full, "lower_is_better": summary["lower_is_better"]}
    points: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        if own := values.get((row["name"], row["wanted"])):
            points.setdefault(row["name"], []).append((row["cost"], own))
    for cost in {cost: None for _, cost in values}:
        at = [row for row in rows if row["wanted"] == cost]
        methods = {_name(row): values[row["name"], cost] for row in at}
        at_cost = {"title": f"{study}: methods at cost {cost:g}", **options}
        plot_methods(methods, metric, **at_cost).savefig(folder / f"picture_{cost:g}.png", dpi=150)
        rules = {row["name"]: reports[row["name"], cost] for row in at}
        chosen = {name: runs for name, runs in rules.items() if all(map(_chooses, runs))}
        if chosen:
            best = dict(islice(chosen.items(), PANELS))  # the rows are sorted
            plot_selection(best).savefig(folder / f"selection_{cost:g}.png", dpi=100)
    # A method with one cost stands in the picture of that cost.
    lines = {name: each for name, each in points.items() if len(each) > 1} or points
    if lines:
        options["title"] = f"{study}: value against cost"
        plot_costs(lines, metric, **options).savefig(folder / "picture.png", dpi=150)
    targets = {
        target["value"]: {name: target["costs"][name] for name in lines if name in target["costs"]}
        for target in summary["targets"]
    }
    if any(cost for costs in targets.values() for cost in costs.values()):
        title = f"{study}: the cost of a value"
        plot_targets(targets, metric, title=title).savefig(folder / "targets.png", dpi=150)


def _name(row: Mapping[str, Any]) -> str:
    return row["name"] if row["ranked"] else f"{row['name']}, at cost {row['cost']:.2f}"


def _chooses(report: PruningReport) -> bool:
    """Whether the run chose more than once, and left samples out."""
    return report.selection.get("choices", 0) > 1 and report.selection["always"] < 1


def plot_costs(
    methods: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    metric: str,
    *,
    full: Sequence[float] = (),
    lower_is_better: bool = False,
    title: str = "",
) -> Figure:
    """Draw what methods reached at what they cost.

    The point of a cost is the mean of the seeds, its bar reaches from the lowest to the highest.
    The points of a method are joined. Points of several methods at one cost stand side by side.
    The legend lists the methods by their best means.

    Args:
        methods: For each method pairs (cost, values): the cost in full runs, a value per seed.
        metric: The name of the values. An accuracy is drawn in per cent.
        full: The values of the full run: a line, and a band from the lowest to the highest.
        lower_is_better: Whether a low value of the metric is good.
        title: Above the drawing.

    Raises:
        ValueError: If a method has no value or one that is not finite.
    """
    values = {name: [v for _, each in points for v in each] for name, points in methods.items()}
    scale, heading = _axis(metric, values, full)
    best = {
        name: (min if lower_is_better else max)(np.mean(each) for _, each in points)
        for name, points in methods.items()
    }
    names = sorted(methods, key=best.__getitem__, reverse=not lower_is_better)
    figure = Figure((8, max(4, 0.8 + 0.2 * len(names))), layout="constrained")
    ax = _plain(figure.subplots())
    most = max(cost for points in methods.values() for cost, _ in points)
    step = 0.006 * most
    lines = {}
    for place, (name, color, marker) in enumerate(_styles(names)):
        costs, each = zip(*sorted(methods[name]), strict=True)
        x = np.array(costs) + step * (place - (len(names) - 1) / 2)
        lows, highs, means = (scale * np.array([*map(f, each)]) for f in (min, max, np.mean))
        ax.vlines(x, lows, highs, color=color, linewidth=1.5)
        (lines[name],) = ax.plot(x, means, color=color, marker=marker, markersize=6, linewidth=1.2)
    if full:
        lines = {**_draw_full(ax.axhline, ax.axhspan, scale * np.array(full)), **lines}
    ax.set_xlim(0, 1.03 * most + step * len(names) / 2)
    ax.set_title(title, **TITLE)
    ax.set_xlabel(COST)
    ax.set_ylabel(heading)
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", **LEGEND)
    return figure


def plot_methods(
    methods: Mapping[str, Sequence[float]],
    metric: str,
    *,
    full: Sequence[float] = (),
    lower_is_better: bool = False,
    title: str = "",
) -> Figure:
    """Draw what methods reached at one cost.

    Each method has a row, the best one on top, with a dot for each seed and a bar at their mean. A
    line marks the mean of the short run. If a method is further behind the short run than twice
    the lead of the full run, the border shows its mean as a number, so that the other methods do
    not crowd together.

    Args: As of [`plot_costs`]; of each method the values of its seeds.

    Raises:
        ValueError: If a method has no value or one that is not finite.
    """
    scale, heading = _axis(metric, methods, full)
    means = {name: scale * float(np.mean(each)) for name, each in methods.items()}
    names = sorted(means, key=means.__getitem__, reverse=lower_is_better)  # from the bottom
    figure, ax = _rows(names)
    short = means.get(SHORT, math.nan)
    far = 2 * abs(scale * float(np.mean(full)) - short) if full else math.nan
    for row, name in enumerate(names):
        color = "black" if name == SHORT else COLORS[0]
        behind = means[name] - short if lower_is_better else short - means[name]
        if behind > far:  # never with nan
            _tell_at_border(ax, row, means[name], color, right=lower_is_better)
            continue
        own = scale * np.array(methods[name])
        dots = {"markersize": 5, "alpha": 0.45, "markeredgewidth": 0}
        ax.plot(own, np.full(len(own), row), "o", color=color, **dots)
        ax.vlines(means[name], row - 0.3, row + 0.3, color=color, linewidth=2.5)
    marks: dict[str, Any] = {}
    if SHORT in means:
        style: dict[str, Any] = {"color": "black", "linewidth": 1, "linestyle": "--", "zorder": 0}
        marks[f"{SHORT}, mean"] = ax.axvline(short, **style)
    if full:
        marks |= _draw_full(ax.axvline, ax.axvspan, scale * np.array(full))
    if marks:
        place = {"loc": "outside upper right", "ncols": len(marks)}
        figure.legend(marks.values(), marks.keys(), **place, **LEGEND)
    ax.set_title(title, **TITLE)
    ax.set_xlabel(f"{heading}: each seed, and the mean")
    return figure


def _tell_at_border(ax: Axes, row: int, value: float, color: str, right: bool) -> None:
    x, words = (0.99, f"{value:.4g} →") if right else (0.01, f"← {value:.4g}")
    place = {"transform": ax.get_yaxis_transform(), "ha": "right" if right else "left"}
    ax.text(x, row, words, va="center", fontsize=9, color=color, **place)


def plot_targets(
    targets: Mapping[float, Mapping[str, Sequence | None]], metric: str, *, title: str = ""
) -> Figure:
    """Draw what methods cost that reach a value.

    Each method has a row, the cheapest one on top, with a point for each value. Lines mark the
    points of the short run. An arrow to the left marks a cost that was enough and the least tried.

    Args:
        targets: For each value to reach, and each method: the cost in full runs at which it
            reaches the value and whether that is its least tried. None if it does not reach it.
        metric: The name of the values. An accuracy is drawn in per cent.
        title: Above the drawing.

    Raises:
        ValueError: If no method reaches any of the values, or a number is not finite.
    """
    names = {name: None for costs in targets.values() for name in costs}
    found = {name: [costs.get(name) for costs in targets.values()] for name in names}
    numbers = [*targets, *(each[0] for row in found.values() for each in row if each)]
    if len(numbers) == len(targets) or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"The targets {targets} cannot be drawn: expected a method that reaches one of the "
            "values, and finite numbers only."
        )
    first = {name: [each[0] if each else math.inf for each in row] for name, row in found.items()}
    names = sorted(found, key=first.__getitem__, reverse=True)  # from the bottom
    figure, ax = _rows(names)
    percent = in_percent(metric, list(targets))
    words = [f"{100 * value:.1f} %" if percent else f"{value:.4g}" for value in targets]
    points = []
    for column, (_, color, marker) in enumerate(_styles(words)):
        points += ax.plot([], [], marker, color=color, markersize=7)
        for row, name in enumerate(names):
            if each := found[name][column]:
                ax.plot(each[0], row, "<" if each[1] else marker, color=color, markersize=7)
                if name == SHORT:
                    ax.axvline(each[0], color=color, linewidth=1, linestyle="--", zorder=0)
    ax.set_xlim(0, 1.02)
    ax.set_xlabel(COST)
    if any(costs.get(SHORT) for costs in targets.values()):
        points.append(Line2D([], [], color=GREY, linewidth=1, linestyle="--"))
        words.append(SHORT)
    if any(each and each[1] for row in found.values() for each in row):
        points.append(Line2D([], [], marker="<", color=GREY, markersize=7, linestyle="none"))
        words.append("least cost tried")
    ax.set_title(title, **TITLE)
    place = {"title": metric.replace("_", " "), "loc": "outside right upper", "alignment": "left"}
    figure.legend(points, words, **place, **LEGEND)
    return figure


# ---- drawing -------------------------------------------------------------------------------------


def _axis(
    metric: str, values: Mapping[str, Sequence[float]], full: Sequence[float]
) -> tuple[float, str]:
    """The factor and the heading of an axis: 100 and "eval accuracy (%)" of an accuracy.

    Raises:
        ValueError: If there is no method, or a method has no value or one that is not finite.
    """
    if not values:
        raise ValueError("There is nothing to draw: expected at least one method.")
    for name, each in {**values, **({FULL: full} if full else {})}.items():
        if not each or not all(map(math.isfinite, each)):
            raise ValueError(
                f"{name!r} has {metric} {list(each)}: expected at least one value, and finite ones."
            )
    percent = in_percent(metric, [*full, *(v for each in values.values() for v in each)])
    words = metric.replace("_", " ")
    return (100, f"{words} (%)") if percent else (1, words)


def _styles(names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Each name with a colour and a marker. The short run is black."""
    others = 0
    for name in names:
        if name == SHORT:
            yield name, "black", "X"
        else:
            yield name, COLORS[others % 6], MARKERS[(others + others // 6) % 6]
            others += 1


def _draw_full(
    line: Callable[..., Line2D], band: Callable[..., Any], values: np.ndarray
) -> dict[str, Any]:
    """Draw the full run across the picture. Returns what stands for it in the legend."""
    marks: dict[str, Any] = {
        f"{FULL}, mean": line(values.mean(), color=GREY, linewidth=1.2, linestyle=":")
    }
    if len(values) > 1:
        spread = band(values.min(), values.max(), color=GREY, alpha=0.15, linewidth=0)
        marks[f"{FULL}, lowest to highest"] = spread
    return marks


def _plain(ax: Axes) -> Axes:
    """No frame on top and on the right, and a pale grid behind what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def _rows(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with a row for each name, from the bottom."""
    figure = Figure((8, max(2.2, 1 + 0.32 * len(names))), layout="constrained")
    ax = _plain(figure.subplots())
    ax.grid(visible=False, axis="y")
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_yticks(range(len(names)), names)
    return figure, ax
