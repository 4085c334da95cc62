"""DETR, the detection transformer (Carion et al., ECCV 2020)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.backbone import Backbone
from detr.models.transformer import Transformer
from detr.types import ImageBatch, Predictions


class BoxHead(nn.Module):
    """A perceptron of three layers from query features to a box in logits."""

    def __init__(self, *, d_model: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d_model, d_model), nn.Linear(d_model, d_model), nn.Linear(d_model, 4)])

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 4"]:
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


class DETR(nn.Module):
    """Backbone, transformer and two heads that turn every object query into a class and a box.

    backbone: images to features (B, backbone.channels, h, w).
    position: padding mask (B, h, w) to encodings (B, d_model, h, w).
    transformer: encoder and decoder.
    num_classes: K; the class head has one more output, the last, for no object.
    num_queries: Q, the most objects that can be found in one image.
    aux_loss: predict from every decoder layer, so that the loss can supervise all of them; off: the last only.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        position: nn.Module,
        transformer: Transformer,
        num_classes: int,
        num_queries: int = 100,
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        if num_queries < 1 or num_classes < 1:
            raise UserError(
                f"DETR: wanted at least one query and one class, got num_queries={num_queries} and "
                f"num_classes={num_classes}."
            )
        self.backbone, self.position, self.transformer = backbone, position, transformer
        self.num_classes, self.num_queries, self.aux_loss = num_classes, num_queries, aux_loss
        d_model = transformer.d_model
        self.input_proj = nn.Conv2d(backbone.channels, d_model, kernel_size=1)
        self.query_embed = nn.Embedding(num_queries, d_model)
        self.class_head = nn.Linear(d_model, num_classes + 1)
        self.box_head = BoxHead(d_model=d_model)

    def forward(self, batch: ImageBatch) -> Predictions:
        """batch: normalised images. Returns L layers of (B, Q, K + 1) logits and (B, Q, 4) boxes."""
        features = self.backbone(batch.images)
        mask = F.interpolate(batch.mask[:, None].float(), size=features.shape[-2:])[:, 0].bool()
        decoded, _ = self.transformer(
            self.input_proj(features),
            self.position(mask),
            mask if batch.padded else None,
            self.query_embed.weight,
        )
        if not self.aux_loss:
            decoded = decoded[-1:]
        return Predictions(logits=self.class_head(decoded), boxes=self.box_head(decoded).sigmoid())
