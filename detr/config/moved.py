"""Options that have other names now."""

_OF_BOTH = ("d_model", "nhead", "dim_feedforward", "dropout", "activation", "norm_first")

# Old name: what to set instead. A name that ends with a separator stands for all that begin with it.
MOVED = {
    **{
        f"model.transformer.{name}": f"model.encoder.{name}, or model.decoder.{name} for the decoder alone"
        for name in _OF_BOTH
    },
    "model.transformer.num_encoder_layers": "model.encoder.num_layers",
    "model.transformer.num_decoder_layers": "model.decoder.num_layers",
    "model.transformer.encoder_attention": "model/encoder=NAME, such as model/encoder=deformable",
    "model.transformer.cross_attention": "model/decoder=NAME, such as model/decoder=deformable",
    "model.transformer.num_points": "model.encoder.num_points and model.decoder.num_points",
    "model.transformer.num_levels": "model.neck.num_levels, which the encoder and the decoder follow",
    "model.transformer.modulate": "model.encoder.scale_positions and model.decoder.modulate_sizes",
    "model.transformer.decoder_norm": "model.decoder.final_norm",
    "model.transformer": "model.encoder and model.decoder",
    "model/position": "model/encoder/position",
    "model/position/": "model/encoder/position=",
    "model.position.centre": "model.encoder.position.center",
    "model.position.": "model.encoder.position.",
    "model.position": "model.encoder.position",
    "model.attention.dual.block.favours": "model.attention.dual.block.favors",
    "criterion.class_weight": "criterion.classification.weight",
    "criterion.box_weight": "criterion.terms.bbox.weight",
    "criterion.giou_weight": "criterion.terms.giou.weight",
}


def moved(name: str) -> str | None:
    """The message about an option or group that was called `name` once; None for any other."""
    if name in MOVED:
        return f"{name} has moved: set {MOVED[name]}."
    for old, new in MOVED.items():
        if old.endswith((".", "/")) and name.startswith(old):
            return f"{name} has moved: set {new}{name.removeprefix(old)}."
    return None
