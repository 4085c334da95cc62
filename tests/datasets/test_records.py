"""Records in arrays: the same ones as in a list, for any process that reads them."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest

from datasets.formats.base import ImageRecord
from datasets.records import Records


@dataclass(frozen=True, kw_only=True)
class MarkedRecord(ImageRecord):
    """A record with one more thing to know of each object."""

    marks: np.ndarray


ODD = ["a ä/b.jpg", "c\udcff.png", "d.jpg"]


def made() -> list[ImageRecord]:
    rng = np.random.default_rng(0)
    records = []
    for key, (name, count) in enumerate(zip(ODD, (2, 0, 3), strict=True)):
        corners = np.sort(rng.uniform(0, 50, (count, 2, 2)), axis=1).reshape(count, 4)
        labels, crowds = rng.integers(0, 9, count), rng.integers(0, 2, count).astype(bool)
        record = ImageRecord.of(name, corners, labels, id=2**40 - key, size=(50 + key, 70), crowds=crowds)
        records.append(MarkedRecord(**{**vars(record), "attributes": {"sun": True} if key else {}}, marks=labels + 7))
    return records


def assert_same(one: ImageRecord, other: ImageRecord) -> None:
    assert type(one) is type(other) and one.arrays().keys() == other.arrays().keys()
    assert (one.id, one.file_name, one.size) == (other.id, other.file_name, other.size)
    assert one.attributes == other.attributes
    for name, values in one.arrays().items():
        found = getattr(other, name)
        assert found.dtype == values.dtype and found.shape == values.shape and (found == values).all()


def test_records_are_those_of_a_list() -> None:
    listed = made()
    records = pickle.loads(pickle.dumps(Records(listed)))
    assert len(records) == 3 and records.places.tolist() == [0, 0, 2, 2, 2]
    for one, other in zip(listed, records, strict=True):
        assert_same(one, other)
    assert_same(listed[-1], records[-1])
    assert [record.id for record in records[::2]] == [record.id for record in listed[::2]]
    with pytest.raises(IndexError):
        records[3]


def test_there_may_be_none() -> None:
    records = Records([])
    assert len(records) == 0 and not list(records) and records.boxes.shape == (0, 4) and records[:] == []
