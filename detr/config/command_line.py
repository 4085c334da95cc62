"""Configurations from the command line, and what Hydra knows of the command that runs."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback as JobCallback
from hydra.types import RunMode
from omegaconf import DictConfig

from detr.config.compose import explained
from detr.config.overrides import as_hydra_reads, with_model_of_weights
from detr.errors import UserError
from detr.folders import CONFIGS

__all__ = ["Job", "JobCallback", "command_line", "in_sweep", "job", "take_failure"]


def command_line(name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorates a function of the configuration `name`, which then gets that of the command line.

    Raises UserError where the command line does not fit it.
    """

    def decorate(run: Callable[[DictConfig], None]) -> Callable[[], None]:
        compose_and_run = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(run)

        @wraps(run)
        def main() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them its own way
            _check_flags(sys.argv[1:])
            parts = [part if part.startswith("-") else as_hydra_reads(part) for part in sys.argv[1:]]
            sys.argv[1:] = with_model_of_weights(parts) if name == "train" else parts
            with explained(name):
                compose_and_run()

        return main

    return decorate


def _check_flags(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would answer with its usage or a traceback."""
    given, unknown = get_args_parser().parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise UserError(f"{flag}: options have no dashes. Write {flag.lstrip('-')}=VALUE.")
    if given.multirun and (given.cfg or given.info):
        raise UserError("-m starts a sweep, --cfg and --info start nothing. Leave one of them out.")


@dataclass(frozen=True)
class Job:
    """A running command.

    name: of its configuration. folder: of its output. overrides: the options that were set on the command line.
    """

    name: str
    folder: Path
    overrides: list[str]

    def sets(self, option: str) -> bool:
        """Whether the command line sets this option."""
        return any(override.startswith(f"{option}=") for override in self.overrides)


def job() -> Job:
    """The command that is running."""
    running = HydraConfig.get()
    return Job(running.job.name, Path(running.runtime.output_dir), list(running.overrides.task))


def in_sweep() -> bool:
    """Whether the command that is running is one of several jobs."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def take_failure(done: JobReturn) -> Exception | None:
    """The error of a job of a sweep, if it failed; it counts as done then, so that the sweep goes on."""
    if done.status != JobStatus.FAILED:
        return None
    error = done._return_value
    done.status, done.return_value = JobStatus.COMPLETED, None
    return error
