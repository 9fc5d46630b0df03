"""Reads a server's own metrics, and sets them beside what the client counted.

Knows: the Prometheus text of GET /metrics, and the names that vLLM, SGLang, llama.cpp and minisrv
share, after a prefix of each server's own. Knows nothing of how the client counts.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from loadgen.http import Client, HTTPError

_TIMEOUT_S = 10.0
_MAX_BYTES = 4 << 20

_COUNTS = {
    "requests": ("request_success_total",),
    "prompt tokens": ("prompt_tokens_total",),
    "output tokens": ("generation_tokens_total", "tokens_predicted_total"),
}
_MEANS = {
    "TTFT mean ms": ("time_to_first_token_seconds",),
    "ITL mean ms": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "E2E mean ms": ("e2e_request_latency_seconds",),
}


class Beside(msgspec.Struct, frozen=True):
    """One figure as the client and as the server has it."""

    name: str
    client: float | None
    server: float


class Metrics(msgspec.Struct, frozen=True):
    """The page of one moment: the samples by name and labels, and which of them only grow."""

    values: dict[str, float]
    counters: frozenset[str]

    def growth_since(self, before: "Metrics") -> dict[str, float]:
        """Return by how much each counter has grown, if it has."""
        growth = {name: self.values[name] - before.values.get(name, 0.0) for name in self.counters}
        return {name: value for name, value in sorted(growth.items()) if value}


async def read(base_url: str, api_key: str | None) -> Metrics:
    """Return the metrics of the server whose API is at `base_url`; none if it shows no page that
    can be read."""
    url = f"{base_url.removesuffix('/v1')}/metrics"
    page = bytearray()

    def receive(status: int, data: bytes, now_s: float) -> bool:
        page.extend(data)
        return len(page) < _MAX_BYTES

    with suppress(HTTPError, TimeoutError), Client(api_key) as client:
        async with asyncio.timeout(_TIMEOUT_S):
            head = await client.exchange("GET", url, b"", receive)
        if head.status == 200:
            with suppress(ValueError):  # it is a page of another kind
                return parse(page.decode())
    return Metrics({}, frozenset())


def parse(text: str) -> Metrics:
    """Parse a page. Raises ValueError."""
    values: dict[str, float] = {}
    counters = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            values[name] = float(sample.value)
            if family.type in ("counter", "histogram", "summary"):
                counters.add(name)
    return Metrics(values, frozenset(counters))


def total(values: Mapping[str, float], ending: str) -> float | None:
    """Return the sum, over all labels, of the samples whose name without the server's own prefix is
    `ending`; None if there is none."""
    found = [
        value for name, value in values.items() if name.partition("{")[0].split(":")[-1] == ending
    ]
    return sum(found) if found else None


def beside(growth: Mapping[str, float], client: Mapping[str, float | None]) -> list[Beside]:
    """Return each figure that the server's counters give, with that of the client."""
    found = []
    for name, endings in _COUNTS.items():
        for ending in endings:
            if (count := total(growth, ending)) is not None:
                found.append(Beside(name, client[name], count))
                break
    for name, endings in _MEANS.items():
        for ending in endings:
            seconds, count = total(growth, f"{ending}_sum"), total(growth, f"{ending}_count")
            if seconds is not None and count:
                found.append(Beside(name, client[name], seconds / count * 1e3))
                break
    return found
