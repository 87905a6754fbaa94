"""Trainings of all kinds of models and tasks: accumulated batches, and the score of each sample."""

import copy
from dataclasses import dataclass

import pytest
import torch
from tiny import bert, llama, t5, texts, tiny_models, trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_dynprune import UCB, DynamicPruningTrainer, EpochPlan, PruningPolicy
from hf_dynprune.table import Last

# ---- accumulation --------------------------------------------------------------------------------

KEPT = 22  # of 30, in batches of 8: the last step has 6 samples, 4 + 2, or 2 + 2 + 2


@dataclass(frozen=True)
class Some(PruningPolicy):
    """A fixed number of samples, drawn again in each epoch. Their weights differ, or are all 1."""

    weighted: bool = False

    memory = Last("loss")
    weighs = True

    def plan(self, choice):
        indices = torch.randperm(choice.n, generator=choice.generator)[:KEPT]
        return EpochPlan(indices, 0.25 + (indices * 7 % 5) / 2 if self.weighted else None)


def terms_of(name, sample):
    """The number of terms in the mean that is the model's loss."""
    labels = sample["labels"][:, 1:] if name == "llama causal" else sample["labels"]
    return int((labels != -100).sum())


class Recording(DynamicPruningTrainer):
    """Notes each sample of the running optimizer step, as a batch of one, and its weight."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        index = inputs["sample_index"]
        self.samples = getattr(self, "samples", [])
        for i, weight in enumerate(self.pruner.weights(index).tolist()):
            sample = {
                name: value[i : i + 1] for name, value in inputs.items() if name != "sample_index"
            }
            self.samples.append((int(index[i]), weight, sample))
        return super().compute_loss(model, inputs, *args, **kwargs)


def gradient_of(name, model, samples):
    """By definition: the gradient of sum w L / D, each L computed from one sample alone."""
    number = [terms_of(name, sample) for _, _, sample in samples]
    losses = [
        w * t * model(**sample).loss for (_, w, sample), t in zip(samples, number, strict=True)
    ]
    defined = torch.autograd.grad(
        sum(losses) / sum(number), list(model.parameters()), allow_unused=True
    )
    return torch.cat([g.flatten() for g in defined if g is not None])


def train(name, folder, batch, accumulation, *, cls=Recording, define=False, **extra):
    """The trained run, and for each optimizer step its samples and its gradient.

    With `define` also the gradient by definition.
    """
    make, data = tiny_models()[name]
    steps = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradient = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            )
            samples = vars(run).pop("samples", [])
            defined = gradient_of(name, model, samples) if define else None
            steps.append(([(i, weight) for i, weight, _ in samples], gradient, defined))

    run = trainer(
        folder,
        cls=cls,
        model=make(),
        data=data,
        extra={"callbacks": [Note()]},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.05,
        **extra,
    )
    run.train()
    return run, steps


def assert_same_gradient(one, other):
    # Entries that cancel out have no relative accuracy, so the whole gradient is the measure.
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", tiny_models())
def test_accumulated_batches_train_as_one_big_batch(name, weighted, tmp_path, reliability):
    policy = Some(weighted=weighted)
    whole, big = train(name, tmp_path, 8, 1, pruning=policy, define=True)
    reliability("accumulation", 2 * len(big))
    assert [len(samples) for samples, _, _ in big] == [8, 8, 6] * 2
    assert len({weight for samples, _, _ in big for _, weight in samples}) == (5 if weighted else 1)
    for _, gradient, defined in big:
        assert_same_gradient(gradient, defined)
    for batch, accumulation in ((4, 2), (2, 4)):
        parts, steps = train(name, tmp_path, batch, accumulation, pruning=policy)
        for (samples, gradient, _), (big_samples, big_gradient, _) in zip(steps, big, strict=True):
            assert samples == big_samples
            assert_same_gradient(gradient, big_gradient)
        for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        last, expected = parts.pruner.table["loss"], whole.pruner.table["loss"]
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


# ---- each score is the loss of its own sample ----------------------------------------------------

TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")),
    pad_token="[PAD]",
)
PAD, PAD_LABELS = DataCollatorWithPadding(TOKENIZER), DataCollatorForTokenClassification(TOKENIZER)
PAD_ALIKE = DataCollatorWithPadding(TOKENIZER, padding="max_length", max_length=12)

# task -> (function that makes the model, collator that pads a batch to its longest text)
TASKS = {
    "single label": (bert, PAD),
    "multi label": (lambda: bert(problem_type="multi_label_classification"), PAD),
    "regression": (lambda: bert(num_labels=1), PAD),
    "token classification": (lambda: bert("TokenClassification"), PAD_LABELS),
    "masked LM": (lambda: bert("MaskedLM"), PAD_LABELS),
    "causal LM": (llama, PAD_LABELS),
    "seq2seq": (t5, DataCollatorForSeq2Seq(TOKENIZER)),
    "question answering": (
        lambda: bert("QuestionAnswering", num_labels=2),
        PAD_ALIKE,
    ),  # padding, too, could be the answer
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_each_score_is_the_loss_of_its_own_sample(task, bf16, tmp_path, reliability):
    reliability("tasks")
    make, collator = TASKS[task]
    model, data, widths = make(), texts(task), set()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # far from uniform predictions, so that the samples differ
            parameter.mul_(4.0)
    reference = copy.deepcopy(model).eval()  # in float32, also for a run in bfloat16

    class Measured(DynamicPruningTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            widths.add(inputs["input_ids"].shape[1])
            return super().compute_loss(model, inputs, *args, **kwargs)

    run = trainer(
        tmp_path,
        cls=Measured,
        model=model,
        data=data,
        pruning=UCB(keep_ratio=0.6),
        extra={"data_collator": collator},
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=0.0,
        bf16=bf16,
    )
    run.train()
    assert len(widths) > 2 or collator is PAD_ALIKE  # batches differ in their padding
    table = run.pruner.table
    assert table.observed.all()
    with torch.no_grad():
        alone = torch.stack([reference(**collator([sample])).loss for sample in data])
    score, close = (
        table["mean"],
        {"rtol": 2e-2, "atol": 1e-2} if bf16 else {"rtol": 1e-4, "atol": 1e-6},
    )
    assert score.dtype == alone.dtype == torch.float32
    assert score.isfinite().all()
    torch.testing.assert_close(score, alone, **close)
    near = torch.isclose(score, alone.roll(1), **close)
    assert near.sum() < 15  # a neighbour's loss would not do
