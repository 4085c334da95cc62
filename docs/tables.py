"""What README.md and the pages show of benchmarks/results.json and of the code.

A comment in a page, show("NAME"), calls one of these functions. `make tables` puts what it returns below the comment.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill

from benchmarks.results import Record, load, markdown
from detr.published import PUBLISHED

# AP on COCO val of those whose files have no name here: Zhang et al., ICLR 2023; Huang et al., CVPR 2025.
AP_OF_PAPERS = {"dino": 49.0, "deim_s": 49.0}
FAST_FIRST = {  # the models of the overview, with the names of their checkpoints
    "d_fine_n": "d_fine_n",
    "d_fine_s": "d_fine_s",
    "deim_s": None,
    "rt_detr_r18": "rt_detr_r18",
    "detr": "detr_r50",
    "deformable_detr": "deformable_detr_r50",
    "dino": None,
}
LITTLE_DATA = {
    "as it is": "nothing more",
    "no denoising": "`~model/denoising`",
    "two maps": "two maps: `model.backbone.features=[8,16] model.neck.num_levels=2`",
    "ImageNet": "two maps of EfficientNet-Lite0 with weights from ImageNet, first stages frozen, fp32",
    "moving average": "`trainer.ema=0.995`",
    "mosaic": "mosaic up to the last epoch: `data/mixing=[mosaic] model.num_queries=120 data.plain_after=0.75`",
}
TRAININGS = {
    "quickstart": "`experiment=quickstart`: 4,000 generated images of 1 to 5 shapes, 4 epochs",
    "bccd": "`experiment=bccd trainer.precision=bf16`: 292 photographs of blood cells, 27 epochs",
    "overfit": "`experiment=overfit trainer.max_steps=300`: 8 photographs of COCO, evaluated on the same 8",
}
MASKS = {
    "detr": "`experiment=quickstart model/masks=detr`",
    "dot_product": "`experiment=quickstart model/masks=dot_product trainer.epochs=3`",
    "overfit": "`experiment=overfit model=small model/masks=dot_product data.size=160 trainer.max_steps=200`: on the 8",
}
# Where the code of each topic is; a message belongs to the first that its file begins with.
TOPICS = {
    "Annotations": ("datasets/formats", "detr/annotations.py", "detr/contents.py"),
    "Images and augmentation": ("datasets", "detr/images.py", "detr/depth.py", "detr/types.py", "detr/masks.py"),
    "Options": ("detr/config", "detr/ranges.py", "detr/cli/agreement.py"),
    "Models and losses": ("detr/models", "detr/losses", "detr/postprocess.py", "detr/panoptic.py"),
    "Weights and checkpoints": ("detr/weights", "detr/archive.py", "detr/files.py"),
    "Training": ("detr/engine", "train.py"),
    "Machines and processes": ("detr/cli/devices.py", "detr/distributed.py"),
    "Folders and logs": ("detr/cli", "detr/reporting"),
    "Evaluation": ("detr/evaluation", "evaluate.py"),
    "Prediction": ("detr/detector.py", "predict.py", "detr/videos.py", "detr/drawing.py", "detr/classes.py"),
    "Export": ("detr/export", "export.py"),
    "Tools": ("tools",),
}
REPOSITORY = Path(__file__).resolve().parents[1]
Cell = Callable[[Record], str]


def show(name: str) -> None:
    print(f"\n{globals()[name]()}\n")


def number(quantity: str, form: str = "#.3g", unit: str = "") -> Cell:
    def cell(record: Record) -> str:
        found = record.find(quantity)
        return "" if found is None else f"{_plain(found.ours, form)}{unit}"

    return cell


def fastest_and_median(quantity: str) -> Cell:
    def cell(record: Record) -> str:
        found = [record.find(f"{quantity}, {which}") for which in ("fastest", "median")]
        return ", ".join(f"{row.ours:.0f}" for row in found if row is not None)

    return cell


def spread(quantity: str) -> Cell:
    def cell(record: Record) -> str:
        return f"{record.value(quantity):.3f} ± {record.value(f'{quantity}, deviation'):.3f}"

    return cell


AP, AP50 = number("AP", ".3f"), number("AP50", ".3f")


def models() -> str:
    measured = load("latency")
    columns = {"parameters, million": number("parameters", ".2f"), "CPU latency, ms": number("deployed", ".0f")}
    lines = [["`model=`", "published AP on COCO val", *columns]]
    for name, file in FAST_FIRST.items():
        ap = AP_OF_PAPERS[name] if file is None else PUBLISHED[file].ap
        lines.append([f"`{name}`", f"{ap:.1f}", *(cell(measured[name]) for cell in columns.values())])
    return markdown(lines)


def in_short() -> str:
    cells = load("random weights")["bccd"]
    matching = [record.row("forward and backward").gain or 0 for record in load("criterion").values()]
    [coco], [step, *_] = load("evaluation").values(), load("step").values()
    text = (
        f"From random weights on a CPU, `experiment=bccd trainer.precision=bf16` reaches AP {AP(cells)} "
        f"(AP50 {AP50(cells)}) on 292 photographs of blood cells in {cells.value('time'):.0f} minutes of one core. "
        f"Matching with its losses takes {min(matching):.0f} to {max(matching):.0f} times less time than in the "
        f"published code, and COCO's metrics {coco.rows[0].gain:.0f} times less; a whole training step on a CPU is as "
        f"fast as the published one ({_plain(step.row('speed').gain, '.2f')}x). "
        "[What else was measured](docs/results.md)."
    )
    return fill(text, 130, break_on_hyphens=False)


def messages() -> str:
    """Every message of exit code 2, by topic, with … for what it fills in."""
    folders = [REPOSITORY / name for name in ("datasets", "detr", "tools")]
    files = [*REPOSITORY.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    found: dict[str, set[str]] = {topic: set() for topic in TOPICS}
    for file in files:
        said = {_message(node) for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))}
        if said := {text for text in said if len(text) > 20}:  # else all is filled in
            path = file.relative_to(REPOSITORY).as_posix()
            found[next(topic for topic, starts in TOPICS.items() if path.startswith(starts))] |= said
    lines: list[str] = []
    for topic, said in found.items():
        lines += [
            f"## {topic}",
            "",
            *(f"- `{text}`" for text in sorted(said, key=lambda text: text.lstrip("…: '"))),
            "",
        ]
    return "\n".join(lines).strip()


def _message(node: ast.AST) -> str:
    """The text of UserError(...), empty for any other code."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError"):
        return ""
    parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
    return re.sub("…+", "…", " ".join(text.replace("`", "'").split()))


def published() -> str:
    """The checkpoints that have a name."""
    lines = [["name", "options that it brings", "published AP", "size"]]
    for name, one in PUBLISHED.items():
        size = "not known" if one.size is None else f"{one.size / 1e6:.0f} MB"
        lines.append([f"`{name}`", f"`{one.options}`", f"{one.ap:.1f}", size])
    return markdown(lines)


def random_weights() -> str:
    columns = {"AP": AP, "AP50": AP50, "minutes of one core": number("time", ".0f")}
    return _table("random weights", columns, first="`train.py`", labels=TRAININGS)


def masks() -> str:
    columns = {"AP of boxes": AP, "AP of masks": number("mask_AP", ".3f"), "AP50 of masks": number("mask_AP50", ".3f")}
    return _table("masks", columns, first="`train.py`", labels=MASKS)


def recipes_compared() -> str:
    columns = {"AP": AP, "AP50": AP50, "images/s": number("speed", ".1f"), "GiB": number("peak memory", ".2f")}
    return _side_by_side("`model=`", {"recipes on shapes": "shapes", "recipes on bccd": "blood cells"}, columns)


def attention_blocks() -> str:
    groups = {"attention on shapes": "shapes", "attention on blood cells": "blood cells"}
    return _side_by_side("`model/attention=`", groups, {"AP": spread("AP")})


def little_data() -> str:
    columns = {"AP": spread("AP"), "AP50": AP50, "minutes": number("time", ".1f")}
    return _table("little data", columns, first="`experiment=bccd trainer.precision=bf16` and", labels=LITTLE_DATA)


def speed() -> str:
    """What the published code was measured beside."""
    kept = {
        "criterion": ("matching and losses, {}: ms", "forward and backward"),
        "transforms": ("reading and transforming {}: images/s, more is better", "reading and transforming"),
        "step": ("training step, {}: images/s, more is better", "speed"),
        "evaluation": ("COCO's metrics beside pycocotools, {}: s", "time; published is pycocotools"),
    }
    lines = []
    for benchmark, (about, quantity) in kept.items():
        for case, record in load(benchmark).items():
            row = record.row(quantity)
            cells = [about.format(case), _plain(row.ours), _plain(row.published), _plain(row.gain, "#.2g")]
            lines.append((record, cells))
    return _with_sources(["", "ours", "published", "times faster"], lines)


def steps() -> str:
    columns = {"seconds": number("training step"), "peak memory, GiB": number("peak memory", ".1f")}
    return _table("recipes", columns, first="`model=`", code=True)


def latency() -> str:
    columns = {
        "milliseconds": number("deployed", ".0f"),
        "as it trains": number("as it trains", ".0f"),
        "parameters, million": number("parameters", ".2f"),
        "GFLOPs": number("operations", ".1f"),
    }
    return _table("latency", columns, first="`model=`", labels={name: f"`{name}`" for name in FAST_FIRST})


def loading() -> str:
    columns = {"waiting for data, % of the time": number("waiting", ".0f")}
    labels = {case: case.partition(" ")[0] for case in load("loading") if "worker" in case}
    return _table("loading", columns, first="`data.workers`", labels=labels)


def mixing() -> str:
    columns = {
        "samples/s of one process": number("speed of one process"),
        "time, relative to single images": number("time", ".1f"),
    }
    return _table("loading", columns, first="augmentation")


def batches() -> str:
    columns = {
        "padding, %": number("padding, as drawn", ".0f"),
        "with `data.group_by_aspect=true`": number("padding, grouped", ".0f"),
    }
    return _table("loading", columns, first="photographs")


def saving() -> str:
    columns = {
        "MiB": number("size", ".0f"),
        "until training goes on: s": number("until training goes on", ".2f"),
        "until it is on the disk: s": number("until it is on the disk", ".2f"),
    }
    return _table("saving", columns, first="what is saved")


def elastic() -> str:
    columns = {
        "as usual: s": number("step as usual"),
        "elastic: s": number("elastic step"),
        "sent by each: MiB": number("sent by each", ".1f"),
    }
    return _table("elastic", columns, first="processes")


def attention() -> str:
    """On the largest map."""

    def of(quantity: str, which: str, form: str = "#.3g") -> Cell:
        return lambda record: _plain(getattr(record.row(quantity), which), form)

    columns = {
        "extra memory, MiB": of("extra memory", "ours"),
        "of the other form": of("extra memory", "published"),
        "times less": of("extra memory", "gain", "#.2g"),
        "seconds": of("forward and backward", "ours"),
        "of the other form ": of("forward and backward", "published"),
        "times faster": of("forward and backward", "gain", "#.2g"),
    }
    labels = {case: case.removesuffix(", 96x96") for case in load("attention") if case.endswith(", 96x96")}
    return _table("attention", columns, first="block", labels=labels)


def padding() -> str:
    columns = {
        "parameters": number("parameters", ".1f", " M"),
        "sides are multiples of": number("sides are multiples of", ".0f"),
        "farthest quarter": number("change by padding, farthest quarter", ".2f"),
        "all cells": number("change by padding, all cells", ".2f"),
    }
    return _table("padding", columns, first="`model.backbone.name`", code=True)


def exported_files() -> str:
    columns = {
        "AP": number("AP", ".4f"),
        "MiB": number("size", ".1f"),
        "difference of scores, on average": number("difference of scores", ".2g"),
        "of corners, pixels": number("difference of boxes", ".2g"),
    }
    return _table("exported files", columns, first="file")


def runtimes() -> str:
    columns = {
        "parameters": number("parameters", unit=" M"),
        "GFLOPs": number("operations"),
        **{name: fastest_and_median(name) for name in ("eager", "torch.compile", "ONNX Runtime", "OpenVINO")},
        "file: MiB": number("file", ".0f"),
    }
    return _table("runtimes", columns, first="`model=`", code=True)


def runtimes_of_small() -> str:
    columns = {f"{precision}: ms": fastest_and_median(precision) for precision in ("fp32", "int8")}
    return _table("runtimes of small", columns, first="runtime")


def serving() -> str:
    columns = {
        "images/s": number("speed", ".1f"),
        "half of the answers within, ms": number("half of the answers within", ".0f"),
        "99 % within, ms": number("99 % of the answers within", ".0f"),
        "memory after 100 requests, MiB": number("memory after 100 requests", ".0f"),
        "after 1,000 more": number("memory after 1,000 more", ".0f"),
    }
    return _table("serving", columns, first="server")


def _table(
    benchmark: str,
    columns: Mapping[str, Cell],
    *,
    first: str = "",
    labels: Mapping[str, str] | None = None,
    code: bool = False,
) -> str:
    """A line for each case that has one of the values, with the command and the machine below.

    first: the head of the column of cases. labels: what is shown of which cases; of all of them their names by default,
    as code where `code`.
    """
    records = load(benchmark)
    names = labels or {case: f"`{case}`" if code else case for case in records}
    lines = [
        (records[case], [name, *(cell(records[case]) for cell in columns.values())]) for case, name in names.items()
    ]
    filled = [(record, line) for record, line in lines if any(line[1:])]
    return _with_sources([first, *columns], filled)


def _side_by_side(first: str, groups: Mapping[str, str], columns: Mapping[str, Cell]) -> str:
    """The same cases of several benchmarks."""
    records = {group: load(group) for group in groups}
    head = [first, *(f"{name}: {column}" for name in groups.values() for column in columns)]
    cases = dict.fromkeys(case for group in records.values() for case in group)
    lines = [
        [f"`{case}`", *(cell(of[case]) if case in of else "" for of in records.values() for cell in columns.values())]
        for case in cases
    ]
    sources = dict.fromkeys(_source(record) for of in records.values() for record in of.values())
    return "\n\n".join([markdown([head, *lines]), *(f"*{source}*" for source in sources)])


def _with_sources(head: list[str], lines: Sequence[tuple[Record, list[str]]]) -> str:
    """A table, and below it by which commands, when and where its values were measured: by line, if that differs."""
    sources = list(dict.fromkeys(_source(record) for record, _ in lines))
    marks = dict(zip(sources, "¹²³⁴⁵⁶", strict=False)) if len(sources) > 1 else dict.fromkeys(sources, "")
    shown = [[f"{line[0]} {marks[_source(record)]}".rstrip(), *line[1:]] for record, line in lines]
    return "\n\n".join([markdown([head, *shown]), *(f"{mark} *{source}*".strip() for source, mark in marks.items())])


def _source(record: Record) -> str:
    return f"`{record.command}`: {record.machine}, {record.date}."


def _plain(value: float | None, form: str = "#.3g") -> str:
    """Without an exponent, and without a point at the end."""
    assert value is not None
    text = f"{value:{form}}"
    return (f"{value:.0f}" if "e" in text and abs(value) >= 1 else text).removesuffix(".")
