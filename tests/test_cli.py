"""The command line, as a person calls it."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from programs import python
from tiny import bert, vit
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from hf_dynprune import Scores, StaticPruning, __version__
from hf_dynprune.cli import COMMANDS, main


def hf_dynprune(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    program = "import sys; from hf_dynprune.cli import main; sys.exit(main())"
    return python("-W", "ignore", "-c", program, *arguments, environment=environment)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """(folder of a model, folder of a dataset)"""
    folder = tmp_path_factory.mktemp("images")
    vit().save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    pixels = [Image.fromarray(a) for a in generator.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)]
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])}
    labels = generator.integers(0, 3, 24).tolist()
    data = datasets.Dataset.from_dict(
        {"img": pixels, "label": labels}, features=datasets.Features(features)
    )
    (folder / "data").mkdir()
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder / "model", folder / "data"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(20))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder / "model")
    bert().save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    rows = [
        " ".join(f"w{i}" for i in generator.integers(0, 20, generator.integers(2, 7)))
        for _ in range(24)
    ]
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    labels = generator.integers(0, 2, 24).tolist()
    data = datasets.Dataset.from_dict(
        {"text": rows, "label": labels}, features=datasets.Features(features)
    )
    (folder / "data").mkdir()
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder / "model", folder / "data"


LITTLE = [
    "--runs",
    2,
    "--epochs",
    1,
    "--num_train_epochs",
    2,
    "--use_cpu",
    True,
    "--report_to",
    "none",
]


def test_score_images(images, tmp_path):
    model, data = images
    where = ["--model", model, "--dataset", data, "--output_dir", tmp_path]
    done = hf_dynprune("score", "--method", "el2n", "--from_scratch", True, *where, *LITTLE)
    assert done.returncode == 0, done.stderr
    scores = Scores.load(tmp_path / "scores.safetensors")
    assert scores.method == "el2n"
    assert len(scores) == 24
    assert scores.provenance["passes"] == 2 * (24 + 24 / 3)
    assert f'StaticPruning("{tmp_path / "scores.safetensors"}", keep_ratio=0.5)' in done.stdout
    assert StaticPruning(str(tmp_path / "scores.safetensors"), keep_ratio=0.5).keep == "hardest"


def test_score_texts(texts, tmp_path):
    model, data = texts
    where = ["--model", model, "--dataset", data, "--output_dir", tmp_path]
    done = hf_dynprune("score", "--method", "forgetting", "--json", *where, *LITTLE)
    assert done.returncode == 0, done.stderr
    scores = Scores.load(tmp_path / "scores.safetensors")
    assert scores.method == "forgetting"
    told = json.loads(done.stdout)
    assert told["passes"] == scores.provenance["passes"]
    assert told["file"] == scores.path


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        (["--method", "el3n"], "el3n"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--model", "no/such"], "'no/such'"),
        (["--dataset", "/no/such/place"], "/no/such/place"),
        (["--label_column", "colour"], "'colour'"),
        (["--image_column", "label2"], "'label2'"),
    ],
)
def test_a_mistake_is_reported_without_a_traceback(changes, value, images, tmp_path, capsys):
    model, data = images
    where = [
        "--method",
        "el2n",
        "--model",
        model,
        "--dataset",
        data,
        "--output_dir",
        tmp_path,
        *LITTLE,
    ]
    assert main(["score", *map(str, [*where, *changes])]) == 2
    captured = capsys.readouterr()
    assert value in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("changes", [["--method", "el3n"], ["--model", "/no/such/model"]])
def test_a_wrong_method_or_model_is_reported_before_the_data_are_read(changes, texts, monkeypatch):
    monkeypatch.setattr("hf_dynprune.data.classification", lambda options: pytest.fail("was read"))
    where = ["--method", "el2n", "--model", texts[0], "--dataset", texts[1], *changes]
    assert main(["score", *map(str, where)]) == 2


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], "--method"),
        (["--method", "el2n", "--model", "a", "--dataset", "b", "--sede", "1"], "'--seed'"),
        (["--method", "el2n", "--model", "a", "--dataset", "b", "--seed", "one"], "'one'"),
    ],
)
def test_the_error_comes_first_and_not_all_options_of_the_trainer(arguments, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["score", *arguments])
    first, *others = capsys.readouterr().err.splitlines()
    assert value in first
    assert len(others) < 5


def test_version():
    done = hf_dynprune("--version")
    assert (done.returncode, done.stdout) == (0, f"hf-dynprune {__version__}\n")


def test_help_names_the_commands_and_their_arguments():
    done = hf_dynprune("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    done = hf_dynprune("score", "--help")
    assert done.returncode == 0
    for option in (
        "--method",
        "--dataset",
        "--runs",
        "--num_train_epochs",
        "examples:",
        "exit status:",
    ):
        assert option in done.stdout


def test_an_unknown_command_is_an_error():
    done = hf_dynprune("prune")
    assert done.returncode == 2
    assert "prune" in done.stderr
