"""The proof that an exported file detects what its model detects."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detr.export.files import Format, Inputs, Program, values_of
from detr.types import Detections

_SURE, _LEAST = 0.05, 10  # the score of detections that are compared, and the number of the best that are in any case


@dataclass(frozen=True)
class Limits:
    """The largest differences that a file may have.

    score, box: of one detection, in its score and in pixels of its corners; mean_score, mean_box: on average.
    mask: 1 - IoU of the masks, on average.
    value: of a value inside, as a part of the largest of its tensor, before a layer is said to differ.
    """

    score: float
    box: float
    mean_score: float
    mean_box: float
    mask: float
    value: float

    @classmethod
    def of(cls, precision: str) -> "Limits":
        """fp32 rounds otherwise; the others are approximations, where a single proposal may give way to another."""
        return {
            "fp32": cls(score=1e-4, box=0.1, mean_score=1e-5, mean_box=0.01, mask=0.001, value=1e-3),
            "fp16": cls(score=math.inf, box=math.inf, mean_score=0.01, mean_box=1.0, mask=0.02, value=0.05),
            "int8": cls(score=math.inf, box=math.inf, mean_score=0.05, mean_box=4.0, mask=0.1, value=0.5),
        }[precision]


@dataclass(frozen=True)
class Proof:
    """How far the detections of a file are from those of its model.

    images, detections: that were compared, the latter of the model. score, box, mean_score, mean_box, mask:
    differences, as in `Limits`. ap, model_ap: of both on a validation set, where there is one. sure: how many of the
    detections have a score of at least 0.05.
    """

    images: int
    detections: int
    score: float
    box: float
    mean_score: float
    mean_box: float
    mask: float | None = None
    ap: float | None = None
    model_ap: float | None = None
    sure: int = 0

    @classmethod
    def failed(cls) -> "Proof":
        """Of a file whose outputs are NaN or infinite."""
        return cls(images=0, detections=0, score=math.nan, box=math.nan, mean_score=math.nan, mean_box=math.nan)

    def excess(self, limits: Limits, ap_loss: float) -> str | None:
        """What is beyond the limits, in words; None where nothing is. ap_loss: the most AP that may be lost."""
        if math.isnan(self.score):
            return "its outputs are NaN or infinite"
        pairs = {
            "a score differs by {:.3g} of at most {:.3g}": (self.score, limits.score),
            "a corner of a box differs by {:.3g} of at most {:.3g} pixels": (self.box, limits.box),
            "scores differ by {:.3g} of at most {:.3g} on average": (self.mean_score, limits.mean_score),
            "corners of boxes differ by {:.3g} of at most {:.3g} pixels on average": (self.mean_box, limits.mean_box),
        }
        if self.mask is not None:
            pairs["the IoU of masks is short of 1 by {:.3g} of at most {:.3g} on average"] = (self.mask, limits.mask)
        for text, (found, most) in pairs.items():
            if found > most:
                return text.format(found, most)
        if self.ap is not None and self.model_ap is not None and self.model_ap - self.ap > ap_loss:
            return f"AP falls from {self.model_ap:.4f} to {self.ap:.4f}, by more than {ap_loss:.3g}"
        return None

    def content(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"{self.detections} detections in {self.images} images differ by at most {self.score:.2g} in scores and "
            f"{self.box:.2g} pixels in boxes, on average by {self.mean_score:.2g} and {self.mean_box:.2g}"
        )
        if self.mask is not None:
            text += f"; the IoU of their masks is {1 - self.mask:.5f} on average"
        if self.ap is not None and self.model_ap is not None:
            text += f". AP {self.ap:.4f}, that of the model {self.model_ap:.4f}"
        return text


def prove(ours: Sequence[Detections], theirs: Sequence[Detections]) -> Proof:
    """Compare the detections of two models in the same images, which both give without a threshold.

    Of each image, our detections with a score of at least 0.05, and the best ten in any case, are matched with theirs
    of the same class; and theirs with ours, so that they have none of their own. One that has no partner counts as
    differing by its whole score.
    """
    scores: list[float] = []
    boxes: list[float] = []
    masks: list[float] = []
    for both in zip(ours, theirs, strict=True):
        for mine, other in (both, both[::-1]):
            chosen = _chosen(mine)
            for label in chosen.labels.unique():
                of_mine = chosen.select((chosen.labels == label).nonzero()[:, 0])
                of_other = other.select((other.labels == label).nonzero()[:, 0])
                pairs = _pairs(of_mine, of_other)
                a, b = of_mine.select(pairs[0]), of_other.select(pairs[1])
                alone = sorted({*range(len(of_mine))} - {*pairs[0].tolist()})
                scores += [*(a.scores - b.scores).abs().tolist(), *of_mine.scores[alone].tolist()]
                boxes += (a.boxes - b.boxes).abs().amax(-1).tolist()
                if a.masks is not None and b.masks is not None:
                    masks += (1 - a.masks.ious(b.masks)).tolist()
    worst, mean = (lambda values: float(np.max(values, initial=0))), (lambda values: float(np.mean(values or [0])))
    return Proof(
        images=len(ours),
        detections=sum(len(_chosen(one)) for one in ours),
        score=worst(scores),
        box=worst(boxes),
        mean_score=mean(scores),
        mean_box=mean(boxes),
        mask=mean(masks) if masks else None,
        sure=sum(int((one.scores >= _SURE).sum()) for one in ours),
    )


def _chosen(found: Detections) -> Detections:
    return found[: max(int((found.scores >= _SURE).sum()), _LEAST)]


def _pairs(mine: Detections, other: Detections) -> tuple[Tensor, Tensor]:
    """The indices of those that are nearest to each other in all, by score and corners."""
    score = (mine.scores[:, None] - other.scores).abs().double()
    box = (mine.boxes[:, None] - other.boxes).abs().amax(-1).double()
    extent = float(mine.boxes.abs().max().clamp(min=1))
    rows, columns = linear_sum_assignment((score + box / extent).numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


def first_difference(kind: Format, path: Path, program: Program, inputs: Inputs, tolerance: float) -> str | None:
    """The first layer of a file whose values differ from those of its program; None where none does.

    tolerance: as `Limits.value`.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    names = [node.name for node in nodes]
    wanted, found = values_of(program, names, inputs), kind.values(path, names, inputs)
    for node in nodes:
        if node.name in wanted and node.name in found and _differ(wanted[node.name], found[node.name], tolerance):
            return _layer(node)
    return None


def first_traced_difference(graph: nn.Module, program: Program, inputs: Inputs, tolerance: float) -> str | None:
    """The first layer of a model whose program gives other values than itself; None where none does."""
    wanted: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                wanted.setdefault(path, output.clone())

        return hook

    leaves = [(path, module) for path, module in graph.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(keep(path)) for path, module in leaves]
    with torch.no_grad():
        graph(*inputs.values())
    for handle in handles:
        handle.remove()
    # The last node of a layer is its output. Of what is called several times, each call has a stack of its own.
    of_layer: dict[str, torch.fx.Node] = {}
    calls: dict[str, str] = {}
    for node in program.graph.nodes:
        for call, (path, _) in list(node.meta.get("nn_module_stack", {}).items())[-1:]:
            if calls.setdefault(path, call) == call:
                of_layer[path] = node
    found = values_of(program, [node.name for node in of_layer.values()], inputs)
    for path, value in wanted.items():
        node = of_layer.get(path)
        if node is not None and node.name in found and _differ(value, found[node.name], tolerance):
            return _layer(node)
    return None


def _differ(wanted: Tensor, found: Tensor, tolerance: float) -> bool:
    if not wanted.is_floating_point() or wanted.shape != found.shape or wanted.numel() == 0:
        return False
    wanted, found = wanted.double(), found.double()
    finite = wanted.isfinite()
    difference = (wanted - found)[finite].abs()
    scale = wanted[finite].abs().max() if finite.any() else torch.tensor(0.0)
    return not bool((difference <= tolerance * scale + 1e-6).all())  # nor NaN


def _layer(node: torch.fx.Node) -> str:
    """The innermost module that a node belongs to, and its operation."""
    stack: Iterable[tuple[str, Any]] = node.meta.get("nn_module_stack", {}).values()
    path, kind = [*stack][-1] if stack else ("", "")
    name = getattr(kind, "__name__", str(kind).rpartition(".")[2])
    operation = str(node.target).removeprefix("aten.").partition(".")[0]
    path = path.removeprefix("model.")
    return (
        f"{path} ({name}), in its {operation}"
        if path not in ("", "model")
        else f"the post-processing, in its {operation}"
    )
