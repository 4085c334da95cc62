"""Detect on images: python predict.py checkpoint=PATH source=FILE|DIR|GLOB output=DIR"""

import json
import logging
from glob import glob
from pathlib import Path

import hydra
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from detr import Detector, UserError
from detr.config import check_config, exit_codes, pick_device, run_directory
from detr.evaluation import to_results
from detr.images import read_image
from detr.reporting import draw_detections

logger = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
@exit_codes()
def main(config: DictConfig) -> None:
    check_config(config)
    run_directory(config)
    paths = find_images(config.source)
    detector = Detector.from_checkpoint(
        config.checkpoint, pick_device(config.device), model=config.model, allow_targets=config.allow_targets
    )
    detector.size, detector.max_size = config.size or detector.size, config.max_size or detector.max_size
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for index, path in enumerate(tqdm(paths, unit="image", disable=None)):
        image = read_image(path)
        [found] = detector.predict(image, config.threshold)
        results += [{"file_name": path.name, **row} for row in to_results(found, index, detector.categories)]
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        draw_detections(picture, found).save(output / f"{path.stem}.jpg", quality=92)
    (output / "results.json").write_text(json.dumps(results))
    logger.info("%d detections in %d images; pictures and results.json are in %s.", len(results), len(paths), output)


def find_images(source: str) -> list[Path]:
    """The image files that a file name, folder or pattern names."""
    path = Path(source)
    known = set(Image.registered_extensions())
    found = sorted(path.iterdir()) if path.is_dir() else sorted(map(Path, [source] if path.exists() else glob(source)))  # noqa: PTH207 - any pattern
    images = [file for file in found if file.suffix.lower() in known]
    if not images:
        raise UserError(f"source={source} names no image. Give an image file, a folder of images, or a quoted pattern.")
    return images


if __name__ == "__main__":
    with exit_codes():
        main()
