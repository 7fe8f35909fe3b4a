"""Images as finished batches: decoded once where they are small, augmented and normalised a batch at a time."""

import copy
import hashlib
import os

import datasets
import numpy as np
import PIL.Image
import torch
from timm.data import Mixup, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_pil_image
from tqdm.auto import tqdm
from transformers import BaseImageProcessor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hfkd.data.decoded import kept_pixels
from hfkd.data.draws import batch_draw, kept_global_state, sample_draws, seed_global, splitmix
from hfkd.data.task_data import TEACHER_COLUMNS, UNLABELLED


AUGMENTATIONS = (None, "flip", "crop", "crop_flip")
# Beyond this, decoded images of a whole set no longer fit a usual memory.
_SMALL = 64
_MANY = 5000  # whose decoding one notices
DEFAULT_VIEWS = 16
_RESAMPLING = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
_GREY_MODES = ("1", "L")
_GREY_WEIGHTS = (0.299, 0.587, 0.114)
_LARGEST_ON_DEVICE = 2**30  # bytes; CIFAR's 50,000 images are 2**27.2


class ImageDataset(Dataset):
    """A split of ``load_image_data`` as finished batches of tensors.

    ``__getitems__`` (which torch's loader calls with a batch's rows) returns ``pixel_values`` (B, C, H, W) float32,
    ``labels`` (B,) int64, ``index`` (B,) int64, and ``teacher_pixel_values`` if the teacher's processor gives anything
    else than the student's. Use it with :class:`hfkd.data.DistillationCollator`, which lets batches pass.

    Images of one size, at most 64 x 64, are decoded once into a uint8 array and cropped (after zero padding by an
    eighth of their size: 4 pixels at 32), flipped and normalised without any Python per sample. Others are decoded in
    ``__getitems__``, so in the loader's workers; there ``"crop"`` is a random resized crop, and without it the
    processors resize as in evaluation. Teacher and student always see the same crop.

    Every draw is a pure function of (seed, epoch, index), so it does not depend on the batch, the order, the number
    of workers or of processes; Mixup's is one of (seed, epoch, the batch's indices). Global generators are left alone.

    With ``views=V`` the augmentation of a sample is drawn, epoch by epoch, from V that are fixed, so that a teacher's
    cache can hold its answers to all of them; the column ``view`` says which, from 1 to V, and is 0 for the
    un-augmented sample. Crop and flip of small images have a finite number of outcomes (162 at 32 x 32): the V are
    drawn from them without repetition, and as many as there are lose nothing. Of any other augmentation they are the
    outcomes of V fixed draws. The V of a sample do not depend on ``seed``, which chooses among them, and are the first
    of those for any greater V.

    Batches are channels last. :meth:`to` keeps small images on an accelerator, where they are then cropped, flipped
    and normalised, with the same result; the trainer does it where that is possible and the loader has no workers.

    Args:
        split: With the columns ``image``, ``label`` and ``index``, and perhaps a teacher's answers as
            ``teacher_logits`` or ``teacher_probabilities``, which are handed on.
        processor: The student's.
        teacher_processor: The teacher's; None if it is the same.
        augment: ``"flip"``, ``"crop"``, ``"crop_flip"``, or None for evaluation.
        rand_augment: RandAugment in timm's notation, such as ``"rand-m9-mstd0.5"``, after crop and flip.
        mixup_alpha: Mixup on the batch, by timm, if above 0; ``labels`` become (B, num_labels) float32.
        cutmix_alpha: CutMix, likewise; with both, each batch gets one or the other.
        num_labels: Number of classes; needed for Mixup and CutMix.
        seed: Of the draws: a run's ``data_seed``.
        views: V, how many different augmentations of a sample there are; None is as many as there are epochs, and 16
            with a teacher's cache.

    Raises:
        ValueError: If the split, the augmentation or the labels do not fit.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        processor: BaseImageProcessor,
        *,
        teacher_processor: BaseImageProcessor | None = None,
        augment: str | None = None,
        rand_augment: str | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        num_labels: int | None = None,
        seed: int = 0,
        views: int | None = None,
    ):
        if augment not in AUGMENTATIONS:
            raise ValueError(f"unknown augment {augment!r}: use one of {', '.join(map(str, AUGMENTATIONS))}")
        lacking = {"image", "label", "index"} - set(split.column_names)
        if lacking:
            raise ValueError(f"the split lacks {sorted(lacking)}: make it with load_image_data")
        if not len(split):
            raise ValueError("the split is empty: it was cut with validation_fraction=0, or a filter left no row")
        self.split = split.select_columns("image")
        self._encoded = self.split.cast_column("image", datasets.Image(decode=False))
        columns = split.select_columns(["label", "index"])[:]
        self.labels, self.index = (np.array(columns[name], dtype=np.int64) for name in ("label", "index"))
        answers = [name for name in TEACHER_COLUMNS if name in split.column_names]
        self.answers = {name: np.array(split[name][:], dtype=np.float32) for name in answers}
        if num_labels is not None:
            known = self.labels[self.labels != UNLABELLED]
            if len(known) and not 0 <= known.min() <= known.max() < num_labels:
                raise ValueError(f"labels {known.min()}..{known.max()} do not fit num_labels={num_labels}: raise it")
        feature = split.features["label"]
        self.label_names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.augment, self.seed = augment, seed
        self.mixup = self._make_mixup(mixup_alpha, cutmix_alpha, num_labels)
        # In shared memory: workers that outlive an epoch must see it change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

        first = self._decode(0)
        self.pixels = self._decode_small(first.size)
        self._on_device: Tensor | None = None  # the pixels in (N, H, W, C)
        if self.pixels is None and self.mixup is not None and augment not in ("crop", "crop_flip"):
            raise ValueError("Mixup needs images of one size and these differ or are large: use augment='crop_flip'")
        self.views = {"pixel_values": _View(processor, first.height, first.width)}
        if teacher_processor is not None:
            teacher = _View(teacher_processor, first.height, first.width)
            if not teacher.agrees_with(self.views["pixel_values"]):
                self.views["teacher_pixel_values"] = teacher
        if self.pixels is None and augment in ("crop", "crop_flip"):
            for view in self.views.values():
                view.check_colours()
        # The larger of both views; the smaller one is resized from the same crop.
        size = max((view.size for view in self.views.values()), key=min)
        self.resized_crop = RandomResizedCropAndInterpolation(size, interpolation="bilinear")
        self.rand_augment = None
        if rand_augment is not None:
            self.rand_augment = self._make_rand_augment(rand_augment, size if self.pixels is None else (first.height,))
        self._rand_augment_spec = rand_augment
        self.number_of_views, self._shown_view = views, None
        if views is not None:
            self._check_views(views)

    def suits(self, teacher_processor: BaseImageProcessor) -> bool:
        """Whether what the teacher gets here, images of its own or the student's, is what this processor makes."""
        first = self._decode(0)
        seen = self.views.get("teacher_pixel_values", self.views["pixel_values"])
        return _View(teacher_processor, first.height, first.width).agrees_with(seen)

    def _check_views(self, views: int) -> None:
        if not self.is_augmented:
            raise ValueError(f"views={views} needs an augmentation to draw from: set augment, or leave views out")
        if self.mixup is not None:
            raise ValueError("Mixup and CutMix mix samples, so that a sample has no views: leave views out")
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}: leave it out for a new view in every epoch")
        if self.outcomes is not None and views > self.outcomes:
            raise ValueError(
                f"augment={self.augment!r} has {self.outcomes} outcomes at this size, got views={views}: lower it"
            )

    def _make_mixup(self, mixup_alpha: float, cutmix_alpha: float, num_labels: int | None) -> Mixup | None:
        if mixup_alpha < 0 or cutmix_alpha < 0:
            raise ValueError(f"mixup_alpha and cutmix_alpha must not be negative, got {mixup_alpha}, {cutmix_alpha}")
        if not mixup_alpha and not cutmix_alpha:
            return None
        if num_labels is None:
            raise ValueError("Mixup and CutMix mix one-hot labels: pass num_labels")
        if (self.labels == UNLABELLED).any():
            raise ValueError(
                f"{(self.labels == UNLABELLED).sum()} samples have no label to mix: set mixup_alpha and cutmix_alpha "
                "to 0, or train on the labelled samples alone"
            )
        return Mixup(mixup_alpha, cutmix_alpha, label_smoothing=0.0, num_classes=num_labels)

    def _make_rand_augment(self, spec: str, size: tuple[int, ...]):
        fill = self.views["pixel_values"].mean_colour
        try:
            return rand_augment_transform(spec, {"translate_const": int(min(size) * 0.45), "img_mean": fill})
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"timm cannot read rand_augment={spec!r}: use its notation, such as 'rand-m9-mstd0.5'"
            ) from error

    @property
    def column_names(self) -> list[str]:
        """What a batch holds."""
        return [*self.views, "labels", "index", *self.answers, *([] if self.number_of_views is None else ["view"])]

    @property
    def is_augmented(self) -> bool:
        """Whether a sample differs from epoch to epoch."""
        return self._shown_view is None and any((self.augment, self.rand_augment, self.mixup))

    def with_numbered_views(self) -> "ImageDataset":
        """Where augmentation is endless, the same samples in 16 views each, or in all that there are; else itself.

        A teacher's cache needs numbered views; 16 is what docs/benchmarks.md found. Decoded images are shared.
        """
        if not self.is_augmented or self.number_of_views is not None or self.mixup is not None:
            return self
        numbered = copy.copy(self)
        numbered.number_of_views = min(DEFAULT_VIEWS, self.outcomes or DEFAULT_VIEWS)
        numbered._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        return numbered

    @property
    def outcomes(self) -> int | None:
        """How many different images crop and flip can make of a small one; None where nobody can count."""
        if self.pixels is None or self.rand_augment is not None or self.mixup is not None:
            return None
        pad = max(self.pixels.shape[-2:]) // 8
        crops = (2 * pad + 1) ** 2 if self.augment in ("crop", "crop_flip") else 1
        return crops * (2 if self.augment in ("flip", "crop_flip") else 1)

    @property
    def preprocessing(self) -> dict[str, str | None]:
        """What decides, besides the images, what the teacher sees of a view."""
        seen = self.views.get("teacher_pixel_values", self.views["pixel_values"]).probe
        crop = self.resized_crop.size if self.pixels is None else None
        names = {"augment": self.augment, "rand_augment": self._rand_augment_spec, "crop": crop}
        if self._rand_augment_spec is not None:
            names["fill"] = self.views["pixel_values"].mean_colour  # the student's, in the teacher's images too
        probe = (seen * 1000).round().to(torch.int32).numpy()
        return {
            **{name: None if value is None else str(value) for name, value in names.items()},
            "processor": hashlib.blake2b(f"{probe.shape}".encode() + probe.tobytes(), digest_size=8).hexdigest(),
        }

    def raw_bytes(self, rows: np.ndarray) -> bytes:
        """The images of some rows before any processing; of a large one in a file its path, size and change time."""
        if self.pixels is not None:
            return self.pixels[rows].tobytes()
        parts = [self._mode]
        for value in self._encoded[rows]["image"]:
            content, path = value["bytes"], value["path"]
            if content is None:
                file = os.stat(path.split("::")[-1])  # of an image in a zip, the zip
                content = f"{path} {file.st_size} {file.st_mtime_ns}".encode()
            parts.append(content)
        return b"".join(parts)

    @property
    def soft_labels(self) -> bool:
        """Whether labels are class probabilities: after Mixup and CutMix."""
        return self.mixup is not None

    @property
    def can_move(self) -> bool:
        """Whether :meth:`to` can give the very same batches: small images that are not resized, no RandAugment."""
        if self.pixels is None or self.rand_augment is not None or self.pixels.nbytes > _LARGEST_ON_DEVICE:
            return False
        return all(view.resampling and view.size == self.pixels.shape[-2:] for view in self.views.values())

    def to(self, device: torch.device | str) -> "ImageDataset":
        """Keep the images on a device and augment them there: batches then have their pixels on it.

        Not with workers, nor with a loader that pins memory.

        Raises:
            ValueError: If the images are large, resized, augmented by RandAugment, or more than 1 GiB.
        """
        if not self.can_move:
            raise ValueError(
                "only images that are decoded once, take at most 1 GiB, are not resized and go without RandAugment "
                "can be augmented on a device: leave them where they are"
            )
        self._on_device = torch.from_numpy(self.pixels).permute(0, 2, 3, 1).contiguous().to(device)
        self.views = {name: view.to(device) for name, view in self.views.items()}
        return self

    def without_augmentation(self) -> "ImageDataset":
        """The same samples as in evaluation, sharing the decoded images; its epochs are its own."""
        plain = copy.copy(self)
        plain.augment = plain.rand_augment = plain.mixup = None
        plain._rand_augment_spec, plain._shown_view = None, 0
        plain._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        return plain

    def only_view(self, view: int) -> "ImageDataset":
        """The same samples, each in one of its views in every epoch; 0 is without augmentation.

        Raises:
            ValueError: If there is no such view.
        """
        if not 0 <= view <= (self.number_of_views or 0):
            raise ValueError(f"there is no view {view}: the data set was made with views={self.number_of_views}")
        if view == 0:
            return self.without_augmentation()
        chosen = copy.copy(self)
        chosen._shown_view = view
        return chosen

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of an epoch, in this process and in running workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        rows = np.asarray(rows)
        draws = sample_draws(self.seed, int(self._epoch), self.index[rows])
        columns = {"labels": torch.from_numpy(self.labels[rows]), "index": torch.from_numpy(self.index[rows])}
        columns.update((name, torch.from_numpy(answer[rows])) for name, answer in self.answers.items())
        if self.number_of_views is not None:
            view = draws % np.uint64(self.number_of_views) + np.uint64(1)
            if self._shown_view is not None:
                view = np.full_like(view, self._shown_view)
            draws = self._draws_of(self.index[rows], view.astype(np.int64))
            columns["view"] = torch.from_numpy(view.astype(np.int64))
        if self.pixels is None and self.augment not in ("crop", "crop_flip"):
            images = self._decode_large(rows, draws)
            pixels = {name: view.process(view.convert(images)) for name, view in self.views.items()}
            return {**pixels, **columns}
        if self.pixels is None:
            batch = _stack(self._decode_large(rows, draws))
        elif self._on_device is not None:
            batch = self._augment_on_device(rows, draws)
        else:
            batch = self._augment_small(self.pixels[rows], draws)
        if self.mixup is not None:
            batch, columns["labels"] = self._mix(batch, columns["labels"], draws)
        pixels = {
            name: view.normalize(batch) if self.pixels is None else view(batch) for name, view in self.views.items()
        }
        return {**pixels, **columns}

    def _draws_of(self, index: np.ndarray, view: np.ndarray) -> np.ndarray:
        """The random words that make a sample's views; those of view 0 are not used."""
        if self.outcomes is None:
            return sample_draws(0, view, index)
        order = sample_draws(0, np.arange(self.outcomes), index[:, None]).argsort(1)
        draws = order[np.arange(len(index)), view - 1].astype(np.uint64)
        return draws << np.uint64(1) if self.augment == "crop" else draws

    def _corners(self, draws: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """How far images are padded, and where in a padded one its crop starts."""
        pad = max(self.pixels.shape[-2:]) // 8
        # With the flip in the lowest bit: one of 162 views at 32 x 32.
        offset = (draws >> np.uint64(1)) % np.uint64((2 * pad + 1) ** 2)
        return pad, *np.divmod(offset.astype(np.int64), 2 * pad + 1)

    def _augment_on_device(self, rows: np.ndarray, draws: np.ndarray) -> Tensor:
        """What _augment_small does, as one gather: (B, C, H, W) uint8, channels last."""
        height, width = self.pixels.shape[-2:]
        pad, top, left, flipped = 0, np.zeros_like(rows), np.zeros_like(rows), np.zeros_like(rows)
        if self.augment in ("crop", "crop_flip"):
            pad, top, left = self._corners(draws)
        if self.augment in ("flip", "crop_flip"):
            flipped = _flips(draws).astype(np.int64)
        plan = torch.from_numpy(np.stack([rows, top - pad, left - pad, flipped]))
        rows, top, left, flipped = plan.to(self._on_device.device, non_blocking=True)[..., None]
        y = top + torch.arange(height, device=top.device)
        x = torch.arange(width, device=top.device)
        x = left + torch.where(flipped == 1, width - 1 - x, x)
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
        y, x = y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None]
        return (self._on_device[rows[..., None], y, x] * inside[..., None]).permute(0, 3, 1, 2)

    @property
    def _mode(self) -> bytes:
        """The one that the feature converts images to as it decodes them; None leaves them theirs."""
        return str(self.split.features["image"].mode).encode()

    def _decode(self, row: int, value: dict | None = None) -> PIL.Image.Image:
        """An image in grey or in colour, from its bytes or path where they are at hand."""
        value = value or self._encoded[row]["image"]
        try:
            # Row by row through the feature is twice as fast as through the column.
            return _as_grey_or_rgb(self.split.features["image"].decode_example(value))
        except (OSError, ValueError, SyntaxError, TypeError) as error:
            path = (value or {}).get("path")
            raise ValueError(
                f"the image of row {row}{f' ({path})' if path else ''}, index {self.index[row]}, cannot be used "
                f"({error}): replace it or drop the row"
            ) from error

    def _decode_small(self, size: tuple[int, int]) -> np.ndarray | None:
        """All images as (N, C, H, W) uint8; None where they are large or differ in size."""
        if max(size) > _SMALL:
            return None
        rows = len(self.index)
        if rows < _MANY:
            return self._decode_all(size)
        starts = range(0, rows, 1000)
        contents = [value["bytes"] for start in starts for value in self._encoded[start : start + 1000]["image"]]
        if None in contents:  # files, which may change
            return self._decode_all(size)
        return kept_pixels([self._mode, *contents], lambda: self._decode_all(size))

    def _decode_all(self, size: tuple[int, int]) -> np.ndarray | None:
        rows, images = len(self.index), []
        for start in tqdm(range(0, rows, 1000), desc="Decoding images", unit="k", disable=rows < _MANY):
            values = self._encoded[start : start + 1000]["image"]
            batch = [self._decode(row, value) for row, value in enumerate(values, start)]
            if any(image.size != size for image in batch):
                return None
            images.append([np.asarray(image) for image in batch])
        arrays = [array for batch in images for array in batch]
        if any(array.ndim == 3 for array in arrays):
            arrays = [array if array.ndim == 3 else np.stack([array] * 3, axis=-1) for array in arrays]
            return np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2))
        return np.stack(arrays)[:, None]

    def _augment_small(self, images: np.ndarray, draws: np.ndarray) -> Tensor:
        """(B, C, H, W) uint8 in and out."""
        if self.augment in ("crop", "crop_flip"):
            batch, channels, height, width = images.shape
            pad, top, left = self._corners(draws)
            padded = np.zeros((batch, channels, height + 2 * pad, width + 2 * pad), dtype=np.uint8)
            padded[:, :, pad : pad + height, pad : pad + width] = images
            windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
            images = windows[np.arange(batch), :, top, left]
        if self.augment in ("flip", "crop_flip"):
            flipped = _flips(draws)
            images[flipped] = images[flipped, :, :, ::-1]
        batch = torch.from_numpy(images)
        if self.rand_augment is None:
            return batch
        grey = batch.shape[1] == 1
        pictures = [PIL.Image.fromarray(image[0] if grey else image.transpose(1, 2, 0)) for image in images]
        return _stack(self._rand_augment(pictures, draws))

    def _decode_large(self, rows: np.ndarray, draws: np.ndarray) -> list[PIL.Image.Image]:
        images = [self._decode(row) for row in rows.tolist()]
        if self.augment in ("crop", "crop_flip"):
            with kept_global_state():
                for i, draw in enumerate(splitmix(draws)):
                    seed_global(draw)
                    images[i] = self.resized_crop(images[i])
        if self.augment in ("flip", "crop_flip"):
            for i in np.flatnonzero(_flips(draws)):
                images[i] = images[i].transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return images if self.rand_augment is None else self._rand_augment(images, draws)

    def _rand_augment(self, images: list[PIL.Image.Image], draws: np.ndarray) -> list[PIL.Image.Image]:
        with kept_global_state():
            for i, draw in enumerate(draws):
                seed_global(draw)
                mode = images[i].mode
                # Its fill colour has three channels.
                images[i] = self.rand_augment(images[i].convert("RGB")).convert(mode)
        return images

    def _mix(self, batch: Tensor, labels: Tensor, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        batch, size = batch.float(), len(labels)
        if size % 2:
            # timm pairs the first sample with the last and refuses an odd number: the first gets itself as partner.
            batch, labels = torch.cat([batch, batch[:1]]), torch.cat([labels, labels[:1]])
        with kept_global_state():
            seed_global(batch_draw(draws))
            batch, labels = self.mixup(batch, labels)
        return batch[:size], labels[:size]


class _View:
    """What one model sees: a processor, and what it does to colours and sizes, learnt by showing it images.

    Learnt rather than read from its attributes, since processors name and combine these in many ways.
    """

    def __init__(self, processor: BaseImageProcessor, height: int, width: int):
        self.processor = processor
        if isinstance(processor, TimmWrapperImageProcessor):
            self.channels = processor.data_config["input_size"][0]
        else:
            self.channels = 1 if len(processor.image_mean or ()) == 1 else 3
        self.grey = torch.tensor(_GREY_WEIGHTS).view(3, 1, 1)
        shape = (1, self.channels, height, width)
        black, white = (self.process(torch.full(shape, value, dtype=torch.uint8)) for value in (0, 255))
        self.size = tuple(black.shape[-2:])
        centre = self.size[0] // 2, self.size[1] // 2
        self.offset = black[0, :, centre[0], centre[1], None, None].clone()
        self.scale = (white[0, :, centre[0], centre[1], None, None] - self.offset) / 255
        noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        self.probe = self.process(noise)
        # A processor that only resizes and normalises is done without, several times faster. PIL and torch round
        # differently, so within a grey level.
        errors = {mode: ((self._simply(noise, mode) - self.probe) / self.scale).abs().max() for mode in _RESAMPLING}
        self.resampling = next((mode for mode, error in errors.items() if error < 1.01), None)

    def to(self, device: torch.device | str) -> "_View":
        """The same for pixels that are on a device."""
        moved = copy.copy(self)
        moved.scale, moved.offset, moved.grey = (part.to(device) for part in (self.scale, self.offset, self.grey))
        return moved

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """The colour that normalisation maps to zero."""
        mean = (-self.offset / self.scale).flatten().clamp(0, 255).round().int().tolist()
        return tuple(mean * 3) if self.channels == 1 else tuple(mean)

    def check_colours(self) -> None:
        """Raise where crops, which the processor does not see, would get other colours than whole images."""
        colour = torch.tensor([32, 96, 160][: self.channels], dtype=torch.uint8).view(1, -1, 1, 1)
        plain = colour.expand(-1, -1, *self.size)
        if not torch.allclose(self.process(plain), self._simply(plain, InterpolationMode.BILINEAR), atol=1e-4):
            raise ValueError(
                f"{type(self.processor).__name__} reorders or mixes colours, which random crops would not follow: use "
                "augment=None or 'flip', or a processor that does not"
            )

    def agrees_with(self, other: "_View") -> bool:
        """Whether both make the same tensor of an image."""
        return self.probe.shape == other.probe.shape and torch.allclose(self.probe, other.probe, atol=1e-4)

    def process(self, images: Tensor | list[PIL.Image.Image]) -> Tensor:
        """The processor's own work, as in evaluation: pixels in 0..255 in, (B, C, H, W) float32 out."""
        if isinstance(images, Tensor) and isinstance(self.processor, TimmWrapperImageProcessor):
            # timm's transforms take tensors too, but their bicubic resizing then overshoots.
            images = [to_pil_image(image) for image in images.round().to(torch.uint8)]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels.contiguous(memory_format=torch.channels_last)

    def convert(self, images: list[PIL.Image.Image]) -> list[PIL.Image.Image]:
        """To the number of channels that the model takes."""
        return [image.convert("L" if self.channels == 1 else "RGB") for image in images]

    def _convert_batch(self, batch: Tensor) -> Tensor:
        if batch.shape[1] == self.channels:
            return batch
        if self.channels == 3:
            return batch.expand(-1, 3, -1, -1)
        return (batch * self.grey).sum(1, keepdim=True)

    def _simply(self, batch: Tensor, resampling: InterpolationMode) -> Tensor:
        batch = self._convert_batch(resize(batch, list(self.size), resampling, antialias=True))
        batch = batch.to(torch.float32, copy=True).mul_(self.scale).add_(self.offset)
        return batch.contiguous(memory_format=torch.channels_last)  # now: four times faster than with the conversion

    def __call__(self, batch: Tensor) -> Tensor:
        """Pixels of whole images, (B, C, H, W) in 0..255, as the processor gives them."""
        if self.resampling is None:
            return self.process(self._convert_batch(batch))
        return self._simply(batch, self.resampling)

    def normalize(self, batch: Tensor) -> Tensor:
        """Pixels of crops, which need no further cropping, at the model's size."""
        return self._simply(batch, InterpolationMode.BILINEAR)


def _flips(draws: np.ndarray) -> np.ndarray:
    return (draws & np.uint64(1)).astype(bool)


def _as_grey_or_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith(("I", "F")):  # which PIL would clip at 255, to white
        raise ValueError(f"its mode is {image.mode}, more than 8 bits: scale its values to 0..255 first")
    return image.convert("L" if image.mode in _GREY_MODES else "RGB")


def _stack(images: list[PIL.Image.Image]) -> Tensor:
    """Images of one size as (B, C, H, W) uint8, in colour unless all are grey."""
    if any(image.mode != "L" for image in images):
        arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2)
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None]
