"""Scores of samples, made before the run that uses them by training a model, and what they cost.

    FullData, a memory beside it ──train──▶ model, table ──forward passes, or the table──▶ Scores

Forgetting events are read from the table of the run. All other scores come from passes over all
samples when the training is over. A reference is trained on other samples than it scores.
"""

import copy
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from . import checkpoints, distributed
from .arguments import TRAINING_SETTINGS
from .checks import check_count, did_you_mean
from .data_side import engine_of, tell_epoch
from .files import SCORES_FILE, checksum, load_json, save_json
from .identity import dataset_fingerprint
from .losses import CLASS_RULES, LossRule
from .policies import FullData
from .pruner import DynamicPruner, choice_seed
from .report import describe_environment, passes
from .sampler import IndexedDataset
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
    "reference": Method(None, 1, "loss"),
}


def score_dataset(
    method: str,
    model_init: Callable[..., nn.Module] | None,
    args: TrainingArguments,
    train_dataset: Any,
    *,
    holdout: Any = None,
    model: nn.Module | None = None,
    runs: int | None = None,
    epochs: float | None = None,
    seeds: Sequence[int] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    data_collator: Callable[[Any], Any] | None = None,
    per_sample_loss_fn: Callable[..., Tensor] | str | LossRule | None = None,
    scoring_dataset: Any = None,
    **trainer_arguments: Any,
) -> Scores:
    """Score each training sample: train a model, and score with it. For [`StaticPruning`], and
    with `"reference"` for [`ReferenceLoss`].

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
        reference          loss under a model that was not trained on the sample, mean over runs

    A high score means a hard sample. Forgetting events are counted during training, in train mode
    and under its augmentation. The others are taken in eval mode after `epochs` epochs of the run
    that `args` describes; its learning rates follow `num_train_epochs`.

    The defaults are those of the papers: EL2N after 20 epochs, 10 runs; forgetting over the whole
    training, 5 runs; GraNd 10 runs. GraNd was also published at initialisation (`epochs=0`). That
    did not reproduce, because a checkpoint had been restored by mistake (Kirsch 2023, arXiv
    2303.14753), so the default here is after 20 epochs. Loss, margin and entropy have no published
    protocol. They follow EL2N's.

    The reference model of `"reference"` is one of three:

        holdout=    trained on that dataset, such as samples with clean labels or of a target task
        model=      given; nothing is trained
        neither     two models, each trained on a random half of the training samples; each scores
                    the other half

    It scores after its last epoch, when the learning rate has reached its end. RHO-LOSS takes the
    epoch of lowest validation loss: for that train the model yourself, with
    `load_best_model_at_end`, and give `model=`.

    Each finished run leaves `run-SEED.safetensors` in `output_dir`. A later call with the same
    settings reads it; more seeds may be added. An interrupted run continues from its newest
    complete checkpoint in `run-SEED`, if `args` saves any. On several ranks each scores its share;
    all of them must see `output_dir`.

    Args:
        method: A name in `METHODS`.
        model_init: Makes a new model, as the Trainer's argument of that name. It is called under
            the seed of each run. None with `model`.
        args: Of the run. `seed`, `data_seed` and `output_dir` are replaced, and nothing is
            evaluated or uploaded.
        train_dataset: The samples, map-style.
        holdout: Other samples, map-style, *optional*, that the reference model is trained on.
        model: The reference model, *optional*. The Trainer moves it to its device. What it cost is
            not known here: add it to `provenance["passes"]` of the scores, and save them again.
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
    GraNd). With `holdout` its number of samples takes the place of the first N; with `model` it is
    N / 3. Two halves cost what one run costs.

    Papers: Paul, Ganguli, Dziugaite, NeurIPS 2021, arXiv 2107.07075 (EL2N, GraNd); Toneva et al.,
    ICLR 2019, arXiv 1812.05159 (forgetting events; code mtoneva/example_forgetting); Mindermann et
    al., ICML 2022, arXiv 2206.07137 (reference losses; code OATML/RHO-Loss).
    """
    how = check_method(method)
    form = _form(method, holdout, model)
    if method == "reference":
        IndexedDataset(train_dataset)  # raises for a stream
    if model is not None:
        _check_given(model, model_init, runs, epochs, seeds)
        epochs, seeds = 0, [args.seed]
    else:
        _check_init(model_init)
        epochs = _epochs(method, how, epochs, args)
        seeds = _seeds(how, runs, seeds, args.seed)
    folder = Path(args.output_dir or ".") / method if output_dir is None else Path(output_dir)

    def trainer_of(seed: int, fold: _Fold) -> "_ScoringTrainer":
        return _ScoringTrainer(
            method,
            form,
            epochs,
            train_dataset,
            fold,
            model=model,
            model_init=None if model is not None else model_init,
            args=_arguments(args, seed, folder / f"run-{seed}{fold.suffix}"),
            data_collator=data_collator,
            per_sample_loss_fn=per_sample_loss_fn,
            scoring_dataset=scoring_dataset,
            **trainer_arguments,
        )

    def run_of(seed: int) -> Scores:
        folds, found = _folds(form, train_dataset, holdout, seed), []
        for fold in folds:  # one model at a time
            found.append((made.pop() if made else trainer_of(seed, fold)).scores(settings))
        return _joined(found, folds)

    first = _folds(form, train_dataset, holdout, seeds[0])[0]
    made = [trainer_of(seeds[0], first)]  # raises before anything is trained
    made[0].check()
    settings = made[0].settings()
    distributed.from_rank_0(lambda: _claim(folder, settings))
    parts = []
    for seed in _bar(seeds, f"{method}, runs", not args.disable_tqdm):
        path = folder / f"run-{seed}.safetensors"
        parts.append(_read_or_made(path, settings, partial(run_of, seed)))
        made.clear()
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


def _check_init(model_init: Any) -> None:
    if isinstance(model_init, nn.Module) or not callable(model_init):
        raise TypeError(
            f"model_init is a {type(model_init).__name__}: expected a function that makes a new "
            "model for each run, such as `lambda: "
            "AutoModelForImageClassification.from_config(config)`."
        )


def _arguments(args: TrainingArguments, seed: int, folder: Path) -> TrainingArguments:
    own = copy.copy(args)  # not constructed again: that would set up the devices again
    own.seed, own.data_seed, own.output_dir = seed, None, str(folder)
    own.eval_strategy, own.eval_on_start = IntervalStrategy.NO, False
    own.load_best_model_at_end, own.push_to_hub = False, False
    return own


# ---- what is trained on, and what is scored ------------------------------------------------------

# Where the model of a score comes from. All methods but "reference" are of the first form.
_Form = Literal["training set", "holdout", "model", "halves"]


def _form(method: str, holdout: Any, model: Any) -> _Form:
    """TypeError or ValueError if the arguments do not fit the method, or each other."""
    given = [name for name, value in (("holdout", holdout), ("model", model)) if value is not None]
    if method != "reference":
        if given:
            raise ValueError(
                f"{given[0]}= with method={method!r}: only method='reference' takes it."
            )
        return "training set"
    if len(given) == 2:
        raise ValueError(
            "holdout= and model= both name the reference: give the model, or the data to train it "
            "on."
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a trained model, an nn.Module."
        )
    return cast(_Form, given[0] if given else "halves")


def _check_given(model: nn.Module, model_init: Any, runs: Any, epochs: Any, seeds: Any) -> None:
    """ValueError for arguments that would train, beside a model that is trained already."""
    unused = {"model_init": model_init, "runs": runs, "epochs": epochs, "seeds": seeds}
    for name, value in unused.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} with model={type(model).__name__}: the model is given, and "
                "nothing is trained. Leave one of the two out (model_init=None)."
            )


@dataclass(frozen=True)
class _Fold:
    """A model of a run: what it is trained on, and which training samples it scores.

    Args:
        trained: Map-style.
        scored: (M,) int64, ascending; None means all.
        suffix: Of the folder of its checkpoints.
    """

    trained: Any
    scored: Tensor | None = None
    suffix: str = ""


class _Part(Subset):
    """Some samples of a dataset that is not a `datasets.Dataset`. It follows the epochs."""

    def set_epoch(self, epoch: int) -> None:
        tell_epoch(self.dataset, epoch)


def _folds(form: _Form, train_dataset: Any, holdout: Any, seed: int) -> list[_Fold]:
    """The models of a run."""
    if form != "halves":
        return [_Fold(train_dataset if holdout is None else holdout)]
    n = len(train_dataset)
    if n < 2:
        raise ValueError(f"{n} samples have no two halves: give holdout= or model=.")
    generator = torch.Generator().manual_seed(choice_seed(seed, 0, "halves"))
    order = torch.randperm(n, generator=generator)
    halves = [half.sort().values for half in (order[: n // 2], order[n // 2 :])]
    return [
        _Fold(_selected(train_dataset, own), other, f"-half-{number}")
        for number, (own, other) in enumerate((halves, halves[::-1]))
    ]


def _selected(dataset: Any, index: Tensor) -> Any:
    rows = index.tolist()
    return dataset.select(rows) if hasattr(dataset, "select") else _Part(dataset, rows)


# ---- one run -------------------------------------------------------------------------------------


class _ScoringTrainer(DynamicPruningTrainer):
    """Trains on all data of a fold for some epochs of a run, and scores.

    Args:
        method: A name in `METHODS`.
        form: Where the model comes from.
        epochs: Epochs of training. Learning rates stay those of the whole run.
        target: The training set, whose samples are scored.
        fold: What is trained on, and which samples are scored.
    """

    def __init__(
        self,
        method: str,
        form: _Form,
        epochs: float,
        target: Any,
        fold: _Fold,
        *,
        scoring_dataset: Any = None,
        **settings: Any,
    ) -> None:
        self.method, self.form, self.epochs = method, form, epochs
        self.target, self.fold = target, fold
        if method == "forgetting":
            self.memory = Counts("correct")
        if scoring_dataset is None and fold.trained is not target:
            scoring_dataset = target
        super().__init__(
            pruning=FullData(),
            train_dataset=fold.trained,
            scoring_dataset=scoring_dataset,
            **settings,
        )

    def _check_scoring_dataset(self) -> None:
        given, expected = self.scoring_dataset, len(self.target)
        if given is not None and len(given) != expected:
            raise ValueError(
                f"The scoring_dataset has {len(given)} samples, the training dataset has "
                f"{expected}: expected the same samples in the same order."
            )

    def _target_fingerprint(self) -> str:
        """The identity of the training set, also if the model is trained on another one."""
        if self.fold.trained is self.target:
            return cast(DynamicPruner, self.pruner).fingerprint
        return dataset_fingerprint(self.target)

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
        if self.method == "grand" and (engine := engine_of(self)):
            raise ValueError(
                f"method={self.method!r} needs the gradient of each sample over a whole model, "
                f"and {engine} splits it over the ranks: score on one process or with DDP."
            )
        if METHODS[self.method].signal == "loss" and rule == "batch_mean":
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
            "dataset": self._target_fingerprint(),
            "model": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "loss": cast(LossRule, self.loss_rule).name,
            "global batch": pruner.shape.global_batch,
        }
        if self.form == "model":
            weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
            return {**about, "reference": self.form, "weights": checksum(weights, "")[:16]}
        about.update({name: values[name] for name in TRAINING_SETTINGS if name in values})
        if self.method == "reference":
            about["reference"] = self.form
        if self.form == "holdout":
            about["trained on"] = pruner.fingerprint
        return json.loads(json.dumps(about))

    def scores(self, settings: Mapping[str, Any]) -> Scores:
        """Train, and score the samples of the fold. Collective."""
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
            return Scores(values, self.method, self._target_fingerprint(), provenance)
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
        """The scores of the fold's samples. Each rank computes its share."""
        scored = self.fold.scored
        n = len(self.target) if scored is None else len(scored)
        places = torch.arange(n)[pruner.rank :: pruner.shape.ranks]
        share = places if scored is None else scored[places]
        with warnings.catch_warnings():  # `check` has warned
            warnings.filterwarnings("ignore", message=r"\w+ cannot be vectorised over samples")
            own = self._score_share(share)
        index, gathered = distributed.gather_observations(places, {"score": own})
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


def _sums(parts: Sequence[Scores]) -> dict[str, float]:
    """What the parts cost together, by kind."""
    counts = (*_KINDS, "passes", "seconds")
    return {name: sum(part.provenance[name] for part in parts) for name in counts}


def _joined(parts: Sequence[Scores], folds: Sequence[_Fold]) -> Scores:
    """The scores of a run, whose models scored different samples."""
    if len(parts) == 1:
        return parts[0]
    values = torch.empty(sum(len(part) for part in parts))
    for part, fold in zip(parts, folds, strict=True):
        values[cast(Tensor, fold.scored)] = part.values
    first = parts[0]
    return Scores(values, first.method, first.fingerprint, {**first.provenance, **_sums(parts)})


def _read_or_made(path: Path, settings: Mapping[str, Any], run: Callable[[], Scores]) -> Scores:
    """The scores of a finished run, or those of a new one, which are saved. Collective."""
    if distributed.from_rank_0(path.is_file):
        part = Scores.load(path)
        _compare(part.provenance.get("settings", {}), settings, path)
        return part
    part = run()
    distributed.from_rank_0(lambda: part.save(path))
    return part


def _combined(method: str, how: Method, parts: Sequence[Scores], seeds: Sequence[int]) -> Scores:
    values = torch.stack([part.values for part in parts]).double()
    first = parts[0].provenance
    provenance = {
        **_sums(parts),
        "runs": len(parts),
        "combined": how.combined,
        "epochs": first["epochs"],
        "seeds": list(seeds),
        "settings": first["settings"],
        "environment": first["environment"],
    }
    values = values.mean(0) if how.combined == "mean" else values.sum(0)
    return Scores(values, method, parts[0].fingerprint, provenance)
