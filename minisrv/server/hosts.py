"""Which names a server answers to: those that a request's `Host` may have.

A web page can let its own name mean 127.0.0.1 as soon as a browser has loaded it (DNS rebinding).
To the browser a server there is then the page's own: scripts may ask it anything and read what it
says. All that gives them away is the name. So a server that listens on a loopback address and asks
for no key answers to this machine's names alone. One that asks for keys, or that other machines
reach, has other names, which nobody here knows: it answers to any, unless it is told which.

Knows: names, as headers have them. Knows nothing of paths, keys or sockets.
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
    """The names that are answered to, at any port."""

    def __init__(self, names: Sequence[str] | None = None) -> None:
        """names: besides those of this machine; None for any name at all."""
        given = () if names is None else (_spelled(name) for name in names)
        self._any = names is None
        self._names = _LOOPBACK.union(given)

    @classmethod
    def of(cls, settings: ServerConfig, address: str) -> HostNames:
        """Those of a server that listens on an IP address."""
        names = settings.allowed_hosts
        local = not settings.api_keys and ip_address(address).is_loopback
        return cls(None if "*" in names or not (names or local) else names)

    def check(self, http_version: str, hosts: Sequence[str]) -> None:
        """Look at all the `Host` headers of a request.

        Raises RequestError for another number of them than one (HTTP/1.0 may have none, as no
        browser's has), MisdirectedError for a name that is not answered to.
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
    """A name as `Host` has it: an IPv6 address stands in brackets."""
    name = name.lower().removesuffix(".")
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def _is_loopback(name: str) -> bool:
    if name.endswith(".localhost"):  # nobody can own it (RFC 6761)
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
