"""Optimal assignment of predictions to targets (Carion et al., ECCV 2020, section 3.1; Kuhn 1955)."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr import boxes as box_ops
from detr.errors import NonFiniteError
from detr.losses.classification import ClassificationLoss, CrossEntropy
from detr.types import Matches, Predictions, Target


class HungarianMatcher:
    """For each image and layer, the one-to-one assignment of queries to targets with the lowest total cost.

    cost = class_cost * (cost of the target's class) + box_cost * L1 + giou_cost * (-GIoU).
    Where an image has more targets than queries, the targets that fit best are kept.
    """

    def __init__(self, *, class_cost: float = 1.0, box_cost: float = 5.0, giou_cost: float = 2.0) -> None:
        self.class_cost, self.box_cost, self.giou_cost = class_cost, box_cost, giou_cost

    @torch.no_grad()
    def __call__(
        self, predictions: Predictions, targets: Sequence[Target], classification: ClassificationLoss | None = None
    ) -> Matches:
        """classification: the loss whose cost of a class it is; without one, published DETR's, -probability.

        Raises NonFiniteError, with the image ids, where predictions are NaN or infinite.
        """
        counts = [len(target) for target in targets]
        cost = self.costs(predictions, targets, classification).cpu().numpy()
        total = predictions.logits.float().sum((0, 2, 3)) + predictions.boxes.float().sum((0, 2, 3))
        if damaged := (~total.isfinite()).nonzero().flatten().tolist():
            raise NonFiniteError("The model's predictions", [targets[image].image_id for image in damaged])
        if not np.isfinite(cost).all():
            raise NonFiniteError("The targets' boxes", [target.image_id for target in targets])

        layers = len(cost)
        query: list[list[np.ndarray]] = [[] for _ in range(layers)]
        target: list[list[np.ndarray]] = [[] for _ in range(layers)]
        start = 0
        for count in counts:
            for layer in range(layers):
                rows, columns = linear_sum_assignment(cost[layer, start : start + count])
                target[layer].append(start + rows)
                query[layer].append(columns)
            start += count

        device, num_queries = predictions.boxes.device, predictions.boxes.shape[2]
        pairs = torch.tensor([min(count, num_queries) for count in counts])

        def stack(indices: list[list[np.ndarray]]) -> Tensor:
            return torch.from_numpy(np.stack([np.concatenate(layer) for layer in indices])).to(device, torch.int64)

        return Matches(
            image=torch.arange(len(counts)).repeat_interleave(pairs).to(device),
            query=stack(query),
            target=stack(target),
        )

    def costs(
        self, predictions: Predictions, targets: Sequence[Target], classification: ClassificationLoss | None = None
    ) -> Float[Tensor, "layers targets queries"]:
        """Costs of each target against the queries of its own image only, never of the whole batch."""
        classification = classification or CrossEntropy()
        labels = torch.cat([target.labels for target in targets])
        wanted = torch.cat([target.boxes for target in targets])
        counts = torch.tensor([len(target) for target in targets])
        image = torch.arange(len(targets)).repeat_interleave(counts).to(labels.device)
        costs = []
        # A layer's block of costs fits the processor's cache, that of all layers does not.
        for logits, boxes in zip(predictions.logits.float(), predictions.boxes.float(), strict=True):
            # Coordinates as planes, contiguous in the queries: work on slices of 4 is several times slower.
            planes = torch.cat((boxes, box_ops.cxcywh_to_xyxy(boxes)), dim=-1).permute(2, 0, 1).contiguous()
            found = planes.index_select(1, image)
            overlap = box_ops.giou(found[4:].movedim(0, -1), box_ops.cxcywh_to_xyxy(wanted)[:, None])
            cost = classification.cost(logits, image, labels, overlap).mul_(self.class_cost)
            for coordinate, target in zip(found[:4], wanted[:, None].unbind(-1), strict=True):
                cost.add_((coordinate - target).abs_(), alpha=self.box_cost)
            costs.append(cost.sub_(overlap, alpha=self.giou_cost))
        return torch.stack(costs)
