"""RT-DETR and RT-DETRv2 in evaluation against numbers from the published implementation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr.config import build_model, compose
from detr.models.deployment import deployed
from detr.models.detr import DETR
from detr.models.layers.convolutions import RepVGGBlock
from detr.models.layers.deformable import DeformableAttention
from detr.models.values import Memory
from detr.postprocess import postprocess
from detr.weights.families import convert
from tests.helpers.published import batch_of, close, load_fixture
from tests.helpers.rt_detr import BOXES, CASES, LOGITS, MAPS, build, options_of, state_of


@torch.no_grad()
def test_every_stage_of_evaluation(published: dict[str, Any], model: DETR) -> None:
    batch, expected = batch_of(published["images"]), published["eval"]
    maps = model.backbone(batch.images, batch.mask)
    for index, level in enumerate(expected.get("backbone", [])):
        close(maps[index][:, :: maps[index].shape[1] // level.shape[1]], level, MAPS, f"map {index}")
    *finer, coarsest = model.neck(maps)
    attended = model.encoder.attend(coarsest, torch.zeros_like(coarsest[:, 0], dtype=torch.bool), padded=False)
    close(attended.flatten(2).transpose(1, 2), expected["aifi"], MAPS, "AIFI")
    for index, (found, level) in enumerate(
        zip(model.encoder.fuse([*finer, attended], None), expected["encoder"], strict=True)
    ):
        close(found, level, MAPS, f"fused map {index}")

    memory = model.encode(batch)
    close(memory.tokens, expected["memory"], LOGITS, "memory")
    cells, usable = model.queries._cells(memory)
    assert torch.equal(usable[0], expected["valid_mask"])
    close(cells[0], expected["anchors"], BOXES, "anchors")
    queries, proposals = model.queries(memory, model.proposal_head)
    close(proposals.logits[0], expected["proposal_logits"], LOGITS, "proposals")
    close(proposals.boxes[0], expected["proposal_boxes"], BOXES, "proposals")
    close(queries.content, expected["content"], LOGITS, "content")
    outputs, references = model.decoder(queries, memory, model._refine, look_forward_twice=True)
    close(outputs, expected["hs"], LOGITS, "layers")
    for index, reference in enumerate(references):
        close(reference, expected["references"][index], BOXES, f"reference {index}")
        close(model.queries.position(reference), expected["query_pos"][index], LOGITS, f"position {index}")

    predictions = model(batch)
    close(predictions.logits, expected["logits"], LOGITS, "logits")
    close(predictions.boxes, expected["boxes"], BOXES, "boxes")
    sizes = [tuple(map(int, found["original_size"]))[::-1] for found in expected["detections"]]
    names = [str(label) for label in range(published["config"]["num_classes"])]
    top = published["config"]["postprocessor"]["num_top_queries"]
    for found, wanted in zip(postprocess(predictions, sizes, names, top), expected["detections"], strict=True):
        close(found.scores, wanted["scores"], 1e-5, "scores")
        assert torch.equal(found.labels, wanted["labels"])
        close(found.boxes, wanted["boxes"], 1e-3, "boxes in pixels")


@torch.no_grad()
def test_deployed(published: dict[str, Any], model: DETR) -> None:
    expected, batch = published["eval"]["deploy"], batch_of(published["images"])
    plain = deployed(model)
    convolution = plain.encoder.top_down[0].blocks[0][0]
    close(convolution.weight[:4], expected["kernel"], 1e-6, "kernel")
    close(convolution.bias, expected["bias"], 1e-6, "bias")
    assert not any(isinstance(module, RepVGGBlock) for module in plain.modules())
    found = plain(batch)
    assert expected["same_selection"]
    close(found.logits[0], expected["logits"], LOGITS, "logits")
    close(found.boxes[0], expected["boxes"], BOXES, "boxes")
    assert any(isinstance(module, RepVGGBlock) for module in model.modules())  # a copy was converted


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cases_in_evaluation(published: dict[str, Any], shared: Path, case: str) -> None:
    if case not in published.get("cases", {}):
        pytest.skip("of the second version only")
    of_case = published["cases"][case]
    model = build(of_case["config"], state_of(shared, of_case))
    for name, images in (("eval", published["images"]), ("images_transposed", published["images"].transpose(2, 3))):
        if name not in of_case:
            continue
        expected = of_case[name]
        predictions = model(batch_of(images))
        _, proposals = model.queries(model.encode(batch_of(images)), model.proposal_head)
        close(proposals.logits[0], expected["proposal_logits"], LOGITS, "proposals")
        close(proposals.boxes[0], expected["proposal_boxes"], BOXES, "proposals")
        close(predictions.logits, expected["logits"], LOGITS, "logits")
        close(predictions.boxes, expected["boxes"], BOXES, "boxes")


@pytest.mark.parametrize(
    "block", ["se", "non_local", "criss_cross", "dual", "residual", "spatial_transformer", "hard", "self_attention"]
)
@torch.no_grad()
def test_attention_blocks_change_nothing_at_the_start(shared: Path, block: str) -> None:
    published = load_fixture(shared, "rt_detr/base.pt")
    state = state_of(shared, published)
    model = build(published["config"], state)
    config = compose([*options_of(published["config"]), f"model/attention={block}"])
    extended = build_model(config.model, num_classes=model.num_classes, pretrained=False).eval()
    left = extended.load_state_dict(convert(state).state, strict=False)
    assert left.missing_keys and all("attention" in name for name in left.missing_keys)
    expected, found = (one(batch_of(published["images"])) for one in (model, extended))
    close(found.logits, expected.logits, 1e-5, "logits")
    close(found.boxes, expected.boxes, 1e-5, "boxes")


# What is right where the published code is not


def attend(sampling: str, shapes: tuple[tuple[int, int], ...], ratios: Tensor | None = None) -> Tensor:
    """The cell of a single map whose value an attention with one point takes, for anchors all over the map."""
    ((height, width),) = shapes
    attention = DeformableAttention(d_model=2, nhead=1, num_levels=1, num_points=1, sampling=sampling)
    for projection in (attention.value_proj, attention.output_proj):
        nn.init.eye_(projection.weight)
    nn.init.zeros_(attention.sampling_offsets.bias)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    tokens = torch.stack((x, y), dim=-1).flatten(0, 1).float()[None]
    memory = Memory(
        tokens=tokens,
        position=tokens,
        mask=None,
        shapes=shapes,
        sizes=torch.tensor([(width, height)]),
        valid_ratios=torch.ones(1, 1, 2) if ratios is None else ratios,
        centers=tokens,
    )
    points = torch.tensor([[-0.4, 0.5], [0.02, 0.02], [0.98, 0.5], [0.5, 0.98], [1.7, 1.7]])
    return attention.attend(torch.zeros(1, 5, 2), points[None], memory)[0]


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_discrete_sampling_stays_within_maps_that_are_not_square(shape: tuple[int, int]) -> None:
    height, width = shape
    right, bottom, row, column = width - 1, height - 1, int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    expected = torch.tensor([[0, row], [0, 0], [right, row], [column, bottom], [right, bottom]])
    assert torch.equal(attend("discrete", (shape,)), expected.float())
    if height <= width:
        limited = torch.stack((expected[:, 0].clamp(max=bottom), expected[:, 1]), dim=-1)
        assert torch.equal(attend("discrete_square", (shape,)), limited.float())


def test_discrete_sampling_stays_out_of_the_padding() -> None:
    found = attend("discrete", ((6, 9),), ratios=torch.tensor([[[5 / 9, 4 / 6]]]))
    assert found[:, 0].max() == 4 and found[:, 1].max() == 3
