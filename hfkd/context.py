"""What a distiller's setup and hooks may use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from hfkd.checks import dataset_index, longest_first
from hfkd.teacher import ColumnTeacher, DeferredTeacher, TeacherEnsemble


if TYPE_CHECKING:
    from hfkd.cache import TeacherCache
    from hfkd.teacher import Teacher, Teachers
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
    def teacher(self) -> Teacher | Teachers | ColumnTeacher | TeacherCache | None:
        """Where teacher outputs come from: call it with a batch. None without a frozen teacher."""
        return self._trainer.teacher if self._trainer.cache is None else self._trainer.cache

    @property
    def teacher_model(self) -> nn.Module | None:
        """The teacher's weights, frozen or trained, where a model is the source.

        Raises:
            ValueError: If several models are, which have no layers in common, or a column of the data.
        """
        if isinstance(self._trainer.teacher, ColumnTeacher):
            raise ValueError(
                f"{type(self._trainer.distiller).__name__} looks inside its teacher, and a column holds only what it "
                "said: pass teacher_model=, or choose a method of logits such as KD()"
            )
        if isinstance(self._trainer.teacher_model, TeacherEnsemble):
            raise ValueError(
                f"{type(self._trainer.distiller).__name__} looks inside its teacher, and an ensemble has only logits: "
                "pass one teacher_model, or choose a method of logits such as KD()"
            )
        if isinstance(self._trainer.teacher, DeferredTeacher):
            self._trainer.teacher.materialize()
        return self._trainer.teacher_model

    @property
    def train_dataset(self) -> Dataset | None:
        """The training set, augmented as in training."""
        return self._trainer.train_dataset

    @property
    def held_out_dataset(self) -> Dataset | None:
        """The split that the user held out for the method."""
        return self._trainer.held_out_dataset

    def labels(self, dataset: Dataset | None) -> np.ndarray | None:
        """The labels of a data set's rows without running its transforms, or None where they cannot be had so."""
        return self._trainer._labels_of(dataset)

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

    @property
    def train_batch_size(self) -> int:
        """Samples of a micro-batch on this process."""
        return self._trainer.args.train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Samples of a batch of evaluation on this process."""
        return self._trainer.args.eval_batch_size

    @property
    def output_dir(self) -> str:
        """The folder of the run; in a search of hyper-parameters of the trial."""
        return self._trainer._get_output_dir(self._trainer._trial)

    @property
    def epochs(self) -> int:
        """Epochs of the whole run, the last one perhaps in part."""
        return math.ceil(self._trainer.state.num_train_epochs)

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self._trainer.accelerator.num_processes

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP spreads the weights over the processes: the student runs, and a part of it has no values."""
        return self._trainer.is_fsdp_enabled

    def autocast(self) -> AbstractContextManager:
        """The precision of a training step, for a hook that runs models."""
        return self._trainer.compute_loss_context_manager()

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate a tensor from all processes along its first dimension, which may differ between them."""
        accelerator = self._trainer.accelerator
        if self.processes == 1:
            return tensor
        sizes = accelerator.gather(torch.tensor([len(tensor)], device=self.device)).tolist()
        padding = tensor.new_zeros(max(sizes) - len(tensor), *tensor.shape[1:])
        parts = accelerator.gather(torch.cat([tensor, padding])).chunk(len(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def batches(
        self, dataset: Dataset, batch_size: int | None = None, *, by_length: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """This process's share of a dataset, un-augmented, collated as in training and on the device.

        A batch has as many samples as one of evaluation, or ``batch_size``. They come in the order of the rows, or
        ``by_length``, where it is a set of texts: those of most tokens first, which takes less padding and time.

        Un-augmented is what a dataset's ``without_augmentation()`` returns; of one without it, such as a
        ``datasets.Dataset`` with a random transform, the rows come as in training.

        Process r of W sees rows r, r + W, …: each row comes once. Shares may differ by a row, so that nothing inside
        the loop may wait for other processes: ``gather`` behind it.
        """
        plain = self._plain(dataset)
        accelerator = self._trainer.accelerator
        share = Subset(plain, range(accelerator.process_index, len(plain), self.processes))
        if by_length and (order := longest_first(share)) is not None:
            share = Subset(share, order.tolist())
        for batch in self.loader(share, batch_size or self.eval_batch_size):
            yield self._prepared(batch, dataset)

    def take(self, dataset: Dataset, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some rows of a dataset as one batch, un-augmented, collated as in training and on the device."""
        return self._prepared(next(iter(self.loader(Subset(self._plain(dataset), rows), len(rows)))), dataset)

    def sample(self, size: int = 2) -> dict[str, Tensor]:
        """The first training samples: un-augmented and collated as in training: enough to learn shapes in ``setup``.

        Raises:
            ValueError: If there is no training set.
        """
        if self.train_dataset is None:
            raise ValueError("the distiller measures features on training samples: pass train_dataset=")
        plain = self._plain(self.train_dataset)
        if not isinstance(plain, IterableDataset):
            plain = Subset(plain, range(min(size, len(plain))))
        return self._trainer._prepare_inputs(next(iter(self.loader(plain, size))))

    def sample_index(self) -> Tensor:
        """The column ``index`` of the training set, in its order; 0, 1, … where the set shows none.

        Raises:
            ValueError: If it shows none and has others.
        """
        index = torch.from_numpy(dataset_index(self.train_dataset))
        ends = [0, len(index) - 1]  # of several sets in a row the last one may count from 0 again
        if not torch.equal(self.take(self.train_dataset, ends)["index"].cpu(), index[ends]):
            raise ValueError(
                "the column index of the training set is not 0, 1, …, and the set does not show it: give it an "
                "`index` attribute, an array with one number a row"
            )
        return index

    def align_buffers(self, model: nn.Module) -> None:
        """Give a model's buffers the values of the first process, as DDP will do at the next forward.

        BatchNorm's statistics differ between processes until then.
        """
        if self.processes > 1:
            for buffer in model.buffers():
                broadcast(buffer)

    def _prepared(self, batch: Mapping[str, Tensor], dataset: Dataset) -> dict[str, Tensor]:
        batch = self._trainer._with_labels(self._trainer._prepare_inputs(batch))
        if dataset is self.train_dataset:
            return self._trainer._with_view(batch)
        return {name: column for name, column in batch.items() if name != "view"}  # whose numbers are another set's

    def _plain(self, dataset: Dataset) -> Dataset:
        if isinstance(dataset, Subset):
            return Subset(self._plain(dataset.dataset), dataset.indices)
        if isinstance(dataset, ConcatDataset):
            return ConcatDataset(self._plain(part) for part in dataset.datasets)
        return getattr(dataset, "without_augmentation", lambda: dataset)()

    def loader(self, dataset: Dataset, batch_size: int) -> DataLoader:
        """All rows of a dataset, in order, collated as in training, on no device yet."""
        # Not one of Accelerate's: those repeat rows, and keep hold of a loader that is left half-way.
        collate = self._trainer._get_collator_with_removed_columns(self._trainer.data_collator)
        # With a generator of its own, or it would draw a seed from the one that training uses.
        return DataLoader(dataset, batch_size=batch_size, collate_fn=collate, generator=torch.Generator())
