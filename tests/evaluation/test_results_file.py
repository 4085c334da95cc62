"""Results of any detector: whose rows are found by ids and names, and refused with a clear message where they are bad."""

import json
from pathlib import Path
from typing import Any

import pytest

from detr.errors import UserError
from detr.evaluation import coco_metrics, read_results

TRUTH = {
    "images": [
        {"id": 3, "file_name": "val/a.jpg", "width": 100, "height": 50},
        {"id": 8, "file_name": "val/b.jpg", "width": 50, "height": 100},
        {"id": 9, "file_name": "night/b.jpg", "width": 50, "height": 100},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 5, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0},
        {"id": 2, "image_id": 8, "category_id": 7, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0},
    ],
    "categories": [{"id": 5, "name": "cat"}, {"id": 7, "name": "dog"}],
}
ROW = {"image_id": 3, "category_id": 5, "bbox": [1, 2, 30, 40], "score": 0.5}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"annotations": rows}])
def test_rows_are_read_in_both_forms(tmp_path: Path, wrap: Any) -> None:
    rows = [ROW, {**ROW, "image_id": "8", "category_id": 7.0, "bbox": [5, 5, 20, 20], "score": 7}]
    results = read_results(written(tmp_path / "a.json", wrap(rows)), TRUTH)
    assert results.rows() == [ROW, {**rows[1], "image_id": 8, "category_id": 7}]
    assert coco_metrics(TRUTH, results).summary["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("row", "image", "category"),
    [
        ({"image_id": "a.jpg", "file_name": "a.jpg"}, 3, 5),
        ({"image_id": 77, "file_name": "night/b.jpg"}, 9, 5),
        ({"image_id": None, "file_name": "photos\\val\\b.jpg"}, 8, 5),
        ({"image_id": 3, "file_name": "night/b.jpg"}, 9, 5),
        ({"image_id": 3, "file_name": "elsewhere.jpg"}, 3, 5),
        ({"image_id": 8, "file_name": "b.jpg"}, 8, 5),
        ({"category_id": 5, "category_name": "dog"}, 3, 7),
        ({"category_id": 1, "category_name": "cat"}, 3, 5),
    ],
)
def test_names_help_where_ids_do_not(tmp_path: Path, row: dict[str, Any], image: int, category: int) -> None:
    results = read_results(written(tmp_path / "a.json", [{**ROW, **row}]), TRUTH)
    assert results.rows() == [{**ROW, "image_id": image, "category_id": category}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "cannot be read as JSON"),
        ({"images": []}, "holds no list of results"),
        ([ROW, 3], "row 1 is 3"),
        ([{**ROW, "image_id": 4}], "row 0 is of the image 4, which the data do not list"),
        ([{**ROW, "image_id": 4, "file_name": "b.jpg"}], "row 0 is of the image 'b.jpg', which the data do not list"),
        ([{**ROW, "file_name": "b.jpg"}], "row 0 is of the image 'b.jpg', which the data do not list"),
        ([{**ROW, "image_id": [3]}], "which the data do not list"),
        ([{**ROW, "category_id": 1}], "1 of 1 rows have a category_id .*such as 1; those listed are 5 cat, 7 dog"),
        ([{**ROW, "category_id": 5, "category_name": "cow"}], "1 of 1 rows have a category_id"),
        ([{key: value for key, value in ROW.items() if key != "score"}], "row 0 lacks score"),
        ([{**ROW, "score": None}], "has the score None, wanted finite"),
        ([{**ROW, "score": True}], "has the score True, wanted finite"),
        ('[{"image_id": 3, "category_id": 5, "bbox": [1, 2, 3, 4], "score": NaN}]', "has the score nan, wanted finite"),
        ('[{"image_id": 3, "category_id": 5, "bbox": [1, 2, 3, Infinity], "score": 1}]', "has the bbox inf, wanted"),
        ([{**ROW, "bbox": [1, 2, 3]}], r"has the bbox \[1, 2, 3\]"),
        ([{**ROW, "bbox": [9, 9, -5, 5]}], "a bbox of negative size"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_results(written(tmp_path / "a.json", content), TRUTH)
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        read_results(tmp_path / "none.json", TRUTH)


def test_what_may_be_meant_otherwise_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corners = [ROW, {**ROW, "bbox": [70, 10, 90, 40]}, {**ROW, "category_id": 1}]
    assert len(read_results(written(tmp_path / "a.json", corners), TRUTH)) == 2
    assert "1 of 3 rows have a category_id that the data do not list, such as 1" in caplog.text
    assert "1 of 2 boxes reach out of their images. If they are corners" in caplog.text
    caplog.clear()
    assert len(read_results(written(tmp_path / "a.json", []), TRUTH)) == 0
    assert not caplog.text
