"""Check a data set before training: python tools/check_data.py OPTION=VALUE ..., with the options of train.py

Writes check.html, which needs nothing else, check.json with the same, and sheet.jpg with annotated images. The page
names the command to train. With data.check=headers no pixels are read, and neither damaged nor similar images found;
with data.check=nothing no image file is read. The exit code is 2 where a training would stop.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # train.py is used from the checkout

from datasets import DetectionDataset, evaluation_loader, hold_out
from datasets.checks import balance_findings, detection_findings, training_findings, validation_findings
from datasets.files import find_files
from datasets.findings import Finding, worst
from datasets.formats import Annotations
from datasets.formats.checks import UNITS
from datasets.image_checks import (
    image_files,
    odd_images,
    repeated_images,
    unusable_images,
)
from detr.cli.exit_codes import exit_codes
from detr.config import build, check_config, compose, explained, plain
from detr.engine import TrainerConfig
from detr.errors import UserError
from detr.images import embedded, jpeg
from detr.reporting import OutputFolder
from detr.reporting.pages import page_template
from detr.reporting.samples import captioned, grid
from tools.data_check import charts, facts, pictures
from tools.data_check.facts import Part
from tools.data_check.recommendation import Choice, command, recommend
from train import BATCHES, build_augmentation, read_annotations, train_loader, unread

PAGE, CONTENT, SHEET = "check.html", "check.json", "sheet.jpg"
_ORDER = ("error", "warning", "note")
_QUALITY = 85  # of JPEG


@dataclass
class Report:
    """All that was found, by part, and what follows from it."""

    findings: dict[str, list[Finding]] = field(default_factory=lambda: {"train": [], "val": []})
    parts: list[Part] = field(default_factory=list)
    augmented: dict[str, Any] | None = None
    choices: list[Choice] = field(default_factory=list)
    command: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """The findings with their parts, the severest first."""
        rows = [{"split": part, **asdict(one)} for part, found in self.findings.items() for one in found]
        return sorted(rows, key=lambda row: _ORDER.index(row["severity"]))

    def summary(self) -> str:
        """In words, how many findings there are."""
        counts = {kind: sum(row["severity"] == kind for row in self.rows()) for kind in _ORDER}
        words = [f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items() if count]
        if counts["error"]:
            return f"Training would stop: {', '.join(words)}."
        return f"Ready to train: {', '.join(words)}." if words else "Ready to train: nothing was found."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="options of train.py")
    parser.add_argument("--output", type=Path, default=Path("data_check"), metavar="DIR", help="where to write to")
    options = parser.parse_intermixed_args(arguments)
    with explained("train"):
        config = compose(["data.check=pixels", *options.overrides, "data.workers=0"])
        if (split := unread(config)) is not None:
            config.data[split] = None
        check_config(config)
    output = OutputFolder(options.output, [PAGE, CONTENT, SHEET], overwrite=True, option="--output DIR")
    report = check(config, options.overrides)
    for part in report.parts:
        if output.folder.resolve().is_relative_to(part.dataset.folder.resolve()):
            raise UserError(
                f"--output {options.output} is in the folder of the images, {part.dataset.folder}: the sheet would "
                "become one of them. Give a folder outside, such as --output data_check."
            )
    for row in report.rows():
        print(f"{row['severity']} ({row['split']}): {row['text']} {row['advice']}")
    _write(report, config, output)
    print(report.summary())
    if report.command:
        print(f"To train: {report.command}")
    print(f"Written: {', '.join(str(output.folder / name) for name in (PAGE, CONTENT, SHEET))}")
    if worst([finding for found in report.findings.values() for finding in found]) == "error":
        raise UserError(f"{report.summary()} See {output.folder / PAGE}.")


def check(config: DictConfig, overrides: Sequence[str] = ()) -> Report:
    """Everything but the writing. overrides: those of the command line, for the command to train."""
    report, data = Report(), config.data
    augmentation, options = build_augmentation(data), TrainerConfig(**plain(config.trainer))
    own = bool(options.overfit_batches)  # it is evaluated on the images that it trains on
    read = _read(data, report.findings, own=own)
    sets: dict[str, DetectionDataset] = {}
    for name, annotations in read.items():
        categories = sets["train"].categories if "train" in sets else None
        with _noted(report.findings[name], "unusable annotations"):
            unreadable = data.unreadable if name == "train" else "stop"
            sets[name] = DetectionDataset(annotations, categories=categories, seed=config.seed, unreadable=unreadable)
            report.findings[name] += sets[name].findings
    files = {
        name: [] if data.check == "nothing" else image_files(one, pixels=data.check == "pixels")
        for name, one in sets.items()
    }
    resizing = {"size": data.size, "max_size": data.max_size, "square": data.square}
    report.parts = [
        Part(
            name=name,
            dataset=one,
            annotated={record.file_name: record for record in read[name].records},
            files=files[name],
            resized=facts.short_sides(one.records, **resizing),
        )
        for name, one in sets.items()
    ]
    _check_images(report, data.check)
    if "train" not in sets:
        return report
    train, val = sets["train"], sets.get("val")
    found = report.findings["train"]
    found += training_findings(train, config.model.get("num_queries"), augmentation.mixed_images)
    found += balance_findings(train)
    if not any(finding.kind in UNITS for finding in found):
        found += facts.tiny_boxes(report.parts[0], data.size)
    with _noted(found, "no training"):
        train_loader(config, options, train, augmentation)
    if val is not None:
        report.findings["val"] += validation_findings(train, val)
        report.findings["val"] += detection_findings(val, config.evaluation.max_dets)
        with _noted(report.findings["val"], "no evaluation"):
            evaluation_loader(val, **{name: data[name] for name in BATCHES})
    report.augmented = facts.augmented(report.parts[0], augmentation)
    if len(train):
        queries = int(config.model.get("num_queries") or 0)
        report.choices = recommend(report.parts[0], report.parts[1] if val is not None else None, overrides, queries)
        split = ["data.split=0.2"] if val is None and data.split is None and not own else []  # as the finding advises
        report.command = command(report.choices, [*overrides, *split])
    return report


def _read(data: DictConfig, findings: dict[str, list[Finding]], *, own: bool) -> dict[str, Annotations]:
    """The parts that can be read, without images whose files are missing.

    own: a training is its own validation, so that there is no such part.
    """
    alone = data.copy()
    alone.split, alone.val = None, None
    read: dict[str, Annotations] = {}
    with _noted(findings["train"], "unreadable annotations"):
        read["train"] = _found(read_annotations(alone)[0], findings["train"])
    if own:
        return read
    if data.split is None:
        with _noted(findings["val"], "unreadable annotations"):
            val = build(data.val, path="data.val")
            if val is None:
                raise UserError("data.val: wanted a reader, got null. Set data.split=0.2 to hold out images.")
            read["val"] = _found(val, findings["val"])
    elif "train" in read:
        with _noted(findings["train"], "no part to hold out"):
            read["train"], read["val"] = hold_out(read["train"], data.split, data.split_seed)
    return read


def _found(annotations: Annotations, findings: list[Finding]) -> Annotations:
    records, missing = find_files(annotations.records, annotations.images, annotations.source)
    findings += missing
    return replace(annotations, records=records)


def _check_images(report: Report, what: str) -> None:
    if what == "nothing":
        return
    usable: dict[str, list[Path]] = {}
    for part in report.parts:
        found = report.findings[part.name]
        found += unusable_images(part.dataset, part.files, replaceable=part.name == "train")
        found += odd_images(part.files)
        usable[part.name] = [(part.dataset.folder / file.name).resolve() for file in part.files if file.problem is None]
    for name, repeated in repeated_images(usable, pixels=what == "pixels").items():
        report.findings[name] += repeated


@contextmanager
def _noted(findings: list[Finding], kind: str) -> Iterator[None]:
    """An error of the user's as a finding, and so what is logged as warnings, but for findings that are logged."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.getMessage())

    kept: list[str] = []
    handler, root = Keep(logging.WARNING), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except UserError as error:
        findings.append(Finding(kind=kind, severity="error", count=1, text=str(error), advice=""))
    finally:
        root.removeHandler(handler)
    known = [str(finding) for finding in findings]
    findings += [
        Finding(kind="reported in reading", severity="warning", count=1, text=text, advice="")
        for text in kept
        if not any(text.endswith(one) for one in known)
    ]


def _write(report: Report, config: DictConfig, output: OutputFolder) -> None:
    drawn = pictures.draw(report.parts, report.findings)
    sheet = [captioned(picture.image, picture.caption) for picture in drawn]
    content = {
        "summary": report.summary(),
        "findings": report.rows(),
        "splits": {part.name: facts.of_part(part) for part in report.parts},
        "training transforms": report.augmented,
        "recommendation": [asdict(choice) for choice in report.choices],
        "command": report.command,
    }
    queries = int(config.model.get("num_queries") or 0)
    first = report.parts[0] if report.parts and report.parts[0].name == "train" else None
    template = page_template("check.html.j2", Path(__file__).parent / "data_check")
    page = template.render(
        **{key.replace(" ", "_"): value for key, value in content.items()},
        size=config.data.size,
        check=config.data.check,
        charts={}
        if first is None
        else {"objects": charts.objects_chart(first, queries), "sides": charts.sides_chart(first, config.data.size)},
        pictures=[(embedded(picture.image, _QUALITY), picture.caption) for picture in drawn],
        today=date.today(),
    )
    output.write(CONTENT, json.dumps(content, indent=2, ensure_ascii=False).encode())
    output.write(PAGE, page.encode())
    output.write(SHEET, jpeg(grid(sheet, columns=4) if sheet else Image.new("RGB", (1, 1)), _QUALITY))


if __name__ == "__main__":
    with exit_codes():
        main()
