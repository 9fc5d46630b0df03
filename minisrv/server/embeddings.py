"""The response to POST /v1/embeddings: the pooled hidden states of prompts, one vector for each.

An input is a request of the engine that asks for no token. The engine reports the hidden states
summed over the tokens that the pooling takes, in as many parts as the prefill has chunks; they are
added up, averaged and normalised here.

Knows: the engine client, and how vectors are encoded. Knows nothing of models.
"""

from __future__ import annotations

import base64
import time
import uuid
from contextlib import aclosing

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv.errors import RequestError, shutting_down_error
from minisrv.request import EngineOutput, EngineRequest, FinishReason, Pooling, SamplingParams
from minisrv.request_metrics import EndedChoice
from minisrv.server.errors import JSON
from minisrv.server.generation_response import AbortableResponse
from minisrv.server.offload import offload
from minisrv.server.request_schemas import EmbeddingRequest
from minisrv.server.response_schemas import Embedding, EmbeddingResponse, EmbeddingUsageInfo
from minisrv.server.serving import Serving

_Vector = NDArray[np.float32]

_encode = msgspec.json.Encoder().encode


class EmbeddingsResponse(AbortableResponse):
    """Answers `request` with an embedding of each input.

    model: the name of the model in the body.
    pooling: how hidden states become an embedding.
    """

    def __init__(
        self, serving: Serving, request: EmbeddingRequest, model: str, pooling: Pooling
    ) -> None:
        super().__init__(serving)
        self._request = request
        self._model = model
        self._pooling = pooling
        self._num_tokens = 0
        self._id = f"embd-{uuid.uuid4().hex}"

    def _described(self) -> dict[str, object]:
        return {"prompt_tokens": self._num_tokens}

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving, request, key = self._serving, self._request, scope["key"]
        info = serving.engine_info()
        if request.dimensions not in (None, info.hidden_size):
            raise RequestError(
                f"dimensions={request.dimensions} is not possible: the embeddings of this model "
                f"have {info.hidden_size} dimensions; leave it out.",
                param="dimensions",
            )
        ids = [serving.choice_id(self._id, index) for index in range(len(request.input))]
        with serving.held(ids, "input", key):
            async with self._in_time():
                prompts = await serving.encode_inputs(request)
                self._num_tokens = sum(map(len, prompts))
                params = SamplingParams(max_tokens=0, pooling=self._pooling)
                requests = [
                    EngineRequest(
                        request_id=request_id,
                        prompt_token_ids=prompt,
                        params=params,
                        api_key_index=None if serving.share_prefix_cache else key,
                        priority=request.priority,
                    )
                    for request_id, prompt in zip(ids, prompts, strict=True)
                ]
                sums = await self._sums(requests, info.hidden_size)
            vectors = [sums[request_id] for request_id in ids]
            body = await offload(lambda: self._body(vectors), len(ids) * info.hidden_size)
        await Response(body, media_type=JSON.media_type)(scope, receive, send)

    async def _sums(self, requests: list[EngineRequest], size: int) -> dict[str, _Vector]:
        """Return the sums of the pooled hidden states, by request id."""
        sums = {request.request_id: np.zeros(size, np.float32) for request in requests}
        lengths = {request.request_id: len(request.prompt_token_ids) for request in requests}
        first: dict[str, EngineOutput] = {}
        left = len(requests)
        batches = self._serving.client.generate(requests)
        async with aclosing(batches):
            async for outputs in batches:
                for output in outputs:
                    request_id = output.request_id
                    first.setdefault(request_id, output)
                    if output.hidden_sum:
                        sums[request_id] += np.frombuffer(output.hidden_sum, np.float32)
                    if output.finish_reason is FinishReason.ABORT:
                        raise shutting_down_error()
                    if output.finish_reason is not None:
                        left -= 1
                        self._count_end(first[request_id], lengths[request_id])
                if not left:
                    break
        return sums

    def _count_end(self, first: EngineOutput, num_prompt_tokens: int) -> None:
        """Count an input whose hidden states are all there; `first` is its first output."""
        now = time.perf_counter()
        self._serving.metrics.ended(
            EndedChoice(
                reason=FinishReason.LENGTH.value,
                latency=now - self._arrival,
                queue=first.scheduled_at - first.queued_at,
                prefill=now - first.scheduled_at,
                decode=0.0,
                num_prompt_tokens=num_prompt_tokens,
                num_cached_tokens=first.num_cached_tokens,
                num_generated_tokens=0,
                max_tokens=0,
            )
        )

    def _body(self, sums: list[_Vector]) -> bytes:
        """Return the body of the response. Each vector becomes text by itself: as lists of numbers,
        all of them together would take three times the memory of their text."""
        data = []
        for index, vector in enumerate(sums):
            # The mean has the direction of the sum, and the length is 1 in the end.
            length = np.linalg.norm(vector.astype(np.float64))
            vector = (vector / (length or 1.0)).astype("<f4")
            values: str | list[float] = (
                base64.b64encode(vector.tobytes()).decode()
                if self._request.encoding_format == "base64"
                else vector.tolist()
            )
            data.append(_encode(Embedding(object="embedding", index=index, embedding=values)))
        usage = EmbeddingUsageInfo(prompt_tokens=self._num_tokens, total_tokens=self._num_tokens)
        frame = EmbeddingResponse(
            id=self._id,
            object="list",
            created=int(time.time()),
            model=self._model,
            data=[],
            usage=usage,
        )
        before, _, after = _encode(frame).partition(b'"data":[]')
        return b"".join((before, b'"data":[', b",".join(data), b"]", after))
