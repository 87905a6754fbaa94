"""The trainers of other libraries that can be pruned: the table that their tests iterate."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder import losses as cross_losses
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from test_sft import sharp, tokenizer
from tiny import QUIET, VOCAB, bert, llama
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from hf_dynprune.embedding import (
    DynamicPruningCrossEncoderTrainer,
    DynamicPruningSentenceTransformerTrainer,
)
from hf_dynprune.preference import (
    DynamicPruningDPOTrainer,
    DynamicPruningKTOTrainer,
    DynamicPruningRewardTrainer,
)
from hf_dynprune.preference_experimental import (
    DynamicPruningCPOTrainer,
    DynamicPruningORPOTrainer,
)
from hf_dynprune.sft import DynamicPruningSFTTrainer

N = 20
SETTINGS = {**QUIET, "learning_rate": 0.01, "max_grad_norm": 0.0}


def rows(n=N, **columns: Any):
    """Random rows. A column is (least, most) words, or a function of the row's number."""
    generator = torch.Generator().manual_seed(0)

    def words(least, most):
        length = int(torch.randint(least, most + 1, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        return " " + " ".join(f"w{i}" for i in ids)

    return datasets.Dataset.from_list(
        [{c: v(i) if callable(v) else words(*v) for c, v in columns.items()} for i in range(n)]
    )


pairs = partial(rows, prompt=(2, 4), chosen=(1, 7), rejected=(1, 7))
completions = partial(rows, prompt=(2, 4), completion=(1, 7))
texts = partial(rows, a=(2, 7), b=(2, 7), label=lambda i: (i * 7 % 10) / 10)


_TEMPORARY = TemporaryDirectory(prefix="bert-")  # removed when the process ends


@cache
def saved() -> str:
    """The folder of a tiny BERT far from uniform outputs, with a tokenizer."""
    folder = os.environ.get("TINY_BERT")  # the ranks of a run take that of the test
    if folder is None:
        folder = _TEMPORARY.name
        sharp(bert(num_labels=1)).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def sentences():
    torch.manual_seed(0)  # the pooler of a BERT without a head
    return SentenceTransformer(modules=[Transformer(saved()), Pooling(16, "mean")], device="cpu")


def cross():
    return CrossEncoder(saved(), device="cpu")


# What does not hold for every trainer. docs/preference.md has the same table.
ACCUMULATION = "small batches that add up train as large ones"
BITWISE = "`FullData()` is the stock trainer bit for bit"
SCORING = "scoring passes on several ranks"
LAST = "the last batch of several ranks"

BY_TOKENS = {
    ACCUMULATION: "trl divides by the tokens of each small batch",
    LAST: "the tokens of the copies that fill it count in its mean",
}
ROUNDED = {BITWISE: "we add up the same losses in another order"}
TALKING = {SCORING: "refused: the library communicates in each pass"}
DROPPED = {LAST: "sentence-transformers drops it if it is not full"}


@dataclass(frozen=True)
class Case:
    """A trainer of another library, ours in its place, and what it trains.

    Attributes:
        more: Makes further arguments of the trainer from the model.
        cannot: Promises that do not hold, and why.
        label: The trainer in docs/preference.md, if not the name of its class.
    """

    pruned: type
    stock: type
    arguments: type
    model: Callable[[], Any] = sharp
    data: Callable[[], Any] = pairs
    settings: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Any], dict[str, Any]] = lambda model: {"processing_class": tokenizer()}
    cannot: dict[str, str] = field(default_factory=dict)
    label: str = ""

    def make(self, folder: Path, *, pruning=None, stock=False, extra=None, **settings):
        """A trainer. `settings` are of its arguments, `extra` the trainer's own."""
        known = self.arguments.__dataclass_fields__
        settings = {**SETTINGS, **self.settings, **settings}
        model = self.model()
        return (self.stock if stock else self.pruned)(
            model=model,
            args=self.arguments(str(folder), **{k: v for k, v in settings.items() if k in known}),
            train_dataset=self.data(),
            **self.more(model),
            **({} if pruning is None else {"pruning": pruning}),
            **(extra or {}),
        )

    def alone(self, run) -> torch.Tensor:
        """(N,) the loss of each row apart: the library's own loss of a batch of one row."""
        run.model.train()
        with torch.no_grad():
            batches = [run.data_collator([row]) for row in run.train_dataset]
            return torch.stack([self.stock.compute_loss(run, run.model, b) for b in batches])


def with_reference(model):
    return {"processing_class": tokenizer(), "ref_model": sharp(llama(seed=1))}


dpo = partial(
    Case,
    DynamicPruningDPOTrainer,
    DPOTrainer,
    DPOConfig,
    more=with_reference,
    cannot=TALKING,
)
sft = partial(Case, DynamicPruningSFTTrainer, SFTTrainer, SFTConfig, data=completions)
CASES = {
    "dpo": dpo(),
    "reward": Case(
        DynamicPruningRewardTrainer,
        RewardTrainer,
        RewardConfig,
        model=lambda: sharp(llama("SequenceClassification", num_labels=1)),
        settings={"center_rewards_coefficient": 0.25, "learning_rate": 1e-4},
        cannot=TALKING,
    ),
    "kto": Case(
        DynamicPruningKTOTrainer,
        KTOTrainer,
        KTOConfig,
        data=partial(rows, prompt=(2, 4), completion=(1, 7), label=lambda i: i % 3 > 0),
        settings={"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"},
        more=with_reference,
        cannot=TALKING,
    ),
    "orpo": Case(
        DynamicPruningORPOTrainer,
        ORPOTrainer,
        ORPOConfig,
        settings={"max_length": 64},
        cannot={**BY_TOKENS, **ROUNDED, **TALKING},
    ),
    "cpo": Case(
        DynamicPruningCPOTrainer,
        CPOTrainer,
        CPOConfig,
        settings={"max_length": 64},
        cannot={**BY_TOKENS, **ROUNDED, **TALKING},
    ),
    "sentences": Case(
        DynamicPruningSentenceTransformerTrainer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        model=sentences,
        data=texts,
        more=lambda model: {"loss": losses.CosineSimilarityLoss(model)},
        cannot={**TALKING, **DROPPED},
    ),
    "cross-encoder": Case(
        DynamicPruningCrossEncoderTrainer,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        model=cross,
        data=texts,
        more=lambda model: {"loss": cross_losses.BinaryCrossEntropyLoss(model)},
        cannot={**ROUNDED, **TALKING, **DROPPED},
    ),
    "sft": sft(cannot=ROUNDED, label="SFTTrainer with padding"),
    "sft-padding-free": sft(
        settings={"padding_free": True, "max_length": None},
        label="SFTTrainer with `padding_free`",
    ),
    "sft-bfd": sft(
        data=partial(completions, 3 * N),
        settings={"packing": True, "max_length": 24},
        label="SFTTrainer with `bfd`",
    ),
}
