"""What a run is asked to do and what one request left behind: frozen records, no behaviour.

Knows the vocabulary shared by all other modules. Does not know HTTP, processes or statistics.
Times ending in `_s` are seconds; instants are readings of `clock`, on Linux CLOCK_MONOTONIC, which
all processes of a machine share, so records of several client processes are merged as they are.
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
"""Requests in flight that one client process is given before another is started, unless told
otherwise: streams of 5 ms per token then take a few percent of a core, and of 1 ms a tenth."""


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS ties no process to cores


class PromptKind(enum.StrEnum):
    """What is sent: random token ids or words to /completions, or words to /chat/completions."""

    TOKENS = "tokens"
    TEXT = "text"
    CHAT = "chat"


class StoppedBy(enum.StrEnum):
    """Which bound ended a measured level."""

    REQUESTS = "requests"
    DURATION = "duration"
    INTERRUPT = "interrupt"


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides which requests are sent; the API key is kept out of it."""

    base_url: str
    """Ends in /v1."""
    model: str
    concurrencies: tuple[int, ...]
    prompt_kind: PromptKind
    input_tokens: int
    """Exact for token prompts; the number of words for text and chat."""
    token_range: tuple[int, int]
    """Prompt ids are drawn from [low, high)."""
    output_tokens: int
    ignore_eos: bool
    requests: int | None
    duration_s: float | None
    warmup: int | None
    """Requests sent first at each concurrency; None means one for each lane."""
    processes: int | None
    """Client processes at most; None leaves it to `processes_at`."""
    seed: int
    timeout_s: float
    label: str
    keep_answers: bool = False
    """Whether records hold what was answered."""
    return_token_ids: bool = False
    """Whether token ids are asked for, an extension."""

    def requests_at(self, concurrency: int) -> int:
        """The most requests measured at `concurrency`."""
        if self.requests is not None:
            return self.requests
        if self.duration_s is not None:
            return MAX_REQUESTS
        return max(MIN_DEFAULT_REQUESTS, 4 * concurrency)

    def warmup_at(self, concurrency: int) -> int:
        """The number of warm-up requests at `concurrency`."""
        return concurrency if self.warmup is None else self.warmup

    def processes_at(self, concurrency: int) -> int:
        """The number of client processes at `concurrency`, none of them without a request."""
        most = self.processes
        if most is None:
            most = min(usable_cores(), -(-concurrency // STREAMS_PER_PROCESS))
        return min(most, concurrency)

    def lanes_at(self, concurrency: int) -> int:
        """The most requests that one client process keeps in flight at `concurrency`."""
        return -(-concurrency // self.processes_at(concurrency))

    @property
    def time_limit_s(self) -> float:
        """No request is started later than this after the start of its level."""
        return MAX_DURATION_S if self.duration_s is None else self.duration_s


class Leg(msgspec.Struct, frozen=True):
    """What is measured in one go: the `level`-th concurrency of a configuration."""

    config: RunConfig
    level: int

    @classmethod
    def of(cls, config: RunConfig) -> list[Self]:
        """All levels of a configuration, in order."""
        return [cls(config, level) for level in range(len(config.concurrencies))]

    @property
    def concurrency(self) -> int:
        """Requests in flight."""
        return self.config.concurrencies[self.level]


class FailureKind(enum.StrEnum):
    """Why a request does not count as a success."""

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
        """The name failures are counted under: the kind, or for example http_429."""
        return str(self.kind) if self.status is None else f"{self.kind}_{self.status}"


class Answer(msgspec.Struct, frozen=True):
    """What a server answered; `token_ids` is empty unless it gave the id of every token."""

    text: str
    token_ids: tuple[int, ...]


class RequestRecord(msgspec.Struct, frozen=True):
    """One request as the client saw it."""

    index: int
    start_s: float
    """The instant before the request was handed to the HTTP client; connecting is included."""
    end_s: float
    """The instant `[DONE]` was read, or the failure was known."""
    chunk_times_s: tuple[float, ...]
    """Arrival of each chunk that carried tokens. Chunks of one read share its instant."""
    chunk_tokens: tuple[float, ...]
    """How many tokens each of them brought; no whole number where that is estimated."""
    prompt_tokens: int | None
    completion_tokens: int | None
    """Both from the server's usage; None where it sent none."""
    failure: Failure | None
    cached_tokens: int | None = None
    """Of the prompt, what the server says it found in its prefix cache; None if it does not."""
    answer: Answer | None = None
    """None unless answers are kept."""

    @property
    def tokens(self) -> int:
        """Output tokens: what usage says, else what the chunks brought."""
        if self.completion_tokens is None:
            return round(sum(self.chunk_tokens))
        return self.completion_tokens

    @property
    def later_tokens(self) -> float:
        """Output tokens that came after the first chunk, which may have brought several."""
        return self.tokens - sum(self.chunk_tokens[:1])

    @property
    def e2e_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s

    @property
    def ttft_s(self) -> float | None:
        """Seconds from start to the first chunk with tokens; None if there was none."""
        return self.chunk_times_s[0] - self.start_s if self.chunk_times_s else None


class ClientLoad(msgspec.Struct, frozen=True):
    """How busy one client process was while a level was measured."""

    streams: int
    """Requests that it kept in flight."""
    cpu_share: float
    """CPU seconds over wall seconds; 1.0 is one full core."""
    lag_p99_s: float
    lag_max_s: float
    """How late a timer of the process's event loop fired."""


class LevelResult(msgspec.Struct, frozen=True):
    """The raw outcome of one concurrency."""

    concurrency: int
    stopped_by: StoppedBy
    records: list[RequestRecord]
    """In order of start."""
    warmup_failures: list[Failure]
    clients: list[ClientLoad]
