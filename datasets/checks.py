"""Checks of annotated images before a training, which would stop at them, or learn them as they are."""

import logging
from collections.abc import Iterator

import numpy as np

from datasets.detection import DetectionDataset
from datasets.findings import Finding, some
from datasets.image_checks import image_files, unusable_images
from detr.errors import UserError, brief

logger = logging.getLogger(__name__)
_MIXED, _FEW = 2000, 0.01  # samples that are drawn to see how many objects mixing gives; a share of no importance
_RARE = 10  # objects of a class, from which on something can be learned
_UNEVEN = 100  # times as many objects has the most frequent class as the rarest of those


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
    for dataset, findings in (
        (train, training_findings(train, num_queries, mixed_images)),
        (val, validation_findings(train, val)),
    ):
        for finding in findings:
            logger.warning("%s: %s", dataset.source, finding)
    if images == "nothing":
        return
    for dataset, replaceable in ((train, True), (val, False)):
        files = image_files(dataset, pixels=images == "pixels")
        for finding in unusable_images(dataset, files, replaceable=replaceable):
            if finding.severity == "error":
                raise UserError(str(finding))
            logger.warning("%s", finding)


def training_findings(dataset: DetectionDataset, num_queries: int | None, mixed_images: int = 1) -> Iterator[Finding]:
    """What is wrong with images to train on, for a model of so many queries."""
    used = dataset.count_by_category() > 0
    unused = [category for category, is_used in zip(dataset.categories, used.tolist(), strict=True) if not is_used]
    if unused:
        yield Finding(
            kind="classes without objects",
            severity="warning",
            count=len(unused),
            text=f"{len(unused)} of {len(used)} categories have no object, such as {unused[0].id} "
            f"{brief(unused[0].name)}.",
            advice="The model cannot learn them; take those that are no classes out of 'categories'.",
        )
    counts = dataset.objects_per_image()
    if num_queries is not None and (counts > num_queries).any():
        fullest = dataset.records[int(counts.argmax())]
        yield Finding(
            kind="more objects than queries",
            severity="warning",
            count=int((counts > num_queries).sum()),
            text=f"{int((counts > num_queries).sum())} of {len(counts)} images have more objects than queries, such as "
            f"image {fullest.id} with {counts.max()}, while model.num_queries is {num_queries}.",
            advice="The rest can never be found; raise model.num_queries.",
            files=some([fullest.file_name]),
        )
    if num_queries is not None and mixed_images > 1 and len(counts) > 0:
        drawn = np.random.default_rng(0).choice(counts, (_MIXED, mixed_images)).sum(1)
        if (share := (drawn > num_queries).mean()) > _FEW:
            yield Finding(
                kind="more objects in mixed samples than queries",
                severity="warning",
                count=int((drawn > num_queries).sum()),
                text=f"data.mixing makes samples of up to {mixed_images} images. About {share:.0%} of these have more "
                f"objects than queries, while model.num_queries is {num_queries}.",
                advice="The rest can never be found; raise model.num_queries, or mix fewer images.",
            )


def validation_findings(train: DetectionDataset, val: DetectionDataset) -> Iterator[Finding]:
    """Of images that are trained on too, where the two sets are not meant to be the same."""
    if train.source == val.source:
        return
    trained, validated = train.folder.resolve(), val.folder.resolve()
    known = {trained / record.file_name for record in train.records}
    shared = [record.file_name for record in val.records if validated / record.file_name in known]
    if shared:
        yield Finding(
            kind="images of both parts",
            severity="warning",
            count=len(shared),
            text=f"{len(shared)} of {len(val)} images are trained on too, such as {brief(shared[0])}.",
            advice="Results on these say little about other images; take them out of one of the two sets.",
            files=some(shared),
        )


def balance_findings(train: DetectionDataset) -> Iterator[Finding]:
    """How much there is to learn of each class, and in how many images."""
    counts, names = train.count_by_category(), [category.name for category in train.categories]
    rare = np.flatnonzero((counts > 0) & (counts < _RARE))
    if len(rare):
        fewest = int(rare[counts[rare].argmin()])
        yield Finding(
            kind="rare classes",
            severity="note",
            count=len(rare),
            text=f"{len(rare)} of {len(names)} classes have fewer than {_RARE} objects, such as {brief(names[fewest])} "
            f"with {counts[fewest]}.",
            advice="Expect little of them; annotate more, or join classes.",
        )
    enough = np.flatnonzero(counts >= _RARE)
    if len(enough) and counts.max() >= _UNEVEN * (least := counts[enough].min()):
        yield Finding(
            kind="uneven classes",
            severity="note",
            count=int((counts[enough] * _UNEVEN <= counts.max()).sum()),
            text=f"{brief(names[int(counts.argmax())])} has {counts.max()} objects, and "
            f"{brief(names[int(enough[counts[enough].argmin()])])} has {least}.",
            advice="AP counts all classes alike: look at each class, and annotate more of the rare ones.",
        )
    objects = train.objects_per_image()
    empty = np.flatnonzero(objects == 0)
    if 2 * len(empty) > len(objects):
        yield Finding(
            kind="mostly images without objects",
            severity="warning",
            count=len(empty),
            text=f"{len(empty)} of {len(objects)} images have no object, such as "
            f"{brief(train.records[int(empty[0])].file_name)}.",
            advice="Some teach what is background; if these are not annotated yet, leave them out.",
            files=some(train.records[place].file_name for place in empty[:10].tolist()),
        )


def detection_findings(val: DetectionDataset, max_dets: int) -> Iterator[Finding]:
    """Whether all objects can count in evaluation. max_dets: detections of an image that count."""
    counts = val.objects_per_image()
    if (counts > max_dets).any():
        fullest = val.records[int(counts.argmax())]
        more = int((counts > max_dets).sum())
        yield Finding(
            kind="more objects than detections",
            severity="warning",
            count=more,
            text=f"{more} of {len(counts)} images have more objects than detections that count, such as "
            f"{brief(fullest.file_name)} with {counts.max()}, while evaluation.max_dets is {max_dets}.",
            advice="AP cannot reach 1; raise evaluation.max_dets.",
            files=some([fullest.file_name]),
        )
