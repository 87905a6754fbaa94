"""Runs programs in forks of a process that has imported what they import.

    python tests/programs.py serve SOCKET           that process, the server
    python tests/programs.py run [options] program  what `sys.executable` is in its forks

Importing torch and transformers takes seconds, and the tests start hundreds of programs. A program
runs as `python program.py arguments` runs it: as `__main__`, with arguments, environment, folder
and output of its own. Only what is read from the environment at an import is the server's.

    test --request--> server --fork--> one process per request --fork--> the programs
"""

import faulthandler
import gc
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
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
SOCKET = "HF_DYNPRUNE_TESTS_SOCKET"  # an environment variable, for `run`

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
    given = os.environ if environment is None else environment
    paths = [str(ROOT / "tests"), str(ROOT), *filter(None, [given.get("PYTHONPATH")])]
    shared = {
        **given,
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(paths),
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
    path, _ = _server()
    environments = [{**environment, SOCKET: path} for environment in environments]
    with tempfile.TemporaryDirectory() as folder:
        names = [(f"{folder}/{i}.out", f"{folder}/{i}.err") for i in range(len(environments))]
        streams = [[os.devnull, *pair] for pair in names]
        answer = _ask(path, command, str(cwd), environments, streams)
        texts = [[Path(name).read_text(errors="replace") for name in pair] for pair in names]
    if answer["hung"]:
        printed = "\n".join(out + err for out, err in texts)
        raise AssertionError(f"{command} was not done after {PATIENCE} s.\n{printed}")
    return [
        subprocess.CompletedProcess(command, status, out, err)
        for status, (out, err) in zip(answer["statuses"], texts, strict=True)
    ]


def _ask(path, command, cwd, environments, streams):
    """The server's answer to a request, when the programs have ended.

    `streams` are the files for the input and the two outputs of each program.
    """
    request = {"command": command, "cwd": cwd, "environments": environments, "streams": streams}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = connection.makefile().readline()
    if not answer:
        raise RuntimeError(f"The server of programs gave no answer to {command}.")
    return json.loads(answer)


@cache
def _server():
    """The socket of this process's server, and the server, which ends when its input does."""
    path = str(Path(tempfile.mkdtemp(prefix="programs"), "socket"))
    command = [sys.executable, __file__, "serve", path]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if not server.stdout.readline():
        raise RuntimeError(f"The server of programs ended with {server.wait()}.")
    return path, server


def run(command):
    """Run a program that a forked program starts, with the streams of this process."""
    streams = [[f"/proc/{os.getpid()}/fd/{number}" for number in range(3)]]
    answer = _ask(os.environ[SOCKET], command, os.getcwd(), [dict(os.environ)], streams)
    return answer["statuses"][0]


# ---- the server ----------------------------------------------------------------------------------


def serve(path):
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
    launcher = Path(path).with_name("python")
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, __file__, "run"])} "$@"\n')
    launcher.chmod(0o700)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes of requests
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while listener in wait([listener, sys.stdin]):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection, str(launcher))
            connection.close()
    shutil.rmtree(launcher.parent)


def _answer(connection, launcher):
    """Carry out the request of a connection in this process, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(connection.makefile().readline())
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=_become, args=(request["command"], request["cwd"], launcher, *each))
        for each in zip(request["environments"], request["streams"], strict=True)
    ]
    for process in processes:
        process.start()
    hung = _wait(processes)
    answer = {"statuses": [process.exitcode for process in processes], "hung": hung}
    connection.sendall(json.dumps(answer).encode() + b"\n")
    os._exit(0)


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


def _become(command, cwd, launcher, environment, streams):
    """Run a program in this process."""
    sys.stdout.flush()
    write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, write, write), strict=True)):
        os.dup2(os.open(path, flags), number)
    faulthandler.enable()
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    more = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.executable = launcher  # what it starts is forked, too
    if command[:1] == ["-u"]:
        command = command[1:]
    if command[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        command = command[2:]
    kind, *rest = command
    if kind in ("-m", "-c"):
        sys.path[:1], sys.argv[:] = [cwd, *more], [kind, *rest[1:]]
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            exec(rest[0], {"__name__": "__main__"})
    else:
        sys.path[:1], sys.argv[:] = [str(Path(kind).resolve().parent), *more], command
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    sys.exit(serve(sys.argv[2]) if sys.argv[1] == "serve" else run(sys.argv[2:]))
