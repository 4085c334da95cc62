"""Images to look at: what is annotated in them, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from torch import Tensor

from detr.boxes import cxcywh_to_xyxy
from detr.masks import Masks
from detr.types import Detections, ImageBatch, Target


@dataclass(frozen=True)
class Sample:
    """An image as the model got it, without its padding. Boxes and masks are in its pixels.

    truth: the annotated objects, in the form of detections with a score of 1. found: what the model found; None where
    the image is one of training.
    """

    image: UInt8[Tensor, "3 _ _"]
    truth: Detections
    found: Detections | None = None

    @classmethod
    def of(
        cls,
        batch: ImageBatch,
        index: int,
        target: Target,
        found: Detections | None = None,
        *,
        names: Sequence[str] = (),
    ) -> "Sample":
        """One of a batch. found: in pixels of the original image. names: of the classes; without them labels serve."""
        height, width = batch.sizes()[index]
        size = torch.tensor([width, height]).repeat(2)
        truth = Detections(
            boxes=cxcywh_to_xyxy(target.boxes) * size,
            scores=torch.ones(len(target)),
            labels=target.labels,
            names=[names[label] if names else str(label) for label in target.labels.tolist()],
            queries=torch.arange(len(target)),
            masks=None if target.masks is None else Masks.encode(target.masks),
        )
        if found is not None:
            original = torch.tensor(target.original_size[::-1]).repeat(2)
            masks = None if found.masks is None else found.masks.resized((height, width))
            found = replace(found, boxes=found.boxes * (size / original), masks=masks)
        return cls(image=batch.images[index, :, :height, :width].clone(), truth=truth, found=found)


def spread(samples: int, batches: int, number: int) -> int:
    """How many samples to take from the batch of this number, for them to come from all over."""
    return sum(sample * batches // samples == number for sample in range(samples))
