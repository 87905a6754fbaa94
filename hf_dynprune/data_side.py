"""PrunedDataMixin: the Trainer trains on the samples that a policy chooses. It needs no loss.

    super().get_train_dataloader() ──dataset, collator, workers──▶ our loader, our sampler ──▶ batch
                                                                                                 │
    pruner ◀── observe(index) ── get_batch_samples, or compute_loss of the loss side ◀───────────┘

It sees to the loader, the lengths of epochs, the learning rate, checkpoints, the report and the
card. [`SampleLossMixin`] adds the losses of single samples.
"""

import inspect
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import HPSearchBackend
from transformers.utils import logging

from . import checkpoints, distributed
from .identity import OWN, dataset_fingerprint
from .policies import PruningPolicy
from .potential import Magnitude
from .provenance import provenance_of
from .pruner import DynamicPruner
from .report import PruningReport
from .sampler import SAMPLE_INDEX, IndexedCollator, IndexedDataset
from .schedule import RunShape, is_choice, is_full_data
from .table import Memory
from .upstream import UpstreamMends, start_workers

logger = logging.get_logger(f"transformers.{__name__}")

_PACKAGE = __name__.partition(".")[0]

# The names that this file leans on and that are private, or public but not documented.
SEAMS = {
    "Trainer.set_initial_training_values": "the numbers of epochs and steps are the pruned run's",
    "Trainer._init_training_state": "the earliest place that knows the checkpoint and the state in "
    "it; it says where the run continues",
    "Trainer._run_epoch": "the length of each epoch is an argument of it; otherwise it is that of "
    "the first epoch",
    "Trainer._save_rng_state": "runs on every rank, after the weights and before "
    "trainer_state.json, the upload and the rotation; on_save comes after all three",
    "Trainer._maybe_log_save_evaluate": "runs after each step; then the step is known at which the "
    "next share of the run is done",
    "Trainer._hp_search_setup": "the trial's values reach the arguments here, and fields of the "
    "policy the policy",
    "Trainer._get_train_sampler": "a class that overrides it chooses the data and is refused",
    "LengthGroupedSampler.lengths": "the lengths by which the Trainer groups samples; its "
    "batch_size is the number of samples of an optimizer step on one rank",
    "trainer_pt_utils.get_length_grouped_indices": "the Trainer's order by length; it gets the "
    "kept samples and our generator",
    "Trainer.save_model(_internal_call)": "saves without an upload, which would save again",
    "Trainer.is_deepspeed_enabled": "parts of the model lie on several ranks, so all ranks make "
    "the same passes; a warning says what was verified",
    "Trainer.is_fsdp_enabled": "the same",
    "Trainer.get_tp_size": "several ranks train one batch, which is refused",
    "Trainer.get_cp_size": "the same",
    "Trainer.get_sp_size": "the same",
    "Trainer.hub_model_id": "the repository that an upload went to",
    "Trainer._trial": "the trial of a search, which the names of its folders come from",
    "LambdaLR._last_lr": "the logged learning rate of the first step of an epoch whose plan scales "
    "it",
    "ProgressCallback.training_bar": "the bar's total is the true number of steps",
    "NotebookProgressCallback.training_tracker": "the same in a notebook",
}

# What our loader takes over from the Trainer's.
_INHERITED = (
    "num_workers",
    "pin_memory",
    "timeout",
    "persistent_workers",
    "multiprocessing_context",
    "prefetch_factor",
    "in_order",
    "worker_init_fn",
)


def run_shape(
    args: TrainingArguments,
    samples: int,
    *,
    batch_size: int | None = None,
    drop_last: bool | None = None,
) -> RunShape:
    """The shape of a run with these arguments.

    Args:
        args: The Trainer's.
        samples: N, the number of training samples.
        batch_size, drop_last: *Optional*, by default those of `args`.
    """
    max_steps = args.max_steps if args.max_steps > 0 else None
    return RunShape(
        samples,
        args.train_batch_size if batch_size is None else batch_size,
        num_epochs=None if max_steps else args.num_train_epochs,
        max_steps=max_steps,
        accumulation=args.gradient_accumulation_steps,
        drop_last=args.dataloader_drop_last if drop_last is None else drop_last,
        ranks=args.world_size,
    )


class CardMixin(UpstreamMends):
    """The card of a pruned run, and its upload. Without a run both are the Trainer's."""

    pruner: DynamicPruner | None

    def _has_record(self) -> bool:
        return (
            self.pruning is not None and self.pruner is not None and bool(self.pruner.report.epochs)
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card, `report.json` and, if matplotlib is installed, a picture.

        The card states the Trainer's facts, what was pruned, what it cost and how to repeat it.
        Takes the Trainer's arguments, and those of [`hf_dynprune.model_card.CardArguments`]:
        `full=` and `short=`, reports to compare with, and `other_seeds=`.
        """
        if not self._has_record():
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            from .model_card import write_card

            write_card(self, Path(self.args.output_dir or "."), *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the model, its card, `report.json` and the picture.

        As the Trainer does, this uploads all other files of `output_dir`, too, except checkpoints
        and names that begin with `_`. Keep private files elsewhere.

        Takes the Trainer's arguments, and those of `create_model_card`.

        Raises:
            RuntimeError: If the upload fails. All files are in `output_dir` by then. The message
                says how to continue.
        """
        if not self._has_record():
            return super().push_to_hub(*args, **kwargs)
        # The Trainer asks the Hub for the repository first, and saves then. Without a network
        # nothing would be saved. Writing twice costs little beside an upload.
        folder = self.args.output_dir or "."
        self.save_model(folder, _internal_call=True)
        stock = inspect.signature(Trainer.push_to_hub).parameters
        self.create_model_card(**{name: v for name, v in kwargs.items() if name not in stock})
        repo_id = self.hub_model_id or self.args.hub_model_id or Path(folder).absolute().name
        left_out = ("--exclude", "checkpoint-*", "--exclude", "_*")
        with uploading(folder, repo_id, "trainer.push_to_hub()", *left_out):
            return super().push_to_hub(*args, **kwargs)


class PrunedDataMixin(CardMixin):
    """Adds `pruning=` to a Trainer with any loss.

    Longer than other classes, because the loader, the lengths, the rates and the checkpoints of a
    run are all methods of one Trainer.

    Alone it serves policies that observe nothing, such as [`RandomPruning`], and subclasses that
    observe signals of their own. Such a subclass names them in `observed_signals`, takes
    `sample_index` out of each batch, and calls `self.pruner.observe(index, signals)` once a batch:

    ```python
    class PrunedRewardTrainer(PrunedDataMixin, RewardTrainer):
        def observed_signals(self):
            return (*super().observed_signals(), "reward_std")
    ```

    Args:
        pruning: The policy; None is the stock Trainer.

    All other arguments are the Trainer's.

    Attributes:
        pruner: The [`DynamicPruner`] of the current run, or of the last one.
        memory: What is remembered of each sample beside what the policy remembers. *Optional*, set
            it before `__init__`.

    Raises:
        TypeError, ValueError: At construction, if something cannot be pruned.
    """

    memory: Memory | None = None
    # Batches of the epoch that the loop has fetched.
    _fetched = 0
    # The training set whose fingerprint is known, its length and the fingerprint.
    _identified: tuple[Any, int, str] | None = None
    # The classes whose order of the training data pruning may replace.
    _replaced_orders: tuple[type, ...] = (Trainer,)
    # Optimizer steps of the run as the loop knows them; 0 before the first run.
    _loop_steps = 0
    # What is logged of an epoch, until the Trainer logs a loss.
    _waiting_logs: Mapping[str, float] = {}
    # The policy that was given, and the one that a search made of it.
    _searched: tuple[PruningPolicy, PruningPolicy] | None = None
    # The scheduler that follows the budget; None if a user's scheduler is in force.
    _following: LambdaLR | None = None

    def __init__(self, *args: Any, pruning: PruningPolicy | None = None, **kwargs: Any) -> None:
        _check_class(type(self))
        self.pruning = pruning
        self.pruner = None
        # The last loader of get_train_dataloader, its pruner and its collator, for the loop.
        self._made: tuple[DataLoader, DynamicPruner, Any] | None = None
        if pruning is not None:
            # Before trl prepares the data, which may take hours.
            _check_policy(pruning)
            # transformers' own message about streams asks for max_steps, which would not help.
            _check_stream(kwargs.get("train_dataset"))
            for given in (*args, *kwargs.values()):
                if isinstance(given, TrainingArguments):
                    _check_order(self, given)
        super().__init__(*args, **kwargs)
        if pruning is None:
            return
        _check_settings(self)
        _check_dataset(self.train_dataset, self.args)
        # Each run makes its own. This one finds out now what does not fit together.
        self.pruner = self._make_pruner(self._planned_shape())
        self._prepare_observation(self.pruner)
        if pruning.looks_once(self.pruner.shape, self.pruner.num_epochs):
            logger.warning(
                "%s chooses by scores, and the run is too short for them (epochs: %d): never "
                "observed samples come first, so nearly all samples are trained once before any is "
                "trained twice. The choice is then as random as RandomPruning's. To let scores "
                "decide, train longer, keep more, or begin with full-data epochs (first=1).",
                pruning,
                self.pruner.num_epochs,
            )

    # ---- signals ----

    def observed_signals(self) -> tuple[str, ...]:
        """The signals that this class observes of each sample; a policy may ask for these."""
        return ()

    def _prepare_observation(self, pruner: DynamicPruner) -> None:
        """Raise ValueError at construction if the policy asks for a signal that nobody observes."""
        observed = self.observed_signals()
        if pruner.policy.scoring != "trained":
            observed = self._scored_signals()
        for name in pruner.scored_signals:
            if name not in observed:
                raise ValueError(
                    f"{pruner.policy} asks for the signal {name!r}, which {type(self).__name__} "
                    f"does not observe (it observes {', '.join(map(repr, observed)) or 'none'}): "
                    "use another signal, or name it in `observed_signals` of a subclass that "
                    "observes it."
                )

    def _scored_signals(self) -> tuple[str, ...]:
        """The signals that forward passes observe, for policies with a `scoring`."""
        return ()

    def _takes_index(self) -> bool:
        """Whether the class takes `sample_index` out of the batches and observes them itself."""
        assert self.pruner is not None
        return bool(self.pruner.signals)

    # ---- data ----

    def _planned_shape(self) -> RunShape:
        """The shape of a run, as the arguments tell it."""
        return run_shape(self.args, len(cast(Any, self.train_dataset)))

    def _shape_of(self, stock: DataLoader) -> RunShape:
        """The shape of a run on the loader of the Trainer, which is checked."""
        samples = len(cast(Any, self.train_dataset))
        _check_loader(stock, samples, self.args.train_sampling_strategy)
        batches: Any = stock.batch_sampler
        return run_shape(
            self.args, samples, batch_size=batches.batch_size, drop_last=batches.drop_last
        )

    def _indexed(self, collator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The collator, whose batches know their samples."""
        # Without signals, weights and padding no row is told from another.
        pruner = cast(DynamicPruner, self.pruner)
        plain = not pruner.signals and not pruner.policy.weighs and pruner.shape.ranks == 1
        return IndexedCollator(collator, any_order=plain)

    def _fingerprint(self) -> str:
        """The identity of the training set, which is looked at once unless it brings its own."""
        dataset, n = self.train_dataset, len(cast(Any, self.train_dataset))
        known = None if hasattr(dataset, OWN) else self._identified
        if known is None or known[0] is not dataset or known[1] != n:
            self._identified = known = dataset, n, dataset_fingerprint(dataset)
        return known[2]

    def _magnitude(self) -> Magnitude | None:
        """What stands in for the size of a sample's gradient, if something observed does."""
        return None

    def _make_pruner(self, shape: RunShape) -> DynamicPruner:
        return DynamicPruner(
            cast(PruningPolicy, self.pruning),
            shape,
            seed=self.args.seed,
            data_seed=self.args.data_seed,
            fingerprint=self._fingerprint(),
            memory=self.memory,
            magnitude=self._magnitude(),
        )

    @property
    def pruning_report(self) -> PruningReport | None:
        """The record of the current run, or of the last one; None with `pruning=None`."""
        return None if self.pruner is None else self.pruner.report

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own loader, over the samples that the pruner chooses.

        Called outside `train()`, it gives the batches of the first epoch without a choice: all
        samples in random order, as the Trainer's loader, without `sample_index`.
        """
        stock = super().get_train_dataloader()
        if self.pruning is None:
            return stock
        batches: Any = stock.batch_sampler
        pruner = self._make_pruner(self._shape_of(stock))
        pruner.sampler.strategy, pruner.sampler.arrange = _order_of(stock)
        first = pruner.sampler.order_of(None, pruner.data_seed, 0)
        pruner.sampler.set_epoch_order(first)
        collator: Any = self._indexed(cast(Any, stock.collate_fn))
        collator.marks = False
        loader = self.accelerator.prepare(
            DataLoader(
                IndexedDataset(stock.dataset),
                batch_size=batches.batch_size,
                sampler=pruner.sampler,
                collate_fn=collator,
                drop_last=batches.drop_last,
                **{name: getattr(stock, name) for name in _INHERITED},
            )
        )
        self._made = (loader, pruner, collator)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of an optimizer step, counted here unless the class observes them itself."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.pruner is not None and not self._takes_index():
            for batch in batches:
                if SAMPLE_INDEX in batch:  # no model expects it
                    self.pruner.observe(batch.pop(SAMPLE_INDEX))
        return batches, items

    # ---- length and learning rate ----

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple:
        """The Trainer's numbers, with the epochs and steps of the pruned run."""
        values = super().set_initial_training_values(args, dataloader)
        if self.pruning is None:
            return values
        made, self._made = self._made, None
        if made is None or made[0] is not dataloader:
            raise RuntimeError(
                "The Trainer trains from another loader than the one that PrunedDataMixin made: "
                f"let {type(self).__name__}.get_train_dataloader return what its super() returns."
            )
        _, self.pruner, collator = made
        collator.marks = True
        self._operations, self._waiting_logs = None, {}
        _, _, num_examples, num_train_samples, batch_size, steps_in_epoch, _ = values
        clock = self.pruner.clock
        self._loop_steps = clock.total_steps()
        return (
            clock.num_epochs,
            clock.length,
            num_examples,
            num_train_samples,
            batch_size,
            steps_in_epoch,
            self._loop_steps,
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The Trainer's scheduler, evaluated at the virtual steps of the run's clock.

        A subclass may ask for a longer or shorter schedule than that of the run:
        `super().create_scheduler(2 * num_training_steps, optimizer)`.
        """
        if self.pruning is None or self.pruner is None:
            return super().create_scheduler(num_training_steps, optimizer)
        pruner = self.pruner
        if self.lr_scheduler is not None:
            logger.warning(
                "The learning-rate scheduler that was passed in stays as it is: make sure that it "
                "was made for the %d optimizer steps of the pruned run. To let the Trainer make "
                "one for them, pass optimizers=(optimizer, None) and set lr_scheduler_type.",
                pruner.clock.total_steps(),
            )
            return super().create_scheduler(num_training_steps, optimizer)
        total, steps = pruner.clock.total, self._loop_steps or pruner.clock.total_steps()
        if num_training_steps != steps:  # a subclass asks for it
            total = max(1, round(total * num_training_steps / steps))
        scheduler = super().create_scheduler(total, optimizer)
        if isinstance(scheduler, LambdaLR):
            _follow_budget(scheduler, pruner)
            self._following = scheduler
        return scheduler

    def _renew_total(self, total: int) -> None:
        """Write the true number of steps to the state and to the progress bar."""
        self.state.max_steps = total
        for callback in self.callback_handler.callbacks:
            for name in ("training_bar", "training_tracker"):
                bar = getattr(callback, name, None)
                if bar is not None:
                    bar.total = total

    def _now(self) -> dict[str, Any]:
        """Where the run stands: what the pruner records of the Trainer."""
        rate = float(cast(torch.optim.Optimizer, self.optimizer).param_groups[0]["lr"])
        return {"step": self.state.global_step, "learning_rate": rate}

    # ---- the run ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        stock_checkpoint: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Train. All arguments but one are the Trainer's.

        Args:
            resume_from_checkpoint: The folder of a checkpoint, or True for the newest complete one
                in `output_dir`.
            stock_checkpoint: Also continue from a checkpoint of the stock Trainer. It has no
                scores: the table starts empty, an interrupted epoch starts again, and earlier
                epochs are charged as full-data epochs.

        After an error or Ctrl-C, `pruning_report` describes what was trained so far.

        Raises:
            TypeError, ValueError: If the checkpoint is not complete or belongs to another run.
                Nothing has changed then.
        """
        if self.pruning is not None:
            # A rank alone would wait for the others forever.
            distributed.check_same({"resume_from_checkpoint": bool(resume_from_checkpoint)})
        if self.pruning is not None and resume_from_checkpoint:
            requested, folder = resume_from_checkpoint, self.args.output_dir or "."
            # Rank 0 looks: all ranks continue from the same checkpoint, and its files are read
            # once.
            resume_from_checkpoint = distributed.from_rank_0(
                lambda: checkpoints.complete_checkpoint(requested, folder, stock=stock_checkpoint)
            )
            self._loading_from = resume_from_checkpoint
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._loading_from = None
        if self.pruner is not None and self.state.global_step and not self.pruner.report.epochs:
            raise RuntimeError(
                f"{type(self).__name__} trained {self.state.global_step} steps in a loop of its "
                "own, so nothing was pruned: use a DynamicPruner in that loop, or pruning=None."
            )
        return output

    def _hp_search_setup(self, trial: Any) -> None:
        """Also set fields of the policy, such as `keep_ratio`, as the trial has them."""
        policy = self.pruning
        if self._searched is not None and self._searched[1] is policy:
            self.pruning = policy = self._searched[0]
        backend: Any = self.hp_search_backend
        if policy is None or trial is None or backend is None:
            return super()._hp_search_setup(trial)
        own: dict[str, Any] = {}

        def rest_of(values: Mapping[str, Any]) -> dict[str, Any]:
            own.update(_policy_fields(policy, self.args, values))
            return {name: value for name, value in values.items() if name not in own}

        if backend == HPSearchBackend.OPTUNA:
            space: Any = self.hp_space
            self.hp_space = lambda trial: rest_of(space(trial))
            try:
                super()._hp_search_setup(trial)
            finally:
                self.hp_space = space
        else:
            super()._hp_search_setup(rest_of(trial))
            self._trial = trial
        if own:
            self.pruning = replace(policy, **own)
            self._searched = policy, self.pruning
            self.pruner = self._make_pruner(self._planned_shape())
            self._prepare_observation(self.pruner)

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
        if resume_from_checkpoint is not None:
            position = checkpoints.resume(
                self.pruner,
                resume_from_checkpoint,
                self.state,
                restart_epoch=self.args.ignore_data_skip,
            )
        self._loading_from = None  # what is loaded from here on is the best model
        self.pruner.report.provenance = provenance_of(self, self._fingerprint())
        _announce_length(self.pruner, position[0], self.state.global_step)
        self._passes_before = self.pruner.report.totals["forward_passes"]
        return position

    def _run_epoch(self, **loop: Any) -> None:  # type: ignore[override]  # the loop passes names
        if self.pruning is None or self.pruner is None:
            return super()._run_epoch(**loop)
        try:
            self._run_pruned_epoch(self.pruner, loop)
        except BaseException:  # also Ctrl-C, and a trial that was given up
            self.pruner.interrupt(**self._now())
            raise

    def _run_pruned_epoch(self, pruner: DynamicPruner, loop: dict[str, Any]) -> None:
        epoch, loader = loop["epoch"], loop["train_dataloader"]
        records = len(pruner.report.epochs)
        scorer = self._begin_epoch(epoch)
        pruner.begin_epoch(epoch, step=self.state.global_step, scorer=scorer)
        if self._following is not None and self._following is self.lr_scheduler:
            _renew_learning_rate(self._following)
        self._renew_total(pruner.clock.total_steps())
        begins = len(pruner.report.epochs) > records  # not resumed in the middle of an epoch
        # With the first loss of the epoch: readers of a log expect a loss in each training entry.
        self._waiting_logs = {}
        if begins or not _logged_since(self.state.log_history, epoch):
            self._waiting_logs = _epoch_logs(pruner.report)
        self._resolve_shares()
        loop["steps_in_epoch"] = len(loader)
        loop["num_update_steps_per_epoch"] = pruner.clock.length
        resumes = loop["resume_from_checkpoint"] and epoch == loop["epochs_trained"]
        if self.args.dataloader_persistent_workers and resumes:
            start_workers(loader)
        batches, steps = pruner.batches_done, self.state.global_step
        self._fetched = batches
        super()._run_epoch(**loop)
        if pruner.batches_done == batches and self.state.global_step > steps:
            raise self._unobserved()
        pruner.end_epoch(**self._now())
        _announce_length(pruner, epoch + 1, self.state.global_step)

    def _begin_epoch(self, epoch: int) -> Callable[[torch.Tensor], Mapping[str, Any]] | None:
        """Get ready for an epoch; return what scores samples by forward passes, or None."""
        # Accelerate tells a dataset its epoch only if the sampler has none to be told.
        tell_epoch(self.train_dataset, epoch)
        return None

    def _unobserved(self) -> RuntimeError:
        name = type(self).__name__
        return RuntimeError(
            f"{name}.compute_loss does not call super().compute_loss, so no sample was observed: "
            "let it call DynamicPruningTrainer's, or mix DynamicPruningMixin with the class that "
            "has it and pass `per_sample_loss_fn=`."
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.pruning is not None:
            self._resolve_shares()

    def _resolve_shares(self) -> None:
        """Say at which step the next share of the run is done, if lengths depend on the data.

        The Trainer resolves `eval_steps=0.25` once, by the number of steps. If that is not known
        beforehand, the share is one of the epochs.
        """
        pruner = cast(DynamicPruner, self.pruner)
        if pruner.clock.is_exact:
            return
        for kind in ("logging", "eval", "save"):
            share = getattr(self.args, f"{kind}_steps")
            if share is not None and 0 < share < 1:
                step = pruner.clock.next_step(self.state.global_step, share)
                # The Trainer acts at multiples of it. The first is the step itself.
                setattr(self.state, f"{kind}_steps", step)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log. Its samples per second are those that were trained.

        The first loss of an epoch is logged with the numbers of its choice.
        """
        if self.pruning is not None and self.pruner is not None:
            if "loss" in logs:
                logs.update(self._waiting_logs)
                self._waiting_logs = {}
            self.pruner.drain()  # the Trainer has just synchronised with the device, too
            seconds = logs.get("train_runtime", 0.0)
            if "train_samples_per_second" in logs and seconds > 0:
                passes = self.pruner.report.totals["forward_passes"] - self._passes_before
                logs["train_samples_per_second"] = round(passes / seconds, 3)
            share = self.pruner.report.effective_share
            if "train_runtime" in logs and share is not None:
                logs["pruning/effective_share"] = share  # of the last epoch: none begins after it
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation, which the report notes."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        # Several datasets are evaluated by one call each, and noted there.
        if self.pruner is not None and not isinstance(given, dict):
            self.pruner.add_evaluation(metrics, best_step=self._best_step())
        return metrics

    def _best_step(self) -> int | None:
        """The optimizer step of the model's weights if the run has loaded its best ones.

        None if the model has the last weights.
        """
        args, state = self.args, self.state
        loads = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self.is_in_train or not loads or state.best_global_step == state.global_step:
            return None
        return state.best_global_step

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.pruning is not None and self.pruner is not None:
            checkpoints.save(
                self.pruner,
                output_dir,
                writes=self.args.should_save,
                epoch_over=self.control.should_epoch_stop,
                **self._now(),
            )


# ---- length and learning rate --------------------------------------------------------------------


def _announce_length(pruner: DynamicPruner, epoch: int, step: int) -> None:
    """Give the loader the length of an epoch before its choice, for callbacks on `on_epoch_begin`.

    Nothing changes if the length depends on the data, or if the run is over.
    """
    policy, n, budget = pruner.policy, pruner.shape.samples, pruner.shape.budget
    if budget.is_spent(epoch, step):
        return
    progress = budget.progress(epoch, step)
    size: int | None
    if len(pruner.report.epochs) > epoch:  # resumed in the middle of it
        size = pruner.report.epochs[epoch].samples
    elif is_full_data(policy, epoch, progress):
        size = n
    elif pruner.plan is None or is_choice(policy, epoch, has_plan=True):
        size = policy.planned_size(n, epoch, progress)
    else:
        size = len(pruner.plan)
    if size is not None:
        pruner.sampler.set_epoch_order(torch.arange(size))


def _follow_budget(scheduler: LambdaLR, pruner: DynamicPruner) -> None:
    """Evaluate the schedule at the virtual steps of the run's clock, scaled by the plan."""

    def follow(schedule: Callable[..., float]) -> Callable[[int], float]:
        return lambda step: schedule(pruner.clock.virtual(step)) * pruner.lr_scale

    lambdas: Any = [follow(schedule) for schedule in scheduler.lr_lambdas]
    scheduler.lr_lambdas = lambdas


def _renew_learning_rate(scheduler: LambdaLR) -> None:
    """Apply the schedule to the epoch that begins: its plan may scale the first step's rate."""
    groups = scheduler.optimizer.param_groups
    for group, base, schedule in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * schedule(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]  # what is logged


# ---- hub and dataset -----------------------------------------------------------------------------


@contextmanager
def uploading(
    folder: str | os.PathLike[str], repo_id: str, call: str, *options: str
) -> Iterator[None]:
    """Turn a failed upload into an error that says what happened and how to continue.

    Args:
        folder: What is uploaded.
        repo_id: Where it is uploaded to.
        call: The Python call that uploads it again.
        options: Of `hf upload`, which does the same from the command line.
    """
    try:
        yield
    except Exception as error:  # of the connection, the login or the Hub: no common class
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *options])
        raise RuntimeError(
            f"The upload to {repo_id} failed ({type(error).__name__}: {str(error).strip()}). "
            f"Nothing is lost: all files are in {folder}. Check the network, log in with a token "
            f"that may write there (`hf auth login`), and call {call} again. If this process has "
            f"ended, use `{command}`."
        ) from error


# ---- engines -------------------------------------------------------------------------------------

# What shards a model -> what the tests run with it, and what no test runs.
_DEEPSPEED, _ACCELERATE, _TRANSFORMERS = (
    "DeepSpeed",
    "FSDP through accelerate",
    "FSDP2 through from_pretrained(distributed_config=...)",
)
_VERIFIED = {
    _DEEPSPEED: (
        "ZeRO 1, 2 and 3 in float32 on two CPU processes, with resuming",
        "several GPUs, half precision, offloading, adapters",
    ),
    _ACCELERATE: (
        "FSDP2 in float32 on two and three CPU processes, with resuming from full and sharded "
        "checkpoints",
        "FSDP1, several GPUs, half precision, offloading, adapters",
    ),
    _TRANSFORMERS: (
        "training in float32 on two and three CPU processes",
        "several GPUs, half precision, offloading, expert parallelism, adapters",
    ),
}


def engine_of(trainer: Trainer) -> str:
    """What splits the model over the ranks, so that they talk in each pass; empty if nothing."""
    if trainer.is_deepspeed_enabled:
        return _DEEPSPEED
    if trainer.is_fsdp_enabled:
        return _ACCELERATE
    return _TRANSFORMERS if distributed.is_fully_sharded(trainer.model) else ""


def _sizes_of_groups(trainer: Trainer) -> dict[str, int]:
    """How many ranks train the same batch, for each way to split a model that does so."""
    loaded = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    return {
        "tp_size": trainer.get_tp_size() or 1,
        "cp_size": trainer.get_cp_size() or 1,
        "sp_size": trainer.get_sp_size() or 1,
        "pp_size": getattr(loaded, "pp_size", None) or 1,
    }


# ---- checks --------------------------------------------------------------------------------------


# Trainers of other libraries -> ours, which know their loss.
_OURS = {
    "SFTTrainer": "sft.DynamicPruningSFTTrainer",
    "DPOTrainer": "preference.DynamicPruningDPOTrainer",
    "RewardTrainer": "preference.DynamicPruningRewardTrainer",
    "KTOTrainer": "preference.DynamicPruningKTOTrainer",
    "ORPOTrainer": "preference_experimental.DynamicPruningORPOTrainer",
    "CPOTrainer": "preference_experimental.DynamicPruningCPOTrainer",
    "SentenceTransformerTrainer": "embedding.DynamicPruningSentenceTransformerTrainer",
    "CrossEncoderTrainer": "embedding.DynamicPruningCrossEncoderTrainer",
}


def ours_for(owner: type, trainer: type) -> str:
    """What to use instead of a class of another library; empty if there is nothing.

    Args:
        owner: The class whose method stands in the way, of the bases of `trainer`.
        trainer: The class that was mixed.
    """
    names = [cls.__name__ for cls in trainer.__mro__ if issubclass(cls, owner)]
    name = next((name for name in names if name in _OURS), None)
    return "" if name is None else f"use hf_dynprune.{_OURS[name]}, which knows the {name}."


def _check_class(trainer: type) -> None:
    if not issubclass(trainer, Trainer):
        others = [cls for cls in trainer.__mro__[1:-1] if cls.__module__.split(".")[0] != _PACKAGE]
        names = ", ".join(f"{cls.__module__}.{cls.__name__}" for cls in others) or "no other class"
        raise TypeError(
            f"{trainer.__name__} is mixed with {names}, which is not a Trainer of transformers: "
            "mix with transformers.Trainer or a class derived from it, such as Seq2SeqTrainer. In "
            "another training loop use DynamicPruner."
        )


def _check_policy(pruning: Any) -> None:
    if not isinstance(pruning, PruningPolicy):
        raise TypeError(
            f"pruning={pruning!r} is not a policy: expected one such as UCB(keep_ratio=0.3) or "
            "make_policy('ucb', keep_ratio=0.3), or None."
        )


def orders_of(trainer: Trainer) -> tuple[type, tuple[str, ...]]:
    """The class that orders the training data, and its `train_sampling_strategy` for pruning."""
    # In a class above ours or behind it.
    owner = next(cls for cls in type(trainer).__mro__ if "_get_train_sampler" in vars(cls))
    known = ("random", "group_by_length", "sequential") if owner is Trainer else ("random",)
    return owner, known


def _check_order(trainer: PrunedDataMixin, args: TrainingArguments) -> None:
    """Raise ValueError for arguments and classes that order the training data themselves."""
    owner, orders = orders_of(cast(Trainer, trainer))
    if owner not in trainer._replaced_orders:
        way_out = ours_for(owner, type(trainer)) or "remove it, or mix with another class."
        raise ValueError(
            f"{owner.__name__}._get_train_sampler chooses the training data itself, and "
            f"pruning would override it: {way_out}"
        )
    if args.train_sampling_strategy not in orders:
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} orders the training "
            f"data, and pruning does too: expected one of {', '.join(map(repr, orders))}, or use "
            "pruning=None."
        )


def _check_settings(trainer: PrunedDataMixin) -> None:
    """Raise ValueError for arguments and classes that do not go with pruning."""
    args = trainer.args
    _check_order(trainer, args)
    if not getattr(args.accelerator_config, "use_seedable_sampler", True):
        logger.warning(
            "accelerator_config: use_seedable_sampler=False has no effect with pruning: the order "
            "of an epoch follows from data_seed and the epoch, as with True. FullData() then has "
            "another order than the stock Trainer."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (nn.DataParallel) mix the samples of a batch: "
            f"start one process for each GPU with `torchrun --nproc_per_node {args.n_gpu} "
            "script.py`, or show one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    for name in ("dispatch_batches", "split_batches"):
        if args.world_size > 1 and getattr(args.accelerator_config, name, None):
            raise ValueError(
                f"accelerator_config: {name}=True does not work with pruning on several ranks: "
                "unset it."
            )
    for name, size in _sizes_of_groups(trainer).items():
        if size > 1:
            raise ValueError(
                f"{name}={size}: groups of {size} ranks train the same batch, and pruning gives "
                "each rank samples of its own: expected data parallelism alone (DDP, FSDP or "
                f"ZeRO with {name}=1), or use pruning=None."
            )
    if engine := engine_of(trainer):
        verified, rest = _VERIFIED[engine]
        warnings.warn(
            f"{engine}. Verified: {verified}. Not verified: {rest}. Compare a short run with one "
            "on DDP before you trust it.",
            stacklevel=4,
        )


def _check_dataset(dataset: Any, args: TrainingArguments) -> None:
    """Raise ValueError for a training set that cannot be pruned."""
    if dataset is None:
        raise ValueError("pruning= needs a train_dataset. To evaluate only, leave `pruning` out.")
    _check_stream(dataset)
    if len(dataset) == 0:
        raise ValueError(
            "The training dataset is empty (0 samples): check the split and the filters."
        )
    transformed = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"
    if args.remove_unused_columns and transformed:
        raise ValueError(
            "The training dataset has a transform (`with_transform`), and "
            "remove_unused_columns=True removes the columns that it reads: set "
            "remove_unused_columns=False."
        )


def _check_stream(dataset: Any) -> None:
    streams = IterableDataset | datasets.IterableDataset
    if dataset is not None and (isinstance(dataset, streams) or not hasattr(dataset, "__len__")):
        raise ValueError(
            f"A {type(dataset).__name__} is a stream. Its samples have no index, so none can be "
            "pruned: load it as a map-style dataset (`load_dataset(..., streaming=False)`), or use "
            "pruning=None."
        )


def _check_loader(loader: DataLoader, samples: int, strategy: str) -> None:
    """Raise ValueError unless the loader goes through the training set in a known order.

    That is a random one or, if `strategy` is "sequential", that of the dataset.
    """
    dataset: Any = loader.dataset
    if not hasattr(dataset, "__len__") or len(dataset) != samples:
        size = len(dataset) if hasattr(dataset, "__len__") else "no"
        raise ValueError(
            f"The loader of get_train_dataloader has {size} samples, the train_dataset has "
            f"{samples}: expected the same samples in the same order."
        )
    batches, sampler = _sampler_of(loader)
    known = isinstance(sampler, RandomSampler | DistributedSampler | LengthGroupedSampler)
    known |= strategy == "sequential" and isinstance(sampler, SequentialSampler)
    if not known or getattr(sampler, "replacement", False) or not hasattr(batches, "batch_size"):
        raise ValueError(
            f"The loader of get_train_dataloader has a {type(sampler).__name__}, which chooses or "
            "orders the training data itself, and pruning would override it: shuffle uniformly "
            "(shuffle=True), or use pruning=None."
        )


def _sampler_of(loader: DataLoader) -> tuple[Any, Any]:
    """The batch sampler of a loader without accelerate's wrapper, and its sampler."""
    batches: Any = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):  # accelerate's share of a rank
        batches = batches.batch_sampler
    return batches, getattr(batches, "sampler", batches)


def _order_of(
    loader: DataLoader,
) -> tuple[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None]:
    """The order of the Trainer's loader: `strategy` and `arrange` of a `PruningSampler`."""
    sampler = _sampler_of(loader)[1]
    if isinstance(sampler, LengthGroupedSampler):
        return "grouped", partial(_grouped, sampler.lengths, sampler.batch_size)
    if isinstance(sampler, SequentialSampler):
        return "sequential", _as_stored
    return "random", None


def _grouped(
    lengths: Sequence[int], batch_size: int, kept: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The kept samples in transformers' order by length."""
    own = [lengths[i] for i in kept.tolist()]
    order = get_length_grouped_indices(own, batch_size, generator=generator)
    return kept[torch.tensor(order)]


def _as_stored(kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The kept samples in the order of the dataset."""
    return kept


def tell_epoch(dataset: Any, epoch: int) -> None:
    """Tell a dataset that follows the epochs, such as one that augments, which one begins."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)


def _policy_fields(
    policy: PruningPolicy, args: TrainingArguments, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of a trial's values that are fields of the policy and no training arguments.

    Raises:
        ValueError: If a share to keep or to prune is not a field of the policy.
    """
    names = [entry.name for entry in fields(policy)]
    for name in ("keep_ratio", "prune_ratio"):
        if name in values and name not in names:
            raise ValueError(
                f"hp_space has {name}={values[name]!r}, and {policy} has no such field: expected "
                f"one of {', '.join(names)}, or a training argument."
            )
    return {
        name: value for name, value in values.items() if name in names and not hasattr(args, name)
    }


def _logged_since(history: list[dict[str, Any]], epoch: int) -> bool:
    """Whether the numbers of an epoch that is resumed were logged before."""
    return any("pruning/kept_samples" in entry and entry["epoch"] > epoch for entry in history)


def _epoch_logs(report: PruningReport) -> dict[str, float]:
    record = report.epochs[-1]
    logs = {
        "pruning/kept_samples": record.samples,
        "pruning/kept_share": record.samples / report.num_samples,
        "pruning/choosing_seconds": record.seconds["choosing"],
    }
    if record.scoring_passes:
        logs["pruning/scoring_seconds"] = record.seconds["scoring"]
    if report.effective_share is not None:  # at the end of the epoch before
        logs["pruning/effective_share"] = report.effective_share
    return {**logs, **{f"pruning/score_{name}": value for name, value in record.scores.items()}}
