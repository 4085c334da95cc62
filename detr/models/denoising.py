"""Denoising queries: disturbed targets that the decoder is trained to restore, beside the queries that are matched."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from detr.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr.models.values import Queries
from detr.types import DenoisingPredictions, Matches, Predictions, Target


@dataclass(frozen=True)
class DenoisingLayout:
    """Where the denoising queries of a batch are, V in all, and which of them restores which target.

    count: places for them in each image's sequence; images with fewer targets than others leave some empty.
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


class DenoisingQueries(nn.Module):
    """Queries from disturbed targets (DN-DETR: Li et al., CVPR 2022; contrastive, DINO: Zhang et al., ICLR 2023).

    Noise is made as in DINO, with or without contrast.

    num_queries: about how many restore a target, in an image; the targets are copied to fill them, at least once.
    label_noise: probability that a label is drawn anew.
    box_noise: each side of a box moves by up to this share of half its width or height.
    contrastive: beside each copy a negative one, moved by between 1 and 2 times as much, that is to find nothing.
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
    ) -> None:
        super().__init__()
        self.num_classes, self.num_queries = num_classes, num_queries
        self.label_noise, self.box_noise, self.contrastive = label_noise, box_noise, contrastive
        self.labels = nn.Embedding(num_classes, d_model)

    @torch.compiler.disable  # the numbers of targets decide its shapes
    def forward(self, queries: Queries, targets: Sequence[Target], num_groups: int) -> tuple[Queries, DenoisingLayout]:
        """Put the denoising queries before the others.

        queries: of `num_groups` groups, with anchors. targets: of each image.
        """
        counts = torch.tensor([len(target) for target in targets])
        most, device = int(counts.max()), queries.content.device
        copies = max(1, self.num_queries // max(most, 1))
        times = copies * (2 if self.contrastive else 1)  # in each copy all positive ones, then all negative ones
        valid = torch.arange(most) < counts[:, None]
        negative = (torch.arange(times) % 2 == 1) & self.contrastive
        labels = pad_sequence([target.labels for target in targets], batch_first=True).to(device)
        boxes = pad_sequence([target.boxes for target in targets], batch_first=True).to(device)
        labels, boxes = self._disturb(
            labels.repeat(1, times), boxes.repeat(1, times, 1), negative.repeat_interleave(most).to(device)[:, None]
        )

        # Indices are worked out before they go to the device, which would have to wait for each.
        valid = valid.repeat(1, times)
        image, place = valid.nonzero(as_tuple=True)
        target = torch.arange(int(counts.sum())).split(counts.tolist())
        positive = ~negative.repeat_interleave(most)[place]
        layout = DenoisingLayout(
            count=valid.shape[1],
            copies=copies,
            image=image.to(device),
            place=place.to(device),
            query=positive.nonzero()[:, 0].to(device),
            target=torch.cat([of_image.repeat(copies) for of_image in target]).to(device),
        )
        group = torch.arange(queries.content.shape[1], device=device) // (queries.content.shape[1] // num_groups)
        copy = torch.arange(copies, device=device).repeat_interleave(valid.shape[1] // copies)
        assert queries.anchors is not None
        extended = replace(
            queries,
            content=torch.cat((self.labels(labels), queries.content), dim=1),
            anchors=torch.cat((boxes, queries.anchors), dim=1),
            keep=self_attention_mask(group, copy=copy, valid=valid.to(device)),
        )
        return extended, layout

    def _disturb(self, labels: Tensor, boxes: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        redrawn = torch.rand(labels.shape, device=labels.device) < self.label_noise
        labels = torch.where(redrawn, torch.randint_like(labels, self.num_classes), labels)
        sign = torch.randint(2, boxes.shape, device=boxes.device) * 2 - 1
        half = boxes[..., 2:].repeat(1, 1, 2) / 2
        corners = cxcywh_to_xyxy(boxes) + sign * (torch.rand_like(boxes) + negative) * half * self.box_noise
        low, high = corners.clamp(0, 1).chunk(2, dim=-1)  # far edges can have changed places
        return labels, xyxy_to_cxcywh(torch.cat((torch.minimum(low, high), torch.maximum(low, high)), dim=-1))


def self_attention_mask(
    group: Int64[Tensor, " queries"],
    *,
    copy: Int64[Tensor, " noise"] | None = None,
    valid: Bool[Tensor, "batch noise"] | None = None,
) -> Bool[Tensor, "_ 1 all all"]:
    """The self-attention mask of a training step: True where a query (row) may attend to another.

    Denoising queries come first. They know the targets, so no other query sees them; those of one copy see one another
    and the first group. Queries of a group see their group.

    group: of each matched query. copy: of each denoising query. valid: whether it is one, and not filled up for an
    image with fewer targets; one that is not is seen only by itself.
    """
    if copy is None or valid is None:
        return (group[:, None] == group)[None, None]
    owner = torch.cat((-1 - copy, group))
    allowed = (owner[:, None] == owner) | ((owner[:, None] < 0) & (owner == 0))
    seen = torch.cat((valid, valid.new_ones(len(valid), len(group))), dim=1)
    itself = torch.eye(len(owner), dtype=torch.bool, device=owner.device)
    return ((allowed & seen[:, None, :]) | itself)[:, None]
