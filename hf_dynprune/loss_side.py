"""SampleLossMixin: the loss of each sample, the weighted loss of a step, and the signals.

An optimizer step minimises one weighted mean, however its samples are spread over micro-batches and
ranks:

    rank 0   [ w1 L1  w2 L2 ] [ w3 L3  w4 L4 ]     L  sum of the loss terms of a sample
    rank 1   [ w5 L5  w6 L6 ] [ w7 L7  0     ]     w  weight of the plan; 0 for padding
              micro-batch 1     micro-batch 2

    loss of the step = sum_i w_i L_i / D,    D = number of loss terms of all its samples

D is known before the first forward pass (`get_batch_samples`). It counts samples and not weights:
dividing by the sum of the weights would cancel InfoBatch's rescaling. DDP averages the gradients of
the ranks, so each rank multiplies its part by their number.

**When no loss of a sample is needed.** A policy that observes no signal of the loss and weighs
nothing ([`RandomPruning`], [`FullData`], `StaticPruning(keep="random")`) can train any model with
any loss. The rule is:

1. If the loss of a sample is known for the model (`per_sample_loss_fn`, or a head of transformers
   with the Trainer's own compute_loss), it is used, for every policy.
2. Otherwise, if nothing needs it, the loss is left to the Trainer: its compute_loss sees the batch
   without `sample_index`, and the normalisation is its own. Batches are only counted.
3. Otherwise it is a ValueError at construction.

Padding needs it too: a copy that fills the last batch of several ranks must have weight 0.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from . import distributed
from .data_side import PrunedDataMixin, tell_epoch
from .losses import (
    SIGNALS,
    LossRule,
    SampleLosses,
    check_signals,
    check_unmixed,
    derive_rule,
    observe_signals,
    unwrapped,
)
from .policies import PruningPolicy
from .pruner import DynamicPruner, choice_seed
from .sampler import SAMPLE_INDEX
from .schedule import planned_epochs
from .scoring import loss_left_out, score_samples
from .upstream import owner_behind

# The private names of the Trainer that this file leans on, and those that are public but not
# documented. Reason for each:
SEAMS = {
    "Trainer._prepare_inputs": "a scoring pass sees its batch as a training step does, also under "
    "DeepSpeed and in classes that override it",
    "Trainer.loss_is_scaled_for_ga": "our loss is normalised over the step; the Trainer must not "
    "divide it by the accumulation steps",
    "Trainer.label_smoother": "our loss smooths labels as the Trainer's does",
    "Trainer.compute_loss_func": "a user's loss, of which the samples' parts are not known",
}

LossFunction = Callable[..., torch.Tensor] | str | LossRule


class SampleLossMixin(PrunedDataMixin):
    """Adds the losses of single samples to [`PrunedDataMixin`].

    Args:
        per_sample_loss_fn: How the loss of one sample is computed if transformers' name of the
            model's head does not tell, or with `compute_loss_func` or a compute_loss of the class
            that is mixed with: a name in [`hf_dynprune.losses.RULES`], a function (outputs, inputs)
            -> losses (B,), or a [`LossRule`].
        scoring_dataset: The training samples, in their order, as scoring passes shall see them,
            such as without augmentation. *Optional*, defaults to `train_dataset`. Only policies
            with a `scoring` other than `"trained"` take such passes.

    All other arguments are those of [`PrunedDataMixin`].

    Attributes:
        loss_rule: How the loss of a sample follows from the outputs. None if the loss is left to
            the Trainer.
    """

    loss_rule: LossRule | None = None

    def __init__(
        self,
        *args: Any,
        pruning: PruningPolicy | None = None,
        per_sample_loss_fn: LossFunction | None = None,
        scoring_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        self.scoring_dataset = scoring_dataset
        self._given_loss = per_sample_loss_fn
        super().__init__(*args, pruning=pruning, **kwargs)

    # ---- what is observed ----

    def observed_signals(self) -> tuple[str, ...]:
        """The signals of a loss; a subclass may add its own, see [`PrunedDataMixin`]."""
        return (*super().observed_signals(), *SIGNALS)

    def batch_signals(
        self,
        names: tuple[str, ...],
        outputs: Any,
        inputs: Mapping[str, Any],
        losses: SampleLosses,
    ) -> dict[str, torch.Tensor]:
        """The signals of a trained batch, (B,) float32 without gradient for each of `names`.

        A subclass that observes more overrides this and `observed_signals`.
        """
        known = tuple(name for name in names if name in SIGNALS)
        return observe_signals(known, outputs, inputs, losses)

    def _scored_signals(self) -> tuple[str, ...]:
        return tuple(SIGNALS)

    def _takes_index(self) -> bool:
        return self.loss_rule is not None or super()._takes_index()

    def _prepare_observation(self, pruner: DynamicPruner) -> None:
        super()._prepare_observation(pruner)
        self._check_scoring_dataset()
        needed = why_losses(pruner)
        try:
            self.loss_rule = self._derive_rule(self._given_loss)
        except ValueError as error:
            if self._given_loss is not None:
                raise
            if needed:
                raise ValueError(f"{error} It is needed because {needed}.") from error
            return
        own = tuple(name for name in pruner.scored_signals if name in SIGNALS)
        check_signals(own, self.loss_rule)
        self.loss_is_scaled_for_ga = True

    def _check_scoring_dataset(self) -> None:
        if self.scoring_dataset is None:
            return
        given, expected = len(self.scoring_dataset), len(cast(Any, self.train_dataset))
        if given != expected:
            raise ValueError(
                f"The scoring_dataset has {given} samples, the training dataset has {expected}: "
                "expected the same samples in the same order."
            )

    # The next three are overridden for a Trainer whose own compute_loss does not give the outputs
    # of its forward pass (`sft.py`).

    def _derive_rule(self, given: LossFunction | None) -> LossRule:
        """How the loss of one sample follows from the outputs; ValueError if that is not known."""
        owner = owner_behind(type(self), SampleLossMixin, "compute_loss")
        if given is None and (self.compute_loss_func is not None or owner is not Trainer):
            what = f"{owner.__name__}.compute_loss"
            if self.compute_loss_func is not None:
                what = "compute_loss_func"
            way_out = (
                "pass `per_sample_loss_fn=`, a function (outputs, inputs) -> losses of shape "
                "(batch size,)"
            )
            if owner.__name__ == "SFTTrainer":
                way_out = (
                    "use hf_dynprune.sft.DynamicPruningSFTTrainer, which knows the loss of trl's "
                    "SFTTrainer"
                )
            raise ValueError(
                f"{what} computes the loss of a batch, and the part of each sample in it is not "
                f"known: {way_out}."
            )
        return derive_rule(unwrapped(self.model), given)

    def _own_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The loss of a batch by the Trainer that is mixed with, and the outputs of its pass."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return loss, outputs

    def _scoring_outputs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """The outputs of a pass that only scores. Not collective: ranks make different numbers."""
        return self._own_loss(model, inputs)[1]

    # ---- the loss of an optimizer step ----

    # Whether the first batch of the run was compared with the model's own loss.
    _loss_checked = False
    # Batches that the running optimizer step accumulates.
    _micro_batches = 1

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple:
        """As in [`PrunedDataMixin`]. A new run begins here."""
        self._loss_checked, self._seen = False, None
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of an optimizer step, and D, its number of loss terms on all ranks.

        D replaces the Trainer's count, so that a step does not communicate more than it does there.
        """
        pruner, rule = self.pruner, self.loss_rule
        owner = owner_behind(type(self), PrunedDataMixin, "get_batch_samples")
        if pruner is None or rule is None or owner is not Trainer:
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        else:
            batches, items = list(itertools.islice(epoch_iterator, num_batches)), None
        if pruner is None or rule is None or not batches:
            return batches, items
        self._micro_batches = len(batches)
        if pruner.batches_done != self._fetched:
            raise self._unobserved()
        self._fetched += len(batches)
        if rule.terms is None:
            return batches, pruner.sampler.samples_in(pruner.batches_done, len(batches))
        terms = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            real = batch[SAMPLE_INDEX] >= 0
            terms = terms + (rule.terms(batch) * real).sum().to(device)
        return batches, distributed.sum_over_ranks(terms)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of a batch, normalised over its optimizer step.

        Without `sample_index`, as in evaluation, or without a rule, it is the Trainer's loss.
        """
        pruner, rule = self.pruner, self.loss_rule
        if pruner is None or rule is None or SAMPLE_INDEX not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        index = inputs.pop(SAMPLE_INDEX)
        batch = dict(inputs)  # label smoothing takes the labels out of `inputs`
        losses, extra, outputs = self._forward(model, inputs, batch, len(index), rule)
        pruner.observe(index, self.batch_signals(pruner.signals, outputs, batch, losses))
        # DDP averages the gradients of the ranks; D counts the samples of all ranks.
        ranks = pruner.shape.ranks
        denominator: Any = num_items_in_batch
        if denominator is None:
            denominator = losses.terms.sum() * ranks
        if isinstance(denominator, torch.Tensor):
            denominator = denominator.clamp(min=1)
        loss = (losses.train * pruner.weights(index)).sum() * ranks / denominator
        if extra is not None:
            loss = loss + extra / self._micro_batches
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        batch: dict[str, Any],
        size: int,
        rule: LossRule,
    ) -> tuple[SampleLosses, torch.Tensor | None, Any]:
        """The losses of the samples, what the model adds to them, and the outputs of its pass."""
        # The model's own loss is compared on the first batch. Later nothing reads it.
        compares = rule.matches_model and not self._loss_checked
        skips = None if compares else self._model_with_loss(rule)
        with loss_left_out(skips) as left_out:
            own_loss, outputs = self._own_loss(model, inputs)
        # A router's loss and the like, which the model added to its own: kept, unweighted.
        auxiliary = _auxiliary(outputs)
        if auxiliary is None and not rule.from_own_loss:
            # Its graph holds as much memory as the logits. It goes before ours is made.
            own_loss = own_loss.detach()
            if isinstance(outputs, MutableMapping):
                outputs["loss"] = None
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        config = getattr(unwrapped(self.model), "config", None)
        losses = rule.losses(outputs, batch, smoothing, config)
        terms = losses.terms.sum().clamp(min=1)
        extra = None
        if auxiliary is not None:
            if not left_out and not rule.matches_model:
                raise _inseparable(self.model)
            extra = own_loss - (0.0 if left_out else losses.train.sum() / terms)
        if isinstance(outputs, MutableMapping) and not rule.from_own_loss:
            # For a compute_loss above this one: the mean of the batch, as the model gives it.
            mean = losses.train.detach().sum() / terms
            outputs["loss"] = mean + (0.0 if extra is None else extra.detach())
        if not self._loss_checked:
            check_unmixed(rule, batch, config)
            _check_shape(losses, size)
            if auxiliary is None and rule.matches_model:
                _check_mean(own_loss, losses, self)
            self._loss_checked = True
        return losses, extra, outputs

    def _model_with_loss(self, rule: LossRule) -> PreTrainedModel | None:
        """The model whose own loss we may skip, or None.

        Token losses only: with a large vocabulary they are the most expensive part of a step, and
        we compute them ourselves. And only if the compute_loss is the Trainer's.
        """
        model = unwrapped(self.model)
        owner = owner_behind(type(self), SampleLossMixin, "compute_loss")
        stock = owner is Trainer and self.compute_loss_func is None
        skips = stock and rule.terms is not None and not rule.from_own_loss
        return model if skips and isinstance(model, PreTrainedModel) else None

    # ---- scoring passes ----

    # What scoring passes see: the dataset that was asked for, and the Trainer's loader of it.
    _seen: tuple[Any, DataLoader] | None = None

    def _begin_epoch(self, epoch: int) -> Callable[[torch.Tensor], Mapping[str, Any]] | None:
        super()._begin_epoch(epoch)
        tell_epoch(self.scoring_dataset, epoch)
        return None if self.loss_rule is None else partial(self._score, epoch)

    def _score(self, epoch: int, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The policy's signals of some samples, by forward passes of the model as it stands."""
        pruner = cast(DynamicPruner, self.pruner)
        return self._forward_signals(
            pruner.scored_signals,
            index,
            mode=pruner.policy.mode_of_scoring,
            seed=choice_seed(pruner.seed, epoch, "scoring"),
            description=f"scoring before epoch {epoch}",
        )

    def _forward_signals(
        self, names: tuple[str, ...], index: torch.Tensor, **options: Any
    ) -> dict[str, torch.Tensor]:
        """Signals of some samples by forward passes; `options` are those of [`score_samples`]."""
        rule = cast(LossRule, self.loss_rule)

        def forward(batch: dict[str, Any]) -> Any:
            batch = cast(dict[str, Any], self._prepare_inputs(batch))
            skips = self._model_with_loss(rule)
            with self.compute_loss_context_manager(), loss_left_out(skips):
                return self._scoring_outputs(cast(torch.nn.Module, self.model), batch)

        return score_samples(
            cast(torch.nn.Module, self.model),
            index=index,
            signals=names,
            rule=rule,
            forward=forward,
            **self._scoring_loader(),
            **options,
        )

    def _scoring_loader(self) -> dict[str, Any]:
        """What scoring passes read, as the Trainer prepares a dataset for prediction."""
        dataset = self.train_dataset if self.scoring_dataset is None else self.scoring_dataset
        if self._seen is None or self._seen[0] is not dataset:
            self._seen = dataset, self.get_test_dataloader(cast(Any, dataset))
        loader = self._seen[1]
        return {
            "dataset": loader.dataset,
            "collator": loader.collate_fn,
            "batch_size": self.args.eval_batch_size,
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "progress": not self.args.disable_tqdm,
        }


# ---- helpers -------------------------------------------------------------------------------------


def why_losses(pruner: DynamicPruner) -> str:
    """Why the run needs the loss of single samples; empty if it does not."""
    policy, shape = pruner.policy, pruner.shape
    own = [name for name in pruner.scored_signals if name in SIGNALS]
    if own:
        return f"{policy} observes {', '.join(map(repr, own))}"
    if policy.weighs:
        return f"{policy} weighs samples"
    sizes = [planned.size for planned in planned_epochs(policy, shape)]
    whole = all(size is not None and size % shape.global_batch == 0 for size in sizes)
    if shape.ranks > 1 and not shape.drop_last and not whole:
        return (
            f"{shape.ranks} ranks pad their last batch, and padding must not be trained "
            "(dataloader_drop_last=True avoids it)"
        )
    return ""


def _auxiliary(outputs: Any) -> torch.Tensor | None:
    if isinstance(outputs, Mapping):
        return outputs.get("aux_loss")
    return getattr(outputs, "aux_loss", None)


def _check_shape(losses: SampleLosses, size: int) -> None:
    if losses.train.shape != (size,):
        raise ValueError(
            f"The per-sample loss has shape {tuple(losses.train.shape)}, the batch has {size} "
            f"samples: expected one loss for each sample, shape ({size},). Pass a "
            "`per_sample_loss_fn=` that returns that."
        )


def _check_mean(own_loss: torch.Tensor, losses: SampleLosses, trainer: SampleLossMixin) -> None:
    """Raise ValueError unless the mean of our losses is the model's own loss."""
    ours = losses.train.detach().sum() / losses.terms.sum().clamp(min=1)
    own = own_loss.detach().float().mean()
    model, args = cast(torch.nn.Module, trainer.model), trainer.args
    dtypes = {parameter.dtype for parameter in model.parameters()}
    half_weights = not dtypes.isdisjoint({torch.bfloat16, torch.float16})
    rtol = 2e-2 if args.bf16 or args.fp16 or half_weights else 1e-3
    if not torch.isclose(ours, own.to(ours.device), rtol=rtol, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"The mean of the per-sample losses on the first batch is {ours.item():.6g}, the "
            f"loss of {type(unwrapped(model)).__name__} is {own.item():.6g}: pruning "
            "would train something else. Pass `per_sample_loss_fn=`, a function (outputs, "
            "inputs) -> losses of shape (batch size,) whose mean is the loss to train. If the "
            "difference is intended, pass a LossRule with matches_model=False."
        )


def _inseparable(model: Any) -> ValueError:
    return ValueError(
        f"{type(unwrapped(model)).__name__} adds an auxiliary loss to a loss that is not the one "
        "of the LossRule (matches_model=False), so the auxiliary loss cannot be kept: switch it "
        "off (output_router_logits=False)."
    )
