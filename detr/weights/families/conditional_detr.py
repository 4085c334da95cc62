"""Conditional DETR (Meng et al., ICCV 2021): Atten4Vis/ConditionalDETR."""

from detr.weights.families.naming import AUTHORS, AUTHORS_CONDITIONAL, AUTHORS_ONE_HEAD, TRANSFORMERS, Family

CONDITIONAL_DETR = Family(
    name="Conditional DETR",
    options="model=conditional_detr",
    marks=(r"\.(ca_q|encoder_attn\.q_)content_proj\.",),
    our_marks=(r"^queries\.points\.", r"\.cross_attn\.query_spatial\."),
    authors=(
        *AUTHORS_ONE_HEAD,
        ("query_embed", "queries.position"),
        ("transformer.decoder.ref_point_head", "queries.points"),
        *AUTHORS_CONDITIONAL,
        *AUTHORS,
    ),
    transformers=(
        ("model.decoder.layers.#.self_attn.v_proj", "decoder.layers.#.self_attn.value"),
        ("model.decoder.layers.#.encoder_attn.v_proj", "decoder.layers.#.cross_attn.value"),
        ("q_content_proj", "query_content"),
        ("q_pos_proj", "query_position"),
        ("k_content_proj", "key_content"),
        ("k_pos_proj", "key_position"),
        ("q_pos_sine_proj", "query_spatial"),
        ("model.decoder.query_scale", "decoder.spatial.scale"),
        ("model.decoder.ref_point_head", "queries.points"),
        *AUTHORS_CONDITIONAL,  # names in files of some versions
        *TRANSFORMERS,
    ),
)
