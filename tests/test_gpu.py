"""The command `make gpu`, at tiny sizes on a CPU. test_devices.py has tests for a GPU."""

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import python

from hf_dynprune.vision import ImageCache
from recipes.benchmarks import gpu

PROGRAM = Path(gpu.__file__)


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    return import_module("gpu_checks")


def command(file):
    return python(PROGRAM, "--device", "cpu", "--output", file)


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """The ended command, and the record that it wrote."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    return command(file), file


def missing(name):
    return [module for module in gpu.CHECKS[name].needs if find_spec(module) is None]


def test_each_check_runs_and_writes_its_result(called):
    done, file = called
    assert done.returncode == 0, done.stdout + done.stderr
    record = gpu.read(file)
    assert set(record) == set(gpu.CHECKS)
    for name, entry in record.items():
        assert (entry["state"], entry["gpus"]) == ("not run" if missing(name) else "passed", 0)
        assert all(module in entry["result"] for module in missing(name))
    assert record["ddp"]["figures"]["ranks"] == 2
    for row in record["bill"]["figures"]["bert"].values():
        assert 0.25 < row["cost"] < 0.4, "the runs trained 30 % of the data"
    paths = [row["path"] for row in record["images"]["figures"]["rows"]]
    assert paths[:2] == ["bare loop", "stock Trainer"]
    assert set(record["waits"]["figures"]) == {"bert, copies do not wait"}
    assert gpu.render(record) == gpu.render({}), "a CPU's results are not those of a GPU"


def test_a_call_continues_where_the_last_one_stopped(called):
    _, file = called
    before = gpu.read(file)
    # As if it had been stopped before this check.
    file.write_text(json.dumps({name: before[name] for name in before if name != "images"}))
    assert command(file).returncode == 0
    after = gpu.read(file)
    again = {name for name in after if after[name] != before[name]}
    assert "images" in again
    assert again <= {"images", *filter(missing, gpu.CHECKS)}
    assert after["images"]["state"] == "passed"


def entry(state, device="one", gpus=1):
    return {
        "state": state,
        "result": f"it {state}",
        "gpus": gpus,
        "environment": {"device": device},
    }


@pytest.fixture
def called_here(monkeypatch, tmp_path, capsys):
    """A function: `main` in this process, with the checks that it starts and what it prints."""
    file = tmp_path / "gpu.json"

    def call(record=None, results=None, device="one", minutes=25):
        started = []

        def start(name, options, seconds):
            started.append(name)
            if result := (results or {}).get(name):
                gpu.note(file, name, {"state": result, "result": result})

        if record is not None:
            file.write_text(json.dumps(record))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device is not None)
        monkeypatch.setattr(gpu, "describe_environment", lambda: {"device": device})
        monkeypatch.setattr(gpu, "start_check", start)
        monkeypatch.setattr(
            sys, "argv", ["gpu.py", "--output", str(file), "--minutes", str(minutes)]
        )
        status = gpu.main()
        return SimpleNamespace(
            status=status, started=started, out=capsys.readouterr().out, file=file
        )

    return call


def test_without_a_gpu_nothing_is_run_or_written(called_here):
    call = called_here(device=None)
    assert (call.status, call.started, call.file.exists()) == (0, [], False)
    assert len(call.out.splitlines()) == 1


def test_what_was_not_tried_comes_before_what_failed(called_here):
    first, second, third, fourth, *rest = gpu.CHECKS
    record = {
        first: entry("failed"),
        second: entry("passed"),
        third: entry("passed", device="another"),
        fourth: entry("not run"),
    }
    assert called_here(record).started == [*rest, first, third, fourth]
    assert called_here(record, minutes=0).started == []


def test_the_status_says_whether_a_check_failed_or_is_left(called_here):
    passed = dict.fromkeys(gpu.CHECKS, entry("passed"))
    assert called_here(passed).status == 0
    (name, *_) = gpu.CHECKS
    assert called_here({**passed, name: entry("not run")}).status == 0
    call = called_here({**passed, name: entry("failed")}, results={name: "failed"})
    assert (call.status, call.started) == (1, [name])
    del passed[name]
    call = called_here(passed)
    assert call.status == 1
    assert name in call.out
    assert called_here(passed, results={name: "passed"}).status == 0


@pytest.mark.parametrize(
    ("script", "seconds", "limit", "noted"),
    [
        ("raise SystemExit(3)", 60, 60, "3"),
        ("import time; time.sleep(600)", 1, 1, "1 s"),
        ("import time; time.sleep(600)", 1, 60, None),  # the command's time was up
    ],
)
def test_a_check_that_dies_or_hangs_is_noted(
    script, seconds, limit, noted, monkeypatch, tmp_path, capsys
):
    program, file = tmp_path / "program.py", tmp_path / "gpu.json"
    program.write_text(script)
    monkeypatch.setattr(gpu, "__file__", str(program))
    monkeypatch.setattr(gpu, "LIMIT", limit)
    gpu.start_check("ddp", SimpleNamespace(device="cpu", output=file), seconds)
    record = gpu.read(file)
    assert set(record) == ({"ddp"} if noted else set())
    if noted:
        assert record["ddp"]["state"] == "failed"
        assert noted in record["ddp"]["result"]


def test_a_check_that_fails_is_noted_with_its_message(checks, monkeypatch, tmp_path, capsys):
    def fails(folder):
        checks.expect(False, "7 waits beside 3")

    assert set(checks.RUNS) == set(gpu.CHECKS)
    monkeypatch.setitem(checks.RUNS, "waits", fails)
    monkeypatch.setitem(gpu.CHECKS, "liger", gpu.Check("words", ("no_such_module",)))
    for name in ("waits", "liger"):
        gpu.run_check(name, tmp_path / "gpu.json")
    record = gpu.read(tmp_path / "gpu.json")
    assert record["waits"]["state"] == "failed"
    assert "7 waits beside 3" in record["waits"]["result"]
    assert record["liger"]["state"] == "not run"
    assert "no_such_module" in record["liger"]["result"]


def test_one_gpu_is_shown_to_a_check_of_one_process(monkeypatch, tmp_path):
    program, seen = tmp_path / "program.py", tmp_path / "seen"
    program.write_text(f"import os; open({str(seen)!r}, 'w').write(os.environ[{VISIBLE!r}])")
    monkeypatch.setattr(gpu, "__file__", str(program))
    monkeypatch.setenv(VISIBLE, "2,3")
    for name, visible in (("waits", "2"), ("ddp", "2,3")):
        gpu.start_check(name, SimpleNamespace(device="cuda", output=tmp_path / "gpu.json"), 60)
        assert seen.read_text() == visible


VISIBLE = "CUDA_VISIBLE_DEVICES"


def test_the_table_shows_what_happened():
    ours = {"ddp": entry("passed"), "steps": entry("failed"), "zero": entry("not run")}
    ours["waits"] = entry("passed", gpus=0)
    lines = dict(zip(gpu.CHECKS, gpu.render(ours).splitlines()[2:], strict=True))
    assert lines["ddp"].endswith("| 1 × one | it passed |")
    assert "**failed**" in lines["steps"]
    assert lines["zero"].endswith("| not run: it not run |")
    for name in set(gpu.CHECKS) - set(ours) | {"waits"}:
        assert lines[name].endswith("| not run |")


def test_runs_that_differ_are_told_apart(checks):
    run = {"times kept": [1, 2], "scores": [1.0, 2.0], "losses": [3.0]}
    assert checks.same(run, run)["differences"] == {"scores": 0, "losses": 0}
    for name, other in (
        ("times kept", [2, 1]),
        ("scores", [1.0, 2.01]),
        ("losses", [3.1]),
        ("losses", [3.0, 3.0]),
        ("scores", [1.0, float("nan")]),
    ):
        with pytest.raises(AssertionError):
            checks.same({**run, name: other}, run)


def test_images_on_the_device_are_windows_of_the_padded_ones(checks):
    held = checks.HeldImages(3, torch.device("cpu"))
    padded = torch.nn.functional.pad(held.images, [held.shift] * 4)
    plain = ImageCache(held.images, held.labels, mean=held.mean, std=held.std)
    batch = held.__getitems__([2, 0, 2])
    assert batch["labels"].tolist() == held.labels[[2, 0, 2]].tolist()
    places = set()
    for sample, image in zip([2, 0, 2], batch["pixel_values"], strict=True):
        places |= {
            (sample, top, left, mirrored)
            for top in range(2 * held.shift + 1)
            for left in range(2 * held.shift + 1)
            for mirrored in (False, True)
            if torch.allclose(image, shown(plain, padded[sample], top, left, mirrored), atol=1e-5)
        }
    assert [place[0] for place in sorted(places)] == [0, 2, 2]


def shown(cache, image, top, left, mirrored):
    """A window of an image, as the cache normalises it."""
    window = image[:, top : top + 32, left : left + 32]
    window = window.flip(2) if mirrored else window
    plain = ImageCache(window[None].clone(), [0], mean=cache.mean, std=cache.std)
    return plain[0]["pixel_values"]
