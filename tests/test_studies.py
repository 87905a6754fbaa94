"""The comparison tool: equal cost is equal, and the summary says what the reports say."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dynprune import (
    KAKURENBO,
    UCB,
    FullData,
    InfoBatch,
    OrderDP,
    RandomPruning,
    RunShape,
    Scores,
    SeTa,
    StaticPruning,
)
from recipes.studies.draw import plot_costs, plot_methods, plot_targets
from recipes.studies.plan import (
    Plan,
    Rule,
    Run,
    Setting,
    at_cost,
    cost_of,
    full_run,
    scores_run,
    static_runs,
)
from recipes.studies.summarise import (
    best_settings,
    next_rate,
    paired,
    reached,
    tables,
    targets,
    tuned_rates,
)

# ---- equal cost ----------------------------------------------------------------------------------

FULL = RunShape(1000, num_epochs=20)


@settings(max_examples=25)
@given(
    st.sampled_from(
        [
            RandomPruning(0.5),
            UCB(0.5),
            UCB(0.5, first=1),
            UCB(0.5, last=0.1),
            UCB(0.5, scoring="dropped"),
            UCB(0.5, scoring="all", period=4),
            InfoBatch(keep_ratio=0.5, max_rescale=20.0),
            OrderDP(0.5, draw_ratio=0.96),
        ]
    ),
    st.floats(0.4, 0.95),
    st.integers(400, 3000),
)
def test_equal_cost_is_equal(policy, cost, n):
    shape = RunShape(n, num_epochs=20)
    assert cost_of(at_cost(policy, cost, shape), shape) == pytest.approx(cost, abs=1.01 / n)


@pytest.mark.parametrize(
    ("policy", "cost", "keep_ratio"),
    [
        (UCB(0.3), 0.3, 0.3),
        (UCB(0.5, scoring="all"), 0.5, 0.5 - 1 / 3),
        (UCB(0.5, first=2), 0.5, (0.5 * 20 - 2) / 18),
        (OrderDP(0.3, draw_ratio=0.6), 0.7, 0.6),  # all that it draws: it cannot keep more
        # 1 / max_rescale: it cannot keep less. An eighth of the run trains on all data.
        (InfoBatch(keep_ratio=0.5), 0.3, 0.25),
    ],
)
def test_the_keep_ratio_follows_from_the_cost(policy, cost, keep_ratio):
    assert at_cost(policy, cost, FULL).keep_ratio == pytest.approx(keep_ratio, abs=1e-3)


def test_what_cannot_meet_the_cost_stays_as_it_is():
    for policy in (UCB(0.3, scoring="all"), KAKURENBO(), FullData(), InfoBatch()):
        assert at_cost(policy, 0.3, FULL) == policy
    assert cost_of(UCB(0.3, scoring="all"), FULL) == pytest.approx(0.3 + 1 / 3)
    assert cost_of(at_cost(InfoBatch(keep_ratio=0.5), 0.3, FULL), FULL) > 0.3


@pytest.mark.parametrize(
    ("policy", "cost"), [(KAKURENBO(), 1.0), (SeTa(prune_ratio=0.1, annealing=0.0), 0.75 * 0.9)]
)
def test_a_size_that_depends_on_the_data_costs_the_most_that_is_expected(policy, cost):
    assert cost_of(policy, FULL) == pytest.approx(cost, abs=1e-3)


def test_scores_are_charged_once(tmp_path):
    path = tmp_path / "scores.safetensors"
    Scores(np.arange(1000.0), "el2n", provenance={"passes": 2000}).save(path)
    for charge, keep_ratio in ((True, 0.2), (False, 0.3)):
        policy = StaticPruning(str(path), 0.3, charge=charge)
        assert at_cost(policy, 0.3, FULL).keep_ratio == pytest.approx(keep_ratio, abs=1e-3)


# ---- rules and runs ------------------------------------------------------------------------------


def test_rules_as_they_are_given():
    given = Rule.parse('ucb:{"c": 2.0}', 0.3)
    assert given == Rule(UCB(0.3, c=2.0), {"c": 2.0}, {})
    assert str(given) == "ucb (c 2.0)"
    assert Rule.parse("infobatch", 0.3).policy == InfoBatch(keep_ratio=0.3)
    assert Rule.parse('infobatch:{"prune_ratio": 0.5}', 0.3).policy == InfoBatch(prune_ratio=0.5)
    least = Rule.parse("infobatch", 0.1).run(0.1, 0, FULL)  # no default that costs more
    assert float(least.options["keep_ratio"]) == pytest.approx(0.25, abs=1e-3)
    assert Rule.parse("kakurenbo", 0.3).policy == KAKURENBO()
    for text, value in (
        ("ucbb", "ucbb"),
        ('ucb:{"cc": 2.0}', "cc"),
        ('ucb:{"keep_ratio": 0.2}', r'ucb:\{"keep_ratio": 0\.2\}'),
    ):
        with pytest.raises((TypeError, ValueError), match=value):
            Rule.parse(text, 0.3)


def test_a_rule_with_options_of_the_recipe():
    given = Rule.parse('ucb:{"c": 2.0} --num_train_epochs 12 --learning_rate=0.8', 0.3)
    assert given.options == {"num_train_epochs": "12", "learning_rate": "0.8"}
    assert str(given) == "ucb (c 2.0, num_train_epochs 12, learning_rate 0.8)"
    run = given.run(0.3, 1, FULL)
    assert run == Run(str(given), 0.3, 1)
    # As many passes in 12 epochs as 0.3 of 20.
    assert float(run.options.pop("keep_ratio")) == pytest.approx(0.5, abs=1e-3)
    assert run.options == {"pruning": "ucb", "pruning_kwargs": '{"c": 2.0}', **given.options}


def test_each_run_has_a_folder_of_its_own():
    runs = [
        full_run(0),
        Run("full run", 1, 0, 0.4),
        Run("ucb", 0.3, 0),
        Run("ucb", 0.3, 0, 0.4),
        Run("ucb", 0.3, 0, 0.8),
        Run("ucb (c 2.0)", 0.3, 0),
        Run("ucb", 0.5, 0),
        Run("ucb", 0.3, 1),
        scores_run("el2n --score_runs 2", 0),
    ]
    assert len({run.folder for run in runs}) == len(runs)
    assert Run("ucb (c 2.0)", 0.3, 1).folder == "ucb_c_2.0_0.3_seed1"
    assert runs[-1].folder == "scores_el2n_score_runs_2_0_seed0"


def test_static_pruning_with_scores_charged_and_given(tmp_path):
    file = tmp_path / "scores.safetensors"
    Scores(np.arange(1000.0), "el2n", provenance={"passes": 2000}).save(file)
    charged, given = static_runs("el2n --score_runs 2", 0.3, 0, FULL, file)
    assert charged.name == "el2n (score_runs 2), scores charged"
    assert given.name == "el2n (score_runs 2), scores given"
    assert charged.folder != given.folder
    assert float(charged.options["keep_ratio"]) == pytest.approx(0.2, abs=1e-3)
    assert float(given.options["keep_ratio"]) == pytest.approx(0.3, abs=1e-3)


def test_reference_losses_go_to_their_policy(tmp_path):
    file = tmp_path / "scores.safetensors"
    Scores(np.arange(1000.0), "reference", provenance={"passes": 2000}).save(file)
    charged, given = static_runs("reference", 0.3, 0, FULL, file)
    assert charged.options["pruning"] == given.options["pruning"] == "reference-loss"
    assert str(file) in charged.options["pruning_kwargs"]
    assert float(charged.options["keep_ratio"]) == pytest.approx(0.2, abs=1e-3)
    assert float(given.options["keep_ratio"]) == pytest.approx(0.3, abs=1e-3)


def test_all_runs_of_a_plan():
    rates = {"learning_rates": [0.1, 0.2], "tuning_seeds": [7], "tune": "first"}
    plan = Plan(["random", "ucb"], ["el2n"], costs=[0.5, 0.3], seeds=[0, 1], **rates)
    runs = list(plan.without_options())
    assert len(set(runs)) == len(runs)
    compared = {run for run in runs if run.rate is None}
    names = ["short run", "random", "ucb", "el2n, scores charged", "el2n, scores given"]
    assert compared == {
        *(full_run(seed) for seed in (0, 1)),
        *(Run(name, cost, seed) for name in names for cost in (0.5, 0.3) for seed in (0, 1)),
    }
    assert set(runs) - compared == {
        *(Run("full run", 1.0, 7, rate) for rate in (0.1, 0.2)),
        *(Run(n, c, 7, r) for n in names[:2] for c in (0.5, 0.3) for r in (0.1, 0.2)),
    }


def test_batch_sizes_are_tuned_for_the_short_run_as_for_every_rule():
    tuned = {"learning_rates": [0.1, 0.2], "batch_sizes": [8, 4], "tuning_seeds": [7]}
    plan = Plan(["random", "ucb"], costs=[0.5], seeds=[0], **tuned)
    settings = [Setting(0.1, 8), Setting(0.2, 8), Setting(0.1, 4), Setting(0.2, 4)]
    assert plan.settings_of("short run") == plan.settings_of("ucb") == settings
    assert plan.settings_of("full run") == [Setting(0.1), Setting(0.2)]
    tried = {run for run in plan.without_options() if run.rate is not None}
    assert tried == {
        *(Run("full run", 1.0, 7, rate) for rate in (0.1, 0.2)),
        *(
            Run(name, 0.5, 7, rate, batch=batch)
            for name in ("short run", "random", "ucb")
            for rate, batch in settings
        ),
    }
    assert len({run.folder for run in plan.without_options()}) == len(tried) + 4
    assert Run("ucb", 0.5, 7, 0.1, batch=8).folder == "ucb_0.5_tuning_0.1_batch_8_seed7"
    assert Run("ucb", 0.5, 7, 0.1).record() == {"name": "ucb", "cost": 0.5, "seed": 7, "rate": 0.1}
    best = {("ucb", 0.5): Setting(0.2, 4)}
    run = plan.at_best_setting(Run("ucb", 0.5, 0, options={"pruning": "ucb"}), best)
    options = {"learning_rate": 0.2, "per_device_train_batch_size": 4, "pruning": "ucb"}
    assert run.options == options


@pytest.mark.parametrize("lower", [False, True])
def test_the_best_batch_size_is_that_of_the_best_rate(lower):
    sign = -1 if lower else 1
    means = {(64, 0.1): 5, (64, 0.2): 9, (128, 0.1): 8, (128, 0.2): 7, (256, 0.1): math.nan}
    values = {
        Run("ucb", 0.3, seed, rate, batch=batch): sign * (mean + seed)
        for (batch, rate), mean in means.items()
        for seed in (0, 1)
    }
    rows = tuned_rates(values, lower=lower)
    assert [row["batch_size"] for row in rows] == [256, 128, 64]
    assert [row["chosen"] for row in rows] == [0.1, 0.1, 0.2]
    assert best_settings(rows, lower) == {("ucb", 0.3): Setting(0.2, 64)}
    # The recipe's batch size, of a study that was tuned without batch sizes before.
    more = tuned_rates({**values, Run("ucb", 0.3, 0, 0.4): sign * 20.0}, lower=lower)
    assert "batch_size" not in more[-1]
    assert best_settings(more, lower) == {("ucb", 0.3): Setting(0.4)}
    alone = tuned_rates({Run("ucb", 0.3, 0, 0.1): 1.0}, lower=lower)
    assert "batch_size" not in alone[0]
    assert best_settings(alone, lower) == {("ucb", 0.3): Setting(0.1)}


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"costs": [1.5]}, r"1\.5"),
        ({"rules": ["ucbb"]}, "ucbb"),
        ({"scores": ["el3n"]}, "el3n"),
        ({"learning_rates": [0.1]}, r"\[0\.1\]"),
        ({"learning_rates": [0.1, -1]}, r"-1"),
        ({"learning_rates": [0.1, 1], "rates_of": Path("tuned")}, "tuned"),
        ({"learning_rates": [0.1, 1], "batch_sizes": [64]}, r"\[64\]"),
        ({"learning_rates": [0.1, 1], "batch_sizes": [64, 64]}, r"\[64, 64\]"),
        ({"learning_rates": [0.1, 1], "batch_sizes": [64, 0]}, r"\[64, 0\]"),
        ({"batch_sizes": [64, 128]}, r"\[64, 128\]"),
    ],
)
def test_what_is_not_a_plan(fields, value):
    with pytest.raises(ValueError, match=value):
        Plan(**fields)


# ---- summary -------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed():
    found = paired({0: 0.5, 1: 0.7, 2: 0.9, 3: 0.1}, {0: 0.4, 1: 0.5, 2: 0.6})
    assert found["mean"] == pytest.approx(0.2)
    assert found["interval"] == pytest.approx([0.2 - 0.24841, 0.2 + 0.24841], abs=1e-4)
    assert found["seeds"] == 3
    assert paired({0: 0.5}, {0: 0.25}) == {"mean": 0.25, "interval": None, "seeds": 1}
    assert paired({0: 0.5}, {1: 0.25}) is None


def row(name="ucb", mean=0.5, *, cost=0.3, ranked=True):
    absent = {"deviation": None, "to_short_run": None, "to_random": None}
    head = {"name": name, "wanted": 0.3, "cost": cost, "ranked": ranked, "mean": mean}
    return {**head, **absent, "seconds": 1.0, "seeds": 1}


def table_of(*rows, metric="eval_accuracy"):
    summary = {"metric": metric, "rows": rows, "targets": [], "tuning": []}
    return tables(summary)["table_0.3"].splitlines()


def test_what_missed_the_cost_is_out_of_the_ranking():
    lines = table_of(row("dear", 0.9, cost=0.63, ranked=False), row("fair", 0.5))[2:]
    assert lines[0].startswith("| fair | 0.300 | 50.00 |")
    assert lines[1].startswith("| (dear) | 0.630 | 90.00 |")


@pytest.mark.parametrize(
    ("metric", "mean", "heading", "shown"),
    [
        ("eval_accuracy", 0.81234, "eval accuracy (%)", "81.23"),
        ("eval_perplexity", 36.97531, "eval perplexity", "36.98"),
        ("eval_loss", 1.23456, "eval loss", "1.2346"),
    ],
)
def test_figures_are_shown_with_the_digits_that_matter(metric, mean, heading, shown):
    lines = table_of(row(mean=mean), metric=metric)
    assert f"| {heading} |" in lines[0]
    assert f"| {shown} |" in lines[2]


def test_the_cost_at_which_a_value_is_reached():
    points = [(0.5, 0.8), (0.1, 0.4), (1.0, 0.9)]  # in any order
    assert reached(points, 0.6) == (pytest.approx(0.3), False)
    assert reached(points, 0.85) == (pytest.approx(0.75), False)
    assert reached(points, 0.4) == (0.1, True)  # by the cheapest: it may be reached for less
    assert reached(points, 0.95) is None
    assert reached([(0.1, 9.0), (1.0, 5.0)], 7.0, lower=True) == (pytest.approx(0.55), False)
    assert reached([(0.1, 9.0), (1.0, 5.0)], 4.0, lower=True) is None


# Costs that are thousandths: between two floats next to each other there is no cost to be found.
COSTS = st.integers(10, 1000).map(lambda thousandths: thousandths / 1000)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(COSTS, st.floats(0, 1)), min_size=1, unique_by=lambda point: point[0]),
    st.floats(0, 1),
)
def test_what_is_reached_is_on_the_line(points, value):
    found = reached(points, value)
    costs, means = np.array(sorted(points)).T
    assert (found is None) == (means.max() < value)
    if found is not None:
        cost, cheapest = found
        assert np.interp(cost, costs, means) == pytest.approx(value, abs=1e-9) or cheapest
        assert all(mean < value for at, mean in points if at < cost - 1e-9)


def test_the_targets_are_shares_of_the_full_run():
    rows = [
        {"name": "full run", "cost": 1.0, "mean": 0.8},
        {"name": "ucb", "cost": 0.5, "mean": 0.7},
    ]
    assert targets(rows, [], lower=False) == []  # no line can be drawn through one cost
    rows.append({"name": "ucb", "cost": 0.25, "mean": 0.6})
    found = targets(rows, [], lower=False)
    assert [target["value"] for target in found] == pytest.approx([0.76, 0.784, 0.792])
    assert found[0]["costs"] == {"ucb": (pytest.approx(0.8), False)}
    values = [target["value"] for target in targets(rows, [], lower=True)]
    assert values == pytest.approx([0.8 / share for share in (0.95, 0.98, 0.99)])
    assert targets(rows[:2], [0.7], lower=False) == [{"value": 0.7, "costs": {"ucb": (0.5, True)}}]
    assert targets(rows[1:], [], lower=False) == []  # the full run is not finished yet


def test_the_next_learning_rate_is_as_far_beyond():
    assert next_rate([0.8, 0.4, 1.6], 1.6) == 3.2
    assert next_rate([0.8, 0.4, 1.6], 0.4) == 0.2
    assert next_rate([1e-4, 3e-4], 1e-4) == pytest.approx(1e-4 / 3, rel=1e-5)


def test_the_best_learning_rate():
    values = {
        Run("ucb", 0.3, seed, rate): value
        for rate, seeds in ((0.8, (5, 7)), (0.4, (6, 8)), (1.6, (1, 1)))
        for seed, value in enumerate(seeds)
    }
    assert tuned_rates(values, lower=False) == [
        {
            "name": "ucb",
            "cost": 0.3,
            "means": [(0.4, 7), (0.8, 6), (1.6, 1)],
            "chosen": 0.4,
            "edge": True,
            "seeds": 2,
        }
    ]
    assert tuned_rates(values, lower=True)[0]["chosen"] == 1.6
    for rate, value in ((0.2, 1), (3.2, 7)):  # a worse one beyond, and one that is as good
        more = {**values, Run("ucb", 0.3, 0, rate): value}
        assert tuned_rates(more, lower=False)[0]["edge"] is False
    diverged = {Run("ucb", 0.3, 0, 1.6): float("nan"), Run("ucb", 0.3, 0, 0.8): 5.0}
    assert tuned_rates(diverged, lower=True)[0]["chosen"] == 0.8


# ---- pictures ------------------------------------------------------------------------------------


def drawn(figure):
    """The figure, laid out as when it is saved."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


def entries(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def names_of(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_methods_against_what_they_cost():
    runs = {"short run": [(0.5, [0.7, 0.8]), (0.3, [0.5, 0.6])], "UCB": [(0.3, [0.9])]}
    figure = drawn(plot_costs(runs, "eval_accuracy", full=[0.9, 1.0]))
    (ax,) = figure.axes
    assert ax.get_ylabel() == "eval accuracy (%)"
    band = ["full run, mean", "full run, lowest to highest"]
    assert entries(figure) == [*band, "UCB", "short run"]  # the best first
    ucb, short, full = ax.lines
    assert short.get_color() == "black"  # the one to beat
    assert short.get_xdata().tolist() == pytest.approx([0.3, 0.5], abs=0.01)
    assert short.get_ydata().tolist() == pytest.approx([55, 75])
    assert ucb.get_ydata().tolist() == [90]
    assert ucb.get_xdata()[0] < short.get_xdata()[0]  # side by side
    assert full.get_ydata() == pytest.approx([95, 95])
    third, half = short.get_xdata()
    bars = np.array([bar.tolist() for bar in ax.collections[1].get_segments()])
    assert bars == pytest.approx(np.array([[[third, 50], [third, 60]], [[half, 70], [half, 80]]]))


def test_costs_of_other_metrics_are_not_in_per_cent():
    runs = {"short run": [(0.3, [0.5])], "UCB": [(0.3, [0.6])]}
    figure = drawn(plot_costs(runs, "eval_perplexity", lower_is_better=True))
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.5]
    assert figure.axes[0].get_ylabel() == "eval perplexity"
    assert entries(figure) == ["short run", "UCB"]


def test_methods_at_one_cost():
    values = {"UCB": [0.7, 0.9], "short run": [0.5], "random": [0.6]}
    figure = drawn(plot_methods(values, "eval_accuracy", full=[0.95]))
    (ax,) = figure.axes
    assert names_of(figure) == ["short run", "random", "UCB"]  # the best on top
    seeds = ax.lines[2]
    assert seeds.get_xdata().tolist() == pytest.approx([70, 90])
    assert seeds.get_ydata().tolist() == [2, 2]
    means = [collection.get_segments()[0][0].tolist() for collection in ax.collections]
    assert means == [pytest.approx([mean, row - 0.3]) for row, mean in enumerate((50, 60, 80))]
    short, full = ax.lines[3:]
    assert short.get_xdata() == pytest.approx([50, 50])
    assert full.get_xdata() == pytest.approx([95, 95])
    assert entries(figure) == ["short run, mean", "full run, mean"]  # one seed has no band
    titled = plot_methods(values, "eval_accuracy", full=[0.9, 1.0], title="CIFAR-10")
    assert entries(titled)[2:] == ["full run, lowest to highest"]
    assert titled.axes[0].get_title("left") == "CIFAR-10"
    loss = plot_methods({"UCB": [2.0], "random": [1.0]}, "eval_loss", lower_is_better=True)
    assert names_of(loss) == ["UCB", "random"]


def test_what_lies_far_behind_is_told_at_the_border():
    values = {"UCB": [0.8], "short run": [0.75], "EL2N": [0.5, 0.6], "random": [0.66]}
    (ax,) = drawn(plot_methods(values, "eval_accuracy", full=[0.8])).axes
    assert [text.get_text() for text in ax.texts] == ["← 55"]
    assert ax.get_xlim()[0] > 60
    assert ax.get_ylim() == (-0.6, 3.6)
    losses = {"short run": [2.0], "EL2N": [9.0]}
    (ax,) = drawn(plot_methods(losses, "eval_loss", full=[1.0], lower_is_better=True)).axes
    assert [text.get_text() for text in ax.texts] == ["9 →"]
    assert ax.get_xlim()[1] < 3


def test_the_cost_at_which_values_are_reached():
    costs = {
        0.8: {"short run": (0.4, False), "UCB": (0.3, True), "random": (0.6, False)},
        0.9: {"short run": (0.7, False), "UCB": None},
    }
    figure = drawn(plot_targets(costs, "eval_accuracy"))
    (ax,) = figure.axes
    assert names_of(figure) == ["random", "short run", "UCB"]  # the cheapest on top
    assert entries(figure) == ["80.0 %", "90.0 %", "short run", "least cost tried"]
    points = [line for line in ax.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    shown = {(*line.get_xdata(), *line.get_ydata(), line.get_marker() == "<") for line in points}
    assert shown == {(0.3, 2, True), (0.4, 1, False), (0.7, 1, False), (0.6, 0, False)}
    lines = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert lines == [0.4, 0.7]  # what the others should be left of
    assert entries(drawn(plot_targets({3.5: {"UCB": (0.3, False)}}, "eval_loss"))) == ["3.5"]


@pytest.mark.parametrize(
    "costs",
    [
        {},
        {0.8: {}},
        {0.8: {"UCB": None}},
        {float("nan"): {"UCB": (0.3, True)}},
        {0.8: {"UCB": (float("inf"), False)}},
    ],
)
def test_what_are_not_targets(costs):
    with pytest.raises(ValueError):  # noqa: PT011  # of any words
        plot_targets(costs, "eval_accuracy")


@pytest.mark.parametrize("values", [{}, {"UCB": []}, {"UCB": [float("nan")]}])
def test_no_values_to_draw(values):
    with pytest.raises(ValueError, match="UCB" if values else "nothing"):
        plot_methods(values, "eval_accuracy")
    with pytest.raises(ValueError, match="UCB" if values else "nothing"):
        plot_costs({name: [(0.3, each)] for name, each in values.items()}, "eval_accuracy")
