"""Admission: requests take places in the queue before any work is spent on them.

To tokenise a prompt and only then find the queue full would waste processor time when it is
scarcest. So an API worker counts for itself: a request holds its place from before it is tokenised
until the worker has seen it end. The engine counts those requests that it knows of, by the same
rule (`Scheduler.has_room`), so a worker that is alone refuses nothing that the engine is sure to
accept. A worker knows nothing of other workers' requests: where these fill the queue, the engine
refuses the rest.

Knows: request ids and how long requests stay. Knows nothing of engines, text or HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minisrv.errors import QueueFullError, RequestError

MAX_RETRY_AFTER = 60
"""Maximum of `Retry-After` in seconds; OpenAI's client ignores longer waits."""

_WEIGHT = 1 / 16
"""Weight of the newest stay in the moving average."""


class Admission:
    """The places of one API worker."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._mean_stay = 0.0

    @property
    def num_taken(self) -> int:
        """Number of places that are taken now."""
        return len(self._since)

    @property
    def retry_after(self) -> int:
        """Number of seconds after which the requests that hold the places now will have left, if
        they stay as long as others did recently."""
        return min(max(1, math.ceil(self._mean_stay)), MAX_RETRY_AFTER)

    @contextmanager
    def places(
        self, request_ids: Sequence[str], limit: int, param: str = "prompt"
    ) -> Iterator[None]:
        """Hold a place for each of `request_ids` during the block, for all or none. At its end the
        places that are still held are released.

        limit: the number of places in all.
        param: the field of the request that asks for so many places; errors name it.

        Raises RequestError for more places than there could ever be, QueueFullError for more than
        are free.
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
        """Release a place; nothing happens if it has been released already."""
        since = self._since.pop(request_id, None)
        if since is not None:
            self._mean_stay += _WEIGHT * (time.monotonic() - since - self._mean_stay)
