"""Repeat a step that failed, and tell where NaN came in first: python tools/replay.py runs/DATE/failures/step-N.pt"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, whose code made the file

from detr.config import build_criterion, build_model, exit_codes
from detr.config.build import MODELS
from detr.engine import TrainerConfig, TrainingStep, failures
from detr.errors import NonFiniteError
from detr.weights import load_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a file in the failures folder of a run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-targets", default="", metavar="PACKAGE,...", help="packages of your own in the model")
    options = parser.parse_args()
    content = failures.load(options.path)
    config, count = content["config"], len(content["categories"])
    own = tuple(filter(None, options.allow_targets.split(",")))
    model = build_model(config["model"], count, pretrained=False, allow=(*MODELS, *own)).to(options.device)
    load_state(model, content["model"], options.path)
    criterion = build_criterion(config["criterion"], count, allow=("detr.losses", *own)).to(options.device)
    step = TrainingStep(
        model=model.train(),
        criterion=criterion.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        config=TrainerConfig(**config["trainer"]),
        seed=content["seed"],
        process=content["process"],
    )
    found: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(partial(_watch_output, found, name))
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(_watch_gradient, found, name))

    for images, targets in content["batches"]:
        print(f"Batch of images {[target.image_id for target in targets]}, {tuple(images.images.shape)}")
        found += [f"target of image {t.image_id}" for t in targets if not t.boxes.isfinite().all()]
    try:
        losses = step(content["batches"], content["step"])
        print(f"Step {content['step']} went through: loss {losses['loss']:.6g}, gradient {losses['grad_norm']:.4g}.")
    except NonFiniteError as error:
        print(f"Step {content['step']} failed again: {error.what} became NaN or infinite.")
    print(f"The first to be NaN or infinite: {found[0] if found else 'none'}")


def _watch_output(found: list[str], name: str, module: nn.Module, given: Any, output: Any) -> None:
    if isinstance(output, Tensor) and not output.isfinite().all():
        found.append(f"output of {name} ({type(module).__name__})")


def _watch_gradient(found: list[str], name: str, parameter: Tensor) -> None:
    if parameter.grad is not None and not parameter.grad.isfinite().all():
        found.append(f"gradient of {name}")


if __name__ == "__main__":
    with exit_codes():
        main()
