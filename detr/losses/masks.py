"""Losses on the masks of matched queries, of the last decoder layer alone (Carion et al., ECCV 2020, section 4.4)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from detr.errors import UserError
from detr.losses.terms import Matched, Term


class MaskTerm(Term):
    """A loss that compares the pixels of a predicted mask with those of its target.

    Predictions are enlarged to the images with their padding, which belongs to no mask.
    """

    needs = "masks"
    models = ", with model/masks=detr or dot_product"

    def forward(self, matched: Matched) -> Float[Tensor, " layers"]:
        if matched.masks is None:
            return matched.num_boxes.new_zeros(0)
        size = matched.predictions.mask_size
        assert size is not None
        logits = F.interpolate(matched.masks[:, None], size=size, mode="bilinear")[:, 0]
        wanted = _padded(matched, size)[matched.matches.target[-1]]
        return self.loss(logits.flatten(1), wanted.to(logits).flatten(1)).sum()[None] / matched.num_boxes

    def loss(
        self, logits: Float[Tensor, "pairs pixels"], wanted: Float[Tensor, "pairs pixels"]
    ) -> Float[Tensor, " pairs"]:
        raise NotImplementedError


class MaskFocal(MaskTerm):
    """Focal loss of each pixel, as a mean over these (Lin et al., ICCV 2017).

    alpha: weight of pixels inside of objects, the others have the rest. gamma: how little sure pixels count.
    """

    def __init__(self, *, weight: float = 1.0, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__(weight=weight)
        self.alpha, self.gamma = alpha, gamma

    def loss(
        self, logits: Float[Tensor, "pairs pixels"], wanted: Float[Tensor, "pairs pixels"]
    ) -> Float[Tensor, " pairs"]:
        return sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma).mean(1)


class Dice(MaskTerm):
    """1 - Dice coefficient, with 1 added to both of its parts (V-Net: Milletari et al., 3DV 2016)."""

    def loss(
        self, logits: Float[Tensor, "pairs pixels"], wanted: Float[Tensor, "pairs pixels"]
    ) -> Float[Tensor, " pairs"]:
        inside = logits.sigmoid()
        return 1 - (2 * (inside * wanted).sum(1) + 1) / (inside.sum(1) + wanted.sum(1) + 1)


def _padded(matched: Matched, size: tuple[int, int]) -> Tensor:
    """The masks of all targets, as large as the images with their padding."""
    height, width = size
    parts = []
    for target in matched.targets:
        if target.masks is None:
            raise UserError(
                "criterion.terms: wanted targets with masks, got some without. Leave the terms of masks out, or train "
                "on data that have masks."
            )
        parts.append(F.pad(target.masks, (0, width - target.masks.shape[2], 0, height - target.masks.shape[1])))
    return torch.cat(parts)
