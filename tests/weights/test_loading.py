"""Weights of other models as a start, and reports of what differs."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from detr.config import build_model, compose
from detr.errors import UserError
from detr.models.detr import DETR
from detr.types import Category
from detr.weights import load_weights, save, to_published
from detr.weights.families import convert, recognize
from tests.helpers import make_batch
from tests.helpers.commands import TINY_MODEL

CLASSES = [Category(1, "cat"), Category(2, "dog")]
OTHER_PARTS = {"config": {"data": {}, "model": {}}, "categories": [], "training": {}}


def test_published_weights_with_another_head_and_more_queries(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    """Of a data set whose classes nobody knows, so that its head starts anew; the queries that are there stay."""
    published = tiny_detr(num_classes=7, num_queries=9)
    torch.save({"model": to_published(published.state_dict())}, tmp_path / "detr.pth")
    model = tiny_detr(num_classes=2, num_queries=11)
    torch.nn.init.constant_(model.heads[0].box_head.layers[0].weight, 5.0)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, tmp_path / "detr.pth", CLASSES)
    assert set(report.fresh) == {"heads.0.class_head.weight", "heads.0.class_head.bias"}
    assert report.mapped == {"queries.position.weight": "rows of 9 of 11 queries; 9 rows in the file"}
    assert "fresh 2: no classes known from the file, which has 8 rows, wanted 3" in str(report)
    assert len(report.loaded) == len(fresh) - 3 and not report.skipped
    for name, tensor in model.state_dict().items():
        expected = fresh[name] if name in report.fresh else published.state_dict()[name]
        if name in report.mapped:
            expected = torch.cat((expected, fresh[name][9:]))
        assert torch.equal(tensor, expected), name


def test_a_file_with_the_options_of_its_training(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    """As published code saves them, in both formats of torch."""
    published = to_published(tiny_detr(num_classes=2).state_dict())
    options = argparse.Namespace(lr=1e-4, masks=False, device="cuda", dilation=None, lr_drops=[40])
    for zipped in (True, False):
        content = {"model": published, "args": options, "epoch": 49}
        torch.save(content, tmp_path / "detr.pth", _use_new_zipfile_serialization=zipped)
        assert not load_weights(tiny_detr(num_classes=2), tmp_path / "detr.pth", CLASSES).fresh
    torch.save({"model": published, "args": Path("detr.pth")}, tmp_path / "detr.pth")
    with pytest.raises(UserError, match=r"detr\.pth is refused: .*could run code"):
        load_weights(tiny_detr(num_classes=2), tmp_path / "detr.pth", CLASSES)


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
    with pytest.raises(UserError, match=r"Wanted weights of .*DINO, DN-DETR, .*, DETR, got tensors such as"):
        convert(state)
    torch.save({"model": state}, tmp_path / "unknown.pth")
    with pytest.raises(UserError, match="not of the model that is configured"):
        load_weights(tiny_detr(), tmp_path / "unknown.pth", CLASSES)


def test_safetensors(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    published = tiny_detr(num_classes=2)
    file = tmp_path / "model.safetensors"
    save_file(to_published(published.state_dict()), file)
    assert not load_weights(tiny_detr(num_classes=2), file, CLASSES).fresh
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
    assert not load_weights(same, tmp_path / "a.pt", CLASSES).fresh
    assert torch.equal(same.heads[0].class_head.weight, trained.heads[0].class_head.weight)
    report = load_weights(other, tmp_path / "a.pt", [Category(1, "ape"), Category(2, "gnu")])
    assert set(report.fresh) == {"heads.0.class_head.weight", "heads.0.class_head.bias"}
    assert not torch.equal(other.heads[0].class_head.weight, trained.heads[0].class_head.weight)


def saved(model: nn.Module, classes: Sequence[str], path: Path) -> Path:
    """A checkpoint of the model, whose weights are all of them random."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=7)]
    save(path, {**OTHER_PARTS, "categories": categories, "model": model.state_dict()})
    return path


def test_classes_of_the_same_name_are_found_as_before(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    """In another order, with other ids, and beside new ones."""
    trained, model = tiny_detr(num_classes=3).eval(), tiny_detr(num_classes=4).eval()
    fresh = model.heads[0].class_head.weight.detach().clone()
    path = saved(trained, ["cat", "dog", "gnu"], tmp_path / "a.pt")
    classes = [Category(number, name) for number, name in enumerate(["gnu", "ape", "cat", "emu"])]
    report = load_weights(model, path, classes)
    assert not report.fresh
    head = "heads.0.class_head"
    assert set(report.mapped) == {f"{head}.weight", f"{head}.bias"}
    assert "mapped 2: rows of 2 of 4 classes; 4 rows in the file" in str(report)
    assert "classes: 2 of 4 from the file: gnu, cat" in str(report)
    assert "classes that start anew: 2: ape, emu" in str(report)
    assert "classes of the file alone: 1: dog" in str(report)
    batch = make_batch([torch.rand(3, 37, 53), torch.rand(3, 48, 41)])
    with torch.no_grad():
        before, now = trained(batch), model(batch)
    assert torch.equal(now.boxes, before.boxes)
    # cat, gnu, no object; a product with another number of columns may round otherwise
    torch.testing.assert_close(now.logits[..., [2, 0, 4]], before.logits[..., [0, 2, 3]], atol=1e-6, rtol=0)
    assert torch.equal(model.heads[0].class_head.weight[[1, 3]], fresh[[1, 3]])


@pytest.mark.parametrize("pure", [False, True])
def test_every_part_that_knows_the_classes_follows_them(tmp_path: Path, pure: bool) -> None:
    """The heads of all layers, of the proposals, and the labels of denoising; what is new starts improbable."""
    kind = ["model.queries.selection=pure", "~model/denoising"] if pure else []
    config = compose(["model=dino", *TINY_MODEL, "model.shared_heads=false", *kind]).model
    trained, model = (build_model(config, num_classes=number) for number in (2, 3))
    path = saved(trained, ["cat", "dog"], tmp_path / "a.pt")
    old, fresh = trained.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, path, [*CLASSES, Category(3, "gnu")])
    heads = ["heads.0", "heads.1", *([] if pure else ["proposal_head"])]  # a pure one knows of objects alone
    names = {f"{head}.class_head.{part}" for head in heads for part in ("weight", "bias")}
    assert set(report.mapped) == names | (set() if pure else {"denoising.labels.weight"})
    assert not report.fresh and not report.skipped
    for name, tensor in model.state_dict().items():
        wanted = old[name]
        if name in report.mapped:  # what a label of no class has stays the last
            wanted = torch.cat((wanted[:2], fresh[name][2:3], wanted[2:]))
        assert torch.equal(tensor, wanted), name
        if name in names and name.endswith("bias"):
            assert tensor[2].sigmoid() == pytest.approx(0.01)


def test_norms_that_count_batches_start_from_those_that_do_not(tmp_path: Path) -> None:
    """Batch norms that train, as a fine-tuning may want, from a checkpoint with frozen ones; and the other way."""
    frozen, training = (
        build_model(compose([*TINY_MODEL, f"model.backbone.norm={norm}"]).model, num_classes=2)
        for norm in ("frozen", "batch")
    )
    path = saved(frozen, ["cat", "dog"], tmp_path / "frozen.pt")
    report = load_weights(training, path, [Category(7, "cat"), Category(8, "dog")])
    assert len(report.loaded) == len(frozen.state_dict()) and not report.fresh
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, training.state_dict()[name]), name
    path = saved(training, ["cat", "dog"], tmp_path / "batch.pt")
    report = load_weights(frozen, path, [Category(7, "cat"), Category(8, "dog")])
    assert len(report.loaded) == len(frozen.state_dict()) and not report.skipped
