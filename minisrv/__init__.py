"""minisrv: a small LLM inference server about one idea, graph-aware batching.

`LLM` and `SamplingParams` are the Python interface. They are imported on first use, so that the
parts that need no torch (`minisrv plan`, the API workers) start without it.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisrv.llm import LLM as LLM
    from minisrv.request import SamplingParams as SamplingParams

__version__ = version("minisrv")
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from minisrv.llm import LLM

        return LLM
    if name == "SamplingParams":
        from minisrv.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'minisrv' has no attribute {name!r}")
