"""Does it pay? Pruning rules at equal cost, through one recipe: beside the full run, and the short run, the one to beat.

    python recipes/compare.py --output_dir runs/study --rules random epsilon-greedy ucb --costs 0.3 --seeds 0 1 2 \\
        --learning_rates 0.2 0.4 0.8 -- recipes/cifar.py --model resnet8_cifar --num_train_epochs 20

The recipe follows the two dashes, with the options of all runs. For each seed there is the full run, and for each cost

    short     all data for cost * epochs, to which the schedule of the learning rate is compressed
    a rule    all epochs, with the keep_ratio at which the passes of the whole run (scoring passes, full-data epochs and
              what scores cost before it are counted) are cost * those of the full run. A rule that cannot meet the cost
              keeps what it keeps, and stands in the table at what that cost, out of the ranking.
    scores    el2n, grand, forgetting and so on (recipes with --score): static pruning, hardest first, twice: with what the
              scores cost taken from the run, and as if they had been given

A rule is a name, with fields if it is to have some, and with options of the recipe for its runs alone (scores can have such,
too): 'ucb:{"scoring": "dropped"}'; 'ucb --num_train_epochs 12', which are fewer epochs, of which it then keeps more;
'el2n --score_runs 2'.

--learning_rates tunes first: the full run and, for each cost, the short run and each rule (with --tune first, the first for
all) are run at each of the rates with --validation_share of the training data held out (always the same part), on which they
are evaluated; where the best rate is the lowest or the highest, at the next one, too. It is that of the runs that follow;
scores take the full run's, static pruning by them the first rule's. The test set is seen once by each of these, at its end.
--rates_of takes the rates that another study chose: those of a short run for a long one, say. What it did not tune takes
that of the same policy without fields, or of the first rule.
For other choices give --validation_share to the recipe: then all runs of the study are evaluated on that part.

Each run is a program of its own, which leaves its report and its log in a folder of the study. Started again, with more
seeds, rules, costs or rates if wanted, the study goes on with the runs that are not finished. Of those that are tell

    table_0.3.md, picture_0.3.png          (and so on, for each cost) mean and standard deviation over the seeds of the last
                                           evaluation; differences to the short run and to dynamic random pruning, seed by
                                           seed, with a 95 % interval
    selection_0.3.png                      how often each rule (the nine best) kept the samples, beside chance
    picture.png                            what was reached against cost
    targets.md, targets.png                at which cost a method reaches a given value, on the line through its means: where
                                           methods have several costs, or with --targets
    tuning.md                              what was reached at which learning rate on the data held out
    summary.json                           all of it

--output_dir alone renews them.
"""

import argparse
import json
import math
import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats
from tqdm import tqdm

from hf_dynprune import PruningPolicy, PruningReport, make_policy
from hf_dynprune.advice import Measured, Settings, predict
from hf_dynprune.plots import plot_costs, plot_methods, plot_selection, plot_targets
from hf_dynprune.report import in_percent
from hf_dynprune.static import METHODS, SCORES_FILE

RANKED = 0.02  # runs whose cost is off by more of what was wanted are not ranked
FULL, SHORT, RANDOM = "full run", "short run", "random"
MOST_RATES = 4  # that tuning adds to those given
PANELS = 9  # of a picture of selections
SHARES = (0.95, 0.98, 0.99)  # of the full run's value, which methods are to reach


@dataclass(frozen=True)
class Run:
    """The recipe with options of its own; `cost` is what is wanted of it, in full runs; `rate` the learning rate that it
    tries on data held out, of a run that tunes."""

    name: str
    cost: float
    seed: int
    rate: float | None = None
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def folder(self) -> str:
        words = f"{self.name} {self.cost:g}" if self.name != FULL else self.name
        words += "" if self.rate is None else f" tuning {self.rate:g}"
        return (
            "_".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())
            + f"_seed{self.seed}"
        )


# ---- equal cost ----------------------------------------------------------------------------------


def cost_of(policy: PruningPolicy, n: int, epochs: float) -> float:
    """Passes of a run over those of the full run, as planned; what scores cost is counted where it is charged."""
    return predict(policy, Settings(n, 1, epochs), Measured(1, 0.0, 0.0, 0.0, 0.0)).passes / (
        n * epochs
    )


def at_cost(policy: PruningPolicy, cost: float, n: int, epochs: float) -> PruningPolicy:
    """The policy with the keep_ratio whose run costs that much, to a sample an epoch; where there is none, with the one
    that comes closest of those the policy takes; as it is where it has none, or scoring alone costs more."""
    own = getattr(policy, "keep_ratio", None)

    def surplus(keep_ratio: float) -> float:
        try:
            return cost_of(replace(policy, keep_ratio=keep_ratio), n, epochs) - cost
        except ValueError:  # less, or more, than the policy can keep
            return -math.inf if keep_ratio < own else math.inf

    if own is None or surplus(1 / n) > 0:
        return policy
    precision = 0.1 / n
    found = 1.0
    if surplus(found) > 0:
        found = optimize.bisect(lambda ratio: np.sign(surplus(ratio)), 1 / n, 1.0, xtol=precision)
    near = (found, min(1.0, found + 2 * precision), found - 2 * precision)
    return replace(policy, keep_ratio=next(r for r in near if math.isfinite(surplus(r))))


def own_options(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the options of the recipe in 'ucb --num_train_epochs 12', and these."""
    text, *own = re.split(r"\s+--", text.strip())
    return text, dict(re.split(r"[\s=]+", option, maxsplit=1) for option in own)


def label(name: str, settings: Mapping[str, Any]) -> str:
    return (
        f"{name} ({', '.join(f'{key} {value}' for key, value in settings.items())})"
        if settings
        else name
    )


@dataclass(frozen=True)
class Rule:
    """A policy, the fields that it was given, and options of the recipe for its runs."""

    policy: PruningPolicy
    fields: dict[str, Any]
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str, cost: float) -> "Rule":
        """From the command line; the cost is its keep_ratio, if it has one, and takes that."""
        text, options = own_options(text)
        name, _, fields = text.partition(":")
        settings = json.loads(fields) if fields else {}
        if "keep_ratio" in settings:
            raise ValueError(
                f"{text} has a keep_ratio, which follows from --costs here: leave it out."
            )
        for keep_ratio in ({"keep_ratio": cost}, {"keep_ratio": 1.0}):
            try:
                return cls(make_policy(name, **keep_ratio, **settings), settings, options)
            except (TypeError, ValueError):
                continue
        return cls(make_policy(name, **settings), settings, options)

    def __str__(self) -> str:
        return label(self.policy.name, {**self.fields, **self.options})

    def run(self, cost: float, seed: int, n: int, epochs: float) -> Run:
        """At a cost in full runs of so many epochs."""
        own = float(self.options.get("num_train_epochs", epochs))
        policy = at_cost(self.policy, cost * epochs / own, n, own)
        options: dict[str, Any] = {"pruning": policy.name}
        if getattr(policy, "keep_ratio", None) is not None:
            options["keep_ratio"] = f"{policy.keep_ratio:.9g}"
        if self.fields:
            options["pruning_kwargs"] = json.dumps(self.fields)
        return Run(str(self), cost, seed, options={**options, **self.options})


# ---- runs ----------------------------------------------------------------------------------------


class Study:
    """Runs of one recipe, each in its folder: report.json, log.txt and, once it is finished, run.json."""

    def __init__(self, folder: Path, recipe: Sequence[str] = (), jobs: int = 1) -> None:
        if jobs < 1:
            raise ValueError(f"--jobs {jobs} is out of range: wanted is at least 1.")
        self.folder, self.recipe = folder, list(recipe)
        self.jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
        for job in range(jobs):
            self.jobs.put(job)
        self.environment = self._environment(jobs)

    @staticmethod
    def _environment(jobs: int) -> dict[str, str]:
        """Of runs side by side on a CPU: each has its share of the cores, unless the user says how many."""
        if jobs == 1 or torch.cuda.is_available():
            return dict(os.environ)
        return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs)), **os.environ}

    def portable(self, command: Iterable[str]) -> list[str]:
        """Without paths of this machine: of data and models elsewhere their names alone, of this study none."""

        def word(text: str) -> str:
            option, equals, value = (
                text.rpartition("=") if text.startswith("--") else ("", "", text)
            )
            value = value.replace(f"{self.folder}/", "")
            path = Path(value)
            outside = (
                len(value) < 1000
                and path.exists()
                and not path.resolve().is_relative_to(Path.cwd())
            )
            return option + equals + (path.resolve().name if outside else value)

        return [word(text) for text in command]

    def finish(self, run: Run, result: str = "report.json") -> Path:
        """The folder of the run, which is started unless it has been finished before.

        Raises:
            ValueError: if there is a run in that folder that had other options.
            RuntimeError: if it fails; the message has the end of its log.
        """
        folder = self.folder / run.folder
        options = [f"--{name}={value}" for name, value in {**run.options, "seed": run.seed}.items()]
        command, noted = [*self.recipe, *options], folder / "run.json"
        record = {**asdict(run), "command": self.portable(command)}
        del record["options"]
        if noted.exists():
            before = json.loads(noted.read_text())
            if before != record:
                raise ValueError(
                    f"{folder} has the run {before}, wanted is {record}: choose another --output_dir, or delete that folder."
                )
            if (folder / result).exists():
                return folder
        folder.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, *command, f"--output_dir={folder}", "--overwrite=True"]
        job = self.jobs.get()
        try:
            environment = dict(self.environment)
            if torch.cuda.device_count() > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(job % torch.cuda.device_count())
            with open(folder / "log.txt", "w") as log:
                done = subprocess.run(
                    program, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
        finally:
            self.jobs.put(job)
        if done.returncode != 0:
            end = "\n".join((folder / "log.txt").read_text().splitlines()[-15:])
            raise RuntimeError(
                f"{run.name}, seed {run.seed}, ended with status {done.returncode}. The end of {folder / 'log.txt'}:\n{end}"
            )
        noted.write_text(json.dumps(record, indent=2) + "\n")
        return folder

    def is_finished(self, run: Run) -> bool:
        return (self.folder / run.folder / "run.json").exists()

    def report(self, run: Run) -> PruningReport:
        return PruningReport.load(self.folder / run.folder / "report.json")

    def finished(self) -> dict[Run, PruningReport]:
        """All that are, of this or earlier sittings; those that only gave scores are none of them."""
        found = {}
        for path in sorted(self.folder.glob("*/run.json")):
            record = json.loads(path.read_text())
            del record["command"]
            if (path.parent / "report.json").exists():
                found[Run(**record)] = PruningReport.load(path.parent / "report.json")
        return found


def full_run(seed: int) -> Run:
    return Run(FULL, 1.0, seed, options={"pruning": "full"})


def short_run(cost: float, seed: int, epochs: float) -> Run:
    return Run(SHORT, cost, seed, options={"pruning": "full", "num_train_epochs": cost * epochs})


def scores_run(text: str, seed: int, **options: Any) -> Run:
    method, own = own_options(text)
    return Run(
        f"scores {label(method, own)}", 0.0, seed, options={"score": method, **options, **own}
    )


def static_runs(
    text: str, cost: float, seed: int, n: int, epochs: float, file: Path
) -> Iterator[Run]:
    """With the scores of a file charged, and given; where the file is not there yet, runs that only have their names."""
    for words, charge in (("charged", True), ("given", False)):
        options = {}
        if file.is_file():
            policy = at_cost(
                make_policy("static", scores=str(file), keep_ratio=cost, charge=charge),
                cost,
                n,
                epochs,
            )
            settings = json.dumps({"scores": str(file), "charge": charge})
            options = {
                "pruning": "static",
                "keep_ratio": f"{policy.keep_ratio:.9g}",
                "pruning_kwargs": settings,
            }
        yield Run(f"{label(*own_options(text))}, scores {words}", cost, seed, options=options)


class Sitting:
    """Carries out what is left of a study, some runs at once, with a bar that counts full runs."""

    def __init__(self, options: argparse.Namespace, study: Study) -> None:
        self.options, self.study = options, study
        self.pool = ThreadPoolExecutor(options.jobs)
        self.started: dict[Run, Future[Path]] = {}
        self.waiting: dict[
            Future[Path], tuple[Run, float]
        ] = {}  # what is to come of each, in full runs
        self.bar = tqdm(unit=" full runs", desc="study", total=self._units())

    def _units(self) -> float:
        """Of all that is not finished, in full runs; what scores cost is taken to be one."""
        o, rates = self.options, self.options.learning_rates
        of_cost = [
            Run(name, cost, 0)
            for cost in o.costs
            for name in (SHORT, *(str(Rule.parse(r, cost)) for r in o.rules))
        ]
        runs = [replace(run, seed=seed) for run in (full_run(0), *of_cost) for seed in o.seeds]
        runs += [
            run
            for s in o.seeds
            for c in o.costs
            for m in o.scores
            for run in static_runs(m, c, s, 1, 1, Path())
        ]
        tuned = [full_run(0)]
        tuned += [
            Run(name, c, 0) for c in o.costs for name in (SHORT, *map(str, self._tuned_rules(c)))
        ]
        runs += [
            replace(run, seed=seed, rate=rate)
            for run in tuned
            for seed in o.tuning_seeds
            for rate in rates
        ]
        scores = [scores_run(method, seed) for method in o.scores for seed in o.seeds]
        left = [run for run in runs if not self.study.is_finished(run)]
        return sum(run.cost for run in left) + sum(
            not self.study.is_finished(run) for run in scores
        )

    def _tuned_rules(self, cost: float) -> list[Rule]:
        rules = [Rule.parse(text, cost) for text in self.options.rules]
        return rules[:1] if self.options.tune == "first" else rules

    def start(self, run: Run, result: str = "report.json") -> Future[Path]:
        """Unless it was: two programs must not write into one folder."""
        if run not in self.started:
            units = 0.0 if self.study.is_finished(run) else run.cost or 1.0
            self.started[run] = self.pool.submit(self.study.finish, run, result)
            self.waiting[self.started[run]] = run, units
        return self.started[run]

    def wait(self, wanted: Iterable[Future[Path]]) -> None:
        """Until these are finished; of all that are the summary is renewed."""
        left = set(wanted)
        while left:
            future = next(as_completed([*self.waiting, *left]))
            left.discard(future)
            future.result()
            run, units = self.waiting.pop(future, (None, 0.0))
            if run is not None and units:
                self.bar.set_postfix_str(
                    f"{run.name} {run.cost:g}, seed {run.seed} finished", refresh=False
                )
                self.bar.update(units)
                summarise(self.study)

    def first(self, runs: Sequence[Run]) -> PruningReport:
        """Starts full runs; the report of the first of them, from which the others' sizes follow."""
        futures = [self.start(run) for run in runs]
        self.wait(futures[:1])
        return self.study.report(runs[0])

    def tune(self) -> dict[tuple[str, float], float]:
        """The best learning rates, by name and cost."""
        o = self.options
        if o.rates_of is not None:
            return chosen_rates(o.rates_of)
        if not o.learning_rates:
            return {}

        held_out = {"validation_share": o.validation_share}

        def at(rate: float, run: Run) -> Run:
            return replace(
                run, rate=rate, options={**run.options, **held_out, "learning_rate": rate}
            )

        seeds = o.tuning_seeds
        full = self.first([at(rate, full_run(seed)) for seed in seeds for rate in o.learning_rates])
        tuned = [full_run(seed) for seed in seeds]
        for seed in seeds:
            for cost in o.costs:
                tuned.append(short_run(cost, seed, full.num_epochs))
                tuned += [
                    rule.run(cost, seed, full.num_samples, full.num_epochs)
                    for rule in self._tuned_rules(cost)
                ]
        for rate in o.learning_rates:
            for run in tuned:
                self.start(at(rate, run))
        self.wait(list(self.waiting))
        rows = self._tuned(tuned)
        for _ in range(MOST_RATES):  # until there is a worse one on either side
            for name, cost in [key for key, row in rows.items() if row["edge"]]:
                beyond = next_rate(
                    [rate for rate, _ in rows[name, cost]["means"]], rows[name, cost]["chosen"]
                )
                for run in tuned:
                    if (run.name, run.cost) == (name, cost):
                        self.bar.total += 0 if self.study.is_finished(at(beyond, run)) else run.cost
                        self.start(at(beyond, run))
            self.wait(list(self.waiting))
            rows = self._tuned(tuned)
        return {key: row["chosen"] for key, row in rows.items()}

    def _tuned(self, runs: Iterable[Run]) -> dict[tuple[str, float], dict[str, Any]]:
        wanted = {(run.name, run.cost) for run in runs}
        rows = {(row["name"], row["cost"]): row for row in summarise(self.study)["tuning"]}
        return {key: row for key, row in rows.items() if key in wanted}

    def carry_out(self) -> None:
        o = self.options
        try:
            rates = self.tune()
            first = {cost: str(rule) for cost in o.costs for rule in self._tuned_rules(cost)[:1]}

            def tuned(run: Run) -> Run:
                names = (run.name, run.name.partition(" (")[0], first.get(run.cost, ""))
                rate = next(
                    (rates[name, run.cost] for name in names if (name, run.cost) in rates), None
                )
                return (
                    run
                    if rate is None
                    else replace(run, options={"learning_rate": rate, **run.options})
                )

            of_full = {"learning_rate": rates[FULL, 1.0]} if rates else {}
            scores = {
                (method, seed): self.start(scores_run(method, seed, **of_full), SCORES_FILE)
                for method in o.scores
                for seed in o.seeds
                if not all(
                    self.study.is_finished(run)
                    for c in o.costs
                    for run in static_runs(method, c, seed, 1, 1, Path())
                )
            }
            full = self.first([tuned(full_run(seed)) for seed in o.seeds])
            n, epochs = full.num_samples, full.num_epochs
            for seed in o.seeds:
                for cost in o.costs:
                    self.start(tuned(short_run(cost, seed, epochs)))
                    for text in o.rules:
                        self.start(tuned(Rule.parse(text, cost).run(cost, seed, n, epochs)))
            for (method, seed), future in scores.items():
                self.wait([future])
                for cost in o.costs:
                    for run in static_runs(
                        method, cost, seed, n, epochs, future.result() / SCORES_FILE
                    ):
                        self.start(tuned(run))
            self.wait(list(self.waiting))
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.bar.close()


# ---- summary -------------------------------------------------------------------------------------


def paired(values: dict[int, float], others: dict[int, float]) -> dict[str, Any] | None:
    """Mean difference over the seeds that both have, and its 95 % interval by Student's t; None where there is none."""
    differences = [values[seed] - others[seed] for seed in values if seed in others]
    if not differences:
        return None
    mean, count = statistics.mean(differences), len(differences)
    half = (
        stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5
        if count > 1
        else None
    )
    return {
        "mean": mean,
        "interval": None if half is None else [mean - half, mean + half],
        "seeds": count,
    }


def reached(
    points: Iterable[tuple[float, float]], value: float, lower: bool = False
) -> tuple[float, bool] | None:
    """The cost at which the line through the points (cost, mean) first reaches a value, and False; the cheapest cost, and
    True, where that is better already; None where it does not get there."""
    sign = -1 if lower else 1
    (cost, mean), *others = sorted(points)
    if sign * mean >= sign * value:
        return cost, True
    for next_cost, next_mean in others:
        if sign * next_mean >= sign * value:
            return cost + (next_cost - cost) * (value - mean) / (next_mean - mean), False
        cost, mean = next_cost, next_mean
    return None


def summarise(study: Study) -> dict[str, Any]:
    """Writes summary.json, tables and pictures of the runs that are finished; returns the first."""
    settings = json.loads((study.folder / "study.json").read_text())
    metric, lower = settings["metric"], settings["lower_is_better"]
    found = study.finished()
    tuning = [(run, report) for run, report in found.items() if run.rate is not None]
    reports: dict[tuple[str, float], dict[int, PruningReport]] = {}
    for run in sorted(set(found) - {run for run, _ in tuning}, key=lambda run: run.seed):
        reports.setdefault((run.name, run.cost), {})[run.seed] = found[run]
    values = {
        key: {seed: report.metrics[metric] for seed, report in seeds.items()}
        for key, seeds in reports.items()
    }
    rows = []
    if full := reports.get((FULL, 1.0)):
        rows = [
            row_of(key, seeds, values, next(iter(full.values())).num_epochs)
            for key, seeds in reports.items()
        ]
        rows.sort(
            key=lambda row: (-row["wanted"], row["mean"] if lower else -row["mean"], row["name"])
        )
    environments: list[dict[str, Any]] = []
    for report in found.values():
        if report.environment not in environments:
            environments.append(report.environment)
    content = {
        **settings,
        "tuning": tuned_rates([(run, report.metrics[metric]) for run, report in tuning], lower),
        "rows": rows,
        "targets": targets(rows, settings["targets"], lower),
        "environments": environments,
    }
    (study.folder / "summary.json").write_text(json.dumps(content, indent=2) + "\n")
    for name, text in tables(content).items():
        (study.folder / f"{name}.md").write_text(text + "\n")
    draw(study.folder, content, reports)
    return content


def draw(
    folder: Path,
    summary: dict[str, Any],
    reports: Mapping[tuple[str, float], dict[int, PruningReport]],
) -> None:
    """picture.png and targets.png, of all costs; of each picture_0.3.png and, how often its rules kept the samples,
    selection_0.3.png."""
    metric, better = summary["metric"], {"lower_is_better": summary["lower_is_better"]}
    full = next(
        (list(row["values"].values()) for row in summary["rows"] if row["name"] == FULL), []
    )
    points: dict[str, list[tuple[float, list[float]]]] = {}
    at: dict[float, dict[str, list[float]]] = {}
    choosing: dict[float, dict[str, list[PruningReport]]] = {}
    for row in summary["rows"]:
        of, seeds = list(row["values"].values()), list(reports[row["name"], row["wanted"]].values())
        if row["name"] != FULL:
            points.setdefault(row["name"], []).append((row["cost"], of))
            words = row["name"] if row["ranked"] else f"{row['name']}, at cost {row['cost']:.2f}"
            at.setdefault(row["wanted"], {})[words] = of
        if all(
            report.selection.get("choices", 0) > 1 and report.selection["always"] < 1
            for report in seeds
        ):
            choosing.setdefault(row["wanted"], {})[row["name"]] = seeds
    for cost, methods in at.items():
        plot_methods(methods, metric, full=full, baseline=SHORT, **better).savefig(
            folder / f"picture_{cost:g}.png", dpi=150
        )
    for cost, rules in choosing.items():
        best = islice(rules.items(), PANELS)  # the rows are sorted
        plot_selection(dict(best)).savefig(folder / f"selection_{cost:g}.png", dpi=100)
    lines = {
        name: of for name, of in points.items() if len(of) > 1
    } or points  # the others are in the picture of their cost
    if lines:
        plot_costs(lines, metric, full=full, baseline=SHORT, **better).savefig(
            folder / "picture.png", dpi=150
        )
    wanted = {
        t["value"]: {name: cost for name, cost in t["costs"].items() if name in lines}
        for t in summary["targets"]
    }
    if any(cost for costs in wanted.values() for cost in costs.values()):
        plot_targets(wanted, metric, baseline=SHORT).savefig(folder / "targets.png", dpi=150)


def tuned_rates(runs: Iterable[tuple[Run, float]], lower: bool) -> list[dict[str, Any]]:
    """Of each name and cost: (learning rate, mean) of those tried, the best, and whether it alone is, at their end."""
    tried: dict[tuple[float, str], dict[float, list[float]]] = {}
    for run, value in runs:
        assert run.rate is not None
        tried.setdefault((run.cost, run.name), {}).setdefault(run.rate, []).append(value)
    rows = []
    for (cost, name), at in sorted(tried.items(), reverse=True):
        means = {rate: statistics.mean(at[rate]) for rate in sorted(at)}
        finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)} or means
        chosen = (min if lower else max)(finite, key=finite.__getitem__)
        ends = (min(means), max(means))
        edge = chosen in ends and all(
            mean != means[chosen] for rate, mean in means.items() if rate != chosen
        )
        seeds = min(map(len, at.values()))
        rows.append(
            {
                "name": name,
                "cost": cost,
                "means": list(means.items()),
                "chosen": chosen,
                "edge": edge,
                "seeds": seeds,
            }
        )
    return rows


def chosen_rates(folder: Path) -> dict[tuple[str, float], float]:
    """The best learning rates that a study tuned, by name and cost."""
    if not (folder / "summary.json").is_file():
        raise ValueError(
            f"{folder} has no summary.json: wanted is the folder of a study that tuned learning rates."
        )
    tuning = json.loads((folder / "summary.json").read_text())["tuning"]
    return {(row["name"], row["cost"]): row["chosen"] for row in tuning}


def next_rate(rates: Collection[float], best: float) -> float:
    """Beyond the best of them, which is the lowest or the highest, by the ratio of the last two."""
    *_, neighbour, end = sorted(rates, reverse=best == min(rates))
    return float(f"{end * end / neighbour:.6g}")


def row_of(
    key: tuple[str, float],
    seeds: dict[int, PruningReport],
    values: Mapping[tuple[str, float], dict[int, float]],
    epochs: float,
) -> dict[str, Any]:
    name, wanted = key
    own = values[key]
    costs = [report.passes / (report.num_samples * epochs) for report in seeds.values()]
    seconds = [
        sum(s for phase, s in report.totals["seconds"].items() if phase != "evaluation")
        for report in seeds.values()
    ]
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
        "to_full_run": paired(own, values[FULL, 1.0]) if name != FULL else None,
        "to_short_run": paired(own, values[SHORT, wanted])
        if (SHORT, wanted) in values and name != SHORT
        else None,
        "to_random": paired(own, values[RANDOM, wanted])
        if (RANDOM, wanted) in values and name != RANDOM
        else None,
        "seconds": statistics.mean(seconds),
        "passes": statistics.mean(report.passes for report in seeds.values()),
        "values": own,
    }


def targets(
    rows: Sequence[dict[str, Any]], wanted: Sequence[float], lower: bool
) -> list[dict[str, Any]]:
    """For each value that is wanted (default: shares of the full run's, where methods have several costs) the cost at which
    each reaches it, on the line through its means, which ends at the full run; and whether its cheapest runs were better
    already."""
    full = next((row["mean"] for row in rows if row["name"] == FULL), None)
    several = len(rows) > len({row["name"] for row in rows})
    if full is None or not (wanted or several):
        return []
    found = []
    for value in wanted or [full / share if lower else full * share for share in SHARES]:
        costs = {}
        for name in {row["name"]: None for row in rows if row["name"] != FULL}:
            points = [(row["cost"], row["mean"]) for row in rows if row["name"] == name]
            costs[name] = reached([*points, (1.0, full)], value, lower)
        found.append({"value": value, "costs": costs})
    return found


def tables(summary: dict[str, Any]) -> dict[str, str]:
    """The summary as Markdown: table_0.3 and so on, of the methods at each cost; targets; tuning. What is empty is left
    out."""
    metric = summary["metric"]
    means = [row["mean"] for row in summary["rows"]]
    percent = in_percent(metric, means)
    scale, digits = (100, 2) if percent else (1, 2 if max(means, default=0.0) >= 10 else 4)

    def number(value: float, sign: str = "", digits: int = digits) -> str:
        return f"{scale * value:{sign}.{digits}f}"

    what = f"{metric.replace('_', ' ')}{' (%)' if percent else ''}"
    parts = {}
    for cost in sorted(
        {row["wanted"] for row in summary["rows"] if row["name"] != FULL}, reverse=True
    ):
        rows = [row for row in summary["rows"] if row["wanted"] == cost or row["name"] == FULL]
        parts[f"table_{cost:g}"] = table(rows, what, number)
    if summary["targets"]:
        values = [number(target["value"], digits=digits - 1) for target in summary["targets"]]
        names = sorted(
            summary["targets"][0]["costs"], key=lambda name: _first(summary["targets"], name)
        )
        cells = [
            [name, *(_cost(target["costs"][name]) for target in summary["targets"])]
            for name in names
        ]
        parts["targets"] = _markdown([f"cost at which {what} is", *values], cells)
    if summary["tuning"]:
        rates = sorted({rate for row in summary["tuning"] for rate, _ in row["means"]})
        cells = []
        for row in summary["tuning"]:
            shown = {
                rate: f"**{number(mean)}**" if rate == row["chosen"] else number(mean)
                for rate, mean in row["means"]
            }
            cells.append(
                [f"{row['name']}, cost {row['cost']:g}", *(shown.get(rate, "") for rate in rates)]
            )
        parts["tuning"] = _markdown(
            [f"{what} on data held out, at learning rate", *(f"{rate:g}" for rate in rates)], cells
        )
    return parts


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    )


def _first(targets: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [
        math.inf if target["costs"][name] is None else target["costs"][name][0]
        for target in targets
    ]


def _cost(found: tuple[float, bool] | None) -> str:
    return "not reached" if found is None else f"{'≤ ' if found[1] else ''}{found[0]:.2f}"


def table(rows: Sequence[dict[str, Any]], heading: str, number: Callable[..., str]) -> str:
    """The best of each cost first; what is not ranked stands behind, in brackets."""

    def difference(found: dict[str, Any] | None) -> str:
        if found is None:
            return ""
        mean, interval = number(found["mean"], "+"), found["interval"]
        return (
            mean
            if interval is None
            else f"{mean} ({number(interval[0], '+')} to {number(interval[1], '+')})"
        )

    shown = []
    for row in sorted(rows, key=lambda row: (-row["wanted"], not row["ranked"])):
        spread = "" if row["deviation"] is None else f" ± {number(row['deviation'])}"
        shown.append(
            [
                row["name"] if row["ranked"] else f"({row['name']})",
                f"{row['cost']:.3f}",
                number(row["mean"]) + spread,
                difference(row["to_short_run"]),
                difference(row["to_random"]),
                f"{row['seconds']:,.0f}",
                str(row["seeds"]),
            ]
        )
    return _markdown(
        ["method", "cost", heading, "to the short run", "to random", "seconds", "seeds"], shown
    )


# ---- command line --------------------------------------------------------------------------------


def note(study: Study, options: argparse.Namespace) -> None:
    """In study.json: what the runs have in common, and the commands.

    Raises:
        ValueError: if the folder has a study of another recipe.
    """
    file = study.folder / "study.json"
    noted = {
        "recipe": study.portable(study.recipe),
        "metric": options.metric,
        "lower_is_better": options.lower_is_better,
    }
    before = json.loads(file.read_text()) if file.exists() else {}
    for name, value in noted.items():
        if before.get(name, value) != value:
            raise ValueError(
                f"{study.folder} has a study with {name} {before[name]}, wanted is {value}: choose another --output_dir."
            )
    study.folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *study.portable(sys.argv)])
    commands = [*(known for known in before.get("commands", []) if known != command), command]
    file.write_text(
        json.dumps({**noted, "targets": options.targets, "commands": commands}, indent=2) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--rules", nargs="*", default=["random", "epsilon-greedy", "ucb"], help="see above"
    )
    parser.add_argument(
        "--scores", nargs="*", default=[], help=f"for static pruning: {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--costs", type=float, nargs="+", default=[0.3], help="in (0, 1), of the full run"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="*",
        default=[],
        help="to choose from; default: the recipe's",
    )
    parser.add_argument(
        "--rates_of",
        type=Path,
        help="folder of the study that chose the learning rates, in place of tuning",
    )
    parser.add_argument(
        "--tune",
        choices=("each", "first"),
        default="each",
        help="each rule, or the first for all rules",
    )
    parser.add_argument(
        "--tuning_seeds", type=int, nargs="+", default=[0], help="of the runs that tune"
    )
    parser.add_argument(
        "--validation_share",
        type=float,
        default=0.1,
        help="of the training data, held out for tuning",
    )
    parser.add_argument("--metric", default="eval_accuracy", help="of the last evaluation")
    parser.add_argument("--lower_is_better", action="store_true")
    parser.add_argument(
        "--targets",
        type=float,
        nargs="*",
        default=[],
        help="values of the metric that methods are to reach",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at once, which share cores, or take a GPU each; their seconds are then those of a machine that is shared",
    )
    arguments = sys.argv[1:]
    own = arguments.index("--") if "--" in arguments else len(arguments)
    options, recipe = parser.parse_args(arguments[:own]), arguments[own + 1 :]
    try:
        study = Study(options.output_dir, recipe, options.jobs)
        if recipe or not (study.folder / "study.json").exists():
            check(options, recipe)
            note(study, options)
            Sitting(options, study).carry_out()
        summary = summarise(study)
    except (ValueError, TypeError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(*tables(summary).values(), sep="\n\n")
    for row in summary["tuning"]:
        if row["edge"]:
            where = f"{row['name']}, cost {row['cost']:g}"
            print(
                f"{where}: the best learning rate, {row['chosen']:g}, is the lowest or highest of those tried. Try more."
            )
    print(
        f"Written to {options.output_dir}: summary.json, tables, pictures, and a folder for each run."
    )


def check(options: argparse.Namespace, recipe: Sequence[str]) -> None:
    """What can be known to be wrong before anything runs."""
    if not recipe or not Path(recipe[0]).is_file():
        raise ValueError(
            f"{''.join(recipe[:1]) or 'nothing'} is no recipe: wanted is -- recipes/cifar.py, say, and its options."
        )
    if len(set(options.learning_rates)) == 1 or min(options.learning_rates, default=1) <= 0:
        raise ValueError(
            f"--learning_rates {options.learning_rates}: wanted are several above 0 to choose from, or none."
        )
    if options.rates_of is not None:
        if options.learning_rates:
            raise ValueError(
                "--rates_of takes rates, --learning_rates tries them: leave out one of them."
            )
        first = str(Rule.parse(options.rules[0], 0.5)) if options.rules else SHORT
        known = chosen_rates(options.rates_of)
        wanted = [(FULL, 1.0), *((name, cost) for cost in options.costs for name in (SHORT, first))]
        if missing := [
            f"{name} at cost {cost:g}" for name, cost in wanted if (name, cost) not in known
        ]:
            raise ValueError(
                f"{options.rates_of} has no learning rates of {', '.join(missing)}: tune them there."
            )
    for cost in options.costs:
        if not 0 < cost < 1:
            raise ValueError(
                f"--costs {cost:g} is out of range: wanted is a share of the full run, in (0, 1)."
            )
        for text in options.rules:
            Rule.parse(text, cost)
    for text in options.scores:
        if own_options(text)[0] not in METHODS:
            raise ValueError(
                f"--scores {text}: wanted are some of {', '.join(METHODS)}, with options of the recipe behind."
            )


if __name__ == "__main__":
    main()
