"""A closed loop of streams, which says how each request ended. `ray_serve.py` and `behind_nginx.py`
use it."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

WAIT_SECONDS = 120


@dataclass(frozen=True)
class Ended:
    """A request that has ended: its times in seconds since the start of the phase."""

    began: float
    first: float | None
    ended: float
    how: str


class Load:
    """Streams, each of which sends its next request when the last one has ended."""

    def __init__(
        self, url: str, streams: int, tokens: int, verify: ssl.SSLContext | bool = True
    ) -> None:
        """Set the server, the number of streams, the tokens of each answer, and whom to trust."""
        self.url, self.streams, self.tokens, self.verify = url, streams, tokens, verify
        self.ended: list[Ended] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the streams while the block does; at its end, let the open requests end."""
        self.began = time.monotonic()
        self.over = False
        self.ended = []
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            timeout=WAIT_SECONDS, limits=limits, verify=self.verify
        ) as client:
            tasks = [asyncio.create_task(self._stream(client, i)) for i in range(self.streams)]
            try:
                yield
            finally:
                self.over = True
                await asyncio.gather(*tasks)

    def now(self) -> float:
        """Return the seconds since the start of the phase."""
        return time.monotonic() - self.began

    async def _stream(self, client: httpx.AsyncClient, index: int) -> None:
        number = 0
        while not self.over:
            number += 1
            self.ended.append(await self.request(client, f"Story {number} of {index}: "))

    async def request(self, client: httpx.AsyncClient, prompt: str) -> Ended:
        """Send one request, and return how it ended."""
        began, first, how = self.now(), None, "cut"
        body = {"prompt": prompt, "stream": True, "seed": 1}
        body |= {"max_tokens": self.tokens, "min_tokens": self.tokens}
        try:
            async with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    how = f"status {response.status_code}"
                async for line in response.aiter_lines():
                    if response.status_code == 200 and line.startswith("data: "):
                        first = first or self.now()
                        if '"error"' in line[:20]:
                            how = "error event"
                        elif line == "data: [DONE]" and how != "error event":
                            how = "ok"
        except httpx.HTTPError:
            how = "cut"
        return Ended(began, first, self.now(), how)

    def summary(self) -> dict[str, Any]:
        """Return the number of requests by how they ended, and the longest times."""
        first = sorted(each.first - each.began for each in self.ended if each.first is not None)
        return {
            "requests": len(self.ended),
            "ends": dict(Counter(each.how for each in self.ended)),
            "median_first_token_s": round(first[len(first) // 2], 3),
            "longest_first_token_s": round(first[-1], 3),
        }


async def until(condition: Callable[[], bool], what: str) -> float:
    """Wait for a condition; return how many seconds it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > WAIT_SECONDS:
            sys.exit(f"not within {WAIT_SECONDS} s: {what}")
        await asyncio.sleep(0.1)
    return round(time.monotonic() - began, 2)


def free_port() -> int:
    """Return a port of this machine that nobody listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
