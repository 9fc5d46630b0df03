"""minisrv as an application of Ray Serve: `serve run minisrv.deploy.ray:app`.

Each replica is an API worker with an engine process of its own: the application, the client and the
engine are those of `minisrv serve`. Ray does the rest: its proxy speaks HTTP, chooses a replica for
each request and passes on ASGI messages, and its controller starts, checks and drains replicas.

Ray asks `check_health` about a replica. When the engine dies, the open requests of the replica end
with an error, and then the replica's process ends too, because Ray replaces a replica that has died
at once, but one that reports bad health only after several checks. A replica that is to end gets no
new requests from Ray, which waits for the open ones.

Knows: Ray Serve, and how a worker and an engine are put together. No module of minisrv outside this
package imports ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.metrics import Gauge
from starlette.types import Message

from minisrv import logs, threads
from minisrv.cli import serve_settings
from minisrv.deploy.forwarding import ReadRequest, answer
from minisrv.deploy.prefix_routing import PrefixRouter, PromptReader
from minisrv.deploy.replica_endpoints import check_endpoints, endpoints_of_replica
from minisrv.deploy.replica_flags import flags_of, is_true
from minisrv.engine.client import EngineClient, EngineState
from minisrv.processes import raise_descriptor_limit
from minisrv.server.hosts import HostNames
from minisrv.server.watched_engine import (
    WatchedEngine,
    check_settings,
    usable_temporary_directory,
)
from minisrv.server.worker import EXIT_REPORT_SECONDS, bound_interpreter, worker_app

logger = logging.getLogger(__name__)

_PROXY_ADDRESS = "127.0.0.1"
"""The address that the host names are chosen for. A replica does not know where Ray's proxies
listen, so without API keys it answers only to names of this machine and to `allowed-hosts`."""

LAST_WORDS_SECONDS = 0.1
"""Seconds in which the errors of the requests of a dead engine reach Ray's proxy. Requests that
come meanwhile end with an error too."""

EXPORT_SECONDS = 5
"""Seconds between two exports of the metrics."""

PREFIX_ROUTING = "prefix-routing"
"""Name of the setting that is no flag: whether requests go to replicas by the beginning of their
prompts."""


class Replica:
    """An API worker inside a process of Ray's, with an engine process of its own."""

    async def __init__(self, flags: list[str]) -> None:  # type: ignore[misc]  # Ray awaits it
        """Start the engine, and return when it is ready.

        flags: those of `minisrv serve`.
        Raises ConfigError, ModelError or EngineDeadError if it cannot be started; Ray tries again.
        """
        threads.without_blas()
        logs.configure("replica")
        bound_interpreter()
        raise_descriptor_limit()
        engine, server = serve_settings(flags)
        server = endpoints_of_replica(server, serve.get_replica_context().rank.rank)
        check_settings(engine)
        with usable_temporary_directory():
            self._private_dir = Path(tempfile.mkdtemp(prefix="minisrv-"))
        self._is_ready = False
        self._engine = WatchedEngine(engine, server, self._private_dir)
        try:
            await asyncio.to_thread(self._engine.load)
            config = self._engine.worker_config(index=0, number=1)
            self._client = EngineClient(
                config.address, config.engine_pid, config.name, EXIT_REPORT_SECONDS
            )
            hosts = HostNames.of(server, _PROXY_ADDRESS)
            self._app = worker_app(config, self._client, hosts, is_alone=False)
            asyncio.get_running_loop().add_reader(self._engine.process.sentinel, self._engine_ended)
            await self._client.start()
            await self._client.settled()
            if self._client.state is EngineState.DEAD:
                raise self._client.death
        except BaseException:
            self._engine.process.stop()
            shutil.rmtree(self._private_dir, ignore_errors=True)
            raise
        self._is_ready = True
        self._export = asyncio.create_task(_export_metrics(self._app))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application, for Ray's `serve.ingress`."""
        return self._app

    async def respond(self, request: ReadRequest) -> AsyncGenerator[Message]:
        """Answer a request of the PromptReader with the messages of the response. Raises
        EngineDeadError if the engine had died before the request came."""
        if self._client.state is EngineState.DEAD:
            raise self._client.death
        async with aclosing(answer(self._app, request)) as messages:
            async for message in messages:
                yield message

    def _engine_ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._engine.process.sentinel)
        self._client.engine_ended(self._engine.describe_exit())
        if self._is_ready:
            logger.error("the engine has ended; this replica ends, and Ray starts another.")
            loop.call_later(LAST_WORDS_SECONDS, os._exit, 1)

    async def check_health(self) -> None:
        """Raise EngineDeadError if the engine is dead; kill it if it hangs. Ray calls this at
        intervals, on the event loop of the requests, so that a loop that hangs is noticed too."""
        self._engine.check(is_ready=self._is_ready)
        if self._client.state is EngineState.DEAD:
            raise self._client.death

    async def __del__(self) -> None:
        """End the engine. Ray calls this when all requests have ended, or their time is over."""
        if not self._is_ready:
            return
        asyncio.get_running_loop().remove_reader(self._engine.process.sentinel)
        self._export.cancel()
        self._client.drain()
        await self._client.close()
        self._app.state.close()
        self._engine.process.stop()
        shutil.rmtree(self._private_dir, ignore_errors=True)


async def _export_metrics(app: FastAPI) -> None:
    """Give what `/metrics` shows to Ray at intervals, whose own metrics have the replica as a
    label. A request for `/metrics` reaches one replica, whichever Ray chooses."""
    (scrape,) = (
        route.endpoint
        for route in app.routes
        if isinstance(route, APIRoute) and route.path == "/metrics"
    )
    gauges: dict[str, Gauge] = {}
    while True:
        text = (await scrape()).body.decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.replace(":", "_")
                if name not in gauges:
                    gauges[name] = Gauge(name, family.documentation, tuple(sample.labels))
                gauges[name].set(sample.value, sample.labels)
        await asyncio.sleep(EXPORT_SECONDS)


_DRAIN = {"graceful_shutdown_timeout_s": 60, "graceful_shutdown_wait_loop_s": 0.5}
_REPLICA: dict[str, Any] = {
    "name": "minisrv",
    "max_ongoing_requests": 128,
    "max_queued_requests": 1024,
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    **_DRAIN,
}
_PROMPT_READER: dict[str, Any] = {
    "name": "prompt-reader",
    "max_ongoing_requests": 1024,
    "ray_actor_options": {"num_cpus": 0.1},
    **_DRAIN,
}
"""The defaults of the deployments' options; deploy/ray-serve.yaml says what they mean."""


def app(settings: dict[str, Any]) -> serve.Application:
    """Return the application, for `serve run` and for the import_path of a configuration.

    settings: the flags of `minisrv serve`, by their names without the dashes at the front, and
        PREFIX_ROUTING.
    Raises ConfigError, before any replica is started.
    """
    flags = flags_of({name: value for name, value in settings.items() if name != PREFIX_ROUTING})
    _, server = serve_settings(flags)
    check_endpoints(server)
    if not is_true(settings.get(PREFIX_ROUTING, False)):
        return serve.deployment(serve.ingress()(Replica), **_REPLICA).bind(flags)
    by_prefix = RequestRouterConfig(request_router_class=PrefixRouter)
    replicas = serve.deployment(Replica, request_router_config=by_prefix, **_REPLICA).bind(flags)
    return serve.deployment(serve.ingress()(PromptReader), **_PROMPT_READER).bind(replicas)
