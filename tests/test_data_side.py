"""The data side of the Trainer: which samples are trained, how long, at which rate; the record."""

import copy
import math
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import datasets
import optuna
import pytest
import torch
from tiny import (
    KnownLoss,
    Shares,
    arguments,
    every_checkpoint,
    images,
    known_losses,
    learning_rates,
    recorded,
    same_weights,
    trainer,
    values,
    vit,
)
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import ConcatDataset, DataLoader, SequentialSampler, WeightedRandomSampler
from transformers import Trainer, TrainerCallback, default_data_collator, get_scheduler
from transformers.trainer_callback import ProgressCallback

from hf_dynprune import (
    UCB,
    DynamicPruningMixin,
    DynamicPruningTrainer,
    EpochPlan,
    EpsilonGreedy,
    FullData,
    PruningPolicy,
    RandomPruning,
)
from hf_dynprune.data_side import PrunedDataMixin, run_shape
from hf_dynprune.schedule import RunShape
from hf_dynprune.table import Last

# ---- promise 1: a score belongs to the sample that produced it -----------------------------------


def tuple_free_collator(features):
    return {
        "value": torch.stack([feature["value"] for feature in features]),
        "junk": torch.zeros(len(features)),
    }


def dict_collator(features):
    return {"value": torch.tensor([feature["value"] for feature in features])}


class Plain(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"value": torch.tensor(float(i + 1))}


class Batched(Plain):
    def __getitems__(self, indices):
        return {"value": torch.tensor(indices).float() + 1}


def doubled(batch):
    return {"value": [2 * torch.as_tensor(v) for v in batch["value"]]}


def datasets_to_try():
    base = values(30)
    return {
        "hf": base,
        "shuffled": base.shuffle(seed=1),
        "filtered": base.filter(lambda row: row["value"] % 2 == 0),
        "selected": base.select([5, 3, 17, 4, 22]),
        "concatenated": datasets.concatenate_datasets([base, values(7)]),
        "more columns": base.add_column("text", [str(i) for i in range(30)]),
        "transformed": base.with_transform(doubled),
        "torch": Plain(30),
        "torch concatenated": ConcatDataset([Plain(13), Plain(9)]),
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", datasets_to_try())
def test_the_whole_table_holds_each_samples_own_loss(name, workers, tmp_path):
    data = datasets_to_try()[name]
    columns = name != "transformed"
    settings = {"dataloader_num_workers": workers, "remove_unused_columns": columns}
    if workers:
        settings |= {"dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    extra = {"per_sample_loss_fn": known_losses}
    run = trainer(
        tmp_path, model=KnownLoss(), data=data, pruning=UCB(keep_ratio=0.6), extra=extra, **settings
    )
    run.train()
    expected = torch.tensor([float(data[i]["value"]) for i in range(len(data))])
    observed = run.pruner.table.observed
    assert observed.all()  # 3 epochs of 0.6: never-observed samples come first
    torch.testing.assert_close(run.pruner.table["mean"], expected, rtol=1e-6, atol=0)
    assert run.pruner.table["variance"].abs().max() < 1e-9


@pytest.mark.parametrize(
    "collator", [None, default_data_collator, tuple_free_collator, dict_collator]
)
@pytest.mark.parametrize("remove", [True, False])
def test_any_collator_and_unused_columns(collator, remove, tmp_path):
    if collator is tuple_free_collator:

        class Model(KnownLoss):
            def forward(self, value, junk=None, labels=None):
                return super().forward(value)
    else:
        Model = KnownLoss
    extra = {"per_sample_loss_fn": known_losses, "data_collator": collator}
    run = trainer(
        tmp_path,
        model=Model(),
        data=values(20),
        pruning=UCB(keep_ratio=0.5),
        extra=extra,
        remove_unused_columns=remove,
    )
    run.train()
    torch.testing.assert_close(run.pruner.table["mean"], torch.arange(1.0, 21.0))


def test_datasets_that_return_whole_batches(tmp_path):
    extra = {"per_sample_loss_fn": known_losses, "data_collator": lambda batch: batch}
    run = trainer(
        tmp_path,
        model=KnownLoss(),
        data=Batched(20),
        pruning=UCB(keep_ratio=0.5),
        extra=extra,
        remove_unused_columns=False,
    )
    run.train()
    torch.testing.assert_close(run.pruner.table["mean"], torch.arange(1.0, 21.0))


def test_a_collator_that_returns_no_dict_is_an_error_at_the_first_batch(tmp_path):
    extra = {
        "per_sample_loss_fn": known_losses,
        "data_collator": lambda features: [f["value"] for f in features],
    }
    run = trainer(tmp_path, model=KnownLoss(), data=values(), pruning=UCB(0.5), extra=extra)
    with pytest.raises(TypeError, match="list"):
        run.train()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_loss_never_poisons_the_table(bad, tmp_path):
    data = [float(i + 1) for i in range(20)]
    data[3] = bad
    dataset = datasets.Dataset.from_dict({"value": data}).with_format("torch")
    extra = {"per_sample_loss_fn": known_losses}
    settings = {"max_grad_norm": 0.0, "learning_rate": 0.0, "num_train_epochs": 4}
    run = trainer(
        tmp_path,
        model=KnownLoss(),
        data=dataset,
        pruning=UCB(keep_ratio=0.5),
        extra=extra,
        **settings,
    )
    run.train()
    mean = run.pruner.table["mean"]
    assert mean[3].isnan()
    assert run.pruner.table["last_observed"][3] >= 0
    assert torch.equal(mean[torch.arange(20) != 3], torch.tensor(data)[torch.arange(20) != 3])
    assert run.pruning_report.nonfinite_samples == [3]
    assert run.pruning_report.totals["nonfinite"] == 1  # and it is not chosen again: it scores -inf


# ---- promise 2: the budget -----------------------------------------------------------------------


class Spy(TrainerCallback):
    """Notes what the loop says of itself."""

    def __init__(self):
        self.epochs, self.totals = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs.append(state.epoch)
        self.totals.append(state.max_steps)


@pytest.mark.parametrize(
    "policy",
    [RandomPruning(0.3), RandomPruning(0.3, replacement=False), EpsilonGreedy(0.3), UCB(0.3)],
)
def test_keep_ratio_is_what_is_trained(policy, tmp_path):
    run = trainer(tmp_path, data=images(50), pruning=policy, num_train_epochs=4)
    batches = recorded(run)
    run.train()
    report = run.pruning_report
    assert [record.samples for record in report.epochs] == [15] * 4
    assert [record.optimizer_steps for record in report.epochs] == [2] * 4
    assert (
        report.totals["forward_passes"]
        == report.totals["backward_passes"]
        == sum(map(len, batches))
        == 60
    )
    assert report.cost_ratio == pytest.approx(0.3)
    per_epoch = [batches[i] + batches[i + 1] for i in range(0, 8, 2)]
    assert all(len(set(epoch)) == 15 for epoch in per_epoch)
    assert len({tuple(sorted(epoch)) for epoch in per_epoch}) > 1  # dynamic


def test_epochs_of_different_lengths_train_every_kept_sample_once(tmp_path):
    spy = Spy()
    run = trainer(
        tmp_path,
        data=images(40),
        pruning=Shares(),
        num_train_epochs=4,
        gradient_accumulation_steps=3,
        extra={"callbacks": [spy]},
    )
    batches = recorded(run)
    run.train()
    sizes = [40, 20, 12, 32]
    counts = [5, 3, 2, 4]  # batches of 8
    for size, count in zip(sizes, counts, strict=True):
        epoch, batches[:count] = list(chain(*batches[:count])), []
        assert len(epoch) == size == len(set(epoch))
    assert batches == []
    assert [r.optimizer_steps for r in run.pruning_report.epochs] == [2, 1, 1, 2]
    assert run.state.global_step == run.state.max_steps == 6
    assert all(p.grad is None for p in run.model.parameters())  # nothing leaks from a partial group
    assert spy.epochs == pytest.approx([3 / 5, 1, 2, 3, 3.75, 4])
    assert set(spy.totals) == {6}


def test_drop_last_drops_the_tail_and_counts(tmp_path):
    run = trainer(
        tmp_path,
        data=images(50),
        pruning=RandomPruning(0.5),
        dataloader_drop_last=True,
        num_train_epochs=2,
    )
    batches = recorded(run)
    run.train()
    assert [len(b) for b in batches] == [8] * 6
    assert run.pruning_report.totals["forward_passes"] == 48


# ---- promise 3: the schedule follows the budget --------------------------------------------------


def wsd(v, warmup, total):
    decay = 4
    stable = total - warmup - decay
    if v < warmup:
        return v / warmup
    if v < warmup + stable:
        return 1.0
    if v < total:
        return 0.5 * (1 + math.cos(math.pi * (v - warmup - stable) / decay))
    return 0.0


def cosine(v, warmup, total):
    return (
        v / warmup
        if v < warmup
        else 0.5 * (1 + math.cos(math.pi * (v - warmup) / (total - warmup)))
    )


SCHEDULES = {
    "linear": ({}, lambda v, w, t: v / w if v < w else (t - v) / (t - w)),
    "cosine": ({}, cosine),
    "cosine_with_min_lr": (
        {"min_lr_rate": 0.1},
        lambda v, w, t: v / w if v < w else 0.1 + 0.9 * cosine(v, w, t),
    ),
    "constant_with_warmup": ({}, lambda v, w, t: min(1.0, v / w)),
    "polynomial": (
        {"lr_end": 1e-3, "power": 2.0},
        lambda v, w, t: (
            v / w if v < w else ((1e-2 - 1e-3) * (1 - (v - w) / (t - w)) ** 2 + 1e-3) / 1e-2
        ),
    ),
    "warmup_stable_decay": ({"num_decay_steps": 4}, wsd),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [3, 0.25])
def test_the_learning_rate_of_each_step_is_that_of_a_hand_computed_schedule(name, warmup, tmp_path):
    settings, schedule = SCHEDULES[name]
    run = trainer(
        tmp_path,
        pruning=Shares(shares=(1.0, 0.6, 0.2, 0.6)),
        num_train_epochs=4,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=settings or None,
        warmup_steps=warmup,
    )
    run.train()
    lengths = [5, 3, 1, 3]  # batches of 8 in 40, 24, 8, 24 samples
    total, mean = 12, 3
    steps = 3  # 3 by itself, and ceil(12 * 0.25)
    virtual = [
        mean * e + mean * k / length for e, length in enumerate(lengths) for k in range(length)
    ]
    expected = [1e-2 * schedule(v, steps, total) for v in virtual]
    assert learning_rates(run) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert run.pruning_report.epochs[-1].learning_rate == pytest.approx(
        1e-2 * schedule(total, steps, total), abs=1e-12
    )


def test_constant_lengths_give_the_schedule_of_that_many_steps_bit_for_bit(tmp_path):
    run = trainer(
        tmp_path, pruning=UCB(0.4), lr_scheduler_type="cosine", warmup_steps=2, num_train_epochs=5
    )
    run.train()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-2)
    stock = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append(stock.get_last_lr()[0])
        optimizer.step()
        stock.step()
    assert learning_rates(run) == expected
    assert run.state.max_steps == 10


def test_max_steps_is_a_budget(tmp_path):
    spy = Spy()
    run = trainer(
        tmp_path,
        pruning=Shares(shares=(1.0, 0.3)),
        max_steps=17,
        extra={"callbacks": [spy]},
        warmup_steps=0.2,
    )
    run.train()
    # 5, 2, 5, 2, then 3 of 5 steps
    assert run.state.global_step == 17
    assert [r.optimizer_steps for r in run.pruning_report.epochs] == [5, 2, 5, 2, 3]
    assert spy.epochs[-1] == pytest.approx(4 + 3 / 5)
    warmup = math.ceil(17 * 0.2)
    expected = [1e-2 * (s / warmup if s < warmup else (17 - s) / (17 - warmup)) for s in range(17)]
    assert learning_rates(run) == pytest.approx(expected)
    assert run.pruning_report.num_epochs == pytest.approx(4.6)
    assert run.pruning_report.cost_ratio == pytest.approx((40 + 12 + 40 + 12 + 24) / (40 * 4.6))


@pytest.mark.parametrize("known", [True, False])
def test_max_steps_goes_on_until_it_is_spent_where_sizes_are_not_known(known, tmp_path):
    run = trainer(tmp_path, pruning=Shares(shares=(0.2,), known=known), max_steps=9)
    run.train()
    assert run.state.global_step == 9
    assert len(run.pruning_report.epochs) == 9


def test_unknown_sizes_end_with_the_learning_rate_at_its_end(tmp_path):
    spy = Spy()
    run = trainer(
        tmp_path,
        pruning=Shares(shares=(0.2, 0.6, 1.0), known=False),
        num_train_epochs=3,
        extra={"callbacks": [spy]},
    )
    run.train()
    assert run.state.global_step == run.state.max_steps == 1 + 3 + 5
    assert spy.totals == [11] * 1 + [9] * 8  # later epochs are taken to be full until they begin
    assert run.pruning_report.epochs[-1].learning_rate == pytest.approx(0, abs=1e-12)
    # F = 5 (N's), so v = 0; 5, 5 + 5/3, 5 + 10/3; 10, 11, 12, 13, 14 of T = 15
    virtual = [0, 5, 5 + 5 / 3, 5 + 10 / 3, 10, 11, 12, 13, 14]
    assert learning_rates(run) == pytest.approx([1e-2 * (1 - v / 15) for v in virtual])


def test_fractional_epochs(tmp_path):
    run = trainer(tmp_path, pruning=UCB(0.5), num_train_epochs=2.5)
    run.train()
    assert run.state.global_step == run.state.max_steps == 8  # 3 + 3 + ceil(1.5)
    assert run.pruning_report.num_epochs == pytest.approx(2 + 2 / 3)


def test_a_plan_scales_the_learning_rate_from_its_first_step_on(tmp_path):
    run = trainer(
        tmp_path, pruning=Shares(shares=(0.4,), lr_scale=2.0, first=1), num_train_epochs=2
    )
    run.train()
    # 5 full-data steps, then 2 of the plan: F = 3.5, T = 7
    virtual, scale = [0.7 * k for k in range(5)] + [3.5, 3.5 + 1.75], [1] * 5 + [2] * 2
    assert learning_rates(run) == pytest.approx(
        [1e-2 * (1 - v / 7) * s for v, s in zip(virtual, scale, strict=True)]
    )


def test_a_scheduler_that_is_passed_in_is_left_alone_with_one_warning(tmp_path, caplog):
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    run = trainer(
        tmp_path, model=model, pruning=UCB(0.4), extra={"optimizers": (optimizer, scheduler)}
    )
    run.train()
    assert learning_rates(run) == pytest.approx([1e-2 / (s + 1) for s in range(6)])
    (warning,) = [r.getMessage() for r in caplog.records if "scheduler" in r.getMessage()]
    assert "6 optimizer steps" in warning
    assert "optimizers=(optimizer, None)" in warning


def test_reduce_lr_on_plateau_follows_the_metric(tmp_path):
    run = trainer(
        tmp_path,
        pruning=UCB(0.4),
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "threshold": 1e9},
        eval_strategy="epoch",
        metric_for_best_model="loss",
        extra={"eval_dataset": images(8)},
    )
    run.train()
    assert run.pruning_report.epochs[-1].learning_rate < 1e-2


@pytest.mark.parametrize(
    ("settings", "evaluations", "saves"),
    [
        (
            {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3},
            [2, 4, 6, 8, 9],
            [3, 6, 9],
        ),
        (
            {
                "eval_strategy": "steps",
                "eval_steps": 0.5,
                "save_strategy": "steps",
                "save_steps": 0.4,
            },
            [5, 9],
            [4, 8, 9],
        ),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [5, 7, 9], [5, 7, 9]),
    ],
)
def test_logging_evaluation_and_saving_by_steps_share_and_epochs(
    settings, evaluations, saves, tmp_path
):
    run = trainer(
        tmp_path,
        pruning=Shares(shares=(1.0, 0.3, 0.4)),
        extra={"eval_dataset": images(8)},
        **settings,
    )
    run.train()
    assert [e["step"] for e in run.state.log_history if "eval_loss" in e] == evaluations
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")) == saves
    assert run.state.log_history[-1]["epoch"] == 3


def test_samples_per_second_counts_what_was_trained(tmp_path):
    run = trainer(tmp_path, pruning=Shares(shares=(1.0, 0.3, 0.4)))
    metrics = run.train().metrics
    trained = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert trained == pytest.approx(40 + 12 + 16, rel=0.02)


def test_samples_per_second_of_a_resumed_run_counts_its_own_samples(tmp_path):
    settings = {"pruning": UCB(0.6), "save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, **settings).train()
    metrics = (
        trainer(tmp_path / "b", **settings)
        .train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        .metrics
    )
    trained = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert trained == pytest.approx(
        3 * 24 - 24 - 8, rel=0.05
    )  # 3 batches of 8 an epoch, 4 of them before


def test_the_progress_bar_knows_the_true_number_of_steps(tmp_path):
    totals = []

    class Bar(ProgressCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            totals.append((self.training_bar.n, self.training_bar.total))

    run = trainer(
        tmp_path, pruning=Shares(shares=(0.2, 0.6, 1.0), known=False), extra={"callbacks": [Bar()]}
    )
    run.train()
    assert totals[0] == (1, 11)
    assert totals[-1] == (9, 9)


# ---- the record ----------------------------------------------------------------------------------


def test_each_epochs_logs_reach_the_loggers(tmp_path):
    logged = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    run = trainer(tmp_path, pruning=UCB(0.5), extra={"callbacks": [Logger()]})
    run.train()
    epochs = [entry for entry in logged if "pruning/kept_share" in entry]
    assert [entry["pruning/kept_share"] for entry in epochs] == [0.5] * 3
    assert [entry["pruning/kept_samples"] for entry in epochs] == [20] * 3
    assert all(entry["pruning/choosing_seconds"] > 0 for entry in epochs)
    assert "pruning/score_mean" not in epochs[0]  # nothing was observed yet
    last = epochs[-1]
    assert last["pruning/score_q05"] <= last["pruning/score_q50"] <= last["pruning/score_q95"]
    assert last["pruning/score_q05"] <= last["pruning/score_mean"] <= last["pruning/score_q95"] + 1


def test_the_report_tells_of_the_run(tmp_path):
    run = trainer(
        tmp_path,
        pruning=RandomPruning(0.5, first=1),
        eval_strategy="epoch",
        extra={"eval_dataset": images(10)},
        seed=3,
    )
    run.train()
    report = run.pruning_report
    assert report.seed == report.data_seed == 3
    assert [record.full_data for record in report.epochs] == [True, False, False]
    assert report.cost_ratio == pytest.approx((40 + 20 + 20) / 120)
    assert report.selection["choices"] == 2
    assert sum(report.selection["histogram"]) == 40
    assert report.metrics["eval_loss"] == run.state.log_history[-2]["eval_loss"]
    for record in report.epochs:
        assert record.seconds["evaluation"] > 0
        assert record.seconds["training"] > 0
        assert record.seconds["choosing"] > 0
        assert record.seconds["scoring"] == 0
    spent = sum(report.totals["seconds"].values())
    assert spent == pytest.approx(run.state.log_history[-1]["train_runtime"], abs=0.5)
    assert report.environment["versions"]["torch"] == torch.__version__


def test_an_evaluation_after_the_end_does_not_replace_the_last_epochs(tmp_path):
    run = trainer(
        tmp_path, pruning=UCB(0.5), eval_strategy="epoch", extra={"eval_dataset": images(10)}
    )
    run.train()
    loss = run.pruning_report.metrics["eval_loss"]
    run.evaluate(images(10, seed=5), metric_key_prefix="eval")
    assert run.pruning_report.metrics["eval_loss"] == loss
    run.evaluate(images(10, seed=5), metric_key_prefix="test")
    assert run.pruning_report.metrics["test_loss"] > 0


# ---- bad input -----------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {"value": torch.tensor(1.0)}


class OwnSampler(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pruning": "ucb"}, TypeError, "'ucb'"),
        ({"data": Stream()}, ValueError, "Stream"),
        ({"data": values(3).to_iterable_dataset()}, ValueError, "IterableDataset"),
        ({"data": values(0)}, ValueError, "0 samples"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 32},
            ValueError,
            r"20 of 40 .*32.* drop_last",
        ),
        ({"train_sampling_strategy": "batch_rebalance"}, ValueError, "batch_rebalance"),
        (
            {"cls": type("Mixed", (DynamicPruningMixin, OwnSampler), {})},
            ValueError,
            "OwnSampler._get_train_sampler",
        ),
        (
            {"data": images().with_transform(lambda batch: batch)},
            ValueError,
            "remove_unused_columns",
        ),
        ({"pruning": UCB(0.5, signal="el2m")}, ValueError, "el2m"),
    ],
)
def test_bad_input_is_an_error_at_construction(changes, error, message, tmp_path):
    settings = {"pruning": UCB(keep_ratio=0.5), **changes}
    with pytest.raises(error, match=message):
        trainer(tmp_path, **settings)


def test_several_gpus_in_one_process_are_refused_with_the_way_out(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2  # what plain `python` finds on a machine with two
    with pytest.raises(ValueError, match=r"2 GPUs .*--nproc_per_node 2 "):
        DynamicPruningTrainer(model=vit(), args=args, train_dataset=images(), pruning=UCB(0.5))


# ---- the loader of another class -----------------------------------------------------------------


class OwnLoader(Trainer):
    """Makes its own loader, as many Trainers do: another batch size, another collator."""

    options: ClassVar = {"shuffle": True}

    def collate(self, features):
        return {"value": 2 * torch.stack([feature["value"] for feature in features])}

    def get_train_dataloader(self):
        options = {"batch_size": 4, "collate_fn": self.collate, **self.options}
        return self.accelerator.prepare(DataLoader(self.train_dataset, **options))


def above(cls, **attributes):
    return type("Pruned", (DynamicPruningMixin, type("Own", (cls,), attributes)), {})


def test_it_stands_above_a_trainer_that_makes_its_own_loader(tmp_path):
    extra = {"per_sample_loss_fn": known_losses}
    run = trainer(
        tmp_path,
        cls=above(OwnLoader),
        model=KnownLoss(),
        data=values(30),
        pruning=UCB(keep_ratio=0.6),
        extra=extra,
    )
    batches = recorded(run)
    run.train()
    assert {len(batch) for batch in batches} == {
        4,
        2,
    }  # the loader's batch size, not the arguments'
    assert run.pruner.shape.batch_size == 4
    torch.testing.assert_close(run.pruner.table["mean"], 2 * torch.arange(1.0, 31.0))
    assert run.state.global_step == run.state.max_steps == 3 * 5


def test_a_loader_that_is_not_prepared(tmp_path):
    class Plain(OwnLoader):
        def get_train_dataloader(self):
            return DataLoader(
                self.train_dataset, batch_size=4, shuffle=True, drop_last=True, num_workers=1
            )

    run = trainer(tmp_path, cls=above(Plain), pruning=RandomPruning(0.5), data=images(26))
    loader = run.get_train_dataloader()
    assert loader.num_workers == 1
    run.train()
    assert run.pruning_report.totals["forward_passes"] == 3 * 12


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"options": {"sampler": WeightedRandomSampler([1.0] * 40, 40)}}, "WeightedRandomSampler"),
        ({"options": {"sampler": SequentialSampler(range(40))}}, "SequentialSampler"),
        ({"options": {"dataset": images(39), "shuffle": True}}, "39 samples.* 40"),
    ],
)
def test_a_loader_that_chooses_the_data_is_refused(attributes, message, tmp_path):
    class Choosing(OwnLoader):
        def get_train_dataloader(self):
            options = {"dataset": self.train_dataset, "batch_size": 4, **self.options}
            return self.accelerator.prepare(DataLoader(**options))

    run = trainer(tmp_path, cls=above(Choosing, **attributes), pruning=UCB(0.5))
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


def test_a_loader_that_leaves_out_ours_is_found_out(tmp_path):
    class Own(DynamicPruningTrainer):
        def get_train_dataloader(self):
            return Trainer.get_train_dataloader(self)

    run = trainer(tmp_path, cls=Own, pruning=UCB(0.5))
    with pytest.raises(RuntimeError, match=r"Own\.get_train_dataloader"):
        run.train()


def test_the_shape_of_a_run_follows_from_the_arguments(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=2.5)
    assert run_shape(args, 40) == RunShape(40, 8, num_epochs=2.5, accumulation=2)
    args = arguments(tmp_path, max_steps=7, dataloader_drop_last=True)
    assert run_shape(args, 40, batch_size=4) == RunShape(40, 4, max_steps=7, drop_last=True)


# ---- without the loss side -----------------------------------------------------------------------


class OnlyABatchLoss(torch.nn.Module):
    """A loss of a batch, of no sample."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.dropout = torch.nn.Linear(192, 4), torch.nn.Dropout(dropout)

    def forward(self, pixel_values, labels=None):
        x = self.dropout(self.encoder(pixel_values.flatten(1)))
        return {"loss": (x.std() + x.mean() - labels.float().mean()) ** 2, "logits": x}


class PrunedData(PrunedDataMixin, Trainer):
    pass


def test_the_data_side_trains_any_loss(tmp_path):
    stock = trainer(tmp_path, cls=Trainer, model=OnlyABatchLoss())
    full = trainer(tmp_path, cls=PrunedData, model=OnlyABatchLoss(), pruning=FullData())
    for run in (stock, full):
        run.train()
    assert same_weights(stock.model, full.model)
    half = trainer(tmp_path, cls=PrunedData, model=OnlyABatchLoss(), pruning=RandomPruning(0.5))
    half.train()
    assert half.pruning_report.cost_ratio == pytest.approx(0.5)
    assert half.state.global_step == 9


def test_the_data_side_resumes(tmp_path):
    def make(folder):
        settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
        model = OnlyABatchLoss(dropout=0.3)
        policy = RandomPruning(0.6, replacement=False)
        return trainer(folder, cls=PrunedData, model=model, pruning=policy, **settings)

    assert sum(1 for _ in every_checkpoint(make, tmp_path)) == 5


@dataclass(frozen=True)
class Rewarded(PruningPolicy):
    """Keeps the half with the largest last reward."""

    @property
    def memory(self):
        return Last("reward")

    def planned_size(self, n, epoch, progress):
        return n // 2

    def plan(self, choice):
        reward = choice.table["reward"].nan_to_num(torch.inf)
        return EpochPlan(reward.topk(choice.size).indices)


class Rewarding(PrunedData):
    """Observes a signal that is not one of the loss."""

    def observed_signals(self):
        return (*super().observed_signals(), "reward")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if (index := inputs.pop("sample_index", None)) is not None:
            self.pruner.observe(index, {"reward": index % 7})
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_a_class_may_observe_its_own_signals(tmp_path):
    run = trainer(
        tmp_path, cls=Rewarding, model=OnlyABatchLoss(), pruning=Rewarded(), num_train_epochs=4
    )
    run.train()
    assert torch.equal(run.pruner.table["reward"], torch.arange(40) % 7.0)
    assert run.pruning_report.totals["forward_passes"] == 80


@pytest.mark.parametrize(
    ("cls", "policy", "name"),
    [
        (PrunedData, Rewarded(), "reward"),
        (PrunedData, UCB(0.5), "loss"),
        (DynamicPruningTrainer, Rewarded(), "reward"),
        (Rewarding, Rewarded(scoring="all"), "reward"),  # no forward pass observes it
    ],
)
def test_a_signal_that_nobody_observes_is_an_error_at_construction(cls, policy, name, tmp_path):
    with pytest.raises(ValueError, match=f"'{name}'"):
        trainer(tmp_path, cls=cls, pruning=policy)


def test_a_copy_of_a_trainer_is_a_trainer_of_its_own(tmp_path):
    extra = {"eval_dataset": images(10)}
    run = trainer(tmp_path, pruning=UCB(0.5), eval_strategy="epoch", extra=extra)
    other = copy.deepcopy(run)
    run.train()
    other.train()
    assert same_weights(run.model, other.model)
    assert other.pruning_report is not run.pruning_report
    assert other.pruning_report.metrics["eval_loss"] == run.pruning_report.metrics["eval_loss"]


def test_several_evaluation_sets_are_each_noted_once(tmp_path):
    sets = {"near": images(10), "far": images(10, seed=1)}
    run = trainer(tmp_path, pruning=UCB(0.5), eval_strategy="epoch", extra={"eval_dataset": sets})
    run.train()
    record = run.pruning_report.epochs[-1]
    assert {"eval_near_loss", "eval_far_loss"} <= set(record.metrics)
    spent = record.metrics["eval_near_runtime"] + record.metrics["eval_far_runtime"]
    assert record.seconds["evaluation"] == pytest.approx(spent)


# ---- what a subclass asks for --------------------------------------------------------------------


def scheduling(factor):
    """A trainer that asks for a schedule of `factor` times the steps of the run."""

    class Scheduling(DynamicPruningTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            return super().create_scheduler(round(factor * num_training_steps), optimizer)

    return Scheduling


@pytest.mark.parametrize("factor", [0.5, 2, 4])
@pytest.mark.parametrize(
    "policy", [FullData(), RandomPruning(0.5), Shares(known=True), Shares(known=False)]
)
def test_a_subclass_may_ask_for_another_schedule(policy, factor, tmp_path):
    run = trainer(tmp_path, cls=scheduling(factor), pruning=policy, num_train_epochs=4)
    run.train()
    last = run.pruning_report.epochs[-1].learning_rate
    assert last == pytest.approx(1e-2 * max(0.0, 1 - 1 / factor), abs=1e-9)


def test_another_schedule_is_continued_by_a_resumed_run(tmp_path):
    def make(folder):
        settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
        return trainer(folder, cls=scheduling(2), pruning=Shares(known=False), **settings)

    assert sum(1 for _ in every_checkpoint(make, tmp_path)) > 5


class Sampling(DynamicPruningTrainer):
    """Above the mixin, as well as behind it."""

    def _get_train_sampler(self, train_dataset=None):
        return WeightedRandomSampler([1.0] * 40, 40)


def test_a_sampler_of_a_subclass_is_refused_at_construction(tmp_path):
    with pytest.raises(ValueError, match=r"Sampling\._get_train_sampler"):
        trainer(tmp_path, cls=Sampling, pruning=RandomPruning(0.5))


def test_a_loop_of_its_own_is_found_out(tmp_path):
    class Looping(DynamicPruningTrainer):
        def _inner_training_loop(self, *args, **kwargs):
            self.state.global_step = sum(1 for _ in self.get_train_dataloader())

    with pytest.raises(RuntimeError, match=r"Looping trained 5 steps"):
        trainer(tmp_path, cls=Looping, pruning=RandomPruning(0.5)).train()


def test_an_order_that_cannot_be_the_stock_trainers_is_said(tmp_path, caplog):
    settings = {"pruning": FullData(), "accelerator_config": {"use_seedable_sampler": False}}
    trainer(tmp_path, **settings)
    assert "use_seedable_sampler=False" in caplog.text


# ---- a batch that the user looks at --------------------------------------------------------------


class NoOtherArguments(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(192, 4)

    def forward(self, pixel_values, labels=None):
        logits = self.layer(pixel_values.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_the_users_own_loader_is_a_stock_batch(workers, tmp_path):
    def made(**extra):
        settings = {"model": NoOtherArguments(), "dataloader_num_workers": workers}
        by_class = images()["labels"][:].argsort().tolist()
        return trainer(tmp_path, data=images().select(by_class), **settings, **extra)

    extra = {"per_sample_loss_fn": "single_label"}
    stock, run = made(cls=Trainer), made(pruning=UCB(0.5), extra=extra)
    expected, batch = (next(iter(one.get_train_dataloader())) for one in (stock, run))
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    run.model(**batch)
    batches = recorded(run)
    run.train()
    assert len(batches) == 9  # with the indices of their samples
    assert run.pruner.table.observed.all()


# ---- logs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logging_strategy": "epoch"},
        {"logging_steps": 2, "logging_first_step": True},
        {"include_num_input_tokens_seen": "all"},
        {"eval_strategy": "epoch"},
        {"logging_strategy": "no"},
        {"logging_steps": 100},
    ],
)
def test_the_log_has_the_entries_of_the_stock_trainer(settings, tmp_path):
    logs = []
    for extra in ({"cls": Trainer}, {"pruning": FullData()}):
        extra = {**extra, "extra": {"eval_dataset": images(8)}}
        run = trainer(tmp_path, **extra, **settings)
        run.train()
        history = run.state.log_history
        logs.append(
            [{name for name in entry if not name.startswith("pruning/")} for entry in history]
        )
    assert logs[0] == logs[1]


def test_the_numbers_of_a_choice_are_logged_once_an_epoch_also_after_a_resume(tmp_path):
    def noted(run):
        history = run.state.log_history
        return [entry["epoch"] for entry in history if "pruning/kept_share" in entry]

    def make(folder):
        settings = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 1}
        return trainer(folder, data=images(80), pruning=UCB(0.5), **settings)

    for run in every_checkpoint(make, tmp_path):
        assert noted(run) == pytest.approx([0.4, 1.2, 2.4])  # steps 2, 6 and 12, of 5 an epoch


# ---- shares of a run whose length depends on the data --------------------------------------------


@pytest.mark.parametrize(
    ("shares", "steps"),
    [((1.0, 0.5, 0.3, 0.8), [5, 8, 10, 14]), ((0.2, 0.2, 0.2, 1.0), [1, 2, 3, 8])],
)
def test_a_share_of_unknown_length_is_one_of_the_epochs(shares, steps, tmp_path):
    run = trainer(
        tmp_path,
        pruning=Shares(shares=shares, known=False),
        num_train_epochs=4,
        eval_strategy="steps",
        eval_steps=0.25,
        save_strategy="steps",
        save_steps=0.5,
        logging_steps=0.25,
        extra={"eval_dataset": images(8)},
    )
    run.train()
    history = run.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == steps
    assert [entry["step"] for entry in history if "loss" in entry] == steps
    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == [steps[1], steps[3]]


def test_a_share_is_the_same_one_after_a_resume(tmp_path):
    def make(folder):
        settings = {"eval_strategy": "steps", "eval_steps": 0.2, "num_train_epochs": 4}
        settings |= {"save_strategy": "steps", "save_steps": 1}
        extra = {"eval_dataset": images(8)}
        return trainer(folder, pruning=Shares(known=False), extra=extra, **settings)

    evaluated = set()
    for run in every_checkpoint(make, tmp_path):
        history = run.state.log_history
        evaluated.add(tuple(entry["step"] for entry in history if "eval_loss" in entry))
    assert len(evaluated) == 1


# ---- searches ------------------------------------------------------------------------------------


class Noting(DynamicPruningTrainer):
    """Notes the policy and the kept samples of each run."""

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.noted = [*getattr(self, "noted", []), (self.pruning, self.pruning_report)]
        return result


def searched(folder, space, policy, values):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    extra = {"model_init": lambda trial: vit(), "eval_dataset": images(8)}
    run = trainer(folder, cls=Noting, pruning=policy, eval_strategy="epoch", extra=extra)
    run.hyperparameter_search(
        hp_space=space,
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.GridSampler(values, seed=0),
    )
    return run


def test_a_search_goes_over_fields_of_the_policy(tmp_path):
    values = {"keep_ratio": [0.2, 0.9]}

    def space(trial):
        ratio = trial.suggest_categorical("keep_ratio", values["keep_ratio"])
        return {"keep_ratio": ratio, "period": 2, "learning_rate": 1e-3}

    given = UCB(0.5)
    run = searched(tmp_path, space, given, values)
    for policy, report in run.noted:
        assert policy.period == 2
        assert report.policy["keep_ratio"] == policy.keep_ratio
        assert [record.samples for record in report.epochs] == [40 * policy.keep_ratio] * 3
    assert {policy.keep_ratio for policy, _ in run.noted} == {0.2, 0.9}
    assert run.args.learning_rate == 1e-3
    run.train()  # after the search the policy is the one that was given
    assert run.noted[-1][0] is run.pruning is given
    assert run.noted[-1][1].epochs[0].samples == 20


@pytest.mark.parametrize(
    ("policy", "values", "message"),
    [
        (FullData(), {"keep_ratio": [0.2, 0.9]}, r"keep_ratio=0\.[29]"),
        (UCB(0.5), {"keep_ratio": [1.5, 2.5]}, r"keep_ratio=[12]\.5"),
    ],
)
def test_a_search_over_what_the_policy_cannot_have_is_an_error(policy, values, message, tmp_path):
    def space(trial):
        return {name: trial.suggest_categorical(name, found) for name, found in values.items()}

    with pytest.raises(ValueError, match=message):
        searched(tmp_path, space, policy, values)
