import io
import os
import pickle
import random
import zipfile

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    MobileViTImageProcessor,
    TimmWrapperConfig,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hfkd.data import DistillationCollator, ImageDataset, load_image_data


MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def splitmix(state):
    """SplitMix64's finaliser in Python's own integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def draw(seed, epoch, index):
    return splitmix(splitmix(splitmix(seed) ^ epoch) ^ index)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loader(dataset, batch_size=8, **options):
    return DataLoader(dataset, batch_size, collate_fn=DistillationCollator(), **options)


@pytest.mark.parametrize("augment", [None, "flip", "crop", "crop_flip"])
@pytest.mark.parametrize(("height", "width", "pad"), [(32, 32, 4), (8, 8, 1), (16, 24, 3)])
def test_crop_and_flip_equal_a_loop_over_samples(make_split, augment, height, width, pad):
    split = make_split([(height, width, 3)] * 30)
    processor = ViTImageProcessor(size={"height": height, "width": width}, image_mean=list(MEAN), image_std=list(STD))
    dataset = ImageDataset(split, processor, augment=augment, seed=5)
    dataset.set_epoch(2)
    batch = dataset.__getitems__(list(range(30)))
    views = set()
    for i, row in enumerate(split):
        image, word = np.asarray(row["image"]), draw(5, 2, row["index"])
        if augment in ("crop", "crop_flip"):
            padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            top, left = divmod((word >> 1) % (2 * pad + 1) ** 2, 2 * pad + 1)
            image = padded[top : top + height, left : left + width]
            views.add((top, left))
        if augment in ("flip", "crop_flip") and word & 1:
            image = image[:, ::-1]
        np.testing.assert_allclose(batch["pixel_values"][i].permute(1, 2, 0), (image / 255 - MEAN) / STD, atol=1e-5)
    assert batch["labels"].tolist() == split["label"][:]
    assert batch["index"].tolist() == split["index"][:]
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == batch["index"].dtype == torch.int64
    assert len(views) > 5 or augment in (None, "flip")


def test_all_views_come_up_equally_often(make_split, processor):
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[16, 15] = 255
    split = make_split([(32, 32, 3)]).map(lambda _: {"image": Image.fromarray(picture)})
    dataset = ImageDataset(split, processor, augment="crop_flip")
    seen = []
    for epoch in range(162 * 50):
        dataset.set_epoch(epoch)
        seen.append(int(dataset[0]["pixel_values"][0].argmax()))
    # Crop offsets -4..4 and the flip shift the point to 9 rows and 9 + 9 - 8 overlapping columns.
    counts = np.bincount(seen, minlength=1024).reshape(32, 32)[12:21]
    assert counts.sum() == len(seen)
    rows = counts.sum(1)
    assert np.all(np.abs(rows - 900) < 5 * np.sqrt(800))
    assert np.all(np.abs(counts.sum(0)[13:19] - 900) < 6 * np.sqrt(800))


def test_real_images(data_dir, processor):
    data = load_image_data("cifar10", data_dir=data_dir, max_eval_samples=100)
    dataset = ImageDataset(data.test, processor)
    batch = dataset.__getitems__(list(range(100)))
    for i, row in enumerate(data.test):
        np.testing.assert_allclose(
            batch["pixel_values"][i].permute(1, 2, 0), (np.asarray(row["image"]) / 255 - MEAN) / STD, atol=1e-5
        )


@pytest.mark.parametrize("rand_augment", [None, "rand-m9-mstd0.5"])
def test_a_sample_does_not_depend_on_its_batch(make_split, processor, rand_augment):
    dataset = ImageDataset(make_split([(32, 32, 3)] * 10), processor, augment="crop_flip", rand_augment=rand_augment)
    whole, reverse = dataset.__getitems__(list(range(10))), dataset.__getitems__(list(range(9, -1, -1)))
    assert equal(whole, {name: column.flip(0) for name, column in reverse.items()})
    for i in range(10):
        assert equal(dataset[i], {name: column[i] for name, column in whole.items()})


def test_a_sample_does_not_depend_on_the_rows_around_it(make_split, processor):
    split = make_split([(32, 32, 3)] * 10)
    whole = ImageDataset(split, processor, augment="crop_flip")
    part = ImageDataset(split.select([7, 2]), processor, augment="crop_flip")
    assert equal(part[0], whole[7])
    assert equal(part[1], whole[2])


def test_epoch_and_seed_change_the_draws(make_split, processor):
    split = make_split([(32, 32, 3)] * 20)
    dataset, rows = ImageDataset(split, processor, augment="crop_flip"), list(range(20))
    first = dataset.__getitems__(rows)
    dataset.set_epoch(1)
    second = dataset.__getitems__(rows)
    changed = (first["pixel_values"] != second["pixel_values"]).flatten(1).any(1)
    assert changed.sum() >= 15
    dataset.set_epoch(0)
    assert equal(dataset.__getitems__(rows), first)
    assert not equal(ImageDataset(split, processor, augment="crop_flip", seed=1).__getitems__(rows), first)


@pytest.mark.parametrize("shapes", [[(32, 32, 3)] * 24, [(70, 80, 3), (90, 75, 3)] * 4], ids=["small", "large"])
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.2])
def test_workers_give_the_same_batches(make_split, processor, shapes, mixup_alpha):
    dataset = ImageDataset(
        make_split(shapes),
        processor,
        augment="crop_flip",
        rand_augment="rand-m9-mstd0.5",
        mixup_alpha=mixup_alpha,
        num_labels=3,
    )
    alone, workers = loader(dataset), loader(dataset, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append(list(alone))
        assert all(equal(a, b) for a, b in zip(epochs[-1], workers, strict=True))
    assert not equal(epochs[0][0], epochs[1][0])


def test_accelerates_loader_sets_the_epoch(make_split, processor):
    dataset = ImageDataset(make_split([(32, 32, 3)] * 8), processor, augment="crop_flip")
    prepared = prepare_data_loader(loader(dataset), put_on_device=False)
    first, second = (list(prepared)[0] for _ in range(2))
    expected = dataset.__getitems__(list(range(8)))
    assert equal(second, expected)
    assert not equal(first, second)


def test_pickled_dataset_gives_the_same(make_split, processor):
    dataset = ImageDataset(make_split([(32, 32, 3)] * 4), processor, augment="crop_flip", rand_augment="rand-m9")
    assert equal(pickle.loads(pickle.dumps(dataset)).__getitems__([0, 1]), dataset.__getitems__([0, 1]))


def test_without_augmentation(make_split, processor):
    split = make_split([(32, 32, 3)] * 6)
    dataset = ImageDataset(
        split, processor, augment="crop_flip", rand_augment="rand-m9", mixup_alpha=1.0, num_labels=3
    )
    dataset.set_epoch(3)
    plain = dataset.without_augmentation()
    assert equal(plain.__getitems__([0, 1]), ImageDataset(split, processor).__getitems__([0, 1]))
    assert plain.pixels is dataset.pixels
    plain.set_epoch(0)
    assert int(dataset._epoch) == 3
    assert dataset.augment == "crop_flip"


def test_global_generators_are_left_alone(make_split, processor):
    dataset = ImageDataset(
        make_split([(80, 70, 3)] * 4),
        processor,
        augment="crop_flip",
        rand_augment="rand-m9-mstd0.5-inc1",
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        num_labels=3,
    )

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    first = dataset.__getitems__([0, 1, 2, 3])
    assert states() == before
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert equal(dataset.__getitems__([0, 1, 2, 3]), first)


def test_rand_augment_changes_images(make_split, processor):
    split = make_split([(32, 32, 3)] * 20)
    plain = ImageDataset(split, processor).__getitems__(list(range(20)))
    augmented = ImageDataset(split, processor, rand_augment="rand-m9-n2-p1.0").__getitems__(list(range(20)))
    changed = (plain["pixel_values"] != augmented["pixel_values"]).flatten(1).any(1)
    assert changed.sum() >= 15
    assert torch.equal(plain["labels"], augmented["labels"])


@pytest.mark.parametrize("size", [1, 6, 7])
def test_mixup_mixes_images_and_labels_alike(make_split, processor, size):
    split = make_split([(32, 32, 3)] * size)
    mixed = ImageDataset(split, processor, mixup_alpha=1.0, num_labels=3, seed=1).__getitems__(list(range(size)))
    plain = ImageDataset(split, processor).__getitems__(list(range(size)))
    assert mixed["labels"].shape == (size, 3)
    assert mixed["labels"].dtype == torch.float32
    torch.testing.assert_close(mixed["labels"].sum(1), torch.ones(size))
    one_hot = torch.eye(3)[plain["labels"]]
    partner = [-i % size for i in range(size)] if size % 2 else list(range(size))[::-1]
    # The share is read off the labels where both differ, and must explain all pixels.
    shares = [
        float(mixed["labels"][i, plain["labels"][i]])
        for i in range(size)
        if plain["labels"][i] != plain["labels"][partner[i]]
    ]
    share = shares[0] if shares else 1.0
    assert shares == pytest.approx([share] * len(shares))
    for name, unmixed in (("pixel_values", plain["pixel_values"]), ("labels", one_hot)):
        torch.testing.assert_close(mixed[name], share * unmixed + (1 - share) * unmixed[partner], atol=1e-4, rtol=0)


def test_cutmix_pastes_a_box_and_counts_its_area(make_split, processor):
    split = make_split([(32, 32, 3)] * 8, labels=[0, 1] * 4)
    plain = ImageDataset(split, processor).__getitems__(list(range(8)))["pixel_values"]
    boxes = 0
    for seed in range(5):
        dataset = ImageDataset(split, processor, cutmix_alpha=1.0, num_labels=2, seed=seed)
        mixed = dataset.__getitems__(list(range(8)))
        kept = (mixed["pixel_values"] - plain).abs().amax(1) < 1e-5
        pasted = (mixed["pixel_values"] - plain.flip(0)).abs().amax(1) < 1e-5
        assert (kept | pasted).all()
        share = kept.float().mean((1, 2))
        torch.testing.assert_close(mixed["labels"].gather(1, torch.tensor([0, 1] * 4)[:, None])[:, 0], share)
        boxes += int((share < 1).all())
    assert boxes >= 3


def test_mixup_depends_on_epoch_seed_and_batch(make_split, processor):
    split = make_split([(32, 32, 3)] * 8)

    def share(rows, epoch=0, seed=0):
        dataset = ImageDataset(split, processor, mixup_alpha=1.0, num_labels=3, seed=seed)
        dataset.set_epoch(epoch)
        return dataset.__getitems__(rows)["labels"].tolist()

    assert share([0, 1, 2, 3]) == share([0, 1, 2, 3])
    distinct = [share([0, 1, 2, 3]), share([0, 1, 2, 3], 1), share([0, 1, 2, 3], 0, 1), share([3, 1, 5, 0])]
    assert all(a != b for i, a in enumerate(distinct) for b in distinct[:i])


def test_teacher_and_student_see_the_same_mixed_image(make_split, processor):
    teacher = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    for shape in ((32, 32, 3), (80, 80, 3)):
        dataset = ImageDataset(
            make_split([shape] * 6),
            processor,
            teacher_processor=teacher,
            augment="crop_flip",
            rand_augment="rand-m9",
            mixup_alpha=1.0,
            cutmix_alpha=1.0,
            num_labels=3,
        )
        batch = dataset.__getitems__([0, 1, 2, 3, 4])
        seen = batch["pixel_values"] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        torch.testing.assert_close(batch["teacher_pixel_values"] * 0.25 + 0.5, seen.float(), atol=1e-5, rtol=0)


def timm_processor(**overrides):
    cfg = {**timm.get_pretrained_cfg("resnet10t").to_dict(), **overrides}
    return TimmWrapperImageProcessor(TimmWrapperConfig(architecture="resnet10t", pretrained_cfg=cfg).pretrained_cfg)


PROCESSORS = {
    "same size": ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=list(MEAN), image_std=list(STD)),
    "bilinear": ViTImageProcessor(size={"height": 48, "width": 48}),
    "bicubic": ViTImageProcessor(size={"height": 48, "width": 40}, resample=3),
    "smaller": ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False),
    "nearest": ViTImageProcessor(size={"height": 48, "width": 48}, resample=0),
    "crop": BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40}),
    "crop alone": BitImageProcessor(do_resize=False, crop_size={"height": 48, "width": 48}),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.875),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_is_the_processors(make_split, name):
    for shapes in ([(32, 32, 3)] * 3, [(70, 80, 3), (90, 75, 3), (66, 66, 3)]):
        split = make_split(shapes)
        batch = ImageDataset(split, PROCESSORS[name]).__getitems__([0, 1, 2])
        expected = PROCESSORS[name](images=split["image"][:], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_evaluation_is_timms(make_split, crop_pct):
    processor = timm_processor(input_size=(3, 48, 48), crop_pct=crop_pct)
    for shapes in ([(32, 32, 3)] * 3, [(70, 80, 3), (90, 75, 3), (66, 66, 3)]):
        split = make_split(shapes)
        dataset = ImageDataset(split, processor)
        expected = processor(images=split["image"][:])["pixel_values"]
        one_grey_level = float(dataset.views["pixel_values"].scale.max()) * 1.01
        torch.testing.assert_close(
            dataset.__getitems__([0, 1, 2])["pixel_values"], expected, atol=one_grey_level, rtol=0
        )
    resampling = ImageDataset(make_split([(32, 32, 3)]), processor).views["pixel_values"].resampling
    assert (resampling is not None) == (crop_pct == 1.0)


def test_what_is_resized_by_ourselves_and_what_by_the_processor(make_split):
    split = make_split([(32, 32, 3)] * 2)
    own = {name: ImageDataset(split, p).views["pixel_values"].resampling is not None for name, p in PROCESSORS.items()}
    assert own == {
        "same size": True,
        "bilinear": True,
        "bicubic": True,
        "smaller": True,
        "nearest": False,
        "crop": False,
        "crop alone": False,
        "convnext": False,
    }


@pytest.mark.parametrize("name", PROCESSORS)
def test_teacher_columns_only_where_its_view_differs(make_split, processor, name):
    for shape in ((32, 32, 3), (80, 70, 3)):
        split = make_split([shape] * 2)
        dataset = ImageDataset(split, processor, teacher_processor=PROCESSORS[name])
        differs = name != "same size"
        assert ("teacher_pixel_values" in dataset.column_names) == differs
        batch = dataset.__getitems__([0, 1])
        assert list(batch) == dataset.column_names
        if differs:
            expected = PROCESSORS[name](images=split["image"][:], return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(batch["teacher_pixel_values"], expected, atol=1e-4, rtol=0)
        assert dataset.suits(PROCESSORS[name])
        assert dataset.suits(processor) != differs
        assert ImageDataset(split, processor).suits(PROCESSORS[name]) != differs


def test_small_teacher_view_follows_the_students_crop(make_split, processor):
    split = make_split([(32, 32, 3)] * 8)
    teacher = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=list(MEAN), image_std=list(STD))
    dataset = ImageDataset(split, processor, teacher_processor=teacher, augment="crop_flip")
    batch = dataset.__getitems__(list(range(8)))
    pixels = batch["pixel_values"] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    pixels = (pixels * 255).round().to(torch.uint8)
    expected = teacher(images=list(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["teacher_pixel_values"], expected, atol=1e-4, rtol=0)


def test_large_images_are_cropped_once_for_both(make_split, processor):
    gradient = np.linspace(0, 255, 96 * 120).reshape(96, 120, 1).repeat(3, 2).astype(np.uint8)
    split = make_split([(8, 8, 3)] * 4).map(lambda _: {"image": Image.fromarray(gradient)})
    teacher = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=list(MEAN), image_std=list(STD))
    dataset = ImageDataset(split, processor, teacher_processor=teacher, augment="crop_flip")
    batch = dataset.__getitems__([0, 1, 2, 3])
    assert batch["teacher_pixel_values"].shape == (4, 3, 64, 64)
    halved = torch.nn.functional.avg_pool2d(batch["teacher_pixel_values"], 2)
    torch.testing.assert_close(batch["pixel_values"], halved, atol=0.15, rtol=0)
    spread = batch["pixel_values"].flatten(1).std(1)
    assert len(spread.unique()) == 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("side", [32, 80])
def test_every_mode_becomes_colour_or_grey(make_split, processor, mode, side):
    source = make_split([(side, side, 3)] * 2)
    images = [image.convert(mode) for image in source["image"]]
    if mode == "CMYK":
        # PNG, in which the split stores images, has no CMYK.
        images = [image.convert("RGB") for image in images]
    split = (
        source.remove_columns("image").add_column("image", [None] * 2).cast_column("image", source.features["image"])
    )
    split = split.map(lambda _, i: {"image": images[i]}, with_indices=True)
    batch = ImageDataset(split, processor).__getitems__([0, 1])
    expected = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-4, rtol=0)
    grey = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    for augment, rand_augment in ((None, None), ("crop_flip", "rand-m9")):
        dataset = ImageDataset(split, grey, teacher_processor=processor, augment=augment, rand_augment=rand_augment)
        batch = dataset.__getitems__([0, 1])
        assert batch["pixel_values"].shape == (2, 1, 32, 32)
        assert batch["teacher_pixel_values"].shape == (2, 3, 32, 32)
        if augment is None:
            expected = grey(images=[image.convert("L") for image in images], return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(batch["pixel_values"], expected, atol=1.01 / 255 / 0.5, rtol=0)


@pytest.mark.parametrize("side", [1, 8, 31, 33])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pixels_are_those_that_pil_decodes(processor, kind, mode, side):
    noise = np.random.default_rng(side).integers(0, 256, (side, side + 2, 3), dtype=np.uint8)
    image, encoded = Image.fromarray(noise).convert(mode), io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    extra = {"exif": turned} if kind in ("JPEG", "PNG", "WEBP") else {}
    try:
        image.save(encoded, kind, **({"lossless": True} if kind == "WEBP" else {}), **extra)
    except (OSError, ValueError):
        pytest.skip(f"PIL writes no {mode} as {kind}")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(num_classes=2), index=datasets.Value("int64")
    )
    columns = {"image": [{"bytes": encoded.getvalue(), "path": None}], "label": [0], "index": [0]}
    split = datasets.Dataset.from_dict(columns, features)
    expected = split[0]["image"]
    expected = np.atleast_3d(np.asarray(expected.convert("L" if expected.mode in ("1", "L") else "RGB")))
    assert expected.shape[:2] == ((side + 2, side) if extra else (side, side + 2))
    np.testing.assert_array_equal(ImageDataset(split, processor).pixels[0], expected.transpose(2, 0, 1))


def test_grey_and_colour_together(make_split, processor):
    split = make_split([(32, 32), (32, 32, 3)])
    batch = ImageDataset(split, processor).__getitems__([0, 1])
    expected = processor(images=[image.convert("RGB") for image in split["image"]], return_tensors="pt")[
        "pixel_values"
    ]
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-4, rtol=0)


def test_digits_keep_one_channel_in_memory(processor):
    data = load_image_data("digits", max_train_samples=20)
    dataset = ImageDataset(data.train, processor, augment="crop")
    assert dataset.pixels.shape == (20, 1, 8, 8)
    batch = dataset.__getitems__([0, 1])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    plain = ImageDataset(data.train, processor).__getitems__(list(range(20)))
    expected = processor(images=[image.convert("RGB") for image in data.train["image"]], return_tensors="pt")
    torch.testing.assert_close(plain["pixel_values"], expected["pixel_values"], atol=1e-4, rtol=0)


def test_unlabelled_samples_pass(make_split, processor):
    dataset = ImageDataset(make_split([(32, 32, 3)] * 3, labels=[0, -100, 1]), processor, num_labels=2)
    assert dataset.__getitems__([0, 1, 2])["labels"].tolist() == [0, -100, 1]
    assert dataset.labels.tolist() == [0, -100, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "resize"}, "unknown augment 'resize': use one of None, flip, crop, crop_flip"),
        ({"rand_augment": "augmix-m5"}, "timm cannot read rand_augment='augmix-m5'"),
        ({"mixup_alpha": 0.2}, "pass num_labels"),
        ({"mixup_alpha": -1}, "must not be negative"),
        ({"mixup_alpha": 0.2, "num_labels": 3}, "1 samples have no label to mix"),
        ({"num_labels": 1}, "labels 0..1 do not fit num_labels=1"),
    ],
)
def test_refusals(make_split, processor, options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(make_split([(32, 32, 3)] * 3, labels=[0, -100, 1]), processor, **options)


def test_a_processor_that_reorders_colours(make_split):
    processor = MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    split = make_split([(80, 70, 3)] * 2)
    expected = processor(images=split["image"][:], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ImageDataset(split, processor).__getitems__([0, 1])["pixel_values"], expected)
    with pytest.raises(ValueError, match="MobileViTImageProcessor reorders or mixes colours"):
        ImageDataset(split, processor, augment="crop_flip")
    small = make_split([(32, 32, 3)] * 2)
    expected = processor(images=small["image"][:], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ImageDataset(small, processor).__getitems__([0, 1])["pixel_values"], expected)


def test_unfit_splits_are_refused(make_split, processor):
    split = make_split([(80, 70, 3)] * 4)
    with pytest.raises(ValueError, match=r"lacks \['index'\]: make it with load_image_data"):
        ImageDataset(split.remove_columns("index"), processor)
    with pytest.raises(ValueError, match="the split is empty: it was cut with validation_fraction=0"):
        ImageDataset(split.select([]), processor)
    with pytest.raises(ValueError, match="use augment='crop_flip'"):
        ImageDataset(split, processor, mixup_alpha=0.2, num_labels=3)


# Views that have a number


def every_crop_and_flip(image, pad=4):
    """All that crop and flip can make of (H, W, 3), by two loops."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    crops = [padded[t : t + height, s : s + width] for t in range(2 * pad + 1) for s in range(2 * pad + 1)]
    return {flipped.tobytes() for crop in crops for flipped in (crop, crop[:, ::-1])}


@pytest.mark.parametrize(("augment", "outcomes"), [("crop_flip", 162), ("crop", 81), ("flip", 2)])
def test_all_views_are_all_outcomes(make_split, processor, augment, outcomes):
    split = make_split([(32, 32, 3)] * 3)
    dataset = ImageDataset(split, processor, augment=augment, views=outcomes)
    assert dataset.outcomes == outcomes
    view = dataset.views["pixel_values"]
    seen = [set() for _ in range(3)]
    for number in range(1, outcomes + 1):
        batch = dataset.only_view(number).__getitems__([0, 1, 2])
        assert batch["view"].tolist() == [number] * 3
        pixels = ((batch["pixel_values"] - view.offset) / view.scale).round().to(torch.uint8).permute(0, 2, 3, 1)
        for images, image in zip(seen, pixels.numpy(), strict=True):
            images.add(image.tobytes())
    for row, images in zip(split, seen, strict=True):
        expected = every_crop_and_flip(np.asarray(row["image"]))
        assert len(images) == outcomes
        assert images <= expected
        assert len(expected) == 162


VIEWS = [
    ({"augment": "crop_flip"}, (32, 32, 3)),
    ({"augment": "crop"}, (32, 32, 3)),
    ({"augment": "crop_flip", "rand_augment": "rand-m9-mstd0.5"}, (32, 32, 3)),
    ({"rand_augment": "rand-m9-mstd0.5"}, (32, 32, 3)),
    ({"augment": "crop_flip"}, (80, 90, 3)),
    ({"augment": "flip", "rand_augment": "rand-m9-mstd0.5"}, (80, 90, 3)),
]


@pytest.mark.parametrize(("options", "shape"), VIEWS)
def test_an_epoch_draws_from_the_views_and_says_which(make_split, processor, options, shape):
    split, rows = make_split([shape] * 6), list(range(6))
    dataset = ImageDataset(split, processor, seed=5, views=3, **options)
    views = [dataset.only_view(number).__getitems__(rows) for number in range(4)]
    assert "view" in dataset.column_names
    numbers = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__(rows)
        assert equal(dataset[4], {name: column[4] for name, column in batch.items()})
        assert batch["view"].tolist() == [1 + draw(5, epoch, index) % 3 for index in batch["index"].tolist()]
        for i in rows:
            assert equal(dataset[i], {name: column[i] for name, column in views[int(batch["view"][i])].items()})
        numbers += batch["view"].tolist()
    assert set(numbers) == {1, 2, 3}
    assert len({view["pixel_values"].numpy().tobytes() for view in views}) == 4


@pytest.mark.parametrize(("options", "shape"), VIEWS)
def test_the_views_depend_on_neither_seed_nor_number(make_split, processor, options, shape):
    split, rows = make_split([shape] * 4), list(range(4))
    few = ImageDataset(split, processor, views=2, **options)
    many = ImageDataset(split, processor, seed=9, views=5, **options)
    many.set_epoch(3)
    for number in range(3):
        assert equal(few.only_view(number).__getitems__(rows), many.only_view(number).__getitems__(rows))
    assert few.preprocessing == many.preprocessing


def test_view_0_is_without_augmentation(make_split, processor):
    split, rows = make_split([(32, 32, 3)] * 4), list(range(4))
    plain = ImageDataset(split, processor).__getitems__(rows)
    dataset = ImageDataset(split, processor, augment="crop_flip", views=2)
    for shown in (dataset.without_augmentation(), dataset.only_view(0)):
        assert equal(shown.__getitems__(rows), {**plain, "view": torch.zeros(4, dtype=torch.int64)})


def test_views_are_alike_in_workers(make_split, processor):
    dataset = ImageDataset(make_split([(32, 32, 3)] * 16), processor, augment="crop_flip", views=4)
    here, there = (list(loader(dataset, num_workers=workers)) for workers in (0, 2))
    assert all(map(equal, here, there))


def test_preprocessing_names_what_changes_the_images(make_split, processor):
    split = make_split([(32, 32, 3)])
    darker = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.6] * 3, image_std=[0.25] * 3)
    described = [
        ImageDataset(split, processor, **options).preprocessing
        for options in (
            {},
            {"augment": "crop_flip"},
            {"augment": "flip"},
            {"rand_augment": "rand-m9-mstd0.5"},
            {"teacher_processor": darker},
        )
    ]
    assert len({str(one) for one in described}) == 5
    assert ImageDataset(split, processor, augment="flip").without_augmentation().preprocessing == described[0]


@pytest.mark.parametrize(("rand_augment", "different"), [(None, 1), ("rand-m9-mstd0.5", 2)])
def test_the_students_fill_colour_is_in_what_the_teacher_sees(make_split, processor, rand_augment, different):
    split, size = make_split([(32, 32, 3)]), {"height": 32, "width": 32}
    students = [ViTImageProcessor(size=size, image_mean=[mean] * 3, image_std=[0.25] * 3) for mean in (0.1, 0.9)]
    sets = [ImageDataset(split, one, teacher_processor=processor, rand_augment=rand_augment) for one in students]
    assert len({str(dataset.preprocessing) for dataset in sets}) == different


def test_large_images_in_another_mode_are_others(make_split, processor):
    split = make_split([(96, 96, 3)] * 2)
    splits = [split.cast_column("image", datasets.Image(mode=mode)) for mode in (None, None, "L")]
    one, same, grey = (ImageDataset(one, processor).raw_bytes(np.arange(2)) for one in splits)
    assert one == same != grey


@pytest.mark.parametrize("zipped", [False, True])
def test_a_large_image_in_a_file_that_is_written_anew_is_another(tmp_path, processor, zipped):
    path = tmp_path / "0.bmp"  # of the same size whatever it shows

    def write(colour, second):
        Image.new("RGB", (96, 96), (colour, 0, 0)).save(path)
        if zipped:
            zipfile.ZipFile(f"{path}.zip", "w").write(path, path.name)
        for file in tmp_path.iterdir():
            os.utime(file, ns=(second * 10**9, second * 10**9))

    write(10, second=1)
    name = f"zip://{path.name}::{path}.zip" if zipped else str(path)
    split = datasets.Dataset.from_dict({"image": [name], "label": [0], "index": [0]})
    dataset = ImageDataset(split.cast_column("image", datasets.Image()), processor)
    before = dataset.raw_bytes(np.arange(1))
    assert dataset.raw_bytes(np.arange(1)) == before
    write(200, second=2)
    assert dataset.raw_bytes(np.arange(1)) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 3}, "views=3 needs an augmentation to draw from"),
        ({"views": 0, "augment": "flip"}, "views must be at least 1, got 0: leave it out"),
        ({"views": 3, "augment": "flip"}, "augment='flip' has 2 outcomes at this size, got views=3: lower it"),
        (
            {"views": 3, "augment": "flip", "mixup_alpha": 0.2, "num_labels": 10},
            "a sample has no views: leave views out",
        ),
    ],
)
def test_views_that_do_not_fit_are_refused(make_split, processor, options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(make_split([(32, 32, 3)] * 2), processor, **options)
    with pytest.raises(ValueError, match="there is no view 1"):
        ImageDataset(make_split([(32, 32, 3)] * 2), processor).only_view(1)


# On a device


def there_and_here(split, processor, **options):
    """The same data set with its images on a device (here the CPU again) and in numpy."""
    return [ImageDataset(split, processor, **options).to("cpu"), ImageDataset(split, processor, **options)]


@pytest.mark.parametrize("augment", [None, "flip", "crop", "crop_flip"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8), (16, 24, 3)], ids=str)
def test_on_a_device_batches_are_bit_for_bit_the_same(make_split, augment, shape):
    size = {"height": shape[0], "width": shape[1]}
    processor = ViTImageProcessor(size=size, image_mean=list(MEAN), image_std=list(STD))
    teacher = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.3] * 3)
    split = make_split([shape] * 40)
    there, here = there_and_here(split, processor, teacher_processor=teacher, augment=augment, seed=5)
    there._augment_small = None  # numpy's way is not gone
    rows = np.random.default_rng(0).permutation(40).tolist()
    for epoch in range(3):
        there.set_epoch(epoch)
        here.set_epoch(epoch)
        batch = there.__getitems__(rows)
        assert equal(batch, here.__getitems__(rows))
        assert batch["teacher_pixel_values"].shape == (40, 3, *shape[:2])
        assert equal(there.without_augmentation().__getitems__(rows), here.without_augmentation().__getitems__(rows))


@pytest.mark.parametrize(("augment", "outcomes"), [("crop_flip", 162), ("crop", 81), ("flip", 2)])
def test_on_a_device_every_view_is_the_same_under_its_number(make_split, processor, augment, outcomes):
    there, here = there_and_here(make_split([(32, 32, 3)] * 3), processor, augment=augment, views=outcomes)
    seen = set()
    for number in range(1, outcomes + 1):
        one, other = (dataset.only_view(number).__getitems__([2, 0, 1]) for dataset in (there, here))
        assert equal(one, other)
        assert one["view"].tolist() == [number] * 3
        seen.add(one["pixel_values"][0].numpy().tobytes())
    assert len(seen) == outcomes
    assert equal(there.__getitems__([0, 1, 2]), here.__getitems__([0, 1, 2]))


def test_on_a_device_mixup_and_grey_models_are_the_same(make_split, processor):
    split = make_split([(32, 32, 3)] * 9)
    there, here = there_and_here(
        split, processor, augment="crop_flip", mixup_alpha=0.4, cutmix_alpha=1.0, num_labels=3
    )
    assert equal(there.__getitems__(list(range(9))), here.__getitems__(list(range(9))))
    grey = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4], image_std=[0.2])
    there, here = there_and_here(split, grey, augment="flip")
    assert there[0]["pixel_values"].shape == (1, 32, 32)
    assert equal(there[0], here[0])


@pytest.mark.parametrize("processes", [1, 2])
def test_on_a_device_accelerates_loader_gives_the_same(make_split, processor, processes):
    split = make_split([(32, 32, 3)] * 20)
    batches = []
    for dataset in there_and_here(split, processor, augment="crop_flip"):
        dataset.set_epoch(1)
        shares = [
            prepare_data_loader(
                loader(dataset, 4), num_processes=processes, process_index=rank, device=torch.device("cpu")
            )
            for rank in range(processes)
        ]
        batches.append([batch for share in shares for batch in share])
    assert len(batches[0]) >= 5
    assert all(equal(one, other) for one, other in zip(*batches, strict=True))


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [((80, 70, 3), 32, {}), ((32, 32, 3), 64, {}), ((32, 32, 3), 32, {"rand_augment": "rand-m9"})],
    ids=["large", "resized", "rand_augment"],
)
def test_what_would_not_be_the_same_on_a_device_stays(make_split, shape, size, options):
    processor = ViTImageProcessor(size={"height": size, "width": size})
    dataset = ImageDataset(make_split([shape] * 2), processor, **options)
    assert not dataset.can_move
    with pytest.raises(ValueError, match="not resized and go without RandAugment .*: leave them where they are"):
        dataset.to("cpu")


def test_too_many_images_stay(make_split, processor, monkeypatch):
    dataset = ImageDataset(make_split([(32, 32, 3)] * 2), processor)
    assert dataset.can_move
    monkeypatch.setattr("hfkd.data.image_dataset._LARGEST_ON_DEVICE", dataset.pixels.nbytes - 1)
    assert not dataset.can_move


@pytest.mark.parametrize("shape", [(32, 32, 3), (80, 70, 3)], ids=["small", "large"])
@pytest.mark.parametrize("augment", [None, "crop_flip"])
def test_pixels_come_channels_last(make_split, processor, shape, augment):
    dataset = ImageDataset(make_split([shape] * 4), processor, augment=augment)
    for each in [dataset, dataset.to("cpu")] if dataset.can_move else [dataset]:
        pixels = next(iter(loader(each, 4)))["pixel_values"]
        assert pixels.is_contiguous(memory_format=torch.channels_last)
