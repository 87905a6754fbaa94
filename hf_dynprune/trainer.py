"""DynamicPruningTrainer: dynamic data pruning inside the Hugging Face Trainer.

Every private seam of the Trainer that we lean on is in this file, and listed in `SEAMS` with its reason; a test compares
their signatures with the installed transformers. With `pruning=None` every method here calls the stock one and nothing
else.
"""

import hashlib
import inspect
import json
import math
import os
import re
import shlex
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
import xxhash
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from . import distributed
from .losses import (
    LossRule,
    SampleLosses,
    check_signals,
    check_unmixed,
    derive_rule,
    observe_signals,
)
from .policies import PruningPolicy
from .pruner import STATE_FILE, DynamicPruner, choice_seed
from .report import PruningReport
from .sampler import SAMPLE_INDEX, IndexedCollator, IndexedDataset
from .scores import load_tensors, save_tensors
from .scoring import loss_left_out, score_samples

# Below transformers' own: `set_verbosity`, and `log_level` of the TrainingArguments, hold for us as well.
logger = logging.get_logger(f"transformers.{__name__}")

# The seams: the parameters (self left out) that each is called with. Reasons:
#   _get_dataloader                      builds the loader with all of the user's dataloader settings
#   _remove_unused_columns               must run on the datasets.Dataset, before it is wrapped
#   _get_collator_with_removed_columns   the index is added around the user's collator, whatever surrounds that
#   _get_num_items_in_batch              the denominator of an optimizer step is known before its first forward pass
#   set_initial_training_values          the number of steps is that of the pruned run
#   _init_training_state                 earliest place that knows the checkpoint; says where the run goes on
#   _run_epoch                           the epoch's length is fixed from the first epoch's otherwise
#   _load_from_checkpoint, _load_best_model, _issue_warnings_after_load
#                                        weights that are saved under other names are not restored otherwise (5.23)
#   _save_rng_state                      on every rank, before trainer_state.json, the hub's upload and the rotation
#   _finalize_training                   samples per second counts what was trained
SEAMS = {
    "_get_dataloader": (
        "dataset",
        "description",
        "batch_size",
        "sampler_fn",
        "is_training",
        "dataloader_key",
    ),
    "_remove_unused_columns": ("dataset", "description"),
    "_get_collator_with_removed_columns": ("data_collator", "description"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "set_initial_training_values": ("args", "dataloader"),
    "_init_training_state": (
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_run_epoch": (
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_issue_warnings_after_load": ("load_result",),
    "_save_rng_state": ("output_dir",),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
}

# Tells our loader from others in `_get_collator_with_removed_columns`; transformers prints it.
_DESCRIPTION = "pruned training"


# At run time the mixin has no base, so that it can stand before any Trainer; a type checker sees the Trainer's methods.
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class DynamicPruningMixin(_Trainer):
    """Adds `pruning=` to a Trainer: `class PrunedSeq2SeqTrainer(DynamicPruningMixin, Seq2SeqTrainer)`.

    Args:
        pruning: the policy, such as `UCB(keep_ratio=0.3)`; None is the stock Trainer.
        per_sample_loss_fn: how the loss of one sample is computed, where transformers' name of the model's head does not
            tell: a name in [`hf_dynprune.losses.RULES`], or a function (outputs, inputs) -> losses (B,). Needed with
            `compute_loss_func`, and with a `compute_loss` of the class that is mixed with.
        scoring_dataset: the training samples, in their order, as scoring passes are to see them, such as without
            augmentation; *optional*, defaults to `train_dataset`. Only policies with a `scoring` other than `"trained"`
            take such passes.

    All other arguments are the Trainer's.

    Attributes:
        pruner: the [`DynamicPruner`] of the current run, or of the last one.
        pruning_report: its [`PruningReport`]; None with `pruning=None`.

    Raises:
        TypeError, ValueError: at construction, for what cannot be pruned; before anything is trained.

    Relations: the loss, the optimizer, evaluation, logging, callbacks and checkpoints are the Trainer's. Each train()
    starts a run with an empty table of scores; `resume_from_checkpoint` continues the identical run.
    """

    # Floating-point operations for an element of the model's main input, once a run has counted them.
    _operations: int | None = None

    def __init__(
        self,
        *args: Any,
        pruning: PruningPolicy | None = None,
        per_sample_loss_fn: Callable[..., torch.Tensor] | str | None = None,
        scoring_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        self.pruning = pruning
        self.scoring_dataset = scoring_dataset
        self.pruner: DynamicPruner | None = None
        if (
            pruning is not None
        ):  # transformers' own message about streams asks for max_steps, which would not help
            _check_stream(kwargs.get("train_dataset"))
        super().__init__(*args, **kwargs)
        if pruning is None:
            return
        if not isinstance(pruning, PruningPolicy):
            raise TypeError(
                f"pruning={pruning!r} is no policy: wanted is one such as UCB(keep_ratio=0.3), make_policy('ucb', "
                "keep_ratio=0.3), or None."
            )
        self._check_settings()
        self._loss_rule: LossRule = self._derive_rule(per_sample_loss_fn)
        self._check_dataset()
        self.pruner = (
            self._make_pruner()
        )  # raises for what does not fit together; each train() makes its own
        check_signals(self.pruner.scored_signals, self._loss_rule)
        if looks_once(pruning, self.pruner.num_epochs):
            logger.warning(
                "%d epochs with %s: never observed samples come first, so that none is trained twice before nearly all "
                "were trained once. Scores decide next to nothing then, and the choice is as random as RandomPruning's. To "
                'let them decide, score before each choice (scoring="all"), begin with full-data epochs (first=1), keep '
                "more or train longer.",
                self.pruner.num_epochs,
                pruning,
            )
        # Our loss is normalised over the optimizer step: the Trainer must not divide it by the accumulation steps.
        self.loss_is_scaled_for_ga = True
        self.add_callback(_Recorder(self))

    # ---- checks ----------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        args = self.args
        if args.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} orders the training data itself, and pruning "
                "does too: set it to 'random', or use pruning=None."
            )
        for method in ("get_train_dataloader", "_get_train_sampler"):
            owner = _owner(type(self), method)
            if owner is not Trainer:
                raise ValueError(
                    f"{owner.__name__}.{method} chooses the training data itself, and pruning would override it: remove "
                    "it, or mix with another class."
                )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (nn.DataParallel) cannot tell whose loss is whose: start one process a "
                f"GPU with `torchrun --nproc_per_node {args.n_gpu} script.py`, or show one with CUDA_VISIBLE_DEVICES=0."
            )
        config = args.accelerator_config
        for name in ("dispatch_batches", "split_batches"):
            if args.world_size > 1 and getattr(config, name, None):
                raise ValueError(
                    f"accelerator_config: {name}=True does not go with pruning on several ranks: unset it."
                )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            warnings.warn(
                f"hf_dynprune was not verified with {'DeepSpeed' if self.is_deepspeed_enabled else 'FSDP'}: compare a "
                "short run with one on DDP before you trust it.",
                stacklevel=3,
            )

    def _check_dataset(self) -> None:
        dataset: Any = self.train_dataset
        if dataset is None:
            raise ValueError(
                "pruning= needs a train_dataset; to evaluate alone leave `pruning` out."
            )
        _check_stream(dataset)
        if self.scoring_dataset is not None and len(self.scoring_dataset) != len(dataset):
            raise ValueError(
                f"The scoring_dataset has {len(self.scoring_dataset)} samples, the training dataset {len(dataset)}: wanted "
                "are the same samples in the same order."
            )
        if len(dataset) == 0:
            raise ValueError(
                "The training dataset is empty (0 samples): check the split and the filters."
            )
        if (
            self.args.remove_unused_columns
            and isinstance(dataset, datasets.Dataset)
            and dataset.format["type"] == "custom"
        ):
            raise ValueError(
                "The training dataset has a transform (`with_transform`), and remove_unused_columns=True removes the "
                "columns that it reads: set remove_unused_columns=False in the TrainingArguments."
            )

    def _make_pruner(self) -> DynamicPruner:
        args, dataset = self.args, cast(Any, self.train_dataset)
        assert self.pruning is not None
        return DynamicPruner(
            self.pruning,
            len(dataset),
            batch_size=self._train_batch_size,
            num_epochs=None if args.max_steps > 0 else args.num_train_epochs,
            max_steps=args.max_steps if args.max_steps > 0 else None,
            accumulation=args.gradient_accumulation_steps,
            drop_last=args.dataloader_drop_last,
            seed=args.seed,
            data_seed=args.data_seed,
            fingerprint=dataset_fingerprint(dataset),
        )

    @property
    def pruning_report(self) -> PruningReport | None:
        """The record of the current run, or of the last one; None with `pruning=None`."""
        return None if self.pruner is None else self.pruner.report

    # ---- data ------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self.pruning is None:
            return super().get_train_dataloader()
        dataset = self.train_dataset
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description=_DESCRIPTION)
        pruner = self._make_pruner()
        loader = self._get_dataloader(
            dataset=IndexedDataset(dataset),
            description=_DESCRIPTION,
            batch_size=self._train_batch_size,
            sampler_fn=lambda _: pruner.sampler,
            is_training=True,
        )
        # The loop takes it over in set_initial_training_values; a loader made for another purpose changes nothing.
        self._made: tuple[DataLoader, DynamicPruner] | None = (loader, pruner)
        return loader

    def _get_collator_with_removed_columns(
        self, data_collator: Callable, description: str | None = None
    ) -> Callable:
        if description != _DESCRIPTION:
            return super()._get_collator_with_removed_columns(data_collator, description)
        if not isinstance(
            self.train_dataset, datasets.Dataset
        ):  # whose columns were removed already
            data_collator = super()._get_collator_with_removed_columns(data_collator, description)
        return IndexedCollator(data_collator)

    # ---- length and learning rate ----------------------------------------------------------------

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        if self.pruning is None:
            return values
        assert self._made is not None  # the loop has just called get_train_dataloader
        (made, self.pruner), self._made = self._made, None
        if made is not dataloader:
            raise RuntimeError(
                "The Trainer trains from another loader than the one that get_train_dataloader made."
            )
        self._loss_checked = False
        self._operations = None
        _, _, num_examples, num_train_samples, batch_size, steps_in_epoch, _ = values
        pruner = self.pruner
        return (
            pruner.num_epochs,
            pruner.clock.length,
            num_examples,
            num_train_samples,
            batch_size,
            steps_in_epoch,
            pruner.total_steps(),
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        if self.pruning is None or self.pruner is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is not None:
            logger.warning(
                "The learning-rate scheduler that was passed in is left as it is: make sure that it was made for the "
                "%d optimizer steps of the pruned run.",
                self.pruner.total_steps(),
            )
            return super().create_scheduler(num_training_steps, optimizer)
        pruner = self.pruner
        scheduler = super().create_scheduler(pruner.clock.total, optimizer)
        if isinstance(scheduler, LambdaLR):

            def follow_the_budget(schedule: Callable[..., float]) -> Callable[[int], float]:
                return lambda step: schedule(pruner.clock.virtual(step)) * pruner.lr_scale

            scheduler.lr_lambdas = [
                follow_the_budget(schedule) for schedule in scheduler.lr_lambdas
            ]
        return scheduler

    # ---- the run ---------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        stock_checkpoint: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Trains; all arguments but one are the Trainer's.

        Args:
            resume_from_checkpoint: the folder of a checkpoint, or True for the newest complete one in `output_dir`.
            stock_checkpoint: goes on from a checkpoint of the stock Trainer as well. It has no scores: the table starts
                empty, an interrupted epoch begins anew, and what was trained before is charged as full data.

        Raises:
            ValueError: for a checkpoint that is not complete or belongs to another run; nothing is changed then.
        """
        if self.pruning is not None and resume_from_checkpoint:
            wanted, folder = resume_from_checkpoint, self.args.output_dir or "."
            # Rank 0 looks: all ranks go on from the same checkpoint, and its files are read once.
            resume_from_checkpoint = distributed.from_rank_0(
                lambda: _complete_checkpoint(wanted, folder, stock_checkpoint)
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.pruning is None or self.pruner is None:
            return position
        if (
            resume_from_checkpoint is not None
            and not (Path(resume_from_checkpoint) / STATE_FILE).exists()
        ):
            position = self.pruner.adopt(self.state.epoch or 0.0, self.state.global_step)
            logger.warning(
                "%s has no %s: the run goes on from epoch %d without any score, and the %.4g epochs before count as full "
                "data.",
                resume_from_checkpoint,
                STATE_FILE,
                position[0],
                self.state.epoch,
            )
        elif resume_from_checkpoint is not None:
            position = self.pruner.load(resume_from_checkpoint)
            if self.args.ignore_data_skip:
                self.pruner.restart_epoch(self.state.global_step)
                position = (position[0], 0)
        self._passes_before = self.pruner.report.totals["forward_passes"]
        return position

    def _run_epoch(self, **loop: Any) -> None:  # type: ignore[override]  # the loop names all its arguments
        if self.pruning is None or self.pruner is None:
            return super()._run_epoch(**loop)
        pruner, epoch = self.pruner, loop["epoch"]
        begun = len(pruner.report.epochs)
        # Datasets that follow the epoch (our augmentation) hear of it here: accelerate tells them only at times.
        for dataset in (self.train_dataset, self.scoring_dataset):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
        pruner.begin_epoch(epoch, step=self.state.global_step, scorer=partial(self._score, epoch))
        if isinstance(self.lr_scheduler, LambdaLR) and self._created_lr_scheduler:
            self._renew_learning_rate()
        self._renew_total()
        if (
            len(pruner.report.epochs) > begun and self.args.logging_strategy != "no"
        ):  # not resumed in mid-epoch
            self.log(self._epoch_logs())
        loop["steps_in_epoch"] = len(loop["train_dataloader"])
        loop["num_update_steps_per_epoch"] = pruner.clock.length
        self._expected = pruner.batches_done
        if (
            self.args.dataloader_persistent_workers
            and loop["resume_from_checkpoint"]
            and epoch == loop["epochs_trained"]
        ):
            # Workers that last draw their seed once, when they start. In a run that was never interrupted that was in its
            # first epoch: they start here, and the global random state is as if they had been there.
            with torch.random.fork_rng(devices=[]):
                iter(loop["train_dataloader"].base_dataloader)
        super()._run_epoch(**loop)
        pruner.end_epoch(step=self.state.global_step, learning_rate=self._get_learning_rate())

    def _renew_learning_rate(self) -> None:
        """The plan that begins may scale the learning rate from its first step on."""
        scheduler = self.lr_scheduler
        for group, base, schedule in zip(
            self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * schedule(scheduler.last_epoch)
        scheduler._last_lr = [
            group["lr"] for group in self.optimizer.param_groups
        ]  # what is logged

    def _renew_total(self) -> None:
        """The true number of steps, in the state and in the progress bar."""
        assert self.pruner is not None
        self.state.max_steps = self.pruner.total_steps()
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None) or getattr(
                callback, "training_tracker", None
            )
            if bar is not None:
                bar.total = self.state.max_steps

    def _epoch_logs(self) -> dict[str, float]:
        assert self.pruner is not None
        record = self.pruner.report.epochs[-1]
        return {
            "pruning/kept_samples": record.samples,
            "pruning/kept_share": record.samples / self.pruner.report.num_samples,
            "pruning/choosing_seconds": record.seconds["choosing"],
            **(
                {"pruning/scoring_seconds": record.seconds["scoring"]}
                if record.scoring_passes
                else {}
            ),
            **{f"pruning/score_{name}": value for name, value in record.scores.items()},
        }

    def _score(self, epoch: int, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The policy's signals of some samples, by forward passes of the model as it stands."""
        policy, pruner, args = self.pruning, self.pruner, self.args
        assert policy is not None
        assert pruner is not None
        model = cast(torch.nn.Module, self.model)
        dataset = self.scoring_dataset if self.scoring_dataset is not None else self.train_dataset
        collator = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="scoring")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="scoring")

        def forward(batch: dict[str, Any]) -> Any:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager(), loss_left_out(self._model_with_loss()):
                return self._scoring_outputs(model, batch)

        return score_samples(
            model,
            dataset,
            index,
            pruner.scored_signals,
            rule=self._loss_rule,
            collator=collator,
            batch_size=args.eval_batch_size,
            forward=forward,
            mode=policy.scoring_mode or ("train" if policy.scoring == "dropped" else "eval"),
            seed=choice_seed(pruner.seed, epoch, "scoring"),
            description=f"scoring before epoch {epoch}",
            progress=not args.disable_tqdm,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> Any:
        if self.pruning is not None and self.pruner is not None:
            # The Trainer takes the share of `num_train_samples` that belongs to this call's share of the steps.
            steps = max(self.state.global_step - self._initial_global_step, 1)
            trained = self.pruner.report.totals["forward_passes"] - self._passes_before
            num_train_samples = trained * max(self.state.max_steps, 1) / steps
        return super()._finalize_training(trial, num_train_samples, start_time)

    # ---- loss ------------------------------------------------------------------------------------

    def _get_num_items_in_batch(
        self, batch_samples: list, device: torch.device
    ) -> torch.Tensor | int | None:
        """D: the number of loss terms of all samples of the optimizer step, on all ranks; evaluation has the stock one."""
        if self.pruner is None or not batch_samples or SAMPLE_INDEX not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        if self.pruner.batches_done != self._expected:
            raise RuntimeError(
                f"{type(self).__name__}.compute_loss does not call super().compute_loss, so no loss of a sample was "
                "observed: let it call DynamicPruningTrainer's, or mix DynamicPruningMixin with the class that has it and "
                "pass `per_sample_loss_fn=`."
            )
        self._expected += len(batch_samples)
        if self._loss_rule.terms is None:
            return self.pruner.sampler.samples_in(self.pruner.batches_done, len(batch_samples))
        terms = sum(
            (self._loss_rule.terms(batch) * (batch[SAMPLE_INDEX] >= 0)).sum().to(device)
            for batch in batch_samples
        )
        return distributed.sum_over_ranks(terms)

    # The next three are overridden for a Trainer whose own compute_loss does not give the outputs of its pass (`sft`).

    def _derive_rule(
        self, per_sample_loss_fn: Callable[..., torch.Tensor] | str | None
    ) -> LossRule:
        """How the loss of one sample follows from the outputs; ValueError, at construction, where that is not known."""
        owner = _owner(type(self), "compute_loss")
        if per_sample_loss_fn is None and (
            self.compute_loss_func is not None or owner is not Trainer
        ):
            what = (
                "compute_loss_func"
                if self.compute_loss_func is not None
                else f"{owner.__name__}.compute_loss"
            )
            way_out = "pass `per_sample_loss_fn=`, a function (outputs, inputs) -> losses of shape (batch size,)"
            if owner.__name__ == "SFTTrainer":
                way_out = "use hf_dynprune.sft.DynamicPruningSFTTrainer, which knows the loss of trl's SFTTrainer"
            raise ValueError(
                f"{what} computes a loss of its own, of which pruning needs the part of each sample: {way_out}."
            )
        return derive_rule(_base_model(self.model), per_sample_loss_fn)

    def _own_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The loss of a batch by the Trainer that is mixed with, and the outputs of its forward pass."""
        return cast(
            tuple[torch.Tensor, Any], super().compute_loss(model, inputs, return_outputs=True)
        )

    def _scoring_outputs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """The outputs of a pass that only scores; not collective, as ranks make different numbers of these."""
        return self._own_loss(model, inputs)[1]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of a batch, normalised over its optimizer step; without `sample_index` the stock loss."""
        if self.pruning is None or self.pruner is None or SAMPLE_INDEX not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        index = inputs.pop(SAMPLE_INDEX)
        batch = dict(inputs)  # label smoothing takes the labels out of `inputs`
        # The model's own loss is looked at on the first batch; later it would be computed for nothing.
        with loss_left_out(self._model_with_loss() if self._loss_checked else None) as left_out:
            own_loss, outputs = self._own_loss(model, inputs)
        # A router's loss and the like, which the model added to its own: kept, unweighted.
        auxiliary = (
            outputs.get("aux_loss")
            if isinstance(outputs, Mapping)
            else getattr(outputs, "aux_loss", None)
        )
        if auxiliary is None and not self._loss_rule.from_own_loss:
            own_loss = (
                own_loss.detach()
            )  # its graph holds as much as the logits: it goes before ours is made
            if isinstance(outputs, MutableMapping):
                outputs["loss"] = None
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        config = getattr(_base_model(self.model), "config", None)
        losses = self._loss_rule.losses(outputs, batch, smoothing, config)
        terms = losses.terms.sum().clamp(min=1)
        extra = (
            None
            if auxiliary is None
            else own_loss - (0.0 if left_out else losses.train.sum() / terms)
        )
        if isinstance(outputs, MutableMapping) and not self._loss_rule.from_own_loss:
            # For a compute_loss above this one, which may look at it: the mean of the batch, as the model gives it.
            outputs["loss"] = losses.train.detach().sum() / terms + (
                0.0 if extra is None else extra.detach()
            )
        if not self._loss_checked:
            check_unmixed(self._loss_rule, batch, config)
            self._check_loss(own_loss, losses, len(index), has_auxiliary=auxiliary is not None)
            self._loss_checked = True
        self.pruner.observe(index, observe_signals(self.pruner.signals, outputs, batch, losses))
        # DDP averages the gradients of the ranks; D counts the samples of all of them.
        ranks = self.pruner.ranks
        denominator = (
            num_items_in_batch if num_items_in_batch is not None else losses.terms.sum() * ranks
        )
        if isinstance(denominator, torch.Tensor):
            denominator = denominator.clamp(min=1)
        loss = (losses.train * self.pruner.weights(index)).sum() * ranks / denominator
        if extra is not None:
            loss = loss + extra / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's count, which goes through all parameters of the model; here that is done once in a run."""
        if self.pruning is None or _owner(type(self), "floating_point_ops") is not Trainer:
            return super().floating_point_ops(inputs)
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if not isinstance(main, torch.Tensor) or main.numel() == 0:
            return super().floating_point_ops(inputs)
        if self._operations is None:
            self._operations = super().floating_point_ops(inputs) // main.numel()
        return self._operations * main.numel()

    def _model_with_loss(self) -> PreTrainedModel | None:
        """The model, if its loss is one over tokens (with a large vocabulary the dearest part of a step) and can be left
        out: transformers' own compute_loss, and our rule instead of it."""
        model = _base_model(self.model)
        stock = _owner(type(self), "compute_loss") is Trainer and self.compute_loss_func is None
        return (
            model
            if stock and self._loss_rule.terms is not None and isinstance(model, PreTrainedModel)
            else None
        )

    def _check_loss(
        self, own_loss: torch.Tensor, losses: SampleLosses, batch_size: int, has_auxiliary: bool
    ) -> None:
        """On the first batch: one loss a sample, and their mean is the model's own loss."""
        if losses.train.shape != (batch_size,):
            raise ValueError(
                f"The per-sample loss has shape {tuple(losses.train.shape)}, the batch {batch_size} samples: wanted is one "
                f"loss for each sample, shape ({batch_size},). Pass a `per_sample_loss_fn=` that returns that."
            )
        if has_auxiliary:
            return
        ours = losses.train.detach().sum() / losses.terms.sum().clamp(min=1)
        own = own_loss.detach().float().mean()
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        half = (
            self.args.bf16
            or self.args.fp16
            or not dtypes.isdisjoint({torch.bfloat16, torch.float16})
        )
        if not torch.isclose(
            ours, own.to(ours.device), rtol=2e-2 if half else 1e-3, atol=1e-6, equal_nan=True
        ):
            raise ValueError(
                f"The mean of the per-sample losses on the first batch is {ours.item():.6g}, the loss of "
                f"{type(_base_model(self.model)).__name__} itself {own.item():.6g}: pruning would train something else. "
                "Pass `per_sample_loss_fn=`, a function (outputs, inputs) -> losses of shape (batch size,) whose mean is "
                "the loss to train."
            )

    # ---- checkpoints -----------------------------------------------------------------------------

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        self._loading_from: str | None = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._loading_from = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """transformers saves some models (ViT, Mixtral, ...) under other names than it has in memory, and here loads them
        by name alone: those weights would stay as they are, with a warning. `from_pretrained` knows the names."""
        if self.pruning is None or not (load_result.missing_keys or load_result.unexpected_keys):
            return super()._issue_warnings_after_load(load_result)
        if not isinstance(self.model, PreTrainedModel):
            raise RuntimeError(
                f"{self._loading_from} does not fit the model: missing are {load_result.missing_keys}, unexpected "
                f"{load_result.unexpected_keys}. Resume with the model that was trained."
            )
        restored = type(self.model).from_pretrained(self._loading_from, config=self.model.config)
        self.model.load_state_dict(restored.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.pruning is None or self.pruner is None:
            return
        # Collective: when it returns, the other ranks have written their files.
        state = self.pruner.state_dict(
            step=self.state.global_step, learning_rate=self._get_learning_rate()
        )
        if self.args.should_save:
            folder = Path(output_dir)
            # One of an earlier run in the same place must not make this checkpoint complete before it is.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            state["metadata"]["files"] = _content(folder)
            save_tensors(folder / STATE_FILE, **state)

    # ---- card ------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the card: the Trainer's facts, and what was pruned, what it cost, how to repeat it. Beside it `report.json`
        and, where matplotlib is installed, a picture.

        Takes the Trainer's arguments, and those of [`hf_dynprune.model_card.card_of_trainer`]: `full=` and `short=`, reports
        to compare with, and `other_seeds=`.
        """
        if self.pruning is None or self.pruner is None or not self.pruner.report.epochs:
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            from .model_card import write_card

            write_card(self, Path(self.args.output_dir or "."), *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Uploads the model, its card, `report.json` and the picture; the arguments are the Trainer's, and those of
        `create_model_card`.

        Raises:
            RuntimeError: if the upload fails. Everything was written to `output_dir` before; the message says how to go on.
        """
        if self.pruning is None or self.pruner is None or not self.pruner.report.epochs:
            return super().push_to_hub(*args, **kwargs)
        # The Trainer asks the Hub for the repository first, and saves then. Writing twice is little beside an upload.
        folder = self.args.output_dir or "."
        self.save_model(folder, _internal_call=True)
        of_upload = inspect.signature(Trainer.push_to_hub).parameters
        self.create_model_card(
            **{name: value for name, value in kwargs.items() if name not in of_upload}
        )
        repo_id = self.hub_model_id or self.args.hub_model_id or Path(folder).absolute().name
        with uploading(
            folder, repo_id, "trainer.push_to_hub()", "--exclude", "checkpoint-*", "--exclude", "_*"
        ):
            return super().push_to_hub(*args, **kwargs)


class DynamicPruningTrainer(DynamicPruningMixin, Trainer):
    """The Hugging Face Trainer with one new argument, `pruning=`; see [`DynamicPruningMixin`].

    ```python
    trainer = DynamicPruningTrainer(model=model, args=args, train_dataset=train, pruning=UCB(keep_ratio=0.3))
    trainer.train()
    trainer.pruning_report.save("report.json")
    ```
    """


class _Recorder(TrainerCallback):
    """Tells the pruner what happens in the loop."""

    def __init__(self, trainer: DynamicPruningMixin) -> None:
        # Weak: in a cycle the loader's workers would be collected in an order in which they wait out a timeout.
        self.trainer = weakref.proxy(trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log and self.trainer.pruner is not None:
            self.trainer.pruner.drain()  # the Trainer synchronises with the device here, too

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        if metrics and self.trainer.pruner is not None:
            self.trainer.pruner.add_evaluation(metrics)


# ---- helpers -------------------------------------------------------------------------------------


@contextmanager
def uploading(
    folder: str | os.PathLike[str], repo_id: str, again: str, *options: str
) -> Iterator[None]:
    """Says of an upload that fails what happened, that nothing is lost, and how to go on: by the call `again`, or by
    `hf upload` with these options."""
    try:
        yield
    except (
        Exception
    ) as error:  # of the connection, the login or the Hub: they have no class in common
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *options])
        raise RuntimeError(
            f"The upload to {repo_id} failed ({type(error).__name__}: {str(error).strip()}). Nothing is lost: all that was "
            f"to be uploaded lies in {folder}. Check the network, log in with a token that may write there (`hf auth "
            f"login`), and call {again} again; or, when this process has ended, `{command}`."
        ) from error


def looks_once(policy: PruningPolicy, epochs: int) -> bool:
    """Whether a policy that goes by scores has none to go by in a run of so many epochs: each choice is a first look.

        choices * keep_ratio <= 1,    choices = ceil(epochs / period)

    Never observed samples come first, so it chooses as [`RandomPruning`] without replacement does. Not so where forward
    passes score what was not trained, nor behind full-data epochs.
    """
    keep_ratio = getattr(policy, "keep_ratio", None)
    by_scores = (
        type(policy).score is not PruningPolicy.score
        and policy.scoring == "trained"
        and policy.first == 0
    )
    return (
        by_scores and keep_ratio is not None and math.ceil(epochs / policy.period) * keep_ratio <= 1
    )


def _owner(cls: type, method: str) -> type:
    """The class, behind the mixin, whose method the mixin's calls."""
    behind = cls.__mro__[cls.__mro__.index(DynamicPruningMixin) + 1 :]
    return next(owner for owner in behind if method in vars(owner))


def _check_stream(dataset: Any) -> None:
    streams = IterableDataset | datasets.IterableDataset
    if dataset is not None and (isinstance(dataset, streams) or not hasattr(dataset, "__len__")):
        raise ValueError(
            f"A {type(dataset).__name__} is a stream: it has no sample index, so nothing in it can be pruned. Load it as a "
            "map-style dataset (`load_dataset(..., streaming=False)`), or use pruning=None."
        )


def _base_model(model: Any) -> torch.nn.Module:
    """The model below PEFT's wrapper, if there is one: its class says which head it has."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def dataset_fingerprint(dataset: Any) -> str:
    """Identifies a dataset across processes: N, and for a `datasets.Dataset` its columns and 64 evenly spaced raw rows.

    `_fingerprint` of datasets would not do: it changes from process to process.
    """
    n = len(dataset)
    if not isinstance(dataset, datasets.Dataset):
        return f"{n} samples"
    rows = dataset.with_format("arrow")[sorted({i * n // 64 for i in range(64)})].to_pylist()
    content = json.dumps([dataset.column_names, rows], default=repr, sort_keys=True)
    return f"{n} samples, {hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _content(folder: Path) -> dict[str, list]:
    """What is in a checkpoint beside our file and the Trainer's state, which follows it: name -> [bytes, xxh3 of 128 bits].

    Cost: reads all of it, from the page cache where it was just written.
    """
    content: dict[str, list] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (
            path.is_file()
            and name not in (STATE_FILE, TRAINER_STATE_NAME)
            and not name.endswith(".tmp")
        ):
            digest = xxhash.xxh3_128()
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
            content[name] = [path.stat().st_size, digest.hexdigest()]
    return content


def _fault_of_checkpoint(folder: Path, stock: bool) -> str | None:
    """Why a run cannot be resumed from the folder; None if it can. `stock`: our file may be missing."""
    try:
        step = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"its {TRAINER_STATE_NAME} cannot be read ({error!r})"
    try:
        _, metadata = load_tensors(folder / STATE_FILE)
    except FileNotFoundError:
        if stock:
            return None
        return (
            f"it has no {STATE_FILE}: it was written by a stock Trainer, or with save_only_model=True. To go on from it "
            "without scores, train(..., stock_checkpoint=True)"
        )
    except ValueError as error:
        return str(error)
    if metadata["step"] != step:
        return f"its {TRAINER_STATE_NAME} is of step {step}, its {STATE_FILE} of step {metadata['step']}"
    found = _content(folder)
    for name, written in metadata.get("files", {}).items():
        if name not in found:
            return f"its {name} is missing"
        if found[name] != written:
            return f"its {name} is damaged: {found[name][0]} bytes, {written[0]} were written, or their checksum differs"
    return None


def _complete_checkpoint(
    wanted: str | os.PathLike[str] | bool, output_dir: str, stock: bool = False
) -> str:
    """The checkpoint to resume from: the newest complete one in output_dir for True, else the named one, if complete."""
    if not isinstance(wanted, bool):
        fault = _fault_of_checkpoint(Path(wanted), stock)
        if fault:
            raise ValueError(
                f"Cannot resume from {wanted}: {fault}. Name another checkpoint, or pass resume_from_checkpoint=True for "
                "the newest complete one."
            )
        return str(wanted)
    found = [
        (int(m[1]), p)
        for p in Path(output_dir).glob("checkpoint-*")
        if (m := re.fullmatch(r"\D+-(\d+)", p.name))
    ]
    for _, folder in sorted(found, reverse=True):
        fault = _fault_of_checkpoint(folder, stock)
        if not fault:
            return str(folder)
        logger.warning("Skipping the checkpoint %s: %s.", folder, fault)
    raise ValueError(
        f"There is no complete checkpoint in {output_dir} ({len(found)} found): start the run without "
        "resume_from_checkpoint."
    )
