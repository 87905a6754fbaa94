"""The identity of a dataset: other content has another one; the same content has the same one.

Reading a dataset changes nothing in it, and no random state.
"""

import pickle
import random
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from programs import python
from tiny import images, texts, trainer
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from hf_dynprune import UCB
from hf_dynprune import identity as module
from hf_dynprune.identity import dataset_fingerprint
from hf_dynprune.vision import ImageCache

N = 40


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Columns that are read whole, and columns of which some rows are looked at."""
    if request.param == "large":
        monkeypatch.setattr(module, "_WHOLE_BYTES", 0)
    return request.param


# ---- datasets.Dataset ----------------------------------------------------------------------------


def changed(column, row, value):
    """The images, with one value of one row changed."""
    rows = images(N).with_format("numpy")[:]
    rows[column] = rows[column].copy()
    rows[column][row] = value
    return datasets.Dataset.from_dict(rows, images(N).features)


CHANGED = {
    "relabelled": lambda: changed("labels", 17, 9),
    "a pixel": lambda: changed("pixel_values", 0, 1.0),
    "swapped": lambda: images(N).select([1, 0, *range(2, N)]),
    "reversed": lambda: images(N).select(range(N - 1, -1, -1)),
    "shorter": lambda: images(N).select(range(N - 1)),
    "renamed": lambda: images(N).rename_column("labels", "label"),
    "one column more": lambda: images(N).add_column("id", list(range(N))),
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_rows_have_another_identity(change, size, reliability):
    assert dataset_fingerprint(CHANGED[change]()) != dataset_fingerprint(images(N))
    reliability("identity")


def saved_and_loaded(dataset, folder):
    dataset.save_to_disk(folder)
    return datasets.load_from_disk(folder)


SAME = {
    "again": lambda dataset, folder: images(N),
    "without a format": lambda dataset, folder: dataset.with_format(None),
    "with a transform": lambda dataset, folder: dataset.with_transform(lambda rows: rows),
    "in two chunks": lambda dataset, folder: datasets.concatenate_datasets(
        [dataset.select(range(13)), dataset.select(range(13, N))]
    ),
    "from the disk": saved_and_loaded,
    "selected": lambda dataset, folder: dataset.select([*range(N)]),
    "shuffled back": lambda dataset, folder: dataset.select(range(N - 1, -1, -1)).select(
        range(N - 1, -1, -1)
    ),
    "columns in another order": lambda dataset, folder: dataset.select_columns(
        ["labels", "pixel_values"]
    ),
}


@pytest.mark.parametrize("how", SAME)
def test_the_same_rows_have_the_same_identity(how, size, tmp_path, reliability):
    dataset = images(N)
    other = SAME[how](dataset, tmp_path / "saved")
    assert dataset_fingerprint(other) == dataset_fingerprint(dataset)
    reliability("identity")


@pytest.mark.parametrize("task", ["single label", "multi label", "regression", "seq2seq"])
def test_texts_and_nested_columns(task, size):
    dataset = texts(task)
    assert dataset_fingerprint(dataset) == dataset_fingerprint(texts(task))
    assert dataset_fingerprint(dataset) != dataset_fingerprint(texts(task, seed=1))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, 1, 2]),
        pa.array(["a", None, "bc"]),
        pa.array([b"a", b"", None]),
        pa.array([[1, 2], None, []]),
        pa.array([[["a"], []], [["b"]], None]),
        pa.array([{"x": 1, "y": "a"}, {"x": None, "y": "b"}, None]),
        pa.array([True, None, False]),
        pa.array([1.5, float("nan"), None]),
        pa.array([1, 2, 3]).cast(pa.timestamp("s")),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array([[1, 2], [3, 4], None], pa.list_(pa.int64(), 2)),
        pa.array([1, 2, 3]).cast(pa.decimal128(20)),
        pa.array([None, None, None]),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_of_any_type(column, size):
    table = pa.table({"x": column})
    dataset = datasets.Dataset(table)
    first = dataset_fingerprint(dataset)
    sliced = datasets.Dataset(pa.concat_tables([table.slice(1), table]).slice(2))
    assert dataset_fingerprint(sliced) == first
    if column.null_count < len(column):
        assert dataset_fingerprint(dataset.select([2, 1, 0])) != first or column[0] == column[2]
    assert first.startswith("3 samples, ")


def test_no_rows(size):
    assert dataset_fingerprint(images(N).select([])).startswith("0 samples")


# ---- files ---------------------------------------------------------------------------------------


def pictures(folder, *, flat=False):
    """A folder of PNG files, and the dataset of it; their paths are absolute."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        place = folder if flat else folder / name
        place.mkdir(parents=True, exist_ok=True)
        for i in range(5):
            pixels = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(place / f"{name}{i}.png")
    return listed(folder)


def listed(folder, column="image"):
    paths = [str(path) for path in sorted(folder.rglob("*.png"))]
    dataset = datasets.Dataset.from_dict({column: paths})
    return dataset.cast_column("image", datasets.Image()) if column == "image" else dataset


@pytest.mark.parametrize("column", ["image", "where"])
@pytest.mark.parametrize("flat", [False, True])
def test_files_at_another_place_are_the_same(column, flat, size, tmp_path, reliability):
    pictures(tmp_path / "a", flat=flat)
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    here, there = listed(tmp_path / "a", column), listed(tmp_path / "b" / "c", column)
    assert dataset_fingerprint(here) == dataset_fingerprint(there)
    one, other = here.select([3]), there.select([3])
    assert dataset_fingerprint(one) == dataset_fingerprint(other)
    reliability("identity", 2)


@pytest.mark.parametrize("column", ["image", "where"])
def test_other_files_are_not_the_same(column, size, tmp_path, reliability):
    pictures(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = dataset_fingerprint(listed(tmp_path / "b", column))
    (tmp_path / "b" / "cat" / "cat1.png").rename(tmp_path / "b" / "cat" / "cat9.png")
    renamed = dataset_fingerprint(listed(tmp_path / "b", column))
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "b" / "dog" / "dog2.png")
    replaced = dataset_fingerprint(listed(tmp_path / "b", column))
    assert len({before, renamed, replaced}) == 3
    reliability("identity", 2)


def test_files_that_are_not_there_are_known_by_name():
    rows = {"image": ["/nowhere/a.png", "/nowhere/b.png"]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    assert dataset_fingerprint(dataset).startswith("2 samples, ")


# ---- other datasets ------------------------------------------------------------------------------


class Items(Dataset):
    """Item i is a function of i and of what the dataset was given."""

    def __init__(self, n=N, **given):
        self.n, self.reads = n, 0
        self.__dict__.update(given)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads += 1
        return {"x": torch.full((3, 4), float(i)), "labels": i % 3, "text": f"text {i}"}


class Shifted(Items):
    def __getitem__(self, i):
        return super().__getitem__((i + self.by) % self.n)


class Augmented(Items):
    """Items with noise from a generator: its own, or a global one."""

    def __getitem__(self, i):
        item = super().__getitem__(i)
        if self.draw() < 0.1:
            item["x"] = -item["x"]
        return item

    def draw(self):
        own = getattr(self, "generator", None)
        return {
            "python": random.random,
            "numpy": np.random.random,
            "torch": lambda: float(torch.rand(())),
            "own": lambda: own.random(),
            "own torch": lambda: float(torch.rand((), generator=own)),
        }[self.kind]()


OTHERS = {
    "items": (lambda: Items(), lambda: Shifted(by=1)),
    "a list": (lambda: list(range(N)), lambda: list(range(N, 0, -1))),
    "a long list": (lambda: list(range(5000)), lambda: list(range(5000, 0, -1))),
    "tensors": (
        lambda: TensorDataset(torch.arange(N), torch.zeros(N, dtype=torch.bfloat16)),
        lambda: TensorDataset(torch.arange(N).flip(0), torch.zeros(N, dtype=torch.bfloat16)),
    ),
    "a subset": (
        lambda: Subset(Items(), list(range(0, N, 2))),
        lambda: Subset(Items(), list(range(1, N, 2))),
    ),
    "a subset of augmented items": (
        lambda: Subset(Augmented(kind="python", targets=[1] * N), [0, 1]),
        lambda: Subset(Augmented(kind="python", targets=[2] * N), [0, 1]),
    ),
    "concatenated": (
        lambda: ConcatDataset([Items(), images(N)]),
        lambda: ConcatDataset([Items(), images(N, seed=1)]),
    ),
    "a dataset within": (lambda: Items(rows=images(N)), lambda: Items(rows=images(N, seed=1))),
    "labels": (
        lambda: Augmented(kind="numpy", targets=torch.arange(N)),
        lambda: Augmented(kind="numpy", targets=torch.arange(N).flip(0)),
    ),
    "samples": (
        lambda: Augmented(kind="torch", samples=[(f"/a/{i}.png", 0) for i in range(N)]),
        lambda: Augmented(kind="torch", samples=[(f"/a/{i}.jpg", 0) for i in range(N)]),
    ),
    "decoded once": (
        lambda: ImageCache(**cached(), augment=True),
        lambda: ImageCache(**{**cached(), "labels": [1] * N}, augment=True),
    ),
}


def cached():
    pixels = np.random.default_rng(0).integers(0, 255, (N, 3, 8, 8), dtype=np.uint8)
    return {"images": pixels, "labels": [0] * N, "mean": (0.5,) * 3, "std": (0.2,) * 3}


@pytest.mark.parametrize("name", OTHERS)
def test_other_content_has_another_identity(name, reliability):
    one, other = OTHERS[name]
    assert dataset_fingerprint(one()) == dataset_fingerprint(one())
    assert dataset_fingerprint(one()) != dataset_fingerprint(other())
    assert ", " in dataset_fingerprint(one())
    reliability("identity", 2)


GENERATORS = {
    "python": lambda: None,
    "numpy": lambda: None,
    "torch": lambda: None,
    "own": lambda: np.random.default_rng(),
    "own torch": lambda: torch.Generator().manual_seed(random.getrandbits(30)),
}


def states():
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))


def state_of(generator):
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    return pickle.dumps(generator)


@pytest.mark.parametrize("kind", GENERATORS)
def test_random_augmentation_is_not_part_of_it(kind, reliability):
    dataset = Augmented(kind=kind, generator=GENERATORS[kind]())
    before = state_of(dataset.generator), states()
    assert dataset_fingerprint(dataset) == f"{N} samples"
    assert (state_of(dataset.generator), states()) == before
    assert dataset.reads == 0
    reliability("identity")


def test_a_generator_that_is_not_read_from_does_not_matter():
    idle = Items(generator=torch.Generator(), other=np.random.default_rng())
    assert dataset_fingerprint(idle) == dataset_fingerprint(Items())


def test_seed_and_epoch_of_an_image_cache_are_not_part_of_it():
    one = ImageCache(**cached(), augment=True, seed=0)
    other = ImageCache(**cached(), augment=True, seed=1)
    other.set_epoch(5)
    assert dataset_fingerprint(one) == dataset_fingerprint(other)
    assert other.epoch == 5


class Lazy(Items):
    """Opens its file when it is first read, as is usual for HDF5 and LMDB."""

    file = None

    def __del__(self):
        if self.file is not None:
            self.file.close()

    def __getitem__(self, i):
        self.file = self.file or open(__file__)  # noqa: SIM115
        return super().__getitem__(i)


def test_reading_leaves_the_dataset_as_it_is():
    dataset = Lazy()
    assert dataset_fingerprint(dataset) == dataset_fingerprint(Items())
    assert dataset.file is None
    assert dataset.reads == 0


class Following(Items):
    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        return {"x": i * 1000 + self.epoch}


def test_the_epoch_that_an_earlier_run_left_is_not_part_of_it():
    one, other = Following(), Following()
    one.set_epoch(3)
    assert dataset_fingerprint(one) == dataset_fingerprint(other)
    assert one.epoch == 3


def test_rounding_of_another_machine_is_not_part_of_it():
    class Rounded(Items):
        def __getitem__(self, i):
            item = super().__getitem__(i)
            return {**item, "x": (item["x"] + 1) * (1 + 1e-6 * self.differs)}

    assert dataset_fingerprint(Rounded(differs=0)) == dataset_fingerprint(Rounded(differs=1))


class Unreadable(Items):
    def __getitem__(self, i):
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    "dataset", [Unreadable(), Items(lock=__import__("threading").Lock()), Items(n=0)]
)
def test_what_cannot_be_read_or_copied_is_known_by_its_length(dataset):
    assert dataset_fingerprint(dataset).startswith(f"{len(dataset)} samples")


def test_another_process_agrees(tmp_path):
    code = (
        "from test_identity import OTHERS, images, texts, dataset_fingerprint as identify\n"
        "print([identify(made[0]()) for made in OTHERS.values()], identify(images()), "
        "identify(texts()))\n"
        "print(hash('a text'))"
    )
    here = Path(__file__).parent
    environment = {"PYTHONPATH": f"{here}:{here.parent}", "HOME": str(tmp_path)}
    done = python("-W", "ignore", "-c", code, cwd=here, environment=environment)
    own = [dataset_fingerprint(made[0]()) for made in OTHERS.values()]
    expected = f"{own} {dataset_fingerprint(images())} {dataset_fingerprint(texts())}"
    found, its_hash = done.stdout.strip().rsplit("\n", 1)
    assert found == expected, done.stderr
    assert int(its_hash) != hash("a text")  # so it orders sets in another way


# ---- one's own -----------------------------------------------------------------------------------


def test_a_dataset_may_bring_its_own():
    dataset = Augmented(kind="python", pruning_fingerprint="cifar10, version 2")
    assert dataset_fingerprint(dataset) == "cifar10, version 2"
    rows = images(N)
    rows.pruning_fingerprint = "v2"
    assert dataset_fingerprint(rows) == "v2"
    assert dataset_fingerprint(Subset(dataset, [1])) != dataset_fingerprint(Subset(Items(), [1]))


@pytest.mark.parametrize("bad", ["", 5, b"x"])
def test_a_fingerprint_is_a_text(bad):
    with pytest.raises(TypeError, match=f"pruning_fingerprint={bad!r}"):
        dataset_fingerprint(Items(pruning_fingerprint=bad))


def test_a_run_looks_once(tmp_path, monkeypatch):
    looked = []
    original = module.dataset_fingerprint
    monkeypatch.setattr(
        "hf_dynprune.data_side.dataset_fingerprint", lambda d: looked.append(d) or original(d)
    )
    run = trainer(tmp_path, pruning=UCB(0.5), num_train_epochs=1)
    run.train()
    run.train()
    assert len(looked) == 1


def test_a_checkpoint_of_other_items_is_refused(tmp_path, reliability):
    def made(data):
        settings = {"save_strategy": "epoch", "remove_unused_columns": False}
        return trainer(tmp_path, data=data, pruning=UCB(0.5), num_train_epochs=1, **settings)

    def rows(data):
        return [data[i] for i in range(len(data))]

    made(rows(images())).train()
    with pytest.raises(ValueError, match="dataset fingerprint"):
        made(rows(images())[::-1]).train(resume_from_checkpoint=True)
    made(rows(images())).train(resume_from_checkpoint=True)
    reliability("refused")


def test_who_is_sure_may_say_that_the_data_are_the_same(tmp_path):
    settings = {"save_strategy": "epoch", "pruning": UCB(0.5), "num_train_epochs": 1}
    first = trainer(tmp_path, **settings)
    first.train()
    other = trainer(tmp_path, data=images(seed=1), **settings)
    with pytest.raises(ValueError, match=f"pruning_fingerprint='{first.pruner.fingerprint}'"):
        other.train(resume_from_checkpoint=True)
    other.train_dataset.pruning_fingerprint = first.pruner.fingerprint
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == first.state.global_step
