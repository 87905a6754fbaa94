"""What the effective share says of the studies: a line through G and the measured savings.

    python -m recipes.studies.potential                 writes recipes/results/potential.json
    python -m recipes.studies.potential --predict NAME=runs/short ... --output predicted.json

With --predict it writes what the line says of new settings, each by the report of a short run, so
that the prediction can be committed before the study is made.

G of a study is the mean over epochs and seeds of 1 / effective share of its loss-proportional runs.
Their reports were written before the effective share was measured. They hold five quantiles of the
mean losses, between which this program interpolates.

The measured saving is a cost ratio: that of a short run which would reach the result of
loss-proportional, over the cost of both. Results of runs on all data are interpolated linearly in
the logarithm of the cost, between the two nearest costs.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from hf_dynprune import PruningReport
from hf_dynprune.files import REPORT_FILE, save_json
from hf_dynprune.potential import STUDIES, effective_share, fit_line, predicted_saving

RESULTS = Path(__file__).parents[1] / "results"
FILE = RESULTS / "potential.json"
RULE = "loss-proportional"
# Repeats a setting of cifar10_16px, with a learning rate that was not tuned.
LEFT_OUT = ("cifar10_settings",)
# Below it there is little to win back. It holds for accuracies, which are shares.
LEAST_LOST = 0.02
_QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
_POINTS = 1000


def gain_of(report: PruningReport) -> float:
    """G of a run, the mean over its epochs, from the quantiles of its mean losses."""
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
    """A row for each cost of a study."""
    summary = json.loads((study / "summary.json").read_text())
    rows = [row for row in summary["rows"] if row["ranked"]]
    plain = {row["wanted"]: row["mean"] for row in rows if row["name"] in ("short run", "full run")}
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
            "short_run_lost": lost,
            "fitted": not accuracy or lost >= LEAST_LOST,
        }
        points.append(point)
    return points


def potential(studies: Sequence[Path]) -> dict[str, Any]:
    """The points of all studies, and the line through those that are fitted."""
    points = [point for study in studies for point in points_of(study)]
    fitted = [point for point in points if point["fitted"]]
    gains, savings = ([point[name] for point in fitted] for name in ("gain", "saving"))
    quantile = float(stats.t.ppf(0.975, len(fitted) - 2))
    return {
        "written_by": "python -m recipes.studies.potential",
        "fit": fit_line(gains, savings, quantile)._asdict(),
        "correlation": float(np.corrcoef(np.log(gains), np.log(savings))[0, 1]),
        "points": points,
    }


def predictions(runs: Mapping[str, Path]) -> dict[str, Any]:
    """For each setting G of a run and the saving that the shipped line predicts.

    Args:
        runs: Setting -> report of a short run, or its folder.

    Raises:
        ValueError: If a report has no effective share.
    """
    found = {}
    for name, path in runs.items():
        report = PruningReport.load(path / REPORT_FILE if path.is_dir() else path)
        if report.gain is None:
            raise ValueError(f"{name}={path} has no effective share: train it with this version.")
        factor, low, high = predicted_saving(report.gain)
        saving = {"factor": factor, "interval": [low, high]}
        found[name] = {"gain": report.gain, "passes": report.passes, "saving": saving}
    return {"fit": STUDIES._asdict(), "settings": found}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--predict", nargs="+", metavar="NAME=RUN", help="settings to predict")
    parser.add_argument("--output", type=Path, help="where the predictions go")
    options = parser.parse_args(argv)
    if (options.predict is None) != (options.output is None):
        parser.error("--predict and --output: expected both or neither.")
    if options.predict:
        pairs = [text.partition("=") for text in options.predict]
        if wrong := [name for name, equals, run in pairs if not (equals and name and run)]:
            parser.error(f"--predict {wrong[0]}: expected NAME=RUN.")
        try:
            save_json(options.output, predictions({name: Path(run) for name, _, run in pairs}))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        return
    folders = sorted((RESULTS / "studies").glob("*/"))
    found = potential([folder for folder in folders if folder.name not in LEFT_OUT])
    save_json(FILE, found)
    for point in found["points"]:
        print(
            f"{point['study']:24} cost {point['cost']:g}  G {point['gain']:.3f}  "
            f"saving {point['saving']:.3f}  {'' if point['fitted'] else '(not fitted)'}"
        )
    print(f"correlation {found['correlation']:.2f}; {found['fit']}")


if __name__ == "__main__":
    main()
