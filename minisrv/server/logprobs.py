"""Log-probabilities in the two shapes that OpenAI has for them.

Every entry of the engine is reported, even if its token has the same text as another one or no text
at all: an id of the model's vocabulary that the tokenizer does not know is spelled `token_id:123`,
as vLLM spells ids. Where entries are keyed by text, so are all but the first of those with the same
text; the sampled token is always found under its own text.

Knows: the tokenizer's spelling of single tokens. Knows nothing of sampling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from minisrv.request import TokenLogprobs
from minisrv.server.preprocessing import Echo
from minisrv.server.response_schemas import (
    ChatCompletionLogprob,
    ChatCompletionLogprobs,
    ChatCompletionLogprobsContent,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
)
from minisrv.text.tokenizer import Tokenizer


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs], num_top: int, *, by_id: bool
) -> ChatCompletionLogprobs:
    """Return `choices[].logprobs` of a chat: a list of tokens, each with its `num_top` most likely
    alternatives.

    by_id: whether tokens are spelled as ids.
    """

    def spell(token_id: int) -> tuple[str, list[int] | None]:
        text, piece = _text(tokenizer, token_id)
        return _by_id(token_id) if by_id else text, None if piece is None else list(piece)

    def entry(token_id: int, logprob: float) -> ChatCompletionLogprob:
        text, piece = spell(token_id)
        return ChatCompletionLogprob(text, logprob, piece)

    def content(position: TokenLogprobs) -> ChatCompletionLogprobsContent:
        text, piece = spell(position.token_id)
        top = [entry(*pair) for pair in position.top[:num_top]]
        return ChatCompletionLogprobsContent(text, position.logprob, piece, top)

    return ChatCompletionLogprobs([content(position) for position in logprobs], refusal=None)


def prompt_logprobs(
    tokenizer: Tokenizer, scored: Sequence[TokenLogprobs], num_top: int
) -> PromptLogprobs:
    """Return vLLM's field `prompt_logprobs`: an entry for each prompt token, null for the first,
    which has no log-probability. An entry holds the token itself and its `num_top` most likely
    alternatives, by token id."""

    def entry(token_id: int, logprob: float, rank: int) -> PromptLogprob:
        text, _ = _text(tokenizer, token_id)
        return PromptLogprob(logprob, rank, text)

    def position(of: TokenLogprobs) -> dict[str, PromptLogprob]:
        own = {str(of.token_id): entry(of.token_id, of.logprob, of.rank)}
        best = enumerate(of.top[:num_top], start=1)
        return own | {str(i): entry(i, logprob, rank) for rank, (i, logprob) in best}

    return [None, *map(position, scored)]


class CompletionLogprobsWriter:
    """Writes `choices[].logprobs` of a completion, whose text offsets run on from chunk to chunk.

    Every offset is an index into the choice's own text. A token whose text may yet be cut off by a
    stop string, together with some that came before it, is held back until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, by_id: bool) -> None:
        """Keep the tokenizer.

        by_id: whether tokens are spelled as ids.
        """
        self._tokenizer = tokenizer
        self._spells_ids = by_id
        self._num_top = num_top
        self._begin = 0
        """Index at which the completion begins, behind a prompt that is echoed."""
        self._length = 0
        """Number of characters of the text so far."""
        self._waiting: deque[tuple[TokenLogprobs, int]] = deque()

    def add(
        self,
        lists: CompletionLogprobs,
        logprobs: Iterable[TokenLogprobs],
        starts: Iterable[int],
        text: str,
        *,
        last: bool,
    ) -> None:
        """Append some tokens to the four lists, one item per token.

        `top_logprobs` holds the sampled token too: at most `num_top` + 1 entries.

        starts: where each token begins; see `CompletionDelta.text_offsets`.
        text: the text that is sent together with these tokens.
        last: whether no text follows.
        """
        self._length += len(text)
        self._waiting += zip(logprobs, (self._begin + start for start in starts), strict=True)
        while self._waiting and (last or self._waiting[0][1] <= self._length):
            position, start = self._waiting.popleft()
            self._append(lists, position.token_id, min(start, self._length), position)

    def add_prompt(
        self,
        lists: CompletionLogprobs,
        echo: Echo,
        token_ids: Sequence[int],
        scored: Sequence[TokenLogprobs],
    ) -> None:
        """Append an echoed prompt to the four lists, with nulls for its first token, which has no
        log-probability. Must be called before any `add`.

        scored: the logprobs of all prompt tokens but the first.
        """
        for token_id, start, position in zip(
            token_ids, echo.text_offsets, (None, *scored), strict=True
        ):
            self._append(lists, token_id, start, position)
        self._begin = self._length = len(echo.text)

    def _append(
        self,
        lists: CompletionLogprobs,
        token_id: int,
        start: int,
        position: TokenLogprobs | None,
    ) -> None:
        name = self._name(token_id)
        lists.tokens.append(name)
        lists.text_offset.append(start)
        if position is None:
            lists.token_logprobs.append(None)
            lists.top_logprobs.append(None)
            return
        best = {}
        for rival, logprob in position.top[: self._num_top]:
            other = self._name(rival)
            taken = rival != token_id and (other == name or other in best)
            best[_by_id(rival) if taken else other] = logprob
        lists.token_logprobs.append(position.logprob)
        lists.top_logprobs.append(best | {name: position.logprob})

    def _name(self, token_id: int) -> str:
        """Return the token as text, or as OpenAI spells a token that is not valid text by
        itself."""
        if self._spells_ids:
            return _by_id(token_id)
        text, piece = _text(self._tokenizer, token_id)
        if piece is None or text.encode() == piece:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _text(tokenizer: Tokenizer, token_id: int) -> tuple[str, bytes | None]:
    """Return a token as text and as bytes; an id that the tokenizer does not know has a name and no
    bytes."""
    if not tokenizer.has_token(token_id):
        return _by_id(token_id), None
    return tokenizer.token_text(token_id)


def _by_id(token_id: int) -> str:
    return f"token_id:{token_id}"
