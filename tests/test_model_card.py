"""The card has the report's numbers, and its snippets run as they stand.

The tests look at metadata, at cells of tables and at snippets. The wording is free.
"""

import ast
import inspect
import json
import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from choosing import INF, NAN
from datasets import Dataset
from hostile import RAW, TEXTS, programs, shape
from huggingface_hub import ModelCard, ModelCardData
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_dynprune import (
    UCB,
    DynamicPruningTrainer,
    FullData,
    PruningReport,
    RandomPruning,
    StaticPruning,
)
from hf_dynprune.escape import printable
from hf_dynprune.model_card import (
    CardArguments,
    CardFacts,
    card_of_reports,
    card_of_trainer,
    command_of,
    eval_results,
    facts_of,
    picture_of,
)
from hf_dynprune.report import KEPT, EpochRecord, chance_of, selection_of

README = Path(__file__).parents[1] / "README.md"
N = 40
# The titles of the sections.
PRUNED, COST, RESULTS = "What was pruned", "What it cost", "Results"
TRAINING, LOAD, REPEAT, LIMITS = "Training", "How to load", "How to repeat", "Limits"


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30, (N, 5), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def tiny_bert():
    set_seed(1)
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
    }
    return BertForSequenceClassification(
        BertConfig(**sizes, vocab_size=30, num_labels=3, max_position_embeddings=8)
    )


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trained(data, folder, policy=None, model=None, **settings):
    arguments = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 0.2,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "seed": 5,
        **settings,
    }
    trainer = DynamicPruningTrainer(
        model=model or tiny_bert(),
        args=TrainingArguments(
            str(folder),
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=data,
        eval_dataset=data.select(range(20)),
        compute_metrics=accuracy,
        pruning=policy or UCB(keep_ratio=0.25, c=2.0),
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trainer(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("runs") / "my-bert")


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card.content, flags=re.DOTALL)


def sections(card):
    """title -> text"""
    _, *parts = card.content.split("\n## ")
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def table(card, title):
    """The tables of a section: first cell -> the other cells."""
    lines = [line for line in sections(card)[title].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in rows}


def items(card, title):
    """How many points the list of a section has."""
    return sections(card)[title].count("\n- ")


def card_of(reports, policy=None, **others):
    return card_of_reports(reports, CardFacts(ModelCardData(), policy), **others)


def a_report(policy=None, accuracies=(0.5, 0.9, 0.7), **changes):
    policy = policy or UCB(keep_ratio=0.3)
    epochs = [
        EpochRecord(
            i,
            False,
            30,
            30,
            30,
            0,
            3,
            metrics={"eval_accuracy": a, "eval_runtime": 1.0, "eval_loss": 1.5},
        )
        for i, a in enumerate(accuracies)
    ]
    selection = selection_of(
        torch.tensor([0] * 40 + [1] * 40 + [2] * 10 + [3] * 10).numpy(), chance_of([0.3] * 3)
    )
    environment = {
        "hf_dynprune": "0.1.0",
        "device": "A Chip",
        "ranks": 1,
        "versions": {"torch": "2.9"},
    }
    report = PruningReport(
        policy.to_dict(), 100, 0, 0, 3.0, epochs, selection, environment=environment
    )
    return replace(report, **changes)


# ---- metadata ------------------------------------------------------------------------------------


def test_metadata(trainer):
    given = CardArguments("en", "mit", dataset="Some Numbers", dataset_tags="org/numbers")
    card = card_of_trainer(trainer, given)
    data, report = card.data.to_dict(), trainer.pruning_report
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["generated_from_trainer", "dynamic-data-pruning", "ucb"]
    assert data["pipeline_tag"] == "text-classification"
    assert (data["license"], data["language"], data["datasets"]) == ("mit", "en", ["org/numbers"])
    assert data["metrics"] == ["accuracy"]
    assert "base_model" not in data
    block = data["hf_dynprune"]
    assert block["policy"] == trainer.pruning.to_dict()
    assert block["cost_ratio"] == pytest.approx(report.cost_ratio, abs=1e-4)
    (entry,) = data["model-index"]
    assert entry["name"] == "my-bert"
    (result,) = entry["results"]
    assert result["task"]["type"] == "text-classification"
    assert result["dataset"] == {"name": "Some Numbers", "type": "org/numbers"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [
        ("accuracy", report.metrics["eval_accuracy"])
    ]


@pytest.mark.parametrize("arguments", [{}, {"dataset": ["one", "two"]}])
def test_no_results_in_the_metadata_unless_it_is_known_of_which_data(trainer, arguments):
    card = card_of_trainer(trainer, CardArguments(**arguments))
    assert "model-index" not in card.data.to_dict()


def test_arguments_are_those_of_the_trainer():
    ours = inspect.signature(CardArguments).parameters
    stock = list(inspect.signature(Trainer.create_model_card).parameters)[1:]
    assert [name for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY] == stock
    assert all(parameter.default is not parameter.empty for parameter in ours.values())


def test_trainer_writes_the_card_and_it_reads_back(trainer, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    trainer.create_model_card(None, None, ["mine"], "written")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["generated_from_trainer", "mine", "dynamic-data-pruning", "ucb"]
    assert card.content == f"{card.content.rstrip()}\n"
    assert "\n\n\n" not in card.content
    assert "\n# written\n" in card.content
    report = PruningReport.load(tmp_path / "report.json")
    assert report.to_dict() == trainer.pruning_report.to_dict()
    assert "](pruning.png)" in card.content
    assert (tmp_path / "pruning.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_matplotlib_and_in_mid_run(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        trainer.create_model_card()
    monkeypatch.setattr(trainer, "is_in_train", True)
    trainer.create_model_card()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "report.json"]
    assert "](" not in ModelCard.load(tmp_path / "README.md").content


def test_trainer_compares_with_reports_it_is_given(trainer, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    report = trainer.pruning_report
    other = replace(
        report, seed=6, epochs=[replace(e, metrics={"eval_accuracy": 0.25}) for e in report.epochs]
    )
    full = replace(report, policy=FullData().to_dict())
    trainer.create_model_card(dataset="numbers", other_seeds=other, full=full)
    card = ModelCard.load(tmp_path / "README.md")
    mean = (report.metrics["eval_accuracy"] + 0.25) / 2
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("accuracy", mean)
    ]
    assert table(card, "Against the full run")["seeds"] == ["5, 6", "5"]
    assert table(card, TRAINING)["seed"] == ["5, 6"]
    assert "](pruning.png)" in card.content


def test_a_card_that_is_there_keeps_its_library_and_tags_but_not_another_policy(
    trainer, tmp_path, monkeypatch
):
    (tmp_path / "README.md").write_text(
        "---\nlibrary_name: peft\ntags:\n- lora\n- random\n---\nOld text\n"
    )
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    card = card_of_trainer(trainer)
    assert card.data.library_name == "peft"
    assert card.data.tags == ["generated_from_trainer", "lora", "dynamic-data-pruning", "ucb"]
    assert "Old text" not in card.content


def test_dataset_of_the_hub_is_found(trainer, monkeypatch):
    data = trainer.eval_dataset.map(None)
    data.info.download_checksums = {"hf://datasets/org/numbers@abc123/data/test.parquet": {}}
    data.info.config_name = "plain"
    monkeypatch.setattr(trainer, "eval_dataset", data)
    card = card_of_trainer(trainer).data.to_dict()
    assert card["datasets"] == ["org/numbers"]
    dataset = card["model-index"][0]["results"][0]["dataset"]
    assert (dataset["name"], dataset["config"], dataset["revision"]) == (
        "org/numbers",
        "plain",
        "abc123",
    )


# ---- where the model comes from ------------------------------------------------------------------


def test_trained_from_scratch(trainer):
    card = card_of_trainer(trainer)
    assert "base_model" not in card.data.to_dict()
    assert "huggingface.co" not in card.content


def test_fine_tuned_only_if_weights_were_loaded(data, tmp_path):
    """By `_is_hf_initialized` and `_name_or_path`, which are private."""
    tiny_bert().save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    trainer = trained(data, tmp_path / "run", model=loaded, num_train_epochs=1)
    card = card_of_trainer(trainer)
    assert "base_model" not in card.data.to_dict()
    assert "`saved`" in card.content
    assert str(tmp_path) not in card.content
    loaded.config._name_or_path = "org/tiny-bert"  # as if it came from the Hub
    card = card_of_trainer(trainer, CardArguments(dataset="numbers"))
    assert card.data.base_model == "org/tiny-bert"
    assert "[org/tiny-bert](https://huggingface.co/org/tiny-bert) on numbers." in card.content

    config = AutoConfig.from_pretrained(tmp_path / "saved")
    config._name_or_path = "org/tiny-bert"
    trainer = trained(
        data, tmp_path / "run", model=BertForSequenceClassification(config), num_train_epochs=1
    )
    assert "base_model" not in card_of_trainer(trainer).data.to_dict()
    given = CardArguments(finetuned_from="org/other")
    assert card_of_trainer(trainer, given).data.base_model == "org/other"


# ---- text ----------------------------------------------------------------------------------------


def test_cost_stands_beside_the_full_run(trainer):
    card, report = card_of_trainer(trainer), trainer.pruning_report
    cost = table(card, COST)
    assert (report.passes, report.totals["optimizer_steps"]) == (30, 9)
    assert cost["cost"] == ["0.250", "1"]
    assert cost["passes"] == ["30", "120"]
    assert cost["optimizer steps"] == ["9", "30"]
    for phase, seconds in report.totals["seconds"].items():
        assert cost[f"seconds, {phase}"][0] == f"{seconds:.2f}"


def test_words_are_defined_once(trainer):
    text = card_of_trainer(trainer).content
    for word in ("Pass", "Full run", "Short run", "Cost"):
        assert text.count(f"- **{word}**: ") == 1


def test_policy_and_selection(trainer):
    card = card_of_trainer(trainer)
    fields = [text for text in re.findall("`(.+?)`", sections(card)[PRUNED]) if "=" in text]
    assert fields == ["keep_ratio=0.25", "c=2.0"]  # those at their defaults are left out
    selection, rows = trainer.pruning_report.selection, table(card, PRUNED)
    for name in KEPT:
        shares = (selection[name], selection["chance_shares"][name])
        assert rows[name] == [f"{100 * share:.1f} %" for share in shares]


def test_training(trainer):
    rows = table(card_of_trainer(trainer), TRAINING)
    assert rows["learning rate"] == ["0.01"]
    assert rows["schedule"][0].startswith("linear, 2 steps")
    assert rows["batch"][0].startswith("4 × 1 × 1 = 4")
    assert rows["epochs"] == ["3"]
    assert rows["optimizer"] == ["SGD, momentum 0.9"]
    assert rows["precision"] == ["float32"]
    assert rows["seed"] == ["5"]
    assert f"torch {torch.__version__}" in rows["versions"][0]


def test_a_scheduler_made_outside_the_trainer_is_named_instead(trainer, monkeypatch):
    """By `_created_lr_scheduler`, which is private."""
    assert trainer._created_lr_scheduler is True
    monkeypatch.setattr(trainer, "_created_lr_scheduler", False)
    (schedule,) = table(card_of_trainer(trainer), TRAINING)["schedule"]
    assert schedule.startswith("LambdaLR")


def test_results_are_the_last_not_the_best():
    report = a_report(accuracies=(0.5, 0.9, 0.7))
    card = card_of(report)
    rows = table(card, RESULTS)
    assert rows["accuracy"] == ["0.7"]
    assert rows["loss"] == ["1.5"]
    assert "0.9" not in sections(card)[RESULTS]
    assert "runtime" not in sections(card)[RESULTS]


def test_not_evaluated():
    report = a_report()
    for record in report.epochs:
        record.metrics.clear()
    assert table(card_of(report), RESULTS) == {}


def test_card_of_a_report_alone(tmp_path):
    a_report().save(tmp_path / "report.json")
    report = PruningReport.load(tmp_path / "report.json")
    card = card_of_reports(report, CardFacts(ModelCardData(model_name="from-json")))
    assert "\n# from-json\n" in card.content
    assert card.data.tags == ["dynamic-data-pruning", "ucb"]
    assert table(card, COST)["cost"] == ["0.300", "1"]
    assert "40.0 %" in sections(card)[LIMITS]  # were never kept
    assert table(card, TRAINING)["hardware"] == ["1 × A Chip"]
    assert not {LOAD, REPEAT} & set(sections(card))
    assert "\n\n\n" not in card.content


def test_limits_depend_on_the_run():
    scored, random = card_of(a_report()), card_of(a_report(RandomPruning(keep_ratio=0.3)))
    assert items(scored, LIMITS) == items(random, LIMITS) + 1
    report = a_report(UCB(keep_ratio=0.3, first=1))
    report.epochs[0] = replace(report.epochs[0], full_data=True, nonfinite=7)
    card = card_of(report)
    assert items(card, LIMITS) == items(scored, LIMITS) + 1
    assert re.search(r"\n- 7 ", sections(card)[LIMITS])
    assert re.search(r"\b1 .*\b3 epochs", sections(card)[PRUNED])


def test_full_run_says_that_nothing_was_pruned():
    card = card_of(a_report(FullData()))
    assert card.data.tags == ["dynamic-data-pruning", "full"]
    assert table(card, PRUNED) == {}
    assert "%" not in card.content
    assert items(card, LIMITS) == items(card_of(a_report()), LIMITS) - 4


@dataclass(frozen=True)
class OwnPolicy(RandomPruning):
    twist: int = 3


def test_policy_of_ones_own(data, tmp_path):
    card = card_of_trainer(trained(data, tmp_path, OwnPolicy(keep_ratio=0.5), num_train_epochs=1))
    assert "OwnPolicy" in card.data.tags
    assert "`twist=3`" in card.content
    # A dataclass without a docstring has its signature as one.
    assert "OwnPolicy(twist" not in card.content
    assert "import DynamicPruningTrainer\n" in snippets(card)[-1]
    assert "import OwnPolicy" not in snippets(card)[-1]


def test_weights_of_the_best_checkpoint_and_a_resumed_run_are_reported(data, tmp_path):
    trainer = trained(
        data,
        tmp_path,
        num_train_epochs=2,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
    )
    before = sections(card_of_trainer(trainer))[COST]
    assert f"step {trainer.state.best_global_step}" in before
    assert f"{trainer.state.best_metric:.4g}" in before
    trainer.pruning_report.resumed.append({"epoch": 1, "step": 1234})
    assert "step 1,234" in sections(card_of_trainer(trainer))[COST]


# ---- several runs --------------------------------------------------------------------------------


def seeds(policy=None, last=(0.7, 0.8, 0.6), **changes):
    return [
        a_report(policy, accuracies=(0.5, 0.9, value), seed=seed, **changes)
        for seed, value in enumerate(last)
    ]


def test_facts_are_means_and_each_value():
    runs = seeds()
    runs[0].epochs[0].backward_passes += 30  # 20 passes more
    runs[1].epochs[0].seconds.update(training=6.0, evaluation=9.0)
    facts = facts_of([runs[2], runs[0], runs[1]])
    assert facts["seeds"] == [0, 1, 2]
    assert facts["results"]["accuracy"]["values"] == [0.7, 0.8, 0.6]
    assert facts["results"]["accuracy"]["mean"] == pytest.approx(0.7)
    assert facts["results"]["accuracy"]["std"] == pytest.approx(0.1)  # sqrt((0 + 0.01 + 0.01) / 2)
    assert facts["passes"] == pytest.approx(90 + 20 / 3)
    assert facts["cost_ratio"] == pytest.approx((90 + 20 / 3) / 300)
    assert facts["optimizer_steps"] == 9
    assert facts["spent_seconds"] == facts["seconds"]["training"] == pytest.approx(2)
    assert facts_of(runs[0])["results"]["accuracy"] == {"mean": 0.7, "std": None, "values": [0.7]}
    assert json.loads(json.dumps(facts)) == facts


def test_spread_of_several_seeds():
    card = card_of(seeds())
    assert table(card, RESULTS)["accuracy"] == ["0.7 ± 0.1", "0.7, 0.8, 0.6"]
    assert "(0, 1, 2)" in card.content.partition("\n## ")[0]
    assert table(card, TRAINING)["seed"] == ["0, 1, 2"]
    assert card.data["hf_dynprune"]["seeds"] == [0, 1, 2]


def test_comparison_with_full_and_short_run():
    full = seeds(FullData(), (0.9, 0.95, 0.97))
    for run in full:
        run.epochs = [
            replace(record, backward_passes=100, forward_passes=100, optimizer_steps=10)
            for record in run.epochs
        ]
    short = replace(full[0], num_epochs=1.0, epochs=full[0].epochs[-1:])
    card = card_of(seeds(), full=full, short=short)
    rows = table(card, "Against the full run and the short run")
    assert rows[""] == ["this run", "full run", "short run"]
    assert rows["epochs"] == ["3", "3", "1"]
    assert rows["seeds"] == ["0, 1, 2", "0, 1, 2", "0"]
    assert rows["cost"] == ["0.300", "1.000", "0.333"]
    assert rows["optimizer steps"] == ["9", "30", "10"]
    assert rows["seconds"] == ["0.0", "0.0", "0.0"]
    assert rows["accuracy"] == ["0.7 ± 0.1", "0.94 ± 0.036", "0.9"]
    assert table(card, COST)["optimizer steps"] == ["9", "30"]
    assert items(card, LIMITS) == items(card_of(seeds()), LIMITS) - 1  # no more "compare it with"
    only = card_of(seeds(), short=short)
    assert table(only, "Against the short run")[""] == ["this run", "short run"]
    assert "0" not in table(only, COST)["seconds, training"][1]
    assert not any(title.startswith("Against") for title in sections(card_of(seeds())))


def test_charged_preparation_is_in_cost_and_seconds():
    preparation = {"method": "el2n", "passes": 60.0, "seconds": 5.0, "charged": True}
    static = StaticPruning(keep="random", keep_ratio=0.3)
    run = a_report(static, preparation=preparation)
    full = a_report(FullData())
    card = card_of(run, static, full=full)
    assert card.data.tags[0] == "static-data-pruning"
    assert card.data["hf_dynprune"]["cost_ratio"] == (90 + 60) / 300
    assert table(card, "Against the full run")["seconds"] == ["5.0", "0.0"]
    (row,) = [cells for label, cells in table(card, COST).items() if "scores" in label]
    assert row == ["60", "0"]


@pytest.mark.parametrize(
    ("runs", "compared", "value"),
    [
        ([], {}, "no report"),
        ([0, 0], {}, "seed 0"),
        ([0, UCB(keep_ratio=0.5)], {}, r"keep_ratio: 0\.3 and 0\.5"),
        ([0], {"full": UCB(keep_ratio=0.3)}, "full run .*'ucb'"),
        ([0], {"short": FullData()}, "short run .*3 epochs"),
        ([0], {"full": 99}, r"\b99 samples.*\b100\b"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(runs, compared, value):
    def report(policy, seed):
        if isinstance(policy, int):
            return a_report(FullData(), num_samples=policy) if policy else a_report()
        return a_report(policy, seed=seed)

    with pytest.raises(ValueError, match=value):
        facts_of(
            [report(policy, seed) for seed, policy in enumerate(runs)],
            **{name: report(policy, 0) for name, policy in compared.items()},
        )


def test_picture():
    full = a_report(FullData())
    comparison = picture_of(seeds(), full=full)
    assert len(comparison.axes[0].lines) == 2
    selection = picture_of(seeds())
    assert len(selection.axes[0].patches) > 0
    assert picture_of(replace(full, selection={})) is None
    for record in full.epochs:
        record.metrics = {"test_accuracy": 0.5}
    assert picture_of(seeds(), full=full) is None


# ---- snippets ------------------------------------------------------------------------------------


def test_loading_snippet_loads(trainer, tmp_path, monkeypatch):
    """The Auto class is found by `_model_mapping`, which is private."""
    trainer.save_model(str(tmp_path))
    load, _ = snippets(card_of_trainer(trainer))
    assert "AutoModelForSequenceClassification" in load
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(load, names)
    torch.testing.assert_close(
        dict(names["model"].named_parameters()), dict(trainer.model.named_parameters())
    )


def test_loading_snippet_names_the_repository(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "hub_model_id", "me/my-bert")
    assert 'name = "me/my-bert"\n' in snippets(card_of_trainer(trainer))[0]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_repeating_snippet_repeats_the_run(trainer, data, tmp_path, monkeypatch):
    _, repeat = snippets(card_of_trainer(trainer))
    assert "pruning=UCB(keep_ratio=0.25, c=2.0)," in repeat
    assert "per_sample_loss_fn" not in repeat
    monkeypatch.chdir(tmp_path)
    names = {
        "model": tiny_bert(),
        "train_dataset": data,
        "eval_dataset": trainer.eval_dataset,
        "compute_metrics": accuracy,
    }
    exec(repeat, names)
    again = names["trainer"]
    assert torch.equal(again.pruner.table["times_kept"], trainer.pruner.table["times_kept"])
    torch.testing.assert_close(
        again.pruner.table["mean"], trainer.pruner.table["mean"], equal_nan=True
    )


def test_a_loss_of_the_user_is_in_the_snippet(data, tmp_path):
    def losses(outputs, inputs):
        return torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    run = DynamicPruningTrainer(
        model=tiny_bert(),
        args=TrainingArguments(
            str(tmp_path), max_steps=1, report_to="none", dataloader_pin_memory=False
        ),
        train_dataset=data,
        pruning=RandomPruning(keep_ratio=0.5),
        per_sample_loss_fn=losses,
    )
    run.train()
    assert "    per_sample_loss_fn=per_sample_loss_fn,\n" in snippets(card_of_trainer(run))[-1]


def test_command_line_of_a_recipe():
    arguments = [
        "--pruning_kwargs",
        '{"scores": "/home/me/s.parquet", "c": 2}',
        "--hub_token",
        "secret",
        "--dataset",
        "a/b",
    ]
    argv = [
        "/home/me/recipes/cifar.py",
        *arguments,
        "--hub-tok=secret",
        "--model=../m/resnet",
        "--push_to_hub",
        "True",
    ]
    command = command_of(argv, ranks=1)
    assert command.startswith("python recipes/cifar.py --pruning_kwargs ")
    assert shlex.split(command)[3:] == [
        '{"scores": "path/to/s.parquet", "c": 2}',
        *("--dataset", "a/b", "--model=path/to/resnet", "--push_to_hub", "True"),
    ]
    assert command_of(argv, ranks=2).startswith("torchrun --nproc_per_node 2 recipes/cifar.py")
    assert command_of(["/home/me/train.py", "--lr", "1"]) == ""
    assert command_of(["recipes/x.py", "~/data", "https://example.org/a/b", "runs/x", "1/3"]) == (
        "python recipes/x.py path/to/data https://example.org/a/b runs/x 1/3"
    )


def test_a_recipe_is_repeated_by_its_command_line(trainer, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes/mine.py", "--seed", "5"])
    card = card_of_trainer(trainer)
    assert "```bash\npython recipes/mine.py --seed 5\n```" in sections(card)[REPEAT]
    assert len(snippets(card)) == 1  # that which loads


def test_folders_of_this_machine_are_not_shown():
    report = a_report()
    report.policy = {
        **StaticPruning(None, keep_ratio=0.3, keep="random").to_dict(),
        "scores": "/home/me/scores.parquet",
    }
    report.policy.update(keep="hardest", digest="0123")
    card = card_of(report)
    assert "/home" not in str(card)
    assert '`scores="path/to/scores.parquet"`' in card.content


def test_architecture_of_ours_asks_for_its_import(tmp_path):
    vision = pytest.importorskip("hf_dynprune.vision")
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    cache = vision.ImageCache(images, torch.arange(16) % 2, mean=[0.5], std=[0.5])
    settings = {"num_labels": 2, "image_size": 8, "mean": [0.5], "std": [0.5], "in_chans": 1}
    for architecture, needs_import in (("resnet8_cifar", True), ("resnet10t", False)):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = DynamicPruningTrainer(
            model=vision.create_timm_model(architecture, **settings),
            args=arguments,
            train_dataset=cache,
            data_collator=vision.batch_collator,
            pruning=UCB(keep_ratio=0.5),
        )
        trainer.train()
        load = snippets(card_of_trainer(trainer))[0]
        assert ("import hf_dynprune.vision" in load) == needs_import
        installs = re.findall(r"pip install \S+", load)
        assert len(installs) == needs_import
        assert all(line in README.read_text() for line in installs)
        assert "AutoModelForImageClassification.from_pretrained(name)" in load
        assert "AutoImageProcessor.from_pretrained(name)" in load


# ---- texts of others -----------------------------------------------------------------------------


def card_with(text):
    """A card in which every text that may be somebody else's is `text`, and its parts."""
    report = a_report()
    report.policy = {**report.policy, "signal": text or "other"}
    report.environment = {
        "hf_dynprune": text or "0",
        "device": text or "cpu",
        "ranks": 1,
        "versions": {text: text or "1", "torch": "2.9"},
    }
    report.best_model = {"step": 2, "metrics": {text: 0.5}}
    for record in report.epochs:
        record.metrics = {f"eval_{text}": 0.5, "eval_loss": 1.5}
    report = PruningReport.from_dict(json.loads(json.dumps(report.to_dict())))
    results = {text: 0.5}
    data = ModelCardData(
        model_name=text or "m",
        tags=[text],
        datasets=[text],
        metrics=list(results),
        eval_results=eval_results(results, text, text),
    )
    full = a_report(FullData())
    for record in full.epochs:
        record.metrics = {f"eval_{text}": 0.25}
    about = CardFacts(
        data,
        origin=f"x {text}" if text.strip() else "x",
        training={text: text},
        notes=[f"x {text}"],
        picture=f"{text}.png",
        command=f"echo {text}",
        loading={
            "model": "AutoModel",
            "processor": None,
            "source": text or "me/m",
            "is_timm": False,
            "architecture": None,
        },
    )
    return card_of_reports(report, about, full=full)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_texts_of_others_show_as_they_are(text, reliability, tmp_path):
    pytest.importorskip("markdown_it")
    reliability("foreign texts")
    plain, card = card_with("plain"), card_with(text)
    assert shape(str(card)) == shape(str(plain))
    path = tmp_path / "README.md"
    path.write_text(str(card), encoding="utf-8")  # no half of a surrogate pair
    assert not RAW.search(str(card))
    data, shown = ModelCard.load(path).data, printable(text)
    assert data["hf_dynprune"]["policy"]["signal"] == (shown or "other")
    assert data.model_name == (shown or "m")
    assert [result.metric_type for result in data.eval_results] == [shown]
    (program,) = programs(str(card))
    name = next(node.value for node in ast.parse(program).body if isinstance(node, ast.Assign))
    assert ast.literal_eval(name) == (text or "me/m")


@pytest.mark.parametrize(
    "text",
    [
        "no metadata",
        "---\na: [\n---\n",
        "---\n- a\n- b\n---\n",
        "---\ntags: 5\nlibrary_name: [x]\n---\n",
        "---\nmodel-index: 3\n---\n",
        b"\xff\xfe\x00",
        b"",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_card_that_is_there_and_is_damaged_is_replaced(text, trainer, tmp_path, monkeypatch):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "README.md").write_bytes(content)
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["generated_from_trainer", "dynamic-data-pruning", "ucb"]
    assert card.data.library_name == "transformers"


def test_a_link_in_place_of_the_card_is_replaced_and_not_followed(trainer, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    for name in ("README.md", "report.json", "pruning.png"):
        (tmp_path / name).write_text("of somebody")
        (tmp_path / "run" / name).symlink_to(tmp_path / name)
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path / "run"))
    trainer.create_model_card()
    for name in ("README.md", "report.json", "pruning.png"):
        assert (tmp_path / name).read_text() == "of somebody"
        assert not (tmp_path / "run" / name).is_symlink()


def test_the_report_beside_the_card_names_no_folders(trainer, tmp_path, monkeypatch):
    report = trainer.pruning_report
    private = {"method": "el2n", "scores": "/home/me/s.parquet", "charged": False, "passes": 1}
    monkeypatch.setattr(report, "preparation", private)
    monkeypatch.setattr(report, "policy", {**report.policy, "scores": "/home/me/s.parquet"})
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    trainer.create_model_card()
    for name in ("README.md", "report.json"):
        assert "/home" not in (tmp_path / name).read_text()
    assert report.preparation == private  # the run's own report keeps it


def test_secrets_are_not_in_the_snippet(trainer, monkeypatch):
    secrets = {"token": "abc", "trust": "hf_abcdefghijkl", "dtype": "bf16"}
    monkeypatch.setattr(trainer.args, "lr_scheduler_kwargs", secrets)
    repeat = snippets(card_of_trainer(trainer))[-1]
    assert "abc" not in repeat
    assert "'bf16'" in repeat


def test_metrics_that_are_not_finite():
    def run(seed, value):
        return a_report(accuracies=(0.5, 0.9, value), seed=seed)

    for values in ([NAN, 0.5], [INF, -INF], [INF, 0.5], [NAN, NAN, NAN], [1.7e308, 1.7e308]):
        runs = [run(seed, value) for seed, value in enumerate(values)]
        result = facts_of(runs)["results"]["accuracy"]
        assert not math.isfinite(result["mean"])
        card = card_of(runs)
        assert table(card, RESULTS)["accuracy"][0].startswith(("nan", "inf"))
    card = card_of(run(0, NAN))
    assert table(card, RESULTS)["accuracy"] == ["nan"]
    assert "model-index" not in card.data.to_dict()


def test_the_best_model_has_a_table_apart(data, tmp_path):
    trainer = trained(
        data,
        tmp_path,
        num_train_epochs=2,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first epoch is better
    )
    assert trainer.state.best_global_step < trainer.state.global_step
    last = dict(trainer.pruning_report.metrics)
    found = trainer.evaluate(data, metric_key_prefix="test")
    again = trainer.evaluate()
    report = trainer.pruning_report
    assert report.metrics == last
    assert report.best_model["step"] == trainer.state.best_global_step
    assert report.best_model["metrics"]["test_loss"] == found["test_loss"]
    assert report.best_model["metrics"]["eval_loss"] == again["eval_loss"]
    rows = table(card_of_trainer(trainer), RESULTS)
    assert rows["test_loss"] == [f"{found['test_loss']:.4g}"]
    assert rows["loss"] == [f"{last['eval_loss']:.4g}"]


def test_evaluations_of_the_last_model_after_the_run_are_results(data, tmp_path):
    trainer = trained(data, tmp_path, num_train_epochs=1, eval_strategy="no")
    found = trainer.evaluate(metric_key_prefix="test")
    assert trainer.pruning_report.metrics["test_loss"] == found["test_loss"]
    assert trainer.pruning_report.best_model == {}
