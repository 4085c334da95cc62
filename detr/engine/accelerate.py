"""Speed and memory of a model, by options that leave its results as they are."""

import os
from functools import partial

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from detr.engine.options import TrainerConfig
from detr.errors import UserError


def accelerated(model: nn.Module, config: TrainerConfig) -> nn.Module:
    """The model in channels-last layout; activation checkpointing, synchronized batch norm, compilation if asked for.

    Its parameters keep their names. Raises UserError where the device cannot do it.
    """
    if config.activation_checkpointing:
        for layer in _repeated(model):
            # Under its own name, so that checkpoints know nothing of it.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if config.sync_batch_norm:
        if not next(model.parameters()).is_cuda:
            raise UserError("trainer.sync_batch_norm works on GPUs only. Set trainer.sync_batch_norm=false, or a "
                            "norm without statistics of the batch: model.backbone.norm=group.")  # fmt: skip
        synchronize_batch_norms(model)
    model = model.to(memory_format=torch.channels_last)
    if config.compile:
        model.compile()
    return model


def make_deterministic(config: TrainerConfig) -> None:
    """Have operations repeat their results bit for bit, or raise an error, if that is asked for; before any runs."""
    wanted = config.deterministic or config.elastic
    if wanted:  # without a workspace of fixed size cuBLAS may add in another order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def synchronize_batch_norms(model: nn.Module) -> None:
    """Let the batch norms that train take statistics of all processes; those that are frozen stay as they are."""
    for parent in [*model.modules()]:
        for name, norm in [*parent.named_children()]:
            if isinstance(norm, nn.BatchNorm2d) and _trains(norm):
                convert = nn.SyncBatchNorm.convert_sync_batchnorm
                if type(norm).__module__.startswith("timm."):  # maybe with an activation, which torch's would drop
                    from timm.layers import convert_sync_batchnorm as convert
                parent.add_module(name, convert(norm))


def _trains(norm: nn.BatchNorm2d) -> bool:
    return not norm.affine or norm.weight.requires_grad


def compilations() -> int:
    """How many graphs were compiled so far in this process: a few, for all sizes of images, or something is wrong."""
    return int(counters["stats"]["unique_graphs"])


def _repeated(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's parts, which make up nearly all activations.

    Not what counts statistics of batches: computed twice, they would count twice.
    """
    found = [layer for part in model.children() for layer in getattr(part, "layers", ())]
    return [layer for layer in found if not any(isinstance(m, nn.BatchNorm2d) and _trains(m) for m in layer.modules())]
