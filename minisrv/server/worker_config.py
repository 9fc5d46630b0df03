"""The arguments of an API worker, and its reports to the launcher.

Knows: plain data that crosses between the two processes. Imports nothing of HTTP, which would take
half a second before the engine starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minisrv.config import ServerConfig
from minisrv.engine.messages import Loading, Ready

CHECKPOINT = "checkpoint"
"""Name of the file in the server's private directory that describes the checkpoint that is served,
for all processes."""

Report = Loading | Ready | str
"""A worker's report to the launcher: the engine's progress, that it is ready, or a message that
says why it cannot serve."""


@dataclass(frozen=True)
class WorkerConfig:
    """The arguments that an API worker is started with.

    index: the worker's number, from 0.
    number: how many workers there are.
    address: the address of the engine's socket.
    engine_pid: the process id of the engine.
    private_dir: the server's private directory, where workers share their metrics and CHECKPOINT
        lies.
    root: the checkpoint as the operator named it, which served_model_names stand for.
    settings: the settings of the server.
    enable_sleep_mode: whether clients may put the engine to sleep.
    engine_is_ready: whether the engine is ready; if not, it is starting too, and the worker answers
        that it is loading.
    """

    index: int
    number: int
    address: str
    engine_pid: int
    private_dir: Path
    root: str
    served_model_names: tuple[str, ...]
    settings: ServerConfig
    enable_sleep_mode: bool = False
    engine_is_ready: bool = False

    @property
    def name(self) -> str:
        """Name of the process, which also identifies the worker to the engine."""
        return f"api-{self.index}"
