"""A tokenizer for random weights that have none: as many tokens as the model has, each with text.

Knows: byte-level BPE. What a model with random weights answers means nothing, but clients see a
token whenever one comes.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minisrv.checkpoint.description import TokenizerDescription

_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def stand_in_tokenizer(vocab_size: int) -> TokenizerDescription:
    """The 256 bytes, by which text is encoded, and made-up words behind them; fewer bytes where the
    vocabulary is smaller than that."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġ{_word(number)}" for number in range(vocab_size - len(alphabet)))
    tokens = [*alphabet[:vocab_size], *words]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenizerDescription(tokenizer.to_str(), chat_templates={"default": _TEMPLATE})


def _word(number: int) -> str:
    """A number to the base of 26, in letters; no two are the same."""
    letters = ""
    while number or not letters:
        number, digit = divmod(number, 26)
        letters += chr(ord("a") + digit)
    return letters
