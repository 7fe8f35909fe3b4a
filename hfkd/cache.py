"""TeacherCache: what a frozen teacher says about every view of every training sample, asked once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import datasets
import numpy as np
import pyarrow
import torch
from filelock import FileLock
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers import PretrainedConfig

from hfkd.checkpoints import check_writable
from hfkd.checks import innermost, set_epoch
from hfkd.data.decoded import default_root
from hfkd.data.draws import splitmix
from hfkd.data.image_dataset import ImageDataset
from hfkd.distillers.base import ModelOutputs
from hfkd.features import in_float32, is_outline
from hfkd.models.loading import BATCH_COUNT, stored_tensors
from hfkd.teacher import DeferredTeacher, Teacher, TeacherEnsemble, Teachers, members_of


MANIFEST = "manifest.json"
_FORMAT = 1
_ABSENT = 0  # the checksum of a row that nobody wrote
_CHUNK = 1024
_LARGEST_MANIFEST = 2**26  # bytes: the names of a million classes
_LOGITS = ""  # a path of no layer
# Of a configuration: what says nothing about the outputs, or changes when a model is saved and loaded.
_BOOKKEEPING = "_name_or_path architectures auto_map dtype id2label label2id problem_type transformers_version".split()


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

    def __init__(self, path: Path, rows: int, width: int, dtype: str | np.dtype):
        self.paths = path, path.with_name(f"{path.name}.checksums")
        self.values = _mapped(self.paths[0], (rows, width), np.dtype(dtype))
        self.checksums = _mapped(self.paths[1], (rows,), np.dtype(np.uint32))
        words = width * self.values.itemsize // 2
        self._weights = splitmix(np.arange(words, dtype=np.uint64)) | np.uint64(1)

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of rows, and which of them are whole."""
        values = self.values[positions]
        return values, self.checksums[positions] == self._checksums_of(values, positions)

    def write(self, positions: np.ndarray, values: np.ndarray) -> None:
        # Not by way of the map, where a disk that is full kills the process.
        values = np.ascontiguousarray(values, self.values.dtype)
        starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)  # of rows that lie one behind the other
        for path, rows in zip(self.paths, (values, self._checksums_of(values, positions)), strict=True):
            with path.open("r+b", buffering=0) as file:
                for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
                    _write(file, rows[start:end].tobytes(), int(positions[start]) * rows[0].nbytes)

    def _checksums_of(self, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
        # Not zlib's, which would take a call a row.
        sums = values.view(np.uint16).astype(np.uint64) @ self._weights
        mixed = splitmix(sums ^ splitmix(positions.astype(np.uint64))) >> np.uint64(32)
        return np.maximum(mixed, _ABSENT + 1).astype(np.uint32)


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    with _opened(path, os.O_RDWR | os.O_CREAT) as file:
        return _mapped_file(file, path, shape, dtype, size)


def _mapped_file(file: BinaryIO, path: Path, shape: tuple[int, ...], dtype: np.dtype, size: int) -> np.ndarray:
    there = os.fstat(file.fileno())
    missing = size - there.st_blocks * 512
    if missing > shutil.disk_usage(path.parent).free:  # found out later, it would kill the process
        raise ValueError(
            f"{path} may grow by {missing / 1e9:.1f} GB, and there is less free: lower views, or name a folder on "
            "another disk in teacher_cache="
        )
    if there.st_size < size:
        file.truncate(size)  # takes no space until it is written
    return np.asarray(np.memmap(file, dtype, mode="r+", shape=shape))


def _opened(path: Path, flags: int) -> BinaryIO:
    """A file of the cache, which others may write to: no link to a file elsewhere, and no pipe to wait at.

    Raises:
        ValueError: If it is one.
    """
    wrong = f"{path} is a link, a folder or a device, and a cache has plain files: delete {path.parent}"
    if path.is_symlink():
        raise ValueError(wrong)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    except IsADirectoryError as error:
        raise ValueError(wrong) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(wrong)
    return os.fdopen(descriptor, "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "r+b")


def _write(file: FileIO, content: bytes, offset: int) -> None:
    try:
        written = os.pwrite(file.fileno(), content, offset)
        if written < len(content):  # the disk's last bytes: the next attempt says why
            written += os.pwrite(file.fileno(), content[written:], offset + written)
        reason = None if written == len(content) else "only a part went in"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise OSError(
            f"cannot write to {file.name} ({reason}): make room and start again, what is there is whole, or name a "
            "folder on another disk in teacher_cache="
        )


class _Top:
    """Of a row of logits the k largest and what the others come to: written so, and made logits of again.

    Args:
        k: How many are kept.
        classes: Logits a sample.
        dtype: In which they are kept; beside them the number of their class in 2 bytes (beyond 65,536 classes in 4),
            and the logarithm of the sum of the others' exponentials in float32.
    """

    def __init__(self, k: int, classes: int, dtype: str):
        if not 1 <= k < classes:
            raise ValueError(
                f"teacher_cache_top_k must lie between 1 and {classes - 1}, as the teacher has {classes} classes, got "
                f"{k}: leave it out to keep all logits"
            )
        self.k, self.classes = k, classes
        numbers = np.min_scalar_type(max(classes - 1, 256))
        self.fields = np.dtype([("largest", dtype, (k,)), ("classes", numbers, (k,)), ("others", np.float32)])

    def pack(self, logits: Tensor) -> np.ndarray:
        largest, classes = logits.topk(self.k)
        packed = np.empty((len(logits), 1), self.fields)
        packed["largest"][:, 0] = _rounded(largest.numpy(), self.fields["largest"].base, "logits")
        packed["classes"][:, 0] = classes.numpy()
        packed["others"] = logits.scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True).numpy()
        return packed

    def fits(self, packed: np.ndarray) -> np.ndarray:
        """Which rows name classes that there are: a checksum keeps off damage, not whoever computes one."""
        return (packed["classes"] < self.classes).all((1, 2))

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        logits = np.repeat(packed["others"] - math.log(self.classes - self.k), self.classes, axis=1)
        classes = packed["classes"][:, 0].astype(np.int64)
        np.put_along_axis(logits, classes, packed["largest"][:, 0].astype(np.float32), axis=1)
        return logits


def _rounded(answers: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = answers.astype(dtype)
    if (np.isinf(rounded) & np.isfinite(answers)).any():
        raise ValueError(
            f"of the teacher's {what} one is {np.abs(answers).max():.3g}, beyond {dtype}: pass "
            'teacher_cache_dtype="float32"'
        )
    return rounded


class TeacherCache:
    r"""A read-through store of a teacher's answers, itself called with a batch like a teacher.

    Of a batch with the columns ``index`` and ``view`` it reads what it has, and asks the teacher for the rest alone;
    what the teacher says is rounded and kept, so that a sample gets the same answer now and in every later run. A
    batch without ``view``, or in another precision than the cache's, goes to the teacher as it is.

    View 0 is the un-augmented sample; the others are those of :class:`~hfkd.data.ImageDataset`. Rows are ordered by
    view, so that the files of 4 views are the beginning of those of 16. Several processes may read and write one
    cache at once, and be killed at any moment.

    For many classes an identity with ``top_k`` keeps the k largest logits of a row alone, and gives every other class
    the same logit

    .. math:: m = \log \frac{1}{C - k} \sum_{j \notin \mathrm{top}\, k} e^{z_j}

    So at temperature 1 the k probabilities are the teacher's, and the others have their mass in equal parts. The
    ratios of the k are right at any temperature. But for T > 1 (KD, DKD; TTM and WTTM at γ = 1/T) the others get more
    than the teacher gives them, and the k lose a common factor, since :math:`(C - k)\, e^{m/T} \ge \sum_j e^{z_j/T}`,
    equal where their logits are; for T < 1 less. WTTM's weight errs upwards by the same difference. Who is who among
    the others, which NKD and DIST also compare, and whether a label outside the k is likelier than the next class,
    is lost: all of it is what a larger k buys.

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
        asking_seconds: What the teacher took for them, from the question to the answers in the host's memory; on a
            GPU with the work that was waiting there.
        store_seconds: What reading and writing took.

    Raises:
        ValueError: If the folder holds another cache; the message names the difference. If ``top_k`` is not below the
            number of classes.
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
        self.teacher, self.views, self.classes, self.precision = teacher, views, classes, identity["precision"]
        self.index = np.sort(np.asarray(index, dtype=np.int64))
        if (self.index[1:] == self.index[:-1]).any():
            raise ValueError(
                "two training samples have the same number in the column index, by which their answers are kept: "
                "give every sample a number of its own"
            )
        self.identity = json.loads(json.dumps({"format": _FORMAT, **identity}))
        if folder is None:
            folder = default_root() / _digest(json.dumps(self.identity, sort_keys=True).encode())
        self.top = _Top(identity["top_k"], classes, identity["dtype"]) if identity.get("top_k") is not None else None
        self.folder = Path(folder).expanduser()
        check_writable(self.folder, "name another folder in teacher_cache=, or make room there")
        rows = (views + 1) * len(self.index)
        with self._locked():
            self._check_manifest()
            width, dtype = (classes, identity["dtype"]) if self.top is None else (1, self.top.fields)
            self.logits = _Rows(self.folder / "logits", rows, width, dtype)
            self.features = {
                layer: _Rows(self.folder / f"features.{quote(layer, safe='')}", rows, width, identity["dtype"])
                for layer, width in (features or {}).items()
            }
        self.hits = self.misses = 0
        self.asking_seconds = self.store_seconds = 0.0

    @property
    def filled(self) -> int:
        """How many rows somebody wrote, of those that this run may ask for."""
        there = [array.checksums != _ABSENT for array in (self.logits, *self.features.values())]
        return int(np.logical_and.reduce(there).sum())

    @property
    def bytes(self) -> int:
        """What it takes on the disk."""
        total = 0
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a manifest.json.part that another run has just renamed
                total += path.stat().st_blocks * 512
        return total

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
        start = time.perf_counter()
        read = {layer: array.read(positions) for layer, array in self._arrays()}
        self.store_seconds += time.perf_counter() - start
        known = np.logical_and.reduce([whole for _, whole in read.values()])
        if self.top is not None:
            known &= self.top.fits(read[_LOGITS][0])
        missing = np.flatnonzero(~known)
        self.hits += len(known) - len(missing)
        self.misses += len(missing)
        if len(missing):
            if len(missing) < len(known):
                rows = torch.from_numpy(missing).to(device)
                batch = {name: column[rows] for name, column in batch.items()}
            for layer, values in self._ask(batch, positions[missing]).items():
                read[layer][0][missing] = values
        arrays = {layer: values for layer, (values, _) in read.items()}
        if self.top is not None:
            start = time.perf_counter()
            arrays[_LOGITS] = self.top.unpack(arrays[_LOGITS])
            self.store_seconds += time.perf_counter() - start
        tensors = {layer: torch.from_numpy(values).to(device, non_blocking=True) for layer, values in arrays.items()}
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
        if isinstance(self.teacher, DeferredTeacher):
            self.teacher.materialize()  # which is no part of what an answer takes
        start = time.perf_counter()
        outputs = in_float32(self.teacher(batch))
        answers = {
            layer: (outputs.logits if layer == _LOGITS else outputs.features[layer]).cpu()
            for layer, _ in self._arrays()
        }
        for layer, values in answers.items():
            wrong = ~values.isfinite().flatten(1).all(1)
            if wrong.any():
                some = batch["index"].cpu()[wrong][:8].tolist()
                raise FloatingPointError(
                    f"the teacher's {repr(layer) if layer else 'logits'}: NaN or infinite for {int(wrong.sum())} of "
                    f"{len(wrong)} samples (index {', '.join(map(str, some))}); none of them is kept. Look at these "
                    'samples and at the teacher (in half precision: teacher_dtype="float32")'
                )
        answered = time.perf_counter()
        self.asking_seconds += answered - start
        kept = {}
        for layer, array in self._arrays():
            if layer == _LOGITS and self.top is not None:
                kept[layer] = self.top.pack(answers[layer])
            else:
                kept[layer] = _rounded(answers[layer].numpy(), array.values.dtype, layer or "logits")
            array.write(positions, kept[layer])
        self.store_seconds += time.perf_counter() - answered
        return kept

    def note_score(self, score: Mapping[str, float]) -> None:
        """Keep the teacher's score in the manifest."""
        with self._locked():
            self._write_manifest({**self._manifest(), "teacher_score": dict(score)})

    def note_asked(self, answers: int, seconds: float) -> None:
        """Add to the manifest how many answers somebody asked for, and what the teacher took for them."""
        with self._locked():
            manifest = self._manifest()
            so_far = _asked(manifest) or {"answers": 0, "seconds": 0.0}
            asked = {"answers": so_far["answers"] + answers, "seconds": so_far["seconds"] + seconds}
            self._write_manifest({**manifest, "asked": asked})

    def figures(self, hits: int, misses: int, asking_seconds: float, store_seconds: float) -> dict[str, float]:
        r"""What a run's use of the cache took, and what it saved.

        With s seconds an answer, on average over all runs that asked (the manifest has it), r seconds of reading and
        writing a sample in this run, F rows filled so far and N samples, breaking even takes

        .. math:: \frac{F s}{N (s - r)}

        epochs: so many would have cost as much by asking about every sample in every one. No figure is an estimate of
        the student's step, nor of what other runs will read.

        Args:
            hits: Of the run, in all its processes, like all that follow: see the attributes.
            misses: Likewise.
            asking_seconds: Likewise.
            store_seconds: Likewise.

        Returns:
            The arguments and ``bytes``; where anybody was ever asked ``seconds_per_answer``, ``fill_seconds`` (F s)
            and ``saved_seconds`` (hits times s, less ``store_seconds``); ``break_even_epochs`` where s > r.
        """
        figures = {
            "hits": hits,
            "misses": misses,
            "asking_seconds": asking_seconds,
            "store_seconds": store_seconds,
            "bytes": self.bytes,
        }
        asked = _asked(self._manifest())
        if asked is None:
            return figures
        per_answer = asked["seconds"] / asked["answers"]
        figures["seconds_per_answer"] = per_answer
        figures["fill_seconds"] = per_answer * self.filled
        figures["saved_seconds"] = hits * per_answer - store_seconds
        gain = per_answer - store_seconds / (hits + misses) if hits + misses else 0.0
        if gain > 0:
            figures["break_even_epochs"] = figures["fill_seconds"] / (len(self.index) * gain)
        return figures

    def evaluation(self, dataset: Dataset, columns: Sequence[str]) -> _Rows | None:
        """Where the teacher's answers to another data set are kept, whole and in float32, in the set's order.

        None where the set does not give the same inputs each time, or hides how it makes them.
        """
        inner = innermost(dataset)
        is_transformed = isinstance(inner, datasets.Dataset) and inner.format["type"] == "custom"
        is_augmented = getattr(inner, "is_augmented", False) or getattr(inner, "number_of_views", None) is not None
        if isinstance(dataset, IterableDataset) or is_transformed or is_augmented:
            return None
        try:
            index, read = _content(dataset, columns)
        except ValueError:
            return None
        inputs = hashlib.blake2b(digest_size=16)
        for start in range(0, len(index), _CHUNK):
            inputs.update(read(np.arange(start, min(start + _CHUNK, len(index)))))
        inputs.update(json.dumps(_preprocessing(dataset)).encode())
        with self._locked():
            path = self.folder / f"evaluation.{inputs.hexdigest()}"
            return _Rows(path, len(index), self.classes, "float32")

    def _locked(self) -> FileLock:
        return FileLock(self.folder / ".lock")

    def _manifest(self) -> dict:
        path = self.folder / MANIFEST
        with _opened(path, os.O_RDONLY) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size) if size <= _LARGEST_MANIFEST else b""
        try:
            manifest = json.loads(content.decode("utf-8"))
            if not isinstance(manifest, dict):
                raise ValueError("no table")
        except (ValueError, RecursionError) as error:  # the latter: nested too deeply
            raise ValueError(f"{path} is damaged: {self._remedy}") from error
        return manifest

    @property
    def _remedy(self) -> str:
        return f"name another folder in teacher_cache=, or delete {self.folder}"

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not os.path.lexists(path):
            if (self.folder / "logits").exists():
                raise ValueError(f"{self.folder} holds a teacher's answers without {MANIFEST}: {self._remedy}")
            self._write_manifest(self.identity)
            return
        there = self._manifest()
        different = [name for name in self.identity if there.get(name) != self.identity[name]]
        if different:
            lines = [f"{name} is {_short(there.get(name))} there and {self.identity[name]} here" for name in different]
            raise ValueError(
                f"the teacher's cache in {self.folder} is another one: {'; '.join(lines)}. {self._remedy}"
            )

    def _write_manifest(self, manifest: Mapping) -> None:
        part = self.folder / f"{MANIFEST}.part"
        with _opened(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
            file.write((json.dumps(manifest, indent=1) + "\n").encode())
        part.replace(self.folder / MANIFEST)


def keep_on_host(batch: Mapping[str, Tensor]) -> dict[str, Tensor | np.ndarray]:
    """A batch with copies, which stay where they are, of what a cache knows it by: to read it there is to wait."""
    # Not views: a loader's worker moves its tensors into shared memory, and their own is freed.
    copies = {f"host_{name}": batch[name].numpy().copy() for name in ("index", "view") if name in batch}
    return {**batch, **copies}


def _on_host(batch: Mapping[str, Tensor | np.ndarray], name: str) -> np.ndarray:
    return batch[f"host_{name}"] if f"host_{name}" in batch else batch[name].cpu().numpy()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def _asked(manifest: Mapping) -> dict[str, float] | None:
    """How many answers a manifest says were asked for, and the seconds; None where it says no such thing."""
    asked = manifest.get("asked")
    figures = [asked.get(name) for name in ("answers", "seconds")] if isinstance(asked, dict) else [None]
    if not all(type(figure) in (int, float) and 0 <= figure < 1e15 for figure in figures) or not figures[0]:
        return None
    return {"answers": figures[0], "seconds": figures[1]}


def describe(
    teacher: nn.Module,
    dataset: Dataset,
    columns: Sequence[str],
    *,
    precision: str,
    dtype: str,
    top_k: int | None = None,
    label_names: Sequence[str] | None,
    label_orders: Sequence[Sequence[int] | None],
    collated: Sequence[Tensor] = (),
) -> tuple[np.ndarray, dict]:
    """What a teacher's answers depend on, and the ``index`` of the samples.

    Labels are left out: a run with other labels on the same inputs has the same answers.

    Args:
        teacher: A classifier, or a :class:`~hfkd.TeacherEnsemble`.
        dataset: The training set.
        columns: The columns that the teacher reads.
        precision: In which it answers.
        dtype: In which its answers are kept.
        top_k: How many logits of a sample are kept; None is all.
        label_names: The student's classes in order, None where they have no names.
        label_orders: For each member the index of each of the student's classes; None where the orders agree.
        collated: What the teacher reads of a few samples, where a collator of one's own makes it of their columns.

    Raises:
        ValueError: If the data set gives other inputs each time.
    """
    index, read = _content(dataset, columns)
    order = np.argsort(index, kind="stable")
    inputs = hashlib.blake2b(digest_size=16)
    for start in range(0, len(order), _CHUNK):
        rows = order[start : start + _CHUNK]
        inputs.update(index[rows].tobytes() + read(rows))
    preprocessing = _preprocessing(dataset)
    if collated:
        probe = _digest(b"".join(part for tensor in collated for part in _raw(tensor)))
        preprocessing = {**(preprocessing or {}), "collator": probe}
    identity = {
        "teacher": [_digest_of_model(member) for member in members_of(teacher)],
        "ensemble": [teacher.average, teacher.temperature] if isinstance(teacher, TeacherEnsemble) else None,
        "inputs": inputs.hexdigest(),
        "preprocessing": preprocessing,
        "precision": precision,
        "dtype": dtype,
        "top_k": top_k,
        "classes": None if label_names is None else list(label_names),
        "order of classes": [None if label_order is None else list(label_order) for label_order in label_orders],
    }
    return index, identity


def _preprocessing(dataset: Dataset) -> dict | None:
    images = innermost(dataset)
    return images.preprocessing if isinstance(images, ImageDataset) else None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest_of_model(model: nn.Module) -> str:
    """Of its weights, and of its configuration: two models of the same weights may have other numbers of heads."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    if isinstance(model.config, PretrainedConfig):
        fields = {name: value for name, value in model.config.to_dict().items() if name not in _BOOKKEEPING}
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    tensors = stored_tensors(model.name_or_path) if is_outline(model) else sorted(model.state_dict().items())
    for name, tensor in tensors:
        if name.endswith(BATCH_COUNT):
            continue
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ValueError(
                "a teacher's cache cannot tell a teacher whose weights are offloaded from another: pass the teacher "
                "by its folder, load it whole, or leave out teacher_cache"
            )
        digest.update(f"{name} ".encode())
        for part in _raw(tensor):
            digest.update(part)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapters = module.active_adapters, module.disable_adapters, module.merged_adapters
            digest.update(f"{name} {adapters} {getattr(module, 'scaling', None)}".encode())
    return digest.hexdigest()


def _raw(value: Any) -> Iterator[bytes]:
    """What a state holds under a name, as bytes: a tensor, or the parts of a quantised one."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _raw(part)
    elif not isinstance(value, Tensor):
        yield repr(value).encode()
    elif is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _raw(getattr(value, name))
    else:
        value = value.dequantize() if value.is_quantized else value
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _content(dataset: Dataset, columns: Sequence[str]) -> tuple[np.ndarray, Callable[[np.ndarray], bytes]]:
    """The ``index`` of a data set (0, 1, … without one), and what gives the inputs in some of its rows as bytes."""
    if isinstance(dataset, Subset):
        index, read = _content(dataset.dataset, columns)
        chosen = np.asarray(dataset.indices)
        return index[chosen], lambda rows: read(chosen[rows])
    if isinstance(dataset, ImageDataset):
        return dataset.index, dataset.raw_bytes
    if isinstance(dataset, datasets.Dataset):
        has_index = "index" in dataset.column_names
        index = np.asarray(dataset.with_format("numpy")["index"][:]) if has_index else np.arange(len(dataset))
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

    numbered = ((row, dataset[row]) for row in range(len(dataset)))
    samples = [(int(sample.get("index", row)), digest(sample)) for row, sample in numbered]
    changes = False
    for epoch in (1, 0):  # training begins with the latter
        set_epoch(dataset, epoch)
        changes |= any(digest(dataset[row]) != samples[row][1] for row in range(min(64, len(dataset))))
    if changes:
        raise ValueError(
            "the training set gives other inputs each time, and a teacher's cache can only hold views that have a "
            "number: use one hfkd.data.ImageDataset(..., views=V), or leave out teacher_cache"
        )
    return np.array([number for number, _ in samples]), lambda rows: b"".join(samples[row][1] for row in rows)
