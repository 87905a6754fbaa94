"""Dynamic data pruning for the Hugging Face Trainer.

Train each epoch on a changing subset of the data, at a half to a third of the full cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; a test compares it with the table below
    from .advice import Advice, advise
    from .arguments import PruningArguments
    from .hub import kept_dataset, load_scores_from_hub, push_scores_to_hub, push_timm_to_hub
    from .policies import (
        GRESO,
        IES,
        KAKURENBO,
        UCB,
        Choice,
        ClassBudget,
        EffectiveShare,
        EpochPlan,
        EpsilonGreedy,
        FullData,
        InfoBatch,
        LossProportional,
        OrderDP,
        PruningPolicy,
        RandomPruning,
        ReferenceLoss,
        ScoredPolicy,
        SeTa,
        StaticPruning,
        ThompsonPrompts,
        make_policy,
        top_k,
    )
    from .pruner import DynamicPruner
    from .report import PruningReport
    from .sampler import PruningSampler
    from .schedule import RunShape
    from .scores import Scores
    from .scoring_runs import score_dataset
    from .table import Column, SampleTable
    from .trainer import DynamicPruningMixin, DynamicPruningTrainer

__version__ = "0.2.0"

# The table of contents. Nothing is imported until it is used (PEP 562), so that
# `import hf_dynprune` costs nothing.
_MODULE_OF = {
    "Advice": "advice",
    "Choice": "policies",
    "ClassBudget": "policies",
    "Column": "table",
    "DynamicPruner": "pruner",
    "DynamicPruningMixin": "trainer",
    "DynamicPruningTrainer": "trainer",
    "EffectiveShare": "policies",
    "EpochPlan": "policies",
    "EpsilonGreedy": "policies",
    "FullData": "policies",
    "GRESO": "policies",
    "IES": "policies",
    "InfoBatch": "policies",
    "KAKURENBO": "policies",
    "LossProportional": "policies",
    "OrderDP": "policies",
    "PruningArguments": "arguments",
    "PruningPolicy": "policies",
    "PruningReport": "report",
    "PruningSampler": "sampler",
    "RandomPruning": "policies",
    "ReferenceLoss": "policies",
    "RunShape": "schedule",
    "SampleTable": "table",
    "ScoredPolicy": "policies",
    "Scores": "scores",
    "SeTa": "policies",
    "StaticPruning": "policies",
    "ThompsonPrompts": "policies",
    "UCB": "policies",
    "advise": "advice",
    "kept_dataset": "hub",
    "load_scores_from_hub": "hub",
    "make_policy": "policies",
    "push_scores_to_hub": "hub",
    "push_timm_to_hub": "hub",
    "score_dataset": "scoring_runs",
    "top_k": "policies",
}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}"
        )
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
