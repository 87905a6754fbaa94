"""What mends transformers itself. None of it has to do with pruning.

Each mend names its public thread. `tests/test_upstream.py` holds, for each, a test of the stock
class that is expected to fail: when upstream mends the bug the test passes, we hear of it, and the
mend goes.

Without pruning nothing here acts.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from .policies import PruningPolicy

logger = logging.get_logger(f"transformers.{__name__}")

# The private names that this file leans on. Reason for each:
SEAMS = {
    "Trainer._issue_warnings_after_load": "the only place that knows which weights did not load, "
    "called for a resumed run and for the best model, before any callback sees the model",
    "PreTrainedModel._keys_to_ignore_on_save": "weights that a checkpoint leaves out on purpose",
    "DataLoaderShard.base_dataloader": "the torch loader in accelerate's; it owns the workers",
    "Trainer.model_accepts_loss_kwargs": "below transformers 5.19 it decides whether the Trainer "
    "divides a loss by the accumulated batches",
    "Trainer.current_gradient_accumulation_steps": "by what it divides then",
}

# At run time a mixin has no base, so that it can stand above any Trainer. Type checkers see the
# Trainer's methods.
if TYPE_CHECKING:
    TrainerBase = Trainer
else:
    TrainerBase = object


def owner_behind(cls: type, mixin: type, method: str) -> type:
    """The class behind `mixin` in the bases of `cls` whose `method` the mixin's `super()` calls."""
    behind = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    return next(owner for owner in behind if method in vars(owner))


class UpstreamMends(TrainerBase):
    """The mends that override a method of the Trainer. They act only with a policy."""

    pruning: PruningPolicy | None = None

    # The checkpoint whose weights the Trainer is loading before its loop starts.
    _loading_from: str | None = None
    # Floating-point operations for one element of the model's main input, counted once in a run.
    _operations: int | None = None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Load weights that were saved under other names than the model has in memory.

        transformers saves some models (ViT, Mixtral, Qwen3-MoE, ...) under the names of the Hub. It
        loads a checkpoint by the names in memory, keeps the weights that do not match as they are,
        and only warns. `from_pretrained` knows both names.

        Threads: https://github.com/huggingface/transformers/issues/48805 (open), issues/43701
        (open), pull/48822 (open).
        """
        misfit = bool(load_result.missing_keys or load_result.unexpected_keys)
        if self.pruning is None or not misfit:
            return super()._issue_warnings_after_load(load_result)
        folder = cast(str, self._loading_from or self.state.best_model_checkpoint)
        if not isinstance(self.model, PreTrainedModel):
            missing = set(load_result.missing_keys)
            if not load_result.unexpected_keys and missing <= untrained(cast(Any, self.model)):
                # The stock method would fail at a model that is not of transformers.
                logger.warning(
                    "%s lacks the frozen weights %s: they stay as they are.",
                    folder,
                    sorted(missing),
                )
                return None
            raise _misfit(folder, load_result.missing_keys, load_result.unexpected_keys)
        restore_weights(self.model, folder)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's count, without its walk through all parameters of the model in each step.

        Thread: no public thread found.
        """
        behind = owner_behind(type(self), UpstreamMends, "floating_point_ops")
        if self.pruning is None or behind is not Trainer:
            return super().floating_point_ops(inputs)
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if not isinstance(main, torch.Tensor) or main.numel() == 0:
            return super().floating_point_ops(inputs)
        if self._operations is None:
            self._operations = super().floating_point_ops(inputs) // main.numel()
        return self._operations * main.numel()


def divided_later(trainer: Trainer) -> int:
    """By what the Trainer divides the loss of a batch after compute_loss.

    1 from transformers 5.19 on, where our `loss_is_scaled_for_ga = True` stops the division.
    Earlier versions divide by the number of accumulated batches if the model's forward takes no
    `**kwargs` and there is no `compute_loss_func`. A loss that is normalised over the step is
    multiplied by this number first. The function goes when 5.19 is the lowest version.
    """
    spared = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    if spared or hasattr(Trainer, "loss_is_scaled_for_ga"):
        return 1
    return cast(Any, trainer).current_gradient_accumulation_steps


def untrained(model: torch.nn.Module) -> set[str]:
    """The names of frozen parameters, and of the buffers of modules without other parameters."""
    names = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    for name, module in model.named_modules():
        if not any(weight.requires_grad for weight in module.parameters()):
            names |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers()}
    return names


def restore_weights(model: PreTrainedModel, folder: str) -> None:
    """Load the weights of a checkpoint into the model, under either kind of name.

    Weights that the checkpoint leaves out stay as they are, if they are frozen or left out on
    purpose (`_keys_to_ignore_on_save`).

    Raises:
        RuntimeError: If the checkpoint lacks other weights of the model.

    Cost: one more copy of the model in memory while it loads.
    """
    loads: Any = type(model).from_pretrained
    restored, found = loads(folder, config=model.config, output_loading_info=True)
    lacking = set(found["missing_keys"])
    if not lacking <= untrained(model) | set(model._keys_to_ignore_on_save or ()):
        raise _misfit(folder, sorted(lacking), sorted(found["unexpected_keys"]))
    weights = {name: w for name, w in restored.state_dict().items() if name not in lacking}
    model.load_state_dict(weights, strict=False)


def _misfit(folder: str, missing: list[str], unexpected: list[str]) -> RuntimeError:
    return RuntimeError(
        f"{folder} does not fit the model: it lacks {missing} and has {unexpected} that the model "
        "does not know. Resume with the model that was trained."
    )


def start_workers(loader: DataLoader) -> None:
    """Start the persistent workers of a resumed run as if they had run from its beginning.

    Such workers draw their seed once, when they start. In a run that was never interrupted that was
    in its first epoch. In a resumed run they would start in a later one, draw another seed, and
    move the global random state, so that dropout differs from then on. What workers draw
    themselves, such as augmentation, is not restored.

    Thread: no public thread found.
    """
    with torch.random.fork_rng(devices=[]):
        iter(cast(Any, loader).base_dataloader)
