"""One seed, one run: to the last bit on the CPU, whatever the number of workers; another seed is another run."""

import random

import datasets
import numpy as np
import pytest
import torch
from helpers import logged, make_trainer, rows, tiny, tiny_teacher, weights
from PIL import Image
from test_contract import build, every_method, random_arguments
from transformers import ViTImageProcessor, set_seed

from hfkd.data import ImageDataset
from hfkd.distillers import AKD, CRD, KD, FitNet


def with_dropout(family):
    return tiny(family, dropout=0.2)


def unsettle(seed):
    """Leave the global generators anywhere."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def trained(trainer):
    """A copy of all that a run leaves."""
    models = [
        trainer.model,
        trainer.distiller,
        *([trainer.teacher_model] if trainer.teacher_model is not None else []),
    ]
    trainer.train()
    return weights(*models), logged(trainer, "loss")


def are_equal(one, other):
    (weights_of_one, losses_of_one), (weights_of_other, losses_of_other) = one, other
    assert weights_of_one.keys() == weights_of_other.keys()
    equal = (torch.equal(tensor, weights_of_other[name]) for name, tensor in weights_of_one.items())
    return all(equal) and losses_of_one == losses_of_other


@every_method
def test_a_seed_is_a_run(tmp_path, method, arguments):
    runs = []
    for i, seed in enumerate((7, 7, 8)):
        unsettle(i)
        # Its models are the same for all: what differs are draws of the method and of the training.
        _, trainer = build(tmp_path, method, arguments, student=with_dropout, seed=seed)
        runs.append(trained(trainer))
    assert are_equal(runs[0], runs[1])
    assert not are_equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("method", "arguments"), [(FitNet, {}), (CRD, {"negatives": 8}), (AKD, {"alpha": "learned", "cam": True})]
)
def test_the_seed_starts_a_methods_own_parameters(tmp_path, method, arguments):
    def start(seed, step):
        unsettle(step)
        distiller, _ = build(tmp_path, method, arguments, seed=seed)
        return weights(distiller)

    one, again, other = start(7, 0), start(7, 1), start(8, 2)
    drawn = [name for name in one if not torch.equal(one[name], other[name])]
    assert drawn
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_the_seed_draws_negatives(tmp_path):
    """Of the same embeddings and the same batch."""
    distiller, trainer = build(tmp_path, CRD, {"negatives": 3})
    _, call = random_arguments(distiller, trainer)

    def terms(seed):
        set_seed(seed)
        return distiller(*call)["crd"]

    assert torch.equal(terms(7), terms(7))
    assert not torch.equal(terms(7), terms(8))


def images(seed=0):
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(16)]
    columns = {"image": pictures, "label": [i % 5 for i in range(16)], "index": list(range(16))}
    features = {"image": datasets.Image(), "label": datasets.Value("int64"), "index": datasets.Value("int64")}
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    split = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    options = {"augment": "crop_flip", "rand_augment": "rand-m9", "mixup_alpha": 0.8, "num_labels": 5}
    return ImageDataset(split, processor, seed=seed, **options)


def run(folder, *, workers, seed=7, data=None):
    unsettle(workers)
    family = "bert" if data is None else "vit"
    trainer = make_trainer(
        folder,
        with_dropout(family),
        tiny_teacher(family),
        KD(),
        rows("bert") if data is None else data,
        max_steps=4,
        seed=seed,
        dataloader_num_workers=workers,
    )
    return trained(trainer)


def test_workers_change_nothing_and_the_seed_does(tmp_path):
    """Shuffling and dropout."""
    first = run(tmp_path, workers=0)
    assert are_equal(first, run(tmp_path, workers=2))
    assert not are_equal(first, run(tmp_path, workers=0, seed=8))


def test_workers_change_no_image_and_each_seed_does(tmp_path):
    """Crop, flip, RandAugment and Mixup, which the seed of the data draws; the run's draws the rest."""
    first = run(tmp_path, workers=0, data=images())
    assert are_equal(first, run(tmp_path, workers=2, data=images()))
    assert not are_equal(first, run(tmp_path, workers=0, data=images(), seed=8))
    assert not are_equal(first, run(tmp_path, workers=0, data=images(seed=1)))
