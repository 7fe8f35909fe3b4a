"""Peak anonymous memory of a training run: python memory.py fill|cached|alone IMAGES OUTPUT TEACHER CACHE."""

import sys

from cases import PAIRS, Epochs, image_set, images
from measure import PeakMemory

from hfkd.models import load_model


def main(side: str, number: str, output: str, teacher: str, cache: str) -> None:
    with PeakMemory() as memory:
        student = load_model(PAIRS["resnet56 to resnet20"][1], num_labels=10)
        has_cache = {"teacher_cache": cache} if side != "alone" else {}
        train = image_set(images(int(number)), student, views=16 if has_cache else None)
        epochs = Epochs(student, teacher if has_cache else None, train, output, **has_cache)
        if side == "fill":
            epochs.fill()
        else:
            epochs.filled = 0
            epochs()
            epochs()
    print(memory.peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
