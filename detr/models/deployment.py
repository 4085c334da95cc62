"""A model for inference alone: faster, with equal results."""

import copy
from typing import cast

from detr.models.detr import DETR
from detr.models.heads import Head
from detr.models.layers.convolutions import ConvNorm, RepVGGBlock


def deployed(model: DETR) -> DETR:
    """A copy of a model for evaluation alone, which predicts what the last layer used there does, up to rounding.

    It has lost the decoder layers that evaluation does not use, and of the heads before the last one what only
    predicts. The convolutions of a hybrid encoder are plain ones, with norms and parallel branches folded into them
    (RepVGG: Ding et al., CVPR 2021). Its state dict has other names there; it cannot be trained.
    """
    model = copy.deepcopy(model).eval()
    decoder = model.decoder
    decoder.layers, decoder.eval_layers = decoder.used, None
    model.aux_loss = False
    if len(model.heads) > 1:
        model.heads = model.heads[: len(decoder.layers)]
        for head in model.heads[:-1]:
            cast(Head, head).only_refine()

    for parent in [*model.encoder.modules()]:
        for name, block in [*parent.named_children()]:
            if isinstance(block, RepVGGBlock):
                parent.add_module(name, block.deployed())
    for name, module in model.encoder.named_modules():
        # Projections to the memory keep their norms, as published.
        if isinstance(module, ConvNorm) and not name.startswith("proj."):
            module.fold()
    return model
