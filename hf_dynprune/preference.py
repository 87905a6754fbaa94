"""trl's DPOTrainer, RewardTrainer and KTOTrainer with `pruning=`. A row (a pair) is a sample.

The loss of trl is the mean of one number for each row. We see these numbers when trl averages them
(`averages.py`), so there is no other forward pass and no copy of trl's formulas.

`hf_dynprune.preference_experimental` has the trainers that trl keeps in `trl.experimental`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainingArguments

from .averages import BATCH_MEAN, AveragedLossMixin, check_given
from .checks import missing
from .loss_side import LossFunction, asks_for_losses
from .policies import PruningPolicy
from .potential import Kind
from .trl_card import TrlCardMixin

try:
    from trl import DPOTrainer, KTOTrainer, RewardTrainer
except ImportError as error:
    raise missing("hf_dynprune.preference", "trl", "llm", error) from error

# The names of trl that this file leans on, private or not documented. Reason for each:
SEAMS = {
    "DPOTrainer.compute_loss": "averages one number for each pair, once for each loss type, and "
    "adds the means with their weights; so do the other trainers",
    "DPOTrainer._metrics": "what trl adds to the next log; a scoring pass must not add to it",
    "DPOTrainer._total_train_tokens": "the same",
    "DPOTrainer.ref_model": "the reference model, or None; its passes need not be watched",
    "DPOTrainer.aux_loss_enabled": "whether the loss contains the router's, of the outputs' "
    "aux_loss and with the factor router_aux_loss_coef",
    "DPOConfig.loss_type": "which losses are one number for each pair",
    "FusedCausalLMOutput.log_probs": "where our loss is compared with trl's by gradients",
    "KTOTrainer.compute_loss": "averages the numbers of the desirable rows, then of the others",
    "KTOConfig.loss_type": "whether the loss needs the neighbours of a row",
}

# The loss types of the DPOTrainer that are one number for each pair.
PAIR_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
)

# What the size of a pair's gradient follows from, as in [`hf_dynprune.potential.Magnitude`].
_KINDS: dict[str, Kind] = {"sigmoid": "likelihood", "sigmoid_norm": "likelihood", "ipo": "error"}


class PreferencePruningMixin(TrlCardMixin, AveragedLossMixin):
    """Adds `pruning=` to a trainer of trl whose loss is the mean of one number for each row.

    The signal `"loss"` of a row is its number. A row is one of `trainer.train_dataset` as trl
    prepared it. trl leaves out rows that are too long.

    Args:
        pruning: The policy; None is trl's trainer.
        per_sample_loss_fn: `"batch_mean"`, or None.

    All other arguments are trl's.

    Raises:
        ValueError: At construction, for `scoring_dataset` and for another `per_sample_loss_fn`. If
            the policy needs the loss of a row: for a loss that is not one number for each row. For
            a `scoring` other than `"trained"` on several ranks.

    Cost: No forward pass and no collective beyond trl's.
    """

    _logged: tuple[str, ...] = ("_metrics", "_total_train_tokens")
    _references = ("ref_model",)

    def __init__(
        self,
        *args: Any,
        pruning: PruningPolicy | None = None,
        per_sample_loss_fn: LossFunction | None = None,
        scoring_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(pruning, PruningPolicy):
            # Before trl prepares the data and computes the log-probabilities of the reference.
            named = (value for value in (*args, *kwargs.values()))
            config = next((value for value in named if isinstance(value, TrainingArguments)), None)
            self._refuse_early(pruning, config, per_sample_loss_fn, scoring_dataset)
        super().__init__(
            *args,
            pruning=pruning,
            per_sample_loss_fn=per_sample_loss_fn,
            scoring_dataset=scoring_dataset,
            **kwargs,
        )

    def _wrong_loss(self, config: Any) -> str:
        """Why the loss is not one number for each row; empty if it is.

        Args:
            config: The trainer's arguments; None for trl's defaults.
        """
        return ""

    def _unknown_loss(self) -> str:
        return self._wrong_loss(self.args)

    def _refuse_early(
        self,
        pruning: PruningPolicy,
        config: TrainingArguments | None,
        given: LossFunction | None,
        scoring_dataset: Any,
    ) -> None:
        """Raise what is known from the arguments."""
        if scoring_dataset is not None:
            raise ValueError(
                "scoring_dataset= would not be prepared as trl prepares the train_dataset: leave "
                "it out, and scoring passes see the training rows."
            )
        check_given(given, type(self))
        why, needed = self._wrong_loss(config), asks_for_losses(pruning, pruning.signals)
        if why and needed and given is None:
            raise ValueError(f"{why}: {BATCH_MEAN} It is needed because {needed}.")

    def _compared(self, passes: list[Any]) -> dict[str, Any]:
        """Of the trained forward pass: where losses are compared, and the router's loss."""
        found: dict[str, Any] = {}
        for outputs in passes:
            for name in ("log_probs", "logits"):
                value = getattr(outputs, name, None)
                if isinstance(value, Tensor) and value.requires_grad:
                    found[name] = value
                    if getattr(self, "aux_loss_enabled", False):
                        found["aux_loss"] = outputs.aux_loss
        return found


# ---- the trainers --------------------------------------------------------------------------------


class _Halves(PreferencePruningMixin):
    """A batch of B pairs has 2 B rows: the chosen completions, then the rejected ones."""

    def _rows_in(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["input_ids"]) // 2

    def _indexed(self, collator: Any) -> Any:
        indexed: Any = super()._indexed(collator)
        indexed.blocks = 2
        return indexed


class DynamicPruningDPOTrainer(_Halves, DPOTrainer):
    """trl's DPOTrainer with one new argument, `pruning=`; see [`PreferencePruningMixin`].

    ```python
    from hf_dynprune.preference import DynamicPruningDPOTrainer

    trainer = DynamicPruningDPOTrainer(
        model, args=args, train_dataset=pairs, pruning=UCB(keep_ratio=0.3)
    )
    ```

    A sample is a pair of a chosen and a rejected completion. Several `loss_type` at once add up
    with their `loss_weights`. The reference may be a model, precomputed, or the model without its
    adapters (PEFT).

    The loss types `"aot"` and `"aot_unpaired"` sort the pairs of a batch, and `"sft"` is a mean
    over the tokens of a batch. They are refused if the policy needs the loss of a pair.
    """

    def _wrong_loss(self, config: Any) -> str:
        types = getattr(config, "loss_type", "sigmoid")
        names = [types] if isinstance(types, str) else types
        wrong = [name for name in names if name not in PAIR_LOSSES]
        if not wrong:
            return ""
        return (
            f"loss_type={wrong[0]!r} is not one number for each pair (these are: "
            f"{', '.join(PAIR_LOSSES)})"
        )

    def _kind(self) -> Kind | None:
        # -log sigmoid(z) has the slope 1 - exp(-loss) in z, and a squared error that of the error.
        args: Any = self.args
        kinds = {_KINDS.get(name) for name in args.loss_type}
        return kinds.pop() if len(kinds) == 1 and not args.use_weighting else None


class DynamicPruningRewardTrainer(_Halves, RewardTrainer):
    """trl's RewardTrainer with one new argument, `pruning=`; see [`PreferencePruningMixin`].

    A sample is a pair. Its loss has its margin and its part of `center_rewards_coefficient`.
    """

    def _kind(self) -> Kind | None:
        args: Any = self.args
        return "likelihood" if args.center_rewards_coefficient is None else None


class DynamicPruningKTOTrainer(PreferencePruningMixin, KTOTrainer):
    """trl's KTOTrainer with one new argument, `pruning=`; see [`PreferencePruningMixin`].

    A sample is one completion with its label. Only `loss_type="apo_zero_unpaired"` can be pruned.
    With `"kto"`, trl pairs each row with the completion of its neighbour in a fixed batch, to
    estimate a KL divergence, so all rows must be trained in the order of the dataset.

    Raises:
        ValueError: At construction, for `loss_type="kto"` with a policy.
    """

    _replaced_orders = (KTOTrainer,)

    def _refuse_early(
        self,
        pruning: PruningPolicy,
        config: TrainingArguments | None,
        given: LossFunction | None,
        scoring_dataset: Any,
    ) -> None:
        loss_type = getattr(config, "loss_type", "kto")
        if loss_type != "apo_zero_unpaired":
            raise ValueError(
                f"loss_type={loss_type!r} pairs each row with its neighbour in a fixed batch, "
                "which needs all rows in the order of the dataset, so no row can be left out: use "
                "loss_type='apo_zero_unpaired' with train_sampling_strategy='random', which has no "
                "such pairs, or pruning=None."
            )
        super()._refuse_early(pruning, config, given, scoring_dataset)

    def _rows_in(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["label"])

    def _in_order(self, rows: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        # trl averages the desirable rows, then the others.
        undesirable = ~inputs["label"].to(rows.device).bool()
        return rows[undesirable.int().argsort(stable=True).argsort()]
