"""Which sample a row of a batch belongs to: collators that keep, reorder, drop and draw."""

import random

import numpy as np
import pytest
import torch
from tiny import bert, trainer
from transformers import Trainer

from hf_dynprune import UCB, FullData, RandomPruning
from hf_dynprune.collating import carries_tags, moves_rows, positions_in, tagged


def rows(n=12):
    """Texts of different lengths."""
    generator = np.random.default_rng(0)
    lengths = generator.permutation(n) % 7 + 4
    return [
        {"input_ids": generator.integers(1, 40, length).tolist(), "labels": i % 3}
        for i, length in enumerate(lengths)
    ]


def padded(samples):
    width = max(len(sample["input_ids"]) for sample in samples)
    ids = [s["input_ids"] + [0] * (width - len(s["input_ids"])) for s in samples]
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": torch.tensor(ids), "labels": labels}


def longest_first(samples):
    return padded(sorted(samples, key=lambda sample: -len(sample["input_ids"])))


def backwards(samples):
    return padded(samples[::-1])


def rotated(samples):
    return padded([*samples[1:], samples[0]])


def shuffled(samples):
    return padded(random.sample(samples, len(samples)))


def masked(samples):
    batch = padded(samples)
    drawn = torch.rand(batch["input_ids"].shape) < 0.3
    return {**batch, "input_ids": batch["input_ids"].masked_fill(drawn, 2)}


def mixed(samples):
    """As mixup: each row has a share of another sample."""
    batch = padded(samples)
    inputs = batch["input_ids"].float()
    return {**batch, "input_ids": 0.7 * inputs + 0.3 * inputs.roll(1, 0)}


def popping(samples):
    """Changes its samples."""
    labels = torch.tensor([sample.pop("labels") for sample in samples])
    for sample in samples:
        sample["input_ids"] += [0] * (12 - len(sample["input_ids"]))
    return {"input_ids": torch.tensor([s["input_ids"] for s in samples]), "labels": labels}


def flat(samples):
    """As for an EmbeddingBag: the offset of a sample depends on those before it."""
    offsets = np.cumsum([0, *(len(sample["input_ids"]) for sample in samples[:-1])])
    labels = torch.tensor([sample["labels"] for sample in samples])
    ids = torch.tensor([i for sample in samples for i in sample["input_ids"]])
    return {"input_ids": ids, "offsets": torch.tensor(offsets), "labels": labels}


def joined(samples):
    return {"input_ids": torch.tensor([[i for sample in samples for i in sample["input_ids"]]])}


def own_numbers(samples):
    """Its random numbers have no seed."""
    batch = padded(samples)
    return {**batch, "labels": batch["labels"] + int.from_bytes(random.SystemRandom().randbytes(2))}


def with_tags(collator):
    def collate(samples):
        batch = collator(samples)
        if "sample_index" in samples[0]:
            ids = {tuple(s["input_ids"]): s["sample_index"] for s in samples}
            given = [tuple(t for t in row if t) for row in batch["input_ids"].tolist()]
            batch["sample_index"] = torch.tensor([ids[row] for row in given])
        return batch

    return collate


@pytest.mark.parametrize("n", [2, 3, 6, 12])
@pytest.mark.parametrize("collator", [longest_first, backwards, rotated, shuffled])
def test_a_collator_that_reorders_is_found_out(collator, n):
    samples = rows(n)
    if collator is longest_first:  # an order that it changes
        samples.sort(key=lambda sample: len(sample["input_ids"]))
    if collator is shuffled and n < 6:  # a draw may keep two samples
        return
    assert moves_rows(collator, samples) is True


@pytest.mark.parametrize("n", [2, 3, 6, 12])
@pytest.mark.parametrize("collator", [padded, masked, mixed, popping, flat])
def test_a_collator_that_keeps_the_order_is_not_refused(collator, n):
    samples = rows(n)
    assert moves_rows(collator, samples) is False
    assert samples == rows(n)


def pairs_of(collator):
    """Two rows of each sample, as trl's collator for preference data joins them."""

    def collate(samples):
        batch = collator(samples)
        ids = batch["input_ids"]
        return {"input_ids": torch.cat([ids, ids + 1])}

    return collate


def interleaved(samples):
    ids = padded(samples)["input_ids"]
    return {"input_ids": torch.stack([ids, ids + 1], 1).flatten(0, 1)}


def test_the_order_of_two_rows_of_each_sample():
    assert moves_rows(pairs_of(padded), rows(), 2) is False
    assert moves_rows(pairs_of(backwards), rows(), 2) is True
    assert moves_rows(interleaved, rows(), 2) is True
    for collator in (pairs_of(backwards), interleaved):  # nobody said how they are joined
        assert moves_rows(collator, rows()) is None


@pytest.mark.parametrize("collator", [joined, own_numbers])
def test_what_cannot_be_known_is_not_refused(collator):
    assert moves_rows(collator, rows()) is None
    assert moves_rows(padded, rows(1)) is None
    assert moves_rows(padded, {"input_ids": [1, 2]}) is None


def test_equal_samples_tell_nothing():
    same = [rows()[0]] * 4
    assert moves_rows(backwards, same) is False


def test_tags_come_through_or_not():
    assert carries_tags(with_tags(backwards), rows(), "sample_index")
    assert not carries_tags(backwards, rows(), "sample_index")  # it leaves unknown entries out
    assert not carries_tags(
        lambda samples: padded([dict(sorted(s.items())) for s in samples]), [], "x"
    )

    def strict(samples):
        assert set(samples[0]) == {"input_ids", "labels"}
        return padded(samples)

    assert not carries_tags(strict, rows(), "sample_index")

    def all_columns(samples):  # the tag would become a feature
        values = [[v for v in s.values() if isinstance(v, int)] for s in samples]
        return {"x": torch.tensor(values), "sample_index": torch.tensor([v[-1] for v in values])}

    assert not carries_tags(all_columns, rows(), "sample_index")


def test_samples_that_cannot_be_tagged():
    assert tagged([{"sample_index": 1}], "sample_index") is None
    assert tagged([(1, 2)], "sample_index") is None
    assert tagged({"x": [1]}, "sample_index") is None


@pytest.mark.parametrize("tags", [[0, 0], [0, 5], [-1, 0], [True, 0], "01", None, [0.0, 1.0]])
def test_tags_that_are_none(tags):
    assert positions_in({"t": tags}, "t", 2) is None


def test_looking_changes_no_random_state_and_no_generator():
    class Drawing:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(1)
            self.numpy = np.random.default_rng(1)

        def __call__(self, samples):
            torch.rand(1, generator=self.generator), self.numpy.random(), random.random()
            return masked(samples)

    collator = Drawing()
    states = [
        torch.get_rng_state(),
        torch.tensor(np.random.get_state()[1].astype(np.int64)),
        collator.generator.get_state(),
    ]
    python, numpy = random.getstate(), collator.numpy.bit_generator.state
    assert moves_rows(collator, rows()) is False
    assert not carries_tags(collator, rows(), "sample_index")
    now = [
        torch.get_rng_state(),
        torch.tensor(np.random.get_state()[1].astype(np.int64)),
        collator.generator.get_state(),
    ]
    assert all(map(torch.equal, states, now))
    assert (python, numpy) == (random.getstate(), collator.numpy.bit_generator.state)


# ---- in a run ------------------------------------------------------------------------------------


def run_with(folder, collator, policy, **settings):
    return trainer(
        folder,
        model=bert(),
        data=rows(24),
        pruning=policy,
        extra={"data_collator": collator},
        num_train_epochs=1,
        **settings,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_each_score_is_that_of_its_own_sample_whatever_the_order_of_rows(workers, tmp_path):
    settings = {"learning_rate": 0.0, "dataloader_num_workers": workers}
    tables = []
    for collator in (padded, with_tags(shuffled)):
        run = run_with(tmp_path, collator, UCB(1.0), **settings)
        run.train()
        tables.append(run.pruner.table["mean"])
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_with_a_collator_that_reorders_is_refused(workers, tmp_path):
    run = run_with(tmp_path, backwards, UCB(0.5), dataloader_num_workers=workers)
    with pytest.raises(ValueError, match="sample_index"):
        run.train()
    assert run.state.global_step == 0


def test_a_policy_that_tells_no_row_from_another_takes_any_order(tmp_path):
    run = run_with(tmp_path, backwards, RandomPruning(0.5))
    run.train()
    assert run.pruning_report.cost_ratio == pytest.approx(0.5)


@pytest.mark.parametrize("collator", [masked, longest_first])
def test_full_data_stays_the_stock_run(collator, tmp_path):
    ours = run_with(tmp_path, collator, FullData())
    ours.train()
    stock = trainer(  # made now: a Trainer seeds the random numbers
        tmp_path,
        cls=Trainer,
        model=bert(),
        data=rows(24),
        extra={"data_collator": collator},
        num_train_epochs=1,
    )
    stock.train()
    for one, other in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tags", [False, True])
def test_a_collator_that_drops_samples_is_refused(tags, tmp_path):
    def dropping(samples):
        return padded(samples[:-1])

    collator = with_tags(dropping) if tags else dropping
    run = run_with(tmp_path, collator, UCB(0.5))
    with pytest.raises(ValueError, match=r"8"):
        run.train()
    assert run.state.global_step == 0
