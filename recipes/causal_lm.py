"""A causal language model, fine-tuned or from scratch, on all data or on a changing subset.

    python recipes/causal_lm.py --pruning ucb --keep_ratio 0.5 --output_dir runs/ucb
    accelerate launch recipes/causal_lm.py recipes/configs/causal_lm_pruned.yaml --lora_rank 8 \\
        --learning_rate 5e-4
    python recipes/causal_lm.py --dataset path/to/tiny_shakespeare --block_size 128 \\
        --tokenizer_vocabulary 1024 --learning_rate 2e-3 \\
        --model_config '{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4}'

`--dataset` and `--model` are Hub ids or local paths. The last command needs neither the Hub nor a
pretrained model. A sample is scored and kept as a whole. It is a row of the dataset; with
`--block_size` all rows are joined and cut into blocks of that many tokens, and a sample is a block.
`--validation_share` holds samples out. If the dataset has questions and answers, the loss is on the
answers (`--answer_only`). The short run, the baseline to beat, is `--pruning full` with fewer
epochs. The optimizer is AdamW; the learning rate warms up, then falls linearly to zero. Writes
report.json, model, tokenizer and card to `--output_dir`.

`perplexity` is exp(token_loss), and token_loss is the mean over all predicted tokens of the
evaluation split. The Trainer's `loss` is the mean of the means of its batches. `exact_match` is the
share of samples whose every predicted token is the likeliest one: greedy decoding would write them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
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
from hf_dynprune.data import find_column, hold_out, load_splits
from hf_dynprune.losses import IGNORED, RULES

GSM8K = "openai/gsm8k"


@dataclass
class DataArguments(common.DataArguments):
    dataset: str = common.option(GSM8K, f"Hub id or local path of the dataset, such as {GSM8K}.")
    text_column: str | None = common.option(
        None,
        "Column of the texts; default: answer if there is a question, else the only one, or text.",
    )
    prompt_column: str | None = common.option(
        None, "Column of the prompts; default: question if there is an answer, else none."
    )
    answer_only: bool = common.option(
        True, "Train and evaluate on the texts only, not on their prompts."
    )
    block_size: int | None = common.option(
        None,
        "Join all texts and cut them into blocks of this many tokens; default: each row is a "
        "sample.",
    )
    max_length: int = common.option(1024, "Tokens after which a row is cut, without --block_size.")
    target_split: str | None = common.option(
        None, "Split of samples of the target task. --score reference trains on these alone."
    )

    def __post_init__(self) -> None:
        if self.dataset == GSM8K:
            self.dataset_config = self.dataset_config or "main"
        for name in ("block_size", "max_length"):
            tokens = getattr(self, name)
            if tokens is not None and tokens < 2:
                raise ValueError(
                    f"{name}={tokens} is out of range: expected at least 2 tokens, because the "
                    "first one cannot be predicted."
                )
        if self.validation_share and self.eval_split:
            raise ValueError(
                f"eval_split={self.eval_split!r} and validation_share={self.validation_share} both "
                "name the samples to evaluate on: give one of the two."
            )


@dataclass
class RecipeArguments(common.ModelArguments, common.ScoringArguments):
    model: str = common.option(
        "HuggingFaceTB/SmolLM2-135M",
        "Hub id or local path of a causal language model; gives weights, configuration and "
        "tokenizer.",
    )
    lora_rank: int | None = common.option(
        None,
        "Train adapters of this rank on all linear layers (LoRA, by peft) instead of the model.",
    )
    lora_alpha: int = common.option(16, "Scale of the adapters: lora_alpha / lora_rank.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank is not None and self.from_scratch:
            raise ValueError(
                f"lora_rank={self.lora_rank} adapts a pretrained model, and this model starts from "
                "random weights, which would not be trained: leave out one of the two."
            )


@dataclass
class CausalTrainingArguments(common.TrainerArguments):
    """The Trainer's arguments, with defaults for fine-tuning."""

    output_dir: str = common.option("runs/causal_lm", "Output folder.")
    num_train_epochs: float = common.option(3.0, "Number of epochs.")
    per_device_train_batch_size: int = common.option(16, "Training batch size per rank.")
    per_device_eval_batch_size: int = common.option(16, "Evaluation batch size per rank.")
    learning_rate: float = common.option(
        5e-5,
        "Peak learning rate of AdamW. Adapters and models from scratch need ten times as much.",
    )
    warmup_steps: float = common.option(
        0.05, "Learning-rate warm-up: a share of the run if below 1, else steps."
    )
    lr_scheduler_type: SchedulerType | str = common.option("linear", "Schedule after the warm-up.")
    bf16: bool = common.option(common.computes_in_bf16(), common.BF16_HELP)
    logging_steps: float = common.option(50, "Steps between two log entries.")


def find_columns(data: DataArguments, features: Any) -> tuple[str | None, str]:
    """Find (column of the prompts or None, column of the texts)."""
    prompt, text = data.prompt_column, data.text_column
    if prompt is None and text is None and {"question", "answer"} <= set(features):
        prompt, text = "question", "answer"
    if prompt is not None:
        prompt = find_column(features, "text", prompt, argument="prompt_column")
    return prompt, find_column(features, "text", text)


def make_tokenizer(recipe: RecipeArguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or train a byte-level BPE on the texts.

    Each process trains the same one, so ranks and resumed runs agree. Padding is ignored, so the
    end-of-text token may serve as padding.
    """
    if recipe.tokenizer_vocabulary is None:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    else:
        tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, recipe.tokenizer_vocabulary)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_config(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Make the model's configuration; from scratch also for this tokenizer."""
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
    """Make samples with `input_ids` and `labels`: one per row, or one per block of all rows."""
    prompt, text = find_columns(data, split.features)
    longest = getattr(config, "max_position_embeddings", None) or data.block_size or data.max_length
    if data.block_size is None and len(split) < 2:
        raise ValueError(
            f"The dataset {data.dataset!r} has a split with {len(split)} rows, and each row is a "
            "sample: cut it into many with --block_size 128."
        )
    if (data.block_size or 0) > longest:
        raise ValueError(
            f"block_size={data.block_size} is out of range: the model takes at most {longest} "
            "tokens."
        )

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        # Without prompts, the start is what the tokenizer sets before each text, if anything.
        prompts = [f"{row}\n" for row in rows[prompt]] if prompt else [""] * len(rows[text])
        starts = tokenizer(prompts, verbose=False)
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
        blocks = {}
        for name, column in rows.items():
            tokens = list(chain.from_iterable(column))
            begins = range(0, len(tokens), data.block_size)
            blocks[name] = [tokens[begin : begin + data.block_size] for begin in begins]
        return blocks

    def has_predictions(row: dict[str, list]) -> bool:
        return any(label != IGNORED for label in row["labels"][1:])

    columns = split.column_names
    samples = split.map(tokenize, batched=True, remove_columns=columns, desc="Tokenizing")
    samples = samples.map(cut, batched=True, desc="Cutting")
    return samples.filter(has_predictions, desc="Dropping samples without tokens to predict")


def load_samples(
    data: DataArguments, recipe: RecipeArguments
) -> tuple[datasets.Dataset, datasets.Dataset | None, PreTrainedTokenizerBase, PreTrainedConfig]:
    """Load (samples to train on, samples to evaluate on, tokenizer, configuration)."""
    # A text may be a single row, so with --block_size blocks are held out, not rows.
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


def load_target(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> datasets.Dataset | None:
    """Load the samples of --target_split; None without it."""
    if data.target_split is None:
        return None
    target, _ = load_splits(data.dataset, data.dataset_config, train=data.target_split)
    return make_samples(target, tokenizer, data, config)


def make_model(recipe: RecipeArguments, config: PreTrainedConfig) -> torch.nn.Module:
    """Make a model from random weights, from pretrained weights, or with adapters."""
    attention = recipe.attn_implementation
    if recipe.from_scratch:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # In float32, whatever the file holds: bfloat16 weights would lose the small steps of AdamW.
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model, dtype=torch.float32, attn_implementation=attention
    )
    if recipe.lora_rank is None:
        return model
    import peft

    adapters = peft.LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, adapters)


def token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Compute (B, 3): the sum of a sample's token losses, their number, and that of wrong tokens.

    A token is wrong if another one is likelier. For `preprocess_logits_for_metrics`.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    losses = RULES["shifted_tokens"].losses({"logits": logits}, {"labels": labels}, 0.0, None)
    predicted = labels[:, 1:]
    wrong = logits[:, :-1].argmax(-1).ne(predicted) & predicted.ne(IGNORED)
    return torch.stack([losses.plain, losses.terms, wrong.sum(1)], dim=1)


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the mean loss of a token, its exp, and the exact match. For `compute_metrics`."""
    found = np.asarray(prediction.predictions, dtype=np.float64)
    total, tokens, _ = found.sum(0)
    return {
        "token_loss": float(total / tokens),
        "perplexity": float(np.exp(total / tokens)),
        "exact_match": float((found[:, 2] == 0).mean()),
    }


def main() -> None:
    data, recipe, pruning, args = common.parse(
        __doc__, DataArguments, RecipeArguments, PruningArguments, CausalTrainingArguments
    )
    # The Trainer would read this from the model's signature, which peft's wrapper hides.
    args.label_names = ["labels"]
    with common.user_mistakes():
        policy = pruning.policy() or FullData()
        if not recipe.score:
            common.check_output(args, recipe)
        with args.main_process_first(desc="tokenizing"):
            train, test, tokenizer, config = load_samples(data, recipe)
            target = load_target(data, tokenizer, config) if recipe.score else None
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    if recipe.score:
        return common.score(
            recipe,
            args,
            model_init=partial(make_model, recipe, config),
            train_dataset=train,
            holdout=target,
            processing_class=tokenizer,
            data_collator=collator,
        )
    with common.user_mistakes():
        set_seed(args.seed)
        model = make_model(recipe, config)

    trainer = DynamicPruningTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=collator,
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
        after=recipe.after,
    )


if __name__ == "__main__":
    main()
