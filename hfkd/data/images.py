"""Image data sets by name, from the Hub, or from a local folder."""

from collections import Counter
from pathlib import Path, PurePath
from typing import Literal

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from hfkd.data.sources import existing_folder, load_from_hub, load_parquet_folder, usual_splits
from hfkd.data.splits import SplitOptions, find_label_column, make_task_data, stratified_rows
from hfkd.data.task_data import TaskData


HUB_IMAGES = {
    "cifar10": ("uoft-cs/cifar10", "plain_text"),
    "cifar100": ("uoft-cs/cifar100", "cifar100"),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
}


def load_image_data(
    dataset: str = "digits",
    *,
    data_dir: str | Path | None = None,
    validation_fraction: float = 0.1,
    held_out_fraction: float = 0.0,
    labels: int | None = None,
    label_noise: float = 0.0,
    noise_type: Literal["symmetric", "pair"] = "symmetric",
    seed: int = 0,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    revision: str | None = None,
) -> TaskData:
    """Load an image classification set; every split has the columns ``image``, ``label`` and ``index``.

    A set's own test split is ``test``. A set with a validation split and no test split gives that one as ``test``,
    and ``validation`` is cut from train; with both, both are taken as they are; with neither, ``test`` is None.

    Args:
        dataset: ``"cifar10"``, ``"cifar100"`` (fine labels), ``"svhn"``, ``"digits"`` (scikit-learn's 1,797 real
            8x8 images, a fixed fifth of them as test), or a Hub id. With ``data_dir`` any name.
        data_dir: Folder with ``train*.parquet`` and perhaps ``validation*``, ``test*`` and ``held_out*`` (also in its
            ``data`` or the set's subfolder), or with images as ``train/<class>/*.png``, ``test/<class>/*.png``. A
            split whose images lie in no class folders is unlabelled; such a test split is ``extra["predict"]``.
        validation_fraction: This and the following: see :class:`hfkd.data.splits.SplitOptions`.
        held_out_fraction: Idem.
        labels: Idem.
        label_noise: Idem.
        noise_type: Idem.
        seed: Idem.
        max_train_samples: Idem.
        max_eval_samples: Idem.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If the set is unknown, its columns or labels do not fit, or some images of a split lie in class
            folders and others do not.
        FileNotFoundError: If ``data_dir`` does not exist or holds no images.

    >>> data = load_image_data("digits", labels=100)
    >>> len(data.train), len(data.validation), len(data.test), data.num_labels
    (1294, 144, 359, 10)
    """
    options = SplitOptions(
        validation_fraction=validation_fraction,
        held_out_fraction=held_out_fraction,
        labels=labels,
        label_noise=label_noise,
        noise_type=noise_type,
        seed=seed,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
    )
    if data_dir is not None:
        folder = existing_folder(data_dir)
        splits = _load_folder(folder, dataset)
        if dataset == "digits":
            dataset = folder.resolve().name
    elif dataset == "digits":
        splits = _load_digits()
    elif dataset in HUB_IMAGES:
        splits = load_from_hub(*HUB_IMAGES[dataset], revision)
    elif "/" in dataset:
        splits = load_from_hub(dataset, revision=revision)
    else:
        raise ValueError(
            f"unknown data set {dataset!r}: use {', '.join(HUB_IMAGES)}, digits, a Hub id such as "
            "'uoft-cs/cifar10', or a local folder as data_dir"
        )
    splits = usual_splits(splits)
    train = splits["train"]
    images = [name for name, feature in train.features.items() if isinstance(feature, Image)]
    if len(images) != 1:
        raise ValueError(
            f"{dataset} has {len(images)} image columns among {train.column_names}: keep exactly one; for text use "
            "load_text_data"
        )
    data = make_task_data(dataset, splits, {images[0]: "image"}, options)
    if data.is_regression:
        raise ValueError(
            f"column {find_label_column(train)!r} of {dataset} holds real numbers: image regression is not supported, "
            "number the classes from 0"
        )
    return data


def _load_folder(folder: Path, dataset: str) -> dict[str, Dataset]:
    splits = load_parquet_folder(folder, dataset, HUB_IMAGES.get(dataset, ("", "data"))[1])
    if splits:
        return splits
    try:
        splits = dict(datasets.load_dataset("imagefolder", data_dir=str(folder), drop_labels=True))
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder.resolve()} holds neither train*.parquet nor images: use the Hub's parquet layout or "
            "train/<class>/*.png"
        ) from error
    return _label_by_folder(splits)


def _label_by_folder(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Class folders as labels, which imagefolder drops from all splits where one has none."""
    folders = {}
    for name, split in splits.items():
        if split.column_names != ["image"]:  # it has a metadata file
            continue
        files = split.cast_column("image", Image(decode=False))[:]["image"]
        folders[name] = [PurePath(file["path"].split("::")[0]).parent for file in files]  # of a zip, the path within
        depths = Counter(len(folder.parts) for folder in folders[name])
        if len(depths) > 1:
            usual = depths.most_common(1)[0][0]
            odd = next(i for i, folder in enumerate(folders[name]) if len(folder.parts) != usual)
            raise ValueError(
                f"{files[odd]['path']} is not as deep in its folders as the other images of {name}: move it into a "
                f"class folder like theirs ({name}/<class>/*.png), or all of them out of theirs"
            )

    classes = {name: {folder.name for folder in own} for name, own in folders.items()}
    labelled = [name for name in folders if len(classes[name]) > 1]
    if "train" in labelled:  # another split may have a single one of its classes, in a folder as deep
        depth = len(folders["train"][0].parts)
        labelled = [name for name in folders if name in labelled or len(folders[name][0].parts) == depth]
    names = sorted(set().union(*(classes[name] for name in labelled)))
    number = {label: i for i, label in enumerate(names)}
    for name in labelled:
        labels = [number[folder.name] for folder in folders[name]]
        splits[name] = splits[name].add_column("label", labels, feature=ClassLabel(names=names))
    return splits


def _load_digits() -> dict[str, Dataset]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    whole = Dataset.from_dict({"image": list(grey), "label": labels}, features=features)
    rows = np.arange(len(labels))
    test = stratified_rows(labels, rows, len(labels) // 5, np.random.default_rng(0))
    return {"train": whole.select(np.setdiff1d(rows, test)), "test": whole.select(test)}
