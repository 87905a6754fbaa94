"""Studies: equal cost is equal, what is finished is not run again, and the summary says what the reports say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_dynprune import KAKURENBO, UCB, FullData, InfoBatch, PruningReport, RandomPruning, Scores, StaticPruning
from recipes.compare import Run, Study, at_cost, cost_of, main, paired, rule, table

ROOT = Path(__file__).parents[1]


# ---- equal cost -----------------------------------------------------------------------------------------------------


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
    assert at_cost(UCB(0.5, first=2), 0.5, 1000, 20).keep_ratio == pytest.approx((0.5 * 20 - 2) / 18, abs=1e-3)


def test_what_cannot_meet_the_cost_stays_as_it_is():
    for policy in (UCB(0.3, scoring="all"), KAKURENBO(), FullData(), InfoBatch()):
        assert at_cost(policy, 0.3, 1000, 20) == policy
    assert cost_of(UCB(0.3, scoring="all"), 1000, 20) == pytest.approx(0.3 + 1 / 3)
    least = at_cost(InfoBatch(keep_ratio=0.5), 0.3, 1000, 20)  # 1 / max_rescale, and an eighth of the run on all data
    assert least.keep_ratio == pytest.approx(0.25, abs=1e-3)
    assert cost_of(least, 1000, 20) > 0.3


def test_scores_are_charged_once(tmp_path):
    path = tmp_path / "scores.safetensors"
    Scores(np.arange(1000.0), "el2n", provenance={"passes": 2000}).save(path)
    charged = at_cost(StaticPruning(str(path), 0.3), 0.3, 1000, 20)
    assert charged.keep_ratio == pytest.approx(0.2, abs=1e-3)
    assert at_cost(StaticPruning(str(path), 0.3, charge=False), 0.3, 1000, 20).keep_ratio == pytest.approx(0.3, abs=1e-3)


def test_rules_as_they_are_given():
    assert rule('ucb:{"c": 2.0}', 0.3) == ("ucb", {"c": 2.0}, UCB(0.3, c=2.0))
    assert rule("infobatch", 0.3)[2] == InfoBatch(keep_ratio=0.3)
    assert rule('infobatch:{"prune_ratio": 0.5}', 0.3)[2] == InfoBatch(prune_ratio=0.5)
    assert rule("kakurenbo", 0.3)[2] == KAKURENBO()
    with pytest.raises(ValueError, match="ucbb"):
        rule("ucbb", 0.3)
    with pytest.raises((TypeError, ValueError), match="cc"):
        rule('ucb:{"cc": 2.0}', 0.3)


def test_differences_are_paired_by_seed():
    found = paired({0: 0.5, 1: 0.7, 2: 0.9, 3: 0.1}, {0: 0.4, 1: 0.5, 2: 0.6})
    assert found["mean"] == pytest.approx(0.2)
    assert found["interval"] == pytest.approx([0.2 - 0.24841, 0.2 + 0.24841], abs=1e-4)
    assert found["seeds"] == 3
    assert paired({0: 0.5}, {0: 0.25}) == {"mean": 0.25, "interval": None, "seeds": 1}
    assert paired({0: 0.5}, {1: 0.25}) is None


def test_what_missed_the_cost_is_out_of_the_ranking():
    row = {"wanted": 0.3, "deviation": None, "to_short_run": None, "to_random": None, "seconds": 1.0, "seeds": 1}
    rows = [
        {**row, "name": "dear", "cost": 0.63, "ranked": False, "mean": 0.9},
        {**row, "name": "fair", "cost": 0.3, "ranked": True, "mean": 0.5},
    ]
    lines = table(rows, "eval_accuracy").splitlines()[2:]
    assert lines[0].startswith("| fair | 0.300 | 50.00 |")
    assert lines[1].startswith("| (dear) | 0.630 | 90.00 |")


# ---- a study --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    for split, n in (("train", 80), ("test", 20)):
        generator = np.random.default_rng(n)
        images = [Image.fromarray(a) for a in generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)]
        features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {i}" for i in range(10)])}
        rows = {"img": images, "label": generator.integers(0, 10, n).tolist()}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(
            folder / f"{split}-00000-of-00001.parquet"
        )
    return folder


def compare(*options, status=0):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "recipes/compare.py", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_a_study(data, tmp_path):
    recipe = ["recipes/cifar.py", "--dataset", data, "--model", "resnet8_cifar", "--num_train_epochs", 4]
    recipe += ["--per_device_train_batch_size", 8, "--score_runs", 1, "--score_epochs", 1]
    study = ["--output_dir", tmp_path, "--rules", "random", "--scores", "el2n", "--costs", 0.5, "--seeds", 3, "--"]
    out = compare(*study, *recipe).stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert set(rows) == {"full run", "short run", "random", "el2n, scores charged", "el2n, scores given"}
    assert rows["full run"]["cost"] == 1
    for name in ("short run", "random", "el2n, scores given"):
        assert rows[name]["cost"] == pytest.approx(0.5)
        assert rows[name]["ranked"]
    # One epoch trained and one scored, 4/3 of the 2 passes over the data that are wanted.
    assert rows["el2n, scores charged"]["cost"] == pytest.approx(0.5, abs=0.01)
    assert rows["el2n, scores charged"]["keep_ratio"] == pytest.approx((2 - 4 / 3) / 4, abs=0.01)
    report = PruningReport.load(tmp_path / "random_0.5_seed3" / "report.json")
    assert rows["random"]["values"] == {"3": report.metrics["eval_accuracy"]}
    assert rows["random"]["to_short_run"]["mean"] == pytest.approx(rows["random"]["mean"] - rows["short run"]["mean"])
    assert (tmp_path / "table.md").read_text().strip() in out
    assert (tmp_path / "picture.png").stat().st_size > 1000

    # Interrupted: one run has no report. It alone is made again.
    (tmp_path / "random_0.5_seed3" / "report.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/report.json")}
    compare(*study, *recipe)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    again = PruningReport.load(tmp_path / "random_0.5_seed3" / "report.json")
    assert again.metrics["eval_accuracy"] == report.metrics["eval_accuracy"]

    done = compare(*study, *recipe, "--learning_rate", 0.1, status=2)
    assert "choose another --output_dir" in done.stderr


def test_a_run_that_fails_shows_its_log(data, tmp_path):
    done = compare(
        "--output_dir", tmp_path, "--seeds", 0, "--", "recipes/cifar.py", "--dataset", data, "--modell", "x", status=2
    )
    assert "full run, seed 0, ended with status 2" in done.stderr
    assert "--modell" in done.stderr


def test_mistakes_are_told_before_anything_runs(tmp_path, capsys, monkeypatch):
    for options, words in (
        ([], "nothing is no recipe"),
        (["--", "recipes/none.py"], "recipes/none.py is no recipe"),
        (["--costs", "1.5", "--", "recipes/cifar.py"], "1.5 is out of range"),
        (["--rules", "ucbb", "--", "recipes/cifar.py"], "ucbb"),
    ):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["compare.py", "--output_dir", str(tmp_path), *options])
        with pytest.raises(SystemExit) as error:
            main()
        assert error.value.code == 2
        assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_each_run_has_a_folder_of_its_own():
    runs = [Run("full run", 1, 0), Run("ucb", 0.3, 0), Run('ucb:{"c": 2.0}', 0.3, 0), Run("ucb", 0.5, 0), Run("ucb", 0.3, 1)]
    assert len({run.folder for run in runs}) == 5
    assert Run('ucb:{"c": 2.0}', 0.3, 1).folder == "ucb_c_2.0_0.3_seed1"
    assert Study(Path("s"), ["r.py"]).report(Run("ucb", 0.3, 0)) is None
