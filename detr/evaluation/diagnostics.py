"""Diagnostics of the matching: whether it is stable, and whether boxes, classes or duplicates limit the precision."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detr import boxes as box_ops
from detr.types import Detections, Matches, Predictions, Target

_SCORE, _RECALL_IOU, _DUPLICATE_IOU = 0.3, 0.5, 0.7


class MatchingDiagnostics:
    """Measures the matching of predictions to targets in an evaluation. It is not part of the training's state.

    match: the matching that the losses are computed on.

    `summarize` returns shares and means over all targets of an evaluation. It leaves out what has nothing to count:

    matching/stability: share of matched targets with the same query as in the previous evaluation; left out in the
        first evaluation of a process (DN-DETR, Li et al., CVPR 2022, counts the changes). A model that selects its
        queries from the image numbers them by rank; there the share says less.
    matching/layer_stability: share of matched targets with the same query in the first decoder layer as in the last
        (Stable-DINO, Liu et al., ICCV 2023); left out for predictions of one layer.
    matching/iou: mean IoU of matched pairs in the last layer.
    matching/recall: share of targets that a box of the last layer overlaps with an IoU of at least 0.5, whatever its
        class. If it is high but AP50 is low, the cause is classes or scores; if it is low, boxes.
    matching/duplicates: mean number of detections beyond the first for each found target. A target is found by
        detections of its class with a score of at least 0.3 and an IoU of at least 0.7.
    """

    def __init__(self, match: Callable[[Predictions, Sequence[Target]], Matches]) -> None:
        self.match = match
        self._previous: Tensor | None = None

    def measure(
        self, predictions: Predictions, targets: Sequence[Target], found: Sequence[Detections]
    ) -> dict[str, Tensor]:
        """Measure one batch, for `summarize`. targets: on the CPU. found: the detections of `predictions`.

        Raises NonFiniteError where predictions are NaN or infinite.
        """
        step = max(len(predictions.boxes) - 1, 1)  # the first and the last layer are enough
        ends = predictions.layers(slice(None, None, step))
        placed = [target.to(ends.boxes.device) for target in targets]
        matches = self.match(ends, placed)
        wanted = torch.cat([target.boxes for target in placed])
        counts = torch.tensor([len(target) for target in targets])
        image = torch.arange(len(targets)).repeat_interleave(counts).to(wanted.device)
        boxes = box_ops.cxcywh_to_xyxy(ends.boxes[-1].float())[image]
        overlap = box_ops.iou(boxes, box_ops.cxcywh_to_xyxy(wanted)[:, None])

        query = matches.query.new_full((len(ends.boxes), len(wanted)), -1)  # of each target; -1: it has none
        query.scatter_(1, matches.target, matches.query)
        first, last = query[0], query[-1]
        matched = last >= 0
        values = {
            "query": last,
            "layer_stability": (first == last)[matched & (len(ends.boxes) > 1)],
            "iou": overlap[matched, last[matched]],
            "recall": overlap.amax(1) >= _RECALL_IOU,
        }
        duplicates = [_duplicates(*pair) for pair in zip(targets, found, strict=True)]
        return {**{name: value.cpu() for name, value in values.items()}, "duplicates": torch.cat(duplicates)}

    def summarize(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """The values above. batches: all of one evaluation; every evaluation has the same order of images."""
        values = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        query = values.pop("query")
        if self._previous is not None:
            values = {"stability": (query == self._previous)[query >= 0], **values}
        self._previous = query
        return {f"matching/{name}": value.double().mean().item() for name, value in values.items() if len(value)}


def _duplicates(target: Target, found: Detections) -> Tensor:
    """Number of detections beyond the first, for each found target of one image."""
    found = found.above(_SCORE)
    height, width = target.original_size
    boxes = box_ops.cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
    close = box_ops.iou(found.boxes, boxes[:, None]) >= _DUPLICATE_IOU
    count = (close & (found.labels == target.labels[:, None])).sum(1)
    return count[count > 0] - 1
