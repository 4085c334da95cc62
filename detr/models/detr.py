"""DETR, the detection transformer (Carion et al., ECCV 2020), and what grew from it, assembled from parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention.placement import Placement, blocks_for
from detr.models.backbones.base import Backbone
from detr.models.decoders.base import Decoder, Reference
from detr.models.denoising import DenoisingLayout, DenoisingQueries, self_attention_mask
from detr.models.encoders.base import Encoder
from detr.models.heads import Head
from detr.models.mask_heads import MaskHead
from detr.models.neck import ChannelMapper
from detr.models.queries import LearnedQueries, ObjectQueries
from detr.models.values import Detail, Memory, masks_for
from detr.types import ImageBatch, Predictions, Target


class DETR(nn.Module):
    """Backbone, neck, encoder, queries, decoder and heads: every object query becomes a class and a box.

    backbone: images to one or several feature maps, largest first.
    encoder: the neck's maps to the memory.
    decoder: queries and memory to the outputs of its layers.
    num_classes: K.
    num_queries: Q, the most objects that can be found in one image.
    neck: makes the encoder's maps of the backbone's; called with `in_channels` and `d_model`.
    queries: the kind of object queries; called with `num_queries` and `d_model`.
    attention: further attention blocks by name: what they are, and where in the backbone or after the neck they go.
    denoising: queries made from disturbed targets in training; called with `d_model` and `num_classes`.
    head: what makes predictions of a decoder layer's output; called with `d_model`, `num_classes` and `background`.
    proposal_head: what makes proposals of the encoder's tokens, for two-stage queries; called likewise.
    masks: what makes a mask of each query of the last layer; called with what MaskHead says. None: boxes alone.
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
        encoder: Encoder,
        decoder: Decoder,
        num_classes: int,
        num_queries: int = 100,
        neck: Callable[..., nn.Module] = ChannelMapper,
        queries: Callable[..., ObjectQueries] = LearnedQueries,
        attention: Mapping[str, Placement] | None = None,
        denoising: Callable[..., DenoisingQueries] | None = None,
        head: Callable[..., Head] = Head,
        proposal_head: Callable[..., Head] = Head,
        masks: Callable[..., MaskHead] | None = None,
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
        self.backbone, self.encoder, self.decoder = backbone, encoder, decoder
        self.num_classes, self.num_queries, self.aux_loss = num_classes, num_queries, aux_loss
        self.refine, self.look_forward_twice = refine, look_forward_twice
        d_model = encoder.d_model
        self.neck = neck(in_channels=[backbone.channels[i] for i in backbone.selected], d_model=encoder.in_channels)
        self._plug(attention or {})
        self.queries = queries(num_queries=num_queries, d_model=d_model)
        self.denoising = None if denoising is None else denoising(d_model=d_model, num_classes=num_classes)
        self._check_parts()
        number = 1 if shared_heads or not (aux_loss or refine) else len(decoder.layers)
        self.heads = nn.ModuleList(
            head(d_model=d_model, num_classes=num_classes, background=background) for _ in range(number)
        )
        self._check_head(self._head(0))
        self._start_at_anchors()
        self.proposal_head = None
        if self.queries.two_stage:
            classes = 1 if self.queries.class_agnostic else num_classes
            self.proposal_head = proposal_head(d_model=d_model, num_classes=classes, background=background)
            self.proposal_head.class_agnostic = self.queries.class_agnostic
            self.proposal_head.start_at_anchors(0.0)
        self.mask_head = None
        if masks is not None:
            self.mask_head = masks(
                d_model=d_model,
                in_channels=encoder.in_channels,
                channels=backbone.channels,
                strides=backbone.strides,
                selected=backbone.selected,
            )

    @property
    def has_masks(self) -> bool:
        """Whether it finds masks too."""
        return self.mask_head is not None

    def forward(self, batch: ImageBatch, targets: Sequence[Target] | None = None) -> Predictions:
        """L layers of class logits (B, Q, C) and boxes (B, Q, 4).

        batch: uint8 images, or floats that are normalized as the backbone needs it. targets: what is in them; denoising
        needs it in training.
        """
        return self.decode(self.encode(batch), targets)

    def encode(self, batch: ImageBatch) -> Memory:
        """What the encoder makes of images, which are uint8 or normalized."""
        backbone = self.backbone
        batch = batch.normalized(backbone.mean, backbone.std).padded_to(backbone.size_divisor)
        found = backbone(batch.images, batch.mask)
        maps = self.neck([found[index] for index in backbone.selected])
        if len(maps) != self.encoder.num_levels:
            raise UserError(
                f"{type(self.encoder).__name__}: wanted num_levels={len(maps)}, the number of maps that come in, got "
                f"{self.encoder.num_levels}. Leave model.encoder.num_levels to follow model.neck.num_levels."
            )
        masks = masks_for(batch.mask, maps)
        for level, blocks in enumerate(self.attention):
            maps[level] = blocks(maps[level], masks[level])
        memory = self.encoder(maps, masks, padded=bool(batch.padded))
        if self.mask_head is None:
            return memory
        height, width = batch.images.shape[-2:]
        detail = Detail(maps=found, neck=maps, mask=batch.mask if batch.padded else None, size=(height, width))
        return replace(memory, detail=detail)

    def decode(self, memory: Memory, targets: Sequence[Target] | None = None) -> Predictions:
        """What the decoder finds in the encoder's memory."""
        queries, proposals = self.queries(memory, self.proposal_head)
        groups, layout = self.queries.groups, None
        if self.training and self.denoising is not None:
            if targets is None:
                raise UserError("DETR: denoising needs targets in training; call model(images, targets).")
            queries, layout = self.denoising(queries, targets, groups)
        elif groups > 1:
            number = queries.content.shape[1] // groups
            group = torch.arange(groups, device=queries.content.device).repeat_interleave(number)
            queries = replace(queries, keep=self_attention_mask(group))
        outputs, references = self.decoder(
            queries,
            memory,
            self._refine if self.refine else None,
            look_forward_twice=self.look_forward_twice,
        )
        predictions = self._predict(outputs, references)
        if self.training:
            predictions = replace(_split(predictions, groups, layout), proposals=proposals)
        return self._with_masks(predictions, outputs[-1], 0 if layout is None else layout.count, memory)

    def _with_masks(self, predictions: Predictions, outputs: Tensor, start: int, memory: Memory) -> Predictions:
        """The same with masks of the queries that are matched. start: of these in the last layer's outputs."""
        if self.mask_head is None or memory.detail is None:
            return predictions
        queries = outputs[:, start : start + predictions.logits.shape[2]]
        inputs = (queries, predictions.boxes[-1], memory, memory.detail)
        predictions = replace(predictions, mask_size=memory.detail.size)
        if not self.training:
            return replace(predictions, masks=self.mask_head(*inputs)[None])
        return replace(predictions, mask_of=_as_here(partial(self.mask_head.of_pairs, *inputs), outputs.device.type))

    def _refine(self, layer: int, x: Tensor, anchors: Tensor | None) -> Tensor:
        return self._head(layer).refine(x, anchors)

    def _predict(
        self, outputs: Float[Tensor, "layers batch queries d_model"], references: Sequence[Reference]
    ) -> Predictions:
        layers = range(len(outputs)) if self.aux_loss else [len(outputs) - 1]
        predictions = Predictions.stack([self._head(layer)(outputs[layer], references[layer]) for layer in layers])
        preliminary = self._head(0).preliminary(outputs[0], references[0]) if self.training else None
        if preliminary is None:
            return predictions
        return replace(predictions, preliminary=Predictions.stack([preliminary]))

    def _head(self, layer: int) -> Head:
        return cast(Head, self.heads[layer if len(self.heads) > 1 else 0])

    def _plug(self, attention: Mapping[str, Placement]) -> None:
        """Add attention blocks to the backbone and after the neck."""
        self.backbone.plug(attention)
        channels, levels = self.encoder.in_channels, self.encoder.num_levels
        at_neck = [blocks_for(attention, "neck", "after", channels) for _ in range(levels)]
        self.attention = nn.ModuleList(at_neck if any(at_neck) else [])

    def _start_at_anchors(self) -> None:
        if not self.queries.anchor_dims:
            return
        for index in range(len(self.heads)):
            # Where anchors are refined, only the first of them have no size yet.
            self._head(index).start_at_anchors(self.queries.start_size if index == 0 or not self.refine else 0.0)

    def _check_head(self, head: Head) -> None:
        """Raises UserError where heads do not give what the decoder refines."""
        if head.refines != self.decoder.refines:
            raise UserError(
                f"DETR: {type(self.decoder).__name__} needs heads that refine {self.decoder.refines}, got "
                f"{type(head).__name__}. Set model/decoder=fine with model.head as in model=d_fine_l, or neither."
            )

    def _check_parts(self) -> None:
        """Raises UserError where the parts do not fit together."""
        dims = self.queries.anchor_dims
        boxes = "model/queries=anchors or model/queries=two_stage"
        points = f"model/queries=points or learned_points, {boxes}"
        decoder, kind = self.decoder, type(self.decoder).__name__
        width = self.encoder.d_model
        needs = [
            (True, decoder.d_model == width, f"{kind} needs the encoder's d_model", f"model.decoder.d_model={width}"),
            (decoder.anchor_dims == 2, dims >= 2, f"{kind} needs queries with anchors", points),
            (decoder.anchor_dims == 4, dims == 4, f"{kind} needs queries with boxes as anchors", boxes),
            (decoder.refines != "boxes", self.refine, f"{kind} needs refinement", "model.refine=true"),
            (
                decoder.refines != "boxes",
                not self.look_forward_twice,
                f"{kind} has no use for look_forward_twice, since its layers train the layers before them anyway",
                "model.look_forward_twice=false",
            ),
            (self.refine, dims >= 2, "refine needs queries with anchors", points),
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
            (
                decoder.eval_layers not in (None, len(decoder.layers)),
                self.aux_loss,
                "eval_layers needs every layer to be trained to predict",
                "model.aux_loss=true",
            ),
        ]
        for wanted, fits, message, remedy in needs:
            if wanted and not fits:
                raise UserError(f"DETR: {message}. Set {remedy}.")


def _as_here(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """A function that runs in the precision of now whenever it is called."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def called(*args: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=enabled):
            return function(*args)

    return called


def _split(predictions: Predictions, groups: int, layout: DenoisingLayout | None) -> Predictions:
    """Take denoising queries and further groups out of the sequence of queries."""
    denoising = None
    if layout is not None:
        denoising = layout.denoised(predictions.select(queries=slice(layout.count)))
        predictions = predictions.select(queries=slice(layout.count, None))
    further = None
    if groups > 1:
        size = predictions.logits.shape[2] // groups
        rest = predictions.select(queries=slice(size, None))
        further = rest.map(lambda tensor: torch.cat(tensor.chunk(groups - 1, dim=2)))
        predictions = predictions.select(queries=slice(size))
    return replace(predictions, groups=further, denoising=denoising)
