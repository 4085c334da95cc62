"""Published checkpoints by name: of which model they are, where they are, and how a damaged copy is recognized.

A further checkpoint is one entry in PUBLISHED. Its options must make the model that its tensors fit.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlparse


@dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint:
    """Where a checkpoint is, and what is known of it.

    options: what sets its model on the command line. ap: on COCO val, as published.
    url: of the file. size: in bytes, None where it is not known.
    sha256: the checksum, or its first digits; None where it is not known: then size and structure alone are checked.
    """

    options: str
    ap: float
    url: str
    size: int | None = None
    sha256: str | None = None


_DETR = "https://dl.fbaipublicfiles.com/detr"
_CONDITIONAL = "https://github.com/DeppMeng/ConditionalDETR/releases/download/v1.0"
_HUB = "https://huggingface.co"
_RT_DETR = "https://github.com/lyuwenyu/storage/releases/download"
_D_FINE = "https://github.com/Peterande/storage/releases/download/dfinev1.0"
_DEFORMABLE = "model=deformable_detr"
_SINGLE_SCALE = f"{_DEFORMABLE} model.backbone.features=[layer4] model.neck.num_levels=1"
_REFINED = f"{_DEFORMABLE} model.refine=true model.shared_heads=false"

# AP: the authors' tables. Sums of DETR begin as the names of its files do. Weights that their authors have on Google
# Drive alone are taken from the repositories of transformers, at fixed revisions where a sum is known.
PUBLISHED: dict[str, PublishedCheckpoint] = {
    "detr_r50": PublishedCheckpoint(
        options="model=detr",
        ap=42.0,
        url=f"{_DETR}/detr-r50-e632da11.pth",
        size=166_618_694,
        sha256="e632da11ec76ae67bac2f8579fbed3724e08dead7d200ca13e019b197784eadc",
    ),
    "detr_r50_dc5": PublishedCheckpoint(
        options="model=detr model/backbone=resnet50_dc5",
        ap=43.3,
        url=f"{_DETR}/detr-r50-dc5-f0fb7ef5.pth",
        size=166_618_694,
        sha256="f0fb7ef52a6b0bbd87dce4a4b8569b509f03ad082f60f936dc5b7009940295d3",
    ),
    "detr_r101": PublishedCheckpoint(
        options="model=detr model/backbone=resnet101",
        ap=43.5,
        url=f"{_DETR}/detr-r101-2c7b67e5.pth",
        size=242_846_568,
        sha256="2c7b67e52d2e687cefa3c4a5e701a148664159c96725c62984600d2d9d5c4104",
    ),
    "detr_r101_dc5": PublishedCheckpoint(
        options="model=detr model/backbone=resnet101_dc5",
        ap=44.9,
        url=f"{_DETR}/detr-r101-dc5-a2e86def.pth",
        size=242_846_568,
        sha256="a2e86defc9f49cfca7df75523d8745c6aa15482a5184e8dc62a0a19119c0286e",
    ),
    "detr_r50_panoptic": PublishedCheckpoint(
        options="model=detr model/masks=detr",
        ap=38.8,
        url=f"{_DETR}/detr-r50-panoptic-00ce5173.pth",
        sha256="00ce5173",
    ),
    "detr_r50_dc5_panoptic": PublishedCheckpoint(
        options="model=detr model/backbone=resnet50_dc5 model/masks=detr",
        ap=40.2,
        url=f"{_DETR}/detr-r50-dc5-panoptic-da08f1b1.pth",
        sha256="da08f1b1",
    ),
    "detr_r101_panoptic": PublishedCheckpoint(
        options="model=detr model/backbone=resnet101 model/masks=detr",
        ap=40.1,
        url=f"{_DETR}/detr-r101-panoptic-40021d53.pth",
        sha256="40021d53",
    ),
    "conditional_detr_r50": PublishedCheckpoint(
        options="model=conditional_detr",
        ap=41.0,
        url=f"{_HUB}/microsoft/conditional-detr-resnet-50/resolve/main/model.safetensors",
    ),
    "conditional_detr_r50_dc5": PublishedCheckpoint(
        options="model=conditional_detr model/backbone=resnet50_dc5",
        ap=43.7,
        url=f"{_CONDITIONAL}/ConditionalDETR_r50dc5_epoch50.pth",
    ),
    "conditional_detr_r101": PublishedCheckpoint(
        options="model=conditional_detr model/backbone=resnet101",
        ap=42.8,
        url=f"{_CONDITIONAL}/ConditionalDETR_r101_epoch50.pth",
    ),
    "conditional_detr_r101_dc5": PublishedCheckpoint(
        options="model=conditional_detr model/backbone=resnet101_dc5",
        ap=45.0,
        url=f"{_CONDITIONAL}/ConditionalDETR_r101dc5_epoch50.pth",
    ),
    "dab_detr_r50": PublishedCheckpoint(
        options="model=dab_detr",
        ap=42.2,
        url=f"{_HUB}/IDEA-Research/dab-detr-resnet-50/resolve/main/model.safetensors",
    ),
    "dab_detr_r50_dc5": PublishedCheckpoint(
        options="model=dab_detr model/backbone=resnet50_dc5",
        ap=44.5,
        url=f"{_HUB}/IDEA-Research/dab-detr-resnet-50-dc5/resolve/main/model.safetensors",
    ),
    "deformable_detr_r50_single_scale": PublishedCheckpoint(
        options=_SINGLE_SCALE,
        ap=39.4,
        url=f"{_HUB}/SenseTime/deformable-detr-single-scale/resolve/e880a4ca7bbe47b33d37ed90e2948efbbdad0d44/model.safetensors",
        sha256="82eeb57bbcdd02408afc53d5f5c874e3a7f27b5034194ae2c4475d06fceaa59b",
    ),
    "deformable_detr_r50_single_scale_dc5": PublishedCheckpoint(
        options=f"{_SINGLE_SCALE} model/backbone=resnet50_dc5",
        ap=41.5,
        url=f"{_HUB}/SenseTime/deformable-detr-single-scale-dc5/resolve/c23332913d0ae1a8c98725e308eccba65a5933cc/model.safetensors",
        sha256="e71afa5f5900e2e769275156494195508efcadaab4275b0cd4c80f10369dc090",
    ),
    "deformable_detr_r50": PublishedCheckpoint(
        options=_DEFORMABLE,
        ap=44.5,
        url=f"{_HUB}/SenseTime/deformable-detr/resolve/83ecd26945199939cb82806f988debdb71e6f43e/model.safetensors",
        size=160_769_532,
        sha256="caf1e3e61283c6ce35cd2d9adaa7033cf40997d4dfe434003bcdb9085cc8cf9b",
    ),
    "deformable_detr_r50_refined": PublishedCheckpoint(
        options=_REFINED,
        ap=46.2,
        url=f"{_HUB}/SenseTime/deformable-detr-with-box-refine/resolve/2e9e461623a8fdc296e19666c46c8a4389a3a6fe/model.safetensors",
        sha256="4113700fe8aade398808424b7c5c1304cfbf886adc6450a6ca5d50a702be3373",
    ),
    "deformable_detr_r50_two_stage": PublishedCheckpoint(
        options=f"{_REFINED} model/queries=two_stage model.queries.selection=pure",
        ap=46.9,
        url=f"{_HUB}/SenseTime/deformable-detr-with-box-refine-two-stage/resolve/e74bff70d69f3e825f6cefaf179bfba707f92054/model.safetensors",
        sha256="411bb4238a834d40fff651b1b5b7d6dd80c2dd28be1747eec7b6918674e85de6",
    ),
    "rt_detr_r18": PublishedCheckpoint(
        options="model=rt_detr_r18",
        ap=46.4,
        url=f"{_RT_DETR}/v0.1/rtdetr_r18vd_dec3_6x_coco_from_paddle.pth",
        sha256="3ba8b5c909c9a1c4f21e96d0a7251ab1a485093955ca327d0061fef8d33c66f0",
    ),
    "rt_detr_r34": PublishedCheckpoint(
        options="model=rt_detr_r34",
        ap=48.9,
        url=f"{_RT_DETR}/v0.1/rtdetr_r34vd_dec4_6x_coco_from_paddle.pth",
    ),
    "rt_detr_r50_m": PublishedCheckpoint(
        options="model=rt_detr_r50_m",
        ap=51.3,
        url=f"{_RT_DETR}/v0.1/rtdetr_r50vd_m_6x_coco_from_paddle.pth",
    ),
    "rt_detr_r50": PublishedCheckpoint(
        options="model=rt_detr_r50",
        ap=53.1,
        url=f"{_RT_DETR}/v0.1/rtdetr_r50vd_6x_coco_from_paddle.pth",
    ),
    "rt_detr_r101": PublishedCheckpoint(
        options="model=rt_detr_r101",
        ap=54.3,
        url=f"{_RT_DETR}/v0.1/rtdetr_r101vd_6x_coco_from_paddle.pth",
    ),
    "rt_detr_r18_objects365": PublishedCheckpoint(
        options="model=rt_detr_r18",
        ap=49.0,
        url=f"{_RT_DETR}/v0.1/rtdetr_r18vd_5x_coco_objects365_from_paddle.pth",
    ),
    "rt_detr_r50_objects365": PublishedCheckpoint(
        options="model=rt_detr_r50",
        ap=55.2,
        url=f"{_RT_DETR}/v0.1/rtdetr_r50vd_2x_coco_objects365_from_paddle.pth",
    ),
    "rt_detr_r101_objects365": PublishedCheckpoint(
        options="model=rt_detr_r101",
        ap=56.2,
        url=f"{_RT_DETR}/v0.1/rtdetr_r101vd_2x_coco_objects365_from_paddle.pth",
    ),
    "rt_detrv2_r18": PublishedCheckpoint(
        options="model=rt_detrv2_r18",
        ap=48.1,
        url=f"{_RT_DETR}/v0.2/rtdetrv2_r18vd_120e_coco_rerun_48.1.pth",
    ),
    "rt_detrv2_r34": PublishedCheckpoint(
        options="model=rt_detrv2_r34",
        ap=49.9,
        url=f"{_RT_DETR}/v0.1/rtdetrv2_r34vd_120e_coco_ema.pth",
    ),
    "rt_detrv2_r50_m": PublishedCheckpoint(
        options="model=rt_detrv2_r50_m",
        ap=51.9,
        url=f"{_RT_DETR}/v0.1/rtdetrv2_r50vd_m_7x_coco_ema.pth",
    ),
    "rt_detrv2_r50": PublishedCheckpoint(
        options="model=rt_detrv2_r50",
        ap=53.4,
        url=f"{_RT_DETR}/v0.1/rtdetrv2_r50vd_6x_coco_ema.pth",
    ),
    "rt_detrv2_r101": PublishedCheckpoint(
        options="model=rt_detrv2_r101",
        ap=54.3,
        url=f"{_RT_DETR}/v0.1/rtdetrv2_r101vd_6x_coco_from_paddle.pth",
    ),
    "d_fine_n": PublishedCheckpoint(
        options="model=d_fine_n",
        ap=42.8,
        url=f"{_D_FINE}/dfine_n_coco.pth",
    ),
    "d_fine_s": PublishedCheckpoint(
        options="model=d_fine_s",
        ap=48.5,
        url=f"{_D_FINE}/dfine_s_coco.pth",
    ),
    "d_fine_m": PublishedCheckpoint(
        options="model=d_fine_m",
        ap=52.3,
        url=f"{_D_FINE}/dfine_m_coco.pth",
    ),
    "d_fine_l": PublishedCheckpoint(
        options="model=d_fine_l",
        ap=54.0,
        url=f"{_D_FINE}/dfine_l_coco.pth",
    ),
    "d_fine_x": PublishedCheckpoint(
        options="model=d_fine_x",
        ap=55.8,
        url=f"{_D_FINE}/dfine_x_coco.pth",
    ),
    "d_fine_s_objects365": PublishedCheckpoint(
        options="model=d_fine_s",
        ap=50.7,
        url=f"{_D_FINE}/dfine_s_obj2coco.pth",
    ),
    "d_fine_m_objects365": PublishedCheckpoint(
        options="model=d_fine_m",
        ap=55.1,
        url=f"{_D_FINE}/dfine_m_obj2coco.pth",
    ),
    "d_fine_l_objects365": PublishedCheckpoint(
        options="model=d_fine_l",
        ap=57.3,
        url=f"{_D_FINE}/dfine_l_obj2coco_e25.pth",
    ),
    "d_fine_x_objects365": PublishedCheckpoint(
        options="model=d_fine_x",
        ap=59.3,
        url=f"{_D_FINE}/dfine_x_obj2coco.pth",
    ),
}


def file_name(name: str) -> str:
    """What the file of a published checkpoint is called in torch's cache: as torch.hub calls it."""
    path = PurePosixPath(urlparse(PUBLISHED[name].url).path)
    return f"{name}{path.suffix}" if path.stem == "model" else path.name  # transformers has one name for all
