"""The messages between API workers and the engine: typed msgpack, no pickle.

Knows: the two unions of messages and their codec. A worker sends everything that one turn of its
event loop collected in one message, and the engine sends each worker one message a step. Knows
nothing of sockets.
"""

from __future__ import annotations

import msgspec

from minisrv.request import EngineOutput, EngineRequest, RequestFailure


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Worker to engine: the first message, which the engine answers with its state."""


class Submit(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Worker to engine: new requests, and the ids of requests to abort."""

    requests: list[EngineRequest] = []
    aborts: list[str] = []


class AskStats(msgspec.Struct, frozen=True, tag=True):
    """Worker to engine: a request for the counters. They are sent when a scrape asks for them, so
    that steps need not send them."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker, during start-up: the current phase and how much of it is done."""

    phase: str
    done: int = 0
    total: int = 0


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
    graphs: int
    startup_seconds: dict[str, float]
    simulated_launch_us: float = 0.0
    """Simulated time of each launch in microseconds. If it is not 0, times measured on this engine
    are not those of the machine."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker: every graph is captured and certified, and requests may be sent."""

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


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker, when asked: a snapshot of its counters, which count from the start.

    prefill_tokens: the number of prompt tokens that steps have computed. Tokens found in the prefix
        cache do not count, and tokens that were computed again count again.
    gpu_busy_ms, gpu_idle_ms: the milliseconds in which a GPU ran steps, and waited for the next one
        while there was work; both 0 on a CPU. The wait of a step with grammars for its masks counts
        as busy.
    """

    running: int = 0
    waiting: int = 0
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


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker: the outputs that one step added to the worker's requests."""

    outputs: list[EngineOutput]


WorkerMessage = Hello | Submit | AskStats
EngineMessage = Loading | Ready | Failed | EngineStats | StepOutputs

encode = msgspec.msgpack.Encoder().encode
decode_worker_message = msgspec.msgpack.Decoder(WorkerMessage).decode
decode_engine_message = msgspec.msgpack.Decoder(EngineMessage).decode
