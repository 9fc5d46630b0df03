"""The tokenizer gives the same results as transformers, and its errors say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minisrv.errors import ModelError, RequestError
from minisrv.text.tokenizer import Tokenizer
from tests.text import tiny_tokenizer
from tests.text.tiny_tokenizer import tokenizer_of

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_end|> wörld\n"},
]


def with_template(tmp_path: Path, template: Any, **config: Any) -> Tokenizer:
    tiny_tokenizer.save(tiny_tokenizer.byte_level(), tmp_path, chat_template=template, **config)
    return tokenizer_of(tmp_path)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_equals_transformers(
    chatml_directory: Path, tokenizer: Tokenizer, add_generation_prompt: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(chatml_directory)
    expected = theirs.apply_chat_template(
        CHAT, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert tokenizer.render_chat(CHAT, add_generation_prompt) == expected
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt) == theirs.encode(
        expected, add_special_tokens=False
    )


@pytest.mark.parametrize("text", ["", "Hello world", "naïve 世界 🎉", "<|im_start|>two words x"])
def test_encode_and_decode_equal_transformers(
    chatml_directory: Path, tokenizer: Tokenizer, text: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(chatml_directory)
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text)
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_templates_see_what_transformers_shows_them(tmp_path: Path) -> None:
    """As in transformers, blocks are trimmed, loops can break, JSON is not escaped for HTML, and
    special tokens are variables."""
    template = (
        "{{ bos_token }}{{ eos_token }}\n"
        "  {% for message in messages %}\n"
        "    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ message | tojson }}{% endgeneration %}\n"
        "  {% endfor %}\n"
        "{{ strftime_now('%Y') | length }}"
    )
    tokenizer = with_template(
        tmp_path,
        template,
        bos_token="<|endoftext|>",
        eos_token={"__type": "AddedToken", "content": "<|im_end|>"},
    )
    rendered = tokenizer.render_chat([{"role": "user", "content": "<b>'é'"}, *CHAT])
    message = '{"role": "user", "content": "<b>\'é\'"}'
    assert rendered == f"<|endoftext|><|im_end|>\n{message}4"


def test_no_special_tokens_are_added_after_the_template(tmp_path: Path) -> None:
    """A template that writes BOS and a tokenizer that adds it would give two of them, as in vLLM's
    bug 9519."""
    from tokenizers.processors import TemplateProcessing

    backend = tiny_tokenizer.byte_level()
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tiny_tokenizer.save(backend, tmp_path, chat_template="<|endoftext|>hi")
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.encode("hi")[0] == 0
    assert tokenizer.apply_chat_template(CHAT).count(0) == 1


def test_the_default_of_several_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert with_template(tmp_path, named).render_chat(CHAT) == "yes"


def test_the_template_for_tools_of_several(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "none"}]
    tokenizer = with_template(tmp_path, named)
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    assert tokenizer.render_chat(CHAT, tools=tools) == "tools"
    assert tokenizer.render_chat(CHAT) == "none"
    assert "tools" in tokenizer.chat_template_source


PARTS = "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }};{% endif %}"


@pytest.mark.parametrize(
    ("user", "assistant", "rendered"),
    [
        ("{{ message.content }};", "{{ message.content }}.", "a\nb;c."),
        (f"{PARTS}{{% endfor %}}", f"{PARTS}{{% endfor %}}", "a;b;c;"),
        (f"{PARTS}{{% endfor %}}", "{{ message.content }}.", "a;b;c."),
        (
            f"{{% if message.content is string %}}<{{{{ message.content }}}}>"
            f"{{% else %}}{PARTS}{{% endfor %}}{{% endif %}}",
            "{{ message.content | trim }}.",
            "a;b;c.",
        ),
        ("{{ message.content[0]['text'] }}-", "{{ message.content + '!' }}", "a-c!"),
    ],
)
def test_content_comes_in_the_form_that_a_template_takes(
    user: str, assistant: str, rendered: str, tmp_path: Path
) -> None:
    """Templates may take content as a string or as parts. A template that loops over parts once
    rendered a string as nothing, with status 200."""
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}"
        + user
        + "{% else %}"
        + assistant
        + "{% endif %}{% endfor %}"
    )
    tokenizer = with_template(tmp_path, template)
    parts = [{"type": "text", "text": text} for text in ("a", "b")]
    answer = {"role": "assistant", "content": "c"}
    assert tokenizer.render_chat([{"role": "user", "content": parts}, answer]) == rendered
    alone = tokenizer.render_chat([{"role": "user", "content": "a\nb"}, answer])
    assert "a\nb" in alone
    assert alone.endswith(rendered[-2:])


def test_the_template_file_goes_before_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert with_template(tmp_path, "from the config").render_chat(CHAT) == "from the file"


@pytest.mark.parametrize("template", [None, [{"name": "tool_use", "template": "x"}]])
def test_without_a_template_chat_is_refused_and_text_is_not(
    tmp_path: Path, template: object
) -> None:
    tokenizer = with_template(tmp_path, template)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="v1/completions") as raised:
        tokenizer.apply_chat_template(CHAT)
    assert raised.value.param == "messages"
    assert tokenizer.encode("Hello")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[7].content.x }}", "has no element 7"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_a_request_error(
    tmp_path: Path, template: str, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        with_template(tmp_path, template).apply_chat_template(CHAT)


def test_templates_may_not_change_the_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    tokenizer = with_template(tmp_path, "{{ messages[0].update(content='y') }}")
    with pytest.raises(RequestError):
        tokenizer.apply_chat_template(messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        tokenizer_of(tmp_path)
    for template in ("{% if %}", 7, [{"name": "default"}]):
        with pytest.raises(ModelError, match=r"chat.template|cannot be read"):
            with_template(tmp_path, template)
    for text in ("[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ModelError, match="cannot be read|must hold a JSON object"):
            tokenizer_of(tmp_path)


def test_training_leftovers_do_not_cut_prompts(tmp_path: Path) -> None:
    """Truncation and padding that training has left in tokenizer.json are not applied."""
    backend = tiny_tokenizer.byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    tokenizer = tokenizer_of(tiny_tokenizer.save(backend, tmp_path))
    ids = tokenizer.encode("a b c d")
    assert tokenizer.decode(ids) == "a b c d"
    assert 2 < len(ids) < 8


def test_single_tokens_as_text_and_bytes(tokenizer: Tokenizer, word_tokenizer: Tokenizer) -> None:
    euro = tokenizer.encode("€")
    assert b"".join(tokenizer.token_text(i)[1] for i in euro) == "€".encode()
    assert all(tokenizer.token_text(i)[0] == "\ufffd" for i in euro)
    assert tokenizer.token_text(1) == ("<|im_start|>", b"<|im_start|>")
    assert word_tokenizer.token_text(0) == (" hello", b" hello"), "as inside a text"


def test_config_is_optional(tmp_path: Path) -> None:
    directory = tiny_tokenizer.save(tiny_tokenizer.byte_level(), tmp_path)
    (directory / "tokenizer_config.json").unlink()
    tokenizer = tokenizer_of(directory)
    assert (
        tokenizer.vocab_size
        == len(json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]) + 2
    )


def test_a_template_is_given_the_tools(tmp_path: Path) -> None:
    template = "{% if tools %}{{ tools[0].function.name }}{% endif %}{{ messages[0].content }}"
    tokenizer = with_template(tmp_path, template)
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    assert tokenizer.render_chat(CHAT[:1], tools=tools) == "look_up" + CHAT[0]["content"]
    assert tokenizer.render_chat(CHAT[:1]) == CHAT[0]["content"]
    assert tokenizer.chat_template_source == template


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="does not accept these messages"):
        tokenizer.render_chat([{"role": "user", "content": "\ud800"}])
