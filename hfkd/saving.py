"""What a run leaves on the disk and on the Hub, and how it goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from hfkd.checkpoints import (
    UNFINISHED_NAME,
    checkpoint_to_resume,
    faults_of,
    last_whole_checkpoint,
    list_files,
    start_checkpoint,
)
from hfkd.checks import check_resume
from hfkd.hub import explained, push_checkpoint, push_student, remedy_for
from hfkd.modelcard import base_without_home
from hfkd.models.loading import check_weight_files
from hfkd.sharding import load_whole_state, whole_state
from hfkd.termination import Termination


DISTILLER_NAME = "distiller.safetensors"
BATCH_NAME = "batch.json"
TEACHER_FOLDER = "teacher"


class SavingTrainer(Trainer):
    """Whole checkpoints or none, exact resuming, and pushes of the student alone.

    The half of :class:`~hfkd.trainer.DistillationTrainer` that is about files. Of the other half it takes
    ``distiller``, ``context``, ``teacher_model``, ``_saves_teacher`` and ``_module``, the module of all that trains.
    """

    def __init__(self, *args, **kwargs):
        self._termination = Termination()
        self._saved_step = -1
        self._resumed_from: str | None = None
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As in ``transformers.Trainer``, but for what a run meets that is cut short.

        SIGTERM writes a checkpoint behind the step under way (on several processes, behind the next one) and exits
        with status 143, unless another handler is installed. Checkpoints that are not whole are never resumed from.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last whole one of ``output_dir``.
            trial: As in ``transformers.Trainer``.
            ignore_keys_for_eval: As in ``transformers.Trainer``.

        Raises:
            ValueError: If there is no whole checkpoint to resume from.
            FloatingPointError: If a loss is not finite, before the step is taken.
            OSError: If a checkpoint could not be written.
            SystemExit: On SIGTERM.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        self._saved_step = -1
        with self._termination.watched():
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            if self._termination.came_too_late():
                raise SystemExit(self._termination.exit_status)
        return output

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        is_due = self._termination.is_due()
        self.control.should_save |= is_due and self._saved_step != self.state.global_step
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if is_due:
            if self._saved_step != self.state.global_step:  # an evaluation that was not the best
                self._save_checkpoint(self.model, None)
            self.accelerator.wait_for_everyone()  # the first to exit has its launcher end the others
            raise SystemExit(self._termination.exit_status)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            if self.args.should_save:
                start_checkpoint(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self._leave_paths_out(folder)
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            if not faults_of(folder):  # written, and not uploaded
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            last = last_whole_checkpoint(folder.parent)
            kept = "none was written before" if last is None else f"the one before, {last}, is whole"
            remedy = "make room, and start again" + ("" if last is None else " with resume_from_checkpoint=True")
            raise OSError(f"{folder} could not be written ({error}); {kept}: {remedy}") from error
        if self.args.should_save:
            (folder / UNFINISHED_NAME).unlink(missing_ok=True)
        self._saved_step = self.state.global_step

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each process writes its own
        if self.args.should_save:
            list_files(Path(output_dir))

    def _save(self, output_dir=None, state_dict=None):
        with self._module.folded(), base_without_home(self.model):
            super()._save(output_dir, whole_state(self.model) if self.is_fsdp_enabled else state_dict)
        # A pickle that nothing reads, with the Hub token and local paths in it.
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def save_state(self):
        super().save_state()
        self._leave_paths_out(self.args.output_dir)

    def _leave_paths_out(self, folder: str | Path) -> None:
        """Of the trainer's state as written: the best checkpoint's path, which is this machine's; its step stays."""
        path = Path(folder, TRAINER_STATE_NAME)
        if self.args.should_save and path.is_file():
            state = {**json.loads(path.read_text(encoding="utf-8")), "best_model_checkpoint": None}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            part.replace(path)

    def _find_best_checkpoint(self) -> None:
        """The best checkpoint of a resumed run lies beside the one it resumes from, whatever its state says."""
        if self._resumed_from is None:
            return
        folder = os.path.dirname(os.path.abspath(self._resumed_from))
        if os.path.isdir(self.args.output_dir) and os.path.samefile(folder, self.args.output_dir):
            folder = self.args.output_dir
        best = os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        self.state.best_model_checkpoint = best if os.path.isdir(best) else None
        is_lost = self.state.best_global_step is not None and not os.path.isdir(best)
        if is_lost and self.args.load_best_model_at_end:
            warnings.warn(
                f"the best checkpoint so far, {best}, is not there: put it beside the one that this run resumes from, "
                "or load_best_model_at_end loads nothing unless a later one is better",
                UserWarning,
                stacklevel=2,
            )

    def _save_optimizer_and_scheduler(self, output_dir):
        with self._module_as_model():
            super()._save_optimizer_and_scheduler(output_dir)
        state = {name: tensor.contiguous() for name, tensor in whole_state(self.distiller).items()}
        teacher_state = whole_state(self.teacher_model) if self._saves_teacher and self.is_fsdp_enabled else None
        if not self.args.should_save:
            return
        # A pickle of all that the other files hold.
        Path(output_dir, f"{FSDP_MODEL_NAME}.bin").unlink(missing_ok=True)
        Path(output_dir, BATCH_NAME).write_text(json.dumps(self._batch_of_all()), encoding="utf-8")
        if state:
            safetensors.torch.save_file(state, os.path.join(output_dir, DISTILLER_NAME))
        if self._saves_teacher:
            self.teacher_model.save_pretrained(self._teacher_folder(output_dir), state_dict=teacher_state)

    def _teacher_folder(self, checkpoint: str) -> str:
        # Of a folder right below a checkpoint transformers would take an adapter for one more of the student's.
        inner = () if isinstance(self.teacher_model, PreTrainedModel) else ("adapter",)
        return os.path.join(checkpoint, TEACHER_FOLDER, *inner)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            self._resumed_from = checkpoint
            check_resume(checkpoint, BATCH_NAME, self._batch_of_all(), is_sharded=self.is_fsdp_enabled)
            self._load_distiller(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _batch_of_all(self) -> dict[str, int]:
        """How many processes there are, and how many samples they take together in a step."""
        samples = self.get_total_train_batch_size(self.args)
        return {"processes": self.accelerator.num_processes, "samples_per_step": samples}

    def _load_distiller(self, checkpoint: str) -> None:
        path = Path(checkpoint, DISTILLER_NAME)
        if self.distiller.state_dict():
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing, and {type(self.distiller).__name__} has state to restore: the checkpoint is "
                    "incomplete, from another method, or was saved with save_only_model=True"
                )
            try:
                load_whole_state(self.distiller, safetensors.torch.load_file(path))
            except torch.OutOfMemoryError:
                raise
            except (safetensors.SafetensorError, RuntimeError) as error:  # the latter: other names or shapes
                raise ValueError(
                    f"{path} is damaged, or of another method or data set than this {type(self.distiller).__name__}: "
                    f"resume from another checkpoint. {str(error)[:500]}"
                ) from error
        if self._saves_teacher:
            if isinstance(self.teacher_model, PreTrainedModel):
                load_weights(self.teacher_model, self._teacher_folder(checkpoint))
            else:
                check_weight_files(self._teacher_folder(checkpoint))
                super()._load_from_checkpoint(self._teacher_folder(checkpoint), self.teacher_model)
        try:
            self.distiller.on_load(self.context)
        except ValueError as error:
            raise ValueError(f"{path} cannot be used, {error}: resume from another checkpoint") from error

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if isinstance(self._module.student, PreTrainedModel):
            load_weights(self._module.student, resume_from_checkpoint)
        else:
            check_weight_files(resume_from_checkpoint)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if isinstance(self.model, PreTrainedModel):
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            check_weight_files(self.state.best_model_checkpoint)
            super()._load_best_model()
        if not self.args.save_only_model:
            self._load_distiller(self.state.best_model_checkpoint)

    # The Hub

    def init_hf_repo(self, *args, **kwargs):  # private is an argument from 5.23 on
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with explained(f"cannot push to {name}"):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """As in ``transformers.Trainer``, but of the output folder it sends the student alone.

        That is its configuration and weights, its tokenizer or processor, modelling code of its own, the model card
        and the pictures in it.

        Raises:
            OSError: If the Hub refuses it or cannot be reached, with the remedy. The output folder has it all by then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token, **({} if private is None else {"private": private}))
        if not self.is_world_process_zero():
            return None
        if own := getattr(self.model, "model_tags", None):
            given = kwargs.get("tags") or []
            kwargs["tags"] = [*dict.fromkeys([*([given] if isinstance(given, str) else given), *own])]
        name = (self.args.hub_model_id or os.path.abspath(self.args.output_dir)).rpartition("/")[2]
        self.create_model_card(**{"model_name": name, **kwargs})
        self._finish_current_push()
        with explained(f"the student is not pushed to {self.hub_model_id}, and lies whole in {self.args.output_dir}"):
            return push_student(
                self,
                commit_message,
                blocking=blocking,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
            )

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self._report_pushes()
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._leave_paths_out(checkpoint_folder)
        under_way = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress([*under_way, push_checkpoint(self, checkpoint_folder)])

    def _finish_current_push(self):
        super()._finish_current_push()
        self._report_pushes()

    def _report_pushes(self) -> None:
        """Warn of pushes that failed while training went on, which transformers keeps to itself."""
        if getattr(self, "push_in_progress", None) is None:
            return
        done = [job for job in self.push_in_progress.jobs if job.done()]
        self.push_in_progress.jobs = [job for job in self.push_in_progress.jobs if job not in done]
        for error in filter(None, (job.exception() for job in done)):
            warnings.warn(
                f"a push to {self.hub_model_id} failed ({remedy_for(error) or error}); training goes on, the "
                f"checkpoint is in {self.args.output_dir}, and the next push sends the student again",
                UserWarning,
                stacklevel=2,
            )


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Load saved weights into a model that exists, by way of ``from_pretrained``.

    The stock reload reads the file as it is and is not strict; for models whose tensors ``save_pretrained`` writes
    under older names (ViT, DeiT, Swin, …; transformers #43701, #48805) it loses them in silence.

    Raises:
        ValueError: If a tensor is missing in the folder or has another shape, or the folder has no safetensors.
    """
    check_weight_files(folder)
    loaded, info = type(model).from_pretrained(
        folder, output_loading_info=True, dtype=model.dtype, use_safetensors=True
    )
    if lost := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"{folder} lacks {len(lost)} tensors of {type(model).__name__}, such as {lost[:3]}")
    load_whole_state(model, loaded.state_dict())
