"""What a distiller's setup and hooks may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


if TYPE_CHECKING:
    from hfkd.teacher import Teacher
    from hfkd.trainer import DistillationTrainer


class DistillationContext:
    """A view of the running trainer for :meth:`Distiller.setup` and the hooks; its values are always current."""

    def __init__(self, trainer: DistillationTrainer):
        self._trainer = trainer

    @property
    def student(self) -> nn.Module:
        """The plain student."""
        return self._trainer.model

    @property
    def teacher(self) -> Teacher | None:
        """Where teacher outputs come from: call it with a batch. None without a frozen teacher."""
        return self._trainer.teacher

    @property
    def teacher_model(self) -> nn.Module | None:
        """The teacher's weights, frozen or trained, where a model is the source."""
        return self._trainer.teacher_model

    @property
    def train_dataset(self) -> Dataset | None:
        """The training set, augmented as in training."""
        return self._trainer.train_dataset

    @property
    def held_out_dataset(self) -> Dataset | None:
        """The split that the user held out for the method."""
        return self._trainer.held_out_dataset

    @property
    def device(self) -> torch.device:
        """Where models and batches are."""
        return self._trainer.args.device

    @property
    def epoch(self) -> int:
        """Epochs completed, from 0."""
        return int(self._trainer.state.epoch or 0)

    @property
    def progress(self) -> float:
        """Share of training done, in [0, 1]."""
        return self._trainer.state.global_step / max(1, self._trainer.state.max_steps)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and shows progress bars."""
        return self._trainer.is_world_process_zero()

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate a tensor of equal shape from all processes along its first dimension."""
        return self._trainer.accelerator.gather(tensor)

    def loader(self, dataset: Dataset) -> DataLoader:
        """Batches of a dataset in order, un-augmented, collated as in training, shared out over the processes."""
        return self._trainer.get_test_dataloader(getattr(dataset, "without_augmentation", lambda: dataset)())

    def sample(self, size: int = 2) -> dict[str, Tensor]:
        """The first training samples, un-augmented and collated as in training: enough to learn shapes in ``setup``.

        Raises:
            ValueError: If there is no training set.
        """
        dataset = self.train_dataset
        if dataset is None:
            raise ValueError("the distiller measures features on training samples: pass train_dataset=")
        plain = getattr(dataset, "without_augmentation", lambda: dataset)()
        collate = self._trainer._get_collator_with_removed_columns(self._trainer.data_collator)
        # Not by `loader`: Accelerate keeps hold of a loader that is left half-way.
        return self._trainer._prepare_inputs(next(iter(DataLoader(plain, batch_size=size, collate_fn=collate))))
