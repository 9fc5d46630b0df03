"""Compares answers of random engines that change meanwhile with answers to requests that run alone.

    python benchmarks/combinations.py --engines 100 --requests 400 --processes 2 --json F

Engines, questions, waves and lone answers are those of benchmarks/random_requests.py, and so are
the options. Here the engine is that of a server: its process's loop, called by hand, with two API
workers. While requests run, drawn from the seed,
- the ladders fill, are refitted, and compiled code comes into service, whether it is faster or not.
  It is what the compiler makes of the model, and comes late however quickly it was made;
- certifications fail, or lack memory;
- steps are verified, and right graphs are taken out of service as if they had been wrong;
- workers put the engine to sleep, at both levels, with requests that it ends or waits for, in the
  middle of whatever it does, and wake it up as a whole or by parts;
- a worker dies, and another takes its place;
- embeddings are asked for.
A turn of the work between steps ends wherever it can, or after some milliseconds.

Besides the answers, these are checked. Each request ends with its answer, or with an error that has
a cause. Counters of steps agree with each other, with the trace and with the tokens that came.
Events of the prefix cache tell what is in it. No certification fails that was not drawn to. No
block, request index, thread or graph is left of what serves no more. An engine that does nothing
for long is at fault, too.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.random_requests import (
    Alone,
    Asking,
    Crowd,
    Engine,
    Finished,
    Task,
    main,
    may_be_interrupted,
)
from minisrv.certification import generation
from minisrv.checkpoint import Checkpoint
from minisrv.compile.modes import CompilationMode
from minisrv.compile.pieces import PieceCompiler
from minisrv.compile.worker import CompileJob
from minisrv.config import EngineConfig
from minisrv.core.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, event_hash
from minisrv.device_kind import CPU
from minisrv.engine import background, refit
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.heartbeat import Heartbeat
from minisrv.engine.messages import (
    Command,
    CommandDone,
    Hello,
    Ready,
    Sleep,
    SleepMode,
    SleepTag,
    StepOutputs,
    Submit,
    WakeUp,
    WorkerMessage,
    decode_engine_message,
    encode,
)
from minisrv.engine.platforms import CPUPlatform
from minisrv.engine.process import _EngineServer
from minisrv.engine.trace_format import AskSteps, TracedStep
from minisrv.errors import CertificationError, MinisrvError
from minisrv.graph.captured import CapturedGraph
from minisrv.machine import missing_to_compile
from minisrv.modes import CUDAGraphMode, Reason
from minisrv.request import EngineOutput, EngineRequest, Pooling, SamplingParams

WORKERS = (b"api-0", b"api-1")
HANGS = 200_000
"""Number of turns of the engine's loop without a token, or without an end of the work between
steps, after which the engine is taken to hang."""
EVENTS = 0.08
"""The probability that something begins to happen before a step while nothing else does."""
EMBEDDING_TOLERANCE = 1e-3


class Changes(NamedTuple):
    """What changes in one engine, and how often.

    polls: the number of looks at the compilation until it is done; 0 without a compilation.
    turn: the duration of a turn of the work between steps, in seconds.
    failing: the probability that a certification fails.
    happens: the names of the other events.
    """

    verify: float
    refits: bool
    covering: bool
    polls: int
    mixed_graphs: bool
    timed_graphs: bool
    itl_target_ms: float
    turn: float
    failing: float
    happens: tuple[str, ...]


def draw_changes(rng: random.Random) -> Changes:
    """Draw the changes of an engine, as many of which as possible happen at the same time."""
    kinds = {"sleep": 0.7, "quarantine": 0.3, "death": 0.3, "embedding": 0.5}
    compiles = rng.random() < 0.4 and missing_to_compile("cpu") is None
    return Changes(
        verify=rng.choice((0.0, 0.1, 0.5, 1.0)),
        refits=rng.random() < 0.7,
        covering=rng.random() < 0.7,
        polls=rng.choice((1, 50, 500)) if compiles else 0,
        mixed_graphs=rng.random() < 0.15,
        timed_graphs=rng.random() < 0.3,
        itl_target_ms=rng.choice((0.0, 0.0, 5.0)),
        turn=rng.choice((0.0, 0.0, 0.001, 0.005)),
        failing=rng.choice((0.0, 0.0, 0.02)),
        happens=tuple(kind for kind, share in kinds.items() if rng.random() < share),
    )


# ---- an engine's process, called by hand ---------------------------------------------------------


class Line:
    """Takes the place of an engine's socket: what is sent has arrived at once."""

    def __init__(self) -> None:
        self.to_engine: deque[list[bytes]] = deque()
        self.to_workers: deque[tuple[bytes, Any]] = deque()

    def poll(self, _: float) -> bool:
        return bool(self.to_engine)

    def recv_multipart(self) -> list[bytes]:
        return self.to_engine.popleft()

    def send_multipart(self, parts: list[bytes]) -> None:
        self.to_workers.append((parts[0], decode_engine_message(parts[1])))


class Reader:
    """Reads the events of a prefix cache.

    known: the hashes of the blocks that are in it.
    """

    def __init__(self) -> None:
        self.known: set[int] = set()

    def publish(self, events: list[Any]) -> None:
        for event in events:
            match event:
                case BlockStored(hashes):
                    assert not self.known & {*hashes}, "stored twice"
                    self.known |= {*hashes}
                case BlockRemoved(hashes):
                    assert self.known >= {*hashes}, "removed twice"
                    self.known -= {*hashes}
                case AllBlocksCleared():
                    self.known.clear()


class LateProcess:
    """A process of a compiler whose program is there after a number of looks at it."""

    done, total = 1, 3

    def __init__(self, made: Path, polls: int) -> None:
        self._made, self._polls = made, polls

    def poll(self) -> Any:
        self._polls -= 1
        return self if self._polls > 0 else self._made

    def close(self) -> None:
        """It has ended."""


class LateCompiler(PieceCompiler):
    """A compiler that has finished when it is started, and says so later. It does not remember what
    is wrong with a program, so that another engine finds it too."""

    def __init__(self, job: CompileJob, model: Any, polls: int) -> None:
        super().__init__(job, model)
        self._late_by = polls

    def find(self) -> None:
        """Find nothing, so that no program serves from the start."""

    def slowness(self, steps: str) -> None:
        """Know of no program that was too slow."""

    def discard(self, directory: Path) -> None:
        """Do nothing."""

    def remember_slowness(self, directory: Path, steps: str, speedup: float) -> None:
        """Do nothing."""

    def start(self) -> Any:
        made = self._job.kept_program()
        if made is None:
            process = super().start()
            while not isinstance(found := process.poll(), Path):
                if isinstance(found, MinisrvError):
                    raise found
                time.sleep(0.1)
            process.close()
            made = found
        return LateProcess(made, self._late_by)


class Served(Engine):
    """An engine behind its process's loop, with two workers.

    num_tokens: the number of tokens that have come.
    owed: the number of commands that are not answered yet, by worker.
    embeddings: the sums of hidden states that have come, by request.
    failed: the kind of the error that ended a request for an embedding, by request.
    """

    def __init__(self, server: _EngineServer, checkpoint: Checkpoint, rng: random.Random) -> None:
        super().__init__(server.core, checkpoint)
        self.server = server
        self.num_tokens = 0
        self.owed = dict.fromkeys(WORKERS, 0)
        self.embeddings: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self._rng = rng
        self._line: Line = server.socket  # type: ignore[assignment]
        self._worker_of: dict[str, bytes] = {}
        for worker in WORKERS:
            self._send(worker, Hello())

    def _send(self, worker: bytes, message: WorkerMessage) -> None:
        self._line.to_engine.append([worker, encode(message)])

    def command(self, *commands: Command) -> None:
        """Send commands, each by a worker that is drawn."""
        for command in commands:
            worker = self._rng.choice(WORKERS)
            self._send(worker, command)
            self.owed[worker] += 1

    def embed(self, name: str, prompt: list[int], pooling: Pooling) -> None:
        """Ask for an embedding."""
        params = SamplingParams(max_tokens=0, pooling=pooling)
        self.embeddings[name] = 0.0
        self.submit([EngineRequest(request_id=name, prompt_token_ids=prompt, params=params)])

    def replace_worker(self) -> list[Asking]:
        """Let a worker die and another take its place. Return the open requests of the dead one."""
        dead = self._rng.choice(WORKERS)
        asked = list(self.open.values())
        lost = [each for each in asked if self._has(dead, each.generation.requests[0])]
        for asking in lost:
            self.forget(asking)
        for name in [each for each in self.embeddings if self._worker_of[each] == dead]:
            del self.embeddings[name]
        self._send(dead, Hello())
        self.owed[dead] = 0
        return lost

    def _has(self, worker: bytes, request: EngineRequest) -> bool:
        return self._worker_of[request.request_id] == worker

    # ---- benchmarks.random_requests.Engine ---------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self.core.has_work or bool(self._line.to_engine)

    def submit(self, requests: list[EngineRequest]) -> None:
        worker = self._rng.choice(WORKERS)
        self._worker_of.update(dict.fromkeys((each.request_id for each in requests), worker))
        self._send(worker, Submit.of(requests, []))

    def drop(self, request_id: str) -> None:
        self._send(self._worker_of[request_id], Submit([], [request_id]))

    def run_step(self) -> list[EngineOutput]:
        self.server._turn()
        outputs: list[EngineOutput] = []
        while self._line.to_workers:
            worker, message = self._line.to_workers.popleft()
            match message:
                case CommandDone(failure):
                    assert failure is None, failure
                    self.owed[worker] -= 1
                    assert self.owed[worker] >= 0, "it has not asked"
                case StepOutputs(added):
                    assert all(self._worker_of[each.request_id] == worker for each in added)
                    outputs += added
        self.num_tokens += sum(len(each.token_ids) for each in outputs)
        for each in outputs:
            if each.request_id in self.embeddings and each.hidden_sum:
                self.embeddings[each.request_id] += np.frombuffer(each.hidden_sum, np.float32)
            if each.request_id in self.embeddings and each.error is not None:
                self.failed[each.request_id] = each.error.kind
        return outputs

    def left_behind(self) -> dict[str, int]:
        if self.core.background.is_in_the_middle:
            return {}  # a trial holds blocks
        owners = len(self.server.owners)
        return super().left_behind() | ({"owners": owners} if owners else {})


# ---- what happens to it --------------------------------------------------------------------------


class Combination(Crowd):
    """The requests to one engine, with what happens to it meanwhile."""

    script = "combinations.py"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._rng = rng = random.Random(f"changes {task.seed} {task.number}")
        self.changes = changes = draw_changes(rng)
        engine = self.settings.engine
        engine |= {
            "verify_graphs": changes.verify,
            "cudagraph_refit": "apply" if changes.refits else "off",
            "cudagraph_capture": "covering" if changes.covering else "whole",
            "enable_sleep_mode": "sleep" in changes.happens,
            "itl_target_ms": changes.itl_target_ms,
            "step_trace": 1 << 20,
        }
        if changes.mixed_graphs:
            engine["cudagraph_mode"] = "full"
        if changes.polls:
            engine |= {"model_impl": "transformers", "enforce_eager": False}
            model = rng.choice(("qwen3", "llama-biases"))  # each is compiled once
            self.settings = self.settings._replace(model=model, layers=2)
        self._reader = Reader()
        self._excuses: dict[object, set[str]] = {}
        self._happening: Iterator[None] | None = None
        self._is_asleep = False
        self._quiet = 0
        self._num_tokens = 0
        self._prompts: dict[str, tuple[list[int], Pooling]] = {}
        self._alone: Alone | None = None

    def run(self, checkpoint: Checkpoint, finished: Finished) -> dict[str, Any]:
        graphs, threads = num_graphs(), num_threads()
        with self._patched():
            found = super().run(checkpoint, finished)
        left = {"graphs": num_graphs() - graphs, "threads": num_threads() - threads}
        if any(left.values()) and not self.faults:
            self._fault(None, left_of_the_engine=left)
        counts = {"counts": dict(self.counts), "faults": self.faults}
        return found | counts | {"changes": self.changes._asdict()}

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """Let works have turns behind each step, looks at the batches come often, and some
        certifications fail."""
        certify, changes = generation.certify, self.changes

        def drawn_to_fail(*args: Any, **kwargs: Any) -> Any:
            found = certify(*args, **kwargs)
            if self._rng.random() < changes.failing:
                self.events["certifications failed"] += 1
                raise self._rng.choice((CertificationError, torch.OutOfMemoryError))("drawn")
            return found

        replaced = [
            (background, {"LEAST_GAP": 0.0, "REST": 0.0, "TURN": changes.turn}),
            (refit, {"LOOK_SECONDS": 0.0, "REST_SECONDS": 0.0, "LEAST_STEPS": 40}),
            (generation, {"certify": drawn_to_fail}),
            (CPUPlatform, {"times_graphs": changes.timed_graphs}),
            (CPUPlatform, {"kind": replace(CPU, captures_mixed=changes.mixed_graphs)}),
        ]
        with ExitStack() as stack:
            for owner, values in replaced:
                stack.enter_context(patch.multiple(owner, **values))
            yield

    def make_engine(self, checkpoint: Checkpoint) -> Served:
        settings = dict(self.settings.engine)
        mode = CUDAGraphMode.parse(settings.pop("cudagraph_mode"))
        polls = self.changes.polls
        config = EngineConfig(
            model=str(checkpoint.directory),
            dtype="float32",
            device="cpu",
            cudagraph_mode=mode,
            compilation_mode=CompilationMode.MINISRV_COMPILE if polls else CompilationMode.NONE,
            **settings,
        )

        def make_compiler(model: Any) -> LateCompiler:
            job = CompileJob(
                model=checkpoint.model.for_context(settings["max_model_len"]),
                directory=checkpoint.directory,
                dtype="float32",
                quantization=None,
                device="cpu",
                threads=torch.get_num_threads(),
                max_num_tokens=settings["max_num_batched_tokens"],
            )
            return LateCompiler(job, model, polls)

        parts = build_engine(
            config,
            checkpoint=checkpoint,
            check_addresses=True,
            make_compiler=make_compiler if polls else None,
            serve_slower=True,
            record_kv_events=config.enable_prefix_caching,
        )
        with TemporaryDirectory(prefix="combinations-") as place:
            server = _EngineServer(f"ipc://{place}/engine", Heartbeat(Path(place, "beats")))
            server.close()
        server.socket = Line()  # type: ignore[assignment]
        server.core = EngineCore(parts)
        server.state = Ready(server.core.info)
        if config.enable_prefix_caching:
            server._kv_events = self._reader  # type: ignore[assignment]
        return Served(server, checkpoint, random.Random(self._rng.getrandbits(32)))

    # ---- benchmarks.random_requests.Crowd ----------------------------------------------------

    def _serve(self, engine: Any, prepared: Any) -> Iterator[Asking | None]:
        try:
            yield from super()._serve(engine, prepared)
            works = engine.core.background
            for _ in range(HANGS):
                if not (works.has_work or works.is_in_the_middle):
                    break
                engine.step()
            else:
                raise AssertionError("the work between steps hangs")
            self.look(engine)
            self._judge_embeddings(engine)
            self._check_counters(engine)
        finally:
            engine.core.background.close()

    def happens(self, engine: Any, all_asked: bool) -> bool:
        self._quiet = 0 if engine.num_tokens > self._num_tokens else self._quiet + 1
        self._num_tokens = engine.num_tokens
        assert self._quiet < HANGS, f"hangs: {engine.core.stats()}"
        if self._happening is None and not all_asked and self._rng.random() < EVENTS:
            kind = self._rng.choice(("", *self.changes.happens))
            self._happening = getattr(self, f"_{kind}")(engine) if kind else None
        if self._happening is not None and next(self._happening, self) is self:
            self._happening = None
        return not all_asked or self._happening is not None

    def comes(self, number: int) -> bool:
        if self._is_asleep:
            self._excuse("EngineAsleepError", number)
            return self._rng.random() < 0.05
        return True

    def look(self, engine: Any) -> None:
        core = engine.core
        is_middle = core.background.is_in_the_middle
        if not is_middle and not core.verification.is_pending:
            core.scheduler.check_integrity()
        if engine.server._kv_events is not None:
            cached = core.scheduler.block_pool._block_of
            assert self._reader.known == {*map(event_hash, cached)}, "events tell what is cached"
        chosen, installed = core.dispatcher.in_service, {*core.runner.graphs}
        assert chosen == installed or (is_middle and chosen < installed), chosen ^ installed
        assert core.dispatcher.ladders is core.runner.ladders

    def _judge(self, asking: Asking, alone: Alone, prepared: Any) -> None:
        self._alone = alone
        if asking.kind is None:
            super()._judge(asking, alone, prepared)
        elif asking.kind in self._excuses.get(asking.number, ()):
            self.counts["ended"] += 1
            self.events[f"requests ended by {asking.kind}"] += 1
        else:
            self._fault(asking.number, error=asking.error, kind=asking.kind)

    # ---- events ------------------------------------------------------------------------------

    def _excuse(self, kind: str, *requests: object) -> None:
        for each in requests:
            self._excuses.setdefault(each, set()).add(kind)

    def _quarantine(self, engine: Served) -> Iterator[None]:
        core = engine.core
        keys = [*core.runner.graphs]
        if keys and not core.background.is_in_the_middle and not core.verification.is_pending:
            self._excuse("GraphQuarantinedError", *engine.open, *engine.embeddings)
            core.verification._withdraw([self._rng.choice(keys)], "drawn.")
            self.events["graphs quarantined"] += 1
        yield

    def _death(self, engine: Served) -> Iterator[None]:
        self.counts["aborted"] += len(engine.replace_worker())
        self.events["workers replaced"] += 1
        yield

    def _embedding(self, engine: Served) -> Iterator[None]:
        if not self._is_asleep:
            name, pooling = f"embedding-{len(self._prompts)}", self._rng.choice([*Pooling])
            most = self.settings.engine["max_model_len"]
            prompt = self._rng.choices(range(3, 300), k=self._rng.choice((1, 17, most // 3)))
            self._prompts[name] = prompt, pooling
            engine.embed(name, prompt, pooling)
        yield

    def _sleep(self, engine: Served) -> Iterator[None]:
        rng, core = self._rng, engine.core
        self._excuse("EngineAsleepError", *engine.open, *engine.embeddings)
        self._is_asleep = True
        self.events["sleeps asked for"] += 1
        self.events["sleeps asked for in the middle"] += core.background.is_in_the_middle
        self.events["sleeps asked for while verifying"] += core.verification.is_pending
        whole = WakeUp([*SleepTag])
        engine.command(Sleep(rng.choice((1, 2)), rng.choice([*SleepMode])))
        if rng.random() < 0.2:
            engine.command(Sleep(rng.choice((1, 2)), rng.choice([*SleepMode])))
        if rng.random() < 0.2:  # before the engine sleeps
            engine.command(whole)
        for _ in range(rng.choice((0, 1, 30, 100))):
            yield
        while any(engine.owed.values()) and rng.random() < 0.9:
            yield
        if rng.random() < 0.3:
            engine.command(WakeUp([rng.choice([*SleepTag])]))
            yield
            if rng.random() < 0.3:
                engine.command(Sleep(rng.choice((1, 2)), rng.choice([*SleepMode])))
                yield
        engine.command(whole)
        while any(engine.owed.values()):
            yield
        report = core.sleeper.report
        assert not report.refuses_requests, "it is awake"
        self._is_asleep = False

    # ---- checks ------------------------------------------------------------------------------

    def _judge_embeddings(self, engine: Served) -> None:
        """Compare each embedding with that of the lone engine."""
        core = None if self._alone is None else self._alone.core
        for name, found in engine.embeddings.items() if core is not None else ():
            if (kind := engine.failed.get(name)) is not None:
                assert kind in self._excuses[name], (name, kind)
                continue
            prompt, pooling = self._prompts[name]
            params = SamplingParams(max_tokens=0, pooling=pooling)
            core.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
            expected: Any = 0.0
            while core.has_work:
                for each in core.step():
                    expected += np.frombuffer(each.hidden_sum, np.float32)
            scale = max(1.0, float(np.abs(expected).max()))
            assert np.abs(found - expected).max() <= EMBEDDING_TOLERANCE * scale, name
            self.events["embeddings compared"] += 1

    def _check_counters(self, engine: Served) -> None:
        """Compare the counters with each other, with the trace and with the tokens that came."""
        stats, traced = engine.core.stats(), _traced(engine.core)
        steps = {(each.mode, each.reason): each.steps for each in stats.steps}
        by_graph = [each for each in stats.steps if each.mode != "NONE"]
        total = sum(steps.values())
        assert [each.id for each in traced] == [*range(total)]
        assert Counter((each.mode, each.reason) for each in traced) == steps
        for counted in (
            sum(each.steps for each in stats.batches),
            sum(stats.tokens_of_steps.counts),
        ):
            assert counted == total
        assert sum(each.steps for each in stats.sizes) == sum(each.steps for each in by_graph)
        for field in ("steps", "padded_tokens"):
            of_sizes = sum(getattr(each, field) for each in stats.sizes)
            assert of_sizes == sum(getattr(each, field) for each in by_graph)
        assert sum(each.tokens for each in stats.steps) == sum(each.tokens for each in traced)
        assert sum(each.sampled for each in traced) == stats.generated_tokens
        assert sum(each.prefill_tokens for each in traced) == stats.prefill_tokens
        assert sum(each.preempted for each in traced) == stats.preemptions
        assert sum(each.generation > 0 for each in traced) == stats.compiled_steps
        generations = [each.generation for each in traced]
        assert generations == sorted(generations)
        for each in traced:
            assert each.rung == each.tokens + each.padding
            assert each.mode != "NONE" or not each.padding
            assert (
                not each.launches
                or not each.launches_replaced
                or (each.launches <= each.launches_replaced)
            )
        lost = stats.generated_tokens - engine.num_tokens
        assert lost >= 0
        assert lost == 0 or "death" in self.changes.happens
        verified, ladder = stats.verified_steps, stats.ladder
        assert verified.keys() <= {"agreed", "skipped"}, verified
        refused = (ladder.refused, ladder.refit.refused, stats.compilation.reason)
        assert self.changes.failing or not any(refused), refused
        self.events.update({f"verified steps: {what}": n for what, n in verified.items()})
        self.events["swaps to compiled code"] += stats.compilation.swaps
        self.events["compiled code refused"] += sum(stats.compilation.refusals.values())
        self.events["refits"] += ladder.refit.refits
        self.events["graphs refused"] += len(ladder.refused)
        self.events["sizes missing"] += sum(
            n for (_, reason), n in steps.items() if reason == Reason.SIZE_MISSING
        )


def _traced(core: EngineCore) -> list[TracedStep]:
    """Return the records of all steps of an engine."""
    trace, found = core.step_trace, list[TracedStep]()
    assert trace is not None, "it was asked for"
    while True:
        last = found[-1].id if found else -1
        read = trace.read(AskSteps(after=last, limit=1 << 20, events_after=-1))
        if not read.steps or read.steps[0].id <= last:
            return found
        found += read.steps


def num_graphs() -> int:
    """Return the number of graphs in this process."""
    gc.collect()
    return sum(type(each) is CapturedGraph for each in gc.get_objects())


def num_threads() -> int:
    """Return the number of threads of work between steps."""
    return sum(each.name == "minisrv-turns" for each in threading.enumerate())


if __name__ == "__main__":
    may_be_interrupted()
    sys.exit(main(crowd=Combination))
