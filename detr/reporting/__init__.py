"""What a run reports: progress, TensorBoard, JSON lines, trackers, drawn boxes and attention."""

from detr.reporting.attention import draw_attention
from detr.reporting.formats import FORMATS, Result
from detr.reporting.output import OutputFolder, RowFile
from detr.reporting.reporter import Reporter
from detr.reporting.sinks import JsonLines, Progress, Sink, TensorBoard
from detr.reporting.summary import describe_model
from detr.reporting.trackers import MLflow, Trackio, WandB

__all__ = [
    "FORMATS",
    "JsonLines",
    "MLflow",
    "OutputFolder",
    "Progress",
    "Reporter",
    "Result",
    "RowFile",
    "Sink",
    "TensorBoard",
    "Trackio",
    "WandB",
    "describe_model",
    "draw_attention",
]
