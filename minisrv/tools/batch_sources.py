"""The batches to which `minisrv ladder` fits capture sizes: recorded, counted, or assumed.

Knows: the format of a step trace, the names of a server's metrics, and a few imagined kinds of
traffic. Knows nothing of what is fitted to them.
"""

from __future__ import annotations

import math
import re
import urllib.error
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

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


_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Sizes = tuple[_Size, ...]


class _Line(msgspec.Struct):
    """Any line of a trace."""

    type: str


class _Ladders(msgspec.Struct):
    decode: _Sizes
    mixed: _Sizes
    epilogue: _Sizes


class _Header(msgspec.Struct):
    """The fields of a header that are used here; see docs/trace.md."""

    version: int
    mode: CUDAGraphMode
    ladders: _Ladders
    max_num_seqs: _Size
    max_num_batched_tokens: _Size
    max_model_len: int
    device: str


class _Event(msgspec.Struct):
    """The field of an event that is used here: the ladders that serve from a refit on."""

    ladders: _Ladders | None = None


class _Step(msgspec.Struct):
    """The fields of a step that are used here."""

    mode: Literal["FULL", "PIECEWISE", "NONE"]
    rung: _Size
    rows: _Size
    tokens: _Size
    prefill_tokens: Annotated[int, msgspec.Meta(ge=0)]
    measured_ms: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None


def read_trace(path: Path) -> Source:
    """Return the batches of a recorded step trace. Raises ConfigError."""
    header: _Header | None = None
    decode: Counter[int] = Counter()
    mixed: Counter[int] = Counter()
    samples: dict[GraphKey, deque[StepSample]] = defaultdict(lambda: deque(maxlen=SAMPLES))
    number = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007  (an error names it)
                kind = msgspec.json.decode(line, type=_Line).type if line.strip() else ""
                if kind == "header" and header is None:
                    header = msgspec.json.decode(line, type=_Header)
                elif kind == "event" and header is not None:
                    refitted = msgspec.json.decode(line, type=_Event).ladders
                    header.ladders = refitted or header.ladders
                elif kind == "step":
                    step = msgspec.json.decode(line, type=_Step)
                    is_decode = not step.prefill_tokens
                    (decode if is_decode else mixed)[step.rows if is_decode else step.tokens] += 1
                    if step.measured_ms:
                        key = _key(step)
                        # What attention takes of it belongs to the batches as they came.
                        samples[key].append(StepSample(key, NO_WORK, step.measured_ms))
    except OSError as error:
        raise ConfigError(f"--trace {path} cannot be read: {error}.") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"--trace {path}: line {number} is no line of a step trace ({error}); record one with "
            "`minisrv trace`."
        ) from error
    if header is None or header.version != TRACE_VERSION:
        raise ConfigError(
            f"--trace {path} has no header of version {TRACE_VERSION}; record the trace with "
            "`minisrv trace` of this version."
        )
    if not decode and not mixed:
        raise ConfigError(f"--trace {path} has no steps; record it while the server is in use.")
    steps = decode.total() + mixed.total()
    ladders, most, tokens = header.ladders, header.max_num_seqs, header.max_num_batched_tokens
    return Source(
        f"{steps:,} steps recorded in {path}",
        BatchCounts(decode, mixed),
        {name: getattr(header, name) for name in SETTINGS},
        Ladders(header.mode, ladders.decode, ladders.mixed, ladders.epilogue, most, tokens),
        tuple(sample for kept in samples.values() for sample in kept),
    )


def _key(step: _Step) -> GraphKey:
    """Return the key of a recorded step."""
    mode = CUDAGraphMode[step.mode]
    if mode is CUDAGraphMode.NONE:
        return mode, BatchDescriptor(step.tokens)
    if mode is CUDAGraphMode.FULL and not step.prefill_tokens:
        return mode, decode_descriptor(step.rung, StageOutput.TOKENS)
    return mode, BatchDescriptor(step.rung)


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
