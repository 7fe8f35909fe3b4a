"""Knowledge distillation weighted by influence (KD-AIF)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.distillers.base import check_not_negative


WEIGHTINGS = ("sigmoid", "exp_minmax")


def _log_weights(influence: Tensor, weighting: str, sharpness: float) -> Tensor:
    """Logarithm of the weights as they are defined, before they are scaled; 0 for all where the range is 0."""
    low, high = influence.aminmax()
    if low == high:
        return torch.zeros_like(influence)
    if weighting == "sigmoid":
        return F.logsigmoid(-sharpness * influence / (high - low))
    return 1 - 2 * (influence - low) / (high - low)


def influence_weights(
    influence: Tensor, *, weighting: str = "sigmoid", sharpness: float = 10.0, clip: float = 0.005
) -> Tensor:
    r"""Weights of the training samples from their influence: more for those that help (φ < 0).

    .. math:: w_i \propto \frac{1}{1 + e^{k \varphi_i / (\max \varphi - \min \varphi)}} \;(\text{sigmoid}), \qquad
        w_i = e^{1 - 2 (\varphi_i - \min \varphi) / (\max \varphi - \min \varphi)} \;(\text{exp\_minmax})

    The sigmoid's are scaled to mean 1, so that the learning rate keeps its meaning; the others, in [1/e, e], are not.
    Neither depends on the unit of φ. Where all φ are equal, all weights are 1.

    Args:
        influence: φ of the whole training set: the range is over all of it.
        weighting: ``"sigmoid"`` or ``"exp_minmax"``, that of the authors' example.
        sharpness: k, not negative: 0 weighs all alike; without meaning for ``"exp_minmax"``.
        clip: Share of the samples at either end whose φ is cut to that of the quantile, in [0, 0.5), so that a few
            outliers do not set the range; 0 for none.

    Shapes:
        ``influence``: (N,). Returns (N,).

    Raises:
        ValueError: If an argument is out of range, or an influence is not finite.

    Source: arXiv 2501.02705 and its released example for ``"exp_minmax"``; sigmoid, scaling and clipping are our
    reading.

    >>> import torch
    >>> influence_weights(torch.tensor([-1.0, 1.0]), sharpness=0.0)
    tensor([1., 1.])
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    check_not_negative(sharpness=sharpness)
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip must lie in [0, 0.5), got {clip}: it is a share of the samples at either end")
    if wrong := (~influence.isfinite()).sum().item():
        raise ValueError(
            f"{wrong} of {len(influence)} influences are not finite: the student has diverged (lower its learning "
            "rate), or its losses overflow in half precision"
        )
    exact = influence.double()
    low, high = exact.quantile(exact.new_tensor([clip, 1 - clip]))
    logarithms = _log_weights(exact.clamp(low, high), weighting, sharpness)
    if weighting == "sigmoid":
        # Mean 1 by way of logarithms: where all φ are far from 0, every sigmoid underflows.
        return (len(influence) * logarithms.softmax(0)).to(influence)
    return logarithms.exp().to(influence)
