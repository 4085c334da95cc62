"""A training framework for DETR, the detection transformer (Carion et al., ECCV 2020)."""

from detr.detector import Detector
from detr.errors import NonFiniteError, UserError
from detr.types import Detection, Detections, ImageBatch, Predictions, Target
from detr.version import __version__

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
