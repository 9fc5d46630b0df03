"""Work that is too long for the event loop, done in a thread.

Knows: asyncio. Knows nothing of what is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

LARGE = 8 << 10
"""Of work by its size: bytes of a body to read, to render and to tokenise, characters of text, or
tokens. Less than that takes some milliseconds at most, and most takes far less."""


async def offload(work: Callable[[], _T], size: float) -> _T:
    """What `work` gives, which is done in a thread if its size is above `LARGE`; an infinite one
    is where it cannot be told. Threads are bounded in number (asyncio's own), and so more of such
    work waits."""
    if size <= LARGE:
        return work()
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    finally:
        # A thread cannot be cancelled: until it is done, the request counts.
        await asyncio.wait((task,))
