"""DETR (Carion et al., ECCV 2020), and DETR with masks: facebookresearch/detr."""

from detr.renaming import Rows
from detr.weights.families.naming import AUTHORS, AUTHORS_ONE_HEAD, TRANSFORMERS, Family, State

_INSIDE = "detr."  # before the names of the detector, where it has masks
_MASKS = "mask_head."

_AUTHORS: Rows = (
    *AUTHORS_ONE_HEAD,
    ("query_embed", "queries.position"),
    ("multihead_attn", "cross_attn"),
    *AUTHORS,
)
# The head of masks; files of transformers have these names too.
_MASK_HEAD: Rows = (
    ("bbox_attention.q_linear", f"{_MASKS}query_proj"),
    ("bbox_attention.k_linear", f"{_MASKS}key_proj"),
    ("mask_head.lay1", f"{_MASKS}first"),
    ("mask_head.gn1", f"{_MASKS}first_norm"),
    *(
        row
        for number in range(4)
        for row in (
            (f"mask_head.lay{number + 2}", f"{_MASKS}convs.{number}"),
            (f"mask_head.gn{number + 2}", f"{_MASKS}norms.{number}"),
        )
    ),
    *((f"mask_head.adapter{number + 1}", f"{_MASKS}adapters.{number}") for number in range(3)),
    ("mask_head.out_lay", f"{_MASKS}last"),
)
# Models of transformers have others.
_MASK_HEAD_OF_MODELS: Rows = (
    ("bbox_attention.q_proj", f"{_MASKS}query_proj"),
    ("bbox_attention.k_proj", f"{_MASKS}key_proj"),
    ("mask_head.conv1.conv", f"{_MASKS}first"),
    ("mask_head.conv1.norm", f"{_MASKS}first_norm"),
    ("mask_head.conv2.conv", f"{_MASKS}convs.0"),
    ("mask_head.conv2.norm", f"{_MASKS}norms.0"),
    *(
        row
        for number in range(3)
        for row in (
            (f"mask_head.fpn_stages.{number}.fpn_adapter", f"{_MASKS}adapters.{number}"),
            (f"mask_head.fpn_stages.{number}.refine.conv", f"{_MASKS}convs.{number + 1}"),
            (f"mask_head.fpn_stages.{number}.refine.norm", f"{_MASKS}norms.{number + 1}"),
        )
    ),
    ("mask_head.output_conv", f"{_MASKS}last"),
)


def _taken_out(state: State) -> State:
    return {name.removeprefix(_INSIDE): tensor for name, tensor in state.items()}


def _put_inside(state: State) -> State:
    return {name if name.startswith(_MASKS) else f"{_INSIDE}{name}": tensor for name, tensor in state.items()}


DETR = Family(
    name="DETR",
    options="model=detr",
    marks=(),
    our_marks=(r"^queries\.position\.weight", r"\.cross_attn\.in_proj\."),
    authors=_AUTHORS,
    transformers=TRANSFORMERS,
    background=True,
)

DETR_WITH_MASKS = Family(
    name="DETR with masks",
    options="model=detr model/masks=detr",
    marks=(r"^mask_head\.",),
    our_marks=(r"^mask_head\.query_proj", *DETR.our_marks),
    authors=(*_MASK_HEAD, *_AUTHORS),
    transformers=(*_MASK_HEAD, *_MASK_HEAD_OF_MODELS, *TRANSFORMERS),
    adopt=_taken_out,
    release=_put_inside,
    background=True,
)
