"""What the study of prompts found: rows, table and picture of the finished runs in rl_sums.json.

    python -m recipes.studies.rl_results    draws the picture, prints the table

`rl.py` carries the runs out. The table of the docs is rendered from the file by tests/fragments.py.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hf_dynprune.files import load_json
from hf_dynprune.plots import save_picture

from .draw import COLORS, GREY, LEGEND, MARKERS, TITLE
from .summarise import markdown, paired, reached

STUDIES = Path(__file__).resolve().parents[1] / "results" / "studies"
FILE, PICTURE = STUDIES / "rl_sums.json", STUDIES / "rl_sums.png"

UNIFORM, FILTER = "uniform", "filter after the rollout"
FEWER, SMALLER = "uniform, half of the steps", "uniform, half of the batch"
OPPONENTS = (FILTER, SMALLER, FEWER)  # they do not choose prompts either
TUNING_SEED = 100  # of the runs that batch and rate are chosen by
WINDOW = 5  # points of a curve that a value of the results is the mean of, an eighth of the run
LEARNED = 2  # digits of the sums whose accuracy is compared
PARTS = (0.5, 0.8)  # of what the uniform run gains: the accuracies to reach

Row = Mapping[str, Any]


def stored() -> list[Row]:
    """The finished runs."""
    return load_json(FILE)["runs"]


# ---- one run -------------------------------------------------------------------------------------


def accuracies(row: Row, part: str = "test") -> list[tuple[float, float]]:
    """Pairs (rollouts, accuracy): the first point, then means of `WINDOW` points of the curve."""
    points = [(point["rollouts"], point[part][LEARNED - 1]) for point in row["curve"]]
    windows = [points[i : i + WINDOW] for i in range(1, len(points) - WINDOW + 1)]
    means = [(window[-1][0], statistics.fmean(y for _, y in window)) for window in windows]
    return [points[0], *means]


def last_accuracy(row: Row, part: str = "test") -> float:
    return accuracies(row, part)[-1][1]


def effective_share(row: Row) -> float:
    """Share of the prompts rolled out that had a gradient."""
    return row["rollouts"]["effective_prompts"] / row["rollouts"]["prompts"]


def saving(row: Row, uniform: Row, part: float) -> float | None:
    """How many times fewer rollouts a run needs than the uniform run of its seed.

    Both must reach the accuracy at which the uniform run has a part of what it gains. None if the
    run does not reach it.
    """
    points = accuracies(uniform)
    value = points[0][1] + part * (points[-1][1] - points[0][1])
    own, theirs = (reached(accuracies(each), value) for each in (row, uniform))
    return None if own is None or theirs is None else theirs[0] / own[0]


# ---- the study -----------------------------------------------------------------------------------


def compared(runs: Sequence[Row]) -> dict[float, dict[str, dict[int, Row]]]:
    """The runs without those of tuning: share -> method -> seed -> run, in their order."""
    found: dict[float, dict[str, dict[int, Row]]] = {}
    for row in runs:
        if row["seed"] != TUNING_SEED:
            found.setdefault(row["share"], {}).setdefault(row["method"], {})[row["seed"]] = row
    return found


def tuned(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """What the tuning runs reached on the prompts for tuning, the best first."""
    tuning = [row for row in runs if row["seed"] == TUNING_SEED]
    rows = [
        {
            "prompts": row["prompts"],
            "rate": row["rate"],
            "validation": last_accuracy(row, "validation"),
        }
        for row in tuning
    ]
    return sorted(rows, key=lambda row: -row["validation"])


def summarise(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each share and method: means over the seeds, paired with the uniform runs."""
    rows = []
    for share, methods in compared(runs).items():
        uniform = methods.get(UNIFORM, {})
        base = {seed: last_accuracy(row) for seed, row in uniform.items()}
        for method, by_seed in methods.items():
            own = {seed: last_accuracy(row) for seed, row in by_seed.items()}
            rows.append(
                {
                    "share": share,
                    "method": method,
                    "seeds": len(own),
                    "effective_share": statistics.fmean(map(effective_share, by_seed.values())),
                    "steps": statistics.fmean(r["optimizer_steps"] for r in by_seed.values()),
                    "rollouts": statistics.fmean(
                        r["rollouts"]["completions"] for r in by_seed.values()
                    ),
                    "accuracy": statistics.fmean(own.values()),
                    "to_uniform": None if method == UNIFORM else paired(own, base),
                    "savings": {part: _savings(by_seed, uniform, part) for part in PARTS},
                }
            )
    return rows


def _savings(runs: Mapping[int, Row], uniform: Mapping[int, Row], part: float) -> dict[str, Any]:
    """How many of the seeds with a uniform run reach the accuracy, and how much they save.

    `log` is the logarithm of the factor; None unless all of these seeds reach the accuracy.
    """
    found = {seed: saving(runs[seed], uniform[seed], part) for seed in runs if seed in uniform}
    logs = {seed: math.log(factor) for seed, factor in found.items() if factor is not None}
    log = paired(logs, dict.fromkeys(logs, 0.0)) if len(logs) == len(found) else None
    return {"seeds": len(found), "reached": len(logs), "log": log}


def table(runs: Sequence[Row], share: float) -> str:
    """The rows of a share as Markdown: the uniform run, then the others, the best first."""
    cells = []
    rows = [row for row in summarise(runs) if row["share"] == share]
    for row in sorted(rows, key=lambda row: (row["method"] != UNIFORM, -row["accuracy"])):
        cells.append(
            [
                row["method"],
                f"{100 * row['effective_share']:.0f} %",
                f"{row['rollouts']:,.0f}",
                f"{row['steps']:,.0f}",
                f"{100 * row['accuracy']:.1f}",
                difference_in_words(row["to_uniform"]),
                *("1" if row["method"] == UNIFORM else factor_in_words(row, p) for p in PARTS),
                str(row["seeds"]),
            ]
        )
    heads = ["method", "prompts with a gradient", "rollouts", "steps", "accuracy (%)"]
    saved = [f"rollouts saved, {100 * part:.0f} % of the gain" for part in PARTS]
    return markdown([*heads, "to uniform (points)", *saved, "seeds"], cells)


def difference_in_words(found: Mapping[str, Any] | None) -> str:
    """In points, with its 95 % interval; empty for the uniform run."""
    if found is None:
        return ""
    text = f"{100 * found['mean']:+.1f}"
    if found["interval"] is None:
        return text
    low, high = (f"{100 * end:+.1f}" for end in found["interval"])
    return f"{text} ({low} to {high})"


def factor_in_words(row: Mapping[str, Any], part: float) -> str:
    """A saving of a row, with its 95 % interval, or how many seeds reached the accuracy."""
    savings = row["savings"][part]
    found = savings["log"]
    if found is None:
        return f"reached by {savings['reached']} of {savings['seeds']}" if savings["seeds"] else ""
    text = f"{math.exp(found['mean']):.2f}"
    if found["interval"] is None:
        return text
    low, high = (f"{math.exp(end):.2f}" for end in found["interval"])
    return f"{text} ({low} to {high})"


def tuning_table(runs: Sequence[Row]) -> str:
    """What each batch and rate reached, as Markdown."""
    rows = tuned(runs)
    rates = sorted({row["rate"] for row in rows})
    cells = []
    for prompts in sorted({row["prompts"] for row in rows}):
        own = {row["rate"]: row["validation"] for row in rows if row["prompts"] == prompts}
        shown = [f"{100 * own[rate]:.1f}" if rate in own else "" for rate in rates]
        cells.append([f"{prompts} prompts in a step", *shown])
    return markdown(["accuracy for tuning (%) at learning rate", *(f"{r:g}" for r in rates)], cells)


# ---- the picture ---------------------------------------------------------------------------------


def plot(runs: Sequence[Row]) -> Figure:
    """Draw accuracy against rollouts: a panel for each share, the largest first.

    A line is the mean of the seeds. The band reaches from the lowest to the highest uniform run.
    """
    shares = dict(sorted(compared(runs).items(), reverse=True))
    names = list(dict.fromkeys(name for methods in shares.values() for name in methods))
    styles: dict[str, dict[str, Any]] = {UNIFORM: {"color": "black", "marker": "X"}}
    rules = [name for name in names if name not in (UNIFORM, *OPPONENTS)]
    for i, name in enumerate(rules):
        styles[name] = {"color": COLORS[i % 6], "marker": MARKERS[(i + i // 6) % 6]}
    for name, line in zip(OPPONENTS, ("--", ":", "-."), strict=True):
        styles[name] = {"color": GREY, "linestyle": line}
    figure = Figure((2.2 + 3.9 * len(shares), 4.2), layout="constrained")
    axes = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    lines: dict[str, Any] = {}
    for ax, methods in zip(axes, shares.values(), strict=True):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#E5E5E5", linewidth=0.8)
        for name, by_seed in methods.items():
            curves = [np.array(accuracies(row)).T for row in by_seed.values()]
            at = np.linspace(0, min(x[-1] for x, _ in curves), 25)
            values = 100 * np.array([np.interp(at, x, y) for x, y in curves])
            if name == UNIFORM:
                band: dict[str, Any] = {"color": GREY, "alpha": 0.2, "linewidth": 0}
                ax.fill_between(at / 1000, values.min(0), values.max(0), **band)
            style: dict[str, Any] = {"markevery": 6, "markersize": 5, "linewidth": 1.5}
            style |= styles[name]
            (lines[name],) = ax.plot(at / 1000, values.mean(0), **style)
        seeds = max(map(len, methods.values()))
        uniform = methods.get(UNIFORM, {}).values()
        measured = 100 * statistics.fmean(map(effective_share, uniform)) if uniform else math.nan
        title = f"uniform: {measured:.0f} % of the prompts\nhave a gradient; seeds: {seeds}"
        ax.set_title(title, **TITLE)
        ax.set_xlabel("rollouts (thousands)")
        ax.set_xlim(left=0)
    axes[0].set_ylabel("accuracy of held-out two-digit sums (%)")
    place = {"loc": "outside right upper"}
    figure.legend(lines.values(), lines.keys(), **place, **LEGEND)
    return figure


def main() -> None:
    runs = stored()
    print(tuning_table(runs), *(table(runs, share) for share in compared(runs)), sep="\n\n")
    save_picture(plot(runs), PICTURE, dpi=110)


if __name__ == "__main__":
    main()
