"""A page that explains an evaluation (templates/evaluation.html.j2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from detr.drawing import draw_detections
from detr.errors import UserError
from detr.evaluation import CocoResults
from detr.evaluation.diagnosis import LEVEL, Box, Confusion, Diagnosis, ImageErrors, Interval, Suspect, diagnose
from detr.images import embedded, read_image
from detr.reporting.pages import HIGHER, INK, LOWER, MUTED, SHADE, WIDTHS, blank_figure, drawn, number, page_template
from detr.types import Detections

Reader = Callable[[str], Image.Image | None]  # file name -> RGB image, or None where it cannot be read
Verdict = Literal["higher", "lower", "within chance", "no value"]
SIGNS: dict[Verdict, str] = {
    "higher": "▲ higher",
    "lower": "▼ lower",
    "within chance": "≈ within chance",
    "no value": "\N{EN DASH}",
}
_SIDE, _PART = 380, 260  # pixels of the long side of pictures
_QUALITY = 72  # of JPEG
_MOST_CLASSES, _MOST_PAIRS, _MOST_CHANGED = 12, 10, 10
_GRAY = (190, 190, 190)
_MEANINGS = {
    "AP": "IoU 0.50 to 0.95, all classes",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "objects below 32² pixels",
    "APm": "objects of 32² to 96² pixels",
    "APl": "objects above 96² pixels",
    "AR1": "recall of the best detection",
    "AR10": "recall of the best 10",
    "ARs": "recall of small objects",
    "ARm": "recall of medium objects",
    "ARl": "recall of large objects",
}


def explain(
    annotations: Mapping[str, Any],
    results: CocoResults,
    folder: Path,
    *,
    title: str,
    max_dets: int,
    against: CocoResults | None = None,
    against_name: str = "",
) -> tuple[bytes, bytes]:
    """The page of an evaluation and its numbers as JSON, as files have them. Arguments as of `diagnose`.

    folder: of the images. title: what was evaluated.
    """
    diagnosis = diagnose(annotations, results, max_dets=max_dets, against=against, against_name=against_name)
    return report_page(diagnosis, folder_reader(folder), title=title).encode(), diagnosis.as_json().encode()


def report_page(diagnosis: Diagnosis, read: Reader, *, title: str) -> str:
    """The page as HTML, which needs nothing else.

    read: gives the image of a file name; only those on the page are read. title: what was evaluated.
    """
    d = diagnosis
    by_ap = sorted(d.classes, key=lambda row: (row.ap.value is None, row.ap.value or 0))
    return page_template("evaluation.html.j2").render(
        d=d,
        title=title,
        verdict=_verdict(d),
        meanings={**_MEANINGS, f"AR{d.max_dets}": f"recall of the best {d.max_dets}"},
        sentences=_sentences(d),
        described=_described(d),
        verdicts=verdict,
        signs=SIGNS,
        changed=_changed(d),
        classes=by_ap,
        matrix=_matrix(d.confusion),
        pairs=d.confusion.pairs[:_MOST_PAIRS],
        slices={name: list(parts) for name, parts in groupby(d.slices, key=lambda part: part.attribute)},
        worst=[_pair(image, read) for image in d.worst],
        suspects=[{"of": suspect, "picture": _part(suspect, read)} for suspect in d.suspects],
        charts={
            "errors": _error_chart(d),
            **({"curves": _curve_chart(d)} if d.curves else {}),
            **({"calibration": _calibration_chart(d)} if d.calibration.bins else {}),
        },
        level=LEVEL,
        today=date.today(),
    )


def folder_reader(folder: Path) -> Reader:
    """Reads images of a folder; names that lead out of it are not read."""

    def read(name: str) -> Image.Image | None:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            return None
        try:
            return Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
        except UserError:
            return None

    return read


def verdict(difference: Interval) -> Verdict:
    """Whether a difference's interval leaves 0 out."""
    if difference.low is None or difference.high is None:
        return "no value"
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "within chance"


def _verdict(d: Diagnosis) -> str:
    ap = d.metrics["AP"]
    if ap.value is None:
        return "There are no objects to find, so there is no AP."
    text = f"AP {ap.value:.3f}"
    if ap.low is not None and ap.high is not None:
        text += f", {100 * LEVEL:g} % of resamples from {ap.low:.3f} to {ap.high:.3f}"
    worst = d.errors[0]
    return f"{text}. " + (
        f"Errors of the kind “{worst.name}” cost most: {worst.cost:.3f} AP50."
        if worst.cost > 0
        else "No single kind of error costs AP50."
    )


def _sentences(d: Diagnosis) -> dict[str, str]:
    return {
        "metrics": _metrics_sentence(d),
        "difference": _difference_sentence(d),
        "errors": _errors_sentence(d),
        "classes": _classes_sentence(d),
        "confusion": _confusion_sentence(d),
        "calibration": _calibration_sentence(d),
        "slices": _slices_sentence(d),
    }


def _metrics_sentence(d: Diagnosis) -> str:
    return (
        f"AP is what detectors are compared by; low and high enclose {100 * LEVEL:g} % of {d.resamples:,} resamples of "
        f"the images (seed {d.seed}). Take a difference to another detector seriously only where report_against shows "
        "an interval without 0. A dash: nothing to find."
    )


def _difference_sentence(d: Diagnosis) -> str:
    if d.difference is None:
        return ""
    interval, found = d.difference.metrics["AP"], verdict(d.difference.metrics["AP"])
    if found == "no value" or interval.value is None:
        return "There is nothing to find, so there is no difference."
    return {
        "higher": f"This AP is higher by {interval.value:.3f}, and the choice of images does not explain it.",
        "lower": f"This AP is lower by {-interval.value:.3f}, and the choice of images does not explain it.",
        "within chance": f"The AP differs by {number(interval.value, '+.3f')}, which the choice of images may explain: "
        "evaluate on more images to tell the two apart.",
    }[found]


def _errors_sentence(d: Diagnosis) -> str:
    first, second = d.errors[:2]
    if first.cost <= 0:
        return "No single kind of error costs AP50."
    text = f"Errors of the kind “{first.name}” cost {first.cost:.3f} AP50"
    return text + (
        f", then “{second.name}” {second.cost:.3f}." if second.cost > 0 else "; the other kinds cost nothing."
    )


def _classes_sentence(d: Diagnosis) -> str:
    known = [row for row in d.classes if row.ap.value is not None]
    if not known:
        return "No class has an object to find."
    lowest = min(known, key=lambda row: row.ap.value or 0)
    sizes = {"small": "APs", "medium": "APm", "large": "APl"}
    values = {size: value for size, name in sizes.items() if (value := d.metrics[name].value) is not None}
    text = f"The lowest AP has “{lowest.name}”, {lowest.ap.value:.3f} with {lowest.objects:,} objects; it comes first."
    if len(values) > 1:
        size = min(values, key=lambda size: values[size])
        text += f" Of the sizes, {size} objects are worst, {values[size]:.3f}."
    return text


def _confusion_sentence(d: Diagnosis) -> str:
    matrix = d.confusion.matrix
    objects, missed, wrong = int(matrix[:-1].sum()), int(matrix[:-1, -1].sum()), int(matrix[-1].sum())
    if not objects:
        return f"There are no objects; {wrong:,} detections above the thresholds are where nothing is annotated."
    text = f"Of {objects:,} objects, {missed:,} are not found; {wrong:,} detections are where nothing is annotated."
    if d.confusion.pairs:
        pair = d.confusion.pairs[0]
        text += (
            f" Most often confused: “{pair.true}”, found as “{pair.found_as}” {_times(pair.count)}. Look whether these "
            "two are annotated consistently."
        )
    else:
        text += " No class is taken for another one."
    return text


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _calibration_sentence(d: Diagnosis) -> str:
    bins = d.calibration.bins
    if not bins:
        return ""
    count = sum(part.count for part in bins)
    gap = sum(part.count * (part.right - part.score) for part in bins) / count
    if abs(gap) < 0.005:
        lean = "neither too high nor too low on average"
    else:
        lean = f"{'too low' if gap > 0 else 'too high'} by {abs(gap):.3f} on average"
    return (
        f"The share of right detections by score; on the line a score is a probability. The mean gap is "
        f"{d.calibration.error or 0:.3f} (expected calibration error), and scores are {lean}. Larger dots are more "
        "detections. Gaps change no AP, which depends on the order of scores alone; read no score as a probability "
        "where they are large."
    )


def _slices_sentence(d: Diagnosis) -> str:
    known = [part for part in d.slices if part.ap.value is not None]
    if not known:
        return "No group of images has an object to find."
    lowest = min(known, key=lambda part: part.ap.value or 0)
    return (
        f"The lowest AP is at “{lowest.attribute}: {lowest.value}”, {lowest.ap.value:.3f} on {lowest.images:,} images. "
        "Where intervals do not overlap, the detector is worse on such images, or they are harder."
    )


def _described(d: Diagnosis) -> dict[str, str]:
    """The charts in words."""
    curves = {iou: f"{values.mean():.3f}" for iou, values in d.curves.items()}
    return {
        "errors": "AP50 that each kind of error costs: " + "; ".join(f"{e.name} {e.cost:.3f}" for e in d.errors) + ".",
        "curves": "Precision against recall; mean precision "
        + "; ".join(f"{v} at IoU {k}" for k, v in curves.items())
        + ".",
        "calibration": "Share of right detections by score: "
        + "; ".join(f"{part.right:.2f} at {part.score:.2f}" for part in d.calibration.bins)
        + ".",
    }


def _changed(d: Diagnosis) -> list[tuple[str, Interval]]:
    if d.difference is None:
        return []
    known = [(name, found) for name, found in d.difference.classes.items() if found.value is not None]
    return sorted(known, key=lambda item: -abs(item[1].value or 0))[:_MOST_CHANGED]


@dataclass(frozen=True)
class Cell:
    """Of the confusion matrix: the count, its share of the row, and whether it is on the diagonal."""

    text: str
    share: float
    right: bool


def _matrix(confusion: Confusion) -> dict[str, Any]:
    """The rows and columns of the classes that are confused most, and of nothing."""
    matrix, names = confusion.matrix, confusion.names
    inner = matrix[:-1, :-1] * ~np.eye(len(names), dtype=bool)
    rank = np.lexsort((-matrix[:-1].sum(1), -(inner.sum(0) + inner.sum(1))))[:_MOST_CLASSES]
    shown = [*sorted(rank.tolist()), len(names)]
    totals = np.maximum(matrix.sum(1), 1)
    labels = [*names, "nothing"]
    return {
        "names": [labels[column] for column in shown[:-1]],
        "rows": [(labels[row], [_cell(matrix, totals, row, column, len(names)) for column in shown]) for row in shown],
        "left_out": len(names) - len(rank),
    }


def _cell(matrix: np.ndarray, totals: np.ndarray, row: int, column: int, nothing: int) -> Cell:
    count = int(matrix[row, column])
    if row == column == nothing:
        return Cell("", 0.0, False)
    return Cell(f"{count:,}" if count else "·", float(count / totals[row]), row == column)


def _error_chart(d: Diagnosis) -> dict[str, str]:
    def draw(width: int) -> Figure:
        beside = width > 2 * WIDTHS["narrow"]
        figure = blank_figure(width, (34 if beside else 46) * len(d.errors) + 44)
        axes = figure.subplots()
        axes.set_ylim(len(d.errors), 0)
        axes.set_xlim(0, max(0.01, *(error.cost for error in d.errors)))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("AP50")
        for row, error in enumerate(d.errors):
            low, high = (0.15, 0.85) if beside else (0.5, 0.9)
            axes.barh(row + (low + high) / 2, error.cost, height=high - low, color=LOWER)
            place: dict[str, Any] = {"y": row + (0.5 if beside else 0.25), "va": "center"}
            place["transform"] = axes.get_yaxis_transform()
            text = f"{error.cost:.3f} · {error.count:,}"
            axes.text(x=-0.02 if beside else 0, s=error.name, ha="right" if beside else "left", **place)
            axes.text(x=1.02 if beside else 1, s=text, ha="left" if beside else "right", **place)
        axes.locator_params(axis="x", nbins=4)
        return figure

    return drawn(draw, "errors")


def _curve_chart(d: Diagnosis) -> dict[str, str]:
    styles: Sequence[tuple[str, Any]] = ((INK, "-"), (HIGHER, (0, (6, 2))), (LOWER, (0, (2, 2))))

    def draw(width: int) -> Figure:
        figure = blank_figure(width, 340)
        axes = figure.subplots()
        for (iou, values), (color, style) in zip(d.curves.items(), styles, strict=True):
            axes.plot(
                np.linspace(0, 1, len(values)), values, color=color, linestyle=style, linewidth=2, label=f"IoU {iou}"
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        axes.legend(
            frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, columnspacing=1, handlelength=1.6
        )
        return figure

    return drawn(draw, "curves")


def _calibration_chart(d: Diagnosis) -> dict[str, str]:
    most = max(part.count for part in d.calibration.bins)

    def draw(width: int) -> Figure:
        figure = blank_figure(width, 340)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        scores = [part.score for part in d.calibration.bins]
        axes.vlines(scores, scores, [part.right for part in d.calibration.bins], color=SHADE, linewidth=3)
        for part in d.calibration.bins:
            size = 4 + 12 * (part.count / most) ** 0.25
            axes.plot(part.score, part.right, "o", color=INK, markersize=size, markeredgewidth=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("score")
        axes.set_ylabel("share that is right")
        return figure

    return drawn(draw, "calibration")


def _pair(image: ImageErrors, read: Reader) -> dict[str, Any]:
    picture = read(image.file_name)
    if picture is None:
        return {"of": image, "truth": None, "found": None}
    return {
        "of": image,
        "truth": embedded(_drawn(picture, image.truth), _QUALITY),
        "found": embedded(_drawn(picture, image.found), _QUALITY),
    }


def _drawn(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A small copy with gray boxes for what is right, and names for what is not."""
    factor = _SIDE / max(picture.size)
    picture = _resized(picture, factor)
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        if box.right:
            left, top, right, bottom = _corners(box, factor)
            draw.rectangle((left, top, max(right, left), max(bottom, top)), outline=_GRAY, width=1)
    wrong = [box for box in boxes if not box.right]
    return draw_detections(picture, _detections(wrong, factor), scores=any(box.score < 1 for box in wrong))


def _part(suspect: Suspect, read: Reader) -> str | None:
    """The surroundings of a detection."""
    picture = read(suspect.file_name)
    if picture is None:
        return None
    x, y, width, height = suspect.found.box
    margin = 0.6 * max(width, height) + 8
    left, top = max(int(x - margin), 0), max(int(y - margin), 0)
    right, bottom = min(int(x + width + margin) + 1, picture.width), min(int(y + height + margin) + 1, picture.height)
    if right <= left or bottom <= top:
        left, top, right, bottom = 0, 0, picture.width, picture.height
    part = picture.crop((left, top, right, bottom))
    factor = _PART / max(part.size)
    moved = _detections([suspect.found], factor, (left, top))
    return embedded(draw_detections(_resized(part, factor), moved), _QUALITY)


def _resized(picture: Image.Image, factor: float) -> Image.Image:
    size = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _corners(box: Box, factor: float, origin: tuple[int, int] = (0, 0)) -> list[float]:
    x, y, width, height = box.box
    x, y = x - origin[0], y - origin[1]
    return [factor * value for value in (x, y, x + width, y + height)]


def _detections(boxes: Sequence[Box], factor: float, origin: tuple[int, int] = (0, 0)) -> Detections:
    return Detections(
        boxes=torch.tensor([_corners(box, factor, origin) for box in boxes]).reshape(-1, 4),
        scores=torch.tensor([box.score for box in boxes]),
        labels=torch.tensor([box.label for box in boxes], dtype=torch.int64),
        names=[box.name for box in boxes],
        queries=torch.arange(len(boxes)),
    )
