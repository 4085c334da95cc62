"""What --help prints: what people change most, recipes, examples, and where the rest is."""

import re
import sys
from dataclasses import dataclass
from textwrap import TextWrapper

from detr.cli import terminal
from detr.folders import CONFIGS, command
from detr.published import PUBLISHED

_WIDTH = 100
_LEFT = 22  # columns of the names of options and recipes
NEEDED, DATE = "needed", "DATE"  # in the place of a default: one that the user gives, and the time of the start


@dataclass(frozen=True)
class Page:
    """about: a sentence. usage, examples: what follows the command. options: by name, a default and what it means.

    weights: the option that takes the name of a published checkpoint.
    """

    about: str
    usage: str
    options: dict[str, tuple[str, str]]
    examples: tuple[str, ...]
    weights: str = "checkpoint"


_CHECKPOINT = (NEEDED, "a file, such as RUN/checkpoints/best.pt, or a published one's name")
_OVERWRITE = ("false", "replace the results of an earlier run")
PAGES = {
    "train": Page(
        about="Train a detector.",
        usage="[experiment=NAME] [OPTION=VALUE ...]",
        options={
            "data": (
                "shapes",
                "format of the data: coco, custom, roboflow, yolo, voc, cvat, csv, coco_panoptic; shapes are generated",
            ),
            "data.root": ("generated/shapes", "the folder of the data"),
            "model": ("detr", "the model, such as small, dino, rt_detr_r18, d_fine_n"),
            "weights": (
                "null",
                "start from a checkpoint: a file, or a published one's name",
            ),
            "trainer.epochs": ("300", "passes over the training data"),
            "data.batch_size": ("16", "images in a batch of each process"),
            "optimizer.lr": ("0.0001", "learning rate; that of the backbone is optimizer.backbone_lr"),
            "trainer.precision": ("fp32", "fp32, bf16 or fp16"),
            "trainer.resume": ("null", "auto: go on from the last checkpoint in run_dir"),
            "run_dir": (f"runs/{DATE}", "the folder for everything that the run writes"),
        },
        examples=(
            "experiment=quickstart",
            "model=small data=yolo data.root=DIR data.split=0.2",
            "experiment=finetune data=yolo data.root=DIR run_dir=RUN trainer.resume=auto",
            "experiment=detr_r50_coco data.root=DIR run_dir=RUN",
        ),
        weights="weights",
    ),
    "evaluate": Page(
        about="Evaluate a checkpoint, or the results of any detector, with COCO's metrics.",
        usage="checkpoint=PATH|NAME | results=FILE [OPTION=VALUE ...]",
        options={
            "checkpoint": ("null", _CHECKPOINT[1]),
            "results": ("null", "instead of a checkpoint: detections in COCO's format"),
            "data": ("from_checkpoint", "format of the data; else the data of the training"),
            "data.root": ("null", "the folder of the data"),
            "data.batch_size": ("4", "images in a batch"),
            "evaluation.max_dets": ("100", "the most detections of an image and class that count"),
            "report": ("false", "also write a page that says where the detector fails"),
            "report_against": ("null", "compare with another evaluation in that page: the run_dir of that one"),
            "run_dir": (f"runs/evaluate/{DATE}", "the folder for the results"),
            "overwrite": _OVERWRITE,
        },
        examples=(
            "checkpoint=RUN/checkpoints/best.pt report=true",
            "checkpoint=detr_r50 data=coco data.root=DIR",
            "results=results.json data=coco data.root=DIR",
        ),
    ),
    "predict": Page(
        about="Detect objects in images and videos.",
        usage="checkpoint=PATH|NAME source=PATH|PATTERN [OPTION=VALUE ...]",
        options={
            "checkpoint": _CHECKPOINT,
            "source": (NEEDED, "images and videos: a file, a folder or a pattern"),
            "output": ("run_dir", "the folder for drawn images and for detections"),
            "overwrite": _OVERWRITE,
            "formats": ("[json]", "files of detections: json, yolo, csv, panoptic"),
            "threshold": ("0.5", "the lowest score to keep; best: each class's own, with the best F1"),
            "max_dets": ("300", "the most detections of an image"),
            "size": ("null", "short side of images in pixels; null: as in training"),
            "batch_size": ("4", "images that the model gets at once"),
            "attention": ("false", "also draw where the model looks for each detection"),
        },
        examples=(
            "checkpoint=RUN/checkpoints/best.pt source=photos output=found",
            "checkpoint=detr_r50 source='photos/*.jpg' output=found threshold=0.7",
            "checkpoint=best.pt source=film.mp4 output=found 'formats=[json,csv]'",
        ),
    ),
    "export": Page(
        about="Export a checkpoint to a file for other runtimes, with the proof that it gives the same detections.",
        usage="checkpoint=PATH|NAME [OPTION=VALUE ...]",
        options={
            "checkpoint": _CHECKPOINT,
            "format": ("onnx", "onnx, openvino, or torch for torch.export.load"),
            "precision": ("fp32", "fp32, fp16, or int8, which needs images"),
            "output": ("run_dir", "the folder of the file"),
            "overwrite": _OVERWRITE,
            "fixed_size": ("false", "accept images of one size alone"),
            "batch_size": ("null", "images in a batch; null: any number"),
            "postprocess": ("true", "give scores, labels and boxes; false: the model's outputs"),
            "images": ("null", "photographs for the proof, a folder or a pattern; null: generated ones"),
            "evaluate": ("false", "also compare AP on the validation data"),
        },
        examples=(
            "checkpoint=RUN/checkpoints/best.pt output=exported",
            "checkpoint=best.pt format=openvino precision=int8 images=photos output=exported",
            "checkpoint=best.pt format=torch batch_size=1 output=exported evaluate=true",
        ),
    ),
}


def answer_help(name: str) -> None:
    """Where the command line asks for help, print the page of the command, and end.

    A command calls this before its imports, which take seconds; this module imports nothing that does.
    """
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        terminal.prepare()
        print(help_page(name))
        sys.exit()


def help_page(name: str) -> str:
    """The page of the command that configs/NAME.yaml configures."""
    page, started = PAGES[name], command(name)
    options = [(option, f"{text} [{default}]") for option, (default, text) in page.options.items()]
    parts = [
        page.about,
        f"Usage: {started} {page.usage}",
        _section("Options that are used most, with their defaults", options),
        *([_section("Recipes, for experiment=NAME", _recipes())] if name == "train" else []),
        _lines("Examples", *(f"{started} {example}" for example in page.examples)),
        *([_lines("On several GPUs", _launched(started))] if name == "train" else []),
        _lines(
            "All options",
            f"{started} --cfg job prints them, as the other arguments set them.",
            f"{CONFIGS} describes them.",
            f"{started} --hydra-help describes flags, such as -m for sweeps.",
        ),
        _section(f"Published checkpoints, for {page.weights}=NAME", [("", ", ".join(PUBLISHED))]),
    ]
    return "\n\n".join(parts)


def _recipes() -> list[tuple[str, str]]:
    """The published ones by name, the others with the first sentence of their comment."""
    rows, published = [], []
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        if "_coco" in path.stem:
            published.append(path.stem)
        else:
            comment = path.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
            rows.append((path.stem, re.split(r"(?<=[.?]) ", comment)[0]))
    return [*rows, ("as published", ", ".join(published))]


def _launched(started: str) -> str:
    script = started.removeprefix("python ")
    program = script if script != started else f"--no-python {started}"
    return f"torchrun --nproc_per_node=8 {program} run_dir=RUN ..."


def _lines(title: str, *lines: str) -> str:
    return "\n  ".join([f"{title}:", *lines])


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"{title}:"]
    for left, text in rows:
        indent = " " * (_LEFT if left else 2)
        first = f"  {left}".ljust(_LEFT) if left else indent
        wrapper = TextWrapper(_WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
        lines += wrapper.wrap(text)
    return "\n".join(lines)
