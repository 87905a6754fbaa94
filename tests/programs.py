"""Runs programs in forks of a process that has imported what they import.

    python tests/programs.py    # that process: a JSON request on each line of stdin

Importing torch and transformers takes seconds, and the tests start hundreds of programs. A program
runs as `python program.py arguments` runs it: as `__main__`, with arguments, environment, folder
and output of its own. Only what is read from the environment at an import is the server's.
"""

import faulthandler
import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 3600  # seconds after which a program hangs

# What most programs import. Nothing may start a thread: a fork loses it.
IMPORTED = (
    "datasets",
    "evaluate",
    "hf_dynprune.cli",
    "hf_dynprune.scoring_runs",
    "hf_dynprune.vision",
    "matplotlib.pyplot",
    "sklearn.metrics",
    "torch.distributed",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
)


# ---- the client ----------------------------------------------------------------------------------


def python(*command, environment=None, cwd=ROOT):
    """Run `python *command`: a script, `-m module` or `-c code`, with arguments.

    Returns:
        subprocess.CompletedProcess, with text as output.
    """
    return _run(command, [os.environ if environment is None else environment], cwd)[0]


def torchrun(*command, ranks, environment=None, cwd=ROOT):
    """Run a program on that many processes that talk by gloo, as torchrun starts them.

    If one fails, the others are killed.

    Returns:
        subprocess.CompletedProcess with the first status that is not 0, and the output of all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **(os.environ if environment is None else environment),
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    own = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    done = _run(command, own, cwd)
    statuses = [each.returncode for each in done]
    status = max(statuses) or min(statuses)  # below 0 for one that was killed
    out, err = "".join(each.stdout for each in done), "".join(each.stderr for each in done)
    return subprocess.CompletedProcess(done[0].args, status, out, err)


def _run(command, environments, cwd):
    """Run one program in as many processes as there are environments, at the same time."""
    command = [str(part) for part in command]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[f"{folder}/{i}.out", f"{folder}/{i}.err"] for i in range(len(environments))]
        request = {
            "command": command,
            "cwd": str(cwd),
            "environments": [dict(environment) for environment in environments],
            "outputs": outputs,
        }
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError(f"The server of programs ended with {server.wait()}.")
        answer = json.loads(answer)
        texts = [[Path(path).read_text(errors="replace") for path in pair] for pair in outputs]
    if answer["hung"]:
        printed = "\n".join(out + err for out, err in texts)
        raise AssertionError(f"{command} was not done after {PATIENCE} s.\n{printed}")
    return [
        subprocess.CompletedProcess(command, status, out, err)
        for status, (out, err) in zip(answer["statuses"], texts, strict=True)
    ]


@cache
def _server():
    """The server of this process. It ends with it, when its input does."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


# ---- the server ----------------------------------------------------------------------------------


def serve():
    for module in IMPORTED:
        import_module(module)
    gc.collect()
    gc.freeze()  # the forks share its pages
    threads = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    names = {thread.read_text().strip() for thread in threads}
    # The forks start jemalloc's again.
    lost = names - {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}
    if lost:
        raise RuntimeError(f"Threads run after the imports, and a fork loses them: {lost}.")
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        request = json.loads(line)
        processes = [
            fork.Process(target=_become, args=(request["command"], request["cwd"], *each))
            for each in zip(request["environments"], request["outputs"], strict=True)
        ]
        for process in processes:
            process.start()
        hung = _wait(processes)
        answer = {"statuses": [process.exitcode for process in processes], "hung": hung}
        print(json.dumps(answer), flush=True)


def _wait(processes):
    """Wait until all have ended. Kills the others if one fails; says whether they hung."""
    running, until = list(processes), time.monotonic() + PATIENCE
    while running:
        wait([process.sentinel for process in running], max(0.0, until - time.monotonic()))
        running = [process for process in running if process.exitcode is None]
        hung = time.monotonic() >= until
        if hung or any(process.exitcode for process in processes):
            for process in running:
                # Their stacks go to stderr.
                with suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(process.pid, signal.SIGABRT if hung else signal.SIGTERM)
            for process in running:
                process.join()
            return hung
    return False


def _become(command, cwd, environment, outputs):
    """Run a program in this process."""
    sys.stdout.flush()
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *((path, os.O_WRONLY | os.O_CREAT) for path in outputs)]
    ):
        os.dup2(os.open(path, flags), number)
    faulthandler.enable()
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    more = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    if command[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        command = command[2:]
    kind, *rest = command
    if kind in ("-m", "-c"):
        sys.path[:1], sys.argv[1:] = [cwd, *more], rest[1:]
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            exec(rest[0], {"__name__": "__main__"})
    else:
        sys.path[:1], sys.argv[:] = [str(Path(kind).resolve().parent), *more], command
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve()
