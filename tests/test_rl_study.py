"""The study of prompts: its runs with a tiny budget, and its results by hand."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_dynprune.files import load_json
from recipes.studies import rl, rl_results
from recipes.studies.rl_results import FEWER, FILTER, TUNING_SEED, UNIFORM

# trl reads a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")


# ---- the results, by hand ------------------------------------------------------------------------


def run_of(method, seed, slope, share=0.2, effective=100):
    """A run of 4,000 rollouts whose accuracy is slope * rollouts, noted every 50 rollouts."""
    points = [(spent, slope * spent) for spent in range(0, 4001, 50)]
    return {
        **rl.Key(share, method, seed, 8, 1e-4)._asdict(),
        "rollouts": {"prompts": 500, "effective_prompts": effective, "completions": 4000},
        "optimizer_steps": 62,
        "curve": [
            {"rollouts": spent, "test": [0.0, value], "validation": [0.0, value / 2]}
            for spent, value in points
        ],
    }


SLOW, FAST = 1e-4, 2e-4


def test_accuracy_is_a_mean_of_five_points():
    found = rl_results.accuracies(run_of(UNIFORM, 0, SLOW))
    assert found[0] == (0, 0.0)
    assert found[1] == (250, pytest.approx(SLOW * 150))
    assert found[-1] == (4000, pytest.approx(SLOW * 3900))


@pytest.mark.parametrize("part", rl_results.PARTS)
def test_saving_by_hand(part):
    """Each reaches a part of what the slow run gains. A mean is the value 100 rollouts before."""
    slow, fast = run_of(UNIFORM, 0, SLOW), run_of("rule", 0, FAST)
    expected = (part * 3900 + 100) / (part / 2 * 3900 + 100)
    assert rl_results.saving(fast, slow, part) == pytest.approx(expected)
    assert rl_results.saving(slow, slow, part) == pytest.approx(1)
    assert rl_results.saving(run_of("rule", 0, SLOW / 3), slow, part) is None


def test_rows_are_paired_by_seed():
    runs = [run_of(UNIFORM, seed, SLOW) for seed in (0, 1)]
    runs += [run_of("fast", seed, FAST, effective=400) for seed in (0, 1, 2)]
    runs += [run_of("mixed", 0, FAST), run_of("mixed", 1, SLOW / 2)]
    runs += [run_of(UNIFORM, TUNING_SEED, FAST)]
    uniform, fast, mixed = rl_results.summarise(runs)
    saved = fast["savings"][0.8]
    assert (uniform["seeds"], fast["seeds"], saved["seeds"]) == (2, 3, 2)
    assert (uniform["effective_share"], fast["effective_share"]) == pytest.approx((0.2, 0.8))
    assert uniform["to_uniform"] is None
    assert fast["to_uniform"]["mean"] == pytest.approx(SLOW * 3900)
    expected = rl_results.saving(runs[2], runs[0], 0.8)
    assert math.exp(saved["log"]["mean"]) == pytest.approx(expected)
    assert mixed["savings"][0.8] == {"seeds": 2, "reached": 1, "log": None}
    lines = rl_results.table([*runs, run_of(UNIFORM, 0, SLOW, share=0.4)], 0.2).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| uniform", "| fast", "| mixed"]
    assert "1 of 2" in lines[-1]
    (panel,) = rl_results.plot(runs).axes
    assert len(panel.lines) == 3
    assert "20 %" in panel.get_title(loc="left")


def test_the_best_setting_is_that_of_the_prompts_for_tuning():
    runs = [run_of(UNIFORM, TUNING_SEED, SLOW), {**run_of(UNIFORM, TUNING_SEED, FAST), "rate": 3.0}]
    runs += [{**run_of(UNIFORM, 0, 2 * FAST), "rate": 5.0}]
    assert rl.chosen_setting(runs) == (8, 3.0)
    assert "19.5" in rl_results.tuning_table(runs)


def test_tuning_comes_before_all_other_runs():
    def chosen():
        raise AssertionError

    keys = list(islice(rl.planned([0.2], [0], rl.METHODS, chosen), len(rl.TRIED)))
    assert {key.seed for key in keys} == {TUNING_SEED}
    keys = list(rl.planned([0.4, 0.1], [0, 1], rl.METHODS, lambda: (4, 1e-4)))[len(rl.TRIED) :]
    assert len(set(keys)) == len(keys) == 2 * 2 * len(rl.METHODS)
    assert [key.share for key in keys] == sorted((key.share for key in keys), reverse=True)


# ---- the runs ------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """A study with a tiny model, few prompts and few rollouts."""
    little = {"warm_steps": 2, "width": 16, "layers": 1, "warm_batch": 8}
    monkeypatch.setattr(rl, "TAUGHT", replace(rl.TAUGHT, **little))
    monkeypatch.setattr(rl, "SPOILED", replace(rl.SPOILED, **little))
    monkeypatch.setattr(rl, "PROMPTS", 40)
    monkeypatch.setattr(rl, "ROLLOUTS", 160)
    monkeypatch.setattr(rl, "POINTS", 10)
    monkeypatch.setattr(rl, "TRIED", ((4, 1e-3),))
    few = {name: rl.METHODS[name] for name in (UNIFORM, FILTER, FEWER)}
    monkeypatch.setattr(rl, "METHODS", few)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_study_continues_and_spends_what_it_should(tiny, tmp_path, capsys, monkeypatch):
    def odd(completion_ids, **columns):
        """A reward that an untaught model gets now and then."""
        return [ids[0] % 2.0 for ids in completion_ids]

    monkeypatch.setattr(rl, "right", odd)
    file = tmp_path / "runs.json"
    arguments = ["--file", file, "--folder", tmp_path / "model", "--shares", 0.2, "--seeds"]
    rl.main([*map(str, arguments), "0"])
    first = load_json(file)["runs"]
    assert [row["method"] for row in first] == [UNIFORM, *rl.METHODS]
    for row in first:
        budget, step = (80 if row["method"] == FEWER else 160), 4 * rl.GENERATIONS
        spent = row["rollouts"]["completions"]
        assert budget <= spent < budget + step, row["method"]
        assert row["curve"][0]["rollouts"] == 0
        assert row["curve"][-1]["rollouts"] == spent
        if row["method"] != FILTER:
            assert row["optimizer_steps"] == math.ceil(budget / step)
    assert len(rl_results.summarise(first)) == len(rl.METHODS)
    capsys.readouterr()
    rl.main([*map(str, arguments), "0", "1"])
    runs = load_json(file)["runs"]
    assert runs[: len(first)] == first
    assert len(capsys.readouterr().out.splitlines()) == len(runs) - len(first) == len(rl.METHODS)


def test_the_filter_fills_its_batches(tiny, tmp_path):
    tokenizer = rl.grpo.make_tokenizer()
    model = rl.first_model(tmp_path, tokenizer, set())
    batches, calls = [], []

    class Watched(rl.FilteringTrainer):
        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            batches.append(made)
            return made

    def some(completion_ids, prompts, **columns):
        """Sums that begin with an even digit are never solved."""
        calls.append(len(prompts))
        odd = [int(prompt[0]) % 2 for prompt in prompts]
        return [float(i % 2) * one for i, one in enumerate(odd)]

    original = rl.FilteringTrainer
    rl.FilteringTrainer, reward = Watched, rl.right
    rl.right = some
    try:
        key = rl.Key(0.2, FILTER, 0, 4, 1e-3)
        row = rl.carry_out(key, model, tokenizer, {}, set())
    finally:
        rl.FilteringTrainer, rl.right = original, reward
    assert sum(calls) == row["rollouts"]["completions"]
    assert len(calls) > len(batches)
    for made in batches[:-1]:
        assert len(made["advantages"]) == 4 * rl.GENERATIONS
        assert bool((made["advantages"] != 0).all())
        assert made["num_items_in_batch"] == made["completion_mask"].sum()


def test_joined_batches_are_padded_as_trl_pads():
    parts = [
        {
            "prompt_ids": torch.full((2, width), width),
            "completion_ids": torch.full((2, 5 - width), width),
            "completion_mask": torch.ones(2, 5 - width, dtype=torch.int64),
            "advantages": torch.full((2,), float(width)),
        }
        for width in (2, 3)
    ]
    made = rl.joined(parts, 3, pad=7)
    assert made["prompt_ids"].tolist() == [[7, 2, 2]] * 2 + [[3, 3, 3]]
    assert made["completion_ids"].tolist() == [[2, 2, 2]] * 2 + [[3, 3, 7]]
    assert made["completion_mask"].tolist() == [[1, 1, 1]] * 2 + [[1, 1, 0]]
    assert made["advantages"].tolist() == [2.0, 2.0, 3.0]
    assert made["num_items_in_batch"] == 8


def test_accuracy_is_the_probability_of_the_right_completion(tiny, tmp_path):
    """Against a draw of completions, token by token."""
    tokenizer = rl.grpo.make_tokenizer()
    parts, taken = rl.held_out(tokenizer)
    assert len(taken) == sum(rl.HELD_OUT)
    rl.first_model(tmp_path, tokenizer, taken)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    part = parts["test"]
    one = part._replace(**{name: value[:1] for name, value in part._asdict().items()})
    ids, answer = one.ids[0], one.labels[0] != -100
    right = 1.0
    for i in torch.nonzero(answer).squeeze(1).tolist():
        logits = model(input_ids=ids[None, :i]).logits[0, -1]
        right *= float(logits.detach().softmax(-1)[ids[i]])
    level = int(one.levels[0])
    assert one.accuracy(model)[level - 1] == pytest.approx(right, rel=1e-4)
    assert tokenizer.decode(ids[answer][:-1]).replace(" ", "").isdigit()
    assert ids[answer][-1] == tokenizer.eos_token_id
