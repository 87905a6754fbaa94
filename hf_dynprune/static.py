"""Scores for static pruning, made before the run, and what they really cost."""

import copy
import difflib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import datasets
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from . import distributed
from .arguments import TRAINING_SETTINGS
from .policies import EpochPlan, FullData, PruningPolicy, check_count
from .report import describe_environment
from .scores import Column, Rows, SampleTable, Scores
from .scoring import gradient_norms, loss_left_out
from .trainer import DynamicPruningTrainer, _complete_checkpoint

SCORES_FILE = "scores.safetensors"
_SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Method:
    """How a score is made: its published protocol.

    Args:
        epochs: of training before the model scores; None is the whole run.
        runs: how many runs, each from its own seed, are combined.
        signal: what forward passes of the trained model observe; None where the score is made otherwise.
        combined: over runs.
    """

    epochs: int | None
    runs: int
    signal: str | None = None
    combined: Literal["mean", "sum"] = "mean"


METHODS = {
    "el2n": Method(20, 10, "el2n"),
    "grand": Method(20, 10),
    "grand-last-layer": Method(20, 10),
    "forgetting": Method(None, 5, combined="sum"),
    "loss": Method(20, 10, "loss"),
    "margin": Method(20, 10, "margin"),
    "entropy": Method(20, 10, "entropy"),
}


def score_dataset(
    method: str,
    model_init: Callable[..., nn.Module],
    args: TrainingArguments,
    train_dataset: Any,
    *,
    runs: int | None = None,
    epochs: float | None = None,
    seeds: Sequence[int] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    data_collator: Callable[[Any], Any] | None = None,
    per_sample_loss_fn: Callable[..., Tensor] | str | None = None,
    scoring_dataset: Any = None,
    **trainer_arguments: Any,
) -> Scores:
    """Scores each training sample for [`StaticPruning`]: trains on all data, several times, and scores with each model.

        el2n               || softmax(f(x)) - onehot(y) ||_2, mean over runs
        grand              || gradient of the sample's loss ||_2 over all trainable parameters, mean over runs
        grand-last-layer   the same over the last linear layer alone: an approximation, from forward passes
        forgetting         how often a sample went from classified rightly to wrongly between two of its presentations in
                           training; one that was never right in a run counts the number of presentations; summed over runs
        loss, margin, entropy   mean over runs; margin: highest probability of another class less that of the label's

    High is hard with each of them. All but forgetting are taken in eval mode, when `epochs` epochs of the run that `args`
    describes (its learning rates follow `num_train_epochs`) are done; forgetting events are counted during training, in
    train mode and under its augmentation.

    The defaults are those of the papers: EL2N after 20 epochs, 10 runs; forgetting over the whole training, 5 runs; GraNd 10
    runs. GraNd was published at initialisation, too (`epochs=0`): that did not reproduce, a restored checkpoint was at fault
    (Kirsch 2023, arXiv 2303.14753), so the default here is after 20 epochs. The last three, which have no protocol of their
    own, follow EL2N's.

    Each finished run leaves `run-SEED.safetensors` in `output_dir`, and a later call with the same settings takes it from
    there; more seeds may be added. An interrupted run goes on from its newest complete checkpoint in `run-SEED`, if `args`
    saves any. On several ranks each scores its share; `output_dir` must be one that all of them see.

    Args:
        method: a name in `METHODS`.
        model_init: makes the model anew, as the Trainer's argument of that name; called under the seed of each run.
        args: of the run; `seed`, `data_seed` and `output_dir` are replaced, and nothing is evaluated or pushed.
        train_dataset: the samples, map-style.
        runs: number of runs, *optional*, defaults to the method's, or to the number of seeds.
        epochs: after how many epochs to score, *optional*, defaults to the method's; at the most `args.num_train_epochs`.
        seeds: of the runs, *optional*, defaults to `args.seed`, `args.seed + 1`, ...
        output_dir: for what the runs leave, *optional*, defaults to a folder with the method's name in `args.output_dir`.
        data_collator, per_sample_loss_fn, scoring_dataset: as in [`DynamicPruningTrainer`]; give a scoring dataset without
            augmentation.
        trainer_arguments: more of its arguments.

    Returns:
        The scores, saved as `output_dir/scores.safetensors`. Their provenance has what they cost: `passes`, by kind, and
        `seconds`.

    Raises:
        TypeError, ValueError: before anything is trained, for an unknown method, numbers out of range, a task that does not
            have the signal, and an output_dir with scores of other settings, with both values. After a run, for scores that
            are NaN.

    Cost: runs * (epochs * N passes, and N / 3 for forward passes over all samples, or N for GraNd).

    Papers: Paul, Ganguli, Dziugaite, NeurIPS 2021, arXiv 2107.07075 (EL2N, GraNd); Toneva et al., ICLR 2019, arXiv
    1812.05159 (forgetting events; code mtoneva/example_forgetting).
    """
    how = _method(method)
    if isinstance(model_init, nn.Module) or not callable(model_init):
        raise TypeError(
            f"model_init is a {type(model_init).__name__}: wanted is a function that makes the model anew for each run, "
            "such as `lambda: AutoModelForImageClassification.from_config(config)`."
        )
    epochs = _epochs(method, how, epochs, args)
    seeds = _seeds(how, runs, seeds, args.seed)
    folder = Path(args.output_dir or ".") / method if output_dir is None else Path(output_dir)

    def trainer_of(seed: int) -> "_ScoringTrainer":
        return _ScoringTrainer(
            model_init=model_init,
            args=_arguments(args, seed, folder / f"run-{seed}"),
            train_dataset=train_dataset,
            data_collator=data_collator,
            per_sample_loss_fn=per_sample_loss_fn,
            scoring_dataset=scoring_dataset,
            pruning=_policy(method, how),
            **trainer_arguments,
        )

    trainer: _ScoringTrainer | None = trainer_of(
        seeds[0]
    )  # raises for what does not go, before anything is trained
    assert trainer is not None
    trainer.check(method)
    settings = trainer.settings(method, epochs)
    distributed.from_rank_0(lambda: _claim(folder, settings))
    parts = []
    for seed in _bar(seeds, f"{method}, runs", not args.disable_tqdm):
        path = folder / f"run-{seed}.safetensors"
        if distributed.from_rank_0(path.is_file):
            part = Scores.load(path)
            _compare(part.provenance.get("settings", {}), settings, path)
        else:
            if trainer is None or trainer.args.seed != seed:
                trainer = trainer_of(seed)
            part = trainer.scores(method, epochs, settings)
            distributed.from_rank_0(lambda part=part, path=path: part.save(path))  # type: ignore[misc]
        trainer = None
        parts.append(part)
    scores = _combined(method, how, parts, seeds)
    distributed.from_rank_0(lambda: scores.save(folder / SCORES_FILE))
    scores.path = str(folder / SCORES_FILE)
    return scores


# ---- what was asked for --------------------------------------------------------------------------


def _method(name: str) -> Method:
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"There is no method {name!r}: {hint}The methods are {', '.join(map(repr, METHODS))}."
        )
    return METHODS[name]


def _epochs(method: str, how: Method, epochs: float | None, args: TrainingArguments) -> float:
    if args.max_steps > 0:
        raise ValueError(
            f"max_steps={args.max_steps}: scores are taken after epochs; set num_train_epochs instead."
        )
    whole = args.num_train_epochs
    if epochs is None:
        epochs = whole if how.epochs is None else how.epochs
    if epochs != whole:
        check_count("epochs", epochs, 1 if method == "forgetting" else 0)
    if epochs > whole:
        raise ValueError(
            f"{method!r} is to be taken after {epochs:g} epochs, and the run has {whole:g} (num_train_epochs): give fewer "
            "`epochs`, or a longer run."
        )
    return epochs


def _seeds(how: Method, runs: int | None, seeds: Sequence[int] | None, first: int) -> list[int]:
    if runs is not None:
        check_count("runs", runs, 1)
    if seeds is None:
        return [first + run for run in range(how.runs if runs is None else runs)]
    for seed in seeds:
        check_count("a seed", seed, 0)
    if len(seeds) == 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}: wanted is at least one, and each once.")
    if runs is not None and runs != len(seeds):
        raise ValueError(f"runs={runs} and {len(seeds)} seeds: give one of the two.")
    return list(seeds)


def _arguments(args: TrainingArguments, seed: int, folder: Path) -> TrainingArguments:
    own = copy.copy(args)  # not made anew: that would set up the devices again
    own.seed, own.data_seed, own.output_dir = seed, None, str(folder)
    own.eval_strategy, own.eval_on_start, own.load_best_model_at_end = (
        IntervalStrategy.NO,
        False,
        False,
    )
    own.push_to_hub = False
    return own


def _policy(method: str, how: Method) -> PruningPolicy:
    if how.signal is not None:
        # It never chooses: the forward passes are made when the training is over.
        return _KeepAll(how.signal, scoring="all", scoring_mode="eval", first=sys.maxsize)
    return _CountForgetting() if method == "forgetting" else FullData()


# ---- policies that keep everything and watch -----------------------------------------------------


class _Watching(PruningPolicy):
    """Trains on all data, and observes it. Abstract."""

    def planned_size(self, n: int, epoch: int, progress: float) -> int:
        return n

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        return EpochPlan(torch.arange(len(table)))


@dataclass(frozen=True)
class _KeepAll(_Watching):
    """`signal` is what is observed in scoring passes."""

    signal: str = "loss"

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)


@dataclass(frozen=True)
class _CountForgetting(_Watching):
    """Counts the forgetting events of each sample.

    acc(t) in {0, 1} at the t-th presentation: an event is acc(t - 1) = 1, acc(t) = 0.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("correct"),  # at the last presentation; NaN before the first
        Column("learned", torch.bool, 0),
        Column("forgotten", torch.int32, 0),
        Column("presented", torch.int32, 0),
    )

    @property
    def signals(self) -> tuple[str, ...]:
        return ("correct",)

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        correct = signals["correct"]
        return {
            "correct": correct,
            "learned": rows["learned"] | (correct == 1),
            "forgotten": rows["forgotten"] + ((rows["correct"] == 1) & (correct == 0)),
            "presented": rows["presented"] + 1,
        }

    @staticmethod
    def count(table: SampleTable) -> Tensor:
        """(N,) float32: the events of a run; the number of presentations for what was never learned. The latter is one
        number for all, as published, so that a sample that `drop_last` left out now and then is not less."""
        return torch.where(table["learned"], table["forgotten"], table["presented"].max()).float()


# ---- one run -------------------------------------------------------------------------------------


class _StopAfter(TrainerCallback):
    """Ends a run early: its learning rates stay those of the whole run."""

    def __init__(self, epochs: float) -> None:
        self.epochs = epochs

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch >= self.epochs - 1e-6:
            control.should_training_stop = True


class _ScoringTrainer(DynamicPruningTrainer):
    """Trains for some epochs, and scores."""

    def check(self, method: str) -> None:
        """Raises ValueError for what the task does not have: by its name, and by a sample that is scored for that alone."""
        rule = self._loss_rule.name
        if method == "grand-last-layer" and rule not in ("single_label", "classification"):
            raise ValueError(
                f"method={method!r} is for classification, and this task is {rule!r}: use method='grand'."
            )
        if method == "loss" and rule == "batch_mean":
            raise ValueError(
                f"method={method!r} with per_sample_loss_fn={rule!r}: a sample has the loss of its batch there, which says "
                "nothing of it. Use method='grand', whose batches have one sample, or a loss of each sample."
            )
        first = torch.zeros(1, dtype=torch.int64)
        if method == "forgetting":
            self._score(0, first)
        else:
            self._score_share(method, 0, first)

    def settings(self, method: str, epochs: float) -> dict[str, Any]:
        """What must be the same for runs to be combined, as JSON has it."""
        assert self.pruner is not None
        model, values = cast(nn.Module, self.model), self.args.to_dict()
        about = {
            "method": method,
            "epochs": epochs,
            "dataset": self.pruner.fingerprint,
            "model": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "loss": self._loss_rule.name,
            "global batch": self.pruner.global_batch,
        }
        return json.loads(
            json.dumps(
                {**about, **{name: values[name] for name in TRAINING_SETTINGS if name in values}}
            )
        )

    def scores(self, method: str, epochs: float, settings: Mapping[str, Any]) -> Scores:
        """Of this run. Collective."""
        if epochs:
            self._train_for(epochs)
        assert self.pruner is not None
        begun, n = time.perf_counter(), len(self.pruner.table)
        report = self.pruner.report.totals
        spent = {
            name: report[name] for name in ("forward_passes", "backward_passes", "scoring_passes")
        }
        if method == "forgetting":
            values = _CountForgetting.count(self.pruner.table)
        else:
            share = torch.arange(n)[self.pruner.rank :: self.pruner.ranks]
            with warnings.catch_warnings():  # `check` has told
                warnings.filterwarnings("ignore", message=r"\w+ cannot be vectorised over samples")
                own = self._score_share(method, int(epochs), share)
            index, gathered = distributed.gather_observations(share, {"score": own})
            values = torch.empty(n)
            values[index] = gathered["score"]
            for kind in (
                ("forward_passes", "backward_passes") if method == "grand" else ("scoring_passes",)
            ):
                spent[kind] += n
        seconds = sum(report["seconds"].values()) + time.perf_counter() - begun
        try:
            return Scores(
                values,
                method,
                self.pruner.fingerprint,
                {
                    **spent,
                    "passes": _passes(spent),
                    "seconds": seconds,
                    "epochs": epochs,
                    "seeds": [self.args.seed],
                    "settings": settings,
                    "environment": describe_environment(ranks=self.pruner.ranks),
                },
            )
        except ValueError as error:
            raise ValueError(
                f"The run with seed {self.args.seed}: {error} Or did its training diverge?"
            ) from error

    def _train_for(self, epochs: float) -> None:
        assert self.pruner is not None
        self.add_callback(_StopAfter(epochs))
        checkpoint = distributed.from_rank_0(lambda: _newest(self.args.output_dir or "."))
        if (
            checkpoint is not None and _epoch_of(checkpoint) >= epochs - 1e-6
        ):  # it was trained, but not scored
            self._load_from_checkpoint(checkpoint)
            self.pruner.load(checkpoint)
        else:
            self.train(resume_from_checkpoint=checkpoint)
        trained = self.pruner.report.num_epochs
        if trained < epochs - 1e-6:
            raise RuntimeError(
                f"The run with seed {self.args.seed} ended after {trained:g} of {epochs:g} epochs: leave callbacks that "
                "stop a run out when scoring."
            )

    def _score_share(self, method: str, epochs: int, share: Tensor) -> Tensor:
        assert self.pruner is not None
        if METHODS[method].signal is not None:
            return self._score(epochs, share)[cast(str, METHODS[method].signal)]
        dataset = self.train_dataset if self.scoring_dataset is None else self.scoring_dataset
        collator: Any = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="scoring")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="scoring")
        with loss_left_out(self._model_with_loss()):
            return gradient_norms(
                cast(nn.Module, self.model),
                dataset,
                share,
                rule=self._loss_rule,
                collator=collator,
                batch_size=self.args.eval_batch_size,
                prepare=lambda batch: dict(self._prepare_inputs(batch)),
                last_layer=method == "grand-last-layer",
                seed=self.args.seed,
                description=method,
                progress=not self.args.disable_tqdm,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )


def _newest(folder: str) -> str | None:
    try:
        return _complete_checkpoint(True, folder)
    except ValueError:  # none is complete
        return None


def _epoch_of(checkpoint: str) -> float:
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["epoch"]


def _bar(seeds: Sequence[int], description: str, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(seeds, desc=description, disable=not progress or distributed.world()[0] != 0)


def _passes(spent: Mapping[str, int]) -> float:
    return (spent["forward_passes"] + 2 * spent["backward_passes"] + spent["scoring_passes"]) / 3


# ---- several runs --------------------------------------------------------------------------------


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes the settings in a new folder; compares with those that are there."""
    path = folder / _SETTINGS_FILE
    if path.exists():
        _compare(json.loads(path.read_text()), settings, path)
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(temporary, path)


def _compare(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    differing = [
        f"{key}: {theirs.get(key)!r} there, {ours[key]!r} here"
        for key in ours
        if theirs.get(key) != ours[key]
    ]
    if differing:
        raise ValueError(
            f"{path} is of other settings ({'; '.join(differing)}): scores of the two cannot be combined. Go on with those, "
            "or give another output_dir."
        )


def _combined(method: str, how: Method, parts: Sequence[Scores], seeds: Sequence[int]) -> Scores:
    values = torch.stack([part.values for part in parts]).double()
    counts = ("forward_passes", "backward_passes", "scoring_passes", "passes", "seconds")
    first = parts[0].provenance
    provenance = {
        **{name: sum(part.provenance[name] for part in parts) for name in counts},
        "runs": len(parts),
        "combined": how.combined,
        "epochs": first["epochs"],
        "seeds": list(seeds),
        "settings": first["settings"],
        "environment": first["environment"],
    }
    values = values.mean(0) if how.combined == "mean" else values.sum(0)
    return Scores(values, method, parts[0].fingerprint, provenance)
