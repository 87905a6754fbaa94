"""Checkpoints: a resumed run is the run that was never interrupted; broken ones are refused."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from hub import Hub
from test_conformance import CASES, policy_of
from tiny import (
    PATIENCE,
    Shares,
    assert_same_run,
    comparable,
    every_checkpoint,
    images,
    learning_rates,
    recorded,
    same_weights,
    trainer,
    vit,
)
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_dynprune import UCB, DynamicPruningTrainer, EpsilonGreedy, RandomPruning
from hf_dynprune.files import STATE_FILE
from hf_dynprune.losses import SIGNALS
from hf_dynprune.report import PruningReport

CHANGING = UCB(keep_ratio=0.4, first=1, last=0.25)  # epochs of 26, 10, 10, 26 samples
GRID = {
    "num_train_epochs": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
}


# ---- exact resume --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [CHANGING, Shares(), EpsilonGreedy(0.5, period=2, first=1, last=0.25)]
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_resuming_from_any_checkpoint_continues_the_identical_run(
    policy, accumulation, tmp_path, reliability
):
    data = images(26)

    def make(folder):
        model = vit(dropout=0.1)
        return trainer(
            folder,
            model=model,
            data=data,
            pruning=policy,
            gradient_accumulation_steps=accumulation,
            **GRID,
        )

    for _ in every_checkpoint(make, tmp_path):
        reliability("resume")


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_resuming_from_any_checkpoint_with_workers(persistent, accumulation, tmp_path, reliability):
    data = images(26)
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}

    def make(folder):
        model = vit(dropout=0.1)
        grid = {
            **GRID,
            **settings,
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": accumulation,
        }
        return trainer(folder, model=model, data=data, pruning=CHANGING, **grid)

    for _ in every_checkpoint(make, tmp_path):
        reliability("resume workers")


@pytest.mark.parametrize(
    "case", [case for case in CASES if set(policy_of(case).signals) <= set(SIGNALS)]
)
def test_every_policy_resumes_in_mid_epoch_and_between_epochs(case, tmp_path, reliability):
    policy, data = policy_of(case), images(26)
    make = lambda folder: trainer(folder, model=vit(dropout=0.1), data=data, pruning=policy, **GRID)  # noqa: E731
    whole = make(tmp_path)
    whole.train()
    lengths = [record.optimizer_steps for record in whole.pruning_report.epochs]
    for step in (lengths[0] + lengths[1], sum(lengths[:2]) + 1):
        part = make(tmp_path / "part")
        part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(part, whole)
        reliability("resume policies")


def test_resuming_a_run_that_is_complete_trains_nothing_more(tmp_path):
    settings = {"save_strategy": "epoch", "num_train_epochs": 2, "pruning": UCB(0.6)}
    whole = trainer(tmp_path, **settings)
    whole.train()
    again = trainer(tmp_path, **settings)
    assert again.train(resume_from_checkpoint=True).metrics["train_samples_per_second"] == 0
    assert same_weights(whole.model, again.model)
    assert comparable(again.pruning_report) == comparable(whole.pruning_report)


# ---- which checkpoint ----------------------------------------------------------------------------


def run_with_checkpoints(folder, **settings):
    return trainer(
        folder, **{"pruning": UCB(0.6), "save_strategy": "steps", "save_steps": 2, **settings}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with the checkpoints 2, 4, 6, 8 and 9, and its folder. Each test gets a copy."""
    folder = tmp_path_factory.mktemp("finished")
    whole = run_with_checkpoints(folder)
    whole.train()
    return whole, folder


@pytest.fixture
def checkpoints(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


def contents(folder):
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path):
    """What a power cut leaves: a file of the right length without content."""
    path.write_bytes(bytes(path.stat().st_size))


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    path.write_bytes(
        (
            path.parent / ("model.safetensors" if path.name == STATE_FILE else STATE_FILE)
        ).read_bytes()
    )


def unreadable(path):
    """Reading it is an EIO, as from a broken disk."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def directory(path):
    path.unlink()
    path.mkdir()


FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "config.json",
    STATE_FILE,
)
FAULTS = [
    (file, fault)
    for file in FILES
    for fault in (truncate, flip, zero, empty, foreign, Path.unlink, unreadable, directory)
    if (file, fault) != ("config.json", flip)  # it may still be a text, see below
]
FAULTS += [
    ("trainer_state.json", fault)
    for fault in (truncate, zero, empty, foreign, Path.unlink, unreadable, directory)
]


@pytest.mark.parametrize(
    ("file", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_broken_checkpoint_is_refused_by_name_and_passed_over_otherwise(
    file, fault, finished, checkpoints, caplog, reliability
):
    fault(checkpoints / "checkpoint-9" / file)
    before = contents(checkpoints)
    with pytest.raises(ValueError, match=rf"(?s)checkpoint-9.*{file}"):
        run_with_checkpoints(checkpoints).train(
            resume_from_checkpoint=str(checkpoints / "checkpoint-9")
        )
    assert contents(checkpoints) == before  # nothing was overwritten
    part = run_with_checkpoints(checkpoints)
    if fault in (unreadable, directory):  # they would be in the way of the next checkpoint
        part.args.save_strategy = "no"
    part.train(resume_from_checkpoint=True)
    assert str(checkpoints / "checkpoint-9") in caplog.text
    assert part.pruning_report.resumed[-1]["step"] == 8
    assert_same_run(part, finished[0])
    reliability("files")


def test_the_newest_complete_checkpoint_is_taken_past_broken_ones(finished, checkpoints, caplog):
    (checkpoints / "checkpoint-9" / "trainer_state.json").unlink()
    truncate(checkpoints / "checkpoint-8" / STATE_FILE)
    shutil.rmtree(checkpoints / "checkpoint-6")
    (checkpoints / "checkpoint-6").mkdir()  # a kill before the first file
    part = run_with_checkpoints(checkpoints)
    part.train(resume_from_checkpoint=True)
    assert part.pruning_report.resumed[-1]["step"] == 4
    for step in (9, 8, 6):
        assert f"checkpoint-{step}: " in caplog.text
    assert_same_run(part, finished[0])


def edit_value(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "note": "served as v1"}))


def indent(path):
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8) + "\n")


def add_a_note(path):
    path.with_name("README.md").write_text("# my best run")


@pytest.mark.parametrize("edit", [edit_value, indent, add_a_note])
def test_a_text_may_be_edited(edit, finished, checkpoints, reliability):
    edit(checkpoints / "checkpoint-8" / "config.json")
    shutil.rmtree(checkpoints / "checkpoint-9")
    part = run_with_checkpoints(checkpoints)
    part.train(resume_from_checkpoint=True)
    assert part.pruning_report.resumed[-1]["step"] == 8
    assert_same_run(part, finished[0])
    reliability("restoring")


@pytest.mark.parametrize("requested", [5, 1, 2.5, b"checkpoint-9", ["checkpoint-9"]])
def test_what_is_no_folder_is_refused(requested, tmp_path, reliability):
    with pytest.raises(TypeError, match=re.escape(f"resume_from_checkpoint={requested!r}")):
        run_with_checkpoints(tmp_path).train(resume_from_checkpoint=requested)
    reliability("restoring")


def test_the_folder_of_the_run_is_no_checkpoint(checkpoints, reliability):
    for requested in (checkpoints, checkpoints / "checkpoint-9" / "config.json"):
        with pytest.raises(ValueError, match=str(requested)) as caught:
            run_with_checkpoints(checkpoints).train(resume_from_checkpoint=requested)
        assert ("checkpoint-9" in str(caught.value)) or requested != checkpoints
    reliability("restoring", 2)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("fault", [truncate, empty, unreadable])
def test_a_stock_checkpoint_that_cannot_be_read_is_passed_over(file, fault, tmp_path, reliability):
    stock_run(tmp_path, save_total_limit=2)  # of 20 steps
    fault(tmp_path / "checkpoint-20" / file)
    run = trainer(tmp_path, pruning=UCB(0.6), optim="sgd", num_train_epochs=4)
    run.train(resume_from_checkpoint=True, stock_checkpoint=True)
    assert run.pruning_report.resumed[-1]["step"] == 19
    reliability("restoring")


def test_states_of_different_steps_do_not_make_a_checkpoint(checkpoints):
    shutil.copy(
        checkpoints / "checkpoint-6" / "trainer_state.json",
        checkpoints / "checkpoint-8" / "trainer_state.json",
    )
    with pytest.raises(ValueError, match=r"of step 6.* of step 8"):
        run_with_checkpoints(checkpoints).train(
            resume_from_checkpoint=str(checkpoints / "checkpoint-8")
        )


def test_no_complete_checkpoint_at_all(checkpoints):
    for folder in checkpoints.glob("checkpoint-*"):
        empty(folder / STATE_FILE)
    with pytest.raises(ValueError, match=r"\(5 found\)"):
        run_with_checkpoints(checkpoints).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_written_over_another_is_complete_only_at_its_end(checkpoints):
    """A new run in the same folder is killed before the Trainer writes its own state."""

    class Killed(DynamicPruningTrainer):
        def _save_rng_state(self, output_dir):
            super()._save_rng_state(output_dir)
            raise KeyboardInterrupt

    again = trainer(
        checkpoints, cls=Killed, pruning=UCB(0.6), save_strategy="steps", save_steps=2, seed=7
    )
    with pytest.raises(KeyboardInterrupt):
        again.train()
    with pytest.raises(ValueError, match=r"trainer_state\.json"):
        run_with_checkpoints(checkpoints, seed=7).train(
            resume_from_checkpoint=str(checkpoints / "checkpoint-2")
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning": UCB(keep_ratio=0.6, c=2.0)}, r"'c': 1.0.*'c': 2.0"),
        ({"pruning": UCB(keep_ratio=0.5)}, r"'keep_ratio': 0.6.*'keep_ratio': 0.5"),
        ({"pruning": EpsilonGreedy(keep_ratio=0.6)}, r"ucb.*epsilon-greedy"),
        ({"data": images(41)}, r"40.*41"),
        ({"data": images(40, seed=9)}, "fingerprint"),
        ({"per_device_train_batch_size": 4}, r"global batch: 8 there, 4 here"),
        ({"gradient_accumulation_steps": 2}, r"gradient accumulation: 1 there, 2 here"),
        ({"dataloader_drop_last": True}, r"drop_last: False there, True here"),
        ({"seed": 1}, r"seed: 42 there, 1 here"),
        ({"data_seed": 1}, r"data seed: 42 there, 1 here"),
    ],
)
def test_another_run_is_refused_on_resume_with_both_values(
    changes, message, checkpoints, reliability
):
    before = contents(checkpoints)
    with pytest.raises(
        ValueError,
        match=message,
    ):
        run_with_checkpoints(checkpoints, **changes).train(
            resume_from_checkpoint=str(checkpoints / "checkpoint-2")
        )
    assert contents(checkpoints) == before
    reliability("refused")


# ---- checkpoints of the stock Trainer ------------------------------------------------------------


def stock_run(folder, **settings):
    run = trainer(
        folder,
        cls=Trainer,
        save_strategy="steps",
        save_steps=1,
        optim="sgd",
        num_train_epochs=4,
        **settings,
    )
    run.train()
    return run


def test_a_stock_checkpoint_is_refused_with_the_way_out(tmp_path):
    stock_run(tmp_path)
    with pytest.raises(ValueError, match=rf"{STATE_FILE}.*stock_checkpoint=True"):
        run_with_checkpoints(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    newest = re.escape(str(tmp_path / "checkpoint-20"))
    with pytest.raises(ValueError, match=rf"{newest}.*stock_checkpoint=True"):
        run_with_checkpoints(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "step", [10, 7]
)  # at the end of an epoch, and in the middle of one of 5 steps
def test_a_stock_checkpoint_is_continued_on_purpose(step, tmp_path, caplog):
    stock_run(tmp_path / "stock")
    checkpoint = tmp_path / "stock" / f"checkpoint-{step}"
    run = trainer(tmp_path, pruning=UCB(0.6), optim="sgd", num_train_epochs=4)
    batches = recorded(run)
    run.train(resume_from_checkpoint=str(checkpoint), stock_checkpoint=True)
    began = step // 5
    assert f"epoch {began} " in caplog.text
    epochs = [batches[i : i + 3] for i in range(0, len(batches), 3)]  # of 24 samples
    assert [len({i for batch in epoch for i in batch}) for epoch in epochs] == [24] * (4 - began)
    report = run.pruning_report
    assert report.totals["forward_passes"] == 8 * step + 24 * (4 - began)
    assert report.resumed == [{"epoch": began, "step": step, "stock_checkpoint": True}]
    assert report.num_epochs == 4
    assert run.state.global_step == run.state.max_steps == step + 3 * (4 - began)
    ours = learning_rates(run)[step:]  # 3 steps an epoch, of 12 in all
    assert ours == pytest.approx([1e-2 * (1 - v / 12) for v in range(3 * began, 12)])
    assert "stock" not in json.dumps(comparable(report))


def test_the_newest_stock_checkpoint_is_found_on_purpose(tmp_path):
    stock_run(tmp_path)
    run = trainer(tmp_path, pruning=UCB(0.6), optim="sgd", num_train_epochs=6)
    run.train(resume_from_checkpoint=True, stock_checkpoint=True)
    assert run.pruning_report.resumed == [{"epoch": 4, "step": 20, "stock_checkpoint": True}]


def test_a_stock_checkpoint_that_is_broken_is_refused_on_purpose_too(tmp_path):
    stock_run(tmp_path)
    empty(tmp_path / "checkpoint-5" / "trainer_state.json")
    with pytest.raises(ValueError, match=r"trainer_state\.json"):
        run_with_checkpoints(tmp_path).train(str(tmp_path / "checkpoint-5"), stock_checkpoint=True)


# ---- options of the Trainer ----------------------------------------------------------------------


def test_ignore_data_skip_restarts_the_interrupted_epoch(checkpoints, tmp_path, reliability):
    run = run_with_checkpoints(tmp_path / "b", ignore_data_skip=True)
    batches = recorded(run)
    run.train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))
    assert len(batches) == 9  # 3 of the interrupted epoch, 3 of each that follows
    assert run.state.global_step == run.state.max_steps == 11
    reliability("trainer options")


def test_save_only_model_leaves_nothing_to_resume(tmp_path, reliability):
    run = run_with_checkpoints(tmp_path, save_only_model=True)
    run.train()
    assert not list(tmp_path.rglob(STATE_FILE))
    with pytest.raises(ValueError, match=f"{STATE_FILE}.*save_only_model=True"):
        run_with_checkpoints(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    reliability("trainer options")


def test_save_total_limit_keeps_the_newest_and_resumes(finished, tmp_path, reliability):
    run = run_with_checkpoints(tmp_path, save_total_limit=1)
    run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]
    again = run_with_checkpoints(tmp_path, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert_same_run(again, finished[0])
    reliability("trainer options")


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}


def test_load_best_model_at_end(tmp_path, reliability):
    extra = {"eval_dataset": images(10, seed=3)}
    settings = {"extra": extra, "save_total_limit": 2, "learning_rate": 0.05, **BEST}
    whole = run_with_checkpoints(tmp_path / "whole", **settings)
    whole.train()
    losses = {
        entry["step"]: entry["eval_loss"]
        for entry in whole.state.log_history
        if "eval_loss" in entry
    }
    best = min(losses, key=losses.get)
    assert best != max(losses)  # the best is not the last, or nothing is tested here
    assert whole.state.best_global_step == best
    assert whole.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert (
        whole.pruning_report.metrics["eval_loss"] == losses[max(losses)]
    )  # of the last, not of the best
    part = run_with_checkpoints(tmp_path / "whole", **settings)
    newest = max(int(path.name.split("-")[1]) for path in (tmp_path / "whole").glob("checkpoint-*"))
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{newest}"))
    assert same_weights(part.model, whole.model)
    reliability("trainer options")


def test_early_stopping_ends_the_run_and_its_record(tmp_path, reliability):
    extra = {
        "eval_dataset": images(10, seed=3),
        "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)],
    }
    run = run_with_checkpoints(
        tmp_path, extra=extra, num_train_epochs=20, learning_rate=0.0, **BEST
    )
    run.train()
    report = run.pruning_report
    assert (
        run.state.global_step == 4
    )  # the loss of the second evaluation is no better than that of the first
    assert sum(record.optimizer_steps for record in report.epochs) == 4
    assert report.num_epochs == pytest.approx(4 / 3)
    assert report.totals["forward_passes"] == 24 + 8
    assert report.cost_ratio == pytest.approx(32 / (40 * 4 / 3))
    reliability("trainer options")


def test_auto_find_batch_size_retries_start_fresh_and_resume(tmp_path, reliability):
    class Crowded(DynamicPruningTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.pruner.batches_done == 1 and len(inputs["labels"]) > 4:
                raise RuntimeError("CUDA out of memory.")  # what accelerate looks for
            return super().training_step(model, inputs, num_items_in_batch)

    settings = {"cls": Crowded, "auto_find_batch_size": True}
    run = run_with_checkpoints(tmp_path, **settings)
    run.train()
    assert run.pruner.shape.batch_size < 8
    assert [record.forward_passes for record in run.pruning_report.epochs] == [24] * 3
    part = run_with_checkpoints(tmp_path / "b", **settings)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert part.pruner.shape.batch_size == run.pruner.shape.batch_size
    assert_same_run(part, run)
    reliability("trainer options")


def test_hyperparameter_search_starts_each_trial_with_an_empty_table(tmp_path, reliability):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    reports, tables = [], []

    class Noting(DynamicPruningTrainer):
        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            reports.append(copy.deepcopy(self.pruning_report))
            tables.append(self.pruner.table["times_kept"].clone())
            return result

    run = trainer(
        tmp_path,
        cls=Noting,
        pruning=UCB(0.6),
        eval_strategy="epoch",
        model=None,
        extra={"model_init": lambda trial: vit(), "eval_dataset": images(8)},
    )
    best = run.hyperparameter_search(
        hp_space=lambda trial: {
            "learning_rate": trial.suggest_categorical("learning_rate", [1e-3, 1e-1]),
            "per_device_train_batch_size": trial.suggest_categorical(
                "per_device_train_batch_size", [4, 8]
            ),
        },
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.GridSampler(
            {"learning_rate": [1e-3, 1e-1], "per_device_train_batch_size": [4, 8]}, seed=0
        ),
    )
    assert best.hyperparameters["learning_rate"] in (1e-3, 1e-1)
    assert len(reports) == 3
    assert {report.epochs[0].optimizer_steps for report in reports} == {3, 6}  # of 8 and of 4
    for report, kept in zip(reports, tables, strict=True):
        assert [record.epoch for record in report.epochs] == [0, 1, 2]
        assert int(kept.sum()) == 3 * 24
    reliability("trainer options")


PUSHING = """
import sys
from tiny import trainer
from hf_dynprune import UCB

folder, *strategies = sys.argv[1:]
for strategy in strategies:
    run = trainer(
        f"{folder}/{strategy}",
        pruning=UCB(0.6),
        push_to_hub=True,
        hub_model_id=f"user/{strategy}",
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
    )
    run.train()
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after a run of each strategy in one child process, and the folder of the runs."""
    folder, tests = tmp_path_factory.mktemp("pushed"), Path(__file__).parent
    strategies = ["checkpoint", "all_checkpoints", "every_save"]
    with Hub() as hub:
        environment = {**hub.environment(folder / "home"), "PYTHONPATH": f"{tests}:{tests.parent}"}
        command = [sys.executable, "-W", "ignore", "-c", PUSHING, str(folder), *strategies]
        subprocess.run(command, env=environment, check=True, timeout=PATIENCE)
    return hub, folder


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_on_the_hub_can_be_resumed(strategy, finished, pushed, tmp_path, reliability):
    names = (
        ["last-checkpoint"]
        if strategy == "checkpoint"
        else [f"checkpoint-{step}" for step in (2, 4, 6, 8, 9)]
    )
    files = pushed[0].files[f"user/{strategy}"]
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        for path, data in files.items():
            if path.startswith(f"{name}/"):
                (folder / path.removeprefix(f"{name}/")).write_bytes(data)
        part = run_with_checkpoints(tmp_path / "part")
        part.train(resume_from_checkpoint=str(folder))
        assert_same_run(part, finished[0])
    reliability("trainer options")


def test_pushes_in_mid_run_leave_the_run_as_it_is(finished, pushed, reliability):
    hub, folder = pushed
    messages = [message for name, message in hub.commits if name == "user/every_save"]
    # The Trainer uploads in the background, and its next save overwrites the files. Then
    # huggingface_hub gives up that upload. Nothing overtakes the last one.
    expected = [f"Training in progress, step {step}" for step in (2, 4, 6, 8, 9)]
    assert messages == [message for message in expected if message in messages]
    assert messages[-1] == expected[-1]
    assert not any(path.startswith(("checkpoint", "last")) for path in hub.files["user/every_save"])
    saved = torch.load(folder / "every_save" / "checkpoint-9" / "optimizer.pt")
    expected = finished[0].optimizer.state_dict()
    assert all(
        torch.equal(value, expected["state"][key][name])
        for key, state in saved["state"].items()
        for name, value in state.items()
    )
    reliability("trainer options")


# ---- runs of one trainer -------------------------------------------------------------------------


def test_a_second_train_starts_fresh(tmp_path):
    first = trainer(tmp_path, pruning=UCB(0.5), learning_rate=0.0)
    first.train()
    before = {name: first.pruner.table[name].clone() for name in first.pruner.table.columns}
    report = first.pruning_report
    first.train()
    assert first.pruning_report is not report
    assert comparable(first.pruning_report) == comparable(report)
    assert all(torch.equal(before[name], first.pruner.table[name]) for name in before)


def test_a_loader_made_by_the_user_does_not_disturb_the_run(tmp_path):
    from transformers import TrainerCallback

    class Nosy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            run.get_train_dataloader()

    run = trainer(tmp_path, pruning=RandomPruning(0.5), extra={"callbacks": [Nosy()]})
    run.train()
    assert run.pruning_report.totals["forward_passes"] == 60


# ---- runs that do not end in the ordinary way ----------------------------------------------------


class Stops(TrainerCallback):
    """Raises, or ends the epoch, at an event."""

    def __init__(self, event, when, act):
        self.event, self.when, self.act = event, when, act

    def __getattribute__(self, name):
        if name.startswith("on_") and name == self.event:
            return self.happens
        return super().__getattribute__(name)

    def happens(self, args, state, control, **kwargs):
        if self.when(state):
            self.act(control)
        return control


def ctrl_c(control):
    raise KeyboardInterrupt


def gives_up(control):
    raise optuna.TrialPruned


def fails(control):
    raise OSError("the disk is full")


ENDS = [
    ("on_step_end", 7, ctrl_c),
    ("on_step_end", 5, ctrl_c),
    ("on_evaluate", 4, gives_up),
    ("on_save", 6, fails),
    ("on_log", 8, fails),
    ("on_epoch_begin", 10, ctrl_c),
]


@pytest.mark.parametrize(("event", "step", "act"), ENDS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_is_broken_off_counts_what_it_trained(
    event, step, act, accumulation, tmp_path, reliability
):
    """40 of 80 samples an epoch, in batches of 8 or 4: five steps."""

    def made(folder, *callbacks):
        return trainer(
            folder,
            data=images(80),
            pruning=UCB(0.5),
            num_train_epochs=3,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=3,
            extra={"callbacks": list(callbacks), "eval_dataset": images(8)},
        )

    stops = Stops(event, lambda state: state.global_step == step, act)
    broken = made(tmp_path, stops)
    with pytest.raises((KeyboardInterrupt, OSError, optuna.TrialPruned)):
        broken.train()
    report = PruningReport.from_dict(broken.pruning_report.to_dict())
    assert broken.state.global_step == report.totals["optimizer_steps"] == step
    assert report.totals["forward_passes"] == 8 * step
    assert report.num_epochs == pytest.approx(step / 5)
    assert report.cost_ratio == pytest.approx(0.5)
    before = report.totals["seconds"]
    assert before["training"] > 0
    assert (broken.pruner.table.observed.sum() > 0) == (step > 0)
    broken.remove_callback(stops)
    broken.evaluate()  # a look at the model takes no time of the training
    assert broken.pruning_report.totals["seconds"]["training"] == before["training"]

    again, whole = made(tmp_path), made(tmp_path / "whole")
    if step == 5:
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    else:
        again.train(resume_from_checkpoint=True)
    whole.train()
    assert_same_run(again, whole)
    reliability("interrupted")


def test_a_run_that_is_broken_off_while_it_scores(tmp_path, reliability):
    class Interrupted(DynamicPruningTrainer):
        def _score(self, epoch, index):
            if epoch == 1:
                raise KeyboardInterrupt
            return super()._score(epoch, index)

    run = trainer(tmp_path, cls=Interrupted, pruning=UCB(0.5, scoring="all"))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    report = run.pruning_report
    assert [record.optimizer_steps for record in report.epochs] == [3, 0]
    assert report.num_epochs == 1
    assert report.totals["forward_passes"] == 20
    assert report.totals["scoring_passes"] == 40
    reliability("interrupted")


@pytest.mark.parametrize("save", ["epoch", "steps"])
def test_epochs_that_are_stopped_count_in_part_and_are_not_continued(save, tmp_path, reliability):
    """Three of five batches of each epoch are trained."""

    def third(control):
        control.should_epoch_stop = True

    def made(folder):
        stop = Stops("on_step_end", lambda state: state.global_step % 3 == 0, third)
        settings = {"save_strategy": save, "save_steps": 1, "extra": {"callbacks": [stop]}}
        return trainer(folder, data=images(80), pruning=UCB(0.5), **settings)

    whole = made(tmp_path)
    whole.train()
    report = whole.pruning_report
    assert [record.optimizer_steps for record in report.epochs] == [3, 3, 3]
    assert report.num_epochs == pytest.approx(1.8)
    assert report.cost_ratio == pytest.approx(0.5)
    steps = (3, 6) if save == "epoch" else (2, 3, 5, 6, 8)
    for step in steps:
        part = made(tmp_path / "part")
        part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(part, whole)
        reliability("interrupted")


def test_an_epoch_that_is_begun_again_counts_all_of_its_steps(checkpoints, tmp_path):
    run = run_with_checkpoints(tmp_path / "b", ignore_data_skip=True)
    run.train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))
    report = run.pruning_report
    assert report.totals["optimizer_steps"] == run.state.global_step == 11
    assert report.totals["forward_passes"] == 8 * 11
    assert report.num_epochs == 3
