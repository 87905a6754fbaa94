"""What users may import. A change here changes the interface, and belongs in the changelog."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import hf_dynprune

PUBLIC = [
    "Advice",
    "Choice",
    "ClassBudget",
    "Column",
    "DynamicPruner",
    "DynamicPruningMixin",
    "DynamicPruningTrainer",
    "EffectiveShare",
    "EpochPlan",
    "EpsilonGreedy",
    "FullData",
    "GRESO",
    "IES",
    "InfoBatch",
    "KAKURENBO",
    "LossProportional",
    "OrderDP",
    "PruningArguments",
    "PruningPolicy",
    "PruningReport",
    "PruningSampler",
    "RandomPruning",
    "ReferenceLoss",
    "RunShape",
    "SampleTable",
    "ScoredPolicy",
    "Scores",
    "SeTa",
    "StaticPruning",
    "ThompsonPrompts",
    "UCB",
    "advise",
    "kept_dataset",
    "load_scores_from_hub",
    "make_policy",
    "push_scores_to_hub",
    "push_timm_to_hub",
    "score_dataset",
    "top_k",
]


def test_names_are_pinned():
    assert hf_dynprune.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_name_can_be_imported(name):
    value = getattr(hf_dynprune, name)
    assert value.__name__ == name
    assert value.__module__.startswith("hf_dynprune.")
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert value.__doc__


def test_type_checkers_see_the_same_table():
    tree = ast.parse(Path(hf_dynprune.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hf_dynprune._MODULE_OF


def test_star_import():
    scope = {}
    exec("from hf_dynprune import *", scope)
    assert set(PUBLIC) <= set(scope)


def test_dir_and_version():
    assert dir(hf_dynprune) == sorted([*PUBLIC, "__version__"])
    assert re.fullmatch(r"\d+\.\d+\.\d+([.a-z]+\d+)?", hf_dynprune.__version__)


def test_unknown_name_lists_what_there_is():
    with pytest.raises(AttributeError, match=r"'Ucb'.*Advice, .*UCB"):
        _ = hf_dynprune.Ucb
    with pytest.raises(ImportError, match="Ucb"):
        exec("from hf_dynprune import Ucb")
    assert not hasattr(hf_dynprune, "nothing")


def test_modules_can_be_reached():
    import hf_dynprune.policies

    assert hf_dynprune.policies.UCB is hf_dynprune.UCB
