"""One message for what Hydra and OmegaConf refuse."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from detr.config.moved import moved


def message(error: Exception, options: Callable[[], Iterable[str]]) -> str:
    """What to report of an error of Hydra or OmegaConf.

    options: names the options and groups that there are, to suggest one where a name is wrong.
    """
    return _missing(error) or _moved(error) or _misspelt(error, options) or _text(error)


def _missing(error: Exception) -> str | None:
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key
    elif isinstance(error, InterpolationToMissingValueError):
        key = str(error).splitlines()[0].rpartition(": ")[2].strip("'")
    else:
        return None
    return f"The option {key} has no value. Set {key}=... on the command line."


def _moved(error: Exception) -> str | None:
    return next((text for name in re.findall(r"'([\w./]+)'", str(error)) if (text := moved(name))), None)


def _misspelt(error: Exception, options: Callable[[], Iterable[str]]) -> str | None:
    found = re.match(r"Could not override '([\w./]+)'", str(error))
    if not found:
        return None
    name, known = found[1], list(options())
    same = [option for option in known if _last(option) == _last(name)]
    close = same if len(same) == 1 else get_close_matches(name, known, 1)
    return f"There is no option {name}. Did you mean {close[0]}?" if close else None


def _last(name: str) -> str:
    return re.split("[./]", name)[-1]


def _text(error: Exception) -> str:
    """Everything that the error says, on one line."""
    causes = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    return " ".join(" ".join(cause.split()) for cause in causes)
