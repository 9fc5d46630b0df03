"""minisrv: a small LLM inference server about one idea, graph-aware batching.

`LLM`, `SamplingParams` and the other names in `__all__` are the Python interface. They are imported
on first use, so that the parts that need no torch (`minisrv plan`, the API workers) start without
it. OpenMP reads how its threads wait when torch is imported, so the environment variables for that
are set here, before any part imports torch.
"""

# NOTE: nothing is imported before this call, not even __future__: an import might find a module in
# the working directory.
from minisrv.import_path import leave_working_directory

leave_working_directory()

from importlib import import_module  # noqa: E402
from importlib.metadata import version  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from minisrv.threads import let_waiting_threads_sleep  # noqa: E402

if TYPE_CHECKING:
    from minisrv.llm import LLM as LLM
    from minisrv.outputs import CompletionOutput as CompletionOutput
    from minisrv.outputs import RequestOutput as RequestOutput
    from minisrv.request import SamplingParams as SamplingParams
    from minisrv.request import StructuredOutputsParams as StructuredOutputsParams

__version__ = version("minisrv")
__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_PLACES = {
    "LLM": "minisrv.llm",
    "CompletionOutput": "minisrv.outputs",
    "RequestOutput": "minisrv.outputs",
    "SamplingParams": "minisrv.request",
    "StructuredOutputsParams": "minisrv.request",
}

let_waiting_threads_sleep()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'minisrv' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
