"""Advice: the arithmetic equals real runs, a dry run changes nothing, findings hold the numbers."""

import copy
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import python
from tiny import (
    KnownLoss,
    Shares,
    bert,
    images,
    known_losses,
    llama,
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
    EffectiveShare,
    EpsilonGreedy,
    FullData,
    InfoBatch,
    LossProportional,
    OrderDP,
    RandomPruning,
    SeTa,
    StaticPruning,
    advise,
)
from hf_dynprune.advice import (
    Advice,
    Measured,
    Potential,
    Settings,
    _check_same,
    _typical_step,
    finished_run,
    predict,
)
from hf_dynprune.potential import Saving, predicted_saving
from hf_dynprune.report import PHASES, EpochRecord, PruningReport
from hf_dynprune.schedule import RunShape
from hf_dynprune.scores import Scores

# ---- prediction ----------------------------------------------------------------------------------


def settings_of(samples=100, batch_size=10, num_epochs=4, max_steps=None, **options):
    shape = RunShape(samples, batch_size, num_epochs=num_epochs, max_steps=max_steps)
    return Settings(shape, **options)


RUN = settings_of()
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
    short = predict(FullData(), settings_of(samples=105), SPENT)  # 4 batches have 5 samples
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
        (UCB(0.3, scoring="dropped"), 12, [70] * 3),  # nothing is dropped before the first choice
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


def test_evaluations_and_checkpoints_follow_the_arguments():
    def seconds(**settings):
        return predict(UCB(0.3), settings_of(**settings), SPENT).seconds

    assert seconds(eval_strategy="epoch")["evaluation"] == 4 * 3.0
    assert seconds(eval_strategy="epoch", eval_delay=3, eval_on_start=True)["evaluation"] == 3 * 3.0
    # After steps 5, 10 and the last, 12.
    assert seconds(eval_strategy="steps", eval_steps=5)["evaluation"] == 3 * 3.0
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


def test_sizes_that_depend_on_the_data_are_assumed():
    assert predict(UCB(0.3), RUN, SPENT).assumed is None
    assert predict(InfoBatch(keep_ratio=0.5), RUN, SPENT).assumed is None
    assert InfoBatch().expected_share(100) == pytest.approx((0.6, 0.9))
    assert SeTa().expected_share(100) == pytest.approx((0.45, 0.75))
    assert KAKURENBO(max_hidden=0.2).expected_share(100) == pytest.approx((0.8, 1.0))
    assert IES().expected_share(100) == (0.54, 0.88)
    assert Shares(known=False).expected_share(100) == (0.01, 1.0)

    prediction = predict(InfoBatch(last=0.0), RUN, SPENT)
    assert prediction.assumed == pytest.approx((0.6, 0.9))
    assert (prediction.least_seconds, prediction.total) == pytest.approx((15 + 24, 15 + 36))
    assert prediction.passes == 360
    # Hidden samples go forward before each choice except the first.
    hiding = predict(KAKURENBO(), RUN, SPENT)
    assert hiding.least_seconds == pytest.approx(15 + 4 * 7 + 3 * (0.5 + 30 * 0.01))


# ---- findings ------------------------------------------------------------------------------------


def advice(*policies, measured=SPENT, **settings):
    settings = settings_of(**settings)
    full, *others = (predict(policy, settings, measured) for policy in (FullData(), *policies))
    return Advice(settings, measured, full, others)


def changed(**seconds):
    return Measured(**{**vars(SPENT), "epoch_start": 0.0, "run_start": 0.0, **seconds})


def test_the_answer_and_the_short_run():
    found = advice(RandomPruning(0.3), RandomPruning(0.5), measured=changed())
    for number in ("40.0 s", "keep_ratio=0.5 takes 20.0 s (50 % less)", "12.0 s (70 % less)"):
        assert number in found.findings["answer"]
    assert list(found.findings) == ["potential", "answer", "short run"]
    assert found.short_epochs(found.predictions[0]) == pytest.approx(1.2)
    assert found.saved(found.predictions[0]) == pytest.approx(0.7)
    assert advice(UCB(1.0, scoring="all")).findings["answer"].count("10 %") == 1
    budget = advice(RandomPruning(0.3), num_epochs=None, max_steps=40)
    assert budget.predictions[0].steps == budget.full.steps
    assert "max_steps=40" in budget.findings["answer"]


def test_the_loader_is_the_bottleneck():
    slow = changed(waiting=0.6, loading=0.8, forward=0.1, backward=0.2)
    found = advice(RandomPruning(0.5), measured=slow).findings["loader"]
    for number in ("60 %", "16.0 s", "40.0 s"):
        assert number in found
    assert "sequential" not in found
    # An order that saves less than a notable share of the loading is not named.
    for seconds, share in ((0.2, "25 %"), (0.7, None)):
        found = advice(measured=replace(slow, loading_in_order=seconds)).findings["loader"]
        assert ("train_sampling_strategy='sequential'" in found) == (share is not None)
        assert share is None or share in found
    # The time between two steps is not loading alone.
    busy = changed(waiting=0.6, loading=0.01, forward=0.1, backward=0.2)
    assert "loader" not in advice(RandomPruning(0.5), measured=busy).findings


def test_scoring_evaluation_and_epoch_starts_eat_the_gain():
    found = advice(
        RandomPruning(0.1), RandomPruning(0.3), measured=changed(), eval_strategy="epoch"
    ).findings
    assert "75 % of RandomPruning(keep_ratio=0.1)" in found["evaluation"]
    assert "eval_strategy" in found["evaluation"]
    found = advice(UCB(0.5, scoring="all"), measured=changed(scoring=0.1)).findings
    assert "UCB(scoring='all', keep_ratio=0.5)" in found["scoring"]
    found = advice(RandomPruning(0.1), measured=changed(epoch_start=5.0), workers=2).findings
    for number in ("5.0 s", "20.0 s", "24.0 s"):
        assert number in found["epoch starts"]
    kept = {"workers": 2, "persistent_workers": True}
    found = advice(RandomPruning(0.1), measured=changed(epoch_start=5.0), **kept).findings
    assert "epoch starts" not in found


def test_policies_that_cannot_act():
    found = advice(UCB(0.25), UCB(0.5), UCB(0.25, scoring="all"))
    assert [row.acts for row in found.predictions] == [False, True, True]
    assert "UCB(keep_ratio=0.25)." in found.findings["first looks"]
    assert "UCB(keep_ratio=0.5)" not in found.findings["first looks"]
    assert "keep_ratio=0.25 " not in advice(UCB(0.25), UCB(0.5)).findings["answer"]


def test_it_prints_and_is_json():
    found = advice(UCB(0.3), InfoBatch(), eval_strategy="epoch")
    first, _, *lines = str(found).splitlines()
    assert first == found.findings["potential"]
    assert re.split(r" {2,}", lines[0])[:-1] == ["policy", "cost", *PHASES, "total", "saved"]
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


# ---- after a finished run ------------------------------------------------------------------------


def finished(*shares, samples=100, passes=100, **given):
    records = [
        EpochRecord(i, True, samples, passes, passes, effective_share=share)
        for i, share in enumerate(shares)
    ]
    return PruningReport(FullData().to_dict(), samples, 0, 0, epochs=records, **given)


@pytest.mark.parametrize(
    ("shares", "num_epochs", "ratio"),
    [
        ([0.9, 0.78], 5, 0.4),  # 2 of 5 epochs
        ([0.999], 4, 0.25),
        ([0.8], 1, 0.8),  # as long as the full run: 1 / G
        ([0.1], 1, 0.1),
        ([0.01], 1, 0.05),
        ([0.8], None, 0.8),  # max_steps
    ],
)
def test_potential_of_a_finished_run(shares, num_epochs, ratio):
    steps = {} if num_epochs else {"max_steps": 10}
    shape = RunShape(100, 10, num_epochs=num_epochs, **steps)
    found = Potential.of(finished(*shares), shape, "runs/short")
    assert found.gain == pytest.approx(np.mean([1 / share for share in shares]))
    assert found.keep_ratio == pytest.approx(ratio)
    assert found.saving == predicted_saving(found.gain)
    shown = str(found)
    assert f"{100 / found.saving.factor:.0f} %" in shown
    assert str(LossProportional(ratio)) in shown
    assert "runs/short" in shown


@pytest.mark.parametrize(
    ("saving", "prunes"),
    [
        (Saving(1.5, 1.2, 1.8), True),  # all of the interval saves
        (Saving(1.2, 0.7, 1.8), None),
        (Saving(1.0, 0.7, 1.3), False),
    ],
)
def test_prune_or_not(saving, prunes):
    found = Potential("a run", 1.2, 0.3, saving)
    assert found.prunes is prunes
    assert json.loads(json.dumps(found.to_dict()))["prune"] is prunes
    takes_the_short_run = "Take the short run" in str(found)
    assert takes_the_short_run is (prunes is False)


def test_finished_runs_are_found_by_report_file_folder_and_checkpoint(tmp_path):
    run = trainer(tmp_path, data=images(40), pruning=FullData(), save_strategy="epoch")
    run.train()
    report = run.pruning_report
    report.save(tmp_path / "report.json")
    for place in (report, tmp_path, str(tmp_path / "report.json"), tmp_path / "checkpoint-15"):
        assert finished_run(place)[0].gain == report.gain
    with pytest.raises(ValueError, match=r"checkpoint-5 is of epoch 1 of 3"):
        finished_run(tmp_path / "checkpoint-5")


def test_a_finished_run_that_set_its_own_cost(tmp_path):
    policy = EffectiveShare(most=0.5)
    run = trainer(tmp_path, data=images(40), pruning=policy, save_strategy="epoch")
    run.train()
    steps = run.state.global_step
    assert steps < 15
    assert finished_run(tmp_path / f"checkpoint-{steps}")[0].gain == run.pruning_report.gain


def test_what_else_a_potential_says():
    shape = RunShape(100, 10, num_epochs=10)
    report = finished(0.5)  # one epoch: a tenth of the data in each of ten is a first look
    idle = Potential.of(report, shape, "a run")
    assert idle.keep_ratio == 0.1
    assert not idle.acts
    assert not idle.same_data
    two = finished(0.5, 0.5, provenance={"dataset": {"fingerprint": "known"}})
    acting = Potential.of(two, shape, "a run")
    assert acting.acts
    assert acting.same_data
    assert len(str(idle)) > len(str(acting))
    assert idle.to_dict()["acts"] is idle.to_dict()["same_data"] is False


def test_a_run_of_other_data_is_refused(tmp_path):
    run = trainer(tmp_path, data=images(40), pruning=FullData(), num_train_epochs=1)
    run.train()
    report = run.pruning_report
    other = trainer(tmp_path, cls=Trainer, data=images(40, seed=1))
    with pytest.raises(ValueError, match="labels of the given run"):
        advise(other, after=report)
    # The same labels, other images: refused, unless the dataset is said to be the same.
    theirs = report.provenance["dataset"]["fingerprint"]
    changed = images(40).map(lambda row: {"pixel_values": row["pixel_values"] + 1})
    with pytest.raises(ValueError, match=f"pruning_fingerprint='{theirs}'"):
        advise(trainer(tmp_path, cls=Trainer, data=changed), after=report)
    changed.pruning_fingerprint = theirs
    _check_same(report, trainer(tmp_path, cls=Trainer, data=changed), "the given run")
    with pytest.raises(ValueError, match=r"40 samples.* 41"):
        advise(trainer(tmp_path, cls=Trainer, data=images(41)), after=report)
    text = trainer(tmp_path, cls=Trainer, model=bert(), data=texts(n=40))
    with pytest.raises(ValueError, match=r"task.*image-classification.*text-classification"):
        advise(text, after=report)
    for record in report.epochs:
        record.effective_share = None
    with pytest.raises(ValueError, match="the given run has no effective share"):
        advise(trainer(tmp_path, cls=Trainer, data=images(40)), after=report)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        advise(run, after=tmp_path / "nowhere")


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
        lambda: (llama(attention_dropout=0.3), {}),
        {"pruning": UCB(0.5), "data": texts("causal LM", padded=True)},
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


class FakeClock:
    """A clock that only models and datasets of a test move, so that seconds are exact."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Slow(KnownLoss):
    """Takes 5 ms per sample of the clock, in training and in evaluation."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def __deepcopy__(self, memo):  # all copies move the same clock
        return Slow(self.clock)

    def forward(self, value, labels=None):
        self.clock.seconds += 0.005 * len(value)
        return super().forward(value, labels)


class SlowSamples(torch.utils.data.Dataset):
    """80 samples. Each takes 4 ms of the clock."""

    def __init__(self, clock):
        self.clock = clock

    def __len__(self):
        return 80

    def __getitem__(self, index):
        self.clock.seconds += 0.004
        return {"value": float(index + 1)}


SECONDS = {"per_device_eval_batch_size": 8, "num_train_epochs": 3, "remove_unused_columns": False}


def test_it_predicts_a_run_of_known_seconds(tmp_path, monkeypatch):
    """If only samples and forward passes take time, the prediction is off by a batch per epoch.

    The loader is one batch ahead: the first step of an epoch waits for two batches and the last for
    none. How much of this counts as starting the loader depends on the length of the epochs. The
    same holds for the five batches that are timed of a scoring pass.
    """
    batch = 8 * 0.004  # seconds to load it
    clock = FakeClock()
    monkeypatch.setattr("time.perf_counter", clock)
    monkeypatch.setattr("time.time", clock)  # the Trainer's `eval_runtime`

    def made(policy):
        return trainer(
            tmp_path,
            model=Slow(clock),
            data=SlowSamples(clock),
            pruning=policy,
            extra={"per_sample_loss_fn": known_losses, "eval_dataset": values(40)},
            eval_strategy="epoch",
            **SECONDS,
        )

    policies = [UCB(0.5), UCB(0.3, scoring="all")]
    found = advise(made(FullData()), policies=policies)
    for prediction in (found.full, *found.predictions):
        run = made(prediction.policy)
        begun = clock.seconds
        run.train()
        assert prediction.total == pytest.approx(clock.seconds - begun, rel=0.06, abs=3 * batch)
        spent = run.pruning_report.totals["seconds"]
        assert prediction.seconds == pytest.approx(spent, rel=0.06, abs=3 * batch)
    m = found.measured
    assert 10 * m.waiting + m.epoch_start == pytest.approx(10 * batch, rel=0.02)  # an epoch
    assert m.loading == pytest.approx(batch, rel=0.15)
    assert m.forward == pytest.approx(8 * 0.005)
    assert m.scoring == pytest.approx(0.004 + 0.005, rel=0.15)
    assert m.evaluation == pytest.approx(40 * 0.005)
    assert (m.backward, m.optimizer, m.run_start) == pytest.approx((0, 0, 0))
    assert "loader" in found.findings


class Disk(SlowSamples):
    """A sample takes 20 ms of the clock, but 1 ms if the one before it was read last."""

    last = -1

    def __getitem__(self, index):
        self.clock.seconds += 0.001 if index == self.last + 1 else 0.02
        self.last = index
        return {"value": float(index + 1)}


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [({}, 0.008), ({"train_sampling_strategy": "sequential"}, 0), ({"cls": Trainer}, 0.008)],
)
def test_a_slow_loader_is_also_timed_in_the_order_of_the_dataset(
    settings, seconds, tmp_path, monkeypatch
):
    clock = FakeClock()
    monkeypatch.setattr("time.perf_counter", clock)
    pruned = {"pruning": RandomPruning(0.5), "extra": {"per_sample_loss_fn": known_losses}}
    pruned = {} if "cls" in settings else pruned
    run = trainer(
        tmp_path, model=Slow(clock), data=Disk(clock), **pruned, **{**SECONDS, **settings}
    )
    strategy = run.args.train_sampling_strategy
    found = advise(run, policies=[RandomPruning(0.5)])
    assert found.measured.loading_in_order == pytest.approx(seconds, rel=0.5)
    assert ("sequential" in found.findings.get("loader", "")) == (seconds > 0)
    assert run.args.train_sampling_strategy == strategy
    assert found.to_dict()["measured"]["loading_in_order"] == found.measured.loading_in_order


def test_a_typical_step():
    """The tenths that compute longest and shortest are left out, as is what is not a step's own."""

    def step(forward, waiting=0.5):
        return {"forward": forward, "backward": 2.0, "optimizer": 1.0, "waiting": waiting}

    forwards = [9.0, *range(1, 9), 100.0]  # after the warm-up the cut leaves 2, ..., 8 and 9
    steps = [step(50.0), step(20.0, 8.0), *map(step, forwards)]
    first = {0, 11}
    means, extra = _typical_step(steps, first, warm_up=2, workers=False)
    assert means == {"forward": 5.5, "backward": 2.0, "optimizer": 1.0, "waiting": 0.5}
    assert extra == pytest.approx(70.0 - 2 * 5.5)

    bursts = [step(1.0, waiting) for waiting in (9.0, 0.0, 0.0, 3.0)]
    assert _typical_step(bursts, {0}, warm_up=0, workers=True)[0]["waiting"] == 1.0
    assert _typical_step(bursts[:1], {0}, warm_up=3, workers=True)[0]["waiting"] == 0.0


def test_every_part_is_measured_with_workers(tmp_path):
    run = trainer(
        tmp_path,
        model=KnownLoss(),
        data=values(80),
        pruning=FullData(),
        extra={"per_sample_loss_fn": known_losses, "eval_dataset": values(16)},
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        **SECONDS,
    )
    found = advise(run, policies=[UCB(0.5, scoring="all")], batches=4)
    m = found.measured
    parts = (m.waiting, m.forward, m.backward, m.optimizer)
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(m.step)
    assert min(m.loading, m.epoch_start, m.run_start, m.evaluation, m.checkpoint) > 0
    assert m.scoring > 0
    assert m.steps == 30 - 3 - 4  # three epochs without warm-up and prefetched batches
    for prediction in (found.full, *found.predictions):
        assert sum(prediction.seconds.values()) == pytest.approx(prediction.total)
        assert prediction.seconds["choosing"] > 0


def test_the_policies_that_it_predicts(tmp_path):
    run = trainer(tmp_path, cls=Trainer, data=images(40))
    labels = [str(prediction.policy) for prediction in advise(run, batches=4).predictions]
    assert len(labels) == 15
    assert labels[0] == "LossProportional(keep_ratio=0.1)"
    own = trainer(tmp_path, data=images(40), pruning=OrderDP(0.3))
    assert advise(own, batches=4).predictions[0].policy == OrderDP(0.3)
    # 4 samples do not fill a batch of 8.
    small = trainer(tmp_path, cls=Trainer, data=images(40), dataloader_drop_last=True)
    policies = [row.policy for row in advise(small, batches=4).predictions]
    assert {getattr(policy, "keep_ratio", None) for policy in policies} == {0.3, 0.5, 0.7, None}


def test_a_trainer_whose_loss_of_a_sample_is_unknown(tmp_path):
    """RandomPruning needs no such loss, so neither does the dry run."""

    class OnlyABatchLoss(KnownLoss):
        def forward(self, value, labels=None):
            return {"loss": super().forward(value)["loss"]}

    run = trainer(tmp_path, model=OnlyABatchLoss(), data=values(40), pruning=RandomPruning(0.5))
    assert advise(run, policies=[RandomPruning(0.5)], batches=4).measured.forward > 0


def test_mistakes(tmp_path):
    with pytest.raises(TypeError, match="trainer='text'"):
        advise("text")
    run = trainer(tmp_path, cls=Trainer)
    run_of_40 = trainer(tmp_path, cls=Trainer)
    with pytest.raises(ValueError, match="batches=3"):
        advise(run, batches=3)
    run.train_dataset = images().to_iterable_dataset()
    with pytest.raises(ValueError, match="IterableDataset"):
        advise(run)
    small = trainer(tmp_path, cls=Trainer, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"4 of 40 samples.* 8 "):
        advise(small, policies=[UCB(0.1)])
    scores = tmp_path / "scores.safetensors"
    Scores(torch.rand(10), "mine", provenance={"passes": 0}).save(scores)
    with pytest.raises(ValueError, match=r"10 samples.* 40"):
        advise(run_of_40, policies=[StaticPruning(scores, keep_ratio=0.5)])


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
    done = python(root / "recipes/benchmarks/advice.py", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "advice.json").read_text())
    assert [run["run"] for run in result["runs"]] == ["full", "short", "ucb 0.3"]
    for run in result["runs"]:
        assert run["error"] == pytest.approx(run["predicted"] / run["measured"] - 1)
        assert [one["settings"]["num_samples"] for one in run["rounds"]] == [898]
        assert run["measured"] == run["rounds"][0]["measured"]
    assert f"worst: quickstart, {result['worst']['run']}" in done.stdout


# ---- the Trainer warns, too ---------------------------------------------------------------------


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
    assert policy.looks_once(RunShape(100, num_epochs=epochs), epochs) is once


def test_the_trainer_warns_once_that_scores_decide_nothing(tmp_path, caplog):
    def warnings(**settings):
        caplog.clear()
        trainer(tmp_path, **settings).train()
        return [
            record.getMessage()
            for record in caplog.records
            if record.levelname == "WARNING" and "UCB(" in record.getMessage()
        ]

    (warning,) = warnings(pruning=UCB(0.3), num_train_epochs=2)
    for word in ("epochs: 2", "UCB(keep_ratio=0.3)", "first=1"):
        assert word in warning
    # 40 samples in batches of 8: one step per epoch.
    assert len(warnings(pruning=UCB(0.2), max_steps=3)) == 1
    assert warnings(pruning=UCB(0.2), max_steps=6) == []
    assert warnings(pruning=UCB(0.5), num_train_epochs=3) == []
    assert warnings(pruning=UCB(0.3, scoring="all"), num_train_epochs=2) == []
    assert warnings(cls=DynamicPruningTrainer, num_train_epochs=1) == []
