"""Images that are nearly the same: found by their thumbnails, without comparing all pairs."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from detr.images import read_gray

_SIDE = 16  # of thumbnails
# The least correlation of thumbnails of images that are nearly the same. Other photographs stay below 0.72 (blood cells
# under a microscope, COCO); copies that are recompressed, scaled, of other contrast or moved by 1% are above 0.974.
_ALIKE = 0.97
# A random plane has both of two thumbnails that are just alike on one side with probability 0.922. In an order by the
# sides of 48 planes, among a million images, they are neighbors in every fourth order or so; so one of 40 shows them.
_ORDERS, _PLANES, _NEIGHBORS = 40, 48, 16
_READERS = 4  # files that are read at a time


def thumbnails(paths: Iterable[Path]) -> Float32[np.ndarray, "images pixels"]:
    """Shades of gray of mean 0 and length 1 of each image; all 0 where there is one shade only.

    Raises UserError where an image cannot be read.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(_thumbnail, paths)
        return np.array(list(found), dtype=np.float32).reshape(-1, _SIDE * _SIDE)


def similar_images(thumbnails: Float32[np.ndarray, "images pixels"]) -> Int64[np.ndarray, " images"]:
    """The group of each image, numbered from 0: images are in one where a chain of similar ones joins them.

    Similar are those whose thumbnails correlate. A difference hash would be no cheaper, and does not tell images with a
    plain background apart, where its bits are noise. Which images are compared is decided by signs of random
    projections (Charikar, STOC 2002): neighbors in the order of these, for several orders, so that the time grows with
    the number of images, not with its square. A pair that is just similar enough may be missed where thousands of
    images are nearly similar; copies are not.
    """
    count = len(thumbnails)
    rng = np.random.default_rng(0)
    pairs = [np.empty((0, 2), np.int64)]
    # Images of one kind have much in common, which would leave all of them on one side of most planes.
    center = thumbnails.mean(0) if count else 0
    for _ in range(_ORDERS if count > _NEIGHBORS + 1 else 1):  # so few are all neighbors of one another
        sides = (thumbnails - center) @ rng.standard_normal((_SIDE * _SIDE, _PLANES), dtype=np.float32) > 0
        order = (sides @ 2 ** np.arange(_PLANES)).argsort(kind="stable")
        sorted_ = thumbnails[order]
        for distance in range(1, min(_NEIGHBORS, count - 1) + 1):
            near = np.flatnonzero(np.einsum("np,np->n", sorted_[distance:], sorted_[:-distance]) >= _ALIKE)
            pairs.append(np.column_stack((order[near], order[near + distance])))
    rows, columns = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _thumbnail(path: Path) -> np.ndarray:
    small = read_gray(path, _SIDE * 8).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    shades = np.asarray(small, dtype=np.float64).ravel()
    shades -= shades.mean()
    return shades / (np.linalg.norm(shades) or 1)
