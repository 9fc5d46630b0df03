"""Checks of a query string, whose parameters are as strict as the fields of a body.

Knows: Starlette's requests. Knows no parameter.
"""

from __future__ import annotations

from starlette.requests import Request

from minisrv.errors import RequestError, name_hint, shown


def check_names(request: Request, *known: str) -> None:
    """Raise RequestError for a parameter of the query string that is none of those known."""
    for name in request.query_params:
        if name not in known:
            hint = name_hint(name, known) if known else "there are none."
            raise RequestError(f"{shown(name)} is no parameter of this path; {hint}", param=name)


def check_once(request: Request, *names: str) -> None:
    """Raise RequestError if the query string has one of these parameters twice."""
    for name in names:
        if len(request.query_params.getlist(name)) > 1:
            raise RequestError(f"{name} may be given once.", param=name)
