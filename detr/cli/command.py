"""How a command starts."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from detr.cli.exit_codes import exit_codes
from detr.cli.run_folder import removed_unless_used
from detr.config import check_config, command_line, explained, in_sweep
from detr.engine.signals import interruptible


def command(
    name: str, *, unread: Callable[[Any], str | None] = lambda config: None
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorates the main function of a command, which then takes its checked configuration from the command line.

    What a user can cause ends the command as `exit_codes` says.

    name: of the configuration, configs/NAME.yaml.
    unread: names, of a configuration, the split of its data that the command does not use, so that it may be left open.
    """

    def decorate(run: Callable[[Any], None]) -> Callable[[], None]:
        @wraps(run)
        @removed_unless_used()
        def job(config: Any) -> None:
            # Here too, because the jobs of a sweep may run in other processes. `Sweep` reports the errors of these.
            with interruptible() if in_sweep() else exit_codes(), explained(name):
                if "data" in config and (split := unread(config)) is not None:
                    config.data[split] = None
                check_config(config)
                run(config)

        return exit_codes()(command_line(name)(job))

    return decorate
