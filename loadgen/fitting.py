"""Finds requests that servers take, where they refuse those of the defaults and the options leave
open what else to send.

Knows: which fields of a configuration may differ, and how to try them with single requests. Knows
nothing of how options are written, and of what a run measures.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from msgspec.structs import replace

from loadgen.client import send
from loadgen.http import Client
from loadgen.prompts import Conversation, endpoint
from loadgen.records import RunConfig


async def fitting(
    configs: Sequence[RunConfig], open_fields: Mapping[str, Sequence[Any]], api_key: str | None
) -> dict[str, Any] | None:
    """Return the first values of the open fields with which each server answers a request, or None
    if there are none.

    configs: a configuration of each server.
    open_fields: the values that a field may have, by its name, the preferred ones first.
    """
    with Client(api_key) as client:
        for values in product(*open_fields.values()):
            fields = dict(zip(open_fields, values, strict=True))
            for config in configs:
                if not await _answers(replace(config, **fields), client):
                    break
            else:
                return fields
    return None


async def _answers(config: RunConfig, client: Client) -> bool:
    """Whether the server answers a request whose prompt is that of no level."""
    config = replace(config, output_tokens=1)
    request = Conversation(config, len(config.loads), True, 0).request()
    return (await send(client, endpoint(config), request, config)).failure is None
