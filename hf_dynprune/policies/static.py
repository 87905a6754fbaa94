"""Static pruning: one choice for the whole run, by scores made before it, or by chance."""

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from ..checks import check_choice, check_flag
from ..scores import Scores, fingerprints_fit
from ..selection import indices_of, keep_count, mask_of, permutation, top_k
from .base import Choice, EpochPlan, PruningPolicy, check_keep_ratio

# What the report notes of the scores' provenance.
_SPENT = (
    "forward_passes",
    "backward_passes",
    "scoring_passes",
    "passes",
    "seconds",
    "runs",
    "epochs",
)


class HoldsScores(PruningPolicy):
    """Keeps K = round(keep_ratio * N) samples by scores that were made before the run. Abstract.

    The file is read once, at construction. The fields are those of the subclass, so that each has
    its own order.
    """

    scores: str | os.PathLike[str] | Scores | None
    keep_ratio: float
    charge: bool
    digest: str | None

    always_shown: ClassVar[tuple[str, ...]] = ("keep_ratio",)

    def __post_init__(self) -> None:
        if not (self.scores is None or isinstance(self.scores, Scores | str | os.PathLike)):
            raise TypeError(
                f"scores={type(self.scores).__name__}: expected the path of a file of "
                "`Scores.save`, or its `Scores`."
            )
        super().__post_init__()
        check_keep_ratio(self.keep_ratio)
        check_flag("charge", self.charge)

    def _hold(self) -> None:
        """Load the scores and check them."""
        scores = self.scores
        if scores is None:
            return
        if not isinstance(scores, Scores):
            path = os.fspath(scores)
            try:
                scores = Scores.load(path)
            except FileNotFoundError:
                # A policy that is read back, say by a model card, has a digest and is not used.
                if self.digest is None:
                    raise
                object.__setattr__(self, "scores", str(path))
                return
        if scores.path is None:
            raise ValueError(
                "These scores have no file yet: save them first, "
                "`scores.save('scores.safetensors')`."
            )
        if self.digest is not None and self.digest != scores.digest:
            raise ValueError(
                f"{scores.path} has the digest {scores.digest}, expected {self.digest}: the scores "
                "were made again since. Use the earlier file, or leave `digest` out and start a "
                "new run."
            )
        if self.charge and "passes" not in scores.provenance:
            raise ValueError(
                f"{scores.path} does not say what its scores cost, so that cannot be charged: note "
                "it, `Scores(..., provenance={'passes': ...})`, 0 for free ones, or set "
                "charge=False."
            )
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "digest", scores.digest)

    def _held(self) -> Scores:
        if not isinstance(self.scores, Scores):
            raise FileNotFoundError(
                f"{self.scores} does not exist: make the scores with `score_dataset`, or correct "
                "the path."
            )
        return self.scores

    def settings(self) -> dict[str, Any]:
        """The fields, with the path of the scores in their place."""
        scores = self.scores.path if isinstance(self.scores, Scores) else self.scores
        return {**super().settings(), "scores": scores}

    def planned_size(self, n: int, epoch: int, progress: float) -> int:
        return keep_count(self.keep_ratio, n)

    def check_dataset(self, n: int, fingerprint: str) -> None:
        """Raise ValueError unless the scores are of these n samples."""
        if self.scores is None:
            return
        scores = self._held()
        if len(scores) != n:
            raise ValueError(
                f"{scores.path} has the scores of {len(scores)} samples, the training set has {n}: "
                "score the training set that is pruned."
            )
        if not fingerprints_fit(scores.fingerprint, fingerprint, n):
            raise ValueError(
                f"{scores.path} has the scores of the dataset {scores.fingerprint!r}, the training "
                f"set is {fingerprint!r}: score the training set that is pruned, or prune the one "
                "that was scored."
            )

    def preparation(self) -> dict[str, Any]:
        """What was spent before the run, for the report; empty without scores."""
        if self.scores is None:
            return {}
        scores = self._held()
        spent = {name: scores.provenance[name] for name in _SPENT if name in scores.provenance}
        about = {"method": scores.method, "scores": scores.path, "digest": scores.digest}
        return {**about, "charged": self.charge, **spent}


@dataclass(frozen=True)
class StaticPruning(HoldsScores):
    """Static pruning: K = round(keep_ratio * N) samples, chosen once, by scores s made before.

        hardest     S = the K highest s_i
        easiest     S = the K lowest s_i
        middle      S = the K samples around the median, ranks (N - K) // 2 to (N - K) // 2 + K - 1
        random      S = K uniform without replacement, from the seed of the run: no scores

    Ties are broken at random. The one choice is made after the `first` full-data epochs and holds
    until the `last` ones; `period` changes nothing.

    The papers train the kept part for as many optimizer steps as the full run takes, so that
    pruning saves them nothing. Here an epoch is as short as its samples. Multiply
    `num_train_epochs` by N / K to train as they did.

    Cost: keep_ratio, and what the scores cost: a run, or ten. O(N log N) for the choice.

    Args:
        scores: The path of a file of `Scores.save`, or the `Scores` that were saved or loaded; None
            with `keep="random"`. The file is read once, here.
        keep_ratio: Share of the samples that is kept, in (0, 1].
        keep: Which samples are kept.
        charge: Whether the report counts what the scores cost (`provenance["passes"]`) as passes of
            this run; otherwise it is shown beside them. If several runs share the scores, charge
            them once, and say so.
        digest: Of the content of the file, read from it. A file with another content is refused.

    Raises:
        TypeError, ValueError, FileNotFoundError: At construction, if the file is missing, damaged
            or another one, or if scores to be charged do not say what they cost. When the pruner or
            the trainer is made, if the scores are of another number of samples or of another
            dataset.

    Papers: EL2N, GraNd: Paul, Ganguli, Dziugaite, NeurIPS 2021, arXiv 2107.07075 (`hardest`; above
    half of the data dropped, a window away from the hardest). Forgetting events: Toneva et al.,
    ICLR 2019, arXiv 1812.05159 (`hardest`).
    """

    # Two policies are equal if the content of their scores is, which `digest` says.
    scores: str | os.PathLike[str] | Scores | None = field(default=None, compare=False)
    keep_ratio: float = 0.5
    keep: Literal["hardest", "easiest", "middle", "random"] = "hardest"
    charge: bool = True
    digest: str | None = None

    name = "static"
    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("keep", self.keep, ("hardest", "easiest", "middle", "random"))
        if (self.scores is None) != (self.keep == "random"):
            raise ValueError(
                f"scores={self.scores!r} with keep={self.keep!r}: keep='random' takes no scores, "
                "and the others need them (`score_dataset` makes them)."
            )
        if self.min_per_class and not self.first:
            raise ValueError(
                f"min_per_class={self.min_per_class} with first=0: labels are known from the first "
                "observation on, and the only choice would be made before it. Set first=1."
            )
        self._hold()

    def plan(self, choice: Choice) -> EpochPlan:
        n, k, generator = choice.n, choice.size, choice.generator
        if self.scores is None:
            return EpochPlan(indices_of(mask_of(permutation(n, generator)[:k], n)))
        values = self._held().values
        if self.keep == "middle":
            order = torch.randperm(n, generator=generator)
            order = order[torch.argsort(values[order], stable=True)]
            begin = (n - k) // 2
            return EpochPlan(order[begin : begin + k].sort().values)
        return EpochPlan(top_k(values if self.keep == "hardest" else -values, k, generator))
