"""POST /v1/responses and what is under it: what becomes of a body, of an answer, and of what is
stored."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.errors import EngineNotReadyError, QueueFullError
from minisrv.request import FinishReason
from minisrv.server.offload import LARGE
from minisrv.server.responses_builder import ResponsesBuilder
from minisrv.server.responses_objects import ItemList, ResponseObject, ResponseStreamEvent
from minisrv.server.responses_store import ResponseStore, StoredResponse
from minisrv.server.unsupported import RESPONSES_BODY
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs
from tests.text import tiny_tokenizer
from tests.text.tiny_tokenizer import tokenizer_of
from tests.text.walks import follow

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
PATH = "/v1/responses"
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }} <tool_call>]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}"
    "({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SWITCHED = TEMPLATE + (
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{# <think></think> #}"
)
ALWAYS = TEMPLATE + "{# <think></think> #}"
EFFORT = ALWAYS + "{{ reasoning_effort }}"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "parameters": SCHEMA}
TIME = {"type": "function", "name": "time"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ALLOWED = {
    "type": "allowed_tools",
    "mode": "auto",
    "tools": [{"type": "function", "name": "weather"}],
}
USER = {"role": "user", "content": "Hi"}
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    def make(template: str) -> Tokenizer:
        directory: Path = tiny_tokenizer.save_chatml(tmp_path_factory.mktemp("responses"))
        config = directory / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
        return tokenizer_of(directory)

    return make


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[[str], Tokenizer]) -> Tokenizer:
    return make_tokenizer(TEMPLATE)


class Model:
    """A server whose model always answers with `text`."""

    def __init__(
        self,
        connect: Connect,
        tokenizer: Tokenizer,
        text: str = "Hello",
        max_model_len: int = 1000,
        **options: Any,
    ) -> None:
        script = outputs([*tokenizer.encode(text), END], FinishReason.STOP)
        self.engine = FakeEngine(script)
        self.engine.info = msgspec.structs.replace(INFO, max_model_len=max_model_len)
        self.client = connect(self.engine, tokenizer=tokenizer, **options)
        self._tokenizer = tokenizer

    async def post(self, **body: Any) -> httpx.Response:
        return await self.client.post(PATH, json={"input": "Hi", **body})

    async def answer(self, **body: Any) -> Any:
        response = await self.post(**body)
        assert response.status_code == 200, response.text
        msgspec.json.decode(response.content, type=ResponseObject)
        return response.json()

    async def prompt_of(self, **body: Any) -> str:
        """The prompt that a body becomes, as text."""
        await self.answer(**body)
        return self._tokenizer.decode(self.engine.requests[-1].prompt_token_ids)

    async def refused(self, **body: Any) -> Any:
        """The error of a body that is refused before it reaches the engine."""
        response = await self.post(**body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert not self.engine.requests
        return error


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which is one that is described."""
    *found, rest = text.split("\n\n")
    assert rest == ""
    values = []
    for number, event in enumerate(found):
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        msgspec.json.decode(data.removeprefix("data: "), type=ResponseStreamEvent)
        assert name == f"event: {value['type']}"
        assert value["sequence_number"] == number
        values.append(value)
    return values


# ---- bodies ----------------------------------------------------------------------------------


async def test_a_text_and_instructions(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer)
    assert await model.prompt_of(instructions="Be kind.") == "<system>Be kind.<user>Hi<assistant>"
    for role in ("system", "developer"):
        said = [{"role": role, "content": "Be kind."}, USER]
        assert await model.prompt_of(input=said) == "<system>Be kind.<user>Hi<assistant>"


async def test_items_of_every_kind(connect: Connect, tokenizer: Tokenizer) -> None:
    """Items of one answer are joined, and the output of a function has a message of its own. Fields
    that other servers have added are ignored."""
    call = {"type": "function_call", "id": "fc_1", "status": "completed", "name": "weather"}
    said = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
            {"type": "reasoning_text", "text": "Which"},
            {"type": "reasoning_text", "text": "city?"},
        ]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []},
        ]},
        {**call, "call_id": "c1", "arguments": '{"city": "Rome"}', "namespace": "x"},
        {**call, "call_id": "c2", "arguments": '{"city": "Ro'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [
            {"type": "input_text", "text": "no"}, {"type": "input_text", "text": "city"},
        ]},
        {"type": None, "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    prompt = await Model(connect, tokenizer).prompt_of(input=said, tools=[WEATHER])
    assert prompt == (
        "[weather <tool_call>]<user>Hi<assistant>(Which\ncity?)Let me see."
        'weather{"city": "Rome"}weather"{\\"city\\": \\"Ro"<tool>rain<tool>no\ncity'
        "<assistant>No.<user>And now?<assistant>"
    )


@pytest.mark.parametrize(
    ("item", "shown"),
    [
        ({"summary": [{"type": "summary_text", "text": "S"}]}, "(S)"),
        ({"content": [], "summary": []}, ""),
        ({"summary": [], "encrypted_content": "gAAAAB"}, ""),
        ({"summary": [], "encrypted_content": "minisrv:R"}, "(R)"),
        (
            {
                "content": [{"type": "reasoning_text", "text": "C"}],
                "summary": [{"type": "summary_text", "text": "S"}],
                "encrypted_content": "minisrv:R",
            },
            "(C)",
        ),
    ],
)
async def test_reasoning_that_comes_back(
    connect: Connect, tokenizer: Tokenizer, item: dict[str, Any], shown: str
) -> None:
    said = [USER, {"type": "reasoning", "id": "rs", **item}, {"role": "assistant", "content": "A"}]
    prompt = await Model(connect, tokenizer).prompt_of(input=[*said, USER])
    assert prompt == f"<user>Hi<assistant>{shown}A<user>Hi<assistant>"


@pytest.mark.parametrize(
    ("choice", "calls", "offered"),
    [
        ("required", (True, True), "[weather <tool_call>][time <tool_call>]<"),
        ({"type": "function", "name": "weather"}, (True, False), "[weather <tool_call>][time"),
        (
            ALLOWED | {"mode": "required"},
            (True, True),
            "[weather <tool_call>]<",
        ),
        (
            ALLOWED,
            None,
            "[weather <tool_call>]<",
        ),
        ("auto", None, "[weather <tool_call>][time <tool_call>]<"),
        ("none", None, "<user>"),
    ],
)  # fmt: skip
async def test_tool_choice(
    connect: Connect,
    tokenizer: Tokenizer,
    choice: Any,
    calls: tuple[bool, bool] | None,
    offered: str,
) -> None:
    """A grammar forces a call where one is required, and several where several are allowed."""
    model = Model(connect, tokenizer, CALL)
    prompt = await model.prompt_of(tools=[WEATHER, TIME], tool_choice=choice)
    assert prompt.startswith(offered)
    form = model.engine.requests[0].structured_output
    if calls is None:
        assert form is None
        return
    assert form is not None
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, [END])
    texts = (CALL, f"{CALL}\n{CALL}")
    assert tuple(follow(backend, tokenizer, form, text) for text in texts) == calls
    assert not follow(backend, tokenizer, form, "It rains.")


async def test_parallel_tool_calls(connect: Connect, tokenizer: Tokenizer) -> None:
    for parallel, number in ((True, 2), (False, 1)):
        response = await Model(connect, tokenizer, f"{CALL}\n{CALL}").answer(
            tools=[WEATHER], parallel_tool_calls=parallel
        )
        assert len(response["output"]) == number
        assert response["parallel_tool_calls"] == parallel


async def test_the_format_of_a_text(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer, "{}")
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, [END])
    for form, texts in (
        ({"type": "text"}, None),
        ({"type": "json_object"}, ('{"a": 1}', "[]")),
        ({"type": "json_schema", "name": "c", "schema": SCHEMA}, ('{"city":"a"}', '{"a":1}')),
    ):
        response = await model.answer(text={"format": form, "verbosity": "low"})
        spec = model.engine.requests[-1].structured_output
        if texts is None:
            assert spec is None
        else:
            assert spec is not None
            found = [follow(backend, tokenizer, spec, text) for text in texts]
            assert found == [True, False]
        assert form.items() <= response["text"]["format"].items()


async def test_sampling_settings(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer)
    response = await model.answer(temperature=0.5, top_p=0.9, max_output_tokens=9)
    params = model.engine.requests[0].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 9)
    assert (response["temperature"], response["top_p"]) == (0.5, 0.9)
    assert response["max_output_tokens"] == 9
    response = await model.answer(max_output_tokens=5000)
    *_, request = model.engine.requests
    assert request.params.max_tokens == 1000 - len(request.prompt_token_ids), "cut to what fits"
    assert response["temperature"] == 0.7, "the checkpoint's"


async def test_the_oldest_turns_are_dropped(connect: Connect, tokenizer: Tokenizer) -> None:
    """With truncation, as many turns are left as fit beside max_output_tokens, with the system
    message, and never the output of a call without the call."""
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    turns = [
        [
            {"role": "user", "content": f"q{number} " + "x " * 20},
            call,
            {"type": "function_call_output", "call_id": "c", "output": f"o{number}"},
            {"role": "assistant", "content": f"a{number}"},
        ]
        for number in range(40)
    ]
    said = [{"role": "system", "content": "Be kind."}, *(item for turn in turns for item in turn)]
    asked: dict[str, Any] = {"input": [*said, USER], "truncation": "auto"}
    kept = []
    for limit in ({}, {"max_output_tokens": 400}, {"max_output_tokens": 5000}):
        model = Model(connect, tokenizer)
        prompt = await model.prompt_of(**asked, **limit)
        number = prompt.count("<tool>")
        kept.append(number)
        assert prompt.startswith(f"<system>Be kind.<user>q{40 - number} ")
        assert prompt.endswith("<user>Hi<assistant>")
        [request] = model.engine.requests
        room = 600 if limit == {"max_output_tokens": 400} else 999
        assert len(request.prompt_token_ids) <= room
        one_more = [said[0], *(item for turn in turns[39 - number :] for item in turn), USER]
        longer = await Model(connect, tokenizer, max_model_len=5000).prompt_of(input=one_more)
        assert len(tokenizer.encode(longer)) > room
    assert kept[0] == kept[2] > kept[1] > 0
    short = await Model(connect, tokenizer).prompt_of(input=said[:5], truncation="auto")
    assert short.startswith("<system>Be kind.<user>q0 ")
    error = await Model(connect, tokenizer).refused(input="x " * 2000, truncation="auto")
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("template", "accepted"),
    [
        (TEMPLATE, {"none": ""}),
        (SWITCHED, {"none": "False"} | dict.fromkeys(EFFORTS[1:], "True")),
        (ALWAYS, {"medium": ""}),
        (EFFORT, dict(zip(EFFORTS, EFFORTS, strict=True))),
    ],
)
async def test_effort(
    connect: Connect,
    make_tokenizer: Callable[[str], Tokenizer],
    template: str,
    accepted: dict[str, str],
) -> None:
    """The template is told of an effort as in a chat."""
    tokenizer = make_tokenizer(template)
    for effort in EFFORTS:
        asked = {"reasoning": {"effort": effort}}
        if effort in accepted:
            prompt = await Model(connect, tokenizer).prompt_of(**asked)
            assert prompt == f"<user>Hi<assistant>{accepted[effort]}"
        else:
            error = await Model(connect, tokenizer).refused(**asked)
            assert error["param"] == "reasoning.effort"


@pytest.mark.parametrize(
    "fields",
    [
        {"background": False, "truncation": "disabled", "context_management": []},
        {"user": "x", "safety_identifier": "x", "prompt_cache_key": "x", "service_tier": "flex"},
        {"prompt_cache_options": {"ttl": "30m"}, "prompt_cache_retention": "24h"},
        {"reasoning": {"mode": "standard", "context": "auto", "effort": None}},
        {"include": ["file_search_call.results", "message.input_image.image_url"]},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        {"tool_choice": "auto"},
        {"tool_choice": "none", "tools": []},
        {"top_logprobs": 0, "metadata": {"a": "b"}},
        {"conversation": None, "prompt": None, "max_tool_calls": None},
        {"previous_response_id": None, "store": None},
        {"tools": [WEATHER | {"strict": True, "defer_loading": False}]},
    ],
)  # fmt: skip
async def test_what_asks_for_nothing(
    connect: Connect, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    response = await Model(connect, tokenizer).post(**fields)
    assert response.status_code == 200, response.text


def _item(**fields: Any) -> dict[str, Any]:
    return {"input": [USER, fields]}


def _part(**fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [fields]}]}


def _tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [WEATHER, fields]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"background": True}, "background"),
    ({"truncation": "some"}, "truncation"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"max_tool_calls": 3}, "max_tool_calls"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"messages": [USER]}, "messages"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"stop": ["x"]}, "stop"),
    ({"input": []}, "input"),
    ({"input": [USER] * 4097}, "input"),
    (_part(type="input_image", image_url="x"), "input[0].content[0].type"),
    (_part(type="input_file", file_id="x"), "input[0].content[0].type"),
    (_part(type="input_audio", input_audio={}), "input[0].content[0].type"),
    (_part(type="text", text="x"), "input[0].content[0].type"),
    (_part(type="input_text"), "input[0].content[0].text"),
    (_part(type="refusal", text="x"), "input[0].content[0].refusal"),
    (_item(role="tool", content="x"), "input[1].role"),
    (_item(role="user", content=[]), "input[1].content"),
    (_item(role="user"), "input[1].content"),
    (_item(type="web_search_call", id="x"), "input[1]"),
    (_item(type="custom_tool_call", name="x"), "input[1]"),
    (_item(type="compaction", encrypted_content="x"), "input[1]"),
    (_item(type="function_call", name="f", arguments="{}"), "input[1].call_id"),
    (_item(type="function_call", call_id="c", name="f", arguments=3), "input[1].arguments"),
    (_item(type="function_call_output", call_id="c"), "input[1].output"),
    (
        _item(type="function_call_output", call_id="c", output=[{"type": "input_image"}]),
        "input[1].output[0].type",
    ),
    (_item(type="item_reference", id=""), "input[1].id"),
    (_tool(type="web_search"), "tools[1].type"),
    (_tool(type="file_search", vector_store_ids=["x"]), "tools[1].type"),
    (_tool(type="mcp", server_label="x"), "tools[1].type"),
    (_tool(type="custom", name="x"), "tools[1].type"),
    (_tool(type="function"), "tools[1].name"),
    (_tool(type="function", name="a b"), "tools[1].name"),
    (_tool(type="function", name="f", function={"name": "f"}), "tools[1].function"),
    (_tool(**WEATHER), "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}, "tools": [WEATHER]}, "tool_choice"),
    ({"tool_choice": {"type": "web_search_preview"}, "tools": [WEATHER]}, "tool_choice.type"),
    (
        {
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "f"}],
            },
            "tools": [WEATHER],
        },
        "tool_choice",
    ),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
    (
        {"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
        "text.format",
    ),
    ({"text": {"what": 1}}, "text.what"),
    ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"include": ["what"]}, "include[0]"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"previous_response_id": ""}, "previous_response_id"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 2**31}, "max_output_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED)
async def test_what_is_refused(
    connect: Connect, tokenizer: Tokenizer, fields: dict[str, Any], named: str
) -> None:
    """What is not supported, and what is wrong, is refused by its own name."""
    assert (await Model(connect, tokenizer).refused(**fields))["param"] == named


ANYTHING: list[Any] = [True, 1, 1.5, "x", [], {}, [[]], [{}], {"type": []}, {"type": {}}]
FIELDS = {
    "model": ("x",),
    "input": ("x",),
    "instructions": ("x",),
    "store": (True,),
    "tools": ([],),
    "tool_choice": (),
    "parallel_tool_calls": (True,),
    "text": ({},),
    "reasoning": ({},),
    "max_output_tokens": (1,),
    "temperature": (1, 1.5),
    "top_p": (1,),
    "top_logprobs": (),
    "include": ([],),
    "stream": (True,),
    "stream_options": (),
    "metadata": ({},),
    "user": ("x",),
    "safety_identifier": ("x",),
    "prompt_cache_key": ("x",),
    "previous_response_id": ("x",),
    "truncation": (),
}
"""The fields of a body, and the values of ANYTHING that have their type."""


async def test_a_grid_of_values(connect: Connect, tokenizer: Tokenizer) -> None:
    """A value of a wrong type, anywhere in a body, is refused with the name of its field."""
    model = Model(connect, tokenizer)
    for field, value in itertools.product(FIELDS, ANYTHING):
        if not any(type(value) is type(right) and value == right for right in FIELDS[field]):
            param = (await model.refused(**{field: value}))["param"]
            assert param.partition(".")[0].partition("[")[0] == field, (field, value)
    for field in RESPONSES_BODY:
        assert (await model.refused(**{field: ["something", 7]}))["param"] == field
    items: list[dict[str, Any]] = [
        {"type": "message", "role": "user", "content": "x"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
        {"type": "reasoning", "summary": [], "content": [], "encrypted_content": "x"},
        {"type": "item_reference", "id": "x"},
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
    ]
    for item in items:
        for name, value in itertools.product(item, ANYTHING):
            response = await model.post(input=[item | {name: value}])
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                assert response.json()["error"]["param"].startswith("input"), (item, name, value)
    for content in (b"", b"[]", b"null", b'{"input": "\\ud800"}', b'{"input": [' * 5000):
        headers = {"content-type": "application/json"}
        response = await model.client.post(PATH, content=content, headers=headers)
        assert response.status_code == 400, response.text
    nested: Any = {}
    for _ in range(400):
        nested = {"a": nested}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": nested}
    response = await model.post(input=[call])
    assert response.status_code in (200, 400), response.text


async def test_a_model_without_tools(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer]
) -> None:
    """What the chat template does not know is refused by the name that it has in this API."""
    plain = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    output = {"type": "function_call_output", "call_id": "c", "output": "x"}
    assert (await Model(connect, plain).refused(tools=[WEATHER]))["param"] == "tools"
    assert (await Model(connect, plain).refused(input=[USER, output]))["param"] == "input"


# ---- answers ---------------------------------------------------------------------------------


async def test_a_whole_answer(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer)
    response = await model.answer(model="org/tiny", store=False)
    assert response.pop("id").startswith("resp_")
    [item] = response.pop("output")
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert response.pop("created_at") <= response.pop("completed_at")
    prompt, answer = len(model.engine.requests[0].prompt_token_ids), len(tokenizer.encode("Hello"))
    assert response == {
        "model": "org/tiny",
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": 0.7,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": answer + 1,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + answer + 1,
        },
    }


async def test_an_empty_answer(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer, "")
    assert (await model.answer())["output"] == []
    names = [event["type"] for event in events((await model.post(stream=True)).text)]
    assert names == ["response.created", "response.in_progress", "response.completed"]


TEXTS = (
    "Hello",
    "<think>\nHm.\n</think>\n\nHello",
    "<think>\nHm.",
    f"<think>\n\n</think>\n\nSee:\n{CALL}\n{CALL}\nDone.",
    f"{CALL[:40]}",
    CALL,
)


@pytest.mark.parametrize("text", TEXTS)
async def test_a_stream_tells_what_a_whole_answer_holds(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer], text: str
) -> None:
    model = Model(connect, make_tokenizer(SWITCHED), text)
    whole = await model.answer(tools=[WEATHER])
    found = events((await model.post(tools=[WEATHER], stream=True)).text)
    last = found[-1]["response"]

    def plain(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in i.items() if k not in ("id", "call_id")} for i in items]

    assert plain(last["output"]) == plain(whole["output"])
    assert last["usage"] == whole["usage"]
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    added = [event["item"] for event in found if event["type"] == "response.output_item.added"]
    assert [item["id"] for item in added] == [item["id"] for item in done]
    assert {item["status"] for item in added} <= {"in_progress"}
    pieces = "".join(event["delta"] for event in found if event["type"].endswith(".delta"))
    held = [part["text"] for item in done if "content" in item for part in item["content"]] + [
        item["arguments"] for item in done if "arguments" in item
    ]
    assert sorted(pieces) == sorted("".join(held))


@pytest.mark.parametrize("large", [False, True])
async def test_a_large_response_becomes_text_beside_the_event_loop(
    connect: Connect, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """The first and the last events hold the whole response."""
    loop = threading.current_thread()
    threads: dict[str, set[threading.Thread]] = {}
    real = ResponsesBuilder._encode

    def encode(self: ResponsesBuilder, events: list[Any]) -> bytes:
        for event in events:
            threads.setdefault(type(event).__name__, set()).add(threading.current_thread())
        return real(self, events)

    monkeypatch.setattr(ResponsesBuilder, "_encode", encode)
    tool = WEATHER | {"description": "x" * LARGE * large}
    model = Model(connect, tokenizer, "Hello, world.")
    await model.post(tools=[tool], tool_choice="none", stream=True)
    for name in ("ResponseCreatedEvent", "OutputItemDoneEvent", "ResponseCompletedEvent"):
        assert (loop in threads[name]) is not large, name


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "failed"),
    [
        (QueueFullError("full", retry_after=3), 429, "queue_full", "rate_limit_exceeded"),
        (EngineNotReadyError("loading"), 503, "not_ready", "server_error"),
        (RuntimeError("a secret"), 500, None, "server_error"),
    ],
)
async def test_errors_before_and_within_an_answer(
    connect: Connect,
    tokenizer: Tokenizer,
    error: Exception,
    status: int,
    code: str | None,
    failed: str,
    stream: bool,
) -> None:
    model = Model(connect, tokenizer)
    model.engine.script = lambda request: [error]
    response = await model.post(stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "secret" not in response.text
    if stream:
        model.engine.script = lambda request: [*outputs([300, 301])(request)[:1], error]
        *_, told, last = events((await model.post(stream=True)).text)
        assert told["type"] == "error"
        assert told["error"]["code"] == code
        assert told["message"] == told["error"]["message"]
        assert last["type"] == "response.failed"
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"] == {"code": failed, "message": told["message"]}
        assert {item["status"] for item in last["response"]["output"]} <= {"incomplete"}
        found = await model.client.get(f"{PATH}/{last['response']['id']}")
        assert found.status_code == 404, "a response that has failed is not stored"


# ---- what is stored --------------------------------------------------------------------------


async def test_input_items(connect: Connect, tokenizer: Tokenizer) -> None:
    """Items are listed in pages, in either order."""
    model = Model(connect, tokenizer)
    said = [{"role": "user", "content": str(number)} for number in range(7)]
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": {"a": 1}}
    response = await model.answer(input=[*said, call])
    path = f"{PATH}/{response['id']}/input_items"

    async def pages(order: str) -> list[str]:
        found: list[str] = []
        after: dict[str, str] = {}
        while True:
            asked = {"limit": "3", "order": order, **after}
            page = await model.client.get(path, params=asked)
            listed = msgspec.json.decode(page.content, type=ItemList)
            assert len(listed.data) <= 3
            found += [item.id for item in listed.data]
            if not listed.has_more:
                return found
            after = {"after": listed.last_id or ""}

    ids = await pages("asc")
    assert len(set(ids)) == 8
    assert await pages("desc") == ids[::-1]
    for wrong in (
        "limit=0",
        "limit=101",
        "limit=x",
        "order=up",
        "after=x",
        "what=1",
        "limit=1&limit=2",
    ):
        assert (await model.client.get(f"{path}?{wrong}")).status_code == 400, wrong
    for wrong in ("stream=true", "include=x"):
        refused = await model.client.get(f"{PATH}/{response['id']}?{wrong}")
        assert refused.status_code == 400, wrong


async def test_several_workers_store_nothing(connect: Connect, tokenizer: Tokenizer) -> None:
    """What needs a store is refused by name, and all else works."""
    model = Model(connect, tokenizer, is_alone=False)
    for fields, named in (
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [USER, {"type": "item_reference", "id": "msg_1"}]}, "input"),
    ):
        error = await model.refused(**fields)
        assert error["param"] == named
        assert "--api-workers" in error["message"]
    response = await model.answer()
    assert response["store"] is False
    for method, path in (
        ("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"),
    ):  # fmt: skip
        missing = await model.client.request(method, f"{PATH}/{response['id']}{path}")
        assert missing.status_code == 404
        assert "--api-workers" in missing.json()["error"]["message"]


async def test_a_conversation_has_the_limits_of_a_body(
    connect: Connect, tokenizer: Tokenizer
) -> None:
    """What comes from the store may be as large as if the client had sent all of it, and counts
    with its values."""
    model = Model(connect, tokenizer, max_model_len=1 << 20, max_body_bytes=20_000)
    one = await model.answer(input="x" * 15_000)
    two = await model.answer(input="x" * 15_000, previous_response_id=one["id"])
    long = await model.post(previous_response_id=two["id"])
    assert long.json()["error"]["param"] == "input"
    assert "bytes" in long.json()["error"]["message"]
    many = Model(connect, tokenizer, max_model_len=1 << 20)
    call = {"type": "function_call", "call_id": "c", "name": "f"}
    call |= {"arguments": json.dumps([{}] * 40_000)}
    one = await many.answer(input=[USER, call, call])
    two = await many.answer(input=[call, call, call], previous_response_id=one["id"])
    refused = await many.post(previous_response_id=two["id"])
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "input"
    assert "objects" in refused.text


def entry(number: int, size: int, previous: StoredResponse | None = None) -> StoredResponse:
    """A response of `size` bytes, besides what every response counts, with one item."""
    return StoredResponse(f"r{number}", b"x" * size, [], {f"i{number}": b""}, previous)


BASE = entry(0, 0).num_bytes


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "carry on", "get", "delete"]),
            st.sampled_from([None, 0, 1]),
            st.integers(0, 30),
            st.integers(0, 3000),
        ),
        max_size=60,
    )
)
@settings(max_examples=100, deadline=None)
def test_the_store_keeps_its_limits(moves: list[tuple[str, int | None, int, int]]) -> None:
    """Whatever happens, the store holds at most so many responses and bytes, counts every response
    that is still held once, and finds the items of those, and only those, that it has."""
    store = ResponseStore(max_responses=5, max_bytes=3 * BASE + 5000)
    added: dict[tuple[int | None, str], StoredResponse] = {}
    for number, (move, key, other, size) in enumerate(moves):
        name = f"r{other}"
        match move:
            case "get":
                found = store.get(key, name)
                assert found is None or found is added[key, name]
            case "delete":
                assert store.delete(key, name) == ((key, name) in _stored(store, added))
            case _:
                previous = store.get(key, name) if move == "carry on" else None
                response = entry(100 + number, size, previous)
                added[key, response.id] = response
                store.add(key, response)
        left = _stored(store, added)
        held = {one.id: one for response in left.values() for one in response.chain}
        assert store.num_bytes == sum(one.num_bytes for one in held.values()) <= 3 * BASE + 5000
        assert len(store) == len(left) <= 5
        for (owner, _), response in added.items():
            [item] = response.output_items
            is_there = (owner, response.id) in left
            assert (store.item(owner, item) is not None) == is_there


def _stored(
    store: ResponseStore, added: dict[tuple[int | None, str], StoredResponse]
) -> dict[tuple[int | None, str], StoredResponse]:
    """Those of the responses that the store has, found by their items, which changes no order."""
    return {
        (key, id): response
        for (key, id), response in added.items()
        if store.item(key, next(iter(response.output_items))) is not None
    }


def test_the_key_that_holds_most_makes_room() -> None:
    """A key that stores much pushes out its own responses, the least recently used first."""
    store = ResponseStore(max_responses=4, max_bytes=1 << 20)
    store.add(1, entry(1, 0))
    for number in range(2, 5):
        store.add(0, entry(number, 0))
    assert store.get(0, "r2") is not None
    store.add(0, entry(5, 0))
    assert store.get(1, "r1") is not None
    assert [store.get(0, f"r{number}") is not None for number in range(2, 6)] == [
        *(True, False, True, True)
    ]


def every_chain(length: int) -> Iterator[StoredResponse]:
    one: StoredResponse | None = None
    for number in range(length):
        one = entry(number, 0, one)
        yield one


def test_a_long_conversation_is_counted_once() -> None:
    """A response that carries on another one keeps it alive, and neither is counted twice."""
    store = ResponseStore(max_responses=2, max_bytes=1 << 20)
    for one in every_chain(100):
        store.add(None, one)
    assert len(store) == 2
    assert store.num_bytes == 100 * BASE
    assert store.delete(None, "r99")
    assert store.delete(None, "r98")
    assert store.num_bytes == 0
