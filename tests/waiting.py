"""Tests wait for a condition, with a guard against hanging, and never for a length of time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

GUARD_SECONDS = 60
"""Seconds after which a wait that would last for ever ends. This is far above what a busy machine
needs, so that no verdict depends on it."""


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until `condition` holds. Raises TimeoutError after GUARD_SECONDS."""
    async with asyncio.timeout(GUARD_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def until_still(progress: Callable[[], int]) -> None:
    """Let the event loop run until nothing more happens: `progress()`, which returned 0 at first,
    stays the same while every task of the loop gets many turns. Raises TimeoutError after
    GUARD_SECONDS."""
    async with asyncio.timeout(GUARD_SECONDS):
        seen = 0
        while seen == 0 or seen != progress():
            seen = progress()
            for _ in range(200):
                await asyncio.sleep(0)


def wait_until(condition: Callable[[], bool]) -> None:
    """Let other threads and processes run until `condition` holds. Raises AssertionError after
    GUARD_SECONDS."""
    end = time.monotonic() + GUARD_SECONDS
    while not condition():
        assert time.monotonic() < end, f"not within {GUARD_SECONDS} s"
        time.sleep(0.01)
