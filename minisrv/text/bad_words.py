"""The tokens of words that a completion must not contain.

Knows: the tokenizer. Knows nothing of logits or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from minisrv.errors import RequestError, shown
from minisrv.request import MAX_BAD_WORD_LENGTH
from minisrv.text.tokenizer import Tokenizer


def bad_words_token_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of each word as it stands at the beginning of a text, and, where they
    are others, behind a space, as in vLLM.

    Raises RequestError for a word that has no tokens, or too many.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        alone = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        behind = tuple(tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False))
        if not alone or max(len(alone), len(behind)) > MAX_BAD_WORD_LENGTH:
            raise RequestError(
                f"bad_words: {shown(word)} has {len(alone)} tokens; it must have 1 to "
                f"{MAX_BAD_WORD_LENGTH}.",
                param="bad_words",
            )
        found[alone] = None
        if behind[-len(alone) :] != alone:  # else it is ruled out already
            found[behind] = None
    return tuple(found)
