"""Decoded images are kept, and only those that were asked for."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hfkd.data import ImageDataset, decoded, image_dataset
from hfkd.data.decoded import kept_pixels


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HFKD_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches" / "pixels"


PIXELS = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)


def never():
    raise AssertionError("decoded again")


def test_the_second_time_nothing_is_decoded(root):
    assert kept_pixels([b"one", b"two"], lambda: PIXELS) is PIXELS
    np.testing.assert_array_equal(kept_pixels([b"one", b"two"], never), PIXELS)
    assert len(list(root.iterdir())) == 1


@pytest.mark.parametrize("encoded", [[b"two", b"one"], [b"onet", b"wo"], [b"one"], [b"one", b"two", b""]])
def test_other_images_are_others(encoded):
    kept_pixels([b"one", b"two"], lambda: PIXELS)
    other = PIXELS + 1
    assert kept_pixels(encoded, lambda: other) is other


def test_another_decoder_decodes_again(monkeypatch):
    kept_pixels([b"one"], lambda: PIXELS)
    monkeypatch.setattr(decoded.PIL, "__version__", "0.0")
    assert kept_pixels([b"one"], lambda: PIXELS) is PIXELS


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "text"])
def test_a_damaged_file_is_written_again(root, damage):
    kept_pixels([b"one"], lambda: PIXELS)
    (path,) = root.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    path.write_bytes({"cut": whole[:-9], "flipped": bytes(flipped), "emptied": b"", "text": b"no tensors"}[damage])
    assert kept_pixels([b"one"], lambda: PIXELS) is PIXELS
    assert path.read_bytes() == whole


def test_what_cannot_be_written_is_decoded_each_time(root):
    root.parent.write_text("a file where the folder would be")
    assert kept_pixels([b"one"], lambda: PIXELS) is PIXELS


def test_a_full_disk_costs_nothing_else(small_disk, monkeypatch):
    folder = small_disk(64)
    monkeypatch.setenv("HFKD_CACHE", str(folder))
    many = np.zeros((100, 3, 32, 32), np.uint8)
    assert kept_pixels([b"one"], lambda: many) is many
    assert not [path for path in (folder / "pixels").iterdir() if path.suffix == ".safetensors"]
    assert kept_pixels([b"two"], lambda: PIXELS) is PIXELS
    np.testing.assert_array_equal(kept_pixels([b"two"], never), PIXELS)  # what the first one wrote is gone


def test_images_of_different_sizes_are_not_kept(root):
    assert kept_pixels([b"one"], lambda: None) is None
    assert not root.exists()


def test_a_data_set_is_the_same_from_the_file(make_split, processor, root, monkeypatch):
    monkeypatch.setattr(image_dataset, "_MANY", 4)
    split = make_split([(32, 32, 3), (32, 32), (32, 32, 3), (32, 32, 3)])
    first = ImageDataset(split, processor, augment="crop_flip")
    assert len(list(root.iterdir())) == 1
    monkeypatch.setattr(ImageDataset, "_decode_all", lambda self, size: never())
    second = ImageDataset(split, processor, augment="crop_flip")
    for name, column in first.__getitems__([3, 0, 2]).items():
        assert torch.equal(column, second.__getitems__([3, 0, 2])[name])
    with pytest.raises(AssertionError, match="decoded again"):
        ImageDataset(split.select([3, 2, 1, 0]), processor)


def test_another_mode_of_the_column_decodes_again(make_split, processor, monkeypatch):
    monkeypatch.setattr(image_dataset, "_MANY", 2)
    split = make_split([(32, 32, 3), (32, 32, 3)])
    colour = ImageDataset(split, processor).pixels
    grey = ImageDataset(split.cast_column("image", datasets.Image(mode="L")), processor).pixels
    assert (colour.shape[1], grey.shape[1]) == (3, 1)
    np.testing.assert_array_equal(ImageDataset(split, processor).pixels, colour)


def test_files_may_change_and_are_not_kept(processor, root, tmp_path, monkeypatch):
    monkeypatch.setattr(image_dataset, "_MANY", 2)
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path in paths:
        Image.new("RGB", (32, 32)).save(path)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(num_classes=2), index=datasets.Value("int64")
    )
    split = datasets.Dataset.from_dict({"image": paths, "label": [0, 1], "index": [0, 1]}, features)
    assert ImageDataset(split, processor).pixels.max() == 0
    Image.new("RGB", (32, 32), "white").save(paths[1])
    assert ImageDataset(split, processor).pixels.max() == 255
    assert not root.exists()
