"""A tiny text grammar.

Knows: `[a|b]` picks one (nestable), `{slot}` inserts a value, `{Slot}` inserts it capitalised,
`a(n)` becomes the right article. Does not know any text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([aA])\(n\) (\w)")


def expand(template: str, slots: Mapping[str, str], rng: random.Random) -> str:
    """The template's text with one choice taken at every bracket."""
    while "[" in template:
        template = _CHOICE.sub(lambda m: rng.choice(m[1].split("|")), template)

    def insert(match: re.Match[str]) -> str:
        name = match[1]
        if name in slots:
            return slots[name]
        value = slots[name[0].lower() + name[1:]]
        return value[0].upper() + value[1:]

    text = _SLOT.sub(insert, template)
    return _ARTICLE.sub(lambda m: m[1] + ("n " if m[2] in "aeiouAEIOU" else " ") + m[2], text)
