"""From the rows of a file's tensors to those of a model that has other classes, queries or sizes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detr.classes import ClassMatch
from detr.models.rows import Rows


@dataclass(frozen=True)
class Correspondence:
    """Which rows of a file's tensors are those of a model's.

    match: the model's classes among the file's; None where the file does not name its classes.
    num_classes: of the file; not used without `match`. num_queries: of a group in the file; None where it is not known.
    """

    match: ClassMatch | None
    num_classes: int
    num_queries: int | None

    def pairs(self, rows: Rows, own: int, found: int) -> dict[int, int]:
        """Rows of a model's tensor, each with that of the file's. own, found: how many rows these have."""
        if rows.of == "classes":
            return self._classes(rows, own, found)
        groups = self._groups(rows, own, found)
        mine, theirs = own // rows.groups, found // groups
        kept = range(min(mine, theirs))
        return {group * mine + row: group * theirs + row for group in range(min(rows.groups, groups)) for row in kept}

    def _classes(self, rows: Rows, own: int, found: int) -> dict[int, int]:
        """A class of the model that the file lacks has no pair; with unnamed ones, as many classes are the same."""
        if self.match is None:
            return {row: row for row in range(own)} if own == found else {}
        if found < self.num_classes or not self.match.labels:
            return {}
        further = range(rows.further if found == self.num_classes + rows.further else 0)
        return self.match.labels | {own - rows.further + row: self.num_classes + row for row in further}

    def _groups(self, rows: Rows, own: int, found: int) -> int:
        """Of the file. Where nothing is known of them, other numbers of queries are of one group, as published."""
        if rows.of == "queries" and self.num_queries is not None and found % self.num_queries == 0:
            return max(found // self.num_queries, 1)
        return rows.groups if own == found else 1


def map_rows(own: Tensor, found: Tensor, pairs: Mapping[int, int]) -> Tensor:
    """A copy of a tensor with rows of another. pairs: rows of `own`, each with the one of `found` that it becomes."""
    tensor = own.clone()
    there, here = (torch.tensor([*rows], dtype=torch.int64) for rows in (pairs, pairs.values()))
    tensor[there] = found[here].to(own)
    return tensor
