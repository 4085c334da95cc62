"""What an exported file says of itself."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from detr.contents import Check, check_content, flag, items, maybe, number, plain, record, text, whole
from detr.errors import UserError
from detr.folders import command
from detr.types import Category

KEY = "detr"  # of the file's metadata
_FORMAT = "detr-export-1"
_SIDE = whole(1, 2**14)
_COLORS = items(number(), count=3)
_CONTENT: Check = record(
    format=text,
    version=text,
    precision=text,
    categories=items(record(id=whole(-(2**63), 2**63 - 1), name=text, is_thing=flag)),
    size=_SIDE,
    max_size=_SIDE,
    square=flag,
    normalize=flag,
    mean=_COLORS,
    std=_COLORS,
    postprocess=flag,
    masks=flag,
    padding=flag,
    batch_size=maybe(whole(1)),
    side=maybe(_SIDE),
    thresholds=plain,
    config=plain,
    proof=plain,
)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What it takes to use an exported file, and where it is from.

    categories: the classes, in the order of the labels.
    size, max_size, square: how images are resized, as in `Detector`.
    normalize: images are uint8 RGB, and the file normalizes them; else they are float32 and normalized already.
    mean, std: of the colors, RGB, in [0, 1], that normalizing takes out.
    postprocess: the outputs are `Ranked`; else they are logits and boxes of the last layer's queries.
    masks: the last output is logits of masks.
    padding: images may be padded at the right and bottom; a second input says (height, width) of each without.
    batch_size: of the only batches that it takes; None: of any.
    side: height and width of the only images that it takes, with their padding; None: any.
    precision: fp32, fp16 or int8.
    version: of this framework.
    thresholds: the content of `Thresholds`. config: the configuration of its training. Either may be None.
    proof: how far its detections are from those of the model, as `Proof.content` has it; None until it is proven.
    """

    categories: Sequence[Category]
    size: int
    max_size: int
    square: bool
    normalize: bool
    mean: Sequence[float]
    std: Sequence[float]
    postprocess: bool
    masks: bool
    padding: bool
    batch_size: int | None
    side: int | None
    precision: str
    version: str
    thresholds: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    proof: dict[str, Any] | None = None

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order: images (B, 3, H, W), and sizes (B, 2) where there is padding."""
        return ["images", "sizes"] if self.padding else ["images"]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order.

        scores (B, N), labels (B, N), boxes (B, N, 4) as x1, y1, x2, y2 and queries (B, N), as `Ranked` has them; or
        logits (B, Q, C) and boxes_cxcywh (B, Q, 4). Then masks (B, Q, h, w), where there are any.
        """
        names = ["scores", "labels", "boxes", "queries"] if self.postprocess else ["logits", "boxes_cxcywh"]
        return [*names, "masks"] if self.masks else names

    @property
    def one_by_one(self) -> bool:
        """Whether images of different sizes have to come in batches of one, because padding would change them."""
        return not self.padding and not self.square

    def as_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, content: str | None, source: object) -> "Description":
        """source: the file, for messages. Raises UserError where it says nothing of the kind, or is damaged."""
        try:
            found = json.loads(content or "")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or "format" not in found:
            raise UserError(
                f"{source} does not say what its inputs and outputs are. Wanted a file of export.py: make one with "
                f"{command('export')} checkpoint=PATH."
            )
        if found["format"] != _FORMAT:
            raise UserError(f"{source} is of a newer version of this framework. Update it, or export the model again.")
        check_content(found, _CONTENT, source)
        fields = {name: value for name, value in found.items() if name in cls.__dataclass_fields__}
        return cls(**{**fields, "categories": [Category(**row) for row in found["categories"]]})
