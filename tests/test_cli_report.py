"""`hf-dynprune report` and `plot`, and the exit status of all commands."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hostile import RAW, TEXTS
from PIL import Image

from hf_dynprune import UCB, DynamicPruner, FullData, PruningReport, RunShape
from hf_dynprune.cli import COMMANDS, main
from hf_dynprune.escape import printable
from hf_dynprune.files import load_tensors, save_tensors
from hf_dynprune.identity import dataset_fingerprint
from hf_dynprune.provenance import labels_checksum

N, CHOICES = 12, 3
ROOT = Path(__file__).parents[1]


def train(folder, seed=0, keep_ratio=0.5, epochs=CHOICES):
    """Run a loop without a model. Write the files of a recipe, and a checkpoint."""
    shape = RunShape(N, 4, num_epochs=epochs)
    pruner = DynamicPruner(UCB(keep_ratio=keep_ratio), shape, seed=seed)
    for epoch in range(epochs):
        pruner.begin_epoch(epoch)
        for index in torch.tensor(list(pruner.sampler)).split(4):
            pruner.observe(index, {"loss": index.float() + 1})
        pruner.add_evaluation(
            {"eval_accuracy": 0.5 + (epoch + seed) / 10, "eval_loss": 1.5, "eval_runtime": 3.0}
        )
    pruner.end_epoch()
    pruner.report.save(folder / "report.json")
    pruner.table.save(folder / "table.safetensors")
    pruner.save(folder / "checkpoint-6")
    return pruner


@pytest.fixture
def runs(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", keep_ratio=0.25)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    images = [Image.new("RGB", (4, 4), (i, i, i)) for i in range(N)]
    data = datasets.Dataset.from_dict({"img": images, "label": [0, 1] * (N // 2)}, features)
    for name, columns in (("images", data), ("texts", data.remove_columns("img"))):
        (folder / name).mkdir()
        columns.to_parquet(folder / name / "train-00000-of-00001.parquet")
    return folder


def call(capsys, *arguments, status=0):
    """What the command prints. If it fails, its standard error, which has no traceback."""
    assert main([*map(str, arguments)]) == status
    out, err = capsys.readouterr()
    if status:
        assert out == ""
        assert f"hf-dynprune {arguments[0]}: " in err
        assert "Traceback" not in err
        return err
    return out


# ---- report --------------------------------------------------------------------------------------


def test_a_run_in_full(runs, capsys):
    file = runs[0] / "report.json"
    summary = PruningReport.load(file).summary()
    first, *lines = call(capsys, "report", runs[0]).splitlines()
    assert first == str(file)
    assert [line.strip().split(maxsplit=1)[0] for line in lines] == [
        label.split()[0] for label in summary
    ]
    assert all(line.endswith(text) for line, text in zip(lines, summary.values(), strict=True))
    assert call(capsys, "report", runs[0], "--metric", "eval_loss").count("eval_") == 1


def test_runs_side_by_side(runs, capsys):
    out = call(capsys, "report", runs[0], runs[1] / "report.json").splitlines()
    assert out[0].split()[:5] == ["run", "eval_accuracy", "cost", "passes/N", "epochs"]
    assert [line.split()[:6] for line in out[1:3]] == [
        ["a", "70.00", "%", "0.500", "1.50", "3"],
        ["b", "70.00", "%", "0.250", "0.75", "3"],
    ]
    assert out[2].endswith("ucb(keep_ratio=0.25)")
    assert "1.5 " in call(capsys, "report", *runs, "--metric", "eval_loss").splitlines()[1]


def cells(out, column):
    header, *rows = [line.split() for line in out.splitlines()]
    return [row[header.index(column) + (row[2] == "%")] for row in rows[:-2]]


def test_costs_have_one_denominator(runs, capsys):
    train(runs[0].parent / "short", keep_ratio=1.0, epochs=2)
    train(runs[0].parent / "long", keep_ratio=0.25, epochs=6)
    three = [runs[0], runs[0].parent / "short", runs[0].parent / "long"]
    out = call(capsys, "report", *three)
    assert cells(out, "passes/N") == ["1.50", "2.00", "1.50"]
    assert cells(out, "cost") == ["0.250", "0.333", "0.250"]  # of 6 epochs
    read = json.loads(call(capsys, "report", *three, "--json"))
    assert [run["cost"] for run in read] == pytest.approx([1.5 / 6, 2 / 6, 1.5 / 6])
    assert {run["cost_against_epochs"] for run in read} == {6}
    assert read[0]["cost_ratio"] == 0.5


def test_costs_against_a_full_run(runs, capsys):
    full = runs[0].parent / "full"
    pruner = train(full, keep_ratio=1.0, epochs=2)
    pruner.report.policy = FullData().to_dict()
    pruner.report.save(full / "report.json")
    for files in ([runs[0]], [full, runs[0]]):
        out = call(capsys, "report", *files, "--full", full)
        assert cells(out, "cost") == ["1.000", "0.750"]  # of 2 epochs
    assert "'ucb'" in call(capsys, "report", runs[0], "--full", runs[1], status=2)
    pruner.report.num_samples = 99
    pruner.report.save(full / "report.json")
    error = call(capsys, "report", runs[0], "--full", full, status=2)
    assert re.search(r"\b12 samples.*\b99\b", error)


def test_effective_shares_have_columns_if_a_run_has_them(runs, capsys):
    assert "eff.share" not in call(capsys, "report", *runs)
    report = PruningReport.load(runs[0] / "report.json")
    for record, share in zip(report.epochs, (1.0, 0.5, None), strict=True):
        record.effective_share = share
    report.save(runs[0] / "report.json")
    header, *rows = [line.split() for line in call(capsys, "report", *runs).splitlines()]
    assert header[-3:] == ["eff.share", "G", "policy"]
    assert [row[-3:-1] for row in rows[:2]] == [["0.500", "1.50"], ["-", "-"]]


def test_committed_reports_side_by_side(capsys):
    files = sorted((ROOT / "recipes" / "results" / "quickstart").glob("*/full.json"))
    out = call(capsys, "report", *files).splitlines()
    rows = out[1 : 1 + len(files)]
    assert [line.split()[0] for line in rows] == [str(file) for file in files]  # names that differ


def test_json(runs, capsys):
    first, second = json.loads(call(capsys, "report", *runs, "--json"))
    assert first["file"] == str(runs[0] / "report.json")
    assert second["policy"]["keep_ratio"] == second["cost_ratio"] == 0.25
    assert first["totals"]["optimizer_steps"] == 6
    assert "epochs" not in first


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (None, ""),
        ("", ""),
        ('{"format_version": 1, "policy":', "Expecting value"),
        ("[1, 2]", ""),
        ('{"loss": 1}', "format_version None"),
        ('{"format_version": 2}', "format_version 2"),
        ('{"format_version": 1}', "'policy'"),
        ("\udcff", ""),
    ],
)
def test_a_file_that_is_not_a_report(text, value, tmp_path, capsys):
    file = tmp_path / "report.json"
    if text is not None:
        file.write_text(text, errors="surrogateescape")
    for command in (["report"], ["plot", "runs"], ["plot", "scores"]):
        for path in (file, tmp_path):
            error = call(capsys, *command, path, status=2)
            assert value in error
            assert str(file) in error


def foreign(path, text):
    """A report in which each name that may be somebody else's is `text`."""
    train(path)
    values = json.loads((path / "report.json").read_text())
    values["policy"] = {"name": text, text: text}
    values["environment"] |= {"device": text, "versions": {text: text}}
    values["preparation"] = {"charged": True, "method": text, "passes": 3}
    values["best_model"] = {"step": 1, "metrics": {text: 0.5}}
    for record in values["epochs"]:
        record["metrics"] = {text: 0.5}
    (path / "report.json").write_text(json.dumps(values))
    return path / "report.json"


@pytest.mark.parametrize("text", [text for text in TEXTS if text], ids=repr)
def test_texts_of_others_are_shown_escaped(text, tmp_path, capsys, reliability):
    reliability("foreign texts")
    file = foreign(tmp_path / "run", text)
    one, two = (call(capsys, "report", *files) for files in ([file], [file, file]))
    assert not RAW.search(one + two)
    assert len(one.splitlines()) == len(PruningReport.load(file).summary()) + 1
    assert len(two.splitlines()) == 5
    assert printable(text) in one
    assert not RAW.search(call(capsys, "report", file, "--metric", "none", status=2))
    (read,) = json.loads(call(capsys, "report", file, "--json"))
    assert read["policy"]["name"] == text


def test_json_of_what_json_does_not_have(tmp_path, capsys):
    train(tmp_path)
    report = PruningReport.load(tmp_path / "report.json")
    report.epochs[-1].metrics = {"eval_auc": math.nan, "eval_loss": -math.inf}
    report.save(tmp_path / "report.json")

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    (read,) = json.loads(call(capsys, "report", tmp_path, "--json"), parse_constant=refuse)
    assert read["metrics"] == {"eval_auc": "NaN", "eval_loss": "-Infinity"}
    assert "eval_auc nan, eval_loss -inf" in call(capsys, "report", tmp_path)
    facts = json.loads(call(capsys, "card", tmp_path, "--json"), parse_constant=refuse)
    assert facts["results"]["auc"]["mean"] == "NaN"


@pytest.mark.parametrize("command", [["report"], ["card"], ["plot", "runs"], ["plot", "scores"]])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_samples", 0),
        ("epochs", {}),
        ("selection", []),
        ("environment", None),
        ("seed", "0"),
        ("policy", {"keep_ratio": 0.5}),
    ],
)
def test_a_wrong_field_is_named(command, field, value, runs, capsys, reliability):
    reliability("foreign reports")
    file = runs[0] / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    error = call(capsys, *command, file, status=2)
    assert str(file) in error
    assert field in error


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_all_characters(encoding, runs):
    program = "import sys; from hf_dynprune.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "report", str(runs[0])]
    settings = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run(command, capture_output=True, env={**os.environ, **settings})
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_truncated_report(runs, capsys):
    text = (runs[0] / "report.json").read_text()
    (runs[0] / "report.json").write_text(text[: len(text) // 2])
    assert str(runs[0] / "report.json") in call(capsys, "report", *runs, status=2)


def test_an_unknown_metric_names_the_known_ones(runs, capsys):
    for command in (["report"], ["plot", "runs"]):
        error = call(capsys, *command, runs[0], "--metric", "eval_f1", status=2)
        assert "'eval_f1'" in error
        assert "eval_accuracy" in error


# ---- plot ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "start"),
    [
        ("runs", ["--output", "a.png"], b"\x89PNG"),
        (
            "runs",
            ["--against", "seconds", "--metric", "eval_loss", "--output", "new/a.svg"],
            b"<?xml",
        ),
        ("selection", ["--name", "one", "two", "--output", "a.pdf"], b"%PDF"),
    ],
)
def test_plot_runs(kind, options, start, runs, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(runs[0].parent)
    assert options[-1] in call(capsys, "plot", kind, *runs, *options)
    assert Path(options[-1]).read_bytes().startswith(start)


def test_runs_of_one_name_are_seeds(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        train(Path(f"seed_{seed}"), seed)
    call(capsys, "plot", "runs", "seed_0", "seed_1", "--name", "UCB", "UCB", "--output", "runs.svg")
    call(capsys, "plot", "runs", "seed_0", "seed_1")
    assert Path("runs.png").exists()
    assert "UCB: 75.00 % (70.00 to 80.00)" in Path("runs.svg").read_text()
    train(Path("other"), keep_ratio=0.25)
    two = ["plot", "runs", "seed_0", "other", "--name", "UCB"]
    assert "keep_ratio: 0.5 and 0.25" in call(capsys, *two, "UCB", status=2)
    assert "--name" in call(capsys, *two, status=2)


def test_plot_scores(runs, capsys):
    pytest.importorskip("matplotlib")
    call(capsys, "plot", "scores", runs[0], "--output", runs[0] / "scores.png")
    assert (runs[0] / "scores.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "source", ["", "table.safetensors", "checkpoint-6", "checkpoint-6/pruning_state.safetensors"]
)
def test_plot_classes_from_a_run_or_a_checkpoint(source, runs, dataset, capsys):
    pytest.importorskip("matplotlib")
    times = DynamicPruner(UCB(keep_ratio=0.5), RunShape(N, 4, num_epochs=CHOICES))
    times.load(runs[0] / "checkpoint-6")
    share = times.table["times_kept"].reshape(-1, 2).double().mean(0) / CHOICES
    file = runs[0] / "classes.svg"
    call(
        capsys,
        "plot",
        "classes",
        runs[0] / source,
        "--dataset",
        dataset / "images",
        "--output",
        file,
    )
    text = file.read_text()
    assert f"all samples: {50:.1f} %" in text
    assert text.index("<!-- cat -->") != text.index("<!-- dog -->")
    assert (text.index("<!-- cat -->") < text.index("<!-- dog -->")) == bool(
        share[0] <= share[1]
    )  # from the lowest


def test_plot_samples(runs, dataset, capsys):
    pytest.importorskip("matplotlib")
    file = runs[0] / "samples.svg"
    call(capsys, "plot", "samples", runs[0], "--dataset", dataset / "images", "--output", file)
    assert file.read_text().count("<image") >= N


def test_another_dataset_of_the_same_length_is_refused(runs, dataset, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    data = datasets.load_dataset(str(dataset / "images"), split="train")
    other = data.map(lambda row: {"label": 1 - row["label"]}, load_from_cache_file=False)
    other.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    report = PruningReport.load(runs[0] / "report.json")
    labels = labels_checksum(np.array(data["label"]))
    known = {"id": "owner/data", "fingerprint": "12 samples, 1f2e", "labels": labels}
    report.provenance = {"dataset": known}
    report.save(runs[0] / "report.json")
    state = runs[0] / "checkpoint-6" / "pruning_state.safetensors"
    tensors, metadata = load_tensors(state)
    save_tensors(state, tensors, {**metadata, "report": report.to_dict()})
    output = ["--output", tmp_path / "x.png"]
    for source in (runs[0], state):
        for kind in ("samples", "classes"):
            plot = ["plot", kind, source, *output, "--dataset"]
            call(capsys, *plot, dataset / "images")
            error = call(capsys, *plot, tmp_path, status=2)
            assert str(tmp_path) in error
            assert "owner/data" in error
            call(capsys, *plot, tmp_path, "--other_labels")
    report.provenance["dataset"]["fingerprint"] = dataset_fingerprint(
        datasets.load_dataset(str(tmp_path), split="train")
    )
    report.save(runs[0] / "report.json")
    call(capsys, "plot", "classes", runs[0], *output, "--dataset", tmp_path)


def test_mistakes_about_the_samples(runs, dataset, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    data = ["--dataset", dataset / "images", "--output", tmp_path / "x.png"]
    classes = ["plot", "classes", runs[0], *data]
    half = call(capsys, *classes, "--split", "train[:50%]", status=2)
    assert re.search(r"\b12 samples.*\b6\b", half)
    assert "'colour'" in call(capsys, *classes, "--label_column", "colour", status=2)
    for missing in (tmp_path, tmp_path / "none"):
        assert str(missing) in call(capsys, "plot", "classes", missing, *data, status=2)
    texts = ["--dataset", dataset / "texts", "--output", tmp_path / "x.png"]
    assert "0 image columns" in call(capsys, "plot", "samples", runs[0], *texts, status=2)
    (runs[1] / "table.safetensors").replace(runs[0] / "table.safetensors")
    unlike = call(capsys, *classes, status=2)
    assert str(runs[0] / "table.safetensors") in unlike
    (runs[0] / "report.json").unlink()
    without = call(capsys, *classes, status=2)
    assert str(runs[0] / "report.json") in without
    assert without != unlike
    assert not (tmp_path / "x.png").exists()


def test_a_state_or_a_table_that_does_not_say_what_was_kept(runs, dataset, capsys):
    data = ["--dataset", dataset / "images"]
    state = runs[0] / "checkpoint-6" / "pruning_state.safetensors"
    save_tensors(state, {"other": torch.ones(2)}, {})
    assert str(state) in call(capsys, "plot", "classes", state, *data, status=2)
    report = runs[0] / "report.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "selection": {}}))
    assert str(report) in call(capsys, "plot", "classes", runs[0], *data, status=2)


def test_an_output_that_cannot_be(runs, capsys):
    error = call(capsys, "plot", "runs", runs[0], "--output", "runs.jpeg2000", status=2)
    assert "runs.jpeg2000" in error


def test_without_matplotlib_the_extra_is_named(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install '.[recipes]'" in call(capsys, "plot", "runs", runs[0], status=1)


# ---- the exit status of all commands -------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["report"], ["plot"], *(["plot", k] for k in ("runs", "classes", "samples"))]
)
def test_help_has_an_example_and_the_exit_status(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"\n  hf-dynprune {' '.join(arguments)} " in out
    assert "exit status" in out


@pytest.mark.parametrize(
    "arguments",
    [[], ["plot"], ["plot", "pie"], ["report"], ["plot", "runs", "x", "--against", "y"]],
)
def test_wrong_arguments_are_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_interrupted(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "report", interrupt)
    call(capsys, "report", status=130)


def test_a_failure_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(COMMANDS, "report", lambda argv: {}["lost"])
    with pytest.raises(KeyError):
        main(["report"])


def test_a_reader_that_goes_away():
    program = "import sys; from hf_dynprune.cli import main; sys.exit(main())"
    files = sorted(
        (ROOT / "recipes" / "results" / "studies" / "cifar10_long").glob("*/report.json")
    )
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", program, "report", *map(str, files)]
    done = subprocess.run(
        command,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
