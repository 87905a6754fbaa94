"""The recipes as a user runs them: as programs. Later runs of a recipe are in this process."""

import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import programs
import pytest
import torch
import yaml
from PIL import Image
from programs import python
from transformers import AutoModelForImageClassification, EvalPrediction, pipeline

from hf_dynprune import SampleTable, Scores
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache  # also for `pipeline`
from recipes.metrics import accuracy_and_balance, accuracy_of

ROOT = Path(__file__).parents[1]


def run(*command, cwd=ROOT):
    """Run Python with this folder's package. An assertion error contains the output."""
    done = python(*command, environment={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart(tmp_path):
    for module in ("timm", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    table = run(
        ROOT / "recipes/quickstart.py", "--output_dir", tmp_path, "--epochs", 2, "--keep_ratio", 0.4
    )
    for name in ("full run", "short run", "pruned run"):
        assert re.search(rf"^{name} .*%$", table, flags=re.MULTILINE)

    reports = {
        name: json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("report", "full", "short")
    }
    assert reports["report"]["policy"]["name"] == "loss-proportional"
    assert reports["report"]["cost_ratio"] == pytest.approx(0.4, abs=0.01)
    assert reports["full"]["cost_ratio"] == 1
    assert reports["short"]["passes"] == pytest.approx(reports["report"]["passes"], rel=0.05)
    assert all(
        epoch["metrics"]["eval_accuracy"] >= 0
        for report in reports.values()
        for epoch in report["epochs"]
    )
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n")

    card = (tmp_path / "README.md").read_text()
    assert "`keep_ratio=0.4`" in card
    assert "python recipes/quickstart.py --output_dir" in card
    assert "| short run" in card
    # The card's code loads the model.
    snippet = r"```python\n((?:#.*\n)?import hf_dynprune.vision.*?)```"
    load = re.search(snippet, card, flags=re.DOTALL)[1]
    assert "AutoModelForImageClassification" in load
    use = "import torch; print(model(torch.zeros(1, 1, 8, 8)).logits.shape)"
    assert run("-c", load + use, cwd=tmp_path) == "torch.Size([1, 10])\n"


# ---- recipes/cifar.py ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_cifar(tmp_path_factory):
    """A dataset like CIFAR-10 or CIFAR-100 as parquet files: 96 and 40 random images."""

    def make(folder, columns):
        for split, n in (("train", 96), ("test", 40)):
            generator = np.random.default_rng(n)
            images = [
                Image.fromarray(a)
                for a in generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            ]
            features = {"img": datasets.Image()} | {
                name: datasets.ClassLabel(names=[f"{name} {i}" for i in range(size)])
                for name, size in columns.items()
            }
            labels = {
                name: generator.integers(0, size, n).tolist() for name, size in columns.items()
            }
            data = datasets.Dataset.from_dict(
                {"img": images, **labels}, features=datasets.Features(features)
            )
            data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        return folder

    return {
        "cifar10": make(tmp_path_factory.mktemp("cifar10"), {"label": 10}),
        "cifar100": make(
            tmp_path_factory.mktemp("cifar100"), {"fine_label": 20, "coarse_label": 4}
        ),
    }


def test_a_dataset_without_an_evaluation_split_is_refused(small_cifar, recipe, tmp_path, capsys):
    train = "train-00000-of-00001.parquet"
    (tmp_path / train).write_bytes((small_cifar["cifar10"] / train).read_bytes())
    with pytest.raises(SystemExit, match="2"):
        recipe("cifar", "--dataset", tmp_path, "--output_dir", tmp_path / "run")
    assert "--eval_split" in capsys.readouterr().err


LITTLE = ["--model", "resnet8_cifar", "--num_train_epochs", "2"]
LITTLE += ["--per_device_train_batch_size", "16"]


def test_cifar(small_cifar, tmp_path):
    data = ["--dataset", str(small_cifar["cifar10"])]
    pruning = ["--pruning", "ucb", "--keep_ratio", "0.5", "--eval_every", "0.5"]
    out = run("recipes/cifar.py", *data, *LITTLE, *pruning, "--output_dir", str(tmp_path))
    assert "cost 0.5000" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["policy"]["name"] == "ucb"
    assert report["cost_ratio"] == pytest.approx(0.5)
    assert 0 <= report["metrics"]["eval_accuracy"] <= report["metrics"]["eval_top5_accuracy"] <= 1
    evaluated = [bool(epoch["metrics"]) for epoch in report["epochs"]]
    assert evaluated == [True, True]  # after steps 3 and 6
    assert "ucb" in (tmp_path / "README.md").read_text()
    classify = pipeline("image-classification", model=str(tmp_path))
    image = datasets.load_dataset(str(small_cifar["cifar10"]), split="test")[0]["img"]
    assert classify(image)[0]["label"].startswith("label ")


def test_cifar_100_under_accelerate_launch_and_from_yaml(small_cifar, tmp_path):
    settings = {
        "dataset": str(small_cifar["cifar100"]),
        "model": "resnet8_cifar",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "pruning": "random",
        "keep_ratio": 0.5,
        "pruning_kwargs": {"replacement": False},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    run(*launcher, "recipes/cifar.py", str(tmp_path / "run.yaml"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["policy"]["replacement"] is False
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["label_names"]) == 20


def test_cifar_with_other_labels(small_cifar, tmp_path, recipe):
    """Training and held-out images have the other labels; the test set keeps its labels."""
    cifar = recipe("cifar")
    noisy = np.random.default_rng(1).integers(0, 10, 96)
    datasets.Dataset.from_dict({"worse": noisy, "few": [11] * 96}).to_parquet(
        tmp_path / "train-00000-of-00001.parquet"
    )
    data = {"dataset": str(small_cifar["cifar10"])}
    labels = {"train_labels": str(tmp_path), "train_label_column": "worse"}
    own = cifar.load_images(cifar.DataArguments(**data), 0)
    images = cifar.load_images(cifar.DataArguments(**data, **labels), 0)
    assert images.train.labels.tolist() == images.plain.labels.tolist() == noisy.tolist()
    assert images.test.labels.tolist() == own.test.labels.tolist()
    assert own.relabelled is None
    assert images.relabelled.tolist() == (own.train.labels != torch.from_numpy(noisy)).tolist()

    tuning = cifar.load_images(cifar.DataArguments(**data, **labels, validation_share=0.25), 0)
    assert (len(tuning.train), len(tuning.test)) == (72, 24)
    names = [image.numpy().tobytes() for image in own.train.images]
    label_of = dict(zip(names, noisy, strict=True))
    for part in (tuning.train, tuning.test):
        found = [label_of[image.numpy().tobytes()] for image in part.images]
        assert part.labels.tolist() == found

    part = cifar.load_images(cifar.DataArguments(**data, **labels, clean_share=0.25), 0)
    assert int(part.clean.sum()) == 24
    expected = torch.from_numpy(noisy).where(~part.clean, own.train.labels)
    assert part.train.labels.tolist() == part.plain.labels.tolist() == expected.tolist()
    assert not (part.relabelled & part.clean).any()
    holdout = part.holdout()
    assert torch.equal(holdout.images, own.train.images[part.clean])
    assert torch.equal(holdout.labels, own.train.labels[part.clean])
    assert (holdout.augment, holdout.shift, holdout.seed) == (True, 4, 0)
    alone = cifar.DataArguments(**data, **labels, clean_share=0.25, clean_only=True)
    alone = cifar.load_images(alone, 0)
    assert torch.equal(alone.train.images, holdout.images)
    assert torch.equal(alone.train.labels, holdout.labels)
    with pytest.raises(ValueError, match="clean_only=True"):
        cifar.DataArguments(**data, **labels, clean_only=True)
    # The two draws are independent: about a quarter of the images of a part are clean, too.
    few = cifar.DataArguments(**data, **labels, clean_share=0.25, max_train_samples=24)
    assert 0 < int(cifar.load_images(few, 0).clean.sum()) < 16
    for value, more in ((1.0, labels), (0.1, {})):
        with pytest.raises(ValueError, match=f"clean_share={value}"):
            cifar.DataArguments(**data, **more, clean_share=value)

    wrong = cifar.DataArguments(**data, train_labels=str(tmp_path), train_label_column="few")
    with pytest.raises(ValueError, match=r"96 labels from 11 to 11 .*'few'"):
        cifar.load_images(wrong, 0)
    unknown = cifar.DataArguments(**data, train_labels=str(tmp_path), train_label_column="wors")
    with pytest.raises(ValueError, match=r"'wors'.*train_label_column="):
        cifar.load_images(unknown, 0)


def test_cifar_at_a_smaller_size(small_cifar, recipe):
    cifar = recipe("cifar")
    data = {"dataset": str(small_cifar["cifar10"])}
    own, small = (
        cifar.load_images(cifar.DataArguments(**data, image_size=size), 0) for size in (None, 16)
    )
    assert own.train.images.shape == (96, 3, 32, 32)
    for images in (small.train, small.plain, small.test):
        assert images.images.shape[1:] == (3, 16, 16)
    assert (own.train.shift, small.train.shift) == (4, 2)  # an eighth of a side
    means = own.train.images.float().mean((2, 3)), small.train.images.float().mean((2, 3))
    assert torch.allclose(*means, atol=2)  # the same images in the same order


def test_cifar_reports_the_share_of_relabelled_samples(small_cifar, tmp_path, recipe):
    own = datasets.load_dataset(str(small_cifar["cifar10"]), split="train")["label"][:]
    noisy = [(label + (i < 24)) % 10 for i, label in enumerate(own)]  # a quarter of 96
    datasets.Dataset.from_dict({"worse": noisy}).to_parquet(
        tmp_path / "labels/train-00000-of-00001.parquet"
    )
    options = ["--dataset", small_cifar["cifar10"], *LITTLE, "--bf16", "False"]
    options += ["--train_labels", tmp_path / "labels", "--train_label_column", "worse"]
    options += ["--pruning", "epsilon-greedy", "--keep_ratio", "0.5"]
    recipe("cifar", *options, "--output_dir", tmp_path / "run")
    kept = SampleTable.load(tmp_path / "run" / "table.safetensors")["times_kept"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = report["metrics"]["train_relabelled_share"]
    assert found == pytest.approx(int(kept[:24].sum()) / int(kept.sum()))


@pytest.mark.parametrize(
    ("sizes", "ratio", "expected"),
    [
        ([5000] * 10, 100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        ([5000] * 10, 10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
        ([80, 80, 80], 4, [80, 40, 20]),
        ([80, 30, 90], 9, [80, 30, 10]),  # none gets more than it has
        ([3, 3, 3], 100, [3, 1, 1]),
        ([7], 10, [7]),
    ],
)
def test_the_profile_of_a_long_tail(recipe, sizes, ratio, expected):
    assert recipe("cifar").long_tail(torch.tensor(sizes), ratio).tolist() == expected


def test_cifar_from_trained_weights(small_cifar, recipe, tmp_path):
    cifar = recipe("cifar")
    images = cifar.load_images(cifar.DataArguments(dataset=str(small_cifar["cifar10"])), 0)
    statistics = {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    trained = cifar.create_timm_model("resnet8_cifar", num_labels=3, **statistics)
    trained.save_pretrained(tmp_path)
    settings = {"model": "resnet8_cifar", "pretrained": str(tmp_path)}
    model = cifar.make_model(cifar.RecipeArguments(**settings), images)
    weights, expected = model.state_dict(), trained.state_dict()
    own = {name for name, value in weights.items() if not torch.equal(value, expected[name])}
    assert own == {"timm_model.fc.weight", "timm_model.fc.bias"}
    assert model.config.id2label[9] == "label 9"
    wrong = cifar.RecipeArguments(**{**settings, "model": "resnet20_cifar"})
    with pytest.raises(ValueError, match=r"resnet8_cifar.*resnet20_cifar"):
        cifar.make_model(wrong, images)


def test_cifar_on_a_part_of_the_images(small_cifar, recipe):
    cifar = recipe("cifar")
    data = {"dataset": str(small_cifar["cifar10"])}
    whole = cifar.load_images(cifar.DataArguments(**data), 0)
    number = {image.numpy().tobytes(): i for i, image in enumerate(whole.train.images)}

    def rows(**settings):
        images = cifar.load_images(cifar.DataArguments(**data, **settings), 0)
        found = [number[image.numpy().tobytes()] for image in images.train.images]
        assert images.train.labels.tolist() == whole.train.labels[found].tolist()
        assert torch.equal(images.plain.images, images.train.images)
        assert torch.equal(images.test.images, whole.test.images)
        same = images.train.pruning_fingerprint == whole.train.pruning_fingerprint
        assert same == (found == list(range(96)))
        return found

    assert rows() == list(range(96))
    tail = rows(imbalance=5)
    sizes = torch.bincount(whole.train.labels, minlength=10)
    expected = cifar.long_tail(sizes, 5)
    assert torch.equal(torch.bincount(whole.train.labels[tail], minlength=10), expected)
    assert tail == sorted(set(tail)) == rows(imbalance=5) != rows(imbalance=5, subset_seed=1)
    few = rows(imbalance=5, max_train_samples=20)
    assert len(few) == 20
    assert set(few) < set(tail)
    assert rows(imbalance=5, max_train_samples=20, copies=3) == [i for i in few for _ in range(3)]
    with pytest.raises(ValueError, match=r"max_train_samples=97 .* 96"):
        rows(max_train_samples=97)
    for name, value in (("imbalance", 0.5), ("max_train_samples", 0), ("copies", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            cifar.DataArguments(**{name: value})


def test_cifar_without_augmentation(small_cifar, recipe):
    cifar = recipe("cifar")
    index = list(range(96))
    for augment in (True, False):
        data = cifar.DataArguments(dataset=str(small_cifar["cifar10"]), augment=augment)
        images = cifar.load_images(data, 0)
        shown, plain = (
            each.__getitems__(index)["pixel_values"] for each in (images.train, images.plain)
        )
        assert torch.equal(shown, plain) is not augment


def test_balanced_images(small_cifar, recipe):
    cifar = recipe("cifar")
    data = {"dataset": str(small_cifar["cifar10"]), "imbalance": 20}
    tail, images = (
        cifar.load_images(cifar.DataArguments(**data, balanced=balanced), 3)
        for balanced in (False, True)
    )
    n, classes = len(tail.train), len(tail.train.labels.unique())
    assert len(images.train) == n
    assert images.train.pruning_fingerprint != tail.train.pruning_fingerprint
    shown = []
    for epoch in (0, 1, 0):
        images.train.set_epoch(epoch)
        drawn = images.train.images_of(np.arange(n))
        batch = images.train.__getitems__(list(range(n)))
        assert batch["labels"].tolist() == tail.train.labels[drawn].tolist()
        counts = torch.bincount(batch["labels"])
        assert set(counts[counts > 0].tolist()) <= {n // classes, n // classes + 1}
        for c in tail.train.labels.unique():  # all before any again
            times = np.bincount(drawn, minlength=n)[tail.train.labels.numpy() == int(c)]
            assert times.max() - times.min() <= 1
        shown.append((drawn.tolist(), batch["pixel_values"]))
    assert shown[0][0] == shown[2][0] != shown[1][0]
    assert torch.equal(shown[0][1], shown[2][1])
    # Samples that show the same image are augmented differently: of some the pixels differ.
    by_image = {}
    for image, pixels in zip(*shown[0], strict=True):
        by_image.setdefault(image, set()).add(pixels.numpy().tobytes())
    repeated = [pixels for i, pixels in by_image.items() if shown[0][0].count(i) > 2]
    assert repeated
    assert all(len(pixels) > 1 for pixels in repeated)


def test_cifar_on_a_long_tail(small_cifar, tmp_path, recipe, capsys):
    options = ["--dataset", small_cifar["cifar10"], *LITTLE, "--bf16", "False", "--imbalance", 3]
    cifar = recipe("cifar")
    with pytest.raises(SystemExit):
        recipe("cifar", *options, "--balanced", True, "--pruning", "ucb", "--output_dir", tmp_path)
    assert "UCB(keep_ratio=0.5)" in capsys.readouterr().err
    reports = {}
    rules = {
        "budget": ["--pruning", "class-budget", "--keep_ratio", 0.5],
        "balanced": ["--pruning", "full", "--balanced", True],
    }
    for name, rule in rules.items():
        recipe("cifar", *options, *rule, "--output_dir", tmp_path / name)
        reports[name] = json.loads((tmp_path / name / "report.json").read_text())
        assert 0 <= reports[name]["metrics"]["eval_balanced_accuracy"] <= 1
    tail = cifar.load_images(
        cifar.DataArguments(dataset=str(small_cifar["cifar10"]), imbalance=3), 0
    )
    assert {report["num_samples"] for report in reports.values()} == {len(tail.train)}
    found = [report["provenance"]["dataset"]["fingerprint"] for report in reports.values()]
    own = tail.train.pruning_fingerprint
    assert found == [own, f"{own}, balanced"]


def test_the_balanced_accuracy():
    best = np.array([[3, 1], [0, 1], [0, 3], [0, 2], [2, 0]])
    labels = np.array([3, 0, 0, 3, 0])  # of 0: 2 of 3 right; of 3: 1 of 2; 2 is not present
    found = accuracy_and_balance(1)(EvalPrediction(predictions=best, label_ids=labels))
    assert found == {"accuracy": 0.6, "balanced_accuracy": pytest.approx((2 / 3 + 1 / 2) / 2)}


def test_cifar_resumes(small_cifar, tmp_path, recipe):
    options = ["--dataset", small_cifar["cifar10"], *LITTLE, "--bf16", "False"]
    options += ["--pruning", "epsilon-greedy", "--keep_ratio", "0.5"]
    options += ["--save_strategy", "steps", "--save_steps", "1"]
    recipe("cifar", *options, "--output_dir", tmp_path / "a")
    resume = ["--resume_from_checkpoint", tmp_path / "a" / "checkpoint-4"]
    resume += ["--dataloader_num_workers", "2", "--output_dir", tmp_path / "b"]
    run("recipes/cifar.py", *options, *resume)
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_two_ranks_of_cifar_evaluate_what_is_saved(small_cifar, tmp_path):
    """In the middle of an epoch, and at its end. None of the 40 images is counted twice."""
    options = ["--dataset", small_cifar["cifar10"], *LITTLE, "--bf16", "False"]
    options += ["--pruning", "random", "--keep_ratio", "0.9", "--max_steps", "3"]
    options += ["--per_device_eval_batch_size", "20", "--eval_strategy", "steps"]
    options += ["--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
    done = programs.torchrun(ROOT / "recipes/cifar.py", *options, "--output_dir", tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["environment"]["ranks"] == 2
    split = datasets.load_dataset(str(small_cifar["cifar10"]), split="test")
    images = ImageCache.from_dataset(split, mean=CIFAR_MEAN, std=CIFAR_STD)
    log = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    for step in (2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            loss = model(**images.__getitems__(list(range(40)))).loss.item()
        assert logged[step] == pytest.approx(loss, rel=1e-5)


LEAVING = """
import time

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # if imported later, it would hold the group
from torch.nn.parallel import DistributedDataParallel

from recipes.common import leave_together


def main():
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    tensor = torch.ones(3)
    if dist.get_rank() == 0:  # a thread of gloo drops the tensor last, and needs the GIL for it
        work = dist.all_reduce(tensor, async_op=True)
        del tensor, work
    else:
        time.sleep(1)
        dist.all_reduce(tensor)
    leave_together()  # with dist.destroy_process_group() here, rank 0 would never end


main()
"""


def test_ranks_leave_together_while_gloo_still_holds_a_tensor(tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    done = programs.torchrun(tmp_path / "leaving.py", ranks=2)  # without it, it would hang
    assert done.returncode == 0, done.stdout + done.stderr


def test_cifar_scores_and_prunes_statically(small_cifar, tmp_path, recipe):
    data = ["--dataset", small_cifar["cifar10"], *LITTLE]
    score = ["--score", "el2n", "--score_runs", "1", "--score_epochs", "1"]
    out = run("recipes/cifar.py", *data, *score, "--output_dir", tmp_path / "el2n")
    assert "el2n: 128 passes" in out  # 96 samples trained, and 96 forward
    static = json.dumps({"scores": str(tmp_path / "el2n" / "scores.safetensors")})
    pruning = ["--pruning", "static", "--keep_ratio", "0.5", "--pruning_kwargs", static]
    recipe("cifar", *data, *pruning, "--output_dir", tmp_path / "static")
    report = json.loads((tmp_path / "static" / "report.json").read_text())
    assert report["passes"] == 2 * 48 + 128
    assert report["preparation"]["method"] == "el2n"


def test_cifar_by_reference_losses(small_cifar, tmp_path, recipe):
    noisy = np.random.default_rng(1).integers(0, 10, 96)
    labels = tmp_path / "labels"
    datasets.Dataset.from_dict({"label": noisy}).to_parquet(labels / "train.parquet")
    options = ["--dataset", small_cifar["cifar10"], *LITTLE, "--bf16", False]
    options += ["--train_labels", labels, "--clean_share", 0.25]
    score = ["--score", "reference", "--score_epochs", 1, "--output_dir", tmp_path / "reference"]
    recipe("cifar", *options, *score)
    scores = Scores.load(tmp_path / "reference" / "scores.safetensors")
    assert scores.provenance["passes"] == pytest.approx(24 + 96 / 3)
    rule = json.dumps({"scores": scores.path})
    pruning = ["--pruning", "reference-loss", "--keep_ratio", 0.5, "--pruning_kwargs", rule]
    recipe("cifar", *options, *pruning, "--output_dir", tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["passes"] == pytest.approx(2 * 48 + 24 + 32)
    assert 0 < report["metrics"]["train_relabelled_share"] < 1


@pytest.mark.parametrize(
    ("capability", "expected"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)]
)
def test_bf16_is_the_default_if_the_cpu_computes_in_it(capability, expected, recipe, monkeypatch):
    common = recipe("common")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert common.computes_in_bf16() is expected


def test_bf16_is_off_if_a_gpu_emulates_it(recipe, monkeypatch):
    common = recipe("common")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert not common.computes_in_bf16()


def test_the_accuracy_metric():
    best = np.array([[3, 1, 0], [2, 0, 1], [1, 2, 3], [0, 1, 2]])
    prediction = EvalPrediction(predictions=best, label_ids=np.array([3, 0, 0, 2]))
    assert accuracy_of(1, 2, 3)(prediction) == {
        "accuracy": 0.25,
        "top2_accuracy": 0.5,
        "top3_accuracy": 0.75,
    }
