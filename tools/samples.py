"""Draw what a training learns from: python tools/samples.py --epoch 5 OPTION=VALUE ..., with the options of train.py

Writes samples.jpg, 16 training samples of that epoch with their boxes, as the model would get them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # train.py is used from the checkout

from datasets.workers import Batch
from detr.cli.exit_codes import exit_codes
from detr.config import compose, plain
from detr.engine import TrainerConfig
from detr.evaluation.samples import Sample
from detr.images import jpeg
from detr.reporting import OutputFolder
from detr.reporting.samples import draw_batch
from train import build_augmentation, data_sets, train_loader

NAME, COUNT = "samples.jpg", 16


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="options of train.py")
    parser.add_argument("--epoch", type=int, default=0, help="epochs count from 0; the first by default")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where to write to; by default here")
    options = parser.parse_intermixed_args(arguments)
    if options.epoch < 0:
        parser.error(f"--epoch: wanted at least 0, got {options.epoch}")
    output = OutputFolder(options.output, [NAME], overwrite=True, option="--output DIR")
    config = compose([*options.overrides, "data.workers=0"])
    trainer, augmentation = TrainerConfig(**plain(config.trainer)), build_augmentation(config.data)
    train_set, _ = data_sets(config, trainer, augmentation)
    loader = train_loader(config, trainer, train_set, augmentation)
    names = [category.name for category in train_set.categories]
    samples: list[Sample] = []
    for batch in loader.epoch(options.epoch):
        samples += _samples(batch, names)
        if len(samples) >= COUNT:
            break
    output.write(NAME, jpeg(draw_batch(samples[:COUNT]), 92))
    print(f"{len(samples[:COUNT])} samples of epoch {options.epoch} are in {output.folder / NAME}.")


def _samples(batch: Batch, names: Sequence[str]) -> list[Sample]:
    images, targets = batch
    return [Sample.of(images, index, target, names=names) for index, target in enumerate(targets)]


if __name__ == "__main__":
    with exit_codes():
        main()
