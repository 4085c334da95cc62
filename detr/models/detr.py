"""DETR, the detection transformer (Carion et al., ECCV 2020), and what grew from it, assembled from parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention.placement import Placement, blocks_for
from detr.models.backbone import Backbone
from detr.models.denoising import Denoising, Noise, who_sees_whom
from detr.models.heads import Head
from detr.models.memory import Memory
from detr.models.neck import ChannelMapper, masks_for
from detr.models.queries import LearnedQueries, ObjectQueries
from detr.models.transformer import Transformer
from detr.types import ImageBatch, Predictions, Target


class DETR(nn.Module):
    """Backbone, transformer and heads that turn every object query into a class and a box.

    backbone: images to one or several feature maps, largest first.
    position: padding mask (B, h, w) to encodings (B, d_model, h, w).
    transformer: encoder and decoder.
    num_classes: K.
    num_queries: Q, the most objects that can be found in one image.
    neck: makes the transformer's maps of the backbone's; called with `in_channels` and `d_model`.
    queries: the kind of object queries; called with `num_queries` and `d_model`.
    attention: further attention blocks by name: what they are, and where in the backbone or after the neck they go.
    denoising: queries made from disturbed targets in training; called with `d_model` and `num_classes`.
    background: the class head has one more output, the last, for no object, as the softmax loss needs; sigmoid losses
        do without.
    refine: each decoder layer moves the anchors for the next one (Deformable DETR: Zhu et al., ICLR 2021).
    look_forward_twice: a layer's boxes also train the layer before (DINO: Zhang et al., ICLR 2023).
    shared_heads: one head for all decoder layers, instead of one for each.
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
        neck: Callable[..., nn.Module] = ChannelMapper,
        queries: Callable[..., ObjectQueries] = LearnedQueries,
        attention: Mapping[str, Placement] | None = None,
        denoising: Callable[..., Denoising] | None = None,
        background: bool = True,
        refine: bool = False,
        look_forward_twice: bool = False,
        shared_heads: bool = True,
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
        self.refine, self.look_forward_twice = refine, look_forward_twice
        d_model = transformer.d_model
        self.neck = neck(in_channels=backbone.channels, d_model=d_model)
        backbone.plug(attention or {})
        at_neck = [blocks_for(attention or {}, "neck", "after", d_model) for _ in range(transformer.num_levels)]
        self.attention = nn.ModuleList(at_neck if any(at_neck) else [])
        self.queries = queries(num_queries=num_queries, d_model=d_model)
        self.denoising = None if denoising is None else denoising(d_model=d_model, num_classes=num_classes)
        self._check_parts()

        def head(num_classes: int) -> Head:
            return Head(d_model=d_model, num_classes=num_classes, background=background)

        number = 1 if shared_heads or not (aux_loss or refine) else len(transformer.decoder.layers)
        self.heads = nn.ModuleList(head(num_classes) for _ in range(number))
        if self.queries.anchor_dims:
            for index in range(number):
                # Where anchors are refined, only the first of them have no size yet.
                self._head(index).start_at_anchors(self.queries.start_size if index == 0 or not refine else 0.0)
        self.proposal_head = None
        if self.queries.two_stage:
            self.proposal_head = head(1 if self.queries.class_agnostic else num_classes)
            self.proposal_head.start_at_anchors(0.0)

    def forward(self, batch: ImageBatch, targets: Sequence[Target] | None = None) -> Predictions:
        """L layers of class logits (B, Q, C) and boxes (B, Q, 4).

        batch: normalised images. targets: what is in them; denoising needs it in training.
        """
        return self.decode(self.encode(batch), targets)

    def encode(self, batch: ImageBatch) -> Memory:
        """What the encoder makes of normalised images."""
        maps = self.neck(self.backbone(batch.images, batch.mask))
        masks = masks_for(batch.mask, maps)
        for level, blocks in enumerate(self.attention[: len(maps)]):
            maps[level] = blocks(maps[level], masks[level])
        positions = [self.position(mask) for mask in masks]
        return self.transformer.encode(maps, positions, masks, padded=bool(batch.padded))

    def decode(self, memory: Memory, targets: Sequence[Target] | None = None) -> Predictions:
        """What the decoder finds in the encoder's memory."""
        queries, proposals = self.queries(memory, self.proposal_head)
        groups, noise = self.queries.groups, None
        if self.training and self.denoising is not None:
            if targets is None:
                raise UserError("DETR: denoising needs targets in training; call model(images, targets).")
            queries, noise = self.denoising(queries, targets, groups)
        elif groups > 1:
            number = queries.content.shape[1] // groups
            group = torch.arange(groups, device=queries.content.device).repeat_interleave(number)
            queries = replace(queries, keep=who_sees_whom(group))
        outputs, references = self.transformer.decoder(
            queries,
            memory,
            self._next_anchors if self.refine else None,
            look_forward_twice=self.look_forward_twice,
        )
        predictions = self._predict(outputs, references)
        if not self.training:
            return predictions
        return replace(_split(predictions, groups, noise), proposals=proposals)

    def _next_anchors(self, layer: int, x: Tensor, anchors: Tensor | None) -> Tensor:
        return _boxes(self._head(layer).box_head(x), anchors)

    def _predict(
        self, outputs: Float[Tensor, "layers batch queries d_model"], references: Sequence[Tensor | None]
    ) -> Predictions:
        layers = range(len(outputs)) if self.aux_loss else [len(outputs) - 1]
        of_layers = []
        for layer in layers:
            logits, offsets = self._head(layer)(outputs[layer])
            of_layers.append({"logits": logits, "boxes": _boxes(offsets, references[layer])})
        return Predictions.stack(of_layers)

    def _head(self, layer: int) -> Head:
        return cast(Head, self.heads[layer if len(self.heads) > 1 else 0])

    def _check_parts(self) -> None:
        """Raises UserError where the parts do not fit together."""
        attention, dims = self.transformer.cross_attention, self.queries.anchor_dims
        boxes = "model/queries=anchors or model/queries=two_stage"
        points = f"model/queries=points or learned_points, {boxes}"
        needs = [
            (attention != "standard", dims >= 2, f"{attention} cross-attention needs queries with anchors", points),
            (self.refine, dims >= 2, "refine needs queries with anchors", points),
            (self.transformer.decoder.modulates, dims == 4, "modulate needs queries with boxes as anchors", boxes),
            (
                self.denoising is not None,
                dims == 4 and self.queries.follows_anchors,
                "denoising needs queries with boxes as anchors, whose positions follow them",
                f"{boxes} (selection mixed)",
            ),
            (self.look_forward_twice, self.refine, "look_forward_twice needs refinement", "model.refine=true"),
            (
                self.refine,
                self.aux_loss or self.look_forward_twice,
                "refine needs every layer to be trained",
                "model.aux_loss=true or model.look_forward_twice=true",
            ),
        ]
        for wanted, fits, message, remedy in needs:
            if wanted and not fits:
                raise UserError(f"DETR: {message}. Set {remedy}.")


def _boxes(offsets: Tensor, reference: Tensor | None) -> Tensor:
    """Boxes from offsets in logits around points, boxes, or nothing."""
    if reference is None:
        return offsets.sigmoid()
    dims = reference.shape[-1]
    offsets = offsets.float()  # half precision could not tell 1 - eps from 1
    moved = offsets[..., :dims] + reference.float().logit(eps=1e-5)
    return torch.cat((moved, offsets[..., dims:]), dim=-1).sigmoid()


def _split(predictions: Predictions, groups: int, noise: Noise | None) -> Predictions:
    """Take denoising queries and further groups out of the sequence of queries."""
    denoising = None
    if noise is not None:
        denoising = noise.denoised(predictions.select(queries=slice(noise.count)))
        predictions = predictions.select(queries=slice(noise.count, None))
    further = None
    if groups > 1:
        size = predictions.logits.shape[2] // groups
        rest = predictions.select(queries=slice(size, None))
        further = rest.map(lambda tensor: torch.cat(tensor.chunk(groups - 1, dim=2)))
        predictions = predictions.select(queries=slice(size))
    return replace(predictions, groups=further, denoising=denoising)
