"""Forward passes that only score: what the model, as it stands, makes of samples that it does not train on.

A pass changes nothing: the mode of each module, its buffers (the statistics of BatchNorm) and all random states are
afterwards what they were. It is a pure function of weights, samples and a seed.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from . import distributed
from .losses import LossRule, observe_signals
from .sampler import SAMPLE_INDEX, IndexedCollator, IndexedDataset


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
    batches = DataLoader(
        IndexedDataset(dataset),
        batch_size=batch_size,
        sampler=index.tolist(),
        collate_fn=IndexedCollator(collator),  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(seed),  # else the workers' seed is drawn from the global state
        **loader,
    )
    parts: list[dict[str, Tensor]] = []
    with scoring_state(model, mode, seed), torch.no_grad():
        for batch in _bar(batches, description, progress):
            batch.pop(SAMPLE_INDEX)
            inputs = dict(batch)
            outputs = forward(batch)
            inputs = {
                name: value.to(_device_of(outputs)) if isinstance(value, Tensor) else value for name, value in inputs.items()
            }
            losses = rule.losses(outputs, inputs, 0.0, getattr(model, "config", None))
            parts.append(observe_signals(signals, outputs, inputs, losses))
    return {name: torch.cat([part[name] for part in parts] or [torch.empty(0)]).float().cpu() for name in signals}


def _bar(batches: DataLoader, description: str, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(batches, desc=description, leave=False, disable=not progress or distributed.world()[0] != 0)


def _device_of(outputs: Any) -> torch.device:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return next(value.device for value in values if isinstance(value, Tensor))


@contextmanager
def scoring_state(model: nn.Module, mode: Literal["eval", "train"], seed: int) -> Iterator[None]:
    """Within, the model is in that mode and random numbers follow from the seed; afterwards all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if mode == "train" else {}
    python, numpy = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
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


# ---- the model's own loss --------------------------------------------------------------------------------------------


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
