"""What crosses the socket between API workers and the engine: typed msgpack, no pickle.

Knows: the two unions of messages and their codec. A worker sends what one turn of its event
loop collected, the engine sends each worker one message a step. Knows nothing of sockets.
"""

from __future__ import annotations

import msgspec

from minisrv.request import EngineOutput, EngineRequest, RequestFailure


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Worker to engine, its first message: the engine answers with its state."""


class Submit(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Worker to engine: new requests and aborted ones."""

    requests: list[EngineRequest] = []
    aborts: list[str] = []


class AskStats(msgspec.Struct, frozen=True, tag=True):
    """Worker to engine: what are the counters? Asked for a scrape, so that steps need not tell."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker, while it starts: what it is doing and how far it is."""

    phase: str
    done: int = 0
    total: int = 0


class EngineInfo(msgspec.Struct, frozen=True):
    """What a ready engine serves with, after every default has been resolved."""

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
    """Other than 0: no time measured on this engine is the machine's own."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker: every graph is captured and certified, requests may come."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker: it cannot go on and ends its process after this."""

    failure: RequestFailure


class StepCount(msgspec.Struct, frozen=True, array_like=True):
    """Steps that ran in one mode for one reason, since the start."""

    mode: str
    reason: str
    steps: int
    tokens: int
    padded_tokens: int


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """Engine to worker, when asked: a snapshot of its counters; counts are since the start.

    prefill_tokens: of prompts, as far as steps have computed them: not what was found in the prefix
        cache, and again what was computed again.
    gpu_busy_ms, gpu_idle_ms: in which a GPU ran steps, and waited for the next one while there was
        work; both 0 on a CPU. What a step with grammars waits for its masks counts as running.
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
    """Engine to worker: what one step added to the worker's requests."""

    outputs: list[EngineOutput]


WorkerMessage = Hello | Submit | AskStats
EngineMessage = Loading | Ready | Failed | EngineStats | StepOutputs

encode = msgspec.msgpack.Encoder().encode
decode_worker_message = msgspec.msgpack.Decoder(WorkerMessage).decode
decode_engine_message = msgspec.msgpack.Decoder(EngineMessage).decode
