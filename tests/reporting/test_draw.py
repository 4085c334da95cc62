"""Colors of classes, and names in every script."""

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageDraw

from detr import drawing
from detr.drawing import class_color, legible
from detr.text import printable


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
