"""Modules import only from the floors below their own."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# The first matching prefix decides.
FLOORS = (
    ("detr.errors", 0),
    ("detr.types", 0),
    ("detr.boxes", 0),
    ("detr.classes", 0),
    ("detr.masks", 0),
    ("detr.memory", 0),
    ("detr.edges", 0),
    ("detr.segments", 0),
    ("detr.distributed", 0),
    ("detr.images", 0),
    ("detr.depth", 0),
    ("detr.annotations", 0),
    ("detr.archive", 0),
    ("detr.contents", 0),
    ("detr.drawing", 0),
    ("detr.text", 0),
    ("detr.videos", 0),
    ("detr.files", 0),
    ("detr.folders", 0),
    ("detr.published", 0),
    ("detr.ranges", 0),
    ("detr.notebook", 0),
    ("detr.renaming", 0),
    ("detr.version", 0),
    ("detr.models.detr", 2),
    ("detr.models.attention_maps", 2),
    ("detr.models", 1),
    ("detr.losses", 1),
    ("detr.postprocess", 1),
    ("detr.panoptic", 1),
    ("datasets", 1),
    ("detr.weights", 2),
    ("detr.evaluation", 2),
    ("detr.reporting", 2),
    ("detr.export", 2),
    ("detr.engine", 3),
    ("detr.config", 4),
    ("detr.detector", 5),
    ("detr.cli", 6),
    ("detr", 7),  # the package itself only hands names on
)
MODULES = sorted(
    [*(REPOSITORY / "detr").rglob("*.py"), *(REPOSITORY / "datasets").rglob("*.py")],
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module: str) -> int:
    return next(floor for prefix, floor in FLOORS if module == prefix or module.startswith(prefix + "."))


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    modules = {name_of(module) for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in modules else node.module for name in full)
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_only_from_lower_floors(path: Path) -> None:
    module = name_of(path)
    for imported in imports_of(path):
        root = imported.split(".")[0]
        if root == "torch" and imported.startswith("torch.distributed"):
            assert module == "detr.distributed", f"{module} imports {imported}"
        if root in ("hydra", "omegaconf"):
            assert module.startswith("detr.config"), f"{module} imports {imported}"
        if root not in ("detr", "datasets"):
            continue
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        same_room = package != "detr" and imported.startswith(package)
        assert same_room or floor_of(imported) <= floor_of(module), f"{module} imports {imported}"
        assert not (root == "datasets" and module.startswith("detr")), f"{module} imports datasets"
        if module.startswith("datasets") and root == "detr":
            assert floor_of(imported) == 0, f"{module} imports {imported}"
