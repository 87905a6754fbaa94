"""trl's preference trainers with pruning: each kind of loss, references, adapters, what is refused.

What holds for all trainers of libraries is in test_library_trainers.py.
"""

import inspect
import re
from dataclasses import replace

import datasets
import peft
import pytest
import torch
from library_trainers import CASES, SETTINGS, N, dpo, pairs
from test_sft import calls_of, mixtral, sharp, tokenizer
from tiny import assert_same_run, llama, same_weights
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from hf_dynprune import UCB, DynamicPruningMixin, FullData, InfoBatch, RandomPruning
from hf_dynprune.preference import PAIR_LOSSES

pytestmark = [
    # trl and peft use the old names.
    pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*`:FutureWarning"),
]

STILL = {"learning_rate": 0.0, "num_train_epochs": 1}
CPU = {"use_cpu": True, "bf16": False}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


# ---- what we lean on -----------------------------------------------------------------------------


def test_the_seams_of_trl():
    """If this fails, trl changed what hf_dynprune/preference.py leans on: read its compute_loss."""
    for cls in (DPOTrainer, RewardTrainer, KTOTrainer, ORPOTrainer):
        parameters = list(inspect.signature(cls.compute_loss).parameters)
        assert parameters == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
        card = inspect.signature(cls.create_model_card).parameters
        assert list(card) == ["self", "model_name", "dataset_name", "tags"]
    assert "_get_train_sampler" in vars(KTOTrainer)
    assert {"log_probs", "aux_loss"} <= set(FusedCausalLMOutput.__dataclass_fields__)
    assert DPOConfig("out", **CPU).loss_type == ["sigmoid"]
    assert KTOConfig("out", **CPU).loss_type == "kto"


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A DPO trainer whose model does not change."""
    return dpo().make(tmp_path_factory.mktemp("still"), pruning=UCB(0.5), **STILL)


# ---- the losses of trl ---------------------------------------------------------------------------

SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}
VARIANTS = [
    *[{"loss_types": [name], "label_smoothing": SMOOTHED.get(name, 0.0)} for name in PAIR_LOSSES],
    {"loss_types": ["sigmoid", "bco_pair", "hinge"], "loss_weights": [0.8, 0.3, -1.0]},
    {"use_weighting": True},
    {"ld_alpha": 0.5},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_loss_of_a_pair(variant, still, monkeypatch):
    """trl's own loss of a batch is the mean of ours, and each is trl's own loss of its pair."""
    for name, value in variant.items():
        monkeypatch.setattr(still, name, value)
    if "use_weighting" in variant:  # in its constructor trl says what the model shall return
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        add_fused_lm_head(still.model, outputs=outputs)
    batch = still.data_collator([still.train_dataset[i] for i in range(8)])
    loss, outputs = still._own_loss(still.model.train(), batch)
    losses = still.loss_rule.losses(outputs, batch, 0.0, None)
    torch.testing.assert_close(losses.train.mean(), loss)
    alone = dpo().alone(still)[:8]
    torch.testing.assert_close(losses.plain, alone, **CLOSE)
    assert alone.std() > 0.01 * alone.abs().mean()
    one, other = (
        torch.autograd.grad(value, still.model.lm_head.weight, retain_graph=True)[0]
        for value in (losses.train.mean(), loss)
    )
    torch.testing.assert_close(one, other)


def test_every_other_loss_is_refused(still, monkeypatch, tmp_path):
    """trl lists what it knows in an error."""
    monkeypatch.setattr(still, "loss_types", ["nonsense"])
    batch = still.data_collator([still.train_dataset[0]])
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        DPOTrainer.compute_loss(still, still.model, batch)
    known = set(re.findall(r"'(\w+)'", str(caught.value)))
    assert set(PAIR_LOSSES) < known
    for name in known - set(PAIR_LOSSES):
        with pytest.raises(ValueError, match=f"loss_type='{name}'"):
            dpo().make(tmp_path, pruning=UCB(0.5), loss_type=name)
        with pytest.raises(ValueError, match=f"loss_type='{name}'"):
            dpo().make(tmp_path, pruning=UCB(0.5), loss_type=["sigmoid", name])


@pytest.mark.parametrize("pruning", [RandomPruning(0.5), UCB(0.5, first=1)])
def test_a_loss_of_a_batch_can_be_trained(pruning, tmp_path):
    """A policy without losses needs none; others take the loss of the batch if that is said."""
    extra = {"per_sample_loss_fn": "batch_mean"} if pruning.signals else {}
    run = dpo().make(tmp_path, pruning=pruning, loss_type="aot", extra=extra, num_train_epochs=1)
    run.train()
    assert (run.loss_rule is None) == (not extra)
    if extra:
        assert len(set(run.pruner.table["mean"].tolist())) == run.state.global_step == 3


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({}, "1 - exp(-loss)"),
        ({"loss_type": "ipo"}, "sqrt(loss)"),
        ({"loss_type": "hinge"}, "None"),
        ({"loss_type": ["sigmoid", "ipo"]}, "None"),
        ({"use_weighting": True}, "None"),
    ],
)
def test_what_the_size_of_a_gradient_follows_from(settings, formula, tmp_path):
    run = dpo().make(tmp_path, pruning=UCB(0.5), **settings)
    assert str(run._magnitude()) == formula


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_of_the_router_is_kept(accumulation, tmp_path):
    case = dpo(model=lambda: sharp(mixtral()))
    settings = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    runs = []
    for kind in ({"stock": True}, {"pruning": FullData()}):
        run = case.make(tmp_path, **settings, **kind)
        run.train()
        runs.append(run)
    assert runs[1].aux_loss_enabled
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_weights_of_infobatch_act(tmp_path):
    run = dpo().make(tmp_path, pruning=InfoBatch(last=0.0), num_train_epochs=3)
    run.train()
    assert run.pruner.policy.weighs
    assert run.pruner.plan.weights.max() > 1


# ---- references and adapters ---------------------------------------------------------------------


@pytest.mark.parametrize("precomputed", [False, True])
def test_one_trained_pass_and_one_of_the_reference_a_batch(precomputed, tmp_path):
    run = dpo().make(tmp_path, pruning=UCB(0.5), precompute_ref_log_probs=precomputed, **STILL)
    calls, others = calls_of(run.model.model), calls_of(run.ref_model.model)
    run.train()
    steps = run.pruning_report.totals["optimizer_steps"]
    assert calls == [True] * steps
    assert others == ([] if precomputed else [False] * steps)
    kept = run.pruner.table.observed
    scores, alone = run.pruner.table["mean"], dpo().alone(run)
    torch.testing.assert_close(scores[kept], alone[kept], **CLOSE)


def test_adapters_without_a_reference_model(tmp_path):
    """The reference is the model without its adapters, in a second pass of the same model."""
    case = dpo(more=lambda model: {"processing_class": tokenizer()})

    def make(name, **settings):
        config = peft.LoraConfig(
            r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        torch.manual_seed(0)
        return case.make(
            tmp_path / name,
            pruning=UCB(0.5, first=1),
            extra={"peft_config": config},
            **{"save_strategy": "steps", "save_steps": 2, **settings},
        )

    fixed = make("fixed", learning_rate=0.0, num_train_epochs=1, save_strategy="no")
    calls = calls_of(fixed.model.get_base_model().model)
    fixed.train()
    assert sorted(calls) == [False] * 3 + [True] * 3
    torch.testing.assert_close(fixed.pruner.table["mean"], case.alone(fixed), **CLOSE)
    assert fixed.ref_model is None

    whole = make("whole")
    whole.train()
    part = make("part", save_strategy="no")
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_run(part, whole)


def test_evaluation_and_card_are_there(tmp_path):
    extra = {"eval_dataset": pairs(6)}
    stock = dpo().make(tmp_path, stock=True, extra=extra)
    ours = dpo().make(tmp_path, pruning=UCB(0.5), extra=extra)
    kept = ("time", "per_second")
    values = [
        {k: v for k, v in run.evaluate().items() if not any(word in k for word in kept)}
        for run in (stock, ours)
    ]
    assert values[0] == values[1]
    assert "eval_rewards/accuracies" in values[0]
    ours.train()
    ours.create_model_card(dataset_name="my pairs", tags="mine")
    card = (tmp_path / "README.md").read_text()
    assert {"- mine", "- trl", "- dpo", "- ucb"} <= set(card.splitlines())
    assert "on my pairs" in card
    repeating = card.split("## How to repeat")[1]
    assert "from hf_dynprune.preference import DynamicPruningDPOTrainer" in repeating
    assert "per_sample_loss_fn" not in repeating
    off = dpo().make(tmp_path / "off")
    off.create_model_card()
    assert off.pruning_report is None
    assert "hf_dynprune" not in (tmp_path / "off" / "README.md").read_text()


def test_off_is_the_trainer_of_trl(tmp_path):
    runs = [dpo().make(tmp_path, stock=stock) for stock in (True, False)]
    for run in runs:
        run.train()
    assert same_weights(runs[0].model, runs[1].model)


# ---- refused -------------------------------------------------------------------------------------


class Untouched:
    """A dataset that must not be prepared."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        raise AssertionError(f"row {index} was read")

    __iter__ = None


@pytest.mark.parametrize(
    ("settings", "extra", "value"),
    [
        ({"loss_type": "sft"}, {}, "loss_type='sft'"),
        ({}, {"per_sample_loss_fn": "shifted_tokens"}, "per_sample_loss_fn='shifted_tokens'"),
        ({}, {"scoring_dataset": pairs(3)}, "scoring_dataset="),
    ],
)
def test_refused_before_the_data_are_prepared(settings, extra, value, tmp_path):
    case = dpo(data=Untouched)
    with pytest.raises(ValueError, match=value):
        case.make(tmp_path, pruning=UCB(0.5), extra=extra, **settings)


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_kto_is_refused_if_its_loss_needs_the_neighbours_of_a_row(strategy, tmp_path):
    """trl asks for 'sequential' then, and nothing that can be set would make it prunable."""
    with pytest.raises(ValueError, match="apo_zero_unpaired"):
        CASES["kto"].make(
            tmp_path, pruning=UCB(0.5), loss_type="kto", train_sampling_strategy=strategy
        )


def test_kto_without_neighbours_needs_the_random_order(tmp_path):
    with pytest.raises(ValueError, match=r"'sequential'.*'random'"):
        CASES["kto"].make(tmp_path, pruning=UCB(0.5), train_sampling_strategy="sequential")


@pytest.mark.parametrize("name", ["dpo", "reward", "kto", "orpo", "cpo"])
def test_the_mixin_alone_says_what_to_use(name, tmp_path):
    case = CASES[name]
    mixed = type("Mixed", (DynamicPruningMixin, case.stock), {})
    with pytest.raises(ValueError, match=case.pruned.__name__):
        replace(case, pruned=mixed).make(tmp_path, pruning=UCB(0.5))


# ---- distillation --------------------------------------------------------------------------------


def gkd(cls, folder, **given):
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    turns = [
        [{"role": "user", "content": f"w{3 + i}"}, {"role": "assistant", "content": f"w{5 + i} w7"}]
        for i in range(N)
    ]
    settings = {**SETTINGS, "max_length": 16, "lmbda": 0.0}
    return cls(
        model=sharp(),
        teacher_model=sharp(llama(seed=1)),
        args=GKDConfig(str(folder), **settings),
        train_dataset=datasets.Dataset.from_dict({"messages": turns}),
        processing_class=words,
        **given,
    )


def test_distillation_takes_the_loss_of_a_batch(tmp_path):
    class Pruned(DynamicPruningMixin, GKDTrainer):
        pass

    with pytest.raises(ValueError, match="'batch_mean'"):
        gkd(Pruned, tmp_path, pruning=UCB(0.5))
    mean = {"per_sample_loss_fn": "batch_mean"}
    full = gkd(Pruned, tmp_path, pruning=FullData(), **mean)
    stock = gkd(GKDTrainer, tmp_path)
    pruned = gkd(Pruned, tmp_path, pruning=UCB(0.5, first=1), **mean)
    for run in (full, stock, pruned):
        run.train()
    assert same_weights(full.model, stock.model)
    assert pruned.pruner.table.observed.all()
    assert pruned.pruning_report.cost_ratio == pytest.approx(0.75)


def test_distillation_that_chooses_its_data_is_refused(tmp_path):
    mixed = type("Mixed", (DynamicPruningMixin, DistillationTrainer), {})
    with pytest.raises(ValueError, match=r"DistillationTrainer\._get_train_sampler"):
        mixed(model=llama(), args=DistillationConfig(str(tmp_path), **CPU), pruning=UCB(0.5))
