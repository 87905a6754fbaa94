"""What the benchmarks share: measuring in turns, the interval of a ratio, the table and the file."""

import argparse
import json
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

from hf_dynprune.report import describe_environment


def in_turns(
    what: Mapping[str, Callable[[], Any]], rounds: int, description: str = "rounds"
) -> dict[str, list[Any]]:
    """What each function returns, `rounds` times; every other round in reverse order, so that what changes with time
    (heat, caches, other programs) falls on all alike."""
    results: dict[str, list[Any]] = {name: [] for name in what}
    for number in trange(rounds, desc=description):
        for name in list(what) if number % 2 == 0 else reversed(list(what)):
            results[name].append(what[name]())
    return results


def apart(function: Callable[..., Any], *task: Any) -> Any:
    """What the function returns in a fresh process, whose memory, its peak and its layout, is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, task)


def step_by_step(runs: Mapping[str, Callable[[Callable[[], None]], Any]]) -> dict[str, Any]:
    """What functions return that run in turns, a step at a time, each in a thread; the first of them begins.

    Each is called with a function, to be called at the end of each step, which returns when it has its turn again. So the
    unrest of a machine, which changes within seconds, falls on all alike.
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


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, Any]:
    """Of values measured in pairs: the mean of their ratios and its 95 % confidence interval, by Student's t."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    half = (
        stats.t.ppf(0.975, len(ratios) - 1) * statistics.stdev(ratios) / len(ratios) ** 0.5
        if len(ratios) > 1
        else None
    )
    mean = statistics.mean(ratios)
    return {
        "ratio": mean,
        "ratio_95": None if half is None else [mean - half, mean + half],
        "ratios": ratios,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def report(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    shown: Mapping[str, str],
    options: argparse.Namespace,
) -> None:
    """Prints a table of the rows; writes them with options, versions and hardware to `options.output`, if that is given.

    Args:
        rows: JSON values.
        shown: the columns that are printed, each with its format, such as `{"ratio": ".3f", "N": ",d"}`.
    """
    cells = [
        {
            name: "" if row.get(name) is None else format(row[name], form)
            for name, form in shown.items()
        }
        for row in rows
    ]
    print(f"{title}\n{pandas.DataFrame(cells).to_string(index=False)}")
    if options.output:
        given = {name: value for name, value in vars(options).items() if name != "output"}
        # Where data lie on this machine is of no use to others.
        given |= {name: Path(given[name]).name for name in ("dataset", "jpeg") if given.get(name)}
        content = {
            "title": title,
            "options": given,
            "rows": list(rows),
            "environment": describe_environment(ranks=1),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=2) + "\n")
