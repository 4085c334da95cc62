"""Records of a whole data set in a few arrays."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from datasets.formats.base import ImageRecord


class Records(Sequence[ImageRecord]):
    """A sequence of records, made anew each time one is asked for.

    The processes of a loader share the arrays. Of lists of records each would get a copy of its own, page by page: a
    look at an object of Python counts its references, beside it.

    places: (objects,) of the image of each object among the records; boxes, labels, crowds, areas: those of all objects
    in this order, as in ImageRecord.
    """

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        counts = [len(record.labels) for record in records]
        self._ends = np.cumsum([0, *counts])
        self._ids = np.array([record.id for record in records], dtype=np.int64)
        self._sizes = np.array([record.size for record in records], dtype=np.int64).reshape(-1, 2)
        names = [record.file_name.encode(errors="surrogateescape") for record in records]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._name_ends = np.cumsum([0, *map(len, names)])
        self.places = np.repeat(np.arange(len(records)), counts)
        self.boxes = np.concatenate([np.empty((0, 4)), *(record.boxes for record in records)])
        self.labels = np.concatenate([np.empty(0, np.int64), *(record.labels for record in records)])
        self.crowds = np.concatenate([np.empty(0, bool), *(record.crowds for record in records)])
        self.areas = np.concatenate([np.empty(0), *(record.areas for record in records)])

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

    def _record(self, place: int) -> ImageRecord:
        own = slice(self._ends[place], self._ends[place + 1])
        name = self._names[self._name_ends[place] : self._name_ends[place + 1]].tobytes()
        height, width = self._sizes[place].tolist()
        return ImageRecord(
            id=int(self._ids[place]),
            file_name=name.decode(errors="surrogateescape"),
            size=(height, width),
            boxes=self.boxes[own],
            labels=self.labels[own],
            crowds=self.crowds[own],
            areas=self.areas[own],
        )
