"""The distillation methods. A name on a command line is looked up among the public names of this module."""

from hfkd.distillers.base import Distiller, ModelOutputs, StudentAlone, Wrapper
from hfkd.distillers.combined import Combined
from hfkd.distillers.kd import KD
from hfkd.distillers.ttm import TTM, WTTM


__all__ = ["KD", "TTM", "WTTM", "Combined", "Distiller", "ModelOutputs", "StudentAlone", "Wrapper"]
