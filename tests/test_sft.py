"""trl's SFTTrainer with pruning: scores belong to their samples, weights act, one pass a batch.

Under torchrun this file is the program of each rank.
"""

import copy
import inspect
import os
import sys
import warnings
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from programs import torchrun
from test_tasks import Some, assert_same_gradient
from tiny import QUIET, VOCAB, assert_same_run, llama, same_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from hf_dynprune import UCB, DynamicPruningMixin, FullData, InfoBatch, RandomPruning
from hf_dynprune.sft import DynamicPruningSFTTrainer

PAD, EOS = 0, 1
N = 30


def tokenizer():
    words = {"[PAD]": PAD, "[EOS]": EOS, "[UNK]": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    words = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )


def pairs(n=N):
    """Prompts of 2 to 4 words, completions of 1 to 8. Only completions have a loss."""
    generator = torch.Generator().manual_seed(0)

    def words(low, high):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(
            f"w{i}" for i in torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        )

    return datasets.Dataset.from_list(
        [{"prompt": words(2, 4), "completion": " " + words(1, 8)} for _ in range(n)]
    )


def sharp(model=None):
    """Far from uniform predictions, so that the samples differ."""
    model = llama() if model is None else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def trainer(
    folder,
    *,
    cls=DynamicPruningSFTTrainer,
    model=None,
    data=None,
    extra=None,
    pruning=None,
    **settings,
):
    """An SFTTrainer of a tiny Llama; `settings` are of the SFTConfig, `extra` the trainer's own."""
    defaults = {
        **QUIET,
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
    }
    return cls(
        model=sharp() if model is None else model,
        args=SFTConfig(str(folder), **{**defaults, **settings}),
        train_dataset=pairs() if data is None else data,
        processing_class=tokenizer(),
        **({} if pruning is None else {"pruning": pruning}),
        **(extra or {}),
    )


def log_probabilities(model, sample):
    """By definition, from a plain forward pass of one sample: log p of each label trained on."""
    ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])[1:]
    logits = model(input_ids=ids).logits[0, :-1].float()
    kept = labels != -100
    return logits.log_softmax(-1)[kept].gather(1, labels[kept, None]).squeeze(1)


def mean_losses(model, data):
    with torch.no_grad():
        return torch.stack([-log_probabilities(model.eval(), sample).mean() for sample in data])


def calls_of(module):
    """A list that grows with each forward pass of a module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


# ---- what we lean on -----------------------------------------------------------------------------


def test_the_seams_of_trl():
    """If this fails, trl changed what hf_dynprune/sft.py leans on: read its compute_loss again."""
    compute_loss = inspect.signature(SFTTrainer.compute_loss).parameters
    assert list(compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert {"log_probs", "label_mask", "aux_loss", "loss"} <= set(
        FusedCausalLMOutput.__dataclass_fields__
    )
    card = inspect.signature(SFTTrainer.create_model_card).parameters
    assert list(card) == ["self", "model_name", "dataset_name", "tags"]
    for name in ("loss_type", "padding_free", "packing_strategy", "label_smoothing_factor"):
        assert name in SFTConfig.__dataclass_fields__

    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9, 4, 3]}]
    rows[0]["seq_lengths"], rows[1]["seq_lengths"] = [2, 1], [4]  # of the texts of a packed row
    flat = DataCollatorForLanguageModeling(PAD, padding_free=True, pad_to_multiple_of=4)(rows)
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3, PAD]]
    assert flat["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 3, 0]]
    assert flat["labels"].tolist() == [[-100, 6, -100, -100, 9, 4, 3, -100]]

    model = llama()
    add_fused_lm_head(model)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, PAD]])
    labels = torch.tensor([[-100, 6, 7, 8], [-100, -100, 11, -100]])
    outputs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert outputs.log_probs.shape == (2, 3)
    assert outputs.label_mask.tolist() == [[True, True, True], [False, True, False]]
    assert torch.equal(outputs.log_probs == 0, ~outputs.label_mask)


def test_a_changed_trl_is_told(tmp_path):
    class Twice(DynamicPruningSFTTrainer):
        def _own_loss(self, model, inputs):
            extra = model.register_forward_pre_hook(
                lambda module, given, named: twice(module, named), with_kwargs=True
            )
            inside = []

            def twice(module, named):
                if not inside:
                    inside.append(True)
                    module(**named)

            try:
                return super()._own_loss(model, inputs)
            finally:
                extra.remove()

    with pytest.raises(RuntimeError, match=r"2 forward passes"):
        trainer(tmp_path, cls=Twice, pruning=FullData()).train()

    class Bare(DynamicPruningSFTTrainer):
        def _own_loss(self, model, inputs):
            loss, outputs = super()._own_loss(model, inputs)
            return loss, {"loss": outputs.loss}

    with pytest.raises(RuntimeError, match="log-probabilities"):
        trainer(tmp_path, cls=Bare, pruning=FullData()).train()


# ---- scores --------------------------------------------------------------------------------------


def masked(n=N):
    """Tokenized conversations in which the two turns of the assistant are marked."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in torch.randint(6, 13, (n,), generator=generator).tolist():
        mask = [0, 0, 1, 0, *[1] * (length - 4)]
        rows.append(
            {
                "input_ids": torch.randint(3, VOCAB, (length,), generator=generator).tolist(),
                "assistant_masks": mask,
            }
        )
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (pairs, {}),
        (pairs, {"completion_only_loss": False}),
        (pairs, {"loss_type": "dft"}),
        (pairs, {"bf16": True}),
        (masked, {}),
        (pairs, {"packing": True, "packing_strategy": "wrapped", "max_length": 12}),
    ],
)
def test_each_score_is_the_mean_loss_of_its_own_sample(data, settings, tmp_path):
    model = sharp()
    plain = copy.deepcopy(model)  # the SFTTrainer gives its model another forward method
    run = trainer(
        tmp_path, model=model, data=data(), pruning=UCB(0.6), learning_rate=0.0, **settings
    )
    calls = calls_of(model.model)
    run.train()
    assert run.pruning_report.num_samples == len(run.train_dataset)
    assert run.pruner.table.observed.all()
    trained = run.pruning_report.totals["optimizer_steps"]
    assert calls == [True] * trained  # one forward pass a batch
    alone = mean_losses(plain, run.train_dataset)
    close = {"rtol": 5e-2, "atol": 2e-2} if settings.get("bf16") else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(run.pruner.table["mean"], alone, **close)
    near = torch.isclose(run.pruner.table["mean"], alone.roll(1), **close)
    assert near.sum() < len(alone) / 2  # a neighbour's loss would not do
    if "packing" in settings:
        assert len(run.train_dataset) < N
    entry = next(entry for entry in run.state.log_history if "mean_token_accuracy" in entry)
    assert {"entropy", "num_tokens"} <= set(entry)  # trl's own metrics


@pytest.mark.parametrize("scoring", ["dropped", "all"])
def test_scoring_passes(scoring, tmp_path):
    model = sharp()
    plain = copy.deepcopy(model)
    run = trainer(
        tmp_path,
        model=model,
        pruning=UCB(0.5, scoring=scoring),
        learning_rate=0.0,
        num_train_epochs=3,
    )
    calls = calls_of(model.model)
    run.train()
    # Before the first choice nothing was dropped yet, before the two others half of all.
    assert run.pruning_report.totals["scoring_passes"] == (
        N // 2 * 2 if scoring == "dropped" else 3 * N
    )
    assert sum(calls) == run.pruning_report.totals["optimizer_steps"] == 6
    assert len(calls) > 6
    torch.testing.assert_close(
        run.pruner.table["mean"], mean_losses(plain, run.train_dataset), rtol=1e-4, atol=1e-6
    )


# ---- the gradient of an optimizer step -----------------------------------------------------------


def train(
    folder, batch, accumulation, *, pruning, define=False, cls=DynamicPruningSFTTrainer, **settings
):
    """The trained run, and for each optimizer step its samples with weights, and its gradient.

    With `define` also the gradient by definition, of  sum w L / D  from one sample at a time.
    """
    steps, seen = [], []
    plain = llama()

    class Recording(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if "sample_index" in inputs:
                index = inputs["sample_index"]
                seen.extend(zip(index.tolist(), self.pruner.weights(index).tolist(), strict=True))
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradient = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            )
            defined = None
            if define:
                plain.load_state_dict(model.state_dict())
                total, terms = 0.0, 0
                for i, weight in seen:
                    log_probs = log_probabilities(plain.train(), run.train_dataset[i])
                    dft = log_probs.detach().exp() if settings.get("loss_type") == "dft" else 1.0
                    total, terms = total - weight * (dft * log_probs).sum(), terms + len(log_probs)
                defined = torch.cat(
                    [
                        g.flatten()
                        for g in torch.autograd.grad(total / terms, list(plain.parameters()))
                    ]
                )
            steps.append((list(seen), gradient, defined))
            seen.clear()

    run = trainer(
        folder,
        cls=Recording,
        pruning=pruning,
        extra={"callbacks": [Note()]},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        ddp_find_unused_parameters=False,
        **settings,
    )
    run.train()
    return run, steps


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_the_weighted_losses_however_batches_are_accumulated(
    weighted, loss_type, tmp_path
):
    policy = Some(weighted=weighted)
    big, whole = train(tmp_path, 8, 1, pruning=policy, define=True, loss_type=loss_type)
    assert [len(samples) for samples, _, _ in whole] == [8, 8, 6] * 2
    assert len({weight for samples, _, _ in whole for _, weight in samples}) == (
        5 if weighted else 1
    )
    for _, gradient, defined in whole:
        assert_same_gradient(gradient, defined)
    run, steps = train(tmp_path, 2, 4, pruning=policy, define=True, loss_type=loss_type)
    assert [samples for samples, _, _ in steps] == [samples for samples, _, _ in whole]
    assert_same_gradient(steps[0][1], whole[0][1])
    for (
        _,
        gradient,
        defined,
    ) in steps:  # by its own weights: from step to step the two runs' rounding grows apart
        assert_same_gradient(gradient, defined)
    torch.testing.assert_close(
        run.pruner.table["loss"], big.pruner.table["loss"], rtol=1e-4, atol=1e-6, equal_nan=True
    )


def test_the_weights_of_infobatch_act(tmp_path):
    _, steps = train(tmp_path, 8, 1, pruning=InfoBatch(last=0.0), define=True, num_train_epochs=3)
    assert {weight for samples, _, _ in steps for _, weight in samples} == {1.0, 2.0}
    for _, gradient, defined in steps:
        assert_same_gradient(gradient, defined)


def test_two_ranks_train_as_one(tmp_path):
    _, whole = train(tmp_path, 8, 1, pruning=Some(weighted=True))
    grouped = {"train_sampling_strategy": "group_by_length", **FREE}
    _, flat = train(tmp_path, 4, 2, pruning=Some(weighted=True), **grouped)
    assert flat[0][0] != whole[0][0]  # another order
    done = torchrun(__file__, tmp_path, ranks=2, imports=("peft", "hf_dynprune.sft"))
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        seen = torch.load(tmp_path / f"rank{rank}.pt")
        assert seen["world"] == 2
        for gradient, (_, expected, _) in zip(seen["gradients"], whole, strict=True):
            assert_same_gradient(gradient, expected)
        for gradient, (_, expected, _) in zip(seen["flat"], flat, strict=True):
            assert_same_gradient(gradient, expected)
        assert seen["scored"].isfinite().all()


def mixtral():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, **heads, num_local_experts=4, router_aux_loss_coef=0.5)
    )


@pytest.mark.parametrize("make", [sharp, mixtral])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_full_data_is_the_stock_trainer(make, accumulation, tmp_path):
    settings = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation,
    }
    stock = trainer(tmp_path, cls=SFTTrainer, model=make(), **settings)
    off = trainer(tmp_path, model=make(), **settings)
    full = trainer(tmp_path, model=make(), pruning=FullData(), **settings)
    for run in (stock, off, full):
        run.train()
    assert same_weights(off.model, stock.model)
    assert off.pruning_report is None
    for one, other in zip(full.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    losses = [
        [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        for run in (full, stock)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- batches that are one row --------------------------------------------------------------------

FREE = {"padding_free": True, "max_length": None}
FLAT = {
    "padding_free": FREE,
    "filled": {**FREE, "pad_to_multiple_of": 16, "loss_type": "dft"},
    "bfd": {"packing": True, "max_length": 20},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 9},
    "wrapped": {**FREE, "packing": True, "packing_strategy": "wrapped", "max_length": 12},
}


def texts_of(row):
    """The texts of a row of the prepared dataset, each as a row."""
    begin = 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        yield {name: row[name][begin : begin + length] for name in ("input_ids", "labels")}
        begin += length


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_of_packed_rows_are_those_of_their_texts_apart(kind, attention, tmp_path):
    model = sharp(llama(attn_implementation=attention))
    plain = copy.deepcopy(model).eval()
    run = trainer(
        tmp_path,
        model=model,
        pruning=UCB(0.6),
        learning_rate=0.0,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        **FLAT[kind],
    )
    calls = calls_of(model.model)
    run.train()
    rows = run.train_dataset
    assert (len(rows) < N) == (kind in ("bfd", "wrapped"))
    assert calls == [True] * run.pruning_report.totals["optimizer_steps"]
    kept = [record.samples for record in run.pruning_report.epochs]
    assert kept == [round(0.6 * len(rows))] * 3
    assert run.pruner.table.observed.all()
    with torch.no_grad():
        alone = torch.stack(
            [
                -torch.cat([log_probabilities(plain, text) for text in texts_of(row)]).mean()
                for row in rows
            ]
        )
    scores = run.pruner.table["mean"]
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-6)
    assert torch.isclose(scores, alone.roll(1), rtol=1e-4).sum() < len(rows) / 2


@pytest.mark.parametrize("kind", ["padding_free", "filled", "bfd"])
def test_full_data_without_padding_is_the_stock_trainer_bit_for_bit(kind, tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **FLAT[kind]}
    stock = trainer(tmp_path, cls=SFTTrainer, **settings)
    full = trainer(tmp_path, pruning=FullData(), **settings)
    (batch, *_), (same, *_) = stock.get_train_dataloader(), full.get_train_dataloader()
    assert batch.keys() == same.keys()
    for run in (stock, full):
        run.train()
    assert full.loss_rule is not None
    assert same_weights(full.model, stock.model)


def test_the_gradient_without_padding_is_that_of_the_weighted_losses(tmp_path):
    _, steps = train(tmp_path, 4, 2, pruning=Some(weighted=True), define=True, **FREE)
    assert [len(samples) for samples, _, _ in steps] == [8, 8, 6] * 2
    for _, gradient, defined in steps:
        assert_same_gradient(gradient, defined)


@pytest.mark.parametrize("kind", ["padding_free", "bfd"])
def test_resuming_without_padding_continues_the_identical_run(kind, tmp_path):
    def make(name, **settings):
        settings = {**SAVING, "per_device_train_batch_size": 4, **FLAT[kind], **settings}
        return trainer(tmp_path / name, pruning=UCB(0.6), num_train_epochs=3, **settings)

    whole = make("whole", save_steps=3)
    whole.train()
    steps = [record.optimizer_steps for record in whole.pruning_report.epochs]
    assert 3 not in (steps[0], steps[0] + steps[1])  # within an epoch
    part = make("part", save_strategy="no")
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_run(part, whole)


def test_scoring_passes_without_padding(tmp_path):
    model = sharp()
    plain = copy.deepcopy(model)
    policy = UCB(0.5, scoring="all")
    run = trainer(tmp_path, model=model, pruning=policy, learning_rate=0.0, **FREE)
    run.train()
    assert run.pruning_report.totals["scoring_passes"] == 2 * N
    torch.testing.assert_close(
        run.pruner.table["mean"], mean_losses(plain, run.train_dataset), rtol=1e-4, atol=1e-6
    )


def test_samples_that_are_joined_otherwise_are_told(tmp_path):
    run = trainer(tmp_path, pruning=UCB(0.5), **FREE)
    collator = run.data_collator
    run.data_collator = lambda rows: collator(rows[::-1])
    with pytest.raises(RuntimeError, match=r"position_ids of shape \(1, "):
        run.train()
    assert run.state.global_step == 0


# ---- virtual tokens ------------------------------------------------------------------------------

PROMPTS = [
    peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers
@pytest.mark.parametrize("config", PROMPTS, ids=lambda config: config.peft_type.name)
def test_scores_behind_a_learned_prompt(config, tmp_path):
    run = trainer(
        tmp_path,
        pruning=UCB(0.6),
        learning_rate=0.0,
        completion_only_loss=False,
        extra={"peft_config": copy.deepcopy(config)},
    )
    run.train()
    with torch.no_grad():
        rows = [
            {n: torch.tensor([row[n]]) for n in ("input_ids", "labels")}
            for row in run.train_dataset
        ]
        alone = torch.stack([run.model.eval()(**row).loss for row in rows])
    torch.testing.assert_close(run.pruner.table["mean"], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft about position_ids
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "config", [None, *PROMPTS], ids=lambda config: str(config and config.peft_type)
)
def test_behind_a_learned_prompt_the_texts_of_a_row_are_not_kept_apart(config):
    """Why it is refused. If this fails, peft or transformers was mended: support it."""
    model = base = sharp()
    if config is not None:
        model = peft.get_peft_model(base, copy.deepcopy(config))
    add_fused_lm_head(base)
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [11, 12, 13, 14]}]
    collator = DataCollatorForLanguageModeling(PAD, padding_free=True)
    with torch.no_grad():
        joined, alone = (
            model.eval()(**collator(each), fused_lm_head=True).log_probs[0, -3:]
            for each in (rows, rows[1:])
        )
    assert torch.allclose(joined, alone, atol=1e-5) == (config is None)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("given", [True, False])
def test_a_learned_prompt_in_front_of_a_joined_row_is_refused(given, tmp_path):
    """PEFT ignores position_ids, so samples would attend to each other."""
    config = copy.deepcopy(PROMPTS[0])
    more = (
        {"extra": {"peft_config": config}}
        if given
        else {"model": peft.get_peft_model(sharp(), config)}
    )
    with pytest.raises(ValueError, match=r"PROMPT_TUNING .*padding_free=False"):
        trainer(tmp_path, cls=Unprepared, pruning=UCB(0.5), **FREE, **more)


# ---- evaluation, checkpoints, adapters, card -----------------------------------------------------


def test_evaluation_is_that_of_the_sft_trainer(tmp_path):
    runs = [
        trainer(tmp_path, extra={"eval_dataset": pairs(10)}, **kind)
        for kind in ({"cls": SFTTrainer}, {"pruning": UCB(0.5)})
    ]
    stock, ours = (
        {k: v for k, v in run.evaluate().items() if "time" not in k and "per_second" not in k}
        for run in runs
    )
    assert ours == stock
    assert "eval_mean_token_accuracy" in ours


SAVING = {"save_strategy": "steps", "optim": "adamw_torch", "learning_rate": 1e-2}


def test_resuming_continues_the_identical_run(tmp_path):
    policy = UCB(0.6, first=1, last=0.25)
    whole = trainer(tmp_path / "whole", pruning=policy, num_train_epochs=3, save_steps=4, **SAVING)
    whole.train()
    for step in (4, 8):  # between two epochs, and within one
        part = trainer(
            tmp_path / "part",
            pruning=policy,
            num_train_epochs=3,
            **{**SAVING, "save_strategy": "no"},
        )
        part.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_run(part, whole)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft reads it, transformers renamed it
def test_lora(tmp_path):
    base = sharp()
    base.save_pretrained(tmp_path / "base")

    def make(name, **settings):
        config = peft.LoraConfig(
            r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        model = type(base).from_pretrained(tmp_path / "base")
        settings = {**SAVING, **settings}
        return trainer(
            tmp_path / name,
            model=model,
            pruning=UCB(0.6),
            extra={"peft_config": config},
            **settings,
        )

    fixed = make("fixed", learning_rate=0.0, save_strategy="no")
    fixed.train()
    plain = mean_losses(fixed.model, fixed.train_dataset)  # by its forward pass with logits
    torch.testing.assert_close(fixed.pruner.table["mean"], plain, rtol=1e-4, atol=1e-6)

    whole = make("whole", save_steps=4)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    changed = {
        name
        for name, value in whole.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed
    assert all("lora" in name for name in changed)
    part = make("part", save_strategy="no")
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_run(part, whole)

    whole.save_model()
    whole.create_model_card()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "fine-tuned from the local checkpoint `base`" in card
    assert str(tmp_path) not in card
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "whole")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=ids).logits, whole.model.eval()(input_ids=ids).logits
        )


def test_the_card(tmp_path):
    run = trainer(tmp_path, pruning=UCB(0.5), save_steps=2, **SAVING)
    run.train()
    card = (
        tmp_path / "README.md"
    ).read_text()  # of the last checkpoint: the SFTTrainer writes one before each
    assert f"**{100 * run.pruning_report.cost_ratio:.1f} %**" in card
    run.create_model_card(dataset_name="my data", tags="mine")
    card = (tmp_path / "README.md").read_text()
    assert "on my data" in card
    assert {"- mine", "- trl", "- sft", "- ucb"} <= set(card.splitlines())
    repeating = card.split("## How to repeat")[1]
    for line in ("from trl import SFTConfig", "from hf_dynprune import UCB", "args = SFTConfig("):
        assert line in repeating
    assert "from hf_dynprune.sft import DynamicPruningSFTTrainer" in repeating


# ---- refused -------------------------------------------------------------------------------------


class Unprepared(DynamicPruningSFTTrainer):
    def _prepare_dataset(self, *args, **kwargs):
        raise AssertionError("the data are tokenized")


@pytest.mark.parametrize(
    ("settings", "extra", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1"),
        (
            {},
            {"compute_loss_func": lambda outputs, labels, num_items_in_batch: 0.0},
            "compute_loss_func=",
        ),
        ({}, {"per_sample_loss_fn": "shifted_tokens"}, "per_sample_loss_fn="),
        ({}, {"scoring_dataset": pairs()}, "scoring_dataset="),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            {},
            "train_sampling_strategy='batch_rebalance'",
        ),
    ],
)
def test_refused_before_the_data_are_tokenized(settings, extra, message, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # trl's, of arguments that are on their way out
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, cls=Unprepared, pruning=UCB(0.5), extra=extra, **settings)


def test_no_policy_is_told_before_the_data_are_tokenized(tmp_path):
    with pytest.raises(TypeError, match="'ucb'"):
        trainer(tmp_path, cls=Unprepared, pruning="ucb")


def test_an_unknown_loss_type_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules["hf_dynprune.sft"].TOKEN_LOSSES, "dft")
    with pytest.raises(ValueError, match=r"loss_type='dft'.*nll"):
        trainer(tmp_path, pruning=UCB(0.5), loss_type="dft")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl about Liger
def test_liger_keeps_the_loss_of_each_token(tmp_path, monkeypatch):
    """trl applies Liger's kernels without its fused loss. Here no kernel is applied."""
    applied = []
    monkeypatch.setattr(
        transformers.trainer, "apply_liger_kernel", lambda model, config: applied.append(config)
    )
    run = trainer(tmp_path, pruning=UCB(0.5), use_liger_kernel=True, max_steps=2)
    run.train()
    assert applied == [{"fused_linear_cross_entropy": False}]
    assert run.pruner.table.observed.sum() == 15


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl about label smoothing
@pytest.mark.parametrize("smoothing", [0.1, 0.0])
@pytest.mark.parametrize("settings", [FREE, {}])
def test_a_policy_that_needs_no_loss_trains_the_loss_of_trl(settings, smoothing, tmp_path):
    """Also if the loss of a sample is not known."""
    settings = {"label_smoothing_factor": smoothing, **settings}
    run = trainer(tmp_path, pruning=RandomPruning(0.5), **settings)
    before = copy.deepcopy(run.model.state_dict())
    run.train()
    assert (run.loss_rule is None) == bool(smoothing)
    assert run.pruning_report.cost_ratio == pytest.approx(0.5)
    assert any(not torch.equal(before[name], w) for name, w in run.model.state_dict().items())


def test_streams_are_refused(tmp_path):
    with pytest.raises(ValueError, match="IterableDataset"):
        trainer(tmp_path, data=pairs().to_iterable_dataset(), pruning=UCB(0.5), max_steps=3)


def test_the_mixin_alone_says_what_to_use(tmp_path):
    class Mixed(DynamicPruningMixin, SFTTrainer):
        pass

    with pytest.raises(ValueError, match=r"hf_dynprune\.sft\.DynamicPruningSFTTrainer"):
        trainer(tmp_path, cls=Mixed, pruning=UCB(0.5))


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    run, steps = train(folder, 4, 1, pruning=Some(weighted=True))
    grouped = {"train_sampling_strategy": "group_by_length", **FREE}
    _, flat = train(folder, 4, 1, pruning=Some(weighted=True), **grouped)
    scored = trainer(
        folder,
        pruning=UCB(0.5, scoring="dropped"),
        data=pairs(13),
        ddp_find_unused_parameters=False,
    )
    scored.train()  # its ranks score 7 and 6 samples
    torch.save(
        {
            "world": run.args.world_size,
            "gradients": [gradient for _, gradient, _ in steps],
            "flat": [gradient for _, gradient, _ in flat],
            "scored": scored.pruner.table["mean"],
        },
        folder / f"rank{rank}.pt",
    )
    torch.distributed.barrier()
    os._exit(0)  # as ranks.py does
