"""Anonymous memory of a training run: python memory.py fill|cached|alone IMAGES OUTPUT TEACHER CACHE."""

import gc
import json
import sys

from cases import PAIRS, Epochs, image_set, images
from measure import PeakMemory

from hfkd.models import load_model


def main(side: str, number: str, output: str, teacher: str, cache: str) -> None:
    """Print the peak of the process, and what of it was not there when training began, in bytes."""
    student = load_model(PAIRS["resnet56 to resnet20"][1], num_labels=10)
    has_cache = {"teacher_cache": cache} if side != "alone" else {}
    train = image_set(images(int(number)), student, views=16 if has_cache else None)
    epochs = Epochs(student, teacher if has_cache else None, train, output, **has_cache)
    if side == "fill":
        epochs.fill()
    gc.collect()
    with PeakMemory() as memory:
        if side != "fill":
            epochs.filled = 0
            epochs()
            epochs()
    print(json.dumps({"peak": memory.peak, "added": memory.peak - memory.start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
