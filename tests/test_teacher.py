"""Several teachers that teach as one, against loops and in a trainer; and answers that are a column of the data."""

import copy
import math

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import (
    Mutual,
    assert_identical,
    largest_difference,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    tokenizer,
    weights,
)
from torch import nn
from transformers import TrainerCallback, ViTImageProcessor

from hfkd import TeacherEnsemble
from hfkd.data import DistillationCollator, ImageDataset
from hfkd.distillers import AT, DML, KD, TTM, Combined, HiddenStates, SelfDistillation, StudentAlone, TfKD
from hfkd.functional import kd_loss


NAMES = ["cat", "dog", "owl", "fox", "bee"]


def ensemble(**options):
    return TeacherEnsemble([nn.Identity(), nn.Identity(), nn.Identity()], **options)


def random_logits():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


def softmax(scores, temperature=1.0):
    exponentials = [math.exp(score / temperature) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def expected_weights(logits, labels, sample):
    """By the formula of the source, from plain numbers."""
    if labels[sample] == -100:
        return [1 / len(logits)] * len(logits)
    errors = [1 / softmax(member[sample].tolist())[labels[sample]] for member in logits]  # exp of the cross-entropy
    return [(1 - error / sum(errors)) / (len(logits) - 1) for error in errors]


LABELS = [2, -100, 0, 4]


@pytest.mark.parametrize("weighting", ["equal", "cross_entropy"])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_the_average_is_its_definition(average, weighting):
    logits, temperature = random_logits(), 3.0
    combined = ensemble(average=average, weighting=weighting, temperature=temperature).combine(
        logits, torch.tensor(LABELS)
    )
    for sample in range(4):
        shares = expected_weights(logits, LABELS, sample) if weighting == "cross_entropy" else [1 / 3] * 3
        assert sum(shares) == pytest.approx(1.0)
        for c in range(5):
            if average == "logits":
                value = sum(w * z[sample, c].item() for w, z in zip(shares, logits, strict=True))
            else:
                softened = [softmax(z[sample].tolist(), temperature)[c] for z in logits]
                value = temperature * math.log(sum(w * p for w, p in zip(shares, softened, strict=True)))
            assert combined[sample, c].item() == pytest.approx(value, rel=1e-12)


def test_golden_value():
    """Sure of either class: their mean is undecided, and by cross-entropy nearly all goes to who is right."""
    pair = [torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, math.log(3.0)]])]
    both = TeacherEnsemble([nn.Identity(), nn.Identity()], temperature=1.0)
    torch.testing.assert_close(both.combine(pair), torch.full((1, 2), math.log(0.5)))
    both.weighting = "cross_entropy"  # weights 3/4 and 1/4: mean 3/4 · 3/4 + 1/4 · 1/4
    torch.testing.assert_close(both.combine(pair, torch.tensor([0])).exp(), torch.tensor([[0.625, 0.375]]))


def test_a_method_at_the_same_temperature_learns_from_the_mean_of_probabilities():
    logits, student = random_logits(), torch.randn(4, 5, dtype=torch.float64)
    combined = ensemble(temperature=2.0).combine(logits)
    mean = torch.stack([(z / 2.0).softmax(-1) for z in logits]).mean(0)
    torch.testing.assert_close((combined / 2.0).softmax(-1), mean)
    expected = 4 * (mean * (mean.log() - (student / 2.0).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(kd_loss(student, combined, temperature=2.0), expected)


@pytest.mark.parametrize("weighting", ["equal", "cross_entropy"])
def test_soft_labels_and_none_weigh_too(weighting):
    logits, labels = random_logits(), torch.tensor([2, 1, 0, 4])
    several = ensemble(weighting=weighting)
    hard, soft = several.combine(logits, labels), several.combine(logits, nn.functional.one_hot(labels, 5).double())
    torch.testing.assert_close(hard, soft)
    torch.testing.assert_close(several.combine(logits), ensemble().combine(logits))
    assert torch.equal(hard, several.combine(logits)) == (weighting == "equal")


def test_a_member_that_is_utterly_wrong_leaves_the_others_finite():
    logits = [torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1.0]])]
    several = TeacherEnsemble([nn.Identity(), nn.Identity()], temperature=1.0, weighting="cross_entropy")
    torch.testing.assert_close(several.combine(logits, torch.tensor([1])), logits[1].log_softmax(-1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"members": [nn.Identity()]}, "at least two members, got 1: pass a single teacher as it is"),
        ({"average": "mean"}, 'average must be "probabilities" or "logits"'),
        ({"weighting": "accuracy"}, 'weighting must be "equal" or "cross_entropy"'),
        ({"temperature": 0.0}, "use 1.0 for no softening"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TeacherEnsemble(**{"members": [nn.Identity(), nn.Identity()], **arguments})


# In a trainer


def train(tmp_path, teacher, distiller=None, family="bert", **arguments):
    student, dataset = tiny(family), rows(family)
    student.config.id2label = dict(enumerate(NAMES))  # of teachers without names the order is taken as it is
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        distiller or KD(temperature=4.0),
        dataset,
        trainer={"eval_dataset": rows(family, 40, seed=5)},
        **arguments,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"average": "logits"}, {"weighting": "cross_entropy"}])
def test_two_equal_teachers_are_one(tmp_path, options):
    teacher = tiny_teacher("bert")
    one = train(tmp_path, teacher)
    two = train(tmp_path, TeacherEnsemble([teacher, copy.deepcopy(teacher)], **options))
    assert largest_difference(weights(one.model), weights(two.model)) <= 1e-6
    assert logged(one, "teacher_accuracy") == logged(two, "teacher_accuracy")


def test_a_list_is_an_ensemble_and_the_student_learns_from_its_mean(tmp_path):
    """One step against a loop: two families, and segments that only the second member takes."""
    teachers = [tiny_teacher("distilbert", seed=7), tiny_teacher("bert")]
    student, dataset = tiny("distilbert"), rows("bert", 8)
    batch = DistillationCollator(tokenizer())([dataset[i] for i in range(8)])
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        segments = {"token_type_ids": batch["token_type_ids"]}
        answers = [teachers[0].eval()(**texts).logits, teachers[1].eval()(**texts, **segments).logits]
        target = torch.stack([(z / 4.0).softmax(-1) for z in answers]).mean(0)
        own = (student(**texts).logits / 4.0).log_softmax(-1)
    expected = 16 * (target * (target.log() - own)).sum(-1).mean().item()
    right = (target.argmax(-1) == batch["labels"]).float().mean().item()
    trainer = make_trainer(
        tmp_path, student, teachers, KD(alpha=1.0), dataset, max_steps=1, trainer={"eval_dataset": dataset}
    )
    trainer.train()
    assert isinstance(trainer.teacher_model, TeacherEnsemble)
    assert logged(trainer, "kd") == pytest.approx([expected], rel=1e-4)
    assert logged(trainer, "teacher_accuracy") == pytest.approx([right])


@pytest.mark.parametrize("options", [{}, {"weighting": "cross_entropy"}])
def test_each_member_keeps_its_own_order_of_classes(tmp_path, options):
    order = [3, 0, 4, 1, 2]
    plain, other = tiny_teacher("bert"), tiny_teacher("bert", seed=7)
    for teacher in (plain, other):
        teacher.config.id2label = dict(enumerate(NAMES))
    permuted = copy.deepcopy(other)
    permuted.config.id2label = {i: NAMES[c] for i, c in enumerate(order)}
    with torch.no_grad():
        permuted.classifier.weight.copy_(other.classifier.weight[order])
        permuted.classifier.bias.copy_(other.classifier.bias[order])
    runs = [train(tmp_path, TeacherEnsemble([plain, second], **options)) for second in (other, permuted)]
    assert largest_difference(*(weights(run.model) for run in runs)) <= 1e-6
    assert logged(runs[0], "teacher_accuracy") == logged(runs[1], "teacher_accuracy")


def test_members_are_frozen_and_stay_as_they_are(tmp_path):
    teachers = [tiny_teacher("resnet"), tiny_teacher("cifar", seed=7)]
    before, modes = weights(*teachers), []
    for teacher in teachers:
        teacher.train().register_forward_hook(
            lambda module, *_: modes.extend(part.training for part in module.modules())
        )
    trainer = train(tmp_path, teachers, family="resnet")
    assert modes
    assert not any(modes)
    assert_identical(weights(*teachers), before)
    assert not any(parameter.requires_grad for teacher in teachers for parameter in teacher.parameters())
    convolution = teachers[1].conv1.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    teachers[1].train()
    with pytest.raises(RuntimeError, match="must stay frozen"):
        trainer.train()


def test_a_convolutional_teacher_may_come_in_half_precision(tmp_path):
    """As ``from_pretrained`` gives it where the file is; images are float32."""
    teacher = tiny_teacher("cifar").bfloat16()
    make_trainer(tmp_path, tiny("cifar"), teacher, KD(), rows("cifar")).train()
    assert teacher.conv1.weight.dtype == torch.bfloat16


def test_members_may_have_a_precision_of_their_own(tmp_path):
    teachers, seen = [tiny_teacher("bert"), tiny_teacher("bert", seed=7).bfloat16()], []
    for teacher in teachers:
        teacher.register_forward_hook(lambda *arguments: seen.append(arguments[-1].logits.dtype))
    before = weights(*teachers)
    train(tmp_path, teachers, teacher_dtype="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert_identical(weights(*teachers), before)


def test_the_score_of_an_ensemble_does_not_see_the_labels(tmp_path):
    """Members who are right about half of the samples each: weighed by the labels they would be right about all."""
    teachers = [tiny_teacher("bert"), tiny_teacher("bert", seed=7)]
    scores = [
        logged(train(tmp_path, TeacherEnsemble(teachers, weighting=kind), max_steps=1), "teacher_accuracy")
        for kind in ("equal", "cross_entropy")
    ]
    assert scores[0] == scores[1]


def test_teachers_of_numbers_are_averaged_as_they_are(tmp_path):
    teachers = [tiny_teacher("bert", num_labels=1, seed=seed) for seed in (3, 4)]
    dataset = rows("bert", 8).with_columns(labels=torch.randn(8, generator=torch.Generator().manual_seed(2)))
    batch = DistillationCollator(tokenizer())([dataset[i] for i in range(8)])
    labels = batch.pop("labels")
    batch.pop("index")
    with torch.no_grad():
        mean = sum(teacher.eval()(**batch).logits[:, 0] for teacher in teachers) / 2
    more = {"eval_dataset": dataset}
    trainer = make_trainer(
        tmp_path,
        tiny("bert", num_labels=1),
        TeacherEnsemble(teachers, average="logits"),
        KD(),
        dataset,
        trainer=more,
    )
    assert trainer.evaluate_teacher() == {"mse": pytest.approx((mean - labels).square().mean().item(), rel=1e-5)}
    with pytest.raises(ValueError, match=r'no probabilities to average.*average="logits"'):
        make_trainer(tmp_path, tiny("bert", num_labels=1), teachers, KD(), dataset)


@pytest.mark.parametrize(
    ("distiller", "family", "message"),
    [
        (HiddenStates(), "bert", "HiddenStates looks inside its teacher, and an ensemble has only logits: pass one"),
        (AT(), "cifar", "AT looks inside its teacher"),
        (TfKD(), "bert", "TfKD looks inside its teacher"),
        (Combined({"kd": KD(), "at": AT()}, task_from="kd"), "cifar", "Combined looks inside its teacher"),
        (Mutual(), "bert", "Mutual trains its teacher, and an ensemble stays as it is: pass one teacher_model"),
        (DML(), "bert", "DML brings its own teacher"),
        (SelfDistillation(), "bert", "SelfDistillation brings its own teacher"),
        (StudentAlone(), "bert", "StudentAlone uses no teacher"),
    ],
)
def test_methods_that_need_one_teacher_are_refused_by_name(tmp_path, distiller, family, message):
    teachers = [tiny_teacher(family), tiny_teacher(family, seed=7)]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny(family), teachers, distiller, rows(family))


def test_layers_that_a_method_names_beforehand_are_refused(tmp_path):
    class Look(KD):
        teacher_layers = ("members.0.classifier",)

    with pytest.raises(ValueError, match="Look looks inside its teacher"):
        make_trainer(tmp_path, tiny("bert"), [tiny_teacher("bert"), tiny_teacher("bert", seed=7)], Look(), rows())


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (lambda: tiny("bert", seed=1), r"the classifier of teacher 2 of 2 \(BertFor.* is freshly initialised"),
        (lambda: tiny_teacher("bert", num_labels=7), "teacher 2 of 2 has 7 classes and the student 5"),
        (lambda: nn.Linear(2, 2), r"teacher 2 of 2 \(Linear\) has no config"),
    ],
)
def test_a_member_that_does_not_fit_is_named(tmp_path, member, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny("bert"), [tiny_teacher("bert"), member()], KD(), rows("bert"))


def test_the_model_card_names_every_member(tmp_path):
    teachers = [tiny_teacher("bert"), tiny_teacher("distilbert", seed=7)]
    for teacher, name in zip(teachers, ("first/one", "second/one"), strict=True):
        teacher.config.name_or_path = name
    trainer = train(tmp_path, teachers, TTM(), max_steps=1)
    trainer.create_model_card()
    total = sum(parameter.numel() for teacher in teachers for parameter in teacher.parameters())
    assert f"taught by `first/one` and `second/one` with {total:,}." in (tmp_path / "README.md").read_text()


# Answers that are a column of the data


def answered(family="bert", name="teacher_logits", n=16):
    """Rows with a teacher's answers, and the teacher."""
    teacher, dataset = tiny_teacher(family).eval(), rows(family, n)
    inputs = {k: v for k, v in dataset.columns.items() if k not in ("labels", "index", "token_type_ids")}
    segments = {"token_type_ids": dataset.columns["token_type_ids"]} if family == "bert" else {}
    with torch.no_grad():
        logits = teacher(**inputs, **segments).logits
    answers = logits if name == "teacher_logits" else logits.softmax(-1)
    return dataset.with_columns(**{name: answers}), teacher


@pytest.mark.parametrize("name", ["teacher_logits", "teacher_probabilities"])
@pytest.mark.parametrize("kind", ["rows", "hub"])
def test_a_column_teaches_as_its_teacher_would(tmp_path, name, kind):
    dataset, teacher = answered(name=name)
    if kind == "hub":
        samples = [{k: v.tolist() for k, v in dataset[i].items()} for i in range(16)]
        dataset = datasets.Dataset.from_list(samples)
    online = make_trainer(tmp_path, tiny("bert"), teacher, KD(), rows("bert"))
    bought = make_trainer(tmp_path, tiny("bert"), None, KD(), dataset)
    for trainer in (online, bought):
        trainer.train()
    assert largest_difference(weights(online.model), weights(bought.model)) < 1e-5
    right = (online.evaluate_teacher(rows("bert"))["accuracy"],)
    assert logged(bought, "teacher_train_accuracy") == pytest.approx(right)
    bought.create_model_card()
    assert f"taught by its data's column `{name}`" in (tmp_path / "README.md").read_text()


def test_image_data_hands_on_a_column(tmp_path):
    generator = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(8)]
    answers = generator.normal(size=(8, 5)).astype(np.float32)
    columns = {"image": pictures, "label": [i % 5 for i in range(8)], "index": list(range(8))}
    split = datasets.Dataset.from_dict({**columns, "teacher_logits": answers.tolist()})
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    dataset = ImageDataset(split, processor, augment="crop_flip")
    np.testing.assert_array_equal(dataset.__getitems__([5, 2])["teacher_logits"], answers[[5, 2]])
    trainer = make_trainer(tmp_path, tiny("cifar"), None, KD(alpha=1.0), dataset, max_steps=1, learning_rate=0.0)
    trainer.train()
    mixed = ImageDataset(split, processor, mixup_alpha=0.2, num_labels=5)
    with pytest.raises(ValueError, match="teacher_logits are about whole samples, and Mixup and CutMix mix them"):
        make_trainer(tmp_path, tiny("cifar"), None, KD(), mixed)


def test_numbers_are_a_column_too(tmp_path):
    dataset = rows("bert").with_columns(labels=torch.randn(16), teacher_logits=torch.arange(16.0))
    trainer = make_trainer(tmp_path, tiny("bert", num_labels=1), None, KD(), dataset, max_steps=1)
    batch = {"teacher_logits": dataset.columns["teacher_logits"][3:5]}
    assert trainer.teacher(batch).logits.tolist() == [[3.0], [4.0]]
    trainer.train()


def spoilt(change):
    dataset, _ = answered(name=change.pop("name", "teacher_logits"))
    name = next(name for name in dataset.columns if name.startswith("teacher_"))
    dataset.columns[name] = change["answers"](dataset.columns[name])
    return dataset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": lambda z: z[:, :3]}, "teacher_logits has 3 numbers a sample, and the student 5 classes"),
        ({"answers": lambda z: z.index_fill(0, torch.tensor([4, 6]), torch.nan)}, r"of row 4 is .nan.* \(and 1 more"),
        ({"name": "teacher_probabilities", "answers": lambda p: 2 * p}, "add up to 1, or call them teacher_logits"),
        ({"name": "teacher_probabilities", "answers": lambda p: p - p.flip(1) + 0.2}, "add up to 1, or call them"),
    ],
)
def test_answers_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny("bert"), None, KD(), spoilt(dict(change)))


def test_methods_and_data_that_a_column_cannot_teach_are_refused(tmp_path):
    dataset, _ = answered()
    both = dataset.with_columns(teacher_probabilities=torch.full((16, 5), 0.2))
    with pytest.raises(ValueError, match="teacher_logits and teacher_probabilities: drop one"):
        make_trainer(tmp_path, tiny("bert"), None, KD(), both)
    for method in (HiddenStates(), TfKD()):
        with pytest.raises(ValueError, match="looks inside its teacher, and a column holds only|needs a teacher"):
            make_trainer(tmp_path, tiny("bert"), None, method, dataset)
    with pytest.raises(ValueError, match="KD needs a teacher: pass teacher_model=, or its answers as a column"):
        make_trainer(tmp_path, tiny("bert"), None, KD(), rows("bert"))
    numbers = rows("bert").with_columns(labels=torch.randn(16), teacher_probabilities=torch.ones(16, 1))
    with pytest.raises(ValueError, match="regression has no probabilities"):
        make_trainer(tmp_path, tiny("bert", num_labels=1), None, KD(), numbers)


def test_before_the_first_step_the_student_answers_once(tmp_path):
    """For the metric to choose by, and beside the teacher."""
    data = rows("bert", 8, seed=1)
    trainer = make_trainer(
        tmp_path,
        tiny_teacher("bert", seed=3),
        tiny_teacher("bert"),
        dataset=rows("bert"),
        max_steps=1,
        metric_for_best_model="accuracy",
        trainer={"eval_dataset": data, "compute_metrics": lambda _: {"accuracy": 0.5}},
    )
    seen = []

    class Begun(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            asked.remove()

    trainer.add_callback(Begun())
    asked = trainer.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.logits)))
    trainer.train()
    assert sum(seen) == 8
