"""A chat with a model in this process, which runs the same `EngineCore` as a server.

Knows: chat templates, the engine, and how tokens become text. Knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from minisrv.chat import COMPLETION_TOKENS, NO_TEMPLATE, Message, Note, Piece
from minisrv.checkpoint import open_checkpoint
from minisrv.config import ChatConfig, EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.errors import ContextLengthError
from minisrv.interrupts import deferred_interrupts
from minisrv.progress import StartupProgress
from minisrv.request import EngineRequest, FinishReason
from minisrv.server.request_schemas import GenerationRequest
from minisrv.text.chat_deltas import ContentDelta, ReasoningDelta
from minisrv.text.chat_format import ChatFormat, ChatParser
from minisrv.text.detokenizer import Detokenizer
from minisrv.text.output_processor import OutputProcessor
from minisrv.text.tokenizer import Tokenizer


class LocalModel:
    """A model in this process, ready when the constructor returns. Answers are sampled as the
    server does by default.

    The constructor raises the errors of start-up (ConfigError, ModelError, GraphError).
    """

    def __init__(self, config: EngineConfig, chat: ChatConfig) -> None:
        self._chat = chat
        self._checkpoint = open_checkpoint(config)
        self.name = config.model or self._checkpoint.directory.name
        self._tokenizer = Tokenizer.from_description(self._checkpoint.tokenizer)
        progress = StartupProgress()
        try:
            self._engine = EngineCore(build_engine(config, progress, checkpoint=self._checkpoint))
        finally:
            progress.close()
        self._count = 0

    def answer(self, messages: list[Message]) -> Generator[Piece, None, None]:
        """See `Model`."""
        tokenizer = self._tokenizer
        if not tokenizer.has_chat_template:
            if not self._count:
                yield Note(NO_TEMPLATE)
            prompt = messages[-1]["content"]
            ids = tokenizer.encode(prompt)
            text = self._text(prompt_token_ids=ids)
            yield from self._generate(ids, text, None, COMPLETION_TOKENS)
            return
        prompt = tokenizer.render_chat(messages)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        form = ChatFormat.of_template(tokenizer.chat_template_source)
        markers = (tokenizer.token_id(marker) for marker in form.markers(None))
        text = self._text(visible_special_ids=frozenset(i for i in markers if i is not None))
        yield from self._generate(ids, text, form.parser(prompt), None)

    def _text(self, **options: Any) -> Detokenizer:
        """Return the detokenizer for an answer, which stops at the stop strings of the
        checkpoint."""
        generation = self._checkpoint.generation
        return Detokenizer(
            self._tokenizer, generation.stop, min_tokens=generation.min_tokens or 0, **options
        )

    def _generate(
        self, ids: list[int], text: Detokenizer, parser: ChatParser | None, most: int | None
    ) -> Generator[Piece, None, None]:
        """Yield the pieces of an answer to the prompt `ids`.

        text: the detokenizer for the answer.
        parser: splits the text into content and reasoning; None if all of it is content.
        most: maximum number of tokens of the answer if neither the user nor the checkpoint sets
            one; None leaves it to the room in the context.
        """
        context, generation = self._engine.info.max_model_len, self._checkpoint.generation
        room = context - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"the conversation has {len(ids)} tokens, and the context holds {context}, the "
                "answer included."
            )
        limit = min(room, self._chat.max_tokens or generation.max_tokens or most or room)
        sampling = GenerationRequest(temperature=self._chat.temperature)
        self._count += 1
        request = EngineRequest(
            request_id=str(self._count),
            prompt_token_ids=ids,
            params=sampling.sampling_params(generation, limit),
        )
        processor = OutputProcessor(text)
        reason = None
        with deferred_interrupts() as check_interrupt:
            self._engine.add(request)
            try:
                while reason is None:
                    check_interrupt()
                    for output in self._engine.step():
                        delta = processor.process(output)
                        if delta is not None:
                            reason = delta.finish_reason
                            yield from _pieces(parser, delta.text, final=reason is not None)
                    self._engine.advance_background()
            finally:
                self._engine.abort(request.request_id)
        if reason is FinishReason.LENGTH:
            yield Note(f"The answer is cut off after {limit} tokens.")


def _pieces(parser: ChatParser | None, text: str, *, final: bool) -> Iterator[Piece]:
    deltas = [ContentDelta(text)] if parser is None else parser.feed(text)
    if final and parser is not None:
        deltas += parser.finish()
    for delta in deltas:
        # No tools were offered, so nothing looks for calls of them.
        assert isinstance(delta, ContentDelta | ReasoningDelta)
        yield delta
