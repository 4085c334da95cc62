"""What the faster-converging relatives of DETR must hold to."""

import functools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from omegaconf import DictConfig
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from detr import boxes as box_ops
from detr.config import build_criterion, build_model, compose
from detr.edges import bin_distances
from detr.errors import UserError
from detr.folders import CONFIGS
from detr.models.denoising import DenoisingLayout, DenoisingQueries, self_attention_mask
from detr.models.detr import DETR
from detr.models.queries import AnchorQueries, LearnedQueries, Queries, TwoStageQueries
from detr.models.values import Memory
from detr.types import ImageBatch, Predictions, Target
from tests.helpers import make_batch, random_targets

# One of those that differ in sizes alone.
_SIZES = re.compile(r"rt_detr_(r34|r50|r50_m)|rt_detrv2_(?!r18).*|deim_rt_detrv2_(?!r50$).*|d_fine_[sml]|deim_[nmlx]")
RECIPES = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml") if not _SIZES.fullmatch(path.stem))
TINY = (
    "model/backbone=resnet18",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.backbone.freeze=[]",
    "model.num_queries=7",
    "model.encoder.d_model=32",
    "model.encoder.nhead=4",
    "model.encoder.num_layers=2",
    "model.decoder.num_layers=3",
    "model.encoder.dim_feedforward=24",
    "model.encoder.dropout=0.0",
)
CLASSES = 5


@functools.cache
def configuration(*overrides: str) -> DictConfig:
    return compose(overrides)


def build(name: str, *options: str) -> tuple[DETR, torch.nn.Module]:
    torch.manual_seed(0)
    config = configuration(f"model={name}", *TINY, *options)
    model = build_model(config.model, CLASSES)
    for parameter in model.parameters():  # a model that starts with zeros would hide mistakes
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, build_criterion(config.criterion, CLASSES)


def batch_of(*sizes: tuple[int, int]) -> ImageBatch:
    generator = torch.Generator().manual_seed(3)
    return make_batch([torch.randn(3, *size, generator=generator) for size in sizes])


def decode(model: DETR, maps: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> Predictions:
    memory = model.encoder(maps, masks, padded=any(bool(mask.any()) for mask in masks))
    return model.decode(memory)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("counts", [[0, 0], [3, 0], [1, 11]], ids=str)
def test_every_parameter_learns_whatever_the_images_hold(name: str, counts: list[int]) -> None:
    model, criterion = build(name, "model.aux_loss=true")
    targets = random_targets(counts, CLASSES)
    losses = criterion(model.train()(batch_of((96, 128), (64, 96)), targets), targets)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", RECIPES)
def test_maps_alone_equal_the_same_maps_in_a_padded_batch(name: str) -> None:
    model, _ = build(name, *(["model.queries.published_padding=false"] if name == "dino" else []))
    model.eval()
    levels, channels = model.encoder.num_levels, model.encoder.in_channels
    torch.manual_seed(1)  # with 0, deim_s selects its last query by a difference of scores that is nothing but rounding
    small = [torch.randn(1, channels, 6 // 2**level + 1, 8 // 2**level + 1) for level in range(levels)]
    large = [torch.randn(2, channels, 14 // 2**level + 1, 16 // 2**level + 1) for level in range(levels)]
    masks = [torch.zeros(2, *level.shape[-2:], dtype=torch.bool) for level in large]
    for one, two, mask in zip(small, large, masks, strict=True):
        height, width = one.shape[-2:]
        two[:1, :, :height, :width] = one
        mask[0, height:], mask[0, :, width:] = True, True
    alone = decode(model, small, [torch.zeros(1, *level.shape[-2:], dtype=torch.bool) for level in small])
    together = decode(model, large, masks)
    torch.testing.assert_close(together.logits[:, :1], alone.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(together.boxes[:, :1], alone.boxes, atol=2e-5, rtol=0)


BACKBONES = sorted(path.stem for path in (CONFIGS / "model" / "backbone").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "backbone",
    [pytest.param(name, marks=[] if name in ("resnet18", "timm") else [pytest.mark.slow]) for name in BACKBONES],
)
def test_every_backbone_fits_every_recipe(name: str, backbone: str) -> None:
    config = compose([f"model={name}", f"model/backbone={backbone}", "model.backbone.weights=null"])
    if config.model.backbone._target_.endswith(".Timm"):
        pytest.importorskip("timm")
    if "dc5" in backbone and 32 in config.model.backbone.features:  # two stages have stride 16
        with pytest.raises(
            UserError, match=r"backbone: wanted features.*layer3 \(16\), layer4 \(16\); got \[8, 16, 32\]"
        ):
            build_model(config.model, CLASSES, pretrained=False)
        config.model.backbone.features = ["layer2", "layer3", "layer4"]
    with torch.device("meta"):
        model = build_model(config.model, CLASSES)
    assert len(model.backbone.channels) == len(config.model.backbone.features) <= model.encoder.num_levels


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_compiles_whole_and_for_all_sizes(name: str) -> None:
    """In a process of its own, which has no hook that checks shapes."""
    mp.spawn(compile_for_sizes, args=(name,), nprocs=1)


def compile_for_sizes(_: int, name: str) -> None:
    torch.set_num_threads(1)
    model, _ = build(name)
    model.train()
    compiled, counter = [], CompileCounter()
    model.compile(backend=counter)
    for step, size in enumerate([(192, 256), (160, 320), (256, 160), (320, 192), (192, 160), (160, 160)]):
        outputs = []
        for compiler in ("force_eager", "default"):
            torch.manual_seed(step)
            with torch.compiler.set_stance(compiler):
                predictions = model(batch_of(size, (size[0] - 20, size[1] - 30)), random_targets([step, 2], CLASSES))
            predictions.logits.sum().backward()
            outputs.append(predictions)
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outputs[0].boxes, outputs[1].boxes, atol=1e-4, rtol=1e-4)
        compiled.append(counter.frame_count)
    assert all("DenoisingQueries.forward" in broken for broken in counters["graph_break"]), counters["graph_break"]
    assert compiled[-1] == compiled[3], f"{name}: compiled {compiled} times"
    assert model.denoising is not None or compiled[-1] <= 3, f"{name}: compiled {compiled} times"


@pytest.mark.parametrize("name", ["dn_detr", "dino"])
def test_denoising_does_not_leak(name: str) -> None:
    """What denoising queries are given changes nothing for the queries that are matched, nor for other copies."""
    model, _ = build(name, {"dino": "model.denoising.num_queries=8", "dn_detr": "model.denoising.num_copies=2"}[name])
    model.train()
    batch, targets = batch_of((96, 128), (64, 96)), random_targets([4, 2], CLASSES)
    noises: list[DenoisingLayout] = []

    def run(disturb: bool) -> Predictions:
        torch.manual_seed(1)
        original = model.denoising.forward

        def disturbed(queries: Queries, targets: Sequence[Target], groups: int) -> object:
            extended, noise = original(queries, targets, groups)
            noises.append(noise)
            content, anchors = extended.content.clone(), extended.anchors.clone()
            if disturb:
                first = noise.count // noise.copies
                content[:, :first] = torch.randn_like(content[:, :first]) * 9
                anchors[:, :first] = torch.rand_like(anchors[:, :first])
            return replace(extended, content=content, anchors=anchors), noise

        model.denoising.forward = disturbed
        try:
            return model(batch, targets)
        finally:
            model.denoising.forward = original

    clean, disturbed = run(False), run(True)
    torch.testing.assert_close(disturbed.logits, clean.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(disturbed.boxes, clean.boxes, atol=1e-6, rtol=0)
    before, after = clean.denoising.predictions.logits, disturbed.denoising.predictions.logits
    first = noises[0].place < noises[0].count // clean.denoising.copies
    assert clean.denoising.copies == 2 and not torch.allclose(after[:, :, first], before[:, :, first], atol=1e-2)
    torch.testing.assert_close(after[:, :, ~first], before[:, :, ~first], atol=1e-6, rtol=0)

    # The matched queries are the ones that there are without denoising too.
    model.denoising = None
    without = model(batch)
    torch.testing.assert_close(without.logits, clean.logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [1, 1], [100, 3]], ids=str)
@pytest.mark.parametrize("contrastive", [True, False])
def test_denoising_queries_restore_their_targets(counts: list[int], contrastive: bool) -> None:
    torch.manual_seed(0)
    denoising = DenoisingQueries(
        d_model=8, num_classes=CLASSES, num_queries=20, label_noise=0.0, box_noise=0.4, contrastive=contrastive
    )
    targets = random_targets(counts, CLASSES)
    queries = Queries(content=torch.zeros(2, 3, 8), anchors=torch.rand(2, 3, 4), position=lambda anchors: anchors)
    extended, noise = denoising(queries, targets, 1)
    copies = max(1, 20 // max(*counts, 1))
    assert noise.count == copies * max(counts) * (1 + contrastive)
    assert extended.content.shape == (2, noise.count + 3, 8)
    assert len(noise.target) == copies * sum(counts) and len(noise.place) == (1 + contrastive) * len(noise.target)
    assert sorted(noise.target.tolist()) == sorted(list(range(sum(counts))) * copies)
    labels, wanted = (torch.cat([getattr(t, name) for t in targets])[noise.target] for name in ("labels", "boxes"))
    image, place = noise.image[noise.query], noise.place[noise.query]
    content, found = (x[image, place] for x in (extended.content, extended.anchors))
    torch.testing.assert_close(content, denoising.labels(labels))
    half = wanted[:, 2:].repeat(1, 2) / 2
    moved = (box_ops.cxcywh_to_xyxy(found) - box_ops.cxcywh_to_xyxy(wanted)).abs()
    assert (moved <= 0.4 * half + 1e-6).all()
    if contrastive and sum(counts):
        negative = extended.anchors[image, place + max(counts)]
        moved = (box_ops.cxcywh_to_xyxy(negative) - box_ops.cxcywh_to_xyxy(wanted)).abs()
        inside = (moved >= 0.4 * half - 1e-6) & (moved <= 0.8 * half + 1e-6)
        at_border = (box_ops.cxcywh_to_xyxy(negative) < 1e-6) | (box_ops.cxcywh_to_xyxy(negative) > 1 - 1e-6)
        assert (inside | at_border).all()


def test_label_noise_has_the_stated_rate() -> None:
    torch.manual_seed(0)
    denoising = DenoisingQueries(d_model=8, num_classes=1000, num_queries=4000, label_noise=0.25, contrastive=False)
    targets = random_targets([40], 1000)
    queries = Queries(content=torch.zeros(1, 3, 8), anchors=torch.rand(1, 3, 4), position=lambda anchors: anchors)
    extended, _ = denoising(queries, targets, 1)
    kept = (extended.content[0, :4000] == denoising.labels(targets[0].labels.repeat(100))).all(-1)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_self_attention_mask_by_its_rules() -> None:
    copies, size, groups, number = 3, 5, 2, 4
    valid = torch.tensor([[True] * 5, [True, True, False, True, False]]).repeat(1, copies)
    copy = torch.arange(copies).repeat_interleave(size)
    group = torch.arange(groups).repeat_interleave(number)
    keep = self_attention_mask(group, copy=copy, valid=valid)
    noise = copies * size
    for image in range(2):
        for i in range(noise + groups * number):
            for j in range(noise + groups * number):
                if i == j:
                    expected = True
                elif j < noise:
                    expected = i < noise and copy[i] == copy[j] and bool(valid[image, j])
                elif i < noise:
                    expected = bool(group[j - noise] == 0)
                else:
                    expected = bool(group[i - noise] == group[j - noise])
                assert bool(keep[image, 0, i, j]) == expected, (image, i, j)


@pytest.mark.parametrize("kind", [LearnedQueries, AnchorQueries, TwoStageQueries])
def test_groups_of_queries_do_not_see_one_another(kind: type) -> None:
    name = {LearnedQueries: "conditional_detr", AnchorQueries: "dab_detr", TwoStageQueries: "dino"}[kind]
    model, criterion = build(name, "model.queries.num_groups=3", "criterion.group_repeats=2")
    model.denoising = None
    batch, targets = batch_of((96, 128), (64, 96)), random_targets([2, 0], CLASSES)
    model.train()
    trained = model(batch)
    assert trained.groups.logits.shape == (2 * 3, 2, 7, CLASSES)
    model.eval()
    used = model(batch)
    assert used.groups is None and used.logits.shape == (3, 2, 7, CLASSES)
    torch.testing.assert_close(used.logits, trained.logits, atol=1e-5, rtol=0)
    model.train()
    losses = criterion(model(batch, targets), targets)
    losses["loss"].backward()
    assert losses["loss_bbox_groups"] > 0
    learned = model.queries.anchors if kind is AnchorQueries else None
    if learned is not None:
        assert learned.weight.grad.view(3, 7, 4).abs().sum((1, 2)).gt(0).all()


def test_two_stage_takes_the_best_proposals_and_never_padding() -> None:
    model, _ = build("dino", "model.queries.published_padding=false")
    model.eval()
    queries, head = model.queries, model.proposal_head
    tokens = torch.randn(2, 5 * 7, 32)
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[0, 2:], mask[0, :, 3:] = True, True
    memory = Memory.from_maps(
        [tokens.transpose(1, 2).unflatten(2, (5, 7))], [torch.zeros(2, 32, 5, 7)], [mask], padded=True
    )
    start, proposals = queries(memory, head)
    proposed = queries.norm(queries.proj(tokens))
    scores, offsets = head.class_head(proposed), head.box_head(proposed)
    for image, usable in enumerate([[0, 1, 2, 7, 8, 9], range(35)]):
        best = sorted(usable, key=lambda cell: -scores[image, cell].max().item())[:7]
        valid_height, valid_width = (2, 3) if image == 0 else (5, 7)
        for rank, cell in enumerate(best):
            row, column = divmod(cell, 7)
            center = torch.tensor([(column + 0.5) / valid_width, (row + 0.5) / valid_height, 0.05, 0.05])
            box = (offsets[image, cell] + (center / (1 - center)).log()).sigmoid()
            torch.testing.assert_close(proposals.boxes[0, image, rank], box, atol=1e-5, rtol=0)
            torch.testing.assert_close(start.anchors[image, rank], box, atol=1e-5, rtol=0)
            torch.testing.assert_close(proposals.logits[0, image, rank], scores[image, cell])
    assert not start.anchors.requires_grad and proposals.boxes.requires_grad


@pytest.mark.parametrize("selection", ["mixed", "pure"])
def test_two_stage_with_softmax_proposes_objects_not_background(selection: str) -> None:
    options = ["model.background=true", f"model.queries.selection={selection}", "~model/denoising"]
    model, criterion = build("small", *options, "criterion=set")
    with torch.no_grad():
        model.proposal_head.class_head.bias[-1] = 9.0
    targets = random_targets([3, 0], CLASSES)
    predictions = model.train()(batch_of((96, 128), (64, 96)), targets)
    assert predictions.proposals.logits.shape[-1] == (2 if selection == "pure" else CLASSES + 1)
    assert criterion(predictions, targets)["loss"].isfinite()
    memory = model.eval().encode(batch_of((96, 128)))
    _, proposals = model.queries(memory, model.proposal_head)
    logits = model.proposal_head.class_head(model.queries.norm(model.queries.proj(memory.tokens))).softmax(-1)
    best = logits[0, :, :-1].amax(-1).topk(7).values
    torch.testing.assert_close(proposals.logits[0, 0].softmax(-1)[:, :-1].amax(-1), best)


def test_denoising_of_images_together_equals_that_of_each_alone() -> None:
    """Images with fewer targets leave places empty, which nothing sees."""
    noise = "model.denoising.label_noise=0.0", "model.denoising.box_noise=0.0"
    model, criterion = build("dino", *noise, "model.denoising.filling=null")
    model.denoising.contrastive = False
    model.train()
    maps = [torch.randn(2, 32, 6, 8) for _ in range(4)]
    masks = [torch.zeros(2, 6, 8, dtype=torch.bool)] * 4
    targets = random_targets([5, 2], CLASSES)

    def losses(images: list[int], queries: int) -> dict[str, torch.Tensor]:
        model.denoising.num_queries = queries  # as many copies, 2, in each case
        chosen = [level[images] for level in maps]
        memory = model.encoder(chosen, [mask[images] for mask in masks], padded=False)
        return criterion(model.decode(memory, [targets[i] for i in images]), [targets[i] for i in images])

    together, first, second = losses([0, 1], 10), losses([0], 10), losses([1], 4)
    for name in ("loss_ce_denoising", "loss_bbox_denoising", "loss_giou_denoising"):
        torch.testing.assert_close(together[name] * 7, first[name] * 5 + second[name] * 2, rtol=1e-4, atol=1e-5)


def test_two_stage_with_fewer_tokens_than_queries() -> None:
    model, criterion = build("dino", "model.num_queries=900")
    targets = random_targets([3, 0], CLASSES)
    predictions = model.train()(batch_of((64, 96), (32, 64)), targets)
    assert predictions.logits.shape[2] < 900
    assert criterion(predictions, targets)["loss"].isfinite()


def test_look_forward_twice_trains_the_layer_before() -> None:
    """Only through it does a layer's box reach the head that moved its anchor."""
    for twice in (False, True):
        model, _ = build("dab_detr", f"model.look_forward_twice={twice}", "model.shared_heads=false")
        predictions = model.train()(batch_of((64, 96)))
        predictions.boxes[1].sum().backward()
        grad = model.heads[0].box_head.layers[-1].weight.grad
        assert bool(grad.abs().sum() > 0) == twice


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["model=detr", "model/decoder=deformable"],
            "DeformableDecoder needs queries with anchors",
        ),
        (
            ["model=detr", "model.refine=true"],
            r"refine needs queries with anchors\. Set model/queries=points",
        ),
        (["model=conditional_detr", "model/denoising=cdn"], "denoising needs queries with boxes as anchors"),
        (
            ["model=conditional_detr", "model.decoder.modulate_sizes=true"],
            "ConditionalDecoder needs queries with boxes",
        ),
        (["model=detr", "model.decoder.d_model=128"], r"needs the encoder's d_model\. Set model\.decoder\.d_model=256"),
        (
            ["model=deformable_detr", "model.neck.num_levels=2"],
            r"model\.neck: wanted num_levels of at least 3.*Raise num_levels",
        ),
        (
            ["model=detr", "model.backbone.features=[layer4,layer2]"],
            r"wanted features as some of.*in this order: layer1 \(4\), layer2 \(8\)",
        ),
        (["model=dino", "model.queries.selection=pure"], r"positions follow them.*selection mixed"),
        (["model=dab_detr", "model.refine=false"], r"look_forward_twice needs refinement\. Set model\.refine=true"),
        (["model=small", "model.aux_loss=false"], r"every layer to be trained\. Set model\.aux_loss=true"),
        (["model=dino", "model.queries.num_groups=0"], r"num_groups of at least 1"),
        (
            ["model=rt_detr_r50_m", "model.aux_loss=false", "model.look_forward_twice=true"],
            r"eval_layers needs every layer to be trained to predict\. Set model\.aux_loss=true",
        ),
        (
            ["model=d_fine_n", "model.look_forward_twice=true"],
            r"FineDecoder has no use for look_forward_twice.*Set model\.look_forward_twice=false",
        ),
    ],
)
def test_parts_that_do_not_fit_together(options: list[str], message: str) -> None:
    config = compose([*options, "model.backbone.weights=null"])
    with pytest.raises(UserError, match=message):
        build_model(config.model, CLASSES)


def test_edges_stay_where_they_are_expected_in_half_precision() -> None:
    """Rounded as other products are there, distances would be wrong by thousandths of a box."""
    model, criterion = build("d_fine_n")
    batch, targets = batch_of((96, 128), (64, 96)), random_targets([3, 1], CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.train()(batch, targets)
    assert {found.boxes.dtype, found.distributions.dtype, found.preliminary.boxes.dtype} == {torch.float32}
    bins = bin_distances(model.decoder.reg_max, model.decoder.up[0], model.decoder.reg_scale[0]).double()
    moves = (found.distributions.double().softmax(-1) * bins).sum(-1)
    start = box_ops.cxcywh_to_xyxy(found.preliminary.boxes.double())
    unit = found.preliminary.boxes[..., 2:].double().repeat(1, 1, 1, 2) / model.decoder.reg_scale
    outwards = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    expected = box_ops.xyxy_to_cxcywh(start + outwards * moves * unit)
    torch.testing.assert_close(found.boxes.double(), expected, atol=1e-6, rtol=0)
    losses = criterion(found, targets)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())


def test_denoising_without_targets_is_refused() -> None:
    model, _ = build("dino")
    with pytest.raises(UserError, match="denoising needs targets"):
        model.train()(batch_of((64, 96)))
