"""Text of foreign files, such as class names and file names, as it may be shown."""

import re

# Control characters, which command a terminal; line and paragraph separators; marks that reverse the direction of what
# follows; halves of surrogate pairs, which no encoding has.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""One line of text with an escape, such as \x1b, in place of each character that cannot or must not be printed."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def printable_lines(text: str) -> str:
    """Likewise of a text whose lines and tabs are meant."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
