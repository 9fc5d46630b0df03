"""The endpoints at which each replica publishes the events of its prefix cache.

All replicas have the same flags, but no two can wait at the same port. As in vLLM, a replica adds
its rank to the ports that are given, and to the path of an ipc endpoint.

Knows: the shapes of endpoints. Imports nothing of Ray, which counts the ranks from 0 on.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError

PORTS = 100
"""Number of ports that belong to each endpoint, and so of replicas that can have one."""

_TCP = re.compile(r"(tcp://.+:)([0-9]{1,5})")
_FIELDS = ("kv_events_endpoint", "kv_events_replay_endpoint")


def check_endpoints(server: ServerConfig) -> None:
    """Raise ConfigError if there are endpoints that replicas cannot have each of their own."""
    ports = []
    for name in _FIELDS:
        endpoint = getattr(server, name)
        if endpoint is None or endpoint.startswith("ipc://"):
            continue
        match = _TCP.fullmatch(endpoint)
        if match is None or not 0 < int(match[2]) <= 65536 - PORTS:
            raise ConfigError(
                f"{name}={endpoint!r} is not allowed for replicas, each of which adds its rank to "
                f"the port; write tcp:// with a port from 1 to {65536 - PORTS} such as "
                "tcp://*:5557, or ipc:// and the path of a file."
            )
        ports.append(int(match[2]))
    if len(ports) == 2 and abs(ports[0] - ports[1]) < PORTS:
        raise ConfigError(
            f"the ports of {_FIELDS[0]} ({ports[0]}) and {_FIELDS[1]} ({ports[1]}) are too close: "
            "each replica adds its rank to both, so one replica would take a port of another; "
            f"write ports at least {PORTS} apart, such as {ports[0]} and {ports[0] + PORTS}."
        )


def endpoints_of_replica(server: ServerConfig, rank: int) -> ServerConfig:
    """Return the settings with the endpoints of the replica of a rank. Raises ConfigError if there
    are too many replicas for the endpoints, which `check_endpoints` has accepted."""
    found: dict[str, Any] = {}
    for name in _FIELDS:
        endpoint = getattr(server, name)
        if endpoint is None:
            continue
        if rank >= PORTS:
            raise ConfigError(
                f"{name} is not allowed with more than {PORTS} replicas; lower num_replicas or "
                "max_replicas, or leave it out."
            )
        match = _TCP.fullmatch(endpoint)
        found[name] = f"{match[1]}{int(match[2]) + rank}" if match else f"{endpoint}-{rank}"
    return replace(server, **found)
