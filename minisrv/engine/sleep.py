"""Sleep and wake: the memory of an engine that has nothing to do is there for others.

While an engine sleeps, the memory of the weights and of the KV cache is released, but their
addresses stay reserved, so graphs and compiled code stay valid. At level 1 the host keeps a copy of
the weights, which on a CPU is where they are. At level 2 nothing is kept, and they are read from
the checkpoint again. What the KV cache held is forgotten at both levels. Before an engine serves
again, some steps must give what they gave before it slept (`certification.witness`).

Knows: what is released and restored, and in which order. Knows nothing of requests, except that
none is taken by an engine that sleeps.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from minisrv.arena import Arena
from minisrv.certification.witness import Witness
from minisrv.core.kv_cache import BlockPool
from minisrv.engine.background import Background
from minisrv.engine.memory import mebibytes
from minisrv.engine.messages import SleepReport, SleepTag
from minisrv.errors import (
    CertificationError,
    ConfigError,
    EngineError,
    MinisrvError,
    SleepError,
    asleep_error,
)
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class Sleeper:
    """The sleep of one engine.

    arenas: the memory that is released; empty if the engine never sleeps.
    runner: the runner, whose KV cache lies in its arena.
    pool: the blocks of that cache.
    background: the work between steps, which may be in the middle of a certification.
    stored: the model's tensors, whose memory belongs to their arena.
    reload: makes the same tensors once more, from the checkpoint.
    release: returns memory that nobody uses to the device.
    held_bytes: returns the number of bytes of the device's memory that are in use.
    """

    def __init__(
        self,
        arenas: Mapping[SleepTag, Arena],
        runner: ModelRunner,
        pool: BlockPool,
        background: Background,
        stored: Sequence[Tensor],
        reload: Callable[[], Sequence[Tensor]],
        *,
        release: Callable[[], None],
        held_bytes: Callable[[], int],
    ) -> None:
        self.report = SleepReport()
        """What is released. A change replaces it."""
        self._runner = runner
        self._pool = pool
        self._stored = stored
        self._reload = reload
        self._release = release
        self._held_bytes = held_bytes
        self._arenas = arenas
        self._background = background
        self._witness: Witness | None = None
        self._are_kept = False

    @property
    def is_busy(self) -> bool:
        """Whether work between steps is in the middle of something, such as the certification of a
        graph, which `sleep` has to wait for."""
        return self._background.is_in_the_middle

    def refuse_requests(self) -> None:
        """Have new requests refused, because the engine is to sleep as soon as it can."""
        self._tell(is_due=True)

    def check_awake(self) -> None:
        """Raise EngineAsleepError if the engine sleeps, or refuses requests before it does."""
        if self.report.refuses_requests:
            raise asleep_error()

    def sleep(self, level: int) -> None:
        """Release the memory. What is released already stays so, and level 2 drops what level 1
        has kept of it. Nobody may hold a block, no step may be in flight, and nothing `is_busy`.

        level: 1 or 2.

        Raises SleepError if the host has no memory for a copy of the weights; nothing is released
        then which was not before. Raises ConfigError if the engine never sleeps.
        """
        self._tell(is_due=False)
        self._check_enabled()
        began, held = time.monotonic(), self._held_bytes()
        weights, kv_cache = self._arenas[SleepTag.WEIGHTS], self._arenas[SleepTag.KV_CACHE]
        keep = level == 1
        if not self.report.is_asleep:
            self._pool.clear_prefix_cache()
            self._witness = Witness(self._runner)
        if not weights.is_released:
            try:
                weights.release(keep=keep)
            except RuntimeError as error:
                raise SleepError(
                    f"the host has no memory for a copy of the weights ({error}); free some, or "
                    "sleep at level 2, which keeps none."
                ) from error
            self._are_kept = keep
        elif self._are_kept and not keep:
            weights.forget()
            self._are_kept = False
        if not kv_cache.is_released:
            kv_cache.release(keep=False)
        self._release()
        took, left = time.monotonic() - began, self._held_bytes()
        self._tell(level=1 if self._are_kept else 2, sleep_seconds=took)
        logger.info(
            "asleep at level %d after %.3f s: %s of memory released, %s still in use",
            self.report.level,
            took,
            mebibytes(max(0, held - left)),
            mebibytes(left),
        )

    def wake_up(self, tags: Collection[SleepTag]) -> None:
        """Restore the memory of `tags`, as far as it is released. The engine is awake when all of
        it is restored. Nothing happens if it is awake already.

        Raises SleepError if the memory, or the checkpoint, is not to be had; the engine sleeps on
        then. Raises EngineError if the engine would compute something else than before, and
        ConfigError if it never sleeps.
        """
        self._check_enabled()
        if not self.report.is_asleep:
            return
        began = time.monotonic()
        try:
            for tag, arena in self._arenas.items():  # weights first: to read them takes memory
                if tag in tags and arena.is_released:
                    self._restore(tag, arena)
        finally:
            self._tell()
        if self._released():
            return
        self._check()
        took = time.monotonic() - began
        self._tell(level=0, wake_up_seconds=took)
        logger.info("awake after %.3f s", took)

    def _check_enabled(self) -> None:
        if not self._arenas:
            raise ConfigError("this engine never sleeps; start it with enable_sleep_mode.")

    def _restore(self, tag: SleepTag, arena: Arena) -> None:
        try:
            if tag is SleepTag.WEIGHTS and not self._are_kept:
                self._read_weights(arena)
            else:
                arena.restore()
            return
        except torch.OutOfMemoryError as error:
            problem = (
                f"the memory of {tag.value} is not to be had ({error}); end what else uses it, and "
                "wake the engine up again."
            )
        except (MinisrvError, OSError) as error:
            problem = f"the weights cannot be read again: {error}"
        # From here on no error refers to what has been read until then.
        gc.collect()
        self._release()
        raise SleepError(problem)

    def _read_weights(self, arena: Arena) -> None:
        """Read the checkpoint again, and then put what it gives where the weights were, for which
        there is no memory until then: a GPU may have no room for both."""
        read = list(self._reload())
        if list(map(_form, read)) != list(map(_form, self._stored)):
            raise SleepError("the checkpoint holds other weights than before.")
        gc.collect()  # the model that they were read for
        arena.refill(read)
        self._release()

    def _check(self) -> None:
        assert self._witness is not None, "an engine that sleeps has one"
        try:
            self._witness.check()
        except CertificationError as error:
            raise EngineError(
                f"the engine does not compute what it did before it slept ({error.message}). If "
                "the checkpoint has changed, start again to serve it; otherwise report this."
            ) from error
        self._witness = None

    def _released(self) -> tuple[SleepTag, ...]:
        return tuple(tag for tag, arena in self._arenas.items() if arena.is_released)

    def _tell(self, **changes: object) -> None:
        self.report = msgspec.structs.replace(self.report, released=self._released(), **changes)


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
