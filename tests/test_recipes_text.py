"""recipes/text_classification.py and recipes/accelerate_loop.py as a user runs them.

The loop trains what the Trainer trains.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from hub import Hub
from PIL import Image
from programs import python, torchrun
from safetensors.torch import load_file
from tiny import arguments, bert
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import EvalPrediction, PreTrainedTokenizerFast, pipeline, set_seed

from hf_dynprune import UCB, DynamicPruningTrainer
from hf_dynprune.report import PruningReport
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache, batch_collator, create_timm_model
from recipes.metrics import accuracy_and_f1

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]


def child(*command, environment=None):
    """Run Python in a new process. An assertion error contains the output."""
    settings = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    if environment is None:
        done = python("-W", "ignore", *command, environment={**os.environ, **settings})
    else:  # of another hub, which is read when huggingface_hub is imported: not by a fork
        command = [sys.executable, "-W", "ignore", *map(str, command)]
        environment = {**environment, **settings}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def program(monkeypatch):
    """`program(recipe, *arguments)` runs `python recipes/recipe.py` in this process.

    A new process would take ten times as long.
    """

    def run(recipe, *arguments):
        AcceleratorState._reset_state(reset_partial_state=True)  # of earlier runs in this process
        monkeypatch.setattr(sys, "argv", [str(RECIPES / recipe), *map(str, arguments)])
        monkeypatch.syspath_prepend(RECIPES)
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def report_of(folder):
    return PruningReport.load(folder / "report.json")


# ---- recipes/text_classification.py --------------------------------------------------------------

INTENTS = ("lost card", "top up", "exchange rate")


@pytest.fixture(scope="module")
def intents(tmp_path_factory):
    """(folder of a dataset of single texts and pairs, folder of a tiny encoder and tokenizer)"""
    folder = tmp_path_factory.mktemp("intents")
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(20)]
    for split, n in (("train", 24), ("test", 10)):
        labels = generator.integers(0, 3, n).tolist()
        texts = [
            " ".join([INTENTS[label], *generator.choice(words, generator.integers(2, 7))])
            for label in labels
        ]
        rows = {"text": texts, "second": texts[::-1], "label": labels}
        features = {"text": datasets.Value("string"), "second": datasets.Value("string")}
        features["label"] = datasets.ClassLabel(names=[name.replace(" ", "_") for name in INTENTS])
        (folder / "data").mkdir(exist_ok=True)
        data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        data.to_csv(folder / f"{split}.csv")
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    known = ["[PAD]", "[UNK]", *words, *" ".join(INTENTS).split()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    fast.save_pretrained(folder / "model")
    bert(num_labels=2).save_pretrained(folder / "model")  # the recipe makes a head for 3 classes
    return folder / "data", folder / "model"


SMALL_BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
# From scratch, with a new tokenizer; two steps per epoch if half of the data is kept.
SCRATCH = ["--text_column", "text", "--model_config", json.dumps(SMALL_BERT)]
SCRATCH += ["--tokenizer_vocabulary", "300"]
LITTLE = ["--num_train_epochs", "1", "--per_device_train_batch_size", "6"]
LITTLE += ["--report_to", "none", "--disable_tqdm", "True"]


def test_a_text_classifier_from_scratch(intents, tmp_path, program, capsys):
    given = ["--dataset", intents[0], *SCRATCH, *LITTLE, "--pruning", "ucb", "--keep_ratio", "0.5"]
    program("text_classification.py", *given, "--output_dir", tmp_path)
    assert "ucb: accuracy " in capsys.readouterr().out
    report = report_of(tmp_path)
    assert report.totals["optimizer_steps"] == 2
    assert report.cost_ratio == pytest.approx(0.5)
    assert 0 <= report.metrics["eval_accuracy"] <= 1
    assert 0 <= report.metrics["eval_macro_f1"] <= 1
    assert "text-classification" in (tmp_path / "README.md").read_text()
    classify = pipeline("text-classification", model=str(tmp_path))
    (answer,) = classify("where is my lost card")
    assert answer["label"] in ("lost_card", "top_up", "exchange_rate")
    # 256 bytes and frequent pairs.
    assert 260 < classify.model.config.vocab_size == len(classify.tokenizer) <= 300
    assert classify.tokenizer.model_max_length == 128


def test_a_run_with_a_new_tokenizer_resumes(intents, tmp_path, program):
    """Bit for bit: the tokenizer is trained again and has the same vocabulary."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    given = ["--dataset", intents[0], *SCRATCH, *LITTLE]
    given += ["--save_strategy", "steps", "--save_steps", "1"]
    program("text_classification.py", *given, "--output_dir", whole)
    resume = ["--resume_from_checkpoint", whole / "checkpoint-2", "--output_dir", resumed]
    program("text_classification.py", *given, *resume)
    assert report_of(resumed).resumed == [{"epoch": 0, "step": 2}]
    tokenizers = [json.loads((run / "tokenizer.json").read_text()) for run in (whole, resumed)]
    assert tokenizers[0]["model"] == tokenizers[1]["model"]
    weights = [(run / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_pairs_and_a_pretrained_encoder_from_the_hub_under_accelerate_launch(intents, tmp_path):
    data, model = intents
    given = ["--dataset", "me/intents", "--model", "me/encoder", "--text_column", "text"]
    given += ["--text_pair_column", "second", "--max_length", "16", *LITTLE]
    with Hub() as hub:
        tables = sorted(data.parent.glob("*.csv"))
        hub.files["me/intents"] = {path.name: path.read_bytes() for path in tables}
        hub.files["me/encoder"] = {path.name: path.read_bytes() for path in model.iterdir()}
        environment = hub.environment(tmp_path / "home")
        command = [*LAUNCH, "recipes/text_classification.py", *given]
        child(*command, "--output_dir", tmp_path / "out", environment=environment)
    assert report_of(tmp_path / "out").policy["name"] == "full"
    (answer,) = pipeline("text-classification", model=str(tmp_path / "out"))(
        [{"text": "top up", "text_pair": "w1"}]
    )
    assert answer["label"] in ("0", "1", "2")  # a CSV file has no names


def test_a_text_classifier_on_two_ranks(intents, tmp_path):
    given = ["--dataset", intents[0], *SCRATCH, *LITTLE, "--seed", "1", "--output_dir", tmp_path]
    given += ["--pruning", "random", "--keep_ratio", "0.5"]
    done = torchrun(RECIPES / "text_classification.py", *given, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(tmp_path)
    assert report.environment["ranks"] == 2
    assert report.totals["optimizer_steps"] == 1
    assert report.cost_ratio == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--dataset", "/no/such/place"], "/no/such/place"),
        (["--text_column", "txet"], "'txet'"),
        (["--text_pair_column", "secnod"], "did you mean 'second'? Set text_pair_column="),
        (["--label_column", "text"], "'text'"),
        (["--model_config", "{hidden_size: 1}"], "model_config='{hidden_size: 1}'"),
        (["--model_config", '{"hidden_size": 16}'], "model_config={'hidden_size': 16}"),
        (["--model_config", '{"model_type": "brt"}'], "brt"),
        (["--max_length", "600"], "max_length=600"),
        (["--keep_ratio", "2", "--pruning", "ucb"], "keep_ratio=2.0"),
        (["--output_dir", "."], "(report.json)"),
    ],
)
def test_a_mistake_in_text_classification_ends_it(
    changes, message, intents, tmp_path, monkeypatch, program, capsys
):
    (tmp_path / "report.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    given = ["--dataset", str(intents[0]), *SCRATCH, *LITTLE, "--output_dir", "out", *changes]
    ends_with_a_message(program, capsys, message, "text_classification.py", *given)


def ends_with_a_message(program, capsys, message, *arguments):
    with pytest.raises(SystemExit) as ended:
        program(*arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_tokenizer_is_trained_only_for_models_from_scratch(intents, program, capsys):
    given = ["--dataset", intents[0], "--model", intents[1], "--text_column", "text", *LITTLE]
    given += ["--tokenizer_vocabulary", "300"]
    for message in ("tokenizer_vocabulary=300", str(intents[1]), "--from_scratch True"):
        ends_with_a_message(program, capsys, message, "text_classification.py", *given)


def test_an_unknown_field_of_a_configuration_ends_the_program(tmp_path, program, capsys):
    for recipe, field, meant in (
        ("text_classification", "keep_ration", "keep_ratio"),
        ("accelerate_loop", "epoch", "epochs"),
    ):
        (tmp_path / "run.yaml").write_text(f"{field}: 1\n")
        message = f"'{field}': did you mean '{meant}'"
        ends_with_a_message(program, capsys, message, f"{recipe}.py", tmp_path / "run.yaml")


@pytest.mark.parametrize("recipe", ["text_classification", "accelerate_loop"])
def test_the_configurations_of_a_pair_differ_only_in_the_pruning(recipe):
    full, pruned = (
        yaml.safe_load((RECIPES / "configs" / f"{recipe}_{name}.yaml").read_text())
        for name in ("full", "pruned")
    )
    differing = {name for name in full.keys() | pruned.keys() if full.get(name) != pruned.get(name)}
    assert differing == {"pruning", "keep_ratio", "output_dir"}
    assert full["pruning"] == "full"


def test_the_configuration_of_the_pruned_text_classifier_runs(intents, tmp_path, program):
    data, model = intents
    changes = ["--dataset", data, "--model", model, "--text_column", "text", *LITTLE]
    changes += ["--max_length", "16"]
    config = RECIPES / "configs" / "text_classification_pruned.yaml"
    program("text_classification.py", config, *changes, "--output_dir", tmp_path)
    assert report_of(tmp_path).policy["name"] == "ucb"
    assert report_of(tmp_path).totals["optimizer_steps"] == 2


def test_macro_f1_counts_each_class_the_same():
    best = np.array([[0, 1], [0, 2], [1, 0], [0, 1]])
    metrics = accuracy_and_f1()(EvalPrediction(predictions=best, label_ids=np.array([0, 0, 1, 2])))
    # Precision and recall: 2/3 and 1 of class 0, 1 and 1 of class 1, 0 and 0 of class 2.
    assert metrics == pytest.approx({"accuracy": 0.75, "macro_f1": (0.8 + 1 + 0) / 3})


# ---- recipes/accelerate_loop.py ------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_cifar(tmp_path_factory):
    """72 and 20 images in the format of CIFAR-10; each class is brighter than the one before."""
    folder = tmp_path_factory.mktemp("cifar")
    for split, n in (("train", 72), ("test", 20)):
        generator = np.random.default_rng(n)
        labels = generator.integers(0, 10, n)
        pixels = generator.integers(0, 160, (n, 32, 32, 3)) + 10 * labels[:, None, None, None]
        images = [Image.fromarray(image.astype(np.uint8)) for image in pixels]
        features = {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=[f"class {i}" for i in range(10)]),
        }
        data = datasets.Dataset.from_dict(
            {"img": images, "label": labels.tolist()}, features=datasets.Features(features)
        )
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def plans(monkeypatch):
    """The plans that UCB made, in their order."""
    chosen, original = [], UCB.plan

    def plan(self, *args, **kwargs):
        chosen.append(original(self, *args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(UCB, "plan", plan)
    return chosen


LOOP = ["--model", "resnet8_cifar", "--epochs", "4", "--seed", "3"]


@pytest.mark.parametrize("scoring", ["trained", "dropped"])
def test_the_loop_trains_what_the_trainer_trains(scoring, small_cifar, tmp_path, plans, program):
    pruning = ["--pruning", "ucb", "--keep_ratio", "0.4"]
    pruning += ["--pruning_kwargs", json.dumps({"first": 1, "scoring": scoring})]
    given = ["--dataset", small_cifar, *LOOP, "--batch_size", "8", *pruning]
    program("accelerate_loop.py", *given, "--output_dir", tmp_path / "loop")
    by_loop, plans[:] = plans.copy(), []

    data = datasets.load_dataset(str(small_cifar), split="train")
    train = ImageCache.from_dataset(data, mean=CIFAR_MEAN, std=CIFAR_STD, augment=True, seed=3)
    set_seed(3)
    statistics = {"mean": CIFAR_MEAN, "std": CIFAR_STD}
    model = create_timm_model(
        "resnet8_cifar", label_names=train.label_names, image_size=32, **statistics
    )
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    trainer = DynamicPruningTrainer(
        model=model,
        args=arguments(
            tmp_path / "trainer",
            num_train_epochs=4,
            per_device_train_batch_size=8,
            lr_scheduler_type="linear",
            max_grad_norm=0.0,
            remove_unused_columns=False,
            seed=3,
        ),
        train_dataset=train,
        data_collator=batch_collator,
        optimizers=(torch.optim.SGD(model.parameters(), 0.1, **settings), None),
        pruning=UCB(keep_ratio=0.4, first=1, scoring=scoring),
    )
    trainer.train()

    assert len(plans) == len(by_loop) == 3
    for ours, theirs in zip(by_loop, plans, strict=True):
        assert torch.equal(ours.indices, theirs.indices)
    report = report_of(tmp_path / "loop")
    kept = {tuple(plan.indices.sort().values.tolist()) for plan in plans}
    assert len(kept) == 3  # the kept samples change
    for ours, theirs in zip(report.epochs, trainer.pruning_report.epochs, strict=True):
        assert ours.samples == theirs.samples
        assert ours.optimizer_steps == theirs.optimizer_steps
        assert ours.passes == theirs.passes
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-4)
    for name, weight in load_file(tmp_path / "loop" / "model.safetensors").items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_the_loop_on_two_ranks_trains_what_it_trains_on_one(small_cifar, tmp_path, program):
    """With half the batch per rank. No BatchNorm: each rank would have other statistics."""
    pruning = ["--pruning", "ucb", "--keep_ratio", "0.4", "--learning_rate", "0.01"]
    settings = ["--dataset", small_cifar, *LOOP, "--model", "test_convnext", *pruning]
    one, two = tmp_path / "1", tmp_path / "2"
    program("accelerate_loop.py", *settings, "--batch_size", 8, "--output_dir", one)
    halves = [*settings, "--batch_size", 4, "--output_dir", two]
    done = torchrun(RECIPES / "accelerate_loop.py", *halves, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = report_of(one), report_of(two)
    assert (one.environment["ranks"], two.environment["ranks"]) == (1, 2)
    assert two.selection == one.selection
    assert two.metrics == one.metrics
    for ours, theirs in zip(two.epochs, one.epochs, strict=True):
        assert (ours.samples, ours.optimizer_steps) == (theirs.samples, theirs.optimizer_steps)
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-3)
    assert two.passes == 4 * 32  # 29 samples per epoch, and the last batch is padded
    weights = load_file(tmp_path / "2" / "model.safetensors")
    for name, weight in load_file(tmp_path / "1" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


def test_the_loop_under_accelerate_launch_from_a_configuration(small_cifar, tmp_path):
    config = RECIPES / "configs" / "accelerate_loop_pruned.yaml"
    given = ["--dataset", small_cifar, "--model", "resnet8_cifar", "--epochs", "2"]
    given += ["--batch_size", "24", "--output_dir", tmp_path]
    out = child(*LAUNCH, "recipes/accelerate_loop.py", config, *given)
    assert "cost 0.3056" in out  # 22 of 72
    assert report_of(tmp_path).totals["optimizer_steps"] == 2
    (best, *_) = pipeline("image-classification", model=str(tmp_path))(Image.new("RGB", (32, 32)))
    assert best["label"].startswith("class ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--dataset", "/no/such/place"], "/no/such/place"),
        (["--train_split", "trian"], "'trian'"),
        (["--model", "resnet9_cifar"], "'resnet9_cifar'"),
        (["--mixed_precision", "bf17"], "bf17"),
        (["--output_dir", "."], "(report.json)"),
        (["--advise", "True"], "--advise"),
    ],
)
def test_a_mistake_in_the_loop_ends_it(
    changes, message, small_cifar, tmp_path, monkeypatch, program, capsys
):
    (tmp_path / "report.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    given = ["--dataset", small_cifar, *LOOP, "--output_dir", "out", *changes]
    ends_with_a_message(program, capsys, message, "accelerate_loop.py", *given)


def test_the_loop_is_short():
    assert len((RECIPES / "accelerate_loop.py").read_text().splitlines()) < 100
