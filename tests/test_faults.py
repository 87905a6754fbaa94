"""Long runs: processes killed at any moment, ranks that die, thousands of epochs; the record."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from programs import python, torchrun
from reliability import render

TESTS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
}


# ---- killed at any moment ------------------------------------------------------------------------


def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_run(tmp_path):
    options = [
        "--kills",
        5,
        "--kills_in_checkpoint",
        2,
        "--num_epochs",
        8,
        "--folder",
        tmp_path / "torture",
    ]
    command = [TESTS / "torture.py", *options, "--write", tmp_path / "record.json"]
    done = python(*command, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "record.json").read_text())["torture"]
    assert record["tried"] >= 5
    assert record["in_checkpoint"] >= 2
    assert record["failed"] == 0


# ---- ranks that die ------------------------------------------------------------------------------

DYING = """
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tiny import images, trainer
from transformers import TrainerCallback

from hf_dynprune import UCB
from hf_dynprune.distributed import world

folder, fault = Path(sys.argv[1]), sys.argv[2]


def happens():
    (folder / "happened").touch()


class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and fault == f"rank {world()[0]} is killed":
            happens()
            os.kill(os.getpid(), signal.SIGKILL)


class Data:
    samples = images(80)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        step = run.state.global_step if "run" in globals() else 0  # items are read before the run
        if fault == "the dataset raises" and world()[0] == 1 and step == 3:
            happens()
            raise OSError("the disk of rank 1 is gone")
        return self.samples[index]


@dataclass(frozen=True)
class Raises(UCB):
    def plan(self, choice):
        if fault == "the policy raises" and choice.epoch == 1:
            happens()  # only rank 0 plans
            raise ArithmeticError("no plan for epoch 1")
        return super().plan(choice)


run = trainer(
    folder,
    data=Data(),
    pruning=Raises(keep_ratio=0.5, first=1),  # 10 steps, then 5 an epoch
    per_device_train_batch_size=4,
    num_train_epochs=4 + (fault == "ranks of other lengths") * int(os.environ["RANK"]),
    save_strategy="steps",
    save_steps=3,
    ddp_find_unused_parameters=False,
    extra={"callbacks": [Dies()]},
)
if world()[0] == 0 and fault == "the folder of a checkpoint is a file":
    (folder / "checkpoint-3").touch()
if world()[0] == 0 and fault == "our file cannot be written":
    (folder / "checkpoint-3" / "pruning_state.safetensors").mkdir(parents=True)
try:
    run.train(fault == "rank 1 alone resumes" and world()[0] == 1)
except Exception:
    if not (folder / "happened").exists():
        happens()
    (folder / f"rank{world()[0]}.error").write_text(traceback.format_exc())
    # The other rank is ended as soon as this one ends. It needs time to write its error.
    time.sleep(1)
    raise
"""


# Each fault with the signal that ends the run, or what the ranks must report. Gloo reports a peer
# that is gone in words that vary.
FAULTS = {
    "rank 0 is killed": signal.SIGKILL,
    "rank 1 is killed": signal.SIGKILL,
    "the dataset raises": {1: "OSError: the disk of rank 1 is gone"},
    "the policy raises": {
        0: "ArithmeticError: no plan for epoch 1",
        1: "RuntimeError: ",
    },
    "the folder of a checkpoint is a file": {0: "FileExistsError"},
    "our file cannot be written": {0: "IsADirectoryError"},
    "ranks of other lengths": dict.fromkeys((0, 1), "rank 0 has 4, rank 1 has 5"),
    "rank 1 alone resumes": dict.fromkeys((0, 1), "rank 0 has False, rank 1 has True"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_dies_ends_the_run(fault, tmp_path, reliability):
    reliability("dying rank")
    script = tmp_path / "run.py"
    script.write_text(DYING)
    done = torchrun(script, tmp_path, fault, ranks=2)
    printed = done.stdout + done.stderr
    assert done.returncode != 0, printed
    assert (tmp_path / "happened").exists(), printed
    expected = FAULTS[fault]
    if isinstance(expected, signal.Signals):
        assert done.returncode == -expected, printed
    else:
        for rank, words in expected.items():
            assert words in (tmp_path / f"rank{rank}.error").read_text()


# ---- thousands of epochs -------------------------------------------------------------------------

SOAK = """
import json
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from tiny import KnownLoss, known_losses, trainer
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback

from hf_dynprune import UCB

folder, num_epochs = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
N, KEPT, BATCH, MAX_AGE = 24, 8, 4, 20
DECAY = 0.8


def loss_of(sample, epoch):
    return (sample * 7919 + epoch * 104729) % 1009 / 1009


class Data(Dataset):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return N

    def __getitem__(self, index):
        return {"value": loss_of(index, self.epoch)}


class Slow:
    "What the table must hold and which choices are right, in plain Python, by the formulas of UCB."

    def __init__(self):
        self.mean, self.variance = [None] * N, [None] * N
        self.last, self.times_kept = [-1] * N, [0] * N
        self.epochs = 0

    def check_choice(self, kept, epoch):
        assert len(set(kept)) == len(kept) == KEPT
        dropped = set(range(N)) - set(kept)
        first = {i for i in range(N) if self.last[i] == -1 or self.last[i] < epoch - MAX_AGE}
        assert first <= set(kept) or set(kept) <= first, (epoch, kept, first)
        if not set(kept) <= first:
            score = [sum(moments) for moments in zip(self.mean, self.variance, strict=True)]
            least = min(score[i] for i in set(kept) - first)
            assert least >= max(score[i] for i in dropped) - 1e-6, (epoch, kept, score)

    def observe(self, kept, epoch):
        for i in kept:
            loss = loss_of(i, epoch)
            if self.mean[i] is None:
                self.mean[i], self.variance[i] = loss, 0.0
            else:
                surprise = (loss - self.mean[i]) ** 2
                self.variance[i] = (1 - DECAY) * self.variance[i] + DECAY * surprise
                self.mean[i] = (1 - DECAY) * self.mean[i] + DECAY * loss
            self.last[i], self.times_kept[i] = epoch, self.times_kept[i] + 1
        self.epochs += 1

    def check(self, table):
        for name, own in (("mean", self.mean), ("variance", self.variance)):
            for i, value in enumerate(table[name].tolist()):
                right = value != value if own[i] is None else abs(value - own[i]) < 1e-6
                assert right, (name, i, value, own[i])
        assert table["last_observed"].tolist() == self.last


class Watch(TrainerCallback):
    process, slow, memory, saved, kept, before = psutil.Process(), Slow(), [], [], [], {}

    def epoch_done(self):
        "The epoch before is in the table: nothing changed there but the rows of its own samples."
        table = run.pruner.table
        self.slow.check(table)
        now = {name: table[name].clone() for name in ("mean", "variance")}
        others = [i for i in range(N) if i not in self.kept]
        for name in self.before:
            before, after = self.before[name][others], now[name][others]
            assert torch.equal(after.nan_to_num(-1), before.nan_to_num(-1)), name
        self.before = now

    def on_step_begin(self, args, state, control, **kwargs):
        if run.pruner.batches_done:
            return
        epoch = run.pruner.report.epochs[-1].epoch  # has chosen, and not begun to train
        self.epoch_done()
        self.kept = list(run.pruner.sampler)
        self.slow.check_choice(self.kept, epoch)
        self.slow.observe(self.kept, epoch)
        if epoch % 10 == 0:
            self.memory.append(self.process.memory_info().rss)

    def on_save(self, args, state, control, **kwargs):
        files = [path for path in folder.rglob("*") if path.is_file()]
        newest = f"checkpoint-{state.global_step}"
        size = sum(path.stat().st_size for path in files if path.parent.name == newest)
        self.saved.append({"epochs": self.slow.epochs, "files": len(files), "bytes": size})


watch = Watch()
run = trainer(
    folder,
    model=KnownLoss(),
    data=Data(),
    pruning=UCB(keep_ratio=KEPT / N, decay=DECAY, max_age=MAX_AGE),
    num_train_epochs=num_epochs,
    per_device_train_batch_size=BATCH,
    save_strategy="steps",
    save_steps=num_epochs * KEPT // BATCH // 20,
    save_total_limit=2,
    extra={"per_sample_loss_fn": known_losses, "callbacks": [watch]},
)
run.remove_callback(PrinterCallback)
run.train()
watch.epoch_done()
assert run.pruner.table["times_kept"].tolist() == watch.slow.times_kept
assert min(watch.slow.times_kept) > num_epochs / 100  # each sample came again and again
logs = run.state.log_history
last = [entry for entry in logs if num_epochs - 2 < entry["epoch"] <= num_epochs - 1]
record = asdict(run.pruning_report.epochs[-1])
seen = {
    "epochs": watch.slow.epochs,
    "memory": watch.memory,
    "saved": watch.saved,
    "bytes of an epoch": len(json.dumps(record)) + len(json.dumps(last, indent=2)),
}
(folder / "seen.json").write_text(json.dumps(seen))
"""


def test_thousands_of_epochs_leak_nothing_and_keep_the_scores_right(tmp_path, reliability):
    epochs = 2000
    reliability("soak", epochs)
    script = tmp_path / "soak.py"
    script.write_text(SOAK)
    folder = tmp_path / "run"
    done = python(script, folder, epochs, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["epochs"] == epochs

    quarter = len(seen["memory"]) // 4
    assert quarter == epochs // 40
    early, late = (
        sum(seen["memory"][quarter : 2 * quarter]) / quarter,
        sum(seen["memory"][-quarter:]) / quarter,
    )
    assert late <= 1.02 * early, f"{early / 2**20:.1f} MiB of memory, later {late / 2**20:.1f} MiB"

    first, *others = seen["saved"]
    assert len(others) == 19
    assert {saved["files"] for saved in others} == {2 * first["files"]}  # save_total_limit
    for saved in (
        others
    ):  # grows by the records and logs of its epochs; in the files they are indented and escaped
        grown = (saved["epochs"] - first["epochs"]) * seen["bytes of an epoch"]
        assert saved["bytes"] <= first["bytes"] + 1.3 * grown, saved


# ---- the record of reliability -------------------------------------------------------------------

TRIES = """
import pytest

@pytest.mark.parametrize("i", range(3))
def test_holds(i, reliability):
    reliability("resume", 5)
    reliability("resume")

def test_fails(reliability):
    reliability("files", 2)
    reliability("resume", 4)
    assert False

@pytest.fixture
def fails_at_its_end(reliability):
    yield
    reliability("tasks", 7)
    assert False

def test_passes_and_then_fails(fails_at_its_end):
    pass

def test_tries_nothing():
    pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_the_session_notes_what_its_tests_tried(workers, tmp_path):
    tests, record = tmp_path / "test_tries.py", tmp_path / "record.json"
    tests.write_text(TRIES)
    kept = {"soak": {"tried": 9, "failed": 0}}
    record.write_text(json.dumps({**kept, "resume": {"tried": 1000, "failed": 1}}))
    command = ["-m", "pytest", "-p", "conftest", *workers, tests]
    done = python(*command, environment={**ENVIRONMENT, "RELIABILITY": str(record)})
    assert done.returncode == 1, done.stdout
    assert json.loads(record.read_text()) == {
        **kept,
        "resume": {"tried": 22, "failed": 4},
        "files": {"tried": 2, "failed": 2},
        "tasks": {"tried": 7, "failed": 7},
    }


def test_without_a_file_nothing_is_noted(tmp_path):
    tests = tmp_path / "test_tries.py"
    tests.write_text(TRIES)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "RELIABILITY"}
    done = python("-m", "pytest", "-p", "conftest", tests, environment=environment)
    assert done.returncode == 1, done.stdout
    assert [path.name for path in tmp_path.glob("*.json")] == []


@pytest.mark.parametrize(("row", "count"), [("resum", 1), ("resume", 0), ("resume", 2.5)])
def test_an_unknown_row_or_a_wrong_count_is_an_error(row, count, reliability):
    with pytest.raises(ValueError, match=re.escape(repr(row))):
        reliability(row, count)


def test_the_table_says_what_failed():
    record = {
        "soak": {"tried": 2000, "failed": 0},
        "files": {"tried": 7, "failed": 2},
        "memory": {"tried": 3, "failed": 1},
    }
    cells = [line.strip("| ").split(" | ") for line in render(record).split("\n")[2:]]
    assert [(cell[1], cell[3]) for cell in cells] == [
        ("7", "**failed 2 times**"),
        ("2,000", "held each time"),
        ("3", "**failed 1 time**"),
    ]
    with pytest.raises(ValueError, match="resum"):
        render({"resum": {"tried": 1, "failed": 0}})
