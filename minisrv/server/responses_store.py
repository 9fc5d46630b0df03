"""The responses of `/v1/responses` that can be asked for and carried on later, in the memory of one
API worker.

A response belongs to the API key that asked for it, and does not exist for other keys. What is
stored is JSON, which takes as much memory as it has bytes. A response that carries on another one
keeps it, also when that one is deleted or dropped, and it counts as long as it is kept.

Knows: ids, JSON texts and bytes. Knows nothing of what they say.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_RESPONSES = 1024
"""Maximum number of responses that are stored."""
MAX_STORED_BYTES = 64 << 20
"""Maximum number of bytes that they may count."""

_ENTRY_BYTES = 1024
"""Bytes that a response counts besides its JSON."""


@dataclass(frozen=True)
class StoredResponse:
    """A response that is stored.

    body: the response.
    input_items: the items of its own input.
    output_items: the items of its output, by id.
    previous: the response that it carries on; None if it begins a conversation.
    """

    id: str
    body: bytes
    input_items: Sequence[bytes]
    output_items: Mapping[str, bytes]
    previous: StoredResponse | None

    @property
    def chain(self) -> list[StoredResponse]:
        """The responses of the conversation, this one last."""
        found, one = [self], self.previous
        while one is not None:
            found.append(one)
            one = one.previous
        return found[::-1]

    @property
    def num_bytes(self) -> int:
        """Number of bytes that the response counts, without what it carries on."""
        items = [*self.input_items, *self.output_items.values()]
        return _ENTRY_BYTES + len(self.body) + sum(map(len, items))

    @property
    def context(self) -> list[bytes]:
        """All items that came before the output, in their order."""
        *earlier, own = self.chain
        found: list[bytes] = []
        for one in earlier:
            found += [*one.input_items, *one.output_items.values()]
        return [*found, *own.input_items]

    @property
    def conversation(self) -> list[bytes]:
        """All items of the conversation, in their order."""
        return [*self.context, *self.output_items.values()]


class ResponseStore:
    """Stores responses within limits. When there is no room, the key whose responses count most
    bytes loses the one that was used least recently. May be used from several threads.

    max_responses: maximum number of responses.
    max_bytes: maximum number of bytes that they may count together.
    """

    def __init__(
        self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORED_BYTES
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._of_key: dict[int | None, OrderedDict[str, StoredResponse]] = {}
        self._bytes: Counter[int | None] = Counter()
        self._items: dict[tuple[int | None, str], StoredResponse] = {}
        self._holders: Counter[str] = Counter()
        """How many hold each response, by its id: the store itself, and responses that carry it
        on."""

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._of_key.values()))

    @property
    def num_bytes(self) -> int:
        """Number of bytes that all responses count."""
        with self._lock:
            return self._bytes.total()

    def add(self, key: int | None, response: StoredResponse) -> None:
        """Store a response of an API key, and drop others if there is no room. A response that is
        larger than all the room is not stored."""
        with self._lock:
            self._of_key.setdefault(key, OrderedDict())[response.id] = response
            self._hold(key, response)
            for item_id in response.output_items:
                self._items[key, item_id] = response
            while (
                self._bytes.total() > self._max_bytes
                or sum(map(len, self._of_key.values())) > self._max_responses
            ):
                largest = max(self._of_key, key=lambda one: self._bytes[one])
                self._drop(largest, next(iter(self._of_key[largest])))

    def get(self, key: int | None, response_id: str) -> StoredResponse | None:
        """Return a response of an API key; None if it is not stored."""
        with self._lock:
            responses = self._of_key.get(key, OrderedDict())
            if response_id in responses:
                responses.move_to_end(response_id)
            return responses.get(response_id)

    def item(self, key: int | None, item_id: str) -> bytes | None:
        """Return an item of the output of a response of an API key; None if it is not stored."""
        with self._lock:
            response = self._items.get((key, item_id))
            return None if response is None else response.output_items[item_id]

    def delete(self, key: int | None, response_id: str) -> bool:
        """Delete a response of an API key. Return whether it was stored."""
        with self._lock:
            found = response_id in self._of_key.get(key, ())
            if found:
                self._drop(key, response_id)
            return found

    def _drop(self, key: int | None, response_id: str) -> None:
        response = self._of_key[key].pop(response_id)
        for item_id in response.output_items:
            del self._items[key, item_id]
        self._release(key, response)
        if not self._of_key[key]:
            del self._of_key[key], self._bytes[key]

    def _hold(self, key: int | None, response: StoredResponse | None) -> None:
        while response is not None:
            self._holders[response.id] += 1
            if self._holders[response.id] > 1:
                break
            self._bytes[key] += response.num_bytes
            response = response.previous

    def _release(self, key: int | None, response: StoredResponse | None) -> None:
        while response is not None:
            self._holders[response.id] -= 1
            if self._holders[response.id]:
                break
            del self._holders[response.id]
            self._bytes[key] -= response.num_bytes
            response = response.previous
