"""The model card of a distilled student."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from hfkd.distillers.base import Distiller
from hfkd.features import base_model
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
) -> None:
    """Write ``README.md`` into the output folder: what taught the student, how, and what came of it.

    Args:
        trainer: A trainer after training; the scores are those it logged last.
        language: As in ``transformers.Trainer.create_model_card``, like all that follow.
        license: Licence of the student.
        tags: Further tags.
        model_name: Heading; the folder's name by default.
        finetuned_from: Model whose weights the student started from.
        tasks: Task such as ``"image-classification"``, for the scores' metadata.
        dataset_tags: Hub ids of the data.
        dataset: Name of the data, for the scores' metadata.
        dataset_args: Configuration of the data.
    """

    def first(value):
        return value if value is None or isinstance(value, str) else next(iter(value), None)

    folder, is_adapter = Path(trainer.args.output_dir), base_model(trainer.model) is not trainer.model
    model_name = model_name or folder.resolve().name
    scores: dict[str, float] = {}
    for entry in trainer.state.log_history:
        scores.update(
            {name: value for name, value in entry.items() if name.startswith(("eval_", "test_", "teacher_"))}
        )
    skipped = ("_runtime", "_per_second", "_time")
    scores = {
        name: value
        for name, value in scores.items()
        if isinstance(value, (int, float)) and not name.endswith(skipped) and not name.startswith("teacher_cache_")
    }
    split = "test" if any(name.startswith("test_") for name in scores) else "eval"
    own = {name.removeprefix(f"{split}_"): value for name, value in scores.items() if name.startswith(f"{split}_")}

    results = None
    if first(dataset) and first(tasks) and own:
        results = [
            EvalResult(
                task_type=first(tasks),
                dataset_type=first(dataset_tags) or first(dataset),
                dataset_name=first(dataset),
                dataset_args=first(dataset_args),
                metric_type=name,
                metric_value=value,
            )
            for name, value in own.items()
            if name != "loss"
        ]
    data = ModelCardData(
        language=language,
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=first(tasks),
        base_model=finetuned_from or (public_name(base_model(trainer.model)) if is_adapter else None),
        datasets=[dataset_tags] if isinstance(dataset_tags, str) else dataset_tags,
        tags=["knowledge-distillation", "hfkd", *([tags] if isinstance(tags, str) else tags or [])],
        model_name=model_name,
        eval_results=results or None,
    )

    student, teacher = trainer.model, trainer.teacher_model
    kind = type(student).__name__.removeprefix("FSDP")  # which sharding puts before a class's name
    parameters = sum(p.numel() for p in student.parameters())
    text = [f"# {model_name}", ""]
    if isinstance(trainer.teacher, ColumnTeacher):
        column = trainer.teacher.column
        text += [f"{kind} with {parameters:,} parameters, taught by its data's column `{column}`."]
    elif teacher is None:
        text += [f"{kind} with {parameters:,} parameters, trained without a teacher."]
    else:
        teacher_parameters = sum(p.numel() for p in teacher.parameters())
        names = " and ".join(f"`{public_name(member)}`" for member in members_of(teacher))
        text += [f"{kind} with {parameters:,} parameters, taught by {names} with {teacher_parameters:,}."]
    text += ["", f"Method: `{describe(trainer.distiller)}`, through hfkd.", ""]
    if scores:
        text += ["| score | value |", "|---|---|", *(f"| {k} | {v:.4f} |" for k, v in scores.items()), ""]
        text += ["Scores are the last ones measured; the teacher's are on at most 1,000 validation samples.", ""]
    text += ["## Training", "", "| setting | value |", "|---|---|"]
    unused = "num_train_epochs" if trainer.args.max_steps > 0 else "max_steps"
    settings = {name: getattr(trainer.args, name) for name in _SETTINGS if name != unused}
    text += [f"| {name} | {getattr(value, 'value', value)} |" for name, value in settings.items() if value is not None]
    text += ["", f"transformers {transformers.__version__}, torch {torch.__version__}.", ""]
    folder.mkdir(parents=True, exist_ok=True)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text))
    card.save(folder / "README.md")
