"""What average precision does not tell: is the matching steady; are boxes, classes or duplicates at fault?"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detr import boxes as box_ops
from detr.types import Detections, Matches, Predictions, Target

_SCORE, _RECALL_IOU, _DUPLICATE_IOU = 0.3, 0.5, 0.7


class MatchingDiagnostics:
    """Measures the matching of predictions to targets over an evaluation. It is not part of the training's state.

    match: the matching that the losses are computed on.

    `summarize` gives shares and means over all targets of an evaluation, without those that have nothing to count:

    matching/stability: share of matched targets with the same query as in the evaluation before; not there in the
        first one of a process (DN-DETR, Li et al., CVPR 2022, counts the changes). Where queries are selected from the
        image, a query is but a rank among them, and the share says less.
    matching/layer_stability: share of matched targets with the same query in the first decoder layer as in the last
        (Stable-DINO, Liu et al., ICCV 2023); not there for predictions of one layer.
    matching/iou: mean IoU of matched pairs in the last layer.
    matching/recall: share of targets that a box of the last layer overlaps with an IoU of at least 0.5, whatever its
        class. Where this is high but AP50 is low, classes or scores are at fault; where it is low, boxes.
    matching/duplicates: mean number of detections beyond the first, of found targets. A target is found by detections
        of its class with a score of at least 0.3 and an IoU of at least 0.7.
    """

    def __init__(self, match: Callable[[Predictions, Sequence[Target]], Matches]) -> None:
        self.match = match
        self._previous: Tensor | None = None

    def measure(
        self, predictions: Predictions, targets: Sequence[Target], found: Sequence[Detections]
    ) -> dict[str, Tensor]:
        """One batch, for `summarize`. targets: on the CPU, as from the loader. found: what `predictions` amount to.

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
        """The values above from all batches of an evaluation, always in the same order."""
        values = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        query = values.pop("query")
        if self._previous is not None:
            values = {"stability": (query == self._previous)[query >= 0], **values}
        self._previous = query
        return {f"matching/{name}": value.double().mean().item() for name, value in values.items() if len(value)}


def _duplicates(target: Target, found: Detections) -> Tensor:
    """How many detections beyond the first each found target of one image has."""
    found = found.above(_SCORE)
    height, width = target.original_size
    boxes = box_ops.cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
    close = box_ops.iou(found.boxes, boxes[:, None]) >= _DUPLICATE_IOU
    count = (close & (found.labels == target.labels[:, None])).sum(1)
    return count[count > 0] - 1
