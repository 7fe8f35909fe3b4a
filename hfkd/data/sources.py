"""Where raw splits come from: the Hub, or a local folder in the Hub's parquet layout."""

import re
from pathlib import Path

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from hfkd.hub import explained, remedy_for
from hfkd.models.loading import check_hub_id


# "train-00000-of-00001.parquet", with the hash that older uploads carry, or plain "train.parquet".
_SPLIT_FILE = re.compile(r"(train|validation|valid|val|dev|test|held_out)(_matched|_mismatched)?(?![a-z])")
_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}


def load_from_hub(hub_id: str, config: str | None = None, revision: str | None = None) -> dict[str, Dataset]:
    """All splits of a Hub data set.

    Raises:
        ConnectionError: If the Hub cannot be reached, or has a fault.
        PermissionError: If it does not accept the token.
        FileNotFoundError: If it has no such data set.
        ValueError: If that cannot be a Hub id.
    """
    check_hub_id(hub_id, revision)
    with explained(f"cannot load {hub_id} from the Hub (you may pass its folder as data_dir)"):
        try:
            splits = dict(datasets.load_dataset(hub_id, config, revision=revision))
        except FileNotFoundError as error:
            if remedy_for(error):
                raise
            raise FileNotFoundError(
                f"the Hub has no data set {hub_id} that can be read ({error}): correct its name, log in where it is "
                "private, or pass a local folder as data_dir"
            ) from error
    return {_ALIASES.get(name, name): split for name, split in splits.items()}


def existing_folder(data_dir: str | Path) -> Path:
    """The folder as a Path, ``~`` expanded."""
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder.resolve()}: correct data_dir")
    return folder


def load_parquet_folder(folder: Path, *subfolders: str) -> dict[str, Dataset]:
    """The splits of the first of ``folder``, its ``data`` and ``subfolders`` that has a train file; else none."""
    for place in (folder, folder / "data", *(folder / name for name in subfolders)):
        files: dict[str, list[str]] = {}
        for path in sorted(place.glob("*.parquet")):
            match = _SPLIT_FILE.match(path.name)
            if match:
                split = _ALIASES.get(match[1], match[1]) + (match[2] or "")
                files.setdefault(split, []).append(str(path))
        if "train" in files:
            return {split: load_files("parquet", paths) for split, paths in files.items()}
    return {}


def load_files(kind: str, paths: list[str], **options) -> Dataset:
    """One split from files that ``datasets`` reads as ``kind``; a split a call, as their columns may differ."""
    try:
        return datasets.load_dataset(kind, data_files=paths, split="train", **options)
    except (ValueError, DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"cannot read {', '.join(paths)} ({reason}): check that it has rows and a header") from error


def usual_splits(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Train, validation, test and held-out; a validation split that comes without a test split is the test split.

    Raises:
        ValueError: If there is no train split.
    """
    if "train" not in splits:
        raise ValueError(f"there is no train split, only {', '.join(splits)}: add one")
    usual = {name: splits[name] for name in ("train", "validation", "test", "held_out") if name in splits}
    if "test" not in usual and "validation" in usual:
        usual["test"] = usual.pop("validation")
    return usual
