"""Work that lasts no longer than its client is connected.

Knows: ASGI. Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Do the work, which is cancelled if the client disconnects, and return whether it is done. The
    body of the request must have been read before. Raises what the work raises."""
    worker = asyncio.current_task()
    assert worker is not None
    before, is_gone = worker.cancelling(), False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        worker.cancel()

    # The work needs no task of its own, which would cost every request more than the rest of this.
    watcher = asyncio.create_task(watch())
    try:
        await work
    except (asyncio.CancelledError, Exception):
        if not is_gone:
            raise
    finally:
        watcher.cancel()
    if is_gone and worker.uncancel() > before:  # somebody else has cancelled it too
        raise asyncio.CancelledError
    return not is_gone
