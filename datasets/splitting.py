"""Holding out images for validation from a data set that has no parts."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from datasets.files import with_files
from datasets.formats.base import Annotations, ImageRecord
from datasets.similarity import similar_images, thumbnails
from detr.errors import UserError

logger = logging.getLogger(__name__)


def hold_out(annotations: Annotations, fraction: float, seed: int = 0) -> tuple[Annotations, Annotations]:
    """The images to train on, and those to validate on, in their order.

    The second part has about this fraction of the images, and of those with each class: iterative stratification
    (Sechidis et al., ECML 2011), which begins with the rarest class. Images that are nearly the same, such as scaled
    and recompressed copies or neighboring frames, stay on one side, unless most images are. The parts depend on the
    images, their annotations and the seed alone.

    Raises UserError where an image cannot be read, and where a part would be empty.
    """
    records = with_files(annotations.records, annotations.images, annotations.source)
    groups = _unless_most(
        similar_images(thumbnails(annotations.images / record.file_name for record in records)), annotations.source
    )
    held_out = _stratified(_counts(records, len(annotations.categories), groups), fraction, seed)[groups]
    if held_out.all() or not held_out.any():
        raise UserError(
            f"{annotations.source}: data.split={fraction:g} leaves {'none' if held_out.all() else 'all'} of the "
            f"{len(records)} images, in {groups.max(initial=-1) + 1} groups of similar ones, for training. Use more "
            "images, or another fraction."
        )
    alike = len(records) - len(np.unique(groups))
    logger.info(
        "%s: %d images are for training and %d for validation%s.",
        annotations.source,
        (~held_out).sum(),
        held_out.sum(),
        f"; {alike} that are nearly the same as another one are on its side" if alike else "",
    )
    parts = [
        [record for record, out in zip(records, held_out.tolist(), strict=True) if out == side]
        for side in (False, True)
    ]
    training, validation = (replace(annotations, records=part) for part in parts)
    return training, validation


def _unless_most(groups: Int64[np.ndarray, " images"], source: Path) -> Int64[np.ndarray, " images"]:
    """The groups, but that of most images taken apart: with one background for all, no two sides can be told."""
    largest = np.bincount(groups, minlength=1).argmax()
    inside = groups == largest
    if 2 * inside.sum() <= len(groups) or inside.sum() < 2:
        return groups
    text = "%s: %d of %d images are nearly the same, as those of a standing camera. They are split one by one."
    logger.warning(text, source, inside.sum(), len(groups))
    apart = np.where(inside, groups.max() + 1 + np.arange(len(groups)), groups)
    return np.unique(apart, return_inverse=True)[1].reshape(-1)


def _counts(records: Sequence[ImageRecord], classes: int, groups: np.ndarray) -> Int64[np.ndarray, "groups columns"]:
    """How many images of each group hold each class; the last column counts all of them."""
    counts = np.zeros((groups.max(initial=-1) + 1, classes + 1), dtype=np.int64)
    for record, group in zip(records, groups.tolist(), strict=True):
        counts[group, np.unique(record.labels[~record.crowds])] += 1
        counts[group, -1] += 1
    return counts


def _stratified(counts: Int64[np.ndarray, "groups columns"], fraction: float, seed: int) -> Bool[np.ndarray, " groups"]:
    """Which groups are held out."""
    shares = np.array([1 - fraction, fraction])
    wanted = shares[:, None] * counts.sum(0)  # of each part, what it still lacks
    left = np.random.default_rng(seed).permutation(len(counts))
    left = left[np.argsort(-counts[left, -1], kind="stable")]  # large groups first, while there is room for them
    sides = np.zeros(len(counts), dtype=bool)
    while len(left):
        remaining = counts[left].sum(0)
        present = np.flatnonzero(remaining[:-1])
        column = present[remaining[present].argmin()] if len(present) else -1
        group = left[counts[left, column].argmax()]
        # The part that lacks more of the class, then more of the images; so the only one of a class is trained on.
        side = int(tuple(wanted[1, [column, -1]]) > tuple(wanted[0, [column, -1]]))
        sides[group] = bool(side)
        wanted[side] -= counts[group]
        left = left[left != group]
    return sides
