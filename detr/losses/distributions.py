"""Losses on the distributions of the edges of boxes (D-FINE: Peng et al., ICLR 2025)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from detr.edges import between_bins, bin_distances, edge_distances
from detr.losses.terms import Matched, Term, single

_IMAGES = 8  # of a batch that DDF's weights are scaled to


class FGL(Term):
    """Fine-grained localization: each edge's distribution aims at the two bins beside its distance from the target.

    Distances are those from the preliminary boxes. A pair weighs as much as its boxes overlap.

    up, reg_scale: of the model's distributions, as in `detr.edges`.
    """

    needs = "distributions"

    def __init__(self, *, weight: float = 1.0, up: float = 0.5, reg_scale: float = 4.0) -> None:
        super().__init__(weight=weight)
        self.up, self.reg_scale = up, reg_scale

    def forward(self, matched: Matched) -> Float[Tensor, " layers"]:
        predictions = matched.predictions
        if predictions.distributions is None:
            return matched.num_boxes.new_zeros(0)
        assert predictions.preliminary is not None
        logits = single(matched.found("distributions")).log_softmax(-1)
        bins = bin_distances(logits.shape[-1] - 1, self.up, self.reg_scale).to(logits)
        start = single(predictions.preliminary.boxes.detach())
        start = start.repeat_interleave(len(logits) // len(start), dim=0)[matched.places]
        left, right = between_bins(edge_distances(start, matched.wanted_corners, self.reg_scale), bins)
        at_left, at_right = (logits.gather(-1, index[..., None])[..., 0] for index in (left, left + 1))
        loss = -(at_left * (1 - right) + at_right * right)
        return (loss * matched.overlaps[..., None]).sum((1, 2)) / matched.num_boxes


class DDF(Term):
    """Decoupled distillation focal loss: the distributions of each layer follow those of the last one.

    Matched queries weigh as much as their boxes overlap with the targets, others as much as the last layer is sure of
    any object. Both kinds are averaged by themselves; the roots of their numbers, those of the matched predictions for
    denoising too, weigh the means. It is the mean of a batch: parts of an accumulated one weigh by their images.

    temperature: that softens both distributions.
    """

    needs = "distributions"

    def __init__(self, *, weight: float = 1.0, temperature: float = 5.0) -> None:
        super().__init__(weight=weight)
        self.temperature = temperature

    def forward(self, matched: Matched) -> Float[Tensor, " layers"]:
        predictions = matched.predictions
        if predictions.distributions is None:
            return matched.num_boxes.new_zeros(0)
        assert predictions.preliminary is not None
        groups = len(predictions.preliminary.boxes)
        logits = single(predictions.distributions).unflatten(0, (groups, -1))
        scores = matched.logits.detach().sigmoid().amax(-1).unflatten(0, (groups, -1))
        weights = scores[:, -1:].expand_as(scores).flatten(0, 1).clone()
        weights[matched.places] = matched.overlaps
        distance = self._divergence(logits[:, :-1], logits[:, -1:].detach())
        distance = F.pad(distance, (0, 0, 0, 0, 0, 1)).flatten(0, 1) * weights

        positive = torch.zeros_like(weights, dtype=torch.bool)
        positive[matched.places] = True
        means = [
            (distance * chosen).sum((1, 2)) / (4 * chosen.sum((1, 2))).clamp(min=1) for chosen in (positive, ~positive)
        ]
        share, roots = self._roots(matched.main or matched)
        return share * (means[0] * roots[0] + means[1] * roots[1]) / roots.sum().clamp(min=1e-12)

    def _divergence(self, logits: Tensor, teacher: Tensor) -> Float[Tensor, "groups layers batch queries"]:
        """Kullback-Leibler divergence from the teacher, summed over edges."""
        heat = self.temperature
        log, log_teacher = ((x / heat).log_softmax(-1) for x in (logits, teacher))
        return heat**2 * (log_teacher.exp() * (log_teacher - log)).sum((-1, -2))

    @staticmethod
    def _roots(main: Matched) -> tuple[float, Float[Tensor, "2"]]:
        """Which share the images have in the step's, and the roots of the numbers of edges, matched and not."""
        _, batch, queries, _ = main.predictions.boxes.shape
        pairs = len(main.matches.image)
        numbers = main.num_boxes.new_tensor([pairs, batch * queries - pairs])
        return main.share, (numbers * (4 * _IMAGES / batch)).sqrt()
