"""Holding out images for validation from a data set that has no parts."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from datasets.files import with_files
from datasets.formats.base import Annotations, ImageRecord
from detr.errors import UserError
from detr.images import read_gray

logger = logging.getLogger(__name__)
_SIDE = 16  # of thumbnails
# The least correlation of thumbnails of images that are nearly the same. Other photographs stay below 0.72 (blood cells
# under a microscope, COCO); copies that are recompressed, scaled, of other contrast or moved by 1% are above 0.974.
_ALIKE = 0.97
_BLOCK = 1024  # images that are compared with all others at a time
_READERS = 4  # files that are read at a time


def hold_out(annotations: Annotations, fraction: float, seed: int = 0) -> tuple[Annotations, Annotations]:
    """The images to train on, and those to validate on, in their order.

    The second part has about this fraction of the images, and of those with each class: iterative stratification
    (Sechidis et al., ECML 2011), which begins with the rarest class. Images that are nearly the same, such as scaled
    and recompressed copies or neighboring frames, stay on one side, unless most images are. The parts depend on the
    images, their annotations and the seed alone.

    Raises UserError where an image cannot be read, and where a part would be empty.
    """
    records = with_files(annotations.records, annotations.images, annotations.source)
    groups = _unless_most(similar_images(records, annotations.images), annotations.source)
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


def similar_images(records: Sequence[ImageRecord], folder: Path) -> Int64[np.ndarray, " images"]:
    """The group of each image, numbered from 0: images are in one where a chain of similar ones joins them.

    Similar are those whose thumbnails correlate. A difference hash would be no cheaper, and does not tell images with a
    plain background apart, where its bits are noise.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(_thumbnail, [folder / record.file_name for record in records])
        thumbnails = np.array(list(found), dtype=np.float32).reshape(len(records), _SIDE * _SIDE)
    pairs = [np.empty((0, 2), np.int64)]
    for start in range(0, len(records), _BLOCK):
        alike = thumbnails[start : start + _BLOCK] @ thumbnails.T >= _ALIKE
        pairs.append(np.argwhere(alike) + np.array([start, 0]))
    rows, columns = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(records), len(records)))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _thumbnail(path: Path) -> np.ndarray:
    """Shades of gray of mean 0 and length 1; all 0 where there is one shade only."""
    small = read_gray(path, _SIDE * 8).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    shades = np.asarray(small, dtype=np.float64).ravel()
    shades -= shades.mean()
    return shades / (np.linalg.norm(shades) or 1)


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
