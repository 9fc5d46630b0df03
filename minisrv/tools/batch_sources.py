"""The batches to which `minisrv ladder` fits capture sizes: recorded, counted, or assumed.

Knows: the format of a step trace, the names of a server's metrics, and a few imagined kinds of
traffic. Knows nothing of what is fitted to them.
"""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisrv.core.attention_work import NO_WORK
from minisrv.core.batch_counts import BatchCounts
from minisrv.core.cost_model import StepSample
from minisrv.core.ladder import Ladders, decode_descriptor
from minisrv.errors import ConfigError
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, StageOutput

TRACE_VERSION = 1
"""The version of the step trace's format that is read here."""

SAMPLES = 40
"""Maximum number of the latest steps of one size whose times are used."""

SETTINGS = ("device", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
"""The settings that the header of a trace has under the same names."""

TIMEOUT = 10.0
"""Number of seconds that a server may take to answer."""


@dataclass(frozen=True)
class Source:
    """Batches, and what is known of the server that has run them.

    text: where they come from, for people.
    settings: settings of that server, as fields of `EngineConfig`.
    ladders: its ladders; None if they are those of the settings.
    samples: steps that it has run, with their times.
    """

    text: str
    batches: BatchCounts
    settings: Mapping[str, Any] = field(default_factory=dict)
    ladders: Ladders | None = None
    samples: tuple[StepSample, ...] = ()


def read_trace(path: Path) -> Source:
    """Return the batches of a recorded step trace. Raises ConfigError."""
    header: dict[str, Any] | None = None
    decode: Counter[int] = Counter()
    mixed: Counter[int] = Counter()
    samples: dict[GraphKey, deque[StepSample]] = defaultdict(lambda: deque(maxlen=SAMPLES))
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007  (an error names it)
                entry = json.loads(line) if line.strip() else {}
                if entry.get("type") == "header" and header is None:
                    header = entry
                elif entry.get("type") == "step":
                    is_decode = not entry["prefill_tokens"]
                    size = entry["rows"] if is_decode else entry["tokens"]
                    (decode if is_decode else mixed)[size] += 1
                    if entry.get("measured_ms"):
                        key = _key(entry, is_decode)
                        # What attention takes of it belongs to the batches as they came.
                        samples[key].append(StepSample(key, NO_WORK, entry["measured_ms"]))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--trace {path}: line {number} is no line of a step trace ({error!r}); record one "
            "with `minisrv trace`."
        ) from error
    if header is None or header.get("version") != TRACE_VERSION:
        raise ConfigError(
            f"--trace {path} has no header of version {TRACE_VERSION}; record the trace with "
            "`minisrv trace` of this version."
        )
    if not decode and not mixed:
        raise ConfigError(f"--trace {path} has no steps; record it while the server is in use.")
    steps = decode.total() + mixed.total()
    return Source(
        f"{steps:,} steps recorded in {path}",
        BatchCounts(decode, mixed),
        {name: header[name] for name in SETTINGS if header.get(name) is not None},
        _ladders(header),
        tuple(sample for kept in samples.values() for sample in kept),
    )


def _key(entry: Mapping[str, Any], is_decode: bool) -> GraphKey:
    """Return the key of a recorded step."""
    mode = CUDAGraphMode[entry["mode"]]
    rung = entry["rung"] if mode is not CUDAGraphMode.NONE else entry["tokens"]
    if is_decode and mode is CUDAGraphMode.FULL:
        return mode, decode_descriptor(rung, StageOutput.TOKENS)
    return mode, BatchDescriptor(rung)


def _ladders(header: Mapping[str, Any]) -> Ladders:
    ladders = header["ladders"]
    return Ladders(
        CUDAGraphMode.parse(header["mode"]),
        tuple(ladders["decode"]),
        tuple(ladders["mixed"]),
        tuple(ladders["epilogue"]),
        header["max_num_seqs"],
        header["max_num_batched_tokens"],
    )


def read_server(url: str, api_key: str | None) -> Source:
    """Return the batches that a server has counted since its start, which its metrics show. Its
    ladders are the sizes that serve. Raises ConfigError."""
    from prometheus_client.parser import text_string_to_metric_families

    address = re.sub(r"(/v1)?/*$", "", url) + "/metrics?names=minisrv"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            text = response.read().decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ConfigError(f"--url {url}: {address} cannot be read: {error}.") from error
    counts: dict[str, dict[int, float]] = {"decode": {}, "mixed": {}}
    sizes: dict[str, set[int]] = {"decode": set(), "mixed": set(), "epilogue": set()}
    for name, found in (("batch_size_steps", counts), ("graph_capture_size", sizes)):
        family = families.get(f"minisrv:{name}")
        for sample in family.samples if family is not None else ():
            if sample.name.endswith("_created"):
                continue
            size, kind = int(sample.labels["size"]), found[sample.labels["kind"]]
            if isinstance(kind, set):
                kind.add(size)
            else:
                kind[size] = sample.value
    batches = BatchCounts(counts["decode"], counts["mixed"])
    if not batches.num_steps:
        raise ConfigError(
            f"--url {url}: {address} counts no steps; it must be a server of minisrv that has "
            "served requests."
        )
    ladders = served_ladders({kind: tuple(sorted(found)) for kind, found in sizes.items()})
    return Source(f"{batches.num_steps:,.0f} steps counted by {url}", batches, ladders=ladders)


def served_ladders(sizes: Mapping[str, tuple[int, ...]]) -> Ladders | None:
    """Return the ladders of a server whose graphs have these sizes; None if it has no graphs."""
    decode, mixed = sizes["decode"], sizes["mixed"]
    if not decode and not mixed:
        return None
    mode = CUDAGraphMode.FULL_AND_PIECEWISE if mixed else CUDAGraphMode.FULL_DECODE_ONLY
    if not decode:
        mode = CUDAGraphMode.PIECEWISE
    most = (decode or mixed)[-1]
    return Ladders(mode, decode, mixed, sizes["epilogue"], most, (mixed or decode)[-1])


def assumed(kind: str, ladders: Ladders) -> Source:
    """Return imagined batches within the limits of ladders. Raises ConfigError.

    kind: "uniform", or "streams:N".
    """
    most = ladders.max_num_seqs
    tokens = ladders.mixed[-1] if ladders.mixed else ladders.max_num_batched_tokens
    if kind == "uniform":
        decode: dict[int, float] = dict.fromkeys(range(1, most + 1), 1.0)
        text = (
            "assumed: every number of decoding requests equally often, and in as many steps every "
            "number of tokens beside a prompt"
        )
        prompts = float(most)
    elif (found := re.fullmatch(r"streams:(\d{1,5})", kind)) and 0 < int(found[1]) <= most:
        streams = int(found[1])
        decode = {
            size: 1000 * math.exp(size * math.log(streams) - streams - math.lgamma(size + 1))
            for size in range(1, most + 1)
        }
        text = (
            f"assumed: about {streams} requests decode (Poisson), and in every 20th step a prompt "
            "of any length is read"
        )
        prompts = sum(decode.values()) / 20
    else:
        raise ConfigError(
            f"--assume {kind!r} is not allowed; write uniform, or streams:N with N from 1 to "
            f"--max-num-seqs {most}."
        )
    return Source(text, BatchCounts(decode, dict.fromkeys(range(1, tokens + 1), prompts / tokens)))
