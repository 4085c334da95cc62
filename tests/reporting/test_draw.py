"""Colors of classes, and names in every script."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw

from detr import drawing
from detr.drawing import class_color, draw_detections, legible
from detr.masks import Masks
from detr.text import printable
from detr.types import Detections


@pytest.mark.parametrize("step", [1, 2])
def test_classes_beside_one_another_have_colors_far_apart(step: int) -> None:
    colors = np.array([class_color(label) for label in range(91)])
    assert colors.min() >= 0 and colors.max() == 255 and len(np.unique(colors, axis=0)) == 91
    assert (np.abs(colors[step:] - colors[:-step]).max(axis=1) > 128).all()


def test_names_are_drawn_in_a_font_that_has_them() -> None:
    for text in ("Größe", "Собака", "Σκύλος", "naïve ½", "مرحبا"):
        shown, font = legible(text, 20.0)
        assert shown == text and "DejaVu" in font.path
        boxes = {bytes(font.getmask(char)) for char in text}
        assert len(boxes) == len(set(text)), "no two characters look alike, as missing ones would"


def test_characters_that_no_font_has_are_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    drawing._font.cache_clear()
    assert legible("狗 a", 20.0)[0] == "\\u72d7 a"
    drawing._font.cache_clear()


def test_a_font_of_the_system_is_used_where_it_has_more(monkeypatch: pytest.MonkeyPatch) -> None:
    own = drawing._DEJAVU.with_name("DejaVuSerif.ttf")
    characters = drawing._characters
    monkeypatch.setattr(
        drawing, "_characters", lambda path: characters(path) | ({"狗"} if path.name == own.name else set())
    )
    drawing._font.cache_clear()
    shown, font = legible("狗 a", 20.0)
    drawing._font.cache_clear()
    assert shown == "狗 a" and font.path.endswith(own.name)
    ImageDraw.Draw(Image.new("RGB", (99, 99))).text((0, 0), shown, font=font)


def drawn(monkeypatch: pytest.MonkeyPatch, boxes: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The texts and places of names in a picture of 400 x 300 pixels, of detections in falling order of scores."""
    names: list[tuple[str, np.ndarray]] = []
    draw_name = drawing._draw_name

    def noted(draw: ImageDraw.ImageDraw, text: str, place: np.ndarray, *rest: Any) -> None:
        names.append((text, place))
        draw_name(draw, text, place, *rest)

    monkeypatch.setattr(drawing, "_draw_name", noted)
    labels = torch.zeros(len(boxes), dtype=torch.long)
    scores = torch.linspace(0.9, 0.5, len(boxes))
    found = Detections(torch.tensor(boxes), scores, labels, ["apple"] * len(boxes), labels)
    draw_detections(Image.new("RGB", (400, 300)), found)
    return names


def test_names_in_a_crowd_hide_neither_one_another_nor_the_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    corners = np.random.default_rng(0).uniform(0, (380, 280), (115, 2))
    boxes = np.concatenate((corners, corners + 18), axis=1)
    names = drawn(monkeypatch, boxes)
    assert 10 < len(names) < 115, "many have room, but not all"
    places = np.stack([place for _, place in names])
    for index, place in enumerate(places):
        others = np.delete(places, index, axis=0)
        assert drawing._hidden(others, place) == 0 and drawing._hidden(boxes, place) <= 0.5


def test_a_name_stands_above_its_box_else_below_else_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = np.array([[100.0, 100, 200, 200], [100.0, 101, 200, 200], [250.0, 0, 350, 200], [0.0, 0, 400, 300]])
    (_, above), (_, below), (_, at_top), (_, inside) = drawn(monkeypatch, boxes)
    assert above[3] < 100 and below[1] > 200 and at_top[1] > 200 and inside[1] == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\nb\r\t\x00\x9b", "a\\nb\\r\\t\\x00\\x9b"),
        ("\ud800 \udcff", "\\ud800 \\udcff"),
        ("gpj\u202eexe", "gpj\\u202eexe"),
        ("狗 Größe कुत्ता \u200d 🍎", "狗 Größe कुत्ता \u200d 🍎"),
    ],
)
def test_printable_text(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_masks_that_overlap_stay_apart() -> None:
    """Every pixel of a mask changes; each has its own filling, and its outline is seen in the other one."""
    pixels = torch.zeros(2, 80, 120, dtype=torch.bool)
    pixels[0, 10:50, 10:70] = True
    pixels[1, 30:70, 40:100] = True
    found = Detections(
        boxes=torch.tensor([[10.0, 10, 70, 50], [40, 30, 100, 70]]),
        scores=torch.tensor([0.9, 0.8]),
        labels=torch.tensor([3, 3]),
        names=["cat", "cat"],
        queries=torch.tensor([0, 1]),
        masks=Masks.encode(pixels),
    )
    blank = Image.new("RGB", (120, 80), (128, 128, 128))
    drawn = np.array(draw_detections(blank, found))
    assert (drawn[pixels.any(0).numpy()] != 128).any(-1).all()
    below, above, both = drawn[60, 80], drawn[20, 40], drawn[40, 55]
    assert (below != above).any() and (both != above).any() and (both != below).any()
    assert tuple(drawn[40, 40]) != tuple(drawn[40, 50])  # the left outline of the lower one, inside of the upper one
    large = draw_detections(blank, found, enlarge=True)
    assert large.size == (360, 240)
    empty = found.select(torch.tensor([], dtype=torch.int64))
    assert draw_detections(blank, empty).tobytes() == blank.tobytes()
