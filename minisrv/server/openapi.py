"""The OpenAPI document. FastAPI makes it from the routes and the request bodies, and this module
adds the response bodies and the API keys.

Knows: FastAPI and the format of the document. Knows nothing of what the routes do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from fastapi import FastAPI

from minisrv.engine.trace_format import TracedStep, TraceHeader
from minisrv.server import anthropic_responses, response_schemas, responses_objects
from minisrv.server.anthropic_responses import AnthropicErrorResponse, AnthropicMessage
from minisrv.server.auth import OPEN_PATHS
from minisrv.server.response_schemas import Body, ErrorResponse
from minisrv.server.responses_objects import ResponseObject

Responses = dict[int | str, dict[str, Any]]

_SCHEMA = "#/components/schemas/{name}"


def _json(*bodies: type[Body]) -> dict[str, Any]:
    """Return the content of a response whose JSON is one of `bodies`."""
    schemas = [{"$ref": _SCHEMA.format(name=body.__name__)} for body in bodies]
    one: dict[str, Any] = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"application/json": {"schema": one}}


def _errors(body: type[Body]) -> Responses:
    """Return the responses to requests that fail, whose JSON is `body`."""
    return {
        "4XX": {
            "content": _json(body),
            "description": "400 the request is at fault, 401 it holds no key that is accepted, "
            "404 no such model or URL, 405, 408 too slow, 413 too large, 415 no plain JSON, "
            "421 another host, 429 too many requests (see the header retry-after), 431",
        },
        "5XX": {
            "content": _json(body),
            "description": "500, 503 the engine is loading, asleep, draining or dead, or too many "
            "large bodies arrive, 504 the deadline is over",
        },
    }


def _stream(**fields: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a stream; the schema describes the fields of each event."""
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    return {"text/event-stream": {"schema": schema}}


_CHUNKS = _stream(data={"type": "string", "description": "A chunk as JSON; at the end [DONE]."})


def _events(events: Iterable[type[Body]]) -> dict[str, Any]:
    """Return the content of a stream of events with names."""
    schemas = [{"$ref": _SCHEMA.format(name=event.__name__)} for event in events]
    return _stream(
        event={"type": "string", "description": "The type of the data."},
        data={
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"oneOf": schemas},
        },
    )


_STREAMS = {
    AnthropicMessage: _events(anthropic_responses.MESSAGE_STREAM_EVENTS),
    ResponseObject: _events(responses_objects.RESPONSE_STREAM_EVENTS),
}
"""What a body is streamed as, if not as chunks."""


def route_responses(*bodies: type[Body], streams: bool = False) -> Responses:
    """Return the responses of a route: one of `bodies`, perhaps also as a stream, or an error."""
    content = _json(*bodies)
    if streams:
        content |= _STREAMS.get(bodies[0], _CHUNKS)
    return {200: {"content": content, "description": "Done"}, **_errors(ErrorResponse)}


def anthropic_responses_of(body: type[Body]) -> Responses:
    """Return the responses of a route of Anthropic's: `body`, a message also as a stream of events,
    or an error."""
    content = _json(body) | _STREAMS.get(body, {})
    return {200: {"content": content, "description": "Done"}, **_errors(AnthropicErrorResponse)}


def errors_only() -> Responses:
    """Return the errors of a route whose other responses are described elsewhere, or are none."""
    return _errors(ErrorResponse)


def health_responses(body: type[Body]) -> Responses:
    """Return the responses of a health check: `body` with either status."""
    content = _json(body)
    return {
        200: {"content": content, "description": "Yes"},
        503: {"content": content, "description": "No"},
    }


def trace_responses() -> Responses:
    """Return the responses of the route of the step trace: lines of JSON, or an error."""
    lines = [_SCHEMA.format(name=line.__name__) for line in (TraceHeader, TracedStep)]
    schema = {
        "description": "A JSON object in each line: first the header, then steps and events.",
        "anyOf": [*({"$ref": line} for line in lines), {"type": "object"}],
    }
    content = {"application/x-ndjson": {"schema": schema}}
    return {200: {"content": content, "description": "Done"}, **_errors(ErrorResponse)}


class DocumentedApp(FastAPI):
    """An application whose document has the schemas of the response bodies.

    keyed: whether the document says that requests need an API key.
    """

    def __init__(self, *, keyed: bool, **options: Any) -> None:
        super().__init__(**options)
        self._keyed = keyed

    def openapi(self) -> dict[str, Any]:
        """Return the document, which is made once."""
        is_new = self.openapi_schema is None
        document = super().openapi()  # the same object at every call
        if is_new:
            schemas, added = document["components"]["schemas"], _response_schemas()
            assert not schemas.keys() & added.keys(), "a name has one meaning"
            schemas |= added
            if self._keyed:
                _add_keys(document)
        return document


def _response_schemas() -> dict[str, Any]:
    """Return the schemas of all response bodies, by name."""
    _, schemas = msgspec.json.schema_components(_BODIES, ref_template=_SCHEMA)
    return schemas


_BODIES = [
    response_schemas.ErrorResponse,
    response_schemas.CompletionResponse,
    response_schemas.ChatCompletionResponse,
    response_schemas.EmbeddingResponse,
    response_schemas.LoadResponse,
    response_schemas.TokenizerInfo,
    response_schemas.TokenizeResponse,
    response_schemas.DetokenizeResponse,
    response_schemas.ModelList,
    response_schemas.HealthResponse,
    response_schemas.ReadyResponse,
    response_schemas.SleepResponse,
    response_schemas.VersionResponse,
    anthropic_responses.AnthropicMessage,
    anthropic_responses.MessageTokensCount,
    *anthropic_responses.MESSAGE_STREAM_EVENTS,
    TraceHeader,
    TracedStep,
    responses_objects.ResponseObject,
    responses_objects.DeletedResponse,
    responses_objects.ItemList,
    *responses_objects.RESPONSE_STREAM_EVENTS,
]


def _add_keys(document: dict[str, Any]) -> None:
    """Add API keys to the document of a server that asks for them."""
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document["security"] = [{"key": []}, {"header": []}]
    for path in OPEN_PATHS:
        for operation in document["paths"][path].values():
            operation["security"] = []
