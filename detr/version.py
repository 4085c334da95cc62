"""The version of the project, which checkpoints and exported files name."""

__version__ = "1.0.0"
