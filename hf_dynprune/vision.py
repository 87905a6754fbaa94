"""Image classification from scratch, with an input path fast enough not to eat up what pruning saves.

* ResNets with the stem for 32x32 images, registered with timm when this module is imported, and `create_timm_model`,
  a `transformers` model of any timm architecture with timm's own initial weights; `save_timm` writes it in timm's format.
* `ImageCache`, images decoded once, of which augmented batches are cut whole; `batch_collator` goes with it.
"""

from __future__ import annotations

import difflib
import json
import operator
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

try:
    import timm
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet
except ImportError as error:
    raise ImportError("hf_dynprune.vision needs timm: pip install hf-dynprune[recipes]") from error

if TYPE_CHECKING:
    import datasets
    from transformers import TimmWrapperForImageClassification

__all__ = [  # timm appends the architectures as they are registered
    "CIFAR_MEAN",
    "CIFAR_STD",
    "CifarResNet",
    "ImageCache",
    "batch_collator",
    "create_timm_model",
    "save_timm",
]

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


class CifarResNet(ResNet):
    """timm's `ResNet`, all arguments included, with a 3x3 convolution of stride 1 as its stem and no max-pool.

    Reference: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight, features = (
            next(self.conv1.parameters()),
            cast(list[dict[str, Any]], self.feature_info),
        )
        stem = nn.Conv2d(
            weight.shape[1], features[0]["num_chs"], kernel_size=3, padding=1, bias=False
        )
        stem.to(weight.device, weight.dtype)
        nn.init.kaiming_normal_(
            stem.weight, mode="fan_out", nonlinearity="relu"
        )  # as timm's other convolutions
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        for info in features:
            info["reduction"] = max(1, info["reduction"] // 4)
        if not hasattr(self, "layer4"):  # timm's forward asks for four stages
            self.layer4 = nn.Sequential()


_LARGE: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}
_INPUT = {
    "input_size": (3, 32, 32),
    "mean": CIFAR_MEAN,
    "std": CIFAR_STD,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}
_HEAD = {"num_classes": 10, "first_conv": "conv1", "classifier": "fc"}

default_cfgs = generate_default_cfgs(
    {
        f"resnet{depth}_cifar": {
            **_INPUT,
            **_HEAD,
            "pool_size": (4, 4) if depth in _LARGE else (8, 8),
        }
        for depth in (8, 20, 56, *_LARGE)
    }
)


def _build(depth: int, pretrained: bool, *, width: float = 1.0, **kwargs: Any) -> CifarResNet:
    n = (depth - 2) // 6  # of the small family: three stages of n blocks, 6n+2 layers
    block, layers, first = (*_LARGE[depth], 64) if depth in _LARGE else (BasicBlock, (n, n, n), 16)
    channels = [8 * max(1, round(first * width * 2**stage / 8)) for stage in range(len(layers))]
    args: dict[str, Any] = {"block": block, "layers": layers, "channels": channels}
    # timm's deep stem alone can be other than 64 wide: twice `stem_width`. CifarResNet puts one layer in its place.
    args |= {"stem_type": "deep", "stem_width": channels[0] // 2}
    args["feature_cfg"] = {"out_indices": tuple(range(len(layers) + 1))}
    # timm zeroes the last BatchNorm of each block. The paper does not, and with few narrow blocks and few epochs it costs:
    # ResNet-8 on CIFAR-10 reached 70.4 % after 3 epochs without it, 68.9 % with it (one seed, a plain loop).
    args["zero_init_last"] = depth in _LARGE
    return build_model_with_cfg(CifarResNet, f"resnet{depth}_cifar", pretrained, **(args | kwargs))


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He et al.'s CIFAR ResNet of 6n+2 layers, n=1; 16, 32, 64 channels, times `width` (to multiples of 8).

    Shortcuts that change shape are 1x1 convolutions (the paper's option B; on CIFAR it used A, without weights)."""
    return _build(8, pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """As `resnet8_cifar`, with n=3 blocks a stage."""
    return _build(20, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """As `resnet8_cifar`, with n=9 blocks a stage."""
    return _build(56, pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """timm's resnet18 but for the stem; 64 to 512 channels, times `width` (to multiples of 8)."""
    return _build(18, pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """timm's resnet34 but for the stem; 64 to 512 channels, times `width` (to multiples of 8)."""
    return _build(34, pretrained, **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """timm's resnet50 but for the stem; 64 to 512 channels, times `width` (to multiples of 8)."""
    return _build(50, pretrained, **kwargs)


def create_timm_model(
    architecture: str,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float = 1.0,
    in_chans: int = 3,
    **model_args: Any,
) -> TimmWrapperForImageClassification:
    """A `transformers` image classifier of any timm architecture, untrained, with timm's own initial weights.

    Made from its config alone, a `TimmWrapperForImageClassification` draws every convolution from normal(0, 0.02) and
    undoes zero-initialised BatchNorm scales. Here the weights are, at the same `torch.manual_seed`, those of
    ``timm.create_model(architecture, num_classes=num_labels, in_chans=in_chans, **model_args)``.

    `save_pretrained` writes into `config.json` all that `from_pretrained`, `AutoImageProcessor` and
    `pipeline("image-classification")` need; a `*_cifar` architecture loads once this module is imported. (The pipeline
    turns every image into RGB: with `in_chans=1`, use image processor and model.)

    Args:
        architecture: a name from `timm.list_models()`.
        num_labels, label_names: give one of them; the names become `id2label` and `label2id`.
        image_size: the image processor scales the short side to image_size / crop_pct (bicubic) and crops the centre
            square of image_size; with a crop_pct of 1 exactly as `ImageCache.from_dataset(image_size=...)`.
        mean, std: a number for each channel, of pixels in [0, 1].
        crop_pct: in (0, 1], above. Common on ImageNet: 0.875.
        in_chans: 3, or 1 for grey images.
        **model_args: timm's, as JSON values: `drop_path_rate=0.1`; `img_size=32, patch_size=4` for a ViT.

    Raises:
        ValueError: an architecture unknown to timm; both or none of `num_labels` and `label_names`; bad mean, std or
            crop_pct.
        TypeError: model arguments that JSON cannot hold.
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models())
        raise ValueError(
            f"timm {timm.__version__} has no architecture {architecture!r}; close: {close}, all: timm.list_models()"
        )
    if (num_labels is None) == (label_names is None):
        raise ValueError(
            f"Give one of num_labels and label_names, got {num_labels} and {label_names}."
        )
    mean, std = _checked_statistics(mean, std, in_chans)
    _check_size(image_size)
    if not 0 < crop_pct <= 1:
        raise ValueError(
            f"crop_pct must be the share of a side that the centre crop keeps, in (0, 1], got {crop_pct}."
        )
    model_args = {"in_chans": in_chans, **model_args}
    try:
        json.dumps(model_args)
    except TypeError as error:
        raise TypeError(
            f"model_args go into config.json: they must be JSON values, got {model_args}."
        ) from error
    labels: dict[str, Any] = {"num_labels": num_labels}
    if label_names is not None:
        names = [str(name) for name in label_names]
        labels = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }
    config = TimmWrapperConfig(architecture=architecture, model_args=model_args, **labels)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away
        model = TimmWrapperForImageClassification(config)
    model.timm_model = timm.create_model(architecture, num_classes=config.num_labels, **model_args)
    registered = model.timm_model.pretrained_cfg
    config.pretrained_cfg = {  # where TimmWrapperImageProcessor looks
        "input_size": [in_chans, image_size, image_size],
        "mean": list(mean),
        "std": list(std),
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "interpolation": "bicubic",
        **{key: registered[key] for key in ("first_conv", "classifier") if key in registered},
    }
    return model


def save_timm(model: TimmWrapperForImageClassification, folder: str | os.PathLike[str]) -> None:
    """Writes a model in timm's own format: `config.json` and `model.safetensors`, the folder is made if need be.

    ``timm.create_model("local-dir:folder", pretrained=True)`` loads it, from the Hub ``"hf-hub:user/name"``; so do
    `AutoModelForImageClassification`, `AutoImageProcessor` and `pipeline`, as from `save_pretrained`. Either way a
    `*_cifar` architecture needs this module to be imported first. (What `save_pretrained` writes timm cannot load: its
    configuration is the same, the names of its weights have a prefix.)

    Raises:
        TypeError: a model of another class.
    """
    from safetensors.torch import save_file
    from transformers import TimmWrapperForImageClassification

    if not isinstance(model, TimmWrapperForImageClassification):
        raise TypeError(
            f"{type(model).__name__} is no model of timm: wanted is a TimmWrapperForImageClassification, such as "
            "create_timm_model makes and AutoModelForImageClassification loads from a repository of timm."
        )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in model.timm_model.state_dict().items()}
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


class ImageCache(torch.utils.data.Dataset):
    """Images decoded once into a uint8 tensor (N, C, H, W), of which whole batches are cut, augmented and normalised.

    A sample is ``{"pixel_values": float32 (C, H, W), "labels": int}``, with pixels ``(x / 255 - mean) / std``. A
    `DataLoader` fetches ready batches; give it ``collate_fn=batch_collator``, and a `Trainer`
    ``data_collator=batch_collator`` and, in its arguments, ``remove_unused_columns=False``.

    With `augment`, an image is padded by `shift` pixels on each side, cut to its size at one of (2 * shift + 1)**2
    places, and mirrored or not, all uniformly at random, before it is normalised. What happens to a sample is a pure
    function of (seed, epoch, sample index): it does not depend on batch, workers, ranks or a resume, and no random
    generator is read or changed. Call `set_epoch` before an epoch's iterator is made; running workers see it, too.

    Cost: N * C * H * W bytes, shared with the workers. One CPU thread makes some 130,000 augmented 32x32 images a second.

    Args:
        images: uint8 (N, C, H, W), tensor or array, not copied if contiguous.
        labels: N integers, also in `self.labels` (N,) int64.
        mean, std: a number for each channel, of pixels in [0, 1].
        augment: for training. Without it, `flip`, `shift`, `padding_mode`, `seed` and the epoch have no effect.
        flip: mirror half of the images. Not for digits or text.
        shift: the largest shift in pixels, smaller than the image; 0 for none.
        padding_mode: "constant" (black, as usual on CIFAR) or "reflect".
        seed: of the augmentation, in [0, 2**64).
        label_names: kept as an attribute, for `create_timm_model(label_names=...)`.

    Raises:
        TypeError: images that are not uint8; labels, a shift or a seed that are not integers.
        ValueError: shapes, lengths or ranges that do not fit.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        flip: bool = True,
        shift: int = 4,
        padding_mode: str = "constant",
        seed: int = 0,
        label_names: Sequence[str] | None = None,
    ) -> None:
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        if images.dtype != torch.uint8:
            raise TypeError(
                f"images must be uint8 (0 to 255), got {images.dtype}; try (x * 255).round().byte()."
            )
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"images must be (N, C, H, W) and not empty, got {tuple(images.shape)}."
            )
        if labels.is_floating_point():
            raise TypeError(f"labels must be integers, got {labels.dtype}.")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"{len(images)} images want labels of shape ({len(images)},), got {tuple(labels.shape)}."
            )
        if padding_mode not in ("constant", "reflect"):
            raise ValueError(f'padding_mode must be "constant" or "reflect", got {padding_mode!r}.')
        if augment and not 0 <= operator.index(shift) < min(images.shape[2:]):
            raise ValueError(
                f"shift must be from 0 to {min(images.shape[2:]) - 1} for these images, got {shift}."
            )
        if not 0 <= operator.index(seed) < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}.")
        self.mean, self.std = _checked_statistics(mean, std, images.shape[1])
        self.images, self.labels = images.cpu().contiguous(), labels.to("cpu", torch.int64)
        self.augment, self.flip, self.shift, self.padding_mode, self.seed = (
            augment,
            flip,
            shift,
            padding_mode,
            seed,
        )
        self.label_names = None if label_names is None else list(label_names)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: int | None = None,
        channels: int = 3,
        **options: Any,
    ) -> ImageCache:
        """Decodes all images of a `datasets.Dataset`, in its order; its format and transform are ignored.

        Cost: about 8,000 CIFAR images a second, on one core; large images on all cores.

        Args:
            image_column, label_column: found where they are not named, see [`hf_dynprune.data.find_column`]. A label
                column that is named may hold any integers.
            image_size: scale the short side to it (bicubic) and crop the centre square; by default images stay as they
                are, and must be of one size.
            channels: 3 converts images to RGB, 1 to grey.
            **options: arguments of `ImageCache`: `mean`, `std`, `augment`, `seed`, ...

        Raises:
            TypeError: not a `datasets.Dataset`; labels that are not integers.
            ValueError: columns that are missing or ambiguous, no images, images of unequal sizes.
        """
        import datasets

        from .data import find_column

        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"dataset must be one split, a datasets.Dataset, got a {type(dataset).__name__}."
            )
        if channels not in (1, 3):
            raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {channels}.")
        image_column = find_column(dataset.features, "image", image_column)
        label_column = find_column(dataset.features, "label", label_column)
        # As bytes: `datasets` would decode them one by one.
        encoded = dataset.with_format(None).cast_column(image_column, datasets.Image(decode=False))
        if len(encoded) == 0:
            raise ValueError("The dataset has no rows; at least one image is wanted.")
        feature, labels = dataset.features[label_column], encoded[label_column][:]
        if not all(isinstance(label, int) for label in labels):
            raise TypeError(
                f"label_column={label_column!r} must hold integers, got {feature}: see class_encode_column()."
            )
        encoded = encoded.select_columns(image_column)
        mode, example = "RGB" if channels == 3 else "L", encoded[0][image_column]
        decode = _decoder(mode, image_size)
        first = decode(example)
        images = np.empty((len(encoded), channels, *first.shape[:2]), dtype=np.uint8)
        # Around a small image there is more Python than decoding, which alone frees the GIL: threads cost up to 60 % there.
        parallel = _decoder(mode, None)(example).size > 128 * 128 * 3
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            datasets.utils.tqdm(
                total=len(encoded), desc="Decoding images", unit=" images"
            ) as progress,
        ):
            for start in range(0, len(encoded), 1000):
                rows = encoded[start : start + 1000][image_column]
                for i, image in enumerate((pool.map if parallel else map)(decode, rows), start):
                    if image.shape != first.shape:
                        raise ValueError(
                            f"Images must be of one size: (height, width, channels) of image 0 is {first.shape}, of "
                            f"image {i} {image.shape}. Give image_size= to scale and crop them."
                        )
                    images[i] = image.transpose(2, 0, 1)
                progress.update(len(rows))
        return cls(images, labels, **{"label_names": getattr(feature, "names", None), **options})

    @property
    def epoch(self) -> int:
        """The epoch whose augmentation is used."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Augment for `epoch` >= 0 from now on, in running workers, too."""
        if operator.index(epoch) < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}.")
        self._epoch.fill_(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # copies and plain pickles come back in private memory

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        return {"pixel_values": batch["pixel_values"][0], "labels": int(batch["labels"])}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these samples: `pixel_values` (B, C, H, W) float32 and `labels` (B,) int64."""
        index = np.asarray(indices, dtype=np.int64)
        if ((index < 0) | (index >= len(self))).any():
            raise IndexError(
                f"Sample indices must be from 0 to {len(self) - 1}, got {index.min()} to {index.max()}."
            )
        pixels = self.images.numpy()[index]
        if self.augment:
            pixels = self._augmented(pixels, _random_bits(self.seed, self.epoch, index))
        # In torchvision's order: equal to the bit. In NumPy: torch's threads are 20 times slower on cores that others use.
        values = np.divide(pixels, np.float32(255), dtype=np.float32)
        mean, std = np.array([self.mean, self.std], dtype=np.float32)[..., None, None]
        values -= mean
        values /= std
        return {
            "pixel_values": torch.from_numpy(values),
            "labels": self.labels[torch.from_numpy(index)],
        }

    def _augmented(self, pixels: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Shifts and mirrors uint8 (B, C, H, W) by 64 random bits each: 24 for an offset, the highest to mirror."""
        if self.shift:
            places, mask, half = np.uint64(2 * self.shift + 1), np.uint64(2**24 - 1), np.uint64(24)
            top, left = (
                (bits & mask) * places >> half,
                (bits >> half & mask) * places >> half,
            )  # a modulo has a bias
            margins = [(0, 0), (0, 0), (self.shift, self.shift), (self.shift, self.shift)]
            padded = np.pad(pixels, margins, mode=self.padding_mode)  # type: ignore[call-overload]
            # A view (B, C, places, places, H, W), from which each sample's window is copied.
            windows = np.lib.stride_tricks.sliding_window_view(
                padded, pixels.shape[2:], axis=(2, 3)
            )
            pixels = windows[np.arange(len(pixels)), :, top, left]
        if self.flip:
            mirrored = bits >> np.uint64(63) == 1
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        return pixels


def batch_collator(features: dict[str, Tensor] | list[dict[str, Any]]) -> dict[str, Tensor]:
    """The collate function of `ImageCache`: a batch stays as it is, a list of samples is stacked key by key.

    Raises:
        TypeError: anything else, such as what is left when a Trainer removes "unused columns" from a batch.
    """
    if isinstance(features, dict):
        return features
    if not features or not all(isinstance(sample, dict) for sample in features):
        raise TypeError(
            f"batch_collator wants a batch (dict) or samples (list of dicts), got {features!s:.100}; "
            "a Trainer needs remove_unused_columns=False."
        )
    return {
        key: torch.stack([torch.as_tensor(sample[key]) for sample in features])
        for key in features[0]
    }


def _random_bits(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """64 random bits a sample, (B,) uint64: splitmix64 as a hash, over seed, epoch and index (B,) in turn.

    A counter-based generator without state. Its constants are fixed for good: others would change every augmented run.
    """
    state = np.zeros(1, dtype=np.uint64)  # an array: products of arrays wrap, those of scalars warn
    for value in (seed, epoch, index):
        state = state + (np.atleast_1d(value).astype(np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        state = state ^ state >> np.uint64(31)
    return state


def _decoder(mode: str, image_size: int | None) -> Callable[[dict[str, Any]], np.ndarray]:
    """From an encoded image to uint8 (H, W, C); scaled and cropped with timm's roundings in evaluation."""
    import datasets
    from PIL.Image import Resampling

    feature = datasets.Image(mode=mode)
    if image_size is not None:
        _check_size(image_size)

    def decode(encoded: dict[str, Any]) -> np.ndarray:
        image = feature.decode_example(encoded)
        if image_size is not None:
            short = min(image.size)
            width, height = (image_size * side // short for side in image.size)
            left, top = round((width - image_size) / 2), round((height - image_size) / 2)
            box = (left, top, left + image_size, top + image_size)
            image = image.resize((width, height), Resampling.BICUBIC).crop(box)
        return np.atleast_3d(np.asarray(image))

    return decode


def _check_size(image_size: int) -> None:
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(
            f"image_size must be the side of a square, an int of 1 or more, got {image_size!r}."
        )


def _checked_statistics(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = tuple(float(value) for value in mean), tuple(float(value) for value in std)
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"mean and std must have a number for each of {channels} channels, got {mean=}, {std=}."
        )
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise ValueError(
            f"mean must be in [0, 1], std in (0, 1], of pixels divided by 255; got {mean=}, {std=}."
        )
    return mean, std
