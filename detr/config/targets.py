"""What a configuration may build: the dotted paths that `_target_` may name."""

from collections.abc import Callable, Sequence
from typing import Any

import hydra.utils

from detr.errors import UserError

# What a configuration may build. A prefix admits a package's own classes and functions, not what it imports.
FRAMEWORK = ("detr", "datasets", "torchvision.transforms.v2")
# What a configuration inside a checkpoint may build: a file from elsewhere is not to be trusted with more.
MODELS = ("detr.models",)


def resolve(target: Any, path: str, allow: Sequence[str]) -> Callable[..., Any]:
    """The class or function of a dotted path, refused where it is not defined inside an allowed package."""
    refusal = UserError(
        f"{path}._target_: '{target}' is refused, because a configuration could run any code otherwise; allowed are "
        f"classes and functions of {', '.join(allow)}. If you trust it, name its package in allow_targets=[PACKAGE], "
        "or of tools in --allow-targets PACKAGE."
    )
    if not isinstance(target, str) or not _inside(target, allow) or "._" in target:
        raise refusal
    try:
        found = hydra.utils.get_object(target)
    except (ImportError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}._target_: '{target}' does not exist ({reason}). Correct the dotted path.") from None
    if not callable(found) or not _inside(f"{getattr(found, '__module__', '')}.", allow):
        raise refusal
    return found


def _inside(name: str, packages: Sequence[str]) -> bool:
    return any(name.startswith(f"{package}.") for package in packages)
