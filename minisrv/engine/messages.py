"""The messages between API workers and the engine: typed msgpack, no pickle.

Knows: the two unions of messages and their codec. A worker sends everything that one turn of its
event loop collected in one message, and the engine sends each worker one message a step. Knows
nothing of sockets.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from minisrv.engine.trace_format import AskSteps, Steps
from minisrv.errors import RequestError, shown
from minisrv.request import EngineOutput, EngineRequest, RequestFailure


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Worker to engine: the first message, which the engine answers with its state."""


class Submit(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Worker to engine: new requests, and the ids of requests to abort.

    requests: the choices of one prompt come one after the other, and only the first of them has the
        prompt; that of the others is empty.
    """

    requests: list[EngineRequest] = []
    aborts: list[str] = []

    @classmethod
    def of(cls, requests: Sequence[EngineRequest], aborts: list[str]) -> Submit:
        """Return the message for requests with their prompts. Requests have one prompt if it is the
        same object, as that of the choices of a response is."""
        sent: list[EngineRequest] = []
        prompt: list[int] | None = None
        for request in requests:
            if request.prompt_token_ids is prompt:
                sent.append(msgspec.structs.replace(request, prompt_token_ids=[]))
            else:
                sent.append(request)
                prompt = request.prompt_token_ids
        return cls(sent, aborts)

    def with_prompts(self) -> Iterator[EngineRequest]:
        """Yield the requests with their prompts; the choices of one prompt share the list."""
        prompt: list[int] = []
        for request in self.requests:
            if request.prompt_token_ids:
                prompt = request.prompt_token_ids
                yield request
            else:
                yield msgspec.structs.replace(request, prompt_token_ids=prompt)


class AskStats(msgspec.Struct, frozen=True, tag=True):
    """Worker to engine: a request for the counters. They are sent when a scrape asks for them, so
    that steps need not send them."""


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Worker to engine: release the memory of weights and KV cache. Commands, of all workers, are
    carried out one after the other, and each is answered when it has been."""

    level: int
    mode: SleepMode


class WakeUp(msgspec.Struct, frozen=True, tag=True):
    """Worker to engine: restore the memory of these tags; it is a command as `Sleep` is."""

    tags: list[SleepTag]


class CommandDone(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker: the first command that has not been answered has been carried out. The
    `Ready` before it describes what the command has brought about.

    failure: why it could not be.
    """

    failure: RequestFailure | None = None


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker, during start-up: the current phase and how much of it is done."""

    phase: str
    done: int = 0
    total: int = 0


class CompilationState(enum.StrEnum):
    """What an engine does about compiled code."""

    OFF = "off"
    """No compiled code was asked for, or none can be made here."""
    COMPILING = "compiling"
    """Another process compiles."""
    CERTIFYING = "certifying"
    """Graphs of the compiled code are captured and certified, one run between two steps."""
    COMPILED = "compiled"
    """Steps run by the compiled code."""
    REFUSED = "refused"
    """Steps run by the model's own code, because the compiled code is missing, wrong or slower."""


class CompilationReport(msgspec.Struct, frozen=True):
    """The generation that serves, and why.

    generation: 0 for the model's own code, 1 for the compiled code.
    reason: why the compiled code does not serve; empty if it serves or may yet.
    swaps: the number of generations that have taken the place of another one.
    refusals: the number of times that compiled code was refused, by its `Refusal`.
    seconds: the number of seconds that each part of its way into service took.
    """

    state: CompilationState = CompilationState.OFF
    generation: int = 0
    reason: str = ""
    swaps: int = 0
    refusals: dict[str, int] = {}
    seconds: dict[str, float] = {}


class SleepTag(enum.StrEnum):
    """A part of an engine's memory that sleep releases."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


class SleepMode(enum.StrEnum):
    """What becomes of the requests that an engine has when it is put to sleep."""

    ABORT = "abort"
    """They end with an error that says why."""
    WAIT = "wait"
    """The engine sleeps when they have ended."""


class SleepReport(msgspec.Struct, frozen=True):
    """Whether an engine sleeps.

    level: the level at which it sleeps; 0 if it is awake.
    released: the parts of its memory that are released.
    sleep_seconds, wake_up_seconds: the number of seconds that the last sleep, and the last waking
        up, took to be complete; 0 if there was none.
    is_due: whether it refuses requests because it is to sleep as soon as it can.
    """

    level: int = 0
    released: tuple[SleepTag, ...] = ()
    sleep_seconds: float = 0.0
    wake_up_seconds: float = 0.0
    is_due: bool = False

    @property
    def is_asleep(self) -> bool:
        """Whether any memory is released, so that no request can run."""
        return bool(self.released)

    @property
    def refuses_requests(self) -> bool:
        """Whether new requests are refused."""
        return self.is_due or self.is_asleep


SLEEP_LEVELS = (1, 2)
"""The levels of sleep: 1 keeps a copy of the weights on the host, 2 keeps nothing."""


def sleep_level(level: object) -> int:
    """Return the level of sleep that a number, or its text, stands for. Raises RequestError."""
    for known in SLEEP_LEVELS:
        if str(level) == str(known):
            return known
    raise RequestError(f"level must be 1 or 2, not {shown(level)}.", param="level")


_E = TypeVar("_E", bound=enum.StrEnum)


def sleep_word(kind: type[_E], word: object, param: str) -> _E:
    """Return the `SleepMode` or `SleepTag` of a name. Raises RequestError.

    param: the parameter that names it.
    """
    for known in kind:
        if word == known.value:
            return known
    raise RequestError(f"{param} must be one of {', '.join(kind)}, not {shown(word)}.", param=param)


class RefitReport(msgspec.Struct, frozen=True):
    """Whether other capture sizes would fit the batches that come.

    sizes: the capture sizes that were proposed last; empty if those in service are good enough.
    gain: the share of the time of steps, or where nothing is predicted of the computed tokens, that
        they would have saved in the steps that were counted.
    refits: the number of times that proposed sizes have come into service.
    refused: why the last that were to come into service did not; empty if they did.
    seconds: the number of seconds that the last refit took, from its proposal on.
    """

    sizes: tuple[int, ...] = ()
    gain: float = 0.0
    refits: int = 0
    refused: str = ""
    seconds: float = 0.0


class LadderReport(msgspec.Struct, frozen=True):
    """The graphs in service.

    graphs: their number.
    total: the number of all graphs of the ladders.
    decode: the numbers of requests for whose decode batches there are FULL graphs, ascending.
    mixed: the numbers of tokens for whose mixed batches there are graphs, ascending.
    epilogues: the numbers of requests for whose epilogues there are graphs, ascending.
    refused: the graphs that may not serve, and why.
    quarantined: the graphs that were taken out of service because a step by them differed from its
        eager run, and how.
    stopped: why the missing graphs are not captured, at least for now; empty if they are.
    refit: whether other sizes would fit the batches that come.
    """

    graphs: int = 0
    total: int = 0
    decode: tuple[int, ...] = ()
    mixed: tuple[int, ...] = ()
    epilogues: tuple[int, ...] = ()
    refused: dict[str, str] = {}
    quarantined: dict[str, str] = {}
    stopped: str = ""
    refit: RefitReport = RefitReport()

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The sizes of the graphs in service, by kind."""
        return {"decode": self.decode, "mixed": self.mixed, "epilogue": self.epilogues}

    @property
    def missing(self) -> int:
        """The number of graphs that come into service; 0 while they are stopped. Some that were
        quarantined may be of ladders that serve no more."""
        never = len(self.refused) + len(self.quarantined)
        return 0 if self.stopped else max(0, self.total - self.graphs - never)


class EngineInfo(msgspec.Struct, frozen=True):
    """The settings that a ready engine serves with, after every default has been resolved."""

    max_model_len: int
    vocab_size: int
    num_kv_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    dtype: str
    device: str
    cudagraph_mode: str
    startup_seconds: dict[str, float]
    device_name: str = ""
    """The processor or GPU by its maker's name."""
    ladders: dict[str, tuple[int, ...]] = {}
    """The sizes of the graphs that serve when the ladders are filled, by kind."""
    step_trace: int = 0
    """The maximum number of steps that are kept for those who read the trace; 0 for no trace."""
    itl_target_ms: float = 0.0
    """Time that a step in which requests decode should not exceed, in milliseconds; 0 for no such
    target."""
    hidden_size: int = 0
    """Number of dimensions of an embedding."""
    simulated_launch_us: float = 0.0
    """Simulated time of each launch in microseconds. If it is not 0, times measured on this engine
    are not those of the machine."""
    async_scheduling: bool = False
    """Whether a step is scheduled before the tokens of the previous one are known."""
    ladder: LadderReport = LadderReport()
    """The graphs in service. When one more is, the description is sent again."""
    compilation_mode: str = "NONE"
    compilation_reason: str = ""
    """Why the model is compiled in that mode."""
    compilation: CompilationReport = CompilationReport()
    """The generation that serves. When it changes, the description is sent again."""
    sleep: SleepReport = SleepReport()
    """Whether the engine sleeps, or is about to. When it changes, the description is sent again."""

    @property
    def summary(self) -> str:
        """The device, the dtype, the graphs, the compilation, the scheduling, the KV cache and the
        limits of a step in one line, for the log."""
        ladder = self.ladder
        ladders = (("requests", ladder.decode), ("tokens", ladder.mixed))
        count = f"{ladder.graphs} of {ladder.total}" if ladder.missing else f"{ladder.graphs}"
        target = f"{self.itl_target_ms:.1f} ms" if self.itl_target_ms else "none"
        largest = ", ".join(f"{unit} up to {sizes[-1]}" for unit, sizes in ladders if sizes)
        return (
            f"{self.dtype} on {self.device}, mode {self.cudagraph_mode}, {count} graphs"
            f"{f' ({largest})' if largest else ''}, "
            f"compilation {self.compilation_mode} ({self.compilation_reason}), "
            f"async scheduling {'on' if self.async_scheduling else 'off'}, "
            f"context {self.max_model_len}, {self.num_kv_blocks} KV blocks of {self.block_size}, "
            f"at most {self.max_num_batched_tokens} tokens a step, ITL target {target}"
        )


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker: every batch has a graph that is captured and certified, and requests may be
    sent. It comes again when the description of the engine has changed."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker: the engine cannot continue; its process ends after this message."""

    failure: RequestFailure


class StepCount(msgspec.Struct, frozen=True, array_like=True):
    """The number of steps that ran in one mode for one reason, since the start."""

    mode: str
    reason: str
    steps: int
    tokens: int
    padded_tokens: int


class SizeCount(msgspec.Struct, frozen=True, array_like=True):
    """The number of steps that ran by the graphs of one size since the start, and of their padding
    tokens.

    kind: decode for graphs of decode batches, whose size is in requests; mixed for others, whose
        size is in tokens.
    """

    kind: str
    size: int
    steps: int
    padded_tokens: int


class BatchCount(msgspec.Struct, frozen=True, array_like=True):
    """The number of steps whose batch had one size, since the start.

    kind: "decode" for steps in which every request decodes, whose size is their number of requests;
        "mixed" for all others, whose size is their number of tokens.
    size: the size, rounded up if it is large (`core.batch_counts`).
    """

    kind: str
    size: int
    steps: int


class BudgetCount(msgspec.Struct, frozen=True, array_like=True):
    """The number of steps whose number of prompt tokens was chosen for one reason, since the start,
    and of their prompt tokens."""

    reason: str
    steps: int
    tokens: int


class Histogram(msgspec.Struct, frozen=True, array_like=True):
    """How a number was distributed over the steps since the start.

    bounds: the upper bounds of the buckets; one more bucket has no bound.
    counts: the number of steps in each bucket.
    total: the sum of the number over all steps.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker, when asked: a snapshot of its counters, which count from the start.

    waiting_for_grammar: how many of those that wait do so because a grammar is being compiled.
    prefill_tokens: the number of prompt tokens that steps have computed. Tokens found in the prefix
        cache do not count, and tokens that were computed again count again.
    gpu_busy_ms, gpu_idle_ms: the milliseconds in which a GPU ran steps, and waited for the next one
        while there was work; both 0 on a CPU. The wait of a step with grammars for its masks counts
        as busy.
    sizes: the steps that ran by a graph, by its size.
    compiled_steps: the number of steps that ran by compiled code.
    itl_target_ms: the time that a step in which requests decode should not exceed; 0 for no target.
    budgets: the steps for which prompt tokens waited, by the reason for their number.
    batches: the steps by the sizes of their batches.
    step_time_errors: the relative differences between predicted and measured times of steps.
    tokens_of_steps: the numbers of real tokens of steps.
    longest_turn_seconds: the longest time for which work between two steps has made requests wait.
    verified_steps: the number of steps that were recorded to be run again eagerly, by what became
        of that (`verification`).
    """

    running: int = 0
    waiting: int = 0
    waiting_for_grammar: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    gpu_busy_ms: float = 0.0
    gpu_idle_ms: float = 0.0
    steps: list[StepCount] = []
    sizes: list[SizeCount] = []
    compiled_steps: int = 0
    itl_target_ms: float = 0.0
    budgets: list[BudgetCount] = []
    batches: list[BatchCount] = []
    step_time_errors: Histogram = Histogram()
    tokens_of_steps: Histogram = Histogram()
    compilation: CompilationReport = CompilationReport()
    sleep: SleepReport = SleepReport()
    ladder: LadderReport = LadderReport()
    longest_turn_seconds: float = 0.0
    verified_steps: dict[str, int] = {}


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker: the outputs that one step added to the worker's requests."""

    outputs: list[EngineOutput]


Command = Sleep | WakeUp
WorkerMessage = Hello | Submit | AskStats | AskSteps | Command
EngineMessage = Loading | Ready | Failed | EngineStats | Steps | StepOutputs | CommandDone

encode = msgspec.msgpack.Encoder().encode
decode_worker_message = msgspec.msgpack.Decoder(WorkerMessage).decode
decode_engine_message = msgspec.msgpack.Decoder(EngineMessage).decode
