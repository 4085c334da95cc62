"""One image of 640x640 through each model, from pixels to detections, with random weights."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measure import in_new_process
from benchmarks.results import Row
from detr.config import build_model, compose
from detr.images import pad_to_batch
from detr.models.deployment import deployed
from detr.models.detr import DETR
from detr.postprocess import postprocess
from detr.types import ImageBatch
from tools.counts import count_flops, count_parameters
from tools.timing import medians

# With the classes of the published weights: COCO has 80, and category ids up to 90.
MODELS = {
    "rt_detr_r18": 80,
    "d_fine_n": 80,
    "d_fine_s": 80,
    "deim_s": 80,
    "deformable_detr": 91,
    "dino": 91,
    "detr": 91,
}
SIDE = 640


def run(*, device: str, threads: int, repeats: int) -> Iterator[Row]:
    for name in MODELS:
        seconds, parameters, operations = in_new_process(_measure, name, device, threads, repeats)
        yield Row(name, "parameters", "M", parameters / 1e6)
        yield Row(name, "operations", "GFLOPs", operations / 1e9)
        for form in seconds:
            yield Row(name, form, "ms", 1000 * seconds[form])


def _measure(name: str, device: str, threads: int, repeats: int) -> tuple[dict[str, float], int, int]:
    """Seconds of the model as it trains and as it is deployed, its parameters, and the floating-point operations of
    its products (two for a multiplication and an addition)."""
    torch.set_num_threads(threads)
    model = build_model(compose([f"model={name}", "model.backbone.weights=null"]).model, num_classes=MODELS[name])
    model = model.to(device).eval()
    batch = pad_to_batch([torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)]).to(device)
    forms = {"as it trains": model, "deployed": deployed(model)}
    seconds = medians(
        {form: partial(_detect, of_form, batch, MODELS[name]) for form, of_form in forms.items()}, repeats
    )
    return seconds, count_parameters(model), count_flops(partial(model, batch))


@torch.inference_mode()
def _detect(model: DETR, batch: ImageBatch, num_classes: int) -> None:
    postprocess(model(batch), [(SIDE, SIDE)], [str(label) for label in range(num_classes)])
