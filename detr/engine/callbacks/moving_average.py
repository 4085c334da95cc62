"""A moving average of the weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detr.contents import INTEGERS, record, tensor
from detr.engine.trainer import Callback, Trainer

_STATE = record(averaged=tensor(*INTEGERS, shape=(), least=0))


class MovingAverage(Callback):
    """An exponential moving average of weights and buffers, which is evaluated and saved in place of the model's.

    decay: in (0, 1); less in early steps, whose weights are far from the later ones: (1 + n) / (10 + n) after n steps
        where that is less.
    warmup: steps over which it is decay * (1 - exp(-n / warmup)) instead, as in RT-DETR (Zhao et al., CVPR 2024).
    """

    def __init__(self, *, model: nn.Module, decay: float, warmup: int | None = None) -> None:
        self.decay, self.warmup = decay, warmup
        self.average = AveragedModel(model, multi_avg_fn=self._update, use_buffers=True)

    def setup(self, trainer: Trainer) -> None:
        trainer.state.averaged = self.average.module

    def on_start(self, trainer: Trainer) -> None:
        if trainer.state.step > 0 and self.average.n_averaged == 0:
            self.average.n_averaged.fill_(1)  # resumed from a training without: its weights are the average so far

    def on_step_end(self, trainer: Trainer, losses: Mapping[str, float]) -> None:
        self.average.update_parameters(trainer.model)

    def state_dict(self) -> dict[str, Any]:
        return {"averaged": self.average.n_averaged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _STATE(state, "")
        self.average.n_averaged.copy_(state["averaged"])

    def _update(self, average: Any, current: Any, number: torch.Tensor | int) -> None:
        steps = float(number)
        decay = min(self.decay, (1 + steps) / (10 + steps))
        if self.warmup is not None:
            decay = self.decay * -math.expm1(-(steps + 1) / self.warmup)
        get_ema_multi_avg_fn(decay)(average, current, number)
