"""DETR's set loss (Carion et al., ECCV 2020, section 3.1), on all decoder layers in one pass."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detr import boxes as box_ops
from detr import distributed
from detr.losses.matcher import HungarianMatcher
from detr.types import Matches, Predictions, Target


class SetCriterion(nn.Module):
    """Cross-entropy over all queries, L1 and GIoU losses over the matched ones, summed over the decoder layers.

    matcher: assigns queries to targets, in every layer on its own.
    num_classes: K; class K means no object.
    class_weight, box_weight, giou_weight: weights of the three losses in the total.
    no_object_weight: weight of queries without an object in the cross-entropy, whose mean is a weighted one.
    """

    class_weights: Tensor

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        num_classes: int,
        class_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        no_object_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.matcher, self.num_classes = matcher, num_classes
        self.weights = {"loss_ce": class_weight, "loss_bbox": box_weight, "loss_giou": giou_weight}
        class_weights = torch.ones(num_classes + 1)
        class_weights[-1] = no_object_weight
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, predictions: Predictions, targets: Sequence[Target]) -> dict[str, Float[Tensor, ""]]:
        """`loss`, the total to minimise, and its parts before weighting.

        `loss_ce`, `loss_bbox`, `loss_giou` are those of the last decoder layer; a suffix `_0`, `_1` ... names an
        earlier one. The box losses are divided by the number of target boxes, averaged over processes, at least 1.
        Two more are for the log only: `class_error`, the percentage of matched queries with a wrong class (100 in a
        batch without targets), and `cardinality_error`, by how many an image's count of objects is off.

        Raises NonFiniteError where predictions are NaN or infinite.
        """
        matches = self.matcher(predictions, targets)
        labels = torch.cat([target.labels for target in targets])[matches.target]
        num_boxes = torch.tensor(float(sum(len(target) for target in targets)), device=predictions.boxes.device)
        num_boxes = distributed.mean(num_boxes).clamp(min=1)

        losses = {
            "loss_ce": self._class_loss(predictions, matches, labels),
            **self._box_losses(predictions, matches, targets, num_boxes),
        }
        total = sum(weight * losses[name].sum() for name, weight in self.weights.items())
        with torch.no_grad():
            losses["cardinality_error"] = self._cardinality_error(predictions, targets)
            class_error = self._class_error(predictions, matches, labels)
        named = {
            name if layer == len(values) - 1 else f"{name}_{layer}": value
            for name, values in losses.items()
            for layer, value in enumerate(values)
        }
        return {"loss": total, **named, "class_error": class_error}

    def _class_loss(self, predictions: Predictions, matches: Matches, labels: Tensor) -> Float[Tensor, " layers"]:
        logits = predictions.logits.float()
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        wanted = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        wanted[layer, matches.image, matches.query] = labels
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), self.class_weights, reduction="none")
        weight = self.class_weights[wanted].flatten(1)
        return loss.view_as(weight).sum(1) / weight.sum(1)

    def _box_losses(
        self, predictions: Predictions, matches: Matches, targets: Sequence[Target], num_boxes: Tensor
    ) -> dict[str, Float[Tensor, " layers"]]:
        layer = torch.arange(len(predictions.boxes), device=num_boxes.device)[:, None]
        found = predictions.boxes.float()[layer, matches.image, matches.query]
        wanted = torch.cat([target.boxes for target in targets])[matches.target]
        overlap = box_ops.giou(box_ops.cxcywh_to_xyxy(found), box_ops.cxcywh_to_xyxy(wanted))
        return {
            "loss_bbox": (found - wanted).abs().sum((1, 2)) / num_boxes,
            "loss_giou": (1 - overlap).sum(1) / num_boxes,
        }

    def _class_error(self, predictions: Predictions, matches: Matches, labels: Tensor) -> Float[Tensor, ""]:
        if labels.shape[1] == 0:
            return torch.tensor(100.0, device=labels.device)
        found = predictions.logits[-1, matches.image, matches.query[-1]].argmax(-1)
        return 100 * (found != labels[-1]).float().mean()

    def _cardinality_error(self, predictions: Predictions, targets: Sequence[Target]) -> Float[Tensor, " layers"]:
        counts = torch.tensor([float(len(target)) for target in targets], device=predictions.logits.device)
        found = (predictions.logits.argmax(-1) != self.num_classes).sum(-1)
        return (found - counts).abs().mean(1)
