"""What a server takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Those of tools/serve.py, whose --help describes them. max_wait: in milliseconds, timeout: in seconds."""

    threshold: float = 0.5
    batch_size: int = 8
    max_wait: float = 0.0
    max_queue: int = 64
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    timeout: float = 20.0
