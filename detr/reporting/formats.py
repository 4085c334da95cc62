"""Files of detections that predict.py writes. `FORMATS` has the choices by name."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import torch
import yaml
from PIL import Image

from detr.boxes import xyxy_to_cxcywh
from detr.evaluation import to_results
from detr.reporting.output import GrowingFile, OutputFolder, RowFile
from detr.segments import Panoptic, colors_of_ids
from detr.types import Category, Detections


@dataclass(frozen=True)
class Result:
    """What was found in an image, or in a frame of a video.

    id: of the image, or of the frame. name: of the file, below the source. picture: of the drawn one, below the output.
    size: (height, width) in pixels. frame, time: of a video, its number from 0, and seconds from the start.
    panoptic: its segments, for the format of that name.
    """

    id: int | str
    name: str
    picture: str
    size: tuple[int, int]
    found: Detections
    frame: int | None = None
    time: float | None = None
    panoptic: Panoptic | None = None

    @property
    def moment(self) -> dict[str, Any]:
        """Where in a video it is; nothing for an image."""
        return {} if self.frame is None else {"frame": self.frame, "time": self.time}


class Format(Protocol):
    """Files of one format in an output folder, which grow result by result. categories: in the order of labels."""

    def __init__(self, output: OutputFolder, categories: Sequence[Category]) -> None: ...

    @staticmethod
    def files(pictures: Iterable[str]) -> list[str]:
        """All files, but those of a video's frames. pictures: of images, the drawn ones."""

    def add(self, results: Sequence[Result]) -> None: ...


class CocoFiles:
    """results.json, as COCO's results with the names of files and classes, and images.json with every image."""

    def __init__(self, output: OutputFolder, categories: Sequence[Category]) -> None:
        self._categories = categories
        rows = json.dumps([{"id": category.id, "name": category.name} for category in categories])
        self._results = RowFile(output, "results.json")
        self._images = RowFile(output, "images.json", before=f'{{"categories": {rows},\n"images": [', after="]}")

    @staticmethod
    def files(pictures: Iterable[str]) -> list[str]:
        return ["results.json", "images.json"]

    def add(self, results: Sequence[Result]) -> None:
        self._results.add(row for result in results for row in self._rows(result))
        self._images.add(map(self._image, results))

    def _rows(self, result: Result) -> list[dict[str, Any]]:
        rows = to_results(result.found, result.id, self._categories)
        return [
            {**row, "file_name": result.name, **result.moment, "category_name": name}
            for row, name in zip(rows, result.found.names, strict=True)
        ]

    @staticmethod
    def _image(result: Result) -> dict[str, Any]:
        """As COCO's; images without detections are listed here alone."""
        height, width = result.size
        of_file = {"id": result.id, "file_name": result.name, **result.moment, "width": width, "height": height}
        return {**of_file, "picture": result.picture, "detections": len(result.found)}


class YoloFiles:
    """labels/NAME.txt, one an image, or labels/NAME_FRAME.txt, one a frame, and data.yaml with the names of classes.

    As Ultralytics writes them: a line is `label center_x center_y width height score`, relative to the sides of the
    image, which boxes are cut to. Images without detections have empty files.
    """

    def __init__(self, output: OutputFolder, categories: Sequence[Category]) -> None:
        self._output = output
        names = {label: category.name for label, category in enumerate(categories)}
        output.write("data.yaml", yaml.safe_dump({"names": names}, allow_unicode=True, sort_keys=False).encode())

    @staticmethod
    def files(pictures: Iterable[str]) -> list[str]:
        return ["data.yaml", *map(_label_file, pictures)]

    def add(self, results: Sequence[Result]) -> None:
        for result in results:
            self._output.write(_label_file(result.picture, result.frame), self._lines(result).encode())

    @staticmethod
    def _lines(result: Result) -> str:
        height, width = result.size
        sides = torch.tensor([width, height, width, height])
        boxes = xyxy_to_cxcywh((result.found.boxes / sides).clamp(0, 1)).tolist()
        columns = (result.found.labels.tolist(), boxes, result.found.scores.tolist())
        return "".join(
            f"{label} {' '.join(f'{value:.6f}' for value in (*box, score))}\n"
            for label, box, score in zip(*columns, strict=True)
        )


class CsvFile:
    """detections.csv, a line a detection, which `data=csv` reads too. Corners are in pixels."""

    _COLUMNS = ("file", "frame", "time", "category_id", "class", "score", "x1", "y1", "x2", "y2")

    def __init__(self, output: OutputFolder, categories: Sequence[Category]) -> None:
        self._categories = categories
        self._file = GrowingFile(output, "detections.csv", before=_line(self._COLUMNS))

    @staticmethod
    def files(pictures: Iterable[str]) -> list[str]:
        return ["detections.csv"]

    def add(self, results: Sequence[Result]) -> None:
        self._file.append(b"".join(map(self._lines, results)))

    def _lines(self, result: Result) -> bytes:
        place = (result.name, result.frame, result.time)
        lines = []
        for one in result.found:
            numbers = (f"{value:.6g}" for value in (one.score, *one.box))
            lines.append(_line((*place, self._categories[one.label].id, one.name, *numbers)))
        return b"".join(lines)


class PanopticFiles:
    """panoptic/NAME.png, whose colors are ids of segments, id = red + 256 green + 256^2 blue, and panoptic.json.

    As COCO has them: 0 is no segment. Of a video's frames these are panoptic/NAME_FRAME.png.
    """

    def __init__(self, output: OutputFolder, categories: Sequence[Category]) -> None:
        self._output, self._categories = output, categories
        rows = json.dumps([{"id": one.id, "name": one.name, "isthing": int(one.is_thing)} for one in categories])
        self._rows = RowFile(output, "panoptic.json", before=f'{{"categories": {rows},\n"annotations": [', after="]}")

    @staticmethod
    def files(pictures: Iterable[str]) -> list[str]:
        return ["panoptic.json", *map(_png, pictures)]

    def add(self, results: Sequence[Result]) -> None:
        self._rows.add(map(self._written, results))

    def _written(self, result: Result) -> dict[str, Any]:
        """The row of an image, whose PNG is written."""
        assert result.panoptic is not None
        found, name = result.panoptic, _png(result.picture, result.frame)
        stream = io.BytesIO()
        Image.fromarray(colors_of_ids(found.ids)).save(stream, "PNG")
        self._output.write(name, stream.getvalue())
        of_file = {"image_id": result.id, "image": result.name, **result.moment}
        return {**of_file, "file_name": PurePosixPath(name).name, "segments_info": found.rows(self._categories)}


FORMATS: dict[str, type[Format]] = {"json": CocoFiles, "yolo": YoloFiles, "csv": CsvFile, "panoptic": PanopticFiles}


def _label_file(picture: str, frame: int | None = None) -> str:
    return _file_of(picture, frame, "labels", "txt")


def _png(picture: str, frame: int | None = None) -> str:
    return _file_of(picture, frame, "panoptic", "png")


def _file_of(picture: str, frame: int | None, folder: str, ending: str) -> str:
    """What is written of a picture in a folder of its own; a video has a file for each frame."""
    stem = PurePosixPath(picture).with_suffix("").as_posix()
    return f"{folder}/{stem}.{ending}" if frame is None else f"{folder}/{stem}_{frame}.{ending}"


def _line(values: Iterable[object]) -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerow(values)
    return stream.getvalue().encode(errors="surrogateescape")  # bytes of a file's name that are no text
