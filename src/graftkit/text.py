"""Text for people: foreign text made printable, and hints for misspelled names."""

import difflib
import re
from collections.abc import Iterable

# What moves the cursor, changes colours, begins a line, or turns the direction of letters around:
# C0, DEL and C1; line and paragraph separators; bidirectional controls; halves of characters.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str, *, keep: str = "") -> str:
    """With escapes, such as \\x1b, in place of control characters, except those in `keep`."""

    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else ascii(match[0])[1:-1]

    return _CONTROLS.sub(escaped, text)


def nearest_name(name: str, names: Iterable[str], prefix: str = "") -> str:
    """A hint such as "; did you mean density?" to end a message with, empty where none is near.

    Args:
        name: what was written. names: what may be written there.
        prefix: put in front of the name that is proposed.
    """
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
