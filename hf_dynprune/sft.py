"""DynamicPruningSFTTrainer: trl's SFTTrainer with `pruning=`.

In training the SFTTrainer builds no logits. Its fused head gives the log-probability of each label,
and its loss is a sum over these. So is our loss of one sample: we read the log-probabilities from
the outputs of its one forward pass.

Without padding (`padding_free`, and the packing strategies that imply it) a batch is one row. The
collator counts the tokens of each sample, so the row is cut at the samples again:

    samples      0 0 0 0 1 1 2 2 2        sample_lengths 4 2 3
    labels       - b c d - f - h i        the first label of a text is predicted by nothing
    log p          b c d   f   h i   ──▶  L0 = b + c + d,  L1 = f,  L2 = h + i
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .checks import missing
from .loss_side import LossFunction, SampleLossMixin, asks_for_losses
from .losses import IGNORED, RULES, LossRule, SampleLosses
from .policies import PruningPolicy
from .sampler import IndexedCollator
from .trainer import DynamicPruningMixin
from .trl_card import TrlCardMixin

try:
    import trl
    from trl import SFTTrainer
except ImportError as error:
    raise missing("hf_dynprune.sft", "trl", "llm", error) from error

# The names of trl that this file leans on, private or not documented. Reason for each:
SEAMS = {
    "SFTTrainer.compute_loss": "makes one forward pass without logits unless return_outputs is set",
    "SFTTrainer.padding_free": "whether a batch is one row; trl then refuses other collators than "
    "its own",
    "DataCollatorForLanguageModeling": "joins the samples of a batch in their order; positions "
    "begin at 0 with each text, and its first label is ignored",
    "SFTConfig.loss_type": "says what the loss of a token is",
    "FusedCausalLMOutput.log_probs": "the log-probability of each label, 0 at ignored labels",
    "FusedCausalLMOutput.label_mask": "which labels are trained on",
    "model(fused_lm_head=True)": "a scoring pass with the fused head, without trl's metrics",
}

# loss_type -> the loss of a token from its log-probability l: -l, or the -l exp(l) of DFT (Wu et
# al. 2025, arXiv 2508.05629), in which exp(l) has no gradient. Both are 0 if l is, as at ignored
# labels.
TOKEN_LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nll": lambda log_probs: -log_probs,
    "dft": lambda log_probs: -log_probs * log_probs.detach().exp(),
}

_WAY_OUT = "hf_dynprune.sft was made for trl >= 1.16, < 2: install that, and report your version."

# The entry of a flattened batch that says how many tokens each sample has, (B,) int64.
LENGTHS = "sample_lengths"


class DynamicPruningSFTTrainer(TrlCardMixin, DynamicPruningMixin, SFTTrainer):
    """trl's SFTTrainer with one new argument, `pruning=`; see [`DynamicPruningMixin`].

    ```python
    from hf_dynprune.sft import DynamicPruningSFTTrainer

    trainer = DynamicPruningSFTTrainer(
        model, args, train_dataset=train, pruning=UCB(keep_ratio=0.3)
    )
    ```

    The signal `"loss"` of a sample is its mean negative log-likelihood over the tokens that are
    trained (the completion, the assistant's turns), also with `loss_type="dft"`. A sample is a row
    of `trainer.train_dataset` as the SFTTrainer prepared it: with `packing=True` it is a packed
    row, which the SFTTrainer packs once before training. With `padding_free=True` alone it is an
    example of the dataset.

    Raises:
        ValueError: At construction, before the data are tokenized, for `per_sample_loss_fn` and
            `scoring_dataset`. If the policy needs the loss of a sample also for
            `compute_loss_func`, for `label_smoothing_factor`, and for PEFT's prompt learning in
            batches without padding.

    Cost: No forward pass and no collective beyond the SFTTrainer's.
    """

    def __init__(
        self,
        *args: Any,
        pruning: PruningPolicy | None = None,
        per_sample_loss_fn: LossFunction | None = None,
        scoring_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(pruning, PruningPolicy):
            given = inspect.signature(SFTTrainer).bind_partial(*args, **kwargs).arguments
            _refuse_early(given, pruning, per_sample_loss_fn, scoring_dataset)
        super().__init__(
            *args,
            pruning=pruning,
            per_sample_loss_fn=per_sample_loss_fn,
            scoring_dataset=scoring_dataset,
            **kwargs,
        )

    def _derive_rule(self, given: LossFunction | None) -> LossRule:
        args: Any = self.args  # an SFTConfig
        peft_config = getattr(self.model, "active_peft_config", None)
        _check_loss(args, given, self.compute_loss_func, self.padding_free, peft_config)
        # The labels say how many terms a sample has, as for other models. Its losses follow from
        # log-probabilities, not from logits.
        token_loss = TOKEN_LOSSES[args.loss_type]
        if self.padding_free:
            losses = _losses(token_loss, _sums_of_samples)
            return replace(RULES["shifted_tokens"], losses=losses, terms=_terms_of_samples)
        return replace(RULES["shifted_tokens"], losses=_losses(token_loss, _sums_of_rows))

    def _indexed(self, collator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if not self.padding_free or self.loss_rule is None:
            return super()._indexed(collator)
        # Its batch has no rows whose order could be looked at. `_with_lengths` looks at positions.
        return _FlatCollator(collator, any_order=True)

    def _scoring_loader(self) -> dict[str, Any]:
        loader = super()._scoring_loader()
        if self.padding_free:
            loader["collator"] = partial(_collated, loader["collator"])
        return loader

    def _check_scoring_dataset(self) -> None:
        _check_unscored(self.scoring_dataset)

    def _own_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        inputs.pop(LENGTHS, None)  # no model takes it
        # With return_outputs=True the SFTTrainer would make another forward pass, for the logits.
        passes: list[Any] = []
        hook = model.register_forward_hook(lambda module, given, outputs: passes.append(outputs))
        try:
            loss = super(SampleLossMixin, self).compute_loss(model, inputs)
        finally:
            hook.remove()
        if len(passes) != 1:
            raise RuntimeError(
                f"trl {trl.__version__} made {len(passes)} forward passes of a batch instead of 1, "
                f"so it is not known which one its loss belongs to. {_WAY_OUT}"
            )
        return loss, passes[0]

    def _scoring_outputs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        # SFTTrainer.compute_loss would add the pass to the metrics of training, and gather them
        # from all ranks, which score different numbers of batches.
        inputs = {name: value for name, value in inputs.items() if name != LENGTHS}
        return model(**inputs, fused_lm_head=True)


# ---- the losses of samples -----------------------------------------------------------------------

# Values of tokens and the batch -> their sum for each sample.
Sums = Callable[[torch.Tensor, Any], torch.Tensor]


def _losses(
    token_loss: Callable[[torch.Tensor], torch.Tensor], sums: Sums
) -> Callable[..., SampleLosses]:
    def losses(outputs: Any, inputs: Any, smoothing: float, config: Any) -> SampleLosses:
        log_probs, mask = getattr(outputs, "log_probs", None), getattr(outputs, "label_mask", None)
        if log_probs is None or mask is None:
            raise RuntimeError(
                f"The outputs in trl {trl.__version__} lack the log-probabilities of the fused "
                f"head. {_WAY_OUT}"
            )
        log_probs = log_probs.float()
        return SampleLosses(
            sums(token_loss(log_probs), inputs),
            sums(-log_probs.detach(), inputs),
            sums(mask.float(), inputs),
        )

    return losses


def _sums_of_rows(values: torch.Tensor, inputs: Any) -> torch.Tensor:
    """(B, T) -> (B,): a row is a sample."""
    return values.sum(1)


def _sums_of_samples(values: torch.Tensor, inputs: Any) -> torch.Tensor:
    """(1, T - 1), the values of all labels but the first -> (B,), by the lengths of the samples.

    What is behind the last sample fills the row: its values are 0, and the last sample takes them.
    The order in which a sample's values are added is fixed, also on a GPU.
    """
    ends = inputs[LENGTHS].to(values.device).cumsum(0)
    places = torch.arange(1, values.shape[1] + 1, device=values.device)
    owners = torch.searchsorted(ends, places, right=True).clamp(max=len(ends) - 1)
    own = owners == torch.arange(len(ends), device=values.device)[:, None]
    return torch.where(own, values, 0).sum(1)


def _terms_of_samples(inputs: Any) -> torch.Tensor:
    """(B,) int64: the number of trained labels of each sample of a flattened row."""
    return _sums_of_samples(inputs["labels"][:, 1:].ne(IGNORED).long(), inputs)


class _FlatCollator(IndexedCollator):
    """Also adds the lengths of the samples to a batch in which they are one row."""

    def __call__(self, indexed: Any) -> Any:
        batch = super().__call__(indexed)
        return _with_lengths(batch, indexed.data) if self.marks else batch


def _collated(collator: Callable[[Any], Any], rows: Any) -> Any:
    return _with_lengths(collator(rows), rows)


def _with_lengths(batch: Any, rows: Any) -> Any:
    """The batch with the lengths of its samples. RuntimeError if it does not begin with them."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    positions, begins = batch["position_ids"], lengths.cumsum(0) - lengths
    whole = positions.shape[0] == 1 and positions.shape[1] >= int(lengths.sum())
    if not whole or bool(positions[0, begins].any()):
        raise RuntimeError(
            f"trl {trl.__version__} joined samples of {lengths.tolist()} tokens to position_ids of "
            f"shape {tuple(positions.shape)}, in which the samples do not begin where they should. "
            f"{_WAY_OUT}"
        )
    batch[LENGTHS] = lengths
    return batch


# ---- checks --------------------------------------------------------------------------------------


def _refuse_early(
    given: dict[str, Any], policy: PruningPolicy, loss: LossFunction | None, scoring_dataset: Any
) -> None:
    """Raise what can be known from the SFTTrainer's arguments, before it tokenizes the data.

    Args:
        given: The arguments by name.
        policy, loss, scoring_dataset: The arguments of ours.
    """
    _check_unscored(scoring_dataset)
    args, needed = given.get("args"), asks_for_losses(policy, policy.signals)
    strategy = getattr(args, "packing_strategy", "wrapped")
    packs = getattr(args, "packing", False) and strategy != "wrapped"
    padding_free = bool(packs or getattr(args, "padding_free", False))
    config = given.get("peft_config") or getattr(given.get("model"), "active_peft_config", None)
    try:
        _check_loss(args, loss, given.get("compute_loss_func"), padding_free, config)
    except ValueError as error:
        if loss is not None:
            raise
        if needed:
            raise ValueError(f"{error} It is needed because {needed}.") from error


def _check_unscored(scoring_dataset: Any) -> None:
    if scoring_dataset is not None:
        raise ValueError(
            "scoring_dataset= would not be prepared as the SFTTrainer prepares the train_dataset: "
            "leave it out, and scoring passes see the training samples."
        )


def _check_loss(
    args: Any, given: LossFunction | None, loss_func: Any, padding_free: bool, peft_config: Any
) -> None:
    """Raise ValueError if the loss of one sample is not known.

    Args:
        args: The SFTConfig. Or TrainingArguments, or None, which have trl's own defaults.
        given: The `per_sample_loss_fn`.
        loss_func: The `compute_loss_func`.
        padding_free: Whether a batch is one row.
        peft_config: Of the model, or None.
    """
    if given is not None or loss_func is not None:
        name = "compute_loss_func" if given is None else "per_sample_loss_fn"
        raise ValueError(
            f"{name}= needs logits, and the SFTTrainer builds none in training: leave it out, "
            "or use DynamicPruningTrainer on tokenized data."
        )
    if getattr(args, "label_smoothing_factor", 0):
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} needs logits, and the "
            "SFTTrainer builds none in training: set it to 0, or use DynamicPruningTrainer on "
            "tokenized data."
        )
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type not in TOKEN_LOSSES:
        raise ValueError(
            f"No loss of one sample is known for loss_type={loss_type!r}: use one of "
            f"{', '.join(TOKEN_LOSSES)}."
        )
    if padding_free and getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{peft_config.peft_type} puts one prompt in front of a batch that is one row. Then "
            "the model does not keep its samples apart. They attend to each other, and none has a "
            "loss of its own: set padding_free=False, and packing=False."
        )
