"""DynamicPruningTrainer as a whole: off means off, full data is the stock run, the seams."""

import ast
import importlib
import inspect
import re

import pytest
import torch
import transformers
from packaging.version import Version
from sentence_transformers import SentenceTransformerTrainer
from tiny import images, learning_rates, recorded, same_weights, trainer, vit
from transformers import Trainer, TrainerCallback, trainer_pt_utils
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

from hf_dynprune import UCB, FullData, RandomPruning
from hf_dynprune.checkpoints import logger

# ---- promise 5: off means off --------------------------------------------------------------------


def test_pruning_none_is_the_stock_trainer(tmp_path):
    stock = trainer(tmp_path, cls=Trainer)
    off = trainer(tmp_path, pruning=None)
    for run in (stock, off):
        run.train()
    assert same_weights(stock.model, off.model)
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    logs = [
        [{k: v for k, v in e.items() if k not in drop} for e in run.state.log_history]
        for run in (stock, off)
    ]
    assert logs[0] == logs[1]
    assert off.pruning_report is None
    assert off.pruner is None
    assert "loss_is_scaled_for_ga" not in vars(off)
    assert [type(c) for c in off.callback_handler.callbacks] == [
        type(c) for c in stock.callback_handler.callbacks
    ]


@pytest.mark.parametrize("n", [40, 37])
def test_full_data_is_the_stock_run(n, tmp_path):
    stock = trainer(
        tmp_path, cls=Trainer, data=images(n), lr_scheduler_type="cosine", warmup_steps=2
    )
    ours = trainer(
        tmp_path, pruning=FullData(), data=images(n), lr_scheduler_type="cosine", warmup_steps=2
    )
    batches = recorded(ours)
    for run in (stock, ours):
        run.train()
    assert learning_rates(stock) == learning_rates(ours)
    for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    expected = []
    for epoch in range(3):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(42 + epoch))
        expected += [batch.tolist() for batch in order.split(8)]
    assert batches == expected
    assert ours.pruning_report.cost_ratio == 1


def test_evaluation_and_prediction_are_untouched(tmp_path):
    held_out = images(10, seed=3)
    stock = trainer(tmp_path, cls=Trainer, extra={"eval_dataset": held_out})
    ours = trainer(tmp_path, pruning=UCB(0.5), extra={"eval_dataset": held_out})
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    assert (ours.predict(held_out).predictions == stock.predict(held_out).predictions).all()


class Events(TrainerCallback):
    """Notes which events it sees, in which order, and at which step."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.seen.append(
                (name, state.global_step)
            )
        return super().__getattribute__(name)


def test_callbacks_see_the_events_of_the_stock_trainer_in_its_order(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 3,
    }
    settings["per_device_train_batch_size"] = 10
    seen = {}
    for name, options in {
        "stock": {"cls": Trainer, "num_train_epochs": 2},
        "pruned": {
            "pruning": RandomPruning(0.5),
            "num_train_epochs": 4,
        },  # as many steps, in twice as many epochs
        "full": {"pruning": FullData(), "num_train_epochs": 2},
    }.items():
        events = Events()
        options["extra"] = {"eval_dataset": images(8), "callbacks": [events]}
        trainer(tmp_path / name, **settings, **options).train()
        seen[name] = events.seen
    assert seen["full"] == seen["stock"]

    def within_epochs(events):
        return [event for event in events if not event[0].startswith("on_epoch")]

    assert within_epochs(seen["pruned"]) == within_epochs(seen["stock"])
    assert {name for name, _ in seen["pruned"]} == {name for name, _ in seen["stock"]}


def test_our_messages_follow_the_verbosity_of_transformers():
    before = logging.get_verbosity()
    try:
        for verbosity, shown in ((logging.WARNING, True), (logging.ERROR, False)):
            logging.set_verbosity(verbosity)
            assert logger.isEnabledFor(logging.WARNING) is shown
    finally:
        logging.set_verbosity(before)


def test_global_random_states_are_the_stock_trainers(tmp_path):
    stock = trainer(tmp_path, cls=Trainer, model=vit(dropout=0.1))
    stock.train()
    expected = torch.rand(3)
    ours = trainer(tmp_path, pruning=FullData(), model=vit(dropout=0.1))
    ours.train()
    assert torch.equal(torch.rand(3), expected)


# ---- the seams -----------------------------------------------------------------------------------

# The modules that lean on names of others which are private, or public but not documented. What the
# seams do is tested where they act: lengths, rates and resuming in test_data_side.py and
# test_checkpoints.py, losses in test_loss_side.py, names of weights in test_upstream.py.
MODULES = ("upstream", "checkpoints", "data_side", "loss_side", "trainer", "scoring_runs")
MODULES += ("sft", "grpo", "trl_card", "preference", "preference_experimental", "embedding")
MODULES += ("averages",)


# Names that lower versions lack, and the version that brought them. The code asks for the name.
SINCE = {"Trainer.loss_is_scaled_for_ga": "5.19"}


def seams(module):
    """The names that a module lists, without their owners."""
    listed = getattr(importlib.import_module(f"hf_dynprune.{module}"), "SEAMS", {})
    return {word for name in listed for word in re.findall(r"\w+", name)}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The private names of the objects that we lean on, with those of their attributes."""
    run = trainer(tmp_path_factory.mktemp("stock"), cls=Trainer)
    run.train()
    libraries = (SFTTrainer, GRPOTrainer, DPOTrainer, KTOTrainer, SentenceTransformerTrainer)
    owners = (run, run.lr_scheduler, run.model, *libraries)
    names = {name for owner in owners for name in dir(owner)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("module", MODULES)
def test_every_private_name_of_others_is_listed(module, foreign):
    tree = ast.parse(inspect.getsource(importlib.import_module(f"hf_dynprune.{module}")))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    used |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert used & (foreign | {"_internal_call"}) <= seams(module)


def test_every_name_that_is_listed_exists(tmp_path):
    stock = trainer(tmp_path, cls=Trainer)
    stock.train()
    found = {
        "Trainer": stock,
        "LambdaLR": stock.lr_scheduler,
        "PreTrainedModel": stock.model,
        "DataLoaderShard": stock.get_train_dataloader(),
        "ProgressCallback": ProgressCallback(),
        "trainer_pt_utils": trainer_pt_utils,
        "LengthGroupedSampler": trainer_pt_utils.LengthGroupedSampler(2, lengths=[1, 2]),
    }
    for module in ("upstream", "data_side", "loss_side", "scoring_runs"):
        for seam in importlib.import_module(f"hf_dynprune.{module}").SEAMS:
            owner, _, name = seam.partition(".")
            if owner == "NotebookProgressCallback":  # cannot be imported without IPython
                continue
            if Version(transformers.__version__) < Version(SINCE.get(seam, "0")):
                continue
            name, _, argument = name.rstrip(")").partition("(")
            assert hasattr(found[owner], name), seam
            if argument:
                assert argument in inspect.signature(getattr(found[owner], name)).parameters
