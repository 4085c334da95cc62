"""Weights of other models as a start, and reports of what differs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from detr.errors import UserError
from detr.models.detr import DETR
from detr.types import Category
from detr.weights import load_weights, save, to_published
from detr.weights.families import convert, recognize

CLASSES = [Category(1, "cat"), Category(2, "dog")]
OTHER_PARTS = {"config": {"data": {}, "model": {}}, "categories": [], "training": {}}


def test_published_weights_with_another_head_and_more_queries(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    published = tiny_detr(num_classes=91, num_queries=20)
    torch.save({"model": to_published(published.state_dict())}, tmp_path / "detr.pth")
    model = tiny_detr(num_classes=3, num_queries=11)
    torch.nn.init.constant_(model.heads[0].box_head.layers[0].weight, 5.0)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, tmp_path / "detr.pth", CLASSES)
    assert set(report.replaced) == {"heads.0.class_head.weight", "heads.0.class_head.bias", "queries.position.weight"}
    assert "trained anew: heads.0.class_head.weight (file [92, 32], model [4, 32])" in str(report)
    assert len(report.loaded) == len(fresh) - 3 and not report.unused
    for name, tensor in model.state_dict().items():
        expected = fresh[name] if name in report.replaced else published.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_weights_of_another_model_are_refused(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    state = tiny_detr().state_dict()
    state["heads.0.box_head.layers.0.weight"] = torch.ones(3, 3)
    del state["neck.levels.0.0.bias"]
    save(tmp_path / "other.pt", {**OTHER_PARTS, "model": state})
    with pytest.raises(
        UserError,
        match=r"not of the model that is configured.*2 tensors differ: neck\.levels\.0\.0\.bias is missing; heads.*box_head.*\[3, 3\]",
    ):
        load_weights(tiny_detr(), tmp_path / "other.pt", CLASSES)


def test_weights_of_another_family_are_refused_by_its_name(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    names = (
        "class_embed.0",
        "transformer.decoder.bbox_embed.0.layers.0",
        "transformer.encoder.layers.0.self_attn.sampling_offsets",
    )
    torch.save({"model": {f"{name}.weight": torch.ones(2, 3) for name in names}}, tmp_path / "refined.pth")
    with pytest.raises(
        UserError,
        match=r"it holds Deformable DETR with refinement, set model=deformable_detr model\.refine=true model\.shared_heads=false\.",
    ):
        load_weights(tiny_detr(), tmp_path / "refined.pth", CLASSES)


@pytest.mark.parametrize("names", [[], ["weight"]])
def test_unknown_weights_are_refused(tmp_path: Path, tiny_detr: Callable[..., DETR], names: list[str]) -> None:
    state = {name: torch.ones(3) for name in names}
    assert recognize(state) is None
    with pytest.raises(UserError, match=r"Wanted weights of two-stage Deformable DETR, .*, DETR, got tensors such as"):
        convert(state)
    torch.save({"model": state}, tmp_path / "unknown.pth")
    with pytest.raises(UserError, match="not of the model that is configured"):
        load_weights(tiny_detr(), tmp_path / "unknown.pth", CLASSES)


def test_safetensors(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    published = tiny_detr(num_classes=2)
    file = tmp_path / "model.safetensors"
    save_file(to_published(published.state_dict()), file)
    assert not load_weights(tiny_detr(num_classes=2), file, CLASSES).replaced
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is cut short or damaged"):
        load_weights(tiny_detr(), file, CLASSES)
    with pytest.raises(UserError, match=r"none\.safetensors does not exist"):
        load_weights(tiny_detr(), tmp_path / "none.safetensors", CLASSES)


def test_the_head_of_other_classes_is_not_used_even_if_there_are_as_many(
    tmp_path: Path, tiny_detr: Callable[..., DETR]
) -> None:
    trained = tiny_detr(num_classes=2)
    torch.nn.init.constant_(trained.heads[0].class_head.weight, 3.0)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    save(tmp_path / "a.pt", {**OTHER_PARTS, "categories": categories, "model": trained.state_dict()})
    same, other = tiny_detr(num_classes=2), tiny_detr(num_classes=2)
    assert not load_weights(same, tmp_path / "a.pt", CLASSES).replaced
    assert torch.equal(same.heads[0].class_head.weight, trained.heads[0].class_head.weight)
    report = load_weights(other, tmp_path / "a.pt", [Category(1, "cat"), Category(2, "gnu")])
    assert set(report.replaced) == {"heads.0.class_head.weight", "heads.0.class_head.bias"}
    assert not torch.equal(other.heads[0].class_head.weight, trained.heads[0].class_head.weight)
