"""The decoder of a `tokenizer.json`, applied token by token.

`tokenizers` decodes all tokens at once, and how it decodes one may depend on later ones. Here every
step of the decoder takes the pieces that the step before it has passed on, passes on what no later
token can change, and passes on the rest when that is settled or the text ends. A token costs what
its own text costs, however long the text has become.

The pieces put together equal what `tokenizers` makes of all tokens at once, with one exception:
where bytes are not UTF-8, `tokenizers` replaces the whole run of byte tokens, so an answer of
nothing but bytes could not be streamed before its end. A stream replaces the invalid bytes only.

A step that has to see all of a text, such as a regular expression behind Fuse, holds all of it
back.

`tokenizers.DecodeStream` (0.22.0 and 0.23.3) is not used, because it raises an error where a later
token changes text that it has returned (BPEDecoder, and byte tokens that are not UTF-8), panics
where Strip does, loses the text that it holds back when a stream ends, and returns nothing and
takes quadratic time as long as the bytes of a text are no character (2.4 s for 4,000 tokens).

Knows: the decoder section of a `tokenizer.json`. Does not know which tokens are to be skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import tokenizers

from minisrv.text.token_bytes import byte_of_token, bytes_of_characters, decoder_steps, utf8_decoder

_CACHED_PIECES = 1 << 16
"""Maximum number of pieces for which a step caches the result: a vocabulary's worth."""


class _State(Protocol):
    """The state of one step for one text."""

    @property
    def held(self) -> int:
        """Number of characters that are held back, as far as it can be told; part of a character
        counts."""

    def push(self, pieces: Iterable[str]) -> list[str]:
        """Add pieces; return those that are settled."""

    def flush(self) -> list[str]:
        """End the text; return what was held back."""


@dataclass(frozen=True)
class _Step:
    """A step of the decoder.

    start: makes the step's state for a text; its argument `streams` says whether characters may be
        returned before their run of bytes has ended.
    inside: returns what the step makes by itself of a piece that is neither the first nor the last;
        bytes if the piece stands for some.
    """

    start: Callable[[bool], _State]
    inside: Callable[[str], str | bytes]


class DecoderPipeline:
    """The decoder of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._id_to_token = backend.id_to_token
        self._steps = _compile(decoder_steps(backend))

    def decoder(self, *, streams: bool = True) -> PipelineDecoder:
        """Return a decoder for a new text.

        streams: whether characters may be returned before their run of byte tokens has ended; see
            the module. If not, invalid bytes are replaced as `tokenizers` does.
        """
        return PipelineDecoder(self._id_to_token, [step.start(streams) for step in self._steps])

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds inside a text, or most likely adds, as UTF-8; nothing if the id
        is not a token's."""
        piece = self._id_to_token(token_id)
        if piece is None:
            return b""
        for step in self._steps:
            found = step.inside(piece)
            try:
                piece = found.decode() if isinstance(found, bytes) else found
            except UnicodeDecodeError as error:
                return error.object
        return piece.encode()


class PipelineDecoder:
    """Decodes the tokens of one text."""

    def __init__(self, id_to_token: Callable[[int], str | None], states: list[_State]) -> None:
        self._id_to_token = id_to_token
        self._states = states

    @property
    def held(self) -> int:
        """Number of characters that are held back, as far as it can be told; part of a character
        counts."""
        return sum(state.held for state in self._states)

    def push(self, token_ids: Iterable[int], final: bool) -> str:
        """Add tokens; return the text that is settled, which is all of it if `final`."""
        tokens = map(self._id_to_token, token_ids)
        pieces = [token for token in tokens if token is not None]
        for state in self._states:
            pieces = state.push(pieces)
            if final:
                pieces += state.flush()
        return "".join(pieces)


def _compile(decoder: Sequence[dict[str, Any]] | None) -> list[_Step]:
    if decoder is None:
        return [_each(lambda token: token, lambda token: " " + token)]
    steps = []
    one_text = False
    """Whether the pieces are parts of one text, so that the borders between them mean nothing."""
    for number, step in enumerate(decoder):
        borders = decoder[number + 1 :] and decoder[number + 1]["type"] != "Fuse"
        match step:
            case {"type": "Fuse"}:
                one_text = True
            case {"type": "Strip", "content": content, "start": start, "stop": stop}:
                steps.append((_strip_text if one_text else _strip_each)(content, start, stop))
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": new} if (
                one_text and old
            ):
                steps.append(_replace(old, new))
            case {"type": "Replace" | "Metaspace" | "WordPiece"} if not one_text:
                steps.append(_each_by_library(step))
            case {"type": "CTC"} if not one_text:
                steps.append(_distinct(_library(step)))
            case {"type": "BPEDecoder"} if not one_text:
                steps.append(_all_but_last(_library(step), bool(borders)))
            case {"type": "ByteFallback"} if not one_text:
                steps.append(_byte_runs(bool(borders)))
            case {"type": "ByteLevel"} if not one_text:
                steps.append(_Step(lambda _: _ByteLevel(), bytes_of_characters))
                one_text = True
            case _:
                steps.append(_whole(_library(step), one_text))
                one_text = True
    return steps


def _library(step: dict[str, Any]) -> Callable[[list[str]], str]:
    """Return the function by which `tokenizers` decodes pieces in this step."""
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps({"model": model, "decoder": step}))
    decode: Callable[[list[str]], str] = tokenizer.decoder.decode
    return decode


def _each(first: Callable[[str], str], other: Callable[[str], str]) -> _Step:
    """Return a step that decodes each piece by itself, with `first` for the first piece of the
    text."""
    cached = lru_cache(_CACHED_PIECES)(other)
    return _Step(lambda _: _Each(first, cached), cached)


def _each_by_library(step: dict[str, Any]) -> _Step:
    decode = _library(step)
    before = len(decode([""]))  # a regular expression may match the empty string
    return _each(lambda piece: decode([piece]), lambda piece: decode(["", piece])[before:])


def _strip_each(content: str, start: int, stop: int) -> _Step:
    """Strip each piece. The library's own step is not used, as it panics where there is less to
    strip than it may."""

    def strip(piece: str) -> str:
        state = _StripText(content, start, stop)
        return "".join([*state.push([piece]), *state.flush()])

    return _each(strip, strip)


class _Each:
    held = 0

    def __init__(self, first: Callable[[str], str], other: Callable[[str], str]) -> None:
        self._next = first
        self._other = other

    def push(self, pieces: Iterable[str]) -> list[str]:
        found = []
        for piece in pieces:
            found.append(self._next(piece))
            self._next = self._other
        return found

    def flush(self) -> list[str]:
        return []


def _distinct(decode: Callable[[list[str]], str]) -> _Step:
    """CTC: a piece that equals the one before it is dropped, and so is an empty one."""

    @lru_cache(_CACHED_PIECES)
    def clean(piece: str) -> str:
        return decode([piece])

    return _Step(lambda _: _Distinct(clean), clean)


class _Distinct:
    held = 0

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean = clean
        self._last: str | None = None

    def push(self, pieces: Iterable[str]) -> list[str]:
        found = []
        for piece in pieces:
            if piece != self._last and (text := self._clean(piece)):
                found.append(text)
            self._last = piece
        return found

    def flush(self) -> list[str]:
        return []


def _all_but_last(decode: Callable[[list[str]], str], borders: bool) -> _Step:
    """BPEDecoder: the end of a word becomes a space, but not in the last piece."""

    @lru_cache(_CACHED_PIECES)
    def forms(piece: str) -> tuple[str | None, tuple[str, str] | None]:
        """Return the part of the piece that is certain, and what follows it if the piece is not the
        last and if it is."""
        inside, last = decode([piece, ""]), decode([piece])
        if inside == last:
            return inside, None
        if borders:
            return None, (inside, last)
        pairs = zip(inside, last, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(last))
        return last[:same], (inside[same:], last[same:])

    return _Step(lambda _: _AllButLast(forms), lambda piece: decode([piece, ""]))


class _AllButLast:
    def __init__(self, forms: Callable[[str], tuple[str | None, tuple[str, str] | None]]) -> None:
        self._forms = forms
        self._held: tuple[str, str] | None = None

    @property
    def held(self) -> int:
        return 0 if self._held is None else len(self._held[0])

    def push(self, pieces: Iterable[str]) -> list[str]:
        found = []
        for piece in pieces:
            if self._held is not None:
                found.append(self._held[0])
            certain, self._held = self._forms(piece)
            if certain is not None:
                found.append(certain)
        return found

    def flush(self) -> list[str]:
        return [] if self._held is None else [self._held[1]]


def _byte_runs(borders: bool) -> _Step:
    def inside(piece: str) -> str | bytes:
        byte = byte_of_token(piece)
        return piece if byte is None else byte

    return _Step(lambda streams: _StreamedRuns() if streams and not borders else _Runs(), inside)


class _Runs:
    """ByteFallback: a run of byte tokens becomes one piece, or replacement characters if it is not
    UTF-8."""

    def __init__(self) -> None:
        self._run = bytearray()
        self.held = 0

    def push(self, pieces: Iterable[str]) -> list[str]:
        found = []
        for piece in pieces:
            byte = byte_of_token(piece)
            if byte is None:
                found += [*self.flush(), piece]
            else:
                self._run += byte
                self.held += byte[0] & 0xC0 != 0x80  # all but continuation bytes begin one
        return found

    def flush(self) -> list[str]:
        run, self._run, self.held = self._run, bytearray(), 0
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _StreamedRuns:
    """ByteFallback for a stream: each character is passed on when it is complete."""

    def __init__(self) -> None:
        self._utf8 = utf8_decoder(errors="replace")

    @property
    def held(self) -> int:
        return bool(self._utf8.getstate()[0])

    def push(self, pieces: Iterable[str]) -> list[str]:
        found = []
        for piece in pieces:
            byte = byte_of_token(piece)
            if byte is None:
                found += [*self.flush(), piece]
            else:
                found.append(self._utf8.decode(byte))
        return found

    def flush(self) -> list[str]:
        return [self._utf8.decode(b"", True)]


class _ByteLevel:
    def __init__(self) -> None:
        self._utf8 = utf8_decoder(errors="replace")

    @property
    def held(self) -> int:
        return bool(self._utf8.getstate()[0])

    def push(self, pieces: Iterable[str]) -> list[str]:
        return [self._utf8.decode(b"".join(map(bytes_of_characters, pieces)))]

    def flush(self) -> list[str]:
        return [self._utf8.decode(b"", True)]


def _replace(old: str, new: str) -> _Step:
    return _Step(lambda _: _Replace(old, new), lambda piece: piece.replace(old, new))


class _Replace:
    """Replace behind Fuse, where the string to replace may lie across pieces."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._held = ""

    @property
    def held(self) -> int:
        return len(self._held)

    def push(self, pieces: Iterable[str]) -> list[str]:
        *before, rest = "".join([self._held, *pieces]).split(self._old)
        most = min(len(rest), len(self._old) - 1)
        held = next(n for n in range(most, -1, -1) if self._old.startswith(rest[len(rest) - n :]))
        self._held = rest[len(rest) - held :]
        return [self._new.join([*before, rest[: len(rest) - held]])]

    def flush(self) -> list[str]:
        return [self._held]


def _strip_text(content: str, start: int, stop: int) -> _Step:
    return _Step(lambda _: _StripText(content, start, stop), lambda piece: piece)


class _StripText:
    """Strip a whole text: up to `start` times `content` from its start, and up to `stop` times from
    its end."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop
        self.held = 0
        """Number of times that `content` stands at the end of the text so far, up to `stop`; these
        are held back, as they may have to be stripped."""

    def push(self, pieces: Iterable[str]) -> list[str]:
        text = "".join(pieces)
        if self._start and text:
            inner = text.lstrip(self._content)
            left = len(text) - len(inner)
            text = text[min(left, self._start) :]
            self._start = 0 if inner else max(0, self._start - left)
        text = self._content * self.held + text
        self.held = min(len(text) - len(text.rstrip(self._content)), self._stop)
        return [text[: len(text) - self.held]]

    def flush(self) -> list[str]:
        return []


def _whole(decode: Callable[[list[str]], str], one_text: bool) -> _Step:
    return _Step(lambda _: _Whole(decode, one_text), lambda piece: decode([piece]))


class _Whole:
    """A step that can be applied only when all of the text is there."""

    def __init__(self, decode: Callable[[list[str]], str], one_text: bool) -> None:
        self._decode = decode
        self._one_text = one_text
        self._pieces: list[str] = []
        self.held = 0

    def push(self, pieces: Iterable[str]) -> list[str]:
        for piece in pieces:
            self._pieces.append(piece)
            self.held += len(piece)
        return []

    def flush(self) -> list[str]:
        return [self._decode(["".join(self._pieces)] if self._one_text else self._pieces)]
