"""One image of 640x640 through each model, from pixels to detections, with random weights."""

from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, in_new_process
from detr.config import build_model, compose
from detr.images import pad_to_batch
from detr.postprocess import postprocess
from tools.timing import medians

# With the classes of the published weights: COCO has 80, and category ids up to 90.
MODELS = {"rt_detr_r18": 80, "deformable_detr": 91, "dino": 91, "detr": 91}
SIDE = 640


def run(*, device: str, threads: int, repeats: int) -> Iterator[Row]:
    for name in MODELS:
        seconds, parameters, operations = in_new_process(_measure, name, device, threads, repeats)
        about = f"{parameters / 1e6:.2f} M parameters, {operations / 1e9:.1f} GFLOPs"
        yield Row(f"one image of {SIDE}x{SIDE}, model={name}: {about}", "ms", 1000 * seconds)


def _measure(name: str, device: str, threads: int, repeats: int) -> tuple[float, int, int]:
    """Seconds, parameters, and floating-point operations of products (two for a multiplication and an addition)."""
    torch.set_num_threads(threads)
    model = build_model(compose([f"model={name}", "model.backbone.weights=null"]).model, num_classes=MODELS[name])
    model = model.to(device).eval()
    batch = pad_to_batch([torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)]).to(device)
    names = [str(label) for label in range(MODELS[name])]

    def detect() -> object:
        with torch.inference_mode():
            return postprocess(model(batch), [(SIDE, SIDE)], names)

    with FlopCounterMode(display=False) as counter:  # with gradients: its record of modules needs these
        model(batch)
    seconds = medians({name: detect}, repeats)[name]
    return seconds, sum(p.numel() for p in model.parameters()), counter.get_total_flops()
