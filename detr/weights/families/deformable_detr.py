"""Deformable DETR (Zhu et al., ICLR 2021), with refinement and two-stage too: fundamentalvision/Deformable-DETR."""

import torch

from detr.weights.families.naming import AUTHORS, TRANSFORMERS, Family, Rows, State, decoder_layers

AUTHORS_DEFORMABLE: Rows = (
    ("input_proj", "neck.levels"),
    ("query_embed", "queries.position"),
    ("transformer.reference_points", "queries.points"),
    ("transformer.enc_output", "queries.proj"),
    ("transformer.enc_output_norm", "queries.norm"),
    ("transformer.pos_trans", "queries.embed.0"),
    ("transformer.pos_trans_norm", "queries.embed.1"),
    # Numbered there in the order of their definition, here in the order of their use.
    ("transformer.decoder.layers.#.norm1", "decoder.layers.#.norm2"),
    ("transformer.decoder.layers.#.norm2", "decoder.layers.#.norm1"),
    *AUTHORS,
)
_TRANSFORMERS: Rows = (
    ("model.input_proj", "neck.levels"),
    ("model.level_embed", "encoder.level_embed"),
    ("model.reference_points", "queries.points"),
    ("model.enc_output", "queries.proj"),
    ("model.enc_output_norm", "queries.norm"),
    ("model.pos_trans", "queries.embed.0"),
    ("model.pos_trans_norm", "queries.embed.1"),
    *TRANSFORMERS,
)
_SHARED_HEADS: Rows = (
    ("class_embed.#", "heads.0.class_head"),
    ("bbox_embed.#", "heads.0.box_head"),
)
_HEADS: Rows = (
    ("class_embed.#", "heads.#.class_head"),
    ("bbox_embed.#", "heads.#.box_head"),
)
# The copies inside the decoder, which refines boxes and proposes them.
_REFINING: Rows = (("decoder.bbox_embed.#", "heads.#.box_head"),)
_PROPOSING: Rows = (*_REFINING, ("decoder.class_embed.#", "heads.#.class_head"))


def _inside(package: str, rows: Rows) -> Rows:
    return [(f"{package}.{there}", here) for there, here in rows]


def _split_queries(state: State) -> State:
    """Theirs keeps position and content of the queries in one matrix."""
    if "queries.position.weight" not in state:
        return state
    position, content = state["queries.position.weight"].chunk(2, dim=1)
    return state | {"queries.position.weight": position, "queries.content.weight": content}


def _join_queries(state: State) -> State:
    state = dict(state)
    parts = [state.pop(f"queries.{part}.weight") for part in ("position", "content")]
    return state | {"queries.position.weight": torch.cat(parts, dim=1)}


def _take_out_proposal_head(state: State) -> State:
    """The head after those of the decoder's layers is that of the proposals; of its classes only the first counts."""
    state = dict(state)
    last = max(int(name.split(".")[1]) for name in state if name.startswith("heads."))
    for name in [name for name in state if name.startswith(f"heads.{last}.")]:
        tensor, part = state.pop(name), name.removeprefix(f"heads.{last}.")
        state[f"proposal_head.{part}"] = tensor[:1] if part.startswith("class_head.") else tensor
    return state


def _put_back_proposal_head(state: State) -> State:
    """Its classes but the first are zeros, which nothing uses."""
    state, last = dict(state), decoder_layers(state)
    for name in [name for name in state if name.startswith("proposal_head.")]:
        tensor, part = state.pop(name), name.removeprefix("proposal_head.")
        if part.startswith("class_head."):
            unused = torch.zeros_like(state[f"heads.0.{part}"][1:])
            tensor = torch.cat((tensor, unused))
        state[f"heads.{last}.{part}"] = tensor
    return state


DEFORMABLE_DETR = Family(
    name="Deformable DETR",
    options="model=deformable_detr",
    marks=(r"\.sampling_offsets\.",),
    our_marks=(r"\.cross_attn\.sampling_offsets\.", r"^queries\.points\.", r"^queries\.content\."),
    authors=(*_SHARED_HEADS, *AUTHORS_DEFORMABLE),
    transformers=(*_SHARED_HEADS, *_TRANSFORMERS),
    adopt=_split_queries,
    release=_join_queries,
)
REFINED_DEFORMABLE_DETR = Family(
    name="Deformable DETR with refinement",
    options=f"{DEFORMABLE_DETR.options} model.refine=true model.shared_heads=false",
    marks=(*DEFORMABLE_DETR.marks, r"\.decoder\.bbox_embed\."),
    our_marks=(*DEFORMABLE_DETR.our_marks, r"^heads\.1\."),
    authors=(*_HEADS, *_inside("transformer", _REFINING), *AUTHORS_DEFORMABLE),
    transformers=(*_HEADS, *_inside("model", _REFINING), *_TRANSFORMERS),
    adopt=_split_queries,
    release=_join_queries,
)
TWO_STAGE_DEFORMABLE_DETR = Family(
    name="two-stage Deformable DETR",
    options=f"{REFINED_DEFORMABLE_DETR.options} model/queries=two_stage model.queries.selection=pure",
    marks=(*REFINED_DEFORMABLE_DETR.marks, r"\.enc_output\."),
    our_marks=(r"\.cross_attn\.sampling_offsets\.", r"^queries\.embed\.", r"^heads\.1\."),
    authors=(*_HEADS, *_inside("transformer", _PROPOSING), *AUTHORS_DEFORMABLE),
    transformers=(*_HEADS, *_inside("model", _PROPOSING), *_TRANSFORMERS),
    adopt=_take_out_proposal_head,
    release=_put_back_proposal_head,
)
