"""The images that an annotation file lists: ids for results that are to be compared with it."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr.annotations import identity, is_missing
from detr.errors import UserError, brief
from detr.evaluation.comparison import loaded
from detr.types import Category


@dataclass(frozen=True)
class ListedImage:
    """Id, as the file writes it, and, where the file has it, size (height, width) of an image."""

    id: int | str
    size: tuple[int, int] | None = None


class ListedImages:
    """What a COCO annotation file says of its images. It needs no annotations, as files of test images have none.

    categories: the model's. Raises UserError where the file is not in this format, or means other classes by its ids.
    """

    def __init__(self, path: str | Path, categories: Sequence[Category]) -> None:
        self.path = Path(path).expanduser()
        content = self._content()
        self._by_name: dict[str, list[ListedImage]] = defaultdict(list)
        for row in self._rows(content, "images"):
            self._by_name[self._name(row)].append(ListedImage(_id(row), _size(row)))
        self._check_categories(self._rows(content, "categories"), categories)

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def of(self, file: Path) -> ListedImage | None:
        """What is listed under the name of a file, or under its name and some of its folders; None where nothing is.

        Raises UserError where several images are listed under it.
        """
        parts = file.absolute().parts
        names = (name_key("/".join(parts[start:])) for start in range(len(parts)))
        name = next((name for name in names if name in self._by_name), None)
        if name is None:
            return None
        if len(self._by_name[name]) > 1:
            ids = ", ".join(str(image.id) for image in self._by_name[name][:3])
            raise UserError(
                f"annotations={self.path} lists {brief(name)} {len(self._by_name[name])} times, with the ids {ids}: "
                "results can have only one of them. List it once."
            )
        return self._by_name[name][0]

    def _content(self) -> Any:
        try:
            return loaded(self.path)
        except FileNotFoundError:
            raise UserError(f"annotations={self.path} does not exist. Give a COCO file of the same images.") from None
        except IsADirectoryError:
            raise self._refusal("it is a folder") from None
        except (ValueError, RecursionError) as error:
            raise self._refusal(str(error)) from None

    def _rows(self, content: Any, kind: str) -> list[dict[str, Any]]:
        rows = content.get(kind, [] if kind == "categories" else None) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self._refusal(f"'{kind}' is missing or no list of objects")
        return rows

    def _name(self, row: Mapping[str, Any]) -> str:
        name, key = row.get("file_name"), row.get("id")
        if not isinstance(name, str) or is_missing(key) or type(identity(key)) not in (int, str):
            raise self._refusal(f"an image has the id {brief(key)} and the file_name {brief(name)}")
        return name_key(name)

    def _refusal(self, reason: str) -> UserError:
        return UserError(
            f"annotations={self.path} is not in COCO format, because {reason}: wanted an object with the list "
            "'images', each with id and file_name. Give the file that the images were annotated in."
        )

    def _check_categories(self, rows: Iterable[Mapping[str, Any]], categories: Sequence[Category]) -> None:
        names = {category.id: category.name for category in categories}
        for row in rows:
            key, name = identity(row.get("id")), row.get("name")
            known = names.get(key) if type(key) is int else None
            # Weights without names have ids for names, and so have categories that a training found without one.
            if known not in (str(key if name is None else name), str(key)):
                raise UserError(
                    f"annotations={self.path} has the category {brief(row.get('id'))} {brief(name)}, which the model "
                    f"{'does not know' if known is None else f'calls {brief(known)}'}: results could not be compared "
                    "with it. Give a file with the categories that the model was trained on."
                )


def _id(row: Mapping[str, Any]) -> int | str:
    """As the file has it: what compares results with the file knows no other."""
    return row["id"] if isinstance(row["id"], str) else identity(row["id"])


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = identity(row.get("height")), identity(row.get("width"))
    return (height, width) if type(height) is int and type(width) is int else None


def name_key(name: str) -> str:
    """File names that differ in slashes, or in how accents are composed, are the same."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))
