"""Pictures of what is annotated and what was found, side by side."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from detr.drawing import draw_detections, legible
from detr.evaluation.samples import Sample

_SCORE, _MOST = 0.5, 100  # the lowest score, and the number, of detections that are drawn
_GAP = 6  # pixels


def draw_sample(sample: Sample) -> Image.Image:
    """The annotated objects, and beside them what was found.

    Detections with a score of at least 0.5 are drawn, but at least as many as there are objects, and at least one: of
    a model that has hardly learned one sees what it finds most likely.
    """
    image = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    truth = captioned(
        draw_detections(image, sample.truth, enlarge=True, scores=False), f"{len(sample.truth)} annotated"
    )
    if sample.found is None:
        return truth
    sure = len(sample.found.above(_SCORE))
    shown = sample.found[: min(max(sure, len(sample.truth), 1), _MOST)]
    text = f"{sure} found" if len(shown) == sure else f"{sure} above {_SCORE}; drawn: the best {len(shown)}"
    return grid([truth, captioned(draw_detections(image, shown, enlarge=True), text)], columns=2)


def draw_batch(samples: Sequence[Sample]) -> Image.Image:
    """Images of training with their objects."""
    return grid([draw_sample(sample) for sample in samples], columns=4)


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """With a line of text above it."""
    height = max(22, picture.height // 30)
    framed = Image.new("RGB", (picture.width, picture.height + height), "white")
    framed.paste(picture, (0, height))
    text, font = legible(text, height * 0.6)
    ImageDraw.Draw(framed).text((2, 2), text, fill="black", font=font)
    return framed


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows, each with the room that the largest needs."""
    width, height = (max(sizes) + _GAP for sizes in zip(*(picture.size for picture in pictures), strict=True))
    rows, columns = -(-len(pictures) // columns), min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet
