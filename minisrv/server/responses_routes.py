"""The routes of `/v1/responses`: create a response, and later ask for it, its input, or its end.

Knows: FastAPI, and how a conversation is put together from what a body and the store hold.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request
from msgspec.structs import replace
from pydantic import ValidationError
from starlette.responses import Response

from minisrv.errors import (
    PreviousResponseNotFoundError,
    RequestError,
    ResponseNotFoundError,
    shown,
)
from minisrv.server.errors import JSON
from minisrv.server.generation_response import GenerationResponse
from minisrv.server.messages import MAX_MESSAGES
from minisrv.server.offload import offload
from minisrv.server.openapi import errors_only, route_responses
from minisrv.server.query import check_names, check_once
from minisrv.server.request_body import BodyRoute, in_turn
from minisrv.server.responses_builder import ReasoningForm, ResponsesBuilder
from minisrv.server.responses_objects import (
    RESPONSES,
    DeletedResponse,
    Item,
    ItemList,
    MessageItem,
    OutputItem,
    OutputText,
    ResponseObject,
)
from minisrv.server.responses_requests import (
    STORED_ITEMS,
    ItemReference,
    ResponsesChat,
    ResponsesRequest,
    SaidItem,
    described,
    too_many_items,
)
from minisrv.server.responses_store import ResponseStore, StoredResponse
from minisrv.server.serving import Serving
from minisrv.server.value_budget import TooManyValuesError, ValueBudget

MAX_LISTED = 100
DEFAULT_LISTED = 20

_encode = msgspec.json.Encoder().encode


class Conversations:
    """Puts the conversations of requests together, and stores their responses.

    store: the store; None if nothing can be stored, as another worker may get the next request.
    max_bytes: maximum number of bytes of the JSON that a request takes from the store. A
        conversation may be as large as if the client had sent all of it.
    """

    def __init__(self, store: ResponseStore | None, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    def needed_store(self, param: str) -> ResponseStore:
        """Return the store, which the field `param` needs. Raises RequestError."""
        if self._store is None:
            raise RequestError(
                f"{param} is not supported by this server: it has several API workers or is a "
                "replica, and they do not know each other's responses. Send the whole conversation "
                "as input, or serve with --api-workers 1 and without replicas.",
                param=param,
            )
        return self._store

    def stored(self, key: int | None, response_id: str) -> StoredResponse:
        """Return the response of this id. Raises ResponseNotFoundError."""
        found = None if self._store is None else self._store.get(key, response_id)
        if found is None:
            raise not_found(response_id, can_store=self._store is not None)
        return found

    def delete(self, key: int | None, response_id: str) -> None:
        """Delete the response of this id. Raises ResponseNotFoundError."""
        if self._store is None or not self._store.delete(key, response_id):
            raise not_found(response_id, can_store=self._store is not None)

    def of(self, body: ResponsesRequest, key: int | None) -> Conversation:
        """Return the conversation that a body begins or carries on. Raises RequestError, and
        PreviousResponseNotFoundError or ResponseNotFoundError for what is not stored."""
        if body.store:
            self.needed_store("store")
        previous = None
        if body.previous_response_id is not None:
            store = self.needed_store("previous_response_id")
            previous = store.get(key, body.previous_response_id)
            if previous is None:
                raise PreviousResponseNotFoundError(
                    f"Previous response with id {shown(body.previous_response_id)} not found: it "
                    "was never stored, or has been deleted or dropped since; send the whole "
                    "conversation as input.",
                    param="previous_response_id",
                )
        texts = [] if previous is None else previous.conversation
        before = len(texts)
        for item in body.input:
            if isinstance(item, ItemReference):
                texts.append(self._referred(item.id, key))
        if before + len(body.input) > MAX_MESSAGES:
            raise too_many_items(before + len(body.input))
        found = self._parsed(texts)
        referred = iter(found[before:])
        own = [next(referred) if isinstance(i, ItemReference) else i for i in body.input]
        return Conversation(found[:before], own, previous, sum(map(len, texts)))

    def _referred(self, item_id: str, key: int | None) -> bytes:
        item = self.needed_store("input").item(key, item_id)
        if item is None:
            raise ResponseNotFoundError(
                f"Item with id {shown(item_id)} not found: only items of stored responses can be "
                "referred to; send the item itself.",
                param="input",
            )
        return item

    def _parsed(self, items: Sequence[bytes]) -> list[SaidItem]:
        """Return items that were stored. Raises RequestError if they are too large together."""
        size = sum(map(len, items))
        if size > self._max_bytes:
            raise RequestError(
                f"The conversation has {size} bytes of stored items, and {self._max_bytes} are the "
                "most; begin a new one.",
                param="input",
            )
        text = b"[" + b",".join(items) + b"]"
        budget = ValueBudget()
        try:
            budget.spend(text)
            return STORED_ITEMS.validate_python(json.loads(text), context=budget)
        except TooManyValuesError as error:
            raise RequestError(f"The conversation {error}.", param="input") from error
        except ValidationError as error:  # the JSON inside its strings counts as well
            reason = error.errors()[0]["ctx"]["error"]
            raise RequestError(f"The conversation {reason}.", param="input") from error

    def keep(
        self,
        response: ResponseObject,
        input_items: Sequence[bytes],
        previous: StoredResponse | None,
        key: int | None,
    ) -> None:
        """Store a response with the items of its input. There must be a store."""
        assert self._store is not None
        outputs = {item.id: _encode(_said(item)) for item in response.output}
        found = StoredResponse(response.id, _encode(response), input_items, outputs, previous)
        self._store.add(key, found)

    def stores(self, body: ResponsesRequest) -> bool:
        """Whether the response to a body is stored."""
        return self._store is not None and body.store is not False


def _said(item: OutputItem) -> OutputItem:
    """Return an item of an answer as a client would send it back: without log-probabilities, which
    may be larger than all else."""
    if not isinstance(item, MessageItem):
        return item
    texts = [part.text for part in item.content if isinstance(part, OutputText)]
    return replace(item, content=list(map(OutputText, texts)))


@dataclass(frozen=True)
class Conversation:
    """A conversation that is to be answered.

    earlier: the items of the responses that are carried on.
    own: the items of the body's input.
    previous: the response that is carried on.
    stored_bytes: number of bytes of the JSON that comes from the store.
    """

    earlier: list[SaidItem]
    own: list[SaidItem]
    previous: StoredResponse | None
    stored_bytes: int


def not_found(response_id: str, *, can_store: bool) -> ResponseNotFoundError:
    """Return the error for a response that is not stored.

    can_store: whether the server stores responses at all.
    """
    why = (
        "it was never stored, or has been deleted or dropped since."
        if can_store
        else "a server with several API workers or replicas stores none; serve with --api-workers "
        "1 and without replicas."
    )
    return ResponseNotFoundError(f"Response with id {shown(response_id)} not found: {why}")


def add_responses_routes(app: FastAPI, serving: Serving, conversations: Conversations) -> None:
    """Add the routes to the application."""
    router = APIRouter(route_class=BodyRoute)

    @router.post(
        RESPONSES, response_class=JSON, responses=route_responses(ResponseObject, streams=True)
    )
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation."""
        model, key = serving.model_name(body.model), request.scope["key"]
        stores = conversations.stores(body)

        def make() -> tuple[ResponsesChat, ResponsesBuilder]:
            conversation = conversations.of(body, key)
            chat = body.as_chat([*conversation.earlier, *conversation.own])
            ids = (uuid.uuid4().hex for _ in conversation.own)
            items = [_encode(item) for item in described(conversation.own, ids)] if stores else []

            def keep(response: ResponseObject) -> None:
                if stores:
                    conversations.keep(response, items, conversation.previous, key)

            builder = ResponsesBuilder(
                chat,
                _frame(body, chat, model, serving, stores=stores),
                serving.tokenizer,
                ReasoningForm(as_summary=body.summarizes, encrypted=body.encrypts_reasoning),
                keep,
            )
            return chat.with_num_bytes(body.num_bytes + conversation.stored_bytes), builder

        # What is taken from the store is read like the body that could have held it.
        carries_on = body.previous_response_id is not None or body.refers
        chat, builder = await (in_turn(make) if carries_on else offload(make, body.num_bytes))
        return GenerationResponse(serving, chat, builder)

    app.include_router(router)
    under = f"{RESPONSES}/{{response_id}}"

    @app.get(under, response_class=JSON, responses=route_responses(ResponseObject))
    async def response(
        request: Request,
        response_id: str,
        stream: Annotated[str, Query(description="false: a stored response is not streamed")] = (
            "false"
        ),
    ) -> Response:
        """Return a stored response."""
        check_names(request, "stream")
        check_once(request, "stream")
        if stream != "false":
            raise RequestError(
                f"stream={shown(stream)} is not supported for a stored response; leave it out.",
                param="stream",
            )
        found = conversations.stored(request.scope["key"], response_id)
        return Response(found.body, media_type=JSON.media_type)

    @app.delete(under, response_class=JSON, responses=route_responses(DeletedResponse))
    async def delete_response(request: Request, response_id: str) -> Response:
        """Delete a stored response. Responses that carry it on stay as they are."""
        check_names(request)
        conversations.delete(request.scope["key"], response_id)
        return JSON(DeletedResponse(response_id))

    @app.post(f"{under}/cancel", response_class=JSON, responses=errors_only())
    async def cancel_response(request: Request, response_id: str) -> Response:
        """Refuse to cancel a stored response: it has ended. A response that is being generated ends
        when its client disconnects."""
        conversations.stored(request.scope["key"], response_id)
        raise RequestError(
            "Only responses that run in the background can be cancelled, and this server runs "
            "none: a stored response has ended. Close the connection to end one that is being "
            "generated."
        )

    @app.get(f"{under}/input_items", response_class=JSON, responses=route_responses(ItemList))
    async def input_items(
        request: Request,
        response_id: str,
        limit: Annotated[str, Query(description="1 to 100")] = str(DEFAULT_LISTED),
        order: Annotated[str, Query(description="asc or desc")] = "desc",
        after: Annotated[str | None, Query(description="Id of an item")] = None,
    ) -> Response:
        """List the items that came before the output of a stored response: those of its input, and
        of the responses that it carries on."""
        check_names(request, "limit", "order", "after")
        check_once(request, "limit", "order", "after")
        number = int(limit) if limit.isascii() and limit.isdecimal() and len(limit) < 4 else 0
        if not 1 <= number <= MAX_LISTED:
            raise RequestError(f"limit must be from 1 to {MAX_LISTED}.", param="limit")
        if order not in ("asc", "desc"):
            raise RequestError("order must be asc or desc.", param="order")
        found = conversations.stored(request.scope["key"], response_id)
        items = found.context[:: 1 if order == "asc" else -1]
        size = sum(map(len, items))
        page = await offload(lambda: _page(items, number, after), size)
        return await offload(lambda: JSON(page), size)


def _page(items: Sequence[bytes], number: int, after: str | None) -> ItemList:
    """Return a page of items. Raises RequestError if `after` is the id of none of them."""
    start = 0
    if after is not None:
        ids = [msgspec.json.decode(item, type=_Identified).id for item in items]
        if after not in ids:
            raise RequestError(f"after={shown(after)} is the id of no input item.", param="after")
        start = ids.index(after) + 1
    page = [msgspec.json.decode(item, type=Item) for item in items[start : start + number]]
    return ItemList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=start + number < len(items),
    )


class _Identified(msgspec.Struct):
    id: str


def _frame(
    body: ResponsesRequest, chat: ResponsesChat, model: str, serving: Serving, *, stores: bool
) -> ResponseObject:
    """Return the response to a body as it is before the answer begins, without an id."""
    params: Any = chat.sampling_params(serving.generation, max_tokens=1)
    return ResponseObject(
        id="",
        created_at=int(time.time()),
        model=model,
        status="in_progress",
        output=[],
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata,
        parallel_tool_calls=body.parallel_tool_calls,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=body.described_reasoning,
        safety_identifier=body.safety_identifier,
        store=stores,
        temperature=params.temperature,
        text=body.described_text,
        tool_choice=body.described_choice,
        tools=[tool.described() for tool in body.tools],
        top_logprobs=body.top_logprobs or 0,
        top_p=params.top_p,
        truncation=body.truncation,
        user=body.user,
    )
