"""The teacher's cache: what it gives is what the teacher says, whatever happens to it."""

import functools
import itertools
import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from helpers import (
    NUM_LABELS,
    Around,
    Mutual,
    Rows,
    as_datasets,
    assert_identical,
    hub_rows,
    largest_difference,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    tokenizer,
    weights,
    widths,
)
from PIL import Image
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import DataCollatorWithPadding, ViTImageProcessor

from hfkd import DistillationTrainingArguments, TeacherEnsemble
from hfkd.cache import MANIFEST, TeacherCache
from hfkd.checks import check_cache
from hfkd.data import DistillationCollator, ImageDataset
from hfkd.distillers import AT, CRD, KD, KDAIF, PKT, TTM, Combined, InContextKD, ModelOutputs, SelfDistillation


NAMES = ["cat", "dog", "owl", "fox", "bee"]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """No test writes into the user's own caches."""
    monkeypatch.setenv("HFKD_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches"


def cached(tmp_path, family="bert", teacher=None, distiller=None, dataset=None, *, trainer=None, **arguments):
    teacher = teacher if teacher is not None else tiny_teacher(family)
    dataset = dataset if dataset is not None else rows(family)
    return make_trainer(
        tmp_path / "run",
        tiny(family),
        teacher,
        distiller,
        dataset,
        trainer=trainer,
        **{"teacher_cache": True, **arguments},
    )


def counts(trainer):
    return trainer.cache.hits, trainer.cache.misses


def table(cache, view=0):
    """What is kept of one view, and of which samples."""
    return cache.logits.read(view * len(cache.index) + np.arange(len(cache.index)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("float32", 1e-6)])
@pytest.mark.parametrize("family", ["bert", "cifar"])
def test_cached_answers_are_the_teachers(tmp_path, family, dtype, tolerance):
    """In both epochs, of which the second asks nobody."""
    online = make_trainer(tmp_path / "online", tiny(family), tiny_teacher(family), KD(), rows(family), max_steps=4)
    online.train()
    trainer = cached(tmp_path, family, distiller=KD(), max_steps=4, teacher_cache_dtype=dtype)
    calls = []
    trainer.teacher_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert (counts(trainer), len(calls)) == ((16, 16), 2)
    assert logged(trainer, "kd") == pytest.approx(logged(online, "kd"), rel=10 * tolerance)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    kept, known = table(trainer.cache)
    assert known.all()
    assert kept.dtype == dtype
    np.testing.assert_allclose(kept, online.teacher(batch).logits.numpy(), rtol=tolerance, atol=tolerance)


def test_a_second_run_asks_nobody_and_is_the_first(tmp_path):
    """Also with another method, other labels, another order, another seed: the inputs are the same."""
    first = cached(tmp_path, max_steps=4)
    first.train()
    again = cached(tmp_path, max_steps=4)
    again.train()
    assert (counts(first), counts(again)) == ((16, 16), (32, 0))
    assert_identical(weights(first.model), weights(again.model))
    turned = rows("bert").columns
    turned = Rows({name: column.flip(0) for name, column in {**turned, "labels": (turned["labels"] + 1) % 5}.items()})
    other = cached(tmp_path, distiller=TTM(), dataset=turned, seed=7, max_steps=2)
    other.train()
    assert counts(other) == (16, 0)
    assert len(list((tmp_path / "caches").iterdir())) == 1


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    cached(tmp_path, max_steps=1).train()
    trainer = cached(tmp_path, max_steps=4)
    assert trainer.cache.filled == 8
    trainer.train()
    assert counts(trainer) == (24, 8)


def test_a_hub_data_set_is_kept_by_its_numbers(tmp_path):
    whole = cached(tmp_path, dataset=hub_rows(), max_steps=2)
    whole.train()
    shuffled = hub_rows().shuffle(seed=3)
    again = cached(tmp_path, dataset=shuffled, max_steps=2)
    again.train()
    assert counts(again) == (16, 0)
    batch = again.data_collator([{k: v for k, v in row.items() if k != "labels"} for row in shuffled])
    kept = again.cache({**batch, "view": torch.zeros(16, dtype=torch.long)}).logits
    torch.testing.assert_close(kept.float(), again.teacher(batch).logits, rtol=2e-3, atol=2e-3)


# What makes it another cache


def changed(change):
    teacher, dataset, arguments = tiny_teacher("bert"), rows("bert"), {}
    if change == "teacher":
        teacher.classifier.bias.data[0] += 1e-6
    elif change == "heads":
        teacher = tiny_teacher("bert", num_attention_heads=1)
    elif change == "inputs":
        dataset.columns["input_ids"][3, 1] = 1 + dataset.columns["input_ids"][3, 1] % 50
    elif change == "index":
        dataset.columns["index"] += 1
    elif change == "precision":
        arguments["teacher_dtype"] = "bfloat16"
    elif change == "autocast":
        arguments["bf16"] = True
    elif change == "dtype":
        arguments["teacher_cache_dtype"] = "float32"
    elif change == "top_k":
        arguments["teacher_cache_top_k"] = 2
    elif change == "ensemble":
        teacher = [teacher, tiny_teacher("bert", seed=3)]
    return teacher, dataset, arguments


CHANGES = {
    "teacher": "teacher is",
    "heads": "teacher is",
    "inputs": "inputs is",
    "index": "inputs is",
    "precision": "precision is float32 there and bfloat16 here",
    "autocast": "precision is float32 there and bfloat16 here",
    "dtype": "dtype is float16 there and float32 here",
    "top_k": "top_k is None there and 2 here",
    "ensemble": "teacher is .*; ensemble is None there",
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_cache_is_refused_with_the_difference_named(tmp_path, change):
    folder = str(tmp_path / "mine")
    cached(tmp_path, teacher_cache=folder, max_steps=1).train()
    teacher, dataset, arguments = changed(change)
    with pytest.raises(ValueError, match=rf"(?s)is another one: [^;]*{CHANGES[change]}.*name another folder"):
        cached(tmp_path, teacher=teacher, dataset=dataset, teacher_cache=folder, **arguments)
    trainer = cached(tmp_path, teacher=teacher, dataset=dataset, **arguments)  # finds or makes its own
    assert trainer.cache.filled == 0


def test_another_order_of_classes_is_another_cache(tmp_path):
    """The student's, or the teacher's alone."""

    def run(order, of_teacher=NAMES):
        student, teacher = tiny("bert"), tiny_teacher("bert")
        student.config.id2label = {i: NAMES[c] for i, c in enumerate(order)}
        teacher.config.id2label = dict(enumerate(of_teacher))
        folder = str(tmp_path / "mine")
        return make_trainer(tmp_path / "run", student, teacher, KD(), rows("bert"), teacher_cache=folder, max_steps=2)

    first = run(range(5))
    first.train()
    with pytest.raises(ValueError, match="another one: classes is .'cat', 'dog'.* there and .'fox', 'cat'.* here"):
        run([3, 0, 4, 1, 2])
    with pytest.raises(ValueError, match=r"another one: order of classes is .None. there and ..4, 3, 2, 1, 0.. here"):
        run(range(5), NAMES[::-1])


def test_another_mean_of_the_same_teachers_is_another_cache(tmp_path):
    def run(**options):
        teachers = TeacherEnsemble([tiny_teacher("bert"), tiny_teacher("bert", seed=3)], **options)
        return cached(tmp_path, teacher=teachers, teacher_cache=str(tmp_path / "mine"))

    run()
    with pytest.raises(ValueError, match="another one: ensemble is .'probabilities', 4.0. there and .*, 2.0. here"):
        run(temperature=2.0)
    with pytest.raises(ValueError, match="another one: ensemble is .'probabilities', 4.0. there and .'logits'"):
        run(average="logits")


def test_a_saved_and_loaded_teacher_is_the_same(tmp_path):
    for family in ("bert", "vit", "cifar", "timm"):
        teacher = tiny_teacher(family)
        first = cached(tmp_path, family, teacher=teacher)
        teacher.save_pretrained(tmp_path / family)
        loaded = type(teacher).from_pretrained(tmp_path / family)
        assert cached(tmp_path, family, teacher=loaded).cache.folder == first.cache.folder


class Noisy(Rows):
    """Other inputs each time."""

    def __getitem__(self, i):
        row = super().__getitem__(i)
        return {**row, "pixel_values": row["pixel_values"] + torch.rand(())}


class Turning(Rows):
    """Other inputs in each epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        row = super().__getitem__(i)
        return {**row, "pixel_values": row["pixel_values"].roll(self.epoch, -1)}


class Stream(IterableDataset):
    def __iter__(self):
        yield from map(rows("bert").__getitem__, range(16))


def duplicated():
    dataset = rows("bert")
    dataset.columns["index"][3] = 4
    return dataset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"family": "cifar", "distiller": AT()},
            r"AT looks at 'layer1' of its teacher, which gives \(2, 16, 16, 16\), and the",
        ),
        (
            {"teacher": tiny_teacher("bert", seed=3), "distiller": Mutual()},
            "the teacher of Mutual changes as it trains",
        ),
        (
            {"teacher": TeacherEnsemble([tiny_teacher("bert"), tiny_teacher("bert")], weighting="cross_entropy")},
            'depend on the labels: use "equal"',
        ),
        ({"dataset": Stream()}, "pass a map-style train_dataset"),
        ({"dataset": rows("bert").with_columns(index=None)}, "kept by the column index, which the training set lacks"),
        ({"dataset": hub_rows().remove_columns("index")}, "which the training set lacks: add it with"),
        ({"dataset": hub_rows().with_transform(dict)}, "has a transform"),
        ({"dataset": duplicated()}, "two training samples have the same number"),
        ({"family": "cifar", "dataset": Noisy(rows("cifar").columns)}, "gives other inputs each time.*views=V"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, **options)


@pytest.mark.parametrize("wrap", [lambda rows: rows, Around, lambda rows: ConcatDataset([rows])])
def test_a_data_set_that_changes_from_epoch_to_epoch_is_refused(tmp_path, wrap):
    """Within one it does not, and is left at the first."""
    dataset = Turning(rows("cifar").columns)
    with pytest.raises(ValueError, match="gives other inputs each time"):
        cached(tmp_path, "cifar", dataset=wrap(dataset))
    assert dataset.epoch == 0


def test_the_samples_of_sets_in_a_row_are_kept_by_their_numbers(tmp_path):
    one, other = rows("bert"), rows("bert", seed=1)
    with pytest.raises(ValueError, match="two training samples have the same number"):
        cached(tmp_path, dataset=ConcatDataset([one, other]))
    other = other.with_columns(index=torch.arange(16, 32))
    trainer = cached(tmp_path, dataset=ConcatDataset([one, other]), max_steps=8)
    trainer.train()
    assert counts(trainer) == (32, 32)
    again = cached(tmp_path, dataset=ConcatDataset([other, one]), max_steps=4)
    again.train()
    assert counts(again) == (32, 0)


PLAIN = DistillationCollator()


def with_pixels(change):
    """A collator that does something to the images of a batch."""

    def collate(features):
        batch = PLAIN(features)
        return {**batch, "pixel_values": change(batch["pixel_values"])}

    return collate


@pytest.mark.parametrize("start", range(3))
def test_a_collator_that_augments_is_refused(tmp_path, start):
    """Also one that leaves most batches as they are."""
    turns = itertools.count(start)
    now_and_then = with_pixels(lambda pixels: pixels.flip(-1) if next(turns) % 3 == 0 else pixels)
    for collate in (with_pixels(lambda pixels: pixels + torch.rand(())), now_and_then):
        with pytest.raises(ValueError, match="makes other pixel_values of the same samples each time, .*views=V"):
            cached(tmp_path, "cifar", trainer={"data_collator": collate})


def test_a_collator_that_tokenises_is_refused(tmp_path):
    """The texts are none of the columns that the teacher reads, so that other texts would get these answers."""
    words = tokenizer()

    def collate(features):
        texts = words([feature["text"] for feature in features], padding=True, return_tensors="pt")
        return {**texts, **{name: torch.tensor([row[name] for row in features]) for name in ("labels", "index")}}

    dataset = datasets.Dataset.from_dict(
        {"text": [str(2 + i) for i in range(16)], "labels": [i % 5 for i in range(16)], "index": list(range(16))}
    )
    with pytest.raises(ValueError, match="reads attention_mask, which the data collator makes .*: store it there"):
        cached(tmp_path, dataset=dataset, remove_unused_columns=False, trainer={"data_collator": collate})


def test_what_a_collator_does_to_the_images_makes_another_cache(tmp_path):
    dataset = rows("cifar")
    shuffled = as_datasets(dataset).with_format("torch").shuffle(seed=2)

    def folder(factor, dataset=dataset):
        collate = with_pixels(lambda pixels: pixels * factor)
        return cached(tmp_path, "cifar", dataset=dataset, trainer={"data_collator": collate}).cache.folder

    plain = cached(tmp_path, "cifar", dataset=dataset).cache.folder
    assert len({plain, folder(2.0), folder(3.0)}) == 3
    assert folder(2.0) == folder(2.0)
    assert folder(2.0, shuffled) == folder(2.0, as_datasets(dataset).with_format("torch"))


def test_a_collator_that_pads_alone_is_taken(tmp_path):
    padding = {"data_collator": DataCollatorWithPadding(tokenizer())}
    runs = [cached(tmp_path, dataset=hub_rows(), max_steps=2, trainer=padding) for _ in range(2)]
    for run in runs:
        run.train()
    assert [counts(run) for run in runs] == [(0, 16), (16, 0)]


def test_a_made_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher of SelfDistillation changes"):
        make_trainer(tmp_path, tiny("bert"), None, SelfDistillation(), rows("bert"), teacher_cache=True)


def test_a_folder_that_is_handed_on_with_the_student_is_refused(tmp_path):
    def check(folder):
        args = DistillationTrainingArguments(str(tmp_path / "run"), teacher_cache=str(folder))
        check_cache(args, rows("bert"), tiny_teacher("bert"))

    with pytest.raises(ValueError, match="goes with the student: put teacher_cache= elsewhere"):
        check(tmp_path / "run" / "checkpoint-3" / ".." / "cache")
    check(tmp_path / "run-cache")


def test_logits_beyond_the_dtype_are_refused(tmp_path):
    teacher = tiny_teacher("bert")
    teacher.classifier.bias.data[2] = 1e6
    with pytest.raises(ValueError, match='logits one is 1e[+]06, beyond float16: pass teacher_cache_dtype="float32"'):
        cached(tmp_path, teacher=teacher).train()
    cached(tmp_path, teacher=teacher, teacher_cache_dtype="float32").train()


def test_numbers_are_kept_whole(tmp_path):
    """Float16 has every second whole number from 2,048 on, and nothing between 2,000 and 2,001."""
    teacher = tiny_teacher("bert", num_labels=1)
    with torch.no_grad():
        teacher.classifier.bias.fill_(2000.0)
    dataset = rows("bert").with_columns(labels=2000 + torch.randn(16))

    def run(**arguments):
        where, student = tmp_path / "run", tiny("bert", num_labels=1)
        options = {"teacher_cache": True, "max_steps": 2, **arguments}
        trainer = make_trainer(where, student, teacher, KD(), dataset, learning_rate=1e-5, **options)
        trainer.train()
        return trainer

    trainer = run()
    kept, known = table(trainer.cache)
    assert known.all()
    batch = trainer.data_collator([dataset[i] for i in range(16)])
    assert torch.equal(torch.from_numpy(kept), trainer.teacher(batch).logits)
    assert table(run(teacher_cache_dtype="float16").cache)[0].dtype == "float16"
    assert table(cached(tmp_path).cache)[0].dtype == "float16"


@pytest.mark.parametrize(("given", "kept"), [(True, True), ("true", True), ("False", None), (None, None), ("x", "x")])
def test_the_argument_takes_a_word_or_a_folder(tmp_path, given, kept):
    trainer = make_trainer(tmp_path, tiny("bert"), dataset=rows("bert"), teacher_cache=given)
    assert trainer.args.teacher_cache == kept
    assert trainer.cache is None


def test_an_ensemble_is_kept_as_its_mean(tmp_path):
    teachers = [tiny_teacher("bert"), tiny_teacher("bert", seed=7)]
    trainer = cached(tmp_path, teacher=teachers, max_steps=4, teacher_cache_dtype="float32")
    trainer.train()
    assert counts(trainer) == (16, 16)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    batch.pop("labels")
    np.testing.assert_allclose(table(trainer.cache)[0], trainer.teacher(batch).logits.numpy(), rtol=1e-5, atol=1e-5)


def test_the_manifest_keeps_the_teachers_score(tmp_path):
    trainer = cached(tmp_path, trainer={"eval_dataset": rows("bert", 8, seed=4)}, max_steps=1)
    trainer.train()
    score = json.loads((trainer.cache.folder / MANIFEST).read_text())["teacher_score"]
    assert [score["accuracy"]] == logged(trainer, "teacher_accuracy")
    assert counts(trainer) == (0, 8)  # the evaluation set has the same numbers, and is none of the cache's


def evaluated(tmp_path, scored, family="bert", **arguments):
    """The score of the teacher on a set, and how often it was asked."""
    trainer = cached(tmp_path, family, **arguments)
    calls = []
    trainer.teacher_model.register_forward_hook(lambda *_: calls.append(1))
    return trainer.evaluate_teacher(scored), len(calls)


def test_what_the_teacher_says_about_an_evaluation_set_is_kept_too(tmp_path):
    """By its inputs, in order: other labels get another score of the same answers."""
    dataset = rows("bert", 16, seed=4)
    online = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), rows("bert")).evaluate_teacher(dataset)
    assert evaluated(tmp_path, dataset, teacher_cache_top_k=2) == (online, 2)
    assert evaluated(tmp_path, dataset, teacher_cache_top_k=2) == (online, 0)
    answers = tiny_teacher("bert").eval()(**{k: v for k, v in dataset.columns.items() if k not in ("labels", "index")})
    right = dataset.with_columns(labels=answers.logits.argmax(1))
    assert evaluated(tmp_path, right, teacher_cache_top_k=2) == ({"accuracy": 1.0}, 0)
    assert evaluated(tmp_path, Subset(right, range(15)), teacher_cache_top_k=2) == ({"accuracy": 1.0}, 2)
    turned = Rows({name: column.flip(0) for name, column in right.columns.items()})
    assert evaluated(tmp_path, turned, teacher_cache_top_k=2) == ({"accuracy": 1.0}, 2)


def test_an_evaluation_set_under_another_processor_is_another(tmp_path):
    sets = [images(pictures=3, mean=mean) for mean in (0.5, 0.1, 0.5)]
    assert [evaluated(tmp_path, one, "cifar", dataset=images())[1] for one in sets] == [1, 1, 0]


def test_answers_to_an_evaluation_set_are_kept_however_training_samples(tmp_path):
    dataset = rows("bert", 16, seed=4)
    scores = [evaluated(tmp_path, dataset, train_sampling_strategy=by) for by in ("group_by_length", "random")]
    assert scores == [(scores[0][0], 2), (scores[0][0], 0)]


def test_answers_to_texts_of_any_length_are_kept_by_row(tmp_path):
    dataset = hub_rows(16, seed=4)
    answers = tiny_teacher("bert").eval()(**DistillationCollator(tokenizer())([*dataset.remove_columns("labels")]))
    right = dataset.map(lambda row, i: {"labels": answers.logits[i].argmax().item()}, with_indices=True)
    assert [evaluated(tmp_path, right) for _ in range(2)] == [({"accuracy": 1.0}, 2), ({"accuracy": 1.0}, 0)]


def test_texts_are_asked_about_longest_first(tmp_path):
    trainer = make_trainer(
        tmp_path / "run",
        tiny("bert"),
        tiny_teacher("bert"),
        KD(),
        hub_rows(16),
        teacher_cache=str(tmp_path / "caches"),
    )
    seen = widths(trainer.teacher_model)
    trainer.warm_teacher_cache()
    assert seen == sorted((len(row["input_ids"]) for row in hub_rows(16)), reverse=True)[::8]
    trainer.train()
    assert trainer.cache.misses == 16


def test_a_damaged_evaluation_is_asked_again(tmp_path):
    dataset = hub_rows().remove_columns("index")
    score, calls = evaluated(tmp_path, dataset)
    assert calls == 2
    (path,) = (tmp_path / "caches").glob("*/evaluation.*[0-9a-f]")
    path.write_bytes(path.read_bytes()[:-4] + b"????")
    assert evaluated(tmp_path, dataset) == (score, 2)
    assert evaluated(tmp_path, dataset) == (score, 0)


def test_an_evaluation_set_that_hides_what_it_makes_is_asked_about(tmp_path):
    columns = rows("cifar", 8, seed=4).columns
    hub = datasets.Dataset.from_dict({name: column.tolist() for name, column in columns.items()}).with_format("torch")
    train = {"dataset": images(augment="crop_flip", views=2)}
    for scored, options in (
        (Noisy(columns), {}),
        (hub.with_transform(lambda rows: {name: torch.tensor(column) for name, column in rows.items()}), {}),
        (images(pictures=3, augment="crop_flip"), train),
        (images(pictures=3, augment="crop_flip", views=3), train),
    ):
        for _ in range(2):
            assert evaluated(tmp_path, scored, "cifar", **options)[1] > 0


@pytest.mark.parametrize("layers", ["last", "all"])
def test_influence_is_what_it_is_without_the_cache(tmp_path, layers):
    """Its un-augmented pass over the training set reads the cache, also within a derivative."""
    held_out = rows("cifar", 8, seed=9)
    runs = [
        cached(
            tmp_path,
            "cifar",
            distiller=KDAIF(layers=layers, hessian="identity", warm_up=0.0),
            trainer={"held_out_dataset": held_out},
            max_steps=4,
            teacher_cache=cache,
            teacher_cache_dtype="float32",
        )
        for cache in (False, True)
    ]
    for run in runs:
        run.train()
    assert counts(runs[1])[1] == 16
    one, other = (run.distiller.influence for run in runs)
    assert one.abs().max() > 0
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# Views


def images(n=8, *, pictures=0, mean=0.5, **options):
    """Images of 32 x 32 with scattered numbers."""
    generator = np.random.default_rng(pictures)
    drawn = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]
    columns = {"image": drawn, "label": [i % NUM_LABELS for i in range(n)], "index": [7 * i + 3 for i in range(n)]}
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[mean] * 3)
    return ImageDataset(datasets.Dataset.from_dict(columns), processor, **options)


def ask(trainer, dataset):
    return trainer.context.teacher(dataset.__getitems__(list(range(len(dataset))))).logits


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("float32", 1e-6)])
def test_every_view_is_the_teachers(tmp_path, dtype, tolerance):
    """All 162 of crop and flip, and the un-augmented sample, asked in one order and read in another."""
    dataset = images(4, augment="crop_flip", views=162)
    trainer = cached(tmp_path, "cifar", dataset=dataset, teacher_cache_dtype=dtype)
    for view in range(163):
        ask(trainer, dataset.only_view(view))
    assert counts(trainer) == (0, 4 * 163)
    trainer.teacher_model.forward = None  # who is asked now fails
    answers = {view: ask(trainer, dataset.only_view(view)) for view in reversed(range(163))}
    assert counts(trainer) == (4 * 163, 4 * 163)
    del trainer.teacher_model.forward
    for view, kept in answers.items():
        pixels = dataset.only_view(view).__getitems__([0, 1, 2, 3])["pixel_values"]
        with torch.no_grad():
            online = trainer.teacher_model(pixels).logits
        torch.testing.assert_close(kept.float(), online, rtol=tolerance, atol=tolerance)
    assert len({kept.numpy().tobytes() for kept in answers.values()}) > 150


def test_training_under_augmentation_is_training_without_the_cache(tmp_path):
    def run(cache):
        return cached(
            tmp_path,
            "cifar",
            dataset=images(augment="crop_flip", views=3),
            max_steps=8,
            teacher_cache=cache,
            teacher_cache_dtype="float32",
        )

    online, first, again = run(None), run(True), run(True)
    for trainer in (online, first):
        trainer.train()
    again.train()
    assert sum(counts(first)) == 64
    assert 16 < counts(first)[1] == first.cache.filled <= 24
    assert counts(again) == (64, 0)
    assert largest_difference(weights(online.model), weights(first.model)) < 1e-5
    assert_identical(weights(first.model), weights(again.model))


def test_two_seeds_two_methods_and_more_views_share_their_views(tmp_path):
    first = cached(tmp_path, "cifar", dataset=images(augment="crop_flip", views=2), max_steps=12)
    first.train()
    assert first.cache.filled == 16  # after 12 epochs all have been met
    other = images(augment="crop_flip", views=2, seed=1)
    second = cached(tmp_path, "cifar", dataset=other, distiller=TTM(), seed=5, max_steps=4)
    second.train()
    assert counts(second) == (32, 0)
    more = cached(tmp_path, "cifar", dataset=images(augment="crop_flip", views=5), max_steps=6)
    more.train()
    assert counts(more)[1] <= 24
    again = cached(tmp_path, "cifar", dataset=images(augment="crop_flip", views=2), max_steps=2)
    again.train()
    assert counts(again) == (16, 0)


def test_a_pass_without_augmentation_gets_no_augmented_view(tmp_path):
    dataset = images(augment="crop_flip", views=3)
    trainer = cached(tmp_path, "cifar", dataset=dataset, max_steps=6, teacher_cache_dtype="float32")
    trainer.train()
    for _ in range(2):
        (batch,) = trainer.context.batches(dataset)
        torch.testing.assert_close(trainer.context.teacher(batch).logits, trainer.teacher(batch).logits)
        taken = trainer.context.take(dataset, [5, 2])
        torch.testing.assert_close(trainer.context.teacher(taken).logits, trainer.teacher(batch).logits[[5, 2]])
    assert table(trainer.cache, 0)[1].all()
    held_out = images(pictures=3, augment="crop_flip", views=3)  # with the same numbers
    (batch,) = trainer.context.batches(held_out)
    torch.testing.assert_close(trainer.context.teacher(batch).logits, trainer.teacher(batch).logits)


def test_a_subset_of_images_is_kept_by_its_numbers(tmp_path):
    dataset = Subset(images(augment="crop_flip", views=2), [6, 1, 4, 3])
    trainer = cached(tmp_path, "cifar", dataset=dataset, max_steps=4, per_device_train_batch_size=2)
    trainer.train()
    assert sum(counts(trainer)) == 8
    assert trainer.cache.index.tolist() == [10, 24, 31, 45]


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({"augment": "crop_flip"}, 16),
        ({"augment": "flip"}, 2),
        ({"rand_augment": "rand-m9-mstd0.5"}, 16),
        ({"augment": "crop_flip", "views": 4}, 4),
        ({}, 0),
    ],
)
def test_augmentation_without_numbered_views_gets_sixteen(tmp_path, options, views):
    for name, part in (("whole", lambda rows: rows), ("part", lambda rows: Subset(rows, [0, 1]))):
        dataset = images(**options)
        trainer = cached(tmp_path / name, "cifar", dataset=part(dataset), max_steps=2)
        assert trainer.cache.views == views
        trainer.train()
        assert {row["teacher_cache_views"] for row in trainer.state.log_history if "teacher_cache_views" in row} == (
            {views} if views else set()
        )


@pytest.mark.parametrize("part", [lambda rows: rows, lambda rows: Subset(rows, [0, 1])])
def test_the_callers_images_keep_all_their_views(tmp_path, part):
    """A baseline without a cache, made of the same data set afterwards, trains on as many as ever."""
    dataset = images(augment="crop_flip")
    whole = part(dataset)
    trainer = cached(tmp_path, "cifar", dataset=whole, num_train_epochs=3, max_steps=-1)
    trainer.train()
    assert trainer.cache.views == 16
    assert dataset.number_of_views is None
    assert int(dataset._epoch) == 0
    baseline = make_trainer(tmp_path / "baseline", tiny("cifar"), None, None, whole)
    assert baseline.train_dataset is whole
    assert "view" not in whole[0]


@pytest.mark.parametrize("options", [{"augment": "crop_flip"}, {"rand_augment": "rand-m9-mstd0.5"}])
def test_mixtures_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="Mixup and CutMix make samples that never come again"):
        cached(tmp_path, "cifar", dataset=images(mixup_alpha=0.2, num_labels=NUM_LABELS, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "inputs is"),
        ({"augment": "crop", "views": 2}, "preprocessing is .*'crop_flip'.* there and .*'crop'.* here"),
        ({"augment": None, "views": None}, "preprocessing is"),
    ],
)
def test_other_images_are_refused(tmp_path, change, message):
    folder, usual = str(tmp_path / "mine"), {"augment": "crop_flip", "views": 2}
    cached(tmp_path, "cifar", dataset=images(**usual), teacher_cache=folder)
    seed = change.pop("seed", 0)
    if seed:
        dataset = images(**usual)
        dataset.pixels[3, 0, 0, 0] ^= 1
    else:
        dataset = images(**{**usual, **change})
    with pytest.raises(ValueError, match=f"another one: {message}"):
        cached(tmp_path, "cifar", dataset=dataset, teacher_cache=folder)


# Filled ahead


@pytest.mark.parametrize("views", [None, 3])
def test_a_cache_filled_ahead_leaves_nothing_to_ask(tmp_path, views):
    def run(**arguments):
        dataset = images(augment="crop_flip" if views else None, views=views)
        return cached(tmp_path, "cifar", dataset=dataset, per_device_eval_batch_size=3, **arguments)

    answers = 8 * (views or 1)
    run(max_steps=1).train()
    warm = run()
    assert warm.cache.filled == 8
    done = warm.warm_teacher_cache()
    assert (done["answers"], done["bytes"]) == (answers - 8, warm.cache.bytes)
    assert warm.cache.bytes >= answers * (2 * NUM_LABELS + 4)
    assert run().warm_teacher_cache()["answers"] == 0
    warm.cache.logits.values[warm.cache.logits.checksums != 0] += 1  # all are damaged
    assert run().warm_teacher_cache()["answers"] == answers
    trainer = run(max_steps=4)
    trainer.train()
    assert counts(trainer) == (32, 0)


def test_without_a_cache_there_is_nothing_to_fill(tmp_path):
    with pytest.raises(ValueError, match="no teacher's cache to fill: pass a teacher, and teacher_cache=True"):
        cached(tmp_path, teacher_cache=None).warm_teacher_cache()


# A teacher in a folder


def in_folder(tmp_path, family, **options):
    teacher = tiny_teacher(family, **options)
    teacher.save_pretrained(tmp_path / "teacher")
    return teacher, str(tmp_path / "teacher")


@pytest.mark.parametrize("family", ["bert", "cifar", "timm"])
def test_behind_a_full_cache_the_weights_are_never_loaded(tmp_path, family):
    teacher, folder = in_folder(tmp_path, family)
    more = {"max_steps": 4, "trainer": {"eval_dataset": rows(family, 8, seed=4)}}
    given, named = (cached(tmp_path, family, teacher=one, **more) for one in (teacher, folder))
    assert not named.teacher.is_loaded
    for trainer in (given, named):
        trainer.train()
    assert named.cache.folder == given.cache.folder
    assert counts(named) == (32, 0)
    assert not named.teacher.is_loaded
    assert all(parameter.is_meta for parameter in named.teacher_model.parameters())
    assert logged(named, "teacher_accuracy") == logged(given, "teacher_accuracy")
    assert_identical(weights(given.model), weights(named.model))


@pytest.mark.parametrize("family", ["bert", "cifar", "timm"])
def test_the_weights_are_loaded_for_what_is_not_kept(tmp_path, family):
    teacher, folder = in_folder(tmp_path, family)
    cached(tmp_path, family, teacher=teacher, max_steps=1).train()
    trainer = cached(tmp_path, family, teacher=folder, max_steps=2)
    trainer.train()
    assert counts(trainer) == (8, 8)
    assert trainer.teacher.is_loaded
    assert_identical(weights(teacher), weights(trainer.context.teacher_model))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    online = make_trainer(tmp_path, tiny(family), teacher, KD(), rows(family)).teacher(batch).logits
    np.testing.assert_allclose(table(trainer.cache)[0], online.numpy(), rtol=2e-3, atol=2e-3)


def test_a_teacher_in_a_folder_that_learns_is_refused(tmp_path):
    _, folder = in_folder(tmp_path, "bert")
    with pytest.raises(ValueError, match="the teacher of Mutual changes as it trains"):
        cached(tmp_path, teacher=folder, distiller=Mutual())


def test_a_folder_is_a_teacher_without_a_cache_too(tmp_path):
    teacher, folder = in_folder(tmp_path, "bert")
    trainer = cached(tmp_path, teacher=folder, teacher_cache=None)
    assert_identical(weights(teacher), weights(trainer.teacher_model))


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_weights_of_other_names_or_precision_are_loaded_at_once(tmp_path, family):
    """A ViT's are saved under older names."""
    teacher, folder = in_folder(tmp_path, family)
    if family == "bert":
        teacher.half().save_pretrained(folder)
    trainer = cached(tmp_path, family, teacher=folder, max_steps=2)
    assert {(p.dtype, p.is_meta) for p in trainer.teacher_model.parameters()} == {(torch.float32, False)}
    trainer.train()
    assert counts(trainer) == (0, 16)


def test_another_order_of_classes_in_a_folder(tmp_path):
    student, order = tiny("bert"), [3, 0, 4, 1, 2]
    student.config.id2label = {i: NAMES[c] for i, c in enumerate(order)}
    teacher, folder = in_folder(tmp_path, "bert", id2label=dict(enumerate(NAMES)))
    trainers = [
        make_trainer(tmp_path, student, one, KD(), rows("bert"), teacher_cache=True, max_steps=2)
        for one in (folder, teacher)
    ]
    for trainer in trainers:
        trainer.train()
    assert [counts(trainer) for trainer in trainers] == [(0, 16), (16, 0)]
    batch = trainers[1].data_collator([trainers[1].train_dataset[i] for i in range(16)])
    np.testing.assert_allclose(
        table(trainers[0].cache)[0], trainers[1].teacher(batch).logits.numpy(), rtol=2e-3, atol=2e-3
    )


# Features


def test_vectors_of_a_layer_are_kept_too(tmp_path):
    """A bank, whose fill is an un-augmented pass, and a method that compares features at every step."""

    def run(distiller, cache):
        dataset = images(16, augment="crop_flip", views=2)
        trainer = cached(
            tmp_path,
            "cifar",
            None,
            distiller,
            dataset,
            max_steps=6,
            teacher_cache=cache,
            teacher_cache_dtype="float32",
        )
        trainer.train()
        return trainer

    logits_alone = run(KD(), True)
    assert logits_alone.cache.filled > 16
    methods = (
        lambda: InContextKD(neighbours=2, negatives=4),
        lambda: CRD(embedding_size=4, negatives=6),
        lambda: Combined({"kd": KD(), "pkt": PKT(teacher_layers="linear:input")}, task_from="kd"),
    )
    misses = []
    for method in methods:
        online, kept = run(method(), None), run(method(), True)
        one, other = (weights(trainer.model, trainer.distiller) for trainer in (online, kept))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4, msg=name)
        misses.append(counts(kept)[1])
    assert misses[0] > 16  # asked again, since logits were kept alone
    assert misses[1:] == [0, 0]


# The largest logits alone


class Says:
    """A teacher without a model."""

    precision = "float32"

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, batch):
        return ModelOutputs(self.logits[batch["index"]])


def largest(folder, logits, k, dtype="float16"):
    identity = {"precision": "float32", "dtype": dtype, "top_k": k}
    return TeacherCache(Says(logits), np.arange(len(logits)), identity, classes=logits.shape[1], folder=folder)


def asked_and_read(cache):
    """What it says to the first question, which is what it says to the second."""
    rows = torch.arange(len(cache.index))
    first, second = (cache({"index": rows, "view": torch.zeros_like(rows)}).logits for _ in range(2))
    assert (cache.hits, cache.misses) == (len(rows), len(rows))
    assert torch.equal(first, second)
    return second


def random_logits(rows, classes):
    return 4 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "precision"), [("float16", 2**-11), ("float32", 2**-23)])
@pytest.mark.parametrize(("classes", "bytes_of_number"), [(100, 2), (70_000, 4)])
def test_the_largest_probabilities_and_the_mass_of_the_others_are_the_teachers(
    tmp_path, classes, bytes_of_number, dtype, precision
):
    logits = random_logits(16, classes)
    logits[:, -1] = 20.0  # the last number is needed
    cache = largest(tmp_path, logits, 5, dtype)
    answers = asked_and_read(cache).double()
    kept, online = answers.softmax(1), logits.double().softmax(1)
    top = online.topk(5).indices
    tolerance = 4 * precision * float(logits.abs().max())  # rounded logits, above and below the fraction's line
    torch.testing.assert_close(kept.gather(1, top), online.gather(1, top), rtol=tolerance, atol=0)
    others = [p.scatter(1, top, 0.0) for p in (kept, online)]
    torch.testing.assert_close(others[0].sum(1), others[1].sum(1), rtol=tolerance, atol=0)
    for row in others[0]:
        assert len(row.unique()) == 2  # 0, and one share
    size = 16 * (5 * (np.dtype(dtype).itemsize + bytes_of_number) + 4)
    assert (tmp_path / "logits").stat().st_size == size
    assert (tmp_path / "logits.checksums").stat().st_size == 16 * 4


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_all_but_one_are_all(tmp_path, dtype):
    logits = random_logits(16, 100)
    answers = asked_and_read(largest(tmp_path, logits, 99, dtype))
    last = logits.argmin(1, keepdim=True)
    torch.testing.assert_close(answers.gather(1, last), logits.gather(1, last), rtol=1e-6, atol=0)
    rounded = logits.to(getattr(torch, dtype)).float()
    assert torch.equal(answers.scatter(1, last, 0.0), rounded.scatter(1, last, 0.0))


def test_at_other_temperatures_the_ratios_of_the_largest_stay(tmp_path):
    logits = random_logits(16, 100)
    answers = asked_and_read(largest(tmp_path, logits, 5, "float32")).double()
    top = logits.topk(5).indices
    for temperature, sign in ((4.0, 1), (0.5, -1)):
        kept, online = ((z.double() / temperature).softmax(1) for z in (answers, logits))
        of_top = [p.gather(1, top) for p in (kept, online)]
        torch.testing.assert_close(*(p / p.sum(1, keepdim=True) for p in of_top), rtol=1e-5, atol=0)
        assert (sign * (of_top[1] - of_top[0]).sum(1) > 0).all()  # what the others have too much or too little


def test_training_with_the_largest_is_training_with_what_they_stand_for(tmp_path):
    """Built by hand in a column, which no cache touches."""
    teacher, dataset = tiny_teacher("bert"), rows("bert")
    plain = cached(tmp_path, teacher=teacher, dataset=dataset, teacher_cache=None)
    batch = plain.data_collator([dataset[i] for i in range(16)])
    built = []
    for row in plain.teacher(batch).logits.double().tolist():
        kept = sorted(range(NUM_LABELS), key=row.__getitem__)[-2:]
        others = [np.exp(row[i]) for i in range(NUM_LABELS) if i not in kept]
        built.append([row[i] if i in kept else np.log(sum(others) / len(others)) for i in range(NUM_LABELS)])
    column = dataset.with_columns(teacher_logits=torch.tensor(built))
    by_hand = make_trainer(tmp_path / "hand", tiny("bert"), None, KD(), column, max_steps=6)
    trainer = cached(
        tmp_path, teacher=teacher, distiller=KD(), max_steps=6, teacher_cache_dtype="float32", teacher_cache_top_k=2
    )
    all_of_them = cached(tmp_path, teacher=teacher, distiller=KD(), max_steps=6)
    for run in (by_hand, trainer, all_of_them):
        run.train()
    assert counts(trainer) == (32, 16)
    assert largest_difference(weights(trainer.model), weights(by_hand.model)) < 1e-5
    assert largest_difference(weights(trainer.model), weights(all_of_them.model)) > 1e-3


def test_features_beside_the_largest_are_whole(tmp_path):
    distiller = Combined({"kd": KD(), "pkt": PKT(teacher_layers="linear:input")}, task_from="kd")
    trainer = cached(tmp_path, "cifar", distiller=distiller, max_steps=2, teacher_cache_top_k=2)
    trainer.train()
    kept, known = trainer.cache.features["linear:input"].read(np.arange(16))
    assert known.all()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    online = trainer.teacher(batch).features["linear:input"].numpy()
    np.testing.assert_allclose(kept, online, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("k", "message"),
    [(0, "be at least 1, got 0: leave it out"), (5, "lie between 1 and 4, as the teacher has 5 classes, got 5")],
)
def test_a_number_of_largest_that_keeps_nothing_or_all_is_refused(tmp_path, k, message):
    with pytest.raises(ValueError, match=f"teacher_cache_top_k must {message}"):
        cached(tmp_path, teacher_cache_top_k=k)


def test_the_largest_beyond_the_dtype_are_refused(tmp_path):
    with pytest.raises(ValueError, match="logits one is 1e[+]06, beyond float16"):
        asked_and_read(largest(tmp_path, random_logits(4, 10) + 1e6, 2))


# What it costs


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def slow(self, function, seconds):
        def wrapped(*args, **kwargs):
            self.now += seconds(*args, **kwargs)
            return function(*args, **kwargs)

        return wrapped


def test_figures_are_what_was_measured(tmp_path, monkeypatch):
    """Two seconds an answer, half a one to read a row, none to write."""
    clock = Clock()
    monkeypatch.setattr("hfkd.cache.time", clock)
    monkeypatch.setattr(Says, "__call__", clock.slow(Says.__call__, lambda self, batch: 2.0 * len(batch["index"])))
    identity = {"precision": "float32", "dtype": "float16"}
    cache = TeacherCache(
        Says(random_logits(4, 10)), np.arange(4), identity, classes=10, folder=tmp_path / "cache", views=1
    )
    cache.logits.read = clock.slow(cache.logits.read, lambda positions: 0.5 * len(positions))
    before = {"hits": 0, "misses": 0, "asking_seconds": 0.0, "store_seconds": 0.0, "bytes": cache.bytes}
    assert cache.figures(0, 0, 0.0, 0.0) == before  # nobody knows what an answer takes
    for view, asked in ((0, [0, 1, 2, 3]), (1, [2, 0]), (0, [3, 1, 2, 0])):
        cache({"index": torch.tensor(asked), "view": torch.full((len(asked),), view)})
    measured = (cache.hits, cache.misses, cache.asking_seconds, cache.store_seconds)
    assert measured == (4, 6, 12.0, 5.0)
    cache.note_asked(4, 9.0)
    cache.note_asked(2, 3.0)
    figures = cache.figures(*measured)
    assert {name: figures[name] for name in list(figures)[5:]} == {
        "seconds_per_answer": 2.0,
        "fill_seconds": 12.0,
        "saved_seconds": 4 * 2.0 - 5.0,
        "break_even_epochs": 12.0 / (4 * (2.0 - 0.5)),
    }
    assert "break_even_epochs" not in cache.figures(1, 0, 0.0, 2.5)  # reading takes longer than asking


def test_runs_that_note_at_once_lose_nothing(tmp_path, monkeypatch):
    cache, read = formula_cache(tmp_path / "cache"), TeacherCache._manifest

    def slowly(self):
        manifest = read(self)
        time.sleep(0.01)
        return manifest

    monkeypatch.setattr(TeacherCache, "_manifest", slowly)
    with ThreadPoolExecutor(4) as runs:
        list(runs.map(lambda _: cache.note_asked(3, 0.5), range(8)))
    assert read(cache)["asked"] == {"answers": 24, "seconds": 4.0}


def test_a_file_that_another_run_renames_meanwhile_takes_no_bytes(tmp_path):
    cache = formula_cache(tmp_path / "cache")
    there = cache.bytes
    (tmp_path / "cache" / "manifest.json.part").symlink_to("gone")  # listed, and then not there
    assert cache.bytes == there > 0


def test_training_says_what_its_cache_cost(tmp_path):
    runs = [cached(tmp_path, max_steps=4) for _ in range(2)]
    first, second = (run.train().metrics for run in runs)
    known = [(run["teacher_cache_hits"], run["teacher_cache_misses"]) for run in (first, second)]
    assert known == [(16, 16), (32, 0)]
    assert first["teacher_cache_asking_seconds"] > 0 == second["teacher_cache_asking_seconds"]
    assert second["teacher_cache_bytes"] == runs[1].cache.bytes
    assert second["teacher_cache_seconds_per_answer"] == first["teacher_cache_asking_seconds"] / 16
    assert second["teacher_cache_fill_seconds"] == pytest.approx(first["teacher_cache_asking_seconds"])
    saved = 32 * second["teacher_cache_seconds_per_answer"] - second["teacher_cache_store_seconds"]
    assert second["teacher_cache_saved_seconds"] == pytest.approx(saved)
    assert runs[0].train().metrics["teacher_cache_hits"] == 32  # its own, not those of both
    assert logged(runs[1], "teacher_cache_hits") == [32]
    runs[1].create_model_card()
    assert "teacher_cache" not in (tmp_path / "run" / "README.md").read_text()
    assert "teacher_cache_hits" not in cached(tmp_path, teacher_cache=None).train().metrics


def test_loading_a_teacher_is_no_part_of_what_an_answer_takes(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("hfkd.cache.time", clock)
    _, folder = in_folder(tmp_path, "bert")
    trainer = cached(tmp_path, teacher=folder, max_steps=2)
    trainer.teacher.load = clock.slow(trainer.teacher.load, lambda: 1000.0)
    metrics = trainer.train().metrics
    assert (clock.now, metrics["teacher_cache_asking_seconds"]) == (1000.0, 0.0)


# What may happen to the files


def damaged(cache, name, change):
    content = bytearray((cache.folder / name).read_bytes())
    change(content)
    (cache.folder / name).write_bytes(content)


def flip(content):
    content[8 * 2 * NUM_LABELS] ^= 1  # one bit in row 8


@pytest.mark.parametrize(
    ("name", "change", "lost"),
    [
        ("logits", flip, 1),
        ("logits.checksums", lambda content: content.__setitem__(slice(12, 20), bytes(8)), 2),
        ("logits", lambda content: content.__delitem__(slice(4 * 2 * NUM_LABELS, None)), 12),
        ("logits.checksums", lambda content: content.clear(), 16),
    ],
)
def test_a_damaged_row_is_absent(tmp_path, name, change, lost):
    whole = cached(tmp_path, max_steps=2)
    whole.train()
    expected = table(whole.cache)[0].copy()
    damaged(whole.cache, name, change)
    trainer = cached(tmp_path, max_steps=2)
    assert (~table(trainer.cache)[1]).sum() == lost
    trainer.train()
    assert counts(trainer) == (16 - lost, lost)
    np.testing.assert_allclose(table(trainer.cache)[0], expected, rtol=2e-3)


def test_a_row_in_the_place_of_another_is_absent(tmp_path):
    trainer = cached(tmp_path, max_steps=2)
    trainer.train()
    for column in (trainer.cache.logits.values, trainer.cache.logits.checksums):
        column[[2, 9]] = column[[9, 2]]
    assert np.flatnonzero(~table(trainer.cache)[1]).tolist() == [2, 9]


def test_a_damaged_manifest_is_refused(tmp_path):
    folder = tmp_path / "mine"
    cached(tmp_path, teacher_cache=str(folder), max_steps=1).train()
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])
    with pytest.raises(ValueError, match=r"manifest.json is damaged: name another folder in teacher_cache="):
        cached(tmp_path, teacher_cache=str(folder))
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match="holds a teacher's answers without manifest.json"):
        cached(tmp_path, teacher_cache=str(folder))


@pytest.mark.parametrize("byte", [0, 2 * 2, 2 * 4], ids=["largest", "classes", "others"])
def test_a_damaged_row_of_the_largest_logits_is_absent(tmp_path, byte):
    whole = cached(tmp_path, max_steps=2, teacher_cache_top_k=2)
    whole.train()
    damaged(whole.cache, "logits", lambda content: content.__setitem__(6 * 12 + byte, content[6 * 12 + byte] ^ 1))
    trainer = cached(tmp_path, max_steps=2, teacher_cache_top_k=2)
    assert np.flatnonzero(~table(trainer.cache)[1]).tolist() == [6]
    trainer.train()
    assert counts(trainer) == (15, 1)


SAMPLES, WIDTH, VIEWS = 256, 4000, 2
ALL = (VIEWS + 1) * SAMPLES
IDENTITY = {"precision": "float32", "dtype": "float16"}


@functools.cache
def answers():
    """Of a teacher without a model, to every sample of every view."""
    return torch.sin(torch.arange(ALL)[:, None] * 0.7 + torch.arange(WIDTH) * 0.01) + 2


class Formula:
    """Gives them; ``noise`` makes two of it disagree a little."""

    precision = "float32"

    def __init__(self, noise):
        self.noise = noise

    def __call__(self, batch):
        return ModelOutputs(answers()[batch["view"] * SAMPLES + batch["index"]] + self.noise)


def formula_cache(folder, noise=0.0):
    return TeacherCache(Formula(noise), np.arange(SAMPLES), IDENTITY, classes=WIDTH, folder=folder, views=VIEWS)


def fill(folder, seed, noise=0.0):
    cache = formula_cache(folder, noise)
    for part in torch.randperm(ALL, generator=torch.Generator().manual_seed(seed)).split(64):
        cache({"index": part % SAMPLES, "view": part // SAMPLES})
    return cache


def kept_and_right(cache, *noises):
    """How many rows are there; asserts that they are the answers, with some noise or other."""
    kept, known = cache.logits.read(np.arange(ALL))
    off = [np.abs(kept[known] - answers().numpy()[known] - noise).max(1) for noise in noises]
    assert (np.min(off, axis=0) < 2e-3).all()
    return int(known.sum())


def process(*arguments):
    return multiprocessing.get_context("fork").Process(target=fill, args=arguments)


def test_a_writer_may_be_killed_at_any_moment(tmp_path):
    """Each time every row is the teacher's or absent; then one run completes what they left.

    ``HFKD_KILLS=200 pytest -k killed -s`` kills more, and tells of each.
    """
    generator = np.random.default_rng(0)
    cache, there, total_torn = formula_cache(tmp_path / "cache"), [], 0
    for seed in range(int(os.environ.get("HFKD_KILLS", 20))):
        cache.logits.checksums[:] = 0
        cache.logits.values[:] = 0
        writer, start = process(tmp_path / "cache", seed), time.perf_counter()
        writer.start()
        enough = int(generator.integers(0, 8)) * 64
        while cache.filled <= enough:
            assert writer.is_alive()
        time.sleep(generator.uniform(0, 0.002))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        there.append(kept_and_right(cache, 0.0))
        touched = int(((cache.logits.checksums != 0) | cache.logits.values.any(1)).sum())
        torn = touched - there[-1]
        total_torn += torn
        when = time.perf_counter() - start
        print(f"kill {seed}: after {when:.3f} s, {there[-1]} rows whole, {ALL - touched} absent, {torn} torn and seen")
    print(f"{len(there)} kills: {sum(there)} rows whole and right, {total_torn} torn and seen, 0 wrong")
    assert len(set(there)) > 5
    last = fill(tmp_path / "cache", 99)
    assert (last.hits, last.misses) == (there[-1], ALL - there[-1])
    assert kept_and_right(cache, 0.0) == ALL


def test_two_writers_share_one_cache(tmp_path):
    """They answer a little differently, as two batches of one sample do: a row is one of the two, or absent."""
    writers = [process(tmp_path / "cache", seed, noise) for seed, noise in ((0, 0.0), (1, 0.25))]
    cache = formula_cache(tmp_path / "cache")
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        kept_and_right(cache, 0.0, 0.25)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert kept_and_right(cache, 0.0, 0.25) > 0.9 * ALL


# On a device


@pytest.mark.parametrize("with_cache", [False, True])
def test_images_on_the_device_train_to_the_same_student(tmp_path, with_cache):
    """As on an accelerator, which the CPU stands in for: training, held-out and evaluation set, views and hooks."""
    runs = []
    for moved in (False, True):
        held_out = images(6, pictures=1)
        trainer = make_trainer(
            tmp_path / f"{moved}",
            tiny("cifar"),
            tiny_teacher("cifar"),
            KDAIF(warm_up=0.0),
            Subset(images(16, augment="crop_flip", views=3), range(1, 14)),
            max_steps=5,
            per_device_train_batch_size=4,
            teacher_cache=str(tmp_path / f"cache-{moved}") if with_cache else None,
            trainer={"held_out_dataset": held_out, "eval_dataset": {"small": images(5, pictures=2)}},
        )
        if moved:
            trainer.args.dataloader_pin_memory = True
            trainer._move_images(torch.device("cpu"))
            assert not trainer.args.dataloader_pin_memory
            for dataset in (trainer.train_dataset.dataset, held_out, trainer.eval_dataset["small"]):
                assert dataset._on_device is not None
                dataset._augment_small = None  # not numpy's way
        trainer.train()
        runs.append((trainer, trainer.evaluate()["eval_small_loss"]))
    (here, loss), (there, same_loss) = runs
    assert_identical(weights(there.model, there.distiller), weights(here.model, here.distiller))
    assert same_loss == loss
    if with_cache:
        assert counts(there) == counts(here)


@pytest.mark.parametrize(("workers", "rand_augment"), [(2, None), (0, "rand-m9")])
def test_images_stay_where_workers_or_the_processor_need_them(tmp_path, workers, rand_augment):
    dataset = images(augment="flip", rand_augment=rand_augment)
    trainer = make_trainer(tmp_path, tiny("cifar"), dataset=dataset, dataloader_num_workers=workers)
    trainer.args.dataloader_pin_memory = True
    trainer._move_images(torch.device("cpu"))
    assert dataset._on_device is None
    assert trainer.args.dataloader_pin_memory


def test_workers_of_a_loader_ask_about_the_samples_that_they_send(tmp_path):
    """Their tensors are moved into shared memory on the way, and what they had is freed."""
    losses = []
    for workers in (0, 2):
        trainer = make_trainer(
            tmp_path / str(workers),
            tiny("bert"),
            tiny_teacher("bert"),
            dataset=rows("bert"),
            max_steps=8,
            teacher_cache=str(tmp_path / "cache"),
            dataloader_num_workers=workers,
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[1] == losses[0]
    assert trainer.cache.misses == 0
