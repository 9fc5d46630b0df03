"""A tokenizer as plain data, which is sent to other processes and stored in the cache.

Knows: what a tokenizer consists of. Knows nothing of files (see `checkpoint`), nor of how text is
encoded (see `tokenizer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenizerDescription:
    """The content of the files of a tokenizer.

    backend: the text of a tokenizer.json that holds the whole tokenizer, special tokens included.
    special_tokens: special tokens by the name of their variable in the chat template, e.g.
        `bos_token`.
    chat_templates: sources of the chat templates by name; the usual one is called `default`.
    chat_template_fault: the reason why they cannot be used; empty if they can.
    eos_token_id: the id of the end-of-sequence token, if there is one.
    highest_id: the highest id of any token.
    splits_special_tokens: whether a special token that is spelled out in a text is tokenized like
        any other text (`split_special_tokens`); a tokenizer.json does not hold this.
    """

    backend: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_templates: dict[str, str] = field(default_factory=dict)
    chat_template_fault: str = ""
    eos_token_id: int | None = None
    highest_id: int = 0
    splits_special_tokens: bool = False
