"""What the effective share says of the studies: a line through G and the measured savings.

    python -m recipes.studies.potential        writes recipes/results/potential.json and .png
    python -m recipes.studies.potential --predict STUDY@COST=runs/short ... --output predicted.json

With --predict it writes what the line says of new settings, each by the report of a short run, so
that the prediction can be committed before the study is made. Settings in the file are replaced or
added. The savings of the studies named in recipes/results/predicted.json are compared with the
predicted ones. Once they are measured, they count for the line as all others do.

G of a study is the mean over epochs and seeds of 1 / effective share of its loss-proportional runs.
Reports that were written before the effective share was measured hold five quantiles of the mean
losses, between which this program interpolates.

The measured saving is a cost ratio: that of a short run which would reach the result of
loss-proportional, over the cost of both. Results of runs on all data are interpolated linearly in
the logarithm of the cost, between the two nearest costs.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from scipy import stats

from hf_dynprune import PruningReport
from hf_dynprune.files import REPORT_FILE, save_json
from hf_dynprune.plots import save_picture
from hf_dynprune.potential import STUDIES, Fit, effective_share, fit_line, predicted_saving

from .draw import COLORS, GREY, LEGEND, TITLE
from .plan import FULL, SHORT

RESULTS = Path(__file__).parents[1] / "results"
FILE, PICTURE = RESULTS / "potential.json", RESULTS / "potential.png"
PREDICTED = RESULTS / "predicted.json"
RULE = "loss-proportional"
# The first three repeat settings of other studies: without tuned learning rates, at other batch
# sizes, with some labels made right. Of the others the question was another one.
LEFT_OUT = (
    "cifar10_settings",
    "cifar10_batch",
    "cifar10n_reference",
    "gsm8k_target",
    "gsm8k_batch",
    "differences_epochs",
    "cifar10n_memorised",
)
# Below it there is little to win back. It holds for accuracies, which are shares.
LEAST_LOST = 0.02
_QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
_POINTS = 1000
PREDICTED_STYLE = {"color": GREY, "marker": "s", "markersize": 4, "elinewidth": 1}
MEASURED_STYLE = {"color": COLORS[0], "marker": "o", "markersize": 5}
TICKS = (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 2, 3, 4, 6, 8)


def gain_of(report: PruningReport) -> float:
    """G of a run, the mean over its epochs; in old reports by the quantiles of its mean losses."""
    if report.gain is not None:
        return report.gain
    gains = []
    at = (np.arange(_POINTS) + 0.5) / _POINTS
    for record in report.epochs:
        if record.scores:
            known = [record.scores[name] for name in _QUANTILES]
            losses = np.interp(at, list(_QUANTILES.values()), known).clip(min=0)
            gains.append(1 / effective_share(torch.from_numpy(-np.expm1(-losses))))
    return statistics.fmean(gains)


def saving_of(cost: float, value: float, on_all_data: Mapping[float, float]) -> float:
    """The factor between the cost at which runs on all data would reach `value`, and `cost`.

    Args:
        cost: One of `on_all_data`.
        value: The result of a pruned run of that cost.
        on_all_data: Cost -> result of the short run of that cost; at 1 that of the full run.
    """
    costs = sorted(on_all_data)
    i = costs.index(cost)
    # A worse result lies below this cost, where a neighbour is not always known.
    slope = (on_all_data[costs[i + 1]] - on_all_data[cost]) / math.log(costs[i + 1] / cost)
    return math.exp((value - on_all_data[cost]) / slope)


def points_of(study: Path) -> list[dict[str, Any]]:
    """A row for each cost of a study at which loss-proportional and the short run were run."""
    summary = json.loads((study / "summary.json").read_text())
    rows = [row for row in summary["rows"] if row["ranked"]]
    plain = {row["wanted"]: row["mean"] for row in rows if row["name"] in (SHORT, FULL)}
    accuracy = summary["metric"].endswith("accuracy")
    points = []
    for row in rows:
        cost = row["wanted"]
        if row["name"] != RULE or cost not in plain:
            continue
        folders = sorted(study.glob(f"loss_proportional_{cost:g}_seed*"))
        gains = [gain_of(PruningReport.load(folder / REPORT_FILE)) for folder in folders]
        lost = plain[1.0] - plain[cost]
        point = {
            "study": study.name,
            "cost": cost,
            "seeds": len(gains),
            "gain": statistics.fmean(gains),
            "saving": saving_of(cost, row["mean"], plain),
            "interval": None,
            "short_run_lost": lost,
            "fitted": not accuracy or lost >= LEAST_LOST,
        }
        if ends := row["to_short_run"]["interval"]:
            savings = [saving_of(cost, plain[cost] + end, plain) for end in ends]
            point["interval"] = sorted(savings)
        points.append(point)
    return points


def potential(studies: Sequence[Path], predicted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The points of all studies, the line through those that are fitted, and what was predicted.

    Args:
        studies: Folders.
        predicted: Settings as [`predictions`] gives them.

    Returns:
        `points`: those of [`points_of`], with `predicted_first`;
        `fit`, `correlation`: of the fitted points, and `before`: the same without those that were
        predicted first, which is the line that predicted them;
        `predicted`: of [`compared`].
    """
    new = {setting["study"] for setting in predicted}
    points = [
        {**point, "predicted_first": study.name in new}
        for study in studies
        for point in points_of(study)
    ]
    fitted = [point for point in points if point["fitted"]]
    return {
        "written_by": "python -m recipes.studies.potential",
        **line_through(fitted),
        "before": line_through([point for point in fitted if not point["predicted_first"]]),
        "points": points,
        "predicted": compared(studies, predicted),
    }


def line_through(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`fit`, and `correlation` of log G and log saving."""
    gains, savings = ([point[name] for point in points] for name in ("gain", "saving"))
    quantile = float(stats.t.ppf(0.975, len(points) - 2))
    return {
        "fit": fit_line(gains, savings, quantile)._asdict(),
        "correlation": float(np.corrcoef(np.log(gains), np.log(savings))[0, 1]),
    }


def compared(studies: Sequence[Path], predicted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Predicted savings beside the measured ones.

    Returns:
        `settings`: those of `predicted` whose study is finished, with its point as `measured`;
        `within`: at how many the measured saving lies in the predicted interval;
        `rank_correlation`: Spearman's, of predicted and measured savings; None below three.
    """
    found = {study.name: points_of(study) for study in studies}
    settings = []
    for setting in predicted:
        for point in found.get(setting["study"], ()):
            if point["cost"] == setting["cost"]:
                settings.append({**setting, "measured": point})
    pairs = [(setting["saving"], setting["measured"]["saving"]) for setting in settings]
    correlation = None
    if len(pairs) > 2:
        said, seen = zip(*((saving["factor"], factor) for saving, factor in pairs), strict=True)
        rank = float(stats.spearmanr(said, seen).statistic)
        correlation = rank if math.isfinite(rank) else None  # all predictions are equal
    within = sum(
        saving["interval"][0] <= factor <= saving["interval"][1] for saving, factor in pairs
    )
    return {"settings": settings, "within": within, "rank_correlation": correlation}


def predictions(runs: Mapping[tuple[str, float], Path]) -> list[dict[str, Any]]:
    """For each setting G of a run and the saving that the shipped line predicts.

    Args:
        runs: (study, cost) -> report of a short run, or its folder.

    Raises:
        ValueError: If a report has no effective share.
    """
    found = []
    for (study, cost), path in runs.items():
        report = PruningReport.load(path / REPORT_FILE if path.is_dir() else path)
        if report.gain is None:
            raise ValueError(f"{path} has no effective share: train it with this version.")
        factor, low, high = predicted_saving(report.gain)
        saving = {"factor": factor, "interval": [low, high]}
        setting = {"study": study, "cost": cost, "gain": report.gain, "passes": report.passes}
        found.append({**setting, "saving": saving})
    return found


def plot_predicted(settings: Sequence[Mapping[str, Any]]) -> Figure:
    """The predicted saving of each setting beside the measured one, with 95 % intervals.

    Args:
        settings: Of [`compared`], at least one. The largest measured saving comes first.
    """
    settings = sorted(settings, key=lambda setting: setting["measured"]["saving"])
    figure = Figure(figsize=(7.5, 1.6 + 0.45 * len(settings)), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    for row, setting in enumerate(settings):
        said, seen = setting["saving"], setting["measured"]
        for place, factor, ends, style in (
            (row + 0.12, said["factor"], said["interval"], PREDICTED_STYLE),
            (row - 0.12, seen["saving"], seen["interval"] or [seen["saving"]] * 2, MEASURED_STYLE),
        ):
            arms = [[factor - ends[0]], [ends[1] - factor]]
            ax.errorbar(factor, place, xerr=arms, **style)
    ax.axvline(1, color=GREY, linewidth=0.5)
    ax.set_yticks(
        range(len(settings)),
        [f"{setting['study']}, cost {setting['cost']:g}" for setting in settings],
    )
    ax.set(xscale="log", xlabel="saving factor (1 saves nothing)")
    ax.xaxis.set_major_locator(FixedLocator(TICKS))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_title("Saving to the short run: predicted first, then measured", **TITLE)
    shown = list(ax.containers[:2])
    figure.legend(shown, ["predicted", "measured"], loc="outside lower right", ncols=2, **LEGEND)
    return figure


def stored_predictions(file: Path, fit: Fit | None = None) -> list[dict[str, Any]]:
    """The settings in a file; none without it.

    Raises:
        ValueError: If another line than `fit` predicted them.
    """
    if not file.exists():
        return []
    stored = json.loads(file.read_text())
    if fit is not None and stored["fit"] != fit._asdict():
        raise ValueError(f"{file} was predicted by another line: choose another --output.")
    return stored["settings"]


def setting_of(text: str) -> tuple[tuple[str, float], Path]:
    """Split 'cifar10@0.3=runs/short' into ('cifar10', 0.3) and the path.

    Raises:
        ValueError: If it has another form.
    """
    found = re.fullmatch(r"([\w.-]+)@([\d.]+)=(.+)", text)
    if not found:
        raise ValueError(f"--predict {text}: expected STUDY@COST=RUN.")
    return (found[1], float(found[2])), Path(found[3])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--predict", nargs="+", metavar="STUDY@COST=RUN", help="what to predict")
    parser.add_argument("--output", type=Path, help="where the predictions go")
    options = parser.parse_args(argv)
    if (options.predict is None) != (options.output is None):
        parser.error("--predict and --output: expected both or neither.")
    if options.predict:
        try:
            new = predictions(dict(map(setting_of, options.predict)))
            named = {(setting["study"], setting["cost"]) for setting in new}
            before = stored_predictions(options.output, STUDIES)
            kept = [old for old in before if (old["study"], old["cost"]) not in named]
            save_json(options.output, {"fit": STUDIES._asdict(), "settings": [*kept, *new]})
        except (ValueError, OSError) as error:
            parser.error(str(error))
        return
    folders = [path.parent for path in sorted((RESULTS / "studies").glob("*/summary.json"))]
    folders = [folder for folder in folders if folder.name not in LEFT_OUT]
    found = potential(folders, stored_predictions(PREDICTED))
    save_json(FILE, found)
    for point in found["points"]:
        print(
            f"{point['study']:24} cost {point['cost']:g}  G {point['gain']:.3f}  "
            f"saving {point['saving']:.3f}  {'' if point['fitted'] else '(not fitted)'}"
        )
    print(f"correlation {found['correlation']:.2f}; {found['fit']}")
    if settings := found["predicted"]["settings"]:
        save_picture(plot_predicted(settings), PICTURE)
    for setting in settings:
        print(
            f"{setting['study']:24} cost {setting['cost']:g}  predicted "
            f"{setting['saving']['factor']:.3f}  measured {setting['measured']['saving']:.3f}"
        )


if __name__ == "__main__":
    main()
