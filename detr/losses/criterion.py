"""DETR's set loss (Carion et al., ECCV 2020, section 3.1), on all decoder layers in one pass."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from detr import boxes as box_ops
from detr import distributed
from detr.errors import UserError
from detr.losses.classification import ClassificationLoss, CrossEntropy
from detr.losses.matcher import HungarianMatcher
from detr.types import Matches, Predictions, Target


class SetCriterion(nn.Module):
    """A classification loss over all queries, L1 and GIoU losses over the matched ones, summed over decoder layers.

    matcher: assigns queries to targets, in every layer on its own.
    num_classes: K.
    classification: the loss of classes, which the matcher takes its cost from; published DETR's unless given.
    class_weight, box_weight, giou_weight: weights of the three losses in the total.
    group_repeats: how often each target is there for a group of queries: once as in Group DETR (Chen et al., ICCV
        2023), or more for the one-to-many matching of H-DETR (Jia et al., CVPR 2023).
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        num_classes: int,
        classification: ClassificationLoss | None = None,
        class_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        group_repeats: int = 1,
    ) -> None:
        super().__init__()
        if group_repeats < 1:
            raise UserError(f"criterion.group_repeats: wanted at least 1, got {group_repeats}.")
        self.matcher, self.num_classes, self.group_repeats = matcher, num_classes, group_repeats
        self.classification = classification or CrossEntropy()
        self.weights = {"loss_ce": class_weight, "loss_bbox": box_weight, "loss_giou": giou_weight}

    def forward(
        self, predictions: Predictions, targets: Sequence[Target], counts: Int64[Tensor, " images"] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """`loss`, the total to minimise, and its parts before weighting.

        counts: the number of objects in each image of the whole optimiser step, over all processes and all batches that
            are accumulated; those of `targets` over all processes unless given. The losses are this batch's part of
            the step's loss: summed over accumulated batches and averaged over processes they equal the loss of one
            large batch.

        `loss_ce` (the classification loss, whatever its kind), `loss_bbox`, `loss_giou` are those of the last decoder
        layer; a suffix `_0`, `_1` ... names an earlier one. Suffixes `_proposals`, `_groups` and `_denoising` name
        those of further predictions, where there are any, summed over layers and averaged over groups: all further
        groups together count as much as the first. The box losses are divided by the number of target boxes, averaged
        over processes, at least 1, times the copies of each. Only those of denoising depend on which images are
        together in a batch, as that decides how often a target is copied. Two more are for the log only: `class_error`,
        the percentage of matched queries with a wrong class (100 in a batch without targets), and `cardinality_error`,
        by how many an image's count of objects is off.

        Raises NonFiniteError where predictions are NaN or infinite, UserError where the class head does not fit the
        loss.
        """
        if counts is None:
            own = torch.tensor([len(target) for target in targets], device=predictions.boxes.device)
            counts = distributed.gather(own)
        num_boxes = (counts.sum() / distributed.world_size()).clamp(min=1)
        matches = self.match(predictions, targets)
        losses = self._losses(predictions, matches, targets, num_boxes, counts)
        further = dict(self._further_losses(predictions, targets, num_boxes, counts))
        total = sum(
            weight * part[name].sum() for part in (losses, *further.values()) for name, weight in self.weights.items()
        )
        with torch.no_grad():
            losses["cardinality_error"] = self._cardinality_error(predictions, targets)
            class_error = self._class_error(predictions, matches, targets)
        named = {
            name if layer == len(values) - 1 else f"{name}_{layer}": value
            for name, values in losses.items()
            for layer, value in enumerate(values)
        }
        named |= {
            f"{name}_{part}": values.sum() for part, of_part in further.items() for name, values in of_part.items()
        }
        return {"loss": total, **named, "class_error": class_error}

    def _further_losses(
        self, predictions: Predictions, targets: Sequence[Target], num_boxes: Tensor, counts: Tensor
    ) -> Iterator[tuple[str, dict[str, Float[Tensor, " layers"]]]]:
        if (proposals := predictions.proposals) is not None:
            num_classes, objects = self.num_classes, targets
            if proposals.logits.shape[-1] == 1 + self.classification.background:  # class-agnostic
                num_classes, objects = 1, [replace(t, labels=torch.zeros_like(t.labels)) for t in targets]
            matches = self.match(proposals, objects, num_classes)
            yield "proposals", self._losses(proposals, matches, objects, num_boxes, counts)
        if (groups := predictions.groups) is not None:
            times = self.group_repeats
            objects = [target.select(torch.arange(len(target)).repeat(times)) for target in targets]
            matches = self.match(groups, objects)
            losses = self._losses(groups, matches, objects, num_boxes * times, counts * times)
            number = len(groups.boxes)
            yield "groups", {name: values * len(predictions.boxes) / number for name, values in losses.items()}
        if (denoised := predictions.denoising) is not None:
            divisor = num_boxes * max(denoised.copies, 1)  # no copies where there is nothing to copy
            yield "denoising", self._losses(denoised.predictions, denoised.matches, targets, divisor)

    @torch.no_grad()
    def per_image(self, predictions: Predictions, targets: Sequence[Target]) -> Float[Tensor, " batch"]:
        """The last decoder layer's weighted loss of each image as if it were alone, without a gradient."""
        costs = []
        for index, target in enumerate(targets):
            alone = predictions.layers(slice(-1, None)).select(images=slice(index, index + 1))
            num_boxes = predictions.boxes.new_tensor(float(max(len(target), 1)))
            losses = self._losses(alone, self.match(alone, [target]), [target], num_boxes)
            costs.append(torch.stack([weight * losses[name].sum() for name, weight in self.weights.items()]).sum())
        return torch.stack(costs)

    def match(self, predictions: Predictions, targets: Sequence[Target], num_classes: int | None = None) -> Matches:
        """The pairs that the losses are of. num_classes: of class-agnostic predictions, where it is another."""
        num_classes = num_classes or self.num_classes
        background, got = self.classification.background, predictions.logits.shape[-1]
        if got != num_classes + background:
            other = got == num_classes + (not background)
            remedy = (
                f"model.background={str(background).lower()}" if other else f"the model's num_classes={num_classes}"
            )
            raise UserError(
                f"The class head has {got} outputs, wanted {num_classes + background} for {num_classes} classes and "
                f"{'a softmax' if background else 'a sigmoid'} loss: set {remedy}."
            )
        return self.matcher(predictions, targets, self.classification)

    def _losses(
        self,
        predictions: Predictions,
        matches: Matches,
        targets: Sequence[Target],
        num_boxes: Tensor,
        counts: Tensor | None = None,
    ) -> dict[str, Float[Tensor, " layers"]]:
        """counts: as in `forward`; without them the classification loss is that of these predictions alone."""
        layer = torch.arange(len(predictions.boxes), device=num_boxes.device)[:, None]
        labels = torch.cat([target.labels for target in targets])[matches.target]
        found = predictions.boxes.float()[layer, matches.image, matches.query]
        wanted = torch.cat([target.boxes for target in targets])[matches.target]
        corners, wanted_corners = box_ops.cxcywh_to_xyxy(found), box_ops.cxcywh_to_xyxy(wanted)
        overlaps = box_ops.iou(corners.detach(), wanted_corners)
        _, batch, slots, _ = predictions.logits.shape
        pairs, queries = num_boxes.new_tensor(len(matches.image)), num_boxes.new_tensor(batch * slots)
        if counts is not None:
            pairs = counts.clamp(max=slots).sum() / distributed.world_size()
            queries = num_boxes.new_tensor(len(counts) * slots / distributed.world_size())
        divisor = self.classification.divisor(num_boxes, pairs, queries)
        of_classes = self.classification(predictions.logits.float(), matches, labels, overlaps)
        return {
            # Without any query the sum is zero, and so shall be the loss.
            "loss_ce": of_classes / divisor.clamp(min=torch.finfo(divisor.dtype).tiny),
            "loss_bbox": (found - wanted).abs().sum((1, 2)) / num_boxes,
            "loss_giou": (1 - box_ops.giou(corners, wanted_corners)).sum(1) / num_boxes,
        }

    def _class_error(self, predictions: Predictions, matches: Matches, targets: Sequence[Target]) -> Float[Tensor, ""]:
        labels = torch.cat([target.labels for target in targets])[matches.target[-1]]
        if len(labels) == 0:
            return torch.tensor(100.0, device=labels.device)
        found = predictions.logits[-1, matches.image, matches.query[-1]].argmax(-1)
        return 100 * (found != labels).float().mean()

    def _cardinality_error(self, predictions: Predictions, targets: Sequence[Target]) -> Float[Tensor, " layers"]:
        counts = torch.tensor([float(len(target)) for target in targets], device=predictions.logits.device)
        return (self.classification.finds(predictions.logits).sum(-1) - counts).abs().mean(1)
