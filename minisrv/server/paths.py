"""The path of a request, without a prefix that a proxy in front of the server has left there.

Knows: ASGI.
"""

from __future__ import annotations

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """Return the path for which a route is looked up, as Starlette does: without the `root_path` of
    the scope, if it begins with that. What is checked of a request by its path must go by this."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    if not prefix or not path.startswith(prefix):
        return path
    rest = path[len(prefix) :]
    return rest if rest[:1] in ("", "/") else path
