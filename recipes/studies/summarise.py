"""What a study found: the summary of its finished runs, as JSON, tables and pictures."""

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from hf_dynprune import PruningReport
from hf_dynprune.files import REPORT_FILE, save_json
from hf_dynprune.report import in_percent

from .draw import draw
from .plan import FULL, RANDOM, SHORT, Key, Run, Setting

STUDY_FILE, RUN_FILE, SUMMARY_FILE = "study.json", "run.json", "summary.json"
RANKED = 0.02  # a run is ranked if its cost is off by at most this share of the planned cost
SHARES = (0.95, 0.98, 0.99)  # of the full run's value: the default targets

Rows = Sequence[Mapping[str, Any]]


def finished(folder: Path) -> dict[Run, PruningReport]:
    """The finished runs of a study with their reports, without runs that only made scores."""
    found = {}
    for path in sorted(folder.glob(f"*/{RUN_FILE}")):
        record = json.loads(path.read_text())
        del record["command"]
        if (path.parent / REPORT_FILE).exists():
            found[Run(**record)] = PruningReport.load(path.parent / REPORT_FILE)
    return found


def summarise(folder: Path) -> dict[str, Any]:
    """Write summary.json, tables and pictures of the finished runs. Return the summary."""
    settings = json.loads((folder / STUDY_FILE).read_text())
    metric, lower = settings["metric"], settings["lower_is_better"]
    found = finished(folder)
    tuning = {run: report.metrics[metric] for run, report in found.items() if run.rate is not None}
    reports: dict[Key, dict[int, PruningReport]] = {}
    for run in sorted(found.keys() - tuning.keys(), key=lambda run: run.seed):
        reports.setdefault(run.key, {})[run.seed] = found[run]
    rows = rows_of(reports, metric)
    rows.sort(key=lambda row: (-row["wanted"], row["mean"] * (1 if lower else -1), row["name"]))
    environments: list[dict[str, Any]] = []
    for report in found.values():
        if report.environment not in environments:
            environments.append(report.environment)
    summary = {
        **settings,
        "tuning": tuned_rates(tuning, lower),
        "rows": rows,
        "targets": targets(rows, settings["targets"], lower),
        "environments": environments,
    }
    save_json(folder / SUMMARY_FILE, summary)
    for name, text in tables(summary).items():
        (folder / f"{name}.md").write_text(text + "\n")
    draw(folder, summary, {key: list(seeds.values()) for key, seeds in reports.items()})
    return summary


# ---- rows ----------------------------------------------------------------------------------------


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> dict[str, Any] | None:
    """The mean difference over the seeds that both have, and its 95 % interval by Student's t.

    The interval is None with one seed. Without a common seed there is no difference: None.
    """
    differences = [values[seed] - others[seed] for seed in values if seed in others]
    count = len(differences)
    if not count:
        return None
    mean, interval = statistics.mean(differences), None
    if count > 1:
        half = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5
        interval = [mean - half, mean + half]
    return {"mean": mean, "interval": interval, "seeds": count}


def rows_of(
    reports: Mapping[Key, Mapping[int, PruningReport]], metric: str
) -> list[dict[str, Any]]:
    """A row for each method at each cost; none before a full run is finished."""
    values = {
        key: {seed: report.metrics[metric] for seed, report in seeds.items()}
        for key, seeds in reports.items()
    }
    if (FULL, 1.0) not in reports:
        return []
    full = next(iter(reports[FULL, 1.0].values()))
    whole = full.num_samples * full.num_epochs  # another run may have other samples

    def difference(key: Key, other: Key) -> dict[str, Any] | None:
        return paired(values[key], values[other]) if key != other and other in values else None

    rows = []
    for key, by_seed in reports.items():
        (name, planned), own, runs = key, values[key], list(by_seed.values())
        cost = statistics.mean(run.passes / whole for run in runs)
        row = {
            "name": name,
            "wanted": planned,
            "cost": cost,
            "ranked": abs(cost - planned) <= RANKED * planned,
            "keep_ratio": runs[0].policy.get("keep_ratio"),
            "seeds": len(own),
            "mean": statistics.mean(own.values()),
            "deviation": statistics.stdev(own.values()) if len(own) > 1 else None,
            "to_full_run": difference(key, (FULL, 1.0)),
            "to_short_run": difference(key, (SHORT, planned)),
            "to_random": difference(key, (RANDOM, planned)),
            "seconds": statistics.mean(map(run_seconds, runs)),
            "passes": statistics.mean(run.passes for run in runs),
            "values": own,
        }
        rows.append(row)
    return rows


def run_seconds(report: PruningReport) -> float:
    """Seconds of the run without evaluation.

    Unlike `report.spent_seconds` it leaves out the preparation: another machine may have made the
    scores, so that its seconds cannot be compared.
    """
    seconds = report.totals["seconds"]
    return sum(each for phase, each in seconds.items() if phase != "evaluation")


# ---- learning rates ------------------------------------------------------------------------------


def tuned_rates(values: Mapping[Run, float], lower: bool) -> list[dict[str, Any]]:
    """The learning rates that were tried for each method and cost, and at each batch size.

    Args:
        values: The metric of the tuning runs.
        lower: Whether a low value is good.

    Returns:
        Rows with `means`, pairs (learning rate, mean over the seeds); `chosen`, the best rate;
        `edge`, whether that is the lowest or highest tried and no other one is as good; `seeds`;
        `batch_size`, if it was tried.
    """
    tried: dict[tuple[float, str, int], dict[float, list[float]]] = {}
    for run, value in values.items():
        assert run.rate is not None
        key = run.cost, run.name, run.batch or 0
        tried.setdefault(key, {}).setdefault(run.rate, []).append(value)
    rows = []
    for (cost, name, batch), by_rate in sorted(tried.items(), reverse=True):
        means = {rate: statistics.mean(by_rate[rate]) for rate in sorted(by_rate)}
        finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)} or means
        chosen = (min if lower else max)(finite, key=finite.__getitem__)
        alone = list(means.values()).count(means[chosen]) == 1
        row = {
            "name": name,
            "cost": cost,
            "means": list(means.items()),
            "chosen": chosen,
            "edge": alone and chosen in (min(means), max(means)),
            "seeds": min(map(len, by_rate.values())),
        }
        rows.append({**row, "batch_size": batch} if batch else row)
    return rows


def best_settings(rows: Rows, lower: bool) -> dict[Key, Setting]:
    """The best learning rate of each method and cost, at the batch size that was best with it.

    Args:
        rows: Of `tuned_rates`.
        lower: Whether a low value is good.
    """
    best: dict[Key, tuple[float, Setting]] = {}
    for row in rows:
        mean = dict(map(tuple, row["means"]))[row["chosen"]]
        loss = mean if lower else -mean
        loss = loss if math.isfinite(loss) else math.inf
        key, setting = (row["name"], row["cost"]), Setting(row["chosen"], row.get("batch_size"))
        if key not in best or loss < best[key][0]:
            best[key] = loss, setting
    return {key: setting for key, (_, setting) in best.items()}


def next_rate(rates: Collection[float], best: float) -> float:
    """The rate to try beyond the best one, which is the lowest or the highest of those tried.

    Its ratio to the best one is that of the best one to its neighbour.
    """
    *_, neighbour, end = sorted(rates, reverse=best == min(rates))
    return float(f"{end * end / neighbour:.6g}")


def chosen_settings(folder: Path) -> dict[Key, Setting]:
    """The best learning rates, and batch sizes, that a study tuned.

    Raises:
        ValueError: If the folder has no summary.
    """
    file = folder / SUMMARY_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: expected a study that tuned learning rates.")
    summary = json.loads(file.read_text())
    return best_settings(summary["tuning"], summary["lower_is_better"])


# ---- targets -------------------------------------------------------------------------------------


def reached(
    points: Iterable[tuple[float, float]], value: float, lower: bool = False
) -> tuple[float, bool] | None:
    """The cost at which the line through the points (cost, mean) first reaches a value.

    Returns:
        The cost and False; the least cost and True if that point is better already; None if the
        line does not reach the value.
    """
    sign = -1 if lower else 1
    (cost, mean), *others = sorted(points)
    if sign * mean >= sign * value:
        return cost, True
    for next_cost, next_mean in others:
        if sign * next_mean >= sign * value:
            return cost + (next_cost - cost) * (value - mean) / (next_mean - mean), False
        cost, mean = next_cost, next_mean
    return None


def targets(rows: Rows, values: Sequence[float], lower: bool) -> list[dict[str, Any]]:
    """The cost at which each method reaches each value, see [`reached`].

    The line goes through the means of the method and ends at the full run. Default values are
    shares of the full run's mean. They are used only if a method has several costs.
    """
    full = next((row["mean"] for row in rows if row["name"] == FULL), None)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["name"], []).append((row["cost"], row["mean"]))
    lines.pop(FULL, None)
    if full is None or not (values or any(len(points) > 1 for points in lines.values())):
        return []
    return [
        {
            "value": value,
            "costs": {
                name: reached([*points, (1.0, full)], value, lower)
                for name, points in lines.items()
            },
        }
        for value in values or [full / share if lower else full * share for share in SHARES]
    ]


# ---- tables --------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """How the values of the metric are shown."""

    heading: str
    scale: float
    digits: int

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "Metric":
        words = summary["metric"].replace("_", " ")
        means = [row["mean"] for row in summary["rows"]]
        if in_percent(summary["metric"], means):
            return cls(f"{words} (%)", 100, 2)
        return cls(words, 1, 2 if max(means, default=0.0) >= 10 else 4)

    def show(self, value: float, sign: str = "", fewer: int = 0) -> str:
        return f"{self.scale * value:{sign}.{self.digits - fewer}f}"

    def difference(self, found: Mapping[str, Any] | None) -> str:
        """Such as '+1.40 (+0.71 to +2.09)'."""
        if found is None:
            return ""
        mean = self.show(found["mean"], "+")
        if found["interval"] is None:
            return mean
        low, high = (self.show(end, "+") for end in found["interval"])
        return f"{mean} ({low} to {high})"


def tables(summary: Mapping[str, Any]) -> dict[str, str]:
    """The summary as Markdown: table_0.3 and so on, targets, tuning; without the empty ones."""
    metric, rows = Metric.of(summary), summary["rows"]
    costs = sorted({row["wanted"] for row in rows if row["name"] != FULL}, reverse=True)
    parts = {}
    for cost in costs:
        at = [row for row in rows if row["wanted"] == cost or row["name"] == FULL]
        parts[f"table_{cost:g}"] = _table_of_methods(at, metric)
    if summary["targets"]:
        parts["targets"] = _table_of_targets(summary["targets"], metric)
    if summary["tuning"]:
        parts["tuning"] = _table_of_rates(summary["tuning"], metric)
    return parts


def _table_of_methods(rows: Rows, metric: Metric) -> str:
    """The full run, the ranked methods, then in brackets those that missed the cost."""
    cells = []
    for row in sorted(rows, key=lambda row: (-row["wanted"], not row["ranked"])):
        spread = "" if row["deviation"] is None else f" ± {metric.show(row['deviation'])}"
        shown = [
            row["name"] if row["ranked"] else f"({row['name']})",
            f"{row['cost']:.3f}",
            metric.show(row["mean"]) + spread,
            metric.difference(row["to_short_run"]),
            metric.difference(row["to_random"]),
            f"{row['seconds']:,.0f}",
            str(row["seeds"]),
        ]
        cells.append(shown)
    ends = ["to the short run", "to random", "seconds", "seeds"]
    return markdown(["method", "cost", metric.heading, *ends], cells)


def _table_of_targets(found: Rows, metric: Metric) -> str:
    """A row for each method, the cheapest one first."""

    def cost(each: Sequence | None) -> str:
        return "not reached" if each is None else f"{'≤ ' if each[1] else ''}{each[0]:.2f}"

    by_name = {name: [target["costs"][name] for target in found] for name in found[0]["costs"]}
    first = {
        name: [math.inf if each is None else each[0] for each in costs]
        for name, costs in by_name.items()
    }
    cells = [[name, *map(cost, by_name[name])] for name in sorted(first, key=first.__getitem__)]
    values = [metric.show(target["value"], fewer=1) for target in found]
    return markdown([f"cost at which {metric.heading} is", *values], cells)


def _table_of_rates(tuning: Rows, metric: Metric) -> str:
    """A row for each method, cost and batch size, a column for each learning rate.

    The best rate of a row is bold.
    """
    rates = sorted({rate for row in tuning for rate, _ in row["means"]})
    cells = []
    for row in tuning:
        shown = {rate: metric.show(mean) for rate, mean in row["means"]}
        shown[row["chosen"]] = f"**{shown[row['chosen']]}**"
        words = f"{row['name']}, cost {row['cost']:g}"
        words += f", batch {row['batch_size']}" if "batch_size" in row else ""
        cells.append([words, *(shown.get(rate, "") for rate in rates)])
    heading = f"{metric.heading} on data held out, at learning rate"
    return markdown([heading, *(f"{rate:g}" for rate in rates)], cells)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], others: str = "---:") -> str:
    """A Markdown table. `others` aligns all columns but the first: right, by default."""
    lines = [head, ["---", *[others] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
