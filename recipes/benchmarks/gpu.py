"""What a CPU cannot show: one command for a machine with one GPU or several.

    make gpu                                            # all checks, then the table of the docs
    python recipes/benchmarks/gpu.py --minutes 9        # stop in time; call again to continue
    python recipes/benchmarks/gpu.py --check images     # one check, also if it passed before
    python recipes/benchmarks/gpu.py --device cpu --output runs/gpu.json    # tiny, to try it

The checks run on a CPU in the tests, at tiny sizes. The table of the docs says `not run` for a
check of which recipes/results/gpu.json has no result of a GPU. gpu_checks.py has the checks.

Each check runs in a fresh process and writes its result at once. A call skips what passed on this
GPU, begins with what was not tried yet, and then tries again what failed. A check that fails, dies
or takes more than 8 minutes is noted as failed and stops no other one. A check that needs a package
that is not installed is noted as not run. Delete the file to begin anew.

The exit status is 0 if no check failed and none is left, also on a machine without a GPU, where
nothing is run or written. Otherwise it is 1, and a line says which checks failed or are left.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_dynprune.files import save_json
from hf_dynprune.report import describe_environment

RECORD = Path(__file__).resolve().parents[2] / "recipes" / "results" / "gpu.json"
LIMIT = 480  # seconds of a check


class Check(NamedTuple):
    words: str
    needs: tuple[str, ...] = ()  # modules
    all_gpus: bool = False


CHECKS = {
    "tests": Check(
        "tests marked `gpu`: bf16, fp16 with loss scaling, torch.compile, scores beside the CPU's, "
        "data on the device, resuming"
    ),
    "waits": Check(
        "host synchronisations by torch.profiler, in steps that neither log nor compare the losses "
        "with the model's own (batches 1, 2, 4, 8, ... do)"
    ),
    "steps": Check("optimizer step that scores every trained sample"),
    "bill": Check("whole runs of three epochs that train 30 % of the data, without evaluation"),
    "ddp": Check(
        "DDP with NCCL on all GPUs; with one GPU, two ranks share it by gloo", all_gpus=True
    ),
    "fsdp2": Check("FSDP2 through the Trainer, on all GPUs", all_gpus=True),
    "zero": Check("ZeRO 1, 2 and 3, on all GPUs", ("deepspeed",), all_gpus=True),
    "liger": Check("Liger's kernels", ("liger_kernel",)),
    "qlora": Check("LoRA on a model of 4 bits", ("bitsandbytes", "peft")),
    "images": Check(
        "ResNet-18 (CIFAR) on images held on the device, channels-last, compiled, bf16"
    ),
}


def read(path: Path = RECORD) -> dict[str, dict[str, Any]]:
    """Check -> entry; nothing if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def note(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Put an entry into the file."""
    about = {"gpus": torch.cuda.device_count(), "environment": describe_environment()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_json(path, {**read(path), name: {**entry, **about}})
    print(f"{name}: {entry['state']}: {entry['result']}", flush=True)


def run_check(name: str, path: Path) -> None:
    """Run a check in this process and note what came of it."""
    check, begun = CHECKS[name], time.perf_counter()
    missing = [module for module in check.needs if find_spec(module) is None]
    if missing:
        return note(path, name, {"state": "not run", "result": f"needs {', '.join(missing)}"})
    try:
        with tempfile.TemporaryDirectory() as folder:
            import gpu_checks  # the command itself does without

            result, figures = gpu_checks.RUNS[name](Path(folder))
        entry = {"state": "passed", "result": result, "figures": figures}
    except Exception as error:
        traceback.print_exc()
        entry = {"state": "failed", "result": f"{type(error).__name__}: {error}"}
    note(path, name, {**entry, "seconds": time.perf_counter() - begun})


def start_check(name: str, options: argparse.Namespace, seconds: float) -> None:
    """Run a check in a fresh process, at most so long."""
    environment = dict(os.environ)
    if options.device == "cuda" and not CHECKS[name].all_gpus:
        # Several in one process would make the Trainer use nn.DataParallel.
        visible = environment.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
    command = [sys.executable, __file__, "--check", name, "--device", options.device]
    command += ["--output", str(options.output)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    failed = None
    try:
        if status := process.wait(min(seconds, LIMIT)):
            failed = f"the process ended with status {status}"
    except subprocess.TimeoutExpired:
        failed = f"not done after {LIMIT} s" if seconds >= LIMIT else None  # or time was up
    finally:
        if process.poll() is None:  # torchrun gets the signal, too, and ends its ranks
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if failed:
        note(options.output, name, {"state": "failed", "result": failed})


def is_done(entry: Mapping[str, Any] | None, device: str) -> bool:
    """Whether a check passed on this device."""
    return (
        entry is not None
        and entry["state"] == "passed"
        and entry["environment"]["device"] == device
    )


def render(record: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the docs. What was not run on a GPU was not run."""
    lines = ["| what | on | result |", "| --- | --- | --- |"]
    for name, check in CHECKS.items():
        entry = record.get(name, {})
        if not entry.get("gpus"):
            lines.append(f"| {check.words} | | not run |")
            continue
        state, result = entry["state"], " ".join(entry["result"].split()).replace("|", "\\|")
        text = {"passed": result, "not run": f"not run: {result}"}.get(
            state, f"**failed**: {result[-300:]}"
        )
        lines.append(
            f"| {check.words} | {entry['gpus']} × {entry['environment']['device']} | {text} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", choices=CHECKS, help="run this one alone, in this process")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--minutes", type=float, default=25.0, help="stop then; what is left waits for another call"
    )
    parser.add_argument("--output", type=Path, default=RECORD, help="JSON file; is continued")
    options = parser.parse_args()
    if options.device == "cpu" and options.output == RECORD:
        parser.error("--device cpu needs --output: the file of the docs is for GPUs")
    return options


def main() -> int:
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for it
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU: nothing was run, and the record stays as it is.")
        return 0
    if options.check:
        run_check(options.check, options.output)
        return int(read(options.output)[options.check]["state"] == "failed")
    until, device = time.monotonic() + 60 * options.minutes, describe_environment()["device"]
    record = read(options.output)
    names = [name for name in CHECKS if not is_done(record.get(name), device)]
    for name in sorted(names, key=lambda name: name in record):  # what was tried comes last
        if (seconds := until - time.monotonic()) > 0:
            start_check(name, options, seconds)
    record = read(options.output)
    failed = [name for name in CHECKS if record.get(name, {}).get("state") == "failed"]
    left = [name for name in CHECKS if name not in record]
    if failed:
        print(f"Failed: {', '.join(failed)}. See {options.output}; call again to try again.")
    if left:
        print(f"Left: {', '.join(left)}. Call again to continue.")
    return int(bool(failed or left))


if __name__ == "__main__":
    sys.exit(main())
