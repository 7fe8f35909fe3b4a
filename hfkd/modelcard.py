"""The model card of a distilled student."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, get_token
from safetensors import safe_open
from torch import nn

from hfkd.distillers.base import IGNORE_INDEX, Distiller
from hfkd.evaluations import Answers, bytes_of, compared, last_scores, latencies, machine_of
from hfkd.features import base_model
from hfkd.labels import named_labels
from hfkd.provenance import bibtex, command_line, data_origin, hub_origin, papers
from hfkd.teacher import ColumnTeacher, members_of


if TYPE_CHECKING:
    from hfkd.trainer import DistillationTrainer

_SETTINGS = (
    "learning_rate",
    "optim",
    "optim_args",
    "lr_scheduler_type",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
)


def describe(distiller: Distiller) -> str:
    """A distiller as the call that makes it: ``KD(alpha=0.9, temperature=4.0)``."""
    names = [name for name in inspect.signature(type(distiller).__init__).parameters if name != "self"]
    values = {name: getattr(distiller, name) for name in names if hasattr(distiller, name)}
    shown = (
        f"{k}={describe(v) if isinstance(v, Distiller) else repr(v)}"
        for k, v in values.items()
        if isinstance(v, (bool, int, float, str, tuple, Distiller, type(None)))
    )
    return f"{type(distiller).__name__}({', '.join(shown)})"


def public_name(model: nn.Module) -> str:
    """What to call a model in public: its Hub id, or the last part of a local path, or its class."""
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or os.path.exists(name) else name


@contextmanager
def base_without_home(model: nn.Module) -> Iterator[None]:
    """While open, an adapter's base that lies in a local folder is named by its path from the working folder.

    Adapters are saved with it, so that it loads again from there; by the folder's name alone where that path would
    tell the home folder too.
    """
    base = base_model(model)
    name = getattr(base.config, "name_or_path", "")
    if base is model or not os.path.isabs(name):
        yield
        return
    path = os.path.relpath(name)
    home, parts = Path.home().parts[1:], Path(path).parts
    if home and any(parts[start : start + len(home)] == home for start in range(len(parts))):
        path = public_name(base)
    known = [config for config in model.peft_config.values() if config.base_model_name_or_path == name]
    for config in known:
        config.base_model_name_or_path = path
    base.config.name_or_path = base.name_or_path = path
    try:
        yield
    finally:
        for config in known:
            config.base_model_name_or_path = name
        base.config.name_or_path = base.name_or_path = name


def save_figures(trainer: DistillationTrainer) -> dict[str, Path]:
    """Draw how training went and how student and teacher answer, as far as is known, into ``figures``.

    Returns:
        The pictures by name: ``training_curves``, ``reliability``, ``confusion_difference``.
    """
    from hfkd.report import confusion_difference, reliability_diagram, training_curves  # matplotlib is slow to import
    from hfkd.report.plots import curves_of

    folder, figures = Path(trainer.args.output_dir, "figures"), {}
    log, weights = trainer.state.log_history, [*trainer.distiller.logged_values()]
    if any(curves_of(log, weights)):
        figures["training_curves"] = training_curves(log, folder / "training_curves.png", weights=weights)
    split, student, teacher, common = compared(trainer)
    if student is None or trainer.problem_type == "regression" or (student.classes == IGNORE_INDEX).all():
        return figures
    models = {f"student, {split}": (student.logits, student.classes)}
    if teacher is not None and (teacher.classes != IGNORE_INDEX).any():
        models = {f"teacher, {split}": (teacher.logits, teacher.classes), **models}
    figures["reliability"] = reliability_diagram(models, folder / "reliability.png")
    if common is not None and (common.classes != IGNORE_INDEX).any():
        figures["confusion_difference"] = confusion_difference(
            common.logits,
            teacher.logits,
            common.classes,
            folder / "confusion_difference.png",
            label_names=named_labels(trainer.model.config),
        )
    return figures


def _calibration(answers: Answers | None, trainer: DistillationTrainer) -> float | None:
    from hfkd.metrics import expected_calibration_error

    if answers is None or trainer.problem_type == "regression" or (answers.classes == IGNORE_INDEX).all():
        return None
    return expected_calibration_error(answers.logits, answers.classes)


def _baseline(baseline: str | Path, split: str, folder: Path) -> tuple[dict[str, float], bool]:
    """The scores of another student, from the metadata of its card, and whether it is the same net as in a folder."""
    path = Path(baseline, "README.md")
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: baseline= is the folder of the same student trained alone, with the card that "
            "create_model_card(dataset=, tasks=) writes"
        )
    results = ModelCard.load(path).data.eval_results or ()
    scores = {result.metric_type: result.metric_value for result in results if result.dataset_split == split}
    own, other = _shapes(folder), _shapes(Path(baseline))
    return scores, bool(own) and own == other


def _shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of every tensor of a saved model, from the heads of its files."""
    shapes = {}
    for path in sorted(folder.glob("*model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # it is no dict
    return shapes


def write_model_card(
    trainer: DistillationTrainer,
    language: str | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
    baseline: str | Path | None = None,
) -> dict[str, Path]:
    """Write ``README.md`` into the output folder: what taught the student, how, and what came of it, with pictures.

    Args:
        trainer: A trainer after training; the scores are those it logged last.
        language: As in ``transformers.Trainer.create_model_card``, like all up to ``dataset_args``.
        license: Licence of the student.
        tags: Further tags.
        model_name: Heading; the folder's name by default.
        finetuned_from: Model whose weights the student started from; by default the one on the Hub that it was loaded
            from, or that it was cut out of.
        tasks: Task such as ``"image-classification"``, for the scores' metadata.
        dataset_tags: Hub ids of the data; by default where ``datasets`` loaded the training set from.
        dataset: Name of the data, for the scores' metadata.
        dataset_args: Configuration of the data.
        baseline: Folder of a run of the same student without a teacher, for the table: its card's scores are shown.

    Returns:
        The pictures, as :func:`save_figures` does.

    Raises:
        FileNotFoundError: If there is no card in ``baseline``.
    """

    def first(value):
        return value if value is None or isinstance(value, str) else next(iter(value), None)

    student, args = trainer.model, trainer.args
    folder, is_adapter = Path(args.output_dir), base_model(student) is not student
    model_name = model_name or folder.resolve().name
    scores = last_scores(trainer.state.log_history)
    split, *answers = compared(trainer)
    own = {name.removeprefix(f"{split}_"): value for name, value in scores.items() if name.startswith(f"{split}_")}
    own.pop("loss", None)
    calibration = _calibration(answers[0], trainer)
    measured = own if calibration is None else {**own, "ece": calibration}

    origin = data_origin(trainer.train_dataset)
    evaluated = None if answers[0] is None else data_origin(answers[0].dataset)
    split_name = {"eval": "validation"}.get(split, split)
    if origin and evaluated and evaluated["split"] != origin["split"]:  # else it was cut from what train is from
        split_name = evaluated["split"]
    dataset_tags = dataset_tags or (origin["id"] if origin else None)
    results = None
    if first(dataset) and first(tasks) and measured:
        results = [
            EvalResult(
                task_type=first(tasks),
                dataset_type=first(dataset_tags) or first(dataset),
                dataset_name=first(dataset),
                dataset_args=first(dataset_args),
                dataset_config=origin["config"] if origin else None,
                dataset_revision=origin["revision"] if origin else None,
                dataset_split=split_name,
                metric_type=name,
                metric_name="expected calibration error, 15 bins" if name == "ece" else None,
                metric_value=value,
            )
            for name, value in measured.items()
            if math.isfinite(value)  # the Hub refuses a card with another number
        ]
    started_from, base = hub_origin(student), finetuned_from
    if base is None and is_adapter:
        base = public_name(base_model(student))
    elif base is None and started_from is not None:
        base = started_from[0]
    members = [] if trainer.teacher_model is None else members_of(trainer.teacher_model)
    teachers = [found for member in members if (found := hub_origin(member)) is not None]
    if trainer._saves_teacher:  # a copy of the student comes from where that does, which makes it no teacher
        teachers = [found for found in teachers if found != started_from]
    data = ModelCardData(
        language=language,
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=first(tasks),
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        datasets=[dataset_tags] if isinstance(dataset_tags, str) else dataset_tags,
        tags=[
            *("knowledge-distillation", "hfkd"),
            *(f"teacher:{name}" for name, _ in teachers),
            *([tags] if isinstance(tags, str) else tags or []),
        ],
        model_name=model_name,
        eval_results=results or None,
        **({"teachers": [{"id": name, "revision": commit} for name, commit in teachers]} if teachers else {}),
    )

    alone = None if baseline is None else _baseline(baseline, split_name, folder)
    task = first(tasks) or trainer._task_of(student)
    hub_id = getattr(trainer, "hub_model_id", None) or args.hub_model_id or model_name
    figures = save_figures(trainer)
    text = [
        f"# {model_name}",
        *_what_it_is(trainer, teachers, first(dataset), origin),
        *("## Use", _how_to_use(trainer, task, hub_id)),
        *("## Results", *_results(trainer, split, own, calibration, answers, alone)),
        *_all_scores(scores),
        *(f"![{_CAPTIONS[name]}](figures/{path.name})\n*{_CAPTIONS[name]}.*" for name, path in figures.items()),
        *("## Training", *_training(trainer)),
        *("## Limits", _limits(trainer, own, split, answers, license)),
        *("## Citation", _citation(trainer.distiller)),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")
    card.save(folder / "README.md")
    return figures


_CAPTIONS = {
    "training_curves": "Losses, scores and learned weights over the steps of training",
    "reliability": "How often the answers are right against how sure they are",
    "confusion_difference": "What the student confuses more (+) and less (−) often than its teacher",
}


def _what_it_is(trainer: DistillationTrainer, teachers, dataset, origin) -> list[str]:
    student, teacher = trainer.model, trainer.teacher_model
    kind = type(student).__name__.removeprefix("FSDP")  # which sharding puts before a class's name
    parameters = sum(p.numel() for p in student.parameters())
    text = []
    if isinstance(trainer.teacher, ColumnTeacher):
        column = trainer.teacher.column
        text += [f"{kind} with {parameters:,} parameters, taught by its data's column `{column}`."]
    elif teacher is None:
        text += [f"{kind} with {parameters:,} parameters, trained without a teacher."]
    else:
        teacher_parameters = sum(p.numel() for p in teacher.parameters())
        names = " and ".join(f"`{public_name(member)}`" for member in members_of(teacher))
        text += [f"{kind} with {parameters:,} parameters, taught by {names} with {teacher_parameters:,}."]
    about = [f"- Teacher: [{name}](https://huggingface.co/{name}), revision `{commit}`" for name, commit in teachers]
    if (start := hub_origin(student)) is not None:
        about += [f"- Student started from: [{start[0]}](https://huggingface.co/{start[0]}), revision `{start[1]}`"]
    if origin is not None:
        address = f"https://huggingface.co/datasets/{origin['id']}"
        about += [f"- Data: [{origin['id']}]({address}), `{origin['config']}`, revision `{origin['revision']}`"]
    elif dataset is not None:
        about += [f"- Data: {dataset}, not loaded from the Hub, so that no revision is known"]
    found = papers(trainer.distiller)
    links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in found)
    about += [
        f"- Method: `{describe(trainer.distiller)}`, through hfkd" + (f"; papers (arXiv): {links}" if links else "")
    ]
    return [*text, "\n".join(about)]


def _how_to_use(trainer: DistillationTrainer, task: str, hub_id: str) -> str:
    student = trainer.model
    auto = (
        "AutoModelForImageClassification" if task == "image-classification" else "AutoModelForSequenceClassification"
    )
    if (base := base_model(student)) is not student:
        labels = base.config.num_labels
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f'base = {auto}.from_pretrained("{public_name(base)}", num_labels={labels})',
            f'student = PeftModel.from_pretrained(base, "{hub_id}")',
        ]
    else:
        options = ", trust_remote_code=True" if student._auto_class is not None else ""
        options += ', function_to_apply="none"' if trainer.problem_type == "regression" else ""
        example = '"picture.png"' if task == "image-classification" else '"A sentence."'
        lines = [
            "from transformers import pipeline",
            "",
            f'classifier = pipeline("{task}", model="{hub_id}"{options})',
            f"classifier({example})",
        ]
    return "\n".join(["```python", *lines, "```"])


def _results(trainer: DistillationTrainer, split, own, calibration, answers, baseline) -> list[str]:
    from hfkd.metrics import agreement

    student, asked, common = answers
    model, teacher = trainer.model, trainer.teacher_model
    student_latency, teacher_latency = latencies(trainer)
    is_adapter = base_model(model) is not model
    alike = None if common is None else agreement(common.logits, asked.logits)
    is_regression = trainer.problem_type == "regression"

    def row(scores: Mapping[str, float], error: float | None) -> dict[str, str]:
        measured = {name: scores[name] for name in own if name in scores} | ({} if error is None else {"ECE": error})
        return {name: f"{value:.4f}" for name, value in measured.items()}

    def size(model: nn.Module, latency: float | None) -> dict[str, str]:
        parameters = f"{sum(p.numel() for p in model.parameters()):,}"
        cells = {"parameters": parameters, "weights (MB)": f"{bytes_of(model) / 1e6:.2f}"}
        return cells if latency is None else {**cells, "latency (ms)": f"{latency:.2f}"}

    rows = {}
    if teacher is not None:
        scores = {} if asked is None else trainer._score(asked.logits, asked.labels)
        rows["teacher"] = row(scores, _calibration(asked, trainer)) | size(teacher, teacher_latency)
    if baseline is not None:
        scores, is_same = baseline
        rows["student alone"] = row(scores, scores.get("ece")) | (size(model, student_latency) if is_same else {})
    is_taught = teacher is not None or trainer.teacher is not None
    name = "distilled student" if is_taught else "student"
    rows[name] = row(own, calibration) | size(model, student_latency)
    if alike is not None:
        rows[name]["agreement"] = f"{alike:.4f}"
    columns = [*own, "ECE", "agreement", "parameters", "weights (MB)", "latency (ms)"]
    columns = [column for column in columns if any(column in cells for cells in rows.values())]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cells.get(column, "–") for column in columns)] for name, cells in rows.items()]
    table = [f"| {' | '.join(line)} |" for line in lines]

    notes = []
    if student is not None:
        notes += [f"Measured on {len(student.logits):,} samples of the split `{split}`."]
    if asked is not None and asked.rows is not None:
        notes += [f"The teacher was asked about {len(asked.logits):,} of them, evenly spread."]
    if alike is not None and is_regression:
        notes += ["Agreement is Pearson's correlation of the student's answers with the teacher's."]
    elif alike is not None:
        notes += ["Agreement is the share of samples to which the student gives the teacher's answer."]
    if calibration is not None:
        notes += ["ECE is the expected calibration error (15 bins): 0 is as sure as it is right."]
    if student_latency is not None:
        machine = machine_of(trainer.args.device)
        notes += [f"Latency is of one sample: the median of 7 forward passes on the machine that trained ({machine})."]
    if is_adapter:
        own_bytes = bytes_of(model, only_trained=True) / 1e6
        notes += [f"The student is an adapter: of its weights {own_bytes:.2f} MB are its own, the others its base's."]
    return ["\n".join(table), " ".join(notes)] if notes else ["\n".join(table)]


def _all_scores(scores: Mapping[str, float]) -> list[str]:
    if not scores:
        return []
    rows = ["| score | value |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in scores.items())]
    note = "Scores are the last ones logged; the teacher's (`teacher_…`) are on at most 1,000 validation samples."
    return ["\n".join(rows), note]


def _training(trainer: DistillationTrainer) -> list[str]:
    args = trainer.args
    processes = trainer.accelerator.num_processes
    text = []
    command = command_line(processes, (args.hub_token, get_token()))
    if command is not None:
        text += [f"```bash\n{command}\n```"]
    unused = "num_train_epochs" if args.max_steps > 0 else "max_steps"
    settings = {name: getattr(args, name) for name in _SETTINGS if name != unused} | {"processes": processes}
    rows = [f"| {name} | {getattr(value, 'value', value)} |" for name, value in settings.items() if value is not None]
    text += ["\n".join(["| setting | value |", "|---|---|", *rows])]
    return [*text, f"transformers {transformers.__version__}, torch {torch.__version__}."]


def _limits(trainer: DistillationTrainer, own: Mapping[str, float], split: str, answers, license: str | None) -> str:
    student, asked, common = answers
    points, state = [], trainer.state
    labels = trainer.context.labels(trainer.train_dataset)
    if labels is not None:
        labelled = int((labels != IGNORE_INDEX).sum()) if labels.ndim == 1 else len(labels)
        part = "" if labelled == len(labels) else f", {labelled:,} of them labelled"
        points += [
            f"Trained on {len(labels):,} samples{part}, for {state.epoch or 0:.4g} epochs ({state.global_step:,} "
            f"steps), with one seed ({trainer.args.seed}): another seed gives another student."
        ]
    if student is not None and "accuracy" in own:
        error = 100 * math.sqrt(own["accuracy"] * (1 - own["accuracy"]) / len(student.logits))
        points += [f"{len(student.logits):,} samples give the accuracy a standard error of {error:.1f} points."]
    if split == "eval":
        points += ["The scores are on the split that was looked at during training, which flatters the student."]
    if common is not None and trainer.problem_type != "regression":
        right, taught = common.classes, asked.logits.argmax(1)
        wrong = (right != IGNORE_INDEX) & (taught != right)
        repeated = int((wrong & (common.logits.argmax(1) == taught)).sum())
        points += [f"The teacher's errors are handed on: of {wrong.sum():,} here the student repeats {repeated:,}."]
    elif trainer.teacher_model is not None or isinstance(trainer.teacher, ColumnTeacher):
        points += ["The teacher's errors are handed on; how many was not measured."]
    points += [
        "What the data lack, the student does not know; where they are wrong or one-sided, so is the student. It was "
        "measured on data like those that it learned from, on no others, and for no group of samples by itself."
    ]
    if license is None:
        points += ["No licence is stated: those of the data and of the models that it comes from may bind it."]
    return "\n".join(f"- {point}" for point in points)


def _citation(distiller: Distiller) -> str:
    from hfkd import __version__

    own = [
        "@software{hfkd,",
        "  title = {hfkd: knowledge distillation on transformers.Trainer},",
        f"  version = {{{__version__}}}",
        "}",
    ]
    entries = ["\n".join(own), *(bibtex(number, *about) for number, about in papers(distiller).items())]
    return "```bibtex\n" + "\n\n".join(entries) + "\n```"
