"""Direct preference optimization with trl's DPOTrainer, on all pairs or on a changing subset.

    python recipes/dpo.py --pruning loss-proportional --keep_ratio 0.5 --output_dir runs/dpo
    accelerate launch recipes/dpo.py recipes/configs/dpo_pruned.yaml --use_peft True \\
        --lora_target_modules all-linear --learning_rate 1e-5

`--dataset` is a Hub id or a local path. It contains pairs, as the DPOTrainer takes them: `chosen`
and `rejected`, with or without `prompt`. Questions with answers become pairs: the right answer
against one in which the result is a wrong number. Answers without a number are left out. A model
that was fine-tuned on the answers before (recipes/sft.py) is the usual start. All arguments of
DPOConfig and of trl's ModelConfig are accepted. Writes report.json, model, tokenizer and card to
`--output_dir`.

`rewards/accuracies` is the share of pairs whose chosen answer gained more than the rejected one,
against the reference model.
"""

import random
import re
from dataclasses import dataclass
from decimal import Decimal

import common
import datasets
from sft import DataArguments, ModelArguments, TextDefaults
from trl import DPOConfig, get_peft_config

from hf_dynprune import FullData, PruningArguments
from hf_dynprune.preference import DynamicPruningDPOTrainer

# Such as 72, 1,250 or 3.5.
NUMBER = r"\d[\d,]*\d(?:\.\d+)?|\d(?:\.\d+)?"


@dataclass
class DPOArguments(TextDefaults, DPOConfig):
    """DPOConfig, with defaults that also work on a CPU."""

    _argument_group_name = "all arguments of DPOConfig"

    output_dir: str | None = common.option("runs/dpo", "Output folder.")


def wrong_answer(answer: str, seed: int) -> str | None:
    """The answer with another result; None if it has no number.

    The result is the last number. It is replaced wherever it stands, so that the text agrees with
    itself: in GSM8K in the last step, and behind `####`.

    Args:
        answer: Such as `"48 + 24 = 72 clips. #### 72"`.
        seed: The wrong number is a function of answer and seed. It is at most a tenth or 9 away.
    """
    numbers = re.findall(NUMBER, answer)
    if not numbers:
        return None
    right = numbers[-1]
    value = Decimal(right.replace(",", ""))
    draw = random.Random(seed)
    step = draw.randint(1, max(9, int(abs(value)) // 10))
    below = draw.random() < 0.5 and step <= value
    wrong = value - step if below else value + step
    shown = f"{wrong:,}" if "," in right else str(wrong)
    return re.sub(NUMBER, lambda found: shown if found[0] == right else found[0], answer)


def pairs(split: datasets.Dataset) -> datasets.Dataset:
    """Turn questions with answers into pairs; keep everything else."""
    if not {"question", "answer"} <= set(split.column_names):
        return split

    def pair(row: dict[str, str], number: int) -> dict[str, str | None]:
        wrong = wrong_answer(row["answer"], number)
        return {"prompt": f"{row['question']}\n", "chosen": row["answer"], "rejected": wrong}

    made = split.map(pair, with_indices=True, remove_columns=split.column_names)
    made = made.filter(lambda row: row["rejected"] is not None)
    if len(made) == 0:
        raise ValueError(
            f"None of {len(split)} answers has a number that could be replaced by a wrong one: "
            "expected answers such as '48 + 24 = 72', or a dataset with columns 'chosen' and "
            "'rejected'."
        )
    return made


def main() -> None:
    data, run, model, pruning, args = common.parse(
        __doc__, DataArguments, common.RunArguments, ModelArguments, PruningArguments, DPOArguments
    )
    with common.user_mistakes():
        policy = pruning.policy() or FullData()
        common.check_output(args, run)
        with args.main_process_first(desc="reading the data"):
            train, test = data.load_splits()
            train, test = pairs(train), None if test is None else pairs(test)
    trainer = DynamicPruningDPOTrainer(
        model.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        peft_config=get_peft_config(model),
        pruning=policy,
    )
    common.train(
        trainer,
        dataset=data.dataset,
        task="text-generation",
        metric="rewards/accuracies",
        advise=run.advise,
        after=run.after,
    )


if __name__ == "__main__":
    main()
