"""Checkpoints of version 1, of when one `Transformer` was encoder and decoder, brought to today's names.

Their training cannot go on: the order of the optimizer's parameters was another one.
"""

from typing import Any

from detr.errors import UserError

FORMAT = "detr-checkpoint-1"

_DETR = "detr.models.detr.DETR"
_TRANSFORMER = "detr.models.transformer.Transformer"
# Starts of tensors' names, then and today. The first that fits holds.
_TENSORS = (
    ("transformer.level_embed", "encoder.level_embed"),
    ("transformer.encoder.", "encoder."),
    ("transformer.decoder.", "decoder."),
    ("position.", "encoder.position."),
)
_ATTENTION, _LAYERS = "detr.models.attention", "detr.models.layers"
# Classes then and today, and their options that have another name.
_CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "detr.models.backbone.Backbone": ("detr.models.backbones.resnet.ResNet", {}),
    "detr.models.position.SinePosition": (f"{_LAYERS}.positions.SinePosition", {"centre": "center"}),
    "detr.models.position.LearnedPosition": (f"{_LAYERS}.positions.LearnedPosition", {}),
    "detr.models.denoising.Denoising": ("detr.models.denoising.DenoisingQueries", {}),
    f"{_ATTENTION}.CrissCross": (f"{_ATTENTION}.CrissCrossAttention", {}),
    f"{_ATTENTION}.Dual": (f"{_ATTENTION}.DualAttention", {"favours": "favors"}),
    f"{_ATTENTION}.Hard": (f"{_ATTENTION}.HardAttention", {}),
    f"{_ATTENTION}.Residual": (f"{_ATTENTION}.ResidualAttention", {}),
    f"{_ATTENTION}.SelfAttention": (f"{_ATTENTION}.MultiHeadSelfAttention", {}),
}
_ENCODERS = {
    "standard": "detr.models.encoders.transformer.TransformerEncoder",
    "deformable": "detr.models.encoders.deformable.DeformableEncoder",
}
_DECODERS = {
    "standard": "detr.models.decoders.transformer.TransformerDecoder",
    "conditional": "detr.models.decoders.conditional.ConditionalDecoder",
    "deformable": "detr.models.decoders.deformable.DeformableDecoder",
}
# Options of the transformer, with the values that they had where a configuration lacks them.
_OF_BOTH = {
    "d_model": 256,
    "nhead": 8,
    "dim_feedforward": 2048,
    "dropout": 0.1,
    "activation": "relu",
    "norm_first": False,
}
_FURTHER = {
    "num_encoder_layers": 6,
    "num_decoder_layers": 6,
    "encoder_attention": "standard",
    "cross_attention": "standard",
    "num_levels": 1,
    "num_points": 4,
    "modulate": False,
    "decoder_norm": True,
}

Node = dict[str, Any]


def upgraded(content: Node, path: object) -> Node:
    """The content of a version-1 checkpoint as a checkpoint of today has it, without the state of its training.

    A model of classes of the user's own stays as it is. Raises UserError for one that cannot be built any more.
    """
    content = {**content, "training": None}
    model = content["config"]["model"]
    if model.get("_target_") != _DETR:
        return content
    state = {new_name(name): tensor for name, tensor in content["model"].items()}
    return content | {"model": state, "config": {**content["config"], "model": upgraded_model(model, path)}}


def is_of_version1(model: Any) -> bool:
    """Whether a `model` configuration is one of version 1: a detector with one transformer and positions beside it."""
    return (
        isinstance(model, dict) and model.get("_target_") == _DETR and not {"transformer", "position"}.isdisjoint(model)
    )


def upgraded_model(model: Node, path: object) -> Node:
    """Today's `model` configuration of one of version 1."""
    model = _renamed(model)
    options, position = {**_OF_BOTH, **_FURTHER, **model.pop("transformer")}, model.pop("position")
    if options.pop("_target_", _TRANSFORMER) != _TRANSFORMER:
        raise UserError(
            f"{path} is of version 1 with a transformer of your own, which has no place any more. Write "
            "it as an encoder and a decoder, and train the model anew."
        )
    attention = options["encoder_attention"], options["cross_attention"]
    if attention == ("standard", "deformable") and options["num_levels"] == 1:
        raise UserError(
            f"{path} is of version 1 with a standard encoder and a deformable decoder for one map, whose "
            "embedding of that map is no part of the model any more. Use it with version 1, or train the model anew."
        )
    return model | {"encoder": _encoder(options, position), "decoder": _decoder(options)}


def new_name(name: str) -> str:
    """Today's name of a tensor of version 1."""
    return next((new + name.removeprefix(old) for old, new in _TENSORS if name.startswith(old)), name)


def _renamed(node: Any) -> Any:
    """A node of the configuration with today's names of classes and of their options."""
    if isinstance(node, list):
        return [_renamed(part) for part in node]
    if not isinstance(node, dict):
        return node
    target, options = _CLASSES.get(node.get("_target_", ""), (node.get("_target_"), {}))
    renamed = {options.get(key, key): _renamed(value) for key, value in node.items()}
    return renamed | {"_target_": target} if "_target_" in node else renamed


def _encoder(options: Node, position: Any) -> Node:
    attention = options["encoder_attention"]
    further = {"scale_positions": options["modulate"]}
    if attention == "deformable":
        further = {"num_points": options["num_points"]}
    return {
        "_target_": _ENCODERS[attention],
        "position": position,
        **{name: options[name] for name in _OF_BOTH},
        "num_layers": options["num_encoder_layers"],
        "num_levels": options["num_levels"],
        **further,
    }


def _decoder(options: Node) -> Node:
    attention = options["cross_attention"]
    further = {
        "standard": {},
        "conditional": {"modulate_sizes": options["modulate"]},
        "deformable": {name: options[name] for name in ("num_levels", "num_points")},
    }
    return {
        "_target_": _DECODERS[attention],
        **{name: options[name] for name in _OF_BOTH},
        "num_layers": options["num_decoder_layers"],
        "final_norm": options["decoder_norm"],
        **further[attention],
    }
