"""Records of a whole data set in a few arrays."""

import itertools
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from datasets.formats.base import ImageRecord
from detr.masks import Masks


class Records(Sequence[ImageRecord]):
    """A sequence of records, made anew each time one is asked for.

    The processes of a loader share the arrays. Of lists of records each would get a copy of its own, page by page: a
    look at an object of Python counts its references, beside it.

    places: (objects,) of the image of each object among the records. arrays: those of all objects in this order, by the
    names of their fields; all records are of one class, and all have masks or none. sizes: (records, 2) of the images.
    """

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        self._kind = type(records[0]) if records else ImageRecord
        counts = [len(record.labels) for record in records]
        self._ends = np.cumsum([0, *counts])
        self._ids = np.array([record.id for record in records], dtype=np.int64)
        self.sizes = np.array([record.size for record in records], dtype=np.int64).reshape(-1, 2)
        names = [record.file_name.encode(errors="surrogateescape") for record in records]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._name_ends = np.cumsum([0, *map(len, names)])
        self.places = np.repeat(np.arange(len(records)), counts)
        own = [record.arrays() for record in records] or [ImageRecord.of("", [], []).arrays()]
        self.arrays = {name: np.concatenate([arrays[name] for arrays in own]) for name in own[0]}
        self._masks = None if not records or records[0].masks is None else _packed(records)
        self._attributes = {place: record.attributes for place, record in enumerate(records) if record.attributes}

    @property
    def boxes(self) -> np.ndarray:
        return self.arrays["boxes"]

    @property
    def labels(self) -> np.ndarray:
        return self.arrays["labels"]

    @property
    def crowds(self) -> np.ndarray:
        return self.arrays["crowds"]

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self._record, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        found = range(len(self))[index]
        return self._record(found) if isinstance(found, int) else [self._record(place) for place in found]

    def select(self, chosen: np.ndarray) -> "Records":
        """The same images with some of their objects."""
        parts = np.split(chosen, self._ends[1:-1])
        return Records([record.select(part) for record, part in zip(self, parts, strict=True)])

    def file_name(self, place: int) -> str:
        """Of one record, which need not be made for it."""
        name = self._names[self._name_ends[place] : self._name_ends[place + 1]].tobytes()
        return name.decode(errors="surrogateescape")

    def masks(self, place: int) -> Masks | None:
        """Of one record, which need not be made for it; None where there are none."""
        if self._masks is None:
            return None
        ends, data = self._masks
        own = ends[self._ends[place] : self._ends[place + 1] + 1].tolist()
        counts = tuple(data[start:end].tobytes() for start, end in itertools.pairwise(own))
        height, width = self.sizes[place].tolist()
        return Masks(size=(height, width), counts=counts)

    def _record(self, place: int) -> ImageRecord:
        own = slice(self._ends[place], self._ends[place + 1])
        height, width = self.sizes[place].tolist()
        return self._kind(
            id=int(self._ids[place]),
            file_name=self.file_name(place),
            size=(height, width),
            attributes=self._attributes.get(place, {}),
            masks=self.masks(place),
            **{name: values[own] for name, values in self.arrays.items()},
        )


def _packed(records: Sequence[ImageRecord]) -> tuple[np.ndarray, np.ndarray]:
    """The encodings of all masks in one array, behind where each of them begins, and the last one ends."""
    counts = [count for record in records if record.masks is not None for count in record.masks.counts]
    return np.cumsum([0, *map(len, counts)]), np.frombuffer(b"".join(counts), dtype=np.uint8)
