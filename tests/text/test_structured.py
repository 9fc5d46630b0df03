"""Structured output: any text sampled from the allowed tokens has the form that was asked for."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import jsonschema
import msgspec
import numpy as np
import pytest
import tokenizers

from minisrv.checkpoint import resolve_checkpoint
from minisrv.errors import RequestError
from minisrv.request import MAX_CHOICES, MAX_GRAMMAR_LENGTH, StructuredOutput
from minisrv.request import StructuredOutputKind as Kind
from minisrv.text.detokenizer import Detokenizer
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from tests.text import tiny_tokenizer
from tests.text.random_schemas import longest, random_schema, recurses
from tests.text.tiny_tokenizer import tokenizer_of
from tests.text.walks import EOS, allowed, follow, stretch, walk

VOCAB_SIZE = 4096 + 64
"""More than the tokenizer's vocabulary, as embeddings are often padded."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(resolve_checkpoint(None))


@pytest.fixture(scope="module")
def backend(tokenizer: Tokenizer) -> GrammarBackend:
    return GrammarBackend(tokenizer, VOCAB_SIZE, [EOS])


@pytest.mark.parametrize("seed", range(300))
def test_a_random_schema_is_kept(backend: GrammarBackend, tokenizer: Tokenizer, seed: int) -> None:
    schema = random_schema(seed)
    spec = StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(schema))
    document = json.loads(walk(backend, tokenizer, spec, random.Random(seed)))
    jsonschema.validate(document, schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("seed", [seed for seed in range(60) if not recurses(random_schema(seed))])
def test_a_random_schema_ends_whatever_a_model_says(
    backend: GrammarBackend, tokenizer: Tokenizer, seed: int
) -> None:
    """Even a text that avoids closing anything ends within `longest`."""
    schema = random_schema(seed)
    spec = StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(schema))
    text = stretch(backend, tokenizer, spec, random.Random(seed))
    assert len(text.encode()) <= longest(schema) <= 1000
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("seed", range(10))
def test_json_object(backend: GrammarBackend, tokenizer: Tokenizer, seed: int) -> None:
    spec = StructuredOutput(kind=Kind.JSON_OBJECT)
    assert isinstance(json.loads(walk(backend, tokenizer, spec, random.Random(seed))), dict)


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-c]{3}-[0-9]{4}",
        r"/path(/[a-z]+)*",
        r"(yes|no)!?",
        "ünï[日本]{2}",
        r"[a-z]{1,9}@[0-9]{1,9}\.com",
    ],
)
def test_regex(backend: GrammarBackend, tokenizer: Tokenizer, regex: str) -> None:
    spec = StructuredOutput(kind=Kind.REGEX, text=regex)
    for seed in range(10):
        text = walk(backend, tokenizer, spec, random.Random(seed))
        assert re.fullmatch(regex, text), text


CHOICES = (
    "yes",
    "yes, sir",
    'a"b\\c',
    "é\n\t",
    "/x/",
    "日本",
    "${}%",
    "a#b // c",
    "😀",
    "\x7f\x01",
)


def test_choice(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    spec = StructuredOutput(kind=Kind.CHOICE, choices=CHOICES)
    assert {walk(backend, tokenizer, spec, random.Random(i)) for i in range(200)} == set(CHOICES)


def test_choice_of_many(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    choices = tuple(f"answer {i}" for i in range(MAX_CHOICES))
    spec = StructuredOutput(kind=Kind.CHOICE, choices=choices)
    assert walk(backend, tokenizer, spec, random.Random(0)) in choices


def test_grammar(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    lark = 'start: sum\nsum: NUMBER ("+" NUMBER | "*" "(" sum ")")*\nNUMBER: /[1-9][0-9]?/'
    spec = StructuredOutput(kind=Kind.GRAMMAR, text=lark)
    assert follow(backend, tokenizer, spec, "1+23*(4+5)")
    assert not follow(backend, tokenizer, spec, "1+23*(4+5")
    assert not follow(backend, tokenizer, spec, "1+023")


def test_end_of_sequence_where_the_grammar_may_end_and_only_it_where_it_must(
    backend: GrammarBackend, tokenizer: Tokenizer
) -> None:
    matcher = backend.compile(StructuredOutput(kind=Kind.REGEX, text="ab{0,2}"))
    encode = tokenizer.encode
    assert EOS not in allowed(backend, matcher)
    assert matcher.accept(encode("a"))
    assert EOS in allowed(backend, matcher)
    assert len(allowed(backend, matcher)) > 1
    assert matcher.accept(encode("b") + encode("b"))
    assert allowed(backend, matcher) == [EOS]


def test_a_batch_is_filled_row_by_row(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    """The bitmask of a batch has each matcher's tokens in its row, and other rows stay as they
    are."""
    matchers = [
        backend.compile(StructuredOutput(kind=Kind.REGEX, text=f"{digit}+")) for digit in range(10)
    ]
    assert not matchers[4].accept([EOS])  # a matcher that has failed
    bitmask = np.full((12, backend.bitmask_words), -1, np.int32)
    rows = [(matcher, 11 - digit) for digit, matcher in enumerate(matchers)]
    backend.fill_bitmasks(rows, bitmask)
    alone = np.empty(backend.bitmask_words, np.int32)
    for digit, matcher in enumerate(matchers):
        matcher.fill_bitmask(alone)
        assert (bitmask[11 - digit] == alone).all()
    assert (bitmask[:2] == -1).all()


def test_a_tokenizer_with_more_tokens_than_the_model(tokenizer: Tokenizer) -> None:
    """A tokenizer may have added tokens for which the embedding has no row."""
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size - 50, [EOS])
    assert 32 * backend.bitmask_words >= tokenizer.vocab_size
    assert follow(backend, tokenizer, StructuredOutput(kind=Kind.REGEX, text="a"), "a")


def test_a_tokenizer_of_bytes_and_pieces(byte_fallback_tokenizer: Tokenizer) -> None:
    """Characters are spread over several byte tokens, and the mask never lets the text end inside
    one."""
    tokenizer = byte_fallback_tokenizer
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, [EOS])
    matcher = backend.compile(StructuredOutput(kind=Kind.REGEX, text="[a-z]+ 世!?"))
    _space, *ids = tokenizer.encode("hello 世", add_special_tokens=False)
    for token_id in ids:
        choices = allowed(backend, matcher)
        assert token_id in choices
        assert EOS not in choices
        assert matcher.accept([token_id])
    assert {tokenizer.token_text(i)[0] for i in allowed(backend, matcher) if i != EOS} == {"!"}
    assert EOS in allowed(backend, matcher)


def _byte_level(
    normalizer: tokenizers.normalizers.Normalizer | None = None, **pre: bool
) -> Tokenizer:
    raw = tiny_tokenizer.byte_level()
    if normalizer is not None:
        raw.normalizer = normalizer
    if pre:
        raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(**pre)
    raw.add_tokens([tokenizers.AddedToken("<tool_call>", special=False)])
    raw.add_tokens([tokenizers.AddedToken("<|wide|>", special=True, lstrip=True, rstrip=True)])
    return Tokenizer(raw)


def _byte_fallback(normalizer: tokenizers.normalizers.Normalizer) -> Tokenizer:
    raw = tiny_tokenizer.byte_fallback()
    raw.normalizer = tokenizers.normalizers.Sequence([normalizer, raw.normalizer])
    return Tokenizer(raw)


SPELLERS: dict[str, Callable[[], Tokenizer]] = {
    "plain": _byte_level,
    "NFC": lambda: _byte_level(tokenizers.normalizers.NFC()),
    "NFKD": lambda: _byte_level(tokenizers.normalizers.NFKD()),
    "lower case": lambda: _byte_level(tokenizers.normalizers.Lowercase()),
    "no accents": lambda: _byte_level(tokenizers.normalizers.BertNormalizer()),
    "strip": lambda: _byte_level(tokenizers.normalizers.Strip()),
    "other letters": lambda: _byte_level(tokenizers.normalizers.Replace("e", "3")),
    "a space before": lambda: _byte_level(add_prefix_space=True),
    "no words": lambda: _byte_level(add_prefix_space=True, use_regex=False),
    "byte fallback": lambda: _byte_fallback(tokenizers.normalizers.NFC()),
    "byte fallback, lower case": lambda: _byte_fallback(tokenizers.normalizers.Lowercase()),
}
LITERALS = [
    "<|im_end|>",
    "say <|im_start|>user, then",
    "</s>",
    "<tool_call>",
    "a <|wide|> b",
    "two words",
    "cafe\u0301",
    "\u212bngstro\u0308m \ufb01",
    "Hello World",
    " padded ",
    "NAÏVE",
    "😀\t世",
]


@pytest.mark.parametrize("speller", SPELLERS)
@pytest.mark.parametrize("kind", ["choice", "const", "enum", "name", "regex", "lark", "reasoning"])
def test_a_literal_is_right_however_the_tokenizer_would_spell_it(speller: str, kind: str) -> None:
    """Literal texts come out exactly even if they contain special tokens or the tokenizer would
    normalise them."""
    tokenizer = SPELLERS[speller]()
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size + 20, [EOS])
    for text in LITERALS:
        named = {"type": "object", "properties": {text: {"const": text}}, "required": [text]}
        asked, expected = {
            "choice": (StructuredOutput(kind=Kind.CHOICE, choices=(text,)), text),
            "const": (_schema({"const": text}), text),
            "enum": (_schema({"enum": [text]}), text),
            "name": (_schema({**named, "additionalProperties": False}), {text: text}),
            "regex": (StructuredOutput(kind=Kind.REGEX, text=re.escape(text)), text),
            "lark": (
                StructuredOutput(kind=Kind.GRAMMAR, text=f"start: {json.dumps(text)}"),
                text,
            ),
            "reasoning": (
                StructuredOutput(kind=Kind.CHOICE, choices=(text,), reasoning_end="</think>"),
                text,
            ),
        }[kind]
        for draw in range(2):
            written = spell(backend, tokenizer, asked, random.Random(draw))
            if kind in ("const", "enum", "name"):
                written = json.loads(written)
            elif kind == "reasoning":
                written = written.rpartition("</think>")[2].lstrip("\n")
            assert written == expected


def _schema(schema: dict[str, object]) -> StructuredOutput:
    return StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(schema))


def spell(
    backend: GrammarBackend, tokenizer: Tokenizer, spec: StructuredOutput, rng: random.Random
) -> str:
    """A random text that follows `spec`, decoded as a completion after a prompt. Reasoning ends at
    once."""
    matcher = backend.compile(spec)
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=tokenizer.encode("hello"))
    text = ""
    end = "</think>" if spec.reasoning_end else ""
    while (choices := allowed(backend, matcher)) != [EOS]:
        if end:
            choices = [i for i in choices if tokenizer.token_text(i)[0] == end[0]]
            end = end[1:]
        token_id = rng.choice([i for i in choices if i != EOS])
        assert matcher.accept([token_id])
        text += detokenizer.push([token_id])
    return text + detokenizer.push([], final=True)


def test_a_tokenizer_of_words_is_refused(word_tokenizer: Tokenizer) -> None:
    backend = GrammarBackend(word_tokenizer, word_tokenizer.vocab_size, [0])
    with pytest.raises(RequestError, match="tokenizer does not allow structured output"):
        backend.compile(StructuredOutput(kind=Kind.JSON_OBJECT))


def test_every_end_of_sequence_token_counts(tokenizer: Tokenizer) -> None:
    backend = GrammarBackend(tokenizer, VOCAB_SIZE, [EOS, 0])
    matcher = backend.compile(StructuredOutput(kind=Kind.REGEX, text="a"))
    assert matcher.accept(tokenizer.encode("a"))
    assert allowed(backend, matcher) == [0, EOS]
    assert matcher.accept([0])


@pytest.mark.parametrize("wrong", [[500], [VOCAB_SIZE - 1], [10**6], [EOS]])
def test_a_token_that_is_not_allowed_ends_its_own_matcher(
    backend: GrammarBackend, tokenizer: Tokenizer, wrong: list[int]
) -> None:
    """A matcher that is given a token that is not allowed fails and offers the end only; another
    one of the same grammar is not affected."""
    spec = StructuredOutput(kind=Kind.REGEX, text="a+", param="structured_outputs")
    matcher, other = backend.compile(spec), backend.compile(spec)
    assert not matcher.accept(wrong)
    assert matcher.error is not None
    assert matcher.error.param == "structured_outputs"
    assert allowed(backend, matcher) == [EOS]
    assert other.error is None
    assert other.accept(tokenizer.encode("a"))


def test_a_matcher_that_runs_into_its_limits_says_so(
    backend: GrammarBackend, tokenizer: Tokenizer
) -> None:
    """The state of an ambiguous grammar grows with the text until it exceeds the parser's limit."""
    rules = ["a: (b|c|d|e)*", 'b: (a|c|"x")*', 'c: (a|b|"y")*', 'd: (a|b|"z")*', "e: (a|b|c|d)*"]
    spec = StructuredOutput(kind=Kind.GRAMMAR, text="\n".join(["start: a b c d e a b c", *rules]))
    matcher = backend.compile(spec)
    rng = random.Random(0)
    for _ in range(500):
        choices = [i for i in allowed(backend, matcher) if i != EOS]
        if matcher.error:
            break
        matcher.accept([rng.choice(choices)])
    assert matcher.error is not None
    assert "the grammar cannot be followed further" in matcher.error.message


def test_whitespace_is_bounded(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    """Models in JSON mode are known to write line breaks until the context is full, so only single
    spaces are allowed."""
    spec = StructuredOutput(kind=Kind.JSON_OBJECT)
    assert follow(backend, tokenizer, spec, '{ "a": 1 }')
    assert follow(backend, tokenizer, spec, '{"a":1,"b":[1,2]}')
    assert not follow(backend, tokenizer, spec, '{  "a": 1}')
    assert not follow(backend, tokenizer, spec, '{\n"a": 1}')


def test_a_schema_cannot_change_how_it_is_read(
    backend: GrammarBackend, tokenizer: Tokenizer
) -> None:
    """llguidance reads options from the schema, and with these the output would be no JSON."""
    schema = {"type": "object", "x-guidance": {"key_separator": "=", "lenient": True}}
    spec = StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(schema))
    assert follow(backend, tokenizer, spec, '{"a":1}')
    assert not follow(backend, tokenizer, spec, '{"a"=1}')
    schema["not"] = {"required": ["a"]}
    with pytest.raises(RequestError, match="Unimplemented"):
        backend.compile(StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(schema)))


@pytest.mark.parametrize("own_token", [True, False])
def test_reasoning_comes_before(own_token: bool) -> None:
    """The form applies after the end of the reasoning, also if its marker is split over tokens;
    with a start marker the reasoning is optional."""
    raw = tokenizers.Tokenizer.from_file(str(resolve_checkpoint(None) / "tokenizer.json"))
    if own_token:
        raw.add_tokens([tokenizers.AddedToken("</think>", special=False)])
    tokenizer = Tokenizer(raw)
    backend = GrammarBackend(tokenizer, VOCAB_SIZE, [EOS])
    spec = StructuredOutput(kind=Kind.JSON_OBJECT, reasoning_end="</think>")
    for text in ('</think>{"a":1}', 'Let me {see} </thin \n</think>\n\n{"a":1}'):
        assert follow(backend, tokenizer, spec, text)
    for text in ('{"a":1}', '{"a":1}</think>', '</think>so {"a":1}'):
        assert not follow(backend, tokenizer, spec, text)
    spec = msgspec.structs.replace(spec, reasoning_start="<think>")
    for text in ('{"a":1}', '<think>\nso {\n</think>\n\n{"a":1}', '<think></think>{"a":1}'):
        assert follow(backend, tokenizer, spec, text)
    for text in ('so {"a":1}', '</think>{"a":1}', '<think>{"a":1}', '{"a":1}</think>'):
        assert not follow(backend, tokenizer, spec, text)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (Kind.JSON_SCHEMA, "{", "not valid"),
        (Kind.JSON_SCHEMA, "false", "a schema is an object"),
        (Kind.JSON_SCHEMA, "[" * 60_000, "nested too deeply"),
        (Kind.JSON_SCHEMA, '{"type": "strin"}', "Invalid type"),
        (Kind.JSON_SCHEMA, '{"$ref": "#/$defs/nope"}', "does not exist"),
        (Kind.JSON_SCHEMA, '{"$ref": "http://example.com/schema"}', "not present"),
        (Kind.JSON_SCHEMA, '{"type": "array", "uniqueItems": true}', "Unimplemented"),
        (Kind.JSON_SCHEMA, '{"type": "string", "pattern": "(?=a)b"}', "look-ahead"),
        (Kind.JSON_SCHEMA, '{"a":' * 500 + "1" + "}" * 500, "recursion limit"),
        (Kind.REGEX, "(a", "unclosed group"),
        (Kind.REGEX, r"(a)\1", "backreferences"),
        (Kind.REGEX, "(" * 5000 + ")" * 5000, "invalid regex"),
        (Kind.GRAMMAR, "start: foo", "unknown name"),
        (Kind.GRAMMAR, "start: " + "(" * 3000 + '"a"' + ")" * 3000, "too deeply nested"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(
    backend: GrammarBackend, kind: Kind, text: str, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as raised:
        backend.compile(StructuredOutput(kind=kind, text=text))
    assert raised.value.param == "response_format"
    assert len(raised.value.message) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": Kind.JSON_SCHEMA},
        {"kind": Kind.REGEX, "text": "a" * (MAX_GRAMMAR_LENGTH + 1)},
        {"kind": Kind.CHOICE},
        {"kind": Kind.CHOICE, "choices": ("a", "")},
        {"kind": Kind.CHOICE, "choices": ("a",) * (MAX_CHOICES + 1)},
        {"kind": Kind.CHOICE, "choices": ("a" * MAX_GRAMMAR_LENGTH, "b")},
    ],
)
def test_sizes_are_bounded(fields: dict[str, object]) -> None:
    with pytest.raises(RequestError) as raised:
        StructuredOutput(**fields, param="tools")
    assert raised.value.param == "tools"


def test_a_spec_crosses_the_socket() -> None:
    spec = StructuredOutput(kind=Kind.CHOICE, choices=("a", "b"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=StructuredOutput) == spec
