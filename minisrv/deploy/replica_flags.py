"""The flags that a replica of Ray Serve has in common with `minisrv serve`.

Knows: names of flags, and which of them Ray has another place for. Imports nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.errors import ConfigError

_BY_RAY = {
    **dict.fromkeys(
        ("host", "port", "ssl-certfile", "ssl-keyfile"),
        "Ray's proxy listens; set http_options in the configuration of Serve.",
    ),
    "api-key": "Ray shows arguments in its dashboard; use api-key-file, or MINISRV_API_KEY.",
    "api-workers": "each replica is one; set num_replicas or autoscaling_config.",
    "shutdown-timeout": "Ray waits for open requests; set graceful_shutdown_timeout_s.",
    "enable-sleep-mode": "a request would reach one replica only; set min_replicas to 0.",
}
"""Flags of `minisrv serve` that have no meaning here, and what to set instead."""


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Return the flags of `minisrv serve` that settings stand for.

    settings: values by the names of flags without the dashes at the front, as YAML has them, or as
        text from a command line. true is a flag alone, false its negation, null no flag, and a list
        several values.
    Raises ConfigError for a flag that Ray has another place for.
    """
    flags = []
    for given, value in settings.items():
        name = given.replace("_", "-")
        if name in _BY_RAY:
            raise ConfigError(f"{given} cannot be set for a replica: {_BY_RAY[name]}")
        if is_true(value):
            flags.append(f"--{name}")
        elif str(value).lower() == "false":
            flags.append(f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def is_true(value: object) -> bool:
    """Return whether a setting is true, as YAML or a command line has it."""
    return str(value).lower() == "true"
