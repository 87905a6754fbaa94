"""Write sums as a dataset of questions and answers, on which a small model learns in minutes.

    python -m recipes.studies.sums --output data/sums
    python recipes/causal_lm.py --dataset data/sums --tokenizer_vocabulary 260 \\
        --model_config '{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4}'

A question is two numbers of `--digits` digits, such as 123+456. The answer has its digits in
reverse, 975, as a child adds: small models learn that much earlier. No question is drawn twice, so
the test split holds none of the training split.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np


def draw(rows: int, digits: int, seed: int) -> datasets.Dataset:
    """Draw different sums, as columns `question` and `answer`."""
    low, high = 10 ** (digits - 1), 10**digits
    pairs = np.random.default_rng(seed).choice((high - low) ** 2, rows, replace=False)
    first, second = low + pairs // (high - low), low + pairs % (high - low)
    return datasets.Dataset.from_dict(
        {
            "question": [f"{a}+{b}" for a, b in zip(first, second, strict=True)],
            "answer": [str(total)[::-1] for total in first + second],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=20_000, help="Sums to train on.")
    parser.add_argument("--test", type=int, default=2_000, help="Sums to evaluate on.")
    parser.add_argument("--digits", type=int, default=3, help="Of each number.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    options = parser.parse_args()
    sums = draw(options.train + options.test, options.digits, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    for split, rows in (
        ("train", range(options.train)),
        ("test", range(options.train, len(sums))),
    ):
        sums.select(rows).to_parquet(options.output / f"{split}-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
