"""Checks of image files: whether they can be used, and which are the same."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.detection import SKIP_ADVICE, DetectionDataset
from datasets.findings import Finding, Severity, some
from datasets.formats.base import ImageRecord
from datasets.similarity import similar_images, thumbnails
from detr import distributed
from detr.errors import UserError
from detr.images import check_image, read_image

logger = logging.getLogger(__name__)
_READERS = 4  # files that are read at a time
_SAMPLES = 3  # images of which all pixels are read in any case, for the warnings about their values
_MANY = 5000  # images that are worth a line in the log
_EVERY = 4  # one of so many rows and columns shows which gray levels there are
_FEW_LEVELS = 64  # gray levels of 256 between the least and the greatest value
_USUAL = 0.1  # of the images: more are no exceptions
_TAIL = 4096  # bytes at the end of a file, which tell most files of one size apart


@dataclass(frozen=True)
class ImageFile:
    """What one image file shows.

    name: relative to its folder. problem: why it cannot be used, if it cannot.
    turned: its EXIF data turn the image, and the size does not tell whether the annotations are for that.
    levels: from the least to the greatest of 256 gray levels; None where the pixels were not read.
    """

    name: str
    problem: str | None = None
    turned: bool = False
    levels: int | None = None


def image_files(dataset: DetectionDataset, *, pixels: bool = False) -> list[ImageFile]:
    """Every file, as far as its header shows it, or all its pixels.

    Processes of one run have each their part of the files, and all get the same answer.
    """
    own = dataset.records[distributed.rank() :: distributed.world_size()]
    if pixels or len(own) > _MANY:
        what = "pixels" if pixels else "headers"
        logger.info("Reading the %s of %d image files in %s.", what, len(dataset), dataset.folder)

    def look(number: int, record: ImageRecord) -> ImageFile:
        path = dataset.folder / record.file_name
        try:
            turned = check_image(path, record.size)
            values = read_image(path, record.size) if pixels or number < _SAMPLES else None
        except UserError as error:
            return ImageFile(record.file_name, problem=str(error))
        levels = None
        if values is not None:
            some_values = values[:, ::_EVERY, ::_EVERY]
            levels = int(some_values.max()) - int(some_values.min()) + 1
        return ImageFile(record.file_name, turned=turned, levels=levels)

    with ThreadPoolExecutor(_READERS) as readers:
        found = list(readers.map(look, range(len(own)), own))
    parts: Sequence[list[ImageFile]] = distributed.from_first(distributed.gather_objects(found))
    return [file for part in parts for file in part]


def unusable_images(dataset: DetectionDataset, files: Sequence[ImageFile], *, replaceable: bool) -> Iterator[Finding]:
    """replaceable: other images take the place of those that cannot be used, where the data set is to skip them."""
    unusable = [file for file in files if file.problem is not None]
    if not unusable:
        return
    skips = replaceable and dataset.unreadable == "skip"
    advice = "Training skips them." if skips else SKIP_ADVICE.strip() * replaceable
    text = f"{len(unusable)} of {len(files)} images in {dataset.folder} cannot be used. The first: "
    yield Finding(
        kind="unusable images",
        severity="warning" if skips else "error",
        count=len(unusable),
        text=f"{text}{unusable[0].problem}",
        advice=advice,
        files=some(file.name for file in unusable),
    )


def odd_images(files: Sequence[ImageFile]) -> Iterator[Finding]:
    """Images that can be used, but may not be what they seem."""
    turned = [file.name for file in files if file.turned]
    if turned:
        yield Finding(
            kind="turned images",
            severity="note",
            count=len(turned),
            text=f"{len(turned)} of {len(files)} images are turned by their EXIF data, such as {turned[0]}, and their "
            "size does not tell whether their boxes are for the turned image.",
            advice="They are turned, as viewers and annotation tools show them. See whether their boxes fit.",
            files=some(turned),
        )
    read = [file for file in files if file.levels is not None]
    flat = [file for file in read if file.levels is not None and file.levels <= _FEW_LEVELS]
    if flat:
        severity: Severity = "warning" if len(flat) > _USUAL * len(read) else "note"
        yield Finding(
            kind="few gray levels",
            severity=severity,
            count=len(flat),
            text=f"{len(flat)} of {len(read)} images use at most {_FEW_LEVELS} of 256 gray levels, such as "
            f"{flat[0].name} with {flat[0].levels}.",
            advice="They are dark, pale or empty for the model. If a camera has 10 or 12 bits in files of 16, store "
            "what is white in the files, or scale their values.",
            files=some(file.name for file in flat),
        )


def repeated_images(parts: Mapping[str, Sequence[Path]], *, pixels: bool) -> dict[str, list[Finding]]:
    """Files of the same bytes, and images that look nearly the same, inside a part and across parts.

    parts: the files of each, those that can be read. pixels: read these for what looks nearly the same; else only files
    are compared.
    """
    paths, groups = _numbered(parts)
    copies = list(_copies(paths))
    same = np.full(len(paths), -1)
    for number, places in enumerate(copies):
        same[places] = number
    found = {
        part: [
            *_inside(
                paths, groups, same, number, "repeated images", "warning", "copies of another file, byte for byte"
            ),
            *_across(paths, groups, same, number, "images of two parts", "copies of files, byte for byte,"),
        ]
        for number, part in enumerate(parts)
    }
    if not pixels:
        return found
    keep = np.delete(np.arange(len(paths)), [place for places in copies for place in places[1:]])
    similar = _nearly_repeated([paths[place] for place in keep.tolist()], groups[keep], list(parts))
    return {part: [*found[part], *similar[part]] for part in parts}


def _nearly_repeated(paths: Sequence[Path], groups: np.ndarray, parts: Sequence[str]) -> dict[str, list[Finding]]:
    """Images that look nearly the same. groups: the number of the part of each."""
    same = similar_images(thumbnails(paths))
    alone = np.bincount(same, minlength=1)[same] == 1
    same[alone] = -1
    return {
        part: [
            *_inside(paths, groups, same, number, "similar images", "note", "nearly the same as another one"),
            *_across(paths, groups, same, number, "similar images of two parts", "nearly the same as images"),
        ]
        for number, part in enumerate(parts)
    }


def _numbered(parts: Mapping[str, Sequence[Path]]) -> tuple[list[Path], np.ndarray]:
    """All files, each with the number of its part; a file of two parts, which is found by its name, only once."""
    number_of = {path: number for number, files in reversed(list(enumerate(parts.values()))) for path in files}
    return list(number_of), np.array(list(number_of.values()), dtype=np.int64)


def _copies(paths: Sequence[Path]) -> Iterator[list[int]]:
    """Groups of files of the same bytes. Only those are read whole that agree in size and at their end."""
    numbers: Iterable[list[int]] = [list(range(len(paths)))]
    with ThreadPoolExecutor(_READERS) as readers:
        for key in (lambda path: path.stat().st_size, _end, _digest):
            alike: dict[object, list[int]] = defaultdict(list)
            for number, group in enumerate(numbers):
                for place, value in zip(group, readers.map(key, [paths[place] for place in group]), strict=True):
                    alike[number, value].append(place)
            numbers = [group for group in alike.values() if len(group) > 1]
    yield from numbers


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL, 0))
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def _digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def _inside(
    paths: Sequence[Path], parts: np.ndarray, same: np.ndarray, part: int, kind: str, severity: Severity, what: str
) -> Iterator[Finding]:
    """Images of a part that are like an earlier one of it. same: the group of each image; -1: none."""
    first: dict[int, int] = {}
    pairs = []
    for place in np.flatnonzero((parts == part) & (same >= 0)).tolist():
        earlier = first.setdefault(int(same[place]), place)
        if earlier != place:
            pairs.append((earlier, place))
    if pairs:
        one, other = (paths[place] for place in pairs[0])
        yield Finding(
            kind=kind,
            severity=severity,
            count=len(pairs),
            text=f"{len(pairs)} of {int((parts == part).sum())} images are {what}, such as {other.name} and "
            f"{one.name}.",
            advice="They count several times. Keep one of each, unless they are meant, such as frames of a video.",
            files=some(paths[place].name for pair in pairs for place in pair),
        )


def _across(
    paths: Sequence[Path], parts: np.ndarray, same: np.ndarray, part: int, kind: str, what: str
) -> Iterator[Finding]:
    """Images of a later part that are like one of the first."""
    trained = {int(group): place for place, group in enumerate(same) if parts[place] == 0 and group >= 0}
    later = np.flatnonzero((parts == part) & (parts > 0)).tolist()
    pairs = [(trained[int(same[place])], place) for place in later if int(same[place]) in trained]
    if pairs:
        one, other = (paths[place] for place in pairs[0])
        yield Finding(
            kind=kind,
            severity="warning",
            count=len(pairs),
            text=f"{len(pairs)} of {int((parts == part).sum())} images are {what} that are trained on, such as "
            f"{other.name} and {one.name}.",
            advice="Results on these say little about other images; take them out of one of the two parts. data.split "
            "keeps such images together.",
            files=some(paths[place].name for pair in pairs for place in pair),
        )
