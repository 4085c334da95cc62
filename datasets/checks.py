"""Checks of images and their annotations before a training, which would stop at them, or learn them as they are."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datasets.detection import SKIP_ADVICE, DetectionDataset
from datasets.formats.base import ImageRecord
from detr import distributed
from detr.errors import UserError, brief
from detr.images import check_image, read_image

logger = logging.getLogger(__name__)
_READERS = 4  # files that are read at a time
_SAMPLES = 3  # images of which all pixels are read in any case, for the warnings about their values
_MIXED, _FEW = 2000, 0.01  # samples that are drawn to see how many objects mixing gives; a share of no importance
_MANY = 5000  # images that are worth a line in the log


def before_training(
    train: DetectionDataset,
    val: DetectionDataset,
    *,
    num_queries: int | None = None,
    mixed_images: int = 1,
    images: str = "headers",
) -> None:
    """Warn of what is wrong with the data, and raise UserError where images cannot be used.

    num_queries: the most objects that the model finds in one image, where that is known.
    mixed_images: the most images that a training sample is made of.
    images: what to read of the image files: "headers", "pixels", or "nothing".
    """
    for text in [*training_warnings(train, num_queries, mixed_images), *validation_warnings(train, val)]:
        logger.warning("%s", text)
    if images == "nothing":
        return
    for dataset, replaceable in ((train, True), (val, False)):
        problems = unusable_images(dataset, pixels=images == "pixels")
        if not problems:
            continue
        text = f"{len(problems)} of {len(dataset)} images in {dataset.folder} cannot be used. The first: {problems[0]}"
        if not replaceable or dataset.unreadable == "stop":
            raise UserError(text + SKIP_ADVICE * replaceable)
        logger.warning("%s Training skips them.", text)


def training_warnings(dataset: DetectionDataset, num_queries: int | None, mixed_images: int = 1) -> list[str]:
    """What is wrong with images to train on, one line a kind, with its count and an example."""
    found = []
    used = dataset.count_by_category() > 0
    unused = [category for category, is_used in zip(dataset.categories, used.tolist(), strict=True) if not is_used]
    if unused:
        found.append(
            f"{len(unused)} of {len(used)} categories have no object, such as {unused[0].id} {brief(unused[0].name)}. "
            "The model cannot learn them; take those that are no classes out of 'categories'."
        )
    counts = dataset.objects_per_image()
    if num_queries is not None and (counts > num_queries).any():
        fullest = dataset.records[int(counts.argmax())]
        found.append(
            f"{int((counts > num_queries).sum())} of {len(counts)} images have more objects than queries, "
            f"such as image {fullest.id} with {counts.max()}, while model.num_queries is {num_queries}. The rest can "
            "never be found; raise model.num_queries."
        )
    if num_queries is not None and mixed_images > 1 and len(counts) > 0:
        drawn = np.random.default_rng(0).choice(counts, (_MIXED, mixed_images)).sum(1)
        if (share := (drawn > num_queries).mean()) > _FEW:
            found.append(
                f"data.mixing makes samples of up to {mixed_images} images. About {share:.0%} of these have more "
                f"objects than queries, while model.num_queries is {num_queries}. The rest can never be found; raise "
                "model.num_queries, or mix fewer images."
            )
    return [f"{dataset.source}: {text}" for text in found]


def validation_warnings(train: DetectionDataset, val: DetectionDataset) -> list[str]:
    """Of images that are trained on too, where the two sets are not meant to be the same."""
    if train.source == val.source:
        return []
    trained, validated = train.folder.resolve(), val.folder.resolve()
    known = {trained / record.file_name for record in train.records}
    shared = [record.file_name for record in val.records if validated / record.file_name in known]
    if not shared:
        return []
    return [
        f"{val.source}: {len(shared)} of {len(val)} images are trained on too, such as {brief(shared[0])}. "
        "Results on these say little about other images; take them out of one of the two sets."
    ]


def unusable_images(dataset: DetectionDataset, *, pixels: bool = False) -> list[str]:
    """Why images cannot be used, as far as their headers show it, or all pixels.

    Processes of one run have each their part of the files, and all get the same answer.
    """
    own = dataset.records[distributed.rank() :: distributed.world_size()]
    if pixels or len(own) > _MANY:
        what = "pixels" if pixels else "headers"
        logger.info("Reading the %s of %d image files in %s.", what, len(dataset), dataset.folder)

    def problem(number: int, record: ImageRecord) -> str | None:
        check = read_image if pixels or number < _SAMPLES else check_image
        try:
            check(dataset.folder / record.file_name, record.size)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_READERS) as readers:
        problems = [text for text in readers.map(problem, range(len(own)), own) if text is not None]
    parts: Sequence[list[str]] = distributed.from_first(distributed.gather_objects(problems))
    return [text for part in parts for text in part]
