"""Outputs and labels -> one number for each sample: the loss to train on, and the signals that policies observe.

The loss of a sample is the sum of its terms; a classification has one term a sample, a token task one a valid token.
An optimizer step minimises  sum_i w_i L_i / D,  L_i the sum of sample i's terms and D the number of terms of all its
samples, so that gradient accumulation and several ranks give the gradient of one big batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label that transformers leaves out of a loss


class SampleLosses(NamedTuple):
    """What a batch of B samples gave: all float32 of shape (B,)."""

    train: Tensor  # sum of the terms of each sample, with label smoothing, with gradient
    plain: Tensor  # the same without smoothing, without gradient
    terms: Tensor  # how many terms each sample has


@dataclass(frozen=True)
class LossRule:
    """How the loss of one sample follows from the outputs of a model.

    Args:
        name: `"single_label"`, `"classification"`, `"tokens"`, `"shifted_tokens"`, `"question_answering"`, `"batch_mean"` or
            `"custom"`.
        losses: (outputs, inputs, label smoothing, config of the model or None) -> SampleLosses.
        terms: inputs -> (B,) int64, the number of terms of each sample, known before the forward pass; None where each
            sample has one.
        from_own_loss: whether `losses` may use the loss that the model gives.
    """

    name: str
    losses: Callable[[Any, Mapping[str, Any], float, Any], SampleLosses]
    terms: Callable[[Mapping[str, Any]], Tensor] | None = None
    from_own_loss: bool = False


def logits_of(outputs: Any) -> Tensor:
    """The logits of a ModelOutput, a dict, or a tuple that has the loss first.

    Raises:
        ValueError: if there are none, as with fused losses.
    """
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, tuple | list):
        logits = outputs[1] if len(outputs) > 1 else None
    else:
        logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(
            "The model's output has no logits, so no loss of one sample can be derived. With Liger kernels set "
            '`liger_kernel_config={"fused_linear_cross_entropy": False}`; otherwise pass `per_sample_loss_fn=`.'
        )
    return logits


def _labels(inputs: Mapping[str, Any]) -> Tensor:
    for key in ("labels", "label"):
        if key in inputs:
            return inputs[key]
    raise ValueError(
        f"The batch has no 'labels' (it has {', '.join(map(repr, inputs))}): a loss needs them."
    )


def _cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float, ignored: int = IGNORED
) -> tuple[Tensor, Tensor]:
    """(smoothed with gradient, plain without) cross-entropy of each label: logits (..., C), labels (...).

    Memory: with a large C the logits are the largest tensor of a run; beside them only their log-softmax is kept.
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
    "The batch has {} as mixup and cutmix make them: a mixture of samples has no loss of one sample. Leave the mixing out, "
    "or pruning; for other soft labels pass `per_sample_loss_fn=`."
)


def _single_label(
    outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
) -> SampleLosses:
    """Cross-entropy. A label -100 has no loss, as in the models, but is counted as a sample of the optimizer step."""
    logits, labels = logits_of(outputs), _labels(inputs)
    if labels.is_floating_point():
        raise ValueError(_MIXED.format(f"{labels.dtype} labels of shape {tuple(labels.shape)},"))
    labels = labels.reshape(-1)
    train, plain = _cross_entropy(logits.reshape(len(labels), -1), labels, smoothing)
    return SampleLosses(train, plain, labels.ne(IGNORED).float())


def _classification(
    outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
) -> SampleLosses:
    """What transformers' sequence and image classification heads do: the kind of problem is declared, or inferred."""
    logits, labels = logits_of(outputs), _labels(inputs)
    problem = getattr(config, "problem_type", None)
    if problem is None:
        if logits.shape[-1] == 1:
            problem = "regression"
        else:
            problem = (
                "multi_label_classification"
                if labels.is_floating_point()
                else "single_label_classification"
            )
    if problem == "single_label_classification":
        return _single_label(outputs, inputs, smoothing, config)
    rows, targets = logits.float().reshape(len(labels), -1), labels.float().reshape(len(labels), -1)
    if problem == "regression":
        train = F.mse_loss(rows, targets, reduction="none").mean(1)
    else:
        train = F.binary_cross_entropy_with_logits(rows, targets, reduction="none").mean(1)
    return SampleLosses(train, train.detach(), torch.ones_like(train))


def _token_rule(name: str, shift: int) -> LossRule:
    """A loss a token: logits (B, T, C); with shift 1 the logits at t predict the label at t + 1."""

    def targets(inputs: Mapping[str, Any]) -> Tensor:
        # The labels are shifted, not the logits: a part of these would be copied.
        return F.pad(_labels(inputs)[:, shift:], (0, shift), value=IGNORED)

    def losses(
        outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
    ) -> SampleLosses:
        labels = targets(inputs)
        logits = logits_of(outputs)[:, : labels.shape[1]]
        train, plain = _cross_entropy(logits, labels, smoothing)
        return SampleLosses(train.sum(1), plain.sum(1), labels.ne(IGNORED).sum(1).float())

    return LossRule(name, losses, lambda inputs: targets(inputs).ne(IGNORED).sum(1))


def _question_answering(
    outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
) -> SampleLosses:
    """Mean of the cross-entropies of start and end; a position behind the sequence has none, as in transformers."""
    if isinstance(outputs, tuple | list):
        start, end = outputs[1], outputs[2]
    else:
        start, end = outputs["start_logits"], outputs["end_logits"]
    train = plain = torch.zeros(len(start), device=start.device)
    for logits, key in ((start, "start_positions"), (end, "end_positions")):
        target = inputs[key].reshape(-1).clamp(0, logits.shape[1])
        loss, raw = _cross_entropy(logits, target, 0.0, ignored=logits.shape[1])
        train, plain = train + loss / 2, plain + raw / 2
    return SampleLosses(train, plain, _answers(inputs, start.shape[1]))


def _batch_mean(
    outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
) -> SampleLosses:
    """The fallback of Batch Loss Score (Zhou et al., CVPR 2026, arXiv 2604.04681) where a model has no loss of one sample:
    each sample gets the loss of its batch. A moving mean over epochs, in which a sample meets ever other samples, tells hard
    ones from easy ones in time; a weight acts on the whole batch by its mean."""
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    size = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    each = loss.float().mean().expand(size)
    return SampleLosses(each, each.detach(), torch.ones_like(each))


def _answers(inputs: Mapping[str, Any], length: int) -> Tensor:
    return sum(
        inputs[key].reshape(-1).lt(length).float() / 2
        for key in ("start_positions", "end_positions")
    )


RULES: dict[str, LossRule] = {
    "single_label": LossRule("single_label", _single_label),
    "classification": LossRule("classification", _classification),
    "tokens": _token_rule("tokens", 0),
    "shifted_tokens": _token_rule("shifted_tokens", 1),
    "question_answering": LossRule(
        "question_answering",
        _question_answering,
        lambda inputs: _answers(inputs, inputs["input_ids"].shape[1]),
    ),
    "batch_mean": LossRule("batch_mean", _batch_mean, from_own_loss=True),
}

# transformers' names for heads say what their loss is; on the first batch the trainer compares with the model's own.
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


def derive_rule(
    model: nn.Module, per_sample_loss_fn: Callable[..., Tensor] | str | None = None
) -> LossRule:
    """How the loss of one sample of this model is computed.

    Args:
        model: the model, without wrappers; a class of transformers, or derived from one, is known by its head.
        per_sample_loss_fn: for all others, the name of a rule in `RULES`, or a function (outputs, inputs) -> (B,) losses.

    Raises:
        ValueError: if no rule is known for the model.
    """
    if isinstance(per_sample_loss_fn, str):
        if per_sample_loss_fn not in RULES:
            raise ValueError(
                f"per_sample_loss_fn={per_sample_loss_fn!r} is no known rule; the rules are {', '.join(RULES)}."
            )
        return RULES[per_sample_loss_fn]
    if per_sample_loss_fn is not None:
        return _custom_rule(per_sample_loss_fn)
    for cls in type(model).__mro__:
        for head, rule in _RULE_OF_HEAD.items():
            if cls.__name__.endswith(head):
                if head == "ForConditionalGeneration" and not getattr(
                    model.config, "is_encoder_decoder", False
                ):
                    rule = "shifted_tokens"
                return RULES[rule]
    raise ValueError(
        f"No loss of one sample is known for a {type(model).__name__}: pass `per_sample_loss_fn=`, the name of a rule "
        f"({', '.join(map(repr, RULES))}) or a function (outputs, inputs) -> losses of shape (batch size,)."
    )


def _custom_rule(function: Callable[..., Tensor]) -> LossRule:
    def losses(
        outputs: Any, inputs: Mapping[str, Any], smoothing: float, config: Any
    ) -> SampleLosses:
        loss = function(outputs, inputs)
        if not isinstance(loss, Tensor) or loss.ndim != 1:
            got = (
                f"a tensor of shape {tuple(loss.shape)}"
                if isinstance(loss, Tensor)
                else f"a {type(loss).__name__}"
            )
            raise ValueError(
                f"per_sample_loss_fn returned {got}; wanted is a tensor of shape (batch size,)."
            )
        loss = loss.float()
        return SampleLosses(loss, loss.detach(), torch.ones_like(loss))

    return LossRule("custom", losses, from_own_loss=True)


def check_unmixed(rule: LossRule, inputs: Mapping[str, Any], config: Any) -> None:
    """Raises ValueError for labels that mixup or cutmix made: transformers trains them as if they were multi-label, so that
    no loss would tell. Looks at the values of a batch: for the first one."""
    labels = inputs.get("labels")
    if rule.name != "classification" or getattr(config, "problem_type", None) == "regression":
        return
    if (
        isinstance(labels, Tensor)
        and labels.is_floating_point()
        and labels.ndim == 2
        and labels.shape[1] > 1
    ):
        if bool(((labels == 0) | (labels == 1)).all()):
            return
        raise ValueError(_MIXED.format(f"labels between 0 and 1, of shape {tuple(labels.shape)},"))


# ---- signals -------------------------------------------------------------------------------------


def _el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """|| softmax(f(x)) - onehot(y) ||_2 in [0, sqrt 2] (Paul, Ganguli, Dziugaite 2021)."""
    return (logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])).norm(dim=-1)


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the highest logit is the label's, else 0.0."""
    return logits.argmax(-1).eq(labels).float()


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Highest probability of another class less that of the label's, in [-1, 1]: high is hard."""
    p = logits.softmax(-1)
    own = p.gather(-1, labels[:, None])
    return (p.scatter(-1, labels[:, None], -1.0).max(-1).values - own.squeeze(-1)).clamp(-1, 1)


def _confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the label's class, in [0, 1]: low is hard."""
    return logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def _label(logits: Tensor, labels: Tensor) -> Tensor:
    """The label itself; exact up to 2^24 classes."""
    return labels.float()


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Entropy of the predicted distribution, in nats."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


# `"loss"` is the plain loss of a sample, the mean over its terms; it is known for every rule. The others are functions of
# (logits (B, C) float32, labels (B,)) and so of single-label classification alone.
SIGNALS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "loss": None,
    "el2n": _el2n,
    "correct": _correct,
    "confidence": _confidence,
    "margin": _margin,
    "entropy": _entropy,
    "label": _label,
}


def check_signals(names: tuple[str, ...], rule: LossRule) -> None:
    """Raises ValueError for an unknown signal, and for one that the task does not have."""
    for name in names:
        if name not in SIGNALS:
            raise ValueError(
                f"There is no signal {name!r}; the signals are {', '.join(map(repr, SIGNALS))}."
            )
        if SIGNALS[name] is not None and rule.name not in ("single_label", "classification"):
            raise ValueError(
                f"The signal {name!r} is defined for single-label classification, and this task is {rule.name!r}: use "
                "the signal 'loss'."
            )


@torch.no_grad()
def observe_signals(
    names: tuple[str, ...], outputs: Any, inputs: Mapping[str, Any], losses: SampleLosses
) -> dict[str, Tensor]:
    """For each name (B,) float32, without gradient."""
    values = {}
    for name in names:
        function = SIGNALS[name]
        if function is None:
            values[name] = losses.plain / losses.terms.clamp(min=1)
        else:
            labels = _labels(inputs).reshape(-1)
            if labels.is_floating_point() or len(labels) != len(losses.plain):
                raise ValueError(
                    f"The signal {name!r} is defined for single-label classification; here use 'loss'."
                )
            values[name] = function(
                logits_of(outputs).detach().float().reshape(len(labels), -1), labels
            )
    return values
