"""What a request asks for, and what comes back of it, token by token.

Knows: the sampling parameters and their bounds, the finish reasons, and the typed records that
cross the socket between API worker and engine. Knows nothing of text, HTTP or tensors: prompts
are token ids here, and stop strings are the API worker's to find.
"""

from __future__ import annotations

import enum
import math

import msgspec

from minisrv.errors import MinisrvError, RequestError

MAX_STOP_TOKEN_IDS = 64
MAX_TOP_K = 2**31 - 1
MAX_LOGPROBS = 20
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1


class FinishReason(enum.StrEnum):
    """Why a request ended. STOP and LENGTH go on the wire under OpenAI's names."""

    STOP = "stop"
    """An end-of-sequence or stop token was sampled, or a stop string was found."""
    LENGTH = "length"
    """`max_tokens` or the context length was reached."""
    ABORT = "abort"
    """The client went away, or asked for the request to be dropped."""


def _check(ok: bool, param: str, value: object, allowed: str) -> None:
    if not ok:
        raise RequestError(f"{param}={value!r} is not allowed: it must be {allowed}.", param=param)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens and when to stop. Field names and meanings are vLLM's and OpenAI's.

    max_tokens: completion tokens at most; None means up to the context length.
    temperature: 0 is greedy.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p.
    min_p: keep tokens whose probability is at least min_p times the highest.
    seed: fixes the sampling noise; None draws one when the request is admitted.
    stop_token_ids: end the request when one is sampled (the token stays in the output ids).
    ignore_eos: go on past the model's end-of-sequence tokens (for measurements).
    logprobs: report the sampled token's log-probability and this many alternatives (None: off).

    Raises RequestError, naming the field, for a value out of bounds.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        finite = math.isfinite(self.temperature)
        _check(finite and 0 <= self.temperature <= 2, "temperature", self.temperature, "in [0, 2]")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _check(-1 <= self.top_k <= MAX_TOP_K, "top_k", self.top_k, "-1 or 0 (all), or 1 and more")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        if self.seed is not None:
            _check(SEED_MIN <= self.seed <= SEED_MAX, "seed", self.seed, "a signed 64-bit integer")
        count = len(self.stop_token_ids)
        _check(
            count <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"[{count} ids]",
            f"at most {MAX_STOP_TOKEN_IDS} ids",
        )
        _check(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "non-empty")
        if self.logprobs is not None:
            _check(
                0 <= self.logprobs <= MAX_LOGPROBS,
                "logprobs",
                self.logprobs,
                f"in [0, {MAX_LOGPROBS}]",
            )


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as an API worker hands it to the engine."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural log, of the unmodified distribution) at one position."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely (token id, logprob) pairs, best first."""


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step (or an abort, or a refusal) adds to one request.

    Exactly one output of a request carries `finish_reason` or `error`; nothing follows it.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: RequestFailure | None = None
    graph_steps: dict[str, int] | None = None
    """With the last output: the request's steps counted by "MODE/reason"."""


class RequestFailure(msgspec.Struct, frozen=True, kw_only=True):
    """An error of the tree of `minisrv.errors`, as it crosses the socket."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None

    @classmethod
    def of(cls, error: MinisrvError) -> RequestFailure:
        """What is sent of `error`."""
        return cls(
            status=error.http_status,
            type=error.type,
            message=error.message,
            param=error.param,
            code=error.code,
        )
