"""Studies: equal cost is equal, what is finished is not run again, and the summary says what the reports say."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_dynprune import (
    KAKURENBO,
    UCB,
    FullData,
    InfoBatch,
    OrderDP,
    PruningReport,
    RandomPruning,
    Scores,
    StaticPruning,
)
from hf_dynprune.report import EpochRecord
from recipes.compare import (
    Rule,
    Run,
    Sitting,
    Study,
    at_cost,
    cost_of,
    full_run,
    main,
    next_rate,
    paired,
    reached,
    scores_run,
    static_runs,
    tables,
    targets,
    tuned_rates,
)

ROOT = Path(__file__).parents[1]


# ---- equal cost ----------------------------------------------------------------------------------


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
    found = at_cost(policy, cost, n, 20)
    assert cost_of(found, n, 20) == pytest.approx(cost, abs=1.01 / n)


def test_scoring_is_charged():
    assert at_cost(UCB(0.3), 0.3, 1000, 20).keep_ratio == pytest.approx(0.3, abs=1e-3)
    every = at_cost(UCB(0.5, scoring="all"), 0.5, 1000, 20)
    assert every.keep_ratio == pytest.approx(0.5 - 1 / 3, abs=1e-3)
    assert at_cost(UCB(0.5, first=2), 0.5, 1000, 20).keep_ratio == pytest.approx(
        (0.5 * 20 - 2) / 18, abs=1e-3
    )


def test_what_cannot_meet_the_cost_stays_as_it_is():
    for policy in (UCB(0.3, scoring="all"), KAKURENBO(), FullData(), InfoBatch()):
        assert at_cost(policy, 0.3, 1000, 20) == policy
    assert cost_of(UCB(0.3, scoring="all"), 1000, 20) == pytest.approx(0.3 + 1 / 3)
    least = at_cost(
        InfoBatch(keep_ratio=0.5), 0.3, 1000, 20
    )  # 1 / max_rescale, and an eighth of the run on all data
    assert least.keep_ratio == pytest.approx(0.25, abs=1e-3)
    assert cost_of(least, 1000, 20) > 0.3
    assert at_cost(OrderDP(0.3, draw_ratio=0.6), 0.7, 1000, 20).keep_ratio == pytest.approx(
        0.6, abs=1e-3
    )


def test_scores_are_charged_once(tmp_path):
    path = tmp_path / "scores.safetensors"
    Scores(np.arange(1000.0), "el2n", provenance={"passes": 2000}).save(path)
    charged = at_cost(StaticPruning(str(path), 0.3), 0.3, 1000, 20)
    assert charged.keep_ratio == pytest.approx(0.2, abs=1e-3)
    assert at_cost(
        StaticPruning(str(path), 0.3, charge=False), 0.3, 1000, 20
    ).keep_ratio == pytest.approx(0.3, abs=1e-3)


def test_rules_as_they_are_given():
    given = Rule.parse('ucb:{"c": 2.0}', 0.3)
    assert given == Rule(UCB(0.3, c=2.0), {"c": 2.0}, {})
    assert str(given) == "ucb (c 2.0)"
    assert Rule.parse("infobatch", 0.3).policy == InfoBatch(keep_ratio=0.3)
    assert Rule.parse('infobatch:{"prune_ratio": 0.5}', 0.3).policy == InfoBatch(prune_ratio=0.5)
    least = Rule.parse("infobatch", 0.1).run(0.1, 0, 1000, 20)  # no default that costs more
    assert float(least.options["keep_ratio"]) == pytest.approx(0.25, abs=1e-3)
    assert Rule.parse("kakurenbo", 0.3).policy == KAKURENBO()
    for text, words in (
        ("ucbb", "ucbb"),
        ('ucb:{"cc": 2.0}', "cc"),
        ('ucb:{"keep_ratio": 0.2}', "follows from --costs"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            Rule.parse(text, 0.3)


def test_a_rule_with_options_of_the_recipe():
    given = Rule.parse('ucb:{"c": 2.0} --num_train_epochs 12 --learning_rate=0.8', 0.3)
    assert given.options == {"num_train_epochs": "12", "learning_rate": "0.8"}
    assert str(given) == "ucb (c 2.0, num_train_epochs 12, learning_rate 0.8)"
    run = given.run(0.3, 1, 1000, 20)
    assert run == Run("ucb (c 2.0, num_train_epochs 12, learning_rate 0.8)", 0.3, 1)
    # As many passes in 12 epochs as 0.3 of 20.
    assert float(run.options.pop("keep_ratio")) == pytest.approx(0.5, abs=1e-3)
    assert run.options == {
        "pruning": "ucb",
        "pruning_kwargs": '{"c": 2.0}',
        "num_train_epochs": "12",
        "learning_rate": "0.8",
    }


def test_differences_are_paired_by_seed():
    found = paired({0: 0.5, 1: 0.7, 2: 0.9, 3: 0.1}, {0: 0.4, 1: 0.5, 2: 0.6})
    assert found["mean"] == pytest.approx(0.2)
    assert found["interval"] == pytest.approx([0.2 - 0.24841, 0.2 + 0.24841], abs=1e-4)
    assert found["seeds"] == 3
    assert paired({0: 0.5}, {0: 0.25}) == {"mean": 0.25, "interval": None, "seeds": 1}
    assert paired({0: 0.5}, {1: 0.25}) is None


def test_what_missed_the_cost_is_out_of_the_ranking():
    row = {
        "wanted": 0.3,
        "deviation": None,
        "to_short_run": None,
        "to_random": None,
        "seconds": 1.0,
        "seeds": 1,
    }
    rows = [
        {**row, "name": "dear", "cost": 0.63, "ranked": False, "mean": 0.9},
        {**row, "name": "fair", "cost": 0.3, "ranked": True, "mean": 0.5},
    ]
    summary = {"metric": "eval_accuracy", "rows": rows, "targets": [], "tuning": []}
    lines = tables(summary)["table_0.3"].splitlines()[2:]
    assert lines[0].startswith("| fair | 0.300 | 50.00 |")
    assert lines[1].startswith("| (dear) | 0.630 | 90.00 |")


@pytest.mark.parametrize(
    ("metric", "mean", "shown"),
    [
        ("eval_accuracy", 0.81234, "eval accuracy (%) | 81.23"),
        ("eval_perplexity", 36.97531, "eval perplexity | 36.98"),
        ("eval_loss", 1.23456, "eval loss | 1.2346"),
    ],
)
def test_figures_are_shown_with_the_digits_that_matter(metric, mean, shown):
    row = {
        "name": "ucb",
        "wanted": 0.3,
        "cost": 0.3,
        "ranked": True,
        "mean": mean,
        "deviation": None,
        "seconds": 1.0,
    }
    row |= {"to_short_run": None, "to_random": None, "seeds": 1}
    table = tables({"metric": metric, "rows": [row], "targets": [], "tuning": []})[
        "table_0.3"
    ].splitlines()
    heading, value = shown.split(" | ")
    assert f"| {heading} |" in table[0]
    assert f"| {value} |" in table[2]


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
    assert [target["value"] for target in targets(rows, [], lower=True)] == pytest.approx(
        [0.8 / s for s in (0.95, 0.98, 0.99)]
    )
    assert targets(rows[:2], [0.7], lower=False) == [{"value": 0.7, "costs": {"ucb": (0.5, True)}}]
    assert targets(rows[1:], [], lower=False) == []  # the full run is not finished yet


def test_the_next_learning_rate_is_as_far_beyond():
    assert next_rate([0.8, 0.4, 1.6], 1.6) == 3.2
    assert next_rate([0.8, 0.4, 1.6], 0.4) == 0.2
    assert next_rate([1e-4, 3e-4], 1e-4) == pytest.approx(1e-4 / 3, rel=1e-5)


def test_the_best_learning_rate():
    runs = [
        (Run("ucb", 0.3, seed, rate), value)
        for rate, of in ((0.8, (5, 7)), (0.4, (6, 8)), (1.6, (1, 1)))
        for seed, value in enumerate(of)
    ]
    (row,) = tuned_rates(runs, lower=False)
    assert row == {
        "name": "ucb",
        "cost": 0.3,
        "means": [(0.4, 7), (0.8, 6), (1.6, 1)],
        "chosen": 0.4,
        "edge": True,
        "seeds": 2,
    }
    assert tuned_rates(runs, lower=True)[0]["chosen"] == 1.6
    assert tuned_rates([*runs, (Run("ucb", 0.3, 0, 0.2), 1)], lower=False)[0]["edge"] is False
    assert (
        tuned_rates([*runs, (Run("ucb", 0.3, 0, 3.2), 7)], lower=False)[0]["edge"] is False
    )  # as good as another


# ---- a study -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    for split, n in (("train", 80), ("test", 20)):
        generator = np.random.default_rng(n)
        images = [
            Image.fromarray(a) for a in generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        ]
        features = {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=[f"class {i}" for i in range(10)]),
        }
        rows = {"img": images, "label": generator.integers(0, 10, n).tolist()}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(
            folder / f"{split}-00000-of-00001.parquet"
        )
    return folder


def program(*options):
    """What `python recipes/compare.py` prints."""
    command = [sys.executable, ROOT / "recipes/compare.py", *map(str, options)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def compare(monkeypatch, capsys):
    """The same in this process, without starting anew; with another status than 0 what it tells instead."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the runs

    def run(*options, status=0):
        monkeypatch.setattr(sys, "argv", ["recipes/compare.py", *map(str, options)])
        if not status:
            main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
        return capsys.readouterr().err

    return run


def test_a_study(data, tmp_path, compare):
    recipe = [
        "recipes/cifar.py",
        "--dataset",
        data,
        "--model",
        "resnet8_cifar",
        "--num_train_epochs",
        4,
    ]
    recipe += ["--per_device_train_batch_size", 8, "--score_epochs", 1]
    folder = tmp_path / "study"
    study = [
        "--output_dir",
        folder,
        "--rules",
        "random",
        "--scores",
        "el2n --score_runs 1",
        "--costs",
        0.5,
        "--seeds",
        3,
        "--jobs",
        2,
        "--targets",
        0.02,
    ]
    out = program(*study, "--", *recipe)
    summary = json.loads((folder / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert set(rows) == {
        "full run",
        "short run",
        "random",
        "el2n (score_runs 1), scores charged",
        "el2n (score_runs 1), scores given",
    }
    assert rows["full run"]["cost"] == 1
    for name in ("short run", "random", "el2n (score_runs 1), scores given"):
        assert rows[name]["cost"] == pytest.approx(0.5)
        assert rows[name]["ranked"]
    # One epoch trained and one scored, 4/3 of the 2 passes over the data that are wanted.
    assert rows["el2n (score_runs 1), scores charged"]["cost"] == pytest.approx(0.5, abs=0.01)
    assert rows["el2n (score_runs 1), scores charged"]["keep_ratio"] == pytest.approx(
        (2 - 4 / 3) / 4, abs=0.01
    )
    report = PruningReport.load(folder / "random_0.5_seed3" / "report.json")
    assert rows["random"]["values"] == {"3": report.metrics["eval_accuracy"]}
    assert rows["random"]["to_short_run"]["mean"] == pytest.approx(
        rows["random"]["mean"] - rows["short run"]["mean"]
    )
    shown = [(folder / f"{name}.md").read_text().strip() for name in ("table_0.5", "targets")]
    assert "\n\n".join(shown) in out
    for picture in ("picture", "picture_0.5", "selection_0.5", "targets"):
        assert (folder / f"{picture}.png").stat().st_size > 1000

    # No path of this machine is in what is published.
    for path in (*folder.glob("*/run.json"), folder / "summary.json", folder / "study.json"):
        assert str(tmp_path) not in path.read_text()
        assert str(data) not in path.read_text()

    # Interrupted: one run was not finished. It alone is made again; for that the scores are not needed.
    (folder / "random_0.5_seed3" / "run.json").unlink()
    shutil.rmtree(folder / "scores_el2n_score_runs_1_0_seed3")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/run.json")}
    out = compare(*study, "--", *recipe)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again = PruningReport.load(folder / "random_0.5_seed3" / "report.json")
    assert again.metrics["eval_accuracy"] == report.metrics["eval_accuracy"]

    # Without a recipe it only renews what it shows.
    (folder / "targets.md").unlink()
    assert compare("--output_dir", folder) == out
    assert (folder / "targets.md").read_text().strip() == shown[1]

    told = compare(*study, "--", *recipe, "--weight_decay", 0.1, status=2)
    assert "choose another --output_dir" in told


def test_a_run_that_fails_shows_its_log(data, tmp_path, compare):
    told = compare(
        "--output_dir",
        tmp_path,
        "--seeds",
        0,
        "--",
        "recipes/cifar.py",
        "--dataset",
        data,
        "--modell",
        "x",
        status=2,
    )
    assert "full run, seed 0, ended with status 2" in told
    assert "--modell" in told


def test_mistakes_are_told_before_anything_runs(tmp_path, compare):
    for options, words in (
        ([], "nothing is no recipe"),
        (["--", "recipes/none.py"], "recipes/none.py is no recipe"),
        (["--costs", "1.5", "--", "recipes/cifar.py"], "1.5 is out of range"),
        (["--rules", "ucbb", "--", "recipes/cifar.py"], "ucbb"),
        (["--jobs", "0", "--", "recipes/cifar.py"], "--jobs 0"),
        (
            ["--scores", "el3n", "--", "recipes/cifar.py"],
            "--scores el3n: wanted are some of el2n, ",
        ),
        (
            ["--learning_rates", "0.1", "--", "recipes/cifar.py"],
            "--learning_rates [0.1]: wanted are several",
        ),
    ):
        assert words in compare("--output_dir", tmp_path, *options, status=2)
    assert list(tmp_path.iterdir()) == []


RECIPE = """
import json, math, pathlib, shutil, sys
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
if "score" in options:
    shutil.copy("SCORES", pathlib.Path(options["output_dir"], "scores.safetensors"))
    sys.exit()
best = {"full": 1.0, "random": 2.0, "ucb": 4.0, "static": 8.0}[options["pruning"]]
report = json.loads(pathlib.Path("TEMPLATE").read_text())
report["epochs"][-1]["metrics"]["eval_accuracy"] = 0.9 - 0.1 * abs(math.log2(float(options["learning_rate"]) / best))
pathlib.Path(options["output_dir"], "report.json").write_text(json.dumps(report))
"""


def test_learning_rates_are_tuned_until_bracketed_and_taken_over(tmp_path, monkeypatch, capsys):
    report = PruningReport({"name": "any"}, 100, 0, 0, num_epochs=4.0)
    report.epochs = [EpochRecord(i, True, 100, 100, 100) for i in range(4)]
    report.save(tmp_path / "template.json")
    Scores(np.arange(100.0), "el2n", provenance={"passes": 100}).save(
        tmp_path / "scores.safetensors"
    )
    program = RECIPE.replace("TEMPLATE", str(tmp_path / "template.json"))
    (tmp_path / "recipe.py").write_text(
        program.replace("SCORES", str(tmp_path / "scores.safetensors"))
    )
    monkeypatch.chdir(tmp_path)

    def study(*options):
        options = [
            "--rules",
            *rules,
            "--costs",
            "0.5",
            "--seeds",
            "0",
            "1",
            "--jobs",
            "2",
            *options,
        ]
        monkeypatch.setattr(sys, "argv", ["compare.py", *options, "--", "recipe.py"])
        main()

    def options_of(folder, *run):
        command = json.loads((tmp_path / folder / Run(*run).folder / "run.json").read_text())[
            "command"
        ]
        return dict(word[2:].split("=", 1) for word in command if "=" in word)

    def rate(folder, name, cost, seed):
        options = options_of(folder, name, cost, seed)
        assert "validation_share" not in options  # nothing is held out of what is published
        return float(options["learning_rate"])

    rules = ["random", "ucb"]
    study("--output_dir", "tuned", "--scores", "el2n", "--learning_rates", "0.5", "1")
    found = {
        row["name"]: row
        for row in json.loads((tmp_path / "tuned/summary.json").read_text())["tuning"]
    }
    assert {
        name: (row["chosen"], len(row["means"]), row["edge"]) for name, row in found.items()
    } == {
        "full run": (1.0, 3, False),
        "short run": (1.0, 3, False),
        "random": (2.0, 4, False),
        "ucb": (4.0, 5, False),
    }
    for name, cost in (("full run", 1.0), ("short run", 0.5), ("random", 0.5), ("ucb", 0.5)):
        assert rate("tuned", name, cost, 1) == found[name]["chosen"]
        for tried, mean in found[name]["means"]:  # on samples held out
            assert float(options_of("tuned", name, cost, 0, tried)["validation_share"]) > 0
            report = PruningReport.load(
                tmp_path / "tuned" / Run(name, cost, 0, tried).folder / "report.json"
            )
            assert report.metrics["eval_accuracy"] == mean
    for words in ("charged", "given"):  # those of scores are not tuned themselves
        assert rate("tuned", f"el2n, scores {words}", 0.5, 1) == found["random"]["chosen"]
    assert (tmp_path / "tuned/tuning.md").read_text().strip() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        study("--output_dir", "tuned")  # now at the learning rate of the recipe
    assert "choose another --output_dir, or delete that folder" in capsys.readouterr().err

    rules = ["random", 'ucb:{"c": 2.0}', "ucb --learning_rate 0.25", "ucb"]
    study("--output_dir", "taken", "--rates_of", "tuned")
    assert json.loads((tmp_path / "taken/summary.json").read_text())["tuning"] == []
    for name, cost, wanted in (
        ("full run", 1.0, 1.0),
        ("random", 0.5, 2.0),
        ("ucb", 0.5, 4.0),
        ("ucb (c 2.0)", 0.5, 4.0),  # that of the policy
        ("ucb (learning_rate 0.25)", 0.5, 0.25),
    ):
        assert rate("taken", name, cost, 1) == wanted

    for options, words in (
        (["--learning_rates", "1", "2"], "leave out one of them"),
        (
            ["--costs", "0.25"],
            "tuned has no learning rates of short run at cost 0.25, random at cost 0.25: tune them there",
        ),
    ):
        with pytest.raises(SystemExit):
            study("--output_dir", "none", "--rates_of", "tuned", *options)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_each_run_has_a_folder_of_its_own():
    runs = [
        Run("full run", 1, 0),
        Run("full run", 1, 0, 0.4),
        Run("ucb", 0.3, 0),
        Run("ucb", 0.3, 0, 0.4),
        Run("ucb", 0.3, 0, 0.8),
        Run("ucb (c 2.0)", 0.3, 0),
        Run("ucb", 0.5, 0),
        Run("ucb", 0.3, 1),
        scores_run("el2n", 0),
        *static_runs("el2n", 0.3, 0, 100, 4, Path()),
    ]
    assert len({run.folder for run in runs}) == len(runs)
    assert Run("ucb (c 2.0)", 0.3, 1).folder == "ucb_c_2.0_0.3_seed1"


def test_a_run_is_started_once(tmp_path):
    program = tmp_path / "recipe.py"
    program.write_text(
        f"import time\ntime.sleep(0.3)\nopen({str(tmp_path / 'log')!r}, 'a').write('started ')\n"
    )
    lists: dict = {name: [] for name in ("rules", "costs", "scores", "learning_rates")}
    options = argparse.Namespace(
        **lists, seeds=[0], tuning_seeds=[0], jobs=2, tune="each", rates_of=None
    )
    sitting = Sitting(options, Study(tmp_path / "study", [str(program)], 2))
    futures = [sitting.start(full_run(0)), sitting.start(full_run(0))]
    for future in futures:
        future.result()
    sitting.pool.shutdown()
    sitting.bar.close()
    assert (tmp_path / "log").read_text() == "started "


def test_runs_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in Study(tmp_path).environment
    assert Study(tmp_path, jobs=1000).environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Study(tmp_path, jobs=1000).environment["OMP_NUM_THREADS"] == "3"
