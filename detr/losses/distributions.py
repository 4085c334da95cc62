"""Losses on the distributions of the edges of boxes (D-FINE: Peng et al., ICLR 2025)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from detr.edges import between_bins, bin_distances, edge_distances
from detr.losses.terms import Matched, Term, single

_IMAGES = 8  # of a batch that the numbers of edges in DDF are scaled to, as published


class FGL(Term):
    """Fine-grained localization loss: each edge's distribution learns how far it is from the target's edge.

    The two bins around that distance share it in a cross-entropy (DFL: Li et al., NeurIPS 2020). A pair weighs as much
    as its boxes overlap.

    up, reg_scale: of the model's distributions, as in `detr.edges`.
    """

    needs = "distributions"
    models = ", such as model=d_fine_l"

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
    """Decoupled distillation focal loss: the distributions of each layer learn from those of the last one.

    Matched queries weigh as much as their boxes overlap with the targets, others as much as the last layer's best class
    score. The means of both kinds are averaged with the square roots of their numbers, those of the matched queries for
    denoising too. The loss is a mean over a batch; of several that are accumulated, each weighs by its images.

    temperature: of the softmax of both distributions.
    """

    needs = "distributions"
    models = ", such as model=d_fine_l"

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
        main = matched.main or matched
        roots = self._roots(main)
        return main.share * (means[0] * roots[0] + means[1] * roots[1]) / roots.sum().clamp(min=1e-12)

    def _divergence(self, logits: Tensor, teacher: Tensor) -> Float[Tensor, "groups layers batch queries"]:
        """Kullback-Leibler divergence from the teacher, summed over edges."""
        heat = self.temperature
        log, log_teacher = ((x / heat).log_softmax(-1) for x in (logits, teacher))
        return heat**2 * (log_teacher.exp() * (log_teacher - log)).sum((-1, -2))

    @staticmethod
    def _roots(main: Matched) -> Float[Tensor, "2"]:
        """The square roots of how many edges are those of matched queries, and of others."""
        _, batch, queries, _ = main.predictions.boxes.shape
        pairs = len(main.matches.image)
        numbers = main.num_boxes.new_tensor([pairs, batch * queries - pairs])
        return (numbers * (4 * _IMAGES / batch)).sqrt()
