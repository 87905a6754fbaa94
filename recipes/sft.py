"""Supervised fine-tuning with trl's SFTTrainer, on all data or on a changing subset.

    python recipes/sft.py --pruning infobatch --output_dir runs/sft
    python recipes/sft.py recipes/configs/sft_pruned.yaml
    accelerate launch recipes/sft.py --dataset path/to/conversations --pruning ucb \\
        --keep_ratio 0.3 --use_peft True --lora_target_modules all-linear --learning_rate 2e-4

`--dataset` is a Hub id or a local path. It contains conversations, prompts with completions, or
texts, as the SFTTrainer takes them; questions with answers become prompts with completions. All
arguments of SFTConfig and of trl's ModelConfig are accepted. The configurations train without
padding; `--packing True` packs texts into rows, of which each is a sample. Writes report.json,
model, tokenizer and card to `--output_dir`.
"""

from dataclasses import dataclass

import common
import datasets
from trl import ModelConfig, SFTConfig, get_peft_config

from hf_dynprune import FullData, PruningArguments
from hf_dynprune.sft import DynamicPruningSFTTrainer

GSM8K = "openai/gsm8k"


@dataclass
class DataArguments(common.DataArguments):
    dataset: str = common.option(GSM8K, f"Hub id or local path of the dataset, such as {GSM8K}.")

    def __post_init__(self) -> None:
        if self.dataset == GSM8K:
            self.dataset_config = self.dataset_config or "main"


@dataclass
class ModelArguments(ModelConfig):
    _argument_group_name = "model"

    model_name_or_path: str | None = common.option(
        "HuggingFaceTB/SmolLM2-135M", "Hub id or local path of the model."
    )


@dataclass
class TextDefaults(common.CPUDefaults):
    """Also with bfloat16 where it is fast."""

    bf16: bool | None = common.option(
        None if common.computes_in_bf16() else False,
        "bfloat16 autocast; default: True if the hardware computes in it (not by emulation) and "
        "--fp16 is not set.",
    )


@dataclass
class SFTArguments(TextDefaults, SFTConfig):
    """SFTConfig, with defaults that also work on a CPU."""

    _argument_group_name = "all arguments of SFTConfig"

    output_dir: str | None = common.option("runs/sft", "Output folder.")


def prompts(split: datasets.Dataset) -> datasets.Dataset:
    """Turn questions with answers into prompts with completions; keep everything else."""
    if not {"question", "answer"} <= set(split.column_names):
        return split
    return split.map(
        lambda row: {"prompt": f"{row['question']}\n", "completion": row["answer"]},
        remove_columns=split.column_names,
    )


def main() -> None:
    data, run, model, pruning, args = common.parse(
        __doc__, DataArguments, common.RunArguments, ModelArguments, PruningArguments, SFTArguments
    )
    with common.user_mistakes():
        policy = pruning.policy() or FullData()
        common.check_output(args, run)
        with args.main_process_first(desc="reading the data"):
            train, test = data.load_splits()
            train, test = prompts(train), None if test is None else prompts(test)
    trainer = DynamicPruningSFTTrainer(
        model.model_name_or_path,
        args,
        train_dataset=train,
        eval_dataset=test,
        peft_config=get_peft_config(model),
        pruning=policy,
    )
    common.train(
        trainer,
        dataset=data.dataset,
        task="text-generation",
        metric="mean_token_accuracy",
        advise=run.advise,
        after=run.after,
    )


if __name__ == "__main__":
    main()
