"""The recipes of CONTRIBUTING.md: their own lines, in a folder outside the packages."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.helpers.commands import REPOSITORY, run

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text()
RECIPES = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", TEXT.partition("## Recipes")[2], re.M | re.S))
SMALL = (
    "model.num_queries=7",
    "model.encoder.d_model=32",
    "model.encoder.nhead=4",
    "model.encoder.num_layers=1",
    "model.decoder.num_layers=2",
    "model.encoder.dim_feedforward=32",
    "data.size=48",
    "data.max_size=64",
    "data.batch_size=4",
    "data.workers=0",
    "device=cpu",
    "trainer.max_steps=2",
    "log_every=1",
)
# What shows that the part was at work, in the model's parameters, the records or the output.
SIGNS = {
    "A backbone": "Patches",
    "A detector variant": "GridQueries",
    "An attention block": "Depthwise",
    "A loss term": "loss_shape",
    "A data format": "read_csv",
    "An augmentation over several images": "Blend",
    "A callback": "The slowest step took",
}


def test_there_are_seven_recipes() -> None:
    assert RECIPES.keys() == SIGNS.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_the_lines_of_a_recipe_train(
    name: str, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", RECIPES[name], re.M | re.S)
    assert [language for language, _ in blocks] == ["python", "yaml", ""]
    for _, text in blocks[:2]:
        path = tmp_path / text.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = blocks[0][1].partition(".py")[0].removeprefix("# ")
    python, script, *options = blocks[2][1].split()
    assert (python, script) == ("python", "train.py")
    options = [str(tmp_path / "conf") if option == "conf" else option for option in options]
    options = [option for option in options if option != "data.root=DIR"]
    try:
        outcome = run("train.py", *options, *SMALL, f"run_dir={tmp_path / 'run'}", *data(name, shapes_root, tmp_path))
    finally:
        sys.modules.pop(module, None)
    assert outcome.code == 0, outcome.output
    written = "".join((tmp_path / "run" / file).read_text() for file in ("config.yaml", "metrics.jsonl"))
    assert SIGNS[name] in written + outcome.output


def test_a_table_without_one_of_the_classes_keeps_the_ids(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (13, 11)).save(tmp_path / "images" / "a.png")
    (tmp_path / "val.csv").write_text("file,class,left,top,right,bottom\na.png,triangle,1,2,4,7\n")
    code, options = re.findall(r"^```(?:python|yaml)\n(.*?)^```", RECIPES["A data format"], re.M | re.S)
    recipe: dict[str, Any] = {}
    exec(code, recipe)
    classes = yaml.safe_load(options)["val"]["classes"]
    found = recipe["read_csv"](images=str(tmp_path / "images"), table=str(tmp_path / "val.csv"), classes=classes)
    assert [(category.id, category.name) for category in found.categories] == [*enumerate(classes)]
    [record] = found.records
    assert record.labels.tolist() == [2] and record.boxes.tolist() == [[1, 2, 3, 5]]


def data(name: str, shapes_root: Path, tmp_path: Path) -> list[str]:
    """Where the data are: generated shapes, in the recipe's own format where it is about one."""
    transforms = ["data.transforms.sizes=[48]", "data.transforms.crop=false"]
    if name != "A data format":
        return [*transforms, f"data.root={shapes_root}", "data.prepare=null"]
    for split in ("train", "val"):
        content = json.loads((shapes_root / f"instances_{split}.json").read_text())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "class", "left", "top", "right", "bottom"])
            for row in content["annotations"]:
                x, y, width, height = row["bbox"]
                writer.writerow([files[row["image_id"]], names[row["category_id"]], x, y, x + width, y + height])
        (tmp_path / split).symlink_to(shapes_root / split)
    return [*transforms, f"data.root={tmp_path}"]
