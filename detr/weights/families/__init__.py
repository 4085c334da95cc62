"""Published weights of DETR and its family under our names, and back. One file a family.

Files of the models' authors are known, and those of the library transformers, under the names in its files and in its
models. A further family is a file here and its entry in FAMILIES.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detr.errors import UserError
from detr.renaming import Renaming
from detr.weights.families.conditional_detr import CONDITIONAL_DETR
from detr.weights.families.d_fine import D_FINE
from detr.weights.families.dab_detr import DAB_DETR, DN_DETR
from detr.weights.families.deformable_detr import (
    DEFORMABLE_DETR,
    REFINED_DEFORMABLE_DETR,
    TWO_STAGE_DEFORMABLE_DETR,
)
from detr.weights.families.detr import DETR, DETR_WITH_MASKS
from detr.weights.families.dino import DINO
from detr.weights.families.naming import Family, decoder_layers, has_marks, pack_attention, reversed_names
from detr.weights.families.rt_detr import DEIM_RT_DETRV2, RT_DETR, RT_DETRV2

# The first whose marks are all there is the one.
FAMILIES = (
    DETR_WITH_MASKS,
    D_FINE,
    DEIM_RT_DETRV2,
    RT_DETRV2,
    RT_DETR,
    DINO,
    DN_DETR,
    TWO_STAGE_DEFORMABLE_DETR,
    REFINED_DEFORMABLE_DETR,
    DEFORMABLE_DETR,
    DAB_DETR,
    CONDITIONAL_DETR,
    DETR,
)
_NAMES = ", ".join(family.name for family in FAMILIES)
_HEAD = re.compile(
    r"(detr\.)?((model\.decoder\.)?class_embed\.(\d+\.)?|class_labels_classifier\.|decoder\.dec_score_head\.\d+\.)weight"
)
_OTHERS = re.compile(r"label_enc|tgt_embed")  # relatives of DINO and DN-DETR


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
        head = next(tensor for name, tensor in self.state.items() if re.match(r"heads\.\d+\.class_head\.weight", name))
        return len(head) - self.family.background

    @property
    def options(self) -> str:
        """What sets such a model on the command line."""
        return self.family.options + self.family.variant(self.state)

    def __str__(self) -> str:
        reasons = [f"{count} {reason}" for reason, count in Counter(self.dropped.values()).items()]
        left_out = f", left out: {', '.join(reasons)}" if reasons else ""
        return f"{self.family.name} from {self.source}, {len(self.state)} tensors{left_out}"


def recognize(state: Mapping[str, Tensor]) -> Family | None:
    """The family of a published state dict, by the names of its tensors; None for any other, ours too.

    Raises UserError for relatives that cannot be converted.
    """
    if not any(_HEAD.fullmatch(name) for name in state):
        return None
    family = next(family for family in FAMILIES if has_marks(state, family.marks))
    if family not in (DINO, DN_DETR) and any(_OTHERS.search(name) for name in state):
        raise UserError(
            "Weights of DAB-Deformable-DETR or DN-Deformable-DETR from elsewhere cannot be converted yet. Use those of "
            f"{_NAMES}, or a checkpoint that train.py wrote."
        )
    return family


def convert(state: Mapping[str, Tensor], family: Family | None = None) -> Converted:
    """A published state dict under our names. Raises UserError where it is of no known family.

    family: for a part of a state dict, that cannot be recognized.
    """
    family = family or recognize(state)
    if family is None:
        raise UserError(
            f"Wanted weights of {_NAMES}, got tensors such as {_examples(state)}. Use a file of their authors or of "
            "transformers."
        )
    library = any(name.startswith(("model.", "detr.model.")) for name in state)
    renamed = Renaming(family.transformers if library else family.authors)
    ours: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for name, tensor in state.items():
        new = renamed(name)
        if library and new.startswith("backbone.") and new.endswith(".num_batches_tracked"):
            dropped[name] = "counts of batches, which frozen norms have no use for"
        elif any(re.search(constant, new) for constant in family.computed):
            dropped[name] = "constants that are computed"
        elif new not in ours:
            ours[new] = tensor
        elif torch.equal(ours[new], tensor):
            dropped[name] = "copies of other tensors"
        else:
            raise UserError(f"{name} is not the copy that it is in {family.name}. Use another file.")
    pack_attention(ours)
    source = "transformers" if library else "its authors"
    return Converted(state=family.adopt(ours), family=family, source=source, dropped=dropped)


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict of DETR or another model of FAMILIES, or a part of DETR's, under our names."""
    return convert(state_dict, recognize(state_dict) or DETR).state


def to_published(state_dict: Mapping[str, Tensor], family: Family | None = None) -> dict[str, Tensor]:
    """A state dict of ours, whole, under the names that the authors of its model use.

    family: where several have the same tensors, as RT_DETR, which is the default, and RT_DETRV2.

    Tensors that theirs has nothing for, such as those of attention blocks, keep our names. Raises UserError where the
    model is none of FAMILIES.
    """
    family = family or next((family for family in FAMILIES if has_marks(state_dict, family.our_marks)), None)
    if family is None:
        raise UserError(
            f"Wanted our weights of {_NAMES}, got tensors such as {_examples(state_dict)}. Other models have no "
            "published names. Use weights=PATH, or Detector.from_checkpoint, with the checkpoint as it is."
        )
    ours = family.release(dict(state_dict))
    renamings = reversed_names(family.authors, decoder_layers(ours))
    return {renamed(name): tensor for name, tensor in ours.items() for renamed in renamings}


def _examples(state: Mapping[str, Tensor]) -> str:
    return ", ".join([*state][:3]) or "none"
