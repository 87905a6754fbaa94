"""Splits are found by path or Hub id; columns are found by type and name."""

import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Features, Image, Value
from hub import Hub
from PIL import Image as Picture

from hf_dynprune.data import class_names, find_column, load_splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Datasets in the formats in which they are stored on a disk."""
    root = tmp_path_factory.mktemp("data")
    for split, n in (("train", 10), ("validation", 3), ("test", 2)):
        rows = datasets.Dataset.from_dict(
            {"text": [f"{split} {i}" for i in range(n)], "label": [i % 3 for i in range(n)]}
        )
        (root / "csv").mkdir(exist_ok=True)
        rows.to_csv(root / "csv" / f"{split}.csv")
        (root / "parquet").mkdir(exist_ok=True)
        rows = rows.cast_column("label", ClassLabel(names=["no", "yes", "maybe"]))
        rows.to_parquet(root / "parquet" / f"{split}-00000-of-00001.parquet")
        for name in ("cat", "dog"):
            pictures = root / "images" / split / name
            pictures.mkdir(parents=True)
            for i in range(n):
                Picture.fromarray(np.full((4, 4, 3), i, np.uint8)).save(pictures / f"{i}.png")
    for config in ("first", "second"):
        (root / "configs" / config).mkdir(parents=True)
        shutil.copy(root / "csv" / "train.csv", root / "configs" / config)
    listed = "".join(
        f"- config_name: {config}\n  data_files: {config}/*.csv\n" for config in ("first", "second")
    )
    (root / "configs" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    (root / "broken").mkdir()
    (root / "broken" / "train.parquet").write_bytes(b"no parquet")
    (root / "empty").mkdir()
    return root


# ---- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "columns", "train", "validation"),
    [
        ("csv", ["text", "label"], 10, 3),
        ("parquet", ["text", "label"], 10, 3),
        ("images", ["image", "label"], 20, 6),
    ],
)
def test_splits_of_a_folder(form, columns, train, validation, folder):
    data, evaluation = load_splits(str(folder / form))
    assert (data.column_names, len(data), len(evaluation)) == (columns, train, validation)
    assert evaluation.column_names == columns


def test_splits_and_slices_by_name(folder):
    joined, _ = load_splits(str(folder / "csv"), train="train+test[:1]")
    train, _ = load_splits(str(folder / "csv"))
    assert len(joined) == len(train) + 1
    data, evaluation = load_splits(str(folder / "csv"), train="train[:50%]", evaluation="test[1:]")
    assert data["text"][:] == [f"train {i}" for i in range(5)]
    assert evaluation["text"][:] == ["test 1"]


def test_a_share_of_the_training_split_is_held_out(folder):
    train, held_out = load_splits(str(folder / "csv"), validation_share=0.3)
    assert (len(train), len(held_out)) == (7, 3)
    assert sorted(train["text"][:] + held_out["text"][:]) == [f"train {i}" for i in range(10)]
    assert train["text"][:] == sorted(train["text"])  # order is kept
    assert held_out["text"][:] != [f"train {i}" for i in range(7, 10)]  # at random
    _, again = load_splits(str(folder / "csv"), validation_share=0.3)
    assert again["text"][:] == held_out["text"][:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 1.0}, r"validation_share=1\.0"),
        ({"validation_share": 0.01}, r"validation_share=0\.01 of 10 rows"),
        (
            {"validation_share": 0.3, "evaluation": "test"},
            r"evaluation='test' and validation_share=0\.3",
        ),
    ],
)
def test_a_share_that_cannot_be_held_out(options, message, folder):
    with pytest.raises(ValueError, match=message):
        load_splits(str(folder / "csv"), **options)


def test_without_a_split_to_evaluate_on_there_is_none(folder):
    data, evaluation = load_splits(str(folder / "configs"), "second")
    assert len(data) == 10
    assert evaluation is None


def test_a_path_may_start_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert len(load_splits("~/csv")[0]) == 10


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("nothing", {}, FileNotFoundError, r"/nothing'"),
        ("empty", {}, FileNotFoundError, r"/empty' .* doesn't contain any data files"),
        ("csv/train.csv", {}, NotADirectoryError, r"/csv/train\.csv'.*/csv'"),
        ("broken", {}, ValueError, r"/broken' .* Parquet "),
        ("csv", {"train": "trian"}, ValueError, "'trian'.* train, validation, test"),
        ("csv", {"evaluation": "dev[:2]"}, ValueError, "'dev'.* train, validation, test"),
        ("csv", {"train": "train+extra"}, ValueError, "no split 'extra'"),
        ("csv", {"train": "train[:x]"}, ValueError, r"train\[:x\]"),
        ("configs", {}, ValueError, r"(?s)'first', 'second'.* --dataset_config"),
        (
            "configs",
            {"config": "third"},
            ValueError,
            r"'third' not found.*'first', 'second'.* --dataset_config",
        ),
    ],
)
def test_missing_data_are_an_error(name, options, error, message, folder):
    with pytest.raises(error, match=message):
        load_splits(str(folder / name), **options)


def test_a_hub_id_without_network():
    with pytest.raises(FileNotFoundError, match=r"Hub .* 'owner/name'"):
        load_splits("owner/name")


def test_splits_of_a_hub_id(folder, tmp_path):
    program = """if True:
        from hf_dynprune.data import load_splits
        data, evaluation = load_splits("owner/texts", train="train[:50%]")
        print(len(data), len(evaluation), data[1])
        try:
            load_splits("owner/texts", train="trian")
        except ValueError as error:
            print(error)
        """
    with Hub() as hub:
        hub.files["owner/texts"] = {
            path.name: path.read_bytes() for path in (folder / "csv").iterdir()
        }
        environment = {**hub.environment(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == "5 3 {'text': 'train 1', 'label': 1}"
    for part in ("'owner/texts'", "'trian'", "train, validation, test"):
        assert part in refused


# ---- columns -------------------------------------------------------------------------------------

NUMBER, TEXT, CLASSES, PICTURE = (
    Value("int64"),
    Value("string"),
    ClassLabel(names=["a", "b"]),
    Image(),
)


@pytest.mark.parametrize(
    ("kind", "columns", "name", "found"),
    [
        ("image", {"img": PICTURE, "label": CLASSES}, None, "img"),
        ("image", {"left": PICTURE, "right": PICTURE}, "right", "right"),
        ("label", {"img": PICTURE, "intent": CLASSES}, None, "intent"),
        ("label", {"coarse_label": CLASSES, "fine_label": CLASSES}, None, "fine_label"),
        ("label", {"fine_label": CLASSES, "label": CLASSES}, None, "label"),
        ("label", {"idx": NUMBER, "label": NUMBER}, None, "label"),
        (
            "label",
            {"label": NUMBER, "intent": CLASSES},
            None,
            "intent",  # a declared label comes before a column with the usual name
        ),
        ("label", {"label": CLASSES, "stars": NUMBER}, "stars", "stars"),
        ("text", {"idx": NUMBER, "query": TEXT}, None, "query"),
        ("text", {"title": TEXT, "text": TEXT}, None, "text"),
        ("text", {"title": Value("large_string"), "sentence": TEXT}, None, "sentence"),
        ("text", {"title": TEXT, "text": TEXT}, "title", "title"),
    ],
)
def test_the_column_of_a_kind(kind, columns, name, found):
    assert find_column(Features(columns), kind, name) == found


@pytest.mark.parametrize(
    ("kind", "columns", "name", "message"),
    [
        (
            "image",
            {"left": PICTURE, "right": PICTURE},
            None,
            r"2 image columns among left \(Image\), right \(Image\).* image_column=",
        ),
        ("text", {"title": TEXT, "body": TEXT}, None, r"2 text columns .* text_column="),
        ("text", {"idx": NUMBER}, None, r"0 text columns among idx \(int64\)"),
        (
            "label",
            {"text": TEXT, "label": TEXT},
            None,
            r"0 label columns among text \(string\), label \(string\)",
        ),
        (
            "label",
            {"a": CLASSES, "b": CLASSES},
            None,
            r"2 label columns among a \(ClassLabel\), b \(ClassLabel\)",
        ),
        ("label", {"text": TEXT, "intent": CLASSES}, "intents", "'intents'.* mean 'intent'"),
        ("text", {"text": TEXT, "idx": NUMBER}, "idx", "'idx' .* text_column="),
    ],
)
def test_a_column_that_is_missing_ambiguous_or_misnamed(kind, columns, name, message):
    with pytest.raises(ValueError, match=message):
        find_column(Features(columns), kind, name)


def test_the_message_names_the_argument_of_the_caller():
    for name in ("txet", "idx"):
        with pytest.raises(ValueError, match="text_pair_column="):
            find_column(
                Features({"text": TEXT, "idx": NUMBER}), "text", name, argument="text_pair_column"
            )


# ---- classes -------------------------------------------------------------------------------------


def labelled(labels, feature):
    return datasets.Dataset.from_dict({"label": labels}, features=Features({"label": feature}))


def test_names_of_the_classes():
    assert class_names(labelled([1], ClassLabel(names=["no", "yes"])), "label") == ["no", "yes"]
    assert class_names(labelled([3, 0, 3], NUMBER), "label") == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, -1], NUMBER),
        ([0.5], Value("float64")),
        (["no"], TEXT),
        ([0, None], NUMBER),
        ([], NUMBER),
    ],
)
def test_labels_that_are_not_classes(labels, feature):
    with pytest.raises(ValueError, match=r"'label' are \[.*class_encode_column\('label'\)"):
        class_names(labelled(labels, feature), "label")
