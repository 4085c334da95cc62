"""Serve a detector over HTTP, with a page to try it: python tools/serve.py CHECKPOINT

Then open http://127.0.0.1:8000, or: curl -F image=@photo.jpg http://127.0.0.1:8000/detect
docs/serving.md describes the endpoints and the limits.
"""

import argparse
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is used from the checkout

from detr import Detector, UserError
from detr.cli.devices import pick_device
from detr.cli.exit_codes import exit_codes
from detr.text import printable
from tools.serving.options import Options
from tools.stored import add_allow_targets

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger("serve")
_KEEP_ALIVE = 75  # seconds: longer than a proxy keeps a connection, which else sends a request into one that closes
_LONGEST_STOP = 300  # seconds for what was taken; a client that does not read its answer must not keep the server


def main(arguments: Sequence[str] | None = None) -> None:
    chosen, options = read_options(arguments)
    _check_packages()
    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s", level=logging.INFO)
    with _listening(chosen.host, chosen.port) as listener:
        device = pick_device(chosen.device)
        detector = Detector.from_checkpoint(chosen.checkpoint, device, allow_targets=chosen.allow_targets)
        logger.info("%s", detector)
        _run(make_server(detector, Path(chosen.checkpoint).name, options), listener)


def read_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    """All options of the command line, and those of them that the server itself has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, or the name of a published checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; this machine's own by default")
    parser.add_argument("--port", type=_number(int, 0, 65535), default=8000, help="0: any that is free")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    for name, (kind, text) in {
        "threshold": (_number(float, 0, 1), "lowest score where a request gives none"),
        "batch_size": (_number(int, 1), "most images that the model runs on together"),
        "max_wait": (_number(float, 0, 60_000), "milliseconds that an incomplete batch waits for more images"),
        "max_queue": (_number(int, 1), "requests that are taken at a time; more get status 503"),
        "max_bytes": (_number(int, 1), "of a request; larger ones get status 413"),
        "max_pixels": (_number(int, 1), "of an image; larger ones get status 413"),
        "timeout": (
            _number(float, 0.001, 3600),
            "seconds for a request to arrive; slower ones get status 408",
        ),
    }.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=asdict(Options())[name], help=f"{text} (%(default)s)"
        )
    add_allow_targets(parser)
    chosen = parser.parse_args(arguments)
    return chosen, Options(**{field.name: getattr(chosen, field.name) for field in fields(Options)})


def _number(kind: Callable[[str], Any], least: float, most: float = float("inf")) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            limit = "" if most == float("inf") else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"wanted at least {least}{limit}, got {text}")
        return value

    number.__name__ = "number"  # in argparse's message about other text
    return number


def _check_packages() -> None:
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Serving needs the package {error.name}. Install it with pip install 'detr-framework[serve]'."
        ) from None


def _listening(host: str, port: int) -> socket.socket:
    """Before the model is loaded, which may take long: an address that cannot be had is reported at once."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"Cannot listen on {printable(host)}, port {port}: {error.strerror}. Give another --host or --port."
        ) from None


def make_server(detector: Detector, name: str, options: Options) -> "uvicorn.Server":
    """One that is not started yet. name: of the detector, to be shown."""
    import uvicorn

    from tools.serving.app import build_app

    config = uvicorn.Config(
        build_app(detector, printable(name), options),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LONGEST_STOP,
    )
    return uvicorn.Server(config)


def _run(server: "uvicorn.Server", listener: socket.socket) -> None:
    """Until a signal; what was taken before is answered first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, server.handle_exit)
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    logger.info("Serving on http://%s:%d. Ctrl-C stops.", shown, port)
    if ipaddress.ip_address(address).is_loopback:
        logger.info("Only this machine reaches it. --host 0.0.0.0 opens it to others.")
    else:
        logger.warning("Everybody who reaches this address can use it: there is no authentication, and no encryption.")
    server.run(sockets=[listener])
    logger.info("Stopped. What was taken is answered.")


if __name__ == "__main__":
    with exit_codes():
        main()
