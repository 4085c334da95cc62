"""Attention blocks on feature maps.

Each is built as `Block(channels, *, ...)` and called with a map (B, C, H, W) and its mask (B, H, W), True = padding.
It returns a map of the same shape, in which what padding holds has changed no valid position. At the start every block
is the identity, so that pre-trained weights stay worth what they are.
"""

from detr.models.attention.criss_cross import CrissCross
from detr.models.attention.dual import Dual
from detr.models.attention.hard import Hard
from detr.models.attention.non_local import NonLocal
from detr.models.attention.residual import Residual
from detr.models.attention.self_attention import SelfAttention
from detr.models.attention.spatial_transformer import SpatialTransformer
from detr.models.attention.squeeze_excitation import SqueezeExcitation

__all__ = [
    "CrissCross",
    "Dual",
    "Hard",
    "NonLocal",
    "Residual",
    "SelfAttention",
    "SpatialTransformer",
    "SqueezeExcitation",
]
