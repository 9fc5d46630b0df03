"""The tokenizer of a checkpoint: text to ids, messages to ids, ids to text.

All methods may be called from several threads.

Knows: the `tokenizers` library, and the chat template. What a checkpoint's files mean is given to
it as a `TokenizerDescription`. Knows nothing of requests that are being generated: incremental
decoding is done by the detokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from minisrv.errors import ModelError, RequestError
from minisrv.text.chat_template import ChatTemplate
from minisrv.text.decoder_pipeline import DecoderPipeline
from minisrv.text.token_bytes import TokenBytes
from minisrv.text.tokenizer_description import TokenizerDescription


class Tokenizer:
    """Tokenizer and chat template of one checkpoint."""

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None
    ) -> None:
        # A tokenizer.json may contain the truncation and padding of its training.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self.token_bytes = TokenBytes.recognise(backend)
        self.pipeline = DecoderPipeline(backend) if self.token_bytes is None else None
        """The decoder, for tokenizers whose tokens are not plain bytes; otherwise None."""
        self.special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )

    @classmethod
    def from_description(cls, description: TokenizerDescription) -> Tokenizer:
        """Make the tokenizer that a checkpoint describes. Raises ModelError."""
        try:
            backend = tokenizers.Tokenizer.from_str(description.backend)
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise ModelError(f"the tokenizer cannot be made: {error}") from error
        backend.encode_special_tokens = description.splits_special_tokens
        templates = description.chat_templates
        if "default" not in templates:
            return cls(backend, None)
        return cls(backend, ChatTemplate(templates, description.special_tokens))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Number of characters of the longest token, as the vocabulary spells it. Its text has no
        more, and a byte of another spelling counts as one."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template, so that chats can be rendered."""
        return self._chat_template is not None

    @property
    def chat_template_source(self) -> str:
        """The text of the chat template, empty if there is none."""
        return "" if self._chat_template is None else self._chat_template.source

    @property
    def chat_template_variables(self) -> frozenset[str]:
        """The variables of the chat template that a request may set; empty if there is none."""
        return frozenset() if self._chat_template is None else self._chat_template.variables

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json` that makes the same tokenizer."""
        return self._backend.to_str()

    def token_id(self, token: str) -> int | None:
        """Return the id of the token with this spelling, or None. Markers such as `<tool_call>` are
        tokens of their own in some vocabularies and plain text in others."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`. Special tokens spelled in it are recognised, unless the
        checkpoint wants them split like other text.

        add_special_tokens: let the tokenizer add the tokens that it puts around a text, e.g. BOS.
        Raises RequestError if the tokenizer has no token for some of the text.
        """
        try:
            # The batch call releases the GIL, and the fast one does not compute offsets.
            found = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise RequestError(f"the model's tokenizer cannot encode the text: {error}") from error
        return found[0].ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Return the token ids of `text`, with the tokens that the tokenizer puts around a text,
        and for each the index in `text` at which its part begins. A token that has no part in
        `text` begins at the end of the part before it. Tokens that share a character all begin with
        it."""
        [encoding] = self._backend.encode_batch([text])
        starts = []
        last = end = 0
        for start, stop in encoding.offsets:
            if start == stop:
                start = end  # a token that was put around the text, or whose text was all left out
            # Some tokenizers leave the spaces in front of a token out of its span.
            while start > end and text[start - 1].isspace():
                start -= 1
            last = max(last, start)
            end = max(end, stop)
            starts.append(last)
        return encoding.ids, starts

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; ids that are not a token's count as empty."""
        if self.pipeline is None:
            # The batch call releases the GIL.
            [text] = self._backend.decode_batch(
                [list(token_ids)], skip_special_tokens=skip_special_tokens
            )
            return text
        skipped = self.special_ids if skip_special_tokens else frozenset()
        shown = [token_id for token_id in token_ids if token_id not in skipped]
        return self.pipeline.decoder(streams=False).push(shown, final=True)

    def spell(self, token_ids: Sequence[int]) -> list[str]:
        """Return the tokens as the vocabulary spells them; ids that are not a token's give an empty
        string."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def has_token(self, token_id: int) -> bool:
        """Whether the id is a token's. A model's embedding may have rows beyond the vocabulary."""
        return self._backend.id_to_token(token_id) is not None

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """Return what one token adds inside a text, as text (with U+FFFD for bytes that are not
        UTF-8 by themselves) and as bytes; a special token is spelled out."""
        if self.pipeline is not None:
            special = token_id in self.special_ids
            [spelling] = self.spell([token_id]) if special else [""]
            piece = spelling.encode() if special else self.pipeline.token_bytes(token_id)
        else:
            assert self.token_bytes is not None
            piece = self.token_bytes[token_id]
        return piece.decode(errors="replace"), piece

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text of a chat, which is to be encoded with `add_special_tokens=False`.

        tools: the tools that the model may call, as OpenAI's API spells them.
        variables: further variables of the template.
        Raises RequestError if there is no template, or it does not accept what it is given.
        """
        if self._chat_template is None:
            raise RequestError(
                "this model has no chat template, so it cannot be used for chat; "
                "send a prompt to /v1/completions instead.",
                param="messages",
            )
        return self._chat_template.render(messages, add_generation_prompt, tools, variables)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the token ids of a chat. The template spells every special token; no others are
        added.

        Raises RequestError like `render_chat`.
        """
        return self.encode(
            self.render_chat(messages, add_generation_prompt), add_special_tokens=False
        )
