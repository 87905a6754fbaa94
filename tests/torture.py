"""Kill a training run again and again, resume it each time, compare it with an undisturbed run.

    python tests/torture.py --kills 30 --kills_in_checkpoint 10 --seed 0

A life is one process that trains until it ends or is killed (SIGKILL). A kill strikes at a random
moment of a life, its start included, or inside the write of a randomly chosen checkpoint.
Each life begins as a job that is put into the queue again: from the newest complete checkpoint.

A run that comes to its end must equal the undisturbed one in weights, optimizer, table of scores,
learning rates and other logs, report, and in the samples and the loss of each batch of each life. A
life must continue from the last checkpoint that was complete, or from a later one. If kills are
left, another run begins. A difference ends with exit status 1, and the folder is kept.

The draws follow from the seed. What they strike does not, because it depends on measured time.
"""

import argparse
import gc
import hashlib
import itertools
import json
import os
import random
import select
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Importing takes seconds, so lives are forked. A fork loses threads, so there must be none.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from reliability import merge
from tiny import PATIENCE, images, trainer, vit
from tqdm import tqdm

from hf_dynprune import UCB, DynamicPruningTrainer
from hf_dynprune.checkpoints import newest_complete
from hf_dynprune.sampler import SAMPLE_INDEX

RESULT = "result.json"
WRITE_BEGINS, WRITE_ENDS = b"(", b")"

# ---- a life, in its own process ------------------------------------------------------------------


class Traced(DynamicPruningTrainer):
    """Notes each batch and each checkpoint in a file, and reports each write to the parent."""

    def follow(self, trace, pipe, born):
        self.trace, self.pipe, self.born, self.started = trace, pipe, born, False

    def note(self, *entry):
        os.write(self.trace, (json.dumps(entry) + "\n").encode())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.started:
            self.started = True
            self.note("starts", self.state.global_step, time.perf_counter() - self.born)
        place = self.state.global_step, self.pruner.batches_done
        index = inputs[SAMPLE_INDEX].tolist()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.note("batch", *place, index, loss.item().hex())
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model, trial):
        begun = time.perf_counter()
        os.write(self.pipe, WRITE_BEGINS)
        super()._save_checkpoint(model, trial)
        os.write(self.pipe, WRITE_ENDS)
        self.note("saved", self.state.global_step, time.perf_counter() - begun)


def live(folder, num_epochs, trace, pipe, born):
    """Train until the end, from the newest complete checkpoint if any, and write the outcome."""
    run = trainer(
        folder / "run",
        cls=Traced,
        model=vit(dropout=0.1),  # it draws random numbers in each step: their state is restored
        data=images(198),  # 25 steps an epoch, then 13; each last one has one batch
        pruning=UCB(keep_ratio=0.5, first=1, last=0.2),
        num_train_epochs=num_epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        warmup_steps=20,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=3,
    )
    run.follow(trace, pipe, born)
    run.train(resume_from_checkpoint=newest_complete(folder / "run") is not None)
    unfinished = folder / f"{RESULT}.tmp"
    unfinished.write_text(json.dumps(outcome(run)))
    os.replace(unfinished, folder / RESULT)


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def outcome(run):
    """All that must be the same, as numbers and strings that JSON keeps exactly."""
    report = run.pruning_report.to_dict()
    for name in ("resumed", "environment"):
        report.pop(name)
    for part in (report["totals"], *report["epochs"]):
        part.pop("seconds")
    # The entry with `train_runtime` has seconds, and means of the last life alone.
    logs = [entry for entry in run.state.log_history if "train_runtime" not in entry]
    optimizer = {}
    for number, values in run.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            optimizer[f"{number} {name}"] = digest(value)
    return {
        "weights": {name: digest(weight) for name, weight in run.model.state_dict().items()},
        "optimizer": optimizer,
        "table": {
            name: column.view(torch.int32).tolist()
            for name, column in run.pruner.table.state_dict().items()
        },
        "report": report,
        "logs": [
            {name: entry[name] for name in sorted(entry) if not name.endswith("_seconds")}
            for entry in logs
        ],
        "steps": run.state.global_step,
    }


# ---- the parent's side ---------------------------------------------------------------------------


class Fault(Exception):
    """A process did not do what it should."""


class Life:
    """A forked process that trains in the folder. `number` names its trace and its output."""

    def __init__(self, folder, num_epochs, number):
        (folder / RESULT).unlink(missing_ok=True)
        self.printed = folder / f"life-{number:03}.txt"
        self.trace = folder / f"life-{number:03}.jsonl"
        self.in_write, self.ended, self.born = False, False, time.perf_counter()
        self.pipe, theirs = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            os.close(theirs)
            return
        status = 1
        try:
            output = os.open(self.printed, os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            trace = os.open(self.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            live(folder, num_epochs, trace, theirs, self.born)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self, *, seconds=None, writes=None):
        """Wait until it is `seconds` old, or begins its write number `writes`, or ends."""
        while not self.ended:
            left = PATIENCE if seconds is None else self.born + seconds - time.perf_counter()
            if left <= 0 or not select.select([self.pipe], [], [], left)[0]:
                if seconds is None:
                    self.kill()
                    raise Fault(
                        f"A process was silent for {PATIENCE} s; its output is in {self.printed}"
                    )
                return
            event = os.read(self.pipe, 1)
            self.ended = event == b""
            self.in_write = event == WRITE_BEGINS or (self.ended and self.in_write)
            if writes is not None and event == WRITE_BEGINS:
                writes -= 1
                if writes == 0:
                    return

    def kill(self):
        """Kill it, unless it has ended. Returns whether it was killed."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()  # read what is left in the pipe
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
        if status != 0:
            raise Fault(f"A process ended with an error:\n{self.printed.read_text()}")
        return False

    def traced(self):
        """What it noted. Its last line may be incomplete, and is left out."""
        if not self.trace.exists():
            return []
        return [json.loads(line) for line in self.trace.read_text().split("\n")[:-1]]


def whole_life(folder, num_epochs, number):
    life = Life(folder, num_epochs, number)
    life.wait()
    if life.kill():
        raise Fault(f"Something else killed a process; its output is in {life.printed}")
    return life


def batches_of(lives):
    """(optimizer step, batch of the epoch) -> samples and loss"""
    return {
        tuple(entry[1:3]): tuple(entry[3:])
        for life in lives
        for entry in life
        if entry[0] == "batch"
    }


def differences(expected, found):
    """The places at which two JSON values differ: at most five lines."""

    def walk(path, a, b):
        if isinstance(a, dict) and isinstance(b, dict):
            for key in {**a, **b}:
                yield from walk(f"{path}.{key}", a.get(key), b.get(key))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from walk(f"{path}[{i}]", x, y)
        elif a != b and not (a != a and b != b):  # NaN equals NaN
            yield f"{path}: {str(a)[:100]} undisturbed, {str(b)[:100]} after the kills"

    return [line.removeprefix(".") for line in itertools.islice(walk("", expected, found), 5)]


def faults_of_traces(expected, lives):
    """What went wrong on the way: other batches, lost checkpoints."""
    faults, whole = [], 0
    for number, life in enumerate(lives):
        for entry in life:
            if entry[0] == "starts" and entry[1] < whole:
                faults.append(
                    f"life {number} began at step {entry[1]}, and checkpoint-{whole} was complete"
                )
            if entry[0] == "saved":
                whole = max(whole, entry[1])
        for place, batch in batches_of([life]).items():
            if batch != expected.get(place):
                undisturbed = expected.get(place)
                faults.append(f"life {number}, (step, batch) {place}: {batch}, not {undisturbed}")
    missing = expected.keys() - batches_of(lives).keys()
    if missing:
        first = min(missing)
        faults.append(f"{len(missing)} batches were never trained, the first at {first}")
    return faults[:5]


class Torture:
    def __init__(self, options, folder):
        self.options, self.folder, self.random = options, folder, random.Random(options.seed)
        self.kills = self.finished = self.skipped = self.failed = 0
        self.aimed = 0  # kills that were aimed at a write and struck it
        self.in_checkpoint = 0  # all kills that struck a write, by chance as well

    def undisturbed(self):
        """Train without a kill, to know what is expected and how long things take."""
        folder = self.folder / "undisturbed"
        folder.mkdir()
        life = whole_life(folder, self.options.num_epochs, 0)
        seconds, traced = time.perf_counter() - life.born, life.traced()
        self.expected = json.loads((folder / RESULT).read_text())
        self.batches = batches_of([traced])
        saved = [entry[2] for entry in traced if entry[0] == "saved"]
        start = next(entry[2] for entry in traced if entry[0] == "starts")
        self.writes, self.write = len(saved), statistics.median(saved)
        # The kills at any moment should fall into about one and a half runs. On average a life
        # lasts half of the longest. The next one starts up, and trains again what came after the
        # last checkpoint.
        uniform = max(1, self.options.kills - self.options.kills_in_checkpoint)
        self.longest = 2 * (start + (seconds - start) * (0.5 / self.writes + 1.5 / uniform))
        print(
            f"undisturbed: {self.expected['steps']} steps in {seconds:.1f} s, {self.writes} "
            f"checkpoints of about {1000 * self.write:.0f} ms; lives of at most "
            f"{self.longest:.1f} s",
            flush=True,
        )

    def wants_more(self):
        return self.kills < self.options.kills or self.aimed < self.options.kills_in_checkpoint

    def life(self, folder, number):
        """One life, killed if kills are left. Returns the life, and whether it was killed."""
        if not self.wants_more():
            return whole_life(folder, self.options.num_epochs, number), False
        inside = max(0, self.options.kills_in_checkpoint - self.aimed)
        into_write = self.random.random() < inside / max(inside, self.options.kills - self.kills)
        if into_write:
            writes = self.random.randint(1, max(2, self.writes // self.options.kills))
            delay = self.random.uniform(0, self.write)
            life = Life(folder, self.options.num_epochs, number)
            life.wait(writes=writes)
            if not life.ended:
                life.wait(seconds=time.perf_counter() - life.born + delay)
        else:
            seconds = self.random.uniform(0, self.longest)
            life = Life(folder, self.options.num_epochs, number)
            life.wait(seconds=seconds)
        killed = life.kill()
        if killed:
            self.kills += 1
            self.aimed += into_write and life.in_write
            self.in_checkpoint += life.in_write
        return life, killed

    def run(self, folder, bar):
        """One run, from its first life to its end. Returns how it differs from the undisturbed."""
        folder.mkdir()
        traces, killed = [], True
        while killed:
            life, killed = self.life(folder, len(traces))
            traces.append(life.traced())
            output = life.printed.read_text() if life.printed.exists() else ""
            self.skipped += "Skipping the checkpoint" in output
            bar.update(self.kills - bar.n)
            bar.set_postfix_str(
                f"{self.in_checkpoint} in a checkpoint, {self.finished} runs finished"
            )
        self.finished += 1
        result = json.loads((folder / RESULT).read_text())
        return differences(self.expected, result) + faults_of_traces(self.batches, traces)

    def all_runs(self):
        """Train runs until all kills are done. Returns what differs."""
        self.undisturbed()
        tqdm.monitor_interval = 0  # its monitor is a thread, which a fork would lose
        # tqdm shares its lock with forked processes. One that is killed with it would block us.
        tqdm.set_lock(threading.RLock())
        with tqdm(total=self.options.kills, desc="kills", unit="") as bar:
            while self.wants_more():
                before = self.kills
                try:
                    faults = self.run(self.folder / f"run-{self.finished}", bar)
                except Fault as fault:
                    faults = [str(fault)]
                if faults:
                    # Which of these kills it was is not known.
                    self.failed = max(1, self.kills - before)
                    return faults
        return []


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="how many kills, at least")
    parser.add_argument(
        "--kills_in_checkpoint",
        type=int,
        default=10,
        help="how many kills inside the write of a checkpoint",
    )
    parser.add_argument("--seed", type=int, default=0, help="the seed of the draws")
    parser.add_argument("--num_epochs", type=int, default=60, help="the length of a run in epochs")
    parser.add_argument(
        "--folder", type=Path, help="where to train; must not exist; default: a temporary folder"
    )
    parser.add_argument(
        "--write", type=Path, help="the record of reliability in which to note the outcome"
    )
    options = parser.parse_args()
    if not 0 <= options.kills_in_checkpoint <= options.kills or options.kills < 1:
        parser.error("expected --kills of at least 1, and not more --kills_in_checkpoint")
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=options.folder is None)
    begun = time.perf_counter()
    torture = Torture(options, folder)
    gc.freeze()  # lives collect garbage: they need not look through what was imported
    faults = torture.all_runs()
    print(
        f"{torture.kills} kills, {torture.in_checkpoint} inside the write of a checkpoint "
        f"({torture.aimed} aimed at it); {torture.finished} runs finished; {torture.skipped} lives "
        f"skipped a torn checkpoint; {time.perf_counter() - begun:.0f} s"
    )
    if options.write:
        row = {
            "tried": torture.kills,
            "failed": torture.failed,
            "in_checkpoint": torture.in_checkpoint,
        }
        merge(options.write, {"torture": row})
    if faults:
        print(
            f"The last run differs from the undisturbed one; {folder} is kept:", *faults, sep="\n  "
        )
        sys.exit(1)
    shutil.rmtree(folder)
    print("Each run equals the undisturbed one, bit for bit.")


if __name__ == "__main__":
    main()
