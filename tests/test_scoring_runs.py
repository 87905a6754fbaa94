"""score_dataset: each method against a plain computation; several runs, their files, their cost."""

import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from programs import torchrun
from tiny import arguments, bert, images, llama, resnet, same_weights, texts, trainer, vit
from torch import nn
from transformers import TrainerCallback

from hf_dynprune import (
    DynamicPruner,
    FullData,
    ReferenceLoss,
    Scores,
    StaticPruning,
    score_dataset,
)
from hf_dynprune.identity import dataset_fingerprint
from hf_dynprune.losses import RULES, derive_rule
from hf_dynprune.schedule import RunShape
from hf_dynprune.scoring import gradient_norms
from hf_dynprune.scoring_runs import METHODS, _claim, _folds
from hf_dynprune.table import Counts

N = 24
DATA = images(N)


def new_vit():
    """A ViT from the seed of the run, unlike that of `tiny`."""
    return transformers.ViTForImageClassification(vit().config)


def new_resnet():
    """A ResNet whose BatchNorm looks at the batch in training."""
    return transformers.ResNetForImageClassification(resnet().config)


def score(method, folder, model_init=new_vit, data=DATA, *, settings=(), **given):
    """Scores from few epochs and runs."""
    defaults = {
        "runs": None if "seeds" in given else 1,
        "epochs": 2,
        "output_dir": folder / "scores",
    }
    args = arguments(folder, num_train_epochs=3, seed=5, **dict(settings))
    return score_dataset(method, model_init, args, data, **{**defaults, **given})


class StopAfter(TrainerCallback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch >= self.epochs


def trained(folder, model_init=new_vit, epochs=2, seed=5, data=DATA, **extra):
    """The model after `epochs` epochs of a run of 3, trained by an ordinary trainer."""
    extra = {"model_init": model_init, "callbacks": [StopAfter(epochs)], **extra}
    run = trainer(
        folder / "plain", pruning=FullData(), data=data, seed=seed, num_train_epochs=3, extra=extra
    )
    if epochs:
        run.train()
    return run.model.eval()


@torch.no_grad()
def logits_and_labels(model, data=DATA):
    return model(pixel_values=data[:]["pixel_values"]).logits, data[:]["labels"]


def loop_of_norms(model, data, loss_of):
    """The gradient norms by one backward pass for each sample, over all trainable parameters."""
    norms = []
    for i in range(len(data)):
        batch = {name: torch.as_tensor(value)[None] for name, value in data[i].items()}
        trainable = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss_of(model, batch), trainable, allow_unused=True)
        norms.append(
            torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
        )
    return torch.stack(norms)


def own_loss(model, batch):
    return model(**batch).loss


# ---- each method by hand -------------------------------------------------------------------------


def margin(z, y):
    rows = zip(z.softmax(-1), y.tolist(), strict=True)
    return torch.stack(
        [max(p for c, p in enumerate(row) if c != label) - row[label] for row, label in rows]
    )


BY_HAND = {
    "el2n": lambda z, y: (z.softmax(-1) - F.one_hot(y, z.shape[-1])).square().sum(-1).sqrt(),
    "loss": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "margin": margin,
    "entropy": lambda z, y: torch.distributions.Categorical(logits=z).entropy(),
}


@pytest.mark.parametrize("model_init", [new_vit, new_resnet])
@pytest.mark.parametrize("method", BY_HAND)
def test_forward_scores(tmp_path, method, model_init):
    scores = score(method, tmp_path, model_init)
    expected = BY_HAND[method](*logits_and_labels(trained(tmp_path, model_init)))
    torch.testing.assert_close(scores.values, expected, rtol=1e-4, atol=1e-5)
    assert scores.method == method
    assert scores.fingerprint == dataset_fingerprint(DATA)


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("model_init", [new_vit, new_resnet])
def test_grand_is_a_loop_over_samples(tmp_path, model_init, epochs):
    scores = score("grand", tmp_path, model_init, epochs=epochs)
    expected = loop_of_norms(trained(tmp_path, model_init, epochs), DATA, own_loss)
    torch.testing.assert_close(scores.values, expected, rtol=1e-3, atol=1e-5)


def test_several_runs_are_averaged(tmp_path):
    both = score("el2n", tmp_path, seeds=[3, 8])
    each = [
        score("el2n", tmp_path, seeds=[seed], output_dir=tmp_path / str(seed)) for seed in (3, 8)
    ]
    torch.testing.assert_close(both.values, (each[0].values + each[1].values) / 2)
    assert not torch.equal(each[0].values, each[1].values)
    for one, seed in zip(each, (3, 8), strict=True):
        model = trained(tmp_path, seed=seed)
        torch.testing.assert_close(
            one.values, BY_HAND["el2n"](*logits_and_labels(model)), rtol=1e-4, atol=1e-5
        )
    assert both.provenance["seeds"] == [3, 8]
    assert (both.provenance["runs"], both.provenance["combined"]) == (2, "mean")


def test_scoring_dataset_is_what_is_scored(tmp_path):
    shown = images(N, seed=9)
    scores = score("loss", tmp_path, scoring_dataset=shown)
    expected = BY_HAND["loss"](*logits_and_labels(trained(tmp_path), shown))
    torch.testing.assert_close(scores.values, expected, rtol=1e-4, atol=1e-5)
    assert scores.fingerprint == dataset_fingerprint(DATA)  # what is pruned


def test_learning_rates_are_those_of_the_whole_run(tmp_path):
    """After 2 of 3 epochs the model differs from a run of 2, whose learning rate ends at 0."""
    extra = {"model_init": new_vit}
    short = trainer(
        tmp_path / "short", pruning=FullData(), data=DATA, seed=5, num_train_epochs=2, extra=extra
    )
    short.train()
    values = score("loss", tmp_path).values
    assert not torch.allclose(
        values, BY_HAND["loss"](*logits_and_labels(short.model.eval())), rtol=1e-4, atol=1e-5
    )


# ---- forgetting ----------------------------------------------------------------------------------

# correct at each presentation -> events
SEQUENCES = [
    ([1, 1, 1, 1, 1], 0),  # unforgettable
    ([0, 0, 1, 1, 1], 0),  # learned late
    ([1, 0, 1, 0, 1], 2),
    ([0, 1, 1, 0, 0], 1),
    ([1, 0, 0, 0, 0], 1),
    ([0, 1, 0, 1, 0], 2),
    ([0, 0, 0, 0, 0], 5),  # never learned: as many as there were presentations
    ([0, 0, 0, 0, 1], 0),
]


def test_forgetting_events_by_hand():
    shape = RunShape(len(SEQUENCES), 3, num_epochs=5)
    pruner = DynamicPruner(FullData(), shape, memory=Counts("correct"))
    for epoch in range(5):
        pruner.begin_epoch(epoch)
        for batch in torch.tensor(list(pruner.sampler)).split(3):
            pruner.observe(
                batch, {"correct": torch.tensor([float(SEQUENCES[i][0][epoch]) for i in batch])}
            )
    pruner.end_epoch()
    assert Counts.forgetting_events(pruner.table).tolist() == [events for _, events in SEQUENCES]
    assert pruner.report.cost_ratio == 1


def test_sample_left_out_of_an_epoch_is_not_less():
    pruner = DynamicPruner(FullData(), RunShape(3, num_epochs=3), memory=Counts("correct"))
    for epoch, presented in enumerate(([0, 1, 2], [0, 1], [1, 0])):
        pruner.begin_epoch(epoch)
        for sample in presented:
            pruner.observe(torch.tensor([sample]), {"correct": torch.zeros(1)})
    pruner.end_epoch()
    assert Counts.forgetting_events(pruner.table).tolist() == [3, 3, 3]  # none was ever right


class Script(nn.Module):
    """Is right or wrong about a sample at its t-th presentation in training, as the sample says."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.times = {}

    def forward(self, sample, correct, labels):
        highest = labels.clone()
        for row, i in enumerate(sample.tolist()):
            time = self.times.get(i, 0)
            if not correct[row][time]:
                highest[row] = (labels[row] + 1) % 3
            if self.training:
                self.times[i] = time + 1
        logits = F.one_hot(highest, 3).float() + 0 * self.weight
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_forgetting_events_are_counted_in_training_and_summed(tmp_path):
    rows = [
        {"sample": i, "correct": correct, "labels": i % 3}
        for i, (correct, _) in enumerate(SEQUENCES)
    ]
    data = datasets.Dataset.from_list(rows).with_format("torch")
    args = arguments(
        tmp_path, num_train_epochs=5, per_device_train_batch_size=3, remove_unused_columns=False
    )
    scores = score_dataset(
        "forgetting", Script, args, data, runs=2, per_sample_loss_fn="single_label"
    )
    assert scores.values.tolist() == [2 * events for _, events in SEQUENCES]
    assert scores.provenance["combined"] == "sum"
    assert scores.provenance["epochs"] == 5
    assert scores.path == str(tmp_path / "forgetting" / "scores.safetensors")


# ---- reference losses ----------------------------------------------------------------------------

HOLDOUT = images(16, seed=3)


def test_a_reference_is_trained_on_the_holdout_and_scores_the_training_samples(tmp_path):
    scores = score("reference", tmp_path, new_resnet, holdout=HOLDOUT, runs=2)
    each = [
        BY_HAND["loss"](*logits_and_labels(trained(tmp_path, new_resnet, seed=seed, data=HOLDOUT)))
        for seed in (5, 6)
    ]
    torch.testing.assert_close(scores.values, sum(each) / 2, rtol=1e-4, atol=1e-5)
    assert scores.fingerprint == dataset_fingerprint(DATA)
    about = scores.provenance
    assert about["forward_passes"] == about["backward_passes"] == 2 * 2 * 16
    assert about["scoring_passes"] == 2 * N
    assert about["passes"] == pytest.approx(2 * (2 * 16 + N / 3))
    assert about["settings"]["reference"] == "holdout"
    assert about["settings"]["trained on"] == dataset_fingerprint(HOLDOUT)


def test_a_reference_scores_what_it_is_shown(tmp_path):
    shown = images(N, seed=9)
    scores = score("reference", tmp_path, holdout=HOLDOUT, epochs=1, scoring_dataset=shown)
    expected = BY_HAND["loss"](*logits_and_labels(trained(tmp_path, epochs=1, data=HOLDOUT), shown))
    torch.testing.assert_close(scores.values, expected, rtol=1e-4, atol=1e-5)


def test_a_given_reference_is_not_trained(tmp_path):
    model = trained(tmp_path, epochs=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = score("reference", tmp_path, None, model=model, runs=None, epochs=None)
    torch.testing.assert_close(
        scores.values, BY_HAND["loss"](*logits_and_labels(model)), rtol=1e-4, atol=1e-5
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert scores.provenance["passes"] == pytest.approx(N / 3)
    assert scores.provenance["seeds"] == [5]
    other = trained(tmp_path, epochs=0)
    with pytest.raises(ValueError, match=r"settings\.json.*weights"):
        score("reference", tmp_path, None, model=other, runs=None, epochs=None)


class Rows(torch.utils.data.Dataset):
    """Rows that differ in each epoch, as augmented ones do."""

    def __init__(self, data):
        self.rows, self.epochs = [data[i] for i in range(len(data))], []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_two_halves_score_each_other(tmp_path, kind):
    data = DATA if kind == "datasets" else Rows(DATA)
    counted = Counted()
    scores = score(
        "reference", tmp_path, data=data, seeds=[8], epochs=None, callbacks=counted.callback()
    )
    assert counted.epochs == 2 * 3  # the whole run, twice
    folds = _folds("halves", DATA, None, 8)
    halves = [set(fold.scored.tolist()) for fold in folds]
    assert halves[0] | halves[1] == set(range(N))
    assert len(halves[0]) == len(halves[1]) == N // 2
    for fold, own in zip(folds, halves[::-1], strict=True):
        half = DATA.select(sorted(own))
        model = trained(tmp_path, seed=8, data=half, epochs=3)
        rows = DATA.select(fold.scored.tolist())
        expected = BY_HAND["loss"](*logits_and_labels(model, rows))
        torch.testing.assert_close(scores.values[fold.scored], expected, rtol=1e-4, atol=1e-5)
    assert scores.fingerprint == dataset_fingerprint(data)
    assert scores.provenance["passes"] == pytest.approx(3 * N + N / 3)
    assert scores.provenance["scoring_passes"] == N
    if kind == "torch":
        assert {0, 1, 2} <= set(data.epochs)


def test_a_run_by_reference_losses_is_charged_with_the_holdout(tmp_path):
    scores = score("reference", tmp_path, holdout=HOLDOUT, epochs=1)
    policy = ReferenceLoss(scores, keep_ratio=0.5)
    run = trainer(tmp_path / "run", data=DATA, pruning=policy, num_train_epochs=4)
    run.train()
    assert run.pruning_report.passes == pytest.approx(4 * N / 2 + 16 + N / 3)
    assert run.pruning_report.preparation["method"] == "reference"
    run.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- dynamic-data-pruning\n" in card
    assert "- reference-loss\n" in card


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "el2n", "holdout": HOLDOUT}, ValueError, "holdout= .*'el2n'"),
        ({"method": "loss", "model": vit()}, ValueError, "model= .*'loss'"),
        ({"holdout": HOLDOUT, "model": vit()}, ValueError, "holdout= and model="),
        ({"model": "vit"}, TypeError, "model is a str"),
        ({"model": vit()}, ValueError, "model_init="),
        ({"model": vit(), "model_init": None, "epochs": None}, ValueError, "runs=1"),
        ({"model": vit(), "model_init": None, "runs": None}, ValueError, "epochs=2"),
        ({"model_init": None}, TypeError, "NoneType"),
        ({"holdout": HOLDOUT.select([])}, ValueError, "0 samples"),
        ({"data": DATA.select([0])}, ValueError, "1 samples"),
        ({"holdout": HOLDOUT, "data": DATA.to_iterable_dataset()}, TypeError, "IterableDataset"),
        ({"holdout": HOLDOUT, "scoring_dataset": HOLDOUT}, ValueError, "16 samples.* 24"),
        ({"per_sample_loss_fn": "batch_mean"}, ValueError, "'reference'.*'batch_mean'"),
    ],
)
def test_wrong_references(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        score(**{"method": "reference", "folder": tmp_path, "callbacks": must_not_train(), **given})


# ---- gradient norms ------------------------------------------------------------------------------


def norms(model, data, rule=None, collator=transformers.default_data_collator, **settings):
    rule = derive_rule(model) if rule is None else rule
    defaults = {"batch_size": 5, "prepare": lambda batch: batch, "progress": False}
    return gradient_norms(
        model,
        data,
        torch.arange(len(data)),
        rule=rule,
        collator=collator,
        **{**defaults, **settings},
    )


def mean_over_terms(model, batch):
    losses = derive_rule(model).losses(model(**batch), batch, 0.0, model.config)
    return losses.train.sum() / losses.terms.sum()


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (bert, "single label"),
        (lambda: bert(problem_type="multi_label_classification"), "multi label"),
        (lambda: bert(num_labels=1), "regression"),
        (lambda: bert("TokenClassification"), "token classification"),
        (lambda: bert("QuestionAnswering", num_labels=2), "question answering"),
    ],
)
@pytest.mark.filterwarnings("ignore:BertFor.* cannot be vectorised")
def test_norms_of_all_tasks(make, task):
    model, data = make().eval(), texts(task, 7, padded=True)
    expected = loop_of_norms(model, data, mean_over_terms)
    torch.testing.assert_close(norms(model, data), expected, rtol=1e-3, atol=1e-5)


def test_model_that_cannot_be_vectorised_gives_the_same_and_says_so():
    """Its forward pass looks into its data, which vmap does not allow."""

    class LooksForImageClassification(transformers.ViTForImageClassification):
        def forward(self, pixel_values, **inputs):
            if bool((pixel_values == 12345).any()):
                raise AssertionError
            return super().forward(pixel_values, **inputs)

    plain = vit()
    looks = LooksForImageClassification(plain.config)
    looks.load_state_dict(plain.state_dict())
    with pytest.warns(
        UserWarning,
        match="LooksForImageClassification",
    ) as caught:
        slow = norms(looks, DATA)
    assert len(caught) == 1
    torch.testing.assert_close(slow, norms(plain, DATA), rtol=1e-4, atol=1e-6)


def test_it_is_said_once_before_the_runs(tmp_path):
    data = texts(n=6, padded=True)
    with pytest.warns(UserWarning, match="cannot be vectorised over samples") as caught:
        score("grand", tmp_path, lambda: bert(), data, runs=2, epochs=1)
    assert len(caught) == 1


def test_error_that_is_no_matter_of_vectorising_is_raised():
    def wrong(outputs, inputs):
        raise KeyError("no such output")

    with (
        pytest.warns(UserWarning, match="cannot be vectorised"),
        pytest.raises(KeyError, match="no such output"),
    ):
        norms(vit(), DATA, derive_rule(vit(), wrong))


def test_memory_is_bounded(monkeypatch):
    """With a limit of two gradients, a batch of five is split."""
    model = vit()
    expected = norms(model, DATA)
    held = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("hf_dynprune.scoring._GRADIENT_BYTES", 2 * held + 1)
    torch.testing.assert_close(norms(model, DATA), expected, rtol=1e-5, atol=1e-7)


def test_frozen_parameters_do_not_count():
    model = vit().eval()
    for parameter in model.vit.parameters():
        parameter.requires_grad_(False)
    values = norms(model, DATA)
    torch.testing.assert_close(values, loop_of_norms(model, DATA, own_loss), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        values, norms(model, DATA, last_layer=True), rtol=1e-4, atol=1e-6
    )  # what is left
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="ViTForImageClassification has no trainable parameters"):
        norms(model, DATA)


def test_nothing_of_the_model_is_changed():
    model = new_resnet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    norms(model, DATA)
    norms(model, DATA, last_layer=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)


class Linear(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.head = nn.Linear(5, 3, bias=bias)

    def forward(self, x, labels=None):
        return {"logits": self.head(x)}


@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_of_a_linear_model_is_all_of_it(bias):
    torch.manual_seed(0)
    model = Linear(bias)
    data = [{"x": torch.randn(5), "labels": torch.tensor(i % 3)} for i in range(7)]
    rule = RULES["single_label"]
    whole = norms(model, data, rule)
    torch.testing.assert_close(
        norms(model, data, rule, last_layer=True), whole, rtol=1e-5, atol=1e-7
    )
    x, y = torch.stack([row["x"] for row in data]), torch.stack([row["labels"] for row in data])
    slope = (model.head(x).softmax(-1) - F.one_hot(y, 3)).norm(dim=1)
    torch.testing.assert_close(
        whole, slope * (x.square().sum(1) + bias).sqrt(), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("make", [new_vit, new_resnet, bert])
def test_last_layer_is_the_gradient_of_the_last_layer(make):
    model = make().eval()
    data = texts(n=7, padded=True) if make is bert else DATA
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    expected = loop_of_norms(model, data, own_loss)
    torch.testing.assert_close(norms(model, data, last_layer=True), expected, rtol=1e-4, atol=1e-6)


def test_last_layer_that_is_not_there():
    class Scaled(Linear):
        def forward(self, x, labels=None):
            return {"logits": 2 * self.head(x)}

    data = [{"x": torch.randn(5), "labels": torch.tensor(0)}]
    with pytest.raises(
        ValueError,
        match=r"Scaled.*\(1, 3\)",
    ):
        norms(Scaled(True), data, RULES["single_label"], last_layer=True)


# ---- what is left of each run --------------------------------------------------------------------


class Counted:
    """Counts the runs that were trained, and can end one with an error."""

    def __init__(self, fail_at=None):
        self.epochs, self.fail_at = 0, fail_at

    def callback(self):
        counted = self

        class Count(TrainerCallback):
            def on_epoch_begin(self, args, state, control, **kwargs):
                counted.epochs += 1
                if counted.epochs == counted.fail_at:
                    raise KeyboardInterrupt("killed")

        return [Count()]


def test_finished_runs_are_not_made_again(tmp_path):
    first, second, third = Counted(), Counted(), Counted()
    two = score("el2n", tmp_path, runs=2, callbacks=first.callback())
    again = score("el2n", tmp_path, runs=2, callbacks=second.callback())
    assert (first.epochs, second.epochs) == (4, 0)
    assert torch.equal(two.values, again.values)
    assert two.provenance == again.provenance
    three = score("el2n", tmp_path, runs=3, callbacks=third.callback())
    assert third.epochs == 2
    assert three.provenance["seeds"] == [5, 6, 7]
    folder = tmp_path / "scores"
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {
        "settings.json",
        "scores.safetensors",
        *(f"run-{seed}.safetensors" for seed in (5, 6, 7)),
    }
    each = [Scores.load(folder / f"run-{seed}.safetensors") for seed in (5, 6, 7)]
    torch.testing.assert_close(three.values, torch.stack([one.values for one in each]).mean(0))
    assert Scores.load(folder / "scores.safetensors").digest == three.digest


@pytest.mark.parametrize("method", ["el2n", "forgetting"])
@pytest.mark.parametrize("fail_at", [2, 4])
def test_interrupted_run_goes_on(tmp_path, method, fail_at):
    """Killed in the second epoch of the first or second run: it ends like the undisturbed one."""
    settings = {"save_strategy": "epoch"}
    whole = score(method, tmp_path, runs=2, output_dir=tmp_path / "whole", settings=settings)
    killed, again = Counted(fail_at), Counted()
    with pytest.raises(KeyboardInterrupt):
        score(method, tmp_path, runs=2, settings=settings, callbacks=killed.callback())
    resumed = score(method, tmp_path, runs=2, settings=settings, callbacks=again.callback())
    assert killed.epochs - 1 + again.epochs == 4  # no epoch was trained twice
    assert torch.equal(resumed.values, whole.values)
    for name in ("forward_passes", "backward_passes", "scoring_passes", "passes"):
        assert resumed.provenance[name] == whole.provenance[name]


@pytest.mark.parametrize("method", ["el2n", "forgetting", "grand"])
def test_run_that_was_trained_but_not_scored(tmp_path, method):
    settings = {"save_strategy": "epoch"}
    whole = score(method, tmp_path, settings=settings)
    (tmp_path / "scores" / "run-5.safetensors").unlink()
    again = Counted()
    resumed = score(method, tmp_path, settings=settings, callbacks=again.callback())
    assert again.epochs == 0
    assert torch.equal(resumed.values, whole.values)
    assert resumed.provenance["passes"] == whole.provenance["passes"]


def test_without_checkpoints_an_interrupted_run_starts_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        score("el2n", tmp_path, callbacks=Counted(2).callback())
    again = Counted()
    scores = score("el2n", tmp_path, callbacks=again.callback())
    assert again.epochs == 2
    assert torch.equal(scores.values, score("el2n", tmp_path, output_dir=tmp_path / "other").values)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "loss"}, "method: 'el2n' there, 'loss' here"),
        ({"epochs": 1}, "epochs: 2 there, 1 here"),
        ({"data": images(N, seed=1)}, f"dataset: '{N} samples, .*' there, '{N} samples, .*' here"),
        (
            {"model_init": new_resnet},
            "model: 'ViTForImageClassification' there, 'ResNetForImageClassification' here; param",
        ),
        (
            {"settings": {"learning_rate": 0.5}},
            r"\(learning_rate: 0\.01 there, 0\.5 here\)",
        ),
        ({"settings": {"per_device_train_batch_size": 3}}, "global batch: 8 there, 3 here"),
    ],
)
def test_other_settings_are_refused(tmp_path, changed, message):
    score("el2n", tmp_path)
    with pytest.raises(ValueError, match=f"settings.json.*{message}"):
        score(**{"method": "el2n", "folder": tmp_path, **changed})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_settings_that_cannot_be_read(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path / "settings.json")):
        _claim(tmp_path, {"method": "el2n"})
    assert (tmp_path / "settings.json").read_text() == text


def test_gradients_of_a_split_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dynprune.scoring_runs.engine_of", lambda trainer: "an engine")
    with pytest.raises(ValueError, match=r"'grand'.*an engine"):
        score("grand", tmp_path, callbacks=must_not_train())
    assert len(score("el2n", tmp_path, epochs=0)) == N


def test_run_of_other_settings_that_was_moved_there(tmp_path):
    score("el2n", tmp_path)
    score("el2n", tmp_path, epochs=1, output_dir=tmp_path / "other")
    shutil.copy(tmp_path / "scores" / "run-5.safetensors", tmp_path / "other" / "run-5.safetensors")
    with pytest.raises(ValueError, match=r"run-5.safetensors.*epochs: 2 there, 1 here"):
        score("el2n", tmp_path, epochs=1, output_dir=tmp_path / "other")


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "forward", "backward", "scoring"),
    [("el2n", 2, 2, 1), ("forgetting", 2, 2, 0), ("grand", 3, 3, 0), ("grand-last-layer", 2, 2, 1)],
)
def test_passes_by_kind(tmp_path, method, forward, backward, scoring):
    """The passes over the data of each of two runs."""
    provenance = score(method, tmp_path, runs=2).provenance
    assert provenance["forward_passes"] == 2 * forward * N
    assert provenance["backward_passes"] == 2 * backward * N
    assert provenance["scoring_passes"] == 2 * scoring * N
    assert provenance["passes"] == pytest.approx(2 * N * (forward + 2 * backward + scoring) / 3)
    assert 0 < provenance["seconds"] < 600
    assert provenance["settings"]["model"] == "ViTForImageClassification"
    assert provenance["environment"]["versions"]["torch"] == torch.__version__


def test_pruned_run_is_charged_with_its_scores(tmp_path):
    scores = score("el2n", tmp_path, epochs=0)  # N / 3 passes
    run = trainer(
        tmp_path / "run",
        data=DATA,
        pruning=StaticPruning(scores, keep_ratio=0.5),
        num_train_epochs=4,
    )
    run.train()
    report = run.pruning_report
    assert report.passes == pytest.approx(4 * N / 2 + N / 3)
    assert report.cost_ratio == pytest.approx(0.5 + 1 / 12)
    assert report.preparation["method"] == "el2n"
    hardest = set(scores.values.topk(N // 2).indices.tolist())
    assert {i for i in range(N) if run.pruner.table["times_kept"][i]} == hardest
    run.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- static-data-pruning\n" in card
    assert " | 8 | 0 |\n" in card  # the passes for the scores


def test_scores_of_other_data_are_refused_by_the_trainer(tmp_path):
    policy = StaticPruning(score("el2n", tmp_path, epochs=0))
    with pytest.raises(ValueError, match=f"'{N} samples, .*'{N} samples, "):
        trainer(tmp_path, data=images(N, seed=1), pruning=policy)
    with pytest.raises(ValueError, match=rf"{N} samples.*{N - 1}"):
        trainer(tmp_path, data=images(N - 1), pruning=policy)


def test_pruned_run_resumes(tmp_path):
    policy = StaticPruning(score("el2n", tmp_path, epochs=0), keep_ratio=0.4)
    settings = {"data": DATA, "pruning": policy, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "run", **settings)
    whole.train()
    again = trainer(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert same_weights(again.model, whole.model)
    assert again.pruning_report.passes == whole.pruning_report.passes


# ---- what cannot be, before anything is trained --------------------------------------------------


def must_not_train():
    return Counted(fail_at=1).callback()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"method": "eln2"},
            ValueError,
            "'eln2'.*'el2n'.*'grand'",
        ),
        ({"method": "confidence"}, ValueError, "'confidence'"),
        (
            {"model_init": vit()},
            TypeError,
            "ViTForImageClassification",
        ),
        ({"model_init": None}, TypeError, "NoneType"),
        (
            {"epochs": 4},
            ValueError,
            "4 epochs.* 3 ",
        ),
        ({"epochs": None}, ValueError, "20 epochs.* 3 "),
        ({"epochs": -1}, ValueError, "epochs=-1 "),
        ({"epochs": 1.5}, TypeError, r"epochs=1\.5 "),
        (
            {"method": "forgetting", "epochs": 0},
            ValueError,
            "epochs=0 .*1",
        ),
        ({"runs": 0}, ValueError, "runs=0 "),
        ({"seeds": []}, ValueError, r"seeds=\[\]"),
        ({"seeds": [1, 1]}, ValueError, r"seeds=\[1, 1\]"),
        ({"seeds": [1, 2], "runs": 3}, ValueError, "runs=3 .*2 seeds"),
        ({"seeds": ["a"]}, TypeError, "seed='a'"),
        ({"settings": {"max_steps": 7}}, ValueError, "max_steps=7"),
        (
            {"scoring_dataset": images(3)},
            ValueError,
            "3 samples.* 24",
        ),
        (
            {"data": datasets.Dataset.from_dict({"pixel_values": [], "labels": []})},
            ValueError,
            "0 samples",
        ),
        ({"data": DATA.to_iterable_dataset()}, ValueError, "IterableDataset"),
    ],
)
def test_wrong_arguments(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        score(**{"method": "el2n", "folder": tmp_path, "callbacks": must_not_train(), **given})


@pytest.mark.parametrize("method", ["el2n", "margin", "entropy", "forgetting", "grand-last-layer"])
@pytest.mark.parametrize("task", ["causal LM", "multi label", "regression"])
def test_task_without_the_signal(tmp_path, method, task):
    make = {
        "causal LM": lambda: llama(),
        "multi label": lambda: bert(problem_type="multi_label_classification"),
        "regression": lambda: bert(num_labels=1),
    }[task]
    given = {"data": texts(task, N, padded=True), "model_init": make, "callbacks": must_not_train()}
    if (method, task) in (("grand-last-layer", "multi label"), ("grand-last-layer", "regression")):
        with pytest.raises(KeyboardInterrupt):  # a classification head: it can be had
            score(method, tmp_path, **given)
        return
    with pytest.raises(
        ValueError, match=r"single-label classification|is for classification, and this task is"
    ):
        score(method, tmp_path, **given)


def test_batch_mean_has_no_loss_of_a_sample(tmp_path):
    given = {"per_sample_loss_fn": "batch_mean", "callbacks": must_not_train()}
    with pytest.raises(ValueError, match="method='loss' with per_sample_loss_fn='batch_mean'"):
        score("loss", tmp_path, **given)
    del given["callbacks"]
    grand = score("grand", tmp_path, epochs=0, **given)  # of batches of one sample
    torch.testing.assert_close(
        grand.values,
        loop_of_norms(trained(tmp_path, epochs=0), DATA, own_loss),
        rtol=1e-3,
        atol=1e-5,
    )


def test_scores_that_are_nan_name_the_run(tmp_path):
    bad = DATA[:]["pixel_values"].clone()
    bad[3] = float("nan")
    data = datasets.Dataset.from_dict(
        {"pixel_values": bad.tolist(), "labels": DATA[:]["labels"].tolist()}
    ).with_format("torch")
    with pytest.raises(ValueError, match=r"seed 5: 1 of 24 .*3"):
        score("loss", tmp_path, data=data, epochs=0)


def test_run_that_stops_early_is_not_scored(tmp_path):
    with pytest.raises(RuntimeError, match=r"seed 5 .* 1 of 2 epochs"):
        score("el2n", tmp_path, callbacks=[StopAfter(1)])


def test_args_are_left_as_they_are(tmp_path):
    args = arguments(tmp_path, num_train_epochs=3, seed=5, data_seed=7, eval_strategy="epoch")
    before = args.to_dict()
    score_dataset("loss", new_vit, args, DATA, runs=1, epochs=1)
    assert args.to_dict() == before
    assert (tmp_path / "loss" / "scores.safetensors").is_file()


def test_published_protocols():
    defaults = {name: (how.epochs, how.runs, how.combined) for name, how in METHODS.items()}
    assert defaults["el2n"] == (20, 10, "mean")
    assert defaults["grand"][1:] == (10, "mean")
    assert defaults["forgetting"] == (None, 5, "sum")
    assert defaults["reference"] == (None, 1, "mean")


# ---- several ranks -------------------------------------------------------------------------------

SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from test_scoring_runs import DATA, new_vit
from tiny import arguments
from hf_dynprune import score_dataset
from hf_dynprune.distributed import world

folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
args = arguments(
    folder,
    num_train_epochs=3,
    seed=5,
    per_device_train_batch_size=6 // ranks,
    optim="sgd",
    ddp_find_unused_parameters=False,
)
for method in ("el2n", "grand", "forgetting", "reference"):
    scores = score_dataset(method, new_vit, args, DATA, runs=2, epochs=2)
    saved = [scores.values, scores.provenance, scores.path]
    torch.save(saved, folder / f"{method}-{world()[0]}.pt")
if ranks > 1:
    torch.distributed.barrier()
    os._exit(0)  # as ranks.py does
"""


def test_two_ranks_score_what_one_scores(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    for ranks in ("1", "2"):
        (tmp_path / ranks).mkdir()
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "1"), "1"])
    exec(SCRIPT, {})
    done = torchrun(tmp_path / "script.py", tmp_path / "2", 2, ranks=2)
    assert done.returncode == 0, done.stderr
    for method in ("el2n", "grand", "forgetting", "reference"):
        alone = torch.load(tmp_path / "1" / f"{method}-0.pt")
        both = [torch.load(tmp_path / "2" / f"{method}-{rank}.pt") for rank in (0, 1)]
        assert torch.equal(both[0][0], both[1][0])
        torch.testing.assert_close(both[0][0], alone[0], rtol=1e-3, atol=1e-5)
        for name in ("forward_passes", "backward_passes", "scoring_passes", "passes"):
            assert both[0][1][name] == alone[1][name]
        assert both[0][2] == both[1][2] == str(tmp_path / "2" / method / "scores.safetensors")


# ---- the documentation ---------------------------------------------------------------------------


def test_program_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs" / "scores.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program, _ = [program for program in programs if "score_dataset" in program]
    monkeypatch.chdir(tmp_path)
    scope = {"model_init": new_vit, "args": arguments(tmp_path), "train": DATA}
    exec(program, scope)
    report = scope["trainer"].pruning_report
    assert report.cost_ratio == pytest.approx((3 / 2 + 2 * (2 + 1 / 3)) / 3)
    assert str(report.cost_ratio) in capsys.readouterr().out
    assert json.dumps(report.to_dict())
