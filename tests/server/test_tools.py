"""Tools: how the prompt presents them, which grammar the engine must follow, and how calls come
back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from minisrv.request import FinishReason
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs, sse
from tests.text import tiny_tokenizer
from tests.text.tiny_tokenizer import tokenizer_of
from tests.text.walks import follow

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} <tool_call>{% endfor %}"
    "{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}"
    "{% endfor %}{% if mood is defined %}{{ mood }}{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = TEMPLATE + "{# <think></think> #}"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time"}}
MESSAGES = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TIME_CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    def make(template: str) -> Tokenizer:
        directory: Path = tiny_tokenizer.save_chatml(tmp_path_factory.mktemp("tools"))
        config = directory / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
        return tokenizer_of(directory)

    return make


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[[str], Tokenizer]) -> Tokenizer:
    return make_tokenizer(TEMPLATE)


class Chat:
    """A chat with tools, whose model always answers with `text`."""

    def __init__(self, connect: Connect, tokenizer: Tokenizer, text: str) -> None:
        ids = [*tokenizer.encode(text), END]
        self.engine = FakeEngine(outputs(ids, FinishReason.STOP))
        self._client = connect(self.engine, tokenizer=tokenizer)
        self._tokenizer = tokenizer

    async def post(self, **body: Any) -> httpx.Response:
        body = {"messages": MESSAGES, "tools": [WEATHER, TIME], **body}
        async with self._client as client:
            return await client.post("/v1/chat/completions", json=body)

    @property
    def prompt(self) -> str:
        """The prompt of the first request, as text."""
        return self._tokenizer.decode(self.engine.requests[0].prompt_token_ids)


async def test_a_call_in_a_whole_answer(connect: Connect, tokenizer: Tokenizer) -> None:
    chat = Chat(connect, tokenizer, f"Let me see.\n{CALL}")
    answer = (await chat.post()).json()["choices"][0]
    assert chat.prompt.startswith("weather <tool_call>time")
    assert chat.engine.requests[0].structured_output is None
    [call] = answer["message"].pop("tool_calls")
    assert call.pop("id").startswith("call_")
    assert call == {
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    nothing = dict.fromkeys(("refusal", "reasoning", "reasoning_content"))
    assert answer["message"] == {"role": "assistant", "content": "Let me see."} | nothing
    assert answer["finish_reason"] == "tool_calls"


async def test_calls_alone_have_no_content(connect: Connect, tokenizer: Tokenizer) -> None:
    answer = (await Chat(connect, tokenizer, f"{CALL}\n{CALL}").post()).json()["choices"][0]
    assert answer["message"]["content"] is None
    assert len({call["id"] for call in answer["message"]["tool_calls"]}) == 2


async def test_one_call_if_no_more_are_wanted(connect: Connect, tokenizer: Tokenizer) -> None:
    chat = Chat(connect, tokenizer, f"{CALL}\n{CALL}")
    answer = (await chat.post(parallel_tool_calls=False)).json()["choices"][0]
    assert len(answer["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("usage", [False, True])
async def test_a_call_in_a_stream(connect: Connect, tokenizer: Tokenizer, usage: bool) -> None:
    chat = Chat(connect, tokenizer, f"Let me see.\n{CALL}")
    options = {"include_usage": True, "continuous_usage_stats": True} if usage else {}
    response = await chat.post(stream=True, stream_options=options, logprobs=True)
    chunks = [chunk["choices"][0] for chunk in sse(response.text) if chunk["choices"]]
    deltas = [chunk["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me see."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert {call["index"] for call in calls} == {0}
    assert set(calls[0]) == {"index", "id", "type", "function"}
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert all(set(call) == {"index", "function"} for call in calls[1:])
    assert len(calls) > 3, "arguments come as they are written"
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "Rome"}
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == ["tool_calls"]


async def test_every_token_is_told_beside_calls(connect: Connect, tokenizer: Tokenizer) -> None:
    chat = Chat(connect, tokenizer, f"Let me see.\n{CALL}")
    response = await chat.post(stream=True, return_token_ids=True)
    chunks = [chunk["choices"][0] for chunk in sse(response.text)]
    told = [i for chunk in chunks for i in chunk["token_ids"] or ()]
    assert told == [*tokenizer.encode(f"Let me see.\n{CALL}"), END]


async def test_no_tools_no_calls(connect: Connect, tokenizer: Tokenizer) -> None:
    """With tool_choice "none" the template gets no tools, and what looks like a call is content."""
    chat = Chat(connect, tokenizer, CALL)
    answer = (await chat.post(tool_choice="none")).json()["choices"][0]
    assert answer["message"]["content"] == CALL
    assert answer["finish_reason"] == "stop"
    assert "weather" not in chat.prompt


@pytest.mark.parametrize(
    ("choice", "names", "many"),
    [
        ("required", ["weather", "time"], True),
        ({"type": "function", "function": {"name": "time"}}, ["time"], False),
    ],
)
async def test_a_call_that_is_forced(
    connect: Connect, tokenizer: Tokenizer, choice: Any, names: list[str], many: bool
) -> None:
    """With a forced call the engine gets a grammar that allows the chosen tools only, and several
    calls only for "required"."""
    chat = Chat(connect, tokenizer, CALL)
    response = await chat.post(tool_choice=choice)
    assert response.status_code == 200, response.text
    form = chat.engine.requests[0].structured_output
    assert form is not None
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, [END])
    calls = {"weather": CALL, "time": TIME_CALL}
    followed = [name for name, call in calls.items() if follow(backend, tokenizer, form, call)]
    assert followed == names
    assert follow(backend, tokenizer, form, f"{TIME_CALL}\n{TIME_CALL}") == many
    assert not follow(backend, tokenizer, form, "It is noon.")
    assert response.json()["choices"][0]["message"]["tool_calls"]


async def test_parameters_that_no_grammar_follows(connect: Connect, tokenizer: Tokenizer) -> None:
    """Parameters that are no object cannot be forced, and are refused."""
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
    response = await Chat(connect, tokenizer, CALL).post(tools=[bad], tool_choice="required")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"


@pytest.mark.parametrize(
    ("template", "fields", "param"),
    [
        (tiny_tokenizer.CHATML, {}, "tools"),
        (TEMPLATE.replace("<tool_call>", ""), {}, "tool_choice"),
        (
            tiny_tokenizer.CHATML,
            {
                "tools": [],
                "messages": [*MESSAGES, {"role": "tool", "content": "3", "tool_call_id": "c"}],
            },
            "messages",
        ),
        (TEMPLATE, {"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        (TEMPLATE, {"chat_template_kwargs": {"raise_exception": 1}}, "chat_template_kwargs"),
    ],
)
async def test_what_a_model_has_not_learned(
    connect: Connect,
    make_tokenizer: Callable[[str], Tokenizer],
    template: str,
    fields: dict[str, Any],
    param: str,
) -> None:
    """A request with tools, results of tools or variables that the chat template cannot take is
    refused with 400."""
    response = await Chat(connect, make_tokenizer(template), "x").post(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_earlier_calls_reach_the_template(connect: Connect, tokenizer: Tokenizer) -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    call = {"id": "c", "type": "function", "function": function}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    chat = Chat(connect, tokenizer, "It rains.")
    assert (await chat.post(messages=turns)).status_code == 200
    assert chat.prompt.endswith("assistant: Rometool: rainassistant: ")


ITEMS = TEMPLATE.replace(
    "{{ call.function.arguments.city }}",
    "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }}{% endfor %}",
)
AS_TEXT = TEMPLATE.replace(".arguments.city", ".arguments")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("template", "told"),
    [(AS_TEXT, '{"city": "Ro'), (ITEMS, "city=Ro"), (TEMPLATE, "")],
)
async def test_a_call_that_was_cut_off_is_accepted_on_later_turns(
    connect: Connect,
    make_tokenizer: Callable[[str], Tokenizer],
    template: str,
    told: str,
    stream: bool,
) -> None:
    """A tool call that max_tokens cut off can be sent back as an earlier turn, whatever the
    template does with its arguments."""
    tokenizer = make_tokenizer(template)
    engine = FakeEngine(outputs(tokenizer.encode(CALL[: CALL.index('me"}')])))
    body: dict[str, Any] = {"messages": MESSAGES, "tools": [WEATHER], "stream": stream}
    async with connect(engine, tokenizer=tokenizer) as client:
        response = await client.post("/v1/chat/completions", json=body)
        if stream:
            answer: dict[str, Any] = {"role": "assistant", "content": ""}
            calls: list[dict[str, Any]] = []
            for chunk in sse(response.text):
                for part in chunk["choices"][0]["delta"].get("tool_calls", ()):
                    if "id" in part:
                        calls.append(part)
                    else:
                        calls[-1]["function"]["arguments"] += part["function"]["arguments"]
            answer["tool_calls"] = calls
        else:
            answer = response.json()["choices"][0]["message"]
            assert response.json()["choices"][0]["finish_reason"] == "length"
        [call] = answer["tool_calls"]
        assert call["function"]["arguments"] == '{"city": "Ro'
        result = {"role": "tool", "tool_call_id": call["id"], "content": "invalid", "name": "w"}
        turns = [*MESSAGES, answer, result]
        again = await client.post("/v1/chat/completions", json=body | {"messages": turns})
    assert again.status_code == 200, again.text
    prompt = tokenizer.decode(engine.requests[1].prompt_token_ids)
    assert prompt.endswith(f"assistant: {told}tool: invalidassistant: ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<tool_call>\n",
        '<tool_call>\n{"name": "weather", "arguments": ',
        '<tool_call>\n{"name": "weather", "arguments": {',
        '<tool_call>\n{"name": "not a name!", "arguments": {}}',
        '<tool_call>\n{"name": "\\ud800", "arguments": {"a": "\\ud800"}}',
        '<tool_call>\n{"arguments": {"a": "\\ud800"}, "name": "f"}',
        '<tool_call>\n{"name": "f", "arguments": {a: 1}}',
        '<tool_call>\n{"name": "f", "arguments": {"a": ' + "[" * 120,
        "<think>Which city?",
        "<think>Which city?</think>",
    ],
)
async def test_what_the_server_has_said_is_accepted_on_later_turns(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer], text: str
) -> None:
    """Every answer of the server, however broken its calls, is accepted as an earlier turn."""
    tokenizer = make_tokenizer(ITEMS + "{# <think></think> #}")
    engine = FakeEngine(outputs([*tokenizer.encode(text), END]))
    engine.info = msgspec.structs.replace(INFO, max_model_len=2000)
    body: dict[str, Any] = {"messages": MESSAGES, "tools": [WEATHER]}
    async with connect(engine, tokenizer=tokenizer) as client:
        answer = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        turns = [*MESSAGES, answer["message"], *MESSAGES]
        again = await client.post("/v1/chat/completions", json=body | {"messages": turns})
    assert again.status_code == 200, again.text


async def test_variables_reach_the_template(connect: Connect, tokenizer: Tokenizer) -> None:
    """chat_template_kwargs are variables of the template."""
    chat = Chat(connect, tokenizer, "Hello")
    assert (await chat.post(chat_template_kwargs={"mood": "merry"})).status_code == 200
    assert chat.prompt.endswith("merryassistant: ")


async def test_reasoning(connect: Connect, make_tokenizer: Callable[[str], Tokenizer]) -> None:
    text = f"<think>\nWhich city?\n</think>\n\nLet me see.\n{CALL}"
    chat = Chat(connect, make_tokenizer(THINKING), text)
    message = (await chat.post()).json()["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Which city?"
    assert message["content"] == "Let me see."
    assert len(message["tool_calls"]) == 1
    chat = Chat(connect, make_tokenizer(THINKING), text)
    chunks = sse((await chat.post(stream=True, tools=[])).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Which city?"
    assert "".join(delta.get("content", "") for delta in deltas) == f"Let me see.\n{CALL}"


async def test_a_form_begins_behind_the_reasoning(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer]
) -> None:
    """The grammar of a structured output starts to apply after the reasoning."""
    chat = Chat(connect, make_tokenizer(THINKING), "<think></think>{}")
    await chat.post(tools=[], response_format={"type": "json_object"})
    form = chat.engine.requests[0].structured_output
    assert form is not None
    assert (form.reasoning_start, form.reasoning_end) == ("<think>", "</think>")


FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}


@pytest.mark.parametrize(
    ("choice", "followed"),
    [
        ("auto", ["call", "calls", "text"]),
        ("required", ["call", "calls"]),
        ({"type": "function", "function": {"name": "weather"}}, ["call"]),
        ("none", ["text"]),
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, THINKING])
async def test_tools_beside_a_format(
    connect: Connect,
    make_tokenizer: Callable[[str], Tokenizer],
    template: str,
    choice: Any,
    followed: list[str],
) -> None:
    """The answer is calls, or text in the format, as far as the tool choice allows either."""
    tokenizer = make_tokenizer(template)
    chat = Chat(connect, tokenizer, CALL)
    response = await chat.post(tool_choice=choice, response_format=FORM)
    assert response.status_code == 200, response.text
    form = chat.engine.requests[0].structured_output
    assert form is not None
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, [END])
    texts = {"call": CALL, "calls": f"{CALL}\n{CALL}", "text": '{"city": "Rome"}', "other": "Hi"}
    assert [n for n, text in texts.items() if follow(backend, tokenizer, form, text)] == followed
    if template is THINKING:
        behind = f"<think>Hm.</think>\n\n{texts[followed[-1]]}"
        assert follow(backend, tokenizer, form, behind)


async def test_a_text_beside_tools(connect: Connect, tokenizer: Tokenizer) -> None:
    """A text in the format is the content, also if tools could have been called."""
    text = '{"city": "Rome"}'
    response = await Chat(connect, tokenizer, text).post(response_format=FORM)
    choice = response.json()["choices"][0]
    assert choice["message"]["content"] == text
    assert choice["finish_reason"] == "stop"


async def test_what_is_wrong_with_tools_beside_a_format(
    connect: Connect, tokenizer: Tokenizer
) -> None:
    """Parameters that no grammar can follow are refused under the name of the tools, without the
    grammar that is made of them, and what is wrong with the format under its own name."""
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
    response = await Chat(connect, tokenizer, CALL).post(tools=[bad], response_format=FORM)
    assert response.json()["error"]["param"] == "tools"
    bad["function"] = {"name": "f", "parameters": {"properties": {"a": {"type": "strange"}}}}
    response = await Chat(connect, tokenizer, CALL).post(tools=[bad], response_format=FORM)
    error = response.json()["error"]
    assert error["param"] == "tools"
    assert error["message"].endswith("Invalid type: strange.")
    wrong: dict[str, Any] = {"structured_outputs": {"regex": "(a"}}
    error = (await Chat(connect, tokenizer, CALL).post(**wrong)).json()["error"]
    assert error["param"] == "structured_outputs"
    assert error["message"].endswith("unclosed group.")
