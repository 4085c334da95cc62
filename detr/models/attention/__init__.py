"""Attention blocks on feature maps.

Each is built as `Block(channels, *, ...)` and called with a map (B, C, H, W) and its mask (B, H, W), True = padding.
It returns a map of the same shape. The content of padding never changes a valid position. At the start every block is
the identity, so that a pre-trained detector computes the same with it.

A `Placement` says where in the detector a kind of block goes. A block that decides by chance also has a `policy_loss`.
"""

from detr.models.attention.criss_cross import CrissCrossAttention
from detr.models.attention.dual import DualAttention
from detr.models.attention.hard import HardAttention
from detr.models.attention.non_local import NonLocal
from detr.models.attention.placement import Blocks, Placement
from detr.models.attention.policy import Policy
from detr.models.attention.residual import ResidualAttention
from detr.models.attention.self_attention import MultiHeadSelfAttention
from detr.models.attention.spatial_transformer import SpatialTransformer
from detr.models.attention.squeeze_excitation import SqueezeExcitation

__all__ = [
    "Blocks",
    "CrissCrossAttention",
    "DualAttention",
    "HardAttention",
    "MultiHeadSelfAttention",
    "NonLocal",
    "Placement",
    "Policy",
    "ResidualAttention",
    "SpatialTransformer",
    "SqueezeExcitation",
]
