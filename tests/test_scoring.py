"""Scoring passes: they give the right number for each sample and change nothing."""

import random

import numpy as np
import pytest
import torch
from tiny import (
    KnownLoss,
    every_checkpoint,
    images,
    known_losses,
    recorded,
    same_weights,
    texts,
    tiny_models,
    trainer,
    values,
    vit,
)

from hf_dynprune import UCB, EpochPlan, EpsilonGreedy, FullData, PruningPolicy
from hf_dynprune.losses import RULES
from hf_dynprune.policies import KAKURENBO
from hf_dynprune.scoring import has_batch_norm, loss_left_out, score_samples, scoring_state
from hf_dynprune.table import Last


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def network():
    torch.manual_seed(0)
    layers = (
        torch.nn.Linear(3, 4),
        torch.nn.BatchNorm1d(4),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(4, 2),
    )
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_leaves_modes_buffers_and_random_states(mode, fails):
    model, x = network(), torch.randn(8, 3)
    model.train()
    model[1].eval()  # as people freeze a norm
    before, buffers = (
        random_states(),
        {name: buffer.clone() for name, buffer in model.named_buffers()},
    )
    try:
        with scoring_state(model, mode, seed=5), torch.no_grad():
            assert all(module.training == (mode == "train") for module in model.modules())
            model(x)
            random.random(), np.random.rand()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [module.training for module in model] == [True, False, True, True]
    assert random_states() == before
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


def test_a_pass_is_a_function_of_its_seed():
    model, x = network(), torch.randn(8, 3)

    def outcome(seed):
        with scoring_state(model, "train", seed), torch.no_grad():
            return model(x), random.random(), np.random.rand()

    torch.manual_seed(1)
    one = outcome(7)
    torch.manual_seed(2)
    two, three = outcome(7), outcome(8)
    assert torch.equal(one[0], two[0])
    assert one[1:] == two[1:]
    assert not torch.equal(one[0], three[0])
    assert one[1:] != three[1:]


def test_the_loss_is_left_out_of_models_that_have_it_as_a_property_and_put_back():
    for name, left_out in (("llama causal", True), ("vit", True), ("bert", False), ("t5", False)):
        make, _ = tiny_models()[name]
        model = make()
        own = model.loss_function
        with loss_left_out(model) as left:
            assert left == left_out
            assert (model.loss_function is own) == (not left_out)
        assert model.loss_function is own
    with loss_left_out(None) as left:
        assert not left


# ---- in the Trainer ------------------------------------------------------------------------------


def means_at_choices(run):
    """Train, and note the means in the table when each plan is made."""
    seen = []
    begin = run._make_pruner

    def make(shape):
        pruner = begin(shape)
        choose = pruner._choose

        def noting(epoch, progress):
            seen.append(pruner.table["mean"].clone())
            return choose(epoch, progress)

        pruner._choose = noting
        return pruner

    run._make_pruner = make
    run.train()
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("scoring", ["all", "dropped"])
def test_each_score_is_that_of_its_sample(scoring, workers, tmp_path):
    extra = {"per_sample_loss_fn": known_losses}
    run = trainer(
        tmp_path,
        model=KnownLoss(),
        data=values(30),
        pruning=UCB(keep_ratio=0.3, scoring=scoring),
        extra=extra,
        dataloader_num_workers=workers,
    )
    run.train()
    torch.testing.assert_close(run.pruner.table["mean"], torch.arange(1.0, 31.0))
    passes = [30, 30, 30] if scoring == "all" else [0, 21, 21]
    assert [record.scoring_passes for record in run.pruning_report.epochs] == passes
    assert run.pruning_report.cost_ratio == pytest.approx((3 * 9 + sum(passes) / 3) / 90)


@pytest.mark.parametrize("name", tiny_models())
def test_all_in_eval_mode_scores_the_model_as_evaluation_sees_it(name, tmp_path):
    make, data = tiny_models(12)[name]
    model = make()
    run = trainer(
        tmp_path,
        model=model,
        data=data,
        pruning=UCB(0.5, decay=1.0, scoring="all"),
        num_train_epochs=1,
    )
    (scores,) = means_at_choices(run)
    fresh = make().eval()
    for i in range(12):
        batch = {key: torch.as_tensor(value)[None] for key, value in data[i].items()}
        with torch.no_grad():
            assert scores[i].item() == pytest.approx(fresh(**batch).loss.item(), rel=1e-4)


def test_in_train_mode_dropout_acts_and_in_eval_mode_it_does_not(tmp_path):
    scores = {}
    for mode in ("eval", "train"):
        policy = UCB(0.5, decay=1.0, scoring="all", scoring_mode=mode)
        run = trainer(tmp_path, model=vit(dropout=0.5), pruning=policy, num_train_epochs=1)
        (scores[mode],) = means_at_choices(run)
    plain = trainer(
        tmp_path, model=vit(), pruning=UCB(0.5, decay=1.0, scoring="all"), num_train_epochs=1
    )
    (expected,) = means_at_choices(plain)
    torch.testing.assert_close(scores["eval"], expected)
    assert (scores["train"] - expected).abs().mean() > 0.01


def fixed(scoring, mode=None):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Fixed(PruningPolicy):
        memory = Last("loss")

        def planned_size(self, n, epoch, progress):
            return n // 2

        def plan(self, choice):
            alternate = torch.arange(choice.epoch % 2, choice.n, 2)
            return EpochPlan(alternate[: choice.n // 2])

    return Fixed(scoring=scoring, scoring_mode=mode)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize(
    ("scoring", "mode"), [("all", "eval"), ("all", "train"), ("dropped", None)]
)
def test_scoring_passes_leave_the_training_as_it_is(name, scoring, mode, tmp_path):
    """They leave weights, BatchNorm statistics and the random numbers of dropout."""
    runs = []
    for policy in (fixed("trained"), fixed(scoring, mode)):
        if name == "vit":
            model = vit(dropout=0.1)
        else:
            import transformers

            torch.manual_seed(0)
            sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
            model = transformers.ResNetForImageClassification(
                transformers.ResNetConfig(**sizes, num_labels=4)
            )
        runs.append(trainer(tmp_path, model=model, data=images(24), pruning=policy))
        runs[-1].train()
    assert same_weights(runs[0].model, runs[1].model)
    assert runs[1].pruning_report.totals["scoring_passes"] > 0


@pytest.mark.parametrize(
    "policy",
    [
        UCB(0.4, scoring="all", scoring_mode="train", first=1),
        EpsilonGreedy(0.4, scoring="dropped"),
        KAKURENBO(max_hidden=0.5, min_confidence=0.2),
    ],
)
def test_resuming_from_any_checkpoint_scores_the_same(policy, tmp_path, reliability):
    settings = {
        "num_train_epochs": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 6,
    }

    def make(folder):
        model = vit(dropout=0.1)
        return trainer(folder, model=model, data=images(26), pruning=policy, **settings)

    for run in every_checkpoint(make, tmp_path):
        assert run.pruning_report.totals["scoring_passes"] > 0
        reliability("resume policies")


def test_a_scoring_dataset_is_what_passes_see(tmp_path):
    doubled = values(30).map(lambda row: {"value": 2 * row["value"]}).with_format("torch")
    extra = {"per_sample_loss_fn": known_losses, "scoring_dataset": doubled}
    policy = UCB(keep_ratio=0.3, decay=1.0, scoring="all")
    run = trainer(tmp_path, model=KnownLoss(), data=values(30), pruning=policy, extra=extra)
    batches = recorded(run)
    run.train()
    torch.testing.assert_close(run.pruner.table["mean"], 2 * torch.arange(1.0, 31.0))
    assert sorted(i for batch in batches[:2] for i in batch) == list(range(21, 30))
    with pytest.raises(ValueError, match=r"29 samples.* 30"):
        trainer(
            tmp_path,
            model=KnownLoss(),
            data=values(30),
            pruning=policy,
            extra={**extra, "scoring_dataset": values(29)},
        )


def test_scores_of_padded_texts_and_label_smoothing_are_plain_losses(tmp_path):
    make, _ = tiny_models()["bert"]
    data = texts(n=12, padded=True)
    policy = UCB(0.5, decay=1.0, scoring="all")
    plain = means_at_choices(
        trainer(tmp_path, model=make(), data=data, pruning=policy, num_train_epochs=1)
    )
    run = trainer(
        tmp_path,
        model=make(),
        data=data,
        pruning=policy,
        num_train_epochs=1,
        label_smoothing_factor=0.3,
    )
    torch.testing.assert_close(means_at_choices(run)[0], plain[0])


def test_a_policy_without_scores_has_nothing_to_score():
    with pytest.raises(ValueError, match=r"scoring='all'.*FullData"):
        FullData(scoring="all")


def test_a_bar_shows_the_pass(tmp_path, capsys):
    run = trainer(tmp_path, pruning=UCB(0.5, scoring="all"), num_train_epochs=1, disable_tqdm=False)
    run.train()
    assert "scoring before epoch 0" in capsys.readouterr().err


def test_scoring_seconds_are_logged(tmp_path):
    run = trainer(tmp_path, pruning=UCB(0.5, scoring="dropped"))
    run.train()
    logged = [entry for entry in run.state.log_history if "pruning/scoring_seconds" in entry]
    assert len(logged) == 2
    assert all(entry["pruning/scoring_seconds"] > 0 for entry in logged)


# ---- batches that are not in order, or too small -------------------------------------------------


class Normed(torch.nn.Module):
    """A BatchNorm1d, which has no statistics of one sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = torch.nn.BatchNorm1d(192), torch.nn.Linear(192, 4)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.norm(pixel_values.flatten(1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def score(model, collator, n=9, mode="eval", dataset=None):
    return score_samples(
        model,
        images(n) if dataset is None else dataset,
        torch.arange(n).flip(0),
        ("loss",),
        rule=RULES["single_label"],
        collator=collator,
        batch_size=4,
        forward=lambda batch: model(**batch),
        mode=mode,
        progress=False,
    )["loss"]


def test_scores_of_a_collator_that_reorders_are_those_of_their_samples():
    def keeping(rows):
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    def tagged(rows):
        return keeping(rows[::-1])

    rows = [dict(row) for row in images(9)]
    assert torch.equal(score(vit(), tagged, dataset=rows), score(vit(), keeping, dataset=rows))
    assert not torch.equal(score(vit(), keeping), score(vit(), keeping).flip(0))


def test_a_scoring_pass_in_train_mode_fills_a_batch_of_one_for_batch_norm():
    def collator(rows):
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    scores = score(Normed(), collator, mode="train")
    assert scores.shape == (9,)
    assert scores.isfinite().all()


def test_batch_norm_that_a_model_keeps_in_eval_mode_does_not_count():
    class Frozen(Normed):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    assert has_batch_norm(Normed())
    assert not has_batch_norm(Frozen())
    assert not has_batch_norm(vit())
    model = Normed().eval()
    assert has_batch_norm(model)
    assert not any(module.training for module in model.modules())
