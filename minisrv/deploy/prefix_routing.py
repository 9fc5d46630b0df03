"""Requests whose prompts begin alike go to the same replica, where the prefix cache has the
beginning already.

Ray's proxy chooses a replica before it has read the body of a request. So there is a deployment in
front of the replicas, the `PromptReader`, which reads the body and passes the request on as an
argument with an attribute `prompt`. By this, Ray's request routers can choose: the `PrefixRouter`
here, or the `PrefixCacheAffinityRouter` of `ray.serve.llm`, which can be imported only where vLLM
or SGLang is installed.

Knows: Ray Serve's routers. Knows nothing of bodies but what `forwarding` has found.
"""

from __future__ import annotations

import asyncio
import hashlib
import time

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from minisrv.deploy.forwarding import ReadRequest, read
from minisrv.errors import EngineDeadError

RETRY_SECONDS = 2.0
"""Seconds for which a request is sent again that only replicas without an engine have seen. Ray
notices within a quarter of a second that such a replica has ended."""
RETRY_PAUSE_SECONDS = 0.05


class PromptReader:
    """Reads each request and passes it on to a replica that the request router chooses by its
    prompt. A request that comes to a replica whose engine has died is sent again; one that an
    engine may have begun never is, as it may be what the engine died of."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(method_name="respond", stream=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application, for Ray's `serve.ingress`."""
        return Router(default=self._pass_on, redirect_slashes=False)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await read(scope, receive)
        if request is None:
            return
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            if request.prompt:
                messages = self._replicas.remote(request)
            else:  # Ray's router for prefixes expects a prompt in a positional argument
                messages = self._replicas.remote(request=request)
            has_begun = False
            try:
                async for message in messages:
                    has_begun = True
                    await send(message)
                return
            except EngineDeadError:
                if has_begun or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(RETRY_PAUSE_SECONDS)


class PrefixRouter(RequestRouter):
    """Chooses the replica that the beginning of the prompt belongs to, unless others have much less
    to do.

    Which one that is follows from the beginning and the replicas' ids alone (rendezvous hashing),
    so that several routers agree without talking, and a replica that comes or goes changes only the
    prompts that it has or had.
    """

    def initialize_state(self, prefix_characters: int = 512, imbalance: int = 8) -> None:  # type: ignore[override]
        """Set what `request_router_kwargs` say.

        prefix_characters: number of characters at the beginning of a prompt that count.
        imbalance: number of open requests by which a replica may be ahead of the least busy one and
            still get the prompts that belong to it.
        """
        self._prefix_characters = prefix_characters
        self._imbalance = imbalance

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return groups of replicas; Ray takes the first group in which one has room."""
        by_load = sorted(candidate_replicas, key=self._open_requests)
        prefix = self._prefix_of(pending_request)
        if not (by_load and prefix):
            return [by_load[:2]]
        home = max(by_load, key=lambda replica: _weight(prefix, str(replica.replica_id.unique_id)))
        if self._open_requests(home) > self._open_requests(by_load[0]) + self._imbalance:
            return [by_load[:2]]
        return [[home], by_load[:2]]

    def _open_requests(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def _prefix_of(self, pending: PendingRequest | None) -> bytes:
        request = pending.args[0] if pending is not None and pending.args else None
        if not isinstance(request, ReadRequest):
            return b""
        return request.prompt[: self._prefix_characters].encode(errors="surrogatepass")


def _weight(prefix: bytes, replica: str) -> bytes:
    return hashlib.blake2b(prefix, key=replica.encode()[:64], digest_size=8).digest()
