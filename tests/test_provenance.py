"""A report says what was trained on what, and a dataset with other labels is told apart."""

import json

import datasets
import numpy as np
import pytest
import torch
from tiny import arguments, images, trainer, vit
from transformers import TrainerCallback, ViTForImageClassification

from hf_dynprune import UCB, FullData, PruningReport, RandomPruning
from hf_dynprune.identity import dataset_fingerprint
from hf_dynprune.provenance import (
    ARGUMENTS,
    has_labels,
    hub_dataset,
    labels_checksum,
    labels_of,
    tasks_of,
)


def test_a_run_notes_what_it_trained_on_what(tmp_path):
    data = images()
    run = trainer(tmp_path, data=data, pruning=RandomPruning(0.5), learning_rate=0.03)
    assert run.pruning_report.provenance == {}  # nothing was trained yet
    run.train()
    report = run.pruning_report
    found = report.provenance
    assert found["model_class"] == "ViTForImageClassification"
    assert found["task"] == "image-classification"
    assert "model" not in found  # random weights
    labels = np.array(data["labels"])
    assert found["dataset"] == {
        "fingerprint": dataset_fingerprint(data),
        "labels": labels_checksum(labels),
    }
    assert found["arguments"]["learning_rate"] == 0.03
    assert set(found["arguments"]) == set(ARGUMENTS)
    report.save(tmp_path / "report.json")
    assert PruningReport.load(tmp_path / "report.json").provenance == found
    summary = report.summary()
    assert "ViTForImageClassification" in summary["model"]
    assert found["dataset"]["fingerprint"] in summary["dataset"]


def test_a_loaded_model_is_noted_by_name_and_not_by_path(tmp_path):
    vit().save_pretrained(tmp_path / "private" / "base")
    model = ViTForImageClassification.from_pretrained(tmp_path / "private" / "base")
    run = trainer(tmp_path / "run", model=model, pruning=UCB(0.4))
    run.train()
    assert run.pruning_report.provenance["model"] == "base"
    assert str(tmp_path) not in json.dumps(run.pruning_report.provenance)


def test_a_run_that_is_continued_notes_its_own_arguments(tmp_path):
    run = trainer(tmp_path, pruning=UCB(0.4), save_strategy="epoch", num_train_epochs=2)
    run.train()
    longer = trainer(tmp_path, pruning=UCB(0.4), num_train_epochs=3)
    longer.train(resume_from_checkpoint=True)
    assert longer.pruning_report.provenance["arguments"]["num_train_epochs"] == 3


def test_arguments_are_fields_of_the_trainer(tmp_path):
    assert [name for name in ARGUMENTS if not hasattr(arguments(tmp_path), name)] == []


def test_tasks():
    assert tasks_of("BertForSequenceClassification") == ["text-classification"]
    assert tasks_of("Net") == []


class Wrapped(torch.utils.data.Dataset):
    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __len__(self):
        return 3


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (Wrapped(labels=torch.tensor([2, 0, 1])), [2, 0, 1]),
        (Wrapped(targets=[2, 0, 1]), [2, 0, 1]),
        (Wrapped(targets=np.array([2, 0, 1], np.uint8)), [2, 0, 1]),
        (Wrapped(labels=[0.5, 1.0, 2.0]), None),
        (Wrapped(labels=[0, 1]), None),
        (Wrapped(labels=["a", "b", "c"]), None),
        (Wrapped(labels="abc"), None),
        (Wrapped(labels=[[0], [1, 2], [3]]), None),
        (Wrapped(), None),
        (datasets.Dataset.from_dict({"label": [2, 0, 1]}), [2, 0, 1]),
        (datasets.Dataset.from_dict({"label": [2, 0, 1]}).select([1, 0]), [0, 2]),
        (datasets.Dataset.from_dict({"label": [2, 0, 1]}).with_transform(lambda b: {}), [2, 0, 1]),
        (datasets.Dataset.from_dict({"labels": [2, 0], "label": [1, 1]}), [2, 0]),
        (datasets.Dataset.from_dict({"labels": [2, None]}), None),
        (datasets.Dataset.from_dict({"labels": [[2, 0], [1]]}), None),
        (datasets.Dataset.from_dict({"labels": ["a", "b"]}), None),
        (datasets.Dataset.from_dict({"text": ["a", "b"]}), None),
    ],
)
def test_labels_of_a_dataset(dataset, labels):
    found = labels_of(dataset)
    assert (None if found is None else found.tolist()) == labels


def test_labels_are_found_in_any_column_and_only_in_their_order():
    checksum = labels_checksum(np.array([2, 0, 1]))
    columns = {"text": ["a", "b", "c"], "coarse": [1, 0, 0], "fine": [2, 0, 1]}
    data = datasets.Dataset.from_dict(columns)
    kinds = datasets.Features({**data.features, "fine": datasets.Value("uint8")})
    assert has_labels(data, checksum)
    assert has_labels(data.cast(kinds), checksum)
    assert not has_labels(data.select([0, 2, 1]), checksum)
    assert not has_labels(data.remove_columns("fine"), checksum)


def test_a_dataset_that_is_not_of_the_hub():
    assert hub_dataset(images()) == hub_dataset([1]) == {}


class Lengths(TrainerCallback):
    """(length when an epoch begins, batches that it then has) of each epoch"""

    def __init__(self):
        self.seen = []

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.seen.append([len(train_dataloader), 0])

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen[-1][1] += 1


@pytest.mark.parametrize(
    ("policy", "lengths"),
    [
        (RandomPruning(0.5), [5, 5, 5]),
        (UCB(0.5, first=1), [10, 5, 5]),
        (UCB(0.3, period=2, last=0.4), [3, 3, 10]),
        (FullData(), [10, 10, 10]),
    ],
)
def test_a_callback_sees_the_length_of_the_epoch_that_begins(policy, lengths, tmp_path):
    found = Lengths()
    run = trainer(
        tmp_path,
        pruning=policy,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=lengths[0] + 2,
        extra={"callbacks": [found]},
    )
    run.train()
    assert found.seen == [[length, length] for length in lengths]
    found.seen = []
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{lengths[0] + 2}"))
    (length, rest), *others = found.seen
    assert (length, rest) == (lengths[1], lengths[1] - 2)
    assert others == [[lengths[2], lengths[2]]]
