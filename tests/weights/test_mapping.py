"""Weights as a start for other classes, queries and sizes, compared with what the model they are from predicts."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detr.config import build_model, compose
from detr.errors import UserError
from detr.models.detr import DETR
from detr.types import Category, Predictions
from detr.weights import LoadReport, load_weights, save, to_published
from tests.helpers import make_batch
from tests.helpers.commands import TINY_MODEL

REFINED = ("model=deformable_detr", "model.refine=true", "model.shared_heads=false")
# Each with its tensors that have a row for each query, none where queries are proposals alone.
FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "detr": (("model=detr",), ("position",)),
    "conditional_detr": (("model=conditional_detr",), ("position",)),
    "dab_detr": (("model=dab_detr",), ("anchors",)),
    "dn_detr": (("model=dn_detr",), ("anchors",)),
    "deformable_detr": (("model=deformable_detr",), ("position", "content")),
    "two-stage": ((*REFINED, "model/queries=two_stage", "model.queries.selection=pure"), ()),
    "dino": (("model=dino",), ("content",)),
    "rt_detr": (("model=rt_detr_r18",), ()),
    "d_fine": (("model=d_fine_n",), ()),
}
OF_PROPOSALS = ("two-stage", "dino", "rt_detr", "d_fine")  # whose choice depends on all classes
KNOWN = [Category(7, "cat"), Category(8, "dog"), Category(9, "gnu")]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def build(family: str, classes: int, *more: str) -> DETR:
    """The same weights each time, none of them special."""
    torch.manual_seed(0)
    model = build_model(
        compose([*FAMILIES[family][0], *TINY_MODEL, *more]).model, num_classes=classes, pretrained=False
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    assert isinstance(model, DETR)
    return model.eval()


def saved(model: DETR, path: Path, classes: Sequence[Category] = KNOWN) -> Path:
    rows = [{"id": category.id, "name": category.name} for category in classes]
    config = {"data": {}, "model": {"num_queries": model.num_queries}}
    save(path, {"config": config, "categories": rows, "training": {}, "model": model.state_dict()})
    return path


def start(model: DETR, path: Path, classes: Sequence[Category] = KNOWN) -> LoadReport:
    """With other values than the file's, so that what is taken over shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.requires_grad)
    return load_weights(model, path, classes)


@torch.no_grad()
def predict(model: DETR, size: int = 1) -> Predictions:
    """On images of two sizes in a batch; size: how many times as large."""
    torch.manual_seed(1)
    shapes = [(64 * size, 96 * size), (32 * size, 64 * size)]
    return model.eval()(make_batch([torch.rand(3, *shape) for shape in shapes]))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_mapped_classes_have_the_logits_that_they_had(family: str, tmp_path: Path) -> None:
    """Under other ids and in another order; with a new class too, where no proposals depend on it; at any size."""
    names = ["gnu", "cat", "dog"] if family in OF_PROPOSALS else ["gnu", "ape", "cat"]
    before, pairs = ["cat", "dog", "gnu"], [label for label, name in enumerate(names) if name != "ape"]
    trained, model = build(family, 3), build(family, len(names))
    classes = [Category(number, name) for number, name in enumerate(names, start=20)]
    report = start(model, saved(trained, tmp_path / "a.pt"), classes)
    assert not report.fresh and not report.skipped
    for size in (1, 2):
        found, wanted = predict(model, size), predict(trained, size)
        close(found.boxes, wanted.boxes)
        close(found.logits[..., pairs], wanted.logits[..., [before.index(names[label]) for label in pairs]])
    if model.denoising is not None and trained.denoising is not None:
        labels, old = model.denoising.labels.weight, trained.denoising.labels.weight
        assert torch.equal(labels[pairs], old[[before.index(names[label]) for label in pairs]])
        assert torch.equal(labels[3:], old[3:]), "what a label of no class has stays the last"


@pytest.mark.parametrize("number", [5, 9])
def test_queries_that_are_there_stay(family: str, number: int, tmp_path: Path) -> None:
    """Fewer: the model is the one from before without the last ones; more: with further ones, which are new."""
    trained, model, judge = build(family, 3), *(build(family, 3, f"model.num_queries={number}") for _ in range(2))
    report = start(model, saved(trained, tmp_path / "a.pt"))
    names = [f"queries.{name}.weight" for name in FAMILIES[family][1]]
    assert list(report.mapped) == names and not report.fresh and not report.skipped
    state, own = trained.state_dict(), model.state_dict()
    judge.load_state_dict(state | {name: torch.cat((state[name][:number], own[name][7:])) for name in names})
    found, wanted = predict(model), predict(judge)
    assert found.logits.shape[2] == number
    close(found.boxes, wanted.boxes)
    close(found.logits, wanted.logits)
    if number < 7:
        for name in names:
            assert torch.equal(own[name], state[name][:number])


@pytest.mark.parametrize(("queries", "groups"), [(5, 3), (9, 2), (9, 4), (14, 1)])
def test_queries_keep_their_place_in_their_group(queries: int, groups: int, tmp_path: Path) -> None:
    """From 7 in each of 2 groups; 14 in one group are as many rows, but others."""
    trained = build("dab_detr", 3, "model.queries.num_groups=2")
    model = build("dab_detr", 3, f"model.num_queries={queries}", f"model.queries.num_groups={groups}")
    report = start(model, saved(trained, tmp_path / "a.pt"))
    assert set(report.mapped) == {"queries.anchors.weight"}
    now = model.state_dict()["queries.anchors.weight"].unflatten(0, (groups, queries))
    before = trained.state_dict()["queries.anchors.weight"].unflatten(0, (2, 7))
    both, kept = min(groups, 2), min(queries, 7)
    assert torch.equal(now[:both, :kept], before[:both, :kept])
    assert not torch.isin(now[:, kept:], before).any() and not torch.isin(now[both:], before).any()


def test_a_state_dict_alone_has_one_group_or_the_models(tmp_path: Path) -> None:
    trained, model = build("dab_detr", 3, "model.num_queries=14"), build("dab_detr", 3, "model.queries.num_groups=3")
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    report = start(model, tmp_path / "a.pt")
    assert report.mapped == {"queries.anchors.weight": "rows of 7 of 21 queries; 14 rows in the file"}
    assert report.classes == ["classes: not named in the file"] and not report.fresh


def test_learned_positions_of_larger_images(tmp_path: Path) -> None:
    """The table for maps grows: cells that were there keep their vectors."""
    options = "model/encoder/position=learned"
    trained, model = build("detr", 3, options), build("detr", 3, options, "model.encoder.position.size=60")
    report = start(model, saved(trained, tmp_path / "a.pt"))
    names = [f"encoder.position.{name}.weight" for name in ("row_embed", "col_embed")]
    assert report.mapped == dict.fromkeys(names, "rows of 50 of 60 cells; 50 rows in the file")
    close(predict(model).logits, predict(trained).logits)


def test_heads_with_and_without_an_output_for_no_object(tmp_path: Path) -> None:
    """Classes keep their rows; the row of no object is new, or left out."""
    softmax, sigmoid = build("detr", 3), build("detr", 3, "criterion=focal")
    for trained, model in ((softmax, sigmoid), (sigmoid, softmax)):
        report = start(model, saved(trained, tmp_path / "a.pt"))
        assert set(report.mapped) == {"heads.0.class_head.weight", "heads.0.class_head.bias"}
        close(predict(model).logits[..., :3], predict(trained).logits[..., :3])


def test_a_head_of_objects_alone_does_not_depend_on_classes(tmp_path: Path) -> None:
    trained, model = build("two-stage", 3), build("two-stage", 1)
    report = start(model, saved(trained, tmp_path / "a.pt"), [Category(1, "ape")])
    assert {name.partition(".")[0] for name in report.fresh} == {"heads"}
    assert torch.equal(model.state_dict()["proposal_head.class_head.bias"], trained.proposal_head.class_head.bias)


def test_published_heads_of_cocos_80_classes(tmp_path: Path) -> None:
    """Whose names are known; denoising labels have a further row."""
    trained, model = build("rt_detr", 80), build("rt_detr", 3)
    torch.save({"model": to_published(trained.state_dict())}, tmp_path / "coco.pth")
    report = start(model, tmp_path / "coco.pth", [Category(7, "hot dog"), Category(8, "gnu"), Category(9, "Person")])
    assert not report.fresh and report.classes[1] == "classes of nearly the same name: 1: Person from person"
    before = trained.state_dict()
    for name, tensor in model.state_dict().items():
        if name in report.mapped:
            assert torch.equal(tensor[[0, 2]], before[name][[52, 0]]), name
            assert torch.equal(tensor[3:], before[name][80:]), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_denoising_that_only_one_side_has(tmp_path: Path) -> None:
    with_it, without = build("dn_detr", 3), build("dn_detr", 3, "~model/denoising")
    report = start(without, saved(with_it, tmp_path / "a.pt"))
    assert report.skipped == {"denoising.labels.weight": "no place in the model"}
    assert start(with_it, saved(without, tmp_path / "b.pt")).fresh == {"denoising.labels.weight": "not in the file"}


def test_the_report_counts_tensors_by_part(tmp_path: Path) -> None:
    trained, model = build("dn_detr", 3), build("dn_detr", 4, "model.num_queries=9")
    classes = [Category(1, "Cat"), Category(2, "gnu"), Category(3, "ape"), Category(4, "e\x1bmu")]
    report = start(model, saved(trained, tmp_path / "a.pt"), classes)
    rows = {name: cells for name, *cells in (line.split() for line in str(report).splitlines()[1:]) if len(cells) == 4}
    assert rows["tensors"] == ["loaded", "mapped", "fresh", "skipped"]
    counted = {
        name: [int(cell.replace("-", "0")) for cell in cells] for name, cells in rows.items() if name != "tensors"
    }
    assert counted["queries"][1] == counted["denoising"][1] == 1 and counted["heads"][1] == 2
    for column in range(4):
        assert sum(cells[column] for name, cells in counted.items() if name != "all") == counted["all"][column]
    assert sum(counted["all"]) == len(model.state_dict())
    for line in (
        "mapped 1: rows of 7 of 9 queries; 7 rows in the file",
        "classes: 2 of 4 from the file: Cat, gnu",
        "classes of nearly the same name: 1: Cat from cat",
        "classes that start anew: 2: ape, e\\x1bmu",
        "classes of the file alone: 1: dog",
    ):
        assert f"  {line}" in str(report).splitlines(), line
    names = [
        line.split()[1].rstrip(":") for line in report.listing().splitlines() if line.startswith(("loaded", "mapped"))
    ]
    assert sorted(names) == sorted(model.state_dict())


def test_rows_of_another_width_are_of_another_model(tmp_path: Path) -> None:
    trained, model = build("detr", 3), build("detr", 3, "model.encoder.d_model=16", "model.num_queries=9")
    with pytest.raises(UserError, match=r"not of the model that is configured.*tensors differ"):
        start(model, saved(trained, tmp_path / "a.pt"))
