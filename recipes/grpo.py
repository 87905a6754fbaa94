"""GRPO on sums, whose answers can be checked: all prompts, or those that can still teach.

    python recipes/grpo.py recipes/configs/grpo_pruned.yaml
    python recipes/grpo.py --warm_only True --output_dir runs/warm
    python recipes/grpo.py --model runs/warm --pruning thompson-prompts --keep_ratio 0.25

Nothing is downloaded. A small Llama from scratch first learns sums from examples, for
`--warm_steps`. It then solves short sums and few long ones. GRPO continues from there, with a
reward of 1 for a right answer and 0 otherwise. `--level_shares` sets how hard the prompts are, and
with it the share of groups that teach. To compare runs, train the first model once (`--warm_only`)
and continue from it (`--model`). The baseline to beat is `--pruning full` with as many rollouts
(`--max_steps`). Writes report.json, model, tokenizer and card to `--output_dir`. All arguments of
GRPOConfig are accepted.

`eval_reward` is the share of right answers to held-out sums, sampled as in training;
`eval_accuracy/level_3` is that of sums with three digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import common
import datasets
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import GRPOConfig

from hf_dynprune import FullData, PruningArguments
from hf_dynprune.grpo import DynamicPruningGRPOTrainer

PAD, EOS = "[PAD]", "[EOS]"
LONGEST_LEVEL = 6  # digits of a number; the model has room for these


@dataclass
class TaskArguments(common.RunArguments):
    """The sums, and the model that has seen some."""

    _argument_group_name = "task and run"

    prompts: int = common.option(400, "Number of sums to train on.")
    eval_prompts: int = common.option(200, "Number of held-out sums.")
    level_shares: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.6],
        metadata={"help": "Shares of the sums of numbers with 1, 2, ... digits; their sum is 1."},
    )
    task_seed: int = common.option(0, "Seed of the sums and of the first model.")
    model: str | None = common.option(
        None, "Folder of a model that this recipe saved; default: train one on examples first."
    )
    warm_steps: int = common.option(1500, "Steps on examples, without --model.")
    warm_batch: int = common.option(128, "Examples in such a step.")
    warm_learning_rate: float = common.option(2e-3, "Peak learning rate of such a step.")
    warm_only: bool = common.option(False, "Save the model after these steps, and stop.")
    width: int = common.option(96, "Width of the model.")
    layers: int = common.option(3, "Layers of the model.")

    def __post_init__(self) -> None:
        shares = self.level_shares
        if not 1 <= len(shares) <= LONGEST_LEVEL or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"level_shares={shares} must be 1 to {LONGEST_LEVEL} shares of at least 0 whose "
                "sum is 1, such as 0.1 0.3 0.6."
            )
        if self.advise:
            raise ValueError("--advise True has no answer for prompts yet: leave it out.")


@dataclass
class GRPOArguments(common.CPUDefaults, GRPOConfig):
    """GRPOConfig, with defaults for this task that also work on a CPU."""

    _argument_group_name = "all arguments of GRPOConfig"

    output_dir: str | None = common.option("runs/grpo", "Output folder.")
    bf16: bool | None = common.option(False, "bfloat16 autocast.")
    activation_checkpointing: bool = common.option(False, "Save memory, and compute more.")
    gradient_checkpointing: bool = common.option(
        False, "The same in older versions of transformers, which do not know the new name."
    )
    num_train_epochs: float = common.option(12.0, "Number of epochs.")
    per_device_train_batch_size: int = common.option(
        256, "Completions in a batch of a rank: num_generations for each prompt."
    )
    per_device_eval_batch_size: int = common.option(256, "Completions in an evaluation batch.")
    num_generations: int | None = common.option(8, "Completions of a prompt.")
    num_generations_eval: int | None = common.option(1, "Completions of a held-out prompt.")
    max_completion_length: int | None = common.option(LONGEST_LEVEL + 2, "Tokens of a completion.")
    learning_rate: float = common.option(2e-4, "Peak learning rate.")
    logging_steps: float = common.option(10, "Steps between two log entries.")


# ---- the task ------------------------------------------------------------------------------------


def draw_sums(level: int, n: int, generator: torch.Generator) -> list[dict]:
    """Draw n sums, with repetition, of two numbers of `level` digits."""
    low = 10 ** (level - 1) if level > 1 else 0
    numbers = torch.randint(low, 10**level, (n, 2), generator=generator).tolist()
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b), "level": level} for a, b in numbers]


def different_sums(task: TaskArguments, n: int, taken: set[str]) -> datasets.Dataset:
    """n different sums with the shares of the levels; what `taken` holds is left out and added."""
    generator = torch.Generator().manual_seed(task.task_seed + len(taken))
    counts = [round(share * n) for share in task.level_shares]
    counts[-1] += n - sum(counts)
    rows: list[dict] = []
    for level, count in enumerate(counts, 1):
        possible = (10**level - (10 ** (level - 1) if level > 1 else 0)) ** 2
        if count + sum(len(prompt) == 2 * level + 2 for prompt in taken) > possible:
            raise ValueError(
                f"{n} sums with level_shares={task.level_shares} need {count} different ones of "
                f"{level} digits, more than are left of {possible}: lower the share or the number."
            )
        found: dict[str, dict] = {}
        while len(found) < count:
            (row,) = draw_sums(level, 1, generator)
            if row["prompt"] not in taken:
                found[row["prompt"]] = row
        rows += found.values()
        taken.update(found)
    return datasets.Dataset.from_list(rows)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each character."""
    words = {PAD: 0, EOS: 1, **{character: i for i, character in enumerate("0123456789+=", 2)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left"
    )


def is_right(
    completion_ids: list[list[int]],
    answer: list[str],
    level: list[int],
    log_metric,
    tokenizer: PreTrainedTokenizerBase,
) -> list[float]:
    """1 for the answer and nothing else, 0 otherwise; notes the accuracy of each level."""
    expected = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in answer]
    rewards = [float(ids == right) for ids, right in zip(completion_ids, expected, strict=True)]
    for each in sorted(set(level)):
        right = [r for r, digits in zip(rewards, level, strict=True) if digits == each]
        log_metric(f"accuracy/level_{each}", sum(right) / len(right))
    return rewards


# ---- the first model -----------------------------------------------------------------------------


def warm_model(
    task: TaskArguments, tokenizer: PreTrainedTokenizerBase, held_out: set[str]
) -> LlamaForCausalLM:
    """Train a model from scratch on examples with answers, but not on held-out ones."""
    set_seed(task.task_seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=task.width,
        intermediate_size=4 * task.width,
        num_hidden_layers=task.layers,
        num_attention_heads=4,
        max_position_embeddings=4 * LONGEST_LEVEL,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
    teach(model, task, tokenizer, held_out, torch.Generator().manual_seed(task.task_seed + 1))
    return model


def teach(
    model: LlamaForCausalLM,
    task: TaskArguments,
    tokenizer: PreTrainedTokenizerBase,
    held_out: set[str],
    generator: torch.Generator,
    wrong: Sequence[float] = (),
) -> None:
    """Train a model on examples with answers, for the `warm_steps` of the task.

    Args:
        model: The model, which is changed.
        task: Its `level_shares` say which levels are taught: those of more than 0, all alike.
        tokenizer: Its tokenizer.
        held_out: Prompts that are not taught.
        generator: Draws the examples.
        wrong: For each level the share of the examples whose answer is replaced by a random number
            of as many digits.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.warm_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.warm_learning_rate, total_steps=max(1, task.warm_steps), pct_start=0.1
    )
    levels = torch.tensor([float(share > 0) for share in task.level_shares])
    for _ in range(task.warm_steps):
        counts = torch.multinomial(levels, task.warm_batch, True, generator=generator).bincount()
        rows = [
            row
            for level, count in enumerate(counts.tolist(), 1)
            for row in draw_sums(level, count, generator)
            if row["prompt"] not in held_out
        ]
        for row in rows if wrong else ():
            if torch.rand((), generator=generator) < wrong[row["level"] - 1]:
                low = 10 ** (len(row["answer"]) - 1)
                row["answer"] = str(int(torch.randint(low, 10 * low, (), generator=generator)))
        ids, labels = (each.to(model.device) for each in examples(rows, tokenizer))
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def examples(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) of sums with their answers, and labels (B, T) of the answers alone."""
    # Padding on the right has no label, so a causal model needs no mask.
    ids, labels = [], []
    for row in rows:
        start = tokenizer(row["prompt"]).input_ids
        end = [*tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id]
        ids.append(torch.tensor(start + end))
        labels.append(torch.tensor([-100] * len(start) + end))
    padded = torch.nn.utils.rnn.pad_sequence
    return padded(ids, True, tokenizer.pad_token_id), padded(labels, True, -100)


def main() -> None:
    task, pruning, args = common.parse(__doc__, TaskArguments, PruningArguments, GRPOArguments)
    with common.user_mistakes():
        policy = pruning.policy() or FullData()
        common.check_output(args, task)
        taken: set[str] = set()
        test = different_sums(task, task.eval_prompts, taken)
        held_out = set(taken)
        train = different_sums(task, task.prompts, taken)
        if task.model is not None:
            tokenizer = AutoTokenizer.from_pretrained(task.model)
            model = AutoModelForCausalLM.from_pretrained(task.model)
    if task.model is None:
        tokenizer = make_tokenizer()
        model = warm_model(task, tokenizer, held_out)
    if task.warm_only:
        for part in (model, tokenizer):
            part.save_pretrained(args.output_dir)
        return

    def correct(completion_ids, answer, level, log_metric, **columns) -> list[float]:
        return is_right(completion_ids, answer, level, log_metric, tokenizer)

    trainer = DynamicPruningGRPOTrainer(
        model,
        correct,
        args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        pruning=policy,
    )
    common.train(trainer, dataset="sums", task="text-generation", metric="reward")


if __name__ == "__main__":
    main()
