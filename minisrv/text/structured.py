"""Structured output: which tokens may come next, so that the text becomes what was asked for.

A `StructuredOutput` is compiled to a matcher (llguidance: an Earley parser over lexemes that are
regular expressions by derivatives). The matcher follows one request's tokens and says, as one bit
a token, which may come next. End-of-sequence is allowed where the grammar may end, and is all
that is allowed where it must. A matcher fails alone: its `error` ends its own request.

Two budgets bound what a grammar may cost. `LIMITS` bounds a mask, the size of a compiled grammar
and its memory. They do not bound every compilation, as some schemas (a `multipleOf` of a million,
an intersection of thirty patterns) are built before they are counted, so a grammar comes here
only after `text.grammar_validator` has seen it compile within a time.

A mask allows every token that goes on with the text, however the tokenizer would spell it. Where
only one text can follow, llguidance would allow no tokens but those that the tokenizer makes of
that text. They are of another text where the tokenizer normalises (NFC, lower case, blanks), and
where the text is spelled as a special token is. A model has learned how to spell, too.

Knows: llguidance and the tokenizer. Knows nothing of logits, requests or the engine's steps.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import msgspec
import numpy as np
import numpy.typing as npt

from minisrv import threads
from minisrv.errors import RequestError, shortened
from minisrv.request import StructuredOutput, StructuredOutputKind
from minisrv.text.closed_schema import closed
from minisrv.text.json_schema import parse_schema, restate, restate_lark
from minisrv.text.tokenizer import Tokenizer

LIMITS = llguidance.LLParserLimits(
    # 10,000 enum values fit; a regex has about as many derivatives at most.
    initial_lexer_fuel=300_000,
    # A mask: under 30 ms for an ambiguous grammar and 150,000 tokens, where the defaults take
    # 300. 1,000 items are 250 optional properties.
    step_lexer_fuel=50_000,
    step_max_items=5_000,
    max_items_in_row=1_000,
    # A matcher's memory: one to two KiB each.
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    # Errors quote the grammar otherwise.
    verbose_errors=False,
)

CHEAP_SECONDS = 0.05
"""Processor time within which nearly every grammar of an honest client compiles: most take a few
milliseconds, 1,000 properties or 4,000 enum values 30. Those that take longer never stand in the
way of one that does not."""

MASK_THREADS = 4
"""A mask takes some 10 us, so eight rows are as fast by one, and threads that look for work take
processors from those who send tokens. Several are for many rows, and for grammars that are hard."""

_JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    # One blank where one may be, as Outlines has it: models are known to write blanks for ever
    # where they may, and indentation is nothing that a client would miss.
    "whitespace_pattern": r"\x20",
    # A keyword that cannot be kept is an error, not ignored.
    "lenient": False,
    "coerce_one_of": False,
}
"""All of llguidance's options that a schema could set for itself."""

_WHAT = {
    StructuredOutputKind.JSON_OBJECT: "JSON object",
    StructuredOutputKind.JSON_SCHEMA: "JSON schema",
    StructuredOutputKind.REGEX: "regular expression",
    StructuredOutputKind.CHOICE: "choice",
    StructuredOutputKind.GRAMMAR: "grammar",
}
_MAX_REASON = 300
"""Characters of llguidance's messages that are passed on: some quote what they are about."""


class Matcher:
    """One request's place in its grammar. Methods are for one thread at a time."""

    def __init__(self, matcher: llguidance.LLMatcher, spec: StructuredOutput) -> None:
        self._matcher = matcher
        self._spec = spec

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Write the tokens that may come next: bit `i % 32` of word `i // 32` is token `i`.

        row: contiguous int32 of `GrammarBackend.bitmask_words`. Releases the GIL meanwhile. A
        matcher that fails here (`error`) or has failed allows end-of-sequence only.
        """
        assert row.dtype == np.int32
        assert row.flags.c_contiguous
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def accept(self, token_ids: Sequence[int]) -> bool:
        """Go on behind these tokens, the end-of-sequence token included; False is an `error`."""
        # Not consume_tokens, which takes no end-of-sequence where nothing else can follow.
        return all(map(self._matcher.consume_token, token_ids))

    @property
    def error(self) -> RequestError | None:
        """Why the matcher cannot go on; it stays so."""
        if not self._matcher.is_error():
            return None
        return grammar_error(self._spec, "cannot be followed further", self._matcher.get_error())

    def copy(self, spec: StructuredOutput) -> Matcher:
        """Another at the same place, for a request that says the same in `spec`."""
        return Matcher(self._matcher.deep_copy(), spec)


class GrammarBackend:
    """Compiles grammars for one model, and fills their masks.

    vocab_size: columns of the model's logits.
    eos_token_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A tokenizer may know a token that the model has no column for: never sampled, but
        # llguidance wants a bit for it.
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = list(eos_token_ids)
        self._loading = threading.Lock()

    @property
    def bitmask_words(self) -> int:
        """Words of int32 in a row of the bitmask; at least as many bits as logits."""
        return (self._vocab_size + 31) // 32

    def lower(self, spec: StructuredOutput) -> StructuredOutput:
        """The same in llguidance's words. All of it is Python, a tenth of a second for large
        schemas, so no process that has something else to do should: steps would wait for the GIL.
        Raises RequestError if a schema cannot be kept."""
        try:
            text = _llguidance_grammar(spec, self._tokenizer)
        except ValueError as error:
            raise grammar_error(spec, "is not valid", str(error)) from error
        return msgspec.structs.replace(spec, text=text, choices=(), lowered=True)

    def compile(self, spec: StructuredOutput) -> Matcher:
        """A matcher at its start; `lower` comes first where nobody has done it. Raises RequestError
        if there is none. Releases the GIL while llguidance works."""
        lowered = spec if spec.lowered else self.lower(spec)
        try:
            with self._loading:
                tokenizer = self._llguidance_tokenizer
        except ValueError as error:
            raise RequestError(
                f"{spec.param}: this model's tokenizer does not allow structured output: {error}",
                param=spec.param,
            ) from error
        matcher = llguidance.LLMatcher(tokenizer, lowered.text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise grammar_error(spec, "cannot be compiled", matcher.get_error())
        return Matcher(matcher, spec)

    def fill(self, matchers: Sequence[tuple[Matcher, int]], bitmask: npt.NDArray[np.int32]) -> None:
        """`Matcher.fill` for a batch, on several processors: each matcher with its row.

        bitmask: contiguous int32 [rows, bitmask_words]; other rows stay as they are. A matcher
        must not come twice. Releases the GIL meanwhile.
        """
        assert bitmask.dtype == np.int32
        assert bitmask.flags.c_contiguous
        num_rows, words = bitmask.shape
        self._executor.unsafe_compute_mask_ptr(
            [(matcher._matcher, row) for matcher, row in matchers],
            bitmask.ctypes.data,
            words * bitmask.itemsize,
            num_rows,
        )

    @functools.cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(min(MASK_THREADS, max(1, threads.cores() // 2)))

    @functools.cached_property
    def _llguidance_tokenizer(self) -> llguidance.LLTokenizer:
        # A second for a large vocabulary, so not before it is needed.
        return llguidance.LLTokenizer(
            self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
        )


def marker(text: str, tokenizer: Tokenizer) -> str:
    """`text` in a rule of a Lark grammar, as the model writes it.

    Where it is a token of its own, that token: llguidance does not count the spelling of a token
    like `<tool_call>` as text.
    """
    token_id = tokenizer.token_id(text)
    return literal(text) if token_id is None else f"<[{token_id}]>"


def literal(text: str) -> str:
    """`text` as a string of a Lark grammar."""
    return json.dumps(text).replace("\x7f", "\\u007f")  # the one that JSON allows and Lark not


def json_rule(schema: dict[str, Any]) -> str:
    """The JSON documents that follow `schema`, in a rule of a Lark grammar. Raises ValueError for
    one that is nested too deeply."""
    return f"%json {json.dumps({**closed(schema), 'x-guidance': _JSON_OPTIONS})}"


def _llguidance_grammar(spec: StructuredOutput, tokenizer: Tokenizer) -> str:
    """llguidance's list of grammars. Raises ValueError if a schema cannot be kept."""
    main: dict[str, Any]
    match spec.kind:
        case StructuredOutputKind.JSON_OBJECT:
            main = {"json_schema": {"type": "object", "x-guidance": _JSON_OPTIONS}}
        case StructuredOutputKind.JSON_SCHEMA:
            schema = restate(closed(parse_schema(spec.text)))
            main = {"json_schema": {**schema, "x-guidance": _JSON_OPTIONS}}
        case StructuredOutputKind.REGEX:
            text = llguidance.regex_to_lark(spec.text)
            main = {"lark_grammar": f"start: TEXT\nTEXT: /{text}/"}
        case StructuredOutputKind.CHOICE:
            # A terminal: as a rule, every choice would be an item of the parser.
            choices = " | ".join(map(literal, spec.choices))
            main = {"lark_grammar": f"start: CHOICE\nCHOICE: {choices}"}
        case StructuredOutputKind.GRAMMAR:
            main = {"lark_grammar": restate_lark(spec.text)}
    # One that sets this option sets it for all.
    rules = ['%llguidance {"no_forcing": true}', "start: @main"]
    if spec.reasoning_end:
        token_id = tokenizer.token_id(spec.reasoning_end)
        free = (
            f"free[suffix={literal(spec.reasoning_end)}]: /(?s:.*)/"
            if token_id is None
            else f"free: /(?s:.*)/ <[{token_id}]>"
        )
        # Models leave a blank line behind their reasoning.
        reasoning = "free /\\n{0,2}/"
        if spec.reasoning_start:
            # One that does not reason this time begins with what was asked for.
            reasoning = f"({marker(spec.reasoning_start, tokenizer)} {reasoning})?"
        rules[1:] = [f"start: {reasoning} @main", free]
    grammars = [{"lark_grammar": "\n".join(rules)}, {"name": "main", **main}]
    try:
        return json.dumps({"grammars": grammars})
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def grammar_error(spec: StructuredOutput, problem: str, reason: str) -> RequestError:
    """What is wrong with a grammar, in the words of the request's field.

    reason: why, e.g. llguidance's message.
    """
    reason = " ".join(reason.removesuffix("<non-verbose/>").split()).rstrip(".")
    if reason.startswith("NoExtension"):  # the bare name of a reason to stop
        reason = "no text satisfies it"
    why = shortened(reason, _MAX_REASON)
    return RequestError(f"{spec.param}: the {_WHAT[spec.kind]} {problem}: {why}.", param=spec.param)
