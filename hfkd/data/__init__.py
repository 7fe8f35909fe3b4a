"""Data, one way in: images and text as splits with the same columns for every set."""

from hfkd.data.collator import DistillationCollator
from hfkd.data.glue import GLUE_TASKS, write_predictions
from hfkd.data.image_dataset import ImageDataset
from hfkd.data.images import load_image_data
from hfkd.data.processors import load_tokenizer, processor_for
from hfkd.data.task_data import TaskData
from hfkd.data.text import load_text_data, tokenize


__all__ = [
    "GLUE_TASKS",
    "DistillationCollator",
    "ImageDataset",
    "TaskData",
    "load_image_data",
    "load_text_data",
    "load_tokenizer",
    "processor_for",
    "tokenize",
    "write_predictions",
]
