"""sentence-transformers' trainers with pruning: kinds of losses, what is refused.

What holds for all trainers of libraries is in test_library_trainers.py.
"""

import inspect
from dataclasses import replace

import datasets
import pytest
import torch
from library_trainers import CASES, N, cross_losses, losses, rows, sentences, texts
from sentence_transformers import CrossEncoderTrainer, SentenceTransformerTrainer
from sentence_transformers.base.sampler import BatchSamplers
from tiny import arguments, bert, same_weights

from hf_dynprune import UCB, DynamicPruningMixin, FullData, RandomPruning
from hf_dynprune.embedding import EmbeddingPruningMixin
from hf_dynprune.loss_side import SampleLossMixin

STILL = {"learning_rate": 0.0, "num_train_epochs": 1}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def case(loss, *, kind="sentences", **columns):
    """A trainer with a loss, on random texts in the columns."""
    data = {name: values if values is not None else (2, 7) for name, values in columns.items()}
    return replace(CASES[kind], data=lambda: rows(**data), more=lambda model: {"loss": loss(model)})


number = lambda i: (i * 7 % 10) / 10  # noqa: E731
either = lambda i: i % 2  # noqa: E731
vector = lambda i: torch.rand(16, generator=torch.Generator().manual_seed(i)).tolist()  # noqa: E731

OWN = {
    "contrastive": case(losses.ContrastiveLoss, a=None, b=None, label=either),
    "triplet": case(losses.TripletLoss, a=None, b=None, c=None),
    "mse": case(losses.MSELoss, a=None, label=vector),
    "margin": case(losses.MarginMSELoss, a=None, b=None, c=None, label=number),
    "softmax": case(lambda model: losses.SoftmaxLoss(model, 16, 2), a=None, b=None, label=either),
    "matryoshka": case(
        lambda model: losses.MatryoshkaLoss(model, losses.CosineSimilarityLoss(model), [16, 8]),
        a=None,
        b=None,
        label=number,
    ),
    "cross mse": case(cross_losses.MSELoss, kind="cross-encoder", a=None, b=None, label=number),
}
IN_BATCH = {
    "negatives": case(losses.MultipleNegativesRankingLoss, a=None, b=None),
    "negatives both ways": case(
        lambda model: losses.MultipleNegativesRankingLoss(
            model,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        ),
        a=None,
        b=None,
    ),
    "hardest": case(losses.BatchHardTripletLoss, a=None, label=either),
    "cross negatives": case(
        cross_losses.MultipleNegativesRankingLoss, kind="cross-encoder", a=None, b=None
    ),
}


class Regularised(losses.CosineSimilarityLoss):
    """Adds what no row has, as the losses of sparse encoders do."""

    def compute_loss_from_embeddings(self, embeddings, labels):
        flops = embeddings[0].mean(0).square().sum()
        return super().compute_loss_from_embeddings(embeddings, labels) + flops


SHARED = {
    "regularised": case(Regularised, a=None, b=None, label=number),
    "cosent": case(losses.CoSENTLoss, a=None, b=None, label=number),
    "angle": case(losses.AnglELoss, a=None, b=None, label=number),
    "online": case(losses.OnlineContrastiveLoss, a=None, b=None, label=either),
    "cached": case(losses.CachedMultipleNegativesRankingLoss, a=None, b=None),
    "summed": case(
        lambda model: losses.ContrastiveLoss(model, size_average=False),
        a=None,
        b=None,
        label=either,
    ),
}


def numbers(run, indices):
    """The loss that sentence-transformers gives a batch, and what we see of it."""
    model, collator = run.model.eval(), run.data_collator
    batch = collator([run.train_dataset[i] for i in indices])
    loss, outputs = run._own_loss(model, batch)
    return loss, run.loss_rule.losses(outputs, batch, 0.0, None)


# ---- what we lean on -----------------------------------------------------------------------------


def test_the_seams_of_sentence_transformers():
    """If this fails, read the compute_loss of sentence-transformers again."""
    for cls in (SentenceTransformerTrainer, CrossEncoderTrainer):
        parameters = list(inspect.signature(cls.compute_loss).parameters)
        assert parameters == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    model = sentences()
    assert losses.CachedMultipleNegativesRankingLoss(model).uses_gradient_cache
    assert not getattr(losses.CosineSimilarityLoss(model), "uses_gradient_cache", False)
    assert "sentence_embedding" in model(model.preprocess(["w3 w4"]))


# ---- kinds of losses -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_losses_of_single_rows(name, tmp_path):
    run = OWN[name].make(tmp_path, pruning=UCB(0.5), **STILL)
    assert run.depends_on_batch is False
    loss, found = numbers(run, range(8))
    torch.testing.assert_close(found.train.mean(), loss, **CLOSE)
    run.model.eval()
    with torch.no_grad():
        batches = [run.data_collator([run.train_dataset[i]]) for i in range(8)]
        alone = torch.stack(
            [OWN[name].stock.compute_loss(run, run.model, batch) for batch in batches]
        )
    torch.testing.assert_close(found.plain, alone, **CLOSE)
    assert alone.std() > 1e-3 * alone.abs().mean()


def test_what_the_size_of_a_gradient_follows_from(tmp_path):
    cases = {name: OWN[name] for name in ("mse", "softmax", "triplet")}
    cases["negatives"] = IN_BATCH["negatives"]
    found = {
        name: str(each.make(tmp_path, pruning=UCB(0.5), **STILL)._magnitude())
        for name, each in cases.items()
    }
    assert found == {
        "mse": "sqrt(loss)",
        "softmax": "1 - exp(-loss)",
        "triplet": "None",
        "negatives": "1 - exp(-loss)",
    }


@pytest.mark.parametrize("name", IN_BATCH)
def test_losses_that_depend_on_the_batch_say_so(name, tmp_path, caplog):
    """Row i has its number in the batch, wherever it stands in it."""
    run = IN_BATCH[name].make(tmp_path, pruning=UCB(0.5), **STILL)
    assert run.depends_on_batch is True
    assert any(type(run.loss).__name__ in record.getMessage() for record in caplog.records)
    torch.manual_seed(0)
    few = list(range(5)) if name == "cross negatives" else list(range(8))  # the others are drawn
    loss, found = numbers(run, few)
    torch.testing.assert_close(found.train.mean(), loss, **CLOSE)
    turned = numbers(run, few[::-1])[1]
    torch.testing.assert_close(turned.plain.flip(0), found.plain, **CLOSE)
    assert len(set(found.plain.tolist())) == len(few)


def test_in_batch_negatives_are_scored_in_their_batches(tmp_path):
    """At learning rate 0 the score of each row is its number in the batch that it was in."""
    seen = {}

    class Noting(CASES["sentences"].pruned):
        def batch_signals(self, names, outputs, inputs, found):
            seen.update(zip(self._of_step[0].tolist(), found.plain.tolist(), strict=True))
            return super().batch_signals(names, outputs, inputs, found)

    run = replace(IN_BATCH["negatives"], pruned=Noting).make(
        tmp_path, pruning=UCB(0.5, first=1), **STILL
    )
    run.train()
    assert sorted(seen) == list(range(N))
    assert run.pruner.table["mean"].tolist() == pytest.approx([seen[i] for i in range(N)])
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    sizes = [8, 8, 4]
    total = sum(size * loss for size, loss in zip(sizes, logged, strict=True))
    assert total == pytest.approx(sum(seen.values()), rel=1e-3)


@pytest.mark.parametrize("name", SHARED)
def test_losses_without_a_number_for_each_row(name, tmp_path):
    with pytest.raises(ValueError, match=r"batch_mean"):
        SHARED[name].make(tmp_path, pruning=UCB(0.5))
    random = SHARED[name].make(tmp_path, pruning=RandomPruning(0.5), num_train_epochs=1)
    random.train()
    assert random.loss_rule is None
    assert random.pruning_report.cost_ratio == pytest.approx(0.5)


def test_a_loss_that_sorts_its_rows_is_refused(tmp_path):
    class Sorted(losses.CosineSimilarityLoss):
        def compute_loss_from_embeddings(self, embeddings, labels):
            cosine = torch.cosine_similarity(*embeddings)
            return (cosine.sort().values - labels.sort().values).square().mean()

    with pytest.raises(ValueError, match="Sorted"):
        case(Sorted, a=None, b=None, label=number).make(tmp_path, pruning=UCB(0.5))


def test_the_loss_of_a_batch_can_be_taken(tmp_path):
    made = SHARED["cosent"]
    mean = {"per_sample_loss_fn": "batch_mean"}
    run = made.make(tmp_path, pruning=UCB(0.5, first=1), extra=mean, num_train_epochs=1)
    run.train()
    assert len(set(run.pruner.table["mean"].tolist())) == run.state.global_step == 3
    full = made.make(tmp_path, pruning=FullData(), extra=mean)
    stock = made.make(tmp_path, stock=True)
    for each in (full, stock):
        each.train()
    assert same_weights(full.model, stock.model)


def test_parts_of_a_loss_are_still_logged(tmp_path):
    """A loss module may return several named losses, which sentence-transformers adds up."""

    class Parts(losses.CosineSimilarityLoss):
        def compute_loss_from_embeddings(self, embeddings, labels):
            far = super().compute_loss_from_embeddings(embeddings, labels)
            return {"cosine": far, "length": 0.1 * embeddings[0].square().mean()}

    run = case(Parts, a=None, b=None, label=number).make(tmp_path, pruning=UCB(0.5, first=1))
    run.train()
    entry = run.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["cosine"] + entry["length"], abs=1e-3)
    assert run.depends_on_batch is False


# ---- refused -------------------------------------------------------------------------------------


def test_several_datasets_and_losses_are_refused(tmp_path):
    several = datasets.DatasetDict({"one": texts(8), "two": texts(8)})
    with pytest.raises(ValueError, match="one, two"):
        replace(CASES["sentences"], data=lambda: several).make(tmp_path, pruning=UCB(0.5))


@pytest.mark.parametrize("sampler", [BatchSamplers.NO_DUPLICATES, "group_by_label"])
def test_other_batches_are_refused(sampler, tmp_path):
    with pytest.raises(ValueError, match="batch_sampler="):
        CASES["sentences"].make(tmp_path, pruning=UCB(0.5), batch_sampler=sampler)


def test_a_function_of_outputs_is_refused(tmp_path):
    extra = {"per_sample_loss_fn": lambda outputs, inputs: outputs}
    with pytest.raises(ValueError, match="per_sample_loss_fn="):
        CASES["sentences"].make(tmp_path, pruning=UCB(0.5), extra=extra)


@pytest.mark.parametrize("name", ["sentences", "cross-encoder"])
def test_the_mixin_alone_says_what_to_use(name, tmp_path):
    mixed = type("Mixed", (DynamicPruningMixin, CASES[name].stock), {})
    with pytest.raises(ValueError, match=CASES[name].pruned.__name__):
        replace(CASES[name], pruned=mixed).make(tmp_path, pruning=UCB(0.5))


@pytest.mark.parametrize("mixin", [DynamicPruningMixin, SampleLossMixin, EmbeddingPruningMixin])
def test_a_class_that_is_no_trainer_is_refused(mixin, tmp_path):
    """Such as SetFit's, which has a loop of its own."""

    class Loop:
        def __init__(self, model, args):
            raise AssertionError("not reached")

    class Mixed(mixin, Loop):
        pass

    for pruning in (UCB(0.5), None):
        with pytest.raises(TypeError, match=f"{__name__}.Loop"):
            Mixed(model=bert(), args=arguments(tmp_path), pruning=pruning)
    with pytest.raises(TypeError, match=r"transformers\.Trainer"):
        type("Alone", (mixin,), {})(pruning=UCB(0.5))


# ---- card ----------------------------------------------------------------------------------------


def test_the_card(tmp_path):
    run = CASES["sentences"].make(tmp_path, pruning=UCB(0.5))
    run.train()
    run.save_model()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert {"- sentence-transformers", "- ucb"} <= set(card.splitlines())
    repeating = card.split("## How to repeat")[1]
    assert "from hf_dynprune.embedding import DynamicPruningSentenceTransformer" in repeating
    assert "    loss=loss," in repeating
    assert "per_sample_loss_fn" not in repeating
