"""Does it pay? Pruning rules at equal cost, through one recipe: beside the full run, and the short run, the one to beat.

    python recipes/compare.py --output_dir runs/study --rules random epsilon-greedy ucb --costs 0.3 --seeds 0 1 2 -- \\
        recipes/cifar.py --model resnet8_cifar --num_train_epochs 20

The recipe follows the two dashes, with the options of all runs. For each seed there is the full run, and for each cost

    short     all data for cost * epochs, to which the schedule of the learning rate is compressed
    a rule    all epochs, with the keep_ratio at which the passes of the whole run (scoring passes, full-data epochs and
              what scores cost before it are counted) are cost * those of the full run. A rule that cannot meet the cost
              keeps what it keeps, and stands in the table at what that cost, out of the ranking.
    scores    el2n, grand, forgetting and so on (recipes with --score): static pruning, hardest first, twice: with what the
              scores cost taken from the run, and as if they had been given

A rule is a name, or a name with fields: 'ucb:{"scoring": "dropped"}'. Each run is a program of its own, which leaves its
report and its log in a folder of the study. Started again, the study goes on with the runs that have no report yet.
summary.json, table.md and picture.png tell of those that are finished: mean and standard deviation over the seeds of the
last evaluation, and the differences to the short run and to dynamic random pruning, seed by seed, with a 95 % interval.

For choices (a learning rate, a rule) hold a part of the training data out, such as --train_split 'train[:90%]' --eval_split
'train[90%:]' for data in random order. The test set is for what is reported, once.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy import optimize, stats
from tqdm import tqdm

from hf_dynprune import PruningPolicy, PruningReport, make_policy
from hf_dynprune.advice import Measured, Settings, predict
from hf_dynprune.plots import plot_costs
from hf_dynprune.static import METHODS, SCORES_FILE

RANKED = 0.02  # runs whose cost is off by more of what was wanted are not ranked
FULL, SHORT, RANDOM = "full run", "short run", "random"


@dataclass(frozen=True)
class Run:
    """The recipe with options of its own; `cost` is what is wanted of it, in full runs."""

    name: str
    cost: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        words = f"{self.name} {self.cost:g}" if self.name != FULL else self.name
        return "_".join("".join(c if c.isalnum() or c == "." else " " for c in words).split()) + f"_seed{self.seed}"


# ---- equal cost -----------------------------------------------------------------------------------------------------


def cost_of(policy: PruningPolicy, n: int, epochs: float) -> float:
    """Passes of a run over those of the full run, as planned; what scores cost is counted where it is charged."""
    return predict(policy, Settings(n, 1, epochs), Measured(1, 0.0, 0.0, 0.0, 0.0)).passes / (n * epochs)


def at_cost(policy: PruningPolicy, cost: float, n: int, epochs: float) -> PruningPolicy:
    """The policy with the keep_ratio whose run costs that much, to a sample an epoch; as it is where there is none."""

    def surplus(keep_ratio: float) -> float:
        try:
            return cost_of(replace(policy, keep_ratio=keep_ratio), n, epochs) - cost
        except ValueError:  # fewer than the policy can keep
            return -1.0

    if getattr(policy, "keep_ratio", None) is None or surplus(1 / n) > 0:
        return policy
    precision = 0.1 / n
    found = 1.0 if surplus(1.0) <= 0 else optimize.bisect(surplus, 1 / n, 1.0, xtol=precision)
    return replace(policy, keep_ratio=found if surplus(found) != -1.0 else min(1.0, found + 2 * precision))


def rule(text: str, cost: float) -> tuple[str, dict[str, Any], PruningPolicy]:
    """The name, the fields and the policy of a rule as it is given, with the cost for its keep_ratio, if it has one."""
    name, _, fields = text.partition(":")
    settings = json.loads(fields) if fields else {}
    try:
        return name, settings, make_policy(name, keep_ratio=cost, **settings)
    except (TypeError, ValueError):
        return name, settings, make_policy(name, **settings)


# ---- runs -----------------------------------------------------------------------------------------------------------


class Study:
    """Runs of one recipe, each in its folder."""

    def __init__(self, folder: Path, recipe: Sequence[str]) -> None:
        self.folder, self.recipe = folder, list(recipe)

    def finish(self, run: Run, result: str = "report.json") -> Path:
        """The folder of the run, which is started unless it has been finished before.

        Raises:
            ValueError: if there is a run in that folder that had other options.
            RuntimeError: if it fails; the message has the end of its log.
        """
        folder = self.folder / run.folder
        options = [f"--{name}={value}" for name, value in {**run.options, "seed": run.seed, "output_dir": folder}.items()]
        command = [*self.recipe, *options]
        noted = folder / "command.json"
        if noted.exists() and json.loads(noted.read_text()) != command:
            raise ValueError(
                f"{folder} has a run of {json.loads(noted.read_text())}, wanted is {command}: choose another --output_dir, "
                "or delete that folder."
            )
        if (folder / result).exists() and noted.exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(command))
        with open(folder / "log.txt", "w") as log:
            done = subprocess.run([sys.executable, *command, "--overwrite=True"], stdout=log, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            end = "\n".join((folder / "log.txt").read_text().splitlines()[-15:])
            raise RuntimeError(
                f"{run.name}, seed {run.seed}, ended with status {done.returncode}. The end of {folder / 'log.txt'}:\n{end}"
            )
        return folder

    def report(self, run: Run) -> PruningReport | None:
        """Of a run that is finished."""
        path = self.folder / run.folder / "report.json"
        return PruningReport.load(path) if path.exists() else None


def runs_at(cost: float, seed: int, options: argparse.Namespace, full: PruningReport, study: Study) -> Iterator[Run]:
    """The runs of a seed at a cost; those that give scores first are finished on the way."""
    n, epochs = full.num_samples, full.num_epochs
    yield Run(SHORT, cost, seed, {"pruning": "full", "num_train_epochs": cost * epochs})
    for text in options.rules:
        name, settings, policy = rule(text, cost)
        policy = at_cost(policy, cost, n, epochs)
        kept = {} if getattr(policy, "keep_ratio", None) is None else {"keep_ratio": policy.keep_ratio}
        more = {"pruning_kwargs": json.dumps(settings)} if settings else {}
        yield Run(text, cost, seed, {"pruning": name, **kept, **more})
    for method in options.scores:
        file = study.finish(Run(f"scores {method}", 0, seed, {"score": method}), SCORES_FILE) / SCORES_FILE
        for words, charge in (("charged", True), ("given", False)):
            policy = at_cost(make_policy("static", scores=str(file), keep_ratio=cost, charge=charge), cost, n, epochs)
            settings = json.dumps({"scores": str(file), "charge": charge})
            kept = {"pruning": "static", "keep_ratio": policy.keep_ratio, "pruning_kwargs": settings}
            yield Run(f"{method}, scores {words}", cost, seed, kept)


def carry_out(options: argparse.Namespace, study: Study) -> list[Run]:
    """All runs, each finished, with a bar that counts full runs; after each the summary is renewed."""
    done: list[Run] = []
    each = 1 + len(options.rules) + 2 * len(options.scores)
    total = len(options.seeds) * (1 + each * sum(options.costs) + len(options.scores))
    with tqdm(total=total, unit=" full runs", desc="study") as bar:
        for seed in options.seeds:
            full = Run(FULL, 1.0, seed, {"pruning": "full"})
            study.finish(full)
            done.append(full)
            bar.update(1)
            report = study.report(full)
            assert report is not None
            for cost in options.costs:
                for run in runs_at(cost, seed, options, report, study):
                    bar.set_postfix_str(f"{run.name} {cost:g}, seed {seed}")
                    study.finish(run)
                    done.append(run)
                    bar.update(cost)
                    summarise(done, study, options)
            bar.update(len(options.scores))
    return done


# ---- summary --------------------------------------------------------------------------------------------------------


def paired(values: dict[int, float], others: dict[int, float]) -> dict[str, Any] | None:
    """Mean difference over the seeds that both have, and its 95 % interval by Student's t; None where there is none."""
    differences = [values[seed] - others[seed] for seed in values if seed in others]
    if not differences:
        return None
    mean, count = statistics.mean(differences), len(differences)
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5 if count > 1 else None
    return {"mean": mean, "interval": None if half is None else [mean - half, mean + half], "seeds": count}


def summarise(done: Sequence[Run], study: Study, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Writes summary.json, table.md and picture.png of the runs that are finished; returns the rows."""
    reports: dict[tuple[str, float], dict[int, PruningReport]] = {}
    for run in done:
        report = study.report(run)
        assert report is not None
        reports.setdefault((run.name, run.cost), {})[run.seed] = report
    values = {
        key: {seed: report.metrics[options.metric] for seed, report in seeds.items()} for key, seeds in reports.items()
    }
    epochs = next(iter(reports[FULL, 1.0].values())).num_epochs
    rows = [row_of(key, seeds, values, epochs) for key, seeds in reports.items()]
    rows.sort(key=lambda row: (-row["wanted"], -row["mean"] if not options.lower_is_better else row["mean"]))
    content = {"recipe": study.recipe, "metric": options.metric, "rows": rows}
    content["environment"] = next(iter(reports[FULL, 1.0].values())).environment
    (study.folder / "summary.json").write_text(json.dumps(content, indent=2) + "\n")
    (study.folder / "table.md").write_text(table(rows, options.metric) + "\n")
    points: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        points.setdefault(row["name"], []).append((row["cost"], list(row["values"].values())))
    plot_costs(points, options.metric).savefig(study.folder / "picture.png", dpi=150)
    return rows


def row_of(
    key: tuple[str, float],
    seeds: dict[int, PruningReport],
    values: dict[tuple[str, float], dict[int, float]],
    epochs: float,
) -> dict[str, Any]:
    name, wanted = key
    own = values[key]
    costs = [report.passes / (report.num_samples * epochs) for report in seeds.values()]
    seconds = [sum(s for phase, s in report.totals["seconds"].items() if phase != "evaluation") for report in seeds.values()]
    cost = statistics.mean(costs)
    return {
        "name": name,
        "wanted": wanted,
        "cost": cost,
        "ranked": abs(cost - wanted) <= RANKED * wanted,
        "keep_ratio": next(iter(seeds.values())).policy.get("keep_ratio"),
        "seeds": len(own),
        "mean": statistics.mean(own.values()),
        "deviation": statistics.stdev(own.values()) if len(own) > 1 else None,
        "to_short_run": paired(own, values[SHORT, wanted]) if (SHORT, wanted) in values and name != SHORT else None,
        "to_random": paired(own, values[RANDOM, wanted]) if (RANDOM, wanted) in values and name != RANDOM else None,
        "seconds": statistics.mean(seconds),
        "values": own,
    }


def table(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """As Markdown, the best of each cost first; what is not ranked stands behind, in brackets."""
    percent = metric.endswith("accuracy")
    scale, digits = (100, 2) if percent else (1, 4)

    def number(value: float, sign: str = "") -> str:
        return f"{scale * value:{sign}.{digits}f}"

    def difference(found: dict[str, Any] | None) -> str:
        if found is None:
            return ""
        mean, interval = number(found["mean"], "+"), found["interval"]
        return mean if interval is None else f"{mean} ({number(interval[0], '+')} to {number(interval[1], '+')})"

    unit = " (%)" if percent else ""
    lines = [
        f"| method | cost | {metric.replace('_', ' ')}{unit} | to the short run | to random | seconds | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (-row["wanted"], not row["ranked"])):
        name = row["name"] if row["ranked"] else f"({row['name']})"
        spread = "" if row["deviation"] is None else f" ± {number(row['deviation'])}"
        lines.append(
            f"| {name} | {row['cost']:.3f} | {number(row['mean'])}{spread} | {difference(row['to_short_run'])} | "
            f"{difference(row['to_random'])} | {row['seconds']:,.0f} | {row['seeds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the study")
    parser.add_argument("--rules", nargs="*", default=["random", "epsilon-greedy", "ucb"], help="see above")
    parser.add_argument("--scores", nargs="*", default=[], choices=METHODS, help="for static pruning")
    parser.add_argument("--costs", type=float, nargs="+", default=[0.3], help="in (0, 1), of the full run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--metric", default="eval_accuracy", help="of the last evaluation")
    parser.add_argument("--lower_is_better", action="store_true")
    arguments = sys.argv[1:]
    own = arguments.index("--") if "--" in arguments else len(arguments)
    options, recipe = parser.parse_args(arguments[:own]), arguments[own + 1 :]
    if not recipe or not Path(recipe[0]).is_file():
        parser.error(
            f"{''.join(recipe[:1]) or 'nothing'} is no recipe: wanted is -- recipes/cifar.py, say, and its options."
        )
    try:
        for cost in options.costs:
            if not 0 < cost < 1:
                raise ValueError(f"--costs {cost:g} is out of range: wanted is a share of the full run, in (0, 1).")
            for text in options.rules:
                rule(text, cost)
        study = Study(options.output_dir, recipe)
        rows = summarise(carry_out(options, study), study, options)
    except (ValueError, TypeError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(table(rows, options.metric))
    print(f"Written to {options.output_dir}: summary.json, table.md, picture.png, and a folder for each run.")


if __name__ == "__main__":
    main()
