"""Tiny models, data and trainers: from configs, on the CPU, with a few thousand parameters."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hf_dynprune import DynamicPruningTrainer, EpochPlan, ScoredPolicy
from hf_dynprune.table import MovingMean

# Seconds after which a test gives up on a process that hangs: far more than any needs, even on a
# machine that is busy with other work. No test may depend on how fast a machine is.
PATIENCE = 3600


def images(n=40, classes=4, seed=0, size=8):
    """A `datasets.Dataset` of n random images with labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, size, size, generator=generator)
    labels = torch.randint(0, classes, (n,), generator=generator)
    rows = {"pixel_values": pixels.numpy(), "labels": labels.numpy()}
    kinds = {
        "pixel_values": datasets.Array3D((3, size, size), "float32"),
        "labels": datasets.Value("int64"),
    }
    return datasets.Dataset.from_dict(rows, datasets.Features(kinds)).with_format("torch")


def vit(classes=4, seed=0, dropout=0.0):
    """A ViT of about 3,000 parameters. The stock Trainer normalises its loss correctly."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=classes,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


VOCAB, CLASSES = 40, 3
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def bert(head="SequenceClassification", seed=0, **config):
    """A BERT without dropout; three labels if need be."""
    torch.manual_seed(seed)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**{**_TEXT, **no_dropout, "num_labels": CLASSES, **config})
    return getattr(transformers, f"BertFor{head}")(config)


def llama(head="CausalLM", seed=0, **config):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{**_TEXT, "num_key_value_heads": 1, "num_labels": CLASSES, **config}
    )
    return getattr(transformers, f"LlamaFor{head}")(config)


def t5(seed=0):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
    }
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


class FixedNormForImageClassification(transformers.ResNetForImageClassification):
    """Its BatchNorm ignores the batch, so the loss of a sample does not depend on the others.

    Its loss follows from the end of its name.
    """

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self


def resnet(classes=4, seed=0):
    torch.manual_seed(seed)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return FixedNormForImageClassification(
        transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=classes)
    )


def texts(task="single label", n=30, seed=0, padded=False):
    """A `datasets.Dataset` of n random texts of 4 to 12 tokens, with the labels of the task.

    Args:
        task: Which labels a text has. Some texts have many, others few.
        padded: Whether all texts have the same length, for the default collator.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for length in generator.integers(4, 13, n):
        tokens = generator.integers(1, VOCAB, length)
        some = generator.random(length) < generator.uniform(0.2, 1)
        some[generator.integers(1, length)] = True  # causal models predict no first token
        other = generator.integers(1, VOCAB, generator.integers(1, 8))
        start, end = np.sort(generator.integers(0, length, 2))
        wanted = {
            "single label": {"labels": tokens[0] % CLASSES},
            "multi label": {"labels": (generator.random(CLASSES) < 0.5).astype(np.float32)},
            "regression": {"labels": np.float32(generator.normal())},
            "token classification": {"labels": np.where(some, tokens % CLASSES, -100)},
            "masked LM": {"labels": np.where(some, generator.integers(1, VOCAB, length), -100)},
            "causal LM": {"labels": np.where(some, tokens, -100)},
            "seq2seq": {"labels": other},
            "question answering": {"start_positions": start, "end_positions": end},
        }[task]
        row = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **wanted}
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            if padded and np.ndim(row.get(name)) == 1 and (name, task) != ("labels", "multi label"):
                row[name] = np.pad(row[name], (0, 12 - len(row[name])), constant_values=fill)
        rows.append({name: value.tolist() for name, value in row.items()})
    return datasets.Dataset.from_list(rows)


def tiny_models(n=30):
    """name -> (makes the model, n samples for the default collator).

    No model has dropout, and in none does the batch change the loss of a sample.
    """
    return {
        "bert": (bert, texts(n=n, padded=True)),
        "llama classification": (lambda: llama("SequenceClassification"), texts(n=n, padded=True)),
        "llama causal": (llama, texts("causal LM", n, padded=True)),
        "t5": (t5, texts("seq2seq", n, padded=True)),
        "vit": (vit, images(n)),
        "resnet": (resnet, images(n)),
    }


class KnownLoss(torch.nn.Module):
    """The loss of a sample is its `value`. The only weight gets a gradient of 0."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, value, labels=None):
        losses = value + 0.0 * self.weight
        return {"loss": losses.mean(), "losses": losses}


def known_losses(outputs, inputs):
    return outputs["losses"]


def values(n=30):
    """Sample i has the value i + 1, which with `KnownLoss` is its loss."""
    return datasets.Dataset.from_dict({"value": [float(i + 1) for i in range(n)]}).with_format(
        "torch"
    )


def arguments(folder, **settings):
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **settings})


def trainer(
    folder: Path,
    *,
    cls=DynamicPruningTrainer,
    model=None,
    data=None,
    pruning=None,
    extra=None,
    **settings,
):
    """A trainer, by default of a tiny ViT on random images.

    Args:
        extra: Arguments of the trainer.
        settings: TrainingArguments.
    """
    return cls(
        model=vit() if model is None and "model_init" not in (extra or {}) else model,
        args=arguments(folder, **settings),
        train_dataset=images() if data is None else data,
        **({} if pruning is None else {"pruning": pruning}),
        **(extra or {}),
    )


# Of the arguments of trl's and sentence-transformers' trainers, whose defaults differ.
QUIET = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    # Lower versions of transformers have only the second name.
    next(
        name
        for name in ("activation_checkpointing", "gradient_checkpointing")
        if name in TrainingArguments.__dataclass_fields__
    ): False,
}


def learning_rates(run):
    """The learning rate of each optimizer step (with logging_steps=1)."""
    return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]


def same_weights(a, b):
    return all(
        torch.equal(p, q)
        for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def recorded(run):
    """A list to which each trained batch adds its sample indices."""
    batches = []
    original = type(run).compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if "sample_index" in inputs:
            batches.append(inputs["sample_index"].tolist())
        return original(self, model, inputs, *args, **kwargs)

    run.__class__ = type("Recorded", (type(run),), {"compute_loss": compute_loss})
    return batches


def comparable(report):
    """A report without what may differ: seconds, the machine, and the list of resumptions."""
    values = report.to_dict()
    for part in (values, values["totals"], *values["epochs"]):
        for name in ("seconds", "environment", "resumed"):
            part.pop(name, None)
        if "metrics" in part:
            speed = ("_runtime", "_per_second")
            metrics = part["metrics"].items()
            part["metrics"] = {k: v for k, v in metrics if not k.endswith(speed)}
    return values


def assert_same_run(part, whole):
    """Bit for bit: weights, table, learning rate of each step, report."""
    assert part.state.global_step == whole.state.global_step
    assert same_weights(whole.model, part.model)
    for name in whole.pruner.table.columns:
        assert torch.equal(
            whole.pruner.table[name].nan_to_num(7), part.pruner.table[name].nan_to_num(7)
        ), name
    assert learning_rates(part) == learning_rates(whole)
    assert comparable(part.pruning_report) == comparable(whole.pruning_report)


def every_checkpoint(make, folder):
    """Train a run that saves at each step, and resume it from each checkpoint but the last.

    Yields:
        Each resumed run. It was compared with the uninterrupted one.
    """
    whole = make(folder / "whole")
    whole.train()
    assert whole.state.global_step > 1
    for step in range(1, whole.state.global_step):
        part = make(folder / "part")
        # Saving takes most of the time. test_faults.py resumes what a resumed run saved.
        part.args.save_strategy = "no"
        part.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
        assert_same_run(part, whole)
        assert part.pruning_report.resumed[-1]["step"] == step
        yield part


@dataclass(frozen=True)
class Shares(ScoredPolicy):
    """Keeps a different share in each epoch; its sizes are known beforehand or not."""

    shares: tuple = (1.0, 0.5, 0.3, 0.8)
    known: bool = True
    weight: float = 1.0
    lr_scale: float = 1.0

    memory = MovingMean("loss", 1.0)
    weighs = True

    def score(self, table):
        return table["mean"]

    def size(self, n, epoch):
        return round(n * self.shares[epoch % len(self.shares)])

    def planned_size(self, n, epoch, progress):
        return self.size(n, epoch) if self.known else None

    def plan(self, choice):
        order = torch.randperm(choice.n, generator=choice.generator)
        indices = order[: self.size(choice.n, choice.epoch)]
        weights = None if self.weight == 1 else torch.full((len(indices),), self.weight)
        return EpochPlan(indices, weights, self.lr_scale)
