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

**Several passes of a batch.** A compute_loss that calls this one twice for a batch (R-Drop,
adversarial training) trains the weighted loss of each pass. The batch is counted and observed once,
by its first pass.

**A loss that divides otherwise.** The losses of a function `per_sample_loss_fn` may add up to a
multiple of the Trainer's loss, as class weights do: `F.cross_entropy(..., weight=w)` divides by the
sum of the weights of its batch. Each batch is scaled so that with weights 1 it has the Trainer's
loss:

    loss of a micro-batch = c sum_i w_i L_i / D,    c = (Trainer's loss) / (mean of the L_i)
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from . import distributed
from .data_side import PrunedDataMixin, engine_of, ours_for, tell_epoch
from .loss_check import LossCheck, Places, Slope, part_of, slope
from .losses import (
    CLASS_RULES,
    FALLBACK,
    RULES,
    SIGNALS,
    LossRule,
    SampleLosses,
    check_signals,
    derive_rule,
    forward_of_transformers,
    model_class,
    observe_signals,
    shared_loss,
    unwrapped,
)
from .policies import PruningPolicy
from .potential import Magnitude, magnitude_of_rule
from .pruner import DynamicPruner, choice_seed
from .sampler import SAMPLE_INDEX
from .schedule import RunShape, planned_epochs
from .scoring import has_batch_norm, loss_left_out, score_samples, scoring_state
from .upstream import divided_later, owner_behind

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

    Longer than other classes, because what is observed, the loss of a step, its comparison and the
    scoring passes are all methods of one Trainer.

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
                "pass `per_sample_loss_fn=` too, a function (outputs, inputs) -> losses of shape "
                f"(batch size,), the parts of that loss{FALLBACK}"
            )
            raise ValueError(
                f"{what} computes the loss of a batch, and the part of each sample in it is not "
                f"known: {ours_for(owner, type(self)) or way_out}"
            )
        rule = derive_rule(cast(torch.nn.Module, self.model), given)
        if rule.name in ("tokens", "shifted_tokens") and fused_by_liger(self.args):
            raise ValueError(
                "use_liger_kernel=True computes the loss of a batch as one number without logits "
                "(fused_linear_cross_entropy), so the loss of one sample is not known: set "
                'liger_kernel_config={"fused_linear_cross_entropy": False}, which keeps all other '
                "kernels. Without logits, use hf_dynprune.sft: trl's fused head gives the loss of "
                "each token."
            )
        model = unwrapped(self.model)
        engine = engine_of(self)
        if given is None and engine and not forward_of_transformers(model):
            raise ValueError(
                f"{model_class(model).__name__} has a forward of its own, so its name does not "
                f"tell its loss, and with {engine} it cannot be compared by gradients: pass "
                f"per_sample_loss_fn={rule.name!r} if that is its loss, or a function (outputs, "
                f"inputs) -> losses of shape (batch size,){FALLBACK}"
            )
        return rule

    def _own_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The loss of a batch by the Trainer that is mixed with, and the outputs of its pass."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return loss, outputs

    def _scoring_outputs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """The outputs of a pass that only scores.

        Not collective: unless the model is sharded, ranks make different numbers of passes.
        """
        return self._own_loss(model, inputs)[1]

    # ---- the loss of an optimizer step ----

    _run_check: LossCheck | None = None
    # The sample indices of the batches of the running step, and which of them had a pass.
    _of_step: tuple[torch.Tensor, ...] = ()
    _passed: frozenset[int] = frozenset()

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple:
        """As in [`PrunedDataMixin`]. A new run begins here."""
        self._run_check = self._seen = None
        return super().set_initial_training_values(args, dataloader)

    def _magnitude(self) -> Magnitude | None:
        if self.loss_rule is None:
            return super()._magnitude()
        return magnitude_of_rule(
            self.loss_rule.name, getattr(unwrapped(self.model), "config", None)
        )

    def _make_pruner(self, shape: RunShape) -> DynamicPruner:
        pruner = super()._make_pruner(shape)
        # A BatchNorm has no statistics of one sample.
        pruner.sampler.fills_one = has_batch_norm(cast(torch.nn.Module, self.model))
        return pruner

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
        if pruner.batches_done != self._fetched:
            raise self._unobserved()
        self._fetched += len(batches)
        self._of_step = tuple(batch[SAMPLE_INDEX] for batch in batches)
        self._passed = frozenset()
        count: Any = 0
        for batch, index in zip(batches, self._of_step, strict=True):
            # Of the batches as they come: with dataloader_in_order=False the last may come early.
            real = index >= 0
            if rule.terms is not None:
                terms = rule.terms(batch)
                _check_shape("The number of terms", terms, len(index))
                real = terms if pruner.unweighted else terms * real.to(terms.device)
            count = count + real.sum().to(device)
        return batches, distributed.sum_over_ranks(count)

    def _first_pass(self, index: torch.Tensor) -> bool:
        """Whether a batch of the step goes through the model for the first time."""
        known = [k for k, other in enumerate(self._of_step) if _is_same(index, other)]
        if not known:  # a copy of the index; comparing its numbers waits for the device
            known = [
                k
                for k, other in enumerate(self._of_step)
                if index.shape == other.shape and torch.equal(index, other.to(index.device))
            ]
        if not known:
            self._of_step, known = (index,), [0]
            self._passed = frozenset()
        first = known[0] not in self._passed
        self._passed |= {known[0]}
        return first

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
        first = self._first_pass(index)
        losses, extra, outputs = self._forward(model, inputs, batch, len(index), rule, first)
        if return_outputs and isinstance(outputs, MutableMapping) and not rule.from_own_loss:
            # For a compute_loss above this one: the mean of the batch, as the model gives it.
            outputs["loss"] = _mean(losses).detach() + (0.0 if extra is None else extra.detach())
        if first:
            pruner.observe(index, self.batch_signals(pruner.signals, outputs, batch, losses))
        # DDP averages the gradients of the ranks; D counts the samples of all ranks.
        ranks = pruner.shape.ranks
        denominator: Any = num_items_in_batch
        if denominator is None:
            denominator = losses.terms.sum() * ranks
        if isinstance(denominator, torch.Tensor):
            denominator = denominator.clamp(min=1)
        weighted = losses.train if pruner.unweighted else losses.train * pruner.weights(index)
        loss = weighted.sum() * ranks / denominator
        if extra is not None:
            loss = loss + extra / max(1, len(self._of_step))
        later = divided_later(self)
        if later > 1:
            loss = loss * later
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        batch: dict[str, Any],
        size: int,
        rule: LossRule,
        first: bool,
    ) -> tuple[SampleLosses, torch.Tensor | None, Any]:
        """The losses of the samples, what the model adds to them, and the outputs of its pass.

        Long, because the own loss's graph must go before ours is made, which ties the order.
        """
        compares = first and rule is not RULES["batch_mean"] and self._check.due()
        skips = self._model_with_loss(rule)
        if compares and rule.matches_model and (skips is not None or hasattr(model, "_orig_mod")):
            # A loss over tokens needs as much memory as a step leaves, and the graph of a compiled
            # pass is one node.
            self._compare_apart(batch, size, rule)
            compares = False
        own: Slope | None = None
        with loss_left_out(skips) as left_out:
            own_loss, outputs = self._own_loss(model, inputs)
        places: Places = self._check.places(outputs) if compares else {}
        if compares and rule.matches_model:
            own = slope(own_loss, places)
        # A router's loss and the like, which the model added to its own: kept, unweighted.
        auxiliary = _auxiliary(outputs)
        if auxiliary is None and not rule.from_own_loss:
            # Its graph holds as much memory as the logits. It goes before ours is made.
            own_loss = own_loss.detach()
            if isinstance(outputs, MutableMapping):
                outputs["loss"] = None
        losses = self._sample_losses(own_loss, outputs, batch, size, rule)
        extra = None
        if auxiliary is not None:
            if not left_out and not rule.matches_model:
                raise _inseparable(self.model)
            extra = own_loss - (0.0 if left_out else _mean(losses))
        if compares:
            self._check(own, losses, places, outputs, batch, adds=auxiliary is not None)
        if rule.name == "custom" and rule.matches_model and auxiliary is None:
            losses = losses._replace(train=losses.train * _multiple(own_loss, losses))
        return losses, extra, outputs

    def _sample_losses(
        self, own_loss: torch.Tensor, outputs: Any, batch: dict[str, Any], size: int, rule: LossRule
    ) -> SampleLosses:
        if rule is RULES["batch_mean"]:  # the outputs of a user's compute_loss may hold no loss
            return shared_loss(own_loss, size)
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        config = getattr(unwrapped(self.model), "config", None)
        losses = rule.losses(outputs, batch, smoothing, config)
        _check_shape("The per-sample loss", losses.train, size)
        if torch.is_grad_enabled() and not losses.train.requires_grad:
            raise ValueError(
                f"The per-sample losses ({rule.name!r}) have no gradient, so they cannot be "
                f"trained: the outputs of {self._loss_name()} are detached, or are metrics. Use "
                "per_sample_loss_fn='batch_mean', which gives each sample the loss of its batch."
            )
        return losses

    # ---- comparing with the Trainer's loss ----

    def _loss_name(self) -> str:
        """What computes the loss that the Trainer would train."""
        owner = owner_behind(type(self), SampleLossMixin, "compute_loss")
        if owner is not Trainer:
            return f"{owner.__name__}.compute_loss"
        if self.compute_loss_func is not None:
            return "compute_loss_func"
        if self.label_smoother is not None:
            return f"label_smoothing_factor={self.args.label_smoothing_factor}"
        return model_class(self.model).__name__

    @property
    def _check(self) -> LossCheck:
        """What compares our loss with the Trainer's. Each run has its own."""
        if self._run_check is None:
            self._run_check = LossCheck(
                cast(torch.nn.Module, self.model),
                cast(LossRule, self.loss_rule),
                self._loss_name(),
                given=self._given_loss,
                half=self.args.bf16 or self.args.fp16,
                # FSDP and DeepSpeed put hooks on the outputs of a pass.
                sharded=bool(engine_of(self)),
            )
        return self._run_check

    def _compare_apart(self, batch: dict[str, Any], size: int, rule: LossRule) -> None:
        """Compare on a quarter of a batch, by two passes of the model that change nothing.

        They use the same random numbers. The first has the Trainer's loss, the second ours, so that
        neither holds more memory than a step.
        """
        model = cast(torch.nn.Module, self.model)
        part, taken = part_of(batch, size, rule, max(2 if has_batch_norm(model) else 1, size // 4))
        if taken == 0:
            if not self._check.sharded:
                return
            taken = size  # the other ranks make these passes
        with scoring_state(model, "train", self.args.seed):
            own_loss, outputs = self._own_loss(model, dict(part))
            places, adds = self._check.places(outputs), _auxiliary(outputs) is not None
            del outputs
            own = slope(own_loss, places)
            del own_loss
        with scoring_state(model, "train", self.args.seed):
            with loss_left_out(self._model_with_loss(rule)):
                own_loss, outputs = self._own_loss(model, dict(part))
            losses = self._sample_losses(own_loss, outputs, part, taken, rule)
            self._check(own, losses, self._check.places(outputs), outputs, part, adds=adds)

    def _model_with_loss(self, rule: LossRule) -> PreTrainedModel | None:
        """The model whose own loss we may skip, or None.

        Token losses only: with a large vocabulary they are the most expensive part of a step, and
        we compute them ourselves. And only if the compute_loss is the Trainer's.
        """
        small = (*CLASS_RULES, "question_answering")
        if rule.terms is None or rule.name in small or rule.from_own_loss:
            return None
        owner = owner_behind(type(self), SampleLossMixin, "compute_loss")
        stock = owner is Trainer and self.compute_loss_func is None
        model = unwrapped(self.model)
        return model if stock and isinstance(model, PreTrainedModel) else None

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
                if rule is RULES["batch_mean"]:  # the outputs may hold no loss
                    return {"loss": self._own_loss(cast(torch.nn.Module, self.model), batch)[0]}
                return self._scoring_outputs(cast(torch.nn.Module, self.model), batch)

        return score_samples(
            cast(torch.nn.Module, self.model),
            index=index,
            signals=names,
            rule=rule,
            forward=forward,
            in_step=bool(engine_of(self)),
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
    if asked := asks_for_losses(policy, pruner.scored_signals):
        return asked
    sizes = [planned.size for planned in planned_epochs(policy, shape)]
    whole = all(size is not None and size % shape.global_batch == 0 for size in sizes)
    if shape.ranks > 1 and not shape.drop_last and not whole:
        return (
            f"{shape.ranks} ranks pad their last batch, and padding must not be trained "
            "(dataloader_drop_last=True avoids it)"
        )
    return ""


def fused_by_liger(args: TrainingArguments) -> bool:
    """Whether Liger, if it knows the model, computes its loss without logits (its default)."""
    config = args.liger_kernel_config or {}
    return args.use_liger_kernel and config.get("fused_linear_cross_entropy", True)


def asks_for_losses(policy: PruningPolicy, signals: Iterable[str]) -> str:
    """Why a policy that observes `signals` needs the loss of single samples; empty if not."""
    own = [name for name in signals if name in SIGNALS]
    if own:
        return f"{policy} observes {', '.join(map(repr, own))}"
    return f"{policy} weighs samples" if policy.weighs else ""


def _auxiliary(outputs: Any) -> torch.Tensor | None:
    if isinstance(outputs, Mapping):
        return outputs.get("aux_loss")
    return getattr(outputs, "aux_loss", None)


def _mean(losses: SampleLosses) -> torch.Tensor:
    """The mean over the terms of a batch, which a model gives as its loss; 0 without terms."""
    return losses.train.sum() / losses.terms.sum().clamp(min=1)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one in memory. Does not wait for the device."""
    place = one.device == other.device and one.shape == other.shape
    return one is other or (place and one.data_ptr() == other.data_ptr())


def _multiple(own_loss: torch.Tensor, losses: SampleLosses) -> torch.Tensor:
    """c, the Trainer's loss of a batch over the mean of our losses; 1 but for rounding is 1.

    Also 1 if one of the two is not finite: a NaN loss spoils no gradient that it would not reach.
    """
    own, mean = own_loss.detach().float().mean(), losses.train.detach().mean()
    own = own.to(mean.device)
    same = torch.isclose(own, mean, rtol=1e-4, atol=1e-6) | (mean == 0)
    multiple = own / mean
    return torch.where(same | ~multiple.isfinite(), torch.ones_like(mean), multiple)


def _check_shape(what: str, values: torch.Tensor, size: int) -> None:
    if values.shape != (size,):
        raise ValueError(
            f"{what} has shape {tuple(values.shape)}, the batch has {size} samples: expected one "
            f"value for each sample, shape ({size},). Either the collator drops or joins samples, "
            "or the loss is another one: pass a `per_sample_loss_fn=` that returns that shape."
        )


def _inseparable(model: Any) -> ValueError:
    return ValueError(
        f"{model_class(model).__name__} adds an auxiliary loss to a loss that is not the one "
        "of the LossRule (matches_model=False), so the auxiliary loss cannot be kept: switch it "
        "off (output_router_logits=False)."
    )
