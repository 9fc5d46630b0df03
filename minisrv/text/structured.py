"""Structured output: which tokens may come next, so that the text becomes what was asked for.

A `StructuredOutput` is compiled to a matcher (llguidance: an Earley parser over lexemes that are
regular expressions by derivatives). The matcher follows one request's tokens and says, with one bit
for each token, which may come next. End-of-sequence is allowed where the grammar may end, and is
all that is allowed where it must end. A matcher fails by itself: its `error` ends its own request
only.

Two budgets bound what a grammar may cost. `LIMITS` bounds the time of a mask, and the size and
memory of a compiled grammar. It does not bound every compilation, as some schemas (a `multipleOf`
of a million, an intersection of thirty patterns) are built before they are counted, so a grammar
gets here only after `text.grammar_validator` has seen it compile within a time limit.

A mask allows every token that continues the text, however the tokenizer would tokenise it. Where
only one text can follow, llguidance would by default allow only the tokens that the tokenizer makes
of that text. These spell another text if the tokenizer normalises (NFC, lower case, spaces), or if
the text is spelled like a special token. Besides, the model has learned a tokenisation of its own.

Knows: llguidance and the tokenizer. Knows nothing of logits, requests or the engine's steps.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from minisrv import threads
from minisrv.errors import GrammarFullError, MinisrvError, RequestError, truncated
from minisrv.request import StructuredOutput, StructuredOutputKind
from minisrv.text.closed_schema import closed
from minisrv.text.json_schema import parse_schema, restate, restate_lark
from minisrv.text.tokenizer import Tokenizer

LIMITS = llguidance.LLParserLimits(
    # 10,000 enum values fit; a regex has about as many derivatives at most.
    initial_lexer_fuel=300_000,
    # A mask takes under 30 ms for an ambiguous grammar and 150,000 tokens, where llguidance's
    # defaults take 300 ms. 1,000 items suffice for 250 optional properties.
    step_lexer_fuel=50_000,
    step_max_items=5_000,
    max_items_in_row=1_000,
    # These bound the memory of a matcher and its copies: one to two KiB for each state or symbol.
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    # Otherwise error messages quote the grammar.
    verbose_errors=False,
)

CHEAP_SECONDS = 0.05
"""Seconds of processor time within which nearly every grammar of an honest client compiles: most
take a few milliseconds; 1,000 properties or 4,000 enum values take 30 ms. Grammars that take longer
never delay one that does not."""

MASK_THREADS = 4
"""Maximum number of threads that fill masks. A mask takes some 10 us, so eight rows are as fast in
one thread, and threads that look for work take processor time from those that send tokens. Several
threads are of use for many rows, and for hard grammars."""

_JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    # At most one space where white space may be, as in Outlines: models are known to write white
    # space for ever where they may, and no client would miss the indentation.
    "whitespace_pattern": r"\x20",
    # A keyword that is not supported is an error, and not ignored.
    "lenient": False,
    "coerce_one_of": False,
}
"""All options of llguidance that a schema could otherwise set for itself."""

_WHAT = {
    StructuredOutputKind.JSON_OBJECT: "JSON object",
    StructuredOutputKind.JSON_SCHEMA: "JSON schema",
    StructuredOutputKind.REGEX: "regular expression",
    StructuredOutputKind.CHOICE: "choice",
    StructuredOutputKind.GRAMMAR: "grammar",
}
_LISTING = re.compile(r"\n\s*\d+ \| .*", re.DOTALL)
"""The lines of a grammar in Lark that llguidance's messages end with."""
_FULL = "too many states"
"""The part of llguidance's message that says that `max_lexer_states` has been reached."""
_MAX_REASON = 300
"""Maximum number of characters of llguidance's messages that are passed on: some quote the
grammar."""


class Matcher:
    """One request's position in its grammar. Methods are for one thread at a time.

    A matcher and its copies share the states that the lexer has been in. If one of them reaches
    `max_lexer_states`, they all fail, and so do later copies: a grammar that has failed on its way
    must be compiled anew for other requests.

    original: the matcher of which this one is a copy; None if it is no copy.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        spec: StructuredOutput,
        original: Matcher | None = None,
    ) -> None:
        self.spec = spec
        self.original = original
        self._matcher = matcher
        self._num_copies = 0

    def fill_bitmask(self, row: npt.NDArray[np.int32]) -> None:
        """Write the mask of tokens that may come next: bit `i % 32` of word `i // 32` is token `i`.

        row: contiguous int32 of `GrammarBackend.bitmask_words` words. The GIL is released
            meanwhile. A matcher that fails here (`error`) or has failed allows end-of-sequence
            only.
        """
        assert row.dtype == np.int32
        assert row.flags.c_contiguous
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def accept(self, token_ids: Sequence[int]) -> bool:
        """Advance behind these tokens, the end-of-sequence token included; return False if that is
        an `error`."""
        # consume_tokens is not used, as it does not accept end-of-sequence where nothing else can
        # follow.
        return all(map(self._matcher.consume_token, token_ids))

    @property
    def error(self) -> MinisrvError | None:
        """The error for which the matcher cannot go on, or None; an error stays. It is a
        RequestError unless other requests may have used up the states that it shares with them."""
        if not self._matcher.is_error():
            return None
        reason = self._matcher.get_error()
        is_shared = self.original is not None and self.original._num_copies > 1
        if is_shared and _FULL in reason:
            return GrammarFullError(
                f"{self.spec.param}: the requests with this {_WHAT[self.spec.kind]} have together "
                f"used up the {LIMITS.max_lexer_states} states that this server keeps of it; send "
                "the request again.",
                param=self.spec.param,
            )
        problem = "cannot be followed further within the limits of this server"
        return grammar_error(self.spec, problem, reason)

    def copy(self, spec: StructuredOutput) -> Matcher:
        """Return another matcher at the same position, for a request with the same grammar in
        `spec`."""
        self._num_copies += 1
        return Matcher(self._matcher.deep_copy(), spec, original=self)


class GrammarBackend:
    """Compiles grammars for one model, and fills their masks.

    vocab_size: number of columns of the model's logits.
    eos_token_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A tokenizer may know a token for which the model has no column: it is never sampled, but
        # llguidance needs a bit for it.
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = list(eos_token_ids)
        self._loading = threading.Lock()

    @property
    def bitmask_words(self) -> int:
        """Number of int32 words in a row of the bitmask, which has at least as many bits as there
        are logits."""
        return (self._vocab_size + 31) // 32

    def lower(self, spec: StructuredOutput) -> StructuredOutput:
        """Return the structured output in llguidance's format. This is all done in Python and takes
        a tenth of a second for large schemas, so a process that has other work should not do it:
        its steps would wait for the GIL. Raises RequestError if a schema cannot be kept."""
        try:
            text = _llguidance_grammar(spec, self._tokenizer)
        except ValueError as error:
            raise grammar_error(spec, "is not valid", str(error)) from error
        return spec.as_lowered(text)

    def compile(self, spec: StructuredOutput) -> Matcher:
        """Compile a grammar to a matcher at its start; `lower` is called first unless that has been
        done. Raises RequestError if the grammar cannot be compiled. Releases the GIL while
        llguidance works."""
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

    def fill_bitmasks(
        self, matchers: Sequence[tuple[Matcher, int]], bitmask: npt.NDArray[np.int32]
    ) -> None:
        """Do `Matcher.fill_bitmask` for a batch in several threads: each matcher fills its row.

        bitmask: contiguous int32 [rows, bitmask_words]; other rows stay as they are. A matcher must
            not come twice. The GIL is released meanwhile.
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
        # This takes a second for a large vocabulary, so it is made when it is first needed.
        return llguidance.LLTokenizer(
            self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
        )


def marker(text: str, tokenizer: Tokenizer) -> str:
    """Return `text` for a rule of a Lark grammar, as the model writes it.

    If it is a token of its own, the result is that token: llguidance does not count the spelling of
    a token like `<tool_call>` as text.
    """
    token_id = tokenizer.token_id(text)
    return literal(text) if token_id is None else f"<[{token_id}]>"


def literal(text: str) -> str:
    """Return `text` as a string of a Lark grammar."""
    return json.dumps(text).replace("\x7f", "\\u007f")  # JSON allows DEL, Lark does not


def json_rule(schema: dict[str, Any]) -> str:
    """Return the expression for a rule of a Lark grammar that matches the JSON documents that
    follow `schema`. Raises ValueError for a schema that is nested too deeply."""
    return f"%json {json.dumps({**closed(schema), 'x-guidance': _JSON_OPTIONS})}"


def _llguidance_grammar(spec: StructuredOutput, tokenizer: Tokenizer) -> str:
    """Return llguidance's list of grammars as JSON. Raises ValueError if a schema cannot be
    kept."""
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
            # A terminal is used, as in a rule every choice would be an item of the parser.
            choices = " | ".join(map(literal, spec.choices))
            main = {"lark_grammar": f"start: CHOICE\nCHOICE: {choices}"}
        case StructuredOutputKind.GRAMMAR:
            main = {"lark_grammar": restate_lark(_as_lark(spec.text))}
    # If one grammar of the list sets this option, it holds for all.
    answer = "(@main | @calls)" if spec.calls else "@main"
    rules = ['%llguidance {"no_forcing": true}', f"start: {answer}"]
    if spec.reasoning_end:
        token_id = tokenizer.token_id(spec.reasoning_end)
        free = (
            f"free[suffix={literal(spec.reasoning_end)}]: /(?s:.*)/"
            if token_id is None
            else f"free: /(?s:.*)/ <[{token_id}]>"
        )
        # Models write up to two line breaks behind their reasoning.
        reasoning = "free /\\n{0,2}/"
        if spec.reasoning_start:
            # The answer of a model that does not reason this time begins with what was asked for.
            reasoning = f"({marker(spec.reasoning_start, tokenizer)} {reasoning})?"
        rules[1:] = [f"start: {reasoning} {answer}", free]
    grammars = [{"lark_grammar": "\n".join(rules)}, {"name": "main", **main}]
    if spec.calls:
        grammars.append({"name": "calls", "lark_grammar": restate_lark(spec.calls)})
    try:
        return json.dumps({"grammars": grammars})
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _as_lark(grammar: str) -> str:
    """Return a grammar in Lark, translated if it is one in GBNF or EBNF. Raises ValueError if it
    cannot be translated."""
    if "::=" not in grammar or is_lark_syntax(grammar):
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # the translation raises nothing more precise
        raise ValueError(f"as GBNF it cannot be read: {error}") from error


def grammar_error(spec: StructuredOutput, problem: str, reason: str) -> RequestError:
    """Return the error for a grammar, which names the request's field.

    reason: why the problem arises, e.g. llguidance's message.
    """
    if spec.kind is not StructuredOutputKind.GRAMMAR or spec.param == "tools":
        reason = _LISTING.sub("", reason)  # the client has not written these lines
    reason = " ".join(reason.removesuffix("<non-verbose/>").split()).rstrip(".")
    if reason.startswith("NoExtension"):  # llguidance gives only the name of the reason
        reason = "no text satisfies it"
    why = truncated(reason, _MAX_REASON)
    return RequestError(f"{spec.param}: the {_WHAT[spec.kind]} {problem}: {why}.", param=spec.param)
