"""D-FINE (Peng et al., ICLR 2025): Peterande/D-FINE.

DEIM (Huang et al., CVPR 2025) has the same tensors; SiLU in place of ReLU leaves no trace in them.
"""

import torch

from detr.weights.families.naming import Family, Rows, State, decoder_layers
from detr.weights.families.rt_detr import (
    AUTHORS_REAL_TIME,
    SIZE,
    TRANSFORMERS_REAL_TIME,
    count_maps,
    proposal_anchors,
)

_STEMS = {16: "s", 32: "m", 48: "l", 64: "x"}  # by channels that the stem of HGNetV2 gives
_POINTS = {2: (6, 6), 3: (3, 6, 3)}  # of cross-attention, by the number of maps
_STRIDES = (8, 16, 32)

_CONVOLUTIONS = (("main", "conv1"), ("skip", "conv2"))


def _fusions(expand: str, csp: tuple[str, str], convs: tuple[str, str], out: str) -> Rows:
    """Rows for the parts of ELANLayer, by their names there: the two CSP layers and the convolutions after them."""
    return [
        (f"encoder.{there}.#.{part}", f"encoder.{here}.#.{ours}")
        for there, here in (("fpn_blocks", "top_down"), ("pan_blocks", "bottom_up"))
        for part, ours in (
            (expand, "expand"),
            *((f"{block}.{conv}", f"csp.{i}.{name}") for i, block in enumerate(csp) for name, conv in _CONVOLUTIONS),
            *((block, f"csp.{i}") for i, block in enumerate(csp)),
            *((conv, f"convs.{i}") for i, conv in enumerate(convs)),
            (out, "out"),
        )
    ]


_BOTTLENECKS: Rows = (("bottlenecks.#.conv1", "blocks.#.square"), ("bottlenecks.#.conv2", "blocks.#.point"))
_AUTHORS: Rows = (
    ("backbone.stages.#", "backbone.net.stages_#"),
    ("backbone", "backbone.net"),
    *_fusions("cv1", ("cv2.0", "cv3.0"), ("cv2.1", "cv3.1"), "cv4"),
    *_BOTTLENECKS,
    ("encoder.lateral_convs", "encoder.laterals"),
    ("encoder.downsample_convs.#.0.cv1", "encoder.downs.#.mix"),
    ("encoder.downsample_convs.#.0.cv2", "encoder.downs.#.halve"),
    ("decoder.decoder.layers.#.gateway.gate", "decoder.layers.#.gate.weigh"),
    ("decoder.decoder.layers.#.gateway.norm", "decoder.layers.#.gate.norm"),
    ("decoder.decoder.lqe_layers.#.reg_conf", "heads.#.quality"),
    ("decoder.up", "decoder.up"),
    ("decoder.decoder.up", "decoder.up"),
    ("decoder.reg_scale", "decoder.reg_scale"),
    ("decoder.decoder.reg_scale", "decoder.reg_scale"),
    ("decoder.pre_bbox_head", "decoder.start_head"),
    *AUTHORS_REAL_TIME,
)
_TRANSFORMERS: Rows = (
    ("model.backbone.model.embedder", "backbone.net.stem"),
    ("model.backbone.model.encoder.stages.#", "backbone.net.stages_#"),
    ("convolution", "conv"),
    ("normalization", "bn"),
    *(
        (f"model.{there}", here)
        for there, here in _fusions("conv1", ("csp_rep1", "csp_rep2"), ("conv2", "conv3"), "conv4")
    ),
    *_BOTTLENECKS,
    ("model.encoder.lateral_convs", "encoder.laterals"),
    ("model.encoder.downsample_convs.#.conv1", "encoder.downs.#.mix"),
    ("model.encoder.downsample_convs.#.conv2", "encoder.downs.#.halve"),
    ("model.decoder.layers.#.gateway.gate", "decoder.layers.#.gate.weigh"),
    ("model.decoder.layers.#.gateway.norm", "decoder.layers.#.gate.norm"),
    ("mlp.layers.0", "ffn.linear1"),
    ("mlp.layers.1", "ffn.linear2"),
    ("model.decoder.lqe_layers.#.reg_conf", "heads.#.quality"),
    ("model.decoder.pre_bbox_head", "decoder.start_head"),
    *TRANSFORMERS_REAL_TIME,
)


def _name(state: State) -> str:
    """Of the configuration, after model=d_fine_."""
    if "neck.levels.2.0.weight" not in state:
        return "n"
    return _STEMS.get(len(state.get("backbone.net.stem.stem4.conv.weight", ())), "l")


def _adopt(state: State) -> State:
    """Their images are not normalized."""
    return state | {"backbone.mean": torch.zeros(3), "backbone.std": torch.ones(3)}


def _release(state: State) -> State:
    state = {name: tensor for name, tensor in state.items() if name not in ("backbone.mean", "backbone.std")}
    points = _POINTS[count_maps(state, published=_POINTS)]
    scale = torch.cat([torch.full((count,), 1 / count) for count in points])
    for layer in range(decoder_layers(state)):
        state[f"decoder.layers.{layer}.cross_attn.num_points_scale"] = scale
    return state | proposal_anchors(_STRIDES[-len(points) :])


D_FINE = Family(
    name="D-FINE",
    options="model=d_fine_",
    marks=(r"pre_bbox_head\.", r"lqe_layers\."),
    our_marks=(r"^decoder\.start_head\.", r"^encoder\.top_down\.\d+\.csp\."),
    authors=_AUTHORS,
    transformers=_TRANSFORMERS,
    adopt=_adopt,
    release=_release,
    variant=_name,
    square=SIZE,
    computed=(r"^decoder\.(anchors|valid_mask)$", r"\.num_points_scale$"),
)
