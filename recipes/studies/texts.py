"""Write the text datasets that some studies train on.

    python -m recipes.studies.texts sums --output data/sums
    python recipes/causal_lm.py --dataset data/sums --tokenizer_vocabulary 260 \\
        --model_config '{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4}'

    python -m recipes.studies.texts sums --sign - --output data/differences
    python -m recipes.studies.texts mixture --output data/mixture
    python recipes/causal_lm.py --dataset data/mixture --target_split target --score reference \\
        --tokenizer_vocabulary 1024 --output_dir runs/reference \\
        --model_config '{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2}'

sums: questions and answers. A question is two numbers of three digits, such as 123+456. The answer
begins with the lowest place, 975, where adding begins. No question is drawn twice, so the test
split holds none of the training split. `--sign -` writes differences such as 456-123 and 333, a
task for a model that was trained on sums.

mixture: a target task among other text. The training split has samples of the target, GSM8K, and
pieces of another text, Shakespeare. The column `target` says which is which; no recipe reads
it. The split `target` has other samples of the target, and the split `test` is the target's.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np

from hf_dynprune.data import load_splits


def sums(rows: int, sign: str = "+") -> datasets.Dataset:
    """Draw different sums, as columns `question` and `answer`; the same ones in each call.

    With `sign="-"` the same pairs of numbers as differences, the larger number first.
    """
    pairs = np.random.default_rng(0).choice(900 * 900, rows, replace=False)
    first, second = 100 + pairs // 900, 100 + pairs % 900
    if sign == "-":
        first, second = np.maximum(first, second), np.minimum(first, second)
    results = first - second if sign == "-" else first + second
    return datasets.Dataset.from_dict(
        {
            "question": [f"{a}{sign}{b}" for a, b in zip(first, second, strict=True)],
            "answer": [str(result)[::-1] for result in results],
        }
    )


def as_text(rows: datasets.Dataset) -> datasets.Dataset:
    """Join question and answer of each row, as columns `text` and `target`."""
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    return datasets.Dataset.from_dict({"text": texts, "target": [True] * len(texts)})


def pieces(text: str, length: int) -> datasets.Dataset:
    """Cut a text into pieces of `length` characters. The columns are `text` and `target`."""
    texts = [text[begin : begin + length] for begin in range(0, len(text), length)]
    return datasets.Dataset.from_dict({"text": texts, "target": [False] * len(texts)})


def first_rows(rows: datasets.Dataset, wanted: int, what: str) -> datasets.Dataset:
    """The first rows. ValueError if there are not that many."""
    if not 0 < wanted <= len(rows):
        raise ValueError(f"{what}={wanted} is out of range: expected 1 to {len(rows)}.")
    return rows.select(range(wanted))


def mixture(options: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """The splits train, target and test of the mixture; the same ones in each call."""
    task, test = load_splits(options.task, options.task_config, evaluation="test")
    other, _ = load_splits(options.other)
    task = as_text(first_rows(task, options.rows + options.target, "rows + target"))
    cut = pieces("".join(other["text"]), options.characters)
    cut = first_rows(cut.shuffle(seed=0), options.other_rows, "other_rows")
    mixed = datasets.concatenate_datasets([task.select(range(options.rows)), cut])
    return {
        "train": mixed.shuffle(seed=0),
        "target": task.select(range(options.rows, len(task))),
        "test": as_text(first_rows(test, options.test, "test")),
    }


def make_parser() -> argparse.ArgumentParser:
    """The options of both datasets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    of_sums, of_mixture = kinds.add_parser("sums"), kinds.add_parser("mixture")
    of_sums.add_argument("--train", type=int, default=20_000, help="Sums to train on.")
    of_sums.add_argument("--test", type=int, default=2_000, help="Sums to evaluate on.")
    of_sums.add_argument("--sign", choices="+-", default="+", help="Sums or differences.")
    add = of_mixture.add_argument
    add("--task", default="openai/gsm8k", help="Dataset of the target: Hub id or local path.")
    add("--task_config", help="Its configuration, such as main; default: the only one.")
    add("--other", default="karpathy/tiny_shakespeare", help="Dataset with the other text.")
    add("--rows", type=int, default=1_000, help="Samples of the target to train on.")
    add("--target", type=int, default=500, help="Further samples of the target, for the reference.")
    add("--other_rows", type=int, default=2_000, help="Pieces of the other text to train on.")
    add("--characters", type=int, default=500, help="Length of a piece.")
    add("--test", type=int, default=500, help="Samples of the target to evaluate on.")
    for each in (of_sums, of_mixture):
        each.add_argument("--output", type=Path, required=True, help="Folder to write.")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    try:
        if options.kind == "sums":
            drawn = sums(options.train + options.test, options.sign)
            splits = drawn.train_test_split(options.test, shuffle=False)
        else:
            splits = mixture(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    folder = options.output / "data"  # only there does datasets take any name of a split
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
