"""Write COCO files of a data set in any format: python tools/convert_data.py data=yolo data.root=DIR output=DIR

OPTION=VALUE are the data options of train.py; data.split=0.2 holds out images, and data.val=null leaves out that part.
Writes instances_train.json and instances_val.json, with file names relative to the folders of images, which it prints.
What it wrote earlier is replaced with overwrite=true only.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # train.py is used from the checkout

from datasets import DetectionDataset
from detr.cli.exit_codes import exit_codes
from detr.config import check_config, compose, explained
from detr.reporting import OutputFolder
from train import read_annotations

NAMES = {"train": "instances_train.json", "val": "instances_val.json"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="data options, output=DIR, overwrite=true")
    with explained("convert_data"):
        config = compose(parser.parse_args(arguments).overrides, "convert_data")
        if config.data.split is not None:
            config.data.val = None
        check_config(config)
        output = OutputFolder(Path(config.output), NAMES.values(), overwrite=config.overwrite)
        train, val = read_annotations(config.data, masks=config.masks)
    train_set = DetectionDataset(train)
    val_set = None if val is None else DetectionDataset(val, categories=train_set.categories)
    for part, dataset in (("train", train_set), ("val", val_set)):
        if dataset is None:
            continue
        info = {"description": f"{dataset.source}, converted"}
        content = {"info": info, "licenses": [], **dataset.ground_truth()}
        output.write(NAMES[part], json.dumps(content, ensure_ascii=False).encode())
        print(f"{output.folder / NAMES[part]}: {dataset.summary()}. Images are in {dataset.folder}.")


if __name__ == "__main__":
    with exit_codes():
        main()
