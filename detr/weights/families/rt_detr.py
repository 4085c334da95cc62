"""RT-DETR (Zhao et al., CVPR 2024) and RT-DETRv2 (Lv et al., 2024): lyuwenyu/RT-DETR.

DEIM (Huang et al., CVPR 2025) on RT-DETRv2: ShihuaHuang95/DEIM.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from detr.errors import UserError
from detr.models.backbones.resnet_vd import PUBLISHED
from detr.weights.families.naming import AUTHORS, TRANSFORMERS, Family, Rows, State, decoder_layers, resnet_name

SIZE = 640  # of the images of all published models
_STRIDES, _HEADS = (8, 16, 32), 8

_FUSIONS: Rows = [
    (f"{there}.#{of_block}", f"{here}.#{block}")
    for there, here in (("encoder.fpn_blocks", "encoder.top_down"), ("encoder.pan_blocks", "encoder.bottom_up"))
    for of_block, block in ((".conv1", ".main"), (".conv2", ".skip"), (".conv3", ".out"), ("", ""))
]
_ENCODER: Rows = (
    *_FUSIONS,
    ("encoder.lateral_convs", "encoder.laterals"),
    ("encoder.downsample_convs", "encoder.downs"),
    ("bottlenecks.#.conv1", "blocks.#.square"),
    ("bottlenecks.#.conv2", "blocks.#.point"),
)
# What all real-time models, D-FINE too, have in the files of their authors, and what those since RT-DETRv2 have.
_AUTHORS_REAL_TIME: Rows = (
    ("encoder.encoder.0.layers", "encoder.layers"),
    ("decoder.input_proj", "encoder.proj"),
    ("decoder.decoder.layers", "decoder.layers"),
    ("decoder.denoising_class_embed", "denoising.labels"),
    ("decoder.query_pos_head", "queries.position.mlp"),
    ("decoder.enc_score_head", "proposal_head.class_head"),
    ("decoder.enc_bbox_head", "proposal_head.box_head"),
    ("decoder.dec_score_head.#", "heads.#.class_head"),
    ("decoder.dec_bbox_head.#", "heads.#.box_head"),
    *(row for row in AUTHORS if row[0].startswith(("linear", "in_proj"))),
)
AUTHORS_REAL_TIME: Rows = (
    ("encoder.input_proj.#.conv", "neck.levels.#.0"),
    ("encoder.input_proj.#.norm", "neck.levels.#.1"),
    ("decoder.enc_output.proj", "queries.proj"),
    ("decoder.enc_output.norm", "queries.norm"),
    *_AUTHORS_REAL_TIME,
)
_AUTHORS: Rows = (
    ("backbone", "backbone.body"),
    *PUBLISHED,
    ("encoder.input_proj", "neck.levels"),
    *_ENCODER,
    ("decoder.enc_output.0", "queries.proj"),
    ("decoder.enc_output.1", "queries.norm"),
    *_AUTHORS_REAL_TIME,
)
_AUTHORS_2: Rows = (("backbone", "backbone.body"), *PUBLISHED, *_ENCODER, *AUTHORS_REAL_TIME)
TRANSFORMERS_REAL_TIME: Rows = (
    ("model.encoder_input_proj", "neck.levels"),
    ("model.encoder.aifi.0.layers.#.final_layer_norm", "encoder.layers.#.norm2"),
    ("model.encoder.aifi.0.layers", "encoder.layers"),
    *((f"model.decoder_input_proj.#.{i}", f"encoder.proj.#.{part}") for i, part in enumerate(("conv", "norm"))),
    ("model.denoising_class_embed", "denoising.labels"),
    ("model.decoder.query_pos_head", "queries.position.mlp"),
    ("model.enc_output.0", "queries.proj"),
    ("model.enc_output.1", "queries.norm"),
    ("model.enc_score_head", "proposal_head.class_head"),
    ("model.enc_bbox_head", "proposal_head.box_head"),
    *(
        (f"{owner}{there}.#", f"heads.#.{here}_head")
        for owner in ("model.decoder.", "")
        for there, here in (("class_embed", "class"), ("bbox_embed", "box"))
    ),
    *TRANSFORMERS,
)
_TRANSFORMERS: Rows = (
    *((f"embedder.embedder.{i}.convolution", f"conv1.{3 * i}") for i in range(3)),
    *((f"embedder.embedder.{i}.normalization", f"conv1.{3 * i + 1}") for i in range(2)),
    ("embedder.embedder.2.normalization", "bn1"),
    ("shortcut.convolution", "downsample.1"),
    ("shortcut.normalization", "downsample.2"),
    ("shortcut.1.convolution", "downsample.1"),
    ("shortcut.1.normalization", "downsample.2"),
    ("model.encoder.encoder.0.layers.#.final_layer_norm", "encoder.layers.#.norm2"),  # in files of some versions
    ("model.encoder.encoder.0.layers", "encoder.layers"),
    *((f"model.{there}", here) for there, here in _ENCODER if there.startswith("encoder")),
    *_ENCODER,
    *TRANSFORMERS_REAL_TIME,
)


def _name(state: State) -> str:
    """Of the configuration, after model=rt_detr_, rt_detrv2_ or deim_rt_detrv2_."""
    name = resnet_name(state).replace("resnet", "r")
    fusion = state.get("encoder.top_down.0.main.conv.weight")
    halved = fusion is not None and len(fusion) * 4 == fusion.shape[1]
    return "r50_m" if name == "r50" and halved else name


def proposal_anchors(strides: Sequence[int]) -> State:
    """What theirs keeps of what it computes for images of 640 x 640, of maps with these strides."""
    anchors = []
    for level, stride in enumerate(strides):
        cells = SIZE // stride
        y, x = torch.meshgrid(*[(torch.arange(cells) + 0.5) / cells] * 2, indexing="ij")
        side = torch.full_like(x, 0.05 * 2**level)
        anchors.append(torch.stack((x, y, side, side), dim=-1).flatten(0, 1))
    boxes = torch.cat(anchors)[None]
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    return {"decoder.anchors": (boxes / (1 - boxes)).log().where(valid, torch.inf), "decoder.valid_mask": valid}


def count_maps(state: State, published: Collection[int]) -> int:
    """How many feature maps a model has. Raises UserError where no published one has as many."""
    count = sum(name.startswith("neck.levels.") and name.endswith(".0.weight") for name in state)
    if count not in published:
        raise UserError(
            f"The published models of this family have {' or '.join(map(str, published))} feature maps, this one has "
            f"{count}, so its weights have no published names. Use the checkpoint as it is."
        )
    return count


def _with_constants(state: State) -> State:
    count_maps(state, published=[len(_STRIDES)])
    state = state | proposal_anchors(_STRIDES)
    for layer in range(decoder_layers(state)):
        attention = f"decoder.layers.{layer}.cross_attn"
        points = len(state[f"{attention}.attention_weights.weight"]) // _HEADS
        state[f"{attention}.num_points_scale"] = torch.full((points,), len(_STRIDES) / points)
    return state


RT_DETR = Family(
    name="RT-DETR",
    options="model=rt_detr_",
    marks=(r"query_pos_head\.", r"_attn\.value_proj\."),
    our_marks=(r"^queries\.position\.mlp\.", r"^encoder\.top_down\.", r"\.cross_attn\.value_proj\."),
    authors=_AUTHORS,
    transformers=_TRANSFORMERS,
    variant=_name,
    square=SIZE,
)
RT_DETRV2 = Family(
    name="RT-DETRv2",
    options="model=rt_detrv2_",
    marks=(*RT_DETR.marks, r"n(um)?_points_scale$"),
    our_marks=(r"(?!)",),  # the tensors are those of RT-DETR, whose names they get unless this family is asked for
    authors=_AUTHORS_2,
    transformers=_TRANSFORMERS,
    release=_with_constants,
    variant=_name,
    square=SIZE,
    computed=(r"^decoder\.(anchors|valid_mask)$", r"\.n(um)?_points_scale$"),
)
# A further layer embeds boxes; SiLU in place of ReLU leaves no trace.
DEIM_RT_DETRV2 = replace(
    RT_DETRV2,
    name="DEIM on RT-DETRv2",
    options="model=deim_rt_detrv2_",
    marks=(*RT_DETRV2.marks, r"query_pos_head\.layers\.2\."),
    our_marks=(*RT_DETR.our_marks, r"^queries\.position\.mlp\.layers\.2\."),
)
