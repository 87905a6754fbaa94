"""Static pruning: one choice for the whole run, by scores that were made before it, or by chance."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..scores import SampleTable, Scores
from .base import (
    EpochPlan,
    PruningPolicy,
    check_choice,
    indices_of,
    keep_count,
    mask_of,
    permutation,
    top_k,
)


def _path_of(scores: Any) -> str | None:
    if isinstance(scores, Scores):
        if scores.path is None:
            raise ValueError(
                "These scores have no file yet: save them first, `scores.save('scores.safetensors')`."
            )
        scores = scores.path
    if scores is not None and not isinstance(scores, str | os.PathLike):
        raise TypeError(
            f"scores={type(scores).__name__}: wanted is the path of a file of `Scores.save`, or its `Scores`."
        )
    return None if scores is None else str(os.fspath(scores))


@dataclass(frozen=True)
class StaticPruning(PruningPolicy):
    """Static pruning: K = round(keep_ratio * N) samples, chosen once, by scores s that were made before the run.

        hardest     S = the K highest s_i
        easiest     S = the K lowest s_i
        middle      S = the K samples around the median, ranks (N - K) // 2 to (N - K) // 2 + K - 1
        random      S = K uniform without replacement, from the seed of the run: no scores

    Ties are broken at random. The one choice is made after the `first` full-data epochs and holds until the `last` ones;
    `period` changes nothing.

    The papers train the kept part for as many optimizer steps as the full run takes, so that pruning saves them nothing;
    here an epoch is as short as its samples. Raise `num_train_epochs` to N / K times as many to train as they did.

    Cost: keep_ratio, and what the scores cost: a run, or ten. O(N log N) for the choice.

    Args:
        scores: the file of `Scores.save`, or the `Scores` that were saved or loaded; None with `keep="random"`.
        keep_ratio: share of the samples that is kept, in (0, 1].
        keep: which.
        charge: whether the report counts what the scores cost (`provenance["passes"]`) as passes of this run; else it is
            shown beside them. Charge it once where several runs share the scores, and say so.
        digest: of the content of the file, read from it; a file whose content is another one is refused.

    Raises:
        TypeError, ValueError, FileNotFoundError: at construction, for a file that is not there, not whole or another one,
            and for scores to be charged that do not say what they cost. When the pruner or the trainer is made, for scores
            of another number of samples or of another dataset.

    Papers: EL2N, GraNd: Paul, Ganguli, Dziugaite, NeurIPS 2021, arXiv 2107.07075 (`hardest`; above half of the data dropped,
    a window away from the hardest). Forgetting events: Toneva et al., ICLR 2019, arXiv 1812.05159 (`hardest`).
    """

    scores: str | os.PathLike[str] | Scores | None = None
    keep_ratio: float = 0.5
    keep: Literal["hardest", "easiest", "middle", "random"] = "hardest"
    charge: bool = True
    digest: str | None = None

    static = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _path_of(self.scores))
        super().__post_init__()
        check_choice("keep", self.keep, ("hardest", "easiest", "middle", "random"))
        if not isinstance(self.charge, bool):
            raise TypeError(f"charge={self.charge!r} must be True or False.")
        if (self.scores is None) != (self.keep == "random"):
            raise ValueError(
                f"scores={self.scores!r} with keep={self.keep!r}: keep='random' takes no scores, and the others need them "
                "(`score_dataset` makes them)."
            )
        if self.min_per_class and not self.first:
            raise ValueError(
                f"min_per_class={self.min_per_class} with first=0: labels are known from the first observation on, and the "
                "only choice would be made before it. Set first=1."
            )
        if self.scores is None:
            return
        try:
            scores = self._read()
        except FileNotFoundError:
            if self.digest is None:  # one that is read back, say by a model card, is not to be used
                raise
            return
        object.__setattr__(self, "digest", scores.digest)
        if self.charge and "passes" not in scores.provenance:
            raise ValueError(
                f"{self.scores} does not say what its scores cost, so that cannot be charged: note it, `Scores(..., "
                "provenance={'passes': ...})`, 0 for free ones, or set charge=False."
            )

    def _read(self) -> Scores:
        scores = Scores.load(str(self.scores))
        if self.digest is not None and self.digest != scores.digest:
            raise ValueError(
                f"{self.scores} has the digest {scores.digest}, wanted is {self.digest}: the scores were made anew since. "
                "Use the file of then, or leave `digest` out and start a new run."
            )
        return scores

    def check_dataset(self, n: int, fingerprint: str) -> None:
        """Raises ValueError unless the scores are of these n samples."""
        if self.scores is None:
            return
        scores = self._read()
        if len(scores) != n:
            raise ValueError(
                f"{self.scores} has the scores of {len(scores)} samples, the training set has {n}: score the training set "
                "that is pruned."
            )
        only_n = ("", f"{n} samples")
        if (
            scores.fingerprint != fingerprint
            and scores.fingerprint not in only_n
            and fingerprint not in only_n
        ):
            raise ValueError(
                f"{self.scores} has the scores of the dataset {scores.fingerprint!r}, the training set is {fingerprint!r}: "
                "score the training set that is pruned, or prune the one that was scored."
            )

    def preparation(self) -> dict[str, Any]:
        """What was spent before the run, for the report; empty where there are no scores."""
        if self.scores is None:
            return {}
        scores = self._read()
        noted = (
            "forward_passes",
            "backward_passes",
            "scoring_passes",
            "passes",
            "seconds",
            "runs",
            "epochs",
        )
        spent = {name: scores.provenance[name] for name in noted if name in scores.provenance}
        return {
            "method": scores.method,
            "scores": self.scores,
            "digest": scores.digest,
            "charged": self.charge,
            **spent,
        }

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        n, k = len(table), keep_count(self.keep_ratio, len(table))
        if self.scores is None:
            return EpochPlan(indices_of(mask_of(permutation(n, generator)[:k], n)))
        values = self._read().values
        if self.keep == "middle":
            order = torch.randperm(n, generator=generator)
            order = order[torch.argsort(values[order], stable=True)]
            begin = (n - k) // 2
            return EpochPlan(order[begin : begin + k].sort().values)
        return EpochPlan(top_k(values if self.keep == "hardest" else -values, k, generator))
