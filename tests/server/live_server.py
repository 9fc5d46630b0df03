"""An application behind the same HTTP server as `minisrv serve` has, on a free port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp

from minisrv.server.connections import Connections
from minisrv.server.http import BoundedProtocol
from minisrv.server.listening import HttpServer


@asynccontextmanager
async def serve(app: ASGIApp) -> AsyncIterator[tuple[str, int]]:
    """Run the server and yield its address. Requests that are still open at the end are
    cancelled."""
    async with serve_with_connections(app) as (address, _):
        yield address


@asynccontextmanager
async def serve_with_connections(
    app: ASGIApp, **settings: Any
) -> AsyncIterator[tuple[tuple[str, int], Connections]]:
    """Run the server and yield its address and its connections, for which a test lets time pass by
    calling `end_late_connections`. A server looks ten times a second whether it is to end, and
    whether its connections have ended; this one looks a hundred times, so that tests are shorter.

    settings: further settings of uvicorn.
    """
    quick = {**vars(asyncio), "sleep": lambda seconds: asyncio.sleep(seconds / 10)}
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=1,
        **settings,
    )
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        patch.setattr("uvicorn.server.asyncio", SimpleNamespace(**quick))
        address = listener.getsockname()
        server = HttpServer(config, listener, Connections())
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        yield address, server.connections
        server.should_exit = True
        await task
