"""Observations: buffered, moved to the host, exchanged."""

import pytest
import torch

from hf_dynprune import observations as module
from hf_dynprune.observations import Observations
from hf_dynprune.policies import UCB
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape


def added(observations, index, *losses):
    """Add observations of the signal `loss`."""
    observations.add(torch.tensor(index), {"loss": torch.tensor(losses)})


def test_they_come_back_in_their_order():
    observations = Observations(10, ("loss",))
    added(observations, [3, 1], 0.5, 1.5)
    observations.drain()
    added(observations, [3], 2.5)
    index, signals = observations.exchange()
    assert index.tolist() == [3, 1, 3]
    assert index.dtype == torch.int64
    assert signals["loss"].tolist() == [0.5, 1.5, 2.5]
    index, signals = observations.exchange()  # they are forgotten
    assert index.tolist() == signals["loss"].tolist() == []
    assert index.dtype == torch.int64


def test_padding_is_left_out():
    observations = Observations(10, ("loss",))
    added(observations, [-1, 4, -1], 7.0, 1.0, float("nan"))
    index, signals = observations.exchange()
    assert index.tolist() == [4]
    assert signals["loss"].tolist() == [1.0]


@pytest.mark.parametrize("index", [[0, 10], [-2, 1]])
def test_index_out_of_range_is_named(index):
    observations = Observations(10, ("loss",))
    added(observations, index, 1.0, 2.0)
    low, high = min(index), max(index)
    with pytest.raises(ValueError, match=rf"\[{low}, {high}\].*\[0, 10\)"):
        observations.drain()


def test_nothing_and_an_empty_batch():
    observations = Observations(10, ("loss", "margin"))
    observations.drain()
    nothing = torch.empty(0)
    observations.add(nothing.long(), {"loss": nothing, "margin": nothing})
    index, signals = observations.exchange()
    assert len(index) == 0
    assert {name: len(values) for name, values in signals.items()} == {"loss": 0, "margin": 0}


def test_observations_without_signals():
    observations = Observations(10, ())
    observations.add(torch.tensor([2, 3]), {})
    index, signals = observations.exchange()
    assert index.tolist() == [2, 3]
    assert signals == {}


def test_clear_forgets_both_places():
    observations = Observations(10, ("loss",))
    added(observations, [1], 1.0)
    observations.drain()
    added(observations, [2], 2.0)
    observations.clear()
    assert len(observations.exchange()[0]) == 0


def test_the_buffer_on_the_device_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_BUFFERED", 8)
    observations, drained = Observations(100, ("loss",)), []
    drain = observations.drain
    monkeypatch.setattr(observations, "drain", lambda: (drained.append(number), drain()))
    for number in range(6):
        added(observations, [3 * number, 3 * number + 1, 3 * number + 2], 0.0, 0.0, 0.0)
    assert drained == [2, 5]  # after 9 observations, and after 9 more
    monkeypatch.undo()
    assert observations.exchange()[0].tolist() == list(range(18))


def test_when_they_are_drained_does_not_change_the_table():
    def run(drain):
        pruner = DynamicPruner(UCB(1.0), RunShape(50, batch_size=5, num_epochs=3))
        for epoch in range(3):
            pruner.begin_epoch(epoch)
            for number, batch in enumerate(torch.tensor(list(pruner.sampler)).split(5)):
                pruner.observe(batch, {"loss": (batch.float() + epoch) % 7})
                if number in drain:
                    pruner.drain()
                if number in drain and epoch == 1:
                    pruner.flush()
        pruner.end_epoch()
        return pruner.table.state_dict()

    base, drained = run(()), run((0, 1, 4, 9))
    assert all(torch.equal(base[name], drained[name]) for name in base)
