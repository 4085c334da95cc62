"""Detectors as files that other runtimes run, and the proof that these give the same detections."""

from detr.export.description import Description
from detr.export.files import FORMATS, Format
from detr.export.graph import Graph, trace
from detr.export.proof import Limits, Proof, first_difference, first_traced_difference, prove
from detr.export.running import ENDINGS, ExportedModel, PaddedModel, open_exported

__all__ = [
    "ENDINGS",
    "FORMATS",
    "Description",
    "ExportedModel",
    "Format",
    "Graph",
    "Limits",
    "PaddedModel",
    "Proof",
    "first_difference",
    "first_traced_difference",
    "open_exported",
    "prove",
    "trace",
]
