"""Weights of DETR and its family from elsewhere, under our names.

Known are the files of the models' authors (DETR: facebookresearch/detr, Conditional DETR: Atten4Vis/ConditionalDETR,
DAB-DETR: IDEA-Research/DAB-DETR, Deformable DETR: fundamentalvision/Deformable-DETR) and those of the library
transformers, by the names that its files have and by those that its models have.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detr.errors import UserError

Rows = Sequence[tuple[str, str]]


class Renaming:
    """Replaces parts of dotted names, each part once and by the first row that fits. `#` stands for a number."""

    def __init__(self, rows: Rows) -> None:
        self.rows = [(re.compile(_expression(old)), new.replace("#", r"\g<1>")) for old, new in rows]
        self._any = re.compile("|".join(pattern.pattern for pattern, _ in self.rows))

    def __call__(self, name: str) -> str:
        return self._any.sub(lambda match: self._replaced(match[0]), name)

    def _replaced(self, part: str) -> str:
        return next(pattern.sub(new, part) for pattern, new in self.rows if pattern.fullmatch(part))


def _expression(part: str) -> str:
    return r"(?<![^.])" + re.escape(part).replace(r"\#", r"(\d+)") + r"(?![^.])"


# Rows of names there and here. Where several have one name here, the others are copies.
_AUTHORS: Rows = (
    ("backbone.0.body", "backbone.body"),
    ("backbone.1", "position"),
    ("linear1", "ffn.linear1"),
    ("linear2", "ffn.linear2"),
    ("in_proj_weight", "in_proj.weight"),
    ("in_proj_bias", "in_proj.bias"),
)
_AUTHORS_ONE_HEAD: Rows = (
    ("input_proj", "neck.levels.0.0"),
    ("class_embed", "heads.0.class_head"),
    ("bbox_embed", "heads.0.box_head"),
)
_CONDITIONAL: Rows = (
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
    ("transformer.decoder.query_scale", "transformer.decoder.spatial.scale"),
)
_DEFORMABLE: Rows = (
    ("input_proj", "neck.levels"),
    ("query_embed", "queries.position"),
    ("transformer.reference_points", "queries.points"),
    ("transformer.enc_output", "queries.proj"),
    ("transformer.enc_output_norm", "queries.norm"),
    ("transformer.pos_trans", "queries.embed.0"),
    ("transformer.pos_trans_norm", "queries.embed.1"),
    # Numbered there in the order of their definition, here in the order of their use.
    ("decoder.layers.#.norm1", "decoder.layers.#.norm2"),
    ("decoder.layers.#.norm2", "decoder.layers.#.norm1"),
)
_TRANSFORMERS: Rows = (
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
    ("model.backbone.position_embedding.row_embeddings", "position.row_embed"),
    ("model.backbone.position_embedding.column_embeddings", "position.col_embed"),
    ("model.position_embedding.row_embeddings", "position.row_embed"),
    ("model.position_embedding.column_embeddings", "position.col_embed"),
    ("model.input_projection", "neck.levels.0.0"),
    ("model.query_position_embeddings", "queries.position"),
    ("model.decoder.layernorm", "transformer.decoder.norm"),
    ("model.encoder.layers.#.final_layer_norm", "transformer.encoder.layers.#.norm2"),
    ("model.encoder", "transformer.encoder"),
    ("model.decoder", "transformer.decoder"),
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
_TRANSFORMERS_CONDITIONAL: Rows = (
    ("model.decoder.layers.#.self_attn.v_proj", "transformer.decoder.layers.#.self_attn.value"),
    ("model.decoder.layers.#.encoder_attn.v_proj", "transformer.decoder.layers.#.cross_attn.value"),
    ("q_content_proj", "query_content"),
    ("q_pos_proj", "query_position"),
    ("k_content_proj", "key_content"),
    ("k_pos_proj", "key_position"),
    ("q_pos_sine_proj", "query_spatial"),
    ("model.decoder.query_scale", "transformer.decoder.spatial.scale"),
    ("model.decoder.ref_point_head", "queries.points"),
)
_TRANSFORMERS_DAB: Rows = (
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
    ("model.encoder.query_scale", "transformer.encoder.position_scale"),
    ("model.decoder.query_scale", "transformer.decoder.spatial.scale"),
    ("model.decoder.ref_point_head", "queries.position.mlp"),
    ("model.decoder.ref_anchor_head", "transformer.decoder.spatial.size"),
    ("class_embed", "heads.0.class_head"),
    ("model.decoder.bbox_embed", "heads.0.box_head"),
)
_TRANSFORMERS_DEFORMABLE: Rows = (
    ("model.input_proj", "neck.levels"),
    ("model.level_embed", "transformer.level_embed"),
    ("model.reference_points", "queries.points"),
    ("model.enc_output", "queries.proj"),
    ("model.enc_output_norm", "queries.norm"),
    ("model.pos_trans", "queries.embed.0"),
    ("model.pos_trans_norm", "queries.embed.1"),
)
_SHARED_HEADS: Rows = (
    ("class_embed.0", "heads.0.class_head"),
    ("bbox_embed.0", "heads.0.box_head"),
    ("class_embed.#", "heads.0.class_head"),
    ("bbox_embed.#", "heads.0.box_head"),
)
_HEADS: Rows = (
    ("class_embed.#", "heads.#.class_head"),
    ("bbox_embed.#", "heads.#.box_head"),
    *(
        (f"{model}.decoder.{there}.#", f"heads.#.{here}")
        for model in ("transformer", "model")
        for there, here in (("class_embed", "class_head"), ("bbox_embed", "box_head"))
    ),
)


@dataclass(frozen=True)
class Family:
    """A kind of model whose weights are known.

    options: what sets it on the command line. marks: what names of its tensors have, all of them, as expressions.
    authors, transformers: rows of names in their files, and ours. background: its head has an output for no object.
    """

    name: str
    options: str
    marks: tuple[str, ...]
    authors: Rows
    transformers: Rows
    background: bool = False


DETR = Family(
    name="DETR",
    options="model=detr",
    marks=(),
    authors=(
        *_AUTHORS_ONE_HEAD,
        ("query_embed", "queries.position"),
        ("multihead_attn", "cross_attn"),
        *_AUTHORS,
    ),
    transformers=_TRANSFORMERS,
    background=True,
)
CONDITIONAL_DETR = Family(
    name="Conditional DETR",
    options="model=conditional_detr",
    marks=(r"\.(ca_q|encoder_attn\.q_)content_proj\.",),
    authors=(
        *_AUTHORS_ONE_HEAD,
        ("query_embed", "queries.position"),
        ("transformer.decoder.ref_point_head", "queries.points"),
        *_CONDITIONAL,
        *_AUTHORS,
    ),
    transformers=(*_TRANSFORMERS_CONDITIONAL, *_CONDITIONAL, *_TRANSFORMERS),
)
DAB_DETR = Family(
    name="DAB-DETR",
    options="model=dab_detr",
    marks=("refpoint_embed",),
    authors=(
        *_AUTHORS_ONE_HEAD,
        ("transformer.decoder.bbox_embed", "heads.0.box_head"),
        ("refpoint_embed", "queries.anchors"),
        ("transformer.decoder.ref_point_head", "queries.position.mlp"),
        ("transformer.decoder.ref_anchor_head", "transformer.decoder.spatial.size"),
        ("transformer.encoder.query_scale", "transformer.encoder.position_scale"),
        ("activation", "ffn.activation"),
        *_CONDITIONAL,
        *_AUTHORS,
    ),
    transformers=(*_TRANSFORMERS_DAB, *_TRANSFORMERS),
)
DEFORMABLE_DETR = Family(
    name="Deformable DETR",
    options="model=deformable_detr",
    marks=(r"\.sampling_offsets\.",),
    authors=(*_SHARED_HEADS, *_DEFORMABLE, *_AUTHORS),
    transformers=(*_SHARED_HEADS, *_TRANSFORMERS_DEFORMABLE, *_TRANSFORMERS),
)
REFINED_DEFORMABLE_DETR = Family(
    name="Deformable DETR with refinement",
    options=f"{DEFORMABLE_DETR.options} model.refine=true model.shared_heads=false",
    marks=(*DEFORMABLE_DETR.marks, r"\.decoder\.bbox_embed\."),
    authors=(*_HEADS, *_DEFORMABLE, *_AUTHORS),
    transformers=(*_HEADS, *_TRANSFORMERS_DEFORMABLE, *_TRANSFORMERS),
)
TWO_STAGE_DEFORMABLE_DETR = Family(
    name="two-stage Deformable DETR",
    options=f"{REFINED_DEFORMABLE_DETR.options} model/queries=two_stage model.queries.selection=pure",
    marks=(*REFINED_DEFORMABLE_DETR.marks, r"\.enc_output\."),
    authors=REFINED_DEFORMABLE_DETR.authors,
    transformers=REFINED_DEFORMABLE_DETR.transformers,
)
# The first whose marks are all there is the one.
FAMILIES = (
    TWO_STAGE_DEFORMABLE_DETR,
    REFINED_DEFORMABLE_DETR,
    DEFORMABLE_DETR,
    DAB_DETR,
    CONDITIONAL_DETR,
    DETR,
)
_HEAD = re.compile(r"((model\.decoder\.)?class_embed\.(\d+\.)?|class_labels_classifier\.)weight")
_OTHERS = re.compile(r"label_enc|tgt_embed")  # DN-DETR, DINO, DAB-Deformable-DETR
_RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (23, True): "resnet101"}  # ResNet-50 needs no option


@dataclass(frozen=True)
class Converted:
    """Weights under our names, what model they are of, and where they came from.

    dropped: why tensors of the source have no place here, by their names there.
    """

    state: dict[str, Tensor]
    family: Family
    source: str
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        head = next(tensor for name, tensor in self.state.items() if name.endswith("class_head.weight"))
        return len(head) - self.family.background

    @property
    def options(self) -> str:
        """What sets such a model on the command line."""
        blocks = sum(bool(re.fullmatch(r"backbone\.body\.layer3\.\d+\.conv1\.weight", name)) for name in self.state)
        resnet = _RESNETS.get((blocks, "backbone.body.layer3.0.conv3.weight" in self.state))
        return self.family.options + (f" model/backbone={resnet}" if resnet else "")

    def __str__(self) -> str:
        reasons = [f"{count} {reason}" for reason, count in Counter(self.dropped.values()).items()]
        left_out = f", left out: {', '.join(reasons)}" if reasons else ""
        return f"{self.family.name} from {self.source}, {len(self.state)} tensors{left_out}"


def recognise(state: Mapping[str, Tensor]) -> Family | None:
    """The family of a state dict from elsewhere, by the names of its tensors; None for any other, ours too."""
    names = "\n".join(state)
    if not any(_HEAD.fullmatch(name) for name in state):
        return None
    if _OTHERS.search(names):
        raise UserError(
            "Weights of DN-DETR, DINO or DAB-Deformable-DETR from elsewhere cannot be converted yet. Use those of "
            f"{', '.join(family.name for family in FAMILIES)}, or a checkpoint that train.py wrote."
        )
    return next(family for family in FAMILIES if all(re.search(mark, names) for mark in family.marks))


def convert(state: Mapping[str, Tensor], family: Family | None = None) -> Converted:
    """A state dict from elsewhere under our names. Raises UserError where it is of no known family.

    family: for a part of a state dict, that could not be recognised.
    """
    family = family or recognise(state)
    if family is None:
        raise UserError(
            f"Wanted weights of {', '.join(family.name for family in FAMILIES)}, got tensors such as "
            f"{', '.join([*state][:3]) or 'none'}. Use a file of their authors or of transformers."
        )
    library = any(name.startswith("model.") for name in state)
    renamed = Renaming(family.transformers if library else family.authors)
    ours: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for name, tensor in state.items():
        new = renamed(name)
        if library and new.endswith(".num_batches_tracked"):
            dropped[name] = "counts of batches, which frozen norms have no use for"
        elif new not in ours:
            ours[new] = tensor
        elif torch.equal(ours[new], tensor):
            dropped[name] = "copies of shared heads"
        else:
            raise UserError(f"{name} is not the copy that it is in {family.name}. Use another file.")
    _pack_attention(ours)
    if family in (DEFORMABLE_DETR, REFINED_DEFORMABLE_DETR) and "queries.position.weight" in ours:
        position, content = ours["queries.position.weight"].chunk(2, dim=1)
        ours |= {"queries.position.weight": position, "queries.content.weight": content}
    if family is TWO_STAGE_DEFORMABLE_DETR:
        _take_out_proposal_head(ours)
    return Converted(state=ours, family=family, source="transformers" if library else "its authors", dropped=dropped)


def _pack_attention(state: dict[str, Tensor]) -> None:
    """Put separate projections of queries, keys and values into one matrix."""
    for name in [name for name in state if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in state for part in parts):
            state[name.replace(".q_proj.", ".in_proj.")] = torch.cat([state.pop(part) for part in parts])


def _take_out_proposal_head(state: dict[str, Tensor]) -> None:
    """The head after those of the decoder's layers is that of the proposals; of its classes only the first counts."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("heads."))
    for name in [name for name in state if name.startswith(f"heads.{last}.")]:
        tensor, part = state.pop(name), name.removeprefix(f"heads.{last}.")
        state[f"proposal_head.{part}"] = tensor[:1] if part.startswith("class_head.") else tensor
