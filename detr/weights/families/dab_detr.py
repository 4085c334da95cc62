"""DAB-DETR (Liu et al., ICLR 2022): IDEA-Research/DAB-DETR. DN-DETR (Li et al., CVPR 2022): IDEA-Research/DN-DETR."""

import torch

from detr.weights.families.naming import AUTHORS, AUTHORS_CONDITIONAL, AUTHORS_ONE_HEAD, TRANSFORMERS, Family, State


def _take_out_content(state: State) -> State:
    """The last of their labels, of no object, is the content of the matched queries."""
    if "denoising.labels.weight" not in state:
        return state
    labels = state["denoising.labels.weight"]
    return state | {"denoising.labels.weight": labels[:-1], "queries.content.weight": labels[-1:]}


def _put_back_content(state: State) -> State:
    state = dict(state)
    content = state.pop("queries.content.weight")
    return state | {"denoising.labels.weight": torch.cat((state["denoising.labels.weight"], content))}


DAB_DETR = Family(
    name="DAB-DETR",
    options="model=dab_detr",
    marks=("refpoint_embed",),
    our_marks=(r"^queries\.anchors\.", r"\.cross_attn\.query_spatial\."),
    authors=(
        *AUTHORS_ONE_HEAD,
        ("transformer.decoder.bbox_embed", "heads.0.box_head"),
        ("refpoint_embed", "queries.anchors"),
        ("transformer.decoder.ref_point_head", "queries.position.mlp"),
        ("transformer.decoder.ref_anchor_head", "decoder.spatial.size"),
        ("transformer.encoder.query_scale", "encoder.position_scale"),
        ("activation", "ffn.activation"),
        *AUTHORS_CONDITIONAL,
        *AUTHORS,
    ),
    transformers=(
        *(
            (f"{kind}_attn_{part}", new)
            for kind in ("self", "cross")
            for part, new in (
                ("query_content_proj", "query_content"),
                ("query_pos_proj", "query_position"),
                ("key_content_proj", "key_content"),
                ("key_pos_proj", "key_position"),
                ("value_proj", "value"),
                ("query_pos_sine_proj", "query_spatial"),
            )
        ),
        ("self_attn.self_attn.output_proj", "self_attn.out_proj"),
        ("cross_attn.cross_attn.output_proj", "cross_attn.out_proj"),
        ("self_attn.self_attn_layer_norm", "norm1"),
        ("cross_attn.cross_attn_layer_norm", "norm2"),
        ("mlp.final_layer_norm", "norm3"),
        ("mlp.activation_fn", "ffn.activation"),
        ("activation_fn", "ffn.activation"),
        ("model.query_refpoint_embeddings", "queries.anchors"),
        ("model.encoder.query_scale", "encoder.position_scale"),
        ("model.decoder.query_scale", "decoder.spatial.scale"),
        ("model.decoder.ref_point_head", "queries.position.mlp"),
        ("model.decoder.ref_anchor_head", "decoder.spatial.size"),
        ("class_embed", "heads.0.class_head"),
        ("model.decoder.bbox_embed", "heads.0.box_head"),
        *TRANSFORMERS,
    ),
)
DN_DETR = Family(
    name="DN-DETR",
    options="model=dn_detr",
    marks=(*DAB_DETR.marks, r"\.ca_qcontent_proj\.", r"^label_enc\."),
    our_marks=(*DAB_DETR.our_marks, r"^queries\.content\.", r"^denoising\."),
    authors=(("label_enc", "denoising.labels"), *DAB_DETR.authors),
    transformers=DAB_DETR.transformers,  # which has none
    adopt=_take_out_content,
    release=_put_back_content,
)
