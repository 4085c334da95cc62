"""Composed configurations, as the command line and as scripts get them."""

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr import distributed
from detr.config import schema
from detr.config.build import check_config, plain
from detr.errors import UserError

logger = logging.getLogger(__name__)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# The reader of checkpoints that were written when there was no other format.
_COCO = "datasets.formats.coco.read_coco"
schema.register()


def compose(overrides: Sequence[str] = (), name: str = "train") -> DictConfig:
    """The configuration of train.py, evaluate.py or predict.py (`name`) with command-line overrides.

    It is checked as the commands do, unless something is still to be filled in.
    """
    if not CONFIGS.is_dir():
        raise UserError(f"The folder {CONFIGS} does not exist. Work in a checkout, installed with pip install -e .")
    # `datasets` is there, which configurations name and which is never installed.
    if str(CONFIGS.parent) not in sys.path:
        sys.path.append(str(CONFIGS.parent))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra_compose(name, overrides=list(overrides))
    if not OmegaConf.missing_keys(config):
        check_config(config)
    return config


@contextmanager
def run_directory(config: DictConfig) -> Iterator[Path]:
    """The folder that Hydra made for this run, with the composed configuration saved in it.

    Raises UserError where another training is at work in it.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if distributed.launched() and not any(option.startswith("run_dir=") for option in hydra.overrides.task):
        raise UserError("Several processes need run_dir=PATH on the command line, the same for all of them.")
    if distributed.rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)  # the others tell only what goes wrong
        yield folder
        return
    with _alone_in(folder) if hydra.job.name == "train" else nullcontext():
        logger.info("Everything goes to %s.", folder)
        # Evaluation may write into the folder of the training: the training's configuration stays.
        name = "config" if hydra.job.name == "train" else hydra.job.name
        (folder / f"{name}.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
        yield folder


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two trainings would overwrite each other's checkpoints."""
    # Processes that load data outlive one that was killed by a few seconds, and hold its lock.
    lock = FileLock(folder / ".lock", timeout=15)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another training is at work in {folder}. Give this one a folder of its own with run_dir=PATH, or end the "
            "other one first."
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s): see to it that no other training writes there.", folder, error)
    try:
        yield
    finally:
        lock.release()


def evaluation_data(config: DictConfig, trained: dict[str, Any] | None) -> dict[str, Any]:
    """The `data` options of an evaluation: those given, and for the rest those that the checkpoint was trained with.

    trained: the checkpoint's configuration, None for published weights.
    """
    given = {key: value for key, value in plain(config.data).items() if value is not None}
    known = trained["data"] if trained else {}
    return {**known, **given, "val": _split(given.get("val", {}), known.get("val", {}))}


def _split(given: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The node of a split: options that are given, and for the rest those known, where both are of one format."""
    given = {key: value for key, value in given.items() if value is not None}
    if not (given or known):
        raise UserError(
            "The checkpoint does not say what to evaluate on. Set data=coco data.root=DIR, or data.val.images=DIR and "
            "data.val.annotations=FILE."
        )
    known = {"_target_": _COCO, **known}
    same = given.get("_target_", known["_target_"]) == known["_target_"]
    return {**known, **given} if same else given


def pick_device(name: str) -> torch.device:
    """The device that `device` names; cuda for `auto`, where there is one; of several processes each gets its own GPU.

    Raises UserError where it cannot be had.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device: wanted auto, cpu, cuda or cuda:N, got '{name}'.")
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= count:
        raise UserError(
            f"device={name} was asked for, but torch finds {count or 'no'} CUDA devices. Set device=cpu or device=auto."
        )
    if name == "cuda" and distributed.launched():
        if distributed.local_rank() >= count:
            raise UserError(
                f"This machine has {count} CUDA devices, too few for its process {distributed.local_rank()}. Start one "
                "process for each with torchrun --nproc_per_node, or set device=cpu."
            )
        torch.cuda.set_device(distributed.local_rank())
        name = f"cuda:{distributed.local_rank()}"
    return torch.device(name)
