"""What a study runs: rules and runs as values, and the keep_ratio at which a run meets a cost."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import optimize

from hf_dynprune import PruningPolicy, RunShape, make_policy
from hf_dynprune.schedule import epoch_costs, planned_epochs
from hf_dynprune.scoring_runs import METHODS

FULL, SHORT, RANDOM = "full run", "short run", "random"
Key = tuple[str, float]  # name of a method, planned cost of its runs


class Setting(NamedTuple):
    """What tuning tries: a learning rate, and a batch size or None for the recipe's."""

    rate: float
    batch: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As options of the recipe."""
        size = {} if self.batch is None else {"per_device_train_batch_size": self.batch}
        return {"learning_rate": self.rate, **size}


@dataclass(frozen=True)
class Run:
    """One run of the recipe.

    Attributes:
        name: The method.
        cost: The planned cost, in full runs.
        seed: The seed of the run.
        rate: The learning rate that a tuning run tries. None for the runs that are compared.
        batch: The batch size that a tuning run tries. None for the recipe's.
        options: The options of the recipe in which the run differs from the others of its study.
            They follow from the other attributes, so they are not compared.
    """

    name: str
    cost: float
    seed: int
    rate: float | None = None
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    batch: int | None = None

    @property
    def key(self) -> Key:
        return self.name, self.cost

    def record(self) -> dict[str, Any]:
        """What run.json says of it beside its command. Without a batch size, if it has none."""
        known = {"name": self.name, "cost": self.cost, "seed": self.seed, "rate": self.rate}
        return known if self.batch is None else {**known, "batch": self.batch}

    @property
    def folder(self) -> str:
        """The name of the run's folder, such as ucb_c_2.0_0.3_seed1."""
        words = self.name if self.name == FULL else f"{self.name} {self.cost:g}"
        words += "" if self.rate is None else f" tuning {self.rate:g}"
        words += "" if self.batch is None else f" batch {self.batch}"
        return "_".join([*re.findall(r"(?:[^\W_]|\.)+", words), f"seed{self.seed}"])


# ---- equal cost ----------------------------------------------------------------------------------


def cost_of(policy: PruningPolicy, shape: RunShape) -> float:
    """The planned passes of a run, divided by those of the full run.

        cost = (trained samples + scored samples / 3 + charged preparation) / (N * epochs)

    If the size of a choice depends on the data, the run is assumed to keep the most that
    `policy.expected_share` gives.
    """
    share = None
    if any(planned.size is None for planned in planned_epochs(policy, shape)):
        _, share = policy.expected_share(shape.samples)
    epochs = list(epoch_costs(policy, shape, share=share))
    before = policy.preparation()
    passes = sum(epoch.samples for epoch in epochs) + sum(epoch.scored for epoch in epochs) / 3
    passes += before["passes"] if before.get("charged") else 0
    return passes / (shape.samples * shape.num_epochs)


def at_cost(policy: PruningPolicy, cost: float, shape: RunShape) -> PruningPolicy:
    """The policy with the keep_ratio at which its run meets a cost, to one sample per epoch.

    If no keep_ratio meets the cost, the policy gets the closest one that it accepts. A policy
    without keep_ratio is returned as it is. So is one whose scoring alone exceeds the cost.
    """
    own = getattr(policy, "keep_ratio", None)

    def surplus(keep_ratio: float) -> float:
        try:
            return cost_of(replace(policy, keep_ratio=keep_ratio), shape) - cost
        except ValueError:  # the policy cannot keep so little, or so much
            return -math.inf if keep_ratio < own else math.inf

    n = shape.samples
    if own is None or surplus(1 / n) > 0:
        return policy
    precision = 0.1 / n
    found = 1.0
    if surplus(found) > 0:
        found = optimize.bisect(lambda ratio: np.sign(surplus(ratio)), 1 / n, 1.0, xtol=precision)
    near = (found, min(1.0, found + 2 * precision), found - 2 * precision)
    return replace(policy, keep_ratio=next(r for r in near if math.isfinite(surplus(r))))


# ---- methods -------------------------------------------------------------------------------------


def own_options(text: str) -> tuple[str, dict[str, str]]:
    """Split 'ucb --num_train_epochs 12' into 'ucb' and the options of the recipe."""
    text, *own = re.split(r"\s+--", text.strip())
    return text, dict(re.split(r"[\s=]+", option, maxsplit=1) for option in own)


def label(name: str, settings: Mapping[str, Any]) -> str:
    """Such as 'ucb (c 2.0, num_train_epochs 12)'."""
    words = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"{name} ({words})" if words else name


class ShortRun:
    """All data for fewer epochs, to which the learning rate schedule is compressed."""

    def __str__(self) -> str:
        return SHORT

    def run(self, cost: float, seed: int, full: RunShape) -> Run:
        options = {"pruning": "full", "num_train_epochs": cost * full.num_epochs}
        return Run(SHORT, cost, seed, options=options)


@dataclass(frozen=True)
class Rule:
    """A policy, the fields that it was given, and options of the recipe for its runs only."""

    policy: PruningPolicy
    fields: dict[str, Any]
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str, cost: float) -> "Rule":
        """Read a rule from the command line, such as 'ucb:{"c": 2.0} --num_train_epochs 12'.

        Its keep_ratio is the cost if the policy accepts that, otherwise 1, otherwise the default.

        Raises:
            TypeError, ValueError: If the policy or a field is unknown, or keep_ratio is given.
        """
        text, options = own_options(text)
        name, _, fields = text.partition(":")
        settings = json.loads(fields) if fields else {}
        if "keep_ratio" in settings:
            raise ValueError(f"{text}: leave out keep_ratio. It follows from --costs.")
        for keep_ratio in ({"keep_ratio": cost}, {"keep_ratio": 1.0}):
            try:
                return cls(make_policy(name, **keep_ratio, **settings), settings, options)
            except (TypeError, ValueError):
                continue
        return cls(make_policy(name, **settings), settings, options)

    def __str__(self) -> str:
        return label(self.policy.name, {**self.fields, **self.options})

    def run(self, cost: float, seed: int, full: RunShape) -> Run:
        """The run at a cost in full runs. If the rule sets its epochs, it keeps more or less."""
        own = replace(full, num_epochs=float(self.options.get("num_train_epochs", full.num_epochs)))
        policy = at_cost(self.policy, cost * full.num_epochs / own.num_epochs, own)
        options: dict[str, Any] = {"pruning": policy.name}
        if getattr(policy, "keep_ratio", None) is not None:
            options["keep_ratio"] = f"{policy.keep_ratio:.9g}"
        if self.fields:
            options["pruning_kwargs"] = json.dumps(self.fields)
        return Run(str(self), cost, seed, options={**options, **self.options})


Method = ShortRun | Rule  # has a name, and a run for each cost and seed


def full_run(seed: int) -> Run:
    return Run(FULL, 1.0, seed, options={"pruning": "full"})


def scores_run(text: str, seed: int, **options: Any) -> Run:
    """The run that makes scores, from 'el2n --score_runs 2'. Its cost is not planned."""
    method, own = own_options(text)
    name = f"scores {label(method, own)}"
    return Run(name, 0.0, seed, options={"score": method, **options, **own})


def static_names(text: str) -> dict[str, bool]:
    """The names of static pruning by scores -> whether the scores are charged to it."""
    name = label(*own_options(text))
    return {f"{name}, scores charged": True, f"{name}, scores given": False}


def static_runs(text: str, cost: float, seed: int, full: RunShape, file: Path) -> Iterator[Run]:
    """Static pruning by the scores of a file: with the scores charged, and with them given.

    Of reference losses it is the policy `reference-loss`.
    """
    policy = "reference-loss" if own_options(text)[0] == "reference" else "static"
    for name, charge in static_names(text).items():
        fields = {"scores": str(file), "charge": charge}
        rule = Rule(make_policy(policy, keep_ratio=cost, **fields), fields, {})
        yield replace(rule.run(cost, seed, full), name=name)


# ---- a study -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a study contains. See the help of recipes/compare.py.

    Raises:
        TypeError, ValueError: If a rule, score, cost or learning rate is unknown or out of range.
    """

    rules: Sequence[str] = ("random", "epsilon-greedy", "ucb")
    scores: Sequence[str] = ()
    costs: Sequence[float] = (0.3,)
    seeds: Sequence[int] = (0, 1, 2)
    learning_rates: Sequence[float] = ()
    batch_sizes: Sequence[int] = ()
    rates_of: Path | None = None
    tune: Literal["each", "first"] = "each"
    tuning_seeds: Sequence[int] = (0,)
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        if len(set(self.learning_rates)) == 1 or min(self.learning_rates, default=1) <= 0:
            raise ValueError(
                f"--learning_rates {self.learning_rates}: expected at least two, above 0, or none."
            )
        if self.batch_sizes:
            self._check_batch_sizes()
        if self.rates_of is not None and self.learning_rates:
            raise ValueError(
                f"--rates_of {self.rates_of} takes learning rates, --learning_rates tries them: "
                "leave out one of the two options."
            )
        for cost in self.costs:
            if not 0 < cost < 1:
                raise ValueError(
                    f"--costs {cost:g} is out of range: expected shares of the full run, in (0, 1)."
                )
            self.methods(cost)
        for text in self.scores:
            if own_options(text)[0] not in METHODS:
                raise ValueError(
                    f"--scores {text} is unknown: expected one of {', '.join(METHODS)}, which "
                    "options of the recipe may follow."
                )

    def _check_batch_sizes(self) -> None:
        sizes = list(self.batch_sizes)
        if len(set(sizes)) < max(2, len(sizes)) or min(sizes) < 1:
            raise ValueError(
                f"--batch_sizes {sizes}: expected at least two different ones, of at least 1."
            )
        if not self.learning_rates:
            raise ValueError(
                f"--batch_sizes {sizes} without --learning_rates: the best rate depends on the "
                "batch size, so give the rates to try, too."
            )

    def settings_of(self, name: str) -> list[Setting]:
        """What tuning tries first for a method: each learning rate at each batch size.

        The full run keeps the recipe's batch size. It is not compared at equal cost, and to tune it
        costs the most.
        """
        batches = [None] if name == FULL or not self.batch_sizes else self.batch_sizes
        return [Setting(rate, batch) for batch in batches for rate in self.learning_rates]

    def methods(self, cost: float) -> list[Method]:
        """The short run and the rules."""
        return [ShortRun(), *(Rule.parse(text, cost) for text in self.rules)]

    def tuned_methods(self, cost: float) -> list[Method]:
        """The methods whose learning rates are tuned."""
        methods = self.methods(cost)
        return methods[:2] if self.tune == "first" else methods

    @property
    def first_rule(self) -> str:
        """The name of the first rule, "" without rules."""
        return "".join(str(Rule.parse(text, self.costs[0])) for text in self.rules[:1])

    def without_options(self) -> Iterator[Run]:
        """All runs but those that make scores. The options follow once the full run is finished."""
        yield from map(full_run, self.seeds)
        for cost, seed in product(self.costs, self.seeds):
            names = [*map(str, self.methods(cost)), *chain(*map(static_names, self.scores))]
            yield from (Run(name, cost, seed) for name in names)
        keys = [(FULL, 1.0)]
        keys += [(str(method), cost) for cost in self.costs for method in self.tuned_methods(cost)]
        for (name, cost), seed in product(keys, self.tuning_seeds):
            for rate, batch in self.settings_of(name):
                yield Run(name, cost, seed, rate, batch=batch)

    def at_best_setting(self, run: Run, tuned: Mapping[Key, Setting]) -> Run:
        """The run at the learning rate, and batch size, that were tuned for its method.

        If there are none: at those of the same policy without fields, or of the first rule.
        """
        names = (run.name, run.name.partition(" (")[0], self.first_rule)
        known = [tuned[name, run.cost] for name in names if (name, run.cost) in tuned]
        return replace(run, options={**known[0].options, **run.options}) if known else run
