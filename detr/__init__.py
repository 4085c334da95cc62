"""A training framework for DETR, the detection transformer (Carion et al., ECCV 2020)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from detr.errors import NonFiniteError, UserError
from detr.version import __version__

if TYPE_CHECKING:
    from detr.detector import Detector
    from detr.types import Detection, Detections, ImageBatch, Predictions, Target
else:

    def __getattr__(name: str) -> Any:
        """A public name whose module imports torch. That takes seconds, so what needs none of them goes without."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("detr.detector" if name == "Detector" else "detr.types"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Detection",
    "Detections",
    "Detector",
    "ImageBatch",
    "NonFiniteError",
    "Predictions",
    "Target",
    "UserError",
    "__version__",
]
