"""`minisrv serve`: the processes, from start to end.

Knows: which process starts which, and how all of them end. The engine starts first and loads while
this process, the API worker, imports its own parts and opens the port: `/health` answers at once,
`/ready` when the engine is. SIGTERM and SIGINT stop admission, give open requests
`shutdown_timeout` seconds, and end the tree.
Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import uvicorn

from minisrv.checkpoint import read_generation_config, resolve_checkpoint
from minisrv.config import EngineConfig, ServerConfig
from minisrv.core.ladder import ladders_of
from minisrv.engine.client import EngineClient, EngineState
from minisrv.engine.process import EngineProcess
from minisrv.errors import ConfigError
from minisrv.progress import StartupProgress
from minisrv.server.app import create_app
from minisrv.server.http import BoundedProtocol, bound_writes
from minisrv.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 2
"""What clients get to read the error that ends their requests when the server shuts down."""


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve until told to stop; returns the exit status.

    0 after SIGTERM or SIGINT, 1 if the engine could not start or had died by then. Raises
    ConfigError, ModelError for what can be seen before anything is started.
    """
    started = time.perf_counter()
    ladders_of(engine)
    directory = resolve_checkpoint(engine.model)
    names = server.served_model_names or (engine.model or directory.name,)
    listener = _listen(server)
    # uvicorn raises the signal again once it has shut down: either ends the process in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="minisrv-") as socket_dir:
        process = EngineProcess(replace(engine, model=str(directory)), Path(socket_dir))
        try:
            client = EngineClient(process.address, process.pid)
            app = create_app(
                client,
                Tokenizer.from_directory(directory),
                served_model_names=names,
                generation=read_generation_config(directory),
            )
            settings = uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=server.shutdown_timeout + LAST_WORDS_SECONDS,
            )
            http = _Server(settings, client, server.shutdown_timeout)
            return asyncio.Runner(loop_factory=settings.get_loop_factory()).run(
                _run(client, http, listener, started)
            )
        except KeyboardInterrupt:
            return 1 if process.has_ended else 0
        finally:
            process.stop()


def _listen(server: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound_writes(listener)
    try:
        listener.bind((server.host, server.port))
        # At once: of two servers that only bind to a port, neither would see the other.
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {server.host}:{server.port} ({error.strerror}); "
            "choose another --host or --port."
        ) from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn, telling the engine's client when the end begins and when time is up."""

    def __init__(self, config: uvicorn.Config, client: EngineClient, seconds: float) -> None:
        """seconds: what open requests get to finish."""
        super().__init__(config)
        self.client = client
        self.seconds = seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, let open ones finish, end with an error those that do not."""
        self.client.drain()
        # NOTE: before uvicorn's own timeout, which cuts connections in the middle of a message.
        late = asyncio.get_running_loop().call_later(self.seconds, self.client.end_open)
        await super().shutdown(sockets)
        late.cancel()


async def _run(
    client: EngineClient, server: _Server, listener: socket.socket, started: float
) -> int:
    url = _url(listener)  # while it is open: a signal may come at any time
    progress = StartupProgress()
    await client.start(progress)
    serving = asyncio.create_task(server.serve([listener]))
    settled = asyncio.create_task(client.settled())
    try:
        await asyncio.wait((serving, settled), return_when=asyncio.FIRST_COMPLETED)
        progress.close()
        if client.state is EngineState.DEAD:
            logger.error("the engine did not start: %s", client.death.message)
            server.should_exit = True
            await serving
            return 1
        if settled.done():
            _announce(client, url, time.perf_counter() - started)
        await serving
        return 0
    finally:
        settled.cancel()
        await client.close()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(client: EngineClient, url: str, seconds: float) -> None:
    info = client.info
    assert info is not None, "the engine is ready"
    phases = ", ".join(f"{name} {took:.1f}" for name, took in info.startup_seconds.items())
    logger.info(
        "ready in %.1f s (%s): %s/v1, mode %s, %d graphs, %s on %s, context %d, %d KV blocks of %d",
        seconds,
        phases,
        url,
        info.cudagraph_mode,
        info.graphs,
        info.dtype,
        info.device,
        info.max_model_len,
        info.num_kv_blocks,
        info.block_size,
    )
