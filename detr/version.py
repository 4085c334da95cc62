"""The version of the project, which checkpoints and exported files name."""

__version__ = "0.1.0"
