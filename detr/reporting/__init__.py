"""What a run reports: progress, TensorBoard, JSON lines, drawn boxes and attention."""

from detr.reporting.attention import draw_attention
from detr.reporting.output import OutputFolder, RowFile
from detr.reporting.reporter import Reporter
from detr.reporting.sinks import JsonLines, Progress, Sink, TensorBoard

__all__ = [
    "JsonLines",
    "OutputFolder",
    "Progress",
    "Reporter",
    "RowFile",
    "Sink",
    "TensorBoard",
    "draw_attention",
]
