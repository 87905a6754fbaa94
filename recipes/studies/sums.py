"""Write sums as a dataset of questions and answers.

    python -m recipes.studies.sums --output data/sums
    python recipes/causal_lm.py --dataset data/sums --tokenizer_vocabulary 260 \\
        --model_config '{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4}'

A question is two numbers of three digits, such as 123+456. The answer begins with the lowest
place, 975, where adding begins. No question is drawn twice, so the test split holds none of the
training split.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np


def draw(rows: int) -> datasets.Dataset:
    """Draw different sums, as columns `question` and `answer`; the same ones in each call."""
    pairs = np.random.default_rng(0).choice(900 * 900, rows, replace=False)
    first, second = 100 + pairs // 900, 100 + pairs % 900
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
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    options = parser.parse_args()
    sums = draw(options.train + options.test)
    options.output.mkdir(parents=True, exist_ok=True)
    for split, rows in sums.train_test_split(options.test, shuffle=False).items():
        rows.to_parquet(options.output / f"{split}-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
