"""Optimal assignment of predictions to targets (Carion et al., ECCV 2020, section 3.1; Kuhn 1955)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr import boxes as box_ops
from detr.errors import NonFiniteError
from detr.types import Predictions, Target


@dataclass(frozen=True)
class Matches:
    """Pairs of one query and one target, the same number M in each of the L decoder layers.

    image: (M,) index in the batch; query: (L, M) index of the query; target: (L, M) index in the targets of the whole
    batch, concatenated. Pairs are ordered by image.
    """

    image: Int64[Tensor, " pairs"]
    query: Int64[Tensor, "layers pairs"]
    target: Int64[Tensor, "layers pairs"]


class HungarianMatcher:
    """For each image and layer, the one-to-one assignment of queries to targets with the lowest total cost.

    cost = class_cost * (-probability of the target's class) + box_cost * L1 + giou_cost * (-GIoU).
    Where an image has more targets than queries, the targets that fit best are kept.
    """

    def __init__(self, *, class_cost: float = 1.0, box_cost: float = 5.0, giou_cost: float = 2.0) -> None:
        self.class_cost, self.box_cost, self.giou_cost = class_cost, box_cost, giou_cost

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: Sequence[Target]) -> Matches:
        """Raises NonFiniteError, with the image ids, where predictions are NaN or infinite."""
        counts = [len(target) for target in targets]
        cost = self.costs(predictions, targets).cpu().numpy()
        if not np.isfinite(cost).all():
            damaged = ~np.isfinite(cost).all(axis=(0, 2))
            image_of = np.repeat(np.arange(len(targets)), counts)
            raise NonFiniteError("The model's predictions", [targets[i].image_id for i in np.unique(image_of[damaged])])

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

    def costs(self, predictions: Predictions, targets: Sequence[Target]) -> Float[Tensor, "layers targets queries"]:
        """Costs of each target against the queries of its own image only, for all layers in one pass."""
        labels = torch.cat([target.labels for target in targets])
        wanted = torch.cat([target.boxes for target in targets])[:, None]
        counts = torch.tensor([len(target) for target in targets])
        image = torch.arange(len(targets)).repeat_interleave(counts).to(labels.device)

        probability = predictions.logits.float().softmax(-1).transpose(2, 3)[:, image, labels]
        # Coordinate planes (L, T, Q), contiguous in the queries: slices of 4 would be several times slower.
        planes = predictions.boxes.float().permute(3, 0, 1, 2).contiguous()
        found = planes[:, :, image].movedim(0, -1)
        distance = (found - wanted).abs().sum(-1)
        overlap = box_ops.giou(box_ops.cxcywh_to_xyxy(found), box_ops.cxcywh_to_xyxy(wanted))
        return self.box_cost * distance - self.class_cost * probability - self.giou_cost * overlap
