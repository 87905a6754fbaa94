"""Runs programs in forks of a process that has imported what they import.

    python tests/programs.py serve SOCKET           that process, the server
    python tests/programs.py run [options] program  what `sys.executable` is in its forks

Importing torch and transformers takes seconds, and the tests start hundreds of programs. A program
runs as `python program.py arguments` runs it: as `__main__`, with arguments, environment, folder
and output of its own. Only what is read from the environment at an import is the server's. What a
program starts by `sys.executable` or by multiprocessing's "spawn" is forked as well.

    test --request--> server --fork--> one process per request --fork--> the programs
"""

import atexit
import faulthandler
import fcntl
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
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.spawn import get_executable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 3600  # seconds after which a program hangs
SOCKET = "HF_DYNPRUNE_TESTS_SOCKET"  # an environment variable, for `run`
ABOVE = 512  # file descriptors from here on are nobody's

# What most programs import. Nothing may start a thread: a fork loses it.
IMPORTED = (
    "datasets",
    "evaluate",
    "hf_dynprune.cli",
    "hf_dynprune.model_card",
    "hf_dynprune.plots",
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


def torchrun(*command, ranks, environment=None, cwd=ROOT, imports=()):
    """Run a program on that many processes that talk by gloo, as torchrun starts them.

    If one fails, the others are killed.

    Args:
        imports: Modules that take long to import. They are imported once for all ranks.

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
    done = _run(command, own, cwd, imports)
    statuses = [each.returncode for each in done]
    status = max(statuses) or min(statuses)  # below 0 for one that was killed
    out, err = "".join(each.stdout for each in done), "".join(each.stderr for each in done)
    return subprocess.CompletedProcess(done[0].args, status, out, err)


def launcher():
    """A program that stands for `sys.executable`, and the environment that it needs.

    What it starts is forked from the server, with the open files of the one that started it.
    """
    path, _ = _server()
    return str(_launcher(path)), {SOCKET: path}


@contextmanager
def spawned_by_forks():
    """Meanwhile what multiprocessing spawns in this process is a fork of the server.

    As in a new interpreter, a worker gets all that it knows of this process by pickle.
    """
    program, environment = launcher()
    executable = get_executable()
    os.environ.update(environment)
    multiprocessing.set_executable(program)
    try:
        yield
    finally:
        multiprocessing.set_executable(executable)


def _run(command, environments, cwd, imports=()):
    """Run one program in as many processes as there are environments, at the same time."""
    command = [str(part) for part in command]
    path, _ = _server()
    environments = [{**environment, SOCKET: path} for environment in environments]
    with tempfile.TemporaryDirectory() as folder:
        names = [(f"{folder}/{i}.out", f"{folder}/{i}.err") for i in range(len(environments))]
        streams = [[os.devnull, *pair] for pair in names]
        answer = _ask(path, command, str(cwd), environments, streams, imports=imports)
        texts = [[Path(name).read_text(errors="replace") for name in pair] for pair in names]
    if answer["hung"]:
        printed = "\n".join(out + err for out, err in texts)
        raise AssertionError(f"{command} was not done after {PATIENCE} s.\n{printed}")
    return [
        subprocess.CompletedProcess(command, status, out, err)
        for status, (out, err) in zip(answer["statuses"], texts, strict=True)
    ]


def _ask(path, command, cwd, environments, streams, handed_on=(), imports=()):
    """The server's answer to a request, when the programs have ended.

    `streams` are the files for the input and the two outputs of each program, `handed_on` the file
    descriptors of this process that they have under the same numbers.
    """
    request = {"command": command, "cwd": cwd, "environments": environments, "streams": streams}
    request |= {"handed on": list(handed_on), "imports": list(imports)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"\n"], handed_on)
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = connection.makefile().readline()
    if not answer:
        raise RuntimeError(f"The server of programs gave no answer to {command}.")
    return json.loads(answer)


def share_server():
    """Start the server for this process and for those that it will start."""
    os.environ[SOCKET], _ = _server()


@cache
def _server():
    """The socket of the server, and the server if it is this process's: it ends with its input."""
    if SOCKET in os.environ:
        return os.environ[SOCKET], None
    path = str(Path(tempfile.mkdtemp(prefix="programs"), "socket"))
    command = [sys.executable, __file__, "serve", path]
    # It hashes texts in another way than this process, so that no program depends on it.
    environment = {**os.environ, "PYTHONHASHSEED": "random"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, env=environment, **pipes)
    if not server.stdout.readline():
        raise RuntimeError(f"The server of programs ended with {server.wait()}.")
    return path, server


def run(command):
    """Run a program that a forked program starts, with the open files of this process."""
    inherited = [int(name) for name in os.listdir("/proc/self/fd")]
    inherited = [number for number in inherited if _is_open(number)]  # not that of the list
    answer = _ask(os.environ[SOCKET], command, os.getcwd(), [dict(os.environ)], [[]], inherited)
    status = answer["statuses"][0]
    if status < 0:  # end by the same signal
        os.kill(os.getpid(), -status)
    return status


def _is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


# ---- the server ----------------------------------------------------------------------------------


def _warm_up():
    """Save a model, since transformers prepares for the first one: a thousand patterns."""
    from torch.random import fork_rng
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would start a thread
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8}
    with fork_rng(), tempfile.TemporaryDirectory() as folder:
        config = ViTConfig(**small, intermediate_size=8, patch_size=8)
        ViTForImageClassification(config).save_pretrained(folder)
    logging.enable_progress_bar()


def serve(path):
    launcher = _launcher(path)
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, __file__, "run"])} "$@"\n')
    launcher.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        if listener in wait([listener, sys.stdin]):  # imports nothing if nobody asks
            _prepare()
        while listener in wait([listener, sys.stdin]):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection, str(launcher))
            connection.close()
    shutil.rmtree(Path(path).parent)


def _launcher(path):
    return Path(path).with_name("python")


def _prepare():
    _import(IMPORTED)
    _warm_up()
    gc.collect()
    gc.freeze()  # the forks share its pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes of requests


def _import(modules):
    for module in modules:
        import_module(module)
    threads = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    names = {thread.read_text().strip() for thread in threads}
    # The forks start jemalloc's again.
    lost = names - {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}
    lost |= {thread.name for thread in threading.enumerate()} - {threading.main_thread().name}
    if lost:
        raise RuntimeError(f"Threads run after the imports, and a fork loses them: {lost}.")


def _answer(connection, launcher):
    """Carry out the request of a connection in this process, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, received, _, _ = socket.recv_fds(connection, 1, 250)
    request = json.loads(connection.makefile().readline())
    handed_on = dict(zip(request["handed on"], received, strict=True))
    _import(request["imports"])
    fork = multiprocessing.get_context("fork")
    common = request["command"], request["cwd"], launcher, handed_on
    processes = [
        fork.Process(target=_become, args=(*common, *each))
        for each in zip(request["environments"], request["streams"], strict=True)
    ]
    for process in processes:
        process.start()
    for number in received:  # a reader of theirs waits until nobody has it open to write
        os.close(number)
    hung = _wait(processes, connection)
    answer = {"statuses": [process.exitcode for process in processes], "hung": hung}
    with suppress(BrokenPipeError):  # nobody waits for the answer
        connection.sendall(json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _wait(processes, connection):
    """Wait until all have ended. Says whether they hung.

    Kills the others if one fails, and all if nobody waits for the answer any more.
    """
    running, until = list(processes), time.monotonic() + PATIENCE
    while running:
        ended = [process.sentinel for process in running]
        ready = wait([*ended, connection], max(0.0, until - time.monotonic()))
        running = [process for process in running if process.exitcode is None]
        hung = time.monotonic() >= until
        if hung or connection in ready or any(process.exitcode for process in processes):
            for process in running:
                # Their stacks go to stderr.
                with suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(process.pid, signal.SIGABRT if hung else signal.SIGTERM)
            for process in running:
                process.join()
            return hung
    return False


def _become(command, cwd, launcher, handed_on, environment, streams):
    """Run a program in this process."""
    sys.stdout.flush()
    write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, write, write), strict=False)):
        os.dup2(os.open(path, flags), number)
    # First all make way. What this process itself has open stays open, under another number.
    own = [number for number in handed_on if number > 2 and _is_open(number)]
    for number in {*own} - {*handed_on.values()}:
        fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, ABOVE)
    files = {n: fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, ABOVE) for n, file in handed_on.items()}
    for file in handed_on.values():
        os.close(file)
    for number, file in files.items():
        os.dup2(file, number)
        os.close(file)
    faulthandler.enable()
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    more = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.executable = launcher  # what it starts is forked, too
    multiprocessing.set_executable(launcher)
    kind, *rest = command
    while kind.startswith("-") and kind not in ("-c", "-m"):
        if kind == "-W":
            warnings.simplefilter(rest.pop(0))
        elif kind not in ("-B", "-u"):
            raise NotImplementedError(f"Python's option {kind}")
        kind, *rest = rest
    atexit._clear()  # what the server registered
    try:
        _run_as_main(kind, rest, cwd, more)
    finally:
        atexit._run_exitfuncs()  # a forked process would leave them out


def _run_as_main(kind, rest, cwd, paths):
    if kind in ("-m", "-c"):
        sys.path[:1], sys.argv[:] = [cwd, *paths], [kind, *rest[1:]]
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            exec(rest[0], {"__name__": "__main__"})
    else:
        sys.path[:1], sys.argv[:] = [str(Path(kind).resolve().parent), *paths], [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    sys.exit(serve(sys.argv[2]) if sys.argv[1] == "serve" else run(sys.argv[2:]))
