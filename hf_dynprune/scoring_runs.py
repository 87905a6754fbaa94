"""Scores for static pruning: made before the run, by training on all data, and what they cost.

    FullData, a memory beside it ──train──▶ model, table ──forward passes, or the table──▶ Scores

Forgetting events are read from the table of the run. All other scores come from passes over all
samples when the training is over.
"""

import copy
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from . import checkpoints, distributed
from .arguments import TRAINING_SETTINGS
from .checks import check_count, did_you_mean
from .files import SCORES_FILE, load_json, save_json
from .losses import CLASS_RULES, LossRule
from .policies import FullData
from .pruner import DynamicPruner, choice_seed
from .report import describe_environment, passes
from .scores import Scores
from .scoring import gradient_norms, loss_left_out
from .table import Counts
from .trainer import DynamicPruningTrainer

# The private names of the Trainer that this file leans on. Reason for each:
SEAMS = {
    "Trainer.set_initial_training_values": "the run ends before its schedule does",
    "Trainer._prepare_inputs": "a gradient is computed from what a training step sees",
}

_SETTINGS_FILE = "settings.json"
_KINDS = ("forward_passes", "backward_passes", "scoring_passes")


@dataclass(frozen=True)
class Method:
    """How a score is made: its published protocol.

    Args:
        epochs: Epochs of training before the model scores; None is the whole run.
        runs: Number of runs that are combined, each with a different seed.
        signal: What forward passes of the trained model observe; None if the score is made
            otherwise.
        combined: How the scores of several runs are combined.
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
    per_sample_loss_fn: Callable[..., Tensor] | str | LossRule | None = None,
    scoring_dataset: Any = None,
    **trainer_arguments: Any,
) -> Scores:
    """Score each training sample for [`StaticPruning`]: train on all data, score with the model.

        el2n               || softmax(f(x)) - onehot(y) ||_2, mean over runs
        grand              || gradient of the sample's loss ||_2 over all trainable parameters, mean
                           over runs
        grand-last-layer   the same over the last linear layer alone: an approximation, from forward
                           passes
        forgetting         how often a sample changed from right to wrong between two of its
                           presentations in training; the number of presentations if it was never
                           right in a run; summed over runs
        loss, entropy      mean over runs
        margin             highest probability of another class minus that of the label's class,
                           mean over runs

    A high score means a hard sample. Forgetting events are counted during training, in train mode
    and under its augmentation. The others are taken in eval mode after `epochs` epochs of the run
    that `args` describes; its learning rates follow `num_train_epochs`.

    The defaults are those of the papers: EL2N after 20 epochs, 10 runs; forgetting over the whole
    training, 5 runs; GraNd 10 runs. GraNd was also published at initialisation (`epochs=0`). That
    did not reproduce, because a checkpoint had been restored by mistake (Kirsch 2023, arXiv
    2303.14753), so the default here is after 20 epochs. Loss, margin and entropy have no published
    protocol. They follow EL2N's.

    Each finished run leaves `run-SEED.safetensors` in `output_dir`. A later call with the same
    settings reads it; more seeds may be added. An interrupted run continues from its newest
    complete checkpoint in `run-SEED`, if `args` saves any. On several ranks each scores its share;
    all of them must see `output_dir`.

    Args:
        method: A name in `METHODS`.
        model_init: Makes a new model, as the Trainer's argument of that name. It is called under
            the seed of each run.
        args: Of the run. `seed`, `data_seed` and `output_dir` are replaced, and nothing is
            evaluated or uploaded.
        train_dataset: The samples, map-style.
        runs: Number of runs. *Optional*, defaults to the method's, or to the number of seeds.
        epochs: Epochs before scoring. *Optional*, defaults to the method's; at most
            `args.num_train_epochs`.
        seeds: Of the runs. *Optional*, defaults to `args.seed`, `args.seed + 1`, ...
        output_dir: Folder for what the runs leave. *Optional*, defaults to a folder with the
            method's name in `args.output_dir`.
        data_collator, per_sample_loss_fn, scoring_dataset: As in [`DynamicPruningTrainer`]. Give a
            scoring dataset without augmentation.
        trainer_arguments: More arguments of it.

    Returns:
        The scores, saved as `output_dir/scores.safetensors`. Their provenance holds what they cost:
        `passes`, by kind, and `seconds`.

    Raises:
        TypeError, ValueError: Before anything is trained: for an unknown method, if a number is out
            of range, if the task does not have the signal, or if `output_dir` holds scores of other
            settings. After a run: if scores are NaN.

    Cost: runs * (epochs * N passes, plus N / 3 for forward passes over all samples, or N for
    GraNd).

    Papers: Paul, Ganguli, Dziugaite, NeurIPS 2021, arXiv 2107.07075 (EL2N, GraNd); Toneva et al.,
    ICLR 2019, arXiv 1812.05159 (forgetting events; code mtoneva/example_forgetting).
    """
    how = check_method(method)
    if isinstance(model_init, nn.Module) or not callable(model_init):
        raise TypeError(
            f"model_init is a {type(model_init).__name__}: expected a function that makes a new "
            "model for each run, such as `lambda: "
            "AutoModelForImageClassification.from_config(config)`."
        )
    epochs = _epochs(method, how, epochs, args)
    seeds = _seeds(how, runs, seeds, args.seed)
    folder = Path(args.output_dir or ".") / method if output_dir is None else Path(output_dir)

    def trainer_of(seed: int) -> "_ScoringTrainer":
        return _ScoringTrainer(
            method,
            epochs,
            model_init=model_init,
            args=_arguments(args, seed, folder / f"run-{seed}"),
            train_dataset=train_dataset,
            data_collator=data_collator,
            per_sample_loss_fn=per_sample_loss_fn,
            scoring_dataset=scoring_dataset,
            **trainer_arguments,
        )

    trainer: _ScoringTrainer | None = trainer_of(seeds[0])  # raises before anything is trained
    assert trainer is not None
    trainer.check()
    settings = trainer.settings()
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
            part = trainer.scores(settings)
            distributed.from_rank_0(lambda part=part, path=path: part.save(path))  # type: ignore[misc]
        trainer = None
        parts.append(part)
    scores = _combined(method, how, parts, seeds)
    distributed.from_rank_0(lambda: scores.save(folder / SCORES_FILE))
    scores.path = str(folder / SCORES_FILE)
    return scores


# ---- arguments -----------------------------------------------------------------------------------


def check_method(name: str) -> Method:
    """The method of a name in `METHODS`. ValueError if there is none."""
    if name not in METHODS:
        raise ValueError(
            f"There is no method {name!r}: {did_you_mean(name, METHODS)}The methods are "
            f"{', '.join(map(repr, METHODS))}."
        )
    return METHODS[name]


def _epochs(method: str, how: Method, epochs: float | None, args: TrainingArguments) -> float:
    if args.max_steps > 0:
        raise ValueError(
            f"max_steps={args.max_steps}: scores are taken after epochs, so set num_train_epochs "
            "instead."
        )
    whole = args.num_train_epochs
    if epochs is None:
        epochs = whole if how.epochs is None else how.epochs
    if epochs != whole:
        check_count("epochs", epochs, 1 if method == "forgetting" else 0)
    if epochs > whole:
        raise ValueError(
            f"{method!r} is taken after {epochs:g} epochs, and the run has {whole:g} "
            "(num_train_epochs): give fewer `epochs`, or a longer run."
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
        raise ValueError(f"seeds={list(seeds)}: expected at least one, and no seed twice.")
    if runs is not None and runs != len(seeds):
        raise ValueError(f"runs={runs} and {len(seeds)} seeds: give one of the two.")
    return list(seeds)


def _arguments(args: TrainingArguments, seed: int, folder: Path) -> TrainingArguments:
    own = copy.copy(args)  # not constructed again: that would set up the devices again
    own.seed, own.data_seed, own.output_dir = seed, None, str(folder)
    own.eval_strategy, own.eval_on_start = IntervalStrategy.NO, False
    own.load_best_model_at_end, own.push_to_hub = False, False
    return own


# ---- one run -------------------------------------------------------------------------------------


class _ScoringTrainer(DynamicPruningTrainer):
    """Trains on all data for some epochs of a run, and scores.

    Args:
        method: A name in `METHODS`.
        epochs: Epochs of training. Learning rates stay those of the whole run.
    """

    def __init__(self, method: str, epochs: float, **settings: Any) -> None:
        self.method, self.epochs = method, epochs
        if method == "forgetting":
            self.memory = Counts("correct")
        super().__init__(pruning=FullData(), **settings)

    def set_initial_training_values(self, *args: Any) -> tuple:
        # The loop ends early. A run that is complete begins no further epoch when it is resumed.
        _, *others = super().set_initial_training_values(*args)
        return (math.ceil(self.epochs), *others)

    def check(self) -> None:
        """Raise ValueError if the task does not have the score, by its name and by one sample."""
        if self.loss_rule is None:
            self._derive_rule(None)  # says why there is none
        rule = cast(LossRule, self.loss_rule).name
        if self.method == "grand-last-layer" and rule not in CLASS_RULES:
            raise ValueError(
                f"method={self.method!r} is for classification, and this task is {rule!r}: use "
                "method='grand'."
            )
        if self.method == "loss" and rule == "batch_mean":
            raise ValueError(
                f"method={self.method!r} with per_sample_loss_fn={rule!r}: each sample has the "
                "loss of its batch, which says nothing about the sample. Use method='grand', whose "
                "batches have one sample, or a loss of each sample."
            )
        first = torch.zeros(1, dtype=torch.int64)
        if self.method == "forgetting":
            self._signal_of("correct", first)
        else:
            self._score_share(first)

    def settings(self) -> dict[str, Any]:
        """What must be the same for runs to be combined, as JSON has it."""
        pruner = cast(DynamicPruner, self.pruner)
        model, values = cast(nn.Module, self.model), self.args.to_dict()
        about = {
            "method": self.method,
            "epochs": self.epochs,
            "dataset": pruner.fingerprint,
            "model": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "loss": cast(LossRule, self.loss_rule).name,
            "global batch": pruner.shape.global_batch,
        }
        about.update({name: values[name] for name in TRAINING_SETTINGS if name in values})
        return json.loads(json.dumps(about))

    def scores(self, settings: Mapping[str, Any]) -> Scores:
        """Train, and score all samples. Collective."""
        if self.epochs:
            self._train()
        pruner = cast(DynamicPruner, self.pruner)
        begun, totals = time.perf_counter(), pruner.report.totals
        spent = {kind: totals[kind] for kind in _KINDS}
        if self.method == "forgetting":
            values = Counts.forgetting_events(pruner.table)
        else:
            values = self._score_all(pruner)
            for kind in _KINDS[:2] if self.method == "grand" else _KINDS[2:]:
                spent[kind] += len(values)
        seconds = sum(totals["seconds"].values()) + time.perf_counter() - begun
        provenance = {
            **spent,
            "passes": passes(*spent.values()),
            "seconds": seconds,
            "epochs": self.epochs,
            "seeds": [self.args.seed],
            "settings": settings,
            "environment": describe_environment(ranks=pruner.shape.ranks),
        }
        try:
            return Scores(values, self.method, pruner.fingerprint, provenance)
        except ValueError as error:
            raise ValueError(
                f"The run with seed {self.args.seed}: {error} Or did its training diverge?"
            ) from error

    def _train(self) -> None:
        folder = self.args.output_dir or "."
        self.train(distributed.from_rank_0(lambda: checkpoints.newest_complete(folder)))
        trained = cast(DynamicPruner, self.pruner).report.num_epochs
        if trained < self.epochs - 1e-6:
            raise RuntimeError(
                f"The run with seed {self.args.seed} ended after {trained:g} of {self.epochs:g} "
                "epochs: leave out callbacks that stop a run when scoring."
            )

    def _score_all(self, pruner: DynamicPruner) -> Tensor:
        """(N,) scores. Each rank computes its share."""
        n = len(pruner.table)
        share = torch.arange(n)[pruner.rank :: pruner.shape.ranks]
        with warnings.catch_warnings():  # `check` has warned
            warnings.filterwarnings("ignore", message=r"\w+ cannot be vectorised over samples")
            own = self._score_share(share)
        index, gathered = distributed.gather_observations(share, {"score": own})
        values = torch.empty(n)
        values[index] = gathered["score"]
        return values

    def _score_share(self, share: Tensor) -> Tensor:
        signal = METHODS[self.method].signal
        if signal is not None:
            return self._signal_of(signal, share)
        rule = cast(LossRule, self.loss_rule)
        with loss_left_out(self._model_with_loss(rule)):
            return gradient_norms(
                cast(nn.Module, self.model),
                index=share,
                rule=rule,
                prepare=lambda batch: dict(self._prepare_inputs(batch)),
                last_layer=self.method == "grand-last-layer",
                seed=self.args.seed,
                description=self.method,
                **self._scoring_loader(),
            )

    def _signal_of(self, signal: str, share: Tensor) -> Tensor:
        seed = choice_seed(cast(DynamicPruner, self.pruner).seed, int(self.epochs), "scoring")
        return self._forward_signals((signal,), share, seed=seed, description=self.method)[signal]


def _bar(seeds: Sequence[int], description: str, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(seeds, desc=description, disable=not progress or distributed.world()[0] != 0)


# ---- several runs --------------------------------------------------------------------------------


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings to a new folder, or compare them with those in the folder."""
    path = folder / _SETTINGS_FILE
    if path.exists():
        try:
            theirs = load_json(path)
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be read ({error}): give another output_dir, or remove the file to "
                "score again."
            ) from error
        _compare(theirs, settings, path)
        return
    save_json(path, settings)


def _compare(theirs: Any, ours: Mapping[str, Any], path: Path) -> None:
    if not isinstance(theirs, Mapping):
        raise ValueError(
            f"{path} holds a {type(theirs).__name__} in place of the settings: give another "
            "output_dir."
        )
    differing = [
        f"{key}: {theirs.get(key)!r} there, {ours[key]!r} here"
        for key in ours
        if theirs.get(key) != ours[key]
    ]
    if differing:
        raise ValueError(
            f"{path} is of other settings ({'; '.join(differing)}): their scores cannot be "
            "combined. Continue with those settings, or give another output_dir."
        )


def _combined(method: str, how: Method, parts: Sequence[Scores], seeds: Sequence[int]) -> Scores:
    values = torch.stack([part.values for part in parts]).double()
    first = parts[0].provenance
    counts = (*_KINDS, "passes", "seconds")
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
