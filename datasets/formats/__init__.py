"""Readers, one file a format: from files to what they annotate. `base` holds what each of them returns."""

from datasets.formats.base import Annotations, ImageRecord

__all__ = ["Annotations", "ImageRecord"]
