"""The engine process that a server starts, feeds with the checkpoint, and watches.

An engine that shows no sign of life for `engine_timeout` seconds (while it loads, for at least
`LOADING_SECONDS`) is killed: the workers see it die and end its requests, or report that it did not
start.

Knows: the order in which an engine starts, and how long one may be silent. Knows nothing of API
workers but what they are started with, and imports neither torch nor anything of HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minisrv.checkpoint import open_checkpoint
from minisrv.config import EngineConfig, ServerConfig
from minisrv.core.ladder import ladders_of
from minisrv.device_kind import expected_kind
from minisrv.engine.process import EngineProcess
from minisrv.machine import check_driver
from minisrv.processes import unusable_temporary_directory
from minisrv.server.worker_config import CHECKPOINT, WorkerConfig

logger = logging.getLogger(__name__)

LOADING_SECONDS = 120
"""Minimum number of seconds that a loading engine may be silent. While it loads, its sign of life
comes from a thread, which is held up by native code that keeps the GIL: loading libraries,
initialising a device, compiling. On a CPU the longest silence was 0.6 s; a cold network disk or a
GPU's driver may take much more."""


def check_settings(engine: EngineConfig) -> None:
    """Raise ConfigError for what is wrong with the settings on this machine, whatever the
    checkpoint."""
    ladders_of(expected_kind(engine).resolve(engine))
    check_driver(engine)


class WatchedEngine:
    """An engine process, what it serves, and whether it has to be killed.

    process: the engine's process; whoever makes this object stops it.
    """

    def __init__(self, config: EngineConfig, server: ServerConfig, private_dir: Path) -> None:
        """Start the process at once. It imports its modules meanwhile, and waits for `load`.

        private_dir: the server's own directory.
        Raises ConfigError if the directory's path is too long for a socket.
        """
        self._config = config
        self._server = server
        self._private_dir = private_dir
        self._hung = False
        self.process = EngineProcess(
            config,
            private_dir,
            log_stats=not server.disable_log_stats,
            kv_events=server.kv_events,
        )

    def load(self) -> None:
        """Read the small files of the checkpoint, and let the process load the model. May be called
        once.

        Raises ConfigError or ModelError for what can be seen to be wrong before weights are read.
        """
        checkpoint = open_checkpoint(self._config)
        self._root = self._config.model or checkpoint.directory.name
        with usable_temporary_directory():
            checkpoint.save(self._private_dir / CHECKPOINT)
        self.process.load(self._private_dir / CHECKPOINT)

    def worker_config(self, index: int, number: int) -> WorkerConfig:
        """Return what an API worker of this engine is started with. May be called after `load`.

        index: the worker's number, from 0.
        number: how many workers there are.
        """
        return WorkerConfig(
            index=index,
            number=number,
            address=self.process.address,
            engine_pid=self.process.pid,
            private_dir=self._private_dir,
            root=self._root,
            served_model_names=self._server.served_model_names or (self._root,),
            settings=self._server,
            enable_sleep_mode=self._config.enable_sleep_mode,
        )

    def check(self, *, is_ready: bool) -> None:
        """Kill the engine if it hangs. It may be stopped, or wait for a device that is gone.

        is_ready: whether it has loaded.
        """
        silent = self.process.silent_seconds
        limit = self._server.engine_timeout
        if not is_ready:
            limit = max(limit, LOADING_SECONDS)
        if silent <= limit or self.process.exit_status is not None:
            return
        if is_ready:
            logger.error(
                "the engine has finished no step for %.1f s (--engine-timeout %g); it is killed. "
                "If its steps may take so long, give it more.",
                silent,
                limit,
            )
        else:
            logger.error(
                "the engine has shown no sign of life for %.1f s while it loads; it is killed. It "
                "was stopped, or hangs; start again, and if the machine is only slow, with an "
                "--engine-timeout above %g.",
                silent,
                limit,
            )
        self._hung = True
        self.process.stop()

    def describe_exit(self) -> str:
        """Return in words how the process has ended, which the kernel tells only to its parent,
        this process."""
        return "killed as it showed no sign of life" if self._hung else self.process.describe_exit()


@contextmanager
def usable_temporary_directory() -> Iterator[None]:
    """Raise ConfigError where the block cannot make a temporary directory or a file in it."""
    try:
        yield
    except OSError as error:
        raise unusable_temporary_directory(error) from error
