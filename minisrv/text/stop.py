"""Finds stop strings in text that arrives in pieces.

The result does not depend on how the text is cut into pieces: a text ends at the first character
that completes a stop string, and is cut where the longest stop string completed there begins, or
behind it.

Knows: characters. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string, which it holds back.

    Only the longest suffix of the text that begins a stop string is held back. This costs a few
    operations per character and stop string (Knuth-Morris-Pratt).

    include_stop: whether the stop string is let through too.
    found: once stopped, the stop string.
    rest: once stopped, the text behind the stop string in the piece that completed it.
    """

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._include_stop = include_stop
        self._stop = [(pattern, _failure_table(pattern)) for pattern in stop]
        self._matched = [0] * len(self._stop)
        self._held = ""
        self.stopped = False
        self.found = ""
        self.rest = ""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Add text; return what is certain not to belong to a stop string.

        may_stop: whether a stop string that this text completes counts.
        """
        text = self._held + text
        done = len(self._held)
        for end in range(done, len(text)):
            if (cut := self._step(text[end])) and may_stop:
                self.stopped = True
                self._held = ""
                self.found = text[end + 1 - cut : end + 1]
                self.rest = text[end + 1 :]
                return text[: end + 1 - (0 if self._include_stop else cut)]
        safe = len(text) - max(self._matched, default=0)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """End the text; return what was held back."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> int:
        """Advance every pattern by a character; return the length of the longest complete one, or
        0."""
        complete = 0
        for i, (pattern, failure) in enumerate(self._stop):
            matched = self._matched[i]
            while matched and pattern[matched] != char:
                matched = failure[matched - 1]
            if pattern[matched] == char:
                matched += 1
            if matched == len(pattern):
                complete = max(complete, matched)
                matched = failure[matched - 1]
            self._matched[i] = matched
        return complete


def _failure_table(pattern: str) -> list[int]:
    """Return for each prefix the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table
