"""What the benchmarks share: measuring in turns, the interval of a ratio, the table and the file."""

import json
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


def in_turns(what: Mapping[str, Callable[[], Any]], rounds: int, description: str = "rounds") -> dict[str, list[Any]]:
    """What each function returns, `rounds` times; every other round in reverse order, so that what changes with time
    (heat, caches, other programs) falls on all alike."""
    results: dict[str, list[Any]] = {name: [] for name in what}
    for number in trange(rounds, desc=description):
        for name in list(what) if number % 2 == 0 else reversed(list(what)):
            results[name].append(what[name]())
    return results


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
    half = stats.t.ppf(0.975, len(ratios) - 1) * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None
    mean = statistics.mean(ratios)
    return {"ratio": mean, "ratio_95": None if half is None else [mean - half, mean + half], "ratios": ratios}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def report(
    title: str, rows: Sequence[Mapping[str, Any]], shown: Mapping[str, str], output: Path | None, **about: Any
) -> None:
    """Prints a table of the rows, and writes them with versions and hardware, if there is an output.

    Args:
        rows: JSON values.
        shown: the columns that are printed, each with its format, such as `{"ratio": ".3f", "N": ",d"}`.
        about: more of the whole benchmark, JSON values.
    """
    cells = [
        {name: "" if row.get(name) is None else format(row[name], form) for name, form in shown.items()} for row in rows
    ]
    print(f"{title}\n{pandas.DataFrame(cells).to_string(index=False)}")
    if output:
        content = {"title": title, **about, "rows": list(rows), "environment": describe_environment(ranks=1)}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=2) + "\n")
