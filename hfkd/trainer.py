"""The trainer: a frozen teacher outside, everything that learns in one module that is wrapped once."""

from __future__ import annotations

import copy
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler, Subset
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_callback import CallbackHandler, TrainerControl
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import BestRun, denumpify_detensorize, has_length

from hfkd.cache import TeacherCache, describe, keep_on_host
from hfkd.checkpoints import (
    check_writable,
)
from hfkd.checks import (
    check_adapter,
    check_arguments,
    check_cache,
    check_collator,
    check_columns,
    check_dataset,
    check_ensemble,
    check_head,
    check_image_processor,
    check_inputs,
    check_label_names,
    check_labels,
    check_method,
    check_probabilities,
    check_processes,
    check_reload,
    check_sharding,
    check_student,
    check_teacher,
    check_teacher_columns,
    check_tokenizers,
    check_tokens,
    class_names,
    columns_of,
    dataset_index,
    dataset_labels,
    first_tokens,
    innermost,
    longest_first,
    problem_type_of,
    set_epoch,
    teacher_column,
)
from hfkd.context import DistillationContext
from hfkd.data import DistillationCollator, ImageDataset
from hfkd.distillers import KD, Distiller, ModelOutputs, StudentAlone
from hfkd.distillers.base import IGNORE_INDEX, HardLabelLoss, autocast_off, weighted_mean
from hfkd.evaluations import Answers, Evaluations
from hfkd.features import (
    Capture,
    base_model,
    detached,
    evaluating,
    find_module,
    in_float32,
    input_names,
    is_outline,
    probe,
    run_model,
    use_channels_last,
)
from hfkd.finite import FiniteLosses
from hfkd.labels import LABEL_COLUMNS, head_looks_new, label_column, named_labels
from hfkd.modelcard import save_figures, write_model_card
from hfkd.models.loading import load_teacher
from hfkd.saving import SavingTrainer
from hfkd.teacher import (
    ColumnTeacher,
    DeferredTeacher,
    Teacher,
    TeacherEnsemble,
    Teachers,
    has_packed_weights,
    members_of,
)
from hfkd.termination import outlive
from hfkd.trackers import show_figures, tracks
from hfkd.training_args import DistillationTrainingArguments


class _DistillationModule(nn.Module):
    """Everything that trains: the student, the distiller and, where it learns too, the teacher.

    Made just before Accelerate wraps it, so that gradient zeroing, clipping, accumulation, DDP and mixed precision
    cover all of it with no special case.
    """

    def __init__(self, student: nn.Module, distiller: Distiller, teacher: nn.Module | None = None):
        super().__init__()
        self.student, self.distiller, self.teacher = student, distiller, teacher
        # Every process writes a distiller's buffers alike; DDP would overwrite them from process 0 at each forward.
        # Not so the running statistics of a projector's BatchNorm, which differ between processes.
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        self._ddp_params_and_buffers_to_ignore = [
            f"distiller.{name}" for name, _ in distiller.named_buffers() if not name.endswith(statistics)
        ]
        self._student = Capture(student, distiller.student_layers)
        self._teacher = nullcontext() if teacher is None else Capture(teacher, distiller.teacher_layers)
        self._compiled = self._terms
        self._is_folded = False

    def compile_terms(self, **options) -> None:
        """Compile the forward pass; in place, so that nothing is wrapped and saved names stay what they are."""
        self._compiled = torch.compile(self._terms, **options)

    def forward(
        self, batch: Mapping[str, Tensor], teacher: ModelOutputs | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the loss, a scalar, what is logged (its terms and the distiller's figures) and what it is made of.

        All but the loss without gradient; the last by the sample, for :class:`~hfkd.finite.FiniteLosses`.
        """
        with self._student, self._teacher:
            return self._compiled(batch, teacher)

    def _terms(
        self, batch: Mapping[str, Tensor], teacher: ModelOutputs | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        student = in_float32(self._student.run(batch))
        live_teacher = None
        if self.teacher is not None:
            live_teacher = in_float32(self._teacher.run(batch, prefix="teacher_"))
            live_teacher.task_logits = live_teacher.logits
            teacher = detached(live_teacher)
        elif teacher is not None:
            teacher = in_float32(teacher)
        with autocast_off(student.logits.device):
            student.task_logits = self.distiller.task_logits(student)
            terms = self.distiller(student, teacher, batch)
            if live_teacher is not None:
                terms = {**terms, **self.distiller.teacher_terms(live_teacher, detached(student), batch)}
            parts = {} if teacher is None else {"the teacher's logits": teacher.logits}
            parts |= {} if teacher is None else {f"the teacher's {k!r}": v for k, v in teacher.features.items()}
            parts |= {"the student's logits": student.logits, **{f"the term {k!r}": v for k, v in terms.items()}}
            parts = {name: part.detach() for name, part in parts.items()}
            weight = batch.get("sample_weight")
            if weight is not None:
                parts["the weights of the samples"] = weight
            terms = {name: weighted_mean(term, name, weight) for name, term in terms.items()}
            loss = torch.stack(list(terms.values())).sum()
            figures = {name: value.mean() for name, value in self.distiller.logged_values().items()}
        return loss, {name: value.detach() for name, value in {**terms, **figures}.items()}, parts

    def predict(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The scores that evaluation uses, (B, C), in float32."""
        student = in_float32(run_model(self.student, batch))
        with autocast_off(student.logits.device):
            return student.logits if self._is_folded else self.distiller.task_logits(student)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """While open, the student alone predicts as all does, as it is to be saved; opened again, it stays so."""
        if self._is_folded:
            yield
            return
        with self.distiller.folded(self.student):
            self._is_folded = True
            try:
                yield
            finally:
                self._is_folded = False

    def start(self) -> None:
        """Do nothing, as a forward pass: FSDP takes what runs first for the whole, and a hook may run a part first."""

    def wholes(self) -> list[str]:
        """Classes of what FSDP gathers as one: the models too, so that a hook can run them by themselves."""
        models = [model for model in (self.student, self.teacher) if model is not None]
        layers = [name for model in models for name in getattr(model, "_no_split_modules", None) or ()]
        here = {type(module).__name__ for module in self.modules()}
        return [*(name for name in layers if name in here), *(type(model).__name__ for model in models)]


class _Collator:
    """Lets the finished batches of data sets with ``__getitems__`` pass, and collates samples."""

    def __init__(self, of_batch: Callable, of_samples: Callable):
        self.of_batch, self.of_samples = of_batch, of_samples

    def __call__(self, features):
        return (self.of_batch if isinstance(features, Mapping) else self.of_samples)(features)


class _KeepingOnHost:
    """A collator whose batches tell a teacher's cache what they hold, wherever they are sent."""

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, features):
        return keep_on_host(self.collator(features))


class _OrderOfEpoch(Sampler):
    """Another sampler's order, drawn from the seed and the number of the epoch.

    Its own is drawn from the global random state, which a resumed run restores only behind the batches that it skips.
    """

    def __init__(self, sampler: LengthGroupedSampler, trainer: DistillationTrainer):
        self.sampler, self.trainer = sampler, trainer

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        args, epoch = self.trainer.args, self.trainer.context.epoch
        seed = args.seed if args.data_seed is None else args.data_seed
        (mixed,) = np.random.SeedSequence((seed, epoch)).generate_state(1)  # seed + epoch is another seed's, too
        self.sampler.generator = torch.Generator().manual_seed(int(mixed))
        return iter(self.sampler)


class _InOrder(Sampler):
    """Rows in a given order, each once."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows.tolist())

    @classmethod
    def of(cls, loader: DataLoader) -> _InOrder | None:
        """That of a loader, where it has one; Accelerate's own loader has it in its batches' sampler alone."""
        inner = getattr(loader, "base_dataloader", loader)
        sampler = getattr(getattr(inner, "batch_sampler", None), "sampler", None)
        return sampler if isinstance(sampler, cls) else None

    def restored(self, found: np.ndarray | None) -> np.ndarray | None:
        """What was found of the samples, in the order of the rows."""
        if found is None:
            return None
        ordered = np.empty_like(found)
        ordered[self.rows] = found
        return ordered


class _Hooks(TrainerCallback):
    """Hands the trainer's events to the distiller."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._check_method_is_own()
        self.trainer._term_sums, self.trainer._term_count = {}, 0
        self.trainer._cache_counts_before = self.trainer._cache_counts()
        self.trainer._find_best_checkpoint()
        self.trainer._report_teacher(self.trainer._check_best_metric())
        self.trainer.distiller.on_train_begin(self.trainer.context)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate's sharded loader sets the epoch of a seedable sampler and then leaves the dataset out.
        set_epoch(self.trainer.train_dataset, self.trainer.context.epoch)
        self.trainer.distiller.on_epoch_begin(self.trainer.context)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._finite_losses.check()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.distiller.on_step_end(self.trainer.context)


class _LastHook(TrainerCallback):
    """Hands the end of training to the distiller, before other callbacks upload the student or close their logs."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.distiller.on_train_end(self.trainer.context)
        if self.trainer.is_world_process_zero() and tracks(self.trainer):
            show_figures(self.trainer, save_figures(self.trainer))


class DistillationTrainer(SavingTrainer):
    """A ``transformers.Trainer`` whose model learns from a teacher.

    ``trainer.model`` is always the plain student: it is saved, pushed and evaluated as any other model. Within a step
    a method with a task head (AEKT) has that beside it: ``trainer.save_model`` folds it in wherever it is called.

    Args:
        model: The student; None with ``model_init``.
        teacher_model: A frozen classifier over the same classes, or several: a list is a
            :class:`~hfkd.TeacherEnsemble` with its defaults. A name or path is given to
            :func:`~hfkd.models.load_teacher`; weights that lie here are not loaded while ``teacher_cache`` has all
            the answers. None trains the student alone, unless the distiller
            brings a teacher of its own, or is given and the training set has a column ``teacher_logits`` or
            ``teacher_probabilities``: the answers of a teacher that is not here, in the student's order of classes.
        distiller: The method, of this trainer alone; with a teacher :class:`~hfkd.distillers.KD` by default.
        args: Training arguments.
        data_collator: By default :class:`~hfkd.data.DistillationCollator`, which also pads ``teacher_…`` columns.
        train_dataset: Rows with the models' inputs, ``labels`` (-100: unlabelled; or ``label``, or what
            ``label_names`` of the arguments names) and, for methods that ask for it, ``index``.
        eval_dataset: The validation set, or several by name.
        held_out_dataset: A split for methods that need one, such as influence weights.
        processing_class: The student's tokenizer or image processor; saved with it.
        teacher_processing_class: The teacher's, where it differs.
        compute_metrics: As in ``transformers.Trainer``; also reports the teacher's score before the first step.
        callbacks: As in ``transformers.Trainer``.
        optimizers: As in ``transformers.Trainer``; a distiller's parameters are added as a group of their own.
        model_init: A function that makes the student, anew at each ``train()`` and for each trial of
            :meth:`hyperparameter_search`: of no argument, or of the trial, which is None where nothing is searched.
        distiller_init: With ``model_init``, a function of the trial (or None) that makes the method for each of these
            students; by default a copy of ``distiller``.
        **kwargs: Further arguments of ``transformers.Trainer``, except ``compute_loss_func``.

    Raises:
        ValueError: If teacher, student, data and distiller do not fit; the message names the remedy.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher_model: nn.Module | Sequence[nn.Module] | str | os.PathLike | None = None,
        distiller: Distiller | None = None,
        args: DistillationTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        held_out_dataset: Dataset | None = None,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        model_init: Callable[..., PreTrainedModel] | None = None,
        distiller_init: Callable[[Any], Distiller] | None = None,
        **kwargs,
    ):
        if kwargs.pop("compute_loss_func", None) is not None:
            raise ValueError(
                "DistillationTrainer takes no compute_loss_func: write a Distiller: its forward returns the terms of "
                "the loss"
            )
        if model_init is not None and (model is not None or tuple(optimizers) != (None, None)):
            raise ValueError(
                "model_init makes a student whenever training starts: leave out model= and optimizers=, which are "
                "about one (optim=, learning_rate= and others of the arguments choose the optimizer)"
            )
        if distiller_init is not None and (model_init is None or distiller is not None):
            raise ValueError(
                "distiller_init makes the method for each student of model_init: pass it with model_init= and without "
                "distiller=, or distiller= alone"
            )
        if isinstance(teacher_model, (list, tuple)):
            teacher_model = TeacherEnsemble(teacher_model)
        args = args if args is not None else DistillationTrainingArguments("tmp_trainer")
        check_arguments(args, eval_dataset)
        if model_init is not None:
            set_seed(args.seed)
            self.model_init = model_init
            model = self.call_model_init()
        check_student(model)
        if distiller_init is not None:
            distiller = distiller_init(None)
        elif distiller is None:
            distiller = StudentAlone() if teacher_model is None else KD()
        check_method(distiller, teacher_model)
        if model_init is not None and distiller_init is None:
            distiller_init = partial(lambda own, trial: copy.deepcopy(own), copy.deepcopy(distiller))
        if isinstance(teacher_model, (str, os.PathLike)):
            may_wait = bool(getattr(args, "teacher_cache", None)) and not distiller.trains_teacher
            teacher_model = load_teacher(teacher_model, task=self._task_of(model), may_wait=may_wait)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which transformers would run as nn.DataParallel, "
                "whose replicas lose buffer writes: start with `accelerate launch` or torchrun, or set "
                "CUDA_VISIBLE_DEVICES=0"
            )

        check_writable(args.output_dir, "name another output_dir, or make room there")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or DistillationCollator(processing_class, teacher_processing_class, args.label_names),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        self.model_init, self._distiller_init = model_init, distiller_init
        self._trial = self._arguments_of_search = None
        # transformers before 5.20 has no `loss_is_scaled_for_ga` and asks this instead.
        self.model_accepts_loss_kwargs = False
        check_processes(self.args, self.accelerator)
        if self.is_fsdp_enabled:
            if self.args.torch_compile:
                raise ValueError("torch_compile=True is not supported under FSDP: drop one of the two")
            if model_init is not None:
                raise ValueError("model_init is not supported under FSDP: pass the student as model=")
            check_sharding(self.accelerator.state.fsdp_plugin, self.model)
            self.model.to(self.args.device)  # which transformers leaves to the sharding, and setup runs the student
        if self.args.torch_compile:  # which _wrap_model does: Accelerate would compile around DDP
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO

        self.held_out_dataset = held_out_dataset
        self.context = DistillationContext(self)
        self._given_teacher, self._teacher_processing_class = teacher_model, teacher_processing_class
        if self.args.device.type != "cpu":
            self._move_images(self.args.device)
        self._set_up(distiller)
        self._evaluated = torch.zeros(2, device=self.args.device)  # sum of losses, number of labelled samples
        self.add_callback(_Hooks(self))
        self.callback_handler.callbacks.insert(0, _LastHook(self))
        self.callback_handler.call_event = self._call_event

    # Setting up

    def _set_up(self, distiller: Distiller) -> None:
        """Bring student, method, teacher and data together: at first, and for each student of ``model_init``."""
        self.distiller = distiller
        self.problem_type = problem_type_of(self.model)
        self._signature_columns = None
        check_adapter(self.model)
        if self.args.load_best_model_at_end:
            check_reload(self.model)
        self._set_up_labels()
        self._set_up_teacher(self._given_teacher)
        self._check_inputs()
        self._set_up_distiller()
        if getattr(self.args, "teacher_cache", None) and self.teacher_model is not None:
            self._set_up_cache()
        self._term_sums: dict[str, Tensor] = {}
        self._term_count = 0
        self._cache_counts_before = self._cache_counts()
        self._finite_losses = FiniteLosses(self.args.device)
        self._resumed_from = None
        self._scoring = False
        self.evaluations, self._outputs, self._card = Evaluations(), [], {}  # what the model card is made of

    def _move_images(self, device: torch.device) -> None:
        """Let small image sets live on the device, where the loader works in this process."""
        sets = [innermost(dataset) for dataset in (*self._eval_datasets().values(), self.held_out_dataset)]
        train = innermost(self.train_dataset)
        if self.args.dataloader_num_workers or not (isinstance(train, ImageDataset) and train.can_move):
            return
        for dataset in (train, *sets):
            if isinstance(dataset, ImageDataset) and dataset.can_move:
                dataset.to(device)
        self.args.dataloader_pin_memory = False  # what is there already cannot be pinned

    def _set_up_labels(self) -> None:
        """Check labels and columns against student and distiller; settle what the hard-label loss is."""
        method = type(self.distiller).__name__
        if self.problem_type not in self.distiller.problem_types:
            raise ValueError(
                f"{method} is not defined for {self.problem_type} problems "
                f"(only {', '.join(self.distiller.problem_types)}): use KD(), which is"
            )
        others = {**self._eval_datasets(), "held-out": self.held_out_dataset}
        for which, dataset in [("train", self.train_dataset), *others.items()]:
            if dataset is not self.held_out_dataset:  # whose rows are the method's affair
                check_dataset(dataset, which)
            check_label_names(dataset, which, self.args.label_names)
            check_labels(dataset, which, self.model.config, self.problem_type, self._label_names)
        check_columns(self.train_dataset, self.distiller)
        named = (class_names(dataset, self._label_names) for dataset in (self.train_dataset, *others.values()))
        self._data_names = next((names for names in named if names), None)

        labels = self._labels_of(self.train_dataset)
        soft_labels = getattr(self.train_dataset, "soft_labels", False) or (labels is not None and labels.ndim > 1)
        if self.distiller.needs_hard_labels and soft_labels:
            raise ValueError(f"{method} needs class indices as labels: turn Mixup and CutMix off")
        self._has_unread_rows = labels is None or isinstance(self.train_dataset, IterableDataset)
        if self.problem_type == "regression" and self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is about classes, and the student has one output: set it to 0")
        labelled = 0 if labels is None else int((labels != IGNORE_INDEX).sum())
        self._is_labelled = labelled > 0
        self.label_scale = labels.size / labelled if labelled else 1.0
        self._is_unlabelled = labels is not None and not labelled  # and says so
        if self._is_unlabelled:
            self._check_method_without_labels()
        hard_label_loss = HardLabelLoss(self.problem_type, self.args.label_smoothing_factor, self.label_scale)
        self._mark = object()
        for part in self.distiller.modules():
            if isinstance(part, Distiller):
                part.hard_label_loss, part._set_up_by = hard_label_loss, self._mark

    def _check_method_is_own(self) -> None:
        """Refuse to train with a method that was set up for other data and models since."""
        for part in self.distiller.modules():
            if isinstance(part, Distiller) and part._set_up_by not in (None, self._mark):
                raise ValueError(
                    f"another trainer was made with this {type(part).__name__} before this one trained, and set it up "
                    "for its own data and models: give each trainer a method of its own (copy.deepcopy before the "
                    "first is made)"
                )

    @property
    def _label_names(self) -> list[str]:
        """The columns that are the labels whatever else is there: the user's, or the student's forward's."""
        return self.label_names if self.args.label_names or "labels" not in self.label_names else []

    def _labels_of(self, dataset: Dataset | None) -> np.ndarray | None:
        return dataset_labels(dataset, self._label_names)

    def _check_method_without_labels(self) -> None:
        method = type(self.distiller).__name__
        if isinstance(self.distiller, StudentAlone):
            raise ValueError(
                "no training sample has a label: name their column labels, or pass a teacher, as the student alone "
                "has nothing to learn"
            )
        if self.distiller.needs_hard_labels or not self.distiller.needs_teacher:
            raise ValueError(
                f"no training sample has a label, and {method} learns from labels: name their column labels, or "
                "choose KD(), which learns from a teacher alone"
            )

    def _check_unread_rows(self, batch: Mapping[str, Tensor]) -> None:
        """Look at the first batch of a set that could not be read ahead."""
        self._has_unread_rows = False
        if isinstance(self.train_dataset, IterableDataset):
            self._check_tokenizers(batch)
        labels = batch["labels"]
        if labels.ndim > 1 and self.problem_type == "single_label":
            check_probabilities(labels.cpu().numpy(), "labels of the first batch")
        elif not self._is_unlabelled and (unlabelled := int((labels == IGNORE_INDEX).sum())):
            warnings.warn(
                f"{unlabelled} of the {len(labels)} labels of the first batch are -100, and how many of the training "
                "set are cannot be read ahead: where others have labels, the term of these is not scaled by "
                "N / N_labelled. Give the data set an attribute labels, an array of all of them, or pass a "
                "datasets.Dataset",
                UserWarning,
                stacklevel=2,
            )

    def _check_batch_without_labels(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse it where others have labels or the method learns nothing from it; otherwise warn, once."""
        dataset = innermost(self.train_dataset)
        has_rows = dataset is not None and not isinstance(dataset, IterableDataset)
        columns = columns_of(dataset) if has_rows else list(batch)
        if self._is_labelled or label_column(columns, self._label_names):
            raise ValueError(
                f"the batch has no labels, only {', '.join(batch)}: name their column in label_names=, and let "
                "the data collator keep it (hfkd.data.DistillationCollator does)"
            )
        self._check_method_without_labels()
        self._is_unlabelled = True
        warnings.warn(
            f"the training set has no column labels ({', '.join(columns)}), so that {type(self.distiller).__name__} "
            "learns from the teacher alone: if a column holds the classes, rename it to labels, or name it in "
            "label_names=",
            UserWarning,
            stacklevel=2,
        )

    def _set_up_teacher(self, teacher_model: nn.Module | None) -> None:
        """Settle who teaches: the given model, one that the method makes, or nobody."""
        distiller, method = self.distiller, type(self.distiller).__name__
        made = distiller.make_teacher(self.model)
        if made is not None and teacher_model is not None:
            raise ValueError(f"{method} brings its own teacher: leave out teacher_model")
        self.teacher_model = made if made is not None else teacher_model
        self.teacher = self.cache = None
        self._saves_teacher = made is not None or distiller.trains_teacher
        if self.teacher_model is None:
            if not distiller.needs_teacher:
                return
            column = None if distiller.trains_teacher else teacher_column(self.train_dataset, self.model.config)
            if column is None:
                raise ValueError(
                    f"{method} needs a teacher: pass teacher_model=, or its answers as a column teacher_logits or "
                    "teacher_probabilities of the training set"
                )
            if getattr(innermost(self.train_dataset), "soft_labels", False):
                raise ValueError(f"{column} are about whole samples, and Mixup and CutMix mix them: turn them off")
            self.teacher = ColumnTeacher(column)
            return
        if self._saves_teacher and getattr(self.args, "teacher_cache", None):
            raise ValueError(f"the teacher of {method} changes as it trains: leave out teacher_cache")
        unlike = made is None or distiller.trains_teacher  # a peer may be the user's own
        members = {"the teacher": self.teacher_model}
        if isinstance(self.teacher_model, TeacherEnsemble):
            check_ensemble(self.teacher_model, self.problem_type, distiller)
            several = self.teacher_model.members
            members = {f"teacher {i} of {len(several)}": member for i, member in enumerate(several, 1)}
        label_orders = [
            check_teacher(member, self.model, distiller, whose, self._data_names) if unlike else None
            for whose, member in members.items()
        ]
        use_channels_last(self.teacher_model)
        own, other = (sum(p.numel() for p in model.parameters()) for model in (self.model, self.teacher_model))
        is_counted = not has_packed_weights(self.teacher_model)
        if unlike and is_counted and other < 0.9 * own:  # two nets of one size differ in their shortcuts or heads
            warnings.warn(
                f"the teacher has {other:,} parameters and the student {own:,}: are they swapped (model= is the "
                "student)?",
                UserWarning,
                stacklevel=4,
            )
        if distiller.trains_teacher:
            if self.model_init is not None and made is None:
                raise ValueError(
                    f"{method} trains the teacher, which all students of model_init share: pass the student as model="
                )
            if label_orders != [None]:
                raise ValueError("a teacher that is trained must have the student's classes in the same order")
            if not any(parameter.requires_grad for parameter in self.teacher_model.parameters()):
                raise ValueError(
                    f"{method} trains the teacher, and all its parameters are frozen, as those of a teacher are that "
                    "another run asked: call teacher.requires_grad_(True) first"
                )
            if getattr(self.args, "teacher_dtype", None):
                raise ValueError(
                    f"{method} trains the teacher, whose weights small steps would not move in another precision: "
                    "leave out teacher_dtype (bf16=True is for both)"
                )
            check_adapter(self.teacher_model, "the teacher")
            self.teacher_model.to(self.args.device)
            return
        dtype = getattr(self.args, "teacher_dtype", None)
        dtype = getattr(torch, dtype) if dtype else None
        options = {"dtype": dtype, "device": self.args.device, "compile_options": self._compile_options()}
        if is_outline(self.teacher_model):
            load = partial(self._load_waiting, self.teacher_model.name_or_path, self.model)
            self.teacher = DeferredTeacher(self.teacher_model, load, label_order=label_orders[0], **options)
            return
        teachers = [
            Teacher(member, label_order=order, **options)
            for member, order in zip(members.values(), label_orders, strict=True)
        ]
        is_ensemble = isinstance(self.teacher_model, TeacherEnsemble)
        self.teacher = Teachers(self.teacher_model, teachers) if is_ensemble else teachers[0]
        if made is not None:  # the method's to update, whatever its precision
            self.teacher_model = self.teacher.model

    @staticmethod
    def _task_of(student: nn.Module) -> str:
        return "text-classification" if "input_ids" in input_names(student) else "image-classification"

    @classmethod
    def _load_waiting(cls, path: str, student: nn.Module) -> nn.Module:
        teacher = load_teacher(path, task=cls._task_of(student))
        check_head(teacher)
        return use_channels_last(teacher)

    def _check_tokenizers(self, rows: Mapping[str, Any]) -> None:
        if self.teacher_model is not None:
            teacher = members_of(self.teacher_model)[-1]
            check_tokenizers(rows, self.processing_class, self._teacher_processing_class, self.model, teacher)

    def _check_inputs(self) -> None:
        """Show student and teacher the first samples, and look at the tokens of all."""
        readers = [(self.model, "the student", "")]
        apart = set()  # those with a precision of their own
        tokens = first_tokens(self.train_dataset)
        if self.teacher_model is not None:
            sources = self.teacher.members if isinstance(self.teacher, Teachers) else [self.teacher]
            models = [self.teacher_model if source is None else source.model for source in sources]
            readers += [(model, "the teacher", "teacher_") for model in models]
            apart = {id(source.model) for source in sources if source is not None and source.dtype is not None}
            self._check_tokenizers(tokens)
            check_teacher_columns(self.train_dataset, self._eval_datasets())
            check_image_processor(self.train_dataset, self._teacher_processing_class)
        for model, whose, prefix in readers:
            for which, dataset in {"train": self.train_dataset, **self._eval_datasets()}.items():
                check_tokens(dataset, which, model, whose, prefix)
        if self.train_dataset is None or isinstance(self.train_dataset, IterableDataset):
            return
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "all parameters of the student are frozen, as those of a teacher are that another run asked: call "
                "student.requires_grad_(True) first"
            )
        batch = self.context.sample()
        if not tokens and "input_ids" in batch:
            self._check_tokenizers(self.context.sample(64))
        for model, whose, prefix in readers:
            if not is_outline(model):
                with nullcontext() if id(model) in apart else self.compute_loss_context_manager():
                    check_inputs(model, batch, self.train_dataset, whose, prefix)
        self._with_labels(batch)

    def _set_up_distiller(self) -> None:
        """Allocate the method's own parameters and put all that trains into one module."""
        if self.distiller.has_task_head and self.args.load_best_model_at_end and self.args.save_only_model:
            raise ValueError(
                f"{type(self.distiller).__name__} has a task head, which save_only_model=True leaves out of the "
                "checkpoints, so that load_best_model_at_end=True could not restore it: turn one of the two off"
            )
        use_channels_last(self.model)
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            self.distiller.setup(self.context)
        self.distiller.to(self.args.device)
        # Not before: setup may choose the layers.
        teacher_model = self.context.teacher_model if self.distiller.teacher_layers else None
        sides = [(self.model, self.distiller.student_layers), (teacher_model, self.distiller.teacher_layers)]
        for model, layers in sides:
            for path in layers if model is not None else ():
                find_module(base_model(model), path.partition(":")[0])
        names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # the second until transformers 6
        checkpointing = [getattr(self.args, name, None) or {} for name in names]
        if self.distiller.student_layers and any(options.get("use_reentrant") for options in checkpointing):
            raise ValueError(
                f"{type(self.distiller).__name__} learns from the student's inner layers, which reentrant "
                f"checkpointing cuts off: leave use_reentrant out of {names[0]}"
            )
        if isinstance(self.teacher, Teacher):
            self.teacher.watch(self.distiller.teacher_layers)
        trained_teacher = self.teacher_model if self.distiller.trains_teacher else None
        self._module = _DistillationModule(self.model, self.distiller, trained_teacher)
        has_parameters = next(self.distiller.parameters(), None) is not None
        if has_parameters and self.optimizer is not None and self.lr_scheduler is not None:
            raise ValueError(
                f"{type(self.distiller).__name__} has parameters of its own, which the given scheduler does not know: "
                "pass optimizers=(optimizer, None), or neither"
            )

    def _set_up_cache(self) -> None:
        """Open the store of the teacher's answers, which from now on stands before the teacher."""
        self.train_dataset = with_numbered_views(self.train_dataset)
        check_cache(self.args, self.train_dataset, self.teacher_model)
        collated = []
        if type(self.data_collator) is not DistillationCollator:
            rows = dataset_index(self.train_dataset).argsort()[:8].tolist()
            take = partial(self.context.take, self.train_dataset, rows)
            collated = check_collator(take, self.train_dataset, self.teacher_model)
        with self.compute_loss_context_manager():
            precision = self.teacher.precision
        members = self.teacher.members if isinstance(self.teacher, Teachers) else [self.teacher]
        label_orders = [None if member.label_order is None else member.label_order.tolist() for member in members]
        index, identity = describe(
            self.teacher_model,
            self.train_dataset,
            self._teacher_columns(),
            precision=precision,
            # Float16 would round numbers about 2,000 to whole ones.
            dtype=self.args.teacher_cache_dtype or ("float32" if self.problem_type == "regression" else "float16"),
            top_k=self.args.teacher_cache_top_k,
            label_names=named_labels(self.model.config),
            label_orders=label_orders,
            collated=collated,
        )
        self._train_index = index
        self.cache = TeacherCache(
            self.teacher,
            index,
            identity,
            classes=self.model.config.num_labels,
            folder=None if self.args.teacher_cache is True else self.args.teacher_cache,
            views=getattr(innermost(self.train_dataset), "number_of_views", None) or 0,
            features=self._cached_features(),
        )

    def _cached_features(self) -> dict[str, int]:
        """The teacher's layers that the method looks at, and how long their vectors are."""
        layers = self.distiller.teacher_layers
        model = self.context.teacher_model if layers else None
        features = probe(model, self.context.sample(), layers, prefix="teacher_") if layers else {}
        for layer, feature in features.items():
            if feature.ndim != 2:
                raise ValueError(
                    f"{type(self.distiller).__name__} looks at {layer!r} of its teacher, which gives "
                    f"{tuple(feature.shape)}, and the cache keeps logits and vectors (B, D) alone: choose a method of "
                    "those, or leave out teacher_cache"
                )
        return {layer: feature.shape[1] for layer, feature in features.items()}

    def _eval_datasets(self) -> dict[str, Dataset]:
        if self.eval_dataset is None:
            return {}
        return self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation": self.eval_dataset}

    # Wrapping and optimizer

    def _compile_options(self) -> dict[str, Any] | None:
        if not self.args.torch_compile:
            return None
        return {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}

    def _wrap_model(self, model, training=True, dataloader=None):
        if not training:
            return self._module
        if self.is_fsdp_enabled:
            return self.model  # prepared by transformers, together with the optimizer
        wrapped_before = isinstance(
            self.accelerator.unwrap_model(model, keep_torch_compile=False), _DistillationModule
        )
        if not wrapped_before and self.args.torch_compile:
            self._module.compile_terms(**self._compile_options())
        return self.accelerator.prepare(model if wrapped_before else self._module)

    @contextmanager
    def _module_as_model(self) -> Iterator[None]:
        """While open, what transformers takes for the model under FSDP is all that trains, as FSDP shards that."""
        student = self.model
        if self.is_fsdp_enabled:
            self.model = self._module
        try:
            yield
        finally:
            self.model = student

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if isinstance(self._module, FSDPModule):
            # Accelerate tells parameters apart by their address, and those of empty shards have none.
            raise RuntimeError("FSDP cannot train() a model again: save the student, and make a new trainer with it")
        self._module.to(memory_format=torch.contiguous_format)  # FSDP shards nothing that is channels last
        plugin = self.accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy  # by class, which the other policies do not go by
        plugin.transformer_cls_names_to_wrap = [*(plugin.transformer_cls_names_to_wrap or ()), *self._module.wholes()]
        # Autocast rounds where it may. FSDP would round all that the module takes and gives, the losses too.
        plugin.mixed_precision_policy = None
        with self._module_as_model():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.callback_handler.model = self.model
        for method in ("predict", "start"):
            register_fsdp_forward_method(self._module, method)
        with torch.no_grad():
            self._module.start()
        return prepared

    def autocast_smart_context_manager(self, cache_enabled=True):
        # The frozen teacher runs outside the prepared module, and evaluation may run before anything is prepared.
        return self.accelerator.autocast()

    def create_optimizer(self, model=None):
        teacher, is_ours = self._module.teacher, self.optimizer is None
        if model is None:
            model = self._module.student
            if teacher is not None:
                model = nn.ModuleDict({"student": model, "teacher": teacher})
        optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        groups = self._distiller_groups()
        parts = [part for part in self.distiller.modules() if isinstance(part, Distiller)]
        ratio = min(part.teacher_learning_rate_ratio for part in parts)
        if teacher is not None:  # unknown only to an optimizer that the user made
            own = [p for p in teacher.parameters() if p.requires_grad]
            groups.append({"params": own, "lr": ratio * optimizer.defaults.get("lr", self.args.learning_rate)})
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
            if group["params"]:
                optimizer.add_param_group(group)
        if teacher is not None:
            rate = getattr(self.args, "teacher_learning_rate", None)
            if rate is None and is_ours and ratio != 1:
                rate = ratio * self.args.learning_rate
            if rate is not None:
                self._set_learning_rate(optimizer, teacher, rate)
        return optimizer

    @staticmethod
    def _set_learning_rate(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
        """Move a model's parameters into groups of their own, alike but for the learning rate."""
        own = {id(parameter) for parameter in model.parameters()}
        for group in list(optimizer.param_groups):
            theirs = [parameter for parameter in group["params"] if id(parameter) in own]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            if theirs:
                optimizer.add_param_group({**group, "params": theirs, "lr": learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    def _distiller_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the distiller: its own learning rate, no decay of scalars and vectors."""
        learning_rate = {}
        for part in self.distiller.modules():
            if isinstance(part, Distiller):
                own = getattr(self.args, "distiller_learning_rate", None)
                own = own or part.default_learning_rate or self.args.learning_rate
                learning_rate.update((parameter, own) for parameter in part.parameters() if parameter.requires_grad)
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for parameter, rate in learning_rate.items():
            decay = self.args.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]

    # Columns

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            names = [*input_names(self.model), *self.distiller.batch_columns, "index", "view", "sample_weight"]
            if self.teacher_model is not None:
                names += self._teacher_columns()
            if isinstance(self.teacher, ColumnTeacher):
                names.append(self.teacher.column)
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *names]))

    def _teacher_columns(self) -> list[str]:
        names = [name for member in members_of(self.teacher_model) for name in input_names(member)]
        return [*names, *(f"teacher_{name}" for name in names)]

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        by_sample = super()._get_collator_with_removed_columns(data_collator, description)
        return _Collator(data_collator, by_sample)

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        dropping = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = dropping and is_training  # of training alone: every row is scored
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = dropping
        inner = getattr(loader, "base_dataloader", loader)  # Accelerate's own, which it iterates
        inner.worker_init_fn = partial(outlive, inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        return _OrderOfEpoch(sampler, self) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _get_eval_sampler(self, eval_dataset):
        # Not transformers', which under group_by_length returns predictions in another order than the rows'.
        if eval_dataset is None or not has_length(eval_dataset) or self.args.world_size > 1:
            return None
        rows = longest_first(eval_dataset) if self._may_reorder() else None
        return SequentialSampler(eval_dataset) if rows is None else _InOrder(rows)

    def _may_reorder(self) -> bool:
        """Whether rows that are scored may come in any order: nobody but this class sees their batches."""
        args, names = self.args, ("get_eval_dataloader", "get_test_dataloader", "evaluation_loop", "prediction_step")
        if not self._scoring or any(getattr(type(self), name) != getattr(DistillationTrainer, name) for name in names):
            return False
        by_batch = args.batch_eval_metrics or args.include_for_metrics or not args.eval_do_concat_batches
        is_kept = args.dataloader_persistent_workers  # a loader that others may ask for later
        return not (by_batch or is_kept or self.preprocess_logits_for_metrics is not None)

    @contextmanager
    def _own_loop(self) -> Iterator[None]:
        """The loader that is made next is read by :meth:`evaluation_loop` or by this class alone."""
        before, self._scoring = self._scoring, True
        try:
            yield
        finally:
            self._scoring = before

    def get_eval_dataloader(self, eval_dataset=None):
        # With persistent workers transformers keeps one loader for all sets that have no name.
        if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        return self.get_test_dataloader(eval_dataset)

    def get_train_dataloader(self):
        collator = self.data_collator
        if self.cache is not None:
            self.data_collator = _KeepingOnHost(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    # Steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self._with_labels(inputs)
        if self._has_unread_rows:
            self._check_unread_rows(batch)
        teacher = None if self.teacher is None else self.context.teacher(self._with_view(batch))
        tensors = {name: column for name, column in batch.items() if isinstance(column, Tensor)}
        loss, terms, parts = model(tensors, teacher)
        self._finite_losses.watch(loss, parts, batch, self.state.global_step + 1)
        for name, term in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + term
        self._term_count += 1
        return (loss, terms) if return_outputs else loss

    def _with_view(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch of the training set with what the teacher's cache, where there is one, knows it by."""
        if self.cache is None or "view" in batch:
            return dict(batch)
        whole = {**batch, "view": torch.zeros_like(batch["index"])}
        return {**whole, "host_view": np.zeros_like(batch["host_index"])} if "host_index" in batch else whole

    def _with_labels(self, inputs: Mapping[str, Tensor], *, fill: bool = True) -> dict[str, Tensor]:
        """The batch with its labels under that name; unlabelled data gets -100 where ``fill``."""
        labels = label_column(inputs, self._label_names)
        batch = {name: column for name, column in inputs.items() if name not in (labels, *LABEL_COLUMNS)}
        if labels is not None:
            batch["labels"] = inputs[labels]
        elif fill:
            if not self._is_unlabelled:
                self._check_batch_without_labels(batch)
            first = next(value for value in batch.values() if isinstance(value, Tensor))
            batch["labels"] = torch.full((len(first),), IGNORE_INDEX, device=first.device)
        return batch

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        batch = self._with_labels(self._prepare_inputs(inputs), fill=False)
        labels = batch.get("labels")
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = module.predict(batch)
        loss = None
        if labels is not None:
            if self.problem_type == "single_label" and not labels.is_floating_point():
                labels = labels.masked_fill(labels == -1, IGNORE_INDEX)  # the hidden labels of a benchmark's test set
            per_sample = HardLabelLoss(self.problem_type)(logits, labels)
            soft = self.problem_type == "single_label" and labels.ndim > 1
            labelled = torch.ones_like(per_sample, dtype=torch.bool) if soft else labels.flatten() != IGNORE_INDEX
            loss = per_sample.sum() / labelled.sum()
            per_sample, labelled = self.accelerator.gather_for_metrics((per_sample, labelled))
            self._evaluated += torch.stack([per_sample.sum(), labelled.sum()])
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._scoring = False  # the loader is made; callbacks and metrics may ask for their own
        self._evaluated.zero_()
        self.context.align_buffers(self.model)  # what is scored is what will be saved
        before, order = self.compute_metrics, _InOrder.of(dataloader)
        compute_metrics = getattr(before, "of_rows", before)  # not that of a loop around this one

        def by_row(found: EvalPrediction):
            return compute_metrics(EvalPrediction(order.restored(found.predictions), order.restored(found.label_ids)))

        by_row.of_rows = compute_metrics
        if compute_metrics is not None:
            self.compute_metrics = compute_metrics if order is None else by_row
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.compute_metrics = before
        if order is not None:
            restored = {name: order.restored(getattr(output, name)) for name in ("predictions", "label_ids")}
            output = output._replace(**restored)
        # transformers averages batches, whatever number of labelled samples they hold: none at all gives NaN.
        loss, labelled = self._evaluated.tolist()
        output.metrics.pop(f"{metric_key_prefix}_loss", None)
        if labelled:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / labelled
        if self._outputs and self._outputs[-1] is None:
            self._outputs[-1] = output
        return output

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self._outputs.append(None)  # for its own loop: a callback may evaluate meanwhile
        try:
            with self._own_loop():
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            output = self._outputs.pop()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if not isinstance(dataset, (dict, IterableDataset)):  # of several sets each one came by here
            if self._are_logits(output.predictions) and isinstance(output.label_ids, np.ndarray):
                answers = Answers(dataset, None, output.predictions, output.label_ids)
                self.evaluations.student[metric_key_prefix] = answers
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        with self._own_loop():
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _are_logits(self, predictions: Any) -> bool:
        is_one = isinstance(predictions, np.ndarray) and self.preprocess_logits_for_metrics is None
        return is_one and predictions.shape[1:] == (self.model.config.num_labels,)

    def _call_event(self, event: str, *args, **kwargs) -> TrainerControl:
        # A callback may save or score the model that it is given, and did so before without its task head. Not at
        # steps, which would fold and unfold at every one.
        with self._module.folded() if event in ("on_epoch_end", "on_evaluate", "on_save") else nullcontext():
            return CallbackHandler.call_event(self.callback_handler, event, *args, **kwargs)

    # Logging

    def log(self, logs, start_time=None):
        if "loss" in logs and self._term_count:
            names = list(self._term_sums)
            means = torch.stack([self._term_sums[name] for name in names]) / self._term_count
            logs.update(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            self._term_sums, self._term_count = {}, 0
        if "train_runtime" in logs and self.cache is not None:  # the last of a run, which train() returns
            figures = self._cache_figures(self._cache_counts_before)
            logs.update({f"teacher_cache_{name}": figure for name, figure in figures.items()})
        super().log(logs, start_time)

    def _cache_counts(self) -> list[float]:
        """Of this process."""
        names = ("hits", "misses", "asking_seconds", "store_seconds")
        return [] if self.cache is None else [getattr(self.cache, name) for name in names]

    def _cache_figures(self, before: Sequence[float]) -> dict[str, float]:
        """What the cache's use since then cost and saved, over all processes; noted in its manifest."""
        since = [now - then for now, then in zip(self._cache_counts(), before, strict=True)]
        everybody = zip(*gather_object([since]), strict=True)
        hits, misses, asking_seconds, store_seconds = (sum(counts) for counts in everybody)
        figures = None
        if self.is_world_process_zero():
            if misses:
                self.cache.note_asked(misses, asking_seconds)
            figures = self.cache.figures(hits, misses, asking_seconds, store_seconds)
        return broadcast_object_list([figures])[0]

    def _report_teacher(self, student: tuple[np.ndarray, ...] | None) -> None:
        """Score the teacher before the first step; ``student`` is what the student answered, where it was asked."""
        if self.label_scale != 1:
            self.log({"label_scale": self.label_scale})
        if self.cache is not None and self.cache.views:
            self.log({"teacher_cache_views": self.cache.views})
        if isinstance(self.teacher, ColumnTeacher):  # which says nothing about the evaluation set
            answers = self._answers(self._ask_teacher, self.train_dataset, max_samples=1000)
            self.log({f"teacher_train_{name}": value for name, value in self._score(*answers[:2]).items()})
            self._judge_teacher(answers, lambda: self._student_answers(self.train_dataset))
        elif self.teacher is not None and not self._saves_teacher and self.eval_dataset is not None:
            answers = self._teacher_answers(max_samples=1000)
            score = self._score(*answers[:2])
            self.log({f"teacher_{name}": value for name, value in score.items()})
            if self.cache is not None and self.is_world_process_zero():
                self.cache.note_score(score)
            self._judge_teacher(answers, lambda: student or self._student_answers())

    def _judge_teacher(self, answers: tuple[np.ndarray, ...], of_student: Callable) -> None:
        """Warn before the first step of a teacher that is no better than a guess, or than the student already is."""
        _, labels, merits = answers
        is_regression = self.problem_type == "regression"
        known = labels.reshape(len(labels)) != IGNORE_INDEX if is_regression else merits >= 0
        if self.state.global_step or not known.any():
            return
        guess = -float(labels[known].var()) if is_regression else 1 / self.model.config.num_labels
        rivals = {"a guess": guess}
        if not head_looks_new(self.model):  # otherwise it guesses
            rivals["the student already"] = float(of_student()[2][known].mean())
        teacher, rival = float(merits[known].mean()), max(rivals, key=rivals.get)
        if teacher < rivals[rival] and self.is_world_process_zero():
            told = (
                "has a squared error of {:.3g}, and {} {:.3g}"
                if is_regression
                else "is right on {:.1%}, and {} on {:.1%}"
            )
            warnings.warn(
                f"of {known.sum()} samples the teacher {told.format(abs(teacher), rival, abs(rivals[rival]))}: look "
                "whether its classes are in the data's order (id2label) and its inputs its own "
                "(teacher_processor= of ImageDataset, teacher_tokenizer= of tokenize), or take another teacher",
                UserWarning,
                stacklevel=2,
            )

    def _student_answers(self, dataset: Dataset | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with evaluating(self._module):
            return self._answers(self._module.predict, dataset, max_samples=1000)

    def _check_best_metric(self) -> tuple[np.ndarray, ...] | None:
        """Refuse a metric to choose by that will not be there at the end of the first epoch.

        Returns:
            The student's answers, where it was asked.
        """
        name = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        if self.args.metric_for_best_model and isinstance(self.eval_dataset, dict) and self.args.eval_strategy != "no":
            if not name.startswith(tuple(f"{which}_" for which in self.eval_dataset)):
                raise ValueError(
                    f"metric_for_best_model is {name!r}, and each of the evaluation sets has its own: name one, such "
                    f"as eval_{next(iter(self.eval_dataset))}_loss"
                )
        one_set = self.eval_dataset is not None and not isinstance(self.eval_dataset, dict)
        if name == "loss" or not one_set or not self._has_metrics or self.state.global_step:
            return None
        answers = self._student_answers()
        score = self._score(*answers[:2])
        if score and not {name, f"eval_{name}"} & {*score}:
            raise ValueError(
                f"metric_for_best_model is {name!r}, and compute_metrics gives {', '.join(score)}: choose one of these"
                ", or loss"
            )
        return answers

    def evaluate_teacher(self, dataset: Dataset | None = None, max_samples: int | None = None) -> dict[str, float]:
        """Score the frozen teacher as the student is scored; a teacher's cache keeps what it says here too.

        Args:
            dataset: What to score it on; the (first) evaluation set by default.
            max_samples: At most so many samples, evenly spread over the set; a stream is scored whole.

        Returns:
            What ``compute_metrics`` returns, or the accuracy (regression: the mean squared error); nothing where no
            sample has a label.

        Raises:
            ValueError: If there is no frozen teacher or no data set.
        """
        if self.teacher is None:
            raise ValueError("there is no frozen teacher to evaluate")
        return self._score(*self._teacher_answers(dataset, max_samples)[:2])

    def _teacher_answers(self, dataset: Dataset | None = None, max_samples: int | None = None):
        answers = self._answers(self._ask_teacher, dataset, max_samples)
        dataset = next(iter(self._eval_datasets().values())) if dataset is None else dataset
        if not isinstance(dataset, IterableDataset) and self._are_logits(answers[0]):
            self.evaluations.keep_teacher(Answers(dataset, spread(dataset, max_samples), *answers[:2]))
        return answers

    def _ask_teacher(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return in_float32(self.teacher(inputs)).logits

    @property
    def _has_metrics(self) -> bool:
        # Metrics that want inputs, or tensors batch by batch, are the student's own affair.
        special = self.args.batch_eval_metrics or self.args.include_for_metrics
        return self.compute_metrics is not None and not special

    def _answers(
        self, ask: Callable, dataset: Dataset | None = None, max_samples: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predictions, labels, and the merit of each prediction: 1 if right, minus the squared error of a number.

        The merit is -1 where a class is not known; all are empty where there are no labels.
        """
        if dataset is None:
            dataset = next(iter(self._eval_datasets().values()), None)
        if dataset is None:
            raise ValueError("pass a dataset: the trainer has no eval_dataset")
        chosen = spread(dataset, max_samples)
        if chosen is not None:
            dataset = dataset.select(chosen) if hasattr(dataset, "select") else Subset(dataset, chosen)
        transforms = self._has_metrics and self.preprocess_logits_for_metrics is not None
        kept = predictions = None
        if self.cache is not None and ask == self._ask_teacher and not transforms:
            kept, predictions = self._kept_evaluation(dataset)
        if predictions is not None:
            labels = self._labels_as_batched(dataset)
            return predictions, labels, self._merit(torch.from_numpy(predictions), torch.from_numpy(labels)).numpy()
        parts = []
        with torch.random.fork_rng(), self.compute_loss_context_manager():
            with self._own_loop():
                loader = self.get_test_dataloader(dataset)
            hidden = self.args.disable_tqdm or not self.is_world_process_zero()
            for batch in tqdm(loader, desc="Teacher", disable=hidden, leave=False):
                batch = self._with_labels(self._prepare_inputs(batch), fill=False)
                if "labels" not in batch:
                    return np.zeros(0), np.zeros(0), np.zeros(0)
                # Without labels, by which an ensemble would choose who is right.
                inputs = {name: column for name, column in batch.items() if name != "labels"}
                logits = ask(inputs)
                merit = self._merit(logits, batch["labels"])
                if transforms:
                    logits = self.preprocess_logits_for_metrics(logits, batch["labels"])
                found = self.accelerator.gather_for_metrics((logits, batch["labels"], merit))
                parts.append([tensor.cpu() for tensor in found])
        columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
        order = _InOrder.of(loader)
        predictions, labels, merits = columns if order is None else map(order.restored, columns)
        # Unlike, they are another column's.
        if kept is not None and np.array_equal(labels, self._labels_as_batched(dataset)):
            kept.write(np.arange(len(predictions)), predictions)
        return predictions, labels, merits

    def _merit(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.problem_type == "regression":
            return -(logits.squeeze(-1) - labels.reshape(len(logits))).square()
        classes = labels if labels.ndim == 1 else labels.argmax(-1)
        return (logits.argmax(-1) == classes).float().masked_fill(classes < 0, -1.0)

    def _score(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        is_regression = self.problem_type == "regression"
        one_each = labels.argmax(-1) if labels.ndim > 1 and not is_regression else labels.reshape(len(labels))
        known = one_each != IGNORE_INDEX if is_regression else one_each >= 0
        if not known.any():
            return {}
        if self._has_metrics:
            compute_metrics = getattr(self.compute_metrics, "of_rows", self.compute_metrics)
            return denumpify_detensorize(compute_metrics(EvalPrediction(predictions, labels)))
        if is_regression:
            return {"mse": float(((predictions.squeeze(-1) - one_each)[known] ** 2).mean())}
        return {"accuracy": float((predictions.argmax(-1) == one_each)[known].mean())}

    def _labels_as_batched(self, dataset: Dataset) -> np.ndarray | None:
        labels = self._labels_of(dataset)
        return labels.astype(np.float32) if labels is not None and labels.dtype.kind == "f" else labels

    def _kept_evaluation(self, dataset: Dataset) -> tuple[Any, np.ndarray | None]:
        """Where the cache keeps the teacher's answers to an evaluation set (on the first process), and all of them."""
        kept = predictions = None
        with self.compute_loss_context_manager():
            is_same = self.teacher.precision == self.cache.precision
        if self.is_world_process_zero() and is_same and self._labels_as_batched(dataset) is not None:
            kept = self.cache.evaluation(dataset, self._teacher_columns())
        if kept is not None:
            answers, whole = kept.read(np.arange(len(dataset)))
            predictions = answers if whole.all() else None
        return kept, broadcast_object_list([predictions])[0]

    def warm_teacher_cache(self) -> dict[str, float]:
        """Ask the teacher about every training sample, in every view, that its cache has no answer to.

        Each process takes its share. Interrupted, the next call goes on where this one was.

        Returns:
            ``answers`` that all processes asked for, the ``seconds`` until the last was done, the ``bytes`` of the
            cache, and what it took to fill: see :meth:`hfkd.cache.TeacherCache.figures`.

        Raises:
            ValueError: If there is no cache.
        """
        if self.cache is None:
            raise ValueError("there is no teacher's cache to fill: pass a teacher, and teacher_cache=True")
        start, before = time.perf_counter(), self._cache_counts()
        views = range(1, self.cache.views + 1) if self.cache.views else (0,)
        # Whatever other processes fill meanwhile, these rows are this one's.
        own = np.arange(self.accelerator.process_index, len(self._train_index), self.accelerator.num_processes)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        with (
            self.compute_loss_context_manager(),
            tqdm(total=len(views) * len(own), desc="Teacher's cache", unit=" answers", disable=hidden) as bar,
        ):
            for view in views:
                rows = own[np.isin(self._train_index[own], self.cache.missing(view))]
                bar.update(len(own) - len(rows))
                dataset = Subset(at_view(self.train_dataset, view), rows.tolist())
                if (order := longest_first(dataset)) is not None:
                    dataset = Subset(dataset, order.tolist())
                for batch in self.context.loader(dataset, self.args.eval_batch_size):
                    self.cache(self._with_view(self._prepare_inputs(batch)))
                    bar.update(len(batch["index"]))
        self.accelerator.wait_for_everyone()
        seconds = time.perf_counter() - start
        figures = self._cache_figures(before)
        names = ("bytes", "seconds_per_answer", "fill_seconds", "break_even_epochs")
        return {
            "answers": figures["misses"],
            "seconds": round(seconds, 1),
            **{name: figures[name] for name in names if name in figures},
        }

    # Searching

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        self._finite_losses.forget()
        if self._arguments_of_search is not None:
            # transformers makes the student before it sets the arguments of its trial, and the seed is one of them.
            vars(self.args).update(self._arguments_of_search)
            super()._hp_search_setup(trial)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    train.__doc__ = SavingTrainer.train.__doc__

    def hyperparameter_search(self, *args, **kwargs) -> BestRun | list[BestRun]:
        """As in ``transformers.Trainer``; a trial has a student of ``model_init`` and a method of ``distiller_init``.

        All trials share the teacher and its cache, and start from the arguments as they were before the search, which
        they are again behind it.

        Raises:
            ValueError: If there is no ``model_init``, or several processes would prune their trials apart.
        """
        if self.model_init is None:
            raise ValueError(
                "every trial of a search needs a student of its own: pass model_init=, a function of the trial that "
                "makes one, in place of model=, and distiller_init= for its method"
            )
        if self.accelerator.num_processes > 1 or kwargs.get("n_jobs", 1) != 1:
            raise ValueError(
                "a search is one process with one trial at a time: start it without a launcher and leave out n_jobs "
                "(more processes can share an optuna storage=)"
            )
        self._arguments_of_search = vars(self.args).copy()
        try:
            return super().hyperparameter_search(*args, **kwargs)
        finally:
            vars(self.args).update(self._arguments_of_search)
            self._train_batch_size = self.args.train_batch_size
            self._arguments_of_search = self.hp_search_backend = None

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            distiller = self._distiller_init(trial)
            check_method(distiller, self._given_teacher)
            self._set_up(distiller)
            set_seed(self.args.seed)  # as it would be behind __init__ with model=

    def create_model_card(self, *args, **kwargs):
        """Write the model card and its pictures: see :func:`hfkd.modelcard.write_model_card`.

        What is given holds for later cards too, such as the one that ``push_to_hub()`` writes.
        """
        if self.is_world_process_zero():
            given = inspect.signature(write_model_card).bind(self, *args, **kwargs).arguments
            self._card |= {name: value for name, value in given.items() if name != "trainer" and value is not None}
            show_figures(self, write_model_card(self, **self._card))


def spread(dataset: Dataset, count: int | None) -> list[int] | None:
    """At most so many rows, evenly spread over a data set; None for all, and of a stream."""
    if count is None or isinstance(dataset, IterableDataset) or len(dataset) <= count:
        return None
    return torch.linspace(0, len(dataset) - 1, count).long().tolist()


def with_numbered_views(dataset: Dataset) -> Dataset:
    """A data set of images as a cache can keep them, and any other as it is; not in place: the caller trains on."""
    if isinstance(dataset, Subset):
        part = copy.copy(dataset)
        part.dataset = with_numbered_views(dataset.dataset)
        return part
    return dataset.with_numbered_views() if isinstance(dataset, ImageDataset) else dataset


def at_view(dataset: Dataset, view: int) -> Dataset:
    """A data set of numbered views with all samples in one of them; any other as it is."""
    if isinstance(dataset, Subset):
        return Subset(at_view(dataset.dataset, view), dataset.indices)
    return dataset.only_view(view) if view else dataset
