"""Cards, models and scores go to a Hub on this machine and back. Failed uploads lose nothing."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import traceback
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hostile import RAW, TEXTS, programs, shape
from hub import Hub, refuse
from huggingface_hub import DatasetCard, ModelCard
from tiny import KnownLoss, arguments, images, known_losses, trainer, values

from hf_dynprune import (
    UCB,
    DynamicPruner,
    DynamicPruningTrainer,
    PruningReport,
    RandomPruning,
    RunShape,
    Scores,
    StaticPruning,
    kept_dataset,
    load_scores_from_hub,
    push_scores_to_hub,
    push_timm_to_hub,
)
from hf_dynprune.escape import printable
from hf_dynprune.files import save_parquet
from hf_dynprune.hub import SCORES_FILE
from hf_dynprune.table import Last

N, SIZE, NAMES = 24, 8, ["cat", "dog", "owl"]


# ---- in one child process, because huggingface_hub reads its settings when it is imported --------


def timm_trainer(folder):
    from hf_dynprune.vision import ImageCache, batch_collator, create_timm_model

    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8)
    cache = ImageCache(pixels, torch.arange(N) % 3, mean=[0.5] * 3, std=[0.25] * 3)
    return DynamicPruningTrainer(
        model=create_timm_model(
            "resnet8_cifar", label_names=NAMES, image_size=SIZE, mean=cache.mean, std=cache.std
        ),
        args=arguments(
            folder, num_train_epochs=2, eval_strategy="epoch", remove_unused_columns=False
        ),
        train_dataset=cache,
        eval_dataset=cache,
        data_collator=batch_collator,
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
        pruning=UCB(keep_ratio=0.5),
    )


REFUSALS = {  # name -> (status, what is refused)
    "not logged in": (401, "/repos/create"),
    "not allowed": (403, "/preupload/"),
    "in mid-upload": (403, "/blob/"),
    "at the commit": (500, "/commit/"),
}


def fails(call, folder):
    """What the call raises, and which files the folder then holds."""
    try:
        call()
    except RuntimeError as error:
        return {
            "message": str(error),
            "cause": type(error.__cause__).__name__,
            "files": sorted(os.listdir(folder)),
        }
    return {"message": "nothing was raised"}


SECRETS = (".env", "patients.csv", "README.md", "deeper/model.safetensors")


def scatter(folder):
    """Put files of a user into a folder."""
    for name in SECRETS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret")


def program(folder):
    import datasets
    import timm
    from PIL import Image
    from transformers import AutoModelForImageClassification, pipeline

    found, errors = {}, {}
    run = timm_trainer(folder / "runs" / "model")
    run.train()
    calls = {
        "model": (
            lambda: run.push_to_hub(dataset="noise", tasks="image-classification"),
            run.args.output_dir,
        ),
        "timm": (lambda: push_timm_to_hub(run, "user/timm"), f"{run.args.output_dir}/_timm"),
        "table": (lambda: push_scores_to_hub(run, "user/table"), f"{run.args.output_dir}/_scores"),
    }
    for why, (status, path) in REFUSALS.items():
        refuse(status, path)
        for what, call in calls.items():
            errors[f"{what}, {why}"] = fails(*call)
    refuse(None)
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        with mock.patch(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}"
        ):
            errors["table, no connection"] = fails(*calls["table"])
    for call, _ in calls.values():
        call()
    scores = Scores(
        torch.arange(24.0), "el2n", provenance={"passes": 3, "model": "/home/someone/model"}
    )
    push_scores_to_hub(scores, "user/el2n", folder=folder / "el2n")
    scores.provenance["settings"] = {"hub_token": "secret", "seed": 3}
    # In the working directory lies a folder with the name of the repository.
    scatter(folder / "cwd" / "mine")
    os.chdir(folder / "cwd")
    push_scores_to_hub(scores, "user/mine")
    push_scores_to_hub(run.pruner, "user/mine-too")
    # These lie in the output folder, and the table is pushed from a folder below it.
    scatter(Path(run.args.output_dir) / "_other")
    push_scores_to_hub(run, "user/table")
    found["temporary"] = sorted(Path(tempfile.gettempdir()).glob("hf_dynprune-*"))

    pixels = run.eval_dataset[0]["pixel_values"][None]
    models = {
        "trained": run.model.timm_model,
        "timm": timm.create_model("hf-hub:user/timm", pretrained=True),
        "transformers": AutoModelForImageClassification.from_pretrained("user/model").timm_model,
        "transformers, of timm's format": AutoModelForImageClassification.from_pretrained(
            "user/timm"
        ).timm_model,
    }
    found["logits"] = {name: model.eval()(pixels).tolist() for name, model in models.items()}
    image = Image.fromarray(np.zeros((SIZE, SIZE, 3), dtype=np.uint8))
    for name in ("user/model", "user/timm"):
        found[f"pipeline {name}"] = pipeline("image-classification", model=name)(image)
    table = load_scores_from_hub("user/table", dataset=run.train_dataset)
    found["table"] = {
        name: [table[name].tolist(), run.pruner.table[name].tolist()] for name in table.columns
    }
    read = load_scores_from_hub("user/el2n")
    found["scores"] = [
        read.values.tolist(),
        read.method,
        StaticPruning(read, keep_ratio=0.5).digest == read.digest,
    ]
    found["rows"] = {
        name: datasets.load_dataset(name, split="train")[1] for name in ("user/table", "user/el2n")
    }
    for name in ("user/model", "user/nothing"):
        try:
            load_scores_from_hub(name)
        except FileNotFoundError as error:
            errors[f"load {name}"] = str(error)
        except Exception as error:
            errors[f"load {name}"] = type(error).__name__
    found["errors"] = errors
    found["docs"] = programs_of_the_docs(folder / "docs")
    (folder / "found.json").write_text(json.dumps(found))


def programs_of_the_docs(folder):
    """Run the programs of the docs that push; the traceback of what fails."""
    from test_docs import run_programs_that_push

    folder.mkdir()
    try:
        run_programs_that_push(folder)
    except Exception:
        return traceback.format_exc()
    return ""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(files by repository, what the child found, its folder)"""
    pytest.importorskip("timm")
    folder, tests = tmp_path_factory.mktemp("hub"), Path(__file__).parent
    with Hub() as hub:
        (folder / "tmp").mkdir()
        environment = {
            **hub.environment(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
        }
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, str(folder)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads((folder / "found.json").read_text())
        # The command by which the message of a failed upload says how to continue later.
        command = shlex.split(found["errors"]["model, not allowed"]["message"].split("`")[-2])
        assert command[:3] == ["hf", "upload", "model"]
        hf = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "huggingface_hub.cli.hf",
            "upload",
            "user/again",
            *command[3:],
        ]
        done = subprocess.run(hf, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return hub.files, found, folder


def test_the_programs_of_the_docs_push(pushed):
    files, found, _ = pushed
    assert found["docs"] == ""
    assert {"user/run", "user/resnet8-cifar10", "user/cifar10-scores"} <= files.keys()


CARD = {"README.md", "report.json", "pruning.png"}


def test_model(pushed):
    pytest.importorskip("matplotlib")  # the card has a picture only then
    files, found, _ = pushed
    assert files["user/model"].keys() == {
        *CARD,
        "config.json",
        "model.safetensors",
        "training_args.bin",
    }
    card = ModelCard(files["user/model"]["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "transformers",
        "image-classification",
    )
    assert {"dynamic-data-pruning", "ucb"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    report = PruningReport.from_dict(json.loads(files["user/model"]["report.json"]))
    assert (result.metric_type, result.metric_value) == (
        "accuracy",
        report.metrics["eval_accuracy"],
    )
    assert "](pruning.png)" in card.content
    assert 'name = "user/model"' in card.content
    assert files["user/model"]["pruning.png"].startswith(b"\x89PNG")
    assert found["logits"]["transformers"] == found["logits"]["trained"]
    assert {guess["label"] for guess in found["pipeline user/model"]} == set(NAMES)


def test_model_in_the_format_of_timm_loads_with_both(pushed):
    files, found, _ = pushed
    assert files["user/timm"].keys() == {*CARD, "config.json", "model.safetensors"}
    config = json.loads(files["user/timm"]["config.json"])
    assert (config["architecture"], config["num_classes"], config["label_names"]) == (
        "resnet8_cifar",
        3,
        NAMES,
    )
    assert config["pretrained_cfg"]["input_size"] == [3, SIZE, SIZE]
    card = ModelCard(files["user/timm"]["README.md"].decode())
    assert card.data.library_name == "timm"
    load = card.content.partition("## How to load")[2].partition("\n## ")[0]
    assert load.index("import hf_dynprune.vision") < load.index(
        'timm.create_model("hf-hub:user/timm", pretrained=True)'
    )
    assert found["logits"]["timm"] == found["logits"]["trained"]
    assert found["logits"]["transformers, of timm's format"] == found["logits"]["trained"]
    assert found["pipeline user/timm"] == found["pipeline user/model"]


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("resnet8_cifar", {"in_chans": 1, "width": 0.5}),
        (
            "vit_tiny_patch16_224",
            {"img_size": SIZE, "patch_size": 4, "depth": 1, "embed_dim": 12, "drop_path_rate": 0.1},
        ),
    ],
)
def test_format_of_timm_keeps_what_the_model_was_made_with(architecture, settings, tmp_path):
    timm = pytest.importorskip("timm")
    from transformers import AutoModelForImageClassification

    from hf_dynprune.vision import create_timm_model, save_timm

    channels = settings.get("in_chans", 3)
    statistics = {"mean": [0.5] * channels, "std": [0.25] * channels}
    model = create_timm_model(
        architecture, num_labels=5, image_size=SIZE, crop_pct=0.8, **statistics, **settings
    ).eval()
    save_timm(model, tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, channels, SIZE, SIZE)
    assert torch.equal(other(pixels), model(pixels).logits)
    assert torch.equal(
        AutoModelForImageClassification.from_pretrained(tmp_path)(pixels).logits, other(pixels)
    )
    expected = {
        "input_size": (channels, SIZE, SIZE),
        "crop_pct": 0.8,
        **{k: tuple(v) for k, v in statistics.items()},
    }
    found = timm.data.resolve_model_data_config(other)
    assert {
        name: tuple(v) if isinstance(v := found[name], list) else v for name in expected
    } == expected


def test_table_of_a_run(pushed):
    files, found, _ = pushed
    assert files["user/table"].keys() == {"README.md", "report.json", SCORES_FILE}
    for name, (read, written) in found["table"].items():
        np.testing.assert_array_equal(read, written, err_msg=name)
    assert list(found["rows"]["user/table"]) == [
        "sample_index",
        "mean",
        "variance",
        "loss",  # of the effective share
        "times_kept",
        "last_observed",
    ]
    assert found["rows"]["user/table"]["sample_index"] == 1
    card = DatasetCard(files["user/table"]["README.md"].decode())
    assert card.data.tags == ["dynamic-data-pruning", "ucb"]
    assert card.data["hf_dynprune"]["fingerprint"].startswith(f"{N} samples")
    assert card.data["hf_dynprune"]["policy"] == UCB(keep_ratio=0.5).to_dict()
    selection = json.loads(files["user/table"]["report.json"])["selection"]
    for name in ("always", "sometimes", "never"):
        assert f"| {name} | {100 * selection[name]:.1f} % |" in card.content


def test_scores_made_before_a_run(pushed):
    files, found, _ = pushed
    assert found["scores"] == [list(range(24)), "el2n", True]
    assert found["rows"]["user/el2n"] == {"sample_index": 1, "score": 1.0}
    card = DatasetCard(files["user/el2n"]["README.md"].decode())
    assert card.data.tags == ["static-data-pruning", "el2n"]
    assert re.search(r"\b3 passes", card.content)
    assert "someone" not in card.content


def test_nothing_leaves_that_was_not_written_to_be_published(pushed, reliability):
    files, found, folder = pushed
    reliability("uploads", len(files))
    expected = {
        "user/table": {"README.md", "report.json", SCORES_FILE},
        "user/mine-too": {"README.md", "report.json", SCORES_FILE},
        "user/mine": {"README.md", SCORES_FILE},
        "user/el2n": {"README.md", SCORES_FILE},
    }
    for name, names in expected.items():
        assert files[name].keys() == names
        content = b"".join(files[name].values())
        assert not re.search(b"secret|someone|/home", content)
        assert str(folder).encode() not in content
    for name in SECRETS:  # nothing was changed where the user's files are
        assert (folder / "cwd" / "mine" / name).read_text() == "secret"
    assert len([p for p in (folder / "cwd").rglob("*") if p.is_file()]) == len(SECRETS)
    assert found["temporary"] == []


def test_what_is_not_there(pushed):
    _, found, _ = pushed
    assert re.search(r"user/model .*scores\.parquet", found["errors"]["load user/model"])
    assert found["errors"]["load user/nothing"] == "RepositoryNotFoundError"


@pytest.mark.parametrize(
    ("what", "why"),
    [*product(("model", "timm", "table"), REFUSALS), ("table", "no connection")],
)
def test_failed_upload_loses_nothing(pushed, what, why):
    _, found, folder = pushed
    error = found["errors"][f"{what}, {why}"]
    where = {"model": "runs/model", "timm": "runs/model/_timm", "table": "runs/model/_scores"}[what]
    files = (
        {"README.md", "report.json", SCORES_FILE}
        if what == "table"
        else {*CARD, "config.json", "model.safetensors"}
    )
    assert files <= set(error["files"])
    assert f" {folder / where}. " in error["message"]
    assert re.search(r"(trainer\.)?push_\w*to_hub\(.*\)", error["message"])
    assert re.search(rf"hf upload (user/)?{what} {folder / where} ", error["message"])
    happened = {"in mid-upload": "Error while uploading", "no connection": "ConnectError"}.get(why)
    assert (happened or str(REFUSALS[why][0])) in error["message"]


def test_the_command_that_the_message_names_uploads(pushed):
    files, _, _ = pushed
    assert files["user/again"].keys() == files["user/model"].keys()
    assert files["user/again"]["model.safetensors"] == files["user/model"]["model.safetensors"]


# ---- without a Hub -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = trainer(
        tmp_path_factory.mktemp("run"),
        model=KnownLoss(),
        data=values(30),
        pruning=UCB(keep_ratio=0.3),
        extra={"per_sample_loss_fn": known_losses},
        num_train_epochs=4,
    )
    run.train()
    return run


def test_kept_by_the_last_choice(run):
    kept = kept_dataset(run, run.train_dataset)
    assert kept["sample_index"][:].tolist() == sorted(run.pruner.plan.indices.tolist())
    assert kept["value"][:].tolist() == [i + 1 for i in kept["sample_index"]]
    assert len(kept) == 9
    assert (
        kept_dataset(run.pruner, run.train_dataset)["sample_index"][:].tolist()
        == kept["sample_index"][:].tolist()
    )


def test_kept_often_enough(run):
    times = run.pruner.table["times_kept"]
    for at_least in (1, 2):
        kept = kept_dataset(run.pruner.table, run.train_dataset, at_least=at_least)
        assert kept["sample_index"][:].tolist() == [i for i in range(30) if times[i] >= at_least]
    with pytest.raises(ValueError, match=rf"at_least=5 .*\b{int(times.max())}\b"):
        kept_dataset(run, run.train_dataset, at_least=5)


def test_kept_asks_for_what_it_needs(run):
    data = run.train_dataset
    with pytest.raises(ValueError, match=r"\b29 samples.*\b30\b"):
        kept_dataset(run, data.select(range(29)))
    with pytest.raises(ValueError, match="SampleTable"):
        kept_dataset(run.pruner.table, data)
    with pytest.raises(ValueError, match="DynamicPruner"):
        kept_dataset(DynamicPruner(RandomPruning(0.5), RunShape(30, num_epochs=1)), data)
    taken = kept_dataset(run, data, at_least=1).select(range(9)).select([*range(9)] * 3 + [0, 1, 2])
    with pytest.raises(ValueError, match="'sample_index'"):
        kept_dataset(run, taken)
    with pytest.raises(TypeError, match="PruningReport"):
        kept_dataset(run.pruning_report, data)
    with pytest.raises(TypeError, match="list"):
        kept_dataset(run, list(range(30)))
    with pytest.raises(ValueError, match="at_least"):
        kept_dataset(run, data, at_least=0)


def load(path, monkeypatch, **settings):
    """Load a file as if it came from the Hub."""
    monkeypatch.setattr("hf_dynprune.hub.hf_hub_download", lambda *args, **kwargs: str(path))
    return load_scores_from_hub("user/table", **settings)


def test_offline_the_scores_are_written_all_the_same(run, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=rf"OfflineModeIsEnabled.*{tmp_path / 'a'}"):
        push_scores_to_hub(run, "user/table", folder=tmp_path / "a")
    table = load(tmp_path / "a" / SCORES_FILE, monkeypatch, dataset=run.train_dataset)
    assert all(
        torch.equal(table[n].nan_to_num(7), run.pruner.table[n].nan_to_num(7))
        for n in table.columns
    )
    with pytest.raises(RuntimeError, match="OfflineModeIsEnabled"):
        push_scores_to_hub(Scores(torch.ones(3), "mine"), "user/table", folder=tmp_path / "b")
    assert Scores.load(tmp_path / "b" / SCORES_FILE).method == "mine"
    with pytest.raises(TypeError, match="list"):
        push_scores_to_hub([1, 2], "user/table", folder=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_offline_a_push_leaves_the_model_its_card_and_its_report(tmp_path):
    run = trainer(tmp_path, data=images(16), pruning=RandomPruning(0.5), num_train_epochs=1)
    run.train()
    with pytest.raises(RuntimeError, match=f"OfflineModeIsEnabled.*{tmp_path}"):
        run.push_to_hub(tags="mine")
    assert {"model.safetensors", "config.json", *CARD} <= set(os.listdir(tmp_path))
    assert "mine" in ModelCard.load(tmp_path / "README.md").data.tags
    with pytest.raises(TypeError, match="ViTForImageClassification"):
        push_timm_to_hub(run, "user/timm")
    run = trainer(tmp_path, data=images(16), pruning=RandomPruning(0.5))
    with pytest.raises(ValueError, match="train"):
        push_timm_to_hub(run, "user/timm")


NOT_NAMES = (
    "..",
    "user/..",
    "",
    ".",
    "/",
    "/etc",
    "user/",
    "user/a/b",
    "../other",
    "~/x",
    "user/name\n",
    "user/..\\x",
    "user/a b",
    "user/na\0me",
    "us\u00e9r/x",
    "user/.env",
    "C:\\x",
    "x" * 97,
    None,
    5,
    Path("user/x"),
    ["user", "x"],
)


@pytest.mark.parametrize("repo_id", NOT_NAMES, ids=repr)
def test_what_is_no_name_of_a_repository(repo_id, run, tmp_path, monkeypatch, reliability):
    reliability("uploads", 5)
    monkeypatch.setattr("hf_dynprune.hub.HfApi", None)  # nothing is asked
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    before = sorted(Path(run.args.output_dir).rglob("*"))
    calls = (
        lambda: push_scores_to_hub(run, repo_id),
        lambda: push_scores_to_hub(run.pruner, repo_id),
        lambda: push_scores_to_hub(Scores(torch.ones(3), "mine"), repo_id),
        lambda: push_timm_to_hub(run, repo_id),
        lambda: load_scores_from_hub(repo_id),
    )
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=re.escape(f"repo_id={repo_id!r}")):
            call()
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder"]
    assert sorted(Path(run.args.output_dir).rglob("*")) == before


class NoHub:
    """In place of HfApi: it notes what would be uploaded."""

    uploads = ()

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **settings):
        return mock.Mock(repo_id=repo_id)

    def upload_folder(self, folder_path, allow_patterns, **settings):
        self.uploads.append((Path(folder_path), allow_patterns))
        return sorted(path.name for path in Path(folder_path).iterdir())


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr("hf_dynprune.hub.HfApi", NoHub)
    monkeypatch.setattr(NoHub, "uploads", [])
    return NoHub


def env_file(folder):
    (folder / ".env").write_text("secret")


def readme(folder):
    (folder / "README.md").write_text("# My project")


def scores_of_the_user(folder):
    Scores(torch.ones(9), "mine").save(folder / SCORES_FILE)


def subfolder(folder):
    (folder / "README.md").mkdir()


def link_to_a_file(folder):
    (folder.parent / "other.md").write_text("<!-- hf_dynprune wrote this card. -->")
    (folder / "README.md").symlink_to(folder.parent / "other.md")


def link_to_a_folder(folder):
    (folder / "data").symlink_to(folder.parent)


def ours_and_another(folder):
    (folder / "README.md").write_text("---\na: 1\n---\n<!-- hf_dynprune wrote this card. -->")
    (folder / "data.csv").write_text("1,2")


def binary_card(folder):
    (folder / "README.md").write_bytes(bytes(range(256)))


FOREIGN = [
    env_file,
    readme,
    scores_of_the_user,
    subfolder,
    link_to_a_file,
    link_to_a_folder,
    ours_and_another,
    binary_card,
]


@pytest.mark.parametrize("put", FOREIGN, ids=lambda put: put.__name__)
def test_a_folder_with_files_of_others_is_refused(put, run, tmp_path, no_hub, reliability):
    reliability("uploads", 2)
    folder = tmp_path / "folder"
    folder.mkdir()
    put(folder)

    def content():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = content()
    for source in (run, Scores(torch.ones(3), "mine")):
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            push_scores_to_hub(source, "user/table", folder=folder)
    assert content() == before
    assert no_hub.uploads == []


def test_a_folder_of_an_earlier_upload_is_used_again(run, tmp_path, no_hub):
    for _ in range(2):
        names = push_scores_to_hub(run, "user/table", folder=tmp_path / "new" / "folder")
        assert names == ["README.md", "report.json", SCORES_FILE]
        # Somebody added what the report does not hold.
        card = tmp_path / "new" / "folder" / "README.md"
        card.write_text(card.read_text() + "\nMore about the data.\n")
    for _, names in no_hub.uploads:
        assert set(names) == {"README.md", "report.json", SCORES_FILE}


def test_a_file_in_place_of_the_folder(run, tmp_path, no_hub):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        push_scores_to_hub(run, "user/table", folder=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_a_temporary_folder_is_kept_only_if_the_upload_fails(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="OfflineModeIsEnabled") as caught:
        push_scores_to_hub(run.pruner, "user/table")
    (made,) = tmp_path.iterdir()
    assert f" {made}. " in str(caught.value)
    assert load(made / SCORES_FILE, monkeypatch)["times_kept"].sum() > 0
    # The command that the message names uploads these files only.
    command = shlex.split(str(caught.value).split("`")[-2])
    only = [command[i + 1] for i, word in enumerate(command) if word == "--include"]
    assert set(only) == {"README.md", "report.json", SCORES_FILE}
    monkeypatch.setattr("hf_dynprune.hub.save_parquet", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        push_scores_to_hub(run.pruner, "user/table")
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_texts_of_others_in_the_card_of_scores(text, tmp_path, no_hub, reliability):
    pytest.importorskip("markdown_it")
    reliability("foreign texts")

    def card(text):
        made = {"passes": 3, "runs": text, "seeds": [text, 1], "model": text, "epochs": {"a": text}}
        scores = Scores(torch.ones(3), text or "m", text, made)
        push_scores_to_hub(scores, "user/table", folder=tmp_path)
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    # In a cell of a table what has a `|` does not stand as code.
    plain, hostile = card("pl|ain" if "|" in text else "plain"), card(text)
    assert shape(hostile) == shape(plain)
    assert not RAW.search(hostile)
    data = DatasetCard(hostile).data
    assert data["hf_dynprune"]["method"] == (printable(text) or "m")
    assert programs(hostile) == programs(plain)


def test_names_of_columns_in_the_card_of_a_table(tmp_path, no_hub):
    pytest.importorskip("markdown_it")

    def card(name):
        # Also what is remembered beside the policy's memory is in the table.
        pruner = DynamicPruner(UCB(0.5), RunShape(9, num_epochs=1), memory=Last(name))
        push_scores_to_hub(pruner, "user/table", folder=tmp_path)
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    for name in ("a|b", "`x`", "a\\|", "<b>", "$x$"):
        assert shape(card(name)) in (shape(card("plain")), shape(card("pl|ain")))


def test_a_table_that_is_not_whole_is_refused(run, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / SCORES_FILE
    save_parquet(path, run.pruner.table.state_dict(), {"fingerprint": "x"})
    whole = pq.read_table(path)
    at = whole.column_names.index("times_kept")
    nines = pa.array([9] * 30, pa.int32())
    other = whole.set_column(at, whole.schema.field("times_kept"), nines)
    damaged = [
        other.replace_schema_metadata(whole.schema.metadata),
        whole.slice(0, 29),
        whole.take([0] * 30),
        whole.replace_schema_metadata(None),
    ]
    # The order of the rows does not matter.
    pq.write_table(whole.take(list(reversed(range(30)))), path)
    table = load(path, monkeypatch)
    assert torch.equal(table["times_kept"], run.pruner.table["times_kept"])
    for content in damaged:
        pq.write_table(content, path)
        with pytest.raises(ValueError, match=str(path)):
            load(path, monkeypatch)
    path.write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=str(path)):
        load(path, monkeypatch)


def test_scores_of_another_dataset_are_refused(run, tmp_path, monkeypatch):
    path, data = tmp_path / SCORES_FILE, run.train_dataset
    about = {"fingerprint": run.pruner.fingerprint}
    save_parquet(path, run.pruner.table.state_dict(), about)
    assert len(load(path, monkeypatch, dataset=data)) == 30
    for other in (values(31), list(range(30)), data.map(lambda row: {"value": row["value"] + 1})):
        with pytest.raises(ValueError, match=f"user/table.*{run.pruner.fingerprint}"):
            load(path, monkeypatch, dataset=other)


if __name__ == "__main__":
    program(Path(sys.argv[1]))
