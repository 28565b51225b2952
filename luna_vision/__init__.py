"""luna_vision: a linear-cost vision backbone. Importing the package registers its models with timm."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import AttentionMaps, LunaVit, init_from_vit

__version__ = "0.1.0"
__all__ = ["AttentionMaps", "LunaVit", "init_from_vit"]

# timm has no plug-ins: it knows our models once they are imported, which takes torch and timm, and seconds. The console
# script answers --help and mistakes without them, and each of its commands imports the models before it needs them.
if not os.path.basename((sys.argv or [""])[0]).startswith("luna-vision"):
    from . import models as models


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import models

    return getattr(models, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
