"""What a run reports: progress, TensorBoard, JSON lines, drawn boxes and attention."""

from detr.reporting.attention import draw_attention
from detr.reporting.formats import FORMATS, Result
from detr.reporting.output import OutputFolder, RowFile
from detr.reporting.reporter import Reporter
from detr.reporting.sinks import JsonLines, Progress, Sink, TensorBoard
from detr.reporting.summary import describe_model

__all__ = [
    "FORMATS",
    "JsonLines",
    "OutputFolder",
    "Progress",
    "Reporter",
    "Result",
    "RowFile",
    "Sink",
    "TensorBoard",
    "describe_model",
    "draw_attention",
]
