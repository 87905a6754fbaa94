"""`hf-dynprune card`, as a person calls it, and the published cards, which it wrote.

After a change of the template or of a policy's docstring write the published cards again:
`python tests/test_cli_card.py`.
"""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hf_dynprune import PruningReport, Scores
from hf_dynprune.cli import main

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"
STUDY = RESULTS / "studies" / "cifar10_resnet8"
UCB, FULL, SHORT = (
    STUDY / f"{name}_seed0" / "report.json" for name in ("ucb_0.3", "full_run", "short_run_0.3")
)


def commands():
    blocks = re.findall(
        r"```bash\n(.*?)```", (ROOT / "model_cards" / "README.md").read_text(), flags=re.DOTALL
    )
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


def run(command, folder):
    """Run a command of model_cards/README.md in the repository. It writes to `folder`."""
    assert command[:2] == ["hf-dynprune", "card"]
    arguments = []
    for argument in command[1:]:
        if argument.startswith("model_cards/"):
            arguments.append(str(folder / Path(argument).name))
        else:  # as the shell does
            found = sorted(map(str, Path().glob(argument))) if "*" in argument else []
            arguments += found or [argument]
    assert main(arguments) == 0


@pytest.mark.parametrize(
    "command", commands(), ids=lambda command: Path(command[command.index("--output") + 1]).stem
)
def test_published_cards_are_what_the_command_writes_now(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run(command, tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (card,) = (name for name in written if name.endswith(".md"))
    assert written[card].decode() == (ROOT / "model_cards" / card).read_text()
    (picture,) = (name for name in written if name.endswith(".png"))
    assert f"]({picture})" in written[card].decode()
    assert (ROOT / "model_cards" / picture).read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "model_cards" / picture).stat().st_size < 150_000


def test_published_cards_are_all_made_so():
    made = {
        Path(command[command.index(option) + 1]).name
        for command in commands()
        for option in ("--output", "--picture")
    }
    assert made == {path.name for path in (ROOT / "model_cards").iterdir()} - {"README.md"}


def test_without_output_the_card_is_printed(capsys):
    assert main(["card", str(UCB)]) == 0
    card = ModelCard(capsys.readouterr().out)
    assert card.data.tags == ["dynamic-data-pruning", "ucb"]
    assert "\n# ucb_0.3_seed0\n" in card.content  # the folder of the report
    assert "model-index" not in card.data.to_dict()


def test_results_are_in_the_metadata_if_it_is_known_of_what(capsys):
    assert (
        main(["card", str(UCB), "--dataset", "uoft-cs/cifar10", "--task", "image-classification"])
        == 0
    )
    data = ModelCard(capsys.readouterr().out).data
    assert data.datasets == ["uoft-cs/cifar10"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found["accuracy"] == PruningReport.load(UCB).metrics["eval_accuracy"]


def test_task_and_dataset_are_those_of_the_report(tmp_path, capsys):
    report = PruningReport.load(UCB)
    report.provenance = {"task": "image-classification", "dataset": {"id": "uoft-cs/cifar10"}}
    report.save(tmp_path / "report.json")
    assert main(["card", str(tmp_path)]) == 0
    data = ModelCard(capsys.readouterr().out).data
    assert (data.pipeline_tag, data.datasets) == ("image-classification", ["uoft-cs/cifar10"])
    assert data.eval_results[0].dataset_type == "uoft-cs/cifar10"


def test_what_was_written_is_printed(tmp_path, capsys):
    card, picture = str(tmp_path / "README.md"), str(tmp_path / "a.png")
    assert main(["card", str(UCB), "--output", card]) == 0
    assert card in capsys.readouterr().out
    assert main(["card", str(UCB), "--output", card, "--picture", picture]) == 0
    out = capsys.readouterr().out
    assert (card in out, picture in out) == (True, True)


def test_json(capsys):
    assert main(["card", str(UCB), "--full", str(FULL), "--short", str(SHORT), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["policy"]["name"] == "ucb"
    assert (
        facts["full"]["results"]["accuracy"]["mean"]
        == PruningReport.load(FULL).metrics["eval_accuracy"]
    )
    assert facts["short"]["cost_ratio"] == pytest.approx(
        PruningReport.load(SHORT).passes / (50_000 * 20)
    )


def test_card_in_another_folder_than_its_picture(tmp_path):
    (tmp_path / "pictures").mkdir()
    where = [
        "--output",
        str(tmp_path / "README.md"),
        "--picture",
        str(tmp_path / "pictures" / "a.png"),
    ]
    assert main(["card", str(UCB), *where]) == 0
    assert "](pictures/a.png)" in (tmp_path / "README.md").read_text()


def test_nothing_is_made_or_overwritten_by_mistake(tmp_path, capsys, reliability):
    report = tmp_path / "run" / "report.json"
    report.parent.mkdir()
    report.write_bytes(UCB.read_bytes())
    (tmp_path / "folder").mkdir()
    mistakes = [
        ["--output", tmp_path / "typo" / "README.md"],
        ["--output", tmp_path / "typo" / "deeper" / "README.md"],
        ["--output", tmp_path / "folder"],
        ["--output", report],
        ["--output", tmp_path / "README.md", "--picture", tmp_path / "typo" / "a.png"],
        ["--output", tmp_path / "README.md", "--picture", tmp_path / "pruning"],
        ["--output", tmp_path / "README.md", "--picture", tmp_path / "folder" / "a.exe"],
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments in mistakes:
        assert main(["card", str(report.parent), *map(str, arguments)]) == 2
        assert str(arguments[-1]) in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert report.read_bytes() == UCB.read_bytes()
    reliability("uploads", len(mistakes))


def test_a_card_reads_no_file_that_the_report_names(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Scores(torch.arange(9.0), "other", provenance={"passes": 1}).save("scores.safetensors")
    values = json.loads(UCB.read_text())
    policy = {"name": "static", "keep_ratio": 0.3, "keep": "hardest", "charge": True}
    values["policy"] = {**policy, "scores": "scores.safetensors", "digest": "0123"}
    Path("report.json").write_text(json.dumps(values))
    # Read, the file would be refused: it has another digest.
    assert main(["card", "report.json"]) == 0
    assert '`scores="scores.safetensors"`' in capsys.readouterr().out


def test_a_policy_that_cannot_be_made_names_the_report(tmp_path, capsys):
    values = json.loads(UCB.read_text())
    values["policy"]["keep_ratio"] = 7
    (tmp_path / "report.json").write_text(json.dumps(values))
    assert main(["card", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "keep_ratio=7" in error


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["nowhere.json"], ["nowhere.json"]),
        ([str(ROOT / "pyproject.toml")], ["pyproject.toml"]),
        ([str(UCB), str(UCB)], ["seed 0"]),
        ([str(UCB), "--full", str(SHORT)], ["6 epochs", "20"]),
        (
            [str(UCB), "--short", str(RESULTS / "quickstart" / "seed_0" / "short.json")],
            ["898", "50,000"],
        ),
        ([str(FULL), "--picture", "x.png"], ["--picture x.png"]),
    ],
)
def test_mistakes_are_reported(arguments, values, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["card", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(value in error for value in values)
    assert not any(tmp_path.iterdir())


def test_unknown_arguments(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["card", str(UCB), "--shrot", "x"])
    assert "--shrot" in capsys.readouterr().err


if __name__ == "__main__":
    os.chdir(ROOT)
    for command in commands():
        run(command, ROOT / "model_cards")
