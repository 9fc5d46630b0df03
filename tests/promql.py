"""A parser of the part of PromQL that the dashboard and the alerting rules use.

It checks the grammar, the names of functions, and that functions of a range are given one, and
tells which series and labels an expression reads. Anything else is refused, also where Prometheus
would take it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

AGGREGATIONS = {"sum": 1, "max": 1, "min": 1, "avg": 1, "count": 1, "topk": 2}
"""Numbers of arguments; the last one is a vector."""
OF_RANGES = {"rate", "increase", "min_over_time", "max_over_time"}
OPERATORS = {"+", "-", "*", "/", "==", "!=", ">", "<", ">=", "<=", "and", "or", "unless"}

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>\d+(?:\.\d+)?(?![\d.a-z]))|(?P<range>\[\d+[smhd]\])"""
    r"""|(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)|(?P<text>"[^"]*")|(?P<sign>=~|!~|==|!=|>=|<=|[-+*/(){},=<>]))"""
)


class PromQLError(Exception):
    """The expression cannot be parsed."""


@dataclass
class Read:
    """What an expression reads.

    selectors: the names of series with the labels by which they are chosen.
    grouped: the labels by which anything is grouped or matched.
    """

    selectors: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    grouped: set[str] = field(default_factory=set)


def parse(expression: str) -> Read:
    """Return what an expression reads. Raises PromQLError."""
    parser = _Parser(expression)
    if parser.expression():
        raise PromQLError(f"a range is no result: {expression}")
    if parser.next_kind:
        raise PromQLError(f"{parser.next!r} is not expected: {expression}")
    return parser.read


class _Parser:
    def __init__(self, expression: str) -> None:
        self.read = Read()
        self._text = expression
        self._tokens: list[tuple[str, str]] = []
        position = 0
        while expression[position:].strip():
            match = _TOKEN.match(expression, position)
            if match is None or match.lastgroup is None:
                raise PromQLError(f"{expression[position:]!r} is no token: {expression}")
            self._tokens.append((match.lastgroup, match[match.lastgroup]))
            position = match.end()
        self._place = 0

    @property
    def next_kind(self) -> str:
        return self._tokens[self._place][0] if self._place < len(self._tokens) else ""

    @property
    def next(self) -> str:
        return self._tokens[self._place][1] if self.next_kind else ""

    def _take(self, wanted: str = "", kind: str = "") -> str:
        token = self.next
        if not token or (wanted and token != wanted) or (kind and self.next_kind != kind):
            raise PromQLError(f"{token!r} in place of {wanted or kind}: {self._text}")
        self._place += 1
        return token

    def _names(self) -> set[str]:
        names = set()
        self._take("(")
        while self.next != ")":
            names.add(self._take(kind="name"))
            if self.next != ")":
                self._take(",")
        self._take(")")
        return names

    def expression(self) -> bool:
        """Parse an expression, and return whether it is a range."""
        is_range = self._operand()
        while self.next in OPERATORS:
            operator = self._take()
            if self.next in ("on", "ignoring"):
                self._take()
                self.read.grouped |= self._names()
            if self._operand() or is_range:
                raise PromQLError(f"{operator} of a range: {self._text}")
        return is_range

    def _operand(self) -> bool:
        if self.next_kind == "number":
            self._take()
            return False
        if self.next == "(":
            self._take()
            is_range = self.expression()
            self._take(")")
            return is_range
        name = self._take(kind="name")
        if name in AGGREGATIONS:
            self._aggregation(name)
            return False
        if self.next == "(":
            self._call(name)
            return False
        labels = set()
        if self.next == "{":
            self._take()
            while self.next != "}":
                labels.add(self._take(kind="name"))
                if self._take(kind="sign") not in ("=", "!=", "=~", "!~"):
                    raise PromQLError(f"a label is compared in another way: {self._text}")
                re.compile(self._take(kind="text").strip('"'))
                if self.next != "}":
                    self._take(",")
            self._take("}")
        self.read.selectors.append((name, frozenset(labels)))
        if self.next_kind == "range":
            self._take()
            return True
        return False

    def _aggregation(self, name: str) -> None:
        if self.next in ("by", "without"):
            self._take()
            self.read.grouped |= self._names()
        if any(self._arguments(AGGREGATIONS[name])):
            raise PromQLError(f"{name} of a range: {self._text}")

    def _call(self, name: str) -> None:
        if name == "histogram_quantile":
            if any(self._arguments(2)):
                raise PromQLError(f"{name} of a range: {self._text}")
        elif name in OF_RANGES:
            if not all(self._arguments(1)):
                raise PromQLError(f"{name} needs a range: {self._text}")
        else:
            raise PromQLError(f"there is no function {name}: {self._text}")

    def _arguments(self, number: int) -> list[bool]:
        """Parse arguments, and return whether each is a range."""
        self._take("(")
        found = [self.expression()]
        while self.next == ",":
            self._take()
            found.append(self.expression())
        self._take(")")
        if len(found) != number:
            raise PromQLError(f"{len(found)} arguments in place of {number}: {self._text}")
        return found
