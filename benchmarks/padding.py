"""How much of the padding in a batch the networks of timm see: ResNets hardly, global attention and pooling do.

The last map of one photograph, alone and as part of a larger batch, three quarters of which is padding: the mean change
of its cells, in standard deviations of the map.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import Row
from benchmarks.transforms import photographs
from detr.images import find_images, read_image, resize
from detr.models.backbones.base import Backbone
from detr.models.backbones.timm import Timm

# One network of each family, with the stride of its last map. Weights are random, and norms have seen photographs.
NETWORKS = {
    "resnet18d": 32, "tf_efficientnet_lite0": 32, "convnext_atto": 32, "hgnetv2_b0": 32,
    "swin_tiny_patch4_window7_224": 32, "mobilenetv3_small_100": 32, "regnety_002": 32, "vit_tiny_patch16_224": 16,
}  # fmt: skip
HEIGHT, WIDTH = 224, 288
CALIBRATION = 8  # photographs


def run(*, folder: Path | None = None, annotations: Path | None = None) -> Iterator[Row]:
    """folder, annotations: photographs to use, those of a COCO data set; generated ones by default."""
    with tempfile.TemporaryDirectory() as temporary:
        images = torch.stack([*_photographs(*photographs(Path(temporary), folder, annotations))])
    for name, stride in NETWORKS.items():
        torch.manual_seed(0)
        backbone = Timm(name=name, norm="batch", freeze=[], features=[stride])
        for module in backbone.modules():
            _draw(module)
        pixels = (images / 255 - backbone.mean.view(3, 1, 1)) / backbone.std.view(3, 1, 1)
        with torch.no_grad():
            backbone.train()(pixels)
            change = _change(backbone.eval(), pixels[:1])
        height, width = (side // 2 for side in change.shape)
        millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
        yield Row(name, "parameters", "M", millions)
        yield Row(name, "sides are multiples of", "pixels", backbone.size_divisor)
        yield Row(name, "change by padding, farthest quarter", "deviations", change[:height, :width].mean().item())
        yield Row(name, "change by padding, all cells", "deviations", change.mean().item())


def _draw(module: nn.Module) -> None:
    """Weights that let every branch take part: many networks start with residual branches that do nothing."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 1 and name != "bias":
            nn.init.ones_(parameter)  # of norms, and scales of branches
        elif isinstance(module, nn.Conv2d | nn.Linear) and name == "weight":
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    if isinstance(module, nn.BatchNorm2d):
        module.momentum = None  # the mean over all that it sees


def _photographs(folder: Path, annotations: Path) -> Iterator[Tensor]:
    root, names = find_images(str(folder))
    for name in names[:CALIBRATION]:
        yield resize(read_image(root / name), (HEIGHT, WIDTH))


def _change(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Of each cell of one image's last map (height, width), by padding to twice the height and width."""
    mask = torch.zeros(1, 2 * HEIGHT, 2 * WIDTH, dtype=torch.bool)
    mask[:, HEIGHT:], mask[:, :, WIDTH:] = True, True
    alone = backbone(pixels)[-1][0]
    padded = backbone(F.pad(pixels, (0, WIDTH, 0, HEIGHT)), mask)[-1][0, :, : alone.shape[1], : alone.shape[2]]
    return (padded - alone).abs().mean(0) / alone.std()
