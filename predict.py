"""Detect on images: python predict.py checkpoint=PATH source=FILE|DIR|GLOB output=DIR"""

import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from detr import Detector
from detr.cli import command, pick_device, run_directory
from detr.evaluation import to_results
from detr.images import find_images, read_image
from detr.reporting import OutputFolder, draw_attention, draw_detections

logger = logging.getLogger(__name__)


@command("predict")
def main(config: DictConfig) -> None:
    with run_directory(config):
        predict(config)


def predict(config: DictConfig) -> None:
    paths = find_images(config.source)
    pictures = [f"{name}.jpg" for name in picture_names(paths)]
    sheets = [f"attention/{picture}" for picture in pictures] if config.attention else []
    output = OutputFolder(Path(config.output), [*pictures, *sheets, "results.json"])
    detector = Detector.from_checkpoint(
        config.checkpoint, pick_device(config.device), model=config.model, allow_targets=config.allow_targets
    )
    detector.size, detector.max_size = config.size or detector.size, config.max_size or detector.max_size
    results = []
    for start in tqdm(range(0, len(paths), config.batch_size), unit="batch", disable=None):
        batch = paths[start : start + config.batch_size]
        images = [read_image(path) for path in batch]
        for offset, found in enumerate(detector.predict(images, config.threshold, config.batch_size)):
            name, index = batch[offset].name, start + offset
            results += [{"file_name": name, **row} for row in to_results(found, index, detector.categories)]
            image = Image.fromarray(images[offset].permute(1, 2, 0).numpy())
            output.write(pictures[index], jpeg(draw_detections(image, found)))
            if config.attention:
                maps = detector.attention(images[offset], config.attention_point, config.threshold)
                output.write(sheets[index], jpeg(draw_attention(image, maps)))
    output.write("results.json", json.dumps(results).encode())
    logger.info(
        "%d detections in %d images; pictures and results.json are in %s.", len(results), len(paths), output.folder
    )


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A name without ending for each image's picture: its own, with a number where others have the same."""
    stems = Counter(path.stem.lower() for path in paths)  # some file systems know no difference in case
    numbered = [f"{index}-{path.name}" for index, path in enumerate(paths)]
    names = [
        path.stem if stems[path.stem.lower()] == 1 else number for path, number in zip(paths, numbered, strict=True)
    ]
    return names if len({name.lower() for name in names}) == len(names) else numbered


def jpeg(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=92)
    return stream.getvalue()


if __name__ == "__main__":
    main()
