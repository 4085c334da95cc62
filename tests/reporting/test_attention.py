"""Sheets of where a model looks: the heat is where the weight is, and every kind of view finds its place."""

import numpy as np
import pytest
import torch
from PIL import Image

from detr.models.attention.views import Gates, SoftMask, Transform, View, Weights
from detr.models.attention_maps import AttentionMaps
from detr.reporting.attention import draw_attention, overlay
from detr.types import Detections


def make_maps(count: int, *, encoder: bool = True, blocks: bool = True) -> AttentionMaps:
    """Of an image of 96 x 64 pixels, on 4 x 6 cells."""
    views = {
        "attention.0.non_local": Weights(torch.rand(1, 4, 6)),
        "attention.0.hard": SoftMask(torch.rand(1, 4, 6)),
        "backbone.body.layer1.0.attention.standard.se": Gates(torch.rand(1, 700) * 2),
        "attention.0.spatial_transformer": Transform(torch.tensor([[[1.2, 0.3, 0.1], [-0.2, 0.9, -0.1]]])),
    }
    detections = Detections(
        boxes=torch.tensor([[10.0, 10.0, 40.0, 30.0]]).expand(count, 4),
        scores=torch.linspace(0.9, 0.2, count),
        labels=torch.zeros(count, dtype=torch.int64),
        names=["gnu"] * count,
        queries=torch.arange(count),
    )
    return AttentionMaps(
        detections=detections,
        point=(0.5, 0.5),
        decoder=torch.rand(count, 4, 6),
        encoder=torch.rand(4, 6) if encoder else None,
        blocks=views if blocks else {},
    )


@pytest.mark.parametrize("cell", [(0, 0), (2, 3), (3, 5)])
@pytest.mark.parametrize("brightness", [0, 128, 255])
def test_the_brightest_place_is_the_cell_with_the_weight(cell: tuple[int, int], brightness: int) -> None:
    values = torch.full((4, 6), 0.01)
    values[cell] = 0.77
    drawn = np.asarray(overlay(Image.new("RGB", (120, 80), (brightness,) * 3), values)).astype(int)
    red = drawn[..., 0] - drawn[..., 2]  # heat is yellow, the rest gray
    row, column = np.unravel_index(red.argmax(), red.shape)
    assert (row // 20, column // 20) == cell
    far = drawn[(cell[0] + 2) % 4 * 20 + 10, (cell[1] + 3) % 6 * 20 + 10]
    assert np.ptp(far) == 0 and far[0] == round(0.7 * brightness)


def test_a_map_that_is_the_same_everywhere_has_no_heat() -> None:
    drawn = np.asarray(overlay(Image.new("RGB", (30, 20), "white"), torch.full((2, 3), 0.3)))
    assert (drawn == drawn[0, 0, 0]).all()


@pytest.mark.parametrize(
    "count, encoder, blocks, columns, rows",
    [(0, False, False, 1, 1), (0, True, False, 2, 1), (2, True, True, 3, 3), (30, True, True, 3, 5)],
)
def test_a_sheet_has_a_panel_for_everything_and_no_more_than_eight_detections(
    count: int, encoder: bool, blocks: bool, columns: int, rows: int
) -> None:
    torch.manual_seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    before = np.asarray(image).copy()
    sheet = draw_attention(image, make_maps(count, encoder=encoder, blocks=blocks))
    assert sheet.size == (columns * (640 + 22) + 22, rows * (427 + 66 + 22) + 22)
    assert (np.asarray(image) == before).all(), "the original stays as it is"


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (4000, 30)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    sheet = draw_attention(Image.new("RGB", size, "gray"), make_maps(3))
    assert max(sheet.size) < 6000


def panel_of(view: View) -> np.ndarray:
    """The picture that a block's view is drawn as, of a gray image."""
    maps = make_maps(0, encoder=False, blocks=False)
    maps.blocks["mine"] = view
    sheet = np.asarray(draw_attention(Image.new("RGB", (64, 64), "gray"), maps)).astype(int)
    panel = sheet[22 + 66 : -22, 2 * 22 + 640 : -22]
    assert panel.shape == (640, 640, 3)
    return panel


def test_a_ring_marks_the_cell_whose_weights_are_drawn() -> None:
    """The point (0.5, 0.5) lies in the third row and column of four, whose center is at 400 of 640."""
    panel = panel_of(Weights(torch.zeros(1, 4, 4)))
    rows, columns = np.nonzero((panel == 255).all(-1))
    assert (rows.min() + rows.max()) / 2 == pytest.approx(400, abs=1) == (columns.min() + columns.max()) / 2
    assert np.ptp(rows) < 24


def test_gates_rise_and_fall_from_one() -> None:
    panel = panel_of(Gates(torch.tensor([[1.5, 0.75]])))
    warm, cold = panel[..., 0] - panel[..., 2] > 60, panel[..., 2] - panel[..., 0] > 60
    assert warm[40:315, 100:250].all() and not warm[325:].any() and not warm[:, 360:].any()
    assert cold[325:460, 400:500].all() and not cold[:315].any() and not cold[475:].any()


def test_a_transform_is_drawn_where_the_map_is_read() -> None:
    """Half as wide and high, at the upper left: grid lines there, and none elsewhere."""
    panel = panel_of(Transform(torch.tensor([[[0.5, 0.0, -0.5], [0.0, 0.5, -0.5]]])))
    changed = (panel != 128).any(-1)
    assert changed[:330, :330].mean() > 0.1 and not changed[330:].any() and not changed[:, 330:].any()
