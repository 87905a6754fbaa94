"""Outputs and labels -> numbers for each sample: the loss to train on, the signals of policies.

The loss of a sample is the sum of its terms. A classification has one term for each sample, a token
task has one for each valid token. An optimizer step minimises

    sum_i w_i L_i / D,    L_i the sum of sample i's terms, D the number of terms of all its samples,

so that gradient accumulation and several ranks give the gradient of one big batch.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .checks import did_you_mean

IGNORED = -100  # the label that transformers leaves out of a loss

# The end of each error that has this way out.
FALLBACK = ", or 'batch_mean' if only the loss of a batch is known."


class SampleLosses(NamedTuple):
    """What a batch of B samples gave, each float32 of shape (B,)."""

    train: Tensor  # sum of the terms of each sample, with label smoothing, with gradient
    plain: Tensor  # the same without smoothing, without gradient
    terms: Tensor  # number of terms of each sample


@dataclass(frozen=True)
class LossRule:
    """How the loss of one sample follows from the outputs of a model.

    `RULES` holds ours. Write your own for a loss with several terms for each sample, such as one
    over a part of the tokens, and pass it as `per_sample_loss_fn`.

    Args:
        name: A name in `RULES`, `"custom"`, or your own. The signals of classes (`"el2n"`, ...) are
            known for `"single_label"` and `"classification"`.
        losses: (outputs, inputs, label smoothing, config of the model or None) -> SampleLosses.
        terms: inputs -> (B,) int64, the number of terms of each sample, known before the forward
            pass. None if each sample has one.
        from_own_loss: Whether `losses` may use the loss that the model gives.
        matches_model: Whether the mean over the terms is the loss that the Trainer would train. It
            is compared on the first batch, and on later ones (`hf_dynprune.loss_check`). False for
            a loss that differs on purpose.
    """

    name: str
    losses: Callable[[Any, Mapping[str, Any], float, Any], SampleLosses]
    terms: Callable[[Mapping[str, Any]], Tensor] | None = None
    from_own_loss: bool = False
    matches_model: bool = True


def unwrapped(model: Any) -> Any:
    """The model below PEFT's wrapper, if it has one. Its class says which head it has."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_class(model: Any) -> type:
    """The class of a model, without PEFT's wrapper and without the one of FSDP2."""
    split = distributed.sharded_classes()
    return next(cls for cls in type(unwrapped(model)).__mro__ if not issubclass(cls, split))


# PEFT's kinds of prompt learning: virtual tokens in front of a sequence, and in its cache.
_IN_FRONT = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING")
_IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")


def virtual_tokens(model: Any) -> int:
    """How many tokens PEFT's prompt tuning puts in front of each sequence of a decoder, or 0.

    Raises:
        ValueError: For prompt learning of another kind, whose loss is not the model's.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not getattr(config, "is_prompt_learning", False):
        return 0
    kind = str(config.peft_type).rsplit(".", 1)[-1]
    if kind not in (*_IN_FRONT, *_IN_CACHE):
        raise ValueError(
            f"PEFT's {kind} learns a prompt and has a loss of its own (CPT's weighs tokens of the "
            "prompt, too), whose parts for each sample are not known: use one of "
            f"{', '.join((*_IN_FRONT, *_IN_CACHE))}, or pass `per_sample_loss_fn=`{FALLBACK}"
        )
    return int(config.num_virtual_tokens) if kind in _IN_FRONT else 0


def logits_of(outputs: Any) -> Tensor:
    """The logits of a ModelOutput, of a dict, or of a tuple that starts with the loss.

    Raises:
        ValueError: If there are none, as with fused losses.
    """
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, tuple | list):
        logits = outputs[1] if len(outputs) > 1 else None
    else:
        logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(
            "The model's output has no logits, so the loss of one sample cannot be derived. With "
            'Liger kernels set `liger_kernel_config={"fused_linear_cross_entropy": False}`. '
            f"Otherwise pass `per_sample_loss_fn=`{FALLBACK}"
        )
    return logits


def _labels(inputs: Mapping[str, Any]) -> Tensor:
    for key in ("labels", "label"):
        if key in inputs:
            return inputs[key]
    raise ValueError(
        f"The batch has no 'labels' (it has {', '.join(map(repr, inputs))}): a loss needs them. "
        "Rename the column, or read it in a function per_sample_loss_fn(outputs, inputs). A column "
        "that the model's forward does not take reaches the batch if TrainingArguments has it in "
        "label_names=[...], or with remove_unused_columns=False."
    )


def _counted(inputs: Mapping[str, Any]) -> Tensor:
    """(B,) int64: 1 for a sample with a label, 0 if the label is ignored."""
    labels = _labels(inputs)
    if labels.is_floating_point():
        return torch.ones(len(labels), dtype=torch.int64, device=labels.device)
    return labels.reshape(-1).ne(IGNORED).long()


def _cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float, ignored: int = IGNORED
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each label: (smoothed, with gradient), (plain, without).

    Args:
        logits: (..., C).
        labels: (...) int64.
        smoothing: Label smoothing, in [0, 1).
        ignored: The label that has no loss.

    Memory: with a large C the logits are the largest tensor of a run. Only their log-softmax is
    kept beside them.
    """
    shape, flat = labels.shape, logits.float().reshape(-1, logits.shape[-1])
    target = labels.reshape(-1)
    if smoothing:
        log_probabilities = flat.log_softmax(-1)
        plain = F.nll_loss(log_probabilities, target, reduction="none", ignore_index=ignored)
        uniform = torch.where(target == ignored, 0.0, -log_probabilities.mean(-1))
        train = (1 - smoothing) * plain + smoothing * uniform
    else:
        train = plain = F.cross_entropy(flat, target, reduction="none", ignore_index=ignored)
    return train.view(shape), plain.detach().view(shape)


_MIXED = (
    "The batch has {} as mixup and cutmix make them. A mixture has no loss of one sample: switch "
    "off the mixing or the pruning. For other soft labels pass `per_sample_loss_fn=`."
)


def _single_label(
    outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
) -> SampleLosses:
    """Cross-entropy. A sample with the label -100 has no loss and no term, as in the models."""
    logits, labels = logits_of(outputs), _labels(inputs)
    if labels.is_floating_point():
        raise ValueError(_MIXED.format(f"{labels.dtype} labels of shape {tuple(labels.shape)},"))
    labels = labels.reshape(-1)
    train, plain = _cross_entropy(logits.reshape(len(labels), -1), labels, smoothing)
    return SampleLosses(train, plain, labels.ne(IGNORED).float())


def _classification(
    outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
) -> SampleLosses:
    """The loss of transformers' sequence and image classification heads.

    The config declares the kind of problem. Otherwise it follows from the labels, as in the heads.
    """
    logits, labels = logits_of(outputs), _labels(inputs)
    problem = getattr(config, "problem_type", None)
    if problem is None:
        if logits.shape[-1] == 1:
            problem = "regression"
        elif labels.is_floating_point():
            problem = "multi_label_classification"
        else:
            problem = "single_label_classification"
    if problem == "single_label_classification":
        return _single_label(outputs, inputs, smoothing, config)
    rows, targets = logits.float().reshape(len(labels), -1), labels.float().reshape(len(labels), -1)
    if problem == "regression":
        train = F.mse_loss(rows, targets, reduction="none").mean(1)
    else:
        train = F.binary_cross_entropy_with_logits(rows, targets, reduction="none").mean(1)
    return SampleLosses(train, train.detach(), torch.ones_like(train))


def _token_rule(name: str, shift: int, virtual: int = 0) -> LossRule:
    """A loss for each token: logits (B, T, C). With shift 1 the logits at t predict label t + 1.

    The first `virtual` positions are a prompt without labels, in front of those of the batch.
    """

    def targets(inputs: Mapping[str, Any], virtual: int) -> Tensor:
        # The labels are shifted and not the logits, because a part of the logits would be a copy.
        labels = F.pad(_labels(inputs), (virtual, 0), value=IGNORED)
        return F.pad(labels[:, shift:], (0, shift), value=IGNORED)

    def losses(
        outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
    ) -> SampleLosses:
        labels = targets(inputs, virtual)
        logits = logits_of(outputs)[:, : labels.shape[1]]
        train, plain = _cross_entropy(logits, labels, smoothing)
        return SampleLosses(train.sum(1), plain.sum(1), labels.ne(IGNORED).sum(1).float())

    # Behind a prompt the first label is predicted, too. The Trainer does not count it there either.
    return LossRule(name, losses, lambda inputs: targets(inputs, 0).ne(IGNORED).sum(1))


def _question_answering(
    outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
) -> SampleLosses:
    """Mean of the cross-entropies of start and end.

    A position behind the sequence has no loss, as in transformers.
    """
    if isinstance(outputs, tuple | list):
        start, end = outputs[1], outputs[2]
    elif "start_logits" in outputs and "end_logits" in outputs:
        start, end = outputs["start_logits"], outputs["end_logits"]
    else:
        raise ValueError(
            "The outputs have no start_logits and end_logits (they have "
            f"{', '.join(map(repr, outputs))}), so the loss of an answer is not known: pass "
            f"`per_sample_loss_fn=`, a function (outputs, inputs) -> (batch size,){FALLBACK}"
        )
    terms = _answers(inputs, start.shape[1])
    train = plain = torch.zeros(len(start), device=start.device)
    for logits, key in ((start, "start_positions"), (end, "end_positions")):
        target = inputs[key].reshape(-1).clamp(0, logits.shape[1])
        loss, raw = _cross_entropy(logits, target, 0.0, ignored=logits.shape[1])
        train, plain = train + loss / 2, plain + raw / 2
    return SampleLosses(train, plain, terms)


def _batch_mean(
    outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
) -> SampleLosses:
    """The loss of its batch for each sample, for models without a loss of one sample.

    Because batches change every epoch, a moving average of batch losses separates hard from easy
    samples over time. A weight acts on the whole batch by its mean.

    Paper: Batch Loss Score (Zhou et al., CVPR 2026, arXiv 2604.04681).
    """
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    size = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    return shared_loss(loss, size)


def shared_loss(loss: Tensor, size: int) -> SampleLosses:
    """The loss of a batch for each of its samples."""
    each = loss.float().mean().expand(size)
    return SampleLosses(each, each.detach(), torch.ones_like(each))


def _answers(inputs: Mapping[str, Any], length: int) -> Tensor:
    keys = [key for key in ("start_positions", "end_positions") if key in inputs]
    if len(keys) < 2:
        raise ValueError(
            "The batch has no 'start_positions' or no 'end_positions' (it has "
            f"{', '.join(map(repr, inputs))}): the loss of question answering needs both. For "
            "another loss pass `per_sample_loss_fn=`, a function (outputs, inputs) -> losses of "
            f"shape (batch size,){FALLBACK}"
        )
    return sum(inputs[key].reshape(-1).lt(length).float() / 2 for key in keys)


RULES: dict[str, LossRule] = {
    "single_label": LossRule("single_label", _single_label, _counted),
    "classification": LossRule("classification", _classification, _counted),
    "tokens": _token_rule("tokens", 0),
    "shifted_tokens": _token_rule("shifted_tokens", 1),
    "question_answering": LossRule(
        "question_answering",
        _question_answering,
        lambda inputs: _answers(inputs, inputs["input_ids"].shape[1]),
    ),
    "batch_mean": LossRule("batch_mean", _batch_mean, from_own_loss=True),
}

# transformers' names of heads say what their loss is. It is a hypothesis: the trainer compares.
_RULE_OF_HEAD = {
    "ForSequenceClassification": "classification",
    "ForImageClassification": "classification",
    "ForAudioClassification": "single_label",
    "ForVideoClassification": "classification",
    "ForMultipleChoice": "single_label",
    "ForTokenClassification": "tokens",
    "ForMaskedLM": "tokens",
    "ForConditionalGeneration": "tokens",
    "ForCausalLM": "shifted_tokens",
    "LMHeadModel": "shifted_tokens",
    "ForQuestionAnswering": "question_answering",
}

# The causal models of transformers whose labels are at the positions that predict them.
_UNSHIFTED = (
    "BartForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM",
    "FlaubertWithLMHeadModel",
    "MBartForCausalLM",
    "MarianForCausalLM",
    "MvpForCausalLM",
    "PLBartForCausalLM",
    "PegasusForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
    "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
)


def derive_rule(
    model: nn.Module, per_sample_loss_fn: Callable[..., Tensor] | str | LossRule | None = None
) -> LossRule:
    """How the loss of one sample of this model is computed.

    Args:
        model: The model, without wrappers but PEFT's. A class of transformers, or one derived from
            it, is known by its head.
        per_sample_loss_fn: For all others the name of a rule in `RULES`, a function (outputs,
            inputs) -> (B,) losses, or a LossRule.

    Raises:
        ValueError: If no rule is known for the model.
    """
    if isinstance(per_sample_loss_fn, LossRule):
        return per_sample_loss_fn
    if isinstance(per_sample_loss_fn, str):
        if per_sample_loss_fn not in RULES:
            raise ValueError(
                f"per_sample_loss_fn={per_sample_loss_fn!r} is not a known rule: "
                f"{did_you_mean(per_sample_loss_fn, RULES)}The rules are {', '.join(RULES)}."
            )
        return _behind_a_prompt(RULES[per_sample_loss_fn], model)
    if per_sample_loss_fn is not None:
        return _custom_rule(per_sample_loss_fn)
    base = unwrapped(model)
    rule = _rule_of_head(base)
    if rule is None:
        raise ValueError(
            f"No loss of one sample is known for a {model_class(base).__name__}: pass "
            f"`per_sample_loss_fn=`, the name of a rule ({', '.join(map(repr, RULES))}) or a "
            f"function (outputs, inputs) -> losses of shape (batch size,){FALLBACK}"
        )
    return _behind_a_prompt(rule, model)


def _rule_of_head(model: nn.Module) -> LossRule | None:
    for cls in model_class(model).__mro__:
        if cls.__name__ in _UNSHIFTED:
            return RULES["tokens"]
        for head, name in _RULE_OF_HEAD.items():
            if not cls.__name__.endswith(head):
                continue
            encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
            if head == "ForConditionalGeneration" and not encodes:
                name = "shifted_tokens"
            return RULES[name]
    return None


def _behind_a_prompt(rule: LossRule, model: nn.Module) -> LossRule:
    """The rule for logits that begin with those of PEFT's virtual tokens, if there are any."""
    if rule is RULES["shifted_tokens"] and (virtual := virtual_tokens(model)):
        return _token_rule(rule.name, 1, virtual)
    return rule


def forward_of_transformers(model: nn.Module) -> bool:
    """Whether the model's forward is one of transformers, and not one of a user's class."""
    forward = inspect.unwrap(type(model).forward)
    return forward.__module__.startswith("transformers.")


def _custom_rule(function: Callable[..., Tensor]) -> LossRule:
    def losses(
        outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
    ) -> SampleLosses:
        loss = function(outputs, inputs)
        if not isinstance(loss, Tensor) or loss.ndim != 1:
            got = f"a {type(loss).__name__}"
            if isinstance(loss, Tensor):
                got = f"a tensor of shape {tuple(loss.shape)}"
            raise ValueError(
                f"per_sample_loss_fn returned {got}: expected a tensor of shape (batch size,)."
            )
        loss = loss.float()
        return SampleLosses(loss, loss.detach(), torch.ones_like(loss))

    return LossRule("custom", losses, from_own_loss=True)


def check_unmixed(rule: LossRule, inputs: Mapping[str, Any], config: Any) -> None:
    """Raise ValueError for labels that mixup or cutmix made.

    transformers trains them as multi-label, so the loss alone would not tell. This looks at the
    values of a batch, so it is called for the first one only.
    """
    labels = inputs.get("labels")
    if rule.name != "classification" or getattr(config, "problem_type", None) == "regression":
        return
    if not isinstance(labels, Tensor) or not labels.is_floating_point():
        return
    if labels.ndim != 2 or labels.shape[1] <= 1 or bool(((labels == 0) | (labels == 1)).all()):
        return
    raise ValueError(_MIXED.format(f"labels between 0 and 1, of shape {tuple(labels.shape)},"))


# ---- signals -------------------------------------------------------------------------------------


def _el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """|| softmax(f(x)) - onehot(y) ||_2 in [0, sqrt 2] (Paul, Ganguli, Dziugaite 2021)."""
    return (logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])).norm(dim=-1)


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 if the highest logit is the label's, else 0.0."""
    return logits.argmax(-1).eq(labels).float()


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Highest probability of another class minus that of the label's, in [-1, 1]; high is hard."""
    p = logits.softmax(-1)
    own = p.gather(-1, labels[:, None])
    return (p.scatter(-1, labels[:, None], -1.0).max(-1).values - own.squeeze(-1)).clamp(-1, 1)


def _confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the label's class, in [0, 1]: low is hard."""
    return logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def _label(logits: Tensor, labels: Tensor) -> Tensor:
    """The label itself. Exact up to 2^24 classes."""
    return labels.float()


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Entropy of the predicted distribution, in nats."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


# `"loss"` is the plain loss of a sample, the mean over its terms. It is known for every rule. The
# others are functions of (logits (B, C) float32, labels (B,)), so only single-label classification
# has them.
SIGNALS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "loss": None,
    "el2n": _el2n,
    "correct": _correct,
    "confidence": _confidence,
    "margin": _margin,
    "entropy": _entropy,
    "label": _label,
}


# The rules whose task has the signals of classes.
CLASS_RULES = ("single_label", "classification")


def check_signals(names: tuple[str, ...], rule: LossRule) -> None:
    """Raise ValueError for an unknown signal, and for one that the task does not have."""
    for name in names:
        if name not in SIGNALS:
            raise ValueError(
                f"There is no signal {name!r}: {did_you_mean(name, SIGNALS)}The signals are "
                f"{', '.join(map(repr, SIGNALS))}."
            )
        if SIGNALS[name] is not None and rule.name not in CLASS_RULES:
            raise ValueError(
                f"The signal {name!r} is defined for single-label classification, and this task is "
                f"{rule.name!r}: use the signal 'loss'."
            )


@torch.no_grad()
def observe_signals(
    names: tuple[str, ...], outputs: Any, inputs: Mapping[str, Any], losses: SampleLosses
) -> dict[str, Tensor]:
    """The signals of a batch: for each name (B,) float32, without gradient."""
    values = {}
    for name in names:
        function = SIGNALS[name]
        if function is None:
            values[name] = losses.plain / losses.terms.clamp(min=1)
        else:
            labels = _labels(inputs).reshape(-1)
            if labels.is_floating_point() or len(labels) != len(losses.plain):
                raise ValueError(
                    f"The signal {name!r} is defined for single-label classification: use 'loss'."
                )
            logits = logits_of(outputs).detach().float().reshape(len(labels), -1)
            if name != "label":
                # A sample with an ignored label has the loss 0. Its other signals are as low: those
                # of a sample whose label is what the model predicts.
                labels = torch.where(labels.eq(IGNORED), logits.argmax(-1), labels)
            values[name] = function(logits, labels)
    return values
