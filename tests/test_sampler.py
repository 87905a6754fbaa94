"""Order, sizes and padding of an epoch, and batches that know their samples."""

import multiprocessing
import pickle
import random
import traceback

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from programs import spawned_by_forks
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from hf_dynprune.policies import UCB, RandomPruning
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.sampler import (
    SAMPLE_INDEX,
    IndexedCollator,
    IndexedDataset,
    PruningSampler,
    epoch_order,
    fit_to_batches,
)
from hf_dynprune.schedule import RunShape

# ---- order ---------------------------------------------------------------------------------------


@given(n=st.integers(1, 50), seed=st.integers(0, 2**31), epoch=st.integers(0, 99), data=st.data())
def test_kept_samples_keep_the_order_of_the_stock_permutation(n, seed, epoch, data):
    kept = data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    stock = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    assert epoch_order(n, None, seed, epoch).tolist() == stock
    order = epoch_order(n, torch.tensor(kept), seed, epoch)
    assert order.dtype == torch.int32
    assert order.tolist() == [i for i in stock if i in kept]


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (10, 42), (1000, 7)])
def test_all_data_is_ordered_as_by_accelerate(n, seed):
    from accelerate.data_loader import SeedableRandomSampler

    stock = SeedableRandomSampler(range(n), data_seed=seed)
    for epoch in range(3):  # it counts the epochs itself
        assert epoch_order(n, None, seed, epoch).tolist() == list(stock)
        everything = epoch_order(n, torch.arange(n), seed, epoch)
        assert torch.equal(everything, epoch_order(n, None, seed, epoch))


@given(n=st.integers(1, 40), epoch=st.integers(0, 99), data=st.data())
def test_kept_samples_in_an_order_of_groups(n, epoch, data):
    """As transformers groups by length: all that it sees is the kept samples and a generator."""
    kept = data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    lengths = data.draw(st.lists(st.integers(1, 99), min_size=n, max_size=n))
    seen = []

    def by_length(chosen, generator):
        seen.append(chosen.tolist())
        batch = get_length_grouped_indices([lengths[i] for i in chosen], 2, generator=generator)
        return chosen[torch.tensor(batch)]

    sampler = PruningSampler(n, 2)
    sampler.arrange = by_length
    order = sampler.order_of(torch.tensor(kept), 7, epoch)
    assert order.dtype == torch.int32
    assert seen == [sorted(kept)]
    assert sorted(order.tolist()) == sorted(kept)
    assert lengths[order[0]] == max(lengths[i] for i in kept)
    assert torch.equal(order, sampler.order_of(torch.tensor(kept[::-1]), 7, epoch))

    stock = LengthGroupedSampler(
        2, lengths=lengths, generator=torch.Generator().manual_seed(7 + epoch)
    )
    assert sampler.order_of(None, 7, epoch).tolist() == list(stock)


# ---- sizes ---------------------------------------------------------------------------------------


@given(data=st.data())
def test_every_kept_sample_once_and_every_rank_as_many_batches(data):
    from accelerate.data_loader import BatchSamplerShard

    n = data.draw(st.integers(1, 40))
    kept = data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    ranks, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    drop_last, even_batches = data.draw(st.booleans()), data.draw(st.booleans())
    whole = ranks * batch
    sampler = PruningSampler(n, whole, ranks=ranks, drop_last=drop_last)
    order = epoch_order(n, torch.tensor(kept), data.draw(st.integers(0, 9)), 0)
    sampler.set_epoch_order(order)
    yielded = list(sampler)
    real, padding = [i for i in yielded if i >= 0], [i for i in yielded if i < 0]

    assert len(sampler) == len(yielded)
    assert yielded == real + padding
    if drop_last:
        assert real == order.tolist()[: len(kept) // whole * whole]
    else:
        assert real == order.tolist()
    if drop_last or ranks == 1:
        assert padding == []
    else:
        assert len(padding) == -len(kept) % whole
        assert {~i for i in padding} <= set(kept)
    if drop_last or ranks > 1:
        assert len(yielded) % whole == 0

    # accelerate deals the batches out. With no setting does it add or drop any.
    batches = BatchSampler(sampler, batch, drop_last)
    shares = [list(batches)]
    if ranks > 1:  # on one rank accelerate makes no shards
        shares = [
            list(BatchSamplerShard(batches, ranks, rank, even_batches=even_batches))
            for rank in range(ranks)
        ]
    assert len({len(share) for share in shares}) == 1
    if ranks > 1:
        assert all(len(b) == batch for share in shares for b in share)
    assert sorted(i for share in shares for b in share for i in b) == sorted(yielded)
    # global batch b is the b-th batch of every rank
    steps = len(shares[0])
    for b in range(steps):
        held = sum(i >= 0 for share in shares for i in share[b])
        assert sampler.samples_in(b, 1) == held
    assert sampler.samples_in(0, steps) == len(real)
    assert sampler.samples_in(steps, 3) == 0
    cut = data.draw(st.integers(0, steps))
    assert sampler.samples_in(0, cut) + sampler.samples_in(cut, steps - cut) == len(real)


def test_padding_by_hand():
    order = torch.tensor([4, 0, 7])
    assert fit_to_batches(order, 4, ranks=2, drop_last=False).tolist() == [4, 0, 7, ~4]
    padded = fit_to_batches(order, 8, ranks=2, drop_last=False).tolist()
    assert padded == [4, 0, 7, ~4, ~0, ~7, ~4, ~0]  # more copies than samples
    assert fit_to_batches(order, 4, ranks=1, drop_last=False).tolist() == [4, 0, 7]
    assert fit_to_batches(order, 2, ranks=2, drop_last=True).tolist() == [4, 0]
    assert fit_to_batches(order, 3, ranks=3, drop_last=False).tolist() == [4, 0, 7]
    assert fit_to_batches(order, 4, ranks=2, drop_last=True).tolist() == []


@pytest.mark.parametrize(
    ("kept", "settings", "expected"),
    [
        (5, {}, [0, 1, 2, 3, 4, ~4]),
        (1, {}, [0, ~0]),
        (6, {}, [0, 1, 2, 3, 4, 5]),
        (9, {}, list(range(9))),  # all data: as in the stock run
        (5, {"drop_last": True}, [0, 1, 2, 3]),
        (5, {"ranks": 2}, [0, 1, 2, 3, 4, ~0, ~1, ~2]),
    ],
)
def test_a_last_batch_of_one_is_filled_on_request(kept, settings, expected):
    sampler = PruningSampler(9, 4, **settings)
    sampler.fills_one = True
    sampler.set_epoch_order(torch.arange(kept))
    assert list(sampler) == expected
    assert len(sampler) == len(expected)


def test_samples_in_by_hand():
    sampler = PruningSampler(10, 4, ranks=2)  # 4, 4, 2 and two of padding
    assert [sampler.samples_in(b, 1) for b in range(4)] == [4, 4, 2, 0]
    assert sampler.samples_in(1, 2) == sampler.samples_in(1, 5) == 6
    sampler = PruningSampler(10, 4, drop_last=True)
    assert [sampler.samples_in(b, 1) for b in range(4)] == [4, 4, 0, 0]


def test_sampler_is_what_accelerate_leaves_alone():
    sampler = PruningSampler(5)
    assert not hasattr(sampler, "set_epoch")
    assert not isinstance(sampler, RandomSampler)
    assert list(sampler) == [0, 1, 2, 3, 4]


def test_iterating_twice_or_at_once_gives_the_same():
    sampler = PruningSampler(200_000)  # more than one block of indices
    sampler.set_epoch_order(epoch_order(200_000, None, 3, 1))
    one, two = list(sampler), list(sampler)
    assert one == two == epoch_order(200_000, None, 3, 1).tolist()
    a, b = iter(sampler), iter(sampler)
    assert [next(a) for _ in range(3)] == [next(b) for _ in range(3)] == one[:3]
    assert all(type(i) is int for i in one[:10])


def test_new_order_leaves_an_iterator_that_began_alone():
    sampler = PruningSampler(4)
    running = iter(sampler)
    next(running)
    sampler.set_epoch_order(torch.tensor([3]))
    assert list(running) == [1, 2, 3]
    assert list(sampler) == [3]


# ---- batches that know their samples -------------------------------------------------------------

N = 23


class ListDataset:
    """A map-style dataset of dicts without a base class."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        assert type(i) is int
        assert 0 <= i < N
        return {"x": torch.tensor(100 + i)}


class BatchedDataset(ListDataset):
    """Has `__getitems__`, which returns whole batches."""

    def __getitem__(self, i):
        raise AssertionError("__getitems__ should be used")

    def __getitems__(self, indices):
        return [{"x": torch.tensor(100 + i)} for i in indices]


class ColumnDataset(BatchedDataset):
    """Its `__getitems__` returns what only `as_columns` understands."""

    def __getitems__(self, indices):
        return torch.tensor(indices) + 100


def as_columns(data):
    return {"x": data}


def hf_dataset(kind):
    import datasets

    if kind == "shuffled":
        return datasets.Dataset.from_dict({"x": list(range(100, 100 + N))}).shuffle(seed=1)
    if kind == "filtered":
        return datasets.Dataset.from_dict({"x": list(range(2 * N))}).filter(
            lambda x: x % 2 == 0, input_columns="x"
        )
    parts = [datasets.Dataset.from_dict({"x": list(range(a, b))}) for a, b in ((50, 60), (0, 13))]
    return datasets.concatenate_datasets(parts)


def make_dataset(kind):
    return {
        "list": lambda: [ListDataset()[i] for i in range(N)],
        "map-style": ListDataset,
        "__getitems__": BatchedDataset,
        "Subset": lambda: Subset(TensorAsDict(2 * N), list(range(2 * N - 1, N - 1, -1))),
        "ConcatDataset": lambda: ConcatDataset([TensorAsDict(9), TensorAsDict(N - 9)]),
    }.get(kind, lambda: hf_dataset(kind))()


class TensorAsDict(TensorDataset):
    def __init__(self, n):
        super().__init__(torch.arange(n))

    def __getitem__(self, i):
        return {"x": super().__getitem__(i)[0]}


# torch warns on a machine with one core, and Python, from 3.12 on, if another library has started a
# thread.
with_workers = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning",
    r"ignore:This process .* is multi-threaded:DeprecationWarning",
)

KINDS = [
    "list",
    "map-style",
    "__getitems__",
    "Subset",
    "ConcatDataset",
    "shuffled",
    "filtered",
    "concatenated",
]


def run_epoch(dataset, loader, pruner, epoch):
    """Train an epoch and check that each index belongs to the data beside it."""
    pruner.begin_epoch(epoch)
    seen = []
    for batch in loader:
        index = batch[SAMPLE_INDEX]
        assert index.dtype == torch.int64
        one_by_one = lambda indices: [dataset[i] for i in indices]  # noqa: E731
        whole = getattr(dataset, "__getitems__", one_by_one)(index.tolist())
        assert batch["x"].tolist() == [int(sample["x"]) for sample in whole]
        seen += index.tolist()
    assert seen == list(pruner.sampler)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_index_belongs_to_the_data(kind):
    dataset = make_dataset(kind)
    assert len(dataset) == N
    pruner = DynamicPruner(RandomPruning(0.6), RunShape(N, batch_size=4, num_epochs=2))
    loader = pruner.dataloader(dataset)
    first, second = run_epoch(dataset, loader, pruner, 0), run_epoch(dataset, loader, pruner, 1)
    assert len(first) == len(second) == 14
    assert set(first) != set(second)


@with_workers
@pytest.mark.parametrize("kind", ["__getitems__", "shuffled"])
@pytest.mark.parametrize("persistent", [False, True])
def test_index_belongs_to_the_data_with_workers(kind, persistent):
    dataset = make_dataset(kind)
    pruner = DynamicPruner(RandomPruning(0.6), RunShape(N, batch_size=3, num_epochs=2))
    loader = pruner.dataloader(
        dataset,
        num_workers=2,
        persistent_workers=persistent,
        prefetch_factor=3,
        multiprocessing_context="fork",
    )
    sizes = [len(run_epoch(dataset, loader, pruner, epoch)) for epoch in range(2)]
    assert sizes == [14, 14]


@with_workers
def test_index_belongs_to_the_data_with_spawned_workers():
    assert "spawn" in multiprocessing.get_all_start_methods()
    dataset = ListDataset()
    pruner = DynamicPruner(RandomPruning(0.6), RunShape(N, batch_size=3, num_epochs=2))
    loader = pruner.dataloader(
        dataset, num_workers=2, persistent_workers=True, multiprocessing_context="spawn"
    )
    with spawned_by_forks():
        sizes = [len(run_epoch(dataset, loader, pruner, epoch)) for epoch in range(2)]
    assert sizes == [14, 14]


def test_two_loaders_of_one_pruner_give_the_same():
    dataset = ListDataset()
    pruner = DynamicPruner(RandomPruning(0.6), RunShape(N, batch_size=4, num_epochs=2))
    one, two = pruner.dataloader(dataset), pruner.dataloader(dataset)
    pruner.begin_epoch(0)
    for a, b in zip(one, two, strict=True):
        assert a[SAMPLE_INDEX].tolist() == b[SAMPLE_INDEX].tolist()


def test_drop_last_leaves_the_tail_out():
    shape = RunShape(N, batch_size=4, num_epochs=1, drop_last=True)
    pruner = DynamicPruner(RandomPruning(0.6), shape)
    loader = pruner.dataloader(ListDataset())
    pruner.begin_epoch(0)
    assert len(loader) == 3
    assert [len(batch["x"]) for batch in loader] == [4, 4, 4]


def test_accelerate_leaves_the_order_alone():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    dataset = ListDataset()
    pruner = DynamicPruner(RandomPruning(0.6), RunShape(N, batch_size=4, num_epochs=2))
    loader = Accelerator(cpu=True).prepare(pruner.dataloader(dataset))
    assert [len(run_epoch(dataset, loader, pruner, epoch)) for epoch in range(2)] == [14, 14]
    # The process shares the state, and other tests choose theirs.
    AcceleratorState._reset_state(reset_partial_state=True)


def test_collator_for_the_batches_of_a_dataset():
    loader = DataLoader(
        IndexedDataset(ColumnDataset()), batch_size=5, collate_fn=IndexedCollator(as_columns)
    )
    batches = list(loader)
    assert torch.cat([b["x"] for b in batches]).tolist() == list(range(100, 100 + N))
    assert torch.cat([b[SAMPLE_INDEX] for b in batches]).tolist() == list(range(N))


def test_collator_of_transformers():
    from transformers import BatchEncoding, default_data_collator

    indexed = IndexedDataset([{"x": i, "label": i % 2} for i in range(6)]).__getitems__([4, 1])
    batch = IndexedCollator(default_data_collator)(indexed)
    assert batch["x"].tolist() == [4, 1]
    assert batch["labels"].tolist() == [0, 1]
    assert batch[SAMPLE_INDEX].tolist() == [4, 1]
    encoding = IndexedCollator(
        lambda data: BatchEncoding({"x": torch.tensor([d["x"] for d in data])})
    )(indexed)
    assert isinstance(encoding, BatchEncoding)
    assert encoding[SAMPLE_INDEX].tolist() == [4, 1]


def test_padding_is_a_copy_with_index_minus_1():
    indexed = IndexedDataset(ListDataset()).__getitems__([3, 22, ~22, ~0])
    assert [int(d["x"]) for d in indexed.data] == [103, 122, 122, 100]
    batch = IndexedCollator(lambda data: {"x": torch.stack([d["x"] for d in data])})(indexed)
    assert batch[SAMPLE_INDEX].tolist() == [3, 22, -1, -1]
    assert int(IndexedDataset(ListDataset())[~5].data[0]["x"]) == 105


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        ((torch.zeros(2), torch.zeros(2)), "tuple"),
        (torch.zeros(2), "Tensor"),
        ([{}], "list"),
        (None, "NoneType"),
    ],
)
def test_collator_must_return_a_dict(result, kind):
    with pytest.raises(TypeError, match=rf"\b{kind}\b"):
        IndexedCollator(lambda data: result)(IndexedDataset([1, 2]).__getitems__([0]))


def tuple_collator(data):
    return torch.zeros(len(data)), torch.zeros(len(data))


@with_workers
def test_collator_must_return_a_dict_in_a_worker_too():
    pruner = DynamicPruner(RandomPruning(0.5), RunShape(N, batch_size=4, num_epochs=1))
    loader = pruner.dataloader(
        ListDataset(), tuple_collator, num_workers=1, multiprocessing_context="fork"
    )
    pruner.begin_epoch(0)
    with pytest.raises(TypeError, match="tuple") as caught:
        next(iter(loader))
    # The frames hold the worker, for which a collection of garbage would wait without end.
    traceback.clear_frames(caught.tb)


def test_data_with_a_column_sample_index_are_refused():
    pruner = DynamicPruner(RandomPruning(0.5), RunShape(N, batch_size=4, num_epochs=1))
    loader = pruner.dataloader([{SAMPLE_INDEX: i} for i in range(N)])
    pruner.begin_epoch(0)
    with pytest.raises(TypeError, match="'sample_index'"):
        next(iter(loader))


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(N)


class StreamOfKnownLength(Stream):
    def __len__(self):
        return N


@pytest.mark.parametrize("dataset", [Stream(), StreamOfKnownLength(), iter([1, 2]), {1, 2}])
def test_streams_are_refused(dataset):
    with pytest.raises(TypeError, match=type(dataset).__name__):
        IndexedDataset(dataset)


@pytest.mark.parametrize("kind", KINDS)
def test_indexed_dataset_pickles(kind):
    indexed = pickle.loads(pickle.dumps(IndexedDataset(make_dataset(kind))))
    assert len(indexed) == N
    assert indexed.__getitems__([4]).indices == [4]
    collator = pickle.loads(pickle.dumps(IndexedCollator(tuple_collator)))
    assert collator.collator is tuple_collator


def test_nothing_is_copied():
    dataset = ListDataset()
    assert IndexedDataset(dataset).dataset is dataset


# ---- global random state -------------------------------------------------------------------------


def global_states():
    return (
        torch.random.get_rng_state().tolist(),
        repr(np.random.get_state(legacy=False)),
        random.getstate(),
    )


def test_no_global_random_state_is_read_or_changed():
    def choices():
        shape = RunShape(50, batch_size=4, num_epochs=3)
        pruner = DynamicPruner(UCB(0.5, epsilon=0.2), shape, seed=1)
        loader = pruner.dataloader([{"x": i} for i in range(50)])
        kept = []
        for epoch in range(3):
            pruner.begin_epoch(epoch)
            kept.append(list(loader.sampler))
            for batch in torch.tensor(kept[-1]).split(4):
                pruner.observe(batch, {"loss": batch % 7.0})
        pruner.end_epoch()
        pruner.state_dict()
        return kept

    def seed_all(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    seed_all(0)
    before = global_states()
    one = choices()
    assert global_states() == before  # not changed
    seed_all(1)
    assert choices() == one  # not read


def test_accelerate_gathers_each_kept_sample_once():
    # gather_for_metrics cuts the last batch by the length of the dataset.
    accelerator = Accelerator(cpu=True)
    data = [{"x": torch.tensor(float(i))} for i in range(50)]
    pruner = DynamicPruner(RandomPruning(0.54), RunShape(50, 8, num_epochs=2))
    loader = accelerator.prepare(pruner.dataloader(data))
    for epoch in range(2):
        record, gathered = pruner.begin_epoch(epoch), []
        for batch in loader:
            index = batch.pop("sample_index")
            pruner.observe(index)
            gathered += accelerator.gather_for_metrics(index).tolist()
        assert len(gathered) == len(set(gathered)) == record.samples == 27
