"""An application behind the HTTP server that `minisrv serve` has, on a free port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from minisrv.server.connections import Connections
from minisrv.server.http import BoundedProtocol
from minisrv.server.listening import HttpServer


@asynccontextmanager
async def serve(app: ASGIApp) -> AsyncIterator[tuple[str, int]]:
    """Yields the address. What is still open at the end is cancelled."""
    async with serve_with_connections(app) as (address, _):
        yield address


@asynccontextmanager
async def serve_with_connections(
    app: ASGIApp, **settings: Any
) -> AsyncIterator[tuple[tuple[str, int], Connections]]:
    """Yields the server's connections as well, whose time a test may let pass by `sweep`.

    settings: more of uvicorn's.
    """
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=1,
        **settings,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        server = HttpServer(config, listener, Connections())
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        yield address, server.connections
        server.should_exit = True
        await task
