"""Text with the plain Trainer: batches by length, Liger kernels, learned prompts."""

import functools
import itertools

import peft
import pytest
import torch
import transformers
from tiny import every_checkpoint, llama, recorded, same_weights, texts, trainer
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_dynprune import UCB, FullData, RandomPruning
from hf_dynprune.loss_side import fused_by_liger

BY_LENGTH = {"train_sampling_strategy": "group_by_length"}


def padded(rows):
    """Pads to the longest row of the batch."""
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], True, fill)
        for name, fill in fills.items()
    }


def sharp(**config):
    """Far from uniform predictions, so that the samples differ."""
    model = llama(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def run_of(folder, *, n=48, cls=None, pruning=None, **settings):
    defaults = {"per_device_train_batch_size": 4, "optim": "sgd", "max_grad_norm": 0.0}
    return trainer(
        folder,
        model=settings.pop("model", None) or sharp(),
        data=texts("causal LM", n),
        extra={"data_collator": padded},
        pruning=pruning,
        **({} if cls is None else {"cls": cls}),
        **{**defaults, **settings},
    )


# ---- batches by length ---------------------------------------------------------------------------


class Seeded(Trainer):
    """The stock Trainer takes its order by length from the global state. Here it is ours."""

    def _get_train_sampler(self, train_dataset=None):
        sampler, seed = super()._get_train_sampler(train_dataset), self.args.seed
        assert type(sampler) is LengthGroupedSampler

        class EachEpoch(LengthGroupedSampler):
            epochs = itertools.count(seed)

            def __iter__(self):
                self.generator = torch.Generator().manual_seed(next(self.epochs))
                return super().__iter__()

        sampler.__class__ = EachEpoch
        return sampler


@pytest.mark.parametrize("accumulation", [1, 2])
def test_full_data_by_length_is_the_stock_run(accumulation, tmp_path):
    """transformers groups the samples of an optimizer step, not those of a batch."""
    settings = {**BY_LENGTH, "gradient_accumulation_steps": accumulation}
    stock = run_of(tmp_path, cls=Seeded, **settings)
    full = run_of(tmp_path, pruning=FullData(), **settings)
    for run in (stock, full):
        run.train()
    for one, other in zip(full.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not same_weights(full.model, sharp())


def padding(batches, lengths):
    """The share of padding in batches of samples of those lengths."""
    places = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / places


def test_the_kept_samples_are_in_batches_of_like_length(tmp_path):
    found = {}
    for strategy in ("random", "group_by_length"):
        run = run_of(tmp_path, n=96, pruning=UCB(0.5), train_sampling_strategy=strategy)
        lengths = [len(row["input_ids"]) for row in run.train_dataset]
        batches = recorded(run)
        state = torch.random.get_rng_state()
        run.get_train_dataloader()
        assert torch.equal(torch.random.get_rng_state(), state)
        run.train()
        epochs = [batches[begin : begin + 12] for begin in (0, 12, 24)]
        for epoch in epochs:
            kept = {i for batch in epoch for i in batch}
            assert len(kept) == 48
            if strategy == "group_by_length":
                assert lengths[epoch[0][0]] == max(lengths[i] for i in kept)  # the longest first
        assert epochs[0] != epochs[1]
        found[strategy] = [padding(epoch, lengths) for epoch in epochs]
    for grouped, plain in zip(found["group_by_length"], found["random"], strict=True):
        assert grouped < 0.6 * plain


def test_lengths_from_a_column(tmp_path):
    """Also if it says something else than the number of tokens, as in the stock Trainer."""
    data = texts("causal LM", 16)
    data = data.add_column("length", list(range(16)))
    run = run_of(tmp_path, pruning=FullData(), remove_unused_columns=False, **BY_LENGTH)
    run.train_dataset = data
    batches = recorded(run)
    run.train()
    assert len(data[15]["input_ids"]) < max(map(len, data["input_ids"]))
    assert batches[0][0] == 15


def test_resuming_by_length_continues_the_identical_run(tmp_path):
    def make(folder):
        return run_of(
            folder, n=24, pruning=UCB(0.5), save_strategy="steps", save_steps=1, **BY_LENGTH
        )

    assert len(list(every_checkpoint(make, tmp_path))) > 5


# ---- the order of the dataset --------------------------------------------------------------------

IN_ORDER = {"train_sampling_strategy": "sequential"}


def test_full_data_in_the_order_of_the_dataset_is_the_stock_run(tmp_path):
    stock, full = (
        run_of(tmp_path, cls=cls, pruning=pruning, **IN_ORDER)
        for cls, pruning in ((Trainer, None), (None, FullData()))
    )
    for run in (stock, full):
        run.train()
    assert same_weights(full.model, stock.model)
    assert not same_weights(full.model, sharp())


def test_the_kept_samples_in_the_order_of_the_dataset(tmp_path):
    """They change from epoch to epoch, and each is trained once."""
    run = run_of(tmp_path, pruning=RandomPruning(0.5), **IN_ORDER)
    batches = recorded(run)
    run.train()
    epochs = [list(itertools.chain(*batches[begin : begin + 6])) for begin in (0, 6, 12)]
    assert all(len(set(epoch)) == 24 and sorted(epoch) == epoch for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_resuming_in_the_order_of_the_dataset_continues_the_identical_run(tmp_path):
    def make(folder):
        settings = {"save_strategy": "steps", "save_steps": 1, "dataloader_num_workers": 1}
        return run_of(folder, n=16, pruning=UCB(0.5), **settings, **IN_ORDER)

    assert len(list(every_checkpoint(make, tmp_path))) > 3


@pytest.mark.parametrize(
    ("first", "other"),
    [("random", "group_by_length"), ("group_by_length", "sequential"), ("sequential", "random")],
)
def test_another_order_does_not_resume(first, other, tmp_path):
    policy = RandomPruning(0.5)
    settings = {"n": 24, "pruning": policy, "save_strategy": "steps", "save_steps": 2}
    run_of(tmp_path, train_sampling_strategy=first, **settings).train()
    again = run_of(tmp_path, train_sampling_strategy=other, **settings)
    with pytest.raises(ValueError, match=r"order: .*(grouped|sequential)"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- Liger ---------------------------------------------------------------------------------------

LIGER = {"use_liger_kernel": True}
UNFUSED = {**LIGER, "liger_kernel_config": {"fused_linear_cross_entropy": False}}


def test_the_fused_loss_of_liger_is_refused_at_construction(tmp_path):
    with pytest.raises(ValueError, match=r"\{\"fused_linear_cross_entropy\": False\}"):
        run_of(tmp_path, pruning=UCB(0.5), **LIGER)


@pytest.mark.parametrize(
    ("policy", "settings", "rule"),
    [
        (UCB(0.5), UNFUSED, "shifted_tokens"),  # all kernels but the fused one
        (RandomPruning(0.5), LIGER, None),  # needs no loss of a sample
    ],
)
def test_the_other_kernels_of_liger_train(policy, settings, rule, monkeypatch, tmp_path):
    """Liger runs on GPUs alone. Here its fused forward is one that gives no logits."""
    applied = []

    def apply(model, config):
        applied.append(config)
        if (config or {}).get("fused_linear_cross_entropy", True):
            forward = model.forward

            @functools.wraps(forward)  # the columns of the data that are kept follow from it
            def fused(*args, **kwargs):
                outputs = forward(*args, **kwargs)
                outputs["logits"] = None
                return outputs

            model.forward = fused

    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", apply)
    run = run_of(tmp_path, pruning=policy, max_steps=2, **settings)
    run.train()
    assert len(applied) == 1
    assert (run.loss_rule and run.loss_rule.name) == rule
    assert run.pruning_report.totals["optimizer_steps"] == 2
    assert fused_by_liger(run.args) == (rule is None)


# ---- virtual tokens ------------------------------------------------------------------------------


def with_prompt(kind, **config):
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **config)
    return peft.get_peft_model(sharp(max_position_embeddings=32), config)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("PromptTuningConfig", {}),
        ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
        ("PrefixTuningConfig", {}),
    ],
)
def test_each_score_behind_a_learned_prompt_is_its_own_samples(kind, config, tmp_path):
    """The logits of the virtual tokens are in front. Read from there, all would be shifted."""
    model = with_prompt(kind, num_virtual_tokens=3, **config)
    settings = {"label_names": ["labels"], "learning_rate": 0.0}
    run = run_of(tmp_path, model=model, n=20, pruning=UCB(0.6), **settings)
    run.train()
    assert run.pruner.table.observed.all()
    names = ("input_ids", "attention_mask", "labels")
    with torch.no_grad():
        rows = [{name: torch.tensor([row[name]]) for name in names} for row in run.train_dataset]
        alone = torch.stack([model.eval()(**row).loss for row in rows])
    torch.testing.assert_close(run.pruner.table["mean"], alone, rtol=1e-4, atol=1e-6)
    assert torch.isclose(alone, alone.roll(1), rtol=1e-3).sum() < 5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_prompt_with_a_loss_of_its_own_is_refused(tmp_path):
    ids = {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}
    with pytest.raises(ValueError, match="CPT"):
        run_of(tmp_path, model=with_prompt("CPTConfig", **ids), pruning=UCB(0.5))
