"""What turns queries, and tokens, into classes and boxes."""

import math
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detr.boxes import inverse_sigmoid
from detr.models.layers.mlp import MLP, MLPActivation
from detr.models.rows import Rowed, Rows
from detr.models.values import Refinement

_PRIOR = 0.01  # probability of each class at the start (Lin et al., ICCV 2017)
_PEAKS = 4  # of each edge's distribution, which location quality is estimated from
_QUALITY_FEATURES = 64


class Head(Rowed):
    """Classes and boxes of every query or token.

    A head of another kind is a subclass; what its `forward` gives beside logits and boxes is a field of Predictions.

    background: one more output, the last, for no object, as the softmax loss needs; without it each class starts
        improbable, as sigmoid losses need.
    eps: as in `inverse_sigmoid`, of the references that boxes are offsets from.
    activation: of the perceptron of boxes.
    refines: what `refine` gives the decoder: boxes, or changes of `distributions` for FineDecoder.
    class_agnostic: its one class is any object, so that it does not depend on the classes of the data.
    """

    refines: Literal["boxes", "distributions"] = "boxes"
    class_agnostic = False

    def __init__(
        self,
        *,
        d_model: int,
        num_classes: int,
        background: bool,
        eps: float = 1e-5,
        activation: MLPActivation = "relu",
    ) -> None:
        super().__init__()
        self.background, self.eps = background, eps
        self.class_head = nn.Linear(d_model, num_classes + background)
        self.box_head = MLP(d_model, d_model, 4, layers=3, activation=activation)
        if not background:
            nn.init.constant_(self.class_head.bias, math.log(_PRIOR / (1 - _PRIOR)))

    def rows(self) -> dict[str, Rows]:
        classes = Rows("classes", further=int(self.background))
        return {} if self.class_agnostic else {"class_head.weight": classes, "class_head.bias": classes}

    def start_at_anchors(self, size: float) -> None:
        """The first boxes are the anchors themselves. size: width and height, in logits, of those that have none."""
        last = cast(nn.Linear, self.box_head.layers[-1])
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, 0.0, size, size]))

    def forward(self, x: Float[Tensor, "batch queries d_model"], reference: Any) -> dict[str, Tensor]:
        """The tensors of one decoder layer by the fields of Predictions.

        x: the layer's output. reference: the anchors, (B, Q, 2 or 4), that boxes are offsets from, or None; of
        FineDecoder, its Refinement.
        """
        return {"logits": self.class_head(x), "boxes": self.boxes(x, reference)}

    def refine(self, x: Tensor, reference: Tensor | None) -> Tensor:
        """What the decoder goes on with: the boxes (B, Q, 4). x, reference: as in `forward`."""
        return self.boxes(x, reference)

    def only_refine(self) -> None:
        """Remove, in place, what `refine` does not need: of a model that predicts from its last layer alone."""
        del self.class_head

    def preliminary(self, x: Tensor, reference: Any) -> dict[str, Tensor] | None:
        """What the first layer predicts beside `forward`, from the same arguments and by field too; None: nothing."""
        return None

    def boxes(
        self, x: Float[Tensor, "batch queries d_model"], reference: Float[Tensor, "batch queries dims"] | None
    ) -> Float[Tensor, "batch queries 4"]:
        """Boxes (cxcywh) in [0, 1], from offsets in logits around points, boxes, or nothing."""
        offsets = self.box_head(x)
        if reference is None:
            return offsets.sigmoid()
        dims = reference.shape[-1]
        offsets = offsets.float()  # half precision rounds 1 - eps to 1
        moved = offsets[..., :dims] + inverse_sigmoid(reference.float(), self.eps)
        return torch.cat((moved, offsets[..., dims:]), dim=-1).sigmoid()

    def scores(self, logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
        """How sure it is of any object, to compare."""
        return logits.softmax(-1)[..., :-1].amax(-1) if self.background else logits.amax(-1)


class FineHead(Head):
    """The head of FineDecoder: changes of distributions, and class logits to which location quality is added (D-FINE:
    Peng et al., ICLR 2025).

    reg_max: N, the number of the last bin of a distribution, as in `detr.edges`.
    activation: of the perceptrons of distributions and of location quality.
    The other options are those of Head.
    """

    refines = "distributions"

    def __init__(
        self,
        *,
        d_model: int,
        num_classes: int,
        background: bool,
        eps: float = 1e-5,
        reg_max: int = 32,
        activation: MLPActivation = "relu",
    ) -> None:
        super().__init__(
            d_model=d_model, num_classes=num_classes, background=background, eps=eps, activation=activation
        )
        self.box_head = MLP(d_model, d_model, 4 * (reg_max + 1), layers=3, activation=activation)
        self.quality = MLP(4 * (_PEAKS + 1), _QUALITY_FEATURES, 1, layers=2, activation=activation)
        self.quality.zero()

    def start_at_anchors(self, size: float) -> None:
        """Distributions start even, so that edges do not move. size: not used; the decoder makes the first boxes."""
        self.box_head.zero()

    def forward(self, x: Float[Tensor, "batch queries d_model"], reference: Refinement) -> dict[str, Tensor]:
        """reference: what the decoder made of this layer's boxes."""
        distributions = reference.distributions
        return {
            "logits": self.class_head(x) + self.location_quality(distributions),
            "boxes": reference.boxes,
            "distributions": distributions,
        }

    def refine(self, x: Tensor, reference: Tensor | None) -> Float[Tensor, "batch queries 4 bins"]:
        """What a layer adds to the logits of distributions."""
        return self.box_head(x).unflatten(-1, (4, -1))

    def only_refine(self) -> None:
        super().only_refine()
        del self.quality

    def location_quality(
        self, distributions: Float[Tensor, "batch queries 4 bins"]
    ) -> Float[Tensor, "batch queries 1"]:
        """How well a box is located, in logits, by the highest probabilities of each edge's bins and their mean.

        distributions: logits. Sharp ones are more certain (GFLv2: Li et al., CVPR 2021).
        """
        peaks = distributions.softmax(-1).topk(_PEAKS, dim=-1).values
        return self.quality(torch.cat((peaks, peaks.mean(-1, keepdim=True)), dim=-1).flatten(-2))

    def preliminary(self, x: Float[Tensor, "batch queries d_model"], reference: Refinement) -> dict[str, Tensor]:
        """What the first layer predicts before its edges move."""
        return {"logits": self.class_head(x), "boxes": reference.start}
