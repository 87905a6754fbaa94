"""A causal language model, fine-tuned or from scratch, on all data or on a part that changes.

    python recipes/causal_lm.py --pruning ucb --keep_ratio 0.5 --output_dir runs/ucb
    accelerate launch recipes/causal_lm.py recipes/configs/causal_lm_pruned.yaml --lora_rank 8 --learning_rate 5e-4
    python recipes/causal_lm.py --dataset path/to/tiny_shakespeare --block_size 128 --tokenizer_vocabulary 1024 \\
        --model_config '{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4}' --learning_rate 2e-3

`--dataset` and `--model` are Hub ids or local paths. A sample, which is scored and kept as one, is a row of the dataset, or
with `--block_size` a block of so many tokens of all rows, joined; `--validation_share` holds samples out. Of questions with
answers the loss is on the answers (`--answer_only`). The last command needs neither the Hub nor a pretrained model. The
short run, the baseline to beat, is `--pruning full` with fewer epochs. AdamW, LR warm-up, then linear to zero. Writes
report.json, model, tokenizer and card to `--output_dir`.

`perplexity` is exp(token_loss), and that the mean over all predicted tokens of the evaluation split; the Trainer's own
`loss` is the mean of the means of its batches.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import common
import datasets
import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SchedulerType,
    set_seed,
)

from hf_dynprune import DynamicPruningTrainer, FullData, PruningArguments
from hf_dynprune.data import find_column, hold_out
from hf_dynprune.losses import IGNORED, RULES

GSM8K = "openai/gsm8k"


@dataclass
class DataArguments(common.DataArguments):
    dataset: str = field(
        default=GSM8K, metadata={"help": f"Hub id or local path of the dataset, such as {GSM8K}."}
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the texts; default: the only one, or text, or answer where there is a question."
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of what stands before a text; default: question where there is an answer, else none."
        },
    )
    answer_only: bool = field(
        default=True,
        metadata={"help": "Train and evaluate on the texts alone, not on what stands before them."},
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Join all texts and cut them into blocks of so many tokens; default: a row each."
        },
    )
    max_length: int = field(
        default=1024, metadata={"help": "Tokens after which a row is cut, where rows are samples."}
    )

    def __post_init__(self) -> None:
        if self.dataset == GSM8K:
            self.dataset_config = self.dataset_config or "main"
        for name in ("block_size", "max_length"):
            tokens = getattr(self, name)
            if tokens is not None and tokens < 2:
                raise ValueError(
                    f"{name}={tokens}: wanted are at least 2 tokens, of which the second can be predicted."
                )
        if self.validation_share and self.eval_split:
            raise ValueError(
                f"Evaluation is to be on {self.eval_split!r} and on validation_share={self.validation_share} of the "
                "training samples: leave one of the two out."
            )


@dataclass
class RecipeArguments(common.ModelArguments):
    model: str = field(
        default="HuggingFaceTB/SmolLM2-135M",
        metadata={
            "help": "Hub id or local path of a causal language model: of its weights, configuration and tokenizer."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train adapters of this rank on all linear layers (LoRA, by peft), not the model."
        },
    )
    lora_alpha: int = field(
        default=16, metadata={"help": "Scale of the adapters: lora_alpha / lora_rank."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank is not None and self.from_scratch:
            raise ValueError(
                f"lora_rank={self.lora_rank} adapts a pretrained model, and this one starts from random weights, which "
                "would stay as they are: leave out one of the two."
            )


@dataclass
class CausalTrainingArguments(common.TrainerArguments):
    """The Trainer's arguments, with the defaults of fine-tuning."""

    output_dir: str = field(default="runs/causal_lm", metadata={"help": "Where to write."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Training batch of one rank."}
    )
    per_device_eval_batch_size: int = field(
        default=16, metadata={"help": "Evaluation batch of one rank."}
    )
    learning_rate: float = field(
        default=5e-5,
        metadata={
            "help": "Peak learning rate of AdamW; adapters and models from scratch want 10 times that."
        },
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "LR warm-up: a share below 1, or steps."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="linear", metadata={"help": "Schedule behind the warm-up."}
    )
    bf16: bool = field(**common.BF16)
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})


def find_columns(data: DataArguments, features: Any) -> tuple[str | None, str]:
    """(column of what stands before a text, or None; column of the texts)."""
    prompt, text = data.prompt_column, data.text_column
    if prompt is None and text is None and {"question", "answer"} <= set(features):
        prompt, text = "question", "answer"
    if prompt is not None:
        prompt = find_column(features, "text", prompt, argument="prompt_column")
    return prompt, find_column(features, "text", text)


def make_tokenizer(recipe: RecipeArguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The model's own, or byte-level BPE trained on the texts: the same in each process, so that all ranks and resumed runs
    agree. Padding is never looked at, so that it may be the token of the end."""
    if recipe.tokenizer_vocabulary is None:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    else:
        tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, recipe.tokenizer_vocabulary)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_config(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The model's configuration; from scratch also for this tokenizer."""
    if not recipe.from_scratch:
        return AutoConfig.from_pretrained(recipe.model)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    changes = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}
    if isinstance(recipe.model_config, dict):
        return AutoConfig.for_model(**{**recipe.model_config, **changes})
    return AutoConfig.from_pretrained(recipe.model, **changes)


def make_samples(
    split: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    config: PreTrainedConfig,
) -> datasets.Dataset:
    """`input_ids` and `labels` of each sample: of a row, or of a block of all rows."""
    prompt, text = find_columns(data, split.features)
    longest = getattr(config, "max_position_embeddings", None) or data.block_size or data.max_length
    if data.block_size is None and len(split) < 2:
        raise ValueError(
            f"The dataset {data.dataset!r} has a split of {len(split)} row, which would be the only sample: cut it into "
            "many with --block_size 128."
        )
    if (data.block_size or 0) > longest:
        raise ValueError(
            f"block_size={data.block_size}: the model takes at the most {longest} tokens."
        )

    def tokenized(rows: dict[str, list]) -> dict[str, list]:
        # Without a prompt this is what the tokenizer sets before each text, if anything.
        starts = tokenizer(
            [f"{row}\n" for row in rows[prompt]] if prompt else [""] * len(rows[text]),
            verbose=False,
        )
        ends = tokenizer(rows[text], add_special_tokens=False, verbose=False)
        samples: dict[str, list] = {"input_ids": [], "labels": []}
        for start, end in zip(starts["input_ids"], ends["input_ids"], strict=True):
            end = [*end, tokenizer.eos_token_id]
            samples["input_ids"].append(start + end)
            samples["labels"].append(([IGNORED] * len(start) if data.answer_only else start) + end)
        return samples

    def cut(rows: dict[str, list]) -> dict[str, list]:
        if data.block_size is None:
            length = min(data.max_length, longest)
            return {name: [row[:length] for row in column] for name, column in rows.items()}
        joined = {name: list(chain.from_iterable(column)) for name, column in rows.items()}
        begins = range(0, len(joined["labels"]), data.block_size)
        return {
            name: [tokens[i : i + data.block_size] for i in begins]
            for name, tokens in joined.items()
        }

    samples = split.map(
        tokenized, batched=True, remove_columns=split.column_names, desc="Tokenizing"
    )
    samples = samples.map(cut, batched=True, desc="Cutting")
    return samples.filter(
        lambda row: any(label != IGNORED for label in row["labels"][1:]),
        desc="With tokens to predict",
    )


def load_samples(
    data: DataArguments, recipe: RecipeArguments
) -> tuple[datasets.Dataset, datasets.Dataset | None, PreTrainedTokenizerBase, PreTrainedConfig]:
    """Samples to train on and to evaluate on, tokenizer, configuration."""
    # A text may be a single row: where rows are cut into blocks, these are held out.
    by_block = data.block_size is not None and data.validation_share > 0
    train, test = (replace(data, validation_share=0.0) if by_block else data).load_splits()
    columns = filter(None, find_columns(data, train.features))
    tokenizer = make_tokenizer(recipe, chain.from_iterable(train[column] for column in columns))
    config = make_config(recipe, tokenizer)
    train = make_samples(train, tokenizer, data, config)
    if by_block:
        train, test = hold_out(train, data.validation_share)
    elif test is not None:
        test = make_samples(test, tokenizer, data, config)
    return train, test, tokenizer, config


def make_model(recipe: RecipeArguments, config: PreTrainedConfig) -> torch.nn.Module:
    if recipe.from_scratch:
        return AutoModelForCausalLM.from_config(config)
    # In float32, whatever it was saved in: small steps of AdamW are lost on bfloat16 weights.
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    if recipe.lora_rank is None:
        return model
    import peft

    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """For `preprocess_logits_for_metrics`: of each sample the sum of its token losses, and how many, (B, 2)."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    losses = RULES["shifted_tokens"].losses({"logits": logits}, {"labels": labels}, 0.0, None)
    return torch.stack([losses.plain, losses.terms], dim=1)


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """For `compute_metrics`: the mean loss of a token, and exp of that."""
    total, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    return {"token_loss": float(total / tokens), "perplexity": float(np.exp(total / tokens))}


def main() -> None:
    data, recipe, pruning, args = common.parse(
        __doc__, DataArguments, RecipeArguments, PruningArguments, CausalTrainingArguments
    )
    args.label_names = ["labels"]  # not to be read off the signature of peft's wrapper
    with common.user_mistakes():
        policy = pruning.policy() or FullData()
        common.check_output(args, recipe)
        with args.main_process_first(desc="tokenizing"):
            train, test, tokenizer, config = load_samples(data, recipe)
        set_seed(args.seed)
        model = make_model(recipe, config)

    trainer = DynamicPruningTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=token_losses,
        pruning=policy,
    )
    common.train(
        trainer,
        dataset=data.dataset,
        task="text-generation",
        metric="perplexity",
        advise=recipe.advise,
    )


if __name__ == "__main__":
    main()
