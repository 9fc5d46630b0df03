"""The settings of a run and the records of its requests: frozen data without behaviour.

Names that end in `_s` are seconds. Points in time are readings of `clock`, which on Linux is
CLOCK_MONOTONIC and the same for all processes of a machine, so that records of several client
processes can be merged without conversion.

Knows: the terms that all other modules share. Knows nothing of HTTP, processes or statistics.
"""

import enum
import os
import time
from typing import Self

import msgspec

clock = time.perf_counter

MAX_REQUESTS = 1_000_000
MAX_DURATION_S = 3600.0
MIN_DEFAULT_REQUESTS = 20
DEFAULT_CONCURRENCIES = (1, 4, 16)
STREAMS_PER_PROCESS = 8
"""Number of requests in flight for which one client process is started, unless `processes` is set.
Streams of 5 ms per token then take a few percent of a core, and streams of 1 ms a tenth."""


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no CPU affinity


class PromptKind(enum.StrEnum):
    """The kind of the prompts: random token ids or random words for /completions, or random words
    for /chat/completions."""

    TOKENS = "tokens"
    TEXT = "text"
    CHAT = "chat"


class StoppedBy(enum.StrEnum):
    """The bound that ended the measurement of a level."""

    REQUESTS = "requests"
    DURATION = "duration"
    INTERRUPT = "interrupt"


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that determines which requests are sent, except the API key, which must not get
    into reports."""

    base_url: str
    """The base URL of the server, which ends in /v1."""
    model: str
    concurrencies: tuple[int, ...]
    prompt_kind: PromptKind
    input_tokens: int
    """Number of tokens of a prompt of token ids; number of words of a text or chat prompt."""
    token_range: tuple[int, int]
    """The range [low, high) from which the token ids of prompts are drawn."""
    output_tokens: int
    ignore_eos: bool
    requests: int | None
    duration_s: float | None
    warmup: int | None
    """Number of requests sent for warm-up at each concurrency; None means as many as are in
    flight."""
    processes: int | None
    """Maximum number of client processes; None leaves it to `processes_at`."""
    seed: int
    timeout_s: float
    label: str
    keep_answers: bool = False
    """Whether records hold the answers."""
    return_token_ids: bool = False
    """Whether requests ask for token ids, an extension of the API."""

    def requests_at(self, concurrency: int) -> int:
        """Return the maximum number of requests that are measured at `concurrency`."""
        if self.requests is not None:
            return self.requests
        if self.duration_s is not None:
            return MAX_REQUESTS
        return max(MIN_DEFAULT_REQUESTS, 4 * concurrency)

    def warmup_at(self, concurrency: int) -> int:
        """Return the number of warm-up requests at `concurrency`."""
        return concurrency if self.warmup is None else self.warmup

    def processes_at(self, concurrency: int) -> int:
        """Return the number of client processes at `concurrency`, which is at most `concurrency`,
        so that none is without a request."""
        most = self.processes
        if most is None:
            most = min(usable_cores(), -(-concurrency // STREAMS_PER_PROCESS))
        return min(most, concurrency)

    def lanes_at(self, concurrency: int) -> int:
        """Return the maximum number of requests that one client process keeps in flight at
        `concurrency`."""
        return -(-concurrency // self.processes_at(concurrency))

    @property
    def time_limit_s(self) -> float:
        """Seconds after the start of a level after which no more requests are started."""
        return MAX_DURATION_S if self.duration_s is None else self.duration_s


class Leg(msgspec.Struct, frozen=True):
    """One measurement: that of the `level`-th concurrency of a configuration."""

    config: RunConfig
    level: int

    @classmethod
    def of(cls, config: RunConfig) -> list[Self]:
        """Return the measurements of all concurrencies of a configuration, in order."""
        return [cls(config, level) for level in range(len(config.concurrencies))]

    @property
    def concurrency(self) -> int:
        """Number of requests in flight."""
        return self.config.concurrencies[self.level]


class FailureKind(enum.StrEnum):
    """The reason why a request does not count as a success."""

    CONNECT = "connect_error"
    TIMEOUT = "timeout"
    HTTP_STATUS = "http"
    BROKEN_STREAM = "broken_stream"
    ERROR_EVENT = "error_event"
    NO_FINISH_REASON = "no_finish_reason"
    NO_TOKENS = "no_tokens"
    WRONG_TOKEN_COUNT = "wrong_token_count"


class Failure(msgspec.Struct, frozen=True):
    """One failed request: its kind, the HTTP status if one other than 200 came, and a message."""

    kind: FailureKind
    message: str
    status: int | None = None

    @property
    def key(self) -> str:
        """The name under which failures are counted: the kind, or, with a status, for example
        http_429."""
        return str(self.kind) if self.status is None else f"{self.kind}_{self.status}"


class Answer(msgspec.Struct, frozen=True):
    """The answer of a server; `token_ids` is empty unless it sent the id of every token."""

    text: str
    token_ids: tuple[int, ...]


class RequestRecord(msgspec.Struct, frozen=True):
    """One request as the client saw it."""

    index: int
    start_s: float
    """The time before the request was handed to the HTTP client, so that durations include the
    connection's set-up."""
    end_s: float
    """The time at which `[DONE]` was read, or the failure was known."""
    chunk_times_s: tuple[float, ...]
    """Arrival time of each chunk that carried tokens. All chunks of one read have its time."""
    chunk_tokens: tuple[float, ...]
    """Number of tokens that each of these chunks brought; not a whole number if it is estimated."""
    prompt_tokens: int | None
    completion_tokens: int | None
    """Number of output tokens. This and `prompt_tokens` come from the server's usage, and are None
    if it sent none."""
    failure: Failure | None
    cached_tokens: int | None = None
    """Number of prompt tokens that the server says it found in its prefix cache; None if it does
    not say."""
    answer: Answer | None = None
    """The answer; None unless answers are kept."""

    @property
    def tokens(self) -> int:
        """Number of output tokens, by usage, or without it by the chunks."""
        if self.completion_tokens is None:
            return round(sum(self.chunk_tokens))
        return self.completion_tokens

    @property
    def later_tokens(self) -> float:
        """Number of output tokens that came after the first chunk, which may have brought
        several."""
        return self.tokens - sum(self.chunk_tokens[:1])

    @property
    def e2e_s(self) -> float:
        """Seconds from the start to the end of the request."""
        return self.end_s - self.start_s

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the start of the request to its first chunk with tokens; None if there was
        none."""
        return self.chunk_times_s[0] - self.start_s if self.chunk_times_s else None


class ClientLoad(msgspec.Struct, frozen=True):
    """The load of one client process while a level was measured."""

    streams: int
    """Number of requests that it kept in flight."""
    cpu_share: float
    """CPU seconds over wall seconds; 1.0 is one full core."""
    lag_p99_s: float
    lag_max_s: float
    """Maximum, and `lag_p99_s` the 99th percentile, of the seconds by which a timer of the
    process's event loop fired late."""


class LevelResult(msgspec.Struct, frozen=True):
    """The raw results of one concurrency."""

    concurrency: int
    stopped_by: StoppedBy
    records: list[RequestRecord]
    """The records of the measured requests, in the order of their start."""
    warmup_failures: list[Failure]
    clients: list[ClientLoad]
