"""The rest of the ladders, captured while the engine serves.

An engine is ready with a covering ladder, which holds every batch with more padding. The other
graphs are captured, certified and timed here, one after the other, in turns between the steps of
requests, and each serves from the next step on. A graph that a batch has asked for comes first. One
that fails its certification is refused, and its batches run at the next larger size as before.

Knows: which graphs are missing, and in which order they come. Knows nothing of how a graph is
certified (`certification.generation`), nor of when it is time for a turn (`background`).
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial

import torch

from minisrv.certification.generation import build_graph, time_generation
from minisrv.core.graph_times import StepTime
from minisrv.core.kv_cache import BlockPool
from minisrv.engine.background import Background, Turn, Work
from minisrv.engine.generations import predicted_bytes
from minisrv.engine.memory import mebibytes
from minisrv.engine.messages import LadderReport, RefitReport
from minisrv.engine.step_costs import StepCosts
from minisrv.errors import MinisrvError
from minisrv.graph.captured import CapturedGraph
from minisrv.modes import GraphKey, Stage, StageOutput
from minisrv.runner.generation import Generation
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

LONGEST_STEP_MS = 20.0
"""Number of milliseconds up to which a step of a size may take for the size to be captured while
requests run that have not asked for it: nothing interrupts a replay on a GPU. Those that have asked
have had a longer step."""

MEMORY_PAUSE = 60.0
"""Number of seconds for which nothing is captured after there was no memory for it."""


class LadderFilling:
    """Brings the graphs that are missing in one engine into service. No error of it ends the
    engine, which can go on as it is.

    pool: the blocks of the runner's cache.
    costs: is told of each graph, with the time of a step by it.
    has_room: whether one more graph may take that many bytes.
    withdrawn: keeps the graphs that are taken out of service, as long as their generation serves.
    """

    def __init__(
        self,
        background: Background,
        runner: ModelRunner,
        pool: BlockPool,
        costs: StepCosts,
        has_room: Callable[[int], bool],
        withdrawn: list[CapturedGraph],
    ) -> None:
        self._background = background
        self._runner = runner
        self._pool = pool
        self._costs = costs
        self._has_room = has_room
        self._refused: dict[str, str] = {}
        self._refit = RefitReport()
        self._quarantined: dict[GraphKey, str] = {}
        self._withdrawn = withdrawn
        self._stopped = ""
        self._paused_at = -math.inf
        self._num_at_start = len(runner.graphs)
        self._began = time.monotonic()
        in_service = costs.dispatcher.in_service
        self._missing = OrderedDict(
            (key, False)  # whether a batch has asked for it
            for key in runner.ladders.keys()  # noqa: SIM118  (not a mapping)
            if key not in in_service
        )
        self.report = self._describe()
        """The graphs that serve. A change replaces it."""
        if self._missing:
            background.add(self._until_interrupted())

    def want(self, keys: Iterable[GraphKey]) -> None:
        """Let graphs come next that a batch would have run by."""
        for key in keys:
            if key in self._missing:
                self._missing.move_to_end(key, last=False)
                self._missing[key] = True

    @property
    def is_whole(self) -> bool:
        """Whether no graph is missing that may yet come."""
        return not self._missing

    def tell(self, refit: RefitReport) -> None:
        """Say of other ladders what `engine.refit` says."""
        self._refit = refit
        self.report = self._describe()

    def replaced(self, refit: RefitReport) -> None:
        """Say that other ladders serve now, all of whose graphs are there that may be."""
        self._refused = {}
        self.tell(refit)

    def quarantine(self, key: GraphKey, why: str) -> None:
        """Take a graph out of service that has served, for as long as the engine runs.

        why: what it did wrong, as a sentence.
        """
        # A step may still be running by it, and on a GPU graphs share a library's workspace.
        self._withdrawn.append(self._runner.graphs[key])
        self._costs.remove(key)
        self._runner.remove(key)
        self._quarantined[key] = why
        self.report = self._describe()
        logger.error(
            "the graph %s is out of service, because it was wrong: %s Its batches run by the next "
            "graph that holds them; please report this.",
            _name(key),
            why,
        )

    def without_quarantined(self, keys: Iterable[GraphKey]) -> list[GraphKey]:
        """Return those of the keys whose graphs were not taken out of service."""
        return [key for key in keys if key not in self._quarantined]

    def _until_interrupted(self) -> Work:
        """Do the work, which Ctrl-C in one of its turns ends."""
        try:
            yield from self._fill()
        except BaseException:
            self._stopped = "it was interrupted."
            self.report = self._describe()
            raise

    def _fill(self) -> Work:
        """Add the missing graphs; between two of them another work may have its turn."""
        turn = self._background.turn
        while self._missing:
            is_paused = time.monotonic() < self._paused_at + MEMORY_PAUSE
            key = None if is_paused else self._next()
            if key is None:
                turn.waits = True
                yield True
                continue
            try:
                if self._has_memory(key):
                    asks = self._costs.asks_for(key)
                    add = partial(_add_graph, self._runner, self._pool, key, turn, timed=asks)
                    self._costs.add(key, (yield from turn.take(add)))
                    del self._missing[key]
                    self._stopped = ""
            except Exception as error:
                self._refuse(key, error)
            self.report = self._describe()
            yield True
        self._tell_end()

    def _next(self) -> GraphKey | None:
        """Return the key of the graph that comes next; None while requests run and all that are
        left would make them wait too long."""
        for key, is_wanted in self._missing.items():
            step_ms = self._costs.longest_step_ms(key)
            if is_wanted or not self._background.busy or step_ms <= LONGEST_STEP_MS:
                return key
        return None

    def _has_memory(self, key: GraphKey) -> bool:
        """Whether there is memory for a graph; if not, none are captured for a while."""
        needed = predicted_bytes([key], self._runner.graphs)
        has_room = self._has_room(needed)
        if not has_room:
            self._pause(f"the next one may take {mebibytes(needed)}, which the GPU has not left.")
        return has_room

    def _refuse(self, key: GraphKey, error: Exception) -> None:
        """Go on without a graph, or for a while without all that are missing if the memory is
        full."""
        what = error.message if isinstance(error, MinisrvError) else f"{error!r}."
        self._runner.remove(key)
        if _is_out_of_memory(error):
            self._pause(what)
            return
        del self._missing[key]
        self._refused[_name(key)] = what
        logger.warning(
            "the graph %s may not serve; its batches run at the next larger size: %s",
            _name(key),
            what,
            exc_info=None if isinstance(error, MinisrvError) else error,
        )

    def _pause(self, why: str) -> None:
        if not self._stopped:
            logger.warning(
                "no more graphs are captured for now: %s Batches run at larger sizes.", why
            )
        self._stopped = why
        self._paused_at = time.monotonic()

    def _describe(self) -> LadderReport:
        served = self._costs.dispatcher.in_service

        def sizes(stage: Stage, *, decode: bool, output: StageOutput) -> tuple[int, ...]:
            return tuple(
                sorted(
                    key.num_tokens // (key.query_len or 1)
                    for _, key in served
                    if (key.stage, key.uniform_decode, key.output) == (stage, decode, output)
                )
            )

        return LadderReport(
            graphs=len(served),
            total=len(self._runner.ladders.keys()),
            decode=sizes(Stage.MODEL, decode=True, output=StageOutput.TOKENS),
            mixed=sizes(Stage.MODEL, decode=False, output=StageOutput.HIDDEN),
            epilogues=sizes(Stage.EPILOGUE, decode=True, output=StageOutput.TOKENS),
            refused=dict(self._refused),
            quarantined={_name(key): why for key, why in self._quarantined.items()},
            stopped=self._stopped,
            refit=self._refit,
        )

    def _tell_end(self) -> None:
        self.report = self._describe()
        report, longest = self.report, self._background.describe_longest()
        logger.info(
            "%d of %d graphs serve, %d of them captured while serving in %.1f s%s",
            report.graphs,
            report.total,
            report.graphs - self._num_at_start,
            time.monotonic() - self._began,
            f"; turns between steps made requests wait {longest} at most" if longest else "",
        )


def _add_graph(
    runner: ModelRunner, pool: BlockPool, key: GraphKey, turn: Turn, *, timed: bool
) -> StepTime | None:
    """Capture, certify and install a graph, and return the time of a step by it if it is timed.

    It refers to no `LadderFilling`: its thread would keep the whole engine when nobody else does.
    """
    build_graph(runner, pool, key, turn)
    if not timed:
        return None
    return time_generation(runner, pool, Generation.in_service(runner), [key], turn)[key]


def _name(key: GraphKey) -> str:
    mode, descriptor = key
    if descriptor.stage is Stage.EPILOGUE:
        kind = "epilogue"
    else:
        kind = "decode" if descriptor.uniform_decode else "mixed"
    return f"{mode.name} {kind} {descriptor.num_tokens} {descriptor.output.name}"


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False
