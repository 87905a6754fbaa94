"""The card says what was done, with the report's numbers, and its snippets work as they stand."""

import inspect
import json
import re
import shlex
from dataclasses import dataclass, replace

import pytest
import torch
from datasets import Dataset
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
from hf_dynprune.model_card import (
    card_of_report,
    card_of_trainer,
    command_of,
    facts_of,
    picture_of,
    results_of,
)
from hf_dynprune.report import EpochRecord, chance_of, selection_of

N = 40


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


def section(card, title):
    return card.content.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


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
    card = card_of_trainer(
        trainer, dataset="Some Numbers", dataset_tags="org/numbers", license="mit", language="en"
    )
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
    assert "model-index" not in card_of_trainer(trainer, **arguments).data.to_dict()


def test_signature_is_that_of_the_trainer():
    ours, stock = (
        inspect.signature(f).parameters for f in (card_of_trainer, Trainer.create_model_card)
    )
    assert [name for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY][1:] == list(stock)[1:]
    assert all(parameter.default is not parameter.empty for parameter in list(ours.values())[1:])


def test_trainer_writes_the_card_and_it_reads_back(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    trainer.create_model_card(model_name="written", tags=["mine"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["generated_from_trainer", "mine", "dynamic-data-pruning", "ucb"]
    assert card.content.endswith("takes.\n")
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
    assert "means of 2 runs that differ in their seed alone (5, 6)" in card.content
    assert "| seeds | 5, 6 | 5 |" in section(card, "Against the full run")
    assert "| seed | 5, 6 |" in section(card, "Training")
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
    assert "This model was trained from scratch." in card.content
    assert "huggingface.co" not in card.content


def test_fine_tuned_only_if_weights_were_loaded(data, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    trainer = trained(data, tmp_path / "run", model=loaded, num_train_epochs=1)
    card = card_of_trainer(trainer)
    assert "base_model" not in card.data.to_dict()
    assert "fine-tuned from the local checkpoint `saved`" in card.content
    assert str(tmp_path) not in card.content
    loaded.config._name_or_path = "org/tiny-bert"  # as if it came from the Hub
    card = card_of_trainer(trainer, dataset="numbers")
    assert card.data.base_model == "org/tiny-bert"
    assert (
        "fine-tuned from [org/tiny-bert](https://huggingface.co/org/tiny-bert) on numbers."
        in card.content
    )

    config = AutoConfig.from_pretrained(tmp_path / "saved")
    config._name_or_path = "org/tiny-bert"
    trainer = trained(
        data, tmp_path / "run", model=BertForSequenceClassification(config), num_train_epochs=1
    )
    card = card_of_trainer(trainer)
    assert "base_model" not in card.data.to_dict()
    assert "trained from scratch" in card.content
    assert card_of_trainer(trainer, finetuned_from="org/other").data.base_model == "org/other"


# ---- text ----------------------------------------------------------------------------------------


def test_cost_stands_beside_the_full_run(trainer):
    card, report = card_of_trainer(trainer), trainer.pruning_report
    cost = section(card, "What it cost")
    assert (report.passes, report.totals["optimizer_steps"]) == (30, 9)
    assert "| cost | 0.250 | 1 |" in cost
    assert "| passes | 30 | 120 |" in cost
    assert "| optimizer steps | 9 | 30 |" in cost
    for phase in ("training", "choosing", "scoring", "evaluation"):
        assert f"| seconds, {phase} | {report.totals['seconds'][phase]:.2f} |" in cost


def test_policy_and_selection(trainer):
    pruned = section(card_of_trainer(trainer), "What was pruned")
    assert "the samples whose loss is high, or uncertain." in pruned
    assert "Reconstructed" not in pruned  # the first sentence alone
    assert "`keep_ratio=0.25`" in pruned
    assert '`bonus="variance"`' in pruned
    selection = trainer.pruning_report.selection
    for name in ("always", "sometimes", "never"):
        assert (
            f"| {name} | {100 * selection[name]:.1f} % | {100 * selection['chance_shares'][name]:.1f} % |"
            in pruned
        )


def test_training(trainer):
    training = section(card_of_trainer(trainer), "Training")
    for row in (
        "learning rate | 0.01",
        "schedule | linear, 2 steps of LR warm-up",
        "batch | 4 × 1 × 1 = 4 (per device × accumulation × ranks)",
        "epochs | 3",
        "optimizer | SGD, momentum 0.9",
        "precision | float32",
        "seed | 5",
    ):
        assert f"| {row} |" in training
    assert f"torch {torch.__version__}" in training


def test_results_are_the_last_not_the_best():
    report = a_report(accuracies=(0.5, 0.9, 0.7))
    assert results_of(report) == {"accuracy": 0.7, "loss": 1.5}
    card = card_of_report(report, ModelCardData())
    results = section(card, "Results")
    assert "after epoch 3 of 3" in results
    assert "| accuracy | 0.7 |" in results
    assert "0.9" not in results
    assert "runtime" not in results


def test_not_evaluated():
    report = a_report()
    for record in report.epochs:
        record.metrics.clear()
    assert "was not evaluated" in section(card_of_report(report, ModelCardData()), "Results")


def test_card_of_a_report_alone(tmp_path):
    a_report().save(tmp_path / "report.json")
    card = card_of_report(
        PruningReport.load(tmp_path / "report.json"), ModelCardData(model_name="from-json")
    )
    assert card.data.tags == ["dynamic-data-pruning", "ucb"]
    assert "| cost | 0.300 | 1 |" in card.content
    assert "40.0 % of the training samples were kept by no choice." in section(card, "Limits")
    assert "A Chip" in card.content
    assert "How to load" not in card.content
    assert "\n\n\n" not in card.content


def test_limits_depend_on_the_policy():
    scored = section(card_of_report(a_report(), ModelCardData()), "Limits")
    assert "by the loss of each" in scored
    assert "wrongly labelled" in scored
    random = section(
        card_of_report(a_report(RandomPruning(keep_ratio=0.3)), ModelCardData()), "Limits"
    )
    assert "wrongly labelled" not in random
    report = a_report(UCB(keep_ratio=0.3, first=1))
    report.epochs[0] = replace(report.epochs[0], full_data=True, nonfinite=7)
    card = card_of_report(report, ModelCardData())
    assert "in the full-data epochs alone" in section(card, "Limits")
    assert "7 observed losses were NaN or infinite" in section(card, "Limits")
    assert "1 of the 3 epochs" in section(card, "What was pruned")


def test_full_run_says_that_nothing_was_pruned():
    card = card_of_report(a_report(FullData()), ModelCardData())
    assert card.data.tags == ["dynamic-data-pruning", "full"]
    assert "Nothing" in section(card, "What was pruned")
    assert "by chance" not in card.content
    assert "hard" not in section(card, "Limits").replace("hardware", "")


@dataclass(frozen=True)
class OwnPolicy(RandomPruning):
    twist: int = 3


def test_policy_of_ones_own(data, tmp_path):
    card = card_of_trainer(trained(data, tmp_path, OwnPolicy(keep_ratio=0.5), num_train_epochs=1))
    assert "OwnPolicy" in card.data.tags
    assert "`twist=3`" in card.content
    assert (
        "OwnPolicy(twist" not in card.content
    )  # the signature that a dataclass without docstring shows
    assert "import DynamicPruningTrainer\n" in snippets(card)[-1]


def test_weights_of_the_best_checkpoint_and_a_resumed_run_are_told(data, tmp_path):
    trainer = trained(
        data,
        tmp_path,
        num_train_epochs=2,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
    )
    trainer.pruning_report.resumed.append({"epoch": 1, "step": 3})
    cost = section(card_of_trainer(trainer), "What it cost")
    assert f"they are of optimizer step {trainer.state.best_global_step}" in cost
    assert "resumed at optimizer step 3." in cost


# ---- several runs --------------------------------------------------------------------------------


def seeds(policy=None, last=(0.7, 0.8, 0.6), **changes):
    return [
        a_report(policy, accuracies=(0.5, 0.9, value), seed=seed, **changes)
        for seed, value in enumerate(last)
    ]


def test_facts_are_means_and_each_value():
    runs = seeds()
    runs[0].epochs[0].backward_passes += 30  # 20 passes more
    facts = facts_of([runs[2], runs[0], runs[1]])
    assert facts["seeds"] == [0, 1, 2]
    assert facts["results"]["accuracy"]["values"] == [0.7, 0.8, 0.6]
    assert facts["results"]["accuracy"]["mean"] == pytest.approx(0.7)
    assert facts["results"]["accuracy"]["std"] == pytest.approx(0.1)  # sqrt((0 + 0.01 + 0.01) / 2)
    assert facts["passes"] == pytest.approx(90 + 20 / 3)
    assert facts["cost_ratio"] == pytest.approx((90 + 20 / 3) / 300)
    assert facts["optimizer_steps"] == 9
    assert facts_of(runs[0])["results"]["accuracy"] == {"mean": 0.7, "std": None, "values": [0.7]}
    assert json.loads(json.dumps(facts)) == facts


def test_spread_of_several_seeds():
    card = card_of_report(seeds(), ModelCardData())
    assert "| accuracy | 0.7 ± 0.1 | 0.7, 0.8, 0.6 |" in section(card, "Results")
    assert "means of 3 runs that differ in their seed alone (0, 1, 2)" in card.content
    assert "| seed | 0, 1, 2 |" in section(card, "Training")
    assert "One run, one seed" not in section(card, "Limits")
    assert card.data["hf_dynprune"]["seeds"] == [0, 1, 2]


def test_comparison_with_full_and_short_run():
    full = seeds(FullData(), (0.9, 0.95, 0.97))
    for run in full:
        run.epochs = [
            replace(record, backward_passes=100, forward_passes=100, optimizer_steps=10)
            for record in run.epochs
        ]
    short = replace(full[0], num_epochs=1.0, epochs=full[0].epochs[-1:])
    card = card_of_report(seeds(), ModelCardData(), full=full, short=short)
    table = section(card, "Against the full run and the short run")
    for row in (
        "| | this run | full run | short run |",
        "| epochs | 3 | 3 | 1 |",
        "| seeds | 0, 1, 2 | 0, 1, 2 | 0 |",
        "| cost | 0.300 | 1.000 | 0.333 |",
        "| optimizer steps | 9 | 30 | 10 |",
        "| accuracy | 0.7 ± 0.1 | 0.94 ± 0.036 | 0.9 |",
    ):
        assert row in table
    assert "| optimizer steps | 9 | 30 |" in section(card, "What it cost")
    assert "compare it with a short run" not in section(card, "Limits")
    only = card_of_report(seeds(), ModelCardData(), short=short)
    assert "full run" not in section(only, "Against the short run").partition("Cost is")[0]
    assert "| seconds, training | 0.00 | not measured |" in section(only, "What it cost")
    assert "Against" not in card_of_report(seeds(), ModelCardData()).content


@pytest.mark.parametrize(
    ("runs", "compared", "message"),
    [
        ([], {}, "There is no report"),
        ([0, 0], {}, "Two reports of the run have the seed 0"),
        ([0, UCB(keep_ratio=0.5)], {}, r"differ in more than the seed \(keep_ratio: 0.3 and 0.5\)"),
        (
            [0],
            {"full": UCB(keep_ratio=0.3)},
            "The full run is one of 'ucb' and 3 epochs: wanted is 'full'",
        ),
        (
            [0],
            {"short": FullData()},
            "The short run is one of 'full' and 3 epochs: .* fewer than 3 epochs",
        ),
        ([0], {"full": 99}, "The full run has 99 samples, the run 100"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(runs, compared, message):
    def report(of, seed):
        if isinstance(of, int):
            return a_report(FullData(), num_samples=of) if of else a_report()
        return a_report(of, seed=seed)

    with pytest.raises(ValueError, match=message):
        facts_of(
            [report(of, seed) for seed, of in enumerate(runs)],
            **{name: report(of, 0) for name, of in compared.items()},
        )


def test_picture():
    full = a_report(FullData())
    comparison = picture_of(seeds(), full=full)
    assert comparison.axes[0].get_ylabel().startswith("eval accuracy")
    selection = picture_of(seeds())
    assert selection.axes[0].get_xlabel() == "times kept (choices)"
    assert picture_of(replace(full, selection={})) is None
    for record in full.epochs:
        record.metrics = {"test_accuracy": 0.5}
    assert picture_of(seeds(), full=full) is None


# ---- snippets ------------------------------------------------------------------------------------


def test_loading_snippet_loads(trainer, tmp_path, monkeypatch):
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
    repeat = section(card_of_trainer(trainer), "How to repeat")
    assert "```bash\npython recipes/mine.py --seed 5\n```" in repeat
    assert "TrainingArguments" not in repeat


def test_paths_of_this_machine_are_not_told():
    report = a_report()
    report.policy = {
        **StaticPruning(None, keep_ratio=0.3, keep="random").to_dict(),
        "scores": "/home/me/scores.parquet",
    }
    report.policy.update(keep="hardest", digest="0123")
    card = card_of_report(report, ModelCardData())
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
        assert load.startswith("import hf_dynprune.vision") == needs_import
        assert "AutoModelForImageClassification.from_pretrained(name)" in load
        assert "AutoImageProcessor.from_pretrained(name)" in load
