"""D-FINE in evaluation against numbers from the published implementation."""

from typing import Any

import pytest
import torch

from detr.config import build_model, compose
from detr.edges import bin_distances
from detr.models.deployment import deployed
from detr.models.detr import DETR
from detr.models.layers.convolutions import RepVGGBlock
from detr.postprocess import postprocess
from tests.helpers.d_fine import BOXES, FUSED, LOGITS, MAPS, options_of
from tests.helpers.published import batch_of, close


@torch.no_grad()
def test_every_stage_of_evaluation(published: dict[str, Any], model: DETR) -> None:
    batch, expected = batch_of(published["images"]), published["eval"]
    maps = model.backbone(batch.images, batch.mask)
    for index, level in enumerate(expected["backbone"]):
        close(maps[index][:, :: maps[index].shape[1] // level.shape[1]], level, MAPS, f"map {index}")
    *finer, coarsest = model.neck(maps)
    attended = model.encoder.attend(coarsest, torch.zeros_like(coarsest[:, 0], dtype=torch.bool), padded=False)
    close(attended.flatten(2).transpose(1, 2), expected["aifi"], MAPS, "AIFI")
    for index, (found, level) in enumerate(
        zip(model.encoder.fuse([*finer, attended], None), expected["encoder"], strict=True)
    ):
        close(found, level, FUSED, f"fused map {index}")

    memory = model.encode(batch)
    close(memory.tokens, expected["memory"], FUSED, "memory")
    cells, usable = model.queries._cells(memory)
    assert torch.equal(usable[0], expected["valid_mask"])
    close(cells[0][usable[0]], expected["anchors"][usable[0]], BOXES, "anchors")
    queries, proposals = model.queries(memory, model.proposal_head)
    close(proposals.logits[0], expected["proposal_logits"], LOGITS, "proposals")
    close(proposals.boxes[0], expected["proposal_boxes"], BOXES, "proposals")
    close(queries.content, expected["content"], FUSED, "content")

    used = len(model.decoder.used)
    outputs, refinements = model.decoder(queries, memory, model._refine)
    close(outputs, expected["hs"][:used], FUSED, "layers")
    references = [queries.anchors, *(refinement.boxes for refinement in refinements)]
    distances = bin_distances(model.decoder.reg_max, model.decoder.up[0], model.decoder.reg_scale[0])
    close(distances, expected["project"], BOXES, "weighting function")
    for index, refinement in enumerate(refinements):
        close(references[index], expected["references"][index], BOXES, f"reference {index}")
        close(model.queries.position(references[index]), expected["query_pos"][index], LOGITS, f"position {index}")
        close(refinement.start, expected["ref_points"][index], BOXES, f"start {index}")
        close(refinement.distributions.flatten(-2), expected["pred_corners"][index], FUSED, f"corners {index}")
        edges = refinement.distributions.softmax(-1) @ distances
        close(edges, expected["edges"][index], LOGITS, f"edges {index}")
        quality = model.heads[index].location_quality(refinement.distributions)
        close(quality, expected["lqe"][index], LOGITS, f"quality {index}")
        close(model.heads[index].class_head(outputs[index]), expected["raw_logits"][index], LOGITS, f"logits {index}")
    preliminary = model.heads[0].preliminary(outputs[0], refinements[0])
    close(preliminary["logits"], expected["pre_logits"], LOGITS, "preliminary")
    close(preliminary["boxes"], expected["pre_boxes"], BOXES, "preliminary")

    predictions = model(batch)
    close(predictions.logits, expected["logits"][:used], LOGITS, "logits")
    close(predictions.boxes, expected["boxes"][:used], BOXES, "boxes")
    sizes = [tuple(map(int, found["original_size"]))[::-1] for found in expected["detections"]]
    names = [str(label) for label in range(published["config"]["num_classes"])]
    top = published["config"]["postprocessor"]["num_top_queries"]
    for found, wanted in zip(postprocess(predictions, sizes, names, top), expected["detections"], strict=True):
        close(found.scores, wanted["scores"], 1e-5, "scores")
        assert torch.equal(found.labels, wanted["labels"])
        close(found.boxes, wanted["boxes"], 3e-3, "boxes in pixels")


@torch.no_grad()
def test_deployed(published: dict[str, Any], model: DETR) -> None:
    expected, plain = published["eval"]["deploy"], deployed(model)
    assert expected["same_selection"]
    assert not any(isinstance(module, RepVGGBlock) for module in plain.modules())
    assert sum(parameter.numel() for parameter in plain.parameters()) == expected["parameters"]
    found = plain(batch_of(published["images"]))
    close(found.logits[0], expected["logits"], LOGITS, "logits")
    close(found.boxes[0], expected["boxes"], BOXES, "boxes")


@pytest.mark.parametrize("stages", ["[backbone]", "[neck]"])
@pytest.mark.parametrize(
    "block", ["se", "non_local", "criss_cross", "dual", "residual", "spatial_transformer", "hard", "self_attention"]
)
@torch.no_grad()
def test_attention_blocks_change_nothing_at_the_start(
    published: dict[str, Any], model: DETR, block: str, stages: str
) -> None:
    placement = [f"model/attention={block}", f"model.attention.{block}.stages={stages}"]
    config = compose([*options_of(published["config"]), *placement, f"model.attention.{block}.where=after"])
    extended = build_model(config.model, num_classes=model.num_classes, pretrained=False).eval()
    left = extended.load_state_dict(model.state_dict(), strict=False)
    assert left.missing_keys and not left.unexpected_keys
    expected, found = (one(batch_of(published["images"])) for one in (model, extended))
    close(found.logits, expected.logits, 1e-5, "logits")
    close(found.boxes, expected.boxes, 1e-5, "boxes")
