import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from hfkd.data import load_image_data


@pytest.mark.parametrize(
    ("name", "classes", "train", "test", "first_label"),
    [
        ("cifar10", 10, 8336, 1017, "cat"),
        ("cifar10_jpeg", 10, 50000, 10000, "cat"),
        ("cifar100", 100, 1117, 916, "mountain"),
        ("svhn", 10, 796, 287, "1"),
    ],
)
def test_named_sets_have_the_same_columns(data_dir, name, classes, train, test, first_label):
    data = load_image_data(name, data_dir=data_dir / name)
    assert data.task == name
    assert data.num_labels == len(data.label_names) == classes
    assert len(data.validation) == round(0.1 * train)
    assert len(data.train) + len(data.validation) == train
    assert len(data.test) == test
    assert data.label_names[data.test[0]["label"]] == first_label
    for split in data.splits().values():
        assert split.column_names == ["image", "label", "index"]
        assert isinstance(split.features["image"], datasets.Image)
    whole = np.bincount([*data.train["label"], *data.validation["label"]])
    cut = np.bincount(data.validation["label"], minlength=classes)
    assert np.all(np.abs(cut - 0.1 * whole) < 1)
    assert not set(data.train["index"]) & set(data.validation["index"])


def test_images_stay_with_their_labels(data_dir):
    file = data_dir / "cifar10" / "train.parquet"
    raw = datasets.Dataset.from_parquet(str(file))
    data = load_image_data("cifar10", data_dir=data_dir, max_train_samples=50, max_eval_samples=50)
    for split in (data.train, data.validation):
        assert len(split) == 50
        for row in split:
            assert np.array_equal(row["image"], raw[row["index"]]["img"])
            assert row["label"] == raw[row["index"]]["label"]


def test_digits():
    from sklearn.datasets import load_digits

    data = load_image_data("digits", labels=100)
    images, labels = load_digits(return_X_y=True)
    assert len(data.train) + len(data.validation) + len(data.test) == len(labels)
    assert (np.array(data.train["label"]) != -100).sum() == 100
    assert np.bincount(data.test["label"]).min() >= 34
    other_seed = load_image_data("digits", seed=1)
    assert other_seed.test[:5]["label"] == data.test[:5]["label"]
    assert other_seed.validation["index"][:] != data.validation["index"][:]
    seen = {tuple(np.rint(image * 255 / 16).astype(int)): label for image, label in zip(images, labels, strict=True)}
    for row in data.test.select(range(20)):
        assert row["image"].mode == "L"
        assert seen[tuple(np.asarray(row["image"]).flatten().tolist())] == row["label"]


@pytest.mark.parametrize(
    "layout", ["{}.parquet", "data/{}-00000-of-00001.parquet", "pets/{}-00000-of-00001-0a1b.parquet"]
)
def test_parquet_layouts(tmp_path, make_split, layout):
    for name, count in (("train", 20), ("valid", 6), ("test", 5)):
        path = tmp_path / layout.format(name)
        path.parent.mkdir(exist_ok=True)
        make_split([(8, 8, 3)] * count).remove_columns("index").to_parquet(path)
    data = load_image_data("pets", data_dir=tmp_path)
    assert {name: len(split) for name, split in data.splits().items()} == {"train": 20, "validation": 6, "test": 5}


def test_shards_are_joined_in_order(tmp_path, make_split):
    for shard in range(2):
        make_split([(8, 8, 3)] * 10, labels=[shard] * 10).to_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet")
    data = load_image_data("pets", data_dir=tmp_path)
    assert data.test is None
    assert all(label == index // 10 for label, index in zip(data.train["label"], data.train["index"], strict=True))


def test_validation_without_test_is_the_test(tmp_path, make_split):
    for name, count in (("train", 20), ("validation", 6)):
        make_split([(8, 8, 3)] * count).to_parquet(tmp_path / f"{name}.parquet")
    data = load_image_data("pets", data_dir=tmp_path)
    assert {name: len(split) for name, split in data.splits().items()} == {"train": 18, "validation": 2, "test": 6}


def test_image_folder(tmp_path):
    for split, count in (("train", 10), ("test", 3)):
        for label, value in (("cat", 10), ("dog", 200)):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), (value, i, 0)).save(folder / f"{i}.png")
    data = load_image_data(data_dir=tmp_path)
    assert data.task == tmp_path.name
    assert data.label_names == ["cat", "dog"]
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 6)
    for row in data.train:
        assert row["image"].getpixel((0, 0))[0] == (10, 200)[row["label"]]


def test_images_without_classes_are_unlabelled(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for i in range(10):
        Image.new("L", (20, 20), i).save(folder / f"{i}.png")
    data = load_image_data("scans", data_dir=tmp_path)
    assert set(data.train["label"]) == set(data.validation["label"]) == {-100}
    assert len(data.train) == 9
    assert data.label_names is None
    with pytest.raises(ValueError, match="labels=5 exceeds the 0 labelled"):
        load_image_data("scans", data_dir=tmp_path, labels=5)
    with pytest.raises(ValueError, match="label_noise needs labels"):
        load_image_data("scans", data_dir=tmp_path, label_noise=0.1)


def write_images(folder, *paths):
    for i, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / path)
    return folder


TWENTY = [f"train/{label}/{i}.png" for label in ("cat", "dog") for i in range(10)]


def test_an_unlabelled_test_split_leaves_train_its_labels(tmp_path):
    data = load_image_data("pets", data_dir=write_images(tmp_path, *TWENTY, "test/0.png", "test/1.png"))
    assert data.label_names == ["cat", "dog"]
    assert np.bincount(data.train["label"]).tolist() == [9, 9]
    assert data.test is None
    assert data.extra["predict"]["label"][:] == [-100, -100]
    assert data.extra["predict"].features["label"].names == ["cat", "dog"]


def test_split_folders_are_no_classes(tmp_path):
    data = load_image_data(
        "scans", data_dir=write_images(tmp_path, *(f"train/{i}.png" for i in range(10)), "test/0.png")
    )
    assert data.label_names is None
    assert (set(data.train["label"]), data.test, len(data.extra["predict"])) == ({-100}, None, 1)


@pytest.mark.parametrize(
    ("test", "names", "labels"),
    [(["test/dog/0.png"], ["cat", "dog"], [1]), (["test/ant/0.png", "test/dog/0.png"], ["ant", "cat", "dog"], [0, 2])],
)
def test_splits_may_have_fewer_classes_or_more(tmp_path, test, names, labels):
    data = load_image_data("pets", data_dir=write_images(tmp_path, *TWENTY, *test))
    assert (data.label_names, data.test["label"][:]) == (names, labels)


def test_an_image_out_of_its_class_folder_is_refused(tmp_path):
    write_images(tmp_path, *TWENTY, "train/cat/more/0.png")
    with pytest.raises(ValueError, match="cat/more/0.png is not as deep .* of train: move it into a class folder"):
        load_image_data("pets", data_dir=tmp_path)


def test_zipped_class_folders(tmp_path):
    write_images(tmp_path / "unpacked", *TWENTY)
    (tmp_path / "packed").mkdir()
    shutil.make_archive(str(tmp_path / "packed" / "train"), "zip", tmp_path / "unpacked" / "train")
    data = load_image_data("pets", data_dir=tmp_path / "packed")
    assert data.label_names == ["cat", "dog"]
    assert sorted(row["image"].getpixel((0, 0))[0] // 10 == row["label"] for row in data.train) == [True] * 18


def test_labels_from_a_metadata_file_go_before_folders(tmp_path):
    write_images(tmp_path, *TWENTY)
    rows = [f"{path.removeprefix('train/')},{'ab'[i % 2]}\n" for i, path in enumerate(TWENTY)]
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n" + "".join(rows))
    data = load_image_data("pets", data_dir=tmp_path)
    assert data.label_names == ["a", "b"]
    assert all(row["image"].getpixel((0, 0))[0] % 2 == row["label"] for row in data.train)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("cifar10", ("uoft-cs/cifar10", "plain_text")),
        ("cifar100", ("uoft-cs/cifar100", "cifar100")),
        ("svhn", ("ufldl-stanford/svhn", "cropped_digits")),
        ("somebody/pets", ("somebody/pets", None)),
    ],
)
def test_hub_ids(monkeypatch, make_split, name, asked):
    def load_dataset(hub_id, config, revision):
        assert (hub_id, config, revision) == (*asked, "v2")
        split = make_split([(8, 8, 3)] * 20).rename_columns({"image": "img", "label": "fine_label"})
        return datasets.DatasetDict({"train": split, "test": split, "extra": split})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_image_data(name, revision="v2")
    assert {name: len(split) for name, split in data.splits().items()} == {"train": 18, "validation": 2, "test": 20}


def test_the_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match="pass its folder as data_dir.*cannot be reached.*check the network"):
        load_image_data("cifar10")


def test_unknown_names_and_folders(tmp_path, make_split):
    with pytest.raises(ValueError, match="unknown data set 'cifar11': use cifar10, cifar100, svhn, digits"):
        load_image_data("cifar11")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere: correct data_dir"):
        load_image_data("cifar10", data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither train.*parquet nor images"):
        load_image_data("cifar10", data_dir=tmp_path)
    make_split([(8, 8, 3)] * 4).remove_columns("image").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="0 image columns among .*use load_text_data"):
        load_image_data("pets", data_dir=tmp_path)


def test_ambiguous_and_real_labels_are_refused(tmp_path, make_split):
    split = make_split([(8, 8, 3)] * 4).remove_columns(["label", "index"])
    classes = datasets.ClassLabel(names=["a", "b"])
    both = split.add_column("kind", [0, 1, 0, 1]).add_column("breed", [0, 1, 0, 1])
    both.cast_column("kind", classes).cast_column("breed", classes).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="several columns of classes.*rename the one you mean to 'label'"):
        load_image_data("pets", data_dir=tmp_path)
    split.add_column("label", [0.5, 1.5, 2.5, 3.0]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="image regression is not supported"):
        load_image_data("pets", data_dir=tmp_path, validation_fraction=0.5)
