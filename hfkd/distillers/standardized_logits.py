"""Logit standardisation (Sun et al. 2024), over any logit method."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from hfkd.distillers.base import Distiller, ModelOutputs, StudentAlone, Wrapper
from hfkd.distillers.combined import Combined
from hfkd.distillers.ic_kd import InContextKD
from hfkd.distillers.kd import KD
from hfkd.distillers.kd_aif import KDAIF


def standardize_logits(logits: Tensor) -> Tensor:
    r"""Z-scores of each sample's logits.

    .. math:: \frac{z - \bar z}{\sigma(z) + 10^{-7}}

    The student then has to learn the relations among the teacher's logits, not their size. σ is the sample standard
    deviation (over C - 1), as in the authors' code; the paper's algorithm divides by C.

    Args:
        logits: Unnormalised scores.

    Shapes:
        (B, C), C at least 2. Returns (B, C) of mean 0 and standard deviation 1.

    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation", CVPR, arXiv 2403.01427, algorithm 1;
    github.com/sunshangquan/logit-standardization-KD.

    >>> import torch
    >>> standardize_logits(torch.tensor([[1.0, 3.0, 5.0]])).tolist()
    [[-1.0, 0.0, 1.0]]
    """
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / (logits.std(-1, keepdim=True) + 1e-7)


def _standardized(outputs: ModelOutputs) -> ModelOutputs:
    return replace(outputs, logits=standardize_logits(outputs.logits))


class StandardizedLogits(Wrapper):
    """Gives another method z-scores in place of logits, on both sides; the labels go on seeing the raw logits.

    Standardised logits are small, so that the wrapped method wants a low temperature and a high weight: the source
    uses temperature 2 and multiplies the weights of KD and DKD by 9.

    Args:
        base: The method to change; the source's ``task + 9 * kd`` at temperature 2 by default.

    Raises:
        ValueError: If the base asks the models itself, and would not see z-scores there (InContextKD, KDAIF).

    Source: arXiv 2403.01427; see :func:`standardize_logits`.
    """

    needs_teacher = True

    def __init__(self, base: Distiller | None = None):
        if base is None:
            parts = {"alone": StudentAlone(), "kd": KD(alpha=1.0, temperature=2.0)}
            base = Combined(parts, {"kd": 9.0}, task_from="alone")
        for part in base.modules():
            if isinstance(part, KDAIF):
                raise ValueError("KDAIF would measure influence on raw logits: use KDAIF(StandardizedLogits(...))")
            if isinstance(part, InContextKD):
                raise ValueError("InContextKD compares z-scores with raw logits of its bank: use it without wrapper")
        super().__init__(base)

    def forward(self, student, teacher, batch):
        return super().forward(_standardized(student), _standardized(teacher), batch)

    def teacher_terms(self, teacher, student, batch):
        return super().teacher_terms(_standardized(teacher), _standardized(student), batch)
