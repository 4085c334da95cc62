"""From YAML to objects: composing, checking and building. Nothing below this package knows of configurations."""

from detr.config.build import build, build_block, build_criterion, build_model
from detr.config.check import check_config, plain
from detr.config.command_line import command_line, job
from detr.config.compose import as_yaml, compose, evaluation_data, explained, save
from detr.config.targets import MODELS

__all__ = [
    "MODELS",
    "as_yaml",
    "build",
    "build_block",
    "build_criterion",
    "build_model",
    "check_config",
    "command_line",
    "compose",
    "evaluation_data",
    "explained",
    "job",
    "plain",
    "save",
]
