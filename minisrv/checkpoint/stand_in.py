"""A stand-in tokenizer for random weights without one: it has a token with text for every id.

The answers of a model with random weights mean nothing, but so clients see text for every token
that is generated.

Knows: byte-level BPE.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minisrv.text.tokenizer_description import TokenizerDescription

_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def stand_in_tokenizer(vocab_size: int) -> TokenizerDescription:
    """Return a tokenizer of `vocab_size` tokens: the 256 bytes, with which text is encoded, and
    made-up words behind them. A vocabulary of fewer than 256 tokens has only the first bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġ{_word(number)}" for number in range(vocab_size - len(alphabet)))
    tokens = [*alphabet[:vocab_size], *words]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenizerDescription(tokenizer.to_str(), chat_templates={"default": _TEMPLATE})


def _word(number: int) -> str:
    """Return a number in base 26, written in letters, so that different numbers give different
    words."""
    letters = ""
    while number or not letters:
        number, digit = divmod(number, 26)
        letters += chr(ord("a") + digit)
    return letters
