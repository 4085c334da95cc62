"""What the commands share: how they start, their exit codes, devices and run folders."""

from detr.cli.command import command
from detr.cli.devices import pick_device
from detr.cli.exit_codes import exit_codes
from detr.cli.run_folder import run_directory

__all__ = ["command", "exit_codes", "pick_device", "run_directory"]
