"""The settings of a run and the records of its requests: frozen data without behaviour.

Names that end in `_s` are seconds. Points in time are readings of `clock`, which on Linux is
CLOCK_MONOTONIC and the same for all processes of a machine, so that records of several client
processes can be merged without conversion.

Knows: the terms that all other modules share. Knows nothing of HTTP, processes or statistics.
"""

import enum
import os
import time
from math import ceil
from typing import Any, Self

import msgspec

from loadgen.lengths import Length

clock = time.perf_counter

MAX_REQUESTS = 1_000_000
MAX_DURATION_S = 3600.0
MIN_DEFAULT_REQUESTS = 20
DEFAULT_CONCURRENCIES = (1, 4, 16)
DEFAULT_OPEN_S = 30.0
"""Seconds for which an open loop sends requests if neither their number nor a time is given."""
DEFAULT_MAX_CONCURRENCY = 1000
OPEN_WARMUP = 4
"""Number of requests that warm up for an open loop, all in flight at once."""
OPEN_PROCESSES = 4
"""Number of client processes of an open loop, if there are as many cores."""
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


class Load(msgspec.Struct, frozen=True):
    """The load of one level. A closed loop keeps `concurrency` requests in flight. An open loop
    sends requests when they are due, whatever the server does: `request_rate` per second on
    average, or by a trace if that is None too."""

    concurrency: int | None = None
    request_rate: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether requests are due at times that do not depend on the server."""
        return self.concurrency is None

    @property
    def short(self) -> str:
        """The load in a column of a table."""
        if self.request_rate is not None:
            return f"{self.request_rate:g}/s"
        return "trace" if self.concurrency is None else str(self.concurrency)

    def __str__(self) -> str:
        if self.request_rate is not None:
            return f"request rate {self.request_rate:g}"
        return "trace" if self.concurrency is None else f"concurrency {self.concurrency}"


class Objective(msgspec.Struct, frozen=True):
    """A limit on a latency of each request."""

    latency: str
    """A name of `slo.LATENCIES`."""
    limit_ms: float

    def __str__(self) -> str:
        return f"{self.latency}:{self.limit_ms:g}"


class Trace(msgspec.Struct, frozen=True):
    """Recorded traffic that is replayed, in a format of `traces`."""

    path: str
    requests: int
    """Number of requests in it."""
    speedup: float
    """How many times as fast as it was recorded."""


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that determines which requests are sent, except the API key, which must not get
    into reports."""

    base_url: str
    """The base URL of the server, which ends in /v1."""
    model: str
    concurrencies: tuple[int, ...]
    """The closed loops to run, one after the other; before the open loops of `request_rates`."""
    prompt_kind: PromptKind
    input_tokens: Length
    """Number of tokens of a prompt of token ids; number of words of a text or chat prompt. A shared
    prefix comes before them."""
    token_range: tuple[int, int]
    """The range [low, high) from which the token ids of prompts are drawn."""
    output_tokens: Length
    ignore_eos: bool
    requests: int | None
    duration_s: float | None
    warmup: int | None
    """Number of requests sent for warm-up at each level; None means as many as are in flight, or
    `OPEN_WARMUP` for an open loop."""
    processes: int | None
    """Maximum number of client processes; None leaves it to `processes_at`."""
    seed: int
    timeout_s: float
    label: str
    keep_answers: bool = False
    """Whether records hold the answers."""
    return_token_ids: bool = False
    """Whether requests ask for token ids, an extension of the API."""
    request_rates: tuple[float, ...] = ()
    """The mean numbers of requests per second of the open loops to run."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps between requests."""
    ramp_up_s: float = 0.0
    """Seconds during which the rate of an open loop grows linearly from 0."""
    max_concurrency: int = DEFAULT_MAX_CONCURRENCY
    """Maximum number of requests in flight in an open loop. Those that are due while there are as
    many are sent late, and their latencies include that."""
    trace: Trace | None = None
    """The trace whose arrivals and lengths are replayed, as the only level."""
    prefix_tokens: int = 0
    """Number of tokens, or words, that prompts of a level share in front; in a chat, as its system
    message."""
    num_prefixes: int = 1
    """Number of such prefixes, of which each prompt has one."""
    turns: Length = 1
    """Number of requests of a chat, each of which holds those before it and their answers."""
    objectives: tuple[Objective, ...] = ()
    """The limits that a request must meet to count for goodput."""
    extra_body: dict[str, Any] = msgspec.field(default_factory=dict)
    """Fields that are added to the body of each request."""
    repeats: int = 1
    """Number of times that each level is run, each with prompts of its own."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether prompts begin like others, so that a prefix cache has something to find."""
        return self.prefix_tokens > 0 or self.turns != 1 or self.trace is not None

    @property
    def loads(self) -> tuple[Load, ...]:
        """The loads of all levels, in order."""
        loads = [Load(concurrency=value) for value in self.concurrencies]
        loads += [Load(request_rate=value) for value in self.request_rates]
        loads += [Load()] * (self.trace is not None)
        return tuple(load for load in loads for _ in range(self.repeats))

    def requests_at(self, load: Load) -> int:
        """Return the maximum number of requests that are measured under `load`."""
        most = MAX_REQUESTS if self.trace is None else self.trace.requests
        if self.requests is not None:
            return min(most, self.requests)
        if self.duration_s is not None or self.trace is not None:
            return most
        if load.request_rate is not None:
            return max(MIN_DEFAULT_REQUESTS, ceil(DEFAULT_OPEN_S * load.request_rate))
        return max(MIN_DEFAULT_REQUESTS, 4 * self.in_flight_at(load))

    def warmup_at(self, load: Load) -> int:
        """Return the number of warm-up requests for `load`."""
        if self.warmup is not None:
            return self.warmup
        return OPEN_WARMUP if load.is_open else self.in_flight_at(load)

    def in_flight_at(self, load: Load) -> int:
        """Return the maximum number of requests in flight under `load`."""
        return self.max_concurrency if load.concurrency is None else load.concurrency

    def processes_at(self, load: Load) -> int:
        """Return the number of client processes for `load`, which is at most the number of requests
        in flight, so that none is without a request."""
        most = self.processes
        if most is None:
            streams = -(-self.in_flight_at(load) // STREAMS_PER_PROCESS)
            most = min(usable_cores(), OPEN_PROCESSES if load.is_open else streams)
        return min(most, self.in_flight_at(load))

    def lanes_at(self, load: Load) -> int:
        """Return the maximum number of requests that one client process keeps in flight under
        `load`."""
        return -(-self.in_flight_at(load) // self.processes_at(load))

    @property
    def time_limit_s(self) -> float:
        """Seconds after the start of a level after which no more requests are started."""
        return MAX_DURATION_S if self.duration_s is None else self.duration_s


class Leg(msgspec.Struct, frozen=True):
    """One measurement: that of the `level`-th load of a configuration."""

    config: RunConfig
    level: int

    @classmethod
    def of(cls, config: RunConfig) -> list[Self]:
        """Return the measurements of all loads of a configuration, in order."""
        return [cls(config, level) for level in range(len(config.loads))]

    @property
    def load(self) -> Load:
        """The load that is measured."""
        return self.config.loads[self.level]


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
    """The index of the request, or of its chat, in its phase."""
    start_s: float
    """The time before the request was handed to the HTTP client, so that durations include the
    connection's set-up."""
    end_s: float
    """The time at which `[DONE]` was read, or, without that, at which the response had ended or the
    failure was known."""
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
    scheduled_s: float | None = None
    """The time at which the request was due, in an open loop; None for one that was due when it was
    sent."""
    turn: int = 0
    """The index of the request in its chat."""
    without_done: bool = False
    """Whether the answer was whole without `[DONE]`."""
    disobeys_ignore_eos: bool = False
    """Whether the model ended the answer although the request had `ignore_eos`."""
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    """The fields of the choice that ended the answer which are no part of OpenAI's API."""

    @property
    def due_s(self) -> float:
        """The time from which the latencies of the request count."""
        return self.start_s if self.scheduled_s is None else self.scheduled_s

    @property
    def send_delay_s(self) -> float:
        """Seconds by which the client sent the request late."""
        return self.start_s - self.due_s

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
        """Seconds from the time at which the request was due to its end."""
        return self.end_s - self.due_s

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the time at which the request was due to its first chunk with tokens; None
        if there was none."""
        return self.chunk_times_s[0] - self.due_s if self.chunk_times_s else None


class ClientLoad(msgspec.Struct, frozen=True):
    """The load of one client process while a level was measured."""

    streams: int
    """Number of requests that it kept in flight, or might in an open loop."""
    cpu_share: float
    """CPU seconds over wall seconds; 1.0 is one full core."""
    lag_p99_s: float
    lag_max_s: float
    """Maximum, and `lag_p99_s` the 99th percentile, of the seconds by which a timer of the
    process's event loop fired late."""


class LevelResult(msgspec.Struct, frozen=True):
    """The raw results of one level."""

    load: Load
    stopped_by: StoppedBy
    records: list[RequestRecord]
    """The records of the measured requests, in the order in which they were due."""
    warmup_failures: list[Failure]
    clients: list[ClientLoad]
    shares_prefixes: bool = False
    """Whether prompts were to begin like others; see `RunConfig.shares_prefixes`."""
    objectives: tuple[Objective, ...] = ()
    server_counters: dict[str, float] = msgspec.field(default_factory=dict)
    """By how much the server's own counters grew in the measurement."""
