"""Forward passes that only score: what the model, as it stands, makes of samples that it does not train on.

A pass changes nothing: the mode of each module, its buffers (the statistics of BatchNorm) and all random states are
afterwards what they were. It is a pure function of weights, samples and a seed.
"""

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from . import distributed
from .losses import LossRule, logits_of, observe_signals
from .sampler import SAMPLE_INDEX, IndexedCollator, IndexedDataset, PruningSampler


def score_samples(
    model: nn.Module,
    dataset: Any,
    index: Tensor,
    signals: tuple[str, ...],
    *,
    rule: LossRule,
    collator: Callable[[Any], Any],
    batch_size: int,
    forward: Callable[[Any], Any],
    mode: Literal["eval", "train"] = "eval",
    seed: int = 0,
    description: str = "scoring",
    progress: bool = True,
    **loader: Any,
) -> dict[str, Tensor]:
    """The signals of some samples, each from one forward pass without gradient.

    Args:
        model: whose mode, buffers and random states are kept.
        dataset: map-style; asked for the samples of `index` alone.
        index: (M,) int64.
        signals: names in [`hf_dynprune.losses.SIGNALS`].
        rule: how the loss of a sample follows from the outputs.
        collator: samples -> batch, a dict.
        batch_size: samples in a forward pass.
        forward: batch, without the sample index -> outputs of the model; moves the batch to the device it needs.
        mode: of the model: `"eval"`, or `"train"` (dropout draws from `seed`, BatchNorm takes the statistics of the batch).
        seed: of all that is drawn at random.
        progress: whether to show a bar, on rank 0.
        loader: more options for the DataLoader.

    Returns:
        For each signal (M,) float32 on the CPU, in the order of `index`.

    Cost: M forward passes.
    """
    batches = _batches(dataset, index, batch_size, collator, seed, loader)
    parts: list[dict[str, Tensor]] = []
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with scoring_state(model, mode, seed), torch.no_grad():
        for batch in _bar(batches, description, progress):
            batch.pop(SAMPLE_INDEX)
            batch = _on(device, batch)  # once: `forward`, and the losses below, find it there
            inputs = dict(batch)
            outputs = forward(batch)
            inputs = _on(
                _device_of(outputs), inputs
            )  # elsewhere only where a model lies on several devices
            losses = rule.losses(outputs, inputs, 0.0, getattr(model, "config", None))
            parts.append(observe_signals(signals, outputs, inputs, losses))
    return {
        name: torch.cat([part[name] for part in parts] or [torch.empty(0)]).float().cpu()
        for name in signals
    }


def _batches(
    dataset: Any,
    index: Tensor,
    batch_size: int,
    collator: Callable[[Any], Any],
    seed: int,
    options: dict[str, Any],
) -> DataLoader:
    """The samples of `index` in their order; each batch knows them."""
    sampler = PruningSampler(
        0
    )  # yields blocks: as one list the indices of a large dataset take five times their bytes
    sampler.set_epoch_order(index)
    return DataLoader(
        IndexedDataset(dataset),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=IndexedCollator(collator),  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(
            seed
        ),  # else the workers' seed is drawn from the global state
        **options,
    )


def _bar(batches: DataLoader, description: str, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(
        batches, desc=description, leave=False, disable=not progress or distributed.world()[0] != 0
    )


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }


def _device_of(outputs: Any) -> torch.device:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return next(value.device for value in values if isinstance(value, Tensor))


@contextmanager
def scoring_state(model: nn.Module, mode: Literal["eval", "train"], seed: int) -> Iterator[None]:
    """Within, the model is in that mode and random numbers follow from the seed; afterwards all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = (
        {name: buffer.clone() for name, buffer in model.named_buffers()} if mode == "train" else {}
    )
    python, numpy = random.getstate(), np.random.get_state()
    devices = {
        parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"
    }
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        model.train(mode == "train")
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])
            random.setstate(python)
            np.random.set_state(numpy)


# ---- the norm of each sample's gradient ----------------------------------------------------------

# Gradients of so many bytes are held at a time.
_GRADIENT_BYTES = 1 << 28


def gradient_norms(
    model: nn.Module,
    dataset: Any,
    index: Tensor,
    *,
    rule: LossRule,
    collator: Callable[[Any], Any],
    batch_size: int,
    prepare: Callable[[Any], Any],
    last_layer: bool = False,
    seed: int = 0,
    description: str = "gradient norms",
    progress: bool = True,
    **loader: Any,
) -> Tensor:
    """GraNd: the norm of the gradient of each sample's loss, the model in eval mode and in its own precision.

        g_i = || grad_theta L_i ||_2,    theta all trainable parameters, L_i the mean over the terms of sample i

    Vectorised over samples (`torch.func`), as many at once as 256 MiB of gradients allow. A model that cannot be vectorised
    (one whose forward pass looks into its data, as attention masks are looked into) goes backward once for each sample: the
    same numbers, slower, and a warning says so.

    Args:
        model: without wrappers for several ranks; its mode, buffers, gradients and random states are kept.
        prepare: batch, without the sample index -> the model's arguments, on its device.
        last_layer: an approximation, from a forward pass alone: the gradient of the last linear layer, whose outputs are the
            logits, || dL_i/dlogits ||_2 * || (features, 1) ||_2. With one label the first factor is || p - onehot ||.
        dataset, index, rule, collator, batch_size, seed, description, progress, loader: as in [`score_samples`].

    Returns:
        (M,) float32 on the CPU, in the order of `index`.

    Raises:
        ValueError: with `last_layer`, where the task is not a classification, or the logits are not as they leave a linear
            layer.

    Cost: M forward and backward passes; with `last_layer` M forward passes.

    Paper: Paul, Ganguli, Dziugaite, NeurIPS 2021, arXiv 2107.07075.
    """
    if last_layer and rule.name not in ("single_label", "classification"):
        raise ValueError(
            f"The last-layer form of GraNd is for classification, and this task is {rule.name!r}: use method='grand'."
        )
    batches = _batches(dataset, index, batch_size, collator, seed, loader)
    norms_of = _LastLayer(model, rule) if last_layer else _WholeGradient(model, rule)
    parts = [torch.empty(0)]
    with scoring_state(model, "eval", seed):
        for batch in _bar(batches, description, progress):
            size = len(batch.pop(SAMPLE_INDEX))
            parts.append(norms_of(prepare(batch), size).float().cpu())
    return torch.cat(parts)


class _WholeGradient:
    """The norms of a batch, vectorised while the model allows that."""

    def __init__(self, model: nn.Module, rule: LossRule) -> None:
        self.model, self.rule, self.vectorised = model, rule, True
        self.trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.fixed = {
            name: p.detach() for name, p in model.named_parameters() if not p.requires_grad
        }
        self.fixed.update(model.named_buffers())
        held = sum(p.numel() * p.element_size() for p in self.trained.values())
        if held == 0:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameters, so its gradients have no norm."
            )
        self.at_once = max(1, _GRADIENT_BYTES // held)

    def loss(
        self, trained: Mapping[str, Tensor], each: Mapping[str, Tensor], same: Mapping[str, Any]
    ) -> Tensor:
        """Of one sample, which makes a batch of its own."""
        inputs = {**same, **{name: value.unsqueeze(0) for name, value in each.items()}}
        outputs = functional_call(self.model, ({**trained}, self.fixed), (), inputs)
        losses = self.rule.losses(outputs, inputs, 0.0, getattr(self.model, "config", None))
        return losses.train.sum() / losses.terms.sum().clamp(min=1)

    def __call__(self, inputs: Mapping[str, Any], size: int) -> Tensor:
        each = {
            name: v
            for name, v in inputs.items()
            if isinstance(v, Tensor) and v.ndim and len(v) == size
        }
        same = {name: v for name, v in inputs.items() if name not in each}
        if self.vectorised:
            chunks = [slice(begin, begin + self.at_once) for begin in range(0, size, self.at_once)]
            try:
                # The fused attentions have no rule for vmap; this one is made of products that have.
                with sdpa_kernel(SDPBackend.MATH):
                    return torch.cat(
                        [self._together({n: v[c] for n, v in each.items()}, same) for c in chunks]
                    )
            except Exception as error:  # whatever is wrong beside vmap, the loop below meets again
                self.vectorised = False
                warnings.warn(
                    f"{type(self.model).__name__} cannot be vectorised over samples: its gradients are computed one by one, "
                    f"with the same result and as many passes, but more slowly. What stood in the way: {error!r:.200}",
                    stacklevel=3,
                )
        return torch.stack(
            [self._alone({n: v[i] for n, v in each.items()}, same) for i in range(size)]
        )

    def _together(self, each: Mapping[str, Tensor], same: Mapping[str, Any]) -> Tensor:
        gradients = vmap(grad(lambda trained, sample: self.loss(trained, sample, same)), (None, 0))(
            self.trained, each
        )
        return sum(g.float().square().flatten(1).sum(1) for g in gradients.values()).sqrt()

    def _alone(self, each: Mapping[str, Tensor], same: Mapping[str, Any]) -> Tensor:
        trained = {name: p.requires_grad_() for name, p in self.trained.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                self.loss(trained, each, same), list(trained.values()), allow_unused=True
            )
        return sum(g.float().square().sum() for g in gradients if g is not None).sqrt()  # type: ignore[union-attr]


class _LastLayer:
    """The norms of a batch, of the gradient of the last linear layer alone."""

    def __init__(self, model: nn.Module, rule: LossRule) -> None:
        self.model, self.rule = model, rule

    def __call__(self, inputs: Mapping[str, Any], size: int) -> Tensor:
        ran: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def note(layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            ran[:] = [(cast(nn.Linear, layer), given[0], output)]  # the last that ran

        hooks = [
            m.register_forward_hook(note) for m in self.model.modules() if isinstance(m, nn.Linear)
        ]
        try:
            with torch.no_grad():
                logits = logits_of(self.model(**inputs))
        finally:
            for hook in hooks:
                hook.remove()
        if not ran or ran[0][2] is not logits or logits.ndim != 2:
            raise ValueError(
                f"The logits of {type(self.model).__name__}, of shape {tuple(logits.shape)}, are not what its last linear "
                "layer gives for each sample, so GraNd has no last-layer form here: use method='grand'."
            )
        layer, features, _ = ran[0]
        logits = logits.detach().float().requires_grad_()
        with torch.enable_grad():
            losses = self.rule.losses(
                {"logits": logits}, inputs, 0.0, getattr(self.model, "config", None)
            )
            (slope,) = torch.autograd.grad(
                losses.train.sum(), logits
            )  # row i depends on sample i alone
        return (
            slope.norm(dim=1) * (features.float().square().sum(1) + (layer.bias is not None)).sqrt()
        )


# ---- the model's own loss ------------------------------------------------------------------------


@contextmanager
def loss_left_out(model: PreTrainedModel | None) -> Iterator[bool]:
    """Within, the model's own loss is 0, and what it adds to that. Yields whether it is: not for None, and not for the
    models that compute their loss without `loss_function`, the property of PreTrainedModel that is there to be set."""
    if model is None or "loss_function" not in _names_in_forward(type(model)):
        yield False
        return
    own = model.loss_function
    model.loss_function = _no_loss
    try:
        yield True
    finally:
        model.loss_function = own


def _no_loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros((), device=logits.device)


def _names_in_forward(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names that the forward method of a class uses, below its decorators."""
    return inspect.unwrap(cls.forward).__code__.co_names
