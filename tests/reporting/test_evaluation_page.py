"""The page of an evaluation: its structure, its pictures, and foreign text in it."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr.evaluation import CocoResults
from detr.evaluation.diagnosis import Diagnosis, Interval, diagnose
from detr.reporting.evaluation_page import folder_reader, report_page, verdict
from tests.helpers.coco import synthetic

EVIL = "<script>alert(1)</script> & \"quoted\" 'too'"
HEADINGS = [
    "COCO\N{RIGHT SINGLE QUOTATION MARK}s numbers",
    "What errors cost",
    "Precision and recall",
    "Classes",
    "What is taken for what",
    "Can scores be trusted?",
    "Images with the most errors",
    "Annotations that may be wrong",
    "How it was measured",
]


class Page(HTMLParser):
    """Tags that are opened and not closed, headings, and addresses."""

    VOID = frozenset({"meta", "img", "br", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def case(seed: int = 1, names: tuple[str, ...] = ("a", "b", "never there")) -> tuple[dict[str, Any], CocoResults]:
    annotations, rows = synthetic(seed, 90)
    annotations["categories"] = [
        {**row, "name": name} for row, name in zip(annotations["categories"], names, strict=True)
    ]
    for number, image in enumerate(annotations["images"]):
        image |= {"file_name": f"{number}.jpg", "width": 300, "height": 260}
    return annotations, CocoResults.from_rows(rows)


def read(_: str) -> Image.Image:
    return Image.new("RGB", (300, 260), (90, 120, 150))


def test_page_holds_everything_it_needs() -> None:
    annotations, results = case()
    diagnosis = diagnose(annotations, results, against=case(2)[1], against_name="runs/other")
    text = report_page(diagnosis, read, title="best.pt")
    page = Page(text)
    assert page.open == [] and page.headings[1] == "Against runs/other"
    groups = ["Groups of images"]
    assert [heading for heading in page.headings if heading not in (page.headings[1], *groups)] == HEADINGS
    assert "script" not in page.tags and "link" not in page.tags
    pictures = [address for address in page.addresses if not address.startswith("#")]
    assert len(pictures) == 2 * len(diagnosis.worst) + len(diagnosis.suspects) > 4
    for picture in pictures:
        kind, _, content = picture.partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert kind == "data:image/jpeg;base64" and image.format == "JPEG" and max(image.size) <= 380
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert f"{diagnosis.metrics['AP'].value:.3f}" in text and f"{diagnosis.resamples:,} bootstrap resamples" in text
    identifiers = re.findall(r' id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert len(text) < 3_000_000


def test_foreign_text_is_escaped() -> None:
    annotations, results = case(names=(EVIL, "b", "<img src=x>"))
    for number, image in enumerate(annotations["images"]):
        image |= {"file_name": f"<b>{number}</b>.jpg", "<i>key</i>": ("<u>x</u>", "<u>y</u>")[number % 2]}
    diagnosis = diagnose(annotations, results, against=results, against_name="<a href=x>")
    text = report_page(diagnosis, read, title="<h6>")
    page = Page(text)
    assert not {"script", "b", "u", "i", "a", "h6"} & set(page.tags)
    assert "&lt;script&gt;" in text and "x" not in page.addresses
    assert any(heading.startswith("Against <a href") for heading in page.headings)


@pytest.mark.parametrize("kind", ["nothing found", "no objects", "neither"])
def test_page_of_nothing(kind: str) -> None:
    annotations, results = case()
    if kind != "nothing found":
        annotations["annotations"] = []
    if kind != "no objects":
        results = CocoResults.from_rows([])
    text = report_page(diagnose(annotations, results, against=results), read, title="nothing")
    assert Page(text).open == [] and "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().replace("nance", "")


def test_matrix_of_many_classes_stays_readable() -> None:
    annotations, rows = synthetic(3, 60)
    annotations["categories"] = [{"id": n, "name": f"class {n}"} for n in range(1, 81)]
    rng = np.random.default_rng(0)
    for row in (*annotations["annotations"], *rows):
        row["category_id"] = int(rng.integers(1, 81))
    diagnosis = diagnose(annotations, CocoResults.from_rows(rows))
    text = report_page(diagnosis, lambda _: None, title="many")
    assert "68 classes that are confused less are left out" in text
    table = text.partition('aria-label="Confusion matrix"')[2].partition("</table>")[0]
    assert table.count("<tr>") == 1 + 12 + 1
    assert "The image cannot be read." in text


def test_unreadable_pictures_and_those_outside_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 6)).save(folder / "there.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "outside.png")
    (folder / "broken.png").write_text("no image")
    reader = folder_reader(folder)
    picture = reader("there.png")
    assert picture is not None and picture.size == (8, 6)
    assert reader("broken.png") is reader("missing.png") is reader("../outside.png") is None


@pytest.mark.parametrize(
    "interval, expected",
    [
        (Interval(0.2, 0.1, 0.3), "higher"),
        (Interval(-0.2, -0.3, -0.1), "lower"),
        (Interval(0.1, -0.1, 0.3), "within chance"),
        (Interval(0.0, 0.0, 0.0), "within chance"),
        (Interval(None), "no value"),
    ],
)
def test_verdict(interval: Interval, expected: str) -> None:
    assert verdict(interval) == expected


def test_sentences_name_the_numbers() -> None:
    annotations, results = case()
    diagnosis: Diagnosis = diagnose(annotations, results)
    text = report_page(diagnosis, read, title="best.pt")
    worst = diagnosis.errors[0]
    assert f"Errors of the kind “{worst.name}” cost {worst.cost:.3f} AP50" in text
    lowest = min((row for row in diagnosis.classes if row.ap.value is not None), key=lambda row: row.ap.value or 0)
    assert f"The lowest AP has “{lowest.name}”, {lowest.ap.value:.3f}" in text
    assert f"The mean gap is {diagnosis.calibration.error:.3f}" in re.sub(r"\s+", " ", text)
