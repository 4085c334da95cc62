"""Denoising queries: disturbed targets that the decoder is trained to restore, beside the queries that are matched."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from detr.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from detr.errors import UserError
from detr.models.rows import Rowed, Rows
from detr.models.values import Queries
from detr.types import DenoisingPredictions, Matches, Predictions, Target

_LONE = (0.5, 0.5, 0.1, 0.1)  # the box that is disturbed where there is no other


@dataclass(frozen=True)
class DenoisingLayout:
    """Where the denoising queries of a batch are, V in all, and which of them restores which target.

    count: places for them in each image's sequence; images with fewer targets than others can leave some empty.
    copies: how many times each target was disturbed.
    image, place: (V,) where in the batch each query is.
    query, target: (M,) pairs, as in Matches; queries are counted over the batch.
    """

    count: int
    copies: int
    image: Int64[Tensor, " queries"]
    place: Int64[Tensor, " queries"]
    query: Int64[Tensor, " pairs"]
    target: Int64[Tensor, " pairs"]

    def denoised(self, predictions: Predictions) -> DenoisingPredictions:
        """What the decoder made of the denoising queries. predictions: of all places."""
        layers = len(predictions.logits)
        return DenoisingPredictions(
            predictions=predictions.map(lambda tensor: tensor[:, self.image, self.place].unsqueeze(1)),
            matches=Matches(
                image=torch.zeros_like(self.target),
                query=self.query.expand(layers, -1),
                target=self.target.expand(layers, -1),
            ),
            copies=self.copies,
        )


@dataclass(frozen=True)
class Noise:
    """What the denoising queries of a batch are disturbed by, drawn evenly; a place for each of them.

    redraw: (B, P) in [0, 1); below `label_noise` the label is drawn anew. label: (B, P) the one drawn.
    part, sign: (B, P, 4) how far each coordinate moves, in [0, 1), and to which side, -1 or 1.
    """

    redraw: Float[Tensor, "batch places"]
    label: Int64[Tensor, "batch places"]
    part: Float[Tensor, "batch places 4"]
    sign: Float[Tensor, "batch places 4"]


class DenoisingQueries(Rowed):
    """Queries from disturbed targets, with negative ones for contrast (DINO: Zhang et al., ICLR 2023).

    Each copy of an image's targets takes as many places, group by group, as the image of a batch with most targets
    needs, all positive ones before all negative ones. What remains empty in other images can be filled up.

    num_queries: about how many restore a target, in an image; the targets are copied to fill them, at least once.
    label_noise: probability that a label is drawn anew.
    box_noise: each side of a box moves by up to this share of half its width or height.
    contrastive: beside each copy a negative one, moved by between 1 and 2 times as much, that is to find nothing.
    swap_sides: where opposite sides of a negative have passed one another they change places (D-FINE); without it a
        box as narrow as `eps` allows remains between them (DINO, RT-DETR).
    filling: center and size of the boxes that fill empty places: 0.5 in DINO and DN-DETR, 0 in RT-DETR, the content 0.
        They are seen by the others of their copy and, with contrast, trained to find nothing. None leaves the places
        out, so that the result does not depend on how many targets the other images of a batch have.
    eps: coordinates of boxes are at least about this far from 0 and 1, as in `inverse_sigmoid`.
    extra_label: embed one more label than there are classes, the last, as published weights do. It is zeros, like the
        content of empty places, and no query has it.
    without_objects: where no image of a batch has an object, each gets a copy of a box in its middle, with sides of a
        tenth, that is to find nothing (RT-DETRv2); without it there are no denoising queries then. Needs `filling`.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_classes: int,
        num_queries: int = 100,
        label_noise: float = 0.25,
        box_noise: float = 1.0,
        contrastive: bool = True,
        swap_sides: bool = True,
        filling: float | None = None,
        eps: float = 1e-5,
        extra_label: bool = False,
        without_objects: bool = False,
    ) -> None:
        super().__init__()
        if without_objects and (filling is None or not contrastive):
            raise UserError("DenoisingQueries: without_objects needs filling and contrastive. Set filling=0.0.")
        self.num_classes, self.num_queries = num_classes, num_queries
        self.label_noise, self.box_noise, self.contrastive = label_noise, box_noise, contrastive
        self.swap_sides, self.filling, self.eps = swap_sides, filling, eps
        self.without_objects = without_objects
        self.labels = nn.Embedding(num_classes + extra_label, d_model, padding_idx=num_classes if extra_label else None)

    def rows(self) -> dict[str, Rows]:
        return {"labels.weight": Rows("classes", further=self.labels.num_embeddings - self.num_classes)}

    @torch.compiler.disable  # the numbers of targets decide its shapes
    def forward(self, queries: Queries, targets: Sequence[Target], num_groups: int) -> tuple[Queries, DenoisingLayout]:
        """Put the denoising queries before the others.

        queries: of `num_groups` groups, with anchors. targets: of each image.
        """
        counts = torch.tensor([len(target) for target in targets])
        lone = self.without_objects and not counts.any()
        most, device = max(int(counts.max()), int(lone)), queries.content.device
        copies = 1 if lone else self.copies(most)
        times = copies * (2 if self.contrastive else 1)  # in each copy all positive ones, then all negative ones
        valid = (torch.arange(most) < counts[:, None]).repeat(1, times)
        negative = ((torch.arange(times) % 2 == 1) & self.contrastive).repeat_interleave(most)
        labels = pad_sequence([target.labels for target in targets], batch_first=True).to(device)
        boxes = pad_sequence([target.boxes for target in targets], batch_first=True).to(device)
        if lone:
            labels, boxes = labels.new_zeros(len(targets), 1), boxes.new_tensor(_LONE).expand(len(targets), 1, 4)
        labels, boxes = labels.repeat(1, times), boxes.repeat(1, times, 1)
        noise, there = self.draw(labels), valid.to(device)[..., None]
        content = self.embed(torch.where(noise.redraw < self.label_noise, noise.label, labels)) * there
        boxes = self.disturb(boxes, noise, negative.to(device))
        if not lone:
            boxes = torch.where(there, boxes, self.filling or 0.0)

        # Indices are worked out before they go to the device, which would have to wait for each.
        everywhere = torch.ones_like(valid)
        image, place = (everywhere if self.filling is not None and self.contrastive else valid).nonzero(as_tuple=True)
        target = torch.arange(int(counts.sum())).split(counts.tolist())
        layout = DenoisingLayout(
            count=len(negative),
            copies=copies,
            image=image.to(device),
            place=place.to(device),
            query=(valid & ~negative)[image, place].nonzero()[:, 0].to(device),
            target=torch.cat([of_image.repeat(copies) for of_image in target]).to(device),
        )
        group = torch.arange(queries.content.shape[1], device=device) // (queries.content.shape[1] // num_groups)
        copy = torch.arange(copies, device=device).repeat_interleave(len(negative) // copies)
        seen = valid if self.filling is None else everywhere[:1]
        assert queries.anchors is not None
        extended = replace(
            queries,
            content=torch.cat((content, queries.content), dim=1),
            anchors=torch.cat((inverse_sigmoid(boxes, self.eps).sigmoid(), queries.anchors), dim=1),
            keep=self_attention_mask(group, copy=copy, valid=seen.to(device)),
        )
        return extended, layout

    def copies(self, most: int) -> int:
        """How many times each target is disturbed. most: targets of the image with most of them."""
        return max(1, self.num_queries // max(most, 1))

    def draw(self, labels: Int64[Tensor, "batch places"]) -> Noise:
        """What to disturb these labels, and a box with each of them, by."""
        shape, device = (*labels.shape, 4), labels.device
        return Noise(
            redraw=torch.rand(labels.shape, device=device),
            label=torch.randint_like(labels, self.num_classes),
            sign=torch.randint(2, shape, device=device) * 2.0 - 1.0,
            part=torch.rand(shape, device=device),
        )

    def embed(self, labels: Int64[Tensor, "batch places"]) -> Float[Tensor, "batch places d_model"]:
        """The content of denoising queries with these labels."""
        return self.labels(labels)

    def disturb(
        self, boxes: Float[Tensor, "batch places 4"], noise: Noise, negative: Bool[Tensor, " places"]
    ) -> Float[Tensor, "batch places 4"]:
        """Boxes (cxcywh) moved by the noise. A width or height below 0, of a box whose sides have passed, means 0."""
        half = boxes[..., 2:].repeat(1, 1, 2) / 2
        moves = noise.sign * (noise.part + negative[:, None]) * half * self.box_noise
        low, high = (cxcywh_to_xyxy(boxes) + moves).clamp(0, 1).chunk(2, dim=-1)
        if self.swap_sides:
            low, high = torch.minimum(low, high), torch.maximum(low, high)
        return xyxy_to_cxcywh(torch.cat((low, high), dim=-1))


class DNDenoisingQueries(DenoisingQueries):
    """Queries from disturbed targets as in DN-DETR (Li et al., CVPR 2022): centers shift, sizes are scaled.

    A last feature of the content, 1, says that they are such. In the matched queries it is 0: give these a content of
    that kind too (`AnchorQueries`, learned_content).

    num_copies: how many times each target is disturbed.
    label_noise: probability that a label is drawn anew.
    box_noise: a center moves by up to this share of half the size, a size changes by up to this share.
    filling, eps: as in DenoisingQueries; there are no negatives.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_classes: int,
        num_copies: int = 5,
        label_noise: float = 0.2,
        box_noise: float = 0.4,
        filling: float | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(
            d_model=d_model - 1,
            num_classes=num_classes,
            label_noise=label_noise,
            box_noise=box_noise,
            contrastive=False,
            filling=filling,
            eps=eps,
        )
        if num_copies < 1:
            raise UserError(f"DNDenoisingQueries: wanted num_copies of at least 1, got {num_copies}.")
        self.num_copies = num_copies

    def copies(self, most: int) -> int:
        return self.num_copies

    def embed(self, labels: Int64[Tensor, "batch places"]) -> Float[Tensor, "batch places d_model"]:
        return F.pad(self.labels(labels), (0, 1), value=1.0)

    def disturb(
        self, boxes: Float[Tensor, "batch places 4"], noise: Noise, negative: Bool[Tensor, " places"]
    ) -> Float[Tensor, "batch places 4"]:
        reach = boxes[..., 2:].repeat(1, 1, 2) * boxes.new_tensor([0.5, 0.5, 1.0, 1.0])
        return boxes + noise.sign * noise.part * reach * self.box_noise


def self_attention_mask(
    group: Int64[Tensor, " queries"],
    *,
    copy: Int64[Tensor, " noise"] | None = None,
    valid: Bool[Tensor, "_ noise"] | None = None,
) -> Bool[Tensor, "_ 1 all all"]:
    """The self-attention mask of a training step: True where a query (row) may attend to another.

    Denoising queries come first. They know the targets, so no other query sees them; those of one copy see one another
    and the first group. Queries of a group see their group.

    group: of each matched query. copy: of each denoising query. valid: whether others may see it; one that is left
    empty in an image with fewer targets is seen only by itself.
    """
    if copy is None or valid is None:
        return (group[:, None] == group)[None, None]
    owner = torch.cat((-1 - copy, group))
    allowed = (owner[:, None] == owner) | ((owner[:, None] < 0) & (owner == 0))
    seen = torch.cat((valid, valid.new_ones(len(valid), len(group))), dim=1)
    itself = torch.eye(len(owner), dtype=torch.bool, device=owner.device)
    return ((allowed & seen[:, None, :]) | itself)[:, None]
