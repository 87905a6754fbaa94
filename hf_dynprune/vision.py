"""Image classification from scratch, with an input pipeline fast enough for pruned training.

* `CifarResNet`: ResNets for 32x32 images, registered with timm when this module is imported.
* `create_timm_model`: a `transformers` model of any timm architecture, with timm's initial weights.
  `save_timm` writes such a model in timm's format.
* `ImageCache`: images that are decoded once; it cuts, augments and normalises whole batches.
  Use it with `batch_collator`.
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

from .checks import missing

try:
    import timm
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet
except ImportError as error:
    raise missing("hf_dynprune.vision", "timm", "recipes", error) from error

if TYPE_CHECKING:
    import datasets
    from transformers import TimmWrapperForImageClassification

__all__ = [  # timm appends each architecture when it is registered
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


# ---- models --------------------------------------------------------------------------------------


class CifarResNet(ResNet):
    """timm's `ResNet` whose stem is a 3x3 convolution of stride 1, without max-pooling.

    It takes all arguments of timm's `ResNet`.

    Reference: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016,
    section 4.2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = next(self.conv1.parameters())
        features = cast(list[dict[str, Any]], self.feature_info)
        channels = features[0]["num_chs"]
        stem = nn.Conv2d(weight.shape[1], channels, kernel_size=3, padding=1, bias=False)
        stem.to(weight.device, weight.dtype)
        # timm initialises its other convolutions like this.
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        for info in features:
            info["reduction"] = max(1, info["reduction"] // 4)
        if not hasattr(self, "layer4"):  # timm's forward expects four stages
            self.layer4 = nn.Sequential()


# depth -> (block, blocks per stage) of the architectures that ResNet has for ImageNet.
_LARGE: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


def _default_cfg(depth: int) -> dict[str, Any]:
    return {
        "input_size": (3, 32, 32),
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": 10,
        "first_conv": "conv1",
        "classifier": "fc",
        "pool_size": (4, 4) if depth in _LARGE else (8, 8),
    }


# timm looks this name up in the module that registers an architecture.
default_cfgs = generate_default_cfgs(
    {f"resnet{depth}_cifar": _default_cfg(depth) for depth in (8, 20, 56, *_LARGE)}
)


def _build(depth: int, pretrained: bool, *, width: float = 1.0, **kwargs: Any) -> CifarResNet:
    if depth in _LARGE:
        (block, layers), first = _LARGE[depth], 64
    else:  # the small family: three stages of n blocks, 6n + 2 layers
        n = (depth - 2) // 6
        block, layers, first = BasicBlock, (n, n, n), 16
    channels = [8 * max(1, round(first * width * 2**stage / 8)) for stage in range(len(layers))]
    args: dict[str, Any] = {
        "block": block,
        "layers": layers,
        "channels": channels,
        # Only timm's deep stem accepts another width than 64; its width is twice `stem_width`.
        # CifarResNet replaces the stem by one convolution.
        "stem_type": "deep",
        "stem_width": channels[0] // 2,
        "feature_cfg": {"out_indices": tuple(range(len(layers) + 1))},
        # timm sets the last BatchNorm scale of each block to zero. The paper does not, and it
        # harms a few narrow blocks in few epochs: ResNet-8 on CIFAR-10 reached 70.4 % after
        # 3 epochs without it and 68.9 % with it (one seed, a plain loop).
        "zero_init_last": depth in _LARGE,
    }
    return build_model_with_cfg(CifarResNet, f"resnet{depth}_cifar", pretrained, **(args | kwargs))


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He et al.'s CIFAR ResNet of 6n + 2 layers with n = 1.

    Its stages have 16, 32 and 64 channels, times `width`, rounded to multiples of 8. Shortcuts
    that change the shape are 1x1 convolutions (the paper's option B; for CIFAR the paper used
    option A, which has no weights).
    """
    return _build(8, pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet8_cifar` with n = 3 blocks per stage."""
    return _build(20, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet8_cifar` with n = 9 blocks per stage."""
    return _build(56, pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """timm's resnet18 with the small stem; 64 to 512 channels, times `width` (multiples of 8)."""
    return _build(18, pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """timm's resnet34 with the small stem; 64 to 512 channels, times `width` (multiples of 8)."""
    return _build(34, pretrained, **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """timm's resnet50 with the small stem; 64 to 512 channels, times `width` (multiples of 8)."""
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
    """Make an untrained `transformers` image classifier of any timm architecture.

    A `TimmWrapperForImageClassification` that is made from its config draws every convolution from
    normal(0, 0.02) and overwrites zero-initialised BatchNorm scales. The weights of this model are,
    at the same `torch.manual_seed`, those of
    ``timm.create_model(architecture, num_classes=num_labels, in_chans=in_chans, **model_args)``.

    `save_pretrained` writes everything into `config.json` that `from_pretrained`,
    `AutoImageProcessor` and `pipeline("image-classification")` need. Import this module before you
    load a `*_cifar` architecture. The pipeline converts every image to RGB; if `in_chans` is 1, use
    image processor and model instead.

    Args:
        architecture: A name from `timm.list_models()`.
        num_labels, label_names: Give exactly one. The names become `id2label` and `label2id`.
        image_size: The image processor scales the short side to image_size / crop_pct (bicubic)
            and crops the central square of image_size. With a crop_pct of 1 the result equals
            `ImageCache.from_dataset(image_size=...)`.
        mean, std: One number per channel, for pixels in [0, 1].
        crop_pct: Share of a side that the crop keeps, in (0, 1]. Common on ImageNet: 0.875.
        in_chans: 3, or 1 for grey images.
        **model_args: timm's arguments, as JSON values: `drop_path_rate=0.1`, or
            `img_size=32, patch_size=4` for a ViT.

    Raises:
        ValueError: If timm does not know the architecture, if both or none of `num_labels` and
            `label_names` are given, or if mean, std, image_size or crop_pct is out of range.
        TypeError: If a model argument cannot be written as JSON.
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    _check_architecture(architecture)
    labels = _label_config(num_labels, label_names)
    mean, std = _checked_statistics(mean, std, in_chans)
    _check_size(image_size)
    if not 0 < crop_pct <= 1:
        raise ValueError(
            f"crop_pct={crop_pct} is out of range: expected the share of a side that the central "
            "crop keeps, in (0, 1]."
        )
    model_args = {"in_chans": in_chans, **model_args}
    try:
        json.dumps(model_args)
    except TypeError as error:
        raise TypeError(
            f"model_args={model_args} cannot be written as JSON into config.json: pass numbers, "
            "strings, booleans, lists and dicts."
        ) from error
    config = TimmWrapperConfig(architecture=architecture, model_args=model_args, **labels)
    with torch.random.fork_rng(devices=[]):  # timm's model below replaces the weights drawn here
        model = TimmWrapperForImageClassification(config)
    model.timm_model = timm.create_model(architecture, num_classes=config.num_labels, **model_args)
    registered = model.timm_model.pretrained_cfg
    config.pretrained_cfg = {  # TimmWrapperImageProcessor reads this
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
    """Write a model in timm's own format: `config.json` and `model.safetensors`.

    ``timm.create_model("local-dir:folder", pretrained=True)`` loads it, or ``"hf-hub:user/name"``
    from the Hub. `AutoModelForImageClassification`, `AutoImageProcessor` and `pipeline` load it as
    they load the output of `save_pretrained`. Import this module before you load a `*_cifar`
    architecture. timm cannot load what `save_pretrained` writes: the configuration is the same, but
    the names of the weights have a prefix.

    Args:
        model: What `create_timm_model` returned, or a model that was loaded from a timm repository.
        folder: It is created if it does not exist.

    Raises:
        TypeError: If the model has another class.
    """
    from safetensors.torch import save_file
    from transformers import TimmWrapperForImageClassification

    if not isinstance(model, TimmWrapperForImageClassification):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a TimmWrapperForImageClassification. "
            "create_timm_model makes one; AutoModelForImageClassification loads one from a "
            "timm repository."
        )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in model.timm_model.state_dict().items()}
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


def _check_architecture(architecture: str) -> None:
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models())
        raise ValueError(
            f"timm {timm.__version__} has no architecture {architecture!r}; similar: {close}. "
            "timm.list_models() lists all names."
        )


def _label_config(num_labels: int | None, label_names: Sequence[str] | None) -> dict[str, Any]:
    """Return the arguments of a config that describe the classes."""
    if (num_labels is None) == (label_names is None):
        raise ValueError(
            f"Give exactly one of num_labels and label_names, got num_labels={num_labels} and "
            f"label_names={label_names}."
        )
    if label_names is None:
        return {"num_labels": num_labels}
    names = [str(name) for name in label_names]
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


# ---- images --------------------------------------------------------------------------------------


class ImageCache(torch.utils.data.Dataset):
    """Images decoded once into a uint8 tensor (N, C, H, W), and batches cut from it.

    A sample is ``{"pixel_values": float32 (C, H, W), "labels": int}``, with pixels
    ``(x / 255 - mean) / std``. A `DataLoader` fetches complete batches: pass it
    ``collate_fn=batch_collator``. Pass ``data_collator=batch_collator`` to a `Trainer` and set
    ``remove_unused_columns=False`` in its arguments.

    With `augment`, an image is padded by `shift` pixels on each side, cropped to its size at one of
    (2 * shift + 1)**2 positions, and mirrored with probability 1/2, all uniformly at random and
    before it is normalised. The augmentation of a sample is a pure function of (seed, epoch, sample
    index): it does not depend on batch, workers, ranks or a resume, and it neither reads nor
    changes a random generator. Call `set_epoch` before you create the iterator of an epoch;
    running workers see the change.

    Cost: N * C * H * W bytes, shared with the workers. One CPU thread makes about 130,000 augmented
    32x32 images per second.

    Args:
        images: uint8 (N, C, H, W), tensor or array. Contiguous images are not copied.
        labels: N integers; stored in `self.labels` (N,) int64.
        mean, std: One number per channel, for pixels in [0, 1].
        augment: Set it for training. If it is False, `flip`, `shift`, `padding_mode`, `seed` and
            the epoch have no effect.
        flip: Mirror half of the images. Do not use it for digits or text.
        shift: The largest shift in pixels, smaller than the image; 0 turns shifts off.
        padding_mode: "constant" (black, as usual on CIFAR) or "reflect".
        seed: Seed of the augmentation, in [0, 2**64).
        label_names: Kept as an attribute, for `create_timm_model(label_names=...)`.

    Raises:
        TypeError: If images are not uint8, or if labels, shift or seed are not integers.
        ValueError: If shapes or lengths do not match, or if a value is out of range.
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
        _check_images(images, labels)
        if padding_mode not in ("constant", "reflect"):
            raise ValueError(f'padding_mode must be "constant" or "reflect", got {padding_mode!r}.')
        largest = min(images.shape[2:]) - 1
        if augment and not 0 <= operator.index(shift) <= largest:
            raise ValueError(f"shift={shift} is out of range: expected 0 to {largest}.")
        if not 0 <= operator.index(seed) < 2**64:
            raise ValueError(f"seed={seed} is out of range: expected [0, 2**64).")
        self.mean, self.std = _checked_statistics(mean, std, images.shape[1])
        self.images = images.cpu().contiguous()
        self.labels = labels.to("cpu", torch.int64)
        self.augment = augment
        self.flip = flip
        self.shift = shift
        self.padding_mode = padding_mode
        self.seed = seed
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
        """Decode all images of a `datasets.Dataset`, in its order.

        The format and the transform of the dataset are ignored.

        Cost: about 8,000 CIFAR images per second on one core. Large images use all cores.

        Args:
            image_column, label_column: Found by [`hf_dynprune.data.find_column`] if not given. A
                label column that is given may contain any integers.
            image_size: Scale the short side to it (bicubic) and crop the central square. By default
                images are not changed and must have the same size.
            channels: 3 converts images to RGB, 1 to grey.
            **options: Arguments of `ImageCache`: `mean`, `std`, `augment`, `seed`, ...

        Raises:
            TypeError: If it is not a `datasets.Dataset`, or if labels are not integers.
            ValueError: If a column is missing or ambiguous, if there are no images, or if images
                differ in size.
        """
        import datasets

        from .data import find_column, integer_labels

        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"dataset is a {type(dataset).__name__}: expected one split, a datasets.Dataset."
            )
        if channels not in (1, 3):
            raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {channels}.")
        if image_size is not None:
            _check_size(image_size)
        image_column = find_column(dataset.features, "image", image_column)
        label_column = find_column(dataset.features, "label", label_column)
        # Encoded images as bytes: `datasets` would decode them one by one.
        encoded = dataset.with_format(None).cast_column(image_column, datasets.Image(decode=False))
        if len(encoded) == 0:
            raise ValueError("The dataset has no rows: expected at least one image.")
        labels = integer_labels(dataset, label_column)
        images = _decoded(encoded.select_columns(image_column), channels, image_size)
        names = getattr(dataset.features[label_column], "names", None)
        return cls(images, labels, **{"label_names": names, **options})

    @property
    def epoch(self) -> int:
        """The epoch whose augmentation is used."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Use the augmentation of `epoch` (0 or more) from now on, in running workers, too."""
        if operator.index(epoch) < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}.")
        self._epoch.fill_(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a copied or unpickled tensor is in private memory

    @property
    def pruning_fingerprint(self) -> str:
        """Identify images and labels; see [`hf_dynprune.identity.dataset_fingerprint`].

        Augmentation, its seed and the epoch are not part of it.
        """
        from .identity import Digest

        digest = Digest()
        digest.array("images", self.images)
        digest.array("labels", self.labels)
        return digest.fingerprint(len(self))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        return {"pixel_values": batch["pixel_values"][0], "labels": int(batch["labels"])}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch: `pixel_values` (B, C, H, W) float32 and `labels` (B,) int64."""
        index = np.asarray(indices, dtype=np.int64)
        if ((index < 0) | (index >= len(self))).any():
            raise IndexError(
                f"Sample indices must be from 0 to {len(self) - 1}, got {index.min()} to "
                f"{index.max()}."
            )
        shown = self.images_of(index)
        pixels = self.images.numpy()[shown]
        if self.augment:
            pixels = self._augmented(pixels, _random_bits(self.seed, self.epoch, index))
        # The order of torchvision's operations, so that results are equal bit for bit. NumPy,
        # because torch's threads are 20 times slower on cores that other processes use.
        values = np.divide(pixels, np.float32(255), dtype=np.float32)
        mean, std = np.array([self.mean, self.std], dtype=np.float32)[..., None, None]
        values -= mean
        values /= std
        labels = self.labels[torch.from_numpy(shown)]
        return {"pixel_values": torch.from_numpy(values), "labels": labels}

    def images_of(self, index: np.ndarray) -> np.ndarray:
        """The images that samples show: (B,) int64. A subclass may show others in each epoch."""
        return index

    def _augmented(self, pixels: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Shift and mirror images.

        Args:
            pixels: uint8 (B, C, H, W).
            bits: uint64 (B,), random. Bits 0 to 23 give the vertical shift, bits 24 to 47 the
                horizontal shift, bit 63 the mirroring.

        Returns:
            uint8 (B, C, H, W).
        """
        if self.shift:
            half, mask = np.uint64(24), np.uint64(2**24 - 1)
            places = np.uint64(2 * self.shift + 1)
            # Multiply and shift right: the remainder of a division would be biased.
            top = (bits & mask) * places >> half
            left = (bits >> half & mask) * places >> half
            margins = [(0, 0), (0, 0), (self.shift, self.shift), (self.shift, self.shift)]
            padded = np.pad(pixels, margins, mode=self.padding_mode)  # type: ignore[call-overload]
            # A view (B, C, places, places, H, W), from which one window per sample is copied.
            windows = np.lib.stride_tricks.sliding_window_view(
                padded, pixels.shape[2:], axis=(2, 3)
            )
            pixels = windows[np.arange(len(pixels)), :, top, left]
        if self.flip:
            mirrored = bits >> np.uint64(63) == 1
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        return pixels


def batch_collator(features: dict[str, Tensor] | list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate for `ImageCache`: return a batch unchanged, stack a list of samples key by key.

    Raises:
        TypeError: For anything else, such as the keys that are left of a batch after a Trainer
            removed "unused columns" from it.
    """
    if isinstance(features, dict):
        return features
    if not features or not all(isinstance(sample, dict) for sample in features):
        raise TypeError(
            "batch_collator expects a batch (dict) or samples (list of dicts), got "
            f"{features!s:.100}. A Trainer needs remove_unused_columns=False."
        )
    return {
        key: torch.stack([torch.as_tensor(sample[key]) for sample in features])
        for key in features[0]
    }


def _random_bits(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """Hash seed, epoch and index (B,) with splitmix64 into 64 random bits per sample, (B,) uint64.

    It is a counter-based generator without state. Do not change its constants: other constants
    would change every augmented run.
    """
    state = np.zeros(1, dtype=np.uint64)  # an array: products of arrays wrap, scalars warn
    gamma = np.uint64(0x9E3779B97F4A7C15)
    for value in (seed, epoch, index):
        state = state + (np.atleast_1d(value).astype(np.uint64) + np.uint64(1)) * gamma
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        state = state ^ state >> np.uint64(31)
    return state


def _decoded(encoded: datasets.Dataset, channels: int, image_size: int | None) -> np.ndarray:
    """Decode the only column of a dataset, which is not empty, into uint8 (N, C, H, W)."""
    import datasets

    (column,) = encoded.column_names
    mode, example = "RGB" if channels == 3 else "L", encoded[0][column]
    decode = _decoder(mode, image_size)
    shape = decode(example).shape
    images = np.empty((len(encoded), channels, *shape[:2]), dtype=np.uint8)
    # Only decoding releases the GIL. Small images spend most of their time in Python, and threads
    # make them up to 60 % slower.
    parallel = _decoder(mode, None)(example).size > 128 * 128 * 3
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        datasets.utils.tqdm(total=len(encoded), desc="Decoding images", unit=" images") as progress,
    ):
        decode_all = pool.map if parallel else map
        for start in range(0, len(encoded), 1000):
            rows = encoded[start : start + 1000][column]
            for i, image in enumerate(decode_all(decode, rows), start):
                if image.shape != shape:
                    raise ValueError(
                        f"Images must have the same size, but (height, width, channels) of image 0 "
                        f"is {shape}, of image {i} {image.shape}. Give image_size= to scale and "
                        "crop them."
                    )
                images[i] = image.transpose(2, 0, 1)
            progress.update(len(rows))
    return images


def _decoder(mode: str, image_size: int | None) -> Callable[[dict[str, Any]], np.ndarray]:
    """Make a function that decodes an image to uint8 (H, W, C).

    It scales and crops with the same rounding as timm's evaluation transform.
    """
    import datasets
    from PIL.Image import Resampling

    feature = datasets.Image(mode=mode)

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


# ---- checks --------------------------------------------------------------------------------------


def _check_images(images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(
            f"images must be uint8 (0 to 255), got {images.dtype}. Try (x * 255).round().byte()."
        )
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (N, C, H, W) and not empty, got {tuple(images.shape)}.")
    if labels.is_floating_point():
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(images)},), one per image, got {tuple(labels.shape)}."
        )


def _check_size(image_size: int) -> None:
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(
            f"image_size={image_size!r} is out of range: expected the side of a square, an int of "
            "1 or more."
        )


def _checked_statistics(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = tuple(float(value) for value in mean), tuple(float(value) for value in std)
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"mean and std must have one number for each of {channels} channels, got {mean=}, "
            f"{std=}."
        )
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise ValueError(
            f"mean must be in [0, 1] and std in (0, 1], of pixels divided by 255, got {mean=}, "
            f"{std=}."
        )
    return mean, std
