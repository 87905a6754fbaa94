"""DynamicPruningTrainer: the five promises, on real Trainers with tiny models."""

import copy
import inspect
import json
import math
from itertools import chain

import datasets
import pytest
import torch
from tiny import (
    KnownLoss,
    Shares,
    arguments,
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
from torch.utils.data import ConcatDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    default_data_collator,
    get_scheduler,
)
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from hf_dynprune import (
    UCB,
    DynamicPruningMixin,
    DynamicPruningTrainer,
    EpsilonGreedy,
    FullData,
    RandomPruning,
)
from hf_dynprune.trainer import SEAMS, logger


class Spy(TrainerCallback):
    """Notes what the loop says of itself."""

    def __init__(self):
        self.epochs, self.totals = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs.append(state.epoch)
        self.totals.append(state.max_steps)


# ---- the seams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEAMS)
def test_the_seams_have_the_signatures_that_we_lean_on(name):
    assert tuple(inspect.signature(getattr(Trainer, name)).parameters)[1:] == SEAMS[name]


def test_the_loop_calls_the_seams_as_we_expect():
    source = inspect.getsource(Trainer._inner_training_loop)
    order = [
        "self.get_train_dataloader()",
        "self.set_initial_training_values(",
        "self._init_training_state(",
    ]
    order += [
        "self._prepare_for_training(",
        "self._run_epoch(\n                model=model,",
        "self._finalize_training(",
    ]
    assert [source.index(call) for call in order] == sorted(source.index(call) for call in order)
    save = inspect.getsource(Trainer._save_checkpoint)
    assert (
        save.index("_save_rng_state")
        < save.index("save_to_json")
        < save.index("_push_from_checkpoint")
    )
    assert "loss_is_scaled_for_ga" in inspect.getsource(Trainer.training_step)
    assert "_get_num_items_in_batch" in inspect.getsource(Trainer.get_batch_samples)


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
    with pytest.raises(TypeError, match="returned a list"):
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
    assert (
        next(r.getMessage() for r in caplog.records if "scheduler" in r.getMessage()).count(
            "6 optimizer steps"
        )
        == 1
    )


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


# ---- the loss ------------------------------------------------------------------------------------


def test_label_smoothing_trains_the_smoothed_loss_and_observes_the_plain_one(tmp_path):
    ours = trainer(
        tmp_path, pruning=Shares(shares=(1.0,)), label_smoothing_factor=0.2, learning_rate=0.0
    )
    assert ours.train().training_loss == pytest.approx(
        trainer(tmp_path, cls=Trainer, label_smoothing_factor=0.2, learning_rate=0.0)
        .train()
        .training_loss,
        rel=1e-5,
    )
    data = images(40)
    with torch.no_grad():
        logits = ours.model(pixel_values=data["pixel_values"][:]).logits
    expected = torch.nn.functional.cross_entropy(logits, data["labels"][:], reduction="none")
    torch.testing.assert_close(ours.pruner.table["last"], expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_scores_are_float32(tmp_path):
    run = trainer(tmp_path, pruning=UCB(0.5), bf16=True)
    run.train()
    assert run.pruner.table["mean"].dtype == torch.float32
    assert run.pruner.table["mean"].isfinite().all()


def test_seq2seq_through_the_mixin(tmp_path):
    class PrunedSeq2SeqTrainer(DynamicPruningMixin, Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    config.decoder_start_token_id = 0
    tokens = torch.randint(1, 32, (20, 5), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[::2, 3:] = -100
    data = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        num_train_epochs=2,
        save_strategy="no",
    )
    run = PrunedSeq2SeqTrainer(
        model=T5ForConditionalGeneration(config),
        args=args,
        train_dataset=data,
        pruning=UCB(keep_ratio=0.5),
    )
    run.train()
    assert run.pruner.table.observed.all()
    assert run.pruning_report.cost_ratio == pytest.approx(0.5)


def test_an_auxiliary_loss_is_kept(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    model = MixtralForCausalLM(config)
    tokens = torch.randint(0, 32, (16, 6), generator=torch.Generator().manual_seed(0)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    settings = {
        "data": data,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    twin = copy.deepcopy(model)
    stock = trainer(tmp_path, cls=Trainer, model=twin, **settings).train()
    ours = trainer(tmp_path, model=model, pruning=FullData(), **settings).train()
    assert ours.training_loss == pytest.approx(stock.training_loss, rel=1e-4)
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert model.loss_function is twin.loss_function  # put back


def language_model(vocabulary, layers=1):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        max_position_embeddings=32,
        **heads,
    )
    return LlamaForCausalLM(config)


def sequences(vocabulary, n=16, length=32):
    tokens = torch.randint(
        0, vocabulary, (n, length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def peak_memory(folder, make=lambda: language_model(8192), **settings):
    """The most bytes of tensors at a time, beyond those before the run, by torch's own count."""
    run = trainer(
        folder,
        model=make(),
        data=sequences(8192),
        per_device_train_batch_size=4,
        max_steps=3,
        **settings,
    )
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run.train()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    allocated = [
        event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"
    ]
    return max(allocated) - allocated[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_large_vocabulary_takes_no_more_memory_than_in_the_stock_trainer(
    bf16, tmp_path, reliability
):
    """Also on the first batch, where the model's own loss is computed and compared."""
    stock = peak_memory(tmp_path, cls=Trainer, bf16=bf16)
    ours = peak_memory(tmp_path, pruning=UCB(keep_ratio=1.0), bf16=bf16)
    assert stock > 4 * 4 * 32 * 8192  # the logits of a batch, at least
    assert ours <= 1.05 * stock
    reliability("memory")


def test_a_large_vocabulary_takes_no_more_memory_where_the_model_computes_its_loss_inline(tmp_path):
    """T5, whose own loss is computed in each step: its graph goes before ours is made."""

    def make():
        torch.manual_seed(0)
        sizes = {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
        }
        return T5ForConditionalGeneration(
            T5Config(vocab_size=8192, decoder_start_token_id=0, **sizes)
        )

    stock = peak_memory(tmp_path, make, cls=Trainer)
    assert peak_memory(tmp_path, make, pruning=UCB(keep_ratio=1.0)) <= 1.05 * stock


def test_a_models_own_loss_is_computed_on_the_first_batch_alone(tmp_path):
    model, calls = language_model(64), []
    stock = model.loss_function

    def count(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    model.loss_function = count
    run = trainer(
        tmp_path, model=model, data=sequences(64), pruning=UCB(0.5), per_device_train_batch_size=4
    )
    run.train()
    assert run.state.global_step == 6
    assert len(calls) == 1
    assert model.loss_function is count
    run.evaluate(sequences(64, n=4))
    assert len(calls) == 2


def test_the_outputs_of_a_batch_have_its_mean_loss(tmp_path):
    """For a compute_loss that is written above ours, on the first batch and later, where the model's own is left out."""
    seen = []

    class Looking(DynamicPruningTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            seen.append((outputs.loss.item(), loss.item(), outputs.loss.requires_grad))
            return (loss, outputs) if return_outputs else loss

    settings = {
        "pruning": UCB(0.5),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    trainer(
        tmp_path, cls=Looking, model=language_model(64), data=sequences(64), max_steps=2, **settings
    ).train()
    assert len(seen) == 4
    for mean, loss, requires_grad in seen:
        assert mean == pytest.approx(2 * loss, rel=1e-5)
        assert not requires_grad


def test_a_fused_loss_is_refused_with_the_cure(tmp_path):
    """Liger's: the forward pass gives a loss and no logits in training."""

    class Fused(type(language_model(64))):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs["logits"] = None
            return outputs

    model = language_model(64)
    model.__class__ = Fused
    run = trainer(
        tmp_path, model=model, data=sequences(64), pruning=UCB(0.5), remove_unused_columns=False
    )
    with pytest.raises(
        ValueError, match=r"liger_kernel_config=\{\"fused_linear_cross_entropy\": False\}"
    ):
        run.train()
    assert run.state.global_step == 0


def test_torch_compile_trains_the_same(tmp_path):
    losses = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        run = trainer(
            tmp_path, model=language_model(64), data=sequences(64), pruning=UCB(0.5), **settings
        )
        losses.append(run.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- promise 5: off means off --------------------------------------------------------------------


def test_pruning_none_is_the_stock_trainer(tmp_path):
    stock = trainer(tmp_path, cls=Trainer)
    off = trainer(tmp_path, pruning=None)
    for run in (stock, off):
        run.train()
    assert same_weights(stock.model, off.model)
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    logs = [
        [{k: v for k, v in e.items() if k not in drop} for e in run.state.log_history]
        for run in (stock, off)
    ]
    assert logs[0] == logs[1]
    assert off.pruning_report is None
    assert off.pruner is None
    assert "loss_is_scaled_for_ga" not in vars(off)
    assert [type(c) for c in off.callback_handler.callbacks] == [
        type(c) for c in stock.callback_handler.callbacks
    ]


@pytest.mark.parametrize("n", [40, 37])
def test_full_data_is_the_stock_run(n, tmp_path):
    stock = trainer(
        tmp_path, cls=Trainer, data=images(n), lr_scheduler_type="cosine", warmup_steps=2
    )
    ours = trainer(
        tmp_path, pruning=FullData(), data=images(n), lr_scheduler_type="cosine", warmup_steps=2
    )
    batches = recorded(ours)
    for run in (stock, ours):
        run.train()
    assert learning_rates(stock) == learning_rates(ours)
    for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    expected = []
    for epoch in range(3):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(42 + epoch))
        expected += [batch.tolist() for batch in order.split(8)]
    assert batches == expected
    assert ours.pruning_report.cost_ratio == 1


def test_evaluation_and_prediction_are_untouched(tmp_path):
    held_out = images(10, seed=3)
    stock = trainer(tmp_path, cls=Trainer, extra={"eval_dataset": held_out})
    ours = trainer(tmp_path, pruning=UCB(0.5), extra={"eval_dataset": held_out})
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    assert (ours.predict(held_out).predictions == stock.predict(held_out).predictions).all()


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


class Events(TrainerCallback):
    """Notes which events it sees, in which order, and at which step."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.seen.append(
                (name, state.global_step)
            )
        return super().__getattribute__(name)


def test_callbacks_see_the_events_of_the_stock_trainer_in_its_order(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 3,
    }
    settings["per_device_train_batch_size"] = 10
    seen = {}
    for name, options in {
        "stock": {"cls": Trainer, "num_train_epochs": 2},
        "pruned": {
            "pruning": RandomPruning(0.5),
            "num_train_epochs": 4,
        },  # as many steps, in twice as many epochs
        "full": {"pruning": FullData(), "num_train_epochs": 2},
    }.items():
        events = Events()
        options["extra"] = {"eval_dataset": images(8), "callbacks": [events]}
        trainer(tmp_path / name, **settings, **options).train()
        # Each epoch logs once more, at its start: kept share, scores.
        own = [
            i
            for i, (event, _) in enumerate(events.seen)
            if event == "on_log" and events.seen[i - 1][0] == "on_epoch_begin"
        ]
        assert len(own) == (0 if name == "stock" else options["num_train_epochs"])
        seen[name] = [event for i, event in enumerate(events.seen) if i not in own]
    assert seen["full"] == seen["stock"]

    def within_epochs(events):
        return [event for event in events if not event[0].startswith("on_epoch")]

    assert within_epochs(seen["pruned"]) == within_epochs(seen["stock"])
    assert {name for name, _ in seen["pruned"]} == {name for name, _ in seen["stock"]}


def test_our_messages_follow_the_verbosity_of_transformers():
    before = logging.get_verbosity()
    try:
        for verbosity, shown in ((logging.WARNING, True), (logging.ERROR, False)):
            logging.set_verbosity(verbosity)
            assert logger.isEnabledFor(logging.WARNING) is shown
    finally:
        logging.set_verbosity(before)


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


def test_global_random_states_are_the_stock_trainers(tmp_path):
    stock = trainer(tmp_path, cls=Trainer, model=vit(dropout=0.1))
    stock.train()
    expected = torch.rand(3)
    ours = trainer(tmp_path, pruning=FullData(), model=vit(dropout=0.1))
    ours.train()
    assert torch.equal(torch.rand(3), expected)


# ---- bad input -----------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {"value": torch.tensor(1.0)}


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class OwnSampler(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pruning": "ucb"}, TypeError, r"make_policy"),
        ({"data": Stream()}, ValueError, "stream"),
        ({"data": values(3).to_iterable_dataset()}, ValueError, "stream"),
        ({"data": values(0)}, ValueError, "empty"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 32},
            ValueError,
            r"keeps 20 of 40 .* drop_last",
        ),
        ({"train_sampling_strategy": "group_by_length"}, ValueError, "group_by_length"),
        ({"train_sampling_strategy": "sequential"}, ValueError, "sequential"),
        ({"model": KnownLoss()}, ValueError, "per_sample_loss_fn"),
        (
            {"extra": {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: 0}},
            ValueError,
            "per_sample_loss_fn",
        ),
        (
            {"cls": type("Mixed", (DynamicPruningMixin, OwnLoss), {})},
            ValueError,
            "OwnLoss.compute_loss",
        ),
        (
            {"cls": type("Mixed", (DynamicPruningMixin, OwnSampler), {})},
            ValueError,
            "OwnSampler._get_train_sampler",
        ),
        (
            {"data": images().with_transform(lambda batch: batch)},
            ValueError,
            "remove_unused_columns=False",
        ),
        ({"pruning": UCB(0.5, signal="el2m")}, ValueError, "el2m"),
        ({"extra": {"per_sample_loss_fn": "single"}}, ValueError, "single_label"),
    ],
)
def test_bad_input_is_an_error_at_construction(changes, error, message, tmp_path):
    settings = {"pruning": UCB(keep_ratio=0.5), **changes}
    with pytest.raises(error, match=message):
        trainer(tmp_path, **settings)


def test_several_gpus_in_one_process_are_refused_with_the_way_out(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2  # what plain `python` finds on a machine with two
    with pytest.raises(
        ValueError, match=r"2 GPUs in one process .*torchrun --nproc_per_node 2 script\.py"
    ):
        DynamicPruningTrainer(model=vit(), args=args, train_dataset=images(), pruning=UCB(0.5))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda outputs, inputs: outputs["losses"].mean(), r"shape \(\).*shape \(batch size,\)"),
        (lambda outputs, inputs: outputs["losses"][:3], r"shape \(3,\).* 8 samples"),
        (lambda outputs, inputs: 2 * outputs["losses"], "would train something else"),
    ],
)
def test_a_wrong_per_sample_loss_is_an_error_at_the_first_batch(function, message, tmp_path):
    run = trainer(
        tmp_path,
        model=KnownLoss(),
        data=values(),
        pruning=UCB(0.5),
        extra={"per_sample_loss_fn": function},
    )
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


def test_a_compute_loss_that_goes_its_own_way_is_found_out(tmp_path):
    class Own(DynamicPruningTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs.pop("sample_index")
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    run = trainer(tmp_path, cls=Own, pruning=UCB(0.5))
    with pytest.raises(RuntimeError, match=r"super\(\)\.compute_loss"):
        run.train()


def test_a_users_loss_function_with_its_per_sample_form(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return 2 * torch.nn.functional.cross_entropy(outputs.logits, labels)

    def per_sample(outputs, inputs):
        return 2 * torch.nn.functional.cross_entropy(
            outputs.logits, inputs["labels"], reduction="none"
        )

    run = trainer(
        tmp_path,
        pruning=UCB(0.5),
        extra={"compute_loss_func": loss, "per_sample_loss_fn": per_sample},
    )
    run.train()
    assert run.pruner.table.observed.all()


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_mixed_samples_are_refused_at_the_first_batch(share, tmp_path):
    def mixup(features):
        batch = default_data_collator(features)
        hard = torch.nn.functional.one_hot(batch["labels"], 4).float()
        batch["labels"] = share * hard + (1 - share) * hard.flip(0)
        return batch

    run = trainer(tmp_path, pruning=UCB(0.5), extra={"data_collator": mixup})
    if (
        share == 1.0
    ):  # several labels may be right, and each is or is not: that is a task of its own
        run.train()
        return
    with pytest.raises(ValueError, match="as mixup and cutmix make them"):
        run.train()
    assert run.state.global_step == 0


class OnlyABatchLoss(torch.nn.Module):
    """A contrastive loss: of a batch, of no sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(192, 4)

    def forward(self, pixel_values, labels=None):
        features = torch.nn.functional.normalize(self.encoder(pixel_values.flatten(1)), dim=1)
        return {"loss": torch.logsumexp(5 * features @ features.T, dim=1).mean()}


def test_the_mean_of_a_batch_where_there_is_no_loss_of_a_sample(tmp_path):
    """Trained on all data with the fallback, the model is the stock Trainer's."""
    runs = []
    for settings in (
        {"cls": Trainer},
        {"pruning": FullData(), "extra": {"per_sample_loss_fn": "batch_mean"}},
    ):
        runs.append(trainer(tmp_path, model=OnlyABatchLoss(), **settings))
        runs[-1].train()
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    extra = {"per_sample_loss_fn": "batch_mean"}
    run = trainer(
        tmp_path, model=OnlyABatchLoss(), pruning=UCB(0.5), extra=extra, learning_rate=0.0
    )
    batches = recorded(run)
    run.train()
    first = run.pruner.table["mean"][torch.tensor(batches[0])]
    assert run.pruner.table.observed.all()
    assert len(first.unique()) <= 3


def test_a_per_sample_loss_may_use_the_models_own(tmp_path):
    """Its gradient is there."""

    def per_sample(outputs, inputs):
        return outputs["loss"].expand(len(inputs["labels"]))

    model = OnlyABatchLoss()
    before = model.encoder.weight.clone()
    trainer(
        tmp_path, model=model, pruning=UCB(0.5), extra={"per_sample_loss_fn": per_sample}
    ).train()
    assert not torch.equal(before, model.encoder.weight)


def test_a_loss_of_the_mixed_class_with_its_per_sample_form(tmp_path):
    cls = type("Mixed", (DynamicPruningMixin, OwnLoss), {})
    run = trainer(tmp_path, cls=cls, pruning=UCB(0.5), extra={"per_sample_loss_fn": "single_label"})
    run.train()
    assert run.pruner.table.observed.all()


def test_operations_are_counted_once_in_a_run_and_as_by_the_stock_trainer(tmp_path, monkeypatch):
    counts = []
    original = type(vit()).num_parameters

    def num_parameters(self, *args, **kwargs):
        counts.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(vit()), "num_parameters", num_parameters)
    runs = {}
    for name, extra in (("stock", {"cls": Trainer}), ("pruned", {"pruning": FullData()})):
        counts.clear()
        run = trainer(tmp_path / name, num_train_epochs=2, **extra)
        counts.clear()
        run.train()
        runs[name] = (
            sum(1 for kwargs in counts if kwargs.get("exclude_embeddings")),
            run.state.total_flos,
        )
    assert runs["stock"][0] == 10  # steps
    assert runs["pruned"][0] == 1
    assert runs["pruned"][1] == runs["stock"][1] > 0


def test_operations_of_a_batch_before_any_run(tmp_path):
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    stock, pruned = (
        trainer(tmp_path, **extra) for extra in ({"cls": Trainer}, {"pruning": UCB(0.5)})
    )
    assert pruned.floating_point_ops(batch) == stock.floating_point_ops(batch) > 0
    assert pruned.floating_point_ops({"labels": torch.zeros(2)}) == 0


def test_operations_of_a_trainers_own_count_stay_its_own(tmp_path):
    class Counting(Trainer):
        def floating_point_ops(self, inputs):
            return 7

    class Pruned(DynamicPruningMixin, Counting):
        pass

    run = trainer(tmp_path, cls=Pruned, pruning=UCB(0.5), num_train_epochs=2)
    run.train()
    assert run.state.total_flos == 7 * run.state.global_step
