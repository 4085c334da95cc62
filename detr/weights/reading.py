"""What a file of weights is, decided once: a checkpoint of ours, published weights, or a state dict alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detr.contents import (
    Check,
    Misfit,
    check_content,
    flag,
    items,
    mapping,
    maybe,
    plain,
    record,
    refuse_non_finite,
    state_dict,
    text,
    whole,
)
from detr.errors import UserError, brief
from detr.files import read_regular, read_tensors
from detr.types import Category
from detr.weights import version1
from detr.weights.families import Converted, convert, recognize
from detr.weights.fetching import weights_file

FORMAT = "detr-checkpoint-3"
_READ = (FORMAT, "detr-checkpoint-2", version1.FORMAT)
_PANOPTIC = 250  # outputs of DETR's panoptic heads, for ids of COCO's panoptic categories, 1 to 200


def _categories(value: Any, place: str) -> None:
    items(record(id=whole(-(2**63), 2**63 - 1), name=text))(value, place)
    items(lambda row, at: flag(row.get("is_thing", True), f"{at}.is_thing"))(value, place)
    if len({row["id"] for row in value}) < len(value):
        raise Misfit(place, "classes with ids of their own", [row["id"] for row in value])


def _config(value: Any, place: str) -> None:
    plain(value, place)
    record(data=_a_dict, model=_a_dict)(value, place)
    maybe(_a_dict)(value["data"].get("val"), f"{place}.data.val")


def _a_dict(value: Any, place: str) -> None:
    mapping(lambda entry, at: None)(value, place)


# What every reader needs; detr.engine.state has what it takes to go on with `training`.
_CONTENT: Check = record(model=state_dict, categories=_categories, training=_a_dict, config=_config)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A state dict under our names, and the file that it is from.

    categories: the classes, in the order of the labels; None where they are not known.
    """

    path: Path
    state: dict[str, Tensor]
    categories: list[Category] | None = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def num_queries(self) -> int | None:
        """Queries of a group, where that is known."""
        return None


@dataclass(frozen=True, kw_only=True)
class Published(Weights):
    """Weights of DETR or its family from elsewhere. converted: what they were converted from."""

    converted: Converted

    def __str__(self) -> str:
        return f"{self.path}, {self.converted}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Weights):
    """What training saves: weights with all that it takes to use them.

    config: the composed configuration.
    training: what it takes to go on, as detr.weights.checkpoints describes it; None for a checkpoint of version 1.
    thresholds: the content of detr.evaluation.Thresholds; None where there are none, as in earlier checkpoints.
    """

    config: dict[str, Any]
    categories: list[Category]
    training: dict[str, Any] | None
    thresholds: dict[str, Any] | None = None

    @property
    def num_queries(self) -> int | None:
        number = self.config["model"].get("num_queries")
        return number if type(number) is int and number > 0 else None


def read_weights(path: str | Path) -> Weights:
    """Read any file of weights: a Checkpoint of any version, Published weights, or a state dict of ours alone.

    path: a file, or what `weights_file` takes. Raises UserError where it is missing, damaged, incomplete, or none of
    these.
    """
    path = weights_file(path)
    content = read_tensors(path)
    if str(content.get("format")).startswith("detr-checkpoint-"):
        return _checkpoint(content, path)
    state, place = _state_of(content)
    try:
        state_dict(state, place)
    except Misfit as misfit:
        raise UserError(
            f"{path} holds no 'model' state dict ({misfit}). Use a checkpoint of this framework or of published DETR."
        ) from None
    refuse_non_finite(state, path)
    if recognize(state) is None:
        return Weights(path=path, state=state)
    converted = convert(state)
    classes = _classes_beside(path, converted.num_classes) or coco_categories(converted.num_classes)
    return Published(path=path, state=converted.state, categories=classes, converted=converted)


def _classes_beside(path: Path, num_classes: int) -> list[Category] | None:
    """The classes that config.json names, which transformers keeps beside its weights; ids are labels."""
    try:
        config = json.loads(read_regular(path.with_name("config.json"), most=2**20))
    except (OSError, ValueError):
        return None
    names = config.get("id2label") if isinstance(config, dict) else None
    labels = [str(label) for label in range(num_classes)]
    if (
        not isinstance(names, dict)
        or names.keys() != set(labels)
        or not all(isinstance(names[one], str) for one in labels)
    ):
        return None
    if all(names[label] == f"LABEL_{label}" for label in labels):  # which it writes where nobody named them
        return None
    return [Category(id=int(label), name=names[label]) for label in labels]


def _state_of(content: dict[str, Any]) -> tuple[Any, str]:
    """Of a file of others, and its place there: a moving average of the weights before the weights themselves."""
    average = content.get("ema")
    if isinstance(average, dict) and "module" in average:
        return average["module"], "ema.module"
    return (content["model"], "model") if "model" in content else (content, "")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours; raises UserError for any other file."""
    return as_checkpoint(read_weights(path))


def as_checkpoint(weights: Weights) -> Checkpoint:
    """The weights, if they are those of a checkpoint of ours; raises UserError otherwise."""
    if isinstance(weights, Checkpoint):
        return weights
    kind, remedy = "is another program's file or holds weights alone", ""
    if isinstance(weights, Published):
        found = weights.converted
        kind = f"is of {found.family.name}, from {found.source}"
        remedy = f"; to evaluate or predict with them, name the model too, as in {found.options}"
    raise UserError(
        f"Checkpoint {weights.path} {kind}, wanted a checkpoint of this framework, which holds its configuration and "
        f"class names. To start training from other weights, set weights=PATH{remedy}."
    )


def _checkpoint(content: dict[str, Any], path: Path) -> Checkpoint:
    if content["format"] not in _READ:
        raise UserError(
            f"Checkpoint {path} is of format {content['format']}, wanted {FORMAT} or an earlier one. Use it with "
            f"the version of this framework that wrote it{_version(content)}."
        )
    check_content(content, _CONTENT, f"Checkpoint {path}")
    check_content({"thresholds": content.get("thresholds")}, record(thresholds=maybe(plain)), f"Checkpoint {path}")
    refuse_non_finite(content["model"], f"Checkpoint {path}")
    if content["format"] == version1.FORMAT:
        try:
            content = version1.upgraded(content, path)
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"Checkpoint {path} is incomplete: {error!r}. Use an intact copy.") from None
    return Checkpoint(
        path=path,
        state=content["model"],
        config=content["config"],
        categories=[_category(row) for row in content["categories"]],
        training=content["training"],
        thresholds=content.get("thresholds"),
    )


def _version(content: Mapping[str, Any]) -> str:
    version = content.get("version")
    return f", {brief(version)}" if isinstance(version, str) else ""


def _category(row: Mapping[str, Any]) -> Category:
    """Earlier checkpoints do not say what is stuff, since there was none."""
    return Category(id=row["id"], name=row["name"], is_thing=row.get("is_thing", True))


def coco_categories(num_classes: int) -> list[Category] | None:
    """The classes of a published head: COCO's 91 ids, which are its labels as they are, or the 80 that have a name.

    Those of panoptic heads are 250, ids too: the 91, and stuff without names. None for any other number.
    """
    names = enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    ids = [Category(id=number, name=name) for number, name in names]
    classes = [category for category in ids if category.name not in ("__background__", "N/A")]
    stuff = [Category(id=number, name=str(number), is_thing=False) for number in range(len(ids), _PANOPTIC)]
    return next((found for found in (ids, classes, [*ids, *stuff]) if len(found) == num_classes), None)
