"""Box formats and overlaps against torchvision's."""

import torch
import torchvision.ops

from detr import boxes


def random_boxes(count: int) -> torch.Tensor:
    low = torch.rand(count, 2)
    return torch.cat((low, low + torch.rand(count, 2) + 0.01), dim=1)


def test_formats_match_torchvision() -> None:
    xyxy = random_boxes(7)
    expected = torchvision.ops.box_convert(xyxy, "xyxy", "cxcywh")
    torch.testing.assert_close(boxes.xyxy_to_cxcywh(xyxy), expected)
    torch.testing.assert_close(boxes.cxcywh_to_xyxy(expected), xyxy)


def test_pairwise_overlaps_match_torchvision() -> None:
    a, b = random_boxes(5), random_boxes(3)
    torch.testing.assert_close(boxes.area(a), torchvision.ops.box_area(a))
    torch.testing.assert_close(boxes.iou(a[:, None], b[None]), torchvision.ops.box_iou(a, b))
    torch.testing.assert_close(boxes.giou(a[:, None], b[None]), torchvision.ops.generalized_box_iou(a, b))


def test_elementwise_overlap_is_the_diagonal_of_the_pairwise_one() -> None:
    a, b = random_boxes(5), random_boxes(5)
    torch.testing.assert_close(boxes.giou(a, b), torchvision.ops.generalized_box_iou(a, b).diagonal())


def test_giou_of_known_boxes() -> None:
    unit = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert boxes.giou(unit, unit).item() == 1
    apart = torch.tensor([3.0, 0.0, 4.0, 1.0])  # hull 4, union 2, no intersection
    assert boxes.giou(unit, apart).item() == -0.5
