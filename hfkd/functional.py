"""The loss functions of all methods, pure and without state."""

from hfkd.distillers.kd import kd_loss
from hfkd.distillers.ttm import ttm_loss, wttm_loss


__all__ = [
    "kd_loss",
    "ttm_loss",
    "wttm_loss",
]
