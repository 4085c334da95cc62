"""The recipes of docs/extending.md: their own lines, in a folder outside the packages."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.commands import REPOSITORY, run

TEXT = (REPOSITORY / "docs" / "extending.md").read_text()
RECIPES = dict(re.findall(r"^## (A.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
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
    "A data format": "read_labelme",
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
    assert [language for language, _ in blocks] == ["python", "yaml", "bash"]
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


def test_the_recipe_of_a_format_reads_shapes(tmp_path: Path) -> None:
    shape = {"label": "triangle", "points": [[4, 2], [1, 7], [3, 5]]}
    content = {"imagePath": "a.png", "imageHeight": 11, "imageWidth": 13, "shapes": [shape]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    code, options = re.findall(r"^```(?:python|yaml)\n(.*?)^```", RECIPES["A data format"], re.M | re.S)
    recipe: dict[str, Any] = {}
    exec(code, recipe)
    classes = yaml.safe_load(options)["val"]["classes"]
    found = recipe["read_labelme"](folder=str(tmp_path), classes=classes)
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
        names = {category["id"]: category["name"] for category in content["categories"]}
        shutil.copytree(shapes_root / split, tmp_path / split)
        for image in content["images"]:
            own = [row for row in content["annotations"] if row["image_id"] == image["id"]]
            shapes = [
                {"label": names[row["category_id"]], "points": [[x, y], [x + width, y + height]]}
                for row in own
                for x, y, width, height in [row["bbox"]]
            ]
            sizes = {"imageHeight": image["height"], "imageWidth": image["width"]}
            file = (tmp_path / split / image["file_name"]).with_suffix(".json")
            file.write_text(json.dumps({"imagePath": image["file_name"], **sizes, "shapes": shapes}))
    return [*transforms, f"data.root={tmp_path}"]
