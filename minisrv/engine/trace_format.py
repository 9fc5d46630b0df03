"""The lines of a step trace, as docs/trace.md describes them, and what the engine and an API worker
say to each other about them.

Knows: the fields of each line. Knows nothing of who keeps the steps, nor of who reads them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

VERSION = 1
"""The version of the format. It changes when a field changes its meaning or is gone; readers ignore
fields and types of lines that they do not know."""


class TracedStep(msgspec.Struct, gc=False, tag_field="type", tag="step"):
    """A step that has been retired.

    id: steps are counted from the start of the engine, and retire in this order.
    time: the Unix time at which the step was launched, in seconds.
    mode, reason: the mode in which its model ran, and why.
    rung, rung_requests: the tokens and the requests of the graph, padding included. Without a graph
        the first is the number of tokens; the second is None where the graph does not depend on it.
    tokens, padding: the tokens of requests, and those that only fill the rung.
    rows, decode_rows, prefill_tokens: the requests that take part, those of them that decode, and
        the prompt tokens of the others.
    context: the tokens of all requests up to the end of the step, which attention reads.
    leaves: what the stage of the model ends with (`StageOutput`).
    epilogue: the padded rows of the second stage; None if there is none.
    epilogue_leaves: what that ends with.
    generation: the generation of code and graphs that ran it; 0 for the model's own code.
    launches: the launches from the host; None where operations are launched one by one, which
        nobody counts in service.
    launches_replaced: the launches of the same stages without a graph; None where unknown.
    budget_reason: why it has this number of prompt tokens; None if no prompt waited.
    host_ms: the host's time by `StepPart`, in milliseconds. Where the device is the host, `launch`
        includes the computation.
    batch: the id of the first step with the same requests in the same order.
    predicted_ms: the time that the cost model predicted; None if nothing was predicted.
    measured_ms: the time that the device took.
    wall_ms: the time since the step before it retired, or since its own launch began if there was
        no work in between.
    sampled: the tokens that it added to requests.
    running, waiting, kv_used: the running and the waiting requests, and the blocks of the KV cache
        in use, when it was retired.
    preempted: the requests that lost their blocks when it was scheduled.
    requests: for each row the opaque id of its request and its tokens, decode rows first. An API
        worker fills them in.
    """

    id: int
    time: float
    mode: str
    reason: str
    rung: int
    rung_requests: int | None
    tokens: int
    padding: int
    rows: int
    decode_rows: int
    prefill_tokens: int
    context: int
    leaves: str
    epilogue: int | None
    epilogue_leaves: str | None
    generation: int
    launches: int | None
    launches_replaced: int | None
    budget_reason: str | None
    host_ms: dict[str, float]
    batch: int
    predicted_ms: float | None = None
    measured_ms: float = 0.0
    wall_ms: float = 0.0
    sampled: int = 0
    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    preempted: int = 0
    requests: list[tuple[str, int]] | UnsetType = UNSET


class TracedBatch(msgspec.Struct, frozen=True, array_like=True):
    """The `requests` of all steps of one batch; see `TracedStep`."""

    id: int
    requests: list[tuple[str, int]]


class TraceEvent(msgspec.Struct, frozen=True, array_like=True):
    """Something else that has happened.

    number: events are counted from the start of the engine.
    after: the id of the last step that had been retired; -1 for none.
    event: its kind.
    details: further fields of its line.
    """

    number: int
    after: int
    time: float
    event: str
    details: dict[str, Any]

    def line(self) -> dict[str, Any]:
        """Return the object that stands in the trace."""
        line = {"type": "event", "time": self.time, "event": self.event, "after": self.after}
        return line | self.details


class AskSteps(msgspec.Struct, frozen=True, tag=True):
    """Worker to engine: a request for steps behind the step `after`, of which one answer holds only
    some. Nothing is sent while nobody asks.

    after: None for the last `limit` steps.
    events_after: the number of the last event that the reader has.
    limit: the maximum number of steps.
    """

    after: int | None
    events_after: int
    limit: int


class Steps(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker: the answer to `AskSteps`.

    first, end: the ids of the oldest step that is kept, and of the next one to be retired.
    batches: those of the steps.
    """

    first: int = 0
    end: int = 0
    steps: list[TracedStep] = []
    batches: list[TracedBatch] = []
    events: list[TraceEvent] = []


class Startup(msgspec.Struct, frozen=True):
    """A part of the start-up, and the seconds that it took."""

    part: str
    seconds: float


class TraceHeader(msgspec.Struct, frozen=True, tag_field="type", tag="header"):
    """The first line: the server as it is when the reading begins.

    time: the Unix time in seconds.
    ladders: the sizes of the graphs that serve when the ladders are filled, by kind.
    in_service: those of the graphs that serve already.
    graphs: the number of graphs in service, and of all in the ladders.
    kept: the maximum number of steps that the server keeps.
    """

    version: int
    server: str
    model: str
    time: float
    device: str
    device_name: str
    mode: str
    compilation: dict[str, Any]
    ladders: dict[str, tuple[int, ...]]
    in_service: dict[str, tuple[int, ...]]
    graphs: dict[str, int]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    kv_blocks: int
    async_scheduling: bool
    itl_target_ms: float | None
    simulated_launch_us: float
    startup: list[Startup]
    kept: int
