"""PruningArguments: a policy from a command line or a YAML file, through HfArgumentParser."""

from dataclasses import dataclass, field
from typing import Any

from .files import parse_json
from .policies import POLICIES, PruningPolicy, make_policy

# The TrainingArguments that decide what a step trains, apart from the batch, the seed and the
# ranks.
TRAINING_SETTINGS = (
    "num_train_epochs",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
)


@dataclass
class PruningArguments:
    """What to prune, for `HfArgumentParser((PruningArguments, TrainingArguments))`.

    In YAML, `pruning: no` and `pruning: off` mean none, too: YAML reads them as False.

    Raises:
        TypeError, ValueError: At construction, if `pruning` is not a name or `pruning_kwargs` is
            not a mapping.
    """

    _argument_group_name = "pruning"  # HfArgumentParser lists them under this name

    pruning: str | None = field(
        default="none",
        metadata={"help": f"The pruning policy: none (the stock Trainer), {', '.join(POLICIES)}."},
    )
    keep_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the training data trained in an epoch, in (0, 1]."},
    )
    pruning_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Further fields of the policy, as JSON, such as \'{"period": 10, "c": 2.0}\'.'
        },
    )

    def __post_init__(self) -> None:
        if self.pruning is None or self.pruning is False:
            self.pruning = "none"
        if not isinstance(self.pruning, str):
            raise TypeError(
                f"pruning={self.pruning!r} is not a name: expected 'none' or a policy "
                f"({', '.join(POLICIES)})."
            )
        if isinstance(text := self.pruning_kwargs, str):
            try:
                self.pruning_kwargs = parse_json(text)
            except ValueError as error:
                shown = text[:200]
                raise ValueError(f"pruning_kwargs={shown!r} is not JSON ({error}).") from error
        if self.pruning_kwargs is not None and not isinstance(self.pruning_kwargs, dict):
            raise ValueError(
                f"pruning_kwargs={self.pruning_kwargs!r} must be a mapping, such as "
                '{"period": 10}.'
            )
        for name in self.pruning_kwargs or {}:
            if not isinstance(name, str) or name == "name":
                raise ValueError(
                    f"pruning_kwargs has {name!r}, which is not a field of a policy: expected "
                    "names such as 'period'. `pruning` names the policy."
                )

    def policy(self) -> PruningPolicy | None:
        """The policy, or None for `pruning="none"`.

        Raises:
            ValueError: If the arguments do not fit together.
        """
        settings = dict(self.pruning_kwargs or {})  # type: ignore[arg-type]  # a mapping since __post_init__
        if self.keep_ratio is not None:
            if "keep_ratio" in settings:
                raise ValueError(
                    f"keep_ratio is given twice: {self.keep_ratio} by itself, "
                    f"{settings['keep_ratio']} in pruning_kwargs."
                )
            settings["keep_ratio"] = self.keep_ratio
        assert self.pruning is not None  # since __post_init__
        if self.pruning.lower() == "none":
            if settings:
                raise ValueError(
                    f"{settings} has no effect with pruning='none': choose a policy "
                    f"({', '.join(POLICIES)}) or leave it out."
                )
            return None
        return make_policy(self.pruning, **settings)
