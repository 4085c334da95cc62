"""Detection on images with a trained checkpoint, from Python."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from PIL import Image
from torch import Tensor, nn

from detr.config import build_stored_model, compose, plain
from detr.contents import check_content, flag, record, whole
from detr.errors import NonFiniteOutputsError, UserError
from detr.evaluation import Thresholds, read_thresholds
from detr.export import ENDINGS, open_exported
from detr.folders import command
from detr.images import model_size, pad_to_batch, read_image, resize, upright_tensor
from detr.models.attention_maps import AttentionMaps, watch
from detr.models.detr import DETR
from detr.panoptic import PUBLISHED_THRESHOLD, panoptic_segmentations
from detr.postprocess import PUBLISHED_PAIRS, Ranked, non_finite, postprocess, ranked
from detr.published import PUBLISHED
from detr.segments import Panoptic
from detr.text import printable
from detr.types import Category, Detections, Predictions
from detr.weights import Published, as_checkpoint, load_state, read_weights, weights_file

logger = logging.getLogger(__name__)

ImageSource = str | Path | Image.Image | np.ndarray | Tensor
ScoreLimit = int | float | str | Path  # a number, "best", or a metrics.json of evaluate.py

# Published DETR and most of its family were evaluated at these sizes.
_PUBLISHED_SIZE, _PUBLISHED_MAX_SIZE = 800, 1333
# Sides of images in a checkpoint's configuration: more than this never fits into memory.
_SIDE = whole(1, 2**14)
_SIZES = record(data=record(size=_SIDE, max_size=_SIDE))
_SHAPE = record(square=flag)
_SHOWN = 5  # class names in a repr


@dataclass(frozen=True)
class Outputs:
    """What a model gives for a batch of images.

    raw: as the model gave it. sizes, original_sizes: (height, width) of each image as the model got it, without
    padding, and as it came. categories: the model's classes, by label.
    """

    raw: Predictions | Ranked
    sizes: Sequence[tuple[int, int]]
    original_sizes: Sequence[tuple[int, int]]
    categories: Sequence[Category]

    def detections(
        self, limit: float | Float64[Tensor, " classes"] = 0.0, max_dets: int = PUBLISHED_PAIRS
    ) -> list[Detections]:
        """Of each image, best score first. limit: as `Detector.limit` gives it. max_dets: the most of an image."""
        names = [category.name for category in self.categories]
        found = postprocess(self.raw, self.original_sizes, names, max_dets, sizes=self.sizes, threshold=limit)
        return [one[:max_dets] for one in found]

    def highest(self) -> float:
        """The best score of all."""
        best = self.raw if isinstance(self.raw, Ranked) else ranked(self.raw, len(self.categories), 1)
        return float(best.scores.max())

    def panoptic(self, threshold: float = PUBLISHED_THRESHOLD) -> list[Panoptic]:
        """The segments of each image. threshold: the least probability of what becomes one."""
        return panoptic_segmentations(
            self.raw,
            self.sizes,
            self.original_sizes,
            self.categories,
            padded_size=self.raw.mask_size,
            threshold=threshold,
        )


class Detector:
    """A model with what it takes to use it: class names and the size of its images.

    model: takes an ImageBatch, gives Predictions. categories: its classes, in the order of its labels.
    size, max_size: short side and limit of the long side that images are resized to.
    square: both sides are resized to `size` instead, whatever the aspect ratio.
    config: the configuration that it was trained with, None for published weights.
    thresholds: the scores with the best F1 by class, for threshold="best"; None where there are none.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        categories: Sequence[Category],
        size: int,
        max_size: int,
        square: bool = False,
        config: dict[str, Any] | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        self.model, self.categories, self.config = model.eval(), list(categories), config
        self.thresholds = thresholds
        self.size, self.max_size, self.square = size, max_size, square

    def __repr__(self) -> str:
        names = [category.name for category in self.categories[:_SHOWN]]
        more = ", ..." if len(self.categories) > _SHOWN else ""
        return (
            f"Detector({type(self.model).__name__}, "
            f"{len(self.categories)} classes: {printable(', '.join(names))}{more}, "
            f"{self.resizing}, on {self._device})"
        )

    @property
    def resizing(self) -> str:
        """The size that images are resized to, in words."""
        if self.square:
            return f"{self.size} x {self.size} pixels"
        return f"short side {self.size} and long side at most {self.max_size} pixels"

    @property
    def has_masks(self) -> bool:
        """Whether it finds masks too."""
        return getattr(self.model, "has_masks", False)

    @property
    def has_segments(self) -> bool:
        """Whether it can divide images into segments: it has masks, and logits of all queries."""
        return self.has_masks and getattr(self.model, "has_logits", True)

    @property
    def shows_attention(self) -> bool:
        """Whether it can show where it looks."""
        return isinstance(self.model, DETR)

    @property
    def one_by_one(self) -> bool:
        """Whether the model takes images one at a time alone, as some exported files do."""
        return getattr(self.model, "one_by_one", False)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.model.parameters()), torch.empty(0)).device

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        model: Any = None,
        allow_targets: Sequence[str] = (),
    ) -> "Detector":
        """Load a checkpoint of this framework, published weights of DETR or of another model of its family, or a file
        of export.py, which runs on the CPU.

        path: a file; the name of a published checkpoint, such as "detr_r50"; or hf:OWNER/REPOSITORY of transformers.
        model: a `model` configuration; needed for files of published weights, which come without one, and not used
        otherwise: a name brings its own.
        allow_targets: packages of your own that the checkpoint's model is built from, beside detr.models.
        Raises UserError where the file is missing, damaged, of another model, or names classes that are not allowed,
        and where the device is not there.
        """
        if Path(path).suffix.lower() in ENDINGS:
            return cls._from_exported(weights_file(path))
        _check_device(device)
        model = _model_of(str(path), model)
        weights = read_weights(path)
        config = thresholds = None
        if isinstance(weights, Published) and model is not None:
            logger.info("Using %s.", weights)
            categories = weights.categories or _unnamed(weights.converted.num_classes)
            side = weights.converted.family.square
            data = {
                "size": side or _PUBLISHED_SIZE,
                "max_size": side or _PUBLISHED_MAX_SIZE,
                "square": side is not None,
            }
        else:
            checkpoint = as_checkpoint(weights)
            categories, config = checkpoint.categories, checkpoint.config
            model = config["model"]
            if checkpoint.thresholds is not None:
                thresholds = Thresholds.from_content(checkpoint.thresholds, f"Checkpoint {path}: thresholds")
            check_content(config, _SIZES, f"Checkpoint {path}: its configuration")
            data = {"square": False, **config["data"]}  # older ones have no such option
            check_content(data, _SHAPE, f"Checkpoint {path}: its data options")
            if not categories:
                raise UserError(f"Checkpoint {path} has no classes, so it can detect nothing. Use an intact copy.")
        detector = build_stored_model(model, len(categories), weights, allow_targets, weights.state)
        load_state(detector, weights.state, weights)
        sizes: dict[str, Any] = {name: data[name] for name in ("size", "max_size", "square")}
        return cls(model=detector.to(device), categories=categories, config=config, thresholds=thresholds, **sizes)

    @classmethod
    def _from_exported(cls, path: Path) -> "Detector":
        model = open_exported(path)
        about = model.description
        thresholds = None
        if about.thresholds is not None:
            thresholds = Thresholds.from_content(about.thresholds, f"{path}: thresholds")
        return cls(
            model=model,
            categories=about.categories,
            size=about.size,
            max_size=about.max_size,
            square=about.square,
            config=about.config,
            thresholds=thresholds,
        )

    def resize_to(self, size: int | None = None, max_size: int | None = None, square: bool | None = None) -> None:
        """Work at another size of images, in pixels; the limit of the long side follows, unless it is given.

        square: whether both sides are resized to `size`; None: as before.
        """
        if size is not None:
            self.size, self.max_size = size, max(round(self.max_size * size / self.size), size)
        self.max_size = max_size or self.max_size
        self.square = self.square if square is None else square

    def resized(self, image: UInt8[Tensor, "3 _ _"]) -> UInt8[Tensor, "3 _ _"]:
        """An image at the size that the model gets it at."""
        height, width = image.shape[1:]
        return resize(image, model_size(height, width, self.size, self.max_size, square=self.square))

    def limit(self, threshold: ScoreLimit) -> float | Float64[Tensor, " classes"]:
        """The lowest score that counts: a number as it is; the best one of each label for "best" or a metrics.json.

        Raises UserError for numbers outside of [0, 1], and where there are no best ones.
        """
        if isinstance(threshold, int | float):
            if not 0 <= threshold <= 1:
                raise UserError(
                    f'Detector.predict: wanted a threshold of at least 0 and at most 1, or "best", got {threshold}.'
                )
            return float(threshold)
        thresholds = self.thresholds if threshold == "best" else self._thresholds_of(threshold)
        if thresholds is None:
            raise UserError(
                "threshold=best needs the thresholds of an evaluation, and these weights hold none. Evaluate them with "
                f"{command('evaluate')} checkpoint=PATH data=..., and give the evaluation/metrics.json that it writes, "
                "as threshold=PATH. Or give a number."
            )
        return torch.tensor(thresholds.scores(self.categories), dtype=torch.float64)

    def _thresholds_of(self, path: str | Path) -> Thresholds:
        """Those of a metrics.json; a warning names classes that it does not know."""
        thresholds = read_thresholds(path)
        unknown = [category.name for category in self.categories if thresholds.of(category) is None]
        if len(unknown) == len(self.categories):
            raise UserError(
                f"threshold={path} knows none of the model's classes, such as {printable(unknown[0])}. Give the "
                "metrics.json of an evaluation of this model."
            )
        if unknown:
            text = "threshold=%s does not know %d of the model's %d classes, such as %s. They get that of all together."
            logger.warning(text, path, len(unknown), len(self.categories), printable(unknown[0]))
        return thresholds

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        threshold: ScoreLimit = 0.5,
        batch_size: int = 4,
        max_dets: int = PUBLISHED_PAIRS,
    ) -> list[Detections]:
        """Detections with a score of at least `threshold`, for each image, with boxes in its own pixels.

        threshold: in [0, 1], or "best": for each class the one with the best F1 in the last evaluation of its training,
            or a metrics.json of evaluate.py, for those that it found.
        images: one or several; paths, Pillow images, arrays (H, W, 3), or (H, W) in shades of gray, or tensors
        (3, H, W), both RGB and either uint8 or float in [0, 1]. OpenCV's arrays are BGR, which no one can see in them:
        give image[..., ::-1]. Paths and Pillow images are turned upright as their EXIF data say.
        max_dets: the most detections of an image, the best.
        Raises UserError for a threshold outside of [0, 1], for images without pixels or of another kind, and where the
        model's outputs are not finite.
        """
        limit = self.limit(threshold)
        if max_dets < 1:
            raise UserError(f"Detector.predict: wanted max_dets of at least 1, got {max_dets}.")
        images = [images] if isinstance(images, ImageSource) else list(images)
        found = [one for outputs in self.outputs(images, batch_size) for one in outputs.detections(limit, max_dets)]
        paths = (image if isinstance(image, str | Path) else None for image in images)
        return [replace(detections, path=path) for detections, path in zip(found, paths, strict=True)]

    def panoptic(
        self, images: ImageSource | Iterable[ImageSource], threshold: float = PUBLISHED_THRESHOLD, batch_size: int = 4
    ) -> list[Panoptic]:
        """What each pixel of each image belongs to: things one by one, and each kind of stuff as one.

        threshold: the least probability of what becomes a segment. Labels of the segments are ranks in `categories`.
        Raises UserError where the model has no masks, and as `predict` does.
        """
        if not self.has_masks:
            raise UserError("Detector.panoptic: wanted a model with masks, such as detr_r50_panoptic, got one without.")
        images = [images] if isinstance(images, ImageSource) else list(images)
        return [one for outputs in self.outputs(images, batch_size) for one in outputs.panoptic(threshold)]

    def outputs(self, images: Sequence[ImageSource], batch_size: int = 4) -> Iterator[Outputs]:
        """What the model gives for each batch of images, which are as `predict` takes them.

        Detections and segments can both be read from it, at any threshold, without running the model again.
        Raises UserError as `predict` does.
        """
        if batch_size < 1:
            raise UserError(f"Detector.predict: wanted batch_size of at least 1, got {batch_size}.")
        step = 1 if self.one_by_one else batch_size
        for start in range(0, len(images), step):
            yield self._run([_to_tensor(image) for image in images[start : start + step]])

    @torch.inference_mode()
    def attention(
        self, image: ImageSource, point: Sequence[float] = (0.5, 0.5), threshold: ScoreLimit = 0.5
    ) -> AttentionMaps:
        """Where the model looks in one image, for each detection with a score of at least `threshold`.

        point: (x, y) in [0, 1] of the image, the place whose self-attention is given.
        """
        if len(point) != 2 or not all(0 <= part <= 1 for part in point):
            raise UserError(
                f"Detector.attention: wanted point as x and y in [0, 1] of the image, got {list(point)}. Correct "
                "attention_point, such as attention_point=[0.5,0.5] for the center."
            )
        if not self.shows_attention:
            raise UserError(
                f"Detector.attention: wanted a model of class DETR, got {type(self.model).__name__}, whose attention "
                "is not known. Leave attention=false."
            )
        place = float(point[0]), float(point[1])
        assert isinstance(self.model, DETR)
        with watch(self.model, place) as seen:
            [found] = self._run([_to_tensor(image)]).detections(self.limit(threshold))
        assert seen.decoder is not None
        return AttentionMaps(
            detections=found,
            point=place,
            decoder=seen.decoder.cpu()[found.queries],
            encoder=None if seen.encoder is None else seen.encoder.cpu(),
            blocks=seen.blocks,
        )

    @torch.inference_mode()
    def _run(self, images: Sequence[Tensor]) -> Outputs:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        batch = pad_to_batch([self.resized(image) for image in images])
        raw = self.model(batch.to(self._device))
        if damaged := non_finite(raw):
            raise NonFiniteOutputsError(
                f"The model's predictions became NaN or infinite for {len(damaged)} of {len(images)} images. Its "
                "weights are damaged, or its training had diverged. Use another checkpoint, such as one from before."
            )
        return Outputs(raw=raw, sizes=batch.sizes(), original_sizes=sizes, categories=self.categories)


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        why = str(error).partition("\n")[0]
        raise UserError(
            f'Detector.from_checkpoint: device {device} cannot be used here: {why}. Give device="cpu".'
        ) from error


def _model_of(name: str, model: Any) -> Any:
    """The model that a published checkpoint of this name brings; for anything else the one that is given."""
    if name not in PUBLISHED:
        return model
    options = PUBLISHED[name].options
    own = plain(compose(options.split()).model)
    if model is not None and plain(model) != own:
        raise UserError(
            f"The published weights {name} bring their own model, {options}. Leave the options of model out."
        )
    return own


def _unnamed(count: int) -> list[Category]:
    """Classes of which the number alone is known."""
    return [Category(id=number, name=str(number)) for number in range(count)]


def _to_tensor(image: ImageSource) -> Tensor:
    """Any accepted kind of image as uint8 (3, H, W)."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image) and 0 not in image.size:
        return upright_tensor(image)
    wanted = "an RGB array (height, width, 3) or tensor (3, height, width), uint8 or float in [0, 1]"
    if isinstance(image, np.ndarray):
        image = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
        image = torch.from_numpy(np.array(image)).movedim(-1, 0)  # a copy: the array may be read-only
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        shape = tuple(getattr(image, "shape", getattr(image, "size", ())))
        raise UserError(f"Detector.predict: wanted {wanted}, got {type(image).__name__} of shape {shape}.")
    if image.is_floating_point():
        if not 0 <= float(image.min()) <= float(image.max()) <= 1:
            raise UserError(
                f"Detector.predict: wanted {wanted}, got floats from {image.min():.3g} to {image.max():.3g}."
            )
        return (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise UserError(f"Detector.predict: wanted {wanted}, got {image.dtype}.")
    return image
