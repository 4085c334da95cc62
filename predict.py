"""Detect on images: python predict.py checkpoint=PATH source=FILE|DIR|GLOB output=DIR"""

import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from detr import Detections, Detector, UserError
from detr.cli import command, pick_device, run_directory
from detr.config import as_yaml
from detr.drawing import draw_detections
from detr.evaluation import ListedImage, ListedImages, to_results
from detr.images import find_images, read_image
from detr.reporting import OutputFolder, RowFile, draw_attention
from detr.text import printable

logger = logging.getLogger(__name__)
CONFIG, RESULTS, IMAGES = "predict.yaml", "results.json", "images.json"


@dataclass(frozen=True)
class Item:
    """An image to detect on: its file, its name below the source, that of its picture below the output."""

    path: Path
    name: str
    picture: str
    listed: ListedImage


@command("predict")
def main(config: DictConfig) -> None:
    with run_directory(config):
        predict(config)


def predict(config: DictConfig) -> None:
    folder, names = find_images(config.source)
    place = Path(config.output).expanduser()
    names = without_pictures_of(OutputFolder(place, ()), folder, names)
    pictures = picture_names(names)
    sheets = [f"attention/{picture}" for picture in pictures] if config.attention else []
    output = OutputFolder(place, [RESULTS, IMAGES, *pictures, *sheets, CONFIG], overwrite=config.overwrite)
    detector = Detector.from_checkpoint(
        config.checkpoint, pick_device(config.device), model=config.model, allow_targets=config.allow_targets
    )
    detector.resize_to(config.size, config.max_size, config.square)
    items = [
        Item(folder / name, name.as_posix(), picture, ListedImage(name.as_posix()))
        for name, picture in zip(names, pictures, strict=True)
    ]
    if config.annotations is not None:
        items = listed(items, ListedImages(config.annotations, detector.categories))
    detect(config, detector, items, output)


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
    found = [(item, images.of(item.path)) for item in items]
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


def detect(config: DictConfig, detector: Detector, items: Sequence[Item], output: OutputFolder) -> None:
    """Every result is written when it is there: an end before the last image loses none."""
    limit = detector.limit(config.threshold)
    unread: list[str] = []
    batches = batched(readable(items, unread), config.batch_size)
    first = next(batches, None)
    if first is None:
        raise UserError(f"source={config.source} names no image that can be read. The last one: {unread[-1]}")
    output.write(CONFIG, as_yaml(config).encode())
    results = RowFile(output, RESULTS)
    categories = json.dumps([asdict(category) for category in detector.categories])
    images = RowFile(output, IMAGES, before=f'{{"categories": {categories},\n"images": [', after="]}")
    done = count = 0
    highest = 0.0
    try:
        for batch in itertools.chain([first], batches):
            pixels = [image for _, image in batch]
            found = detector.predict(pixels, 0.0, config.batch_size, config.max_dets)
            for (item, image), everything in zip(batch, found, strict=True):
                highest = max(highest, *everything.scores.tolist()[:1])
                detections = everything.above(limit)
                draw(config, detector, item, image, detections, output)
                results.add(result_rows(item, detections, detector))
                images.add([image_row(item, image, detections)])
                done, count = done + 1, count + len(detections)
    finally:
        logger.info(
            "%d detections in %d of %d images; pictures, %s and %s are in %s.",
            *(count, done, len(items), RESULTS, IMAGES, output.folder),
        )
    if count == 0:
        text = "No score reaches threshold=%s; the highest is %.3f. A lower threshold shows more."
        logger.warning(text, config.threshold, highest)
    if unread:
        logger.warning("%d of %d files could not be read and were left out.", len(unread), len(items))


def readable(items: Iterable[Item], unread: list[str]) -> Iterator[tuple[Item, Tensor]]:
    """The images with their pixels. For each that cannot be read there is a warning, which `unread` gets too."""
    for item in tqdm(items, unit="image", disable=None):
        try:
            yield item, read_image(item.path, item.listed.size)
        except UserError as error:
            unread.append(str(error))
            logger.warning("Skipped: %s", error)


def batched(images: Iterator[tuple[Item, Tensor]], size: int) -> Iterator[list[tuple[Item, Tensor]]]:
    while batch := list(itertools.islice(images, size)):
        yield batch


def draw(
    config: DictConfig, detector: Detector, item: Item, image: Tensor, found: Detections, output: OutputFolder
) -> None:
    photograph = Image.fromarray(image.permute(1, 2, 0).numpy())
    output.write(item.picture, jpeg(draw_detections(photograph, found, enlarge=config.enlarge)))
    if config.attention:
        maps = detector.attention(image, config.attention_point, config.threshold)
        output.write(f"attention/{item.picture}", jpeg(draw_attention(photograph, maps)))


def result_rows(item: Item, found: Detections, detector: Detector) -> list[dict[str, object]]:
    """COCO's, with the names of file and class."""
    rows = to_results(found, item.listed.id, detector.categories)
    return [{**row, "file_name": item.name, "category_name": name} for row, name in zip(rows, found.names, strict=True)]


def image_row(item: Item, image: Tensor, found: Detections) -> dict[str, object]:
    """COCO's, with the picture's name: images without detections are listed here alone."""
    height, width = image.shape[1:]
    size = {"width": width, "height": height}
    return {"id": item.listed.id, "file_name": item.name, **size, "picture": item.picture, "detections": len(found)}


def picture_names(names: Sequence[Path]) -> list[str]:
    """A name for each image's picture: its own, with its former ending where others differ in that alone."""
    stems = Counter(str(name.with_suffix("")).lower() for name in names)  # some file systems know no difference in case
    taken: set[str] = set()
    pictures = []
    for name in names:
        unique = stems[str(name.with_suffix("")).lower()] == 1
        stem = name.with_suffix("") if unique else name.with_name(f"{name.stem}_{name.suffix[1:]}")
        numbered = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        candidates = (f"{stem.as_posix()}{end}.jpg" for end in numbered)
        picture = next(candidate for candidate in candidates if taken.isdisjoint(written(candidate)))
        taken |= written(picture)
        pictures.append(picture)
    return pictures


def written(picture: str) -> set[str]:
    """Everything that may be drawn of one image."""
    return {picture.lower(), f"attention/{picture}".lower()}


def some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))


def jpeg(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=92)
    return stream.getvalue()


if __name__ == "__main__":
    main()
