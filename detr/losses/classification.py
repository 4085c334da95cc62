"""Classification losses of set prediction, each with the matching cost that fits it."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from detr.losses.terms import Matched, Term


class ClassificationLoss(Term):
    """The loss of classes over all queries, and the cost of pairs that the matching takes from it.

    background: whether the class head has one more output than there are classes, the last, for no object. A loss
        works with one of both only; the configuration of the model follows this option.
    """

    def __init__(self, *, background: bool, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.background = background

    def cost(
        self,
        logits: Float[Tensor, "batch queries classes"],
        image: Int64[Tensor, " targets"],
        labels: Int64[Tensor, " targets"],
        overlaps: Float[Tensor, "targets queries"],
    ) -> Float[Tensor, "targets queries"]:
        """Costs, a new tensor, of each target against the queries of its image; overlaps: GIoU of these pairs."""
        raise NotImplementedError

    def finds(self, logits: Float[Tensor, "*batch classes"]) -> Bool[Tensor, "*batch"]:
        """Which queries claim an object."""
        raise NotImplementedError


class CrossEntropy(ClassificationLoss):
    """Softmax over the classes and no object (Carion et al., ECCV 2020); its cost is the probability, negative.

    no_object_weight: weight of queries without an object in the mean over queries, which is a weighted one.
    """

    def __init__(self, *, weight: float = 1.0, background: Literal[True] = True, no_object_weight: float = 0.1) -> None:
        super().__init__(weight=weight, background=background)
        self.no_object_weight = no_object_weight

    def forward(self, matched: Matched) -> Float[Tensor, " layers"]:
        logits = matched.logits
        no_object = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:3], no_object, device=logits.device)
        wanted[matched.places] = matched.labels
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view_as(wanted)
        weight = torch.ones_like(loss).masked_fill(wanted == no_object, self.no_object_weight)
        # Without any query the sum is zero, and so shall be the loss.
        divisor = self._total_weight(matched)
        return (loss * weight).sum((1, 2)) / divisor.clamp(min=torch.finfo(divisor.dtype).tiny)

    def _total_weight(self, matched: Matched) -> Float[Tensor, ""]:
        pairs = matched.num_pairs
        return pairs + self.no_object_weight * (matched.num_queries - pairs)

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor, overlaps: Tensor) -> Float[Tensor, "targets queries"]:
        return logits.softmax(-1)[image, :, labels].neg_()

    def finds(self, logits: Tensor) -> Bool[Tensor, "*batch"]:
        return logits.argmax(-1) != logits.shape[-1] - 1


class SigmoidLoss(ClassificationLoss):
    """Binary losses, one for each query and class, summed and divided by the number of boxes.

    A subclass gives the loss of a `positive` query and class (matched, and the class of the target) and that of all
    others, the `negative` ones. The cost is that of Deformable DETR (Zhu et al., ICLR 2021) for all: the focal loss of
    a positive minus that of a negative.

    alpha, gamma: as each subclass says; the cost always has 0.25 and 2, as published.
    """

    def __init__(
        self, *, weight: float = 1.0, background: Literal[False] = False, alpha: float = 0.25, gamma: float = 2.0
    ) -> None:
        super().__init__(weight=weight, background=background)
        self.alpha, self.gamma = alpha, gamma

    def negative(self, logits: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        raise NotImplementedError

    def positive(self, logits: Float[Tensor, "layers pairs"], matched: Matched) -> Float[Tensor, "layers pairs"]:
        raise NotImplementedError

    def forward(self, matched: Matched) -> Float[Tensor, " layers"]:
        positives = *matched.places, matched.labels
        loss = self.negative(matched.logits)
        loss[positives] = self.positive(matched.logits[positives], matched)
        return loss.sum((1, 2, 3)) / matched.num_boxes

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor, overlaps: Tensor) -> Float[Tensor, "targets queries"]:
        return _focal_cost(logits[image, :, labels].sigmoid_())

    def finds(self, logits: Tensor) -> Bool[Tensor, "*batch"]:
        return (logits > 0).any(-1)  # a score above 0.5


class SigmoidFocal(SigmoidLoss):
    """Focal loss (Lin et al., ICCV 2017) as in Deformable DETR: easy pairs count little.

    alpha: weight of positives, 1 - alpha that of negatives. gamma: power of the distance to the target as a weight.
    """

    def negative(self, logits: Tensor) -> Float[Tensor, "*batch"]:
        return (1 - self.alpha) * logits.sigmoid() ** self.gamma * F.softplus(logits)

    def positive(self, logits: Tensor, matched: Matched) -> Float[Tensor, "layers pairs"]:
        return self.alpha * (-logits).sigmoid() ** self.gamma * F.softplus(-logits)


class Varifocal(SigmoidLoss):
    """Varifocal loss (Zhang et al., CVPR 2021) as in RT-DETR: a positive aims at its IoU, and weighs as much.

    alpha * p^gamma: weight of negatives, a constant to the gradient.
    """

    def __init__(
        self, *, weight: float = 1.0, background: Literal[False] = False, alpha: float = 0.75, gamma: float = 2.0
    ) -> None:
        super().__init__(weight=weight, background=background, alpha=alpha, gamma=gamma)

    def negative(self, logits: Tensor) -> Float[Tensor, "*batch"]:
        return self.alpha * logits.detach().sigmoid() ** self.gamma * F.softplus(logits)

    def positive(self, logits: Tensor, matched: Matched) -> Float[Tensor, "layers pairs"]:
        return matched.overlaps * _cross_entropy(logits, matched.overlaps)


class IoUAwareBCE(SigmoidLoss):
    """IoU-aware loss of Align-DETR (Cai et al., 2023): a positive aims at p^alpha * IoU^(1 - alpha), at least 0.01.

    p^gamma: weight of negatives.
    """

    def negative(self, logits: Tensor) -> Float[Tensor, "*batch"]:
        return logits.sigmoid() ** self.gamma * F.softplus(logits)

    def positive(self, logits: Tensor, matched: Matched) -> Float[Tensor, "layers pairs"]:
        quality = logits.detach().sigmoid() ** self.alpha * matched.overlaps ** (1 - self.alpha)
        return _cross_entropy(logits, quality.clamp(min=0.01))


class PositionSupervised(SigmoidLoss):
    """Position-supervised loss of Stable-DINO (Liu et al., ICCV 2023): positives aim at the square of their IoU.

    As in its published code, IoUs are rescaled to 1 for the best pair of each image and layer: else the poor boxes at
    the start would teach that there is nothing. The cost modulates the probability with the position too, by the root
    of the overlap (GIoU + 1) / 2.

    alpha: weight of positives, 1 - alpha that of negatives. gamma: power of the distance to the target as a weight.
    """

    def negative(self, logits: Tensor) -> Float[Tensor, "*batch"]:
        return (1 - self.alpha) * logits.sigmoid() ** self.gamma * F.softplus(logits)

    def positive(self, logits: Tensor, matched: Matched) -> Float[Tensor, "layers pairs"]:
        wanted = _relative_overlaps(matched) ** 2
        return self.alpha * (wanted - logits.sigmoid()).abs() ** self.gamma * _cross_entropy(logits, wanted)

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor, overlaps: Tensor) -> Float[Tensor, "targets queries"]:
        modulation = ((overlaps + 1) / 2).clamp_(0, 1).sqrt_()  # rounding may leave the range
        return _focal_cost(logits[image, :, labels].sigmoid_().mul_(modulation))


class MatchabilityAware(SigmoidLoss):
    """Matchability-aware loss of DEIM (Huang et al., CVPR 2025): positives aim at IoU^gamma, poor ones weigh in full.

    alpha * p^gamma: weight of negatives, a constant to the gradient.
    """

    def __init__(
        self, *, weight: float = 1.0, background: Literal[False] = False, alpha: float = 1.0, gamma: float = 1.5
    ) -> None:
        super().__init__(weight=weight, background=background, alpha=alpha, gamma=gamma)

    def negative(self, logits: Tensor) -> Float[Tensor, "*batch"]:
        return self.alpha * logits.detach().sigmoid() ** self.gamma * F.softplus(logits)

    def positive(self, logits: Tensor, matched: Matched) -> Float[Tensor, "layers pairs"]:
        return _cross_entropy(logits, matched.overlaps**self.gamma)


def _relative_overlaps(matched: Matched) -> Float[Tensor, "layers pairs"]:
    """IoUs as shares of the best one in each image and layer."""
    overlaps, image = matched.overlaps, matched.matches.image
    best = overlaps.new_full(matched.logits.shape[:2], 1e-8)
    best = best.scatter_reduce(1, image.expand_as(overlaps), overlaps, "amax")
    return overlaps / best[:, image]


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def _focal_cost(p: Tensor) -> Tensor:
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    return positive - negative
