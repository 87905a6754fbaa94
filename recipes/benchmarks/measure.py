"""Shared by the benchmarks: measuring in turns, the interval of a ratio, the table, the file."""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import Any

import pandas
from scipy import stats
from tqdm import trange

from hf_dynprune.files import save_json
from hf_dynprune.report import describe_environment


def in_turns(
    what: Mapping[str, Callable[[], Any]], rounds: int, description: str = "rounds"
) -> dict[str, list[Any]]:
    """Call each function `rounds` times and return what it returned.

    Every other round is in reverse order, so that changes over time (heat, caches, other programs)
    affect all functions alike.
    """
    results: dict[str, list[Any]] = {name: [] for name in what}
    for number in trange(rounds, desc=description):
        for name in list(what) if number % 2 == 0 else reversed(list(what)):
            results[name].append(what[name]())
    return results


def apart(function: Callable[..., Any], *task: Any) -> Any:
    """Call the function in a fresh process, which has its own memory layout and peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, task)


def step_by_step(runs: Mapping[str, Callable[[Callable[[], None]], Any]]) -> dict[str, Any]:
    """Run functions in turns, one step at a time, and return what they returned.

    The speed of a machine changes within seconds. This way the changes affect all runs alike.

    Args:
        runs: Each runs in a thread, the first one begins. It is called with a function that it
            must call at the end of each step. That call returns when it is its turn again.
    """
    if not runs:
        return {}
    waiting = {name: Semaphore(0) for name in runs}
    running = list(runs)

    def pass_on(name: str) -> None:
        following = running[(running.index(name) + 1) % len(running)]
        if following != name:
            waiting[following].release()
            waiting[name].acquire()

    def run(name: str) -> Any:
        waiting[name].acquire()
        try:
            return runs[name](lambda: pass_on(name))
        finally:
            following = running[(running.index(name) + 1) % len(running)]
            running.remove(name)
            waiting[following].release()

    with ThreadPoolExecutor(len(runs)) as pool:
        results = {name: pool.submit(run, name) for name in runs}
        waiting[running[0]].release()
        return {name: result.result() for name, result in results.items()}


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """The mean ratio of values measured in pairs, and its 95 % interval by Student's t."""
    ratios = [a / b for a, b in zip(values, base, strict=True)]
    mean, interval = statistics.mean(ratios), None
    if len(ratios) > 1:
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        half = stats.t.ppf(0.975, len(ratios) - 1) * error
        interval = [mean - half, mean + half]
    return {"ratio": mean, "ratio_95": interval, "ratios": ratios}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median, the lowest and the highest value."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def report(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    shown: Mapping[str, str],
    options: argparse.Namespace,
) -> None:
    """Print a table of the rows. Write them to `options.output`, if given, as JSON.

    The file also has the options, versions and hardware.

    Args:
        title: The heading of the table.
        rows: JSON values.
        shown: The printed columns with their formats, such as `{"ratio": ".3f", "N": ",d"}`.
        options: The options of the benchmark.
    """
    table = pandas.DataFrame(rows, columns=list(shown), dtype=object)
    for name, form in shown.items():
        table[name] = ["" if pandas.isna(value) else format(value, form) for value in table[name]]
    print(f"{title}\n{table.to_string(index=False)}")
    if options.output:
        given = {name: value for name, value in vars(options).items() if name != "output"}
        # Paths of this machine are of no use to others.
        given |= {name: Path(given[name]).name for name in ("dataset", "jpeg") if given.get(name)}
        content = {"title": title, "options": given, "rows": list(rows)}
        save_json(options.output, {**content, "environment": describe_environment(ranks=1)})
