"""Runs work that takes too long for the event loop in a thread.

Knows: asyncio. Knows nothing of what is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

LARGE = 8 << 10
"""Size above which work is done in a thread: bytes of a body to read, render and tokenise,
characters of text, or tokens. Less than this takes some milliseconds at most, and mostly far
less."""


async def offload(work: Callable[[], _T], size: float) -> _T:
    """Return what `work` returns. It is done in a thread if its size is above `LARGE`; an infinite
    size is for work whose size cannot be told. The number of threads is bounded (asyncio's default
    executor), so further work of this kind waits."""
    if size <= LARGE:
        return work()
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    finally:
        # A thread cannot be cancelled: the request counts as open until it is done. If it fails
        # then, nobody is there to be told, and asyncio would log an error that nobody retrieved.
        await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()
