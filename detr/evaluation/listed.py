"""The images that an annotation file lists: ids for results that are to be compared with it."""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr.errors import UserError
from detr.types import Category


@dataclass(frozen=True)
class ListedImage:
    """Id and, where the file has it, size (height, width) of an image."""

    id: int | str
    size: tuple[int, int] | None = None


class ListedImages:
    """What a COCO annotation file says of its images. It needs no annotations, as files of test images have none.

    categories: the model's. Raises UserError where the file is not in this format, or means other classes by its ids.
    """

    def __init__(self, path: str | Path, categories: Sequence[Category]) -> None:
        self.path = Path(path).expanduser()
        content = self._content()
        self._check_categories(content.get("categories", []), categories)
        self._by_name = {_key(row["file_name"]): ListedImage(row["id"], _size(row)) for row in content["images"]}

    def __len__(self) -> int:
        return len(self._by_name)

    def of(self, file: Path) -> ListedImage | None:
        """What is listed under the name of a file, or under its name and some of its folders; None where nothing is."""
        parts = file.absolute().parts
        names = (_key("/".join(parts[start:])) for start in range(len(parts)))
        return next((self._by_name[name] for name in names if name in self._by_name), None)

    def _content(self) -> Any:
        try:
            content = json.loads(self.path.read_bytes())
            for row in content["images"]:
                row["id"], row["file_name"].encode
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"annotations={self.path} is not in COCO format ({type(error).__name__}: {error}): wanted an object "
                "with the list 'images', each with id and file_name. Give the file that the images were annotated in."
            ) from None
        return content

    def _check_categories(self, rows: Iterable[Mapping[str, Any]], categories: Sequence[Category]) -> None:
        names = {category.id: category.name for category in categories}
        for row in rows:
            known, name = names.get(row.get("id", -1)), row.get("name")
            if known not in (name, str(row.get("id"))):  # weights without names have ids for names
                raise UserError(
                    f"annotations={self.path} has the category {row.get('id')} '{name}', which the model "
                    f"{'does not know' if known is None else f'calls {known!r}'}: results could not be compared with "
                    "it. Give a file with the categories that the model was trained on."
                )


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = row.get("height"), row.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _key(name: str) -> str:
    """File names that differ in slashes, or in how accents are composed, are the same."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))
