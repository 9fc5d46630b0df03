"""Models of request bodies: fields that are accepted take effect, and everything else is refused
with its name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from minisrv.checkpoint import GenerationConfig
from minisrv.request import SamplingParams
from minisrv.server import unsupported
from minisrv.server.messages import Message
from minisrv.server.request_schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    StreamOptions,
)

SILENT = GenerationConfig()
USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hi", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [USER], **fields})


def refused(make: Any, **fields: Any) -> str:
    """The path of the field that is refused."""
    with pytest.raises(ValidationError) as raised:
        make(**fields)
    first = raised.value.errors()[0]
    path = [*first["loc"], *([first["ctx"]["field"]] if "field" in first.get("ctx", {}) else [])]
    return ".".join(map(str, path))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_the_four_spellings_of_prompt(prompt: object, expected: object) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    "prompt",
    [
        *(None, 1, True, {}, [], [[]], [None], ["a", 1], [1, "a"], [[1], "a"], [1.0], [True]),
        *([-1], [2**31], [[1, True]], [["a"]], ["\ud800"], ["a"] * 65, [[1]] * 65),
    ],
)
def test_prompts_that_are_none(prompt: object) -> None:
    assert refused(completion, prompt=prompt) == "prompt"


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("model", ["x"], [1, "x" * 513, "\ud800"]),
        ("n", [1, 128], [0, -1, 129, 1.0, "2", True]),
        ("max_tokens", [1, 2**31 - 1], [0, -1, 2**31, 1.0, "1", True, 10**400]),
        ("min_tokens", [0, 2**31 - 1], [-1, 2**31, 1.0, "1", True]),
        (
            "logit_bias",
            [{}, {"5": -100, "0": 1.5}, {str(i): 1 for i in range(300)}],
            [
                *({"5": 101}, {"5": "1"}, {"5": True}, {"5": float("nan")}, {"5": None}, {"x": 1}),
                *({"-1": 1}, {"01": 1}, {"²": 1}, {str(2**31): 1}, {"1" * 5000: 1}, [[5, 1]], "5"),
                {str(i): 1 for i in range(301)},
            ],
        ),
        ("presence_penalty", [0, -2, 2.0], [2.1, -2.1, "1", True, float("nan")]),
        ("frequency_penalty", [0, -2, 2.0], [2.1, -2.1, "1", True, float("inf")]),
        ("repetition_penalty", [1, 0.01, 100], [0, 101, -1, "1", True]),
        ("temperature", [0, 2, 0.5], [-0.1, 2.1, "1", True, float("nan"), float("inf")]),
        ("top_p", [1, 0.1], [0, 1.1, float("nan")]),
        ("top_k", [-1, 0, 5], [-2, 2**31, 1.5]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("seed", [0, -(2**63), 2**63 - 1], [2**63, 1.5, "1"]),
        ("stop", ["x", ["x"] * 16, []], ["", ["x"] * 17, [""], 1, [1], "x" * 513]),
        ("stop_token_ids", [[], [0] * 64], [[0] * 65, [-1], [True], 1, ["1"]]),
        ("include_stop_str_in_output", [True, False], [1, "true"]),
        ("ignore_eos", [True, False], [1, "true"]),
        ("stream", [True, False], [1, "true"]),
        ("return_token_ids", [True], [1]),
        ("include_graph_steps", [True], [1]),
        ("prompt_logprobs", [0, 20], [-1, 21, 1.0, "1", True]),
        ("cache_salt", ["x", "x" * 512], ["", 1, "x" * 513, "\ud800"]),
        ("user", ["x"], [1, "x" * 513]),
        ("metadata", [{}, {"a": "b"}], [{"a": 1}, {str(i): "" for i in range(17)}, "x"]),
        ("store", [True], [1]),
    ],
)
@pytest.mark.parametrize("make", [completion, chat])
def test_bounds(make: Any, field: str, good: list[object], bad: list[object]) -> None:
    """The good values of each field and null are accepted, the bad ones are refused."""
    for value in [*good, None]:
        make(**{field: value})
    for value in bad:
        assert refused(make, **{field: value}).startswith(field)


@pytest.mark.parametrize("make", [completion, chat])
def test_null_is_absent_in_every_optional_field(make: Any) -> None:
    """Clients send their own optional fields as nulls, also inside other fields."""
    optional = (
        name for name, field in type(make()).model_fields.items() if not field.is_required()
    )
    assert make(**dict.fromkeys(optional)) == make()
    options = {"stream": True, "stream_options": {}}
    inner = dict.fromkeys(StreamOptions.model_fields)
    assert make(**options | {"stream_options": inner}) == make(**options)
    if make is chat:
        part = {"type": "text", "text": "hi"}
        message = dict.fromkeys([*Message.model_fields, *unsupported.MESSAGE])
        message |= USER | {"content": [part | {"refusal": None}]}
        assert chat(messages=[message]) == chat(messages=[USER])


def test_logprobs() -> None:
    """`logprobs` is a number in completions and a boolean, with `top_logprobs`, in chats."""
    assert completion().num_logprobs is None
    assert completion(logprobs=0).num_logprobs == 0
    assert completion(logprobs=20).num_logprobs == 20
    assert refused(completion, logprobs=21) == "logprobs"
    assert refused(completion, logprobs=True) == "logprobs"
    assert chat(logprobs=False).num_logprobs is None
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).num_logprobs == 5
    assert refused(chat, logprobs=True, top_logprobs=21) == "top_logprobs"
    assert refused(chat, top_logprobs=5) == "top_logprobs"
    assert chat(logprobs=False, top_logprobs=0).num_logprobs is None
    assert refused(chat, logprobs=5) == "logprobs"


def test_echo_and_prompt_logprobs() -> None:
    assert completion(echo=True).num_scored_logprobs is None
    assert completion(echo=True, logprobs=0).num_scored_logprobs == 0
    assert completion(logprobs=3).num_scored_logprobs is None
    assert completion(prompt_logprobs=2).num_scored_logprobs == 2
    assert completion(echo=True, logprobs=3, prompt_logprobs=2).num_scored_logprobs == 3
    assert chat(prompt_logprobs=2).num_scored_logprobs == 2
    assert refused(completion, echo=1) == "echo"
    for make in (completion, chat):
        assert refused(make, prompt_logprobs=2, stream=True) == "prompt_logprobs"


def test_no_tokens_are_asked_for_only_where_there_is_something_else() -> None:
    """max_tokens=0 is allowed only if the prompt is echoed or scored."""
    assert completion(max_tokens=0, echo=True).token_limit == 0
    assert completion(max_tokens=0, prompt_logprobs=0).token_limit == 0
    assert refused(completion, max_tokens=0, logprobs=1) == "max_tokens"
    assert refused(chat, max_tokens=0, prompt_logprobs=1) == "max_tokens"


def test_stream_options() -> None:
    assert completion(stream=True, stream_options={"include_usage": True}).include_usage
    assert not completion(stream=True, stream_options={"include_usage": None}).include_usage
    assert refused(chat, stream_options={"include_usage": True}) == "stream_options"
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert completion(stream=True, stream_options=options).continuous_usage
    for usage in (False, None):
        options["include_usage"] = usage
        assert not completion(stream=True, stream_options=options).continuous_usage
    for obfuscated in (True, False):
        assert chat(stream=True, stream_options={"include_obfuscation": obfuscated})
    options = {"include_usage": True, "what": True}
    assert refused(chat, stream=True, stream_options=options) == "stream_options.what"


def test_choices_of_all_prompts_are_bounded() -> None:
    assert completion(prompt=["a"] * 64, n=2).n == 2
    assert refused(completion, prompt=["a"] * 64, n=3) == "n"


@pytest.mark.parametrize(
    ("seed", "choice", "expected"), [(7, 0, 7), (7, 3, 10), (2**63 - 1, 2, -(2**63) + 1)]
)
def test_the_seed_of_a_choice(seed: int, choice: int, expected: int) -> None:
    """Choice i has the seed of the request plus i, wrapped around in 64 bits; without a seed no
    choice has one."""
    assert completion(n=4, seed=seed).sampling_params(SILENT, 9, choice=choice).seed == expected
    assert completion(n=4).sampling_params(SILENT, 9, choice=choice).seed is None


def test_the_two_names_of_max_tokens() -> None:
    assert chat().token_limit is None
    assert chat(max_tokens=3).token_limit == 3
    assert chat(max_completion_tokens=4).token_limit == 4
    assert chat(max_completion_tokens=4, max_tokens=4).token_limit == 4
    assert refused(chat, max_completion_tokens=4, max_tokens=3) == "max_tokens"
    assert refused(completion, max_completion_tokens=4) == "max_completion_tokens"


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
BROKEN = {"name": "f", "arguments": 1}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": []}, "messages.0.content"),
        ({"role": "user", "content": 1}, "messages.0.content"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "", "content": "x"}, "messages.0.role"),
        ({"role": "a\nb", "content": "x"}, "messages.0.role"),
        ({"role": "tool", "tool_call_id": "c"}, "messages.0.content"),
        (USER | {"name": 1}, "messages.0.name"),
        (USER | {"images": ["x"]}, "messages.0.images"),
        (USER | {"attachments": [{}]}, "messages.0.attachments"),
        ({"role": "assistant", "content": "x", "prefix": True}, "messages.0.prefix"),
        ({"role": "assistant", "content": "x", "partial": True}, "messages.0.partial"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages.0.audio"),
        (USER | {"function_call": {"name": "f"}}, "messages.0.function_call"),
        (
            {"role": "assistant", "tool_calls": [CALL], "function_call": {"name": "f"}},
            "messages.0.function_call",
        ),
        (USER | {"refusal": "no"}, "messages.0.refusal"),
        (USER | {"content": [{"type": "text"}]}, "messages.0.content.0.text"),
        (USER | {"content": [{"type": "text", "refusal": "a"}]}, "messages.0.content.0.text"),
        (USER | {"tool_calls": [CALL]}, "messages.0.tool_calls"),
        (USER | {"tool_call_id": "c"}, "messages.0.tool_call_id"),
        (USER | {"reasoning_content": "hm"}, "messages.0.reasoning_content"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages.0.tool_calls.0.function"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]},
            "messages.0.tool_calls.0.type",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"arguments": "{}"}}]},
            "messages.0.tool_calls.0.function.name",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": BROKEN}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content.0.type"),
        ("hi", "messages.0"),
    ],
)
def test_messages_that_are_refused(message: object, param: str) -> None:
    assert refused(chat, messages=[message]) == param


def test_a_call_and_its_result_as_templates_expect_them() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"}
    result = {"role": "tool", "tool_call_id": "c", "content": "3"}
    first, second = (m.for_template() for m in chat(messages=[asked, result]).messages)
    function = {"name": "f", "arguments": {"a": 1}}
    assert first == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
        "reasoning_content": "hm",
    }
    assert second == result


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type"),
        ({"tools": [TOOL | {"function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {str(i): i for i in range(17)}}, "chat_template_kwargs"),
        ({"functions": [{}]}, "functions"),
    ],
)
def test_what_is_wrong_with_tools(fields: dict[str, object], param: str) -> None:
    found = refused(chat, messages=[USER], **fields)
    assert found is not None
    assert found.startswith(param)


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"functions": []}])
@pytest.mark.parametrize("choice", ["tool_choice", "function_call"])
@pytest.mark.parametrize("value", ["none", "auto"])
def test_a_choice_among_no_tools(fields: dict[str, object], choice: str, value: str) -> None:
    """What asks for no call is accepted without tools, as clients send it with every request."""
    body = chat(messages=[USER], **fields, **{choice: value})
    assert (body.offered_tools, body.required_tools) == ([], [])


def test_messages() -> None:
    assert refused(chat, messages=[]) == "messages"
    assert refused(chat, messages=None) == "messages"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": "x"}, USER | {"content": parts}])
    assert [message.for_template() for message in request.messages] == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]


@pytest.mark.parametrize(
    "more",
    [
        # openai-python sends absent parts of a message as nulls.
        {"refusal": None, "annotations": [], "audio": None, "function_call": None},
        {"tool_calls": None, "reasoning": None, "reasoning_content": None},
        {"tool_calls": [], "annotations": [{"type": "url_citation", "url_citation": {}}]},
        # Fields that other servers and clients add.
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}], "index": 0},
        {"provider_specific_fields": {"refusal": None}, "id": "msg_1", "citations": None},
        {"thinking_blocks": [], "cache_control": {"type": "ephemeral"}, "images": []},
        {"content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        {"content": [{"type": "text", "text": "x", "annotations": [], "logprobs": []}]},
        {"content": [{"type": "refusal", "refusal": "x"}]},
        {"content": None, "refusal": "x"},
        {"refusal": "x", "content": ""},
    ],
)
def test_an_answer_can_be_sent_back_as_the_client_holds_it(more: dict[str, Any]) -> None:
    """Extra fields of an earlier answer change nothing in what the template sees."""
    answer = {"role": "assistant", "content": "x"} | more
    told = chat(messages=[USER, answer, USER]).messages[1].for_template()
    assert told == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    "nothing", [{}, {"content": None}, {"content": ""}, {"content": []}, {"tool_calls": []}]
)
def test_an_answer_may_be_empty(nothing: dict[str, Any]) -> None:
    answer = {"role": "assistant"} | nothing
    told = chat(messages=[USER, answer, USER]).messages[1].for_template()
    assert told == {"role": "assistant", "content": ""}


def test_names_of_speakers() -> None:
    for role in ("system", "developer", "user", "assistant", "tool"):
        message = {"role": role, "content": "x", "name": "Ada"}
        assert chat(messages=[message]).messages[0].for_template()["name"] == "Ada"


@pytest.mark.parametrize(
    ("arguments", "told", "whole"),
    [
        ('{"a": 1}', {"a": 1}, {"a": 1}),
        ({"a": 1}, {"a": 1}, {"a": 1}),
        ("", {}, {}),
        (None, {}, {}),
        ('{"city": "Ro', '{"city": "Ro', {"city": "Ro"}),
        ('{"a": {"b": [1, 2', '{"a": {"b": [1, 2', {"a": {"b": [1, 2]}}),
        ("{", "{", {}),
        ("Rome", "Rome", {}),
        ("[1]", "[1]", {}),
        ("null", "null", {}),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}', {}),
    ],
)
def test_arguments_that_are_no_json(arguments: object, told: object, whole: object) -> None:
    """Arguments of an earlier call that are no JSON object reach the template as their text, or,
    with `whole_calls`, as an object of what is complete in them."""
    call = CALL | {"function": {"name": "any, of the model's", "arguments": arguments}, "index": 0}
    answer = {"role": "assistant", "tool_calls": [call | {"id": None}]}
    [message] = chat(messages=[answer]).messages
    for whole_calls, expected in ((False, told), (True, whole)):
        [spelled] = message.for_template(whole_calls=whole_calls)["tool_calls"]
        assert spelled["function"] == {"name": "any, of the model's", "arguments": expected}
        assert "id" not in spelled


TABLES = [
    (completion, unsupported.EVERYWHERE | unsupported.COMPLETION_ONLY),
    (chat, unsupported.EVERYWHERE | unsupported.CHAT_ONLY),
]


@pytest.mark.parametrize(("make", "table"), TABLES)
def test_unsupported_fields_are_accepted_where_they_ask_for_nothing(
    make: Any, table: dict[str, tuple[object, ...]]
) -> None:
    for name, neutral in table.items():
        for value in (*neutral, None):
            make(**{name: value})
        assert refused(make, **{name: ["something", 7]}) == name


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("guided_whitespace_pattern", " "),
        ("what_is_this", 1),
    ],
)
def test_what_is_not_supported_is_refused_by_name(make: Any, field: str, value: object) -> None:
    assert refused(make, **{field: value}) == field


HINTS = ("verbosity", "service_tier", "prediction", "moderation")
HINTS += ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")


@pytest.mark.parametrize("make", [completion, chat])
def test_hints_change_nothing(make: Any) -> None:
    """Hints to routing, storage and billing change nothing in the sampling parameters, whatever
    their values."""
    config = GenerationConfig()
    told = {"type": "content", "content": "x"}
    for value in ("low", "24h", told, {"ttl": 5}, [told], True, 1):
        hints = {name: value for name in HINTS if name != "prompt_cache_key"}
        assert make(**hints).sampling_params(config, 9) == make().sampling_params(config, 9)


def test_an_empty_name_of_a_model_is_none() -> None:
    """An empty model name counts as none."""
    assert chat(model="").model is None
    assert completion(model="x").model == "x"


def test_no_field_is_both_supported_and_not() -> None:
    for model, (_, table) in zip((CompletionRequest, ChatCompletionRequest), TABLES, strict=True):
        assert not set(model.model_fields) & set(table)


def test_every_supported_field_does_something() -> None:
    """A field that is accepted without effect is a defect, unless its description says that it is
    ignored."""
    ignored = {"user", "metadata", "store", "safety_identifier", *HINTS}
    for name in ignored:
        assert (GenerationRequest.model_fields[name].description or "").startswith("Ignored")
    handled = {"model", "stream", "stream_options", "return_token_ids", "include_graph_steps"}
    handled |= {
        "prompt_logprobs",
        "stop",
        "max_tokens",
        "cache_salt",
        "n",
        "include_stop_str_in_output",
        "priority",
        "response_format",
        "structured_outputs",
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("bad_words", "truncate_prompt_tokens", "return_tokens_as_token_ids"),
    }
    # The server itself handles those; the following ones are passed to the engine.
    sampling = {"temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos"}
    sampling |= {"min_tokens", "logit_bias", "allowed_token_ids"}
    sampling |= {"presence_penalty", "frequency_penalty", "repetition_penalty"}
    assert set(GenerationRequest.model_fields) == ignored | handled | sampling
    assert sampling <= set(SamplingParams.__struct_fields__)


def test_sampling_defaults_are_the_checkpoint_s_and_then_openai_s() -> None:
    """Parameters that a request leaves out come from the checkpoint's generation config, and
    otherwise from OpenAI's defaults."""
    assert completion().sampling_params(SILENT, 9) == SamplingParams(max_tokens=9)
    config = GenerationConfig(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1)
    expected = SamplingParams(max_tokens=9, temperature=0.6, top_p=0.9, top_k=20, min_p=0.1)
    assert chat().sampling_params(config, 9) == expected
    neutral = chat(temperature=0, top_p=1, top_k=-1, min_p=0).sampling_params(config, 9)
    assert neutral == SamplingParams(max_tokens=9, temperature=0.0, top_k=-1)


def test_sampling_parameters_reach_the_engine() -> None:
    same: dict[str, Any] = {"seed": -3, "ignore_eos": True, "logprobs": 2, "min_tokens": 2}
    same |= {"presence_penalty": 0.5, "frequency_penalty": -1.5, "repetition_penalty": 1.2}
    same["prompt_logprobs"] = 1
    params = completion(
        stop="x", stop_token_ids=[4], logit_bias={"7": -3, "8": 0.5}, **same
    ).sampling_params(SILENT, 5)
    assert params == SamplingParams(
        max_tokens=5, stop_token_ids=(4,), logit_bias={7: -3.0, 8: 0.5}, **same
    )
