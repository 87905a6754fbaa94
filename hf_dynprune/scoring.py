"""Forward passes that only score: the signals of samples under the model as it stands.

A pass changes nothing. The mode of each module, its buffers (the statistics of BatchNorm) and all
random states are restored. It is a pure function of weights, samples and a seed.
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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from . import distributed
from .losses import CLASS_RULES, LossRule, logits_of, observe_signals
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
    in_step: bool = False,
    **loader: Any,
) -> dict[str, Tensor]:
    """The signals of some samples, each from one forward pass without gradient.

    Args:
        model: The model. Its mode, buffers and random states are restored.
        dataset: Map-style. Only the samples of `index` are read.
        index: (M,) int64.
        signals: Names in [`hf_dynprune.losses.SIGNALS`].
        rule: How the loss of a sample follows from the outputs.
        collator: Samples -> batch, a dict.
        batch_size: Samples in a forward pass.
        forward: Batch without the sample index -> outputs of the model. It moves the batch to the
            device that it needs.
        mode: Mode of the model: `"eval"`, or `"train"` (dropout draws from `seed`, BatchNorm takes
            the statistics of the batch).
        seed: Seeds all random numbers of the pass.
        description: The label of the bar.
        progress: Whether to show a bar, on rank 0.
        in_step: Whether all ranks must make the same number of passes, because their parts of the
            model talk to each other in each pass. A rank with fewer samples scores copies.
        loader: More options for the DataLoader.

    Returns:
        For each signal (M,) float32 on the CPU, in the order of `index`.

    Cost: M forward passes.
    """
    fills_one = mode == "train" and has_batch_norm(model)
    copies = distributed.most(len(index)) - len(index) if in_step else 0
    batches = _batches(
        dataset, index, batch_size, collator, seed, loader, fills_one=fills_one, copies=copies
    )
    parts: list[dict[str, Tensor]] = []
    scored = []
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with scoring_state(model, mode, seed), torch.no_grad():
        for batch in _bar(batches, description, progress):
            scored.append(batch.pop(SAMPLE_INDEX))
            # Moved once: `forward` and the losses below find it there.
            batch = _on(device, batch)
            inputs = dict(batch)
            outputs = forward(batch)
            # The outputs are on another device only if the model lies on several.
            inputs = _on(_device_of(outputs), inputs)
            losses = rule.losses(outputs, inputs, 0.0, getattr(model, "config", None))
            parts.append(observe_signals(signals, outputs, inputs, losses))
    if not parts:
        return {name: torch.empty(0) for name in signals}
    values = {name: torch.cat([part[name] for part in parts]).float().cpu() for name in signals}
    return _in_order(values, torch.cat(scored), index)


def _in_order(values: dict[str, Tensor], scored: Tensor, index: Tensor) -> dict[str, Tensor]:
    """The values in the order of `index`, without padding: a collator may reorder its samples."""
    real = torch.nonzero(scored >= 0).squeeze(1)
    kept = scored[real]
    if torch.equal(kept, index.to(kept.dtype)):
        return {name: value[real] for name, value in values.items()}
    if not torch.equal(kept.sort().values, index.to(kept.dtype).sort().values):
        raise ValueError(
            f"{len(index)} samples were scored, and the batches held {len(kept)} of them: expected "
            "a collator that leaves no sample out."
        )
    # The place of each sample among those that were scored.
    order = real[kept.argsort(stable=True)][index.argsort(stable=True).argsort()]
    return {name: value[order] for name, value in values.items()}


def _batches(
    dataset: Any,
    index: Tensor,
    batch_size: int,
    collator: Callable[[Any], Any],
    seed: int,
    options: dict[str, Any],
    *,
    fills_one: bool = False,
    copies: int = 0,
) -> DataLoader:
    """The samples of `index`, in their order. Each batch carries its sample indices.

    After them come `copies` of one sample, with the index -1. With `fills_one`, a last batch of one
    sample gets a copy, too.
    """
    # The sampler yields blocks. As one list the indices of a large dataset take five times the
    # bytes.
    sampler = PruningSampler(0)
    copies += fills_one and batch_size > 1 and (len(index) + copies) % batch_size == 1
    copied = index[-1:] if len(index) else torch.zeros(1, dtype=torch.int64)
    sampler.set_epoch_order(torch.cat([index, ~copied.repeat(copies)]) if copies else index)
    return DataLoader(
        IndexedDataset(dataset),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=IndexedCollator(collator),  # type: ignore[arg-type]
        # Otherwise the seed of the workers would be drawn from the global state.
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def _bar(batches: DataLoader, description: str, progress: bool) -> Any:
    from tqdm.auto import tqdm

    hidden = not progress or distributed.world()[0] != 0
    return tqdm(batches, desc=description, leave=False, disable=hidden)


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    moved = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device, non_blocking=True)
    return moved


def _device_of(outputs: Any) -> torch.device:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return next(value.device for value in values if isinstance(value, Tensor))


@contextmanager
def scoring_state(model: nn.Module, mode: Literal["eval", "train"], seed: int) -> Iterator[None]:
    """Put the model in a mode and seed all random numbers; restore everything at the end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers: dict[str, Tensor] = {}
    if mode == "train":  # only then does a pass change buffers
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
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


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a layer takes the statistics of its batch while the model trains."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return False
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # a model may keep its norms in eval mode
    found = any(norm.training for norm in norms)
    for module, training in modes:
        module.training = training
    return found


# ---- the norm of each sample's gradient ----------------------------------------------------------

# At most this many bytes of gradients are held at a time.
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
    """GraNd: the norm of the gradient of each sample's loss, in eval mode.

        g_i = || grad_theta L_i ||_2,    theta all trainable parameters,
                                         L_i the mean over the terms of sample i

    The model keeps its precision. The norms are vectorised over samples (`torch.func`), as many at
    once as 256 MiB of gradients allow. Some models cannot be vectorised, because their forward pass
    looks into its data, such as an attention mask. They go backward once for each sample: the same
    numbers, but slower, and a warning says so.

    Args:
        model: Without wrappers for several ranks. Its mode, buffers, gradients and random states
            are restored.
        prepare: Batch without the sample index -> the model's arguments, on its device.
        last_layer: Whether to approximate, from a forward pass alone: the gradient of the last
            linear layer, whose outputs are the logits, || dL_i/dlogits ||_2 * || (features, 1)
            ||_2. With one label the first factor is || p - onehot ||.
        dataset, index, rule, collator, batch_size, seed, description, progress, loader: As in
            [`score_samples`].

    Returns:
        (M,) float32 on the CPU, in the order of `index`.

    Raises:
        ValueError: With `last_layer`, if the task is not a classification, or if the logits are not
            the output of a linear layer.

    Cost: M forward and backward passes; with `last_layer` M forward passes.

    Paper: Paul, Ganguli, Dziugaite, NeurIPS 2021, arXiv 2107.07075.
    """
    if last_layer and rule.name not in CLASS_RULES:
        raise ValueError(
            f"The last-layer form of GraNd is for classification, and this task is {rule.name!r}: "
            "use method='grand'."
        )
    batches = _batches(dataset, index, batch_size, collator, seed, loader)
    norms_of = _LastLayer(model, rule) if last_layer else _WholeGradient(model, rule)
    parts, scored = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    with scoring_state(model, "eval", seed):
        for batch in _bar(batches, description, progress):
            scored.append(batch.pop(SAMPLE_INDEX))
            parts.append(norms_of(prepare(batch), len(scored[-1])).float().cpu())
    return _in_order({"norm": torch.cat(parts)}, torch.cat(scored), index)["norm"]


class _WholeGradient:
    """The norms of a batch, vectorised unless the model does not allow that."""

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
                f"{type(model).__name__} has no trainable parameters, so its gradients have no "
                "norm."
            )
        self.at_once = max(1, _GRADIENT_BYTES // held)

    def loss(
        self, trained: Mapping[str, Tensor], each: Mapping[str, Tensor], same: Mapping[str, Any]
    ) -> Tensor:
        """The loss of one sample, as a batch of one."""
        inputs = {**same, **{name: value.unsqueeze(0) for name, value in each.items()}}
        outputs = functional_call(self.model, ({**trained}, self.fixed), (), inputs)
        losses = self.rule.losses(outputs, inputs, 0.0, getattr(self.model, "config", None))
        return losses.train.sum() / losses.terms.sum().clamp(min=1)

    def __call__(self, inputs: Mapping[str, Any], size: int) -> Tensor:
        each: dict[str, Tensor] = {}
        same: dict[str, Any] = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == size:
                each[name] = value
            else:
                same[name] = value
        if self.vectorised:
            chunks = [slice(begin, begin + self.at_once) for begin in range(0, size, self.at_once)]
            try:
                # Fused attentions have no rule for vmap. This one is made of products, which have.
                with sdpa_kernel(SDPBackend.MATH):
                    return torch.cat(
                        [self._together({n: v[c] for n, v in each.items()}, same) for c in chunks]
                    )
            except Exception as error:  # any other error occurs again in the loop below
                self.vectorised = False
                warnings.warn(
                    f"{type(self.model).__name__} cannot be vectorised over samples, because of "
                    f"{error!r:.200}: its gradients are computed one by one, with the same result "
                    "and as many passes, but more slowly.",
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
    """The norms of a batch, for the gradient of the last linear layer alone."""

    def __init__(self, model: nn.Module, rule: LossRule) -> None:
        self.model, self.rule = model, rule

    def __call__(self, inputs: Mapping[str, Any], size: int) -> Tensor:
        ran: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def note(layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            ran[:] = [(cast(nn.Linear, layer), given[0], output)]  # only the last one that ran

        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        hooks = [layer.register_forward_hook(note) for layer in linear]
        try:
            with torch.no_grad():
                logits = logits_of(self.model(**inputs))
        finally:
            for hook in hooks:
                hook.remove()
        if not ran or ran[0][2] is not logits or logits.ndim != 2:
            raise ValueError(
                f"The logits of {type(self.model).__name__}, of shape {tuple(logits.shape)}, are "
                "not the output of its last linear layer for each sample, so GraNd has no "
                "last-layer form here: use method='grand'."
            )
        layer, features, _ = ran[0]
        logits = logits.detach().float().requires_grad_()
        config = getattr(self.model, "config", None)
        with torch.enable_grad():
            losses = self.rule.losses({"logits": logits}, inputs, 0.0, config)
            # Row i of the gradient depends on sample i alone.
            (slope,) = torch.autograd.grad(losses.train.sum(), logits)
        squares = features.float().square().sum(1) + (layer.bias is not None)
        return slope.norm(dim=1) * squares.sqrt()


# ---- the model's own loss ------------------------------------------------------------------------


@contextmanager
def loss_left_out(model: PreTrainedModel | None) -> Iterator[bool]:
    """Replace the model's own loss by 0, so that only what the model adds to it is left.

    Yields whether that is so. It is not for None, nor for models that compute their loss without
    `loss_function`, the property of PreTrainedModel that may be set.
    """
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
    """The names that the forward method of a class uses, without its decorators."""
    return inspect.unwrap(cls.forward).__code__.co_names
