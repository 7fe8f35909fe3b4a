"""The distillation methods. A name on a command line is looked up among the public names of this module."""

import inspect

from hfkd.distillers.aekt import AEKT
from hfkd.distillers.akd import AKD
from hfkd.distillers.at import AT
from hfkd.distillers.attention_maps import AttentionMaps
from hfkd.distillers.base import Distiller, ModelOutputs, StudentAlone, Wrapper
from hfkd.distillers.cam import CAM
from hfkd.distillers.combined import Combined
from hfkd.distillers.crd import CRD
from hfkd.distillers.dist import DIST
from hfkd.distillers.dkd import DKD
from hfkd.distillers.dml import DML
from hfkd.distillers.fitnet import FitNet
from hfkd.distillers.hidden_states import HiddenStates
from hfkd.distillers.ic_kd import InContextKD
from hfkd.distillers.kd import KD
from hfkd.distillers.kd_aif import KDAIF
from hfkd.distillers.label_smoothing import LabelSmoothing
from hfkd.distillers.nkd import NKD
from hfkd.distillers.pkt import PKT
from hfkd.distillers.reviewkd import ReviewKD
from hfkd.distillers.rkd import RKD
from hfkd.distillers.self_distillation import SelfDistillation
from hfkd.distillers.small_loss import SmallLoss
from hfkd.distillers.sp import SP
from hfkd.distillers.standardized_logits import StandardizedLogits
from hfkd.distillers.tf_kd import TfKD
from hfkd.distillers.ttm import TTM, WTTM
from hfkd.distillers.vid import VID


__all__ = [
    "KD",
    "TTM",
    "WTTM",
    "AEKT",
    "AKD",
    "KDAIF",
    "AT",
    "CAM",
    "CRD",
    "DIST",
    "DKD",
    "DML",
    "NKD",
    "PKT",
    "RKD",
    "SP",
    "VID",
    "AttentionMaps",
    "Combined",
    "Distiller",
    "FitNet",
    "HiddenStates",
    "InContextKD",
    "LabelSmoothing",
    "ModelOutputs",
    "ReviewKD",
    "SelfDistillation",
    "SmallLoss",
    "StandardizedLogits",
    "StudentAlone",
    "TfKD",
    "Wrapper",
]


def make_distiller(name: str, **kwargs) -> Distiller:
    """A method by the name of its class, in any case: ``make_distiller("wttm", gamma=0.3)``.

    Names with a plus between them are a :class:`Combined` with the task term of the first, and each one's arguments
    are a table under its name: ``make_distiller("wttm+crd", wttm={"gamma": 0.3})``.

    Raises:
        ValueError: If there is no such method (names those there are), or it takes no such argument.
    """
    parts = name.lower().split("+")
    if len(parts) > 1:
        if wrong := [n for n, table in kwargs.items() if n not in parts or not isinstance(table, dict)]:
            raise ValueError(
                f"{', '.join(wrong)}: the arguments of {name!r} are a table for each of {', '.join(parts)}, such as "
                f'{{"{parts[0]}": {{}}}}'
            )
        if len(set(parts)) < len(parts):
            raise ValueError(f"{name!r} names a method twice: Combined, in Python, gives each a name of its own")
        made = {part: make_distiller(part, **kwargs.get(part, {})) for part in parts}
        return Combined(made, task_from=parts[0])
    methods = {
        method.lower(): globals()[method]
        for method in __all__
        if method not in ("Combined", "Distiller", "ModelOutputs", "Wrapper")
    }
    method = methods.get(name.lower())
    if method is None:
        raise ValueError(
            f"unknown distiller {name!r}: choose one of {', '.join(m.__name__ for m in methods.values())}"
        )
    try:
        return method(**kwargs)
    except TypeError as error:
        raise ValueError(f"{method.__name__}{inspect.signature(method)} cannot be made so: {error}") from error
