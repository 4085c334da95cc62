"""Object queries: where the decoder starts from."""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.heads import Head
from detr.models.layers.mlp import MLP, MLPActivation
from detr.models.layers.positions import anchor_embedding, sine_embedding
from detr.models.rows import Rowed, Rows
from detr.models.values import Memory, Queries
from detr.types import Predictions


class ObjectQueries(Rowed):
    """What every kind of queries has in common.

    num_queries: queries in a group.
    num_groups: groups in training, which do not see one another (Group DETR: Chen et al., ICCV 2023; H-DETR: Jia et
        al., CVPR 2023); afterwards only the first one is used.
    anchor_dims: what the anchors are: 0 none, 2 points, 4 boxes.
    two_stage: whether they need a head for what the encoder proposes.
    class_agnostic: whether that head only separates objects from background.
    follows_anchors: whether positions are embedded anew from the anchors, so that more queries can be put beside them.
    start_size: width and height, in logits, of the first boxes around points.
    own: the embeddings that each query, of each group, has a row of.
    """

    anchor_dims = 4
    two_stage = False
    class_agnostic = False
    follows_anchors = True
    start_size = 0.0
    own: tuple[str, ...] = ()

    def __init__(self, *, num_queries: int, d_model: int, num_groups: int) -> None:
        super().__init__()
        if num_groups < 1:
            raise UserError(f"{type(self).__name__}: wanted num_groups of at least 1, got {num_groups}.")
        self.num_queries, self.d_model, self.num_groups = num_queries, d_model, num_groups

    @property
    def groups(self) -> int:
        """Groups that are used now."""
        return self.num_groups if self.training else 1

    def rows(self) -> dict[str, Rows]:
        return {f"{name}.weight": Rows("queries", groups=self.num_groups) for name in self.own}

    def forward(self, memory: Memory, head: Head | None) -> tuple[Queries, Predictions | None]:
        """The queries, and the proposals that they start from, where they are two-stage.

        head: applied to the encoder's tokens, for two-stage queries only.
        """
        raise NotImplementedError


class LearnedQueries(ObjectQueries):
    """A learned position for each query; content 0 (DETR: Carion et al., ECCV 2020).

    points: how each query's position gives the point that its box is an offset from: `mlp` (Conditional DETR),
        `linear` (Deformable DETR, whose first boxes are small), or null for none (DETR).
    learned_content: learn the content too (Deformable DETR).
    """

    follows_anchors = False
    own = ("position", "content")

    def __init__(
        self,
        *,
        num_queries: int,
        d_model: int,
        num_groups: int = 1,
        points: Literal["mlp", "linear"] | None = None,
        learned_content: bool = False,
    ) -> None:
        super().__init__(num_queries=num_queries, d_model=d_model, num_groups=num_groups)
        self.anchor_dims = 0 if points is None else 2
        self.position = nn.Embedding(num_queries * num_groups, d_model)
        self.content = nn.Embedding(num_queries * num_groups, d_model) if learned_content else None
        self.points: nn.Module | None = None
        if points == "mlp":
            self.points = MLP(d_model, d_model, 2, layers=2)
            self.points.apply(_xavier)
        elif points == "linear":
            self.start_size = -2.0
            self.points = nn.Linear(d_model, 2)
            self.points.apply(_xavier)
            nn.init.zeros_(self.points.bias)

    def forward(self, memory: Memory, head: Head | None = None) -> tuple[Queries, None]:
        def rows(embedding: nn.Embedding) -> Tensor:
            return embedding.weight[: self.groups * self.num_queries].expand(memory.tokens.shape[0], -1, -1)

        position = rows(self.position)
        content = torch.zeros_like(position) if self.content is None else rows(self.content)
        anchors = None if self.points is None else self.points(position).sigmoid()
        return Queries(content=content, anchors=anchors, position=lambda _: position), None


class AnchorPosition(nn.Module):
    """Positional embeddings from anchors: their sine embedding through a perceptron (DAB-DETR)."""

    def __init__(self, *, d_model: int) -> None:
        super().__init__()
        self.mlp = MLP(2 * d_model, d_model, d_model, layers=2)
        self.mlp.apply(_xavier)

    def forward(
        self, anchors: Float[Tensor, "batch queries 4"], shares: Float[Tensor, "batch 1 4"] | None = None
    ) -> Float[Tensor, "batch queries d_model"]:
        """shares: what part of the padded image's width and height (w, h, w, h) is image, to embed anchors in that."""
        if shares is not None:
            anchors = anchors * shares
        return self.mlp(anchor_embedding(anchors, self.mlp.d_out // 2))


class AnchorQueries(ObjectQueries):
    """Learned boxes that the decoder moves layer by layer; content 0 (DAB-DETR: Liu et al., ICLR 2022).

    learned_content: learn one content, which all queries have; its last feature is 0, which says that they are no
        denoising queries (DN-DETR: Li et al., CVPR 2022).
    """

    own = ("anchors",)

    def __init__(self, *, num_queries: int, d_model: int, num_groups: int = 1, learned_content: bool = False) -> None:
        super().__init__(num_queries=num_queries, d_model=d_model, num_groups=num_groups)
        self.anchors = nn.Embedding(num_queries * num_groups, 4)
        self.content = nn.Embedding(1, d_model - 1) if learned_content else None
        self.position = AnchorPosition(d_model=d_model)

    def forward(self, memory: Memory, head: Head | None = None) -> tuple[Queries, None]:
        batch, rows = memory.tokens.shape[0], self.num_queries * self.groups
        anchors = self.anchors.weight[:rows].sigmoid().expand(batch, -1, -1)
        content = anchors.new_zeros(1, self.d_model)
        if self.content is not None:
            content = F.pad(self.content.weight, (0, 1))
        content = content.expand(batch, rows, -1)
        return Queries(content=content, anchors=anchors, position=self.position), None


class BoxPosition(nn.Module):
    """Positional embeddings from boxes alone, by a perceptron (RT-DETR: Zhao et al., CVPR 2024).

    layers: with 2 its hidden layer has twice d_model features, as in RT-DETR; more have d_model (3 in DEIM: Huang et
        al., CVPR 2025).
    """

    def __init__(self, *, d_model: int, layers: int, activation: MLPActivation = "relu") -> None:
        super().__init__()
        self.mlp = MLP(4, 2 * d_model if layers == 2 else d_model, d_model, layers=layers, activation=activation)
        self.mlp.apply(_xavier)

    def forward(self, anchors: Float[Tensor, "batch queries 4"]) -> Float[Tensor, "batch queries d_model"]:
        return self.mlp(anchors)


class TwoStageQueries(ObjectQueries):
    """The boxes that the encoder's tokens propose, the best first (Deformable DETR: Zhu et al., ICLR 2021).

    Each token proposes one box around its cell. A cell in the padding or at the very edge proposes none.

    selection: `mixed` learns the content and takes only the anchors from the proposals (DINO: Zhang et al., ICLR 2023);
        `pure` makes content and position of the proposals' boxes (Deformable DETR), which then only separate objects
        from background; `tokens` takes the tokens' features as content, and makes positions of the boxes alone
        (RT-DETR: Zhao et al., CVPR 2024). Only the proposals that are selected are trained, as in DINO.
    ranking: what is compared: `best`, the score of a token's best class; `agnostic`, that of any object, for which the
        proposals have one class; `pairs`, all scores of all tokens, so that a token of several classes may be selected
        several times (RT-DETRv2: Lv et al., 2024, which names them default, agnostic and one2many).
    position_layers, position_activation: of the perceptron that makes positions of boxes, of `tokens` only.
    published_padding: cells that propose nothing can be selected too, as the box (1, 1, 1, 1), and positions are
        embedded from anchors as shares of the padded image, as published DINO does. An image's results then depend on
        what it is batched with.
    """

    two_stage = True
    own = ("content",)

    def __init__(
        self,
        *,
        num_queries: int,
        d_model: int,
        num_groups: int = 1,
        selection: Literal["mixed", "pure", "tokens"] = "mixed",
        ranking: Literal["best", "agnostic", "pairs"] = "best",
        position_layers: int = 2,
        position_activation: MLPActivation = "relu",
        published_padding: bool = False,
    ) -> None:
        super().__init__(num_queries=num_queries, d_model=d_model, num_groups=num_groups)
        self.published_padding = published_padding
        self.selection, self.ranking = selection, "agnostic" if selection == "pure" else ranking
        self.class_agnostic, self.follows_anchors = self.ranking == "agnostic", selection != "pure"
        if selection != "mixed" and num_groups > 1:
            raise UserError(
                f"TwoStageQueries: groups of {selection} selection would be all alike. Set selection=mixed or "
                "num_groups=1."
            )
        self.proj, self.norm = nn.Linear(d_model, d_model), nn.LayerNorm(d_model)
        if selection == "pure":
            self.embed = nn.Sequential(nn.Linear(2 * d_model, 2 * d_model), nn.LayerNorm(2 * d_model))
        elif selection == "mixed":
            self.content = nn.Embedding(num_queries * num_groups, d_model)
            self.position: nn.Module = AnchorPosition(d_model=d_model)
        else:
            self.position = BoxPosition(d_model=d_model, layers=position_layers, activation=position_activation)
        self.apply(_xavier)

    def forward(self, memory: Memory, head: Head | None) -> tuple[Queries, Predictions]:
        """Where there are fewer tokens than queries, there are as many queries as tokens."""
        assert head is not None
        cells, usable = self._cells(memory)
        tokens = self.norm(self.proj(memory.tokens.masked_fill(~usable[..., None], 0.0)))
        logits, offsets = head.class_head(tokens), head.box_head(tokens)
        if self.published_padding:
            cells, usable = cells.masked_fill(~usable[..., None], math.inf), torch.ones_like(usable)
        chosen = self._chosen(head, logits.detach(), usable)[..., None]
        boxes = (offsets + cells).gather(1, chosen.expand(-1, -1, 4)).sigmoid()
        proposals = Predictions(
            logits=logits.gather(1, chosen.expand(-1, -1, logits.shape[-1]))[None], boxes=boxes[None]
        )
        content = tokens.gather(1, chosen.expand(-1, -1, tokens.shape[-1])) if self.selection == "tokens" else None
        return self._queries(boxes.detach(), None if content is None else content.detach(), memory), proposals

    def _chosen(self, head: Head, logits: Tensor, usable: Tensor) -> Int64[Tensor, "batch chosen"]:
        """Indices of the tokens that propose the best boxes, the best first."""
        number = min(self.num_queries, logits.shape[1])
        if self.ranking != "pairs":
            return head.scores(logits).masked_fill(~usable, -math.inf).topk(number, dim=1).indices
        scores = logits[..., :-1] if head.background else logits
        scores = scores.masked_fill(~usable[..., None], -math.inf)
        return scores.flatten(1).topk(number, dim=1).indices // scores.shape[-1]

    def _queries(self, anchors: Tensor, content: Tensor | None, memory: Memory) -> Queries:
        batch, count, _ = anchors.shape
        if content is not None:
            return Queries(content=content, anchors=anchors, position=self.position)
        anchors = anchors.repeat(1, self.groups, 1)
        if self.selection == "pure":
            embedding = sine_embedding(anchors * (2 * math.pi), self.d_model // 2).flatten(-2)
            position, content = self.embed(embedding).chunk(2, dim=-1)
            return Queries(content=content, anchors=anchors, position=lambda _: position)
        content = self.content.weight.unflatten(0, (self.num_groups, -1))[: self.groups, :count].flatten(0, 1)
        shares = memory.valid_ratios[:, :1].repeat(1, 1, 2)
        return Queries(
            content=content.expand(batch, -1, -1),
            anchors=anchors,
            position=partial(self.position, shares=shares) if self.published_padding else self.position,
        )

    def _cells(self, memory: Memory) -> tuple[Float[Tensor, "batch tokens 4"], Bool[Tensor, "batch tokens"]]:
        """The box in logits that each token's offsets start from, and whether it may propose."""
        sizes = [
            memory.tokens.new_full((height * width,), 0.05 * 2**level)
            for level, (height, width) in enumerate(memory.shapes)
        ]
        size = torch.cat(sizes)[:, None].expand(memory.tokens.shape[0], -1, 2)
        cells = torch.cat((memory.centers, size), dim=-1)
        usable = ((cells > 0.01) & (cells < 0.99)).all(-1)
        if memory.mask is not None:
            usable = usable & ~memory.mask
        return cells.logit(eps=1e-5), usable


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.xavier_uniform_(module.weight)
