"""Tiny models, data and trainers for the tests: from configs, on the CPU, a few thousand parameters."""

from pathlib import Path

import datasets
import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hf_dynprune import DynamicPruningTrainer


def images(n=40, classes=4, seed=0, size=8):
    """A `datasets.Dataset` of n random images with labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, size, size, generator=generator)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return datasets.Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels.tolist()}).with_format("torch")


def vit(classes=4, seed=0, dropout=0.0):
    """A ViT of about 3,000 parameters: the stock Trainer normalises its loss rightly."""
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


class KnownLoss(torch.nn.Module):
    """The loss of a sample is its `value`, whatever the weight, which gets a gradient of 0."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, value, labels=None):
        losses = value + 0.0 * self.weight
        return {"loss": losses.mean(), "losses": losses}


def known_losses(outputs, inputs):
    return outputs["losses"]


def values(n=30):
    """Sample i has the value i + 1, and so, with `KnownLoss`, the loss i + 1."""
    return datasets.Dataset.from_dict({"value": [float(i + 1) for i in range(n)]}).with_format("torch")


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


def trainer(folder: Path, *, cls=DynamicPruningTrainer, model=None, data=None, pruning=None, extra=None, **settings):
    """A trainer of a tiny ViT on random images; `settings` are TrainingArguments, `extra` the trainer's own."""
    return cls(
        model=vit() if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=images() if data is None else data,
        **({} if pruning is None else {"pruning": pruning}),
        **(extra or {}),
    )


def learning_rates(run):
    """The learning rate of each optimizer step (with logging_steps=1)."""
    return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
