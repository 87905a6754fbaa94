"""Is the loss that we train the loss that the Trainer would train? Compared by gradients.

Predictions near the uniform one give every cross-entropy nearly the same mean, whatever its class
weights, its smoothing or its shift. The gradients with respect to the logits differ at once:

    own loss  = what the Trainer computes from the batch, a scalar
    our loss  = sum_i L_i / (number of terms)
    compared  : d own / d logits  and  d ours / d logits,  and the two values

Both gradients belong to the same forward pass, so dropout and precision cancel out. They stop at
the logits, or at the other outputs if there are none by that name. What is compared if that is not
possible:

- If the own loss does not depend on an output, as with some compiled models, the gradients with
  respect to the model's last trainable parameters.
- With FSDP and DeepSpeed, or if autograd refuses, the values alone.

A batch is compared if it has a valid label and its number in the run is 1, 2, 4, 8, ...: what
depends on labels, such as a class weight, may be absent from the first batch.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

# Nodes that hand a tensor on as it is: accelerate converts the outputs of a pass to float32, and
# DDP passes them through a function of its own. The own loss may depend on what is before them.
_COPIES = ("ToCopyBackward0", "_DDPSinkBackward", "CloneBackward0", "AliasBackward0")

# Half-precision gradients of small losses would be rounded to 0.
_SCALE = 1024.0

# Largest relative difference: of numbers in float32, and in half precision.
_CLOSE, _CLOSE_IN_HALF = 1e-3, 2e-2

# Rows of a gradient that are longer are projected on as many random directions.
_KEPT = 8

# So many trainable parameters are looked at if no output will do.
_LAST = 8


class Schedule:
    """Which batches of a run are compared."""

    def __init__(self) -> None:
        self._batches, self._next = 0, 1

    def due(self) -> bool:
        """Whether the batch that begins is compared. Counts it."""
        self._batches += 1
        return self._batches >= self._next

    def compared(self) -> None:
        """Note that the batch had a valid label and was compared."""
        self._next = 2 * self._batches


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
        before, at = following[number if len(following) > 1 else 0]
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
    rounded = own.half if own.where == "outputs" else half
    close = _CLOSE_IN_HALF if rounded else _CLOSE
    length = sum(float(part.double().square().sum()) for part in own.parts.values()) ** 0.5
    # The gradient of a term of size 1, after rounding. It counts if the losses are nearly 0.
    rounding = (4e-3 if rounded else 1e-5) / max(terms, 1.0) ** 0.5
    return max(close, 1e-6 / max(abs(own.value), 1e-12)), close + rounding / max(length, 1e-30)


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
