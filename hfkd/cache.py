"""TeacherCache: what a frozen teacher says about every view of every training sample, asked once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import PretrainedConfig

from hfkd.checks import innermost
from hfkd.data.draws import splitmix
from hfkd.data.image_dataset import ImageDataset
from hfkd.distillers.base import ModelOutputs
from hfkd.features import in_float32
from hfkd.models.loading import stored_tensors
from hfkd.teacher import Teacher, TeacherEnsemble, Teachers, members_of


MANIFEST = "manifest.json"
_FORMAT = 1
_ABSENT = 0  # the checksum of a row that nobody wrote
_CHUNK = 1024
_LOGITS = ""  # a path of no layer
# Of a configuration: what says nothing about the outputs, or changes when a model is saved and loaded.
_BOOKKEEPING = "_name_or_path architectures auto_map dtype id2label label2id problem_type transformers_version".split()


def default_root() -> Path:
    """Where caches are kept: ``HFKD_CACHE``, or ``~/.cache/hfkd``."""
    return Path(os.environ.get("HFKD_CACHE") or "~/.cache/hfkd").expanduser()


class _Rows:
    """Memory-mapped rows of numbers, each with a checksum behind which it is written: a row is whole, or it is absent.

    Whoever is killed between the two, or writes the same row at the same time, leaves a checksum that does not fit;
    so do a damaged disk and a power cut, after which pages are on the disk in any order.

    Args:
        path: The file; its checksums are beside it. Both grow where they are too short, and are never cut.
        rows: How many.
        width: Numbers a row.
        dtype: Of the numbers.
    """

    def __init__(self, path: Path, rows: int, width: int, dtype: str):
        self.values = _mapped(path, (rows, width), np.dtype(dtype))
        self.checksums = _mapped(path.with_name(f"{path.name}.checksums"), (rows,), np.dtype(np.uint32))
        words = width * self.values.itemsize // 2
        self._weights = splitmix(np.arange(words, dtype=np.uint64)) | np.uint64(1)

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of rows, and which of them are whole."""
        values = self.values[positions]
        return values, self.checksums[positions] == self._checksums_of(values, positions)

    def write(self, positions: np.ndarray, values: np.ndarray) -> None:
        self.values[positions] = values
        self.checksums[positions] = self._checksums_of(values, positions)

    def _checksums_of(self, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
        # Not zlib's, which would take a call a row.
        sums = values.view(np.uint16).astype(np.uint64) @ self._weights
        mixed = splitmix(sums ^ splitmix(positions.astype(np.uint64))) >> np.uint64(32)
        return np.maximum(mixed, _ABSENT + 1).astype(np.uint32)


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    path.touch()
    missing = size - path.stat().st_blocks * 512
    if missing > shutil.disk_usage(path.parent).free:  # found out later, it would kill the process
        raise ValueError(
            f"{path} may grow by {missing / 1e9:.1f} GB, and there is less free: lower views, or name a folder on "
            "another disk in teacher_cache="
        )
    if path.stat().st_size < size:
        os.truncate(path, size)  # takes no space until it is written
    return np.asarray(np.memmap(path, dtype, mode="r+", shape=shape))


class TeacherCache:
    """A read-through store of a teacher's answers, itself called with a batch like a teacher.

    Of a batch with the columns ``index`` and ``view`` it reads what it has, and asks the teacher for the rest alone;
    what the teacher says is rounded and kept, so that a sample gets the same answer now and in every later run. A
    batch without ``view``, or in another precision than the cache's, goes to the teacher as it is.

    View 0 is the un-augmented sample; the others are those of :class:`~hfkd.data.ImageDataset`. Rows are ordered by
    view, so that the files of 4 views are the beginning of those of 16. Several processes may read and write one
    cache at once, and be killed at any moment.

    Args:
        teacher: Who is asked.
        index: The ``index`` of every sample, each once.
        identity: What the answers depend on, as JSON: see :func:`describe`.
        folder: Where it is kept; None is a folder of its own under :func:`default_root`, chosen by the identity.
        views: Views besides the un-augmented one.
        classes: Logits a sample.
        features: Layers of the teacher whose outputs are kept too, each a vector a sample, with its length. A cache
            that was filled without asks the teacher again.

    Attributes:
        hits: Samples whose answers were read.
        misses: Samples about which the teacher was asked.

    Raises:
        ValueError: If the folder holds another cache; the message names the difference.
    """

    def __init__(
        self,
        teacher: Teacher | Teachers,
        index: np.ndarray,
        identity: Mapping,
        *,
        classes: int,
        folder: str | Path | None = None,
        views: int = 0,
        features: Mapping[str, int] | None = None,
    ):
        self.teacher, self.views, self.precision = teacher, views, identity["precision"]
        self.index = np.sort(np.asarray(index, dtype=np.int64))
        if (self.index[1:] == self.index[:-1]).any():
            raise ValueError(
                "two training samples have the same number in the column index, by which their answers are kept: "
                "give every sample a number of its own"
            )
        self.identity = json.loads(json.dumps({"format": _FORMAT, **identity}))
        if folder is None:
            folder = default_root() / _digest(json.dumps(self.identity, sort_keys=True).encode())
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = (views + 1) * len(self.index)
        with self._locked():
            self._check_manifest()
            self.logits = _Rows(self.folder / "logits", rows, classes, identity["dtype"])
            self.features = {
                layer: _Rows(self.folder / f"features.{layer.replace(':', '.')}", rows, width, identity["dtype"])
                for layer, width in (features or {}).items()
            }
        self.hits = self.misses = 0

    @property
    def filled(self) -> int:
        """How many rows somebody wrote, of those that this run may ask for."""
        there = [array.checksums != _ABSENT for array in (self.logits, *self.features.values())]
        return int(np.logical_and.reduce(there).sum())

    @property
    def bytes(self) -> int:
        """What it takes on the disk."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())

    def missing(self, view: int) -> np.ndarray:
        """The ``index`` of the samples that have no answer in a view."""
        rows = np.arange(len(self.index)) + view * len(self.index)
        parts = np.split(rows, range(_CHUNK, len(rows), _CHUNK))
        known = [np.logical_and.reduce([array.read(part)[1] for _, array in self._arrays()]) for part in parts]
        return self.index[~np.concatenate(known)]

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> ModelOutputs:
        """The teacher's answers to a batch, without gradient.

        Raises:
            ValueError: If a sample or a view is not one of the cache's, or an answer does not fit its dtype.
        """
        if "view" not in batch or self.teacher.precision != self.precision:
            return self.teacher(batch)
        device = batch["index"].device
        positions = self._positions(*(_on_host(batch, name) for name in ("index", "view")))
        batch = {name: column for name, column in batch.items() if isinstance(column, Tensor)}
        read = {layer: array.read(positions) for layer, array in self._arrays()}
        known = np.logical_and.reduce([whole for _, whole in read.values()])
        missing = np.flatnonzero(~known)
        self.hits += len(known) - len(missing)
        self.misses += len(missing)
        if len(missing):
            if len(missing) < len(known):
                rows = torch.from_numpy(missing).to(device)
                batch = {name: column[rows] for name, column in batch.items()}
            for layer, values in self._ask(batch, positions[missing]).items():
                read[layer][0][missing] = values
        tensors = {
            layer: torch.from_numpy(values).to(device, non_blocking=True) for layer, (values, _) in read.items()
        }
        return ModelOutputs(tensors.pop(_LOGITS), features=tensors)

    def _arrays(self) -> list[tuple[str, _Rows]]:
        return [(_LOGITS, self.logits), *self.features.items()]

    def _positions(self, index: np.ndarray, view: np.ndarray) -> np.ndarray:
        rows = np.searchsorted(self.index, index)
        unknown = self.index[np.minimum(rows, len(self.index) - 1)] != index
        if unknown.any():
            raise ValueError(
                f"the teacher's cache has no sample {index[unknown][:5].tolist()}: train on the data set that the "
                "trainer was made with"
            )
        if view.min() < 0 or view.max() > self.views:
            raise ValueError(f"the teacher's cache has views 0 to {self.views}, and the batch {view.max()}")
        return view.astype(np.int64) * len(self.index) + rows

    def _ask(self, batch: Mapping[str, Tensor], positions: np.ndarray) -> dict[str, np.ndarray]:
        """The teacher's answers as they are kept, after they are."""
        outputs = in_float32(self.teacher(batch))
        kept = {}
        for layer, array in self._arrays():
            answers = (outputs.logits if layer == _LOGITS else outputs.features[layer]).cpu().numpy()
            with np.errstate(over="ignore"):
                kept[layer] = answers.astype(array.values.dtype)
            if (np.isinf(kept[layer]) & np.isfinite(answers)).any():
                raise ValueError(
                    f"of the teacher's {layer or 'logits'} one is {np.abs(answers).max():.3g}, beyond "
                    f'{array.values.dtype}: pass teacher_cache_dtype="float32"'
                )
            array.write(positions, kept[layer])
        return kept

    @property
    def score(self) -> dict[str, float]:
        """The teacher's score as the manifest has it; empty before somebody measured it."""
        return json.loads((self.folder / MANIFEST).read_text()).get("teacher_score", {})

    def note_score(self, score: Mapping[str, float]) -> None:
        """Keep the teacher's score in the manifest."""
        with self._locked():
            self._write_manifest({**json.loads((self.folder / MANIFEST).read_text()), "teacher_score": dict(score)})

    def _locked(self) -> FileLock:
        return FileLock(self.folder / ".lock")

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        remedy = f"name another folder in teacher_cache=, or delete {self.folder}"
        if not path.exists():
            if (self.folder / "logits").exists():
                raise ValueError(f"{self.folder} holds a teacher's answers without {MANIFEST}: {remedy}")
            self._write_manifest(self.identity)
            return
        try:
            there = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {remedy}") from error
        different = [name for name in self.identity if there.get(name) != self.identity[name]]
        if different:
            lines = [f"{name} is {there.get(name)} there and {self.identity[name]} here" for name in different]
            raise ValueError(f"the teacher's cache in {self.folder} is another one: {'; '.join(lines)}. {remedy}")

    def _write_manifest(self, manifest: Mapping) -> None:
        part = self.folder / f"{MANIFEST}.part"
        part.write_text(json.dumps(manifest, indent=1) + "\n")
        part.replace(self.folder / MANIFEST)


def keep_on_host(batch: Mapping[str, Tensor]) -> dict[str, Tensor | np.ndarray]:
    """A batch with copies, which stay where they are, of what a cache knows it by: to read it there is to wait."""
    copies = {f"host_{name}": batch[name].numpy() for name in ("index", "view") if name in batch}
    return {**batch, **copies}


def _on_host(batch: Mapping[str, Tensor | np.ndarray], name: str) -> np.ndarray:
    return batch[f"host_{name}"] if f"host_{name}" in batch else batch[name].cpu().numpy()


def describe(
    teacher: nn.Module,
    dataset: Dataset,
    columns: Sequence[str],
    *,
    precision: str,
    dtype: str,
    label_names: Sequence[str] | None,
    label_orders: Sequence[Sequence[int] | None],
) -> tuple[np.ndarray, dict]:
    """What a teacher's answers depend on, and the ``index`` of the samples.

    Labels are left out: a run with other labels on the same inputs has the same answers.

    Args:
        teacher: A classifier, or a :class:`~hfkd.TeacherEnsemble`.
        dataset: The training set.
        columns: The columns that the teacher reads.
        precision: In which it answers.
        dtype: In which its answers are kept.
        label_names: The student's classes in order, None where they have no names.
        label_orders: For each member the index of each of the student's classes; None where the orders agree.

    Raises:
        ValueError: If the data set gives other inputs each time.
    """
    index, read = _content(dataset, columns)
    order = np.argsort(index, kind="stable")
    inputs = hashlib.blake2b(digest_size=16)
    for start in range(0, len(order), _CHUNK):
        rows = order[start : start + _CHUNK]
        inputs.update(index[rows].tobytes() + read(rows))
    images = innermost(dataset)
    identity = {
        "teacher": [_digest_of_model(member) for member in members_of(teacher)],
        "ensemble": [teacher.average, teacher.temperature] if isinstance(teacher, TeacherEnsemble) else None,
        "inputs": inputs.hexdigest(),
        "preprocessing": images.preprocessing if isinstance(images, ImageDataset) else None,
        "precision": precision,
        "dtype": dtype,
        "classes": None if label_names is None else list(label_names),
        "order of classes": [None if label_order is None else list(label_order) for label_order in label_orders],
    }
    return index, identity


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest_of_model(model: nn.Module) -> str:
    """Of its weights, and of its configuration: two models of the same weights may have other numbers of heads."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    if isinstance(model.config, PretrainedConfig):
        fields = {name: value for name, value in model.config.to_dict().items() if name not in _BOOKKEEPING}
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    is_outline = next(model.parameters()).is_meta
    for name, tensor in stored_tensors(model.name_or_path) if is_outline else sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _content(dataset: Dataset, columns: Sequence[str]) -> tuple[np.ndarray, Callable[[np.ndarray], bytes]]:
    """The ``index`` of a data set, and what gives the inputs in some of its rows as bytes."""
    if isinstance(dataset, Subset):
        index, read = _content(dataset.dataset, columns)
        chosen = np.asarray(dataset.indices)
        return index[chosen], lambda rows: read(chosen[rows])
    if isinstance(dataset, ImageDataset):
        return dataset.index, dataset.raw_bytes
    if isinstance(dataset, datasets.Dataset):
        index = np.asarray(dataset.with_format("numpy")["index"][:])
        inputs = dataset.with_format("arrow", columns=[name for name in dataset.column_names if name in columns])
        return index, lambda rows: b"".join(
            name.encode() + _bytes_of_column(column)
            for table in [inputs[rows]]
            for name, column in zip(table.column_names, table.columns, strict=True)
        )
    return _content_by_sample(dataset, columns)


def _bytes_of_column(column: pyarrow.ChunkedArray) -> bytes:
    array = column.combine_chunks()
    parts = [str(array.type).encode()]
    while isinstance(array, (pyarrow.ListArray, pyarrow.LargeListArray, pyarrow.FixedSizeListArray)):
        parts.append(array.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    parts.append(json.dumps(values.tolist(), default=str).encode() if values.dtype == object else values.tobytes())
    return b"".join(parts)


def _content_by_sample(dataset: Dataset, columns: Sequence[str]) -> tuple[np.ndarray, Callable[[np.ndarray], bytes]]:
    def digest(sample: Mapping) -> bytes:
        parts = []
        for name in sorted(set(sample) & set(columns)):
            array = np.asarray(sample[name])
            parts += [f"{name} {array.dtype} {array.shape}".encode(), array.tobytes()]
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()

    samples = [(int(sample["index"]), digest(sample)) for sample in map(dataset.__getitem__, range(len(dataset)))]
    if any(digest(dataset[row]) != samples[row][1] for row in range(min(64, len(dataset)))):
        raise ValueError(
            "the training set gives other inputs each time, and a teacher's cache can only hold views that have a "
            "number: use hfkd.data.ImageDataset(..., views=V), or leave out teacher_cache"
        )
    return np.array([number for number, _ in samples]), lambda rows: b"".join(samples[row][1] for row in rows)
