"""Distillation from a stronger teacher by correlations (DIST, Huang et al. 2022)."""

from __future__ import annotations

from torch import Tensor

from hfkd.distillers.base import Distiller, check_not_negative, check_temperature


def _mean_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson correlation row by row, then the mean over rows; a row without spread counts 0."""
    one, other = (rows - rows.mean(-1, keepdim=True) for rows in (one, other))
    return ((one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1) + 1e-8)).mean()


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""One minus the correlation of predictions, over the classes of a sample and over the samples of a class.

    .. math:: T^2 \left[\beta \Big(1 - \frac1B \sum_i \rho(P^S_{i,:}, P^T_{i,:})\Big)
        + \gamma \Big(1 - \frac1C \sum_c \rho(P^S_{:,c}, P^T_{:,c})\Big)\right]

    with P the softmax at temperature T, (B, C), and ρ Pearson's correlation. Matching is up to a shift and a scale of
    the probabilities, which leaves a weak student room under a strong teacher.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        beta: Weight of the correlation within a sample; the paper uses 1 on CIFAR-100.
        gamma: Weight of the correlation within a class, over the batch; likewise 1.
        temperature: Softening of both distributions; the paper uses 1 on ImageNet and 4 on CIFAR-100.
        reduction: ``"mean"`` only: the second part compares the samples of a batch with each other.

    Shapes:
        ``student_logits`` and ``teacher_logits``: (B, C). Returns a scalar, without a unit. At B = 1 the second part
        is the constant γT².

    Raises:
        ValueError: If the temperature is not positive, or the reduction is not ``"mean"``.

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", NeurIPS, arXiv 2205.10536;
    github.com/hunto/DIST_KD.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    >>> round(dist_loss(z, z).item(), 4)
    0.0
    """
    check_temperature(temperature)
    if reduction != "mean":
        raise ValueError(
            f'reduction must be "mean", got {reduction!r}: DIST correlates the samples of a batch with each other, so '
            "there is no loss per sample"
        )
    student, teacher = (student_logits / temperature).softmax(-1), (teacher_logits / temperature).softmax(-1)
    within_sample, within_class = _mean_correlation(student, teacher), _mean_correlation(student.T, teacher.T)
    return temperature**2 * (beta * (1 - within_sample) + gamma * (1 - within_class))


class DIST(Distiller):
    """Distillation by correlations: ``task + dist``. Its term mixes the samples of a batch.

    Args:
        beta: Weight of the correlation within a sample, not negative; see :func:`dist_loss`.
        gamma: Weight of the correlation within a class, not negative.
        temperature: Softening of both distributions; 4 is usual on CIFAR-100.

    Raises:
        ValueError: If an argument is out of range.

    Source: arXiv 2205.10536; see :func:`dist_loss`.
    """

    batch_coupled = True

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0):
        super().__init__()
        check_not_negative(beta=beta, gamma=gamma)
        check_temperature(temperature)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, student, teacher, batch):
        options = {"beta": self.beta, "gamma": self.gamma, "temperature": self.temperature}
        return {
            "task": self.task_loss(student, batch),
            "dist": dist_loss(student.logits, teacher.logits, **options),
        }
