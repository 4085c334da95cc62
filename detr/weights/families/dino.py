"""DINO (Zhang et al., ICLR 2023): IDEA-Research/DINO."""

from detr.weights.families.deformable_detr import AUTHORS_DEFORMABLE
from detr.weights.families.naming import Family, Rows, State, resnet_of

_AUTHORS: Rows = (
    ("class_embed.#", "heads.0.class_head"),
    ("bbox_embed.#", "heads.0.box_head"),
    ("transformer.decoder.class_embed.#", "heads.0.class_head"),
    ("transformer.decoder.bbox_embed.#", "heads.0.box_head"),
    ("transformer.enc_out_class_embed", "proposal_head.class_head"),
    ("transformer.enc_out_bbox_embed", "proposal_head.box_head"),
    ("transformer.tgt_embed", "queries.content"),
    ("transformer.decoder.ref_point_head", "queries.position.mlp"),
    ("label_enc", "denoising.labels"),
    *AUTHORS_DEFORMABLE,
)


def _variant(state: State) -> str:
    """What its backbone is, and whether it has five maps instead of four."""
    five = "neck.levels.4.0.weight" in state
    return resnet_of(state) + (" model.backbone.features=[4,8,16,32] model.neck.num_levels=5" if five else "")


DINO = Family(
    name="DINO",
    options="model=dino",
    marks=(r"\.enc_out_class_embed\.", r"^label_enc\."),
    our_marks=(r"\.cross_attn\.sampling_offsets\.", r"^queries\.content\.", r"^proposal_head\.", r"^denoising\."),
    authors=_AUTHORS,
    transformers=_AUTHORS,  # which has none
    variant=_variant,
)
