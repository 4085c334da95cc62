"""Where the shared fixtures and photographs are, and small things that many tests need."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datasets import shapes
from detr.models.decoders.transformer import TransformerDecoder
from detr.models.detr import DETR
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.positions import SinePosition
from tests.helpers import TinyBackbone
from tests.helpers.commands import REPOSITORY, TINY_MODEL

torch.set_num_threads(1)  # the models here are tiny: threads would only wait for one another


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with fixtures/ and data/, which are not part of the repository."""
    path = Path(os.environ.get("DETR_SHARED", REPOSITORY.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared fixtures and data; set DETR_SHARED (looked in {path})")
    return path.resolve()


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of generated shapes: 24 training and 7 validation images."""
    root = tmp_path_factory.mktemp("shapes") / "set"
    shapes.generate(root, train_images=24, val_images=7, image_size=48, max_objects=3)
    return root


@pytest.fixture(scope="session")
def tiny_options(shapes_root: Path) -> list[str]:
    """Overrides that make train.py run in seconds on the small set of shapes."""
    return [
        *TINY_MODEL,
        f"data.root={shapes_root}",
        "data.prepare=null",
        "data.size=48",
        "data.max_size=64",
        "data.transforms.sizes=[40,48]",
        "data.batch_size=4",
        "data.workers=0",
        "device=cpu",
    ]


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def tiny_detr() -> Callable[..., DETR]:
    """Builds the same small detector each time; its backbone has two convolutions, so that steps take milliseconds."""

    def build(*, dropout: float = 0.0, **options: object) -> DETR:
        torch.manual_seed(0)
        sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dropout": dropout}
        return DETR(
            backbone=TinyBackbone(),
            encoder=TransformerEncoder(position=SinePosition(d_model=32), num_layers=1, **sizes),
            decoder=TransformerDecoder(num_layers=3, **sizes),
            **{"num_classes": 5, "num_queries": 11, **options},
        )

    return build
