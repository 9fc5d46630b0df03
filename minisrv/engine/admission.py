"""Places for requests, taken before anything is spent on them.

To tokenise a prompt and then hear that the queue is full would waste, in the busiest moment, what
is scarcest then. So an API worker counts for itself: a request holds its place from before it is
tokenised until the worker has seen it end. The engine counts those of them that it knows of, by
the same rule (`Scheduler.has_room`), so a worker alone refuses nothing that the engine is sure to
take. Of other workers' requests a worker knows nothing: there the engine refuses the rest.

Knows: ids and how long they stay. Knows nothing of engines, text or HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minisrv.errors import QueueFullError, RequestError

MAX_RETRY_AFTER = 60
"""Seconds. OpenAI's client heeds no longer wait than this."""

_WEIGHT = 1 / 16
"""Of the newest stay in the mean."""


class Admission:
    """The places of one API worker."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._mean_stay = 0.0

    @property
    def num_taken(self) -> int:
        """Places that are taken now."""
        return len(self._since)

    @property
    def retry_after(self) -> int:
        """Seconds after which those who hold the places now will have left, if they stay as long
        as others did of late."""
        return min(max(1, math.ceil(self._mean_stay)), MAX_RETRY_AFTER)

    @contextmanager
    def places(
        self, request_ids: Sequence[str], limit: int, param: str = "prompt"
    ) -> Iterator[None]:
        """A place for each of `request_ids`, all or none. At the end those go back that are still
        held.

        limit: places in all.
        param: the field that asks for so many, for the error to name.
        Raises RequestError for more than there could ever be, QueueFullError for more than are
        free.
        """
        number = len(request_ids)
        if number > limit:
            raise RequestError(
                f"{param} asks for {number} choices at once, and this server runs and queues at "
                f"most {limit}; send several requests.",
                param=param,
            )
        if self.num_taken + number > limit:
            raise QueueFullError(
                f"{self.num_taken} requests are running or waiting, of at most {limit}; "
                f"try again in {self.retry_after} s.",
                retry_after=self.retry_after,
            )
        self._since.update(dict.fromkeys(request_ids, time.monotonic()))
        try:
            yield
        finally:
            for request_id in request_ids:
                self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """Give a place back; nothing happens if that has been done."""
        since = self._since.pop(request_id, None)
        if since is not None:
            self._mean_stay += _WEIGHT * (time.monotonic() - since - self._mean_stay)
