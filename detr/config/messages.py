"""One message for what Hydra and OmegaConf refuse."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from detr.config.moved import moved
from detr.config.overrides import quoted


def message(error: Exception, options: Callable[[], Iterable[str]]) -> str:
    """What to report of an error of Hydra or OmegaConf.

    options: names the options and groups that there are, to suggest one where a name is wrong.
    """
    return _missing(error) or _moved(error) or _misspelt(error, options) or _unreadable(error) or _text(error)


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
    close = [option for option in known if _last(option) == _last(name)]
    if not close and not (close := get_close_matches(name, known, 1)):
        close = [option for option in known if _last(option) in get_close_matches(name, map(_last, known), 1)]
    return f"There is no option {name}. Did you mean {' or '.join(close[:3])}?" if close else None


def _unreadable(error: Exception) -> str | None:
    """What the grammar of the command line does not take."""
    if several := re.match(r"Ambiguous value for argument '(.*?)=(.*)'", str(error)):
        name, value = several.groups()
        return (
            f'{name}={value} has several values. Write {name}=[{value}] for a list, "{name}={quoted(value)}" for one '
            "text with a comma, or add -m to run the command once with each."
        )
    override = getattr(error, "override", None)
    if override is None:
        return None
    name, equals, value = override.partition("=")
    if not equals:
        return f"'{name}' has no value. Write {name}=VALUE."
    return f'{override} cannot be read: {_text(error)}. If it is meant as a text, quote it: "{name}={quoted(value)}"'


def _last(name: str) -> str:
    return re.split("[./]", name)[-1]


def _text(error: Exception) -> str:
    """Everything that the error says, on one line."""
    causes = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    text = " ".join(" ".join(cause.split()) for cause in causes)
    return re.split(" See https://hydra.cc| Config search path:", text)[0]
