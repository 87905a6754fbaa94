"""trl's GRPOTrainer and RLOOTrainer with pruning: prompts are chosen before they are rolled out.

Under torchrun this file is the program of each rank.
"""

import copy
import math
import os
import sys
from pathlib import Path

import datasets
import peft
import pytest
import torch
from huggingface_hub import ModelCardData
from programs import torchrun
from test_sft import tokenizer
from tiny import QUIET, every_checkpoint, learning_rates, llama, same_weights
from torch.utils.data import SequentialSampler
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import RepeatSampler

import hf_dynprune.grpo
from hf_dynprune import (
    GRESO,
    UCB,
    EpsilonGreedy,
    FullData,
    InfoBatch,
    LossProportional,
    PruningReport,
    RandomPruning,
    ThompsonPrompts,
)
from hf_dynprune.cli import main
from hf_dynprune.grpo import (
    SEAMS,
    SIGNALS,
    DynamicPruningGRPOTrainer,
    DynamicPruningRLOOTrainer,
    PromptShape,
    group_signals,
)
from hf_dynprune.model_card import CardFacts, card_of_reports, facts_of, picture_of
from hf_dynprune.plots import plot_runs
from hf_dynprune.potential import read_rollout_log
from hf_dynprune.report import EpochRecord
from hf_dynprune.sampler import RepeatingSampler
from hf_dynprune.table import Last

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
N, G = 13, 4
NAN = math.nan
KINDS = {
    "grpo": (DynamicPruningGRPOTrainer, GRPOTrainer, GRPOConfig),
    "rloo": (DynamicPruningRLOOTrainer, RLOOTrainer, RLOOConfig),
}
# trl reads a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
every_kind = pytest.mark.parametrize("kind", KINDS)


def prompts(n=N):
    """Prompt i is the word w(i + 3) and has the value i."""
    return datasets.Dataset.from_list(
        [{"prompt": f"w{3 + i}", "value": float(i)} for i in range(n)]
    )


def by_tokens(prompts, completions, completion_ids, **columns):
    """A reward that depends on what was generated."""
    return [sum(ids) % 5 / 4 for ids in completion_ids]


def by_prompt(prompts, completions, value, **columns):
    """The value of the prompt, and 1 more for every other completion of an even one."""
    return [v + (i % 2) * (v % 2 == 0) for i, v in enumerate(value)]


def solves(prompts, completions, value, **columns):
    """The first v % 5 completions of each four of prompt v are right."""
    return [float(i % G < v % 5) for i, v in enumerate(value)]


def trainer(
    folder,
    kind="grpo",
    *,
    stock=False,
    reward=by_tokens,
    data=None,
    model=None,
    memory=None,
    extra=None,
    **args,
):
    """A trainer of a tiny Llama; `args` are of its config, `extra` are other arguments."""
    pruned, behind, config = KINDS[kind]
    if memory is not None:
        pruned = type(pruned.__name__, (pruned,), {"memory": memory})
    defaults = {
        **QUIET,
        "num_generations": G,
        "max_completion_length": 3,
        "learning_rate": 0.5,
        "beta": 0.0,
    }
    return (behind if stock else pruned)(
        llama() if model is None else model,
        reward,
        config(str(folder), **{**defaults, **args}),
        train_dataset=prompts() if data is None else data,
        processing_class=tokenizer(),
        **(extra or {}),
    )


def pruned(folder, policy, kind="grpo", **settings):
    extra = {"pruning": policy, **settings.pop("extra", {})}
    return trainer(folder, kind, extra=extra, **settings)


def noting(reward=by_tokens):
    """A reward function, and a list to which each of its calls adds prompts and completions."""
    calls = []

    def noted(prompts, completion_ids, **columns):
        calls.append((list(prompts), copy.deepcopy(completion_ids), sorted(columns)))
        return reward(prompts=prompts, completion_ids=completion_ids, **columns)

    return noted, calls


def logged(run, name):
    return [entry[name] for entry in run.state.log_history if name in entry]


# ---- the signals of a group, by hand -------------------------------------------------------------


def signals_of(rewards, weights=None, **settings):
    rewards = torch.tensor(rewards)
    weights = torch.ones(rewards.shape[1]) if weights is None else torch.tensor(weights)
    signals = group_signals(rewards, weights, 2, **settings)
    assert tuple(signals) == SIGNALS
    return {name: value.tolist() for name, value in signals.items()}


def test_signals_by_hand():
    found = signals_of([[0.0], [1.0], [1.0], [1.0], [0.5], [0.5]])
    assert found["reward_mean"] == [0.5, 1.0, 0.5]
    assert found["reward_std"] == pytest.approx([math.sqrt(0.5), 0.0, 0.0])
    assert found["solved"] == [0.5, 1.0, 0.0]
    assert found["completions"] == [2, 2, 2]


def test_signals_of_several_functions():
    """Weights 2 and 0.5. A function that gives nothing adds nothing to the full marks either."""
    found = signals_of([[1.0, 1.0], [1.0, 0.0], [NAN, 1.0], [1.0, NAN]], [2.0, 0.5])
    assert found["reward_mean"] == [2.25, 1.25]
    assert found["reward_std"] == pytest.approx([0.5 * math.sqrt(0.5), 1.5 * math.sqrt(0.5)])
    assert found["solved"] == [0.5, 1.0]


def test_signals_without_rewards():
    found = signals_of([[NAN], [NAN], [NAN], [1.0]])
    assert all(math.isnan(found[name][0]) for name in SIGNALS[:3])
    assert found["completions"] == [0, 1]
    assert [found[name][1] for name in SIGNALS[:3]] == [1.0, 0.0, 1.0]


def test_equal_rewards_have_no_spread_at_all():
    rewards = torch.full((6, 3), 0.1)
    assert group_signals(rewards, torch.tensor([0.1, 0.2, 0.7]), 3)["reward_std"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("settings", "solved"),
    [
        ({}, [0.5, 0.0]),
        ({"full_marks": 0.5}, [0.5, 1.0]),
        ({"clip": (0.0, 0.5)}, [0.5, 1.0]),
    ],
)
def test_full_marks(settings, solved):
    assert signals_of([[0.0], [1.0], [0.5], [0.5]], **settings)["solved"] == solved


def test_penalties_are_not_part_of_full_marks():
    assert signals_of([[1.0, 0.0], [1.0, 1.0]], [1.0, -1.0])["solved"] == [0.5]


# ---- the order -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("shuffle", "repeats"), [(True, 1), (False, 1), (True, 6)])
def test_order_is_that_of_trl(shuffle, repeats):
    theirs = RepeatSampler(range(N), G, 3, repeats, shuffle, seed=7)
    ours = RepeatingSampler(N, 3, generations=G, repeats=repeats, shuffle=shuffle)
    for epoch in range(4):
        ours.set_epoch_order(ours.order_of(None, 7, epoch))
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)
        assert ours.samples == N // 3 * 3


def test_an_epoch_has_one_order_whatever_was_asked_before():
    sampler = RepeatingSampler(N, 3, generations=G, repeats=1)
    orders = [sampler.order_of(None, 7, epoch).tolist() for epoch in range(4)]
    for epoch in (2, 0, 3, 3):
        assert sampler.order_of(None, 7, epoch).tolist() == orders[epoch]
    kept = torch.tensor([1, 4, 5, 11])
    assert sampler.order_of(kept, 7, 2).tolist() == [i for i in orders[2] if i in kept]
    assert sampler.order_of(None, 8, 2).tolist() != orders[2]


def test_shape_in_generations():
    shape = PromptShape(
        13, num_epochs=2, accumulation=4, drop_last=True, prompts=3, completions=G, repeats=6
    )
    assert [shape.batches(size) for size in (2, 3, 5, 13)] == [0, 6, 6, 24]
    assert [shape.steps(size) for size in (3, 13)] == [2, 6]
    assert shape.global_batch == 3
    with pytest.raises(ValueError, match="keeps 2 of 13"):
        shape.check_size(0, 2)


# ---- off means off, all means stock --------------------------------------------------------------

SCHEDULES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "slices": {"steps_per_generation": 3, "per_device_train_batch_size": 4},
    "iterations": {"num_iterations": 2, "gradient_accumulation_steps": 2},
    "uneven": {
        "num_iterations": 2,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 4,
    },
    "in order": {"shuffle_dataset": False},
    "max_steps": {"max_steps": 8},
    "fractional": {"num_train_epochs": 1.5},
}


def assert_stock(folder, kind, pruning, **settings):
    runs = []
    for stock in (True, False):
        reward, calls = noting()
        extra = {} if stock else {"extra": {"pruning": pruning}}
        run = trainer(folder / str(stock), kind, stock=stock, reward=reward, **settings, **extra)
        run.train()
        runs.append((run, calls))
    (stock, expected), (ours, calls) = runs
    assert calls == expected
    assert len(calls) > 2
    assert same_weights(ours.model, stock.model)
    assert not same_weights(ours.model, llama())
    assert learning_rates(ours) == learning_rates(stock)
    assert ours.state.global_step == stock.state.global_step
    for name in ("loss", "reward", "reward_std", "entropy", "num_tokens", "frac_reward_zero_std"):
        assert logged(ours, name) == logged(stock, name)
    return ours


# RLOO shares the code under test, so it need not go through all of them.
every_schedule = pytest.mark.parametrize(
    ("kind", "schedule"),
    [("grpo", schedule) for schedule in SCHEDULES] + [("rloo", "plain"), ("rloo", "uneven")],
)


@every_schedule
def test_full_data_is_the_stock_trainer(kind, schedule, tmp_path):
    assert_stock(tmp_path, kind, FullData(), **SCHEDULES[schedule])


@every_kind
def test_no_pruning_is_the_stock_trainer(kind, tmp_path):
    run = assert_stock(tmp_path, kind, None, save_strategy="epoch")
    assert run.pruning_report is None
    assert not list(tmp_path.rglob("rollouts_*"))


@pytest.mark.parametrize("scale_rewards", ["batch", "none"])
def test_settings_of_trl_hold(scale_rewards, tmp_path):
    more = {"scale_rewards": scale_rewards, "beta": 0.0, "data_seed": 3, "loss_type": "grpo"}
    assert_stock(tmp_path, "grpo", FullData(), seed=5, logging_steps=1, **more)


def test_metrics_of_a_log_are_not_torn_apart_by_an_epoch(tmp_path):
    stock = trainer(tmp_path, stock=True, logging_steps=4)
    stock.train()
    ours = pruned(tmp_path, FullData(), logging_steps=4)
    ours.train()
    assert logged(ours, "reward") == logged(stock, "reward")
    assert len(logged(ours, "pruning/kept_samples")) == 2


# ---- right prompts -------------------------------------------------------------------------------


def expected_of(i):
    """Mean and std of the rewards of `by_prompt` for prompt i."""
    return (i + 0.5, math.sqrt(1 / 3)) if i % 2 == 0 else (float(i), 0.0)


@every_schedule
def test_each_observation_belongs_to_its_prompt(kind, schedule, tmp_path):
    memory = Last("reward_mean", "reward_std", "completions")
    run = pruned(
        tmp_path, RandomPruning(0.7), kind, reward=by_prompt, memory=memory, **SCHEDULES[schedule]
    )
    run.train()
    table = run.pruner.table
    seen = torch.nonzero(table.observed).squeeze(1).tolist()
    assert len(seen) > 5
    for i in seen:
        found = [float(table[name][i]) for name in memory.names]
        assert found == pytest.approx([*expected_of(i), G])
    report = run.pruning_report
    assert sum(record.rollouts["prompts"] for record in report.epochs) == sum(
        record.forward_passes for record in report.epochs
    )


def test_workers_change_nothing(tmp_path):
    tables = []
    for workers in ({}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}):
        run = pruned(tmp_path, UCB(0.5, signal="reward_mean"), reward=by_prompt, **workers)
        run.train()
        tables.append(run.pruner.table["mean"])
    assert torch.equal(tables[0].nan_to_num(-1), tables[1].nan_to_num(-1))


def test_reward_functions_see_the_columns_of_the_dataset_alone(tmp_path):
    seen = []
    for extra in ({"stock": True}, {"extra": {"pruning": ThompsonPrompts(0.5)}}):
        reward, calls = noting()
        trainer(tmp_path, reward=reward, **extra).train()
        seen.append({tuple(columns) for *_, columns in calls})
    assert seen[0] == seen[1]


def test_several_functions_with_weights_none_and_nan(tmp_path):
    """a rewards even prompts, b the others; c gives NaN for prompt 1 and 2 for the rest."""

    def a(value, **columns):
        return [v if v % 2 == 0 else None for v in value]

    def b(value, **columns):
        return [None if v % 2 == 0 else i % 2 for i, v in enumerate(value)]

    def c(value, **columns):
        return [NAN if v == 1 else 2.0 for v in value]

    run = pruned(
        tmp_path,
        EpsilonGreedy(1.0, decay=1.0, signal="reward_mean"),
        reward=[a, b, c],
        reward_weights=[1.0, 10.0, 0.5],
        num_train_epochs=1,
        data=prompts(12),
    )
    run.train()
    expected = [i + 1 if i % 2 == 0 else 5.0 + (i != 1) for i in range(12)]
    assert run.pruner.table["mean"].tolist() == pytest.approx(expected)
    assert run.pruning_report.totals["rollouts"]["reward_calls"] == 3 * 12 * G
    assert run.pruning_report.totals["rollouts"]["effective_prompts"] == 6


def test_a_prompt_without_a_reward_is_noted_as_such(tmp_path):
    def partly(value, **columns):
        return [None if v == 4 else v for v in value]

    policy = UCB(1.0, signal="reward_mean")
    run = pruned(tmp_path, policy, reward=partly, data=prompts(12), num_train_epochs=1)
    run.train()
    assert run.pruning_report.nonfinite_samples == [4]
    assert run.pruner.table["mean"].isnan().tolist() == [i == 4 for i in range(12)]
    assert run.pruner.table["last_observed"].tolist() == [0] * 12


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_effective_prompts_have_a_gradient(aggregation, tmp_path):
    """Two functions that cancel out: their sum never differs, each of them does."""

    def one(value, **columns):
        return [float(i % 2) * (v < 6) for i, v in enumerate(value)]

    def minus_one(value, **columns):
        return [-x for x in one(value)]

    run = pruned(
        tmp_path,
        FullData(),
        reward=[one, minus_one],
        multi_objective_aggregation=aggregation,
        reward_weights=[1.0, 1.0],
        data=prompts(12),
        num_train_epochs=1,
    )
    run.train()
    effective = {"sum_then_normalize": 0, "normalize_then_sum": 6}[aggregation]
    assert run.pruning_report.totals["rollouts"]["effective_prompts"] == effective
    assert sum(logged(run, "pruning/effective_prompts")) * 2 == effective


@every_kind
def test_effective_share_is_what_trl_logs(kind, tmp_path):
    run = pruned(tmp_path, ThompsonPrompts(0.7), kind, reward=solves, num_train_epochs=4)
    run.train()
    zero = logged(run, "frac_reward_zero_std")
    assert logged(run, "pruning/effective_prompts") == pytest.approx([1 - share for share in zero])
    assert 0 < sum(zero) < len(zero)
    run.state.save_to_json(tmp_path / "trainer_state.json")
    log = read_rollout_log(tmp_path)
    assert log.effective_share == pytest.approx(1 - sum(zero) / len(zero))
    assert (log.steps, log.visits) == (run.state.global_step, None)


def test_clipped_rewards_of_rloo(tmp_path):
    policy = UCB(1.0, signal="reward_mean")
    run = pruned(
        tmp_path,
        policy,
        "rloo",
        reward=by_prompt,
        reward_clip_range=(2.0, 5.0),
        data=prompts(12),
        num_train_epochs=1,
    )
    run.train()
    mean = [sum(min(5, max(2, i + k * (i % 2 == 0))) for k in (0, 1)) / 2 for i in range(12)]
    assert run.pruner.table["mean"].tolist() == pytest.approx(mean)


# ---- the rules choose ----------------------------------------------------------------------------

POLICIES = [
    ThompsonPrompts(0.5),
    GRESO(),
    UCB(0.5, signal="reward_std"),
    EpsilonGreedy(0.5, signal="reward_std"),
    LossProportional(0.5, signal="reward_std"),
    RandomPruning(0.5),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_rule_trains_and_leaves_out_what_it_should(policy, tmp_path):
    data = prompts(20)
    settings = {"per_device_train_batch_size": 16, "num_train_epochs": 8}
    run = pruned(tmp_path, policy, reward=solves, data=data, **settings)
    run.train()
    report = run.pruning_report
    assert report.totals["rollouts"]["completions"] == G * report.passes
    assert report.totals["optimizer_steps"] == run.state.global_step
    if policy.signals:
        useful = torch.tensor([0 < i % 5 < G for i in range(20)])
        kept = run.pruner.table["times_kept"].double()
        assert kept[useful].mean() > kept[~useful].mean() + 1


# ---- schedule and bill ---------------------------------------------------------------------------


def test_steps_epochs_and_rates_are_those_of_the_pruned_run(tmp_path):
    data, settings = prompts(40), {"num_train_epochs": 3, "gradient_accumulation_steps": 2}
    run = pruned(tmp_path, RandomPruning(0.3), data=data, **settings)  # P = 4
    run.train()
    assert run.state.global_step == run.state.max_steps == 9
    assert learning_rates(run) == pytest.approx([0.5 * (1 - step / 9) for step in range(9)])
    assert logged(run, "epoch")[-1] == 3.0
    assert [record.samples for record in run.pruning_report.epochs] == [12, 12, 12]
    assert set(run.lr_scheduler.get_last_lr()) == {0.0}
    longer = pruned(tmp_path, RandomPruning(0.3), data=data, max_steps=11, **settings)
    longer.train()
    assert longer.state.global_step == 11
    assert [record.optimizer_steps for record in longer.pruning_report.epochs] == [3, 3, 3, 2]
    assert learning_rates(longer)[-1] == pytest.approx(0.5 / 11)


def test_the_size_of_a_choice_may_depend_on_the_rewards(tmp_path):
    run = pruned(tmp_path, GRESO(), reward=solves, data=prompts(40), num_train_epochs=4)
    run.train()
    records = run.pruning_report.epochs
    assert records[0].samples == 40 > records[-1].samples >= 24
    assert run.state.global_step == sum(record.samples // 2 for record in records)
    assert learning_rates(run)[-1] > 0
    assert set(run.lr_scheduler.get_last_lr()) == {0.0}


def test_bill(tmp_path):
    reward, calls = noting()
    run = pruned(
        tmp_path,
        ThompsonPrompts(0.5),
        reward=reward,
        data=prompts(16),
        num_iterations=2,
        num_train_epochs=2,
    )
    run.train()
    report = run.pruning_report
    completions = [ids for _, call, _ in calls for ids in call]
    rollouts = report.totals["rollouts"]
    assert rollouts["completions"] == len(completions) == 2 * 8 * G
    assert rollouts["tokens"] == sum(map(len, completions))
    assert rollouts["prompts"] == 16
    assert rollouts["reward_calls"] == len(completions)
    assert report.passes == 16  # however often a rollout is trained on
    assert report.cost_ratio == 0.5
    assert report.totals["optimizer_steps"] == 16
    seconds = report.totals["seconds"]
    assert seconds["generation"] > 0 < seconds["rewards"]
    assert f"{len(completions)} of 16 prompts" in report.summary()["rollouts"]
    report.save(tmp_path / "report.json")
    again = PruningReport.load(tmp_path / "report.json")
    assert again.to_dict() == report.to_dict()
    assert again.epochs[0].rollouts == report.epochs[0].rollouts


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A full run and a pruned one, with an evaluation after each epoch: name -> report, folder."""
    found = {}
    for name, policy in (("full", FullData()), ("pruned", ThompsonPrompts(0.5))):
        folder = tmp_path_factory.mktemp(name)
        run = pruned(
            folder,
            policy,
            eval_strategy="epoch",
            per_device_eval_batch_size=8,
            extra={"eval_dataset": prompts(4)},
        )
        run.train()
        run.pruning_report.save(folder / "report.json")
        found[name] = run.pruning_report, folder
    return found


def test_evaluation_is_not_part_of_the_bill(evaluated):
    report, _ = evaluated["pruned"]
    assert report.totals["rollouts"]["prompts"] == 12
    assert report.metrics["eval_reward"] >= 0
    assert report.totals["seconds"]["evaluation"] > 0


def test_bill_in_the_report_of_several_runs(evaluated, capsys):
    assert main(["report", *(str(folder) for _, folder in evaluated.values())]) == 0
    head, *rows = capsys.readouterr().out.splitlines()[:3]
    assert "eval_reward" in head
    for (report, _), row in zip(evaluated.values(), rows, strict=True):
        rollouts, cells = report.totals["rollouts"], row.split()
        for name in ("completions", "tokens", "reward_calls"):
            assert f"{rollouts[name]:,}" in cells
        for phase in ("generation", "training"):
            assert f"{report.totals['seconds'][phase]:,.1f}" in cells


def test_bill_in_the_card(evaluated, tmp_path):
    (run, folder), (full, of_full) = evaluated["pruned"], evaluated["full"]
    facts = facts_of([run], full=[full])
    assert facts["rollouts"] == run.totals["rollouts"]
    assert facts["full"]["rollouts"] == full.totals["rollouts"]
    paths = ["--output", tmp_path / "README.md", "--picture", tmp_path / "runs.png"]
    assert main(["card", str(folder), "--full", str(of_full), *map(str, paths)]) == 0
    text = (tmp_path / "README.md").read_text()
    for name in ("completions", "tokens", "reward_calls", "effective_prompts"):
        assert f"| {run.totals['rollouts'][name]:,} | {full.totals['rollouts'][name]:,} |" in text
    for phase in ("generation", "rewards"):
        seconds = f"{run.totals['seconds'][phase]:,.2f} | {full.totals['seconds'][phase]:,.2f}"
        assert f"| seconds, {phase} | {seconds} |" in text
    assert "| generated tokens |" in text.partition("## Against the full run")[2]
    assert f"rollouts: {run.totals['rollouts']['completions']}" in text.partition("# ")[0]
    alone = card_of_reports([run], CardFacts(ModelCardData())).content
    assert f"| rollouts | {run.totals['rollouts']['completions']:,} | not measured |" in alone


def test_runs_are_drawn_against_rollouts(evaluated, tmp_path):
    runs = {name: report for name, (report, _) in evaluated.items()}
    against, seconds = plot_runs(runs, "eval_reward").axes
    label = against.get_xlabel()
    assert "rollouts" in label
    assert "seconds" in seconds.get_xlabel()
    for line, report in zip(against.lines, runs.values(), strict=True):
        assert line.get_xdata()[-1] == report.totals["rollouts"]["completions"]
    (ax,) = picture_of(runs["pruned"], full=runs["full"]).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == (label, "eval reward")
    command = ["plot", "runs", *(str(folder) for _, folder in evaluated.values())]
    assert main([*command, "--output", str(tmp_path / "runs.png")]) == 0
    other = PruningReport(FullData().to_dict(), 4, 0, 0, 1.0, [EpochRecord(0, True, 4)])
    other.epochs[0].metrics = {"eval_reward": 1.0}
    mixed = plot_runs({**runs, "other": other}, "eval_reward")
    assert "passes" in mixed.axes[0].get_xlabel()
    with pytest.raises(ValueError, match="'other' has no rollouts"):
        plot_runs({**runs, "other": other}, "eval_reward", against="rollouts")


# ---- resuming ------------------------------------------------------------------------------------

RESUMED = {
    "plain": {"num_train_epochs": 3},
    "slices": {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "per_device_train_batch_size": 4,
        "data": prompts(5),
    },
    "accumulation": {
        "num_train_epochs": 3,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 4,
    },
}


def resumable(kind, policy, settings):
    def make(folder):
        return pruned(
            folder,
            policy,
            kind,
            model=llama(attention_dropout=0.2),
            disable_dropout=False,
            **{"data": prompts(9), "save_strategy": "steps", "save_steps": 1, **settings},
        )

    return make


def test_a_rule_without_a_fixed_size_resumes_too(tmp_path):
    make = resumable("grpo", GRESO(), {"reward": solves, "data": prompts(6)})
    assert len(list(every_checkpoint(make, tmp_path))) >= 3


@pytest.mark.parametrize(
    ("kind", "schedule"), [("grpo", schedule) for schedule in RESUMED] + [("rloo", "slices")]
)
def test_resume_from_every_checkpoint(kind, schedule, tmp_path):
    policy = ThompsonPrompts(0.5) if kind == "grpo" else UCB(0.5, signal="reward_std")
    resumed = list(every_checkpoint(resumable(kind, policy, RESUMED[schedule]), tmp_path))
    assert len(resumed) >= 3
    if schedule != "plain":
        assert list(tmp_path.rglob("rollouts_0.pt"))


def test_rollouts_are_saved_only_in_the_middle_of_a_generation(tmp_path):
    make = resumable("grpo", ThompsonPrompts(0.5), {"steps_per_generation": 2})
    make(tmp_path).train()
    saved = [(tmp_path / f"checkpoint-{step}" / "rollouts_0.pt").exists() for step in range(1, 5)]
    assert saved == [True, False] * 2


def test_rollouts_of_other_ranks_are_refused(tmp_path):
    make = resumable("grpo", ThompsonPrompts(0.5), {"steps_per_generation": 2})
    make(tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    run = make(tmp_path / "other")
    run._saved_rollouts(str(checkpoint))
    torch.save({"ranks": 2, "batches": []}, checkpoint / "rollouts_0.pt")
    for _ in range(2):  # those of two ranks, and none
        with pytest.raises(ValueError, match=r"ranks, not of 1"):
            run._saved_rollouts(str(checkpoint))
        (checkpoint / "rollouts_0.pt").unlink(missing_ok=True)


def test_resume_begins_the_epoch_again_if_asked(tmp_path):
    settings = {"steps_per_generation": 2, "num_train_epochs": 1}
    make = resumable("grpo", ThompsonPrompts(0.5), settings)
    make(tmp_path).train()
    run = make(tmp_path / "again")
    run.args.ignore_data_skip = True
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert run.pruning_report.totals["rollouts"]["prompts"] == 8  # 4 of them twice


def test_a_second_run_begins_with_a_generation(tmp_path):
    run = pruned(tmp_path, FullData(), max_steps=1, steps_per_generation=2)
    for _ in range(2):
        run.train()
        assert run.pruning_report.totals["rollouts"]["completions"] == 16


def test_other_completions_of_a_prompt_are_another_run(tmp_path):
    make = resumable("grpo", ThompsonPrompts(0.5), {})
    make(tmp_path).train()
    run = resumable("grpo", ThompsonPrompts(0.5), {"num_iterations": 2})(tmp_path / "again")
    with pytest.raises(ValueError, match="batches a generation: 1 there, 2 here"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---- several ranks -------------------------------------------------------------------------------


def run_on_ranks(folder, policy, batch, reward=solves, **settings):
    """A run with the same batches on any number of ranks, and completions without chance."""
    run = pruned(
        folder,
        policy,
        reward=reward,
        data=prompts(12),
        top_k=1,
        num_train_epochs=4,
        per_device_train_batch_size=batch // RANKS,
        ddp_find_unused_parameters=False,
        **settings,
    )
    run.train()
    records = run.pruning_report.epochs
    for record in records:
        # Slices of a generation are cut at random, on each rank apart, so that weights and then
        # completions differ.
        record.rollouts.pop("tokens")
    return {
        "weights": {name: value.double() for name, value in run.model.state_dict().items()},
        "table": run.pruner.table.state_dict(),
        "rates": learning_rates(run),
        "effective": logged(run, "pruning/effective_prompts"),
        "records": [(r.samples, r.optimizer_steps, r.passes, r.rollouts) for r in records],
    }


def everything_on_ranks(folder):
    slices = {"num_iterations": 2, "steps_per_generation": 2}
    runs = {
        "thompson": run_on_ranks(folder / "0", ThompsonPrompts(0.5), 8),
        "greso, slices": run_on_ranks(folder / "1", GRESO(), 8, **slices),
        "a group on two ranks": run_on_ranks(folder / "2", GRESO(), 4, reward=by_prompt),
    }
    make = resumable(
        "grpo",
        ThompsonPrompts(0.5),
        {**RESUMED["slices"], "data": prompts(9), "num_train_epochs": 1},
    )
    resumed = len(list(every_checkpoint(make, folder / "resumed"))) if RANKS > 1 else 0
    return runs, resumed


def test_two_ranks_train_what_one_trains(tmp_path):
    done = torchrun(__file__, tmp_path, ranks=2, imports=("peft", "hf_dynprune.grpo"))
    assert done.returncode == 0, done.stderr
    alone, _ = everything_on_ranks(tmp_path / "alone")
    for rank in range(2):
        runs, resumed = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert resumed == 3
        for name, two in runs.items():
            one = alone[name]
            for part in ("rates", "records", "effective"):
                assert two[part] == one[part], (name, part)
            for column, values in one["table"].items():
                assert torch.equal(two["table"][column].nan_to_num(7), values.nan_to_num(7)), name
            if "slices" not in name:
                torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-4, atol=1e-5)


# ---- refusals, before the first rollout ----------------------------------------------------------


def never(**columns):
    raise AssertionError("rolled out")


@every_kind
@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (UCB(0.5), "'loss'"),
        (LossProportional(0.5), "'loss'"),
        (InfoBatch(), "weighs"),
        (UCB(0.5, signal="reward_std", scoring="all"), "scoring='all'"),
        (UCB(0.5, signal="reward_std", min_per_class=1), "'label'"),
        (RandomPruning(0.1), "keeps 1 of 13"),
    ],
    ids=str,
)
def test_policies_that_do_not_fit_are_refused(kind, policy, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        pruned(tmp_path, policy, kind, reward=never)


def test_a_stream_is_refused(tmp_path):
    for data in (prompts().to_iterable_dataset(),):
        with pytest.raises(ValueError, match="stream"):
            pruned(tmp_path, ThompsonPrompts(0.5), reward=never, data=data, max_steps=2)


def test_a_column_of_our_name_is_refused(tmp_path):
    data = prompts().add_column("sample_index", [0] * N)
    with pytest.raises(ValueError, match="sample_index"):
        pruned(tmp_path, ThompsonPrompts(0.5), reward=never, data=data)


def test_generations_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(8\).*\(3\)"):
        pruned(tmp_path, ThompsonPrompts(0.5), reward=never, num_generations=3)


def test_an_order_of_ones_own_is_refused(tmp_path):
    class Ordered(DynamicPruningGRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    class Loaded(DynamicPruningGRPOTrainer):
        def _get_dataloader(self, *args, **kwargs):
            return super()._get_dataloader(*args, **{**kwargs, "sampler_fn": SequentialSampler})

    for cls in (Ordered, Loaded):
        run = pruned(tmp_path, None)
        with pytest.raises(ValueError, match=r"Ordered|SequentialSampler"):
            cls(
                llama(),
                never,
                run.args,
                train_dataset=prompts(),
                processing_class=tokenizer(),
                pruning=ThompsonPrompts(0.5),
            ).train()


@pytest.mark.parametrize("wrong", [1, 7])
def test_a_wrong_number_of_rewards_is_refused_before_a_step(wrong, tmp_path):
    run = pruned(tmp_path, ThompsonPrompts(0.5), reward=lambda **columns: [1.0] * wrong)
    with pytest.raises(ValueError, match=f"{wrong} rewards, but 8"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("nothing", [None, NAN])
def test_rewards_that_are_none_are_refused_before_a_step(nothing, tmp_path):
    def silent(completions, **columns):
        return [nothing] * len(completions)

    run = pruned(tmp_path, ThompsonPrompts(0.5), reward=silent)
    with pytest.raises(ValueError, match=r"silent.*8 completions"):
        run.train()
    assert run.state.global_step == 0


def test_a_trainer_that_mixes_groups_is_found_out(tmp_path):
    class Mixing(DynamicPruningGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs[::2] + inputs[1::2])

    run = pruned(tmp_path, None)
    mixing = Mixing(
        llama(),
        by_tokens,
        run.args,
        train_dataset=prompts(),
        processing_class=tokenizer(),
        pruning=FullData(),
    )
    with pytest.raises(RuntimeError, match="groups of 4"):
        mixing.train()


# ---- what else trl can do ------------------------------------------------------------------------


def test_peft(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    extra = {"peft_config": config}
    run = pruned(tmp_path, ThompsonPrompts(0.5), extra=extra, save_strategy="epoch")
    run.train()
    assert run.pruning_report.totals["rollouts"]["prompts"] == 12
    again = pruned(tmp_path, ThompsonPrompts(0.5), extra=extra)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_weights(again.model, run.model)


def test_async_reward_functions(tmp_path):
    async def later(value, **columns):
        return by_prompt(None, None, value)

    policy = UCB(1.0, signal="reward_mean")
    run = pruned(tmp_path, policy, reward=later, data=prompts(12), num_train_epochs=1)
    run.train()
    expected = [expected_of(i)[0] for i in range(12)]
    assert run.pruner.table["mean"].tolist() == pytest.approx(expected)


@every_kind
def test_card(kind, tmp_path):
    run = pruned(tmp_path, ThompsonPrompts(0.5), kind, save_strategy="epoch")
    run.train()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "thompson-prompts" in text
    assert f"- {kind}" in text
    assert (tmp_path / "report.json").exists()


def test_every_seam_exists(tmp_path):
    found = {
        "GRPOTrainer": pruned(tmp_path, None),
        "RLOOTrainer": pruned(tmp_path, None, "rloo"),
    }
    found["GRPOConfig"] = found["GRPOTrainer"].args
    found["Trainer"] = found["GRPOTrainer"]
    for seam, reason in SEAMS.items():
        owner, _, name = seam.partition(".")
        assert reason
        assert hasattr(found[owner], name) if name else hasattr(hf_dynprune.grpo, owner), seam
        if owner == "GRPOTrainer" and "objective" not in name:
            assert hasattr(found["RLOOTrainer"], name), seam


# ---- the recipe ----------------------------------------------------------------------------------


def test_recipe(recipe, tmp_path, capsys):
    """A first model, saved, and two runs that continue from it; the files differ in the pruning."""
    little = ["--prompts", "30", "--eval_prompts", "12", "--width", "16", "--layers", "1"]
    little += ["--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "16"]
    little += ["--warm_steps", "2", "--warm_batch", "8", "--num_train_epochs", "2"]
    little += ["--report_to", "none", "--disable_tqdm", "True"]
    recipe("grpo", *little, "--warm_only", "True", "--output_dir", tmp_path / "warm")
    capsys.readouterr()
    little += ["--model", tmp_path / "warm"]
    configs = Path(__file__).parents[1] / "recipes" / "configs"
    for name in ("full", "pruned"):
        recipe("grpo", configs / f"grpo_{name}.yaml", *little, "--output_dir", tmp_path / name)
        report = PruningReport.load(tmp_path / name / "report.json")
        assert report.num_samples == 30
        assert report.totals["rollouts"]["prompts"] == {"full": 60, "pruned": 16}[name] // 2 * 2
        assert {"eval_reward", "eval_accuracy/level_1"} <= set(report.metrics)
    assert "thompson-prompts: reward " in capsys.readouterr().out


def test_sums_are_different_and_held_out_ones_are_not_trained_on(recipe):
    module = recipe("grpo")
    task, taken = module.TaskArguments(), set()
    test, train = (module.different_sums(task, n, taken) for n in (100, 300))
    assert len(set(test["prompt"]) | set(train["prompt"])) == 400
    assert all(
        eval(p[:-1]) == int(a) for p, a in zip(train["prompt"], train["answer"], strict=True)
    )
    assert [train["level"].count(level) for level in (1, 2, 3)] == [30, 90, 180]
    with pytest.raises(ValueError, match="1 digits"):
        module.different_sums(task, 1000, taken)
    for shares in ([0.5], [-0.5, 1.5], [0.1] * 10):
        with pytest.raises(ValueError, match="level_shares"):
            module.TaskArguments(level_shares=shares)


def test_a_right_answer_has_nothing_else(recipe):
    module, noted = recipe("grpo"), {}
    words = module.make_tokenizer()
    texts = ["12", "12", "13", "121"]
    ids = [[*words(text).input_ids, *[1] * (i != 1)] for i, text in enumerate(texts)]
    rewards = module.is_right(ids, ["12"] * 4, [1, 1, 2, 2], noted.__setitem__, words)
    assert rewards == [1.0, 0.0, 0.0, 0.0]
    assert noted == {"accuracy/level_1": 0.5, "accuracy/level_2": 0.0}


def rank(folder):
    seen = everything_on_ranks(folder)
    torch.save(seen, folder / f"rank{RANK}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # as in ranks.py


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
