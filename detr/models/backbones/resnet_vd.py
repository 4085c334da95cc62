"""ResNet-vd, the backbone of RT-DETR (He et al., CVPR 2019: "Bag of tricks"; Zhao et al., CVPR 2024)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.backbones.base import is_file, read_state_dict
from detr.models.backbones.resnet import STAGES, ResNet, Stage, downloaded
from detr.renaming import Renaming, Rows

_ADDRESS = "https://github.com/lyuwenyu/storage/releases/download/v0.1"
_FILES = {
    "resnet18": "ResNet18_vd_pretrained_from_paddle.pth",
    "resnet34": "ResNet34_vd_pretrained_from_paddle.pth",
    "resnet50": "ResNet50_vd_ssld_v2_pretrained_from_paddle.pth",
    "resnet101": "ResNet101_vd_ssld_pretrained_from_paddle.pth",
}
_BRANCHES = [
    (f"branch2{letter}.{part}", f"{here}{index}")
    for index, letter in enumerate("abc", start=1)
    for part, here in (("conv", "conv"), ("norm", "bn"))
]
_SHORTCUT = [("conv", "downsample.1"), ("norm", "downsample.2")]
PUBLISHED: Rows = (  # names in RT-DETR's files, and here
    *((f"conv1.conv1_{i + 1}.conv", f"conv1.{3 * i}") for i in range(3)),
    *((f"conv1.conv1_{i + 1}.norm", f"conv1.{3 * i + 1}") for i in range(2)),
    ("conv1.conv1_3.norm", "bn1"),
    *(
        (f"res_layers.{index}.blocks.#.{there}", f"{stage}.#.{here}")
        for index, stage in enumerate(STAGES)
        for there, here in (
            *_BRANCHES,
            *((f"short.conv.{part}" if index else f"short.{part}", here) for part, here in _SHORTCUT),
        )
    ),
)


class ResNetVD(ResNet):
    """A ResNet with three 3x3 convolutions as its stem, whose shortcuts average before they project.

    The first shortcut of ResNet-18 and -34 projects too, unlike that of timm's resnet18d and resnet34d. Images are in
    [0, 1], without mean and deviation taken out.

    weights: `PADDLE` for RT-DETR's pre-trained weights, which come from PaddlePaddle, a path to them, or None for
        random weights. The other options are those of ResNet.
    """

    def __init__(
        self,
        *,
        name: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50",
        weights: str | None = None,
        norm: Literal["frozen", "batch", "group"] = "frozen",
        freeze: Sequence[Stage] = ("stem",),
        features: Sequence[Stage | int] = (8, 16, 32),
        detail: int | None = None,
    ) -> None:
        super().__init__(name=name, weights=weights, norm=norm, freeze=freeze, features=features, detail=detail)
        self.mean.zero_()
        self.std.fill_(1.0)

    def _network(self, name: str, norm: Callable[[int], nn.Module], dilation: bool) -> Any:
        body = super()._network(name, norm, dilation)
        body.conv1 = nn.Sequential(
            *(_convolution(3, 32, stride=2), norm(32), nn.ReLU(inplace=True)),
            *(_convolution(32, 32), norm(32), nn.ReLU(inplace=True)),
            _convolution(32, 64),
        )
        for index, stage in enumerate(STAGES):
            block = getattr(body, stage)[0]
            last = block.conv3 if hasattr(block, "conv3") else block.conv2
            pool = nn.AvgPool2d(2, ceil_mode=True) if index else nn.Identity()
            project = nn.Conv2d(block.conv1.in_channels, last.out_channels, kernel_size=1, bias=False)
            nn.init.kaiming_normal_(project.weight, mode="fan_out", nonlinearity="relu")
            block.downsample = nn.Sequential(pool, project, norm(last.out_channels))
        return body

    def _state_dict(self, name: str, weights: str) -> dict[str, Tensor]:
        if weights == "PADDLE":
            address = f"{_ADDRESS}/{_FILES[name]}"
            load = partial(torch.hub.load_state_dict_from_url, address, map_location="cpu", weights_only=True)
            state = downloaded(address, load)
        elif is_file(weights):
            state = read_state_dict(weights, "ResNet")
        else:
            raise UserError(f"ResNetVD: wanted weights as PADDLE or a path, got '{weights}'. Correct weights.")
        renamed = Renaming(PUBLISHED)
        return {renamed(key): value for key, value in state.items()}


def _convolution(channels: int, out: int, *, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, out, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
