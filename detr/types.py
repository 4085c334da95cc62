"""Every value that crosses a floor: what goes into the detector, what comes out, what it is compared with."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from PIL import Image
from torch import Tensor

from detr.errors import UserError
from detr.masks import Masks
from detr.text import printable

Container = TypeVar("Container", bound="TensorContainer")
Index = slice | Int64[Tensor, " chosen"]

_SHOWN = 5  # detections in a repr


def exporting() -> bool:
    """Whether torch.export traces a model now; always False before torch 2.7."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()


@dataclass(frozen=True)
class Category:
    """One class of a data set: `id` as in the annotation file (any integer), and its name.

    is_thing: whether it is of countable objects, and not of stuff such as sky.
    """

    id: int
    name: str
    is_thing: bool = True


class TensorContainer:
    """A frozen dataclass with tensors among its fields. What is done to one of them is done to all, new ones included.

    Fields that are no tensors stay as they are. A field that is None is not there.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of their fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self: Container, function: Callable[[Tensor], Tensor]) -> Container:
        """The same with a function applied to each tensor."""
        return replace(self, **{name: function(value) for name, value in self.tensors().items()})  # type: ignore[type-var]

    def to(self: Container, device: torch.device | str) -> Container:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: Container) -> Container:
        return self.map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class ImageBatch(TensorContainer):
    """Images of different sizes, padded at the right and bottom to the largest.

    images: (B, 3, H, W); uint8 RGB as they come from the loader, float after `normalized`.
    mask: (B, H, W), True where there is padding.
    padded: whether `mask` holds any True. The loader knows it, which saves asking the device; else it is looked up.
    """

    images: Shaped[Tensor, "batch 3 height width"]
    mask: Bool[Tensor, "batch height width"]
    padded: bool | None = None

    def __post_init__(self) -> None:
        if self.padded is None:
            object.__setattr__(self, "padded", bool(self.mask.any()))

    def __len__(self) -> int:
        return len(self.images)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image without padding."""
        valid = ~self.mask
        sides = torch.stack((valid[:, :, 0].sum(1), valid[:, 0].sum(1)), dim=1).tolist()
        return [(height, width) for height, width in sides]

    def normalized(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> "ImageBatch":
        """uint8 images as float with a mean and a deviation taken out, padding exactly 0; others as they are.

        mean, std: of the colors, RGB, in [0, 1]. Runs where the images are, so a quarter of the bytes cross to the
        device.
        """
        if self.images.is_floating_point():
            return self
        mean, scale = (
            torch.as_tensor(values, device=self.images.device).mul(255).view(1, 3, 1, 1) for values in (mean, std)
        )
        images = self.images.float().sub_(mean).mul_(scale.reciprocal_())
        if self.padded:
            images.masked_fill_(self.mask.unsqueeze(1), 0.0)
        return replace(self, images=images)

    def padded_to(self, divisor: int) -> "ImageBatch":
        """Padded on until height and width are multiples of a number of pixels."""
        height, width = self.images.shape[-2:]
        more = (0, -width % divisor, 0, -height % divisor)
        # A program for any size always pads, by none where that is enough.
        if divisor == 1 or not (exporting() or any(more)):
            return self
        return ImageBatch(images=F.pad(self.images, more), mask=F.pad(self.mask, more, value=True), padded=True)


@dataclass(frozen=True)
class Target(TensorContainer):
    """What is in one image. The first dimension of every tensor is that of the objects.

    labels: (n,) contiguous, 0..K-1.
    boxes: (n, 4) as center x, center y, width, height in [0, 1] of the image.
    image_id: as in the annotation file.
    original_size: (height, width) in pixels that detections are reported in.
    masks: (n, H, W) in the pixels of the image, without its padding; None where they are not asked for.
    """

    labels: Int64[Tensor, " n"]
    boxes: Float[Tensor, "n 4"]
    image_id: int
    original_size: tuple[int, int]
    masks: Bool[Tensor, "n height width"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, objects: Index) -> "Target":
        """Some of the objects, or some of them several times."""
        return self.map(lambda tensor: tensor[objects])


@dataclass(frozen=True)
class Matches(TensorContainer):
    """Pairs of one query and one target, the same number M in each of the L decoder layers.

    image: (M,) index in the batch; query: (L, M) index of the query; target: (L, M) index in the targets of the whole
    batch, concatenated. Pairs are ordered by image.
    """

    image: Int64[Tensor, " pairs"]
    query: Int64[Tensor, "layers pairs"]
    target: Int64[Tensor, "layers pairs"]

    def first_layer(self) -> "Matches":
        return replace(self, query=self.query[:1], target=self.target[:1])


@dataclass(frozen=True)
class Predictions(TensorContainer):
    """Outputs of the decoder layers, the last layer last (one layer only without auxiliary losses).

    The first dimensions of every tensor are layer, image and query.

    logits: (L, B, Q, C); for sigmoid losses C = K classes, for the softmax loss C = K + 1 and the last means no object.
    boxes: (L, B, Q, 4) as center x, center y, width, height in [0, 1] of each image without its padding.

    distributions: (L, B, Q, 4, N + 1) logits of how far the left, top, right and bottom edges move from those of the
        preliminary boxes, as in `detr.edges`; from models that have such (D-FINE: Peng et al., ICLR 2025).
    masks: (1, B, Q, h, w) logits of the last layer's masks over the padded images, at a fraction of their size; from
        models that have such.
    mask_of: in training, in place of all masks, what gives those (pairs, h, w) of some queries, by index of image and
        query (pairs,).
    mask_size: (height, width) in pixels of the images with their padding.

    Further predictions are there in training only, from models that have such parts. They are no tensors: only
    `everything` includes them. All other methods, `to` among them, leave them as they are, except for `preliminary`,
    whose queries are the same: what is done to the other fields is done to it.

    preliminary: what the first layer predicts before the edges of its boxes move, as one layer.
    proposals: what the encoder proposed and the queries started from, as one layer. Where C = 1 < K they only separate
        objects from background.
    groups: further groups of queries, each to be matched on its own: (G * L, B, Q, C), a group's layers in a row.
    denoising: what became of the denoising queries.
    """

    logits: Float[Tensor, "layers batch queries classes"]
    boxes: Float[Tensor, "layers batch queries 4"]
    distributions: Float[Tensor, "layers batch queries 4 bins"] | None = None
    masks: Float[Tensor, "1 batch queries h w"] | None = None
    mask_of: Callable[[Tensor, Tensor], Tensor] | None = None
    mask_size: tuple[int, int] | None = None
    preliminary: "Predictions | None" = None
    proposals: "Predictions | None" = None
    groups: "Predictions | None" = None
    denoising: "DenoisingPredictions | None" = None

    @classmethod
    def stack(cls, layers: Sequence[dict[str, Tensor]]) -> "Predictions":
        """From the tensors of each layer, by field: logits (B, Q, C), boxes (B, Q, 4)."""
        stacked: dict[str, Any] = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        return cls(**stacked)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Predictions":
        mapped = super().map(function)
        return mapped if self.preliminary is None else replace(mapped, preliminary=self.preliminary.map(function))

    def layers(self, chosen: slice) -> "Predictions":
        """Some of the layers, such as `slice(-1, None)` for the last."""
        return self.map(lambda tensor: tensor[chosen])

    def select(self, *, images: slice = slice(None), queries: slice = slice(None)) -> "Predictions":
        """Some of the images or queries."""
        chosen = self.map(lambda tensor: tensor[:, images, queries])
        mask_of = self.mask_of
        if mask_of is None:
            return chosen
        kept_images, kept_queries = (
            torch.arange(count, device=self.boxes.device)[kept]
            for count, kept in zip(self.boxes.shape[1:3], (images, queries), strict=True)
        )
        return replace(chosen, mask_of=lambda image, query: mask_of(kept_images[image], kept_queries[query]))

    def has(self, field: str) -> bool:
        """Whether a field is there, masks in either form."""
        return getattr(self, field) is not None or (field == "masks" and self.mask_of is not None)

    def everything(self) -> Iterator[Tensor]:
        """All tensors, those of further predictions included."""
        yield from self.tensors().values()
        if self.mask_of is not None:
            first = torch.zeros(1, dtype=torch.int64, device=self.boxes.device)
            yield self.mask_of(first, first)
        denoised = None if self.denoising is None else self.denoising.predictions
        for further in (self.preliminary, self.proposals, self.groups, denoised):
            if further is not None:
                yield from further.everything()


@dataclass(frozen=True)
class DenoisingPredictions:
    """Predictions of denoising queries, each made from a target or, for contrast, from its surroundings.

    predictions: (L, 1, V, C), those of the whole batch in a row, as if of one image.
    matches: which query is to restore which target, the same in all layers; the rest are to find nothing.
    copies: how many times each target was disturbed, by which the losses are divided.
    """

    predictions: Predictions
    matches: Matches
    copies: int


class Detection(NamedTuple):
    """One of the things that were found in an image.

    box: x1, y1, x2, y2 in pixels of the original image. score: in [0, 1]. label: the index of its class.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    label: int


@dataclass(frozen=True)
class Detections(TensorContainer):
    """What was found in one image, best score first. The first dimension of every tensor is that of the detections.

    Iteration and an index give each as a `Detection`, a slice gives some of them as `Detections`.

    boxes: (n, 4) as x1, y1, x2, y2 in pixels of the original image.
    scores: (n,) in [0, 1].
    labels: (n,) contiguous class indices; `names` holds the same as text.
    queries: (n,) index of the object query that found it; with sigmoid scores one query may find several.
    path: the file of their image, where they were found in a file.
    masks: in pixels of the original image; None from models without masks.
    """

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int64[Tensor, " n"]
    names: list[str]
    queries: Int64[Tensor, " n"]
    path: str | Path | None = None
    masks: Masks | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        columns = (self.scores.tolist(), map(tuple, self.boxes.tolist()), self.labels.tolist())
        return map(Detection, self.names, *columns)

    @overload
    def __getitem__(self, chosen: int) -> Detection: ...

    @overload
    def __getitem__(self, chosen: slice) -> "Detections": ...

    def __getitem__(self, chosen: int | slice) -> "Detection | Detections":
        numbers = range(len(self))[chosen]
        if isinstance(numbers, range):
            return self.select(torch.tensor(numbers, dtype=torch.int64))
        return next(iter(self.select(torch.tensor([numbers]))))

    def __repr__(self) -> str:
        shown = [f"{one.name} {one.score:.2f} at {tuple(map(round, one.box))}" for one in self[:_SHOWN]]
        more = [f"{len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        return f"Detections({len(self)}{': ' if shown else ''}{printable(', '.join(shown + more))})"

    def _repr_html_(self) -> str:
        """For notebooks: the best ones in a table, beside the drawn image where its file is known and there."""
        from detr.notebook import as_html

        return as_html(self)

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`, with names in data["class_name"] and queries in data["query"].

        Masks are there as pixels. Raises UserError where supervision is missing.
        """
        columns = (self.boxes, self.scores, self.labels, self.queries)
        boxes, scores, labels, queries = (column.detach().cpu().numpy() for column in columns)
        data = {"class_name": np.array(self.names, dtype=str), "query": queries}
        mask = None if self.masks is None else self.masks.decode().numpy()
        return _supervision().Detections(xyxy=boxes, confidence=scores, class_id=labels, mask=mask, data=data)

    @classmethod
    def from_supervision(cls, found: Any) -> "Detections":
        """From `supervision.Detections`, best score first.

        Without scores these are 1, as of annotations; without data["class_name"] names are the numbers of classes.
        Raises UserError where there are no classes, and where supervision is missing.
        """
        if not isinstance(found, _supervision().Detections):
            raise UserError(f"Detections.from_supervision: wanted supervision.Detections, got {type(found).__name__}.")
        if found.class_id is None:
            raise UserError("Detections.from_supervision: wanted classes, got class_id=None. Set class_id.")
        count = len(found)
        scores = np.ones(count) if found.confidence is None else found.confidence
        names = found.data.get("class_name", found.class_id)
        queries = found.data.get("query", range(count))
        detections = cls(
            boxes=torch.tensor(found.xyxy, dtype=torch.float32).reshape(-1, 4),
            scores=torch.tensor(scores, dtype=torch.float32),
            labels=torch.tensor(found.class_id, dtype=torch.int64),
            names=[str(name) for name in names],
            queries=torch.tensor(queries, dtype=torch.int64),
            masks=None if found.mask is None else Masks.encode(torch.tensor(found.mask, dtype=torch.bool)),
        )
        return detections.select(detections.scores.argsort(descending=True, stable=True))

    def above(self, threshold: float | Float[Tensor, " classes"]) -> "Detections":
        """Those with a score of at least `threshold`, of one number for all or one for each label."""
        least = threshold[self.labels] if isinstance(threshold, Tensor) else threshold
        return self.select((self.scores >= least).nonzero()[:, 0])

    def select(self, chosen: Int64[Tensor, " chosen"]) -> "Detections":
        """Some of the detections."""
        names = [self.names[index] for index in chosen.tolist()]
        masks = None if self.masks is None else self.masks.select(chosen)
        return replace(self.map(lambda tensor: tensor[chosen]), names=names, masks=masks)

    def draw(self, image: Image.Image | str | Path | None = None, *, enlarge: bool = False) -> Image.Image:
        """A copy of their image, upright, with masks, boxes, names and scores.

        image: a file or a Pillow image; None: `path`. enlarge: make one that is too small for text larger.
        Raises UserError where the file cannot be read, or is not known.
        """
        from detr.drawing import draw_detections
        from detr.images import read_image, upright_tensor

        image = self.path if image is None else image
        if image is None:
            raise UserError("Detections.draw: these were not found in a file. Give their image: found.draw(IMAGE).")
        pixels = upright_tensor(image) if isinstance(image, Image.Image) else read_image(image)
        return draw_detections(Image.fromarray(pixels.permute(1, 2, 0).numpy()), self, enlarge=enlarge)

    def save(self, path: str | Path) -> None:
        """Write them as JSON: a list of {"name", "score", "box": [x1, y1, x2, y2], "label"}.

        Where there are masks, each has "segmentation" too, the run-length encoding of COCO's results.
        Raises UserError for a path that does not end in .json; `draw` returns a picture, which has a `save` too.
        """
        if Path(path).suffix != ".json":
            raise UserError(
                f"Detections.save: wanted a path that ends in .json, got {path}. A picture is saved with "
                "found.draw(IMAGE).save(PATH)."
            )
        masks = [{}] * len(self) if self.masks is None else [{"segmentation": row} for row in self.masks.rows()]
        rows = [{**one._asdict(), **mask} for one, mask in zip(self, masks, strict=True)]
        Path(path).write_text(json.dumps(rows, indent=2) + "\n")


def _supervision() -> Any:
    try:
        import supervision
    except ImportError:
        raise UserError(
            "This needs the package supervision. Install it with pip install 'detr-framework[supervision]'."
        ) from None
    return supervision
