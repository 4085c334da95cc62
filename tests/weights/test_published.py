"""The table of published checkpoints: it is complete and listed, and each brings the model that its tensors fit."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from detr import Detector
from detr.config import build_model, compose
from detr.errors import UserError
from detr.models.detr import DETR
from detr.published import PUBLISHED, PublishedCheckpoint, file_name
from detr.types import Category
from detr.weights import check_state, load_weights, read_weights, to_published
from detr.weights.families import convert
from detr.weights.reading import coco_categories
from tests.helpers.commands import TINY_MODEL, run

DEFORMABLE = {
    "deformable_detr_r50_single_scale": {"num_feature_levels": 1},
    "deformable_detr_r50_single_scale_dc5": {"num_feature_levels": 1},
    "deformable_detr_r50": {},
    "deformable_detr_r50_refined": {"with_box_refine": True},
    "deformable_detr_r50_two_stage": {"with_box_refine": True, "two_stage": True},
}


RT_DETR = {  # depths of the backbone, layers of the decoder, expansion and channels of the encoder
    "r18": ([2, 2, 2, 2], 3, 0.5, 256),
    "r34": ([3, 4, 6, 3], 4, 0.5, 256),
    "r50_m": ([3, 4, 6, 3], 6, 0.5, 256),
    "r50": ([3, 4, 6, 3], 6, 1.0, 256),
    "r101": ([3, 4, 23, 3], 6, 1.0, 384),
}


D_FINE = {  # stem, channels within blocks and between them, blocks, layers of a block; channels, expansion, depth, decoder
    "n": ((16, 16), (16, 32, 64, 128), (64, 256, 512, 1024), (1, 1, 2, 1), 3, 128, 0.34, 0.5, 3),
    "s": ((16, 16), (16, 32, 64, 128), (64, 256, 512, 1024), (1, 1, 2, 1), 3, 256, 0.5, 0.34, 3),
    "m": ((24, 32), (32, 64, 128, 256), (96, 384, 768, 1536), (1, 1, 3, 1), 4, 256, 1.0, 0.67, 4),
    "l": ((32, 48), (48, 96, 192, 384), (128, 512, 1024, 2048), (1, 1, 3, 1), 6, 256, 1.0, 1.0, 6),
    "x": ((32, 64), (64, 128, 256, 512), (128, 512, 1024, 2048), (1, 2, 5, 2), 6, 384, 1.0, 1.0, 6),
}


def classes_of(name: str) -> int:
    """COCO's classes, or its 91 ids."""
    if name.endswith("panoptic"):
        return 250
    return 80 if name.startswith(("rt_detr", "d_fine")) else 91


def sketch(name: str) -> Any:
    """The model that a checkpoint brings, without data."""
    config = compose(PUBLISHED[name].options.split()).model
    with torch.device("meta"):
        return build_model(config, num_classes=classes_of(name), pretrained=False)


def test_the_table_is_well_formed() -> None:
    files = [file_name(name) for name in PUBLISHED]
    assert len(set(files)) == len(files)
    for name, one in PUBLISHED.items():
        assert one.url.startswith("https://") and file_name(name).endswith((".pth", ".safetensors")), name
        assert one.sha256 is None or re.fullmatch("[0-9a-f]{8,64}", one.sha256), name
        if prefix := re.search(r"-([0-9a-f]{8})\.pth$", file_name(name)):  # torch.hub's convention
            assert one.sha256 is not None and one.sha256.startswith(prefix[1]), name


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("train.py", "weights"),
        ("evaluate.py", "checkpoint"),
        ("predict.py", "checkpoint"),
    ],
)
def test_help_lists_them(script: str, option: str) -> None:
    done = run(script, "--help")
    listed = done.output.partition(f"for {option}=NAME:\n")[2].partition("\n\n")[0]
    assert done.code == 0 and re.findall(r"\w+", listed) == list(PUBLISHED)


def theirs(name: str) -> nn.Module:
    """The model as transformers has it, without data."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    if name.startswith("rt_detr"):
        return their_rt_detr(transformers, name)
    if name.startswith("d_fine"):
        return their_d_fine(transformers, name.removeprefix("d_fine_")[0])
    masks = name.endswith("panoptic")
    several = name in DEFORMABLE and "single" not in name
    resnet = transformers.ResNetConfig(
        depths=[3, 4, 23 if "r101" in name else 6, 3],
        out_features=["stage1"] * masks + ["stage2", "stage3"] * (several or masks) + ["stage4"],
    )
    options: dict[str, Any] = {"use_timm_backbone": False, "use_pretrained_backbone": False}
    options["num_labels"] = 250 if masks else 91
    options |= {"backbone_config": resnet} | DEFORMABLE.get(name, {})
    if name in DEFORMABLE:
        kind, options = "DeformableDetr", {**options, "backbone": None, "num_queries": 300}
    else:
        kind = {"d": "Detr", "c": "ConditionalDetr"}[name[0]] if not name.startswith("dab") else "DabDetr"
    config = getattr(transformers, f"{kind}Config")(**options)
    with torch.device("meta"):
        return getattr(transformers, f"{kind}For{'Segmentation' if masks else 'ObjectDetection'}")(config)


def their_rt_detr(transformers: Any, name: str) -> nn.Module:
    second, size = re.fullmatch(r"rt_detr(v2)?_(r\d+(?:_m)?)(?:_objects365)?", name).groups()
    depths, layers, expansion, channels = RT_DETR[size]
    widths = [64 * 2**stage * (1 if size in ("r18", "r34") else 4) for stage in range(4)]
    config = getattr(transformers, "RTDetrV2Config" if second else "RTDetrConfig")(
        backbone_config=transformers.RTDetrResNetConfig(
            layer_type="basic" if size in ("r18", "r34") else "bottleneck",
            depths=depths,
            hidden_sizes=widths,
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=widths[1:],
        encoder_hidden_dim=channels,
        encoder_ffn_dim=2048 if size == "r101" else 1024,
        hidden_expansion=expansion,
        decoder_in_channels=[channels] * 3,
        decoder_layers=layers,
        num_labels=80,
    )
    with torch.device("meta"):
        return getattr(transformers, "RTDetrV2ForObjectDetection" if second else "RTDetrForObjectDetection")(config)


def their_d_fine(transformers: Any, size: str) -> nn.Module:
    stem, inner, outer, blocks, layers, channels, expansion, depth, decoder_layers = D_FINE[size]
    maps, d_model = (2, 128) if size == "n" else (3, 256)
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, *stem],
        stage_in_channels=[stem[-1], *outer[:-1]],
        stage_mid_channels=inner,
        stage_out_channels=outer,
        hidden_sizes=outer,
        stage_num_blocks=blocks,
        stage_numb_of_layers=[layers] * 4,
        use_learnable_affine_block=size in "nsm",
        out_features=[f"stage{index}" for index in range(5 - maps, 5)],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=outer[-maps:],
        encoder_hidden_dim=channels,
        encoder_ffn_dim={"n": 512, "x": 2048}.get(size, 1024),
        encode_proj_layers=[maps - 1],
        feat_strides=[8, 16, 32][-maps:],
        hidden_expansion=expansion,
        depth_mult=depth,
        d_model=d_model,
        num_feature_levels=maps,
        decoder_in_channels=[channels] * maps,
        decoder_ffn_dim=512 if size == "n" else 1024,
        decoder_layers=decoder_layers,
        decoder_n_points=[6, 6] if size == "n" else [3, 6, 3],
        num_labels=80,
    )
    with torch.device("meta"):
        return transformers.DFineForObjectDetection(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_brings_the_model_that_its_tensors_fit(name: str) -> None:
    """The library transformers is the judge of names and shapes; dilation has no tensors, so that the name tells it."""
    state = {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in theirs(name).state_dict().items()}
    converted, model = convert(state), sketch(name)
    check_state(model, converted.state, name)
    assert model.backbone.strides[-1] == (16 if "_dc5" in name else 32)
    assert converted.options.split()[0] == PUBLISHED[name].options.split()[0]


def test_the_authors_file_fits(shared: Path) -> None:
    names = json.loads((shared / "fixtures" / "detr" / "state_dict_detr_resnet50.json").read_text())
    state = convert({name: torch.zeros(shape) for name, shape in names}).state
    check_state(sketch("detr_r50"), state, "detr_r50")


def test_classes_are_those_of_coco() -> None:
    categories, classes = coco_categories(91), coco_categories(80)
    assert categories is not None and classes is not None and coco_categories(79) is None
    named = {category.id: category.name for category in categories}
    assert {1: "person", 18: "dog", 90: "toothbrush"}.items() <= named.items()
    assert [classes[label].name for label in (0, 16, 79)] == ["person", "dog", "toothbrush"]
    assert [category.id for category in classes] == sorted({category.id for category in classes})


# Training


def test_a_training_gets_the_model_of_its_weights() -> None:
    config = compose(["weights=deformable_detr_r50_two_stage", "model.num_queries=77"])
    expected = compose([*PUBLISHED["deformable_detr_r50_two_stage"].options.split(), "model.num_queries=77"])
    assert config.weights == "deformable_detr_r50_two_stage"
    assert config.model == expected.model and config.criterion == expected.criterion
    data = [f"data.{split}.{part}=x" for split in ("train", "val") for part in ("images", "annotations")]
    config = compose(["experiment=finetune", "weights=detr_r101", *data])
    assert config.model.backbone.name == "resnet101" and config.trainer.max_steps == 2000
    assert compose(["weights=detr_r101", "model/backbone=resnet101"]).model.backbone.name == "resnet101"


@pytest.mark.parametrize("option", ["model=dino", "model/backbone=resnet50"])
def test_another_model_than_that_of_the_weights_is_refused(option: str) -> None:
    match = rf"weights=detr_r50_dc5 brings its own model, model=detr model/backbone=resnet50_dc5; {option} is another"
    with pytest.raises(UserError, match=match):
        compose(["weights=detr_r50_dc5", option])
    done = run("train.py", "weights=detr_r50_dc5", option)
    assert done.code == 2 and re.search(match, done.message), done.output


def test_a_sweep_of_names_is_refused() -> None:
    """Each would need a model of its own."""
    with pytest.raises(UserError, match="weights=detr_r50,detr_r101 has several values, each of which brings its own"):
        compose(["weights=detr_r50,detr_r101"])
    assert run("train.py", "-m", "weights=null,detr_r50").code == 2


def test_rows_of_cocos_classes_are_kept(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    """By their names, whatever the ids; the softmax of DETR has a row for no object, which is kept too."""
    published = tiny_detr(num_classes=91)
    torch.save({"model": to_published(published.state_dict())}, tmp_path / "detr.pth")
    model = tiny_detr(num_classes=3)
    fresh = model.heads[0].class_head.weight.detach().clone()
    report = load_weights(model, tmp_path / "detr.pth", [Category(5, "dog"), Category(6, "gnu"), Category(1, "person")])
    assert set(report.mapped) == {"heads.0.class_head.weight", "heads.0.class_head.bias"} and not report.fresh
    now, before = model.heads[0].class_head.weight, published.heads[0].class_head.weight
    assert torch.equal(now[[0, 2, 3]], before[[18, 1, 91]]) and torch.equal(now[1], fresh[1])


def test_classes_that_transformers_names_beside_its_weights(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    file = tmp_path / "model.safetensors"
    save_file(to_published(tiny_detr(num_classes=2).state_dict()), file)
    assert read_weights(file).categories is None
    for content, expected in (
        ({"id2label": {"0": "gnu", "1": "emu"}}, [Category(0, "gnu"), Category(1, "emu")]),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"0": "gnu"}}, None),
        ({"id2label": {"0": "gnu", "1": 7}}, None),
        ([], None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert read_weights(file).categories == expected
    (tmp_path / "config.json").write_bytes(b"\xff{")
    assert read_weights(file).categories is None


# From the command line, with a small checkpoint


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedCheckpoint:
    """A published checkpoint, `tiny`, that lies in torch's cache already."""
    options = ["model=conditional_detr", *TINY_MODEL]
    entry = PublishedCheckpoint(options=" ".join(options), ap=0.0, url="https://127.0.0.1/tiny.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setitem(PUBLISHED, "tiny", entry)
    torch.manual_seed(0)
    model = build_model(compose(options).model, num_classes=91)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"model": to_published(model.state_dict())}, folder / "tiny.pth")
    return entry


def test_train_from_a_name(tiny: PublishedCheckpoint, tiny_options: list[str], tmp_path: Path) -> None:
    data = [option for option in tiny_options if option not in TINY_MODEL]
    done = run("train.py", "weights=tiny", *data, f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1")
    assert done.code == 0, done.output
    assert "weights=tiny brings model=conditional_detr" in done.output
    assert re.search(r"Weights from \S+tiny\.pth, Conditional DETR from its authors", done.output)
    categories = Detector.from_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").categories
    assert [category.name for category in categories] == ["circle", "square", "triangle"]


def test_evaluate_and_predict_by_a_name(tiny: PublishedCheckpoint, shapes_root: Path, tmp_path: Path) -> None:
    content = json.loads((shapes_root / "instances_val.json").read_text())
    content["categories"] = [
        {"id": number, "name": name} for number, name in enumerate(("person", "bicycle", "car"), 1)
    ]
    annotations = tmp_path / "coco.json"
    annotations.write_text(json.dumps(content))
    data = [f"data.val.images={shapes_root / 'val'}", f"data.val.annotations={annotations}", "data.size=48"]
    done = run("evaluate.py", "checkpoint=tiny", *data, "data.workers=0", f"run_dir={tmp_path}", "device=cpu")
    assert done.code == 0 and "bicycle" in done.output, done.output
    done = run(
        "predict.py", "checkpoint=tiny", f"source={shapes_root / 'val' / '000000.jpg'}", f"output={tmp_path / 'found'}",
        f"run_dir={tmp_path / 'found'}", "threshold=0", "size=48", "device=cpu",
    )  # fmt: skip
    assert done.code == 0, done.output
    names = {row["category_name"] for row in json.loads((tmp_path / "found" / "results.json").read_text())}
    coco = coco_categories(91)
    assert names and coco is not None and names <= {category.name for category in coco}


def test_a_detector_by_a_name(tiny: PublishedCheckpoint, tmp_path: Path) -> None:
    detector = Detector.from_checkpoint("tiny")
    assert detector.categories == coco_categories(91)
    model = compose(tiny.options.split()).model
    assert len(Detector.from_checkpoint("tiny", model=model).categories) == 91
    with pytest.raises(UserError, match="The published weights tiny bring their own model, model=conditional_detr"):
        Detector.from_checkpoint("tiny", model=compose(["model=detr"]).model)


@pytest.mark.parametrize(("script", "option"), [("train.py", "weights"), ("predict.py", "checkpoint")])
def test_without_a_connection_there_is_one_message(
    script: str, option: str, free_port: int, tiny: PublishedCheckpoint, shapes_root: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(PUBLISHED, "tiny", replace(tiny, url=f"http://127.0.0.1:{free_port}/absent.pth"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    more = (
        ["data.prepare=null", f"data.root={shapes_root}"] if script == "train.py" else [f"source={shapes_root / 'val'}"]
    )
    done = run(script, f"{option}=tiny", *more, f"run_dir={tmp_path / 'run'}", "device=cpu")
    assert done.code == 2 and "Traceback" not in done.output
    assert "absent.pth could not be fetched: " in done.message
    assert f"put it to {tmp_path}/torch/hub/checkpoints/absent.pth" in done.message
