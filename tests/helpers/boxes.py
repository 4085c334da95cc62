"""Images whose boxes can be seen: white rectangles exactly where the boxes are."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors


def painted(
    height: int, width: int, boxes: Sequence[Sequence[int]], labels: Sequence[int] | None = None
) -> tuple[tv_tensors.Image, dict[str, Any]]:
    """A black image with a white rectangle at each of its boxes (left, top, right, bottom)."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for left, top, right, bottom in boxes:
        image[:, top:bottom, left:right] = 255
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return tv_tensors.Image(image), {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor(range(len(boxes)) if labels is None else labels, dtype=torch.int64),
    }


def extents(image: torch.Tensor, above: int = 127) -> torch.Tensor | None:
    """The box round all pixels of the first channel that are brighter; None where there is none."""
    ys, xs = torch.nonzero(image[0] > above, as_tuple=True)
    if len(xs) == 0:
        return None
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)
