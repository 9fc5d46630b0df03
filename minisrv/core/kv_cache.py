"""Allocation of KV cache blocks and request indices, as plain numbers.

Knows: which numbers are free, how many requests hold a block, and which blocks can be found by the
tokens that they keep (the prefix cache). Block 0 and request index 0 are the null ones: they belong
to padding and are never handed out. Knows nothing of tensors, nor of who holds a number and why.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

import msgspec

NULL_BLOCK = 0
NULL_REQ_INDEX = 0

_encode = msgspec.msgpack.Encoder().encode


Salt = tuple[int | None, str | None]
"""Owner of a block in the prefix cache: the number of the client's API key, where keys do not
share, and the salt that the client chose. These are two values and not one text, so that no salt of
one key's client can equal the salt of another key."""


def hash_block(salt: Salt, parent: bytes | None, token_ids: Sequence[int]) -> bytes:
    """Return the hash that identifies a full block: SHA-256 over the salt, the hash of the block
    before it (None for the first block) and its token ids. The entries of a block depend on every
    token before it, and so does its hash.

    It is SHA-256 because a collision would show one client the prompt of another.
    """
    return sha256(_encode((salt, parent, token_ids))).digest()


class FreeList:
    """The numbers 1 to `total - 1`, handed out first in, first out.

    The order is first in, first out because the number that has been free longest is the likeliest
    to reveal a use after free, and because, for blocks, the prefix cache is to evict the least
    recently used one.
    """

    def __init__(self, total: int) -> None:
        assert total >= 2, "one null number and at least one real one"
        self.total = total
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, total))

    @property
    def num_free(self) -> int:
        """Number of free numbers."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of numbers handed out, without the null one."""
        return self.total - 1 - len(self._free)

    def allocate(self) -> int:
        """Return a free number and mark it as used. The caller must make sure that one is free."""
        return self._free.popitem(last=False)[0]

    def free(self, number: int) -> None:
        """Mark a number that `allocate` handed out as free again."""
        assert number > 0, "the null number was never handed out"
        assert number not in self._free, f"{number} is free already"
        self._free[number] = None


class BlockPool(FreeList):
    """The blocks of the KV cache, each of `block_size` tokens, and the prefix cache over them.

    A full block that has entered the prefix cache (`cache_full_block`) is found by its hash and may
    be held by several requests. It can still be found when nobody holds it any more, until
    `allocate` hands it out again.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks)
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that `num_tokens` tokens of one request need."""
        return -(-num_tokens // self.block_size)

    @property
    def capacity(self) -> int:
        """Number of tokens that one request alone could keep in the cache."""
        return (self.total - 1) * self.block_size

    def allocate(self) -> int:
        """Return a free block to write to, held by the caller alone. If it was in the prefix cache,
        it is removed from there."""
        block = super().allocate()
        if block in self._hash_of:
            del self._block_of[self._hash_of.pop(block)]
        self._ref_counts[block] = 1
        return block

    def reserve(self, count: int) -> list[int]:
        """Take up to `count` free blocks that the prefix cache cannot find, and return them in
        ascending order. The last block of the cache is among them if it is such a block."""
        found = [block for block in self._free if block not in self._hash_of]
        found.sort(key=lambda block: block != self.total - 1)
        for block in found[:count]:
            self.touch(block)
        return sorted(found[:count])

    def evict(self, count: int) -> list[int]:
        """Take up to `count` free blocks, those that were used least recently, out of the prefix
        cache if they are in it, and return them in ascending order."""
        return sorted(self.allocate() for _ in range(min(count, self.num_free)))

    def give_back(self, blocks: Sequence[int]) -> None:
        """Free blocks that `reserve` or `evict` returned. They are handed out before all others, so
        that nothing leaves the prefix cache any sooner."""
        for block in reversed(blocks):
            self.free(block)
            self._free.move_to_end(block, last=False)

    def cache_full_block(self, block: int, block_hash: bytes) -> None:
        """Enter a full block into the prefix cache. Its holder must not write to it any more.

        If several blocks have the same hash, the first one stays the one that is found.
        """
        assert self._ref_counts[block] == 1, "only a block found before may have other holders"
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def get_cached_blocks(self, block_hashes: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the longest prefix of `block_hashes`. They can be evicted
        until the caller calls `touch`."""
        blocks = []
        for block_hash in block_hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def clear_prefix_cache(self) -> None:
        """Forget what every block keeps. Those who hold a block go on to do so."""
        self._hash_of, self._block_of = {}, {}

    def is_in_use(self, block: int) -> bool:
        """Whether somebody holds the block, so that one more holder does not reduce the free
        blocks."""
        return self._ref_counts[block] > 0

    def touch(self, block: int) -> None:
        """Become one more holder of a block that `get_cached_blocks` returned."""
        if not self._ref_counts[block]:
            del self._free[block]
        self._ref_counts[block] += 1

    def free(self, block: int) -> None:
        """Release a block; it becomes free when nobody holds it any more."""
        assert self._ref_counts[block], f"nobody holds {block}"
        self._ref_counts[block] -= 1
        if not self._ref_counts[block]:
            super().free(block)

    def check_integrity(self, tables: Iterable[tuple[Sequence[int], Sequence[bytes]]]) -> None:
        """Assert that the counts match the holders, and that only full blocks can be found. For
        tests.

        tables: for every holder its blocks, and the hashes of the first of these blocks, to which
            it will not write again.
        """
        holders: Counter[int] = Counter()
        for blocks, hashes in tables:
            assert len(set(blocks)) == len(blocks) >= len(hashes)
            holders.update(blocks)
            for block, block_hash in zip(blocks, hashes, strict=False):
                assert self._hash_of.get(block, block_hash) == block_hash, "keeps other tokens"
            for block in blocks[len(hashes) :]:
                assert block not in self._hash_of, "found before it is full"
                assert self._ref_counts[block] == 1, "shared before it is full"
        assert self._ref_counts == [holders[block] for block in range(self.total)]
        assert NULL_BLOCK not in holders
        assert set(self._free) == set(range(1, self.total)) - set(holders)
        assert {block: name for name, block in self._block_of.items()} == self._hash_of
        assert len(self._block_of) == len(self._hash_of)
