"""Studies: what is finished is not run again, learning rates are tuned, mistakes are told first."""

import json
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from programs import python

from hf_dynprune import PruningReport, Scores
from hf_dynprune.report import EpochRecord
from recipes.studies.command import main
from recipes.studies.plan import Plan, Run, full_run
from recipes.studies.run import Sitting, Study

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small data set of the form of CIFAR-10."""
    folder = tmp_path_factory.mktemp("cifar")
    names = datasets.ClassLabel(names=[f"class {i}" for i in range(10)])
    features = datasets.Features({"img": datasets.Image(), "label": names})
    for split, n in (("train", 80), ("test", 20)):
        generator = np.random.default_rng(n)
        pixels = generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        rows = {
            "img": [Image.fromarray(each) for each in pixels],
            "label": generator.integers(0, 10, n).tolist(),
        }
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def command(*options):
    """What `python recipes/compare.py` prints."""
    done = python(ROOT / "recipes/compare.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def compare(monkeypatch, capsys):
    """The same in this process, without a new start. If it fails: its status and its message."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the runs

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["recipes/compare.py", *map(str, options)])
        try:
            main("")
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return run


def test_a_study(data, tmp_path, compare, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "study"
    recipe = f"recipes/cifar.py --dataset {data} --model resnet8_cifar --num_train_epochs 4"
    recipe = f"-- {recipe} --per_device_train_batch_size 8 --score_epochs 1".split()
    study = f"--output_dir {folder} --rules random --costs 0.5 --seeds 3 --jobs 2 --targets 0.02"
    study = [*study.split(), "--scores", "el2n --score_runs 1"]
    out = command(*study, *recipe)
    summary = json.loads((folder / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    charged, given = (f"el2n (score_runs 1), scores {which}" for which in ("charged", "given"))
    assert set(rows) == {"full run", "short run", "random", charged, given}
    assert rows["full run"]["cost"] == 1
    for name in ("short run", "random", given):
        assert rows[name]["cost"] == pytest.approx(0.5)
        assert rows[name]["ranked"]
    # Scores take one epoch trained and one scored: 4/3 of the 2 passes over the data.
    assert rows[charged]["cost"] == pytest.approx(0.5, abs=0.01)
    assert rows[charged]["keep_ratio"] == pytest.approx((2 - 4 / 3) / 4, abs=0.01)
    report = PruningReport.load(folder / "random_0.5_seed3" / "report.json")
    assert rows["random"]["values"] == {"3": report.metrics["eval_accuracy"]}
    difference = rows["random"]["mean"] - rows["short run"]["mean"]
    assert rows["random"]["to_short_run"]["mean"] == pytest.approx(difference)
    shown = [(folder / f"{name}.md").read_text().strip() for name in ("table_0.5", "targets")]
    assert "\n\n".join(shown) in out
    for picture in ("picture", "picture_0.5", "selection_0.5", "targets"):
        assert (folder / f"{picture}.png").stat().st_size > 1000

    # No path of this machine is in what is published.
    for path in (*folder.glob("*/run.json"), folder / "summary.json", folder / "study.json"):
        assert str(tmp_path) not in path.read_text()
        assert str(data) not in path.read_text()

    # One run was interrupted. Only that run is made again, and it does not need the scores.
    (folder / "random_0.5_seed3" / "run.json").unlink()
    shutil.rmtree(folder / "scores_el2n_score_runs_1_0_seed3")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/run.json")}
    status, out = compare(*study, *recipe)
    assert status == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again = PruningReport.load(folder / "random_0.5_seed3" / "report.json")
    assert again.metrics["eval_accuracy"] == report.metrics["eval_accuracy"]

    # Without a recipe it only renews what it shows.
    (folder / "targets.md").unlink()
    assert compare("--output_dir", folder) == (0, out)
    assert (folder / "targets.md").read_text().strip() == shown[1]

    status, message = compare(*study, *recipe, "--weight_decay", 0.1)
    assert status == 2
    assert "'--weight_decay', '0.1'" in message


def test_a_run_that_fails_shows_its_log(tmp_path, compare):
    program = tmp_path / "recipe.py"
    program.write_text("import sys\nprint('out of memory')\nsys.exit(7)\n")
    status, message = compare("--output_dir", tmp_path / "study", "--seeds", 5, "--", program)
    assert status == 2
    for value in ("full run", "seed 5", "status 7", "out of memory"):
        assert value in message


def test_mistakes_are_told_before_anything_runs(tmp_path, compare):
    recipe = tmp_path / "recipe.py"
    recipe.touch()
    for options, value in (
        ([], "nothing"),
        (["--", "recipes/none.py"], "recipes/none.py"),
        (["--costs", "1.5", "--", recipe], "1.5"),
        (["--rules", "ucbb", "--", recipe], "ucbb"),
        (["--jobs", "0", "--", recipe], "--jobs 0"),
        (["--scores", "el3n", "--", recipe], "el3n"),
        (["--learning_rates", "0.1", "--", recipe], "[0.1]"),
        (["--rates_of", "nowhere", "--", recipe], "nowhere"),
    ):
        status, message = compare("--output_dir", tmp_path / "study", *options)
        assert status == 2
        assert value in message
    assert list(tmp_path.iterdir()) == [recipe]


# A recipe that does not train: its accuracy depends on the learning rate, best at one of its own.
RECIPE = """
import json, math, pathlib, shutil, sys
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
if "score" in options:
    shutil.copy("scores.safetensors", options["output_dir"])
    sys.exit()
best = {"full": 1.0, "random": 2.0, "ucb": 4.0, "static": 8.0}[options["pruning"]]
report = json.loads(pathlib.Path("template.json").read_text())
batch = float(options.get("per_device_train_batch_size", 8))
best *= batch / 8  # the best rate grows with the batch, and each rule has a best batch
accuracy = 0.9 - 0.1 * abs(math.log2(float(options["learning_rate"]) / best))
accuracy -= 0.05 * abs(math.log2(batch / {"full": 8, "random": 4}.get(options["pruning"], 16)))
report["epochs"][-1]["metrics"]["eval_accuracy"] = accuracy
pathlib.Path(options["output_dir"], "report.json").write_text(json.dumps(report))
"""


@pytest.fixture
def study(tmp_path, monkeypatch, compare):
    """A study of that recipe: folder, rules and more options -> status and what it prints.

    Its pictures stay empty: `test_a_study` draws them.
    """
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **how: path.touch())
    report = PruningReport({"name": "any"}, 100, 0, 0, num_epochs=4.0)
    report.epochs = [EpochRecord(i, True, 100, 100, 100) for i in range(4)]
    report.save(tmp_path / "template.json")
    Scores(np.arange(100.0), "el2n", provenance={"passes": 100}).save(
        tmp_path / "scores.safetensors"
    )
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)

    def run(folder, rules, *options):
        common = ["--costs", "0.5", "--seeds", "0", "1", "--jobs", "2"]
        where = ["--output_dir", folder, "--rules", *rules]
        return compare(*where, *common, *options, "--", "recipe.py")

    return run


def options_of(folder, *run):
    command = json.loads(Path(folder, Run(*run).folder, "run.json").read_text())["command"]
    return dict(word[2:].split("=", 1) for word in command if "=" in word)


def rate_of(folder, name, cost):
    """The learning rate of a run that is compared."""
    options = options_of(folder, name, cost, 1)
    assert "validation_share" not in options  # nothing is held out of what is published
    return float(options["learning_rate"])


def test_learning_rates_are_tuned_until_bracketed(study):
    tune = ["--scores", "el2n", "--learning_rates", "0.5", "1"]
    status, out = study("tuned", ["random", "ucb"], *tune)
    assert status == 0
    tuning = json.loads(Path("tuned/summary.json").read_text())["tuning"]
    found = {row["name"]: row for row in tuning}
    short = {name: (row["chosen"], len(row["means"]), row["edge"]) for name, row in found.items()}
    assert short == {
        "full run": (1.0, 3, False),
        "short run": (1.0, 3, False),
        "random": (2.0, 4, False),
        "ucb": (4.0, 5, False),
    }
    for name, cost in (("full run", 1.0), ("short run", 0.5), ("random", 0.5), ("ucb", 0.5)):
        assert rate_of("tuned", name, cost) == found[name]["chosen"]
        for tried, mean in found[name]["means"]:  # on samples held out
            assert float(options_of("tuned", name, cost, 0, tried)["validation_share"]) > 0
            path = Path("tuned", Run(name, cost, 0, tried).folder, "report.json")
            assert PruningReport.load(path).metrics["eval_accuracy"] == mean
    for words in ("charged", "given"):  # static pruning by scores is not tuned itself
        assert rate_of("tuned", f"el2n, scores {words}", 0.5) == found["random"]["chosen"]
    assert Path("tuned/tuning.md").read_text().strip() in out
    # Without tuning the runs would have the learning rate of the recipe.
    status, message = study("tuned", ["random", "ucb"])
    assert status == 2
    assert "'--learning_rate=1.0'" in message


def test_batch_sizes_are_tuned_with_the_rates(study):
    sizes = ["--batch_sizes", "4", "8", "16"]
    status, out = study("batches", ["random", "ucb"], "--learning_rates", "1", "2", *sizes)
    assert status == 0
    for name, cost, batch, rate in (
        ("short run", 0.5, 8, 1.0),
        ("random", 0.5, 4, 1.0),  # 2.0 at 8
        ("ucb", 0.5, 16, 8.0),
    ):
        options = options_of("batches", name, cost, 1)
        assert int(options["per_device_train_batch_size"]) == batch
        assert rate_of("batches", name, cost) == rate
    assert "per_device_train_batch_size" not in options_of("batches", "full run", 1.0, 1)
    assert rate_of("batches", "full run", 1.0) == 1
    assert "ucb, cost 0.5, batch 16" in Path("batches/tuning.md").read_text()
    assert "ucb, cost 0.5: the best batch size is 16, the lowest or highest" in out
    assert study("taken", ["random", "ucb"], "--rates_of", "batches")[0] == 0
    assert options_of("taken", "random", 0.5, 1)["per_device_train_batch_size"] == "4"


def test_learning_rates_are_taken_over(study):
    assert study("tuned", ["random", "ucb"], "--learning_rates", "0.5", "1")[0] == 0
    rules = ["random", 'ucb:{"c": 2.0}', "ucb --learning_rate 0.25", "ucb"]
    assert study("taken", rules, "--rates_of", "tuned")[0] == 0
    assert json.loads(Path("taken/summary.json").read_text())["tuning"] == []
    for name, cost, rate in (
        ("full run", 1.0, 1.0),
        ("random", 0.5, 2.0),
        ("ucb", 0.5, 4.0),
        ("ucb (c 2.0)", 0.5, 4.0),  # that of the policy
        ("ucb (learning_rate 0.25)", 0.5, 0.25),
    ):
        assert rate_of("taken", name, cost) == rate
    for options, value in (
        (["--learning_rates", "1", "2"], "--learning_rates"),
        (["--costs", "0.25"], "short run at cost 0.25, random at cost 0.25"),
    ):
        status, message = study("none", rules, "--rates_of", "tuned", *options)
        assert status == 2
        assert value in message
    assert not Path("none").exists()


def test_a_run_is_started_once(tmp_path):
    program, log = tmp_path / "recipe.py", tmp_path / "log"
    program.write_text(f"open({str(log)!r}, 'a').write('started ')\n")
    plan = Plan(rules=[], costs=[], seeds=[0])
    sitting = Sitting(plan, Study(tmp_path / "study", [str(program)], 2))
    futures = [sitting.start(full_run(0)), sitting.start(full_run(0))]
    for future in futures:
        future.result()
    sitting.pool.shutdown()
    sitting.bar.close()
    assert log.read_text() == "started "


def test_the_runs_of_a_seed_come_before_those_of_the_next(study):
    tune = ["--learning_rates", "1", "2"]
    assert study("study", ["random"], *tune, "--jobs", "1")[0] == 0
    files = sorted(Path("study").glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns)
    runs = [json.loads(path.read_text()) for path in files]
    assert [run["seed"] for run in runs if run["rate"] is None] == [0, 0, 0, 1, 1, 1]


def test_runs_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in Study(tmp_path).environment
    assert Study(tmp_path, jobs=1000).environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Study(tmp_path, jobs=1000).environment["OMP_NUM_THREADS"] == "3"
