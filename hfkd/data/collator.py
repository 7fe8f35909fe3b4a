"""One collator for finished image batches and for text of one or two tokenizers."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from hfkd.labels import LABEL_COLUMNS, label_column


_TEXT_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


class DistillationCollator:
    """Make a batch: pad the student's text columns and the teacher's, each with its own tokenizer, stack the rest.

    A finished batch, as :class:`hfkd.data.ImageDataset` gives, passes through. Columns of strings are dropped;
    ``label`` and ``label_ids``, or what ``label_names`` names, become ``labels``. transformers' own padding collators
    crash on ``teacher_input_ids``.

    Args:
        processing_class: The student's tokenizer; not used for images.
        teacher_processing_class: The teacher's, for the columns that ``tokenize`` prefixes with ``teacher_``.
        label_names: As in the training arguments; of several columns that may be the labels, the one that is.

    Raises:
        ValueError: If a column needs a tokenizer that is not given, or cannot be stacked, or two may be the labels.
    """

    def __init__(self, processing_class=None, teacher_processing_class=None, label_names: Sequence[str] | None = None):
        self.processing_class = processing_class
        self.teacher_processing_class = teacher_processing_class
        self.label_names = label_names or ()

    def __call__(self, features: list[dict] | dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of tensors from samples, or a finished batch as it is."""
        if isinstance(features, dict):
            return features
        batch = self._pad(features, self.processing_class, "", "processing_class")
        batch |= self._pad(features, self.teacher_processing_class, "teacher_", "teacher_processing_class")
        labels = label_column(features[0], self.label_names)
        for name in features[0]:
            if name in batch or (name in LABEL_COLUMNS and name != labels):
                continue
            column = _stack_column(name, [feature[name] for feature in features])
            if column is not None:
                batch["labels" if name == labels else name] = column
            elif name == labels:
                raise ValueError(f"column {name!r} holds {features[0][name]!r}: map labels to class indices first")
        return batch

    def _pad(self, features: list[dict], tokenizer, prefix: str, argument: str) -> dict[str, Tensor]:
        names = [name for name in _TEXT_COLUMNS if prefix + name in features[0]]
        if not names:
            return {}
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"the samples have {prefix}{names[0]}: pass the tokenizer that made it as {argument}")
        rows = [{name: feature[prefix + name] for name in names} for feature in features]
        padded = pad_without_fast_tokenizer_warning(tokenizer, rows, padding=True, return_tensors="pt")
        return {prefix + name: padded[name] for name in padded}


def _stack_column(name: str, values: list) -> Tensor | None:
    first = values[0]
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, str) or first is None:
        return None
    if isinstance(first, PIL.Image.Image):
        raise ValueError(f"column {name!r} holds images: wrap the split in hfkd.data.ImageDataset")
    try:
        if isinstance(first, Tensor):
            return torch.stack(values)
        array = np.asarray(values)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"column {name!r} differs in length between samples ({error}): pad it or drop it") from error
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
