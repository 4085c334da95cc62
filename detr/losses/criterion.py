"""DETR's set loss (Carion et al., ECCV 2020, section 3.1), on all decoder layers in one pass."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from detr import distributed
from detr.errors import UserError
from detr.losses.boxes import L1, GIoU
from detr.losses.classification import ClassificationLoss, CrossEntropy
from detr.losses.matcher import HungarianMatcher
from detr.losses.terms import Matched, Term
from detr.types import DenoisingPredictions, Matches, Predictions, Target

Losses = dict[str, Float[Tensor, " layers"]]


class SetCriterion(nn.Module):
    """Matches queries to targets and adds up a list of losses, each with its weight, over all decoder layers.

    matcher: assigns queries to targets, in every layer on its own.
    num_classes: K.
    classification: the loss of classes, which the matcher takes its cost from; published DETR's unless given.
    terms: the other losses by name; unless given, those of published DETR: L1 as `bbox`, weight 5, and generalized IoU
        as `giou`, weight 2.
    union: terms other than classification judge the union of the pairs of all layers, of preliminary boxes and of
        proposals, the same in all of these; each query has its most frequent target (GO-LSD of D-FINE: Peng et al.,
        ICLR 2025). Further groups and denoising keep their own pairs.
    group_repeats: how often each target is there for a group of queries: once as in Group DETR (Chen et al., ICCV
        2023), or more for the one-to-many matching of H-DETR (Jia et al., CVPR 2023).
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        num_classes: int,
        classification: ClassificationLoss | None = None,
        terms: Mapping[str, Term] | None = None,
        union: bool = False,
        group_repeats: int = 1,
    ) -> None:
        super().__init__()
        if group_repeats < 1:
            raise UserError(f"group_repeats: wanted at least 1, got {group_repeats}.")
        self.matcher, self.num_classes, self.group_repeats = matcher, num_classes, group_repeats
        self.union = union
        self.classification = classification or CrossEntropy()
        self.terms = _checked({"bbox": L1(weight=5.0), "giou": GIoU(weight=2.0)} if terms is None else terms)

    def forward(
        self, predictions: Predictions, targets: Sequence[Target], counts: Int64[Tensor, " images"] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """`loss`, the total to minimize, and its parts before weighting.

        counts: the number of objects in each image of the whole optimizer step, over all processes and all batches that
            are accumulated; those of `targets` over all processes unless given. The losses are this batch's part of
            the step's loss: summed over accumulated batches and averaged over processes they equal the loss of one
            large batch.

        `loss_ce` is the classification loss, whatever its kind, and `loss_NAME` that of a term, such as `loss_bbox`.
        They are those of the last decoder layer; a suffix `_0`, `_1` ... names an earlier one. Suffixes
        `_preliminary`, `_proposals`, `_groups`, `_denoising`, and `_groups_preliminary`, `_denoising_preliminary` name
        those of further predictions, where there are any, summed over layers and averaged over groups: all further
        groups together count as much as the first. Only the losses of denoising, of `union` and DDF depend on which
        images are together in a batch, as that decides how often a target is copied or paired. Two more are for
        the log only: `class_error`, the percentage of matched queries with a wrong class (100 in a batch without
        targets), and `cardinality_error`, by how many an image's count of objects is off.

        Raises NonFiniteError where predictions are NaN or infinite, UserError where the class head does not fit the
        loss, or a term needs what the model does not predict.
        """
        self._check_fields(predictions)
        parts = self.matched(predictions, targets, counts)
        further = {name: self._losses(part) for name, part in parts.items()}
        matched, losses = parts["main"], further.pop("main")
        weighted = [loss for part in (losses, *further.values()) for loss in self._weighted(part)]
        with torch.no_grad():
            losses["cardinality_error"] = self._cardinality_error(matched)
            class_error = _class_error(matched)
        summed = {
            f"{name}_{part}": values.sum()
            for part, of_part in further.items()
            for name, values in of_part.items()
            if len(values)
        }
        return {"loss": cast(Tensor, sum(weighted)), **_by_layer(losses), **summed, "class_error": class_error}

    @torch.no_grad()
    def per_image(self, predictions: Predictions, targets: Sequence[Target]) -> Float[Tensor, " batch"]:
        """The last decoder layer's weighted loss of each image as if it were alone, without a gradient."""
        costs = []
        for index, target in enumerate(targets):
            alone = predictions.layers(slice(-1, None)).select(images=slice(index, index + 1))
            matches = self.match(alone, [target])
            num_boxes = predictions.boxes.new_tensor(float(max(len(target), 1)))
            matched = Matched(predictions=alone, targets=[target], matches=matches, num_boxes=num_boxes)
            costs.append(torch.stack(list(self._weighted(self._losses(matched)))).sum())
        return torch.stack(costs)

    def match(self, predictions: Predictions, targets: Sequence[Target], num_classes: int | None = None) -> Matches:
        """The pairs that the losses are of. num_classes: of class-agnostic predictions, where it is another."""
        self._check_head(predictions.logits.shape[-1], num_classes or self.num_classes)
        return self.matcher(predictions, targets, self.classification)

    def _check_head(self, outputs: int, num_classes: int) -> None:
        background = self.classification.background
        if outputs == num_classes + background:
            return
        swapped = outputs == num_classes + (not background)
        raise UserError(
            f"The class head has {outputs} outputs, wanted {num_classes + background} for {num_classes} classes and "
            f"{'a softmax' if background else 'a sigmoid'} loss: set the model's "
            f"{f'background={background}' if swapped else f'num_classes={num_classes}'}."
        )

    def _matched(self, predictions: Predictions, targets: Sequence[Target], counts: Tensor | None) -> Matched:
        if counts is None:
            counts = distributed.gather(_counts(targets, predictions.boxes.device))
        return Matched(
            predictions=predictions,
            targets=targets,
            matches=self.match(predictions, targets),
            num_boxes=(counts.sum() / distributed.world_size()).clamp(min=1),
            counts=counts,
        )

    def _check_fields(self, predictions: Predictions) -> None:
        for name, term in self._by_name():
            if term.needs is not None and not predictions.has(term.needs):
                raise UserError(
                    f"criterion.terms.{name}: wanted a model that predicts {term.needs}{term.models}. Use one, or "
                    f"leave the term out with criterion.terms.{name}=null."
                )

    def _losses(self, matched: Matched) -> Losses:
        losses = {"loss_ce": self.classification(matched)}
        judged = matched.union or matched
        losses |= {f"loss_{name}": term(judged) for name, term in cast(Mapping[str, Term], self.terms).items()}
        return {name: values * matched.scale for name, values in losses.items()}

    def _weighted(self, losses: Losses) -> Iterator[Float[Tensor, ""]]:
        return (term.weight * losses[f"loss_{name}"].sum() for name, term in self._by_name())

    def _by_name(self) -> Iterator[tuple[str, Term]]:
        yield "ce", self.classification
        yield from cast(Mapping[str, Term], self.terms).items()

    def matched(
        self, predictions: Predictions, targets: Sequence[Target], counts: Int64[Tensor, " images"] | None = None
    ) -> dict[str, Matched]:
        """The pairs of all that is trained, `main` and further predictions by the suffixes of their losses."""
        main = self._matched(predictions, targets, counts)
        parts = {"main": main}
        if (preliminary := predictions.preliminary) is not None:
            parts["preliminary"] = replace(main, predictions=preliminary, matches=self.match(preliminary, targets))
        if predictions.proposals is not None:
            parts["proposals"] = self._matched_proposals(main, predictions.proposals)
        if self.union:
            parts = _with_union(parts)
        if (groups := predictions.groups) is not None:
            parts["groups"] = self._matched_groups(main, groups, len(predictions.boxes))
            if groups.preliminary is not None:
                parts["groups_preliminary"] = self._matched_groups(main, groups.preliminary, 1)
        if (denoising := predictions.denoising) is not None:
            parts["denoising"] = _matched_denoising(parts["main"], denoising)
            if (preliminary := denoising.predictions.preliminary) is not None:
                first = replace(denoising, predictions=preliminary, matches=denoising.matches.first_layer())
                parts["denoising_preliminary"] = _matched_denoising(parts["main"], first)
        return parts

    def _matched_proposals(self, main: Matched, proposals: Predictions) -> Matched:
        num_classes, targets = self.num_classes, main.targets
        if proposals.logits.shape[-1] == 1 + self.classification.background:  # class-agnostic
            num_classes, targets = 1, [replace(t, labels=torch.zeros_like(t.labels)) for t in targets]
        matches = self.match(proposals, targets, num_classes)
        return replace(main, predictions=proposals, targets=targets, matches=matches)

    def _matched_groups(self, main: Matched, groups: Predictions, layers: int) -> Matched:
        """layers: of each group."""
        assert main.counts is not None
        times, number = self.group_repeats, groups.boxes.shape[0] // layers
        targets = [target.select(torch.arange(len(target)).repeat(times)) for target in main.targets]
        return Matched(
            predictions=groups,
            targets=targets,
            matches=self.match(groups, targets),
            num_boxes=main.num_boxes * times,
            counts=main.counts * times,
            scale=1 / number,
        )

    def _cardinality_error(self, matched: Matched) -> Float[Tensor, " layers"]:
        logits = matched.predictions.logits
        found = self.classification.finds(logits).sum(-1)
        return (found - _counts(matched.targets, logits.device).float()).abs().mean(1)


def _checked(terms: Mapping[str, Term]) -> nn.ModuleDict:
    terms = {name: term for name, term in terms.items() if term is not None}
    for name, term in terms.items():
        if name == "ce" or "." in name or hasattr(nn.ModuleDict(), name):
            raise UserError(f"terms: the name {name} is taken, or has a dot. Choose another.")
        if not isinstance(term, Term):
            raise UserError(
                f"terms: wanted a subclass of detr.losses.Term as {name}, got {type(term).__name__}. Correct or remove "
                "the entry."
            )
    return nn.ModuleDict(terms)


def _matched_denoising(main: Matched, denoising: DenoisingPredictions) -> Matched:
    """Their matches are known, and the step has none of them but these."""
    copies = max(denoising.copies, 1)  # no copies where there is nothing to copy
    return Matched(
        predictions=denoising.predictions,
        targets=main.targets,
        matches=denoising.matches,
        num_boxes=main.num_boxes * copies,
        main=main.union or main,
    )


def _with_union(parts: Mapping[str, Matched]) -> dict[str, Matched]:
    """Each with the union of all their pairs, of which each query keeps the most frequent one."""
    main = parts["main"]
    matches = [part.matches for part in parts.values()]
    images = torch.cat([m.image.expand_as(m.query).flatten() for m in matches]).cpu()
    pairs = torch.stack([torch.cat([getattr(m, name).flatten() for m in matches]) for name in ("query", "target")], 1)
    pairs = pairs.cpu()
    kept = [_most_frequent(pairs[images == index]) for index in range(len(main.targets))]
    query, target = torch.cat(kept).to(main.boxes.device).unbind(1)
    image = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(of_image) for of_image in kept]))
    image = image.to(query.device)

    # The pairs of the step's other batches are not known yet: there may be as many for each target as here.
    own = sum(len(target) for target in main.targets)
    pairs_and_targets = distributed.gather(main.num_boxes.new_tensor([[len(image), own]])).sum(0)
    assert main.counts is not None
    of_targets = main.counts.sum() / pairs_and_targets[1].clamp(min=1)
    num_boxes = (pairs_and_targets[0] / distributed.world_size() * of_targets).clamp(min=1)

    def union(part: Matched) -> Matched:
        layers = len(part.predictions.boxes)
        same = Matches(image=image, query=query.expand(layers, -1), target=target.expand(layers, -1))
        return replace(part, matches=same, num_boxes=num_boxes)

    return {name: replace(part, union=union(part)) for name, part in parts.items()}


def _most_frequent(pairs: Int64[Tensor, "pairs 2"]) -> Int64[Tensor, "kept 2"]:
    """Of pairs of query and target, each query with its most frequent target; ties as torch sorts, as published."""
    pairs, votes = pairs.unique(dim=0, return_counts=True)
    kept: dict[int, int] = {}
    for query, target in pairs[votes.argsort(descending=True)].tolist():
        kept.setdefault(query, target)
    return torch.tensor([*kept.items()], dtype=torch.int64).reshape(-1, 2)


def _class_error(matched: Matched) -> Float[Tensor, ""]:
    labels, matches = matched.labels[-1], matched.matches
    if len(labels) == 0:
        return torch.tensor(100.0, device=labels.device)
    found = matched.predictions.logits[-1, matches.image, matches.query[-1]].argmax(-1)
    return 100 * (found != labels).float().mean()


def _counts(targets: Sequence[Target], device: torch.device) -> Int64[Tensor, " images"]:
    return torch.tensor([len(target) for target in targets], device=device)


def _by_layer(losses: Losses) -> dict[str, Float[Tensor, ""]]:
    """The value of each layer, the last one without a suffix."""
    return {
        name if layer == len(values) - 1 else f"{name}_{layer}": value
        for name, values in losses.items()
        for layer, value in enumerate(values)
    }
