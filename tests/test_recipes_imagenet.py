"""recipes/imagenet.py as a user runs it, on tiny images: augmentation, resume and ranks, too."""

import json
import random
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import programs
import pytest
import torch
import yaml
from PIL import Image
from programs import torchrun
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/imagenet.py"
CLASSES = ["cat", "dog", "eel"]
LITTLE = ["--model", "test_resnet", "--image_size", "32", "--per_device_train_batch_size", "8"]
LITTLE += ["--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of images by class, and one of parquet files.

    Each has 36 and 12 random images of different sizes; some are grey.
    """
    generator = np.random.default_rng(0)

    def picture():
        height, width = generator.integers(24, 60, 2)
        shape = (height, width) if generator.random() < 0.3 else (height, width, 3)
        return Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))

    folder, parquet = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("parquet")
    for split, other, n in (("train", "train", 36), ("val", "validation", 12)):
        pictures, labels = [picture() for _ in range(n)], [i % 3 for i in range(n)]
        for i, (image, label) in enumerate(zip(pictures, labels, strict=True)):
            place = folder / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i}.jpg")
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
        )
        rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        rows.to_parquet(parquet / f"{other}-00000-of-00001.parquet")
    return {"folder": folder, "parquet": parquet}


@pytest.fixture
def imagenet(recipe):
    return recipe("imagenet")


def python(*command):
    done = programs.python(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def losses_of(folder, images):
    """The mean loss of the saved model on a split, with the saved image processor."""
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = processor([image.convert("RGB") for image in images["image"]])["pixel_values"]
    with torch.no_grad():
        return model(pixel_values=pixels, labels=torch.tensor(images["label"][:])).loss.item()


# ---- as a program --------------------------------------------------------------------------------


def test_python_folder_average_and_exact_resume(data, tmp_path, recipe):
    settings = [*LITTLE, "--dataset", data["folder"], "--num_train_epochs", "2", "--bf16", "False"]
    settings += ["--pruning", "ucb", "--keep_ratio", "0.5", "--label_smoothing_factor", "0"]
    settings += ["--auto_augment", "rand-m7-mstd0.5", "--random_erasing", "0.5"]
    settings += ["--ema_decay", "0.9"]
    settings += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "10"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    out = python(RECIPE, *settings, "--dataloader_num_workers", "2", "--output_dir", whole)
    assert "cost 0.5000" in out

    # Both results in the report are those of saved models: the last weights and their average.
    report = report_of(whole)
    images = datasets.load_dataset(str(data["folder"]), split="validation")
    assert report["metrics"]["eval_loss"] == pytest.approx(losses_of(whole, images), rel=1e-3)
    assert report["metrics"]["eval_ema_loss"] == pytest.approx(
        losses_of(whole / "ema", images), rel=1e-3
    )
    assert report["metrics"]["eval_ema_loss"] != report["metrics"]["eval_loss"]
    for name in (
        "eval_accuracy",
        "eval_top5_accuracy",
        "eval_ema_accuracy",
        "eval_ema_top5_accuracy",
    ):
        assert 0 <= report["metrics"][name] <= 1
    for folder in (whole, whole / "ema"):
        classify = pipeline("image-classification", model=str(folder))
        assert {found["label"] for found in classify(images[0]["image"])} == set(CLASSES)

    # From the middle of the second of two epochs, with a different number of workers.
    resume = ["--resume_from_checkpoint", whole / "checkpoint-4", "--dataloader_num_workers", "1"]
    recipe("imagenet", *settings, *resume, "--output_dir", part)
    for name in ("model.safetensors", "ema/model.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes(), name


def test_accelerate_launch_parquet_and_yaml(data, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    config = ROOT / "recipes/configs/imagenet_pruned.yaml"
    settings = [*LITTLE, "--dataset", data["parquet"], "--max_steps", "2", "--output_dir", tmp_path]
    python(*launch, RECIPE, config, *settings)
    report = report_of(tmp_path)
    assert report["policy"]["name"] == "ucb"
    assert report["policy"]["keep_ratio"] == 0.3
    assert report["totals"]["optimizer_steps"] == 2
    assert report["environment"]["ranks"] == 1
    log = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    top5 = [entry["eval_top5_accuracy"] for entry in log if "eval_top5_accuracy" in entry]
    assert max(top5) == 1  # there are three classes
    classify = pipeline("image-classification", model=str(tmp_path))
    assert classify(Image.new("L", (50, 40)))[0]["label"] in CLASSES


def test_two_ranks_evaluate_what_is_saved(data, tmp_path):
    settings = [*LITTLE, "--dataset", data["parquet"], "--max_steps", "2", "--bf16", "False"]
    settings += ["--pruning", "random", "--keep_ratio", "0.9", "--ema_decay", "0.5"]
    # Two ranks evaluate 12 images without padding, so the Trainer counts no image twice.
    settings += ["--label_smoothing_factor", "0", "--per_device_eval_batch_size", "6"]
    done = torchrun(RECIPE, *settings, "--output_dir", tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(tmp_path)
    assert report["environment"]["ranks"] == 2
    assert report["totals"]["optimizer_steps"] == 2
    images = datasets.load_dataset(str(data["parquet"]), split="validation")
    assert report["metrics"]["eval_loss"] == pytest.approx(losses_of(tmp_path, images), rel=1e-5)
    assert report["metrics"]["eval_ema_loss"] == pytest.approx(
        losses_of(tmp_path / "ema", images), rel=1e-5
    )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--dataset", "path/to/nothing"], "'path/to/nothing'"),
        (["--label_column", "lable"], "did you mean 'label'"),
        (["{tmp}/unknown.yaml"], "'keep_ration': did you mean 'keep_ratio'"),
        (["--output_dir", "{tmp}/done"], "/done contains a run (report.json)"),
        (["--model", "resnet51"], "'resnet51'"),
        (["--auto_augment", "rand-q7"], "auto_augment='rand-q7'"),
        (["--auto_augment", "rand-m7", "--color_jitter", "0.4"], "color_jitter=0.4"),
        (["--ema_decay", "1.5"], "ema_decay=1.5"),
        (["--min_crop", "0"], "min_crop=0.0"),
        (["--crop_pct", "87.5"], "crop_pct=87.5"),
        (["--dataset", "{tmp}/secret"], "[-1]"),
        (["--dataset", "{tmp}/lonely"], "--eval_split"),
    ],
)
def test_mistakes_end_with_a_message(mistake, message, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "unknown.yaml").write_text("keep_ration: 0.3\n")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "report.json").write_text("{}")
    for name in ("secret", "lonely"):
        rows = datasets.load_dataset(str(data["parquet"]), split="train")
        (tmp_path / name).mkdir()
        rows.to_parquet(tmp_path / name / "train.parquet")
    secret = rows.select(range(6)).map(lambda row: {"label": -1})
    secret.to_parquet(tmp_path / "secret" / "test.parquet")
    mistake = [part.replace("{tmp}", str(tmp_path)) for part in mistake]
    positional, options = (mistake, []) if mistake[0].endswith(".yaml") else ([], mistake)
    usual = ["--dataset", str(data["parquet"]), "--output_dir", str(tmp_path / "out"), *LITTLE]
    monkeypatch.syspath_prepend(RECIPE.parent)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *positional, *usual, *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["imagenet", "cifar"])
def test_the_two_configurations_differ_only_in_pruning(recipe, monkeypatch):
    full, pruned = (
        yaml.safe_load((ROOT / f"recipes/configs/{recipe}_{name}.yaml").read_text())
        for name in ("full", "pruned")
    )
    assert full["pruning"] == "full"
    different = {name for name in full | pruned if full.get(name) != pruned.get(name)}
    assert different == {"pruning", "keep_ratio", "output_dir"}
    # They set fields of the recipe, with values of the right type.
    monkeypatch.syspath_prepend(RECIPE.parent)
    module = __import__(recipe)
    arguments = {"imagenet": "ImageNetTrainingArguments", "cifar": "CifarTrainingArguments"}[recipe]
    groups = (
        module.DataArguments,
        module.RecipeArguments,
        module.PruningArguments,
        getattr(module, arguments),
    )
    for name, settings in (("full", full), ("pruned", pruned)):
        monkeypatch.setattr(
            sys, "argv", ["recipe", str(ROOT / f"recipes/configs/{recipe}_{name}.yaml")]
        )
        parsed = module.common.parse("A recipe.", *groups)
        for field, value in settings.items():
            found = next(getattr(group, field) for group in parsed if hasattr(group, field))
            assert getattr(found, "value", found) == value, field  # an enum's


def test_learning_rate_follows_the_global_batch(data, tmp_path, monkeypatch, imagenet):
    seen = []

    def stop(trainer, **words):
        seen.append(trainer.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(imagenet.common, "train", stop)
    usual = [*LITTLE, "--dataset", str(data["parquet"]), "--output_dir", str(tmp_path)]
    usual += ["--gradient_accumulation_steps", "4"]
    for option in ([], ["--base_learning_rate", "0.4"], ["--learning_rate", "0.7"]):
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *usual, *option])
        imagenet.main()
    assert seen == pytest.approx([0.1 * 32 / 256, 0.4 * 32 / 256, 0.7])


# ---- augmentation --------------------------------------------------------------------------------


def images_of(imagenet, data, **settings):
    recipe = imagenet.RecipeArguments(
        image_size=32, auto_augment="rand-m7-mstd0.5", random_erasing=0.5
    )
    config = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic"}
    augmented, _ = imagenet.make_transforms(recipe, config)
    split = datasets.load_dataset(str(data["parquet"]), split="train")
    return imagenet.LabelledImages(split, "image", "label", 3, augmented, **{"seed": 0, **settings})


def test_augmentation_is_a_function_of_seed_epoch_and_sample(data, imagenet):
    images = images_of(imagenet, data)
    first = [images[i] for i in range(len(images))]
    assert [sample["labels"] for sample in first] == images.rows["label"][:]
    assert {sample["pixel_values"].shape for sample in first} == {(3, 32, 32)}

    # In another order and with other random states, which are not changed.
    for module in (random, np.random):
        module.seed(7)
    torch.manual_seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for i in reversed(range(len(images))):
        assert torch.equal(images[i]["pixel_values"], first[i]["pixel_values"]), i
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )

    def differing(others):
        return sum(
            not torch.equal(others[i]["pixel_values"], first[i]["pixel_values"])
            for i in range(len(first))
        )

    assert differing(images_of(imagenet, data, seed=1)) == len(first)
    images.set_epoch(1)
    assert differing(images) == len(first)
    images.set_epoch(0)
    assert differing(images) == 0


def test_the_epoch_reaches_running_workers(data, imagenet):
    images = images_of(imagenet, data)
    loader = torch.utils.data.DataLoader(
        images, batch_size=6, num_workers=2, persistent_workers=True
    )
    for epoch in range(3):
        images.set_epoch(epoch)
        loaded = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(
            loaded, torch.stack([images[i]["pixel_values"] for i in range(len(images))])
        ), epoch


def test_a_checkpoint_without_average_is_refused(imagenet):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    without = optimizer.state_dict()
    trainer = type("Trainer", (), {"model": layer, "optimizer": optimizer})
    imagenet.WeightAverage(trainer, 0.9)
    with pytest.raises(ValueError, match="--ema_decay 0"):
        optimizer.load_state_dict(without)
