"""Advice: the arithmetic against real runs, the dry run against what it must leave alone, the words against the numbers."""

import copy
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    KnownLoss,
    Shares,
    bert,
    images,
    known_losses,
    same_weights,
    texts,
    trainer,
    values,
    vit,
)
from transformers import Trainer, TrainerCallback

from hf_dynprune import (
    IES,
    KAKURENBO,
    UCB,
    DynamicPruningTrainer,
    EpsilonGreedy,
    FullData,
    InfoBatch,
    OrderDP,
    RandomPruning,
    SeTa,
    StaticPruning,
    advise,
)
from hf_dynprune.advice import Advice, Measured, Settings, assumed_share, predict
from hf_dynprune.report import PHASES
from hf_dynprune.trainer import looks_once

# ---- prediction ----------------------------------------------------------------------------------

RUN = Settings(num_samples=100, batch_size=10, num_epochs=4)
SPENT = Measured(
    steps=20,
    waiting=0.1,
    forward=0.3,
    backward=0.5,
    optimizer=0.1,
    loading=0.1,
    epoch_start=2.0,
    run_start=7.0,
    scoring=0.01,
    scoring_start=0.5,
    evaluation=3.0,
    checkpoint=4.0,
)


def test_a_run_adds_up():
    full = predict(FullData(), RUN, SPENT)
    assert full.seconds == {
        "training": 7 + 40 * 1.0 + 4 * 2,
        "scoring": 0,
        "choosing": 0,
        "evaluation": 0,
    }
    assert (full.steps, full.epochs, full.passes) == (40, 4, 400)
    short = predict(
        FullData(), Settings(num_samples=105, batch_size=10, num_epochs=4), SPENT
    )  # batches of 5 samples
    assert short.seconds["training"] == pytest.approx(7 + 42 * 0.9 + 44 * 0.1 + 4 * 2)
    pruned = predict(UCB(0.3), RUN, SPENT, choosing=0.25)
    assert pruned.seconds == {
        "training": 7 + 12 * 1.0 + 4 * 2,
        "scoring": 0,
        "choosing": 1,
        "evaluation": 0,
    }
    assert (pruned.steps, pruned.passes, pruned.total) == (12, 120, 28)


@pytest.mark.parametrize(
    ("policy", "steps", "scored"),
    [
        (UCB(0.3, scoring="all"), 12, [100] * 4),
        (UCB(0.3, scoring="dropped"), 12, [70] * 3),  # before the first choice nothing was dropped
        (UCB(0.3, scoring="dropped", first=2), 2 * 10 + 2 * 3, [70]),
        (UCB(0.3, scoring="all", period=2), 12, [100] * 2),
        (UCB(0.3, scoring="all", last=0.25), 3 * 3 + 10, [100] * 3),
    ],
)
def test_scoring_passes_are_counted_by_choices(policy, steps, scored):
    prediction = predict(policy, RUN, SPENT)
    assert prediction.steps == steps
    assert prediction.seconds["scoring"] == pytest.approx(len(scored) * 0.5 + sum(scored) * 0.01)
    assert prediction.passes == pytest.approx(steps * 10 + sum(scored) / 3)


def test_what_the_arguments_say_of_evaluation_and_checkpoints():
    def seconds(**settings):
        return predict(UCB(0.3), Settings(100, 10, 4, **settings), SPENT).seconds

    assert seconds(eval_strategy="epoch")["evaluation"] == 4 * 3.0
    assert seconds(eval_strategy="epoch", eval_delay=3, eval_on_start=True)["evaluation"] == 3 * 3.0
    assert (
        seconds(eval_strategy="steps", eval_steps=5)["evaluation"] == 3 * 3.0
    )  # after 5, 10 and the last, 12
    assert seconds(eval_strategy="steps", eval_steps=0.25)["evaluation"] == 4 * 3.0
    assert seconds(save_strategy="epoch")["training"] - seconds()["training"] == 4 * 4.0
    assert seconds()["training"] - seconds(persistent_workers=True)["training"] == 3 * 2.0


POLICIES = [
    FullData(),
    RandomPruning(0.3),
    UCB(0.5, scoring="dropped"),
    UCB(0.3, scoring="all", period=2),
    EpsilonGreedy(0.4, first=1, last=0.4),
    StaticPruning(None, keep_ratio=0.5, keep="random"),
    Shares(),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "epoch", "save_strategy": "epoch"},
        {
            "num_train_epochs": 2.5,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
        },
        {
            "max_steps": 9,
            "dataloader_drop_last": True,
            "eval_strategy": "epoch",
            "save_strategy": "steps",
            "save_steps": 4,
        },
    ],
    ids=["epochs", "half an epoch", "steps"],
)
def test_steps_passes_evaluations_and_checkpoints_are_those_of_the_run(policy, settings, tmp_path):
    data = {"eval_dataset": images(8, seed=1)}
    run = trainer(
        tmp_path, data=images(36), pruning=policy, extra=data, save_total_limit=None, **settings
    )
    measured = changed(waiting=0.0, forward=0.0, backward=0.0, optimizer=1.0)
    prediction = predict(policy, Settings.of(run), measured)
    run.train()
    totals = run.pruning_report.totals
    evaluations = sum("eval_loss" in entry for entry in run.state.log_history)
    assert prediction.steps == run.state.global_step
    assert prediction.epochs == len(run.pruning_report.epochs)
    assert prediction.seconds["evaluation"] == evaluations * SPENT.evaluation
    scorings = sum(epoch.scoring_passes > 0 for epoch in run.pruning_report.epochs)
    assert prediction.seconds["scoring"] == pytest.approx(
        scorings * 0.5 + totals["scoring_passes"] * 0.01
    )
    assert prediction.seconds["training"] - prediction.steps == pytest.approx(
        len(list(tmp_path.glob("checkpoint-*"))) * SPENT.checkpoint
    )
    if "num_train_epochs" not in settings and "max_steps" not in settings:
        assert prediction.passes == pytest.approx(run.pruning_report.passes)


def test_sizes_that_depend_on_the_data_are_assumed_and_say_so():
    assert predict(UCB(0.3), RUN, SPENT).assumed is None
    assert predict(InfoBatch(keep_ratio=0.5), RUN, SPENT).assumed is None
    assert assumed_share(InfoBatch(), 100) == pytest.approx((0.6, 0.9))
    assert assumed_share(SeTa(), 100) == pytest.approx((0.45, 0.75))
    assert assumed_share(KAKURENBO(max_hidden=0.2), 100) == pytest.approx((0.8, 1.0))
    assert assumed_share(IES(), 100) == (0.54, 0.88)
    assert assumed_share(Shares(known=False), 100) == (0.01, 1.0)

    prediction = predict(InfoBatch(last=0.0), RUN, SPENT)
    assert prediction.assumed == pytest.approx((0.6, 0.9))
    assert (prediction.least_seconds, prediction.total) == pytest.approx((15 + 24, 15 + 36))
    assert prediction.passes == 360
    hiding = predict(
        KAKURENBO(), RUN, SPENT
    )  # what is hidden goes forward, but before the first choice
    assert hiding.least_seconds == pytest.approx(15 + 4 * 7 + 3 * (0.5 + 30 * 0.01))


# ---- findings ------------------------------------------------------------------------------------


def advice(*policies, measured=SPENT, **settings):
    settings = Settings(**{**vars(RUN), **settings})
    return Advice(
        settings,
        measured,
        *(lambda full, *rest: (full, list(rest)))(
            *(predict(policy, settings, measured) for policy in (FullData(), *policies))
        ),
    )


def changed(**seconds):
    return Measured(**{**vars(SPENT), "epoch_start": 0.0, "run_start": 0.0, **seconds})


def test_the_answer_and_the_short_run():
    found = advice(RandomPruning(0.3), RandomPruning(0.5), measured=changed())
    assert found.findings["answer"].startswith(
        "Answer: it can pay. All data take 40.0 s; keep_ratio=0.5 20.0 s (50 % less), "
    )
    assert list(found.findings) == ["answer", "short run"]
    assert found.short_epochs(found.predictions[0]) == pytest.approx(1.2)
    assert found.saved(found.predictions[0]) == pytest.approx(0.7)
    assert advice(UCB(1.0, scoring="all")).findings["answer"].startswith("Answer: no.")
    budget = advice(RandomPruning(0.3), num_epochs=None, max_steps=40)
    assert budget.predictions[0].steps == budget.full.steps
    assert "max_steps=40 is a budget" in budget.findings["answer"]


def test_the_loader_is_the_limit():
    slow = changed(waiting=0.6, loading=0.8, forward=0.1, backward=0.2)
    found = advice(RandomPruning(0.5), measured=slow).findings["loader"]
    assert "60 % of a step is waiting for data" in found
    assert "would take 16.0 s instead of 40.0 s" in found
    busy = changed(
        waiting=0.6, loading=0.01, forward=0.1, backward=0.2
    )  # what is between two steps is not all loading
    assert "loader" not in advice(RandomPruning(0.5), measured=busy).findings


def test_scoring_evaluation_and_epoch_starts_eat_the_gain():
    found = advice(
        RandomPruning(0.1), RandomPruning(0.3), measured=changed(), eval_strategy="epoch"
    ).findings
    assert (
        "75 % of RandomPruning(keep_ratio=0.1), and more than 30 % of 1 others"
        in found["evaluation"]
    )
    assert "evaluate less often" in found["evaluation"]
    found = advice(UCB(0.5, scoring="all"), measured=changed(scoring=0.1)).findings
    assert "of UCB(scoring='all', keep_ratio=0.5)." in found["scoring"]
    found = advice(RandomPruning(0.1), measured=changed(epoch_start=5.0), workers=2).findings
    assert "5.0 s an epoch, 20.0 s of 24.0 s" in found["epoch starts"]
    assert (
        "epoch starts"
        not in advice(
            RandomPruning(0.1), measured=changed(epoch_start=5.0), persistent_workers=True
        ).findings
    )


def test_policies_that_cannot_act():
    found = advice(UCB(0.25), UCB(0.5), UCB(0.25, scoring="all"))
    assert [row.acts for row in found.predictions] == [False, True, True]
    assert found.findings["first looks"].startswith("Cannot act: UCB(keep_ratio=0.25). ")
    assert "keep_ratio=0.25 " not in advice(UCB(0.25), UCB(0.5)).findings["answer"]


def test_it_prints_and_is_json():
    found = advice(UCB(0.3), InfoBatch(), eval_strategy="epoch")
    lines = str(found).splitlines()
    assert re.split(r" {2,}", lines[0]) == [
        "policy",
        "cost",
        *PHASES,
        "total",
        "saved",
        "as long: all data for",
    ]
    assert lines[1].startswith("FullData()")
    assert lines[3].startswith("~ InfoBatch(prune_ratio=0.5)")
    assert len({len(line) for line in lines[:4]}) == 1
    rows = json.loads(json.dumps(found.to_dict()))["predictions"]
    assert [row["label"] for row in rows] == [
        "FullData()",
        "UCB(keep_ratio=0.3)",
        "InfoBatch(prune_ratio=0.5)",
    ]
    assert rows[1]["saved"] == pytest.approx(
        1 - rows[1]["total_seconds"] / rows[0]["total_seconds"]
    )
    assert rows[1]["estimate"] is None
    assert rows[2]["estimate"]["kept"] == pytest.approx([0.6, 0.9])


# ---- the dry run ---------------------------------------------------------------------------------


class Counts(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def own_optimizer(model):
    return {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)}


MADE = {
    "stock": (lambda: (vit(dropout=0.3), {}), {"cls": Trainer}),
    "stock, its optimizer, workers": (
        lambda: (lambda model: (model, own_optimizer(model)))(vit(dropout=0.3)),
        {"cls": Trainer, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ),
    "stock, model_init": (
        lambda: (None, {"model_init": lambda: vit(dropout=0.3)}),
        {"cls": Trainer},
    ),
    "pruning": (lambda: (vit(dropout=0.3), {}), {"pruning": UCB(0.5, scoring="dropped")}),
    "pruning, bf16, accumulation": (
        lambda: (vit(dropout=0.3), {}),
        {"pruning": EpsilonGreedy(0.5), "bf16": True, "gradient_accumulation_steps": 2},
    ),
    "pruning texts": (
        lambda: (bert(hidden_dropout_prob=0.3), {}),
        {"pruning": UCB(0.5), "data": texts(padded=True)},
    ),
}


@pytest.mark.parametrize("kind", MADE)
def test_it_leaves_all_as_it_was(kind, tmp_path):
    make, settings = MADE[kind]

    def made(folder):
        random.seed(1)
        np.random.seed(1)
        model, extra = make()
        evaluation = (
            {}
            if "data" in settings
            else {"eval_dataset": images(12, seed=1), "eval_strategy": "epoch"}
        )
        strategy = {"eval_strategy": evaluation.pop("eval_strategy")} if evaluation else {}
        return trainer(
            folder,
            model=model,
            extra={**extra, **evaluation},
            save_strategy="epoch",
            **strategy,
            **settings,
        )

    run = made(tmp_path / "a")
    counts = Counts()
    run.add_callback(counts)
    attributes, weights = dict(vars(run)), copy.deepcopy(run.model.state_dict())
    optimizer = copy.deepcopy(run.optimizer.state_dict()) if run.optimizer else None
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = advise(run, batches=4, policies=[UCB(0.5), UCB(0.5, scoring="dropped")])

    assert found.measured.step > 0
    assert found.measured.checkpoint > 0
    assert found.measured.scoring > 0
    assert (found.measured.evaluation > 0) == (run.eval_dataset is not None)
    assert counts.steps == 0
    assert states[0] == random.getstate()
    assert (states[1] == np.random.get_state()[1]).all()
    assert torch.equal(states[2], torch.get_rng_state())
    assert vars(run).keys() == attributes.keys()
    assert all(vars(run)[name] is value for name, value in attributes.items())
    assert all(torch.equal(weights[name], value) for name, value in run.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert (run.optimizer.state_dict() if run.optimizer else None) == optimizer
    assert list((tmp_path / "a").iterdir()) == []

    run.train()
    without = made(tmp_path / "b")
    without.train()
    assert same_weights(run.model, without.model)
    assert counts.steps == run.state.global_step


class Slow(KnownLoss):
    """Takes 40 ms for 8 samples, in training and in evaluation, or a multiple of that."""

    def __init__(self, times=1):
        super().__init__()
        self.seconds = 0.005 * times

    def forward(self, value, labels=None):
        time.sleep(self.seconds * len(value))
        return super().forward(value, labels)


class SlowSamples(torch.utils.data.Dataset):
    """Takes 4 ms a sample, or a multiple of that."""

    def __init__(self, times=1):
        self.seconds = 0.004 * times

    def __len__(self):
        return 80

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return {"value": float(index + 1)}


SECONDS = {"per_device_eval_batch_size": 8, "num_train_epochs": 3, "remove_unused_columns": False}


def test_it_predicts_a_run_of_known_seconds(tmp_path):
    def made(policy, folder):
        extra = {"per_sample_loss_fn": known_losses, "eval_dataset": values(40)}
        return trainer(
            folder,
            model=Slow(),
            data=SlowSamples(),
            pruning=policy,
            extra=extra,
            eval_strategy="epoch",
            **SECONDS,
        )

    policies = [UCB(0.5), UCB(0.3, scoring="all")]
    found = advise(made(FullData(), tmp_path), policies=policies)
    for prediction in (found.full, *found.predictions):
        run = made(prediction.policy, tmp_path)
        begun = time.perf_counter()
        run.train()
        seconds = time.perf_counter() - begun
        assert prediction.total == pytest.approx(seconds, rel=0.15)
        for phase, measured in run.pruning_report.totals["seconds"].items():
            start = (
                found.measured.run_start if phase == "training" else 0.0
            )  # train()'s own, before the first epoch
            assert prediction.seconds[phase] - start == pytest.approx(measured, rel=0.2, abs=0.2), (
                phase
            )
    m = found.measured
    assert m.waiting == pytest.approx(0.032, rel=0.3)
    assert m.loading == pytest.approx(0.032, rel=0.3)
    assert m.forward == pytest.approx(0.040, rel=0.3)
    assert m.scoring == pytest.approx(0.009, rel=0.3)
    assert "loader" in found.findings


def test_workers_are_measured_behind_the_model(tmp_path):
    """Two workers load 8 samples of 20 ms in 80 ms: less than the 200 ms of a step. All this is sleep, and long beside what
    two workers take to be woken on a busy machine, some 10 ms a batch."""
    extra = {"per_sample_loss_fn": known_losses}
    run = trainer(
        tmp_path,
        model=Slow(times=5),
        data=SlowSamples(times=5),
        pruning=FullData(),
        extra=extra,
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
        **SECONDS,
    )
    m = advise(run, policies=[UCB(0.5)]).measured
    assert 0.06 < m.loading < 0.14  # one worker takes 0.16
    assert m.waiting < 0.06
    assert m.epoch_start > 0.08


def test_what_it_asks_for(tmp_path):
    run = trainer(tmp_path, cls=Trainer, data=images(40))
    labels = [str(prediction.policy) for prediction in advise(run, batches=4).predictions]
    assert len(labels) == 17
    assert labels[0] == "RandomPruning(keep_ratio=0.1)"
    own = trainer(tmp_path, data=images(40), pruning=OrderDP(0.3))
    assert advise(own, batches=4).predictions[0].policy == OrderDP(0.3)
    small = trainer(
        tmp_path, cls=Trainer, data=images(40), dataloader_drop_last=True
    )  # 4 samples do not fill a batch of 8
    assert {
        getattr(p.policy, "keep_ratio", None) for p in advise(small, batches=4).predictions
    } == {0.3, 0.5, 0.7, None}


def test_mistakes(tmp_path):
    with pytest.raises(TypeError, match="is no transformers Trainer"):
        advise("trainer")
    run = trainer(tmp_path, cls=Trainer)
    with pytest.raises(ValueError, match="batches=3 is out of range"):
        advise(run, batches=3)
    run.train_dataset = images().to_iterable_dataset()
    with pytest.raises(ValueError, match="without a length"):
        advise(run)
    small = trainer(tmp_path, cls=Trainer, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="less than one batch of 8"):
        advise(small, policies=[UCB(0.1)])


def test_the_benchmark(tmp_path):
    root = Path(__file__).parents[1]
    options = [
        "--quickstart_epochs",
        "1",
        "--rounds",
        "1",
        "--output",
        str(tmp_path / "advice.json"),
    ]
    command = [sys.executable, str(root / "recipes/benchmarks/advice.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "advice.json").read_text())
    assert [run["run"] for run in result["runs"]] == ["full", "short", "ucb 0.3"]
    for run in result["runs"]:
        assert run["error"] == pytest.approx(run["predicted"] / run["measured"] - 1)
        assert [one["settings"]["num_samples"] for one in run["rounds"]] == [898]
        assert run["measured"] == run["rounds"][0]["measured"]
    assert f"worst: quickstart, {result['worst']['run']}" in done.stdout


# ---- the Trainer says it, too --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "epochs", "once"),
    [
        (UCB(0.3), 3, True),
        (UCB(0.3), 4, False),
        (UCB(0.5), 2, True),
        (UCB.paper_like(keep_ratio=0.3), 20, True),  # two choices
        (EpsilonGreedy(0.1), 10, True),
        (UCB(0.3, first=1), 3, False),
        (UCB(0.3, scoring="all"), 3, False),
        (RandomPruning(0.3), 3, False),
        (StaticPruning(None, 0.3, keep="random"), 3, False),
        (InfoBatch(), 1, False),
        (FullData(), 1, False),
    ],
    ids=repr,
)
def test_looks_once(policy, epochs, once):
    assert looks_once(policy, epochs) is once


def test_the_trainer_says_once_that_scores_decide_nothing(tmp_path, caplog):
    def said(**settings):
        caplog.clear()
        run = trainer(tmp_path, **settings)
        run.train()
        return [
            record
            for record in caplog.records
            if "never observed samples come first" in record.getMessage()
        ]

    (warning,) = said(pruning=UCB(0.3), num_train_epochs=2)
    assert warning.levelname == "WARNING"
    for word in ("2 epochs with UCB(", 'scoring="all"', "first=1"):
        assert word in warning.getMessage()
    assert (
        len(said(pruning=UCB(0.2), max_steps=3)) == 1
    )  # 40 samples, batches of 8: one step an epoch
    assert said(pruning=UCB(0.2), max_steps=6) == []
    assert said(pruning=UCB(0.5), num_train_epochs=3) == []
    assert said(pruning=UCB(0.3, scoring="all"), num_train_epochs=2) == []
    assert said(cls=DynamicPruningTrainer, num_train_epochs=1) == []
