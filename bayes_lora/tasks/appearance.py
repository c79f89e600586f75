"""What a text looks like: equal for texts that a reader cannot tell apart, though their characters differ."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

__all__ = ["appearance", "merge_alike"]

# Soft hyphen, zero-width space, word joiner, byte-order mark, marks of direction, variation selectors.
INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff]")
# Joiners show between letters of scripts that join, and between emoji.
JOINERS = re.compile("(?<![^\\x00-\\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\\x00-\\x7f])")
RAISED = ("<super>", "<sub>")


def appearance(text: str) -> str:
    """Return a text that is equal for texts that look the same.

    It is in the Unicode form NFKC, in which an accented letter is one character and full-width letters are ordinary
    ones, without characters that take no room, and with single spaces. Case is kept, and so are exponents and indices,
    which NFKC would make ordinary digits.
    """
    if text.isascii():
        return " ".join(text.split())
    text = JOINERS.sub("", INVISIBLE.sub("", text))
    raised = [letter for letter in text if unicodedata.decomposition(letter).startswith(RAISED)]
    return "\0".join([" ".join(unicodedata.normalize("NFKC", text).split()), *raised])


def merge_alike(options: Sequence[str], answer: int) -> tuple[tuple[str, ...], int]:
    """Return the first of the options that look the same, and the index of the answer among them."""
    first: dict[str, str] = {}
    for option in options:
        first.setdefault(appearance(option), option)
    return tuple(first.values()), list(first).index(appearance(options[answer]))
