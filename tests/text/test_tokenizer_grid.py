"""Tokenizers and chat templates in the forms in which checkpoints hold them: encoding, decoding and
rendering give the same as transformers with the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from minisrv.checkpoint import describe_tokenizer
from minisrv.errors import MinisrvError, RequestError
from minisrv.text.tokenizer import Tokenizer
from tests.checkpoints import write_files
from tests.text.tiny_tokenizer import (
    CHATML,
    byte_fallback,
    byte_level,
    tokenizer_of,
    unigram,
    word_piece,
)

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of checkpoints among the temporary files of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


# ---- tokenizers ----------------------------------------------------------------------------------


def as_text(tokenizer: Any) -> str:
    text: str = tokenizer.to_str()
    return text


def without_added_tokens(text: str) -> str:
    return json.dumps({**json.loads(text), "added_tokens": []})


def added(content: str, **more: Any) -> Json:
    return {"__type": "AddedToken", "content": content, "special": True, **more}


BYTES = as_text(byte_level())
BARE = without_added_tokens(BYTES)
"""A tokenizer.json whose special tokens are in the vocabulary only."""
END = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
S = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
_BPE = json.loads(BYTES)["model"]
VOCAB: Json = {
    "vocab__json": _BPE["vocab"],
    "merges__txt": "#version: 0.2\n" + "\n".join(map(" ".join, _BPE["merges"])),
}

TOKENIZERS: dict[str, Json] = {
    "tokenizer.json alone": {"tokenizer__json": BYTES},
    "named": {"tokenizer__json": BYTES, "tokenizer_config__json": END},
    "named, in the vocabulary only": {"tokenizer__json": BARE, "tokenizer_config__json": END},
    "named at length": {
        "tokenizer__json": BARE,
        "tokenizer_config__json": {"eos_token": added("<|im_end|>", lstrip=True, rstrip=True)},
    },
    "named null": {"tokenizer__json": BYTES, "tokenizer_config__json": {"eos_token": None}},
    "unheard of": {"tokenizer__json": BYTES, "tokenizer_config__json": {"eos_token": "<new>"}},
    "special_tokens_map": {
        "tokenizer__json": BARE,
        "special_tokens_map__json": {
            "eos_token": {"content": "<|im_end|>", "lstrip": False},
            "additional_special_tokens": ["<new>"],
        },
    },
    "special_tokens_map against the config": {
        "tokenizer__json": BARE,
        "special_tokens_map__json": {"eos_token": "<|im_end|>"},
        "tokenizer_config__json": {"eos_token": "<|endoftext|>"},
    },
    "added_tokens_decoder": {
        "tokenizer__json": BARE,
        "tokenizer_config__json": {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "2": {"content": "<|im_end|>", "special": True},
                "340": {"content": "<new>", "special": False},
            },
        },
    },
    "additional_special_tokens": {
        "tokenizer__json": BARE,
        "tokenizer_config__json": {"additional_special_tokens": ["<|im_end|>", added("<new>")]},
    },
    "extra_special_tokens": {
        "tokenizer__json": BARE,
        "tokenizer_config__json": {"extra_special_tokens": ["<|im_start|>", "<new>"]},
    },
    "extra_special_tokens by name": {
        "tokenizer__json": BARE,
        "tokenizer_config__json": {"extra_special_tokens": {"image_token": "<new>"}},
    },
    "added_tokens.json": {"tokenizer__json": BARE, "added_tokens__json": {"<new>": 340}},
    "other roles": {
        "tokenizer__json": BARE,
        "tokenizer_config__json": {
            "pad_token": "<|endoftext|>",
            "sep_token": "<new>",
            "cls_token": "<|im_start|>",
            "mask_token": added("<mask>", lstrip=True),
        },
    },
    "bos and eos around": {
        "tokenizer__json": BYTES,
        "tokenizer_config__json": {**END, "add_bos_token": True, "add_eos_token": True},
    },
    "no bos around": {
        "tokenizer__json": BYTES,
        "tokenizer_config__json": {**END, "add_bos_token": False},
    },
    "prefix space": {
        "tokenizer__json": BYTES,
        "tokenizer_config__json": {**END, "add_prefix_space": True},
    },
    "split special tokens": {
        "tokenizer__json": BYTES,
        "tokenizer_config__json": {**END, "split_special_tokens": True},
    },
    "of a short context": {"tokenizer__json": BYTES, "tokenizer_config__json": {"max_length": 2}},
    "code of its own": {
        "tokenizer__json": BYTES,
        "tokenizer_config__json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "auto_map": {"AutoTokenizer": ["x.Y", None]},
        },
    },
    "GPT-2's class": {
        "tokenizer__json": BYTES,
        "tokenizer_config__json": {**END, "tokenizer_class": "GPT2Tokenizer"},
    },
    "Qwen2's class": {
        "tokenizer__json": BYTES,
        "tokenizer_config__json": {**END, "tokenizer_class": "Qwen2TokenizerFast"},
        "config__json": {"model_type": "qwen3"},
    },
    "Llama's class": {
        "tokenizer__json": as_text(byte_fallback()),
        "tokenizer_config__json": {**S, "tokenizer_class": "LlamaTokenizer", "legacy": False},
        "config__json": {"model_type": "llama"},
    },
    "Llama's fast class": {
        "tokenizer__json": as_text(byte_fallback()),
        "tokenizer_config__json": {**S, "tokenizer_class": "LlamaTokenizerFast"},
    },
    "byte fallback": {
        "tokenizer__json": as_text(byte_fallback()),
        "tokenizer_config__json": {**S, "add_bos_token": True},
    },
    "no class": {
        "tokenizer__json": BYTES,
        "tokenizer_config__json": {**END, "tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "unigram": {"tokenizer__json": as_text(unigram()), "tokenizer_config__json": S},
    "WordPiece": {"tokenizer__json": as_text(word_piece())},
    "vocabulary and merges": {
        **VOCAB,
        "tokenizer_config__json": {**END, "tokenizer_class": "Qwen2Tokenizer"},
    },
    "vocabulary and merges of a model": {**VOCAB, "config__json": {"model_type": "qwen2"}},
}
TEXTS = [
    "Hello world, hello there!",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a <|im_end|> b  <s>x</s> <new> <mask>!",
    " leads and trails ",
    "naïve café 你好 🎉 two words ü ü",
    "Don't stop , please .",
    "",
]


@pytest.mark.parametrize("files", TOKENIZERS)
def test_tokenizer(files: str, tmp_path: Path) -> None:
    """Ids, texts and special tokens equal those of transformers for each form of checkpoint."""
    write_files(tmp_path, **TOKENIZERS[files])
    expected = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    told = describe_tokenizer(tmp_path)
    found = Tokenizer.from_description(told)
    assert told.eos_token_id == expected.eos_token_id
    assert told.special_tokens == expected.special_tokens_map
    assert found.vocab_size == len(expected)
    assert found.special_ids >= set(expected.all_special_ids)
    for text in TEXTS:
        for add in (True, False):
            ids = expected(text, add_special_tokens=add)["input_ids"]
            assert found.encode(text, add) == ids
            for skip in (True, False):
                decoded = expected.decode(ids, skip_special_tokens=skip)
                assert found.decode(ids, skip) == decoded


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": {"tokenizer_class": "Qwen2Tokenizer"}},
        {"chat_template__jinja": "x", "config__json": {"model_type": "qwen2"}},
        {**VOCAB, "tokenizer_config__json": {"tokenizer_class": "LlamaTokenizer"}},
    ],
)
def test_a_tokenizer_without_its_vocabulary_is_refused(files: Json, tmp_path: Path) -> None:
    """transformers makes a tokenizer of special tokens alone, which would encode nothing."""
    with pytest.raises(MinisrvError, match="no vocabulary was found"):
        describe_tokenizer(write_files(tmp_path, **files))


def test_text_that_has_no_token_is_a_fault_of_the_request(tmp_path: Path) -> None:
    odd = json.loads(as_text(word_piece()))
    odd["model"]["unk_token"] = "gone"
    write_files(tmp_path, tokenizer__json=odd)
    with pytest.raises(RequestError, match="cannot encode the text"):
        tokenizer_of(tmp_path).encode("漢")


# ---- templates -----------------------------------------------------------------------------------

LOOP = "{% for m in messages %}[{{ m.role }}]"
TEMPLATES = {
    "ChatML": CHATML,
    "either": LOOP + "{% if m.content is string %}S{{ m.content }}{% else %}"
    "{% for p in m.content %}P{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
    "generation": LOOP + "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% endfor %}",
    "tools": "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<{{ c.function.name }}|{{ c.function.arguments | tojson }}>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
    "undefined": "{{ messages[0].nope }}|{{ tools is none }}|{{ documents is defined }}|"
    "{{ enable_thinking is defined }}|{{ pad_token is defined }}|{{ image_token }}|{{ bos_token }}",
    "reasoning": LOOP + "<{{ m.reasoning_content }}|{{ m.thinking }}>{{ m.content }}{% endfor %}",
    "raise": "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}ok",
    "spaces": "  {% if true %}\n  x\n  {% endif %}\n{# c #}\n\ty {{- ' z' -}} \n end\n",
    "JSON": "{{ messages | tojson }}{{ '<é&>' | tojson(ensure_ascii=true) }}",
    "methods": "{{ messages[0].content.split('e') | join('-') }}{{ messages[-1]['content'][:3] }}"
    "{{ messages[0] | items | list }}{{ messages[0].content | trim | upper }}",
    "system": "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% else %}{% set s = 'none' %}{% endif %}<<{{ s }}>>{{ messages[-1]['content'] }}",
}
PARTS = LOOP + "{% for p in m.content %}{{ p['text'] }};{% endfor %}{% endfor %}"
PLACES: dict[str, Callable[[str], Json]] = {
    "a string": lambda source: {"tokenizer_config__json": {"chat_template": source, **END}},
    "a file": lambda source: {
        "chat_template__jinja": source,
        "tokenizer_config__json": {"chat_template": "old", **END},
    },
    "named ones": lambda source: {
        "tokenizer_config__json": {
            "chat_template": [
                {"name": "default", "template": source},
                {"name": "tool_use", "template": "tools:" + source},
            ]
        }
    },
    "a folder": lambda source: {
        "chat_template__jinja": source,
        "additional_chat_templates___tool_use__jinja": "tools:" + source,
        "tokenizer_config__json": {},
    },
}
CALL = {"type": "function", "id": "c", "function": {"name": "f", "arguments": {"a": "é"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Hé <llo>"}
CHATS: list[list[Json]] = [
    [USER],
    [{"role": "system", "content": "be"}, USER],
    [USER, {"role": "assistant", "content": "yo"}, {"role": "user", "content": ""}],
    [{"role": "assistant", "content": "yo"}, USER],
    [USER, {"role": "assistant", "content": "yo", "reasoning_content": "why"}, USER],
    [USER, {"role": "assistant", "content": "yo", "reasoning": "why", "tool_calls": None}, USER],
    [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "name": "f", "content": "42"},
    ],
]


def rendered(render: Callable[[], str]) -> str | None:
    """The rendered text, or None if the template refuses; transformers passes on the errors of
    Jinja and Python for that."""
    try:
        return render()
    except (RequestError, jinja2.TemplateError, TypeError):
        return None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_template(name: str, place: str, tmp_path: Path) -> None:
    """Each template, in each place where a checkpoint may hold it, renders chats as transformers
    does."""
    write_files(tmp_path, tokenizer__json=BYTES, **PLACES[place](TEMPLATES[name]))
    expected = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    found = tokenizer_of(tmp_path)
    in_parts = {"role": "user", "content": [{"type": "text", "text": text} for text in "ab"]}
    for chat in [*CHATS, *([[in_parts]] if name == "either" else [])]:
        for tools in (None, [TOOL]):
            for prompt in (True, False):
                options = {"tools": tools, "add_generation_prompt": prompt}
                assert rendered(
                    lambda o=options, c=chat: found.render_chat(
                        c, o["add_generation_prompt"], o["tools"] or ()
                    )
                ) == rendered(
                    lambda o=options, c=chat: expected.apply_chat_template(c, tokenize=False, **o)
                )


def test_a_template_of_parts_gets_parts(tmp_path: Path) -> None:
    """Content is passed as parts, as transformers renders them; a string would be rendered as
    nothing."""
    write_files(tmp_path, tokenizer__json=BYTES, **PLACES["a string"](PARTS))
    expected = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    found = tokenizer_of(tmp_path)
    for chat in CHATS[:4]:
        in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
        text = expected.apply_chat_template(in_parts, tokenize=False)
        assert found.render_chat(chat, False) == found.render_chat(in_parts, False) == text
