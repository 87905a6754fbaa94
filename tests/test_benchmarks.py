"""The benchmarks run, at small sizes. Their files say what they measure. No test is about time."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
from programs import python

from recipes.benchmarks import measure

ROOT = Path(__file__).parents[1]

# script -> (options of a run that is as small as possible, the column that names a row)
BENCHMARKS = {
    "overhead": ("--models bert --pairs 2 --steps 5", "model"),
    "throughput": ("--rounds 1 --samples 512 --batch_size 64", "path"),
    "choosing": ("--sizes 3000 --rounds 1 --policies ucb kakurenbo", "policy"),
    "exchange": ("--ranks 2 --sizes 3000 --rounds 2", "way"),
    "packing": (
        "--rounds 1 --samples 16 --max_length 32 --layouts padded padding-free packed",
        "layout",
    ),
    "reading": ("--rows 3000 --tokens 4 --batches 2 --rounds 1 --workers 0 1", "order"),
    "scale": ("--sizes 3000 20000 --ranks 4 --extrapolate 1e6", "role"),
    "sharded": ("--ranks 2 --sizes --rounds 1 --extrapolate 1e6", "way"),
    "scoring": ("--rounds 1 --samples 256 --models resnet8_cifar bert", "model"),
    "startup": ("--rounds 1 --samples 3000", "what"),
}


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for entry in value for number in numbers(entry)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("script", BENCHMARKS)
def test_a_benchmark_writes_what_it_prints(script, tmp_path):
    options, name = BENCHMARKS[script]
    file = tmp_path / "result.json"
    program = ROOT / f"recipes/benchmarks/{script}.py"
    done = python(program, *options.split(), "--output", file)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["rows"]
    assert result["environment"]["versions"]["torch"]
    for row in result["rows"]:
        assert str(row[name]) in done.stdout
        assert all(math.isfinite(number) for number in numbers(row))


def test_every_benchmark_is_run():
    scripts = {path.stem for path in (ROOT / "recipes/benchmarks").glob("*.py")}
    # test_advice.py and test_gpu.py run the others.
    assert scripts == {*BENCHMARKS, "advice", "gpu", "gpu_checks", "measure", "engine_settings"}


def test_runs_take_turns_step_by_step():
    seen = []

    def run(name, steps, pass_on):
        for step in range(steps):
            seen.append(f"{name}{step}")
            pass_on()
        return steps

    lengths = {"a": 2, "b": 4, "c": 3}
    runs = {name: lambda pass_on, name=name: run(name, lengths[name], pass_on) for name in lengths}
    assert measure.step_by_step(runs) == lengths
    assert seen == ["a0", "b0", "c0", "a1", "b1", "c1", "b2", "c2", "b3"]
    assert measure.step_by_step({}) == {}


def test_a_run_that_fails_stops_no_other():
    def fail(pass_on):
        pass_on()
        raise ValueError("a step failed")

    ended = []

    def run(pass_on):
        for _ in range(3):
            pass_on()
        ended.append(True)

    with pytest.raises(ValueError, match="a step failed"):
        measure.step_by_step({"fails": fail, "runs": run})
    assert ended == [True]


def test_every_other_round_is_in_reverse_order():
    seen = []

    def turn(name):
        seen.append(name)
        return len(seen)

    found = measure.in_turns({name: partial(turn, name) for name in "ab"}, 3)
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_the_interval_of_a_ratio():
    found = measure.ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert found["ratio"] == 2
    # t = 4.3027 with 2 degrees of freedom.
    assert found["ratio_95"] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-4)
    assert measure.ratio([3.0], [2.0])["ratio_95"] is None
