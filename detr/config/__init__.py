"""From YAML to objects: composing, checking and building. Nothing below this package knows of configurations."""

from detr.config.build import build, build_block, build_criterion, build_model, check_config, plain
from detr.config.compose import compose, evaluation_data, pick_device, run_directory
from detr.config.exit_codes import exit_codes

__all__ = [
    "build",
    "build_block",
    "build_criterion",
    "build_model",
    "check_config",
    "compose",
    "evaluation_data",
    "exit_codes",
    "pick_device",
    "plain",
    "run_directory",
]
