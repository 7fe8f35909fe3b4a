from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import DATA
from PIL import Image
from transformers import ViTImageProcessor


@pytest.fixture(scope="session")
def data_dir() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no real data: {DATA} does not exist, set HFKD_DATA_DIR")
    return DATA


@pytest.fixture(autouse=True, scope="session")
def no_progress_bars():
    datasets.disable_progress_bars()


@pytest.fixture
def processor() -> ViTImageProcessor:
    return ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )


@pytest.fixture
def make_split():
    """Random images of the given (height, width) or (height, width, channels), with labels and scattered indices."""

    def make(shapes, labels=None, seed=0) -> datasets.Dataset:
        rng = np.random.default_rng(seed)
        images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
        labels = [i % 3 for i in range(len(shapes))] if labels is None else labels
        index = [7 * i + 3 for i in range(len(shapes))]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("int64"), "index": datasets.Value("int64")}
        )
        return datasets.Dataset.from_dict({"image": images, "label": labels, "index": index}, features=features)

    return make
