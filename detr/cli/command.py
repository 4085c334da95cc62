"""How a command starts."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from detr.cli.exit_codes import exit_codes
from detr.config import check_config, command_line, explained


def command(name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorates the main function of a command, which then takes its checked configuration from the command line.

    name: of the configuration, configs/NAME.yaml. What a user can cause ends the command as `exit_codes` says.
    """

    def decorate(run: Callable[[Any], None]) -> Callable[[], None]:
        @wraps(run)
        @exit_codes()  # here too, because the jobs of a sweep may run in other processes
        def job(config: Any) -> None:
            with explained(name):
                check_config(config)
                run(config)

        return exit_codes()(command_line(name)(job))

    return decorate
