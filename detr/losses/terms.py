"""What the set criterion adds up: terms, and the matched predictions that each of them is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from detr import boxes as box_ops
from detr import distributed
from detr.types import Matches, Predictions, Target

Places = tuple[Int64[Tensor, "layers 1"], Int64[Tensor, " pairs"], Int64[Tensor, "layers pairs"]]


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Predictions of L layers, B images and Q queries, the targets, and the M pairs of one query and one target.

    What several terms need is computed when the first of them asks for it. Logits and boxes are in single precision,
    whatever the precision of the training.

    targets: those of each image.
    num_boxes: what a loss over pairs is divided by: the number of target boxes in the optimizer step, averaged over
        processes, at least 1, times the copies of each.
    counts: the number of objects in each image of the optimizer step, over all processes; without them the step
        consists of these predictions alone.
    union: the same predictions with the union of the pairs of all outputs, where other terms than classification judge
        these.
    main: of denoising queries, what was matched beside them.
    scale: of all losses, by which they are averaged over groups.
    """

    predictions: Predictions
    targets: Sequence[Target]
    matches: Matches
    num_boxes: Float[Tensor, ""]
    counts: Int64[Tensor, " images"] | None = None
    union: "Matched | None" = None
    main: "Matched | None" = None
    scale: float = 1.0

    def found(self, field: str) -> Shaped[Tensor, "layers pairs ..."]:
        """What the query of each pair predicts. field: of `Predictions`, such as "boxes"."""
        return getattr(self.predictions, field)[self.places]

    def wanted(self, field: str) -> Shaped[Tensor, "layers pairs ..."]:
        """What the target of each pair has. field: of `Target`, such as "boxes"."""
        return torch.cat([getattr(target, field) for target in self.targets])[self.matches.target]

    @cached_property
    def places(self) -> Places:
        """Index of the pairs in a tensor (L, B, Q, ...): layer, image and query."""
        layer = torch.arange(len(self.predictions.boxes), device=self.matches.query.device)
        return layer[:, None], self.matches.image, self.matches.query

    @cached_property
    def logits(self) -> Float[Tensor, "layers batch queries classes"]:
        """Class logits of all queries, matched or not."""
        return single(self.predictions.logits)

    @cached_property
    def labels(self) -> Int64[Tensor, "layers pairs"]:
        return self.wanted("labels")

    @cached_property
    def boxes(self) -> Float[Tensor, "layers pairs 4"]:
        """Predicted boxes as center x, center y, width, height in [0, 1]."""
        return single(self.found("boxes"))

    @cached_property
    def wanted_boxes(self) -> Float[Tensor, "layers pairs 4"]:
        return self.wanted("boxes")

    @cached_property
    def corners(self) -> Float[Tensor, "layers pairs 4"]:
        """Predicted boxes as x1, y1, x2, y2."""
        return box_ops.cxcywh_to_xyxy(self.boxes)

    @cached_property
    def wanted_corners(self) -> Float[Tensor, "layers pairs 4"]:
        return box_ops.cxcywh_to_xyxy(self.wanted_boxes)

    @cached_property
    def masks(self) -> Float[Tensor, "pairs h w"] | None:
        """Logits of predicted masks of the last layer; None where there are none."""
        pairs = self.matches.image, self.matches.query[-1]
        if self.predictions.mask_of is not None:
            return single(self.predictions.mask_of(*pairs))
        return None if self.predictions.masks is None else single(self.predictions.masks[-1][pairs])

    @cached_property
    def overlaps(self) -> Float[Tensor, "layers pairs"]:
        """IoU of predicted and target boxes, without a gradient."""
        return box_ops.iou(self.corners.detach(), self.wanted_corners)

    @property
    def num_pairs(self) -> Float[Tensor, ""]:
        """Pairs of one layer in the optimizer step, averaged over processes."""
        if self.counts is None:
            return self.num_boxes.new_tensor(len(self.matches.image))
        return self.counts.clamp(max=self.predictions.logits.shape[2]).sum() / distributed.world_size()

    @property
    def share(self) -> float:
        """How many of the optimizer step's images, averaged over processes, these are: a share in (0, 1]."""
        batch = self.predictions.boxes.shape[1]
        return 1.0 if self.counts is None else batch * distributed.world_size() / len(self.counts)

    @property
    def num_queries(self) -> Float[Tensor, ""]:
        """Queries of one layer in the optimizer step, over all images, averaged over processes."""
        _, batch, queries, _ = self.predictions.logits.shape
        images = batch if self.counts is None else len(self.counts)
        processes = 1 if self.counts is None else distributed.world_size()
        return self.num_boxes.new_tensor(images * queries / processes)


class Term(nn.Module):
    """One loss of those that the criterion adds up.

    A term of your own is a subclass with `forward`; it is trained with once `criterion.terms` names it.

    weight: its factor in the total. Losses are logged without it.
    needs: a field of `Predictions` that the model must have for it. models: which models have it, for messages.
    """

    needs: str | None = None
    models = ""

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, matched: Matched) -> Float[Tensor, " layers"]:
        """The loss of each layer, summed over the batch and divided by `matched.num_boxes` or the like.

        It may be that of the last layer alone, shape (1,), and none, shape (0,), where the predictions have nothing to
        judge: proposals have no masks, for one.
        """
        raise NotImplementedError


def single(tensor: Tensor) -> Tensor:
    """In single precision, unless it is double."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
