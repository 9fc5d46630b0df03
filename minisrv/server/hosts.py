"""The host names that a server answers to: the values that a request's `Host` header may have.

A web page can make its own host name resolve to 127.0.0.1 as soon as a browser has loaded the page
(DNS rebinding). To the browser, a server at that address then has the page's origin: scripts may
send it any request and read its responses. Only the `Host` header gives them away. So a server that
listens on a loopback address and asks for no API key answers to this machine's names alone. A
server that asks for keys, or that other machines reach, has other names, which cannot be known
here: it answers to any name unless it is told which.

Knows: names as headers have them. Knows nothing of paths, keys or sockets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

from minisrv.config import ServerConfig
from minisrv.errors import MisdirectedError, RequestError, shown

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+?)\.?(?::\d*)?")


class HostNames:
    """The host names that a server answers to, at any port."""

    def __init__(self, names: Sequence[str] | None = None) -> None:
        """Set the names.

        names: names to answer to besides those of this machine; None for any name at all.
        """
        given = () if names is None else (_spelled(name) for name in names)
        self._any = names is None
        self._names = _LOOPBACK.union(given)

    @classmethod
    def of(cls, settings: ServerConfig, address: str) -> HostNames:
        """Return the host names of a server that listens on an IP address."""
        names = settings.allowed_hosts
        local = not settings.api_keys and ip_address(address).is_loopback
        return cls(None if "*" in names or not (names or local) else names)

    def check(self, http_version: str, hosts: Sequence[str]) -> None:
        """Check all the `Host` headers of a request.

        Raises RequestError unless there is exactly one (an HTTP/1.0 request may have none, as no
        browser sends one), MisdirectedError for a name that the server does not answer to.
        """
        if len(hosts) != 1:
            if not hosts and http_version == "1.0":
                return
            raise RequestError(f"A request must have one Host header, not {len(hosts)}.")
        if self._any:
            return
        found = _HOST.fullmatch(hosts[0].lower())
        name = found[1] if found else ""
        if name not in self._names and not _is_loopback(name):
            raise MisdirectedError(
                f"This server does not answer to the Host {shown(hosts[0])}, but to localhost and "
                "what --allowed-hosts names, so that no web page reaches it by a name of its own. "
                "Ask for one of these, or start the server with --allowed-hosts and this name."
            )


def _spelled(name: str) -> str:
    """Return a name as it stands in `Host`: an IPv6 address is in brackets."""
    name = name.lower().removesuffix(".")
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def _is_loopback(name: str) -> bool:
    if name.endswith(".localhost"):  # nobody can own such a name (RFC 6761)
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
