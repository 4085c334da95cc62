"""Which augmentation each epoch of a training has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets.mixing import Mixing
from detr.errors import UserError
from detr.ranges import checked

Transforms = Callable[..., Any]


@dataclass(frozen=True)
class Recipe:
    """Transforms of images, and what takes their place in batches that have drawn a size, by this size, if anything."""

    transforms: Transforms | None
    at_size: Mapping[int, Transforms] = field(default_factory=dict)

    def of(self, size: int | None) -> Transforms | None:
        return self.transforms if size is None or not self.at_size else self.at_size[size]


@dataclass(frozen=True)
class Phase:
    """The epochs from this one on. name: what they have, in words."""

    epoch: int
    recipe: Recipe
    mixing: Mixing | None = None
    name: str = ""


@dataclass(frozen=True)
class Augmentation:
    """DEIM's schedule (Huang et al., CVPR 2025): plain; mixing and `recipe`; `recipe` alone; plain, at its own size.

    plain_before, mixing_until, plain_after: where the second, third and fourth phase begin, as fractions of the
    training. Each is turned into the nearest whole epoch. With plain_after below 1 the last of several epochs is plain
    in any case.

    Raises UserError for a fraction outside of [0, 1], and for a phase that would end before it begins.
    """

    recipe: Recipe
    plain: Recipe
    mixing: Mixing | None = None
    plain_before: float = 0.0
    mixing_until: float = 1.0
    plain_after: float = 1.0

    def __post_init__(self) -> None:
        for name in ("plain_before", "mixing_until", "plain_after"):
            checked(getattr(self, name), f"data.{name}", "at least 0 and at most 1", lambda value: 0 <= value <= 1)
        for name in ("mixing_until", "plain_after"):
            if self.plain_before > getattr(self, name):
                raise UserError(
                    f"data.plain_before: wanted at most data.{name}={getattr(self, name)}, got {self.plain_before}."
                )

    @property
    def mixed_images(self) -> int:
        """The most images that one sample is made of, as far as the mixing says."""
        return getattr(self.mixing, "images", 1)

    def phases(self, epochs: int) -> list[Phase]:
        """Those of a training of so many epochs, begun ones counted."""
        begin = round(self.plain_before * epochs)
        end = epochs if self.plain_after == 1 else min(round(self.plain_after * epochs), max(epochs - 1, 1))
        mixed = begin if self.mixing is None else round(self.mixing_until * epochs)
        found = [
            Phase(0, self.plain, name="plain transforms"),
            Phase(min(begin, end), self.recipe, self.mixing, name="mixing and transforms"),
            Phase(min(max(begin, mixed), end), self.recipe, name="transforms"),
            Phase(end, Recipe(self.plain.transforms), name="plain transforms of one size"),
        ]
        ends = [*(phase.epoch for phase in found[1:]), epochs]
        return [phase for phase, following in zip(found, ends, strict=True) if phase.epoch < following]
