"""The requests that a server is sent instead of those it refuses."""

import asyncio
from itertools import product
from typing import Any

import msgspec
import pytest

from loadgen.fitting import fitting
from loadgen.records import PromptKind
from tests.loadgen.scripted_server import ScriptedServer, Status, Step, honest
from tests.loadgen.test_loadgen_client import CONFIG

OPEN: dict[str, Any] = {
    "prompt_kind": tuple(PromptKind),
    "ignore_eos": (True, False),
    "return_token_ids": (True, False),
}


def takes(fields: dict[str, Any], refused: set[str]) -> bool:
    """Whether a server that refuses these kinds and fields takes a request."""
    names = {str(fields["prompt_kind"])} | {name for name in fields if fields[name] is True}
    return not names & refused


def fields_of(body: dict[str, Any]) -> dict[str, Any]:
    kind = PromptKind.CHAT if "messages" in body else PromptKind.TEXT
    if isinstance(body.get("prompt"), list):
        kind = PromptKind.TOKENS
    return {"prompt_kind": kind} | {n: n in body for n in ("ignore_eos", "return_token_ids")}


def test_the_first_requests_that_the_server_takes_are_sent() -> None:
    """Of every server that refuses some of the kinds and fields: the most preferred that it
    takes, and None if it takes none. A second server, which takes all, changes nothing."""
    names = [*map(str, PromptKind), "ignore_eos", "return_token_ids"]
    refused: set[str] = set()

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        taken = takes(fields_of(body), refused)
        return list(honest(number, body)) if taken else [Status(400, {"detail": "no"})]

    with ScriptedServer(script) as server, ScriptedServer() as other:
        configs = [msgspec.structs.replace(CONFIG, base_url=s.url + "/v1") for s in (server, other)]
        for chosen in product([False, True], repeat=len(names)):
            refused = {name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen}
            every = [dict(zip(OPEN, values, strict=True)) for values in product(*OPEN.values())]
            expected = next((fields for fields in every if takes(fields, refused)), None)
            assert asyncio.run(fitting(configs, OPEN, None)) == expected


@pytest.mark.parametrize("kind", PromptKind)
def test_what_the_options_say_is_kept(kind: PromptKind) -> None:
    """Fields that are not open are those of the configuration."""
    with ScriptedServer() as server:
        config = msgspec.structs.replace(CONFIG, base_url=server.url + "/v1", prompt_kind=kind)
        found = asyncio.run(fitting([config], {"ignore_eos": (False, True)}, None))
        assert found == {"ignore_eos": False}
        assert fields_of(server.bodies[0])["prompt_kind"] is kind
        assert server.bodies[0]["max_tokens"] == 1
