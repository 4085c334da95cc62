"""A model that knows the answers."""

import torch

from datasets import DetectionDataset
from detr.types import ImageBatch, Predictions


class Oracle(torch.nn.Module):
    """Knows the answers: a first query for each object, the rest no object. It counts the images it is shown."""

    def __init__(self, dataset: DetectionDataset) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dataset, self.seen = dataset, 0

    def forward(self, batch: ImageBatch) -> Predictions:
        logits = torch.full((1, len(batch), 5, 4), -9.0)
        logits[..., 3] = 9
        boxes = torch.full((1, len(batch), 5, 4), 0.5)
        for row in range(len(batch)):
            record = self.dataset.records[self.seen]
            height, width = record.size
            for query, ((x, y, w, h), label) in enumerate(zip(record.boxes, record.labels, strict=True)):
                logits[0, row, query, 3], logits[0, row, query, label] = -9, 9
                boxes[0, row, query] = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
            self.seen += 1
        return Predictions(logits=logits, boxes=boxes)
