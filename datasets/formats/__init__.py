"""Readers of annotations, one file a format. `base` holds what each of them returns."""

from datasets.formats.base import Annotations, ImageRecord

__all__ = ["Annotations", "ImageRecord"]
