"""What an engine's process does while it imports torch.

An import keeps one core busy. Beside it a thread prepares the GPU and reads Triton's files, both of
which happen outside of Python. Nothing depends on it: what is not done ahead is done when it is
needed, and what fails fails again then, with an error that is told.

Knows: what takes long in the start of a library. Knows nothing of models.
"""

from __future__ import annotations

import logging
import threading

from minisrv.config import EngineConfig
from minisrv.machine import has_driver, open_gpu

logger = logging.getLogger(__name__)


def prepare_gpu(config: EngineConfig) -> None:
    """Start the thread, if an engine with these settings will use a GPU."""
    if config.device != "cpu" and has_driver():
        threading.Thread(target=_prepare, name="minisrv-ahead", daemon=True).start()


def _prepare() -> None:
    try:
        open_gpu()
        from triton.runtime import driver
        from triton.runtime.cache import triton_key

        triton_key()  # a digest of Triton's files, hundreds of megabytes, which it keeps
        _ = driver.active.utils  # the calls of the driver, in C, compiled at the first start
    except Exception:
        logger.debug("the GPU is not prepared ahead", exc_info=True)
