"""Is the loss that we train the loss that the Trainer would train? Compared by gradients.

Predictions near the uniform one give every cross-entropy nearly the same mean, whatever its class
weights, its smoothing or its shift. The gradients with respect to the logits differ at once:

    own loss  = what the Trainer computes from the batch, a scalar
    our loss  = sum_i L_i / (number of terms)
    compared  : d own / d logits  and  d ours / d logits,  and the two values

Both gradients belong to the same forward pass, so dropout and precision cancel out. They stop at
the logits, or at the other outputs if there are none by that name. What is compared if that is not
possible:

- If the own loss does not depend on an output, as with fused heads, the gradients with respect to
  the model's last trainable parameters.
- A loss over tokens, and a compiled model: on a quarter of the batch, by two extra passes of the
  model without its wrappers, which change nothing (`SampleLossMixin._compare_apart`).
- With FSDP and DeepSpeed, or if autograd refuses, the values alone.

A batch is compared if it has a valid label and its number in the run is 1, 2, 4, 8, ...: what
depends on labels, such as a class weight, may be absent from the first batch. With FSDP and
DeepSpeed the parts of a model talk to each other in each pass, so no rank may make more passes than
another. There the number of the batch alone decides.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .losses import FALLBACK, RULES, LossRule, SampleLosses, check_unmixed, unwrapped

# Nodes that hand a tensor on as it is: accelerate converts the outputs of a pass to float32, and
# DDP passes them through a function of its own. The own loss may depend on what is before them.
_COPIES = ("ToCopyBackward0", "_DDPSinkBackward", "CloneBackward0", "AliasBackward0")

# Half-precision gradients of small losses would be rounded to 0.
_SCALE = 1024.0

# Largest relative difference of gradients: in float32, and in half precision. A value is a mean
# over many numbers that is rounded once.
_CLOSE, _CLOSE_IN_HALF, _VALUE_IN_HALF = 1e-3, 2e-2, 5e-3

# Rows of a gradient that are longer are projected on as many random directions.
_KEPT = 8

# So many trainable parameters are looked at if no output will do.
_LAST = 8


class Slope(NamedTuple):
    """The value of a loss, and its gradient, shortened.

    `where` says with respect to what: `"outputs"`, `"parameters"`, or `""` if there is no gradient.
    """

    value: float
    where: str
    parts: dict[str, Tensor]
    half: bool  # whether the gradient was rounded to half precision


class Difference(NamedTuple):
    """How two losses differ, relative to the first.

    `ratio` is the factor on the second that fits the first best; the other numbers are what is left
    of the difference with the factor 1, and with that factor.
    """

    values: float
    gradients: float
    ratio: float
    beyond_ratio: float


# Of a forward pass: with respect to what a gradient can be taken.
Places = Mapping[str, Mapping[str, Any]]


def places_of(outputs: Any, model: nn.Module) -> Places:
    """With respect to what a gradient can be taken. Keeps no output in memory.

    Args:
        outputs: Of a forward pass.
        model: Whose last trainable parameters are looked at if no output will do.
    """
    return {
        "outputs": {name: _source(tensor) for name, tensor in _outputs(outputs).items()},
        "parameters": dict([i for i in model.named_parameters() if i[1].requires_grad][-_LAST:]),
    }


def slope(loss: Tensor, places: Places, where: str | None = None) -> Slope:
    """The value and the gradient of a loss, which keeps its graph.

    Args:
        loss: A scalar.
        places: Of the forward pass that the loss belongs to; empty to look at the value alone.
        where: As in [`Slope`], to get what another loss has. *Optional*, by default the first that
            is possible.
    """
    value = float(loss.detach().float().mean())
    if not loss.requires_grad or where == "":
        return Slope(value, "", {}, False)
    loss = loss.float().mean() * _SCALE
    for name, place in places.items():
        if where not in (None, name) or not place:
            continue
        try:
            found = torch.autograd.grad(
                loss, list(place.values()), allow_unused=True, retain_graph=True
            )
        except RuntimeError:  # reentrant checkpointing, donated buffers of a compiled model
            continue
        parts = {key: g for key, g in zip(place, found, strict=True) if g is not None}
        if parts or where == name:
            half = any(g.dtype in (torch.float16, torch.bfloat16) for g in parts.values())
            return Slope(value, name, {key: _shortened(g) for key, g in parts.items()}, half)
    return Slope(value, "", {}, False)


def _outputs(outputs: Any) -> dict[str, Tensor]:
    """The outputs that a loss is computed from: the logits, or all tensors if there are none."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(outputs, Mapping):
        items = outputs.items()
    elif isinstance(outputs, tuple | list):
        items = enumerate(outputs)
    else:
        items = vars(outputs).items() if hasattr(outputs, "__dict__") else ()
    tensors = {
        str(name): value
        for name, value in items
        if isinstance(value, Tensor) and value.ndim and value.requires_grad
    }
    logits = {n: t for n, t in tensors.items() if "logits" in n or n == "log_probs"}
    return logits or tensors


def _source(tensor: Tensor) -> GradientEdge:
    """Where in the graph the tensor comes from, behind nodes that only copy it."""
    node, number = get_gradient_edge(tensor)[:2]
    while node.name() in _COPIES:
        following = node.next_functions
        place = number if len(following) > 1 else 0
        # DDP's function counts outputs that are None, and has no input for them.
        before, at = following[place] if place < len(following) else (None, 0)
        if before is None:
            break
        node, number = before, at
    return GradientEdge(node, number)


def _shortened(gradient: Tensor) -> Tensor:
    """(rows, at most 8) float32: long rows are projected on the same random directions."""
    rows = gradient.reshape(-1, gradient.shape[-1] if gradient.ndim > 1 else 1)
    width = rows.shape[1]
    if width <= _KEPT:
        return rows.float() / _SCALE
    generator = torch.Generator().manual_seed(0)
    onto = torch.randn(width, _KEPT, generator=generator).to(rows.device) / (_KEPT**0.5 * _SCALE)
    return torch.cat([part.float() @ onto for part in rows.split(64)])


def difference(own: Slope, ours: Slope) -> Difference:
    """How much two losses of one forward pass differ."""
    values = abs(own.value - ours.value) / max(abs(own.value), 1e-12)
    if not own.where:
        ratio = own.value / ours.value if ours.value else 1.0
        return Difference(values, 0.0, ratio, 0.0)
    pairs = []
    for key in {**own.parts, **ours.parts}:
        one, other = own.parts.get(key), ours.parts.get(key)
        shape = one if one is not None else other
        assert shape is not None
        zero = torch.zeros_like(shape)
        pairs.append((zero if one is None else one, zero if other is None else other))

    def product(f: Callable[[Tensor, Tensor], Tensor]) -> float:
        return sum(float(f(one, other).double().sum()) for one, other in pairs)

    length = product(lambda one, other: one * one) ** 0.5
    square = product(lambda one, other: other * other)
    ratio = product(lambda one, other: one * other) / square if square else 0.0
    distance = product(lambda one, other: (one - other) ** 2) ** 0.5
    beyond = product(lambda one, other: (one - ratio * other) ** 2) ** 0.5
    scale = max(length, 1e-30)
    return Difference(values, distance / scale, ratio, beyond / scale)


def tolerances(own: Slope, terms: float, half: bool) -> tuple[float, float]:
    """The largest relative differences of values and of gradients that rounding explains.

    Args:
        own: The Trainer's loss.
        terms: The number of terms of the batch.
        half: Whether the run computes in half precision.
    """
    rounded = half or own.half
    close = _CLOSE_IN_HALF if rounded else _CLOSE
    value = _VALUE_IN_HALF if rounded and own.where == "outputs" else close
    length = sum(float(part.double().square().sum()) for part in own.parts.values()) ** 0.5
    # The gradient of a term of size 1, after rounding. It counts if the losses are nearly 0.
    rounding = (4e-3 if rounded else 1e-5) / max(terms, 1.0) ** 0.5
    return max(value, 1e-6 / max(abs(own.value), 1e-12)), close + rounding / max(length, 1e-30)


def agree(
    own: Slope, ours: Slope, terms: float, half: bool, *, multiple: bool
) -> Difference | None:
    """None if two losses are the same but for rounding, else how they differ.

    Args:
        own, ours, terms, half: As in [`difference`] and [`tolerances`].
        multiple: Whether ours may also be a multiple of the own loss, in value and in gradient.
    """
    if not math.isfinite(own.value):  # the Trainer, too, would train on it
        return None
    found = difference(own, ours)
    values, gradients = tolerances(own, terms, half)
    if found.values <= values and found.gradients <= gradients:
        return None
    if multiple and found.ratio > 0 and found.beyond_ratio <= gradients:
        left = abs(own.value - found.ratio * ours.value)
        if left <= max(values * abs(own.value), 1e-6):
            return None
    return found


def differs(own: Slope, ours: Slope, found: Difference, name: str, rule: str, way_out: str) -> str:
    """The error for losses that differ."""
    gradients = ""
    if own.where:
        gradients = (
            f", and their gradients with respect to the {own.where} differ by {found.gradients:.2%}"
        )
    return (
        f"The mean of the per-sample losses ({rule!r}) on a batch is {ours.value:.6g}, the loss of "
        f"{name} is {own.value:.6g}{gradients}: pruning would train something else. Way out: "
        f"{way_out}"
    )


def part_of(
    batch: dict[str, Any], size: int, rule: LossRule, samples: int
) -> tuple[dict[str, Any], int]:
    """At most so many samples of a batch that have a label, and how many these are.

    The whole batch if not all of its tensors and lists have one row for each sample.
    """
    rowed = {
        name: value
        for name, value in batch.items()
        if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim)
    }
    device = next((value.device for value in rowed.values() if isinstance(value, Tensor)), None)
    valid = torch.arange(size, device=device)
    if rule.terms is not None:
        valid = valid[rule.terms(batch).to(valid.device) > 0]
    if len(valid) == 0 or any(len(value) != size for value in rowed.values()):
        return batch, size if len(valid) else 0
    rows = valid[:samples]
    taken = {
        name: value[rows.to(value.device)]
        if isinstance(value, Tensor)
        else [value[i] for i in rows]
        for name, value in rowed.items()
    }
    return {**batch, **taken}, len(rows)


class LossCheck:
    """Compares our loss with the Trainer's, on batches 1, 2, 4, ... of a run.

    Args:
        model: With PEFT's wrapper, without those for several ranks.
        rule: Ours.
        name: What computes the Trainer's loss: a model, a compute_loss, ...
        given: The `per_sample_loss_fn`.
        half: Whether the run computes in half precision.
        sharded: Whether parts of the model lie on several ranks. Then no gradient can be looked
            at, and all ranks compare the same batches.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: LossRule,
        name: str,
        *,
        given: Any = None,
        half: bool = False,
        sharded: bool = False,
    ) -> None:
        self.model, self.rule, self.name, self.given = model, rule, name, given
        dtypes = {parameter.dtype for parameter in model.parameters()}
        self.half = half or not dtypes.isdisjoint({torch.bfloat16, torch.float16})
        self.sharded = sharded
        self._batches, self._next = 0, 1

    def due(self) -> bool:
        """Whether the batch that begins is compared. Counts it."""
        self._batches += 1
        due = self._batches >= self._next
        if due and self.sharded:
            self._next = 2 * self._batches
        return due

    def places(self, outputs: Any) -> Places:
        """Where gradients are compared, as in [`places_of`]; empty for the values alone."""
        return {} if self.sharded else places_of(outputs, self.model)

    def __call__(
        self,
        own: Slope | None,
        losses: SampleLosses,
        places: Places,
        outputs: Any,
        batch: dict[str, Any],
        *,
        adds: bool = False,
    ) -> None:
        """Compare. A batch without a valid label has no loss, so the next one is compared.

        Args:
            own: The Trainer's loss; None if it differs on purpose.
            losses: Ours.
            places, outputs, batch: Of the forward pass that `losses` belongs to.
            adds: Whether the model adds another loss to its own, so that only gradients compare.

        Raises:
            ValueError: If the losses differ.

        Cost: One backward pass through each loss. Waits for the device.
        """
        rule, terms = self.rule, float(losses.terms.sum())
        # An answer with its start or its end behind the sequence: transformers averages the starts
        # and the ends apart, and we over all of the optimizer step.
        halves = rule is RULES["question_answering"] and bool((losses.terms % 1 != 0).any())
        if terms == 0 or halves:
            return
        self._next = 2 * self._batches
        config = getattr(unwrapped(self.model), "config", None)
        check_unmixed(rule, batch, config)
        if own is None or (adds and not own.where):
            return
        ours = slope(losses.train.sum() / terms, places, own.where)
        if adds:
            own = own._replace(value=ours.value)
        found = agree(own, ours, terms, self.half, multiple=rule.name == "custom")
        if found is None:
            return
        fits = []
        for name, other in RULES.items():
            try:
                each = other.losses(outputs, batch, 0.0, config)
                if each.train.shape != losses.train.shape:  # a loss of each token, say
                    continue
                mean = slope(each.train.sum() / each.terms.sum(), places, own.where)
            except Exception:  # the rule is for other outputs or labels
                continue
            if name != "batch_mean" and agree(own, mean, terms, self.half, multiple=False) is None:
                fits.append(name)
        raise ValueError(differs(own, ours, found, self.name, rule.name, self._way_out(fits)))

    def _way_out(self, fits: list[str]) -> str:
        if isinstance(self.given, LossRule):
            return "if the difference is intended, pass a LossRule with matches_model=False."
        rule = f"pass per_sample_loss_fn={fits[0]!r}, which is that loss." if fits else ""
        if self.rule.name == "custom" and self.name == type(unwrapped(self.model)).__name__:
            return (
                "to train the losses of your per_sample_loss_fn (a focal loss, say), pass their "
                "mean as `compute_loss_func=` too. To train the model's loss, "
                f"{rule or 'let the function return its parts.'}"
            )
        if rule:
            return rule
        if self.rule.name == "custom":
            return (
                f"let per_sample_loss_fn return the parts of {self.name}: losses whose sum is "
                "proportional to it in each batch, also in its gradient."
            )
        return (
            "pass `per_sample_loss_fn=`, a function (outputs, inputs) -> losses of shape (batch "
            f"size,), the parts of that loss{FALLBACK}"
        )
