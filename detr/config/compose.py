"""Composed configurations, as the command line and as scripts get them."""

import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Any

import hydra
from hydra._internal import defaults_list
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detr.config import schema
from detr.config.check import check_config, plain
from detr.config.messages import message
from detr.config.overrides import as_hydra_reads, with_model_of_weights
from detr.contents import flat
from detr.errors import UserError
from detr.folders import CONFIGS, ROOT

# The reader of checkpoints that were written when there was no other format.
_COCO = "datasets.formats.coco.read_coco"
_HEADER = "# What this command ran with. It is not read again: options come from configs/ and the command line.\n"
schema.register()


def compose(overrides: Sequence[str] = (), name: str = "train") -> DictConfig:
    """The configuration of train.py, evaluate.py or predict.py (`name`) with command-line overrides.

    It is checked as the commands do, unless something is still to be filled in. Raises UserError.
    """
    _find_datasets()
    with explained(name):
        config = _composed(overrides, name)
        if not OmegaConf.missing_keys(config):
            check_config(config)
    return config


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what Hydra and OmegaConf refuse in a configuration of this name into UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(message(error, lambda: _options(name))) from error
    except (ValueError, TypeError) as error:
        if Path(extract_tb(error.__traceback__)[-1].filename) != Path(defaults_list.__file__):
            raise
        raise UserError(
            "A group is set to null, to a number, or to a list of these, wanted the name of one of its files. Write "
            "~GROUP, such as ~model/denoising, to leave it out."
        ) from error


def save(config: DictConfig, path: Path) -> None:
    """Write a configuration as YAML, with everything filled in."""
    path.write_text(as_yaml(config))


def as_yaml(config: DictConfig) -> str:
    """A configuration as YAML, with everything filled in."""
    return _HEADER + OmegaConf.to_yaml(config, resolve=True)


def written_by_us(path: Path) -> bool:
    """Whether `save` made this file; one that it had just begun is empty."""
    return path.is_file() and path.read_bytes()[: len(_HEADER)] in (b"", _HEADER.encode())


def evaluation_data(config: DictConfig, trained: dict[str, Any] | None) -> dict[str, Any]:
    """The `data` options of an evaluation: those given, and for the rest those that the checkpoint was trained with.

    Where `split` is given, or no `val` while the training held out a part of `train`, that part is meant; else `split`
    is None.
    trained: the checkpoint's configuration, None for published weights.
    """
    given = {key: value for key, value in plain(config.data).items() if value is not None}
    known = trained["data"] if trained else {}
    has_val = any(value is not None for value in given.get("val", {}).values())
    options = given if "split" in given else {} if has_val else known
    held_out = {"split": options.get("split"), "split_seed": options.get("split_seed", 0)}
    part = "val" if held_out["split"] is None else "train"
    return {**known, **given, **held_out, part: _split(given.get(part, {}), known.get(part) or {})}


def _split(given: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The node of a split: options that are given, and for the rest those known, where both are of one format."""
    given = {key: value for key, value in given.items() if value is not None}
    if not (given or known):
        raise UserError(
            "Nothing says what to evaluate on. Set data=coco data.root=DIR, or data.val.images=DIR and "
            "data.val.annotations=FILE."
        )
    known = {"_target_": _COCO, **known}
    same = given.get("_target_", known["_target_"]) == known["_target_"]
    return {**known, **given} if same else given


def _composed(overrides: Sequence[str], name: str) -> DictConfig:
    GlobalHydra.instance().clear()
    overrides = with_model_of_weights(overrides) if name == "train" else overrides
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(name, overrides=[as_hydra_reads(override) for override in overrides])


def _find_datasets() -> None:
    """Make `datasets` be that of this project, which configurations name. Another library has the same name.

    Raises UserError where this process has imported that one already.
    """
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # last, as the folder holds names of others: train, evaluate, tools
    if "datasets" not in sys.modules:
        sys.path.insert(0, str(ROOT))
        try:
            importlib.import_module("datasets")
        finally:
            sys.path.remove(str(ROOT))
    origin = getattr(sys.modules["datasets"], "__file__", None)
    if origin is None or Path(origin).resolve().parent != ROOT / "datasets":
        raise UserError(
            f"datasets: wanted the package in {ROOT}, got another library of that name, which was imported before "
            f"({origin}). Call detr.config.compose before importing that library, or work in two processes."
        )


@functools.cache
def _options(name: str) -> list[str]:
    """The options of a configuration, and all groups of files to choose from."""
    content: Any = OmegaConf.to_container(_composed((), name))
    groups = {path.parent.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")} - {"."}
    return [*(option for option, _ in flat(content)), *sorted(groups)]
