"""Every shipped configuration composes and binds; wrong ones are refused with a message that helps."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from detr.config import MODELS, build, build_criterion, build_model, check_config, compose, evaluation_data
from detr.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
OPTIONS = sorted(
    path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS
)
FILLED_IN = ["data.train.images=x", "data.train.annotations=x", "data.val.images=x", "data.val.annotations=x"]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes_and_binds(option: Path) -> None:
    if option.name == "from_checkpoint":
        assert compose(["checkpoint=x"], "evaluate").data.val.images is None
        return
    overrides = [f"{'/'.join(option.parts[:-1])}={option.name}".replace("recipe=", "model=")]
    if option.name in ("common", "coco_format"):
        return  # what the others inherit
    text = (CONFIGS / option).with_suffix(".yaml").read_text()
    if "root: ???" in text or "_coco" in option.name:
        overrides.append("data.root=x")
    if "_target_: ???" in text:
        overrides.append(f"model.attention.{option.name}.block._target_=detr.models.attention.CrissCrossAttention")
    own_paths = option.parts[0] == "data" and "annotations:" not in text and option.name != "custom"
    check_config(compose([*overrides, *([] if own_paths else FILLED_IN)]))


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_every_command_composes(name: str) -> None:
    assert compose([], name).device == "auto"


@pytest.mark.parametrize("data", ["coco", "custom", "shapes", "from_checkpoint"])
def test_evaluation_needs_no_training_data(data: str) -> None:
    root = ["data.root=x"] if data == "coco" else []
    files = [] if data == "coco" else ["data.val.images=x", "data.val.annotations=x"]
    config = compose(["checkpoint=x", f"data={data}", *root, *files], "evaluate")
    config.data.train = None  # as evaluate.py does
    check_config(config)
    found = evaluation_data(config, {"data": {"size": 96, "max_size": 128, "val": {"images": "a", "annotations": "b"}}})
    assert (found["size"], found["max_size"]) == (96, 128) and found["val"]["images"] in ("x", "x/val2017")


def test_evaluation_takes_the_data_options_of_a_training() -> None:
    config = compose(["checkpoint=x", *FILLED_IN, "data.batch_size=3"], "evaluate")
    assert (config.data.val.images, config.data.batch_size) == ("x", 3)


def test_one_option_rules_the_size_of_images() -> None:
    published = compose(["data=custom", *FILLED_IN]).data
    assert published.max_size == 1333 and published.transforms.sizes == list(range(480, 801, 32))
    crops = ("crop_from", "crop_min", "crop_max")
    assert [published.transforms[name] for name in crops] == [[400, 500, 600], 384, 600]
    data = compose(["data=custom", "data.size=320", *FILLED_IN]).data
    assert data.max_size == data.transforms.max_size == data.plain_transforms.max_size == 533
    assert (min(data.transforms.sizes), max(data.transforms.sizes), data.plain_transforms.sizes) == (192, 320, [320])
    assert [data.transforms[name] for name in crops] == [[160, 200, 240], 154, 240]
    assert compose(["data.size=64"]).data.transforms.sizes == [64]


def test_a_model_brings_what_fits_it() -> None:
    config = compose(["data=custom", "model=small", *FILLED_IN])
    assert (config.data.size, config.data.transforms.sizes, config.data.batch_size) == (320, [320], 4)
    assert (config.optimizer.lr, config.optimizer.backbone_lr, config.trainer.epochs) == (8e-4, 8e-4, 50)
    config = compose(["data=custom", "model=small", "optimizer.lr=1e-3", "data.size=256", *FILLED_IN])
    assert (config.optimizer.lr, config.data.transforms.sizes) == (1e-3, [256])
    assert compose(["model=small"]).data.size == 96, "the generated images have their own size"
    assert compose(["experiment=bccd", "data.root=x"]).trainer.epochs == 27
    assert compose(["data=custom", *FILLED_IN]).trainer.epochs == 300


@pytest.mark.parametrize("data", ["roboflow", "yolo", "voc"])
def test_a_recipe_takes_data_of_any_format(data: str) -> None:
    config = compose(["experiment=finetune", f"data={data}", "data.root=x"]).data
    assert (config.train.root, config.train.part, config.val.part, config.size) == ("x", "train", "val", 384)


def test_experiments_open_with_command_and_hardware() -> None:
    for path in (CONFIGS / "experiment").glob("*.yaml"):
        head = path.read_text().split("defaults:")[0]
        assert "Command:" in head and "Hardware:" in head and f"experiment={path.stem}" in head, path


def test_models_build_from_their_configuration() -> None:
    small = ["model/backbone=resnet18", "model.backbone.weights=null", "model.encoder.num_layers=1"]
    config = compose([*small, "model/encoder/position=learned", "model.encoder.d_model=64", "model.num_queries=9"])
    model = build_model(config.model, num_classes=3)
    assert model.heads[0].class_head.out_features == 4 and model.queries.position.num_embeddings == 9
    assert model.encoder.position.row_embed.embedding_dim == 32
    criterion = build_criterion(compose(["criterion.classification.no_object_weight=0.5"]).criterion, num_classes=3)
    assert criterion.classification.no_object_weight == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_querys": 5},
            r"model\.num_querys is not an option of detr\.models\.detr\.DETR.*Did you mean num_queries\?",
        ),
        ({"num_queries": "many"}, r"model\.num_queries: wanted int, got 'many'"),
        ({"aux_loss": 3}, r"model\.aux_loss: wanted bool, got 3"),
        ({"num_queries": True}, r"model\.num_queries: wanted int, got True"),
        ({"num_queries": {"a": 1}}, r"model\.num_queries: wanted int, got {'a': 1}"),
        ({"_recursive_": False}, r"model: the key _recursive_ is not used here"),
    ],
)
def test_bad_options_are_named_with_their_place(options: dict[str, object], message: str) -> None:
    config = compose()
    model = {**OmegaConf.to_container(config.model, resolve=True), **options}
    with pytest.raises(UserError, match=message):
        build_model(model, num_classes=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optimizer.lr", "true"),
        ("optimizer.betas", "''"),
        ("scheduler.drops", "''"),
        ("scheduler.drops", "[0.5,0.5,0.5,half]"),
        ("scheduler.drops", "[0.5,true]"),
        ("scheduler.warmup", "{a: 1}"),
        ("optimizer.weight_decays", "{norm: 0, bias: none}"),
        ("trainer.freeze", "''"),
        ("trainer.freeze", "0"),
        ("trainer.freeze", "[backbone]"),
    ],
)
def test_values_of_another_type_are_refused_wherever_they_are(option: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(option)}: wanted "):
        compose([f"{option}={value}"])


@pytest.mark.parametrize("override", ["model=5", "logger=[1,2]", "experiment=[1]"])
def test_a_group_that_is_set_to_no_name_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=r"^A group is set to .*wanted the name of one of its files"):
        compose([override])


def test_nested_options_are_checked_before_anything_is_built() -> None:
    with pytest.raises(
        UserError, match=r"^model\.encoder\.activation: wanted relu or gelu or silu or glu or prelu, got 'tanh'\.$"
    ):
        check_config(compose(["model.encoder.activation=tanh"]))
    model = OmegaConf.to_container(compose().model, resolve=True)
    del model["encoder"]["position"]["d_model"]
    with pytest.raises(
        UserError, match=r"model\.encoder\.position: .*needs the option d_model\. Set model\.encoder\.position\.d_model"
    ):
        build_model(model, num_classes=3)


@pytest.mark.parametrize(
    "target",
    ["os.system", "torch.hub.load", "builtins.eval", "detr.models.backbones.resnet.torch.hub.load",
     "detr.models.backbones.resnet._group_norm",
     "detr.weights.save", "torch.load", 3],
)  # fmt: skip
def test_checkpoints_build_model_classes_only(target: object) -> None:
    with pytest.raises(UserError, match=r"model\._target_: '.*' is refused"):
        build({"_target_": target}, path="model", allow=MODELS)


def test_users_own_packages_can_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts.py").write_text(
        "from detr.losses import HungarianMatcher\nclass Matcher(HungarianMatcher):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "my_parts.Matcher", "class_cost": 3.0}
    with pytest.raises(UserError, match=r"refused.*allow_targets=\[PACKAGE\]"):
        build(node, path="criterion.matcher")
    assert build(node, path="criterion.matcher", allow=("my_parts",)).class_cost == 3
    with pytest.raises(UserError, match=r"'my_parts\.Other' does not exist"):
        build({"_target_": "my_parts.Other"}, path="criterion", allow=("my_parts",))
    config = compose(["criterion.matcher._target_=my_parts.Matcher", "allow_targets=[my_parts]"])
    assert type(build_criterion(config.criterion, num_classes=3).matcher).__name__ == "Matcher"
