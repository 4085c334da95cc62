"""Steps whose bits do not depend on the number of processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from detr import distributed
from detr.engine.batches import Batch
from detr.engine.options import TrainerConfig
from detr.engine.profile import phase
from detr.engine.step import TrainingStep, count_objects, raise_together, restore
from detr.errors import NonFiniteError, UserError

Node = tuple[int, int]  # the batches of a step from the first number up to the second


@contextmanager
def alike(config: TrainerConfig) -> Iterator[None]:
    """Meanwhile, take away what differs between processes, where the training is to be elastic.

    The CPU adds in another order with another number of threads, and launchers give processes fewer of them than a
    single one has. So it is one thread in each. On GPUs too: the CPU augments images there.

    Raises UserError where there are more processes than batches of a step.
    """
    if not config.elastic:
        yield
        return
    if distributed.world_size() > config.accumulate:
        raise UserError(
            f"trainer.elastic=true: a step has {config.accumulate} batches (trainer.accumulate), wanted one at least "
            f"for each of {distributed.world_size()} processes. Start fewer of them. Another trainer.accumulate with "
            "another data.batch_size makes another training."
        )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:  # the next training of a sweep may be another kind
        torch.set_num_threads(before)


class ElasticStep(TrainingStep):
    """A step that gives the same bits on 1, 2, ... up to `trainer.accumulate` processes.

    Processes divide its `accumulate` batches among them. Each batch is computed alone: from the buffers as they were
    before the step, and with randomness that follows from the seed, the step and the number of the batch in it. What
    it gives is added up in pairs, always the same ones: the two halves of the batches, each of which is the sum of its
    halves. A process adds what lies in its own share. The others' sums go around once: each process adds a part of the
    columns of all, and what it has is gathered. That is as much as two copies of the gradients, sent and received.

    Losses, gradients and what was learned by the way, such as the statistics of batch norms, are all added like that.
    Statistics move once a step, by the mean of its batches.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, process=0, own=distributed.part(options["config"].accumulate))
        distributed.share(self.model)

    def parallelize(self) -> None:
        with distributed.alone():  # gradients are shared here, not by the model
            super().parallelize()

    def _attempt(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        counts = self._counts(batches)
        before = [buffer.clone() for buffer in self.model.buffers()]
        names: list[str] = []
        shapes: list[torch.Size] = []

        def compute(number: int) -> Tensor:
            """All that the batch of a number adds to the step, in one row."""
            restore(self.model, before)
            self.optimizer.zero_grad(set_to_none=True)
            with distributed.alone():
                losses, failure = self._learn(batches[self.own.index(number)], counts, step, number)
            if failure is not None:
                raise failure
            values = [*self._gradients(), *self._changes(before), *losses.values()]
            names[:], shapes[:] = losses, [value.shape for value in values]
            return torch.cat([value.reshape(-1) for value in values])

        rows, failed = [], None
        try:
            rows = [_computed(node, compute) for node in _nodes((0, self.config.accumulate), self.own)]
        except NonFiniteError as error:
            failed = error.with_traceback(None)
        raise_together(failed)
        with phase("sums"):
            row = _added(self.config.accumulate, torch.stack(rows))
            values = [
                part.view(shape) for part, shape in zip(row.split([s.numel() for s in shapes]), shapes, strict=True)
            ]
            self._take(values[: -len(names)], before)
        with distributed.alone():
            return self._update(dict(zip(names, values[-len(names) :], strict=True)), batches)

    def _counts(self, batches: Sequence[Batch]) -> Tensor:
        """The number of objects in each image of the step."""
        own, size = count_objects(batches, self.device), len(batches[0][0])
        counts = own.new_zeros(self.config.accumulate * size)
        counts[self.own.start * size : self.own.stop * size] = own
        return distributed.total(counts)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _gradients(self) -> list[Tensor]:
        """Those of all parameters that train, zeros where there is none, and last for which of them there is one."""
        found = [(parameter, parameter.grad) for parameter in self._trained()]
        there = torch.tensor([float(gradient is not None) for _, gradient in found], device=self.device)
        return [*(torch.zeros_like(one) if gradient is None else gradient for one, gradient in found), there]

    def _changes(self, before: Sequence[Tensor]) -> list[Tensor]:
        """How far a batch has moved the buffers. Counters are no floats: every batch leaves the same in them."""
        pairs = [(b, a) for b, a in zip(before, self.model.buffers(), strict=True) if a.is_floating_point()]
        return [torch.where(a == b, 0.0, a - b) for b, a in pairs]  # constants may be infinite

    def _take(self, values: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Gradients of the step become those of the model, and its buffers move. values: sums over the batches."""
        trained = self._trained()
        gradients, there, changes = values[: len(trained)], values[len(trained)], iter(values[len(trained) + 1 :])
        for parameter, gradient, known in zip(trained, gradients, there.tolist(), strict=True):
            # As its own gradient lies in memory, which the order of sums over it depends on.
            parameter.grad = torch.empty_like(parameter).copy_(gradient) if known else None
        for buffer, old in zip(self.model.buffers(), before, strict=True):
            if buffer.is_floating_point():
                buffer.copy_(old + next(changes) / self.config.accumulate)


def _halves(node: Node) -> tuple[Node, Node]:
    start, stop = node
    middle = (start + stop) // 2
    return (start, middle), (middle, stop)


def _nodes(node: Node, own: range) -> list[Node]:
    """The largest nodes below this one that lie within a range of batches."""
    start, stop = node
    if own.start <= start and stop <= own.stop:
        return [node]
    if stop <= own.start or own.stop <= start:
        return []
    return [found for half in _halves(node) for found in _nodes(half, own)]


def _computed(node: Node, compute: Callable[[int], Tensor]) -> Tensor:
    """The sum of a node whose batches are all computed here."""
    if node[1] - node[0] == 1:
        return compute(node[0])
    left, right = _halves(node)
    first = _computed(left, compute)
    return first.add_(_computed(right, compute))


def _combined(node: Node, known: Mapping[Node, Tensor]) -> Tensor:
    """The sum of a node from those of nodes below it."""
    if node in known:
        return known[node]
    left, right = _halves(node)
    return _combined(left, known) + _combined(right, known)


def _added(count: int, rows: Tensor) -> Tensor:
    """The sum over all batches of a step. count: their number. rows: the sums of this process's nodes, one each."""
    of_processes = [_nodes((0, count), distributed.part(count, p)) for p in range(distributed.world_size())]
    columns = distributed.transposed(rows, [len(nodes) for nodes in of_processes])
    known = dict(zip(chain.from_iterable(of_processes), columns, strict=True))
    return distributed.gather(_combined((0, count), known))[: rows.shape[1]]
