"""The distillation methods. A name on a command line is looked up among the public names of this module."""

import inspect

from hfkd.distillers.base import Distiller, ModelOutputs, StudentAlone, Wrapper
from hfkd.distillers.combined import Combined
from hfkd.distillers.kd import KD
from hfkd.distillers.ttm import TTM, WTTM


__all__ = ["KD", "TTM", "WTTM", "Combined", "Distiller", "ModelOutputs", "StudentAlone", "Wrapper"]


def make_distiller(name: str, **kwargs) -> Distiller:
    """A method by the name of its class, in any case: ``make_distiller("wttm", gamma=0.3)``.

    Raises:
        ValueError: If there is no such method (names those there are), or it takes no such argument.
    """
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
