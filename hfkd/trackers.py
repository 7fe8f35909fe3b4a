"""Pictures for TensorBoard and trackio, where `report_to` names them; scalars reach them by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from transformers.integrations import TensorBoardCallback, TrackioCallback


if TYPE_CHECKING:
    from hfkd.trainer import DistillationTrainer


def tracks(trainer: DistillationTrainer) -> bool:
    """Whether there is such a tracker."""
    callbacks = trainer.callback_handler.callbacks
    return any(isinstance(callback, (TensorBoardCallback, TrackioCallback)) for callback in callbacks)


def show_figures(trainer: DistillationTrainer, figures: Mapping[str, Path]) -> None:
    """Hand pictures to the trackers, at the step that training has reached.

    Args:
        trainer: During or after training, which may have closed the trackers' logs: then they go on as for a scalar.
        figures: Name to PNG file.
    """
    args, state = trainer.args, trainer.state
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is not None:
            if callback.tb_writer is None:
                callback._init_summary_writer(args)
            for name, path in figures.items():
                picture = np.asarray(PIL.Image.open(path).convert("RGB"))
                callback.tb_writer.add_image(f"figures/{name}", picture, state.global_step, dataformats="HWC")
            callback.tb_writer.flush()
        elif isinstance(callback, TrackioCallback) and figures:
            if not callback._initialized:
                callback.setup(args, state, trainer.model)
            images = {f"figures/{name}": callback._trackio.Image(path) for name, path in figures.items()}
            callback._trackio.log({**images, "train/global_step": state.global_step})
