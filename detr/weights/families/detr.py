"""DETR (Carion et al., ECCV 2020): facebookresearch/detr."""

from detr.weights.families.naming import AUTHORS, AUTHORS_ONE_HEAD, TRANSFORMERS, Family

DETR = Family(
    name="DETR",
    options="model=detr",
    marks=(),
    our_marks=(r"^queries\.position\.weight", r"\.cross_attn\.in_proj\."),
    authors=(
        *AUTHORS_ONE_HEAD,
        ("query_embed", "queries.position"),
        ("multihead_attn", "cross_attn"),
        *AUTHORS,
    ),
    transformers=TRANSFORMERS,
    background=True,
)
