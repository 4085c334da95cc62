"""Detect on images and videos: python predict.py checkpoint=PATH source=FILE|DIR|GLOB output=DIR"""

from detr.cli.help import answer_help

if __name__ == "__main__":
    answer_help("predict")

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from detr import Detections, Detector, UserError
from detr.cli.command import command
from detr.cli.devices import pick_device
from detr.cli.run_folder import run_directory
from detr.config import as_yaml
from detr.detector import Outputs
from detr.drawing import draw_detections
from detr.evaluation import ListedImage, ListedImages
from detr.images import find_images, jpeg, read_image
from detr.reporting import FORMATS, OutputFolder, Result, draw_attention
from detr.segments import Panoptic
from detr.text import printable
from detr.types import Category
from detr.videos import VIDEO_ENDINGS, Frame, VideoWriter, is_video, read_video

logger = logging.getLogger(__name__)
CONFIG = "predict.yaml"
QUALITY = 92  # of JPEG


@dataclass(frozen=True)
class Item:
    """An image or a video to detect on: its file, its name below the source, that of its picture below the output."""

    path: Path
    name: str
    picture: str
    listed: ListedImage


@dataclass(frozen=True)
class Shot:
    """An image, or a frame of a video, with its pixels (3, H, W)."""

    item: Item
    image: Tensor
    frame: Frame | None = None

    def result(self, found: Detections, panoptic: Panoptic | None) -> Result:
        listed, name, size = self.item.listed, self.item.name, (self.image.shape[1], self.image.shape[2])
        if self.frame is None:
            return Result(listed.id, name, self.item.picture, size, found, panoptic=panoptic)
        number, time = self.frame.index, round(float(self.frame.time), 6)
        return Result(f"{listed.id}#{number}", name, self.item.picture, size, found, number, time, panoptic)


@command("predict")
def main(config: DictConfig) -> None:
    with run_directory(config):
        predict(config)


def predict(config: DictConfig) -> None:
    folder, names = find_images(config.source, VIDEO_ENDINGS)
    place = Path(config.output).expanduser()
    names = without_pictures_of(OutputFolder(place, ()), folder, names)
    pictures = picture_names(names)
    videos = [name.as_posix() for name in names if is_video(name)]
    if config.attention and videos:
        raise UserError(
            f"attention=true draws images alone, and source has {len(videos)} videos, such as {printable(videos[0])}. "
            "Leave it out, or give a source without videos."
        )
    sheets = [f"attention/{picture}" for picture in pictures] if config.attention else []
    images = [picture for name, picture in zip(names, pictures, strict=True) if not is_video(name)]
    files = [file for name in config.formats for file in FORMATS[name].files(images)]
    output = OutputFolder(place, [*files, *pictures, *sheets, CONFIG], overwrite=config.overwrite)
    detector = Detector.from_checkpoint(
        config.checkpoint, pick_device(config.device), model=config.model, allow_targets=config.allow_targets
    )
    if "panoptic" in config.formats and not detector.has_segments:
        raise UserError(
            "formats: panoptic needs a model with masks, or a file of one with postprocess=false. Leave it out."
        )
    if config.attention and not detector.shows_attention:
        raise UserError("attention=true needs a checkpoint: of other files nobody knows where they look. Leave it out.")
    detector.resize_to(config.size, config.max_size, config.square)
    items = [
        Item(folder / name, name.as_posix(), picture, ListedImage(name.as_posix()))
        for name, picture in zip(names, pictures, strict=True)
    ]
    categories: Sequence[Category | None] = detector.categories
    if config.annotations is not None:
        listing = ListedImages(config.annotations, detector.categories)
        items, categories = listed(items, listing), listing.categories
    detect(config, detector, items, categories, output)


def without_pictures_of(output: OutputFolder, folder: Path, names: Sequence[Path]) -> list[Path]:
    """The images but those that an earlier run drew, where the output is inside of the source."""
    kept = [name for name in names if not output.wrote(folder / name)]
    if not kept:
        raise UserError(f"All images in {folder} were drawn by this program. Give a source with photographs.")
    if len(kept) < len(names):
        logger.info("%d pictures of an earlier run in %s are left out.", len(names) - len(kept), output.folder)
    return kept


def listed(items: Sequence[Item], images: ListedImages) -> list[Item]:
    """Those that an annotation file lists, with what it says of them; a warning counts the others."""
    found = [(item, None if is_video(item.path) else images.of(item.path)) for item in items]
    kept = [Item(item.path, item.name, item.picture, row) for item, row in found if row is not None]
    if not kept:
        raise UserError(
            f"annotations={images.path} lists none of the {len(items)} images of source, such as {items[0].name}. Give "
            "the file that they were annotated in."
        )
    [(number, count)] = Counter(item.listed.id for item in kept).most_common(1)
    if count > 1:
        same = ", ".join(item.name for item in kept if item.listed.id == number)
        raise UserError(f"annotations={images.path} has one image for {same}. Give a source with one of them.")
    if left_out := [item.name for item, row in found if row is None]:
        logger.warning(
            "%d images are left out, which %s does not list: %s.", len(left_out), images.path, some(left_out)
        )
    if len(kept) < len(images):
        text = "%s lists %d images, of which source has %d: an evaluation against it counts the others as missed."
        logger.warning(text, images.path, len(images), len(kept))
    return kept


def detect(
    config: DictConfig,
    detector: Detector,
    items: Sequence[Item],
    categories: Sequence[Category | None],
    output: OutputFolder,
) -> None:
    """Every result is written when it is there: an end before the last image loses none.

    categories: of the model's labels, for results; None leaves a class out of these.
    """
    limit = detector.limit(config.threshold)
    unread: list[str] = []
    batches = batched(readable(items, unread, config.video_stride), 1 if detector.one_by_one else config.batch_size)
    first = next(batches, None)
    if first is None:
        raise UserError(f"source={config.source} names no image that can be read. The last one: {unread[-1]}")
    output.write(CONFIG, as_yaml(config).encode())
    known = [category for category in categories if category is not None]
    files = [FORMATS[name](output, known) for name in config.formats]
    done = count = 0
    highest = 0.0
    try:
        with Pictures(config, detector, output) as pictures:
            for batch in itertools.chain([first], batches):
                [outputs] = detector.outputs([shot.image for shot in batch], config.batch_size)
                highest = max(highest, outputs.highest())
                found = outputs.detections(limit, config.max_dets)
                segments = panoptic(config, outputs, categories)
                results = [
                    shot.result(of_categories(one, categories), pixels)
                    for shot, one, pixels in zip(batch, found, segments, strict=True)
                ]
                for shot, one in zip(batch, found, strict=True):
                    pictures.add(shot, one)
                for file in files:
                    file.add(results)
                done, count = done + len(batch), count + sum(len(result.found) for result in results)
    finally:
        whole = f"{done} of {len(items)} images"
        if any(is_video(item.path) for item in items):
            whole = f"{done} images and frames of {len(items)} files"
        logger.info("Read %s. Detections: %d. What was drawn and written is in %s.", whole, count, output.folder)
    if count == 0:
        text = "No score reaches threshold=%s; the highest is %.3f. A lower threshold shows more."
        logger.warning(text, config.threshold, highest)
    if unread:
        logger.warning("%d of %d files could not be read and were left out.", len(unread), len(items))


def panoptic(config: DictConfig, outputs: Outputs, categories: Sequence[Category | None]) -> Sequence[Panoptic | None]:
    """The segments of each image where these are to be written, with the labels of `of_categories`."""
    if "panoptic" not in config.formats:
        return [None] * len(outputs.sizes)
    known = [label for label, category in enumerate(categories) if category is not None]
    labels = {label: rank for rank, label in enumerate(known)}
    return [one.numbered(labels) for one in outputs.panoptic(config.panoptic_threshold)]


def readable(items: Iterable[Item], unread: list[str], stride: int) -> Iterator[Shot]:
    """The images, and every `stride`-th frame of videos.

    For each that cannot be read there is a warning, which `unread` gets too; for a video that ends early a warning.
    """
    for item in tqdm(items, unit="file", disable=None):
        given = False
        try:
            for shot in shots(item, stride):
                yield shot
                given = True
        except UserError as error:
            if given:
                logger.warning("%s What was found before is kept.", error)
            else:
                unread.append(str(error))
                logger.warning("Skipped: %s", error)


def shots(item: Item, stride: int) -> Iterator[Shot]:
    if is_video(item.path):
        frames = tqdm(read_video(item.path, stride), desc=printable(item.name), unit="frame", leave=False, disable=None)
        yield from (Shot(item, frame.image, frame) for frame in frames)
    else:
        yield Shot(item, read_image(item.path, item.listed.size))


def batched(shots: Iterator[Shot], size: int) -> Iterator[list[Shot]]:
    while batch := list(itertools.islice(shots, size)):
        yield batch


def of_categories(found: Detections, categories: Sequence[Category | None]) -> Detections:
    """Detections with the labels and names of some categories. These are given for each label; None leaves it out."""
    known = [label for label, category in enumerate(categories) if category is not None]
    numbers = torch.full((len(categories),), -1)
    numbers[known] = torch.arange(len(known))
    found = replace(found, labels=numbers[found.labels])
    found = found.select((found.labels >= 0).nonzero()[:, 0])
    names = [category.name for category in categories if category is not None]
    return replace(found, names=[names[label] for label in found.labels.tolist()])


class Pictures:
    """Drawn images and videos in the output folder. At the end of the context the last video is complete."""

    def __init__(self, config: DictConfig, detector: Detector, output: OutputFolder) -> None:
        self._config, self._detector, self._output = config, detector, output
        self._stack = ExitStack()
        self._video: tuple[Item, VideoWriter] | None = None

    def add(self, shot: Shot, found: Detections) -> None:
        photograph = Image.fromarray(shot.image.permute(1, 2, 0).numpy())
        drawn = draw_detections(photograph, found, enlarge=self._config.enlarge)
        if shot.frame is not None:
            self._writer(shot.item, shot.frame).add(drawn, shot.frame.time)
            return
        self._output.write(shot.item.picture, jpeg(drawn, QUALITY))
        if self._config.attention:
            maps = self._detector.attention(shot.image, self._config.attention_point, self._config.threshold)
            self._output.write(f"attention/{shot.item.picture}", jpeg(draw_attention(photograph, maps), QUALITY))

    def _writer(self, item: Item, frame: Frame) -> VideoWriter:
        """Of the video that the frame is of; the one before it ends."""
        if self._video is None or self._video[0] is not item:
            self._stack.close()
            file = self._stack.enter_context(self._output.create(item.picture))
            self._video = item, self._stack.enter_context(VideoWriter(file, frame.rate))
        return self._video[1]

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def picture_names(names: Sequence[Path]) -> list[str]:
    """A name for the picture of each image or video: its own, with its former ending where others differ in that alone.

    Files of labels have it too; those of frames, with the number of the frame behind it, are no image's either.
    """
    stems = Counter(stem_of(name) for name in names)
    numbered = {re.sub(r"_\d+$", "", stem) for stem in stems if re.search(r"_\d+$", stem)}
    taken: set[str] = set()
    pictures = []
    for name in names:
        avoided = numbered if is_video(name) else frozenset[str]()
        unique = stems[stem_of(name)] == 1 and stem_of(name) not in avoided
        stem = name.with_suffix("") if unique else name.with_name(f"{name.stem}_{name.suffix[1:]}")
        ending = ".mp4" if is_video(name) else ".jpg"
        numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        candidates = (f"{stem.as_posix()}{number}{ending}" for number in numbers)
        picture = next(
            candidate
            for candidate in candidates
            if taken.isdisjoint(written(candidate)) and stem_of(Path(candidate)) not in avoided
        )
        taken |= written(picture)
        pictures.append(picture)
    return pictures


def stem_of(name: Path) -> str:
    return str(name.with_suffix("")).lower()  # some file systems know no difference in case


def written(picture: str) -> set[str]:
    """Everything that may be written of one image or video, but the labels of frames."""
    return {picture.lower(), f"attention/{picture}".lower(), f"labels/{Path(picture).with_suffix('.txt')}".lower()}


def some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))


if __name__ == "__main__":
    main()
