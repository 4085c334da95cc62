"""Classification losses of set prediction, each with the matching cost that fits it."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from detr.types import Matches


class ClassificationLoss(nn.Module):
    """What a classification loss has: the loss of all layers in one pass, and the cost of pairs for the matching.

    background: whether the head has one more output than there are classes, the last, for no object.
    """

    background: bool

    def forward(
        self,
        logits: Float[Tensor, "layers batch queries classes"],
        matches: Matches,
        labels: Int64[Tensor, "layers pairs"],
        overlaps: Float[Tensor, "layers pairs"],
    ) -> Float[Tensor, " layers"]:
        """The loss of each layer, summed over queries and not yet divided by `divisor`.

        labels: of the matched targets; overlaps: IoU of the pairs, without a gradient.
        """
        raise NotImplementedError

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

    def divisor(
        self, num_boxes: Float[Tensor, ""], pairs: Float[Tensor, ""], queries: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """What the loss is to be divided by, for so many target boxes, pairs and queries."""
        raise NotImplementedError


class CrossEntropy(ClassificationLoss):
    """Softmax over the classes and no object (Carion et al., ECCV 2020); its cost is the probability, negative.

    no_object_weight: weight of queries without an object in the mean over queries, which is a weighted one.
    """

    background = True

    def __init__(self, *, no_object_weight: float = 0.1) -> None:
        super().__init__()
        self.no_object_weight = no_object_weight

    def forward(self, logits: Tensor, matches: Matches, labels: Tensor, overlaps: Tensor) -> Float[Tensor, " layers"]:
        no_object = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:3], no_object, device=logits.device)
        wanted[_layer(logits), matches.image, matches.query] = labels
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view_as(wanted)
        weight = torch.ones_like(loss).masked_fill(wanted == no_object, self.no_object_weight)
        return (loss * weight).sum((1, 2))

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor, overlaps: Tensor) -> Float[Tensor, "targets queries"]:
        return logits.softmax(-1)[image, :, labels].neg_()

    def finds(self, logits: Tensor) -> Bool[Tensor, "*batch"]:
        return logits.argmax(-1) != logits.shape[-1] - 1

    def divisor(self, num_boxes: Tensor, pairs: Tensor, queries: Tensor) -> Float[Tensor, ""]:
        return pairs + self.no_object_weight * (queries - pairs)


class SigmoidLoss(ClassificationLoss):
    """Binary losses, one for each query and class, summed and divided by the number of boxes.

    A subclass says what a pair of query and class is charged that is `positive` (matched, and of the target's class),
    and what all others, the `negative` ones. The cost is that of Deformable DETR (Zhu et al., ICLR 2021) for all: the
    focal loss of a positive pair minus that of a negative one.

    alpha, gamma: as each subclass says; the cost always has 0.25 and 2, as published.
    """

    background = False

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha, self.gamma = alpha, gamma

    def negative(self, logits: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        raise NotImplementedError

    def positive(
        self, logits: Float[Tensor, "layers pairs"], overlaps: Float[Tensor, "layers pairs"]
    ) -> Float[Tensor, "layers pairs"]:
        raise NotImplementedError

    def forward(self, logits: Tensor, matches: Matches, labels: Tensor, overlaps: Tensor) -> Float[Tensor, " layers"]:
        matched = _layer(logits), matches.image, matches.query, labels
        loss = self.negative(logits)
        loss[matched] = self.positive(logits[matched], overlaps)
        return loss.sum((1, 2, 3))

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor, overlaps: Tensor) -> Float[Tensor, "targets queries"]:
        return _focal_cost(logits[image, :, labels].sigmoid_())

    def finds(self, logits: Tensor) -> Bool[Tensor, "*batch"]:
        return (logits > 0).any(-1)  # a score above 0.5

    def divisor(self, num_boxes: Tensor, pairs: Tensor, queries: Tensor) -> Float[Tensor, ""]:
        return num_boxes


class SigmoidFocal(SigmoidLoss):
    """Focal loss (Lin et al., ICCV 2017) as in Deformable DETR: easy pairs count little.

    alpha: weight of positives, 1 - alpha that of negatives. gamma: power of the distance to the target as a weight.
    """

    def negative(self, logits: Tensor) -> Float[Tensor, "*batch"]:
        return (1 - self.alpha) * logits.sigmoid() ** self.gamma * F.softplus(logits)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Float[Tensor, "layers pairs"]:
        return self.alpha * (-logits).sigmoid() ** self.gamma * F.softplus(-logits)


class Varifocal(SigmoidLoss):
    """Varifocal loss (Zhang et al., CVPR 2021) as in RT-DETR: a positive aims at its IoU, and weighs as much.

    alpha * p^gamma: weight of negatives, a constant to the gradient.
    """

    def __init__(self, *, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__(alpha=alpha, gamma=gamma)

    def negative(self, logits: Tensor) -> Float[Tensor, "*batch"]:
        return self.alpha * logits.detach().sigmoid() ** self.gamma * F.softplus(logits)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Float[Tensor, "layers pairs"]:
        return overlaps * _cross_entropy(logits, overlaps)


class IoUAwareBCE(SigmoidLoss):
    """IoU-aware loss of Align-DETR (Cai et al., 2023): a positive aims at p^alpha * IoU^(1 - alpha), at least 0.01.

    p^gamma: weight of negatives.
    """

    def negative(self, logits: Tensor) -> Float[Tensor, "*batch"]:
        return logits.sigmoid() ** self.gamma * F.softplus(logits)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Float[Tensor, "layers pairs"]:
        quality = logits.detach().sigmoid() ** self.alpha * overlaps ** (1 - self.alpha)
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

    def positive(self, logits: Tensor, overlaps: Tensor) -> Float[Tensor, "layers pairs"]:
        wanted = overlaps**2
        return self.alpha * (wanted - logits.sigmoid()).abs() ** self.gamma * _cross_entropy(logits, wanted)

    def forward(self, logits: Tensor, matches: Matches, labels: Tensor, overlaps: Tensor) -> Float[Tensor, " layers"]:
        best = overlaps.new_full(logits.shape[:2], 1e-8)
        best = best.scatter_reduce(1, matches.image.expand_as(overlaps), overlaps, "amax")
        return super().forward(logits, matches, labels, overlaps / best[:, matches.image])

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor, overlaps: Tensor) -> Float[Tensor, "targets queries"]:
        modulation = ((overlaps + 1) / 2).clamp_(0, 1).sqrt_()  # rounding may leave the range
        return _focal_cost(logits[image, :, labels].sigmoid_().mul_(modulation))


class MatchabilityAware(SigmoidLoss):
    """Matchability-aware loss of DEIM (Huang et al., CVPR 2025): positives aim at IoU^gamma, poor ones weigh in full.

    alpha * p^gamma: weight of negatives, a constant to the gradient.
    """

    def __init__(self, *, alpha: float = 1.0, gamma: float = 1.5) -> None:
        super().__init__(alpha=alpha, gamma=gamma)

    def negative(self, logits: Tensor) -> Float[Tensor, "*batch"]:
        return self.alpha * logits.detach().sigmoid() ** self.gamma * F.softplus(logits)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Float[Tensor, "layers pairs"]:
        return _cross_entropy(logits, overlaps**self.gamma)


def _layer(logits: Tensor) -> Int64[Tensor, "layers 1"]:
    return torch.arange(len(logits), device=logits.device)[:, None]


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def _focal_cost(p: Tensor) -> Tensor:
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    return positive - negative
