"""Repeat a step that failed, and report where NaN came in first: python tools/replay.py runs/DATE/failures/step-N.pt"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, whose code made the file

from detr.cli.devices import pick_device
from detr.cli.exit_codes import exit_codes
from detr.config import build_stored_criterion, build_stored_model
from detr.engine import TrainerConfig, TrainingStep, failures
from detr.engine.batches import Batch
from detr.errors import NonFiniteError, UserError
from detr.weights import load_state
from tools.stored import add_allow_targets


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a file in the failures folder of a run")
    parser.add_argument("--device", default="cpu")
    add_allow_targets(parser)
    options = parser.parse_args(arguments)
    step, batches, number = _load(options.path, options.allow_targets, pick_device(options.device))
    found: list[str] = []
    for name, module in step.model.named_modules():
        module.register_forward_hook(partial(_watch_output, found, name))
    for name, parameter in step.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(_watch_gradient, found, name))

    for images, targets in batches:
        print(f"Batch of images {[target.image_id for target in targets]}, {tuple(images.images.shape)}")
        found += [f"target of image {t.image_id}" for t in targets if not t.boxes.isfinite().all()]
    try:
        losses = step(batches, number)
        print(f"Step {number} went through: loss {losses['loss']:.6g}, gradient {losses['grad_norm']:.4g}.")
    except NonFiniteError as error:
        print(f"Step {number} failed again: {error.what} became NaN or infinite.")
    print(f"The first to be NaN or infinite: {found[0] if found else 'none'}")


def _load(path: Path, packages: Sequence[str], device: torch.device) -> tuple[TrainingStep, list[Batch], int]:
    """A step that changes nothing, with the model and the losses of the file; its batches and its number.

    Raises UserError where the file is damaged or of another kind.
    """
    try:
        content = failures.load(path)
        config, count, state = content["config"], len(content["categories"]), content["model"]
        model = build_stored_model(config["model"], count, path, packages, state).to(device)
        criterion = build_stored_criterion(config["criterion"], count, path, packages).to(device)
        load_state(model, state, path)
        _set_modes(model, content["frozen"], content["evaluated"])
        step = TrainingStep(
            model=model,
            criterion=criterion.train(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            config=_trainer_options(config["trainer"], path),
            seed=content["seed"],
            process=content["process"],
            own=range(content["first"], content["first"] + len(content["batches"])),
        )
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": content["scale"]})
        return step, content["batches"], content["step"]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not what train.py writes ({error!r}). Use an intact copy.") from None


def _trainer_options(options: Mapping[str, Any], path: Path) -> TrainerConfig:
    try:
        return TrainerConfig(**options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _set_modes(model: nn.Module, frozen: Sequence[str], evaluated: Sequence[str]) -> None:
    """What trained, and what was in evaluation mode, as they were in the step."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    if unknown := [*({*frozen} - parameters.keys()), *({*evaluated} - modules.keys())]:
        raise KeyError(unknown[0])
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    for name, module in modules.items():
        module.training = name not in evaluated


def _watch_output(found: list[str], name: str, module: nn.Module, given: Any, output: Any) -> None:
    if isinstance(output, Tensor) and not output.isfinite().all():
        found.append(f"output of {name} ({type(module).__name__})")


def _watch_gradient(found: list[str], name: str, parameter: Tensor) -> None:
    if parameter.grad is not None and not parameter.grad.isfinite().all():
        found.append(f"gradient of {name}")


if __name__ == "__main__":
    with exit_codes():
        main()
