"""Text classification with any encoder, on all data or on a part that changes.

    python recipes/text_classification.py --pruning ucb --keep_ratio 0.5 --output_dir runs/ucb
    python recipes/text_classification.py --dataset nyu-mll/glue --dataset_config mrpc --text_column sentence1 \\
        --text_pair_column sentence2 --model FacebookAI/roberta-base --pruning random --keep_ratio 0.5
    accelerate launch recipes/text_classification.py recipes/configs/text_classification_pruned.yaml
    python recipes/text_classification.py --dataset path/to/banking77 --tokenizer_vocabulary 4000 --learning_rate 1e-3 \\
        --model_config '{"model_type": "bert", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 2}'

`--dataset` and `--model` are Hub ids or local paths. The last command needs neither the Hub nor a pretrained model. The
short run, the baseline to beat, is `--pruning full` with fewer epochs. AdamW, LR warm-up, then linear to zero. Writes
report.json, model, tokenizer and card to `--output_dir`; `pipeline("text-classification")` loads them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
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
    dataset: str = field(
        default="PolyAI/banking77",
        metadata={"help": "Hub id or local path of the dataset, such as PolyAI/banking77."},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of the texts; default: the only one, or text."}
    )
    text_pair_column: str | None = field(
        default=None,
        metadata={"help": "Column of second texts, where pairs of texts are classified."},
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of the labels; default: the only ClassLabel column, or label."},
    )


@dataclass
class RecipeArguments(common.ModelArguments):
    model: str = field(
        default="distilbert/distilbert-base-uncased",
        metadata={
            "help": "Hub id or local path of an encoder: of its weights, configuration and tokenizer."
        },
    )
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text is cut."})


@dataclass
class TextTrainingArguments(common.TrainerArguments):
    """The Trainer's arguments, with the defaults of fine-tuning."""

    output_dir: str = field(
        default="runs/text_classification", metadata={"help": "Where to write."}
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs."})
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Training batch of one rank."}
    )
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Evaluation batch of one rank."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay, not on norms and biases."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "LR warm-up: a share below 1, or steps."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="linear", metadata={"help": "Schedule behind the warm-up."}
    )
    logging_steps: float = field(default=100, metadata={"help": "Log every so many steps."})


def make_tokenizer(recipe: RecipeArguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The model's own, or one that is trained on the texts.

    Byte-level BPE, since from the same texts it gives the same vocabulary each time: ranks and resumed runs agree.
    WordPiece does not (`tokenizers` numbers its first letters in the order of a hash table).
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
            f"The tokenizer of {recipe.model} has no padding token: choose an encoder as --model."
        )
    return tokenizer


def make_config(
    recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> PreTrainedConfig:
    """The model's configuration, for these classes; from scratch also for this tokenizer."""
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
    longest = min(limit for limit in limits if limit > 0)  # XLNet says -1, which is none
    if not 1 <= recipe.max_length <= longest:
        raise ValueError(
            f"max_length={recipe.max_length}: wanted is from 1 to {longest}, what the model takes."
        )
    return config


def main() -> None:
    data, recipe, pruning, args = common.parse(
        __doc__, DataArguments, RecipeArguments, PruningArguments, TextTrainingArguments
    )
    with common.user_mistakes():
        policy = pruning.policy() or FullData()
        common.check_output(args, recipe)
        with args.main_process_first(desc="tokenizing"):
            train, test = data.load_splits()
            columns = [find_column(train.features, "text", data.text_column)]
            if data.text_pair_column is not None:
                columns.append(
                    find_column(
                        train.features, "text", data.text_pair_column, argument="text_pair_column"
                    )
                )
            label = find_column(train.features, "label", data.label_column)
            names = class_names(train, label)
            tokenizer = make_tokenizer(
                recipe, (text for column in columns for text in train[column])
            )
            config = make_config(recipe, tokenizer, names)

            def tokenized(split: datasets.Dataset) -> datasets.Dataset:
                return split.map(
                    lambda rows: {
                        **tokenizer(
                            *(rows[column] for column in columns),
                            truncation=True,
                            max_length=recipe.max_length,
                        ),
                        "labels": rows[label],
                    },
                    batched=True,
                    remove_columns=split.column_names,
                    desc="Tokenizing",
                )

            train, test = tokenized(train), None if test is None else tokenized(test)
        set_seed(args.seed)
        if recipe.from_scratch:
            model = AutoModelForSequenceClassification.from_config(config)
        else:  # in float32, whatever it was saved in: small steps of AdamW are lost on bfloat16 weights
            model = AutoModelForSequenceClassification.from_pretrained(
                recipe.model, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
            )

    trainer = DynamicPruningTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
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
    )


if __name__ == "__main__":
    main()
