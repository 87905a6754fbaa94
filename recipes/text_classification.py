"""Text classification with any encoder, on all data or on a changing subset.

    python recipes/text_classification.py --pruning ucb --keep_ratio 0.5 --output_dir runs/ucb
    python recipes/text_classification.py --dataset nyu-mll/glue --dataset_config mrpc \\
        --text_column sentence1 --text_pair_column sentence2 --model FacebookAI/roberta-base \\
        --pruning random --keep_ratio 0.5
    accelerate launch recipes/text_classification.py recipes/configs/text_classification_pruned.yaml
    python recipes/text_classification.py --dataset path/to/banking77 --learning_rate 1e-3 \\
        --tokenizer_vocabulary 4000 --model_config '{"model_type": "bert", "hidden_size": 128,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}'

`--dataset` and `--model` are Hub ids or local paths. The last command needs neither the Hub nor a
pretrained model. The short run, the baseline to beat, is `--pruning full` with fewer epochs. The
optimizer is AdamW; the learning rate warms up, then falls linearly to zero. Writes report.json,
model, tokenizer and card to `--output_dir`; `pipeline("text-classification")` loads them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import common
import datasets
import torch
from metrics import accuracy_and_f1, best_classes
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
    SchedulerType,
    set_seed,
)

from hf_dynprune import DynamicPruningTrainer, FullData, PruningArguments
from hf_dynprune.data import class_names, find_column


@dataclass
class DataArguments(common.DataArguments):
    dataset: str = common.option(
        "PolyAI/banking77", "Hub id or local path of the dataset, such as PolyAI/banking77."
    )
    text_column: str | None = common.option(
        None, "Column of the texts; default: the only one, or text."
    )
    text_pair_column: str | None = common.option(
        None, "Column of the second texts, to classify pairs of texts."
    )
    label_column: str | None = common.option(
        None, "Column of the labels; default: the only ClassLabel column, or label."
    )


@dataclass
class RecipeArguments(common.ModelArguments):
    model: str = common.option(
        "distilbert/distilbert-base-uncased",
        "Hub id or local path of an encoder; gives weights, configuration and tokenizer.",
    )
    max_length: int = common.option(128, "Tokens after which a text is cut.")


@dataclass
class TextTrainingArguments(common.TrainerArguments):
    """The Trainer's arguments, with defaults for fine-tuning."""

    output_dir: str = common.option("runs/text_classification", "Output folder.")
    num_train_epochs: float = common.option(10.0, "Number of epochs.")
    per_device_train_batch_size: int = common.option(32, "Training batch size per rank.")
    per_device_eval_batch_size: int = common.option(128, "Evaluation batch size per rank.")
    learning_rate: float = common.option(5e-5, "Peak learning rate of AdamW.")
    weight_decay: float = common.option(0.01, "Weight decay, not on norms and biases.")
    warmup_steps: float = common.option(
        0.1, "Learning-rate warm-up: a share of the run if below 1, else steps."
    )
    lr_scheduler_type: SchedulerType | str = common.option("linear", "Schedule after the warm-up.")
    logging_steps: float = common.option(100, "Steps between two log entries.")


def make_tokenizer(recipe: RecipeArguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or train one on the texts.

    It is byte-level BPE, which gives the same vocabulary each time it is trained on the same texts,
    so ranks and resumed runs agree. WordPiece does not: `tokenizers` numbers its first letters in
    the order of a hash table.
    """
    if recipe.tokenizer_vocabulary is not None:
        tokenizer = RobertaTokenizer(add_prefix_space=True).train_new_from_iterator(
            texts, recipe.tokenizer_vocabulary
        )
        tokenizer.model_max_length = recipe.max_length
        return tokenizer
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer of {recipe.model} has no padding token: choose an encoder, --model."
        )
    return tokenizer


def make_config(
    recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> PreTrainedConfig:
    """Make the model's configuration for these classes; from scratch also for this tokenizer."""
    changes: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if recipe.from_scratch:
        special = ("pad_token_id", "bos_token_id", "eos_token_id")
        changes |= {
            "vocab_size": len(tokenizer),
            **{name: getattr(tokenizer, name) for name in special},
        }
    if isinstance(recipe.model_config, dict):
        config = AutoConfig.for_model(**{**recipe.model_config, **changes})
    else:
        config = AutoConfig.from_pretrained(recipe.model, **changes)
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", 0))
    longest = min(limit for limit in limits if limit > 0)  # XLNet has -1, which means no limit
    if not 1 <= recipe.max_length <= longest:
        raise ValueError(
            f"max_length={recipe.max_length} is out of range: the model takes 1 to {longest} "
            "tokens."
        )
    return config


@dataclass
class Texts:
    """The tokenized splits, and what is needed to make a model for them."""

    train: datasets.Dataset
    test: datasets.Dataset | None
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig


def load_texts(data: DataArguments, recipe: RecipeArguments) -> Texts:
    """Load and tokenize the splits."""
    train, test = data.load_splits()
    columns = [find_column(train.features, "text", data.text_column)]
    if data.text_pair_column is not None:
        second = data.text_pair_column
        columns.append(find_column(train.features, "text", second, argument="text_pair_column"))
    label = find_column(train.features, "label", data.label_column)
    names = class_names(train, label)
    texts = (text for column in columns for text in train[column])
    tokenizer = make_tokenizer(recipe, texts)
    config = make_config(recipe, tokenizer, names)

    def tokenize(rows: dict[str, list]) -> dict[str, Any]:
        first_and_second = (rows[column] for column in columns)
        tokens = tokenizer(*first_and_second, truncation=True, max_length=recipe.max_length)
        return {**tokens, "labels": rows[label]}

    def tokenized(split: datasets.Dataset) -> datasets.Dataset:
        options = {"remove_columns": split.column_names, "desc": "Tokenizing"}
        return split.map(tokenize, batched=True, **options)

    return Texts(tokenized(train), None if test is None else tokenized(test), tokenizer, config)


def make_model(recipe: RecipeArguments, config: PreTrainedConfig) -> torch.nn.Module:
    """Make a model from random or pretrained weights."""
    attention = recipe.attn_implementation
    if recipe.from_scratch:
        return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    # In float32, whatever the file holds: bfloat16 weights would lose the small steps of AdamW.
    return AutoModelForSequenceClassification.from_pretrained(
        recipe.model,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        attn_implementation=attention,
    )


def main() -> None:
    data, recipe, pruning, args = common.parse(
        __doc__, DataArguments, RecipeArguments, PruningArguments, TextTrainingArguments
    )
    with common.user_mistakes():
        policy = pruning.policy() or FullData()
        common.check_output(args, recipe)
        with args.main_process_first(desc="tokenizing"):
            texts = load_texts(data, recipe)
        set_seed(args.seed)
        model = make_model(recipe, texts.config)
    trainer = DynamicPruningTrainer(
        model=model,
        args=args,
        train_dataset=texts.train,
        eval_dataset=texts.test,
        processing_class=texts.tokenizer,
        data_collator=DataCollatorWithPadding(texts.tokenizer),
        compute_metrics=accuracy_and_f1(),
        preprocess_logits_for_metrics=best_classes,
        pruning=policy,
    )
    common.train(
        trainer,
        dataset=data.dataset,
        task="text-classification",
        metric="accuracy",
        advise=recipe.advise,
        after=recipe.after,
    )


if __name__ == "__main__":
    main()
