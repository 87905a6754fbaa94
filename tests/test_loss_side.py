"""The loss side of the Trainer: the loss of a sample and of a step, signals; runs without any."""

import copy
import json
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from tiny import (
    KnownLoss,
    Shares,
    every_checkpoint,
    images,
    known_losses,
    llama,
    recorded,
    same_weights,
    texts,
    trainer,
    values,
    vit,
)
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
)

from hf_dynprune import (
    UCB,
    DynamicPruningMixin,
    DynamicPruningTrainer,
    FullData,
    InfoBatch,
    RandomPruning,
    StaticPruning,
)
from hf_dynprune.loss_side import why_losses
from hf_dynprune.losses import LossRule, SampleLosses
from hf_dynprune.schedule import RunShape

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
    torch.testing.assert_close(ours.pruner.table["mean"], expected, rtol=1e-4, atol=1e-5)


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
    # Below 5.18 the stock Trainer counts the first label, which no token predicts.
    labels = [[-100, *row[1:]] for row in tokens]
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels})
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


def test_a_models_own_loss_is_computed_for_comparisons_alone(tmp_path):
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
    assert len(calls) == 3  # at batches 1, 2 and 4
    assert model.loss_function is count
    run.evaluate(sequences(64, n=4))
    assert len(calls) == 4


def test_the_outputs_of_a_batch_have_its_mean_loss(tmp_path):
    """For a compute_loss above ours: on the first batch, and later, without the model's own."""
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


# ---- bad input -----------------------------------------------------------------------------------


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": KnownLoss()}, "KnownLoss"),
        (
            {"extra": {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: 0}},
            "compute_loss_func",
        ),
        ({"cls": type("Mixed", (DynamicPruningMixin, OwnLoss), {})}, r"OwnLoss\.compute_loss"),
        ({"extra": {"per_sample_loss_fn": "single"}}, "'single'.*single_label"),
        ({"extra": {"per_sample_loss_fn": "single"}, "pruning": RandomPruning(0.5)}, "'single'"),
    ],
)
def test_an_unknown_loss_is_an_error_at_construction(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **{"pruning": UCB(keep_ratio=0.5), **changes})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda outputs, inputs: outputs["losses"].mean(), r"shape \(\)"),
        (lambda outputs, inputs: outputs["losses"][:3], r"\(3,\).* 8 "),
        (lambda outputs, inputs: outputs["losses"] ** 2, "'custom'"),
        (lambda outputs, inputs: outputs["losses"][:1].expand(8), "'custom'"),
        (lambda outputs, inputs: outputs["losses"].detach(), "batch_mean"),
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


@pytest.mark.parametrize("batch", [8, 64])  # an epoch of one step is found out, too
def test_a_compute_loss_that_goes_its_own_way_is_found_out(batch, tmp_path):
    class Own(DynamicPruningTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs.pop("sample_index")
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    run = trainer(tmp_path, cls=Own, pruning=UCB(0.5), per_device_train_batch_size=batch)
    with pytest.raises(RuntimeError, match=r"Own\.compute_loss"):
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
    if share == 1.0:  # labels of 0 and 1 are a multi-label task
        run.train()
        return
    with pytest.raises(ValueError, match="mixup"):
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


# ---- where no loss of a sample is needed ---------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [RandomPruning(0.5), StaticPruning(keep_ratio=0.5, keep="random"), FullData()],
    ids=str,
)
def test_a_policy_that_needs_no_loss_trains_any_model(policy, tmp_path):
    run = trainer(tmp_path, model=OnlyABatchLoss(), pruning=policy)
    before = run.model.encoder.weight.clone()
    run.train()
    assert run.loss_rule is None
    assert not torch.equal(before, run.model.encoder.weight)
    assert run.pruning_report.cost_ratio == pytest.approx(1.0 if policy == FullData() else 0.5)
    assert run.evaluate(images(8))["eval_loss"] > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_losses_the_normalisation_is_the_stock_trainers(accumulation, tmp_path):
    settings = {"gradient_accumulation_steps": accumulation}
    runs = []
    for kind in ({"cls": Trainer}, {"pruning": FullData()}):
        runs.append(trainer(tmp_path, model=OnlyABatchLoss(), **settings, **kind))
        runs[-1].train()
    assert same_weights(runs[0].model, runs[1].model)
    assert [entry.get("loss") for entry in runs[0].state.log_history if "loss" in entry] == [
        entry["loss"] for entry in runs[1].state.log_history if "loss" in entry
    ]


def test_a_users_compute_loss_trains_as_it_is(tmp_path):
    class Weighted(Trainer):
        weight = torch.tensor([0.5, 1.0, 1.5, 2.0])

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, labels, weight=self.weight)
            return (loss, outputs) if return_outputs else loss

    class Pruned(DynamicPruningMixin, Weighted):
        pass

    stock = trainer(tmp_path, cls=Weighted)
    ours = trainer(tmp_path, cls=Pruned, pruning=FullData())
    for run in (stock, ours):
        run.train()
    assert same_weights(stock.model, ours.model)
    half = trainer(tmp_path, cls=Pruned, pruning=RandomPruning(0.5))
    half.train()
    assert half.pruning_report.totals["forward_passes"] == 60
    with pytest.raises(ValueError, match=r"Weighted\.compute_loss"):
        trainer(tmp_path, cls=Pruned, pruning=UCB(0.5))


def test_runs_without_losses_resume(tmp_path):
    def make(folder):
        settings = {"save_strategy": "steps", "save_steps": 1}
        return trainer(folder, model=OnlyABatchLoss(), pruning=RandomPruning(0.4), **settings)

    assert sum(1 for _ in every_checkpoint(make, tmp_path)) == 5


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (UCB(0.5), "'loss'"),
        (InfoBatch(), "InfoBatch"),
        (RandomPruning(0.5, min_per_class=2), "'label'"),
    ],
)
def test_a_policy_that_needs_a_loss_says_for_what(policy, reason, tmp_path):
    with pytest.raises(ValueError, match=f"OnlyABatchLoss.*{reason}"):
        trainer(tmp_path, model=OnlyABatchLoss(), pruning=policy)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, True),  # 20 samples do not fill batches of 16
        ({"batch_size": 5}, False),
        ({"drop_last": True}, False),
        ({"ranks": 1}, False),
    ],
)
def test_padding_needs_the_loss_of_each_sample(changes, needed):
    shape = RunShape(**{"samples": 40, "batch_size": 8, "num_epochs": 3, "ranks": 2, **changes})
    pruner = SimpleNamespace(policy=RandomPruning(0.5), shape=shape, scored_signals=())
    assert bool(why_losses(pruner)) is needed


# ---- several passes of a batch -------------------------------------------------------------------


class Twice:
    """R-Drop and the like."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        copies = [dict(inputs), self.again(inputs)]
        passes = [
            super(Twice, self).compute_loss(model, copy, True, num_items_in_batch)
            for copy in copies
        ]
        loss = (passes[0][0] + passes[1][0]) / 2
        return (loss, passes[0][1]) if return_outputs else loss

    def again(self, inputs):
        return dict(inputs)


class TwiceCopied(Twice):
    def again(self, inputs):
        return {name: value.clone() for name, value in inputs.items()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("passes", [Twice, TwiceCopied])
def test_a_batch_that_goes_through_the_model_twice_counts_once(passes, accumulation, tmp_path):
    stock_class = type("Stock", (passes, Trainer), {})
    our_class = type("Ours", (passes, DynamicPruningTrainer), {})
    settings = {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-3}
    stock = trainer(tmp_path, cls=stock_class, **settings)
    ours = trainer(tmp_path, cls=our_class, pruning=FullData(), **settings)
    for run in (stock, ours):
        run.train()
    for one, other in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert ours.pruning_report.cost_ratio == 1.0
    scored = trainer(tmp_path, cls=our_class, pruning=UCB(0.5), **settings)
    scored.train()
    assert scored.pruner.table.observed.all()


def test_what_is_observed_is_the_first_pass(tmp_path):
    class Perturbed(Twice):
        def again(self, inputs):
            return {**inputs, "pixel_values": inputs["pixel_values"] + 10.0}

    cls = type("Ours", (Perturbed, DynamicPruningTrainer), {})
    runs = [
        trainer(tmp_path, cls=kind, pruning=UCB(1.0), learning_rate=0.0, num_train_epochs=1)
        for kind in (cls, DynamicPruningTrainer)
    ]
    for run in runs:
        run.train()
    torch.testing.assert_close(runs[0].pruner.table["mean"], runs[1].pruner.table["mean"])


def test_a_batch_in_one_pass_of_two_copies_is_refused(tmp_path):
    class Doubled(DynamicPruningTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
            return super().compute_loss(model, twice, *args, **kwargs)

    run = trainer(tmp_path, cls=Doubled, pruning=UCB(0.5))
    with pytest.raises(ValueError, match=r"16 samples, expected 8"):
        run.train()


def test_a_step_counts_the_samples_of_its_batches_not_their_place(tmp_path):
    """With dataloader_in_order=False the short batch may come first."""
    run = trainer(tmp_path, model=KnownLoss(), data=values(20), pruning=FullData(),
                  extra={"per_sample_loss_fn": known_losses})  # fmt: skip
    batches = [{"sample_index": torch.arange(n)} for n in (4, 8)]
    batches[1]["sample_index"][5:] = -1
    _, terms = run.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    assert int(terms) == 4 + 5


# ---- BatchNorm -----------------------------------------------------------------------------------


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = (torch.nn.Linear(192, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4))
        self.body = torch.nn.Sequential(torch.nn.Flatten(), *layers)

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("fn", ["single_label", None])
def test_a_last_batch_of_one_is_filled_for_batch_norm(fn, tmp_path):
    """A copy of the sample with weight 0; also if the loss is left to the Trainer."""
    sizes = []

    class Measured(DynamicPruningTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            sizes.append(len(inputs["pixel_values"]))
            return super().training_step(model, inputs, *args, **kwargs)

    policy = RandomPruning(0.425) if fn is None else Shares(shares=(0.425,))  # 17 of 40
    extra = {} if fn is None else {"per_sample_loss_fn": fn}
    run = trainer(tmp_path, cls=Measured, model=Normed(), pruning=policy, extra=extra)
    run.train()
    assert sizes == [8, 8, 2] * 3
    assert run.state.global_step == 9
    if fn is not None:
        assert int(run.pruner.table.observed.sum()) <= 40


def test_the_copy_of_a_last_sample_trains_nothing(tmp_path):
    """The loss of the last step is that of its one sample, not of two."""
    losses = []

    class Noting(DynamicPruningTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            index = inputs["sample_index"]
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            losses.append((index.tolist(), loss.item()))
            return loss

    extra = {"per_sample_loss_fn": "single_label"}
    settings = {"learning_rate": 0.0, "num_train_epochs": 1, "extra": extra}
    policy = Shares(shares=(0.425,))
    run = trainer(tmp_path, cls=Noting, model=Normed(), pruning=policy, **settings)
    run.train()
    index, loss = losses[-1]
    assert index[1] == -1
    table = run.pruner.table
    assert loss == pytest.approx(float(table["mean"][index[0]]), rel=1e-5)


def test_without_batch_norm_and_on_all_data_batches_stay_as_they_are(tmp_path):
    run = trainer(tmp_path, data=images(17), pruning=RandomPruning(0.99))
    assert not run.pruner.sampler.fills_one
    full = trainer(tmp_path, model=Normed(), data=images(17), pruning=FullData())
    assert full.pruner.sampler.fills_one
    assert len(full.pruner.sampler) == 17


# ---- losses that only a batch has ----------------------------------------------------------------


class Preferring(Trainer):
    """As trl's: its batch has two rows for each sample, its outputs hold metrics alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")
        rows = torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(3)])
        logits = model(pixel_values=rows).logits
        loss = -F.logsigmoid(logits[: len(rows) // 2, 0] - logits[len(rows) // 2 :, 1]).mean()
        metrics = {"chosen": logits[:, 0].detach().mean()}
        return (loss, metrics) if return_outputs else loss


class PrunedPreferring(DynamicPruningMixin, Preferring):
    pass


@pytest.mark.parametrize("scoring", ["trained", "all"])
def test_batch_mean_needs_no_loss_in_the_outputs(scoring, tmp_path):
    extra = {"per_sample_loss_fn": "batch_mean"}
    stock = trainer(tmp_path, cls=Preferring)
    ours = trainer(tmp_path, cls=PrunedPreferring, pruning=FullData(), extra=extra)
    for run in (stock, ours):
        run.train()
    assert same_weights(stock.model, ours.model)
    scored = trainer(tmp_path, cls=PrunedPreferring, pruning=UCB(0.5, scoring=scoring), extra=extra)
    scored.train()
    assert scored.pruner.table.observed.all()


def test_outputs_that_are_metrics_are_named_on_the_first_batch(tmp_path):
    def function(outputs, inputs):
        return outputs["chosen"].expand(len(inputs["pixel_values"]))

    extra = {"per_sample_loss_fn": function}
    run = trainer(tmp_path, cls=PrunedPreferring, pruning=UCB(0.5), extra=extra)
    with pytest.raises(ValueError, match=r"Preferring\.compute_loss.*batch_mean"):
        run.train()
    assert run.state.global_step == 0


def test_refusals_name_the_fallback_and_the_other_argument(tmp_path):
    focal = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: 0}
    with pytest.raises(ValueError, match=r"compute_loss_func.*per_sample_loss_fn=.*batch_mean"):
        trainer(tmp_path, pruning=UCB(0.5), extra=focal)
    with pytest.raises(ValueError, match=r"KnownLoss.*batch_mean"):
        trainer(tmp_path, model=KnownLoss(), data=values(), pruning=UCB(0.5))


# ---- rules and signals of a user -----------------------------------------------------------------


def focus(labels):
    """Token selection: every other token is trained on."""
    chosen = F.pad(labels[:, 1:], (0, 1), value=-100).clone()
    chosen[:, ::2] = -100
    return chosen


def focused(**fields):
    """A user's own rule over a part of the tokens."""

    def losses(outputs, inputs, smoothing, config):
        chosen = focus(inputs["labels"])
        flat = F.cross_entropy(outputs.logits.flatten(0, 1), chosen.flatten(), reduction="none")
        each = flat.view(chosen.shape).sum(1)
        return SampleLosses(each, each.detach(), chosen.ne(-100).sum(1).float())

    return LossRule("focus", losses, lambda i: focus(i["labels"]).ne(-100).sum(1), **fields)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_users_rule_is_normalised_over_its_own_terms(accumulation, tmp_path):
    data = texts("causal LM", 16, padded=True)
    gradients = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    run = trainer(
        tmp_path,
        model=llama(),
        data=data,
        pruning=FullData(),
        extra={
            "per_sample_loss_fn": focused(matches_model=False),
            "callbacks": [Note()],
        },
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        max_steps=1,
    )
    run.train()
    model = llama()
    batch = default_data_collator([data[i] for i in range(16)])
    chosen = focus(batch["labels"])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    F.cross_entropy(logits.flatten(0, 1), chosen.flatten()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-6)


def test_the_score_of_a_users_rule_is_its_mean_over_the_terms(tmp_path):
    data = texts("causal LM", 16, padded=True)
    run = trainer(
        tmp_path,
        model=llama(),
        data=data,
        pruning=UCB(1.0),
        extra={"per_sample_loss_fn": focused(matches_model=False)},
        learning_rate=0.0,
        num_train_epochs=1,
    )
    run.train()
    model = llama()
    for i in range(16):
        batch = default_data_collator([data[i]])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        chosen = focus(batch["labels"])
        each = F.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="sum")
        expected = each.item() / max(1, int(chosen.ne(-100).sum()))
        assert run.pruner.table["mean"][i].item() == pytest.approx(expected, rel=1e-4)


def test_a_rule_that_differs_without_saying_so_is_an_error_at_the_first_batch(tmp_path):
    data = texts("causal LM", 16, padded=True)
    extra = {"per_sample_loss_fn": focused()}
    run = trainer(tmp_path, model=llama(), data=data, pruning=UCB(0.5), extra=extra)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*matches_model"):
        run.train()


class Confident(DynamicPruningTrainer):
    """Observes the highest probability, which may belong to another class than the label."""

    def observed_signals(self):
        return (*super().observed_signals(), "highest")

    def batch_signals(self, names, outputs, inputs, losses):
        signals = super().batch_signals(names, outputs, inputs, losses)
        highest = outputs.logits.detach().softmax(-1).max(-1).values
        return {**signals, "highest": highest}


def test_a_subclass_may_add_a_signal(tmp_path):
    run = trainer(tmp_path, cls=Confident, pruning=UCB(1.0, signal="highest"), learning_rate=0.0)
    run.train()
    with torch.no_grad():
        logits = vit()(pixel_values=images()["pixel_values"][:]).logits
    torch.testing.assert_close(run.pruner.table["mean"], logits.softmax(-1).max(-1).values)
    with pytest.raises(ValueError, match="'highest'"):
        trainer(tmp_path, pruning=UCB(0.5, signal="highest"))
