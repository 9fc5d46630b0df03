"""The bytes behind each token id, for tokenizers in which every token is a string of bytes.

Two families cover the supported checkpoints:

- byte-level BPE (GPT-2, Llama 3, Qwen): each character of a token stands for one byte;
- SentencePiece with byte fallback (Llama 2, Gemma): `▁` stands for a space, `<0xE2>` for a byte.

For these, the text of a sequence is the concatenated bytes read as UTF-8, so that it can be decoded
incrementally and exactly. For byte-level BPE it equals `tokenizers`' own decoding for any sequence
of ids. For byte fallback it does so if the bytes are valid; if they are not, `tokenizers` replaces
the whole run of byte tokens and this module replaces the invalid bytes only.

Knows: the decoder section of a `tokenizer.json`. Does not know which tokens are to be skipped.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

import tokenizers

utf8_decoder = codecs.getincrementaldecoder("utf-8")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"


def _byte_level_alphabet() -> dict[str, int]:
    """Return the inverse of GPT-2's table of one printable character per byte
    (`bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_LEVEL = _byte_level_alphabet()


class TokenBytes(dict[int, bytes]):
    """A mapping from token id to its bytes, filled on demand; unknown ids have no bytes.

    strip_start: maximum number of leading spaces that decoding removes from the start of a text.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, byte_level: bool, strip_start: int
    ) -> None:
        super().__init__()
        self._id_to_token = backend.id_to_token
        self._to_bytes = bytes_of_characters if byte_level else _from_sentence_piece
        self.strip_start = strip_start

    def __missing__(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id)
        piece = b"" if token is None else self._to_bytes(token)
        self[token_id] = piece
        return piece

    @classmethod
    def recognise(cls, backend: tokenizers.Tokenizer) -> TokenBytes | None:
        """Return the mapping for this tokenizer, or None if its tokens are not plain bytes."""
        steps = decoder_steps(backend) or []
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(backend, byte_level=True, strip_start=0)
        if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
            replace, strip = steps[0], steps[3] if steps[3:] else {"start": 0, "stop": 0}
            spaces = replace["pattern"] == {"String": _SPACE_MARK} and replace["content"] == " "
            if spaces and strip.get("content", " ") == " " and strip["stop"] == 0:
                return cls(backend, byte_level=False, strip_start=strip["start"])
        return None


def decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]] | None:
    """Return the steps of the decoder as a flat list, each as `tokenizer.json` has it; None if
    there is no decoder."""
    decoder = json.loads(backend.to_str())["decoder"]
    return None if decoder is None else list(_flat(decoder))


def _flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step["decoders"]:
        yield from _flat(inner)


def bytes_of_characters(token: str) -> bytes:
    """Return the bytes behind a token of byte-level BPE."""
    try:
        return bytes([_BYTE_LEVEL[char] for char in token])
    except KeyError:  # an added token is spelled as plain text
        return token.encode()


def byte_of_token(token: str) -> bytes | None:
    """Return the byte that a token of byte fallback stands for, or None if it is another token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return match and bytes.fromhex(match[1])


def _from_sentence_piece(token: str) -> bytes:
    byte = byte_of_token(token)
    return token.replace(_SPACE_MARK, " ").encode() if byte is None else byte
