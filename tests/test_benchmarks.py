"""The benchmarks run, small: what they measure is in their files, and no test is about time."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# script -> (options of a run as small as can be, what a row names)
BENCHMARKS = {
    "overhead": ("--models bert resnet8_cifar --pairs 2 --steps 5", "model"),
    "throughput": ("--rounds 2 --samples 512 --batch_size 64", "path"),
    "choosing": ("--sizes 3000 --rounds 2", "policy"),
    "exchange": ("--ranks 2 --sizes 3000 --rounds 2", "way"),
    "scale": ("--sizes 3000 20000 --ranks 4 --wanted 1e6", "role"),
    "scoring": ("--rounds 2 --samples 256", "model"),
    "startup": ("--rounds 2 --samples 3000", "what"),
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
    done = subprocess.run(
        [sys.executable, ROOT / f"recipes/benchmarks/{script}.py", *options.split(), "--output", file],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["rows"]
    assert result["environment"]["versions"]["torch"]
    for row in result["rows"]:
        assert str(row[name]) in done.stdout
        assert all(math.isfinite(number) for number in numbers(row))


def test_every_benchmark_is_run():
    scripts = {path.stem for path in (ROOT / "recipes/benchmarks").glob("*.py")}
    assert scripts == {*BENCHMARKS, "advice", "measure"}  # advice is run by test_advice
