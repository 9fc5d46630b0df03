"""How a chat's prompt is rendered: where it ends, for which roles, and with which variables; and
what an answer then begins with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from minisrv.request import FinishReason
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, outputs, sse
from tests.text import tiny_tokenizer
from tests.text.tiny_tokenizer import tokenizer_of

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
TEMPLATE = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant', 'tool', 'critic'] %}"
    "<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }}]"
    "{% endfor %}</{{ m.role }}>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# <tool_call> {{ tools }} #}"
)
SWITCH = TEMPLATE + "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
EFFORT = TEMPLATE + "{{ reasoning_effort | default('') }}"
BOTH = SWITCH + "{{ reasoning_effort | default('') }}"
THINKING = TEMPLATE + "{# <think></think> #}"
ASKED = {"role": "user", "content": "Say it"}
BEGUN = {"role": "assistant", "content": "It is "}
TOOL = {"name": "f"}
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    def make(template: str) -> Tokenizer:
        directory = tiny_tokenizer.save_chatml(tmp_path_factory.mktemp("prompts"))
        config = directory / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
        return tokenizer_of(directory)

    return make


class Chat:
    """A chat whose model always answers with `text`."""

    def __init__(self, connect: Connect, tokenizer: Tokenizer, text: str = "done") -> None:
        self.num_tokens = len(tokenizer.encode(text)) + 1
        self.engine = FakeEngine(outputs([*tokenizer.encode(text), END], FinishReason.STOP))
        self.client = connect(self.engine, tokenizer=tokenizer)
        self.tokenizer = tokenizer

    async def post(self, *messages: dict[str, Any], **body: Any) -> httpx.Response:
        body = {"messages": [*messages] or [ASKED], **body}
        return await self.client.post("/v1/chat/completions", json=body)

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.engine.requests[-1].prompt_token_ids)


@pytest.fixture
def chat(connect: Connect, make_tokenizer: Callable[[str], Tokenizer]) -> Chat:
    return Chat(connect, make_tokenizer(TEMPLATE))


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "<user>Say it</user><assistant>It is </assistant><assistant>"),
        ({"add_generation_prompt": False}, "<user>Say it</user><assistant>It is </assistant>"),
        ({"continue_final_message": True}, "<user>Say it</user><assistant>It is "),
        (
            {"continue_final_message": True, "add_generation_prompt": False},
            "<user>Say it</user><assistant>It is ",
        ),
    ],
)
async def test_where_a_prompt_ends(chat: Chat, fields: dict[str, Any], prompt: str) -> None:
    """Generations and /tokenize agree."""
    assert (await chat.post(ASKED, BEGUN, **fields)).status_code == 200
    assert chat.prompt == prompt
    body = {"messages": [ASKED, BEGUN], **fields}
    told = (await chat.client.post("/tokenize", json=body)).json()
    assert told["tokens"] == chat.engine.requests[-1].prompt_token_ids


async def test_a_text_that_holds_a_message_of_its_own_is_continued_at_its_end(chat: Chat) -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "It is "}]
    await chat.post(ASKED, BEGUN, ASKED, BEGUN | {"content": parts}, continue_final_message=True)
    assert chat.prompt.endswith("<user>Say it</user><assistant>It is \nIt is ")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"echo": True}, "It is done"),
        ({"echo": True, "continue_final_message": True}, "It is done"),
        ({"continue_final_message": True}, "done"),
        ({"echo": False}, "done"),
    ],
)
async def test_an_echo(chat: Chat, fields: dict[str, Any], content: str, stream: bool) -> None:
    response = await chat.post(ASKED, BEGUN, stream=stream, **fields)
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in sse(response.text)]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == content
    else:
        assert response.json()["choices"][0]["message"]["content"] == content
    nothing = (await chat.post(ASKED, echo=True)).json()["choices"][0]["message"]["content"]
    assert nothing == "done", "the last message is no assistant's"


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ([ASKED], {"continue_final_message": True}, "continue_final_message"),
        (
            [BEGUN],
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        (
            [BEGUN | {"function_call": {"name": "f"}}],
            {"continue_final_message": True},
            "continue_final_message",
        ),
        ([ASKED | {"role": "robot"}], {}, "messages"),
        ([ASKED], {"chat_template": "x"}, "chat_template"),
        ([ASKED], {"chat_template_kwargs": {"mood": "merry"}}, "chat_template_kwargs"),
        ([ASKED], {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ([ASKED], {"reasoning_effort": "low"}, "reasoning_effort"),
        ([ASKED], {"reasoning_effort": "most"}, "reasoning_effort"),
        ([ASKED], {"functions": [{"name": "f"}], "tools": [{}]}, "tools[0].type"),
        ([ASKED], {"functions": [{"name": "f"}, {"name": "f"}]}, "functions"),
        ([ASKED], {"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
        ([ASKED], {"function_call": {"name": "f"}}, "function_call"),
    ],
)
async def test_what_is_refused(
    chat: Chat, messages: list[dict[str, Any]], fields: dict[str, Any], param: str
) -> None:
    response = await chat.post(*messages, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_a_template_that_drops_the_last_message_cannot_continue_it(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer]
) -> None:
    chat = Chat(connect, make_tokenizer("{{ messages[0].content }}"))
    assert (await chat.post(ASKED, BEGUN)).status_code == 200
    response = await chat.post(ASKED, BEGUN, continue_final_message=True)
    assert response.json()["error"]["param"] == "continue_final_message"


async def test_roles_that_the_template_renders(chat: Chat) -> None:
    await chat.post(
        {"role": "developer", "content": "Be brief"}, {"role": "critic", "content": "No"}
    )
    assert chat.prompt == "<system>Be brief</system><critic>No</critic><assistant>"


async def test_calls_of_functions_become_calls_of_tools(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer]
) -> None:
    """The older form of tools, in messages, in a whole answer and in a stream."""
    text = 'Well. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    chat = Chat(connect, make_tokenizer(TEMPLATE.replace("{#", "").replace("#}", "")), text)
    turns = [
        ASKED,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "3"},
    ]
    fields: dict[str, Any] = {"functions": [{"name": "f"}, {"name": "g"}], "function_call": "auto"}
    answer = (await chat.post(*turns, **fields)).json()["choices"][0]
    assert "<assistant>[f]</assistant><tool>3</tool>" in chat.prompt
    assert "'name': 'g'" in chat.prompt
    assert answer["message"]["function_call"] == {"name": "f", "arguments": '{"a": 1}'}
    assert "tool_calls" not in answer["message"]
    assert answer["finish_reason"] == "function_call"
    chunks = [chunk["choices"][0] for chunk in sse((await chat.post(stream=True, **fields)).text)]
    calls = [c["delta"]["function_call"] for c in chunks if "function_call" in c["delta"]]
    assert [call["name"] for call in calls if "name" in call] == ["f"]
    assert "".join(call["arguments"] for call in calls) == '{"a": 1}'
    assert chunks[-1]["finish_reason"] == "function_call"
    await chat.post(**fields | {"function_call": {"name": "g"}})
    form = chat.engine.requests[-1].structured_output
    assert form is not None
    assert form.param == "tools"
    await chat.post(**fields | {"function_call": "none"})
    assert "'name'" not in chat.prompt


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_allowed_tools_are_all_that_the_model_is_told_of(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer], mode: str
) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("one", "two", "three")]
    chat = Chat(connect, make_tokenizer(TEMPLATE.replace("{#", "").replace("#}", "")))
    allowed = {"mode": mode, "tools": tools[1:]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    await chat.post(tools=tools, tool_choice=choice)
    assert [name in chat.prompt for name in ("one", "two", "three")] == [False, True, True]
    assert (chat.engine.requests[-1].structured_output is not None) == (mode == "required")
    response = await chat.post(tools=tools[:2], tool_choice=choice)
    assert response.json()["error"]["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("template", "effort", "end"),
    [
        (SWITCH, "none", "False"),
        (SWITCH, "minimal", "True"),
        (SWITCH, "high", "True"),
        (SWITCH.replace("enable_thinking", "thinking"), "low", "True"),
        (EFFORT, "none", "none"),
        (EFFORT, "xhigh", "xhigh"),
        (TEMPLATE, "none", ""),
        (BOTH, "none", "False"),
        (BOTH, "low", "low"),
        (THINKING, "none", None),
        (THINKING, "medium", ""),
        (THINKING, "high", None),
        (TEMPLATE, "medium", None),
    ],
)
async def test_reasoning_effort(
    connect: Connect,
    make_tokenizer: Callable[[str], Tokenizer],
    template: str,
    effort: str,
    end: str | None,
) -> None:
    chat = Chat(connect, make_tokenizer(template))
    response = await chat.post(reasoning_effort=effort)
    if end is None:
        assert response.json()["error"]["param"] == "reasoning_effort"
    else:
        assert chat.prompt == f"<user>Say it</user><assistant>{end}"


@pytest.mark.parametrize(
    ("template", "params"),
    [
        (TEMPLATE.replace("tool", ""), [("tools", "tools"), ("functions", "functions")]),
        (
            TEMPLATE.replace("<tool_call>", ""),
            [("tools", "tool_choice"), ("functions", "function_call")],
        ),
    ],
)
async def test_errors_name_the_fields_that_were_sent(
    connect: Connect,
    make_tokenizer: Callable[[str], Tokenizer],
    template: str,
    params: list[tuple[str, str]],
) -> None:
    chat = Chat(connect, make_tokenizer(template))
    for field, param in params:
        tool = TOOL if field == "functions" else {"type": "function", "function": TOOL}
        error = (await chat.post(**{field: [tool]})).json()["error"]
        assert error["param"] == param
        assert error["message"].startswith(f"{param} ")
        other = "tool_choice" if field == "functions" else "function_call"
        assert other not in error["message"]


async def test_variables_agree(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer]
) -> None:
    off = {"enable_thinking": False}
    chat = Chat(connect, make_tokenizer(SWITCH))
    response = await chat.post(reasoning_effort="low", chat_template_kwargs=off)
    assert response.json()["error"]["param"] == "reasoning_effort"
    plain = Chat(connect, make_tokenizer(TEMPLATE))
    assert (await plain.post(chat_template_kwargs=off)).status_code == 200, "it does not reason"
    always = Chat(connect, make_tokenizer(THINKING))
    response = await always.post(chat_template_kwargs=off)
    assert response.json()["error"]["param"] == "chat_template_kwargs"


REASONED = "<think>\nWhy not?\n</think>\n\nYes."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [True, False])
async def test_reasoning_is_counted_and_may_be_left_out(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer], stream: bool, include: bool
) -> None:
    """The tokens are counted up to the one that holds the end of the marker."""
    tokenizer = make_tokenizer(THINKING)
    chat = Chat(connect, tokenizer, REASONED)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await chat.post(include_reasoning=include, **options)
    if stream:
        chunks = sse(response.text)
        usage = chunks.pop()["usage"]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        told = "".join(delta.get("reasoning", "") for delta in deltas)
        content = "".join(delta.get("content", "") for delta in deltas)
    else:
        usage, message = response.json()["usage"], response.json()["choices"][0]["message"]
        told, content = message["reasoning"] or "", message["content"]
    assert told == ("Why not?" if include else "")
    assert content == "Yes."
    ids = tokenizer.encode(REASONED)
    expected = next(n for n in range(len(ids)) if "</think>" in tokenizer.decode(ids[:n]))
    assert usage["completion_tokens_details"] == {"reasoning_tokens": expected}
    assert usage["completion_tokens"] == chat.num_tokens


@pytest.mark.parametrize(
    ("text", "counts"),
    [("Yes.", False), ("<think>\nWhy", True), ("<th", False)],
)
async def test_an_answer_that_is_one_or_the_other(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer], text: str, counts: bool
) -> None:
    chat = Chat(connect, make_tokenizer(THINKING), text)
    details = (await chat.post()).json()["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": chat.num_tokens if counts else 0}


@pytest.mark.parametrize(
    ("begun", "reasoning"),
    [("It <think>", "Why not?"), ("<think>a</think>", None), ("It", None)],
)
async def test_an_answer_is_continued_inside_its_reasoning_or_behind_it(
    connect: Connect, make_tokenizer: Callable[[str], Tokenizer], begun: str, reasoning: str | None
) -> None:
    chat = Chat(connect, make_tokenizer(THINKING), "Why not?</think>Yes.")
    last = {"role": "assistant", "content": begun}
    response = await chat.post(ASKED, last, continue_final_message=True)
    message = response.json()["choices"][0]["message"]
    assert message["reasoning"] == reasoning
    assert message["content"] == ("Yes." if reasoning else "Why not?</think>Yes.")
