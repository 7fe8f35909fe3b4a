"""Teach an image classifier with a bigger one.

    accelerate launch examples/run_image_kd.py --dataset cifar10 --teacher TEACHER --student resnet20 \
        --distiller wttm --distiller_kwargs '{"gamma": 0.3, "beta": 1.5}' --output_dir outputs/wttm

Also from a file, which flags override: python examples/run_image_kd.py config.yaml --seed 1. Without --teacher the
student learns alone; with --train_teacher the teacher is fine-tuned first. Two processes on a machine without GPU:
torchrun --nproc_per_node 2 examples/run_image_kd.py … --use_cpu

The defaults are the recipe of the literature for CIFAR nets trained from scratch (SGD, batch 64, crop and flip) with a
cosine schedule; for a pretrained transformer use --optim adamw_torch --learning_rate 1e-4.
"""

import copy
import os
from dataclasses import dataclass, field

from transformers import set_seed

from hfkd import DistillationTrainer, DistillationTrainingArguments, Distiller
from hfkd.checkpoints import where_both_resume
from hfkd.cli import check_conflicts, explain_refusals, json_table, parse_arguments
from hfkd.data import ImageDataset, load_image_data, processor_for
from hfkd.distillers import make_distiller
from hfkd.labels import named_labels
from hfkd.metrics import compute_metrics
from hfkd.models import load_model, load_teacher


@dataclass
class ModelArguments:
    student: str = field(default="resnet20", metadata={"help": "Name in hfkd.models or timm, Hub id or local folder."})
    teacher: str | None = field(
        default=None, metadata={"help": "As --student, or a .safetensors file of a CIFAR net."}
    )
    distiller: str | None = field(default=None, metadata={"help": "A method of hfkd.distillers; kd with a teacher."})
    distiller_kwargs: str = field(default="{}", metadata={"help": "Its arguments, as JSON."})
    student_pretrained: bool = field(default=True, metadata={"help": "Start from weights where the student has any."})
    train_teacher: bool = field(default=False, metadata={"help": "Fine-tune the teacher on the same labels first."})
    teacher_epochs: float | None = field(default=None, metadata={"help": "Epochs of that; as for the student."})
    baseline: str | None = field(
        default=None, metadata={"help": "Folder of a run of the student alone, for the model card's table."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a Hub id."})


@dataclass
class DataArguments:
    dataset: str = field(default="digits", metadata={"help": "cifar10, cifar100, svhn, digits, or a Hub id."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Local folder: parquet in the Hub's layout, or images."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of train cut off for validation; with 0 also --eval_strategy no."}
    )
    held_out_fraction: float = field(default=0.0, metadata={"help": "Share cut off for methods that need one."})
    labels: int | None = field(
        default=None, metadata={"help": "Keep so many labels; the other samples stay, unlabelled."}
    )
    drop_unlabelled: bool = field(default=False, metadata={"help": "Train on the labelled samples alone."})
    label_noise: float = field(default=0.0, metadata={"help": "Share of training labels to corrupt."})
    noise_type: str = field(default="symmetric", metadata={"help": "symmetric or pair."})
    split_seed: int = field(default=0, metadata={"help": "Seed of splits, budgets and noise."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training samples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many validation and test samples."})
    augment: str | None = field(
        default=None, metadata={"help": "crop_flip, flip, crop or none; by default crop_flip, and crop for digits."}
    )
    rand_augment: str | None = field(default=None, metadata={"help": "A timm specification such as rand-m9-mstd0.5."})
    views: int | None = field(
        default=None, metadata={"help": "Draw augmentation from so many views of a sample; 16 with --teacher_cache."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup on the batch."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "CutMix on the batch."})


@dataclass
class TrainingArguments(DistillationTrainingArguments):
    output_dir: str = field(default="outputs/image_kd", metadata={"help": "Where the student goes."})
    optim: str = field(default="sgd", metadata={"help": "The optimizer."})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "Its arguments."})
    learning_rate: float = field(default=0.05, metadata={"help": "Its peak learning rate."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Its weight decay."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 does not."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Training batch on each device."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Evaluation batch on each device."})
    num_train_epochs: float = field(default=15, metadata={"help": "Passes over the training set."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate on validation."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    distiller: Distiller | None = None,
    only_warm: bool = False,
) -> dict[str, float]:
    """Train, evaluate on validation and test, save; return what all_results.json holds.

    With ``only_warm`` fill the teacher's cache instead.
    """
    check_conflicts(model_args, args)
    if model_args.distiller is not None:
        kwargs = json_table(model_args.distiller_kwargs, "distiller_kwargs")
        distiller = make_distiller(model_args.distiller, **kwargs)
    data = load_image_data(
        data_args.dataset,
        data_dir=data_args.data_dir,
        validation_fraction=data_args.validation_fraction,
        held_out_fraction=data_args.held_out_fraction,
        labels=data_args.labels,
        label_noise=data_args.label_noise,
        noise_type=data_args.noise_type,
        seed=data_args.split_seed,
        max_train_samples=data_args.max_train_samples,
        max_eval_samples=data_args.max_eval_samples,
    )
    augment = data_args.augment or ("crop" if data.task in ("digits", "svhn") else "crop_flip")
    if data_args.drop_unlabelled:
        data.drop_unlabelled()

    def trainer_for(student, student_name, args, teacher=None, teacher_name=None, distiller=None):
        processor = processor_for(student, student_name)
        teacher_processor = None if teacher is None else processor_for(teacher, teacher_name)

        def plain(split):
            return ImageDataset(split, processor, teacher_processor=teacher_processor) if split else None

        train = ImageDataset(
            data.train,
            processor,
            teacher_processor=teacher_processor,
            augment=None if augment == "none" else augment,
            rand_augment=data_args.rand_augment,
            mixup_alpha=data_args.mixup_alpha,
            cutmix_alpha=data_args.cutmix_alpha,
            num_labels=data.num_labels,
            seed=args.data_seed or 0,
            views=data_args.views,
        )
        return DistillationTrainer(
            student,
            teacher,
            distiller,
            args,
            train_dataset=train,
            eval_dataset=plain(data.validation),
            held_out_dataset=plain(data.held_out),
            processing_class=processor,
            compute_metrics=compute_metrics(data.task),
        ), plain(data.test)

    teacher, teacher_name, train_teacher = None, model_args.teacher, model_args.train_teacher
    teacher_folder = os.path.normpath(args.output_dir) + "-teacher"  # beside the student, whose folder is its own
    resume, teacher_resume = args.resume_from_checkpoint, None
    if train_teacher and resume:
        resume, is_finished, teacher_resume = where_both_resume(resume, args.output_dir, teacher_folder)
        if is_finished:
            teacher_name, train_teacher = teacher_folder, False
    if teacher_name is not None:
        set_seed(args.seed)
        if train_teacher:
            teacher = load_model(
                teacher_name, label_names=data.label_names, trust_remote_code=model_args.trust_remote_code
            )
        else:
            teacher = load_teacher(
                teacher_name,
                task="image-classification",
                may_wait=bool(args.teacher_cache),
                trust_remote_code=model_args.trust_remote_code,
            )
        names = [teacher.config.id2label[i] for i in range(teacher.config.num_labels)]
        are_numbers = data.label_names == [str(i) for i in range(len(names))]  # in the file, where they have no names
        if data.label_names is None or (are_numbers and named_labels(teacher.config)):
            data.label_names = names
        if train_teacher:
            teacher_args = copy.copy(args)
            teacher_args.output_dir = teacher_folder
            if model_args.teacher_epochs is not None:
                teacher_args.num_train_epochs, teacher_args.max_steps = model_args.teacher_epochs, -1
            teacher_args.learning_rate = args.teacher_learning_rate or args.learning_rate
            teacher_args.push_to_hub = False
            teacher_trainer, _ = trainer_for(teacher, teacher_name, teacher_args)
            teacher_trainer.train(resume_from_checkpoint=teacher_resume)
            teacher_trainer.save_model()

    set_seed(args.seed)
    student = load_model(
        model_args.student,
        label_names=data.label_names,
        num_labels=data.num_labels,
        pretrained=model_args.student_pretrained,
        trust_remote_code=model_args.trust_remote_code,
    )
    trainer, test = trainer_for(student, model_args.student, args, teacher, teacher_name, distiller)

    if only_warm:
        return trainer.warm_teacher_cache()
    results = trainer.train(resume_from_checkpoint=resume).metrics
    results["world_size"] = args.world_size
    for split, dataset in (("eval", trainer.eval_dataset), ("test", test)):
        if dataset is not None:
            results.update(trainer.evaluate(dataset, metric_key_prefix=split))
            if teacher is not None and trainer.teacher is not None:  # which one that learns too is not
                results.update({f"teacher_{split}_{k}": v for k, v in trainer.evaluate_teacher(dataset).items()})
            results.update(trainer.evaluations.figures(split))

    trainer.save_state()
    trainer.log_metrics("all", results)
    trainer.save_metrics("all", results)
    card = {"dataset": data.task, "tasks": "image-classification", "baseline": model_args.baseline}
    if args.push_to_hub:
        trainer.push_to_hub(**card)  # which saves the student first
    else:
        trainer.save_model()
        trainer.create_model_card(**card)
    return results


if __name__ == "__main__":
    with explain_refusals():
        run(*parse_arguments((ModelArguments, DataArguments, TrainingArguments)))
