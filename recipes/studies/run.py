"""Carries out a study: each run is a program of its own, several at a time, and resumable."""

import json
import os
import queue
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_dynprune import PruningReport, RunShape
from hf_dynprune.files import REPORT_FILE, SCORES_FILE, save_json

from .plan import FULL, Key, Plan, Run, Setting, full_run, scores_run, static_names, static_runs
from .summarise import RUN_FILE, STUDY_FILE, best_settings, chosen_settings, next_rate, summarise

MOST_RATES = 4  # that tuning adds to the given ones, at each batch size
LOG_FILE = "log.txt"


class Study:
    """The runs of one recipe.

    Each run has a folder with report.json, log.txt and, once it is finished, run.json.

    Args:
        folder: The folder of the study.
        recipe: The recipe and the options of all runs.
        jobs: How many runs go on at once. They share the cores, or take one GPU each.

    Raises:
        ValueError: If `jobs` is less than 1.
    """

    def __init__(self, folder: Path, recipe: Sequence[str] = (), jobs: int = 1) -> None:
        if jobs < 1:
            raise ValueError(f"--jobs {jobs} is out of range: expected at least 1.")
        self.folder, self.recipe, self.jobs = folder, list(recipe), jobs
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)
        self.environment = dict(os.environ)
        if jobs > 1 and not torch.cuda.is_available():
            cores = max(1, len(os.sched_getaffinity(0)) // jobs)
            self.environment.setdefault("OMP_NUM_THREADS", str(cores))

    def portable(self, command: Iterable[str]) -> list[str]:
        """The command without paths of this machine, as it is published.

        Data and models outside the working directory keep their names. The folder of the study
        is left out.
        """

        def portable(word: str) -> str:
            option, equals, value = (
                word.rpartition("=") if word.startswith("--") else ("", "", word)
            )
            value = value.replace(f"{self.folder}/", "")
            path = Path(value)
            is_path = len(value) < 1000 and path.exists()  # JSON can be too long for a path
            if is_path and not path.resolve().is_relative_to(Path.cwd()):
                value = path.resolve().name
            return option + equals + value

        return [portable(word) for word in command]

    def note(self, settings: dict[str, Any], targets: Sequence[float], command: list[str]) -> None:
        """Write study.json: the recipe, settings that all commands must share, and the commands.

        The folder is made.

        Raises:
            ValueError: If the folder has a study with another recipe or other settings.
        """
        file = self.folder / STUDY_FILE
        noted = {"recipe": self.portable(self.recipe), **settings}
        before = json.loads(file.read_text()) if file.exists() else {}
        for name, value in noted.items():
            if before.get(name, value) != value:
                raise ValueError(
                    f"{self.folder} has a study with the {name} {before[name]}, expected {value}: "
                    "choose another --output_dir."
                )
        self.folder.mkdir(parents=True, exist_ok=True)  # `portable` leaves out only what exists
        words = shlex.join(self.portable(command))
        commands = [*(known for known in before.get("commands", []) if known != words), words]
        save_json(file, {**noted, "targets": targets, "commands": commands})

    def is_finished(self, run: Run) -> bool:
        return (self.folder / run.folder / RUN_FILE).exists()

    def report(self, run: Run) -> PruningReport:
        return PruningReport.load(self.folder / run.folder / REPORT_FILE)

    def finish(self, run: Run, result: str = REPORT_FILE) -> Path:
        """Start the run unless it is finished, and wait for it.

        Args:
            run: The run.
            result: The file that tells that an earlier sitting finished it.

        Returns:
            The folder of the run.

        Raises:
            ValueError: If its folder has a run with other options.
            RuntimeError: If the run fails. The message has the end of its log.
        """
        folder = self.folder / run.folder
        options = [f"--{name}={value}" for name, value in {**run.options, "seed": run.seed}.items()]
        command, noted = [*self.recipe, *options], folder / RUN_FILE
        record = {**run.record(), "command": self.portable(command)}
        if noted.exists():
            before = json.loads(noted.read_text())
            if before != record:
                raise ValueError(
                    f"{folder} has the run {before}, expected {record}: choose another "
                    "--output_dir, or delete that folder."
                )
            if (folder / result).exists():
                return folder
        folder.mkdir(parents=True, exist_ok=True)
        status = self._start(command, folder)
        if status != 0:
            end = "\n".join((folder / LOG_FILE).read_text().splitlines()[-15:])
            raise RuntimeError(
                f"{run.name}, seed {run.seed}, ended with status {status}. The end of "
                f"{folder / LOG_FILE}:\n{end}"
            )
        save_json(noted, record)
        return folder

    def _start(self, command: Sequence[str], folder: Path) -> int:
        """Run the program once a slot is free, and return its status."""
        program = [sys.executable, *command, f"--output_dir={folder}", "--overwrite=True"]
        slot, environment = self.slots.get(), dict(self.environment)
        try:
            if torch.cuda.device_count() > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
            with open(folder / LOG_FILE, "w") as log:
                options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
                return subprocess.run(program, **options).returncode
        finally:
            self.slots.put(slot)


class Sitting:
    """Carries out what is left of a plan. Its progress bar counts full runs."""

    def __init__(self, plan: Plan, study: Study) -> None:
        self.plan, self.study = plan, study
        self.pool = ThreadPoolExecutor(study.jobs)
        self.started: dict[Run, Future[Path]] = {}
        self.waiting: dict[Future[Path], tuple[Run, float]] = {}  # with the run's units of the bar
        scores = [scores_run(text, seed) for text, seed in self._missing_scores()]
        self.counted = {*plan.without_options(), *scores}
        total = sum(map(self._units, self.counted))
        self.bar = tqdm(unit=" full runs", desc="study", total=total)

    def carry_out(self) -> None:
        try:
            self._compare(self._tune())
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.bar.close()

    def start(self, run: Run, result: str = REPORT_FILE) -> Future[Path]:
        """Start the run once: two programs must not write into one folder."""
        if run not in self.started:
            units = self._units(run)
            if run not in self.counted:
                self.bar.total += units
            self.started[run] = self.pool.submit(self.study.finish, run, result)
            self.waiting[self.started[run]] = run, units
        return self.started[run]

    def wait(self, futures: Iterable[Future[Path]] | None = None) -> None:
        """Wait for these runs, by default for all. Renew the summary with each finished run."""
        left = set(self.waiting if futures is None else futures)
        while left:
            future = next(as_completed([*self.waiting, *left]))
            left.discard(future)
            future.result()
            run, units = self.waiting.pop(future, (None, 0.0))
            if run is not None and units:
                words = f"{run.name} {run.cost:g}, seed {run.seed} finished"
                self.bar.set_postfix_str(words, refresh=False)
                self.bar.update(units)
                summarise(self.study.folder)

    def _units(self, run: Run) -> float:
        """What is left of the run, in full runs. Making scores is assumed to cost one."""
        return 0.0 if self.study.is_finished(run) else run.cost or 1.0

    def _missing_scores(self) -> Iterator[tuple[str, int]]:
        """The scores that unfinished static pruning needs: (method, seed)."""
        for text, seed in product(self.plan.scores, self.plan.seeds):
            pruned = [Run(*key, seed) for key in product(static_names(text), self.plan.costs)]
            if not all(map(self.study.is_finished, pruned)):
                yield text, seed

    def _first(self, runs: Sequence[Run]) -> RunShape:
        """Start full runs and wait for the first one, which tells the shape of all full runs."""
        futures = [self.start(run) for run in runs]
        self.wait(futures[:1])
        report = self.study.report(runs[0])
        return RunShape(report.num_samples, num_epochs=report.num_epochs)

    def _tune(self) -> dict[Key, Setting]:
        """Find the best learning rates: try more until a worse one stands on either side.

        Of several batch sizes each is tuned so, and the best one is taken.
        """
        plan = self.plan
        if plan.rates_of is not None:
            return chosen_settings(plan.rates_of)
        if not plan.learning_rates:
            return {}

        def at(setting: Setting, run: Run) -> Run:
            options = {"validation_share": plan.validation_share, **setting.options}
            return replace(run, **setting._asdict(), options={**run.options, **options})

        runs = [full_run(seed) for seed in plan.tuning_seeds]
        full = self._first([at(setting, run) for run in runs for setting in plan.settings_of(FULL)])
        for seed, cost in product(plan.tuning_seeds, plan.costs):
            runs += [method.run(cost, seed, full) for method in plan.tuned_methods(cost)]
        keys = {run.key for run in runs}
        left = {(name, cost): plan.settings_of(name) for name, cost in keys}
        found: dict[Key, Setting] = {}
        for _ in range(1 + MOST_RATES):
            for run in runs:
                for setting in left.get(run.key, ()):
                    self.start(at(setting, run))
            self.wait()
            summary = summarise(self.study.folder)
            rows = [row for row in summary["tuning"] if (row["name"], row["cost"]) in keys]
            found = best_settings(rows, summary["lower_is_better"])
            left = {}
            for row in rows:
                if row["edge"]:
                    rate = next_rate([rate for rate, _ in row["means"]], row["chosen"])
                    beyond = Setting(rate, row.get("batch_size"))
                    left.setdefault((row["name"], row["cost"]), []).append(beyond)
            if not left:
                break
        return found

    def _compare(self, tuned: Mapping[Key, Setting]) -> None:
        """Make the runs that are compared, at the settings that were tuned, if any."""
        plan = self.plan
        options = tuned[FULL, 1.0].options if tuned else {}
        scores = {
            (text, seed): self.start(scores_run(text, seed, **options), SCORES_FILE)
            for text, seed in self._missing_scores()
        }
        fulls = [plan.at_best_setting(full_run(seed), tuned) for seed in plan.seeds]
        full = self._first(fulls[: self.study.jobs])  # no job is idle while the first one runs
        # Seed by seed: a study that is stopped early has complete seeds, which can be compared.
        for seed, of_seed in zip(plan.seeds, fulls, strict=True):
            self.start(of_seed)
            for cost in plan.costs:
                for method in plan.methods(cost):
                    self.start(plan.at_best_setting(method.run(cost, seed, full), tuned))
        for (text, seed), future in scores.items():
            self.wait([future])
            for cost in plan.costs:
                for run in static_runs(text, cost, seed, full, future.result() / SCORES_FILE):
                    self.start(plan.at_best_setting(run, tuned))
        self.wait()
