"""`hf-dynprune advise`, as a user calls it, and `--advise True` of a recipe."""

import json
from pathlib import Path

import pytest
import test_cli
from programs import python
from test_cli import hf_dynprune

from hf_dynprune.cli import main
from hf_dynprune.policies import FullData
from hf_dynprune.report import EpochRecord, PruningReport

images, texts = test_cli.images, test_cli.texts  # the fixtures
RUN = ["--num_train_epochs", 2, "--per_device_train_batch_size", 8, "--use_cpu", True]
RUN += ["--report_to", "none", "--batches", 4]


def test_advice_on_images(images, tmp_path):
    model, data = images
    where = ["--model", model, "--dataset", data, "--output_dir", tmp_path / "new"]
    done = hf_dynprune("advise", *where, *RUN, "--from_scratch", True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "--after" in lines[0]  # fresh weights cannot tell whether pruning pays
    assert lines[2].startswith("policy ")
    assert lines[3].startswith("FullData() ")
    assert "UCB(keep_ratio=0.1)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_advice_on_texts_as_json(texts, tmp_path, capsys):
    model, data = texts
    where = ["--model", model, "--dataset", data, "--output_dir", tmp_path]
    evaluation = ["--eval_strategy", "epoch", "--eval_split", "train[:8]"]
    assert main(["advise", *map(str, [*where, *RUN, *evaluation]), "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["settings"]["num_samples"] == 24
    assert advice["measured"]["evaluation"] > 0
    assert advice["potential"] is None
    full, *others = advice["predictions"]
    assert full["steps"] == 6
    assert full["seconds"]["evaluation"] == pytest.approx(2 * advice["measured"]["evaluation"])
    assert {row["keep_ratio"] for row in others} == {0.1, 0.3, 0.5, 0.7, None}
    assert list(tmp_path.iterdir()) == []


def leave_a_short_run(folder, **given):
    report = PruningReport(
        FullData().to_dict(),
        24,
        0,
        0,
        num_epochs=1.0,
        epochs=[EpochRecord(0, True, 24, 24, 24, effective_share=0.8)],
        **given,
    )
    report.save(folder / "report.json")


def test_advice_after_a_short_run(images, tmp_path, capsys):
    model, data = images
    other = {"dataset": {"fingerprint": "24 samples, of another kind"}}
    leave_a_short_run(tmp_path / "short", provenance=other)
    where = ["--model", model, "--dataset", data, "--output_dir", tmp_path / "new"]
    after = ["--after", tmp_path / "short", "--from_scratch", True]
    assert main(["advise", *map(str, [*where, *RUN, *after])]) == 2
    assert "--same_data" in capsys.readouterr().err
    after.append("--same_data")
    assert main(["advise", *map(str, [*where, *RUN, *after]), "--json"]) == 0
    potential = json.loads(capsys.readouterr().out)["potential"]
    assert potential["gain"] == pytest.approx(1.25)
    assert potential["keep_ratio"] == 0.5  # one epoch of two
    assert potential["interval"][0] < potential["cost"] < potential["interval"][1]
    replaced = PruningReport.load(tmp_path / "short" / "report.json")
    replaced.num_samples = 25
    replaced.save(tmp_path / "short" / "report.json")
    assert main(["advise", *map(str, [*where, *RUN, *after])]) == 2
    assert "25 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--after", "/no/such/run"], "/no/such/run"),
        (["--dataset", "/no/such/place"], "/no/such/place"),
        (["--batches", 1], "batches=1"),
        (["--same_data"], "--after"),
        (["--eval_strategy", "epoch"], "--eval_split"),
    ],
)
def test_a_mistake_gives_a_message_without_a_traceback(changes, message, images, tmp_path, capsys):
    model, data = images
    where = ["--model", model, "--dataset", data, "--output_dir", tmp_path]
    assert main(["advise", *map(str, [*where, *RUN, *changes])]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_advice_on_a_log(tmp_path, capsys):
    """Neither a model nor data are needed."""
    file = tmp_path / "trainer_state.json"
    entries = [{"frac_reward_zero_std": 0.75, "step": 10, "epoch": 12.0}]
    file.write_text(json.dumps({"log_history": entries}))
    assert main(["advise", "--log", str(file)]) == 0
    assert "G = 4.0" in capsys.readouterr().out
    assert main(["advise", f"--log={file}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["effective_share"] == 0.25
    file.write_text("{}")
    assert main(["advise", "--log", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_help():
    done = hf_dynprune("advise", "--help")
    assert done.returncode == 0
    for part in ("--log LOG", "--batches", "--eval_split", "--num_train_epochs", "--dataset"):
        assert part in done.stdout
    assert "advise" in hf_dynprune("--help").stdout


def test_a_recipe_advises(images, tmp_path):
    """Nothing is trained or written, even if the output folder contains a run."""
    leave_a_short_run(tmp_path)
    root = Path(__file__).parents[1]
    data = ["--dataset", images[1], "--eval_split", "train[:8]", "--model", "resnet8_cifar"]
    run = ["--num_train_epochs", 2, "--output_dir", tmp_path, "--advise", "True"]
    done = python(root / "recipes/cifar.py", *data, *run, "--after", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1.25" in done.stdout.splitlines()[0]  # G
    assert "FullData()" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    done = python(root / "recipes/cifar.py", *data, *run, "--after", tmp_path / "no_run")
    assert done.returncode == 2
    assert "no_run" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
