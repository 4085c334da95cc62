"""Our checkpoints, and the published weights of DETR and its family."""

from detr.weights.checkpoints import newest, save
from detr.weights.families import from_published, to_published
from detr.weights.fetching import weights_file
from detr.weights.loading import check_state, load_state, load_weights
from detr.weights.reading import Checkpoint, Published, Weights, as_checkpoint, read_checkpoint, read_weights
from detr.weights.report import LoadReport

__all__ = [
    "Checkpoint",
    "LoadReport",
    "Published",
    "Weights",
    "as_checkpoint",
    "check_state",
    "from_published",
    "load_state",
    "load_weights",
    "newest",
    "read_checkpoint",
    "read_weights",
    "save",
    "to_published",
    "weights_file",
]
