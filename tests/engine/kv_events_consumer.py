"""A reader of KV cache events, written from the schema of vLLM 0.33.0
(vllm/distributed/kv_events.py) and not from ours."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

TIMEOUT_MS = 20_000


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead_token_ids: list[list[int]] | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Block(msgspec.Struct):
    """What a reader knows of a block."""

    parent: int | None
    token_ids: list[int]
    extra_keys: tuple[Any, ...] | None


class Consumer:
    """Follows a publisher, and asks for what it has missed.

    blocks: what is cached, by hash.
    known: all blocks that have ever been cached.
    next_number: the number of the next batch.
    num_replayed: the number of batches that came from a replay.
    """

    def __init__(self, endpoint: str, replay_endpoint: str, topic: str = "") -> None:
        self.blocks: dict[int, Block] = {}
        self.known: dict[int, Block] = {}
        self.next_number = self.num_replayed = 0
        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self._context = zmq.Context()
        self._events = self._context.socket(zmq.SUB)
        self._events.set_hwm(0)
        self._events.subscribe(topic.encode())
        self._replay = self._context.socket(zmq.DEALER)
        self._replay.set_hwm(0)
        for socket, address in ((self._events, endpoint), (self._replay, replay_endpoint)):
            socket.rcvtimeo = TIMEOUT_MS
            socket.connect(address)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def read(self) -> None:
        """Wait for a batch, and read it after what was missed before it."""
        _, number, payload = self._events.recv_multipart()
        if int.from_bytes(number, "big") > self.next_number:
            self.catch_up()
        if int.from_bytes(number, "big") == self.next_number:
            self._apply(payload)

    def has_heard(self) -> bool:
        """Whether a batch has come, or comes within 20 ms: then it has subscribed."""
        return bool(self._events.poll(20))

    def lose(self) -> None:
        """Wait for a batch and lose it."""
        self._events.recv_multipart()

    def catch_up(self) -> None:
        """Ask for all batches from the first missing one on."""
        self._replay.send_multipart((b"", self.next_number.to_bytes(8, "big")))
        while True:
            _, _, number, payload = self._replay.recv_multipart()
            if int.from_bytes(number, "big", signed=True) == -1:
                return
            assert int.from_bytes(number, "big") == self.next_number
            self._apply(payload)
            self.num_replayed += 1

    def _apply(self, payload: bytes) -> None:
        batch = self._decode(payload)
        assert batch.data_parallel_rank == 0
        self.next_number += 1
        for event in batch.events:
            match event:
                case BlockStored():
                    self._store(event)
                case BlockRemoved(block_hashes, "GPU"):
                    for block_hash in block_hashes:
                        del self.blocks[block_hash]
                case AllBlocksCleared():
                    self.blocks.clear()
                case _:
                    raise AssertionError(event)

    def _store(self, event: BlockStored) -> None:
        assert (event.medium, event.lora_id, event.lora_name) == ("GPU", None, None)
        size, parent = event.block_size, event.parent_block_hash
        assert len(event.token_ids) == size * len(event.block_hashes)
        assert parent is None or parent in self.known
        for index, block_hash in enumerate(event.block_hashes):
            assert block_hash not in self.blocks, "stored twice"
            keys = event.extra_keys[index] if event.extra_keys else None
            token_ids = event.token_ids[index * size : (index + 1) * size]
            block = Block(parent, token_ids, keys)
            self.blocks[block_hash] = self.known[block_hash] = block
            parent = block_hash
