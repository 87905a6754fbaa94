"""Models keep timm's weights. An augmented pixel depends only on seed, epoch and sample index."""

import copy
import io
import pickle
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("datasets")

import datasets
import timm
from PIL import Image
from programs import spawned_by_forks
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperForImageClassification,
    pipeline,
)

from hf_dynprune.vision import (
    CIFAR_MEAN,
    CIFAR_STD,
    ImageCache,
    _random_bits,
    batch_collator,
    create_timm_model,
)

ARCHITECTURES = [f"resnet{depth}_cifar" for depth in (8, 20, 56, 18, 34, 50)]
STATISTICS = {"mean": CIFAR_MEAN, "std": CIFAR_STD}


def random_images(n, channels=3, height=12, width=10, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, (n, channels, height, width), dtype=np.uint8
    )


def make_cache(n=64, **options):
    return ImageCache(
        random_images(n), np.arange(n) % 7, **{**STATISTICS, "augment": True, **options}
    )


def epoch_pixels(cache, epoch, order=None):
    cache.set_epoch(epoch)
    return cache.__getitems__(list(range(len(cache))) if order is None else order)["pixel_values"]


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_registered_and_takes_small_images(name):
    model = timm.create_model(name, num_classes=7, in_chans=1, width=0.5).eval()
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    assert model.conv1.stride == (1, 1)
    assert model.get_classifier().out_features == 7
    cfg = timm.get_pretrained_cfg(name).to_dict()
    assert (cfg["input_size"], cfg["mean"], cfg["std"]) == ((3, 32, 32), CIFAR_MEAN, CIFAR_STD)
    assert (cfg["first_conv"], cfg["classifier"], cfg["crop_pct"]) == ("conv1", "fc", 1.0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet8_cifar", 78_042), ("resnet20_cifar", 272_474), ("resnet56_cifar", 855_770)],
)
def test_the_small_family_has_the_published_number_of_weights(name, parameters):
    """He et al. (2016), table 6: 0.27 M and 0.85 M. Our two 1x1 shortcuts add 2,752 weights."""
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_a_large_architecture_differs_from_timms_only_in_the_stem(depth):
    ours, theirs = (
        timm.create_model(f"resnet{depth}_cifar"),
        timm.create_model(f"resnet{depth}", num_classes=10),
    )
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0].pop("conv1.weight") == (64, 3, 3, 3)
    assert shapes[1].pop("conv1.weight") == (64, 3, 7, 7)
    assert shapes[0] == shapes[1]
    assert isinstance(ours.maxpool, torch.nn.Identity)


@pytest.mark.parametrize("name", ["resnet8_cifar", "resnet18_cifar"])
def test_features_have_the_size_given_by_their_reduction(name):
    model = timm.create_model(name, features_only=True)
    features = model(torch.rand(1, 3, 32, 32))
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [32 // f.shape[2] for f in features] == model.feature_info.reduction()


@pytest.mark.parametrize("name", ["resnet8_cifar", "resnet18_cifar"])
def test_gradient_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name, width=0.25), torch.rand(4, 3, 16, 16)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append(model.conv1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("resnet8_cifar", {}),
        ("resnet18_cifar", {"width": 0.25}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    ],
)
def test_initial_weights_are_timms(architecture, arguments):
    torch.manual_seed(0)
    model = create_timm_model(architecture, num_labels=5, image_size=32, **STATISTICS, **arguments)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    reference = timm.create_model(architecture, num_classes=5, **arguments)
    assert torch.equal(after, torch.get_rng_state())
    for name, value in reference.state_dict().items():
        assert torch.equal(model.timm_model.state_dict()[name], value), name


def test_initial_scales_are_timms_and_not_the_wrappers():
    model = create_timm_model("resnet18_cifar", num_labels=10, image_size=32, **STATISTICS)
    stem, stage = timm.create_model("resnet18_cifar", in_chans=40).conv1, model.timm_model.layer1[0]
    for convolution in (stem, stage.conv1):
        assert convolution.weight.std().item() == pytest.approx(
            (2 / (64 * 9)) ** 0.5, rel=0.05
        )  # kaiming, fan out
    assert stage.bn2.weight.abs().max() == 0  # the last BatchNorm of a residual branch
    stock = TimmWrapperForImageClassification(model.config).timm_model.layer1[0]
    assert stock.conv1.weight.std().item() == pytest.approx(0.02, rel=0.05), (
        "transformers now keeps timm's weights: simplify create_timm_model"
    )
    assert stock.bn2.weight.min() == 1


@pytest.mark.parametrize("architecture", ["resnet8_cifar", "resnet18"])
def test_round_trip_through_from_pretrained_and_pipeline(tmp_path, architecture):
    names = ["plane", "car", "bird"]
    model = create_timm_model(architecture, label_names=names, image_size=32, **STATISTICS).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert again.config.id2label == model.config.id2label == dict(enumerate(names))
    assert (
        again.config.label2id == model.config.label2id == {name: i for i, name in enumerate(names)}
    )

    image = Image.fromarray(random_images(1, height=50, width=41)[0].transpose(1, 2, 0))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(image)["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert processor.data_config["mean"] == CIFAR_MEAN
    assert processor.data_config["std"] == CIFAR_STD
    with torch.no_grad():
        logits = model(pixels).logits
        # A convolution picks its algorithm by the address of its weights: the last bit may differ.
        torch.testing.assert_close(again(pixels).logits, logits, rtol=1e-6, atol=1e-6)
    answer = {
        row["label"]: row["score"]
        for row in pipeline("image-classification", model=str(tmp_path))(image)
    }
    assert set(answer) == set(names)
    scores = torch.tensor([answer[name] for name in names])
    torch.testing.assert_close(scores, logits.softmax(1)[0], rtol=1e-6, atol=1e-7)


def test_grey_images_go_through_image_processor_and_model(tmp_path):
    model = create_timm_model(
        "resnet8_cifar", num_labels=10, image_size=8, mean=[0.3], std=[0.4], in_chans=1
    ).eval()
    model.save_pretrained(tmp_path)
    image = random_images(1, 1, 8, 8)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(image[0, 0]))[
        "pixel_values"
    ]
    assert torch.equal(pixels[0], ImageCache(image, [0], mean=[0.3], std=[0.4])[0]["pixel_values"])
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architecture": "resnet8_cifra"}, ValueError, "resnet8_cifar"),
        ({"num_labels": None}, ValueError, "num_labels=None"),
        ({"label_names": ["a", "b"]}, ValueError, r"label_names=\['a', 'b'\]"),
        ({"in_chans": 1}, ValueError, r"1 channels.* mean=\(0\.4914,"),
        ({"mean": (125.0, 123.0, 114.0)}, ValueError, r"mean=\(125\.0,"),
        ({"std": (0.2, 0.2, 0.0)}, ValueError, r"std=\(0\.2, 0\.2, 0\.0\)"),
        ({"image_size": (32, 32)}, ValueError, r"image_size=\(32, 32\)"),
        ({"crop_pct": 1.5}, ValueError, r"crop_pct=1\.5"),
        ({"norm_layer": torch.nn.BatchNorm2d}, TypeError, "norm_layer"),
    ],
)
def test_wrong_arguments_of_create_timm_model(change, error, message):
    arguments = {
        "architecture": "resnet8_cifar",
        "num_labels": 10,
        "image_size": 32,
        **STATISTICS,
        **change,
    }
    with pytest.raises(error, match=message):
        create_timm_model(**arguments)


def test_without_timm_the_import_says_what_to_install():
    code = "import sys; sys.modules['timm'] = None; import hf_dynprune.vision"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "pip install '.[recipes]'" in result.stderr


# ---- the cache: pixels ---------------------------------------------------------------------------


def slow_augmentation(image, seed, epoch, index, shift, padding_mode, flip):
    """Pad, crop and mirror one image (C, H, W) with Python integers and loops."""
    bits = 0
    for value in (seed, epoch, index):
        bits = (bits + (value + 1) * 0x9E3779B97F4A7C15) % 2**64
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        bits = bits ^ (bits >> 31)
    top = (bits % 2**24) * (2 * shift + 1) // 2**24
    left = (bits // 2**24 % 2**24) * (2 * shift + 1) // 2**24
    height, width = image.shape[1:]
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            source_y, source_x = y + top - shift, x + left - shift
            if padding_mode == "reflect":
                source_y = (height - 1) - abs((height - 1) - abs(source_y))
                source_x = (width - 1) - abs((width - 1) - abs(source_x))
            if 0 <= source_y < height and 0 <= source_x < width:
                out[:, y, x] = image[:, source_y, source_x]
    return out[:, :, ::-1] if flip and bits >= 2**63 else out


@pytest.mark.parametrize("padding_mode", ["constant", "reflect"])
@pytest.mark.parametrize(("shift", "flip"), [(4, True), (2, False), (0, True)])
def test_augmented_pixels_equal_the_slow_reference(padding_mode, shift, flip):
    images, seed, epoch = random_images(40), 2**64 - 1, 3
    options = {"shift": shift, "flip": flip, "padding_mode": padding_mode}
    cache = ImageCache(images, [0] * 40, **STATISTICS, augment=True, seed=seed, **options)
    expected = np.stack(
        [slow_augmentation(images[i], seed, epoch, i, **options) for i in range(40)]
    )
    expected = ImageCache(expected, [0] * 40, **STATISTICS)
    assert torch.equal(epoch_pixels(cache, epoch), epoch_pixels(expected, 0))


def test_without_augmentation_pixels_are_only_normalised():
    cache = make_cache(augment=False)
    mean, std = torch.tensor(CIFAR_MEAN)[:, None, None], torch.tensor(CIFAR_STD)[:, None, None]
    expected = (torch.from_numpy(random_images(64)).float() / 255 - mean) / std
    assert torch.equal(epoch_pixels(cache, 0), expected)
    assert torch.equal(epoch_pixels(cache, 1), expected)


def test_the_hash_is_splitmix64():
    """The first outputs that are published for seed 0. Seed and epoch of -1 keep the state at 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert _random_bits(2**64 - 1, 2**64 - 1, np.arange(3)).tolist() == published
    # Recorded: other values would change the pixels of every augmented run.
    assert _random_bits(0, 0, np.arange(2)).tolist() == [0x238275BC38FCBE91, 0xF89A2566B5822C54]


def test_a_sample_does_not_depend_on_its_batch():
    cache = make_cache(seed=5)
    whole = epoch_pixels(cache, 2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(epoch_pixels(cache, 2, order), whole[order])
    assert torch.equal(epoch_pixels(cache, 2, [7, 7, 3]), whole[[7, 7, 3]])
    for i in (0, 31, 63):
        sample = cache[i]
        assert torch.equal(sample["pixel_values"], whole[i])
        assert sample["labels"] == i % 7
        assert isinstance(sample["labels"], int)


def test_epoch_and_seed_change_the_pixels_and_going_back_restores_them():
    cache, other = make_cache(seed=0), make_cache(seed=1)
    first, second = epoch_pixels(cache, 0), epoch_pixels(cache, 1)
    changed = (first != second).flatten(1).any(1).float().mean()
    assert changed > 0.95  # expected: all but 1 in 162
    assert not torch.equal(first, epoch_pixels(other, 0))
    assert not torch.equal(second, epoch_pixels(other, 0)), (
        "seed 1, epoch 0 must differ from seed 0, epoch 1"
    )
    assert torch.equal(first, epoch_pixels(cache, 0))
    assert cache.epoch == 0


def test_shifts_and_flips_are_uniform_and_independent():
    """Each image has one lit pixel left of its centre; its new position gives shift and flip."""
    n, size = 20_000, 19
    images = np.zeros((n, 1, size, size), np.uint8)
    images[:, :, 9, 4] = 255
    cache = ImageCache(images, np.zeros(n, int), mean=[0.0], std=[1.0], augment=True)
    for epoch in (0, 1):
        lit = epoch_pixels(cache, epoch).flatten(1).argmax(1)
        down, across = lit // size - 9, lit % size
        flipped = across > 9
        right = torch.where(flipped, 18 - across, across) - 4
        counts = torch.zeros(2, 9, 9).index_put(
            (flipped.long(), down + 4, right + 4), torch.ones(n), accumulate=True
        )
        mean = n / 162
        chi_square = ((counts - mean) ** 2 / mean).sum().item()
        assert counts.min() > 0
        assert chi_square < 161 + 4 * (2 * 161) ** 0.5  # four standard deviations
        assert abs(flipped.float().mean() - 0.5) < 4 * 0.5 / n**0.5


def test_no_random_state_is_read_or_changed():
    cache = make_cache()
    torch.manual_seed(0)
    first, state, numpy_state = (
        epoch_pixels(cache, 0),
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
    )
    torch.rand(1)
    assert torch.equal(epoch_pixels(cache, 0), first)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


# ---- the cache: loaders --------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_loaders_with_and_without_persistent_workers_give_the_same_pixels(start):
    cache = make_cache()
    workers = (
        {}
        if start is None
        else {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": start}
    )
    loader = DataLoader(cache, batch_size=20, collate_fn=batch_collator, **workers)
    for epoch in (0, 1, 5):
        expected = epoch_pixels(cache, epoch)
        with spawned_by_forks() if start == "spawn" else nullcontext():
            batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [20, 20, 20, 4]
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [
            i % 7 for i in range(64)
        ]


def test_batches_have_the_documented_types():
    batch = next(iter(DataLoader(make_cache(), batch_size=8, collate_fn=batch_collator)))
    assert set(batch) == {"pixel_values", "labels"}
    assert (batch["pixel_values"].dtype, batch["pixel_values"].shape) == (
        torch.float32,
        (8, 3, 12, 10),
    )
    assert (batch["labels"].dtype, batch["labels"].shape) == (torch.int64, (8,))


def test_batch_collator_keeps_a_batch_and_stacks_samples():
    cache = make_cache()
    batch = cache.__getitems__([1, 2])
    assert batch_collator(batch) is batch
    stacked = batch_collator([cache[1], cache[2]])
    assert all(
        torch.equal(stacked[key], batch[key]) and stacked[key].dtype == batch[key].dtype
        for key in batch
    )
    with pytest.raises(TypeError, match="remove_unused_columns=False"):
        batch_collator(["pixel_values", "labels"])


def test_batches_are_copies():
    cache = make_cache(augment=False)
    before = cache.images.clone(), cache.labels.clone()
    batch = cache.__getitems__([0, 1])
    batch["pixel_values"].zero_()
    batch["labels"].zero_()
    assert torch.equal(cache.images, before[0])
    assert torch.equal(cache.labels, before[1])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]
)
def test_copies_and_pickles_are_whole_and_have_their_own_epoch(duplicate):
    cache = make_cache(seed=3, label_names=list("abcdefg"))
    cache.set_epoch(4)
    again = duplicate(cache)
    assert again.label_names == cache.label_names
    assert torch.equal(epoch_pixels(again, again.epoch), epoch_pixels(cache, 4))
    again.set_epoch(5)
    assert (cache.epoch, again.epoch) == (4, 5)
    assert again._epoch.is_shared()


def test_a_contiguous_array_is_not_copied():
    images = random_images(4)
    cache = ImageCache(images, [0, 1, 2, 3], **STATISTICS)
    assert np.shares_memory(images, cache.images.numpy())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": random_images(4).astype(np.float32)}, TypeError, "float32"),
        ({"images": random_images(4)[0]}, ValueError, r"\(3, 12, 10\)"),
        ({"images": random_images(4)[:0]}, ValueError, r"\(0, 3, 12, 10\)"),
        ({"labels": [0.0, 1.0, 2.0, 3.0]}, TypeError, "float"),
        ({"labels": [0, 1, 2]}, ValueError, r"\(3,\)"),
        ({"mean": (0.5,)}, ValueError, r"3 channels.* mean=\(0\.5,\)"),
        ({"mean": (125.3, 123.0, 113.9)}, ValueError, r"mean=\(125\.3,"),
        ({"padding_mode": "zeros"}, ValueError, "zeros"),
        ({"shift": 10}, ValueError, "shift=10 .* 0 to 9"),
        ({"shift": -1}, ValueError, "shift=-1"),
        ({"shift": 2.5}, TypeError, "float"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 2**64}, ValueError, f"seed={2**64}"),
    ],
)
def test_wrong_arguments_of_the_cache(change, error, message):
    arguments = {
        "images": random_images(4),
        "labels": [0, 1, 2, 3],
        **STATISTICS,
        "augment": True,
        **change,
    }
    with pytest.raises(error, match=message):
        ImageCache(**arguments)


def test_wrong_indices_and_epochs_are_errors():
    cache = make_cache(8)
    for index in (8, -1):
        with pytest.raises(IndexError, match="0 to 7"):
            cache[index]
    with pytest.raises(ValueError, match="-1"):
        cache.set_epoch(-1)
    with pytest.raises(TypeError, match="float"):
        cache.set_epoch(1.5)
    assert len(list(cache)) == 8


# ---- the cache: decoding -------------------------------------------------------------------------


def make_dataset(images, labels=None, **columns):
    """`images`: arrays (H, W, C), (H, W) or PIL images, stored as PNG."""
    images = [
        image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images
    ]
    labels = [i % 3 for i in range(len(images))] if labels is None else labels
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    features |= {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(
        {"img": images, "label": labels, **columns}, datasets.Features(features)
    )


def test_from_dataset_decodes_every_image_in_order(tmp_path):
    images = random_images(25)
    dataset = make_dataset(images.transpose(0, 2, 3, 1), note=["x"] * 25)
    dataset.to_parquet(tmp_path / "train.parquet")
    dataset = datasets.Dataset.from_parquet(
        str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache")
    )
    cache = ImageCache.from_dataset(dataset, **STATISTICS, augment=True, seed=9)
    assert (cache.images.numpy() == images).all()
    assert cache.labels.tolist() == dataset["label"][:]
    assert cache.label_names == ["a", "b", "c"]
    assert (cache.augment, cache.seed) == (True, 9)

    order = [24, 3, 3, 11]
    selected = ImageCache.from_dataset(dataset.with_format("torch").select(order), **STATISTICS)
    assert (selected.images.numpy() == images[order]).all()
    assert selected.labels.tolist() == [i % 3 for i in order]


def test_from_dataset_reads_image_folders(tmp_path):
    images = random_images(4)
    for i, image in enumerate(images):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    dataset = datasets.load_dataset(
        "imagefolder",
        data_dir=str(tmp_path / "data"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    cache = ImageCache.from_dataset(dataset, **STATISTICS)
    assert (cache.images.numpy() == images[[0, 2, 1, 3]]).all()
    assert cache.labels.tolist() == [0, 0, 1, 1]
    assert cache.label_names == ["a", "b"]


def test_from_dataset_converts_modes():
    colour = random_images(1)[0].transpose(1, 2, 0)
    image = Image.fromarray(colour)
    dataset = make_dataset([image, image.convert("L"), image.convert("RGBA"), image.convert("P")])
    rgb = ImageCache.from_dataset(dataset, **STATISTICS).images
    grey = ImageCache.from_dataset(dataset, mean=[0.5], std=[0.5], channels=1).images
    assert (rgb.shape, grey.shape) == ((4, 3, 12, 10), (4, 1, 12, 10))
    assert (rgb[2].numpy() == colour.transpose(2, 0, 1)).all()
    assert (rgb[1] == grey[1]).all()
    assert (grey[0, 0].numpy() == np.asarray(image.convert("L"))).all()


def test_scaled_images_equal_those_of_the_models_image_processor(tmp_path):
    """Odd and even margins, both orientations, larger and smaller images, one of the right size."""
    sizes = [(32, 32), (50, 41), (41, 50), (20, 61), (33, 32), (32, 47), (100, 64), (7, 9)]
    images = [
        random_images(1, height=h, width=w, seed=i)[0].transpose(1, 2, 0)
        for i, (h, w) in enumerate(sizes)
    ]
    cache = ImageCache.from_dataset(make_dataset(images), image_size=32, **STATISTICS)
    create_timm_model("resnet8_cifar", num_labels=3, image_size=32, **STATISTICS).save_pretrained(
        tmp_path
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor([Image.fromarray(image) for image in images])["pixel_values"]
    assert torch.equal(epoch_pixels(cache, 0), expected)


def test_large_images_are_decoded_in_order():
    images = random_images(6, height=150, width=140)
    cache = ImageCache.from_dataset(make_dataset(images.transpose(0, 2, 3, 1)), **STATISTICS)
    assert (cache.images.numpy() == images).all()


def test_a_named_label_column_may_hold_integers():
    dataset = make_dataset(random_images(3).transpose(0, 2, 3, 1)).add_column("noisy", [2, -100, 7])
    cache = ImageCache.from_dataset(dataset, label_column="noisy", **STATISTICS)
    assert cache.labels.tolist() == [2, -100, 7]
    assert cache.label_names is None


def test_unequal_sizes_are_an_error():
    dataset = make_dataset([np.zeros((8, 8, 3), np.uint8)] * 3 + [np.zeros((8, 9, 3), np.uint8)])
    with pytest.raises(ValueError, match=r"\(8, 8, 3\), of image 3 \(8, 9, 3\)"):
        ImageCache.from_dataset(dataset, **STATISTICS)


def test_wrong_arguments_of_from_dataset():
    dataset = make_dataset(random_images(3).transpose(0, 2, 3, 1), note=["x", "y", "z"])
    two = datasets.concatenate_datasets(
        [dataset, dataset.select_columns("img").rename_column("img", "img2")], axis=1
    )
    for data, arguments, error, message in [
        (datasets.DatasetDict(train=dataset), {}, TypeError, "DatasetDict"),
        (dataset.to_iterable_dataset(), {}, TypeError, "IterableDataset"),
        (dataset.select([]), {}, ValueError, "rows"),
        (dataset.remove_columns("img"), {}, ValueError, "0 image columns.*label.*image_column="),
        (dataset.remove_columns("label"), {}, ValueError, "0 label columns.*note.*label_column="),
        (two, {}, ValueError, "2 image columns.*img2"),
        (dataset, {"image_column": "image"}, ValueError, "'image'.*'img'"),
        (dataset, {"image_column": "note"}, ValueError, "'note'.*cast_column"),
        (dataset, {"label_column": "labels"}, ValueError, "'labels'.*'label'"),
        (dataset, {"label_column": "note"}, TypeError, "class_encode_column"),
        (dataset, {"channels": 4}, ValueError, "channels.* 4"),
        (dataset, {"image_size": 0}, ValueError, "image_size=0"),
    ]:
        with pytest.raises(error, match=message):
            ImageCache.from_dataset(data, **arguments, **STATISTICS)


def test_encoded_bytes_are_decoded_with_decode_false():
    """A column with `decode=False` is still a column of images."""
    image = random_images(1)[0].transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    features = datasets.Features(
        {"img": datasets.Image(decode=False), "y": datasets.ClassLabel(names=["a"])}
    )
    row = {"bytes": buffer.getvalue(), "path": None}
    cache = ImageCache.from_dataset(
        datasets.Dataset.from_dict({"img": [row], "y": [0]}, features), **STATISTICS
    )
    assert (cache.images[0].numpy() == image.transpose(2, 0, 1)).all()
