"""The loss of one sample against the models' own loss; signals against numbers by hand."""

import functools
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_pt_utils import LabelSmoother

from hf_dynprune.losses import (
    CLASS_RULES,
    RULES,
    SIGNALS,
    LossRule,
    SampleLosses,
    check_signals,
    derive_rule,
    logits_of,
    observe_signals,
    unwrapped,
)

B, T, VOCAB = 5, 7, 40
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def bert(head, **config):
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**BERT, **config))


def llama(head, **config):
    settings = {**BERT, "pad_token_id": 0, "num_key_value_heads": 1, **config}
    return getattr(transformers, f"LlamaFor{head}")(transformers.LlamaConfig(**settings))


def t5():
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit():
    return tiny.vit(classes=3)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def tokens():
    return {
        "input_ids": torch.randint(1, VOCAB, (B, T)),
        "attention_mask": torch.ones(B, T, dtype=torch.int64),
    }


def images():
    return {"pixel_values": torch.randn(B, 3, 8, 8)}


def token_labels(classes):
    """Rows with different numbers of labels; first and last positions are valid in some of them."""
    labels = torch.randint(0, classes, (B, T))
    labels[0, 3:] = -100
    labels[1, :2] = -100
    labels[2, 1:-1] = -100
    labels[3, :-1] = -100
    return labels


def choices():
    ids = torch.randint(1, VOCAB, (B, 3, T))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, 3, (B,)),
    }


def questions():
    start, end = (
        torch.tensor([0, 2, T - 1, T + 3, 1]),
        torch.tensor([0, 4, T - 1, T, 5]),
    )  # the fourth has no answer
    return {**tokens(), "start_positions": start, "end_positions": end}


def classes():
    return torch.randint(0, 3, (B,))


# name -> (rule, model, batch)
MODELS = {
    "bert single": (
        "classification",
        lambda: bert("SequenceClassification", num_labels=3),
        lambda: {**tokens(), "labels": classes()},
    ),
    "bert labels (B, 1)": (
        "classification",
        lambda: bert("SequenceClassification", num_labels=3),
        lambda: {**tokens(), "labels": classes()[:, None]},
    ),
    "bert multi-label": (
        "classification",
        lambda: bert("SequenceClassification", num_labels=3),
        lambda: {**tokens(), "labels": torch.randint(0, 2, (B, 3)).float()},
    ),
    "bert regression": (
        "classification",
        lambda: bert("SequenceClassification", num_labels=1),
        lambda: {**tokens(), "labels": torch.randn(B)},
    ),
    "bert regression of three": (
        "classification",
        lambda: bert("SequenceClassification", num_labels=3, problem_type="regression"),
        lambda: {**tokens(), "labels": torch.randn(B, 3)},
    ),
    "bert tokens": (
        "tokens",
        lambda: bert("TokenClassification", num_labels=3),
        lambda: {**tokens(), "labels": token_labels(3)},
    ),
    "bert masked": (
        "tokens",
        lambda: bert("MaskedLM"),
        lambda: {**tokens(), "labels": token_labels(VOCAB)},
    ),
    "bert choice": ("single_label", lambda: bert("MultipleChoice"), choices),
    "bert questions": ("question_answering", lambda: bert("QuestionAnswering"), questions),
    "llama causal": (
        "shifted_tokens",
        lambda: llama("CausalLM"),
        lambda: {**tokens(), "labels": token_labels(VOCAB)},
    ),
    "llama single": (
        "classification",
        lambda: llama("SequenceClassification", num_labels=3),
        lambda: {**tokens(), "labels": classes()},
    ),
    "gpt2": (
        "shifted_tokens",
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=16
            )
        ),
        lambda: {**tokens(), "labels": token_labels(VOCAB)},
    ),
    "t5": ("tokens", t5, lambda: {**tokens(), "labels": token_labels(VOCAB)}),
    "vit": ("classification", vit, lambda: {**images(), "labels": classes()}),
    "resnet": ("classification", resnet, lambda: {**images(), "labels": classes()}),
}


@functools.cache
def model_and_batch(name):
    _, make_model, make_batch = MODELS[name]
    torch.manual_seed(0)
    model, batch = make_model().eval(), make_batch()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # far from uniform predictions, so that the samples differ
            parameter.mul_(3.0)
    return model, batch


def example(name):
    """rule, model, batch, outputs"""
    model, batch = model_and_batch(name)
    rule = derive_rule(model)
    assert rule is RULES[MODELS[name][0]]
    return rule, model, batch, model(**batch)


def losses_of(name, smoothing=0.0):
    rule, model, batch, outputs = example(name)
    return rule.losses(outputs, batch, smoothing, model.config), batch, outputs


@pytest.mark.parametrize("name", MODELS)
def test_losses_make_the_models_own_loss(name):
    losses, _, outputs = losses_of(name)
    assert all(value.shape == (B,) and value.dtype == torch.float32 for value in losses)
    torch.testing.assert_close(
        losses.train.sum() / losses.terms.sum(), outputs.loss, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", MODELS)
def test_loss_of_a_sample_is_that_of_a_batch_of_it_alone(name):
    rule, model, batch, outputs = example(name)
    losses = rule.losses(outputs, batch, 0.0, model.config)
    compared = 0
    for i in range(B):
        if losses.terms[i]:
            alone = model(**{key: value[i : i + 1] for key, value in batch.items()}).loss
            torch.testing.assert_close(
                losses.train[i] / losses.terms[i], alone, rtol=1e-4, atol=1e-6
            )
            compared += 1
    assert compared >= B - 2
    assert len({round(float(loss), 5) for loss in losses.plain}) > B - 2  # they do differ


@pytest.mark.parametrize("name", MODELS)
def test_plain_loss_is_without_gradient_and_smoothing(name):
    losses, _, _ = losses_of(name)
    smoothed, _, _ = losses_of(name, smoothing=0.2)
    assert losses.train.requires_grad
    assert not losses.plain.requires_grad
    torch.testing.assert_close(losses.plain, losses.train.detach(), rtol=0, atol=0)
    torch.testing.assert_close(smoothed.plain, losses.plain)
    assert smoothed.terms.tolist() == losses.terms.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_terms_are_known_before_the_forward_pass(name):
    rule, model, batch, outputs = example(name)
    terms = rule.losses(outputs, batch, 0.0, model.config).terms
    if rule.terms is None:
        assert terms.tolist() == [1.0] * B
    else:
        assert rule.terms(batch).tolist() == terms.tolist()
        assert rule.name in CLASS_RULES or len(set(terms.tolist())) > 1
        assert rule.terms(batch).shape == (B,)


@pytest.mark.parametrize(
    "name",
    [
        "bert single",
        "bert tokens",
        "bert masked",
        "bert choice",
        "llama causal",
        "llama single",
        "t5",
        "vit",
        "gpt2",
    ],
)
def test_label_smoothing_is_that_of_transformers(name):
    losses, batch, outputs = losses_of(name, smoothing=0.1)
    shift = name in ("llama causal", "gpt2")
    expected = LabelSmoother(epsilon=0.1)(
        {"logits": outputs.logits}, batch["labels"], shift_labels=shift
    )
    torch.testing.assert_close(losses.train.sum() / losses.terms.sum(), expected, rtol=1e-5, atol=0)
    assert not torch.allclose(losses.train.detach(), losses.plain)


@pytest.mark.parametrize("name", ["bert tokens", "bert masked", "llama causal", "t5"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sample_without_a_valid_label_has_loss_0(name, smoothing):
    rule, model, batch, outputs = example(name)
    batch = {**batch, "labels": batch["labels"].clone()}
    batch["labels"][4] = -100
    losses = rule.losses(outputs, batch, smoothing, model.config)
    assert [value[4].tolist() for value in losses] == [0.0, 0.0, 0.0]
    assert int(rule.terms(batch)[4]) == 0
    assert (losses.plain[:3] > 0).all()
    assert observe_signals(("loss",), outputs, batch, losses)["loss"][4] == 0
    losses.train.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_question_without_an_answer_has_loss_0():
    losses, batch, outputs = losses_of("bert questions")
    assert [value[3].tolist() for value in losses] == [0.0, 0.0, 0.0]
    assert losses.terms.tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert observe_signals(("loss",), outputs, batch, losses)["loss"][3] == 0


def test_label_ignored_by_shifting_has_no_term():
    labels = torch.tensor([[5, 1, 2], [7, -100, -100]])  # the first label predicts nothing
    assert RULES["shifted_tokens"].terms({"labels": labels}).tolist() == [2, 0]
    assert RULES["tokens"].terms({"labels": labels}).tolist() == [3, 1]


def test_tokens_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])  # p = (1/4, 3/4), (1/2, 1/2)
    labels = torch.tensor([[0, 1]])
    losses = RULES["tokens"].losses({"logits": logits}, {"labels": labels}, 0.0, None)
    assert losses.train.tolist() == pytest.approx([math.log(4) + math.log(2)])
    losses = RULES["shifted_tokens"].losses({"logits": logits}, {"labels": labels}, 0.0, None)
    assert losses.train.tolist() == pytest.approx(
        [-math.log(3 / 4)]
    )  # the first position predicts the second label
    assert losses.terms.tolist() == [1.0]


def test_half_precision_is_computed_in_float32():
    logits, labels = torch.tensor([[8.0, -8.0]], dtype=torch.bfloat16), torch.tensor([0])
    losses = RULES["single_label"].losses({"logits": logits}, {"labels": labels}, 0.0, None)
    assert losses.train.dtype == torch.float32
    assert losses.train.item() == pytest.approx(math.log1p(math.exp(-16)), rel=0.1)


# ---- which rule ----------------------------------------------------------------------------------


def test_class_derived_from_a_known_one_is_known():
    class Mine(transformers.BertForTokenClassification):
        pass

    assert derive_rule(Mine(transformers.BertConfig(**BERT))) is RULES["tokens"]


@pytest.mark.parametrize(("encoder_decoder", "rule"), [(True, "tokens"), (False, "shifted_tokens")])
def test_conditional_generation_shifts_without_an_encoder(encoder_decoder, rule):
    class TalkingForConditionalGeneration(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=encoder_decoder)

    assert derive_rule(TalkingForConditionalGeneration()) is RULES[rule]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
def test_unknown_model_names_the_way_out(model):
    with pytest.raises(ValueError, match=rf"{type(model).__name__}.*'single_label'"):
        derive_rule(model)


@pytest.mark.parametrize("name", RULES)
def test_rule_by_name(name):
    assert derive_rule(nn.Linear(2, 2), name) is RULES[name]
    assert RULES[name].name == name


def test_unknown_rule_lists_the_rules():
    with pytest.raises(ValueError, match=r"'singel'.*'single_label'.*classification"):
        derive_rule(nn.Linear(2, 2), "singel")


def test_a_rule_of_ones_own_is_taken_as_it_is():
    rule = LossRule("mine", lambda *given: None)
    assert derive_rule(bert("SequenceClassification"), rule) is rule
    assert rule.matches_model


def test_a_wrapped_model_is_known_by_what_it_wraps():
    wrapped = SimpleNamespace(get_base_model=lambda: "base")
    assert unwrapped(wrapped) == "base"
    assert unwrapped("plain") == "plain"


def test_function_of_ones_own_is_taken_before_the_models_rule():
    def mine(outputs, inputs):
        return (outputs["y"] - inputs["target"]).abs().half()

    rule = derive_rule(bert("SequenceClassification"), mine)
    outputs = {"y": torch.tensor([1.0, 2.0, 3.0], requires_grad=True)}
    losses = rule.losses(outputs, {"target": torch.tensor([1.0, 0.0, 5.0])}, 0.3, None)
    assert rule.name == "custom"
    assert rule.terms is None
    assert losses.train.tolist() == losses.plain.tolist() == [0.0, 2.0, 2.0]
    assert losses.terms.tolist() == [1.0] * 3
    assert losses.train.dtype == torch.float32
    assert losses.train.requires_grad
    assert not losses.plain.requires_grad


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor(1.0), r"a tensor of shape \(\)"),
        (torch.zeros(3, 1), r"a tensor of shape \(3, 1\)"),
        (1.5, "a float"),
        ([1.0, 2.0], "a list"),
        (None, "a NoneType"),
    ],
)
def test_function_of_ones_own_must_give_one_loss_a_sample(result, message):
    rule = derive_rule(nn.Linear(2, 2), lambda outputs, inputs: result)
    with pytest.raises(ValueError, match=message):
        rule.losses({}, {}, 0.0, None)


LOGITS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "outputs",
    [
        {"loss": 0, "logits": LOGITS},
        SequenceClassifierOutput(loss=torch.zeros(()), logits=LOGITS),
        (torch.zeros(()), LOGITS),
        [torch.zeros(()), LOGITS],
        SimpleNamespace(logits=LOGITS),
    ],
)
def test_logits_are_found(outputs):
    assert logits_of(outputs) is LOGITS


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"logits": None},
        SequenceClassifierOutput(loss=torch.zeros(())),
        (torch.zeros(()),),
        SimpleNamespace(),
    ],
)
def test_missing_logits_name_the_ways_out(outputs):
    with pytest.raises(ValueError, match=r"fused_linear_cross_entropy.*per_sample_loss_fn="):
        logits_of(outputs)


def test_mixed_labels_are_refused_with_a_reason():
    mixed = {"labels": torch.tensor([[0.7, 0.3], [0.0, 1.0]])}
    with pytest.raises(ValueError, match="mixup"):
        RULES["single_label"].losses({"logits": torch.zeros(2, 2)}, mixed, 0.0, None)


def test_batch_mean_gives_each_sample_the_loss_of_its_batch():
    loss = torch.tensor(3.0, requires_grad=True)
    losses = RULES["batch_mean"].losses(
        {"loss": loss}, {"x": torch.zeros(4, 2), "flag": True}, 0.0, None
    )
    assert losses.train.tolist() == losses.plain.tolist() == [3.0] * 4
    (losses.train.sum() / 4).backward()
    assert loss.grad == 1
    assert not losses.plain.requires_grad
    assert RULES["batch_mean"].losses(
        (loss, None), {"x": torch.zeros(2)}, 0.0, None
    ).terms.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rule", ["single_label", "classification", "tokens", "shifted_tokens"])
def test_missing_labels_are_named(rule):
    with pytest.raises(ValueError, match=r"'labels'.*'input_ids', 'target'"):
        RULES[rule].losses({"logits": LOGITS}, {"input_ids": 1, "target": 2}, 0.0, None)


# ---- signals -------------------------------------------------------------------------------------


def signals_by_hand(p, label):
    """From their definitions, in plain Python."""
    others = [q for c, q in enumerate(p) if c != label]
    return {
        "loss": -math.log(p[label]),
        "el2n": math.sqrt((1 - p[label]) ** 2 + sum(q * q for q in others)),
        "correct": float(p[label] >= max(p)),
        "confidence": p[label],
        "margin": max(others) - p[label],
        "entropy": -sum(q * math.log(q) for q in p),
        "label": float(label),
    }


def test_signals_by_hand():
    shares = [[3 / 4, 1 / 4], [3 / 4, 1 / 4], [1 / 10, 9 / 10]]
    labels = [1, 0, 1]
    inputs = {"labels": torch.tensor(labels)}
    outputs = {"logits": torch.tensor(shares).log() + torch.tensor([[5.0], [0.0], [-3.0]])}
    rule = RULES["classification"]
    got = observe_signals(tuple(SIGNALS), outputs, inputs, rule.losses(outputs, inputs, 0.0, None))
    assert (
        list(got)
        == list(SIGNALS)
        == ["loss", "el2n", "correct", "confidence", "margin", "entropy", "label"]
    )
    assert got["el2n"].tolist() == pytest.approx(
        [0.75 * math.sqrt(2), 0.25 * math.sqrt(2), 0.1 * math.sqrt(2)]
    )
    assert got["correct"].tolist() == [0.0, 1.0, 1.0]
    assert got["confidence"].tolist() == pytest.approx([0.25, 0.75, 0.9])
    assert got["margin"].tolist() == pytest.approx([0.5, -0.5, -0.8])
    assert got["loss"].tolist() == pytest.approx([math.log(4), math.log(4 / 3), math.log(10 / 9)])
    two = math.log(4) - 0.75 * math.log(3)  # -(3/4 ln 3/4 + 1/4 ln 1/4)
    assert got["entropy"].tolist() == pytest.approx([two, two, math.log(10) - 0.9 * math.log(9)])


def test_signals_of_three_classes_run_over_the_classes_not_the_batch():
    shares = [
        [1 / 2, 1 / 3, 1 / 6],
        [1 / 6, 1 / 6, 2 / 3],
        [1 / 4, 1 / 2, 1 / 4],
        [0.1, 0.2, 0.7],
        [0.6, 0.3, 0.1],
    ]
    labels = [1, 0, 1, 2, 2]
    inputs, outputs = {"labels": torch.tensor(labels)}, {"logits": torch.tensor(shares).log()}
    losses = RULES["single_label"].losses(outputs, inputs, 0.0, None)
    got = observe_signals(tuple(SIGNALS), outputs, inputs, losses)
    assert got["el2n"][0] == pytest.approx(math.sqrt(1 / 4 + 4 / 9 + 1 / 36))
    expected = [signals_by_hand(p, label) for p, label in zip(shares, labels, strict=True)]
    for name, values in got.items():
        assert values.shape == (5,)
        assert values.dtype == torch.float32
        assert values.tolist() == pytest.approx([e[name] for e in expected], abs=1e-6)


def test_signals_have_no_gradient_and_leave_that_of_the_loss():
    rule, model, batch, outputs = example("vit")
    losses = rule.losses(outputs, batch, 0.1, model.config)
    got = observe_signals(tuple(SIGNALS), outputs, batch, losses)
    assert not any(values.requires_grad for values in got.values())
    assert losses.train.requires_grad
    assert torch.equal(got["loss"], losses.plain)  # not the smoothed one


def test_loss_signal_is_the_mean_over_the_terms():
    losses = SampleLosses(
        torch.tensor([6.0, 6.0, 0.0]), torch.tensor([6.0, 6.0, 0.0]), torch.tensor([3.0, 1.0, 0.0])
    )
    assert observe_signals(("loss",), None, {}, losses)["loss"].tolist() == [2.0, 6.0, 0.0]


def test_only_the_requested_signals_are_computed():
    losses = SampleLosses(*[torch.zeros(2)] * 3)
    assert observe_signals((), None, {}, losses) == {}


def test_multiple_choice_has_signals():
    rule, model, batch, outputs = example("bert choice")
    losses = rule.losses(outputs, batch, 0.0, model.config)
    got = observe_signals(("el2n", "correct"), outputs, batch, losses)
    assert got["correct"].tolist() == (outputs.logits.argmax(1) == batch["labels"]).float().tolist()


def test_check_signals():
    for rule in RULES.values():
        check_signals(("loss",), rule)
        check_signals((), rule)
    check_signals(tuple(SIGNALS), RULES["single_label"])
    check_signals(tuple(SIGNALS), RULES["classification"])
    with pytest.raises(ValueError, match=r"'los'.*'loss', 'el2n'"):
        check_signals(("loss", "los"), RULES["single_label"])
    for task in ("tokens", "shifted_tokens", "question_answering"):
        with pytest.raises(ValueError, match=f"'margin'.*'{task}'"):
            check_signals(("margin",), RULES[task])
    with pytest.raises(ValueError, match="'custom'"):
        check_signals(("el2n",), derive_rule(nn.Linear(2, 2), lambda outputs, inputs: None))


@pytest.mark.parametrize("name", ["bert regression", "bert multi-label"])
@pytest.mark.parametrize("signal", ["el2n", "correct", "margin", "entropy"])
def test_signals_of_classes_are_refused_where_there_are_none(name, signal):
    rule, model, batch, outputs = example(name)
    losses = rule.losses(outputs, batch, 0.0, model.config)
    with pytest.raises(ValueError, match=f"'{signal}'"):
        observe_signals((signal,), outputs, batch, losses)
