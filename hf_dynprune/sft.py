"""DynamicPruningSFTTrainer: trl's SFTTrainer with `pruning=`.

In training the SFTTrainer builds no logits. Its fused head gives the log-probability of each label,
and its loss is a sum over these. So is our loss of one sample: we read the log-probabilities from
the outputs of its one forward pass.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .loss_side import LossFunction, SampleLossMixin
from .losses import RULES, LossRule, SampleLosses
from .trainer import DynamicPruningMixin

try:
    import trl
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("hf_dynprune.sft needs trl: pip install hf-dynprune[llm]") from error

# The names of trl that this file leans on, private or not documented. Reason for each:
SEAMS = {
    "SFTTrainer.compute_loss": "makes one forward pass without logits unless return_outputs is set",
    "SFTTrainer.padding_free": "whether a batch is one row, in which samples cannot be told apart",
    "SFTTrainer._tag_names": "the tags of trl's own card",
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


class DynamicPruningSFTTrainer(DynamicPruningMixin, SFTTrainer):
    """trl's SFTTrainer with one new argument, `pruning=`; see [`DynamicPruningMixin`].

    ```python
    from hf_dynprune.sft import DynamicPruningSFTTrainer

    trainer = DynamicPruningSFTTrainer(
        model, args, train_dataset=train, pruning=UCB(keep_ratio=0.3)
    )
    ```

    The signal `"loss"` of a sample is its mean negative log-likelihood over the tokens that are
    trained (the completion, the assistant's turns), also with `loss_type="dft"`. A sample is a row
    of `trainer.train_dataset` as the SFTTrainer prepared it. With `packing=True,
    packing_strategy="wrapped"` it is a packed row.

    Raises:
        ValueError: At construction, for `per_sample_loss_fn` and `scoring_dataset`. If the policy
            needs the loss of a sample also for `padding_free` (so for the packing strategies that
            imply it), `compute_loss_func` and `label_smoothing_factor`.

    Cost: No forward pass and no collective beyond the SFTTrainer's.
    """

    def _derive_rule(self, given: LossFunction | None) -> LossRule:
        args: Any = self.args  # an SFTConfig
        if self.padding_free:
            raise ValueError(
                "padding_free joins the samples of a batch in one row, in which pruning cannot "
                "tell them apart: set padding_free=False, and packing=False or "
                "packing_strategy='wrapped' (the other strategies imply padding_free)."
            )
        if given is not None or self.compute_loss_func is not None:
            name = "compute_loss_func" if given is None else "per_sample_loss_fn"
            raise ValueError(
                f"{name}= needs logits, and the SFTTrainer builds none in training: leave it out, "
                "or use DynamicPruningTrainer on tokenized data."
            )
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} needs logits, and the "
                "SFTTrainer builds none in training: set it to 0, or use DynamicPruningTrainer on "
                "tokenized data."
            )
        if args.loss_type not in TOKEN_LOSSES:
            raise ValueError(
                f"No loss of one sample is known for loss_type={args.loss_type!r}: use one of "
                f"{', '.join(TOKEN_LOSSES)}."
            )
        # The labels say how many terms a sample has, as for other models. Its losses follow from
        # log-probabilities, not from logits.
        return replace(RULES["shifted_tokens"], losses=_losses(TOKEN_LOSSES[args.loss_type]))

    def _check_scoring_dataset(self) -> None:
        if self.scoring_dataset is not None:
            raise ValueError(
                "scoring_dataset= would not be prepared as the SFTTrainer prepares the "
                "train_dataset: leave it out, and scoring passes see the training samples."
            )

    def _own_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
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
        return model(**inputs, fused_lm_head=True)

    def create_model_card(  # type: ignore[override]  # trl's has other arguments
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **words: Any,
    ) -> None:
        """Write the card.

        Takes trl's arguments, and for a pruned run those of `Trainer.create_model_card` by name.
        """
        if self.pruner is None or not self.pruner.report.epochs:
            return SFTTrainer.create_model_card(self, model_name, dataset_name, tags, **words)
        # The SFTTrainer writes a card before each checkpoint, in the middle of an epoch.
        self.pruner.update_record(step=self.state.global_step)
        given = [tags] if isinstance(tags, str) else tags or []
        words = {"dataset": dataset_name, **words, "tags": [*given, *self._tag_names]}
        super().create_model_card(model_name=model_name, **words)


def _losses(token_loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., SampleLosses]:
    def losses(outputs: Any, inputs: Any, smoothing: float, config: Any) -> SampleLosses:
        log_probs, mask = getattr(outputs, "log_probs", None), getattr(outputs, "label_mask", None)
        if log_probs is None or mask is None:
            raise RuntimeError(
                f"The outputs in trl {trl.__version__} lack the log-probabilities of the fused "
                f"head. {_WAY_OUT}"
            )
        log_probs = log_probs.float()
        return SampleLosses(
            token_loss(log_probs).sum(1), -log_probs.detach().sum(1), mask.sum(1).float()
        )

    return losses
