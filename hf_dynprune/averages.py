"""What does a loss average? The numbers of single samples, as a library's own loss computes them.

A trainer or a loss module of a library gives one scalar. Somewhere it is the mean over the batch:

    loss = sum_k c_k mean(x_k),    x_k (B,), one number for each sample

[`Averages`] watches the loss being computed, and sees each x_k just before it is averaged. So the
losses of samples are known without another forward pass, and without a copy of the formulas. The
factors c_k are the derivatives of the loss with respect to the means. What is averaged for metrics
has none, and is left out.

A mean over the tokens of a batch with labels to ignore is a weighted mean of samples:

    mean = sum_i (sum of l over i's tokens) / (tokens of the batch)
    trained of sample i    B / (tokens of the batch) * (sum of l over i's tokens)
    observed of sample i   the mean of l over i's own tokens, which does not depend on the batch
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .loss_side import LossFunction, SampleLossMixin
from .losses import RULES, LossRule, SampleLosses
from .potential import Kind, Magnitude
from .pruner import DynamicPruner
from .trainer import DynamicPruningMixin

_MEANS = frozenset([Tensor.mean, torch.mean, Tensor.nanmean, torch.nanmean])
_WITH_IGNORED = (F.cross_entropy, F.nll_loss)


class _Mean(NamedTuple):
    """One average: the scalar, and for each sample what is trained and what is observed."""

    value: Tensor  # ()
    train: Tensor | None  # (B,), or None if the numbers are not those of samples
    plain: Tensor | None  # (B,)


class Averages(TorchFunctionMode):
    """Sees what is averaged over a batch while a loss is computed. Use it as a context, once.

    It sees `x.mean()` and the losses of `torch.nn.functional` with `reduction="mean"` (or
    `"batchmean"`). The numbers of a sample must be those at its place in the first dimension. A
    cross-entropy may also have all tokens of the batch in one dimension.

    Args:
        size: B, the samples of the batch.
        alone: Whether the forward pass has no gradient. Then the means are made the leaves of a
            graph of their own, so that the factors are known nevertheless.

    Cost: a Python call for each torch function, some microseconds; none between `pause` and
    `resume`. A loss of `torch.nn.functional` is computed once, without its reduction.
    """

    def __init__(self, size: int, *, alone: bool = False) -> None:
        super().__init__()
        self.size, self.alone = size, alone
        self._seen: list[_Mean] = []
        self._watches = False

    def resume(self) -> None:
        """Watch."""
        if not self._watches:
            self._watches = True
            super().__enter__()

    def pause(self) -> None:
        """Do not watch, as in the forward pass of a model."""
        if self._watches:
            self._watches = False
            super().__exit__(None, None, None)

    def __enter__(self) -> "Averages":
        self.resume()
        return self

    def __exit__(self, *error: Any) -> None:
        self.pause()  # already, if a forward pass failed

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        mean = None
        if not kwargs:
            if func not in _MEANS:  # nearly all functions of a forward pass
                return func(*args)
            if len(args) == 1 and args[0].is_floating_point():
                mean = self._of_rows(func(args[0]), args[0])
        elif kwargs.get("reduction") in ("mean", "batchmean") and kwargs.get("reduce") is None:
            mean = self._of_loss(func, args, dict(kwargs))
        if mean is None:
            return func(*args, **(kwargs or {}))
        if self.alone and torch.is_grad_enabled() and not mean.value.requires_grad:
            mean = mean._replace(value=mean.value.detach().requires_grad_())
            self._seen.append(mean)
            return mean.value.clone()  # a leaf could not be added to in place
        if mean.value.requires_grad:
            self._seen.append(mean)
        return mean.value

    def _of_rows(self, value: Tensor, numbers: Tensor) -> _Mean:
        rows = None
        if numbers.ndim and len(numbers) == self.size:
            rows = numbers.flatten(1).mean(1) if numbers.ndim > 1 else numbers
        return _Mean(value, rows, None if rows is None else rows.detach())

    def _of_loss(self, func: Any, args: Any, kwargs: dict[str, Any]) -> _Mean | None:
        each = {**kwargs, "reduction": "none"}
        if func in _WITH_IGNORED:
            if kwargs.get("weight") is not None:  # divides by the weights of the batch
                return None
            return self._of_labels(func(*args, **each), args[1], kwargs.get("ignore_index", -100))
        if kwargs["reduction"] == "batchmean":
            terms = func(*args, **each).flatten(1).sum(1)
        else:
            terms = func(*args, **each)
        return self._of_rows(terms.mean(), terms)

    def _of_labels(self, terms: Tensor, labels: Tensor, ignored: int) -> _Mean:
        """The mean over the labels that are not ignored, and their share of each sample."""
        counted = torch.ones_like(terms)
        if not labels.is_floating_point():
            counted = labels.ne(ignored).to(terms).view(terms.shape)
        valid = counted.sum()
        value = terms.sum() / valid
        if terms.numel() % self.size:
            return _Mean(value, None, None)
        sums = terms.reshape(self.size, -1).sum(1)
        own = counted.reshape(self.size, -1).sum(1)
        plain = sums.detach() / own.clamp(min=1)
        return _Mean(value, sums * (self.size / valid), plain)

    def parts_of(self, loss: Tensor) -> SampleLosses | None:
        """The losses of the samples, (B,) each; None if the loss averages nothing over samples.

        Args:
            loss: The scalar that was computed. Its graph stays.
        """
        if not self._seen or not loss.requires_grad:
            return None
        factors = torch.autograd.grad(
            loss, [mean.value for mean in self._seen], retain_graph=True, allow_unused=True
        )
        train: Any = None
        plain: Any = None
        for mean, factor in zip(self._seen, factors, strict=True):
            if factor is None or mean.train is None or mean.plain is None:
                continue
            more, own = factor.detach() * mean.train, factor.detach() * mean.plain
            train = more if train is None else train + more
            plain = own if plain is None else plain + own
        if train is None:
            return None
        train = train.float()
        return SampleLosses(train, plain.float(), torch.ones_like(train.detach()))


@contextmanager
def around(
    models: Iterable[nn.Module], before: Callable[[], Any], after: Callable[[], Any]
) -> Iterator[None]:
    """Call something before and after each forward pass of some models."""

    def begin(*_: Any) -> None:
        before()

    def end(*_: Any) -> None:
        after()

    hooks: list[Any] = []
    for model in models:
        hooks += model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_gradient(model: nn.Module) -> Iterator[None]:
    """Forward passes of the model have no gradient, what follows them has."""
    switches = (partial(torch.set_grad_enabled, on) for on in (False, True))
    with torch.enable_grad(), around([model], *switches):
        yield


# ---- a trainer of a library ----------------------------------------------------------------------

# The entry of the outputs with the losses of samples.
_SAMPLES = "samples"

AVERAGED = LossRule("averaged", lambda outputs, *_: outputs[_SAMPLES])

# The ways out if a loss averages nothing over samples.
BATCH_MEAN = (
    "pass per_sample_loss_fn='batch_mean', which gives each sample the loss of its batch, or use a "
    "policy that needs no loss, such as RandomPruning(keep_ratio=0.5)."
)


class AveragedLossMixin(DynamicPruningMixin):
    """Adds `pruning=` to a Trainer whose compute_loss averages one number for each sample.

    The base of `preference.py` and `embedding.py`. The signal `"loss"` of a sample is its number.

    Args:
        pruning: The policy; None is the stock Trainer.
        per_sample_loss_fn: `"batch_mean"`, or None.

    Cost: No forward pass and no collective beyond those of the Trainer's compute_loss.
    """

    # What compute_loss adds to for the next log. A scoring pass leaves it as it was.
    _logged: tuple[str, ...] = ()
    # Other models that compute_loss calls.
    _references: tuple[str, ...] = ()

    # ---- what a subclass says ----

    def _rows_in(self, inputs: Mapping[str, Any]) -> int:
        """The number of samples of a batch."""
        raise NotImplementedError

    def _in_order(self, rows: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The numbers that are averaged, (B,), in the order of the batch."""
        return rows

    def _compared(self, passes: list[Any]) -> dict[str, Any]:
        """Of the outputs of forward passes: where our loss is compared by gradients."""
        return {}

    def _unknown_loss(self) -> str:
        """Why the loss does not average one number for each sample; empty if it does."""
        return ""

    def _kind(self) -> Kind | None:
        """How the size of a sample's gradient follows from its number; None if that is unknown."""
        return None

    # ---- the losses of samples ----

    def _magnitude(self) -> Magnitude | None:
        kind = self._kind() if self.loss_rule is AVERAGED else None
        return None if kind is None else Magnitude("loss", kind)

    def _prepare_observation(self, pruner: DynamicPruner) -> None:
        super()._prepare_observation(pruner)
        scoring, ranks = pruner.policy.scoring, pruner.shape.ranks
        if scoring != "trained" and ranks > 1:
            raise ValueError(
                f"scoring={scoring!r} on {ranks} ranks: each rank scores its own samples, and the "
                f"loss of {type(self).__name__} communicates in each pass. Use scoring='trained', "
                "or one rank."
            )

    def _derive_rule(self, given: LossFunction | None) -> LossRule:
        if given == "batch_mean":
            return RULES["batch_mean"]
        check_given(given, type(self))
        if why := self._unknown_loss():
            raise ValueError(f"{why}: {BATCH_MEAN}")
        return AVERAGED

    def _own_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        return self._watched(model, inputs, alone=False)

    def _watched(
        self, model: nn.Module, inputs: dict[str, Any], *, alone: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of the Trainer, and the losses of its samples among the outputs.

        Args:
            model, inputs: Of compute_loss.
            alone: Whether the forward pass has no gradient.
        """
        batch = dict(inputs)  # compute_loss may change its inputs
        passes: list[Any] = []
        hook = model.register_forward_hook(lambda module, given, outputs: passes.append(outputs))
        averages = Averages(self._rows_in(batch), alone=alone)
        others = [vars(self)[name] for name in self._references if vars(self).get(name) is not None]
        try:
            with around([model, *others], averages.pause, averages.resume), averages:
                # return_outputs=True may cost another forward pass.
                loss = cast(Tensor, super(SampleLossMixin, self).compute_loss(model, inputs))
        finally:
            hook.remove()
        outputs = {"loss": loss.detach(), **self._compared(passes)}
        if self.loss_rule is not RULES["batch_mean"]:
            losses = averages.parts_of(loss)
            if losses is None:
                raise ValueError(
                    f"The loss of {type(self).__name__} averages nothing over the "
                    f"{averages.size} samples of a batch, so the loss of a sample is not known: "
                    f"{BATCH_MEAN}"
                )
            train, plain = (self._in_order(rows, batch) for rows in losses[:2])
            outputs[_SAMPLES] = SampleLosses(train, plain, losses.terms)
        return loss, outputs

    def _scoring_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        kept = {name: copy.deepcopy(vars(self)[name]) for name in self._logged}
        try:
            with without_gradient(model):
                return self._watched(model, inputs, alone=True)[1]
        finally:
            vars(self).update(kept)


def check_given(given: LossFunction | None, trainer: type) -> None:
    """Raise ValueError for a `per_sample_loss_fn` that could not be used."""
    if given not in (None, "batch_mean"):
        raise ValueError(
            f"per_sample_loss_fn={given!r}: {trainer.__name__} takes the loss of a sample from "
            "what the trainer's own loss averages. Leave it out, or pass 'batch_mean'."
        )
