"""A detector on plain tensors, and what torch.export makes of it."""

import traceback
from collections.abc import Mapping

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

from detr.errors import UserError
from detr.export.description import Description
from detr.models.deployment import deployed
from detr.models.detr import DETR
from detr.postprocess import ranked
from detr.types import ImageBatch


class Graph(nn.Module):
    """Images to what `Description.outputs` names, with the model's last layer alone (`deployed`)."""

    def __init__(self, model: DETR, description: Description) -> None:
        super().__init__()
        self.model, self.description = deployed(model), description

    def forward(
        self, images: Shaped[Tensor, "batch 3 height width"], sizes: Int64[Tensor, "batch 2"] | None = None
    ) -> tuple[Tensor, ...]:
        """sizes: (height, width) of each image without its padding, which is at the right and bottom."""
        predictions = self.model(ImageBatch(images=images, mask=_mask(images, sizes), padded=sizes is not None))
        if not self.description.postprocess:
            masks = None if predictions.masks is None else predictions.masks[-1]
            found = [predictions.logits[-1].float(), predictions.boxes[-1].float(), masks]
        else:
            best = ranked(predictions, len(self.description.categories))
            found = [best.scores, best.labels, best.boxes, best.queries, best.masks]
        return tuple(output for output in found if output is not None)


def _mask(images: Tensor, sizes: Tensor | None) -> Tensor:
    batch, _, height, width = images.shape
    if sizes is None:
        return torch.zeros((batch, height, width), dtype=torch.bool, device=images.device)
    rows, columns = (torch.arange(count, device=images.device) for count in (height, width))
    return (rows[:, None] >= sizes[:, 0, None, None]) | (columns >= sizes[:, 1, None, None])


def trace(graph: Graph, example: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """The program that a graph runs on inputs like `example`, of any batch and size where the description allows it.

    Raises UserError that names the part of the model that cannot be exported.
    """
    free, description = torch.export.Dim.AUTO, graph.description
    batch = {} if description.batch_size else {0: free}
    shapes = {"images": batch if description.side else {**batch, 2: free, 3: free}, "sizes": batch}
    try:
        with torch.no_grad():
            program = torch.export.export(
                graph.eval(),
                tuple(example.values()),
                dynamic_shapes={name: shapes[name] for name in example},
                strict=False,
            )
    except Exception as error:
        raise UserError(
            f"The model cannot be exported: {_part(graph, error)} does not allow it. {type(error).__name__}: "
            + str(error).strip().partition("\n")[0]
        ) from error
    found = next(node for node in program.graph.nodes if node.name == "images").meta["val"].shape
    for name, place in (("batch size", 0), ("height", 2), ("width", 3)):
        if place in shapes["images"] and str(found[place]).isdigit():  # a constant may still be a SymInt
            raise UserError(
                f"The model cannot be exported for any {name}: one of its parts takes {found[place]} alone. Set "
                + ("batch_size=1." if place == 0 else "fixed_size=true.")
            )
    return program


def _part(graph: nn.Module, error: BaseException) -> str:
    """The innermost module at work when an error arose."""
    names = {id(module): name for name, module in graph.named_modules()}
    path = "the model"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if names.get(id(module)):
            path = f"{names[id(module)].removeprefix('model.')} ({type(module).__name__})"
    return path
