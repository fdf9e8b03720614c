"""The setting ``backbone``: names of torchvision's classifiers, and of timm's with ``timm:`` before them."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from retinaflow.errors import SettingError

TIMM = "timm:"
DEFAULT_BACKBONE = "resnet18"


def _known(value: str) -> str:
    """The value, if its library knows the name. Loads that library, which takes seconds, but for the default."""
    if value == DEFAULT_BACKBONE:
        return value
    if value.startswith(TIMM):
        try:
            timm = import_timm()
        except SettingError as error:
            raise PydanticCustomError("rule", "{error}", {"error": str(error)}) from None
        known = [TIMM + name for name in timm.list_models()]
        # A tag (resnet50.a1_in1k) chooses one of several published weights.
        tagged = "." in value and value.removeprefix(TIMM) in timm.list_pretrained()
        library = "timm"
    else:
        from torchvision import models

        known, tagged, library = models.list_models(module=models), False, "torchvision"
    if value not in known and not tagged:
        rule = f"backbone must be a classifier of {library}" + (" or timm:NAME" if library == "torchvision" else "")
        raise PydanticCustomError("no_such_name", "{rule}", {"rule": rule, "known": known})
    return value


Backbone = Annotated[str, AfterValidator(_known)]
"""``resnet50``, ``timm:tf_efficientnet_lite0``: a name that its library knows."""


def import_timm() -> Any:
    """The library timm. Raises SettingError where it is not installed."""
    # By name: an import statement would make it a requirement of every served model.
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise SettingError(
            f"backbone=timm:NAME needs the library timm (pip install 'retinaflow[timm]'): {error}"
        ) from None
