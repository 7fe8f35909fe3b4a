"""Label smoothing (Szegedy et al. 2016): a teacher that says the same of all classes."""

from __future__ import annotations

from torch import Tensor

from hfkd.distillers.base import Distiller, HardLabelLoss, reduce_batch


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must lie in [0, 1], got {epsilon}: it is the probability spread over all classes")


def label_smoothing_loss(
    student_logits: Tensor, labels: Tensor, *, epsilon: float = 0.1, reduction: str = "mean"
) -> Tensor:
    r"""Cross-entropy with labels that leave some probability to every class.

    .. math:: -\sum_c q'_c \log p^S_c, \qquad q' = (1 - \varepsilon) \, y + \varepsilon / C

    Args:
        student_logits: Unnormalised scores.
        labels: Class indices, a sample with -100 contributes 0; or class probabilities.
        epsilon: Probability spread evenly over all classes, the label's own among them.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        ``student_logits``: (B, C), labels: (B,) or (B, C). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If epsilon is outside [0, 1], or the reduction is unknown.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", CVPR, arXiv 1512.00567,
    section 7.

    >>> import torch
    >>> round(label_smoothing_loss(torch.zeros(1, 4), torch.tensor([2])).item(), 4)  # log(4), whatever the label says
    1.3863
    """
    _check_epsilon(epsilon)
    return reduce_batch(HardLabelLoss(label_smoothing=epsilon)(student_logits, labels), reduction)


class LabelSmoothing(Distiller):
    """No teacher: the labels alone, smoothed.

    As ``StudentAlone()`` with ``label_smoothing_factor=epsilon`` in the training arguments, which reaches the task
    term of every method; here it is a method, to be compared with others or combined with them.

    Args:
        epsilon: Probability spread evenly over all classes; see :func:`label_smoothing_loss`.

    Raises:
        ValueError: If epsilon is outside [0, 1], or the training arguments smooth the labels already.

    Source: arXiv 1512.00567; see :func:`label_smoothing_loss`.
    """

    needs_teacher = False

    def __init__(self, epsilon: float = 0.1):
        super().__init__()
        _check_epsilon(epsilon)
        self.epsilon = epsilon

    def setup(self, context):
        if self.hard_label_loss.label_smoothing:
            raise ValueError(
                "labels would be smoothed twice: leave out label_smoothing_factor, or take StudentAlone() in place of "
                f"LabelSmoothing({self.epsilon})"
            )

    def forward(self, student, teacher, batch):
        loss = label_smoothing_loss(student.task_logits, batch["labels"], epsilon=self.epsilon, reduction="none")
        return {"task": self.hard_label_loss.scale * loss}
