"""What happens to the prefix cache, as events for routers that send a prompt to where its beginning
is cached.

The events are vLLM's, as of 0.33.0 (vllm/distributed/kv_events.py): the classes, the names and the
order of their fields, and hashes as integers. A block is stored when it can be found in the cache,
and removed when it cannot be found any more, so whoever has read all events knows what is cached.

Knows: the prefix cache and the tokens of requests. Knows nothing of who reads events, nor how.
"""

from __future__ import annotations

import msgspec

from minisrv.core.kv_cache import BlockPool
from minisrv.core.request_state import RequestState
from minisrv.core.scheduler import Scheduler

MEDIUM = "GPU"
"""vLLM's name of the memory in which the engine computes, whatever its device."""


class KVCacheEvent(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """An event of the prefix cache."""


class BlockStored(KVCacheEvent, frozen=True):
    """Full blocks, each after the one before, can be found from now on.

    block_hashes: the hash of each block.
    parent_block_hash: the hash of the block before the first one; None if there is none.
    token_ids: the tokens of all these blocks.
    lora_id, lora_name: always None, as there are no adapters.
    extra_keys: for each block what else its hash depends on, and neither its tokens nor its parent
        tells; None if there is nothing for any block.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None


class BlockRemoved(KVCacheEvent, frozen=True):
    """Blocks cannot be found any more."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(KVCacheEvent, frozen=True):
    """No block can be found any more."""


def event_hash(block_hash: bytes) -> int:
    """Return the hash of a block as events have it: its last 64 bits, as vLLM does by default."""
    return int.from_bytes(block_hash[-8:], "big")


class RecordingBlockPool(BlockPool):
    """A pool that records what enters and leaves the prefix cache.

    What enters has to be described by `RecordingScheduler`, which knows its tokens.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self._events: list[KVCacheEvent] = []
        self._removed: list[int] | None = None
        """The hashes of the last event, if that is a removal to which more can be added."""
        self._entered: set[bytes] = set()

    def take_events(self) -> list[KVCacheEvent]:
        """Return what has happened since the last call."""
        events, self._events, self._removed = self._events, [], None
        return events

    def allocate(self) -> int:
        evicted = self._hash_of.get(next(iter(self._free)))
        block = super().allocate()
        if evicted is not None:
            if self._removed is None:
                removed: list[int] = []
                self._record(BlockRemoved(removed, MEDIUM))
                self._removed = removed
            self._removed.append(event_hash(evicted))
        return block

    def cache_full_block(self, block: int, block_hash: bytes) -> None:
        if block_hash not in self._block_of:
            self._entered.add(block_hash)
        super().cache_full_block(block, block_hash)

    def clear_prefix_cache(self) -> None:
        super().clear_prefix_cache()
        self._record(AllBlocksCleared())

    def describe_entered(self, request: RequestState, first: int) -> None:
        """Record the blocks of a request that have entered the cache, of those from number `first`
        on: an event for each run of them."""
        run: list[int] = []
        for index in range(first, request.num_cached_blocks):
            if request.block_hashes[index] in self._entered:
                run.append(index)
            elif run:
                self._record_stored(request, run)
                run = []
        if run:
            self._record_stored(request, run)
        self._entered.clear()

    def _record_stored(self, request: RequestState, run: list[int]) -> None:
        hashes, size = request.block_hashes, self.block_size
        key, salt = request.cache_salt
        told = tuple(
            text for text in (None if key is None else f"api_key:{key}", salt) if text is not None
        )
        # As in vLLM, a salt belongs to the first block; those behind have it through their parent.
        extra_keys = [told if index == 0 else None for index in run] if told else None
        self._record(
            BlockStored(
                block_hashes=[event_hash(hashes[index]) for index in run],
                parent_block_hash=event_hash(hashes[run[0] - 1]) if run[0] else None,
                token_ids=request.token_ids(run[0] * size, (run[-1] + 1) * size),
                block_size=size,
                lora_id=None,
                medium=MEDIUM,
                lora_name=None,
                extra_keys=extra_keys,
            )
        )

    def _record(self, event: KVCacheEvent) -> None:
        self._events.append(event)
        self._removed = None


class RecordingScheduler(Scheduler):
    """A scheduler that describes to its `RecordingBlockPool` what enters the prefix cache."""

    block_pool: RecordingBlockPool

    def _cache_full_blocks(self, request: RequestState, num_written: int) -> None:
        first = request.num_cached_blocks
        super()._cache_full_blocks(request, num_written)
        if request.num_cached_blocks > first:
            self.block_pool.describe_entered(request, first)
