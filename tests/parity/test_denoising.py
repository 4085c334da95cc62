"""Denoising queries against numbers from the published implementations, disturbed by the same draws."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detr.models.denoising import DenoisingQueries, DNDenoisingQueries, Noise
from detr.models.values import Queries
from tests.helpers.published import as_noise, as_targets, load_fixture, weights_of

# RT-DETR keeps a row for no label, 0, which its filled-up places have.
FIXTURES = {
    "dino/base.pt": "label_enc.weight",
    "dn_detr/base.pt": "label_enc.weight",
    "rt_detr/base.pt": "decoder.denoising_class_embed.weight",
    "rt_detr/base_v2.pt": "decoder.denoising_class_embed.weight",
    "d_fine/base.pt": "decoder.denoising_class_embed.weight",
}
CASES = ["train", "train_equal", "train_one_empty", "train_no_objects"]


def build(name: str, fixture: dict[str, Any], rows: Tensor) -> DenoisingQueries:
    config = fixture["config"]
    if name.startswith("dn_detr"):
        options = {"num_copies": config["scalar"], "filling": 0.5, "eps": 1e-3}
        denoising: DenoisingQueries = DNDenoisingQueries(
            d_model=rows.shape[1] + 1,
            num_classes=config["num_classes"],
            label_noise=config["label_noise_scale"],
            box_noise=config["box_noise_scale"],
            **options,
        )
    else:
        if name.startswith("dino"):
            options = {"filling": 0.5, "eps": 1e-3, "num_queries": config["dn_number"]}
            noise = config["dn_label_noise_ratio"], config["dn_box_noise_scale"]
        else:
            decoder = config[next(part for part in config if part.lower().endswith(("decoder", "transformer")))]
            options = {"filling": 0.0, "eps": 1e-5, "num_queries": decoder["num_denoising"]}
            options["without_objects"] = name == "rt_detr/base_v2.pt"
            noise = decoder["label_noise_ratio"], decoder["box_noise_scale"]
        denoising = DenoisingQueries(
            d_model=rows.shape[1],
            num_classes=len(rows) - 1,
            label_noise=noise[0] / 2,
            box_noise=noise[1],
            swap_sides=name.startswith("d_fine"),
            **options,
        )
    denoising.labels.weight.data.copy_(rows[:-1])
    return denoising


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FIXTURES)
def test_denoising_queries(shared: Path, name: str, case: str) -> None:
    fixture = load_fixture(shared, name)
    if "attn_mask" not in fixture.get(case, {}).get("denoising", {}):
        pytest.skip(f"{name} has no denoising queries of targets in {case}")
    wanted, targets = fixture[case]["denoising"], as_targets(fixture[case])
    denoising = build(name, fixture, weights_of(shared, name, fixture)[FIXTURES[name]])
    drawn = as_noise(fixture[case]["noise"])
    denoising.draw = lambda labels: drawn  # type: ignore[method-assign]
    matched = wanted["attn_mask"].shape[0] - wanted["pad_size"]
    width = wanted["query_content"].shape[-1]
    queries = Queries(content=torch.zeros(2, matched, width), anchors=torch.rand(2, matched, 4), position=lambda _: _)
    extended, layout = denoising(queries, targets, 1)
    places = wanted["pad_size"]
    assert layout.count == places and (places == 0 or layout.copies == wanted["groups"])
    torch.testing.assert_close(extended.content[:, :places], wanted["query_content"][:, :places], atol=1e-6, rtol=0)
    anchors = wanted["query_anchor_logits"][:, :places].sigmoid()
    torch.testing.assert_close(extended.anchors[:, :places], anchors, atol=1e-7, rtol=1e-5)
    assert extended.keep is not None and torch.equal(~extended.keep[0, 0], wanted["attn_mask"])

    # Each restores the target that it was made of; where there is contrast, all others are to find nothing.
    filled = wanted["labels"] < 0
    trained = torch.zeros_like(filled)
    trained[layout.image, layout.place] = True
    assert torch.equal(trained, torch.ones_like(filled) if denoising.contrastive else ~filled)
    size = places // max(layout.copies, 1)
    most = size // 2 if denoising.contrastive else size
    start = torch.tensor([0, *[len(target) for target in targets]]).cumsum(0)
    for query, target in zip(layout.query.tolist(), layout.target.tolist(), strict=True):
        image, place = int(layout.image[query]), int(layout.place[query]) % size
        assert place < most and start[image] + place == target
    assert len(layout.query) == layout.copies * sum(len(target) for target in targets)


def test_draws_cover_their_ranges() -> None:
    torch.manual_seed(0)
    denoising = DenoisingQueries(d_model=8, num_classes=5)
    noise: Noise = denoising.draw(torch.zeros(10, 400, dtype=torch.int64))
    for values, low, high in ((noise.redraw, 0, 1), (noise.part, 0, 1), (noise.label, 0, 4), (noise.sign, -1, 1)):
        assert low <= values.min() and values.max() <= high
        assert values.float().mean().item() == pytest.approx((low + high) / 2, abs=0.05)
