"""sentence-transformers' trainers with `pruning=`: embedding models and cross-encoders.

The loss is a module of its own. We see the numbers of its rows when it averages them
(`averages.py`). At construction we find out whether each number depends on its own row alone: the
loss of a few rows is computed, then again in another order, then for half of them.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils import logging

from .averages import AveragedLossMixin, Averages, without_gradient
from .checks import missing
from .potential import Kind
from .scoring import scoring_state

try:
    from sentence_transformers import CrossEncoderTrainer, SentenceTransformerTrainer
    from sentence_transformers.base.sampler import BatchSamplers
except ImportError as error:
    raise missing("hf_dynprune.embedding", "sentence-transformers", "embedding", error) from error

logger = logging.get_logger(f"transformers.{__name__}")

# The names of sentence-transformers that this file leans on, private or not documented. Reason for
# each:
SEAMS = {
    "SentenceTransformerTrainer.compute_loss": "calls `loss` with the model in it, and adds up its "
    "parts if it returns a dict",
    "SentenceTransformerTrainer.loss": "the loss module; for several datasets a dict of them",
    "SentenceTransformerTrainer.accum_loss_components": "what is added to the next log; a scoring "
    "pass must not add to it",
    "SentenceTransformerTrainer.data_collator": "the trainer's loader uses it as it is",
    "Trainer._prepare_inputs": "moves a batch to the device",
    "BatchSamplers.BATCH_SAMPLER": "the batches that are drawn at random",
    "uses_gradient_cache": "a loss with this attribute goes through the model again in the "
    "backward pass, so its samples cannot be weighted",
    "sentence_embedding": "an output of the model; where our loss is compared by gradients",
    "scores": "the same of a cross-encoder",
}

# So many rows are looked at. Losses that draw negatives at random take all of so few.
_ROWS = 4

# What the size of a row's gradient follows from, as in [`hf_dynprune.potential.Magnitude`].
_KINDS: dict[str, Kind] = {
    "CosineSimilarityLoss": "error",
    "MSELoss": "error",
    "MarginMSELoss": "error",
    "SoftmaxLoss": "likelihood",
    "CrossEntropyLoss": "likelihood",
    "MultipleNegativesRankingLoss": "likelihood",
}


class EmbeddingPruningMixin(AveragedLossMixin):
    """Adds `pruning=` to a trainer of sentence-transformers.

    The signal `"loss"` of a row is what its loss module averages: one number for each row. There
    are three kinds of losses:

    - The number depends on its own row alone, as in `CosineSimilarityLoss`. It is its score.
    - The number depends on the other rows of its batch, too, as in `MultipleNegativesRankingLoss`,
      which takes them as negatives. It is its score. A warning says so: pruning changes with whom a
      row is in a batch, and each batch gives it another score.
    - There is no such number, as in `CoSENTLoss`. Such a loss is refused if the policy needs it.
      `per_sample_loss_fn="batch_mean"` gives each row the loss of its batch.

    Args:
        pruning: The policy; None is the trainer of sentence-transformers.
        per_sample_loss_fn: `"batch_mean"`, or None.

    All other arguments are those of sentence-transformers.

    Attributes:
        depends_on_batch: Whether the loss of a row depends on the others of its batch.

    Raises:
        ValueError: At construction, for several datasets or losses, for a `batch_sampler` other
            than `"batch_sampler"`, and for another `per_sample_loss_fn`. If the policy needs the
            loss of a row: for a loss that averages no number for each row, or caches gradients. For
            a `scoring` other than `"trained"` on several ranks.

    Cost: No forward pass in training beyond the trainer's. Three at construction, of at most 4
    rows.
    """

    depends_on_batch: bool | None = None
    _logged = ("accum_loss_components",)

    def _planned_shape(self) -> Any:
        trainer = cast(Any, self)
        for name in ("train_dataset", "loss"):
            given = getattr(trainer, name)
            if isinstance(given, Mapping):
                raise ValueError(
                    f"{name} has {len(given)} parts ({', '.join(map(str, given))}): with pruning "
                    "one dataset and one loss are expected. Join the datasets "
                    "(datasets.concatenate_datasets), or use pruning=None."
                )
        if trainer.args.batch_sampler != BatchSamplers.BATCH_SAMPLER:
            raise ValueError(
                f"batch_sampler={trainer.args.batch_sampler!r} chooses which rows are in a batch, "
                "and pruning does too: leave it at 'batch_sampler', or use pruning=None."
            )
        return super()._planned_shape()

    def _rows_in(self, inputs: Mapping[str, Any]) -> int:
        if "label" in inputs:
            return len(inputs["label"])
        # Texts of a cross-encoder are lists. The prompt's length may be a tensor, of one number. A
        # static embedding has all tokens of a batch in one dimension, beside the B offsets.
        sizes = [
            len(value)
            for name, value in inputs.items()
            if isinstance(value, list)
            or (isinstance(value, Tensor) and value.ndim and not name.endswith("prompt_length"))
        ]
        return min(sizes)

    def _compared(self, passes: list[Any]) -> dict[str, Any]:
        found = [outputs.get(key) for outputs in passes for key in ("sentence_embedding", "scores")]
        return {
            f"logits_{number}": value
            for number, value in enumerate(found)
            if isinstance(value, Tensor) and value.requires_grad
        }

    def _kind(self) -> Kind | None:
        return _KINDS.get(type(cast(Any, self).loss).__name__)

    def _unknown_loss(self) -> str:
        loss = cast(Any, self).loss
        name = type(loss).__name__
        if getattr(loss, "uses_gradient_cache", False):
            return (
                f"{name} goes through the model again in its backward pass, with gradients that it "
                "kept, so the loss of a row is not known"
            )
        rows = list(range(min(_ROWS, len(cast(Any, self.train_dataset)))))
        half = rows[: max(1, len(rows) // 2)]
        whole = self._numbers_of(rows)
        if whole is None:
            return f"{name} is not a mean of one number for each row"
        reverse, part = self._numbers_of(rows[::-1]), self._numbers_of(half)
        if reverse is None or not _close(reverse.flip(0), whole):
            return f"The numbers that {name} averages are not in the order of the rows"
        self.depends_on_batch = part is None or not _close(part, whole[: len(half)])
        if self.depends_on_batch:
            logger.warning(
                "With %s the loss of a row depends on the other rows of its batch, and so does its "
                "score: pruning compares rows that were in different batches.",
                name,
            )
        return ""

    def _numbers_of(self, rows: list[int]) -> Tensor | None:
        """What the loss averages for some rows, (B,), by a forward pass that changes nothing."""
        trainer, model = cast(Any, self), cast(torch.nn.Module, self.model)
        batch = trainer.data_collator([cast(Any, self.train_dataset)[i] for i in rows])
        logged = trainer.accum_loss_components
        trainer.accum_loss_components = {"train": {}, "eval": {}}
        try:
            with (
                scoring_state(model, "eval", self.args.seed),
                self.compute_loss_context_manager(),
                without_gradient(model),
                Averages(len(rows), alone=True) as averages,
            ):
                inputs = cast(dict[str, Any], self._prepare_inputs(batch))
                loss = super(AveragedLossMixin, self)._own_loss(model, inputs)[0]
        finally:
            trainer.accum_loss_components = logged
        losses = averages.parts_of(loss)
        if losses is None or not _close(losses.train.mean(), loss.float()):
            return None  # or it adds something that no row has, such as a regulariser
        return losses.plain


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two batches give the same numbers, but for rounding."""
    scale = float(other.detach().abs().mean())
    return bool(torch.isclose(one, other, rtol=1e-2, atol=1e-3 * scale + 1e-6).all())


class DynamicPruningSentenceTransformerTrainer(EmbeddingPruningMixin, SentenceTransformerTrainer):
    """The SentenceTransformerTrainer with one new argument; see [`EmbeddingPruningMixin`].

    ```python
    from hf_dynprune.embedding import DynamicPruningSentenceTransformerTrainer

    trainer = DynamicPruningSentenceTransformerTrainer(
        model, args, train_dataset=pairs, loss=CosineSimilarityLoss(model), pruning=UCB(0.3)
    )
    ```
    """


class DynamicPruningCrossEncoderTrainer(EmbeddingPruningMixin, CrossEncoderTrainer):
    """The CrossEncoderTrainer with one new argument; see [`EmbeddingPruningMixin`]."""
