"""Small-loss selection (Han et al. 2018): of each batch the samples whose labels fit worst are left out."""

from __future__ import annotations

import torch
from torch import Tensor

from hfkd.distillers.base import IGNORE_INDEX, Distiller, Ramp, Wrapper
from hfkd.distillers.kd import KD


def small_loss_weights(losses: Tensor, labels: Tensor, dropped: float | Tensor) -> Tensor:
    r"""Weights that leave out the labelled samples of the largest losses and keep the batch's average a mean.

    .. math:: w_i = \frac{n}{k} \, [\ell_i \text{ is among the } k \text{ smallest}], \qquad
        k = n - \lfloor r \, n \rfloor

    n counts the labelled samples; one without a label keeps the weight 1.

    Args:
        losses: On the labels, one a sample.
        labels: Class indices, -100 for none.
        dropped: r, the share to leave out, in [0, 1).

    Shapes:
        ``losses`` and ``labels``: (B,). Returns (B,), without gradient.

    Source: Han et al. 2018, "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels", arXiv
    1804.06872, algorithm 1, of one network alone.

    >>> import torch
    >>> small_loss_weights(torch.tensor([0.1, 5.0, 0.3, 0.2]), torch.tensor([0, 1, 2, 3]), 0.25)
    tensor([1.3333, 0.0000, 1.3333, 1.3333])
    """
    labelled = labels != IGNORE_INDEX
    count = labelled.sum().to(losses.dtype)
    kept = count - (dropped * count).floor()
    rank = losses.detach().masked_fill(~labelled, float("inf")).argsort(stable=True).argsort()
    return torch.where(labelled, (rank < kept) * (count / kept), 1.0)


class SmallLoss(Wrapper):
    """Leaves out of each batch the samples on whose labels the student's loss is largest, over any method.

    The usual opponent of methods against noisy labels: a network learns what is common before what is exceptional, so
    that early in training a wrong label is one of large loss. What is left out are all of a sample's terms.

    Args:
        base: The method to change; ``KD()`` by default. Its terms must be per sample.
        noise_rate: Share of labels that are believed wrong, in [0, 1): so much of each batch is left out in the end.
        warm_up: Share of training over which that rises from 0 in a straight line; the paper takes 10 of 200 epochs.

    Raises:
        ValueError: If an argument is out of range, or the base couples the samples of a batch.

    Source: arXiv 1804.06872, of whose two networks this is one; see :func:`small_loss_weights`.
    """

    needs_hard_labels = True
    batch_coupled = True  # whether a sample stays depends on the others

    def __init__(self, base: Distiller | None = None, *, noise_rate: float = 0.2, warm_up: float = 0.1):
        super().__init__(KD() if base is None else base)
        if self.base.batch_coupled:
            raise ValueError(
                f"SmallLoss leaves samples out, and {type(self.base).__name__} mixes the samples of a batch: wrap a "
                "method with terms per sample, such as KD() or StudentAlone()"
            )
        if not 0 <= noise_rate < 1:
            raise ValueError(f"noise_rate must lie in [0, 1), got {noise_rate}: it is the share of wrong labels")
        self.noise_rate = noise_rate
        self.ramp = Ramp(warm_up)

    def forward(self, student, teacher, batch):
        return self._select(super().forward(student, teacher, batch), student, batch)

    def teacher_terms(self, teacher, student, batch):
        return self._select(super().teacher_terms(teacher, student, batch), student, batch)

    def _select(self, terms, student, batch):
        dropped = self.noise_rate * self.ramp.factor
        weights = small_loss_weights(self.task_loss(student, batch), batch["labels"], dropped)
        return {name: weights * term for name, term in terms.items()}

    def on_epoch_begin(self, context):
        super().on_epoch_begin(context)
        self.ramp.update(context.progress)

    def on_step_end(self, context):
        super().on_step_end(context)
        self.ramp.update(context.progress)
