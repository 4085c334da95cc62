"""How tensors are named elsewhere and here: what the files of all families share."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detr.renaming import Renaming, Rows

State = dict[str, Tensor]

# By the number of residual blocks in layer3, and whether these are bottlenecks; ResNet-50 needs no option.
_RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101"}


def reversed_names(rows: Rows, layers: int) -> list[Renaming]:
    """From our names back to theirs. All but the first renaming give the names of copies.

    layers: of the decoder; theirs has as many copies of what is numbered there and not here.
    """
    back = list(_reversed(rows, layers))
    known = [here for here, _ in back]
    copies = [row for index, row in enumerate(back) if row[0] in known[:index]]
    return [Renaming(back), *(Renaming([copy, *back]) for copy in copies)]


def _reversed(rows: Rows, layers: int) -> Iterator[tuple[str, str]]:
    for there, here in rows:
        numbers = range(layers) if "#" in there and "#" not in here else [None]
        yield from ((here, there if number is None else there.replace("#", str(number))) for number in numbers)


def _unchanged(state: State) -> State:
    return state


def resnet_name(state: State) -> str:
    """Which ResNet a backbone is, by the blocks of its third stage; resnet50 where it is none."""
    blocks = sum(bool(re.fullmatch(r"backbone\.body\.layer3\.\d+\.conv1\.weight", name)) for name in state)
    return _RESNETS.get((blocks, "backbone.body.layer3.0.conv3.weight" in state), "resnet50")


def resnet_of(state: State) -> str:
    """The option of a backbone that is another ResNet than ResNet-50."""
    name = resnet_name(state)
    return "" if name == "resnet50" else f" model/backbone={name}"


@dataclass(frozen=True)
class Family:
    """A kind of model whose weights are known, by the names that its authors and transformers give its tensors.

    options: what sets it on the command line.
    marks: what names of its tensors have there, all of them, as expressions. our_marks: the same here.
    authors, transformers: rows of names in their files, and ours. The most special come first. Where several have one
        name here, the later ones are copies.
    adopt: what renaming alone does not do, on a state under our names. release: the same back.
    variant: what options of a model depend on its sizes, from a state under our names; they follow `options`.
    computed: what tensors of theirs follow from the options alone, as expressions of our names.
    background: its head has an output for no object.
    square: sides in pixels that its images are resized to; None: short sides of 800, long ones of at most 1333.
    """

    name: str
    options: str
    marks: tuple[str, ...]
    our_marks: tuple[str, ...]
    authors: Rows
    transformers: Rows
    adopt: Callable[[State], State] = _unchanged
    release: Callable[[State], State] = _unchanged
    background: bool = False
    variant: Callable[[State], str] = resnet_of
    computed: tuple[str, ...] = ()
    square: int | None = None


def has_marks(names: Iterable[str], marks: Iterable[str]) -> bool:
    text = "\n".join(names)
    return all(re.search(mark, text, re.M) for mark in marks)


def pack_attention(state: State) -> None:
    """Put separate projections of queries, keys and values into one matrix, in place."""
    for name in [name for name in state if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in state for part in parts):
            state[name.replace(".q_proj.", ".in_proj.")] = torch.cat([state.pop(part) for part in parts])


def decoder_layers(state: Mapping[str, Tensor]) -> int:
    """Of a state under our names."""
    numbers = [int(found[1]) for name in state if (found := re.match(r"decoder\.layers\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


AUTHORS: Rows = (
    ("backbone.0.body", "backbone.body"),
    ("backbone.1", "encoder.position"),
    ("linear1", "ffn.linear1"),
    ("linear2", "ffn.linear2"),
    ("in_proj_weight", "in_proj.weight"),
    ("in_proj_bias", "in_proj.bias"),
    ("transformer.level_embed", "encoder.level_embed"),
    ("transformer.encoder", "encoder"),
    ("transformer.decoder", "decoder"),
)
AUTHORS_ONE_HEAD: Rows = (
    ("input_proj", "neck.levels.0.0"),
    ("class_embed", "heads.0.class_head"),
    ("bbox_embed", "heads.0.box_head"),
)
TRANSFORMERS: Rows = (
    ("model.backbone.conv_encoder.model._backbone", "backbone.body"),
    ("model.backbone.conv_encoder.model", "backbone.body"),
    ("model.backbone.model", "backbone.body"),
    ("embedder.embedder.convolution", "conv1"),
    ("embedder.embedder.normalization", "bn1"),
    *((f"encoder.stages.{number}.layers", f"layer{number + 1}") for number in range(4)),
    *((f"layer.{number}.convolution", f"conv{number + 1}") for number in range(3)),
    *((f"layer.{number}.normalization", f"bn{number + 1}") for number in range(3)),
    ("shortcut.convolution", "downsample.0"),
    ("shortcut.normalization", "downsample.1"),
    ("model.backbone.position_embedding.row_embeddings", "encoder.position.row_embed"),
    ("model.backbone.position_embedding.column_embeddings", "encoder.position.col_embed"),
    ("model.position_embedding.row_embeddings", "encoder.position.row_embed"),
    ("model.position_embedding.column_embeddings", "encoder.position.col_embed"),
    ("model.input_projection", "neck.levels.0.0"),
    ("model.query_position_embeddings", "queries.position"),
    ("model.decoder.layernorm", "decoder.norm"),
    ("model.encoder.layers.#.final_layer_norm", "encoder.layers.#.norm2"),
    ("model.encoder", "encoder"),
    ("model.decoder", "decoder"),
    ("self_attn_layer_norm", "norm1"),
    ("encoder_attn_layer_norm", "norm2"),
    ("final_layer_norm", "norm3"),
    ("encoder_attn", "cross_attn"),
    ("o_proj", "out_proj"),
    ("mlp.fc1", "ffn.linear1"),
    ("mlp.fc2", "ffn.linear2"),
    ("fc1", "ffn.linear1"),
    ("fc2", "ffn.linear2"),
    ("class_labels_classifier", "heads.0.class_head"),
    ("bbox_predictor", "heads.0.box_head"),
)
# The attention of Conditional DETR's decoder, which DAB-DETR has too.
AUTHORS_CONDITIONAL: Rows = (
    *(
        (f"{there}_{part}", f"{here}.{new}")
        for there, here in (("sa", "self_attn"), ("ca", "cross_attn"))
        for part, new in (
            ("qcontent_proj", "query_content"),
            ("qpos_proj", "query_position"),
            ("kcontent_proj", "key_content"),
            ("kpos_proj", "key_position"),
            ("v_proj", "value"),
            ("qpos_sine_proj", "query_spatial"),
        )
    ),
    ("transformer.decoder.query_scale", "decoder.spatial.scale"),
)
