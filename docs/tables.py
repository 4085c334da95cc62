"""What README.md and the pages show of benchmarks/results.json and of the code.

A comment in a page, show("NAME"), calls one of these functions. `make tables` puts what it returns below the comment.
"""

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import fill

from benchmarks.results import Record, load, markdown
from detr.published import PUBLISHED

# AP on COCO val of those whose files have no name here: Zhang et al., ICLR 2023; Huang et al., CVPR 2025.
AP_OF_PAPERS = {"dino": 49.0, "deim_s": 49.0}
FAST_FIRST = {
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
    columns = {"parameters, million": number("parameters", ".2f"), "latency, ms": number("deployed", ".0f")}
    lines = [["`model=`", "published AP on COCO val", *columns]]
    for name, file in FAST_FIRST.items():
        ap = AP_OF_PAPERS[name] if file is None else PUBLISHED[file].ap
        lines.append([f"`{name}`", f"{ap:.1f}", *(cell(measured[name]) for cell in columns.values())])
    return markdown(lines)


def in_short() -> str:
    cells = load("random weights")["bccd"]
    matching = [record.row("forward").gain or 0 for record in load("criterion").values()]
    [coco] = load("evaluation").values()
    text = (
        f"From random weights on a CPU, `model=small` reaches AP {AP(cells)} (AP50 {AP50(cells)}) on 292 photographs "
        f"of blood cells in {cells.value('time'):.0f} minutes of one core. Matching with its losses takes "
        f"{min(matching):.0f} to {max(matching):.0f} times less time than in the published code, and COCO's metrics "
        f"{coco.rows[0].gain:.0f} times less. [What else was measured](docs/results.md)."
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
    return _side_by_side({"recipes on shapes": "shapes", "recipes on bccd": "blood cells"}, columns)


def attention_blocks() -> str:
    groups = {"attention on shapes": "shapes", "attention on blood cells": "blood cells"}
    return _side_by_side(groups, {"AP": spread("AP")})


def little_data() -> str:
    columns = {"AP": spread("AP"), "AP50": AP50, "minutes": number("time", ".1f")}
    return _table("little data", columns, first="`experiment=bccd trainer.precision=bf16` and", labels=LITTLE_DATA)


def speed() -> str:
    """What the published code was measured beside."""
    kept = {
        "criterion": ("matching and losses", "forward"),
        "transforms": ("", "reading and transforming"),
        "step": ("training step", "speed"),
        "evaluation": ("COCO metrics, published by pycocotools", "time; published is pycocotools"),
    }
    lines = [["", "ours", "published", "gain"]]
    records: list[Record] = []
    for benchmark, (about, quantity) in kept.items():
        for case, record in load(benchmark).items():
            row = record.row(quantity)
            values = [f"{_plain(value)} {row.unit}" for value in (row.ours, row.published)]
            lines.append([f"{about}: {case}" if about else case, *values, f"{_plain(row.gain, '#.2g')}x"])
            records.append(record)
    return _with_source(markdown(lines), records)


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
    return _table("loading", columns, first="loader")


def mixing() -> str:
    columns = {
        "samples/s of one process": number("speed of one process"),
        "time of a sample": number("time", ".1f", "x"),
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
    return _table("saving", columns)


def elastic() -> str:
    columns = {
        "as usual: s": number("step as usual"),
        "elastic: s": number("elastic step"),
        "sent by each: MiB": number("sent by each", ".1f"),
    }
    return _table("elastic", columns)


def attention() -> str:
    """On the largest map."""

    def beside(quantity: str) -> Cell:
        def cell(record: Record) -> str:
            row = record.row(quantity)
            return f"{_plain(row.ours)} of {_plain(row.published)}, {_plain(row.gain, '#.2g')}x"

        return cell

    columns = {"extra memory, MiB": beside("extra memory"), "seconds": beside("forward and backward")}
    records = load("attention")
    labels = {case: case.removesuffix(", 96x96") for case in records if case.endswith(", 96x96")}
    return _table("attention", columns, labels=labels)


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
    return _table("runtimes of small", columns)


def serving() -> str:
    columns = {
        "images/s": number("speed", ".1f"),
        "half of the answers within, ms": number("half of the answers within", ".0f"),
        "99 % within, ms": number("99 % of the answers within", ".0f"),
        "memory after 100 requests, MiB": number("memory after 100 requests", ".0f"),
        "after 1,000 more": number("memory after 1,000 more", ".0f"),
    }
    return _table("serving", columns)


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
    lines = {case: [name, *(cell(records[case]) for cell in columns.values())] for case, name in names.items()}
    lines = {case: line for case, line in lines.items() if any(line[1:])}
    return _with_source(markdown([[first, *columns], *lines.values()]), [records[case] for case in lines])


def _side_by_side(groups: Mapping[str, str], columns: Mapping[str, Cell]) -> str:
    """The same cases of several benchmarks."""
    records = {group: load(group) for group in groups}
    head = [f"{name}: {column}" for name in groups.values() for column in columns]
    cases = dict.fromkeys(case for group in records.values() for case in group)
    lines = [
        [f"`{case}`", *(cell(of[case]) if case in of else "" for of in records.values() for cell in columns.values())]
        for case in cases
    ]
    return _with_source(markdown([["", *head], *lines]), [record for of in records.values() for record in of.values()])


def _with_source(table: str, records: Iterable[Record]) -> str:
    """The table, and by which commands, when and where its values were measured."""
    sources = dict.fromkeys((f"`{record.command}`", record.date, record.machine) for record in records)
    commands: dict[tuple[str, str], list[str]] = {}
    for command, date, machine in sources:
        commands.setdefault((date, machine), []).append(command)
    lines = [f"{', '.join(given)}: {machine}, {date}." for (date, machine), given in commands.items()]
    return "\n\n".join([table, *(f"*{line}*" for line in lines)])


def _plain(value: float | None, form: str = "#.3g") -> str:
    """Without an exponent, and without a point at the end."""
    assert value is not None
    text = f"{value:{form}}"
    return (f"{value:.0f}" if "e" in text and abs(value) >= 1 else text).removesuffix(".")
