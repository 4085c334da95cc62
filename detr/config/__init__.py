"""From YAML to objects: composing, checking and building. Nothing below this package knows of configurations."""

from detr.config.build import build, build_block, build_criterion, build_model, build_reader
from detr.config.check import check_config, plain
from detr.config.command_line import JobCallback, command_line, in_sweep, job, take_failure
from detr.config.compose import as_yaml, compose, evaluation_data, explained, save, written_by_us
from detr.config.stored import build_stored_criterion, build_stored_model
from detr.config.targets import MODELS

__all__ = [
    "MODELS",
    "JobCallback",
    "as_yaml",
    "build",
    "build_block",
    "build_criterion",
    "build_model",
    "build_reader",
    "build_stored_criterion",
    "build_stored_model",
    "check_config",
    "command_line",
    "compose",
    "evaluation_data",
    "explained",
    "in_sweep",
    "job",
    "plain",
    "save",
    "take_failure",
    "written_by_us",
]
