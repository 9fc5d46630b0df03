"""Routers: who chooses the replica of a request, and by what. `kv_routing.py` puts them in front of
servers and `fleet.py` in front of simulated ones.

Knows: what a router knows of a replica. Knows nothing of time or of the network.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from minisrv.core.kv_cache import hash_block

NOBODY = (None, None)
"""The owner of blocks in the prefix cache of a server without API keys."""


def block_hashes(prompt: Sequence[int], block_size: int) -> list[bytes]:
    """Return the hashes of the blocks of a prompt that a prefix cache could have. The block with
    the last token is not among them, because that token is computed in any case."""
    hashes: list[bytes] = []
    for start in range(0, (len(prompt) - 1) // block_size * block_size, block_size):
        parent = hashes[-1] if hashes else None
        hashes.append(hash_block(NOBODY, parent, prompt[start : start + block_size]))
    return hashes


class Cache(Protocol):
    """The prefix cache of a replica, as its router knows it."""

    def __contains__(self, block_hash: bytes) -> bool: ...


class Replica:
    """What a router knows of one replica.

    open_requests: the number of requests that it was sent and that have not ended.
    """

    def __init__(self, cache: Cache) -> None:
        self.open_requests = 0
        self._cache = cache
        self._being_computed: Counter[bytes] = Counter()
        self._queued: list[Sequence[bytes]] = []

    def num_cached(self, hashes: Sequence[bytes]) -> int:
        """Return how many blocks of a prompt its cache has according to its events."""
        return next((i for i, each in enumerate(hashes) if each not in self._cache), len(hashes))

    def num_expected(self, hashes: Sequence[bytes]) -> int:
        """Return how many blocks of a prompt its cache will have when the prompt's turn comes: also
        those of prompts that a step is computing now, but not those of prompts that wait for the
        same step as this one."""
        for index, each in enumerate(hashes):
            if each not in self._cache and not self._being_computed[each]:
                return index
        return len(hashes)

    def sent(self, hashes: Sequence[bytes]) -> None:
        """Note that a request has been sent to it. An idle one begins with it at once."""
        self._queued.append(hashes)
        if not self.open_requests:
            self.stepped()
        self.open_requests += 1

    def stepped(self) -> None:
        """Note that it has begun a step with all that it has been sent: tokens of the step before
        have come."""
        for hashes in self._queued:
            self._being_computed.update(hashes)
        self._queued.clear()

    def computed(self, hashes: Sequence[bytes]) -> None:
        """Note that the prompt of a request has been computed: its first token has come."""
        self.stepped()
        self._being_computed -= Counter(hashes)

    def ended(self) -> None:
        """Note that a request has ended."""
        self.open_requests -= 1


Choose = Callable[[Sequence[Replica], Sequence[bytes]], int]
"""Returns the index of the replica for a prompt with these hashes."""

MAX_AHEAD = 8
"""Number of open requests by which a replica may be ahead of the least busy one and still get
the prompts that belong to it, as in `minisrv.deploy.prefix_routing`."""


def make_router(name: str, seed: int = 0) -> Choose:
    """Return the router of a name in `ROUTERS`."""
    return ROUTERS[name](random.Random(seed))


def _random(draw: random.Random) -> Choose:
    return lambda replicas, hashes: draw.randrange(len(replicas))


def _round_robin(draw: random.Random) -> Choose:
    turns = iter(range(1 << 60))
    return lambda replicas, hashes: next(turns) % len(replicas)


def _two_choices(draw: random.Random) -> Choose:
    """As Ray Serve has it: the less busy one of two that are drawn."""

    def choose(replicas: Sequence[Replica], hashes: Sequence[bytes]) -> int:
        two = draw.sample(range(len(replicas)), min(2, len(replicas)))
        return min(two, key=lambda index: replicas[index].open_requests)

    return choose


def _prefix_hash(draw: random.Random) -> Choose:
    """As minisrv's router for Ray Serve: the replica that the beginning belongs to (rendezvous
    hashing), unless it has much more to do than another."""
    by_load = _two_choices(draw)

    def choose(replicas: Sequence[Replica], hashes: Sequence[bytes]) -> int:
        if not hashes:
            return by_load(replicas, hashes)
        beginning = hashes[min(len(hashes), BEGINNING_BLOCKS) - 1]
        home = max(range(len(replicas)), key=lambda index: _weight(beginning, index))
        least = min(replica.open_requests for replica in replicas)
        is_ahead = replicas[home].open_requests > least + MAX_AHEAD
        return by_load(replicas, hashes) if is_ahead else home

    return choose


BEGINNING_BLOCKS = 4
"""Number of blocks at the beginning of a prompt that count for its home."""


def _weight(beginning: bytes, index: int) -> bytes:
    return hashlib.blake2b(beginning, key=index.to_bytes(4, "big"), digest_size=8).digest()


def _kv_events(draw: random.Random) -> Choose:
    """The replica with the most of the prompt, by the events of its cache, of those that are not
    much busier than another; the least busy of equals, and of these any."""

    def choose(replicas: Sequence[Replica], hashes: Sequence[bytes]) -> int:
        least = min(replica.open_requests for replica in replicas)

        def rank(index: int) -> tuple[int, int, float]:
            replica = replicas[index]
            return -replica.num_expected(hashes), replica.open_requests, draw.random()

        allowed = [
            index
            for index, replica in enumerate(replicas)
            if replica.open_requests <= least + MAX_AHEAD
        ]
        return min(allowed, key=rank)

    return choose


ROUTERS: dict[str, Callable[[random.Random], Choose]] = {
    "random": _random,
    "round-robin": _round_robin,
    "two-choices": _two_choices,
    "prefix-hash": _prefix_hash,
    "kv-events": _kv_events,
}
"""The routers by name, each with a source of chance."""
