"""What is refused before a run starts, and that each message names the remedy."""

import copy
import os
import types
from functools import partial

import datasets
import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import (
    FAMILIES,
    NUM_LABELS,
    Bank,
    MovingAverage,
    Mutual,
    Weighted,
    as_datasets,
    largest_difference,
    logged,
    make_trainer,
    named,
    rows,
    tiny,
    tiny_teacher,
    tokenizer,
    weights,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import BertForSequenceClassification, DataCollatorWithPadding

from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.checks import check_processes, check_reload, check_sharding, class_names
from hfkd.distillers import DKD, KD, TTM, StudentAlone, Wrapper
from hfkd.labels import align_labels, head_looks_new


NAMES = ["cat", "dog", "owl", "fox", "bee"]


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[i] for i in range(len(self.dataset)))


# Teacher


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    teacher = named(tiny_teacher("bert"), ["cat", "dog", "owl", "fox", "wasp"])
    with pytest.raises(
        ValueError, match=r"only there \['wasp'\], only in the student \['bee'\].*set id2label on both"
    ):
        make_trainer(tmp_path, named(tiny("bert"), NAMES), teacher, KD(), rows("bert"))


def test_a_teacher_with_another_number_of_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher has 7 classes and the student 5: .*num_labels="):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert", num_labels=7), KD(), rows("bert"))


def teachers_of_two_orders():
    """Of NAMES, and of the same classes in another order, whose names are written otherwise."""
    order = [3, 0, 4, 1, 2]  # the permuted teacher's class i is the plain one's class order[i]
    plain = named(tiny_teacher("bert"), NAMES)
    permuted = named(copy.deepcopy(plain), [NAMES[i].upper() + " " for i in order])
    with torch.no_grad():
        permuted.classifier.weight.copy_(plain.classifier.weight[order])
        permuted.classifier.bias.copy_(plain.classifier.bias[order])
    return plain, permuted


def test_permuted_classes_are_put_into_the_students_order(tmp_path):
    """A teacher whose classes are permuted teaches exactly what the unpermuted one teaches."""
    plain, permuted = teachers_of_two_orders()
    trained = []
    for teacher in (plain, permuted):
        student, dataset = named(tiny("bert"), NAMES), rows("bert")
        trainer = make_trainer(tmp_path, student, teacher, KD(), dataset, trainer={"eval_dataset": dataset})
        trainer.train()
        trained.append((weights(student), logged(trainer, "teacher_accuracy")))
    assert largest_difference(trained[0][0], trained[1][0]) <= 1e-6
    assert trained[0][1] == trained[1][1]


@pytest.mark.parametrize("kind", ["datasets", "stream", "map-style", "evaluation"])
def test_a_student_without_names_has_those_of_the_data(tmp_path, kind):
    """Its classes are LABEL_0, LABEL_1, …: what a permuted teacher says is put into the data set's order."""
    dataset = evaluation = with_class_names(rows("bert"), NAMES)
    if kind == "stream":
        dataset = dataset.to_iterable_dataset()
    elif kind == "map-style":
        dataset = evaluation = rows("bert")
        dataset.label_names = NAMES
    elif kind == "evaluation":
        dataset = rows("bert")
    answers = []
    for teacher in teachers_of_two_orders():
        more = {"eval_dataset": evaluation}
        trainer = make_trainer(tmp_path, tiny("bert"), teacher, KD(), dataset, trainer=more)
        answers.append(trainer.teacher(trainer.context.take(evaluation, range(4))).logits)
    torch.testing.assert_close(*answers)
    wrong = named(tiny_teacher("bert"), ["wasp", *NAMES[1:]])
    message = r"classes of the teacher are not the data set's: only there \['wasp'\], only in the data set \['cat'\]"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny("bert"), wrong, KD(), dataset, trainer={"eval_dataset": evaluation})


def test_label_names_are_matched_by_name():
    assert align_labels(["a", "b", "c"], ["c", "a", "b"], whose="x") == [1, 2, 0]
    assert align_labels(["a", "b"], ["A ", "b"], whose="x") is None
    assert align_labels(None, ["a", "b"], whose="x") is None
    with pytest.raises(ValueError, match="the classes of x are not the student's"):
        align_labels(["a", "a", "b"], ["a", "b", "a"], whose="x")


def test_a_fresh_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"BertForSequenceClassification\) is freshly initialised.*--train_teacher"):
        make_trainer(tmp_path, tiny("bert"), tiny("bert", seed=1), KD(), rows("bert"))


def test_a_fresh_head_is_fine_where_the_teacher_is_trained(tmp_path):
    make_trainer(tmp_path, tiny("bert"), tiny("bert", seed=1), Mutual(), rows("bert")).train()


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "resnet"])
def test_heads_are_told_apart(family):
    fresh = tiny(family, initializer_range=0.02)
    assert head_looks_new(fresh)
    assert not head_looks_new(tiny_teacher(family, initializer_range=0.02))
    trained = tiny(family, initializer_range=0.02)
    head = [module for module in trained.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.zeros_(head.bias)
    head.weight.data.mul_(3)  # trained without moving the bias
    assert not head_looks_new(trained)


def test_the_student_as_its_own_teacher_is_refused(tmp_path):
    student = tiny_teacher("bert")
    with pytest.raises(ValueError, match=r"same object: pass copy.deepcopy\(student\)"):
        make_trainer(tmp_path, student, student, KD(), rows("bert"))


def test_a_teacher_without_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher \(Linear\) has no config: wrap it as a PreTrainedModel"):
        make_trainer(tmp_path, tiny("bert"), nn.Linear(2, 2), KD(), rows("bert"))


@pytest.mark.parametrize("distiller", [KD(), Weighted(), Mutual()])
def test_a_method_without_the_teacher_it_needs_is_refused(tmp_path, distiller):
    with pytest.raises(ValueError, match=f"{type(distiller).__name__} needs a teacher: pass teacher_model="):
        make_trainer(tmp_path, tiny("bert"), None, distiller, rows("bert"))


def test_a_teacher_that_nobody_asks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"StudentAlone uses no teacher: leave out teacher_model, or choose KD\(\)"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), StudentAlone(), rows("bert"))


def test_a_second_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match="MovingAverage brings its own teacher: leave out teacher_model"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), MovingAverage(), rows("bert"))


def test_a_trained_teacher_with_permuted_classes_is_refused(tmp_path):
    teacher = named(tiny_teacher("bert"), NAMES[::-1])
    with pytest.raises(ValueError, match="trained must have the student's classes in the same order"):
        make_trainer(tmp_path, named(tiny("bert"), NAMES), teacher, Mutual(), rows("bert"))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_layer_that_does_not_exist_is_refused(tmp_path, side):
    distiller = KD()
    setattr(distiller, f"{side}_layers", ("bert.encoder.layer.7:input",))
    with pytest.raises(ValueError, match=r"no module 'bert.encoder.layer.7'; near it are bert.encoder.layer"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), distiller, rows("bert"))


# Labels


@pytest.mark.parametrize("kind", ["datasets", "map-style"])
@pytest.mark.parametrize(
    ("label", "which", "message"),
    [
        (6, "train", r"labels of the train set hold \[6\].*5 classes, 0 to 4: give the student num_labels=7"),
        (-1, "train", r"labels of the train set hold \[-1\].*-100 marks an unlabelled sample"),
        (-7, "evaluation", r"labels of the evaluation set hold \[-7\]"),
        (5, "evaluation", r"labels of the evaluation set hold \[5\].*num_labels=6"),
    ],
)
def test_labels_outside_the_range_are_refused(tmp_path, kind, label, which, message):
    sets = {"train": rows("bert"), "evaluation": rows("bert")}
    sets[which].columns["labels"][2] = label
    if kind == "datasets":
        sets = {name: as_datasets(dataset) for name, dataset in sets.items()}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny("bert"), None, None, sets["train"], trainer={"eval_dataset": sets["evaluation"]})


def test_a_wrong_label_in_one_of_several_evaluation_sets_names_the_set(tmp_path):
    wrong = rows("bert")
    wrong.columns["labels"][0] = 9
    with pytest.raises(ValueError, match="labels of the mismatched set"):
        make_trainer(
            tmp_path,
            tiny("bert"),
            None,
            None,
            rows("bert"),
            trainer={"eval_dataset": {"matched": rows("bert"), "mismatched": wrong}},
        )


def test_unlabelled_samples_and_hidden_test_labels_are_fine(tmp_path):
    train, evaluation = rows("bert"), rows("bert")
    train.columns["labels"][:3] = -100
    evaluation.columns["labels"][:] = -1
    trainer = make_trainer(
        tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), train, trainer={"eval_dataset": evaluation}
    )
    trainer.train()
    assert "eval_loss" not in trainer.evaluate()
    assert logged(trainer, "teacher_accuracy") == []


def test_labels_that_are_no_numbers_are_refused(tmp_path):
    dataset = as_datasets(rows("bert")).remove_columns("labels").add_column("label", ["cat"] * 16)
    with pytest.raises(ValueError, match="not numbers: map them to class indices first"):
        make_trainer(tmp_path, tiny("bert"), None, None, dataset)


def test_regression_targets_must_be_finite(tmp_path):
    labels = torch.randn(16)
    labels[4] = float("nan")
    dataset = rows("bert").with_columns(labels=labels)
    with pytest.raises(ValueError, match="NaN or infinity: remove those rows or set them to -100"):
        make_trainer(tmp_path, tiny("bert", num_labels=1), None, None, dataset)


def with_class_names(dataset, names):
    return as_datasets(dataset).cast_column("labels", datasets.ClassLabel(names=names))


def test_a_data_set_that_numbers_the_classes_otherwise_is_refused(tmp_path):
    dataset = with_class_names(rows("bert"), NAMES[::-1])
    with pytest.raises(ValueError, match="build the student with id2label in the data set's order"):
        make_trainer(tmp_path, named(tiny("bert"), NAMES), None, None, dataset)
    make_trainer(tmp_path, named(tiny("bert"), NAMES[::-1]), None, None, dataset)
    make_trainer(tmp_path, tiny("bert"), None, None, dataset)  # LABEL_0, LABEL_1, … say nothing


def test_other_columns_may_have_classes_of_their_own(tmp_path):
    """Such as CIFAR-100's coarse labels."""
    dataset = with_class_names(rows("bert"), NAMES).add_column("coarse_label", [0] * 16)
    dataset = dataset.cast_column("coarse_label", datasets.ClassLabel(names=["large", "small"]))
    make_trainer(tmp_path, named(tiny("bert"), NAMES), None, None, dataset)


def test_no_labels_at_all_leave_the_student_alone_nothing_to_learn(tmp_path):
    dataset = rows("bert").with_columns(labels=torch.full((16,), -100))
    with pytest.raises(ValueError, match="no training sample has a label.*nothing to learn"):
        make_trainer(tmp_path, tiny("bert"), None, None, dataset)
    make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), dataset).train()


def test_multi_label_students_are_refused(tmp_path):
    student = tiny("bert", problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="multi-label models are not supported: a sample has one class"):
        make_trainer(tmp_path, student, None, None, rows("bert"))


def test_soft_labels_are_refused_by_a_method_of_hard_ones(tmp_path):
    class Hard(KD):
        needs_hard_labels = True

    mixing, soft = rows("bert"), rows("bert").with_columns(labels=torch.full((16, NUM_LABELS), 0.2))
    mixing.soft_labels = True
    for dataset in (mixing, soft):
        for distiller, name in ((Hard(), "Hard"), (Wrapper(Hard()), "Wrapper")):
            with pytest.raises(ValueError, match=f"{name} needs class indices as labels: turn Mixup and CutMix off"):
                make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), distiller, dataset)


# Columns


@pytest.mark.parametrize("kind", ["datasets", "map-style"])
def test_a_missing_column_is_refused(tmp_path, kind):
    dataset = rows("bert").with_columns(index=None)
    dataset = as_datasets(dataset) if kind == "datasets" else dataset
    remedy = r"no column index, which Bank needs: .*dataset.add_column\(\"index\", list\(range\(len\(dataset\)\)\)\)"
    with pytest.raises(ValueError, match=remedy):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), Bank(), dataset)


def test_a_wrapper_asks_for_the_columns_of_its_base(tmp_path):
    dataset = rows("bert").with_columns(index=None)
    with pytest.raises(ValueError, match="no column index, which Weighted needs"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), Weighted(Bank()), dataset)


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_a_stream_is_refused_where_rows_are_looked_up_and_works_elsewhere(tmp_path, kind):
    stream = as_datasets(rows("bert")).to_iterable_dataset() if kind == "datasets" else Stream(rows("bert"))
    more = {"eval_dataset": stream}
    with pytest.raises(ValueError, match="looks samples up by index, and an IterableDataset has no fixed rows"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), Bank(), stream, trainer=more)
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), stream, max_steps=2, trainer=more)
    trainer.train()
    assert len(logged(trainer, "teacher_accuracy")) == 1
    assert len(logged(trainer, "kd")) == 2


# Processes


def test_deepspeed_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, tiny("bert"), None, None, rows("bert"))
    active = types.SimpleNamespace(num_processes=2, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(RuntimeError, match=r"DEEPSPEED is not supported: shard with FSDP2 \(--fsdp\), or use plain"):
        check_processes(trainer.args, active)


def test_a_student_for_each_node_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tiny("bert"), None, None, rows("bert"), save_on_each_node=True)
    four = types.SimpleNamespace(num_processes=4, distributed_type=DistributedType.MULTI_CPU)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_processes(trainer.args, four)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="leaves the student out on all nodes but the first .*a disk that all nodes"):
        check_processes(trainer.args, four)


SHARDING = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fsdp_version": 1}, 'FSDP1 is not supported .*"version": 2 in fsdp_config'),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, '"state_dict_type": "FULL_STATE_DICT"'),
        ({"cpu_ram_efficient_loading": True}, '"cpu_ram_efficient_loading": false'),
        ({"cpu_offload": True}, "offloading to the CPU is not supported"),
        ({"activation_checkpointing": True}, "activation_checkpointing is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_fsdp_that_lose_something_are_refused(wrong, message):
    with pytest.warns(UserWarning, match="FSDP is tested on CPUs alone"):
        check_sharding(FullyShardedDataParallelPlugin(**SHARDING), tiny("bert"))
    with pytest.raises(ValueError, match=message):
        check_sharding(FullyShardedDataParallelPlugin(**{**SHARDING, **wrong}), tiny("bert"))


def test_adapters_are_refused_under_fsdp():
    student = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="FSDP shards a PreTrainedModel alone, and the student is a PeftModel: train"):
        check_sharding(FullyShardedDataParallelPlugin(**SHARDING), student)


# Arguments


def test_a_loss_that_would_bypass_the_distiller_is_refused(tmp_path):
    more = {"compute_loss_func": lambda *_: None}
    with pytest.raises(ValueError, match="takes no compute_loss_func: write a Distiller"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), rows("bert"), trainer=more)


class DeepHead(BertForSequenceClassification):
    """With a head that its configuration makes."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = deep_head()


def deep_head():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, NUM_LABELS))


def test_a_head_replaced_by_hand_cannot_be_loaded_at_the_end(tmp_path):
    """It was noticed after the last step."""

    def trainer(student, **arguments):
        times = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        data = {"eval_dataset": rows("bert")}
        return make_trainer(tmp_path, student, None, None, rows("bert"), trainer=data, **times, **arguments)

    by_hand = tiny("bert")
    by_hand.classifier = deep_head()
    with pytest.raises(ValueError, match="BertForSequenceClassification .* no such classifier.0.weight, .* subclass"):
        trainer(by_hand, load_best_model_at_end=True)
    trainer(by_hand).train()
    trainer(DeepHead(by_hand.config), load_best_model_at_end=True).train()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_loads_again_is_taken_and_draws_nothing(family):
    student = tiny(family)
    torch.manual_seed(3)
    check_reload(student)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


def test_a_class_that_is_made_otherwise_is_not_judged():
    class Made(BertForSequenceClassification):
        def __init__(self, config, width):
            super().__init__(config)

    check_reload(Made(tiny("bert").config, 3))


def test_a_distiller_by_name_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"distiller must be a Distiller, got str: pass KD\(\), not its name"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), "kd", rows("bert"))


def test_a_scheduler_that_does_not_know_the_distillers_parameters_is_refused(tmp_path):
    def optimizers(student, scheduled):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer) if scheduled else None

    for distiller, scheduled in ((KD(), True), (Weighted(), False)):
        student = tiny("bert")
        more = {"optimizers": optimizers(student, scheduled)}
        make_trainer(tmp_path, student, tiny_teacher("bert"), distiller, rows("bert"), trainer=more).train()
    student = tiny("bert")
    more = {"optimizers": optimizers(student, True)}
    with pytest.raises(ValueError, match=r"pass optimizers=\(optimizer, None\), or neither"):
        make_trainer(tmp_path, student, tiny_teacher("bert"), Weighted(), rows("bert"), trainer=more)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distiller_learning_rate": 0.0}, "distiller_learning_rate must be positive, got 0.0: leave it out"),
        ({"teacher_dtype": "int8"}, "teacher_dtype must be float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_training_arguments_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillationTrainingArguments("out", **wrong)


def test_defaults_choose_the_method(tmp_path):
    args = DistillationTrainingArguments(os.fspath(tmp_path), use_cpu=True, report_to="none")
    assert type(DistillationTrainer(tiny("bert"), args=args).distiller) is StudentAlone
    assert type(DistillationTrainer(tiny("bert"), tiny_teacher("bert"), args=args).distiller) is KD
    assert NUM_LABELS == len(NAMES)
    assert type(DistillationTrainer(tiny("bert"), tiny_teacher("bert"), TTM(), args).distiller) is TTM


def test_a_fresh_cifar_head_is_recognised_and_a_trained_one_is_not():
    assert all(head_looks_new(tiny("cifar", seed=seed)) for seed in range(5))
    trained = tiny("cifar")
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    pixels, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 5
    for _ in range(8):
        torch.nn.functional.cross_entropy(trained(pixels).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not head_looks_new(trained)


def test_a_small_trained_head_is_not_taken_for_a_fresh_one():
    head = tiny("bert", num_labels=1, initializer_range=0.02)
    nn.init.constant_(head.classifier.bias, 0.01)
    assert not head_looks_new(head)


def test_teacher_and_student_that_share_weights_are_refused(tmp_path):
    student, teacher = tiny("bert"), tiny_teacher("bert")
    student.bert.embeddings = teacher.bert.embeddings
    with pytest.raises(ValueError, match="share weights.*pass a deep copy"):
        make_trainer(tmp_path, student, teacher, KD(), rows("bert"))


def test_regression_with_several_outputs_is_refused(tmp_path):
    student = tiny("bert", problem_type="regression")
    with pytest.raises(ValueError, match="several outputs is not supported: give the student num_labels=1"):
        make_trainer(tmp_path, student, None, None, rows("bert"))


def test_labels_of_the_held_out_set_are_checked(tmp_path):
    held_out = rows("bert")
    held_out.columns["labels"][0] = 99
    with pytest.raises(ValueError, match=r"labels of the held-out set hold \[99\]"):
        make_trainer(tmp_path, tiny("bert"), None, None, rows("bert"), trainer={"held_out_dataset": held_out})


def test_empty_labels_are_refused_with_the_remedy(tmp_path):
    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2]] * 4, "labels": [0, 1, None, 1]})
    with pytest.raises(ValueError, match="empty cells: set them to -100"):
        make_trainer(tmp_path, tiny("bert"), None, None, dataset)


@pytest.mark.parametrize("kind", ["images", "text"])
def test_classes_in_another_order_than_the_data_sets_are_refused(tmp_path, kind):
    from hfkd.data import ImageDataset, load_image_data, processor_for

    if kind == "text":
        features = datasets.Features(
            {"input_ids": datasets.List(datasets.Value("int64")), "labels": datasets.ClassLabel(names=["no", "yes"])}
        )
        dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2]] * 4, "labels": [0, 1, 0, 1]}, features=features)
        student = tiny("bert", num_labels=2, id2label={0: "yes", 1: "no"})
    else:
        data = load_image_data("digits", max_train_samples=20)
        student = tiny("cifar", num_labels=10, id2label=dict(enumerate(data.label_names[::-1])))
        dataset = ImageDataset(data.train, processor_for(student))
    with pytest.raises(ValueError, match="numbers the classes as.*build the student with id2label"):
        make_trainer(tmp_path, student, None, None, dataset)


@pytest.mark.parametrize("column", ["label", "label_ids", "labels"])
def test_labels_train_under_any_of_their_names(tmp_path, column):
    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, column: [0, 1, 2, 3]})
    trainer = make_trainer(tmp_path, tiny("bert"), None, None, dataset)
    trainer.train()
    assert trainer.state.log_history[0]["task"] > 0.1


def test_a_collator_that_loses_the_labels_is_refused(tmp_path):
    def losing(features):
        return {"input_ids": torch.tensor([feature["input_ids"] for feature in features])}

    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [0, 1, 2, 3]})
    more = {"data_collator": losing}
    with pytest.raises(ValueError, match="the batch has no labels, only input_ids.*DistillationCollator does"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), dataset, trainer=more)


class Labels(KD):
    """Keeps the labels that it was given of each sample."""

    def forward(self, student, teacher, batch):
        self.seen = dict(zip(batch["index"].tolist(), batch["labels"].tolist(), strict=True))
        return super().forward(student, teacher, batch)


@pytest.mark.parametrize("kind", ["datasets", "subset", "map-style", "stream", "transformers' collator"])
@pytest.mark.parametrize("other", ["label", "labels", None])
def test_label_names_say_which_column_holds_the_labels(tmp_path, kind, other):
    dataset, distiller, more = rows("bert"), Labels(), {}
    expected = dict(enumerate(dataset.columns["labels"].tolist()))
    columns = {"labels": None, "coarse": dataset.columns["labels"]}
    if other is not None:
        columns[other] = (dataset.columns["labels"] + 1) % NUM_LABELS
    dataset = dataset.with_columns(**columns)
    if kind != "map-style":
        dataset = as_datasets(dataset)
    if kind == "subset":
        dataset = Subset(dataset, range(16))
    elif kind == "stream":
        dataset = dataset.to_iterable_dataset()
    elif kind == "transformers' collator":
        more["data_collator"] = DataCollatorWithPadding(tokenizer())
    trainer = make_trainer(
        tmp_path,
        tiny("bert"),
        tiny_teacher("bert"),
        distiller,
        dataset,
        trainer=more,
        label_names=["coarse"],
        per_device_train_batch_size=16,
        max_steps=1,
    )
    trainer.train()
    assert distiller.seen == expected


def test_the_column_in_label_names_is_checked_and_scaled(tmp_path):
    target = torch.full((16,), -100)
    target[:4] = torch.arange(4)
    dataset = as_datasets(rows("bert").with_columns(labels=None, target=target, label=torch.full((16,), 77)))
    make = partial(make_trainer, tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), label_names=["target"])
    assert make(dataset).label_scale == 4.0
    attributed = rows("bert").with_columns(target=target)
    attributed.target = target
    assert make(attributed).label_scale == 4.0
    with pytest.raises(ValueError, match=r"labels of the train set hold \[6, 7, 8, 9\]"):
        make(dataset.map(lambda row: {"target": row["target"] if row["target"] < 0 else row["target"] + 6}))
    named_otherwise = dataset.select(range(4)).cast_column("target", datasets.ClassLabel(names=NAMES[::-1]))
    with pytest.raises(ValueError, match="numbers the classes as"):
        make_trainer(tmp_path, named(tiny("bert"), NAMES), None, None, named_otherwise, label_names=["target"])


@pytest.mark.parametrize("which", ["train", "evaluation"])
def test_label_names_that_name_no_column_are_refused(tmp_path, which):
    """Where another column would be learnt, or scored, in its place."""
    dataset = rows("bert")
    sets = dict.fromkeys(("train", "evaluation"), dataset.with_columns(coarse=dataset.columns["labels"]))
    sets[which] = dataset
    message = rf"label_names=\['coarse'\], and the {which} set has no such column, only .*labels, index: correct it"
    with pytest.raises(ValueError, match=message):
        make_trainer(
            tmp_path,
            tiny("bert"),
            None,
            None,
            sets["train"],
            trainer={"eval_dataset": sets["evaluation"]},
            label_names=["coarse"],
        )
    unlabelled = dataset.with_columns(labels=None)
    make_trainer(
        tmp_path, tiny("bert"), None, None, dataset, trainer={"eval_dataset": unlabelled}, label_names=["labels"]
    )


@pytest.mark.parametrize("kind", ["datasets", "map-style", "stream"])
def test_two_columns_that_may_be_the_labels_are_refused(tmp_path, kind):
    dataset = rows("bert").with_columns(label=torch.zeros(16, dtype=torch.long))
    if kind != "map-style":
        dataset = as_datasets(dataset)
    if kind == "stream":
        dataset = Stream(dataset)
    message = "the columns labels and label may both be the labels: drop or rename one, or say which it is in label_na"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), dataset).train()
    make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), dataset, label_names=["labels"]).train()


@pytest.mark.parametrize("kind", ["datasets", "subset", "map-style", "stream", "torch's stream"])
def test_labels_under_another_name_are_not_dropped_in_silence(tmp_path, kind):
    dataset = rows("bert")
    dataset = dataset.with_columns(target=dataset.columns["labels"], labels=None)
    if kind in ("datasets", "subset", "stream"):
        dataset = as_datasets(dataset)
    if kind == "subset":
        dataset = Subset(dataset, range(8))
    elif kind == "stream":
        dataset = dataset.to_iterable_dataset()
    elif kind == "torch's stream":
        dataset = Stream(dataset)
    with pytest.warns(UserWarning, match="no column labels .* KD learns from the teacher alone: .*rename it") as found:
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), dataset).train()
    assert len([warning for warning in found if "no column labels" in str(warning.message)]) == 1
    with pytest.raises(ValueError, match="no training sample has a label.*nothing to learn"):
        make_trainer(tmp_path, tiny("bert"), None, None, dataset).train()
    with pytest.raises(ValueError, match="no training sample has a label, and DKD learns from labels"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), DKD(), dataset).train()


def test_a_set_that_says_that_it_has_no_labels_is_not_warned_of(tmp_path, recwarn):
    dataset = rows("bert").with_columns(labels=torch.full((16,), -100))
    for unlabelled in (dataset, as_datasets(dataset)):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), unlabelled).train()
    assert not [warning for warning in recwarn if "no column labels" in str(warning.message)]


def test_text_labels_are_refused_by_the_collator():
    from hfkd.data import DistillationCollator

    with pytest.raises(ValueError, match="column 'label' holds 'good': map labels to class indices first"):
        DistillationCollator()([{"x": 1, "label": "good"}])


def test_parts_of_one_set_have_the_same_classes():
    def part(*names):
        features = datasets.Features({"labels": datasets.ClassLabel(names=list(names))})
        return datasets.Dataset.from_dict({"labels": [0, 1]}, features=features)

    assert class_names(ConcatDataset([part("cat", "dog"), part("cat", "dog")])) == ["cat", "dog"]
    with pytest.raises(ValueError, match="cast their label columns to one ClassLabel"):
        class_names(ConcatDataset([part("cat", "dog"), part("dog", "cat")]))
