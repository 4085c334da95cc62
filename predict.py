"""Detect on images: python predict.py checkpoint=PATH source=FILE|DIR|GLOB output=DIR"""

import json
import logging
from collections import Counter
from pathlib import Path

import hydra
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from detr import Detector
from detr.config import check_config, exit_codes, pick_device, run_directory
from detr.evaluation import to_results
from detr.images import find_images, read_image
from detr.reporting import draw_attention, draw_detections

logger = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
@exit_codes()
def main(config: DictConfig) -> None:
    check_config(config)
    with run_directory(config):
        predict(config)


def predict(config: DictConfig) -> None:
    paths = find_images(config.source)
    detector = Detector.from_checkpoint(
        config.checkpoint, pick_device(config.device), model=config.model, allow_targets=config.allow_targets
    )
    detector.size, detector.max_size = config.size or detector.size, config.max_size or detector.max_size
    output = Path(config.output)
    folder = output / "attention" if config.attention else output
    folder.mkdir(parents=True, exist_ok=True)
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else f"{index}-{path.name}" for index, path in enumerate(paths)]
    results = []
    for start in tqdm(range(0, len(paths), config.batch_size), unit="batch", disable=None):
        batch = paths[start : start + config.batch_size]
        images = [read_image(path) for path in batch]
        for offset, found in enumerate(detector.predict(images, config.threshold, config.batch_size)):
            name, index = batch[offset].name, start + offset
            results += [{"file_name": name, **row} for row in to_results(found, index, detector.categories)]
            picture = Image.fromarray(images[offset].permute(1, 2, 0).numpy())
            draw_detections(picture, found).save(output / f"{names[index]}.jpg", quality=92)
            if config.attention:
                maps = detector.attention(images[offset], config.attention_point, config.threshold)
                draw_attention(picture, maps).save(folder / f"{names[index]}.jpg", quality=92)
    (output / "results.json").write_text(json.dumps(results))
    logger.info("%d detections in %d images; pictures and results.json are in %s.", len(results), len(paths), output)


if __name__ == "__main__":
    with exit_codes():
        main()
