"""What a run reports: progress, TensorBoard, JSON lines, drawn boxes and attention."""

from detr.reporting.attention import draw_attention
from detr.reporting.draw import draw_detections
from detr.reporting.output import OutputFolder
from detr.reporting.reporter import Reporter
from detr.reporting.sinks import JsonLines, Progress, Sink, TensorBoard
from detr.reporting.summary import describe_model

__all__ = [
    "JsonLines",
    "OutputFolder",
    "Progress",
    "Reporter",
    "Sink",
    "TensorBoard",
    "describe_model",
    "draw_attention",
    "draw_detections",
]
