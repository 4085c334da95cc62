"""Losses on the boxes of matched queries."""

from jaxtyping import Float
from torch import Tensor

from detr import boxes as box_ops
from detr.losses.terms import Matched, Term


class L1(Term):
    """Distance of center, width and height, each as a share of the image (Carion et al., ECCV 2020)."""

    def forward(self, matched: Matched) -> Float[Tensor, " layers"]:
        return (matched.boxes - matched.wanted_boxes).abs().sum((1, 2)) / matched.num_boxes


class GIoU(Term):
    """1 - generalized IoU (Rezatofighi et al., CVPR 2019)."""

    def forward(self, matched: Matched) -> Float[Tensor, " layers"]:
        return (1 - box_ops.giou(matched.corners, matched.wanted_corners)).sum(1) / matched.num_boxes
