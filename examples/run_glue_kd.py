"""Teach a small text classifier with a bigger one, on GLUE or on your own files.

    accelerate launch examples/run_glue_kd.py --task mrpc --teacher MODEL --train_teacher --student_layers 2 \
        --distiller kd --distiller_kwargs '{"alpha": 0.9, "temperature": 2}' --output_dir outputs/mrpc

The student is cut out of the teacher (--student_layers) or named (--student). Without --teacher, or with --distiller
studentalone, it learns from the labels alone; that is also how to fine-tune a teacher once for several students. Own
data: --train_file train.csv --validation_file dev.csv. Also from a file, which flags override: python
examples/run_glue_kd.py config.yaml --seed 1. With --do_predict the splits without labels get a file of predictions in
GLUE's format. Two processes on a machine without GPU: torchrun --nproc_per_node 2 examples/run_glue_kd.py … --use_cpu

The score "test" is on GLUE's official validation set; "eval" is on a part cut off from train.
"""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.checkpoints import where_both_resume
from hfkd.cli import check_conflicts, explain_refusals, json_table, parse_arguments
from hfkd.data import load_text_data, load_tokenizer, tokenize, write_predictions
from hfkd.distillers import make_distiller
from hfkd.labels import named_labels
from hfkd.metrics import compute_metrics
from hfkd.models import load_model, load_teacher, student_from_teacher


@dataclass
class ModelArguments:
    teacher: str | None = field(default=None, metadata={"help": "Hub id or local folder."})
    student: str | None = field(default=None, metadata={"help": "Hub id or local folder; else see student_layers."})
    student_layers: int = field(
        default=2, metadata={"help": "Cut the student out of the teacher, with so many layers."}
    )
    distiller: str | None = field(default=None, metadata={"help": "A method of hfkd.distillers; kd with a teacher."})
    distiller_kwargs: str = field(default="{}", metadata={"help": "Its arguments, as JSON."})
    train_teacher: bool = field(default=False, metadata={"help": "Fine-tune the teacher on the same labels first."})
    teacher_epochs: float | None = field(default=None, metadata={"help": "Epochs of that; as for the student."})
    baseline: str | None = field(
        default=None, metadata={"help": "Folder of a run of the student alone, for the model card's table."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a Hub id."})


@dataclass
class DataArguments:
    task: str | None = field(default=None, metadata={"help": "A GLUE task, a Hub id, or a name for your own files."})
    data_dir: str | None = field(default=None, metadata={"help": "Local folder of parquet files in the Hub's layout."})
    train_file: str | None = field(default=None, metadata={"help": "Your own CSV or JSON file."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise; else cut off from train."})
    test_file: str | None = field(default=None, metadata={"help": "Likewise."})
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
    max_length: int = field(default=128, metadata={"help": "Tokens kept of a sample."})


@dataclass
class TrainingArguments(DistillationTrainingArguments):
    output_dir: str = field(default="outputs/glue_kd", metadata={"help": "Where the student goes."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "The optimizer."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training batch on each device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Evaluation batch on each device."})
    num_train_epochs: float = field(default=5, metadata={"help": "Passes over the training set."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate on validation."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})


def run(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, only_warm: bool = False
) -> dict[str, float]:
    """Train, evaluate on validation and test, save; return what all_results.json holds.

    With ``only_warm`` fill the teacher's cache instead.
    """
    if model_args.teacher is None and model_args.student is None:
        raise ValueError("name a --student, or a --teacher to cut the student out of")
    check_conflicts(model_args, args)
    distiller = None
    if model_args.distiller is not None:
        kwargs = json_table(model_args.distiller_kwargs, "distiller_kwargs")
        distiller = make_distiller(model_args.distiller, **kwargs)
    if data_args.task is None and data_args.train_file is None:
        raise ValueError("name a --task, or your own data with --train_file")
    raw = load_text_data(
        data_args.task or Path(data_args.train_file).stem,
        data_dir=data_args.data_dir,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        test_file=data_args.test_file,
        validation_fraction=data_args.validation_fraction,
        held_out_fraction=data_args.held_out_fraction,
        labels=data_args.labels,
        label_noise=data_args.label_noise,
        noise_type=data_args.noise_type,
        seed=data_args.split_seed,
        max_train_samples=data_args.max_train_samples,
        max_eval_samples=data_args.max_eval_samples,
    )
    if data_args.drop_unlabelled:
        raw.drop_unlabelled()

    options = {"task": "text-classification", "trust_remote_code": model_args.trust_remote_code}

    def trainer_for(model, data, tokenizer, args, **kwargs):
        return DistillationTrainer(
            model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation or None,
            held_out_dataset=data.held_out,
            processing_class=tokenizer,
            compute_metrics=compute_metrics(raw),
            **kwargs,
        )

    teacher, teacher_tokenizer = None, None
    teacher_name, train_teacher = model_args.teacher, model_args.train_teacher
    teacher_folder = os.path.normpath(args.output_dir) + "-teacher"  # beside the student, whose folder is its own
    resume, teacher_resume = args.resume_from_checkpoint, None
    if train_teacher and resume:
        resume, is_finished, teacher_resume = where_both_resume(resume, args.output_dir, teacher_folder)
        if is_finished:
            teacher_name, train_teacher = teacher_folder, False
    if teacher_name is not None:
        set_seed(args.seed)
        teacher_tokenizer = load_tokenizer(teacher_name, trust_remote_code=model_args.trust_remote_code)
        if train_teacher:
            teacher = load_model(teacher_name, label_names=raw.label_names, num_labels=raw.num_labels, **options)
            teacher_args = copy.copy(args)
            teacher_args.output_dir = teacher_folder
            if model_args.teacher_epochs is not None:
                teacher_args.num_train_epochs, teacher_args.max_steps = model_args.teacher_epochs, -1
            teacher_args.learning_rate = args.teacher_learning_rate or args.learning_rate
            teacher_args.push_to_hub = False
            data = tokenize(raw, teacher_tokenizer, max_length=data_args.max_length)
            teacher_trainer = trainer_for(teacher, data, teacher_tokenizer, teacher_args)
            teacher_trainer.train(resume_from_checkpoint=teacher_resume)
            teacher_trainer.save_model()
        else:
            teacher = load_teacher(teacher_name, may_wait=bool(args.teacher_cache), **options)
        names = [teacher.config.id2label[i] for i in range(teacher.config.num_labels)]
        are_numbers = raw.label_names == [str(i) for i in range(len(names))]  # in the file, where they have no names
        if (raw.label_names is None and not raw.is_regression) or (are_numbers and named_labels(teacher.config)):
            raw.label_names = names

    set_seed(args.seed)
    if model_args.student is not None:
        tokenizer = load_tokenizer(model_args.student, trust_remote_code=model_args.trust_remote_code)
        student = load_model(model_args.student, label_names=raw.label_names, num_labels=raw.num_labels, **options)
    else:
        tokenizer = teacher_tokenizer
        # Behind a cache the teacher waits without its weights; those read here are gone when the student is cut out.
        whole = load_teacher(teacher_name, **options) if teacher.device.type == "meta" else teacher
        student = student_from_teacher(whole, num_layers=model_args.student_layers, label_names=raw.label_names)
        del whole

    data = tokenize(raw, tokenizer, teacher_tokenizer=teacher_tokenizer, max_length=data_args.max_length)
    if distiller is not None and not distiller.needs_teacher:
        teacher = None  # the student was cut out of it and learns alone from there
    trainer = trainer_for(
        student,
        data,
        tokenizer,
        args,
        teacher_model=teacher,
        distiller=distiller,
        teacher_processing_class=teacher_tokenizer,
    )

    if only_warm:
        return trainer.warm_teacher_cache()
    results = trainer.train(resume_from_checkpoint=resume).metrics
    results["world_size"] = args.world_size
    unlabelled = {}
    for split, dataset in {"eval": data.validation, "test": data.test, **data.extra}.items():
        if not dataset:
            continue
        if max(dataset["labels"]) == -100:
            unlabelled[split] = dataset
            continue
        results.update(trainer.evaluate(dataset, metric_key_prefix=split))
        if teacher is not None and trainer.teacher is not None:  # which one that learns too is not
            results.update({f"teacher_{split}_{k}": v for k, v in trainer.evaluate_teacher(dataset).items()})
        results.update(trainer.evaluations.figures(split))
    trainer.save_state()
    trainer.log_metrics("all", results)
    trainer.save_metrics("all", results)
    if args.do_predict:
        for split, dataset in unlabelled.items():
            predictions = trainer.predict(dataset).predictions
            task = {"ax": "ax", "official_test_mnli-mm": "mnli-mm"}.get(split, raw.task)
            if trainer.is_world_process_zero():
                write_predictions(args.output_dir, task, predictions, raw.label_names)
    card = {"dataset": data.task, "tasks": "text-classification", "baseline": model_args.baseline}
    if args.push_to_hub:
        trainer.push_to_hub(**card)  # which saves the student first
    else:
        trainer.save_model()
        trainer.create_model_card(**card)
    return results


if __name__ == "__main__":
    with explain_refusals():
        run(*parse_arguments((ModelArguments, DataArguments, TrainingArguments)))
