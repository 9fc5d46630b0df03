"""Records which kernels Triton would have to compile for launches that are not carried out.

Triton specialises a kernel for the types, the constants and the alignment of its arguments, and
compiles it at its first launch. A recording lets code launch kernels as always, on tensors of the
meta device, and keeps for each specialisation the function that compiles it. It is Triton's own
launch that specialises the kernel, up to the key under which the compiled kernel lies in Triton's
cache; so a launch on the GPU, by this process or another one, finds it there.

Knows: Triton's launches, from the arguments to the compiled kernel. Knows no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime._async_compile import AsyncCompileMode

from minisrv.kernels.gpu import GPU, rehearse_on

WARP = 32
"""Number of threads in a warp of an NVIDIA GPU."""


class _Driver:
    """What stands in for Triton's driver: it names the GPU, which need not be there."""

    def __init__(self, gpu: GPU) -> None:
        major, minor = gpu.capability
        self._target = GPUTarget("cuda", 10 * major + minor, WARP)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _RecordedKernel:
    """What a launch gets in place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        """Return nothing, as there is nobody to tell of a launch."""

    def run(self, *args: Any) -> None:
        """Launch nothing."""


class Recording(AsyncCompileMode):  # type: ignore[misc]
    """Within this context kernels are recorded for a GPU, and none is launched. A process that has
    recorded cannot launch kernels any more.

    kernels: for each recorded kernel, by its key in Triton's cache, the function that compiles it.
    """

    def __init__(self, gpu: GPU) -> None:
        super().__init__(executor=None)
        self._gpu = gpu
        self.kernels: dict[str, Callable[[], Any]] = {}

    def __enter__(self) -> Recording:
        triton.runtime.driver.set_active(_Driver(self._gpu))
        rehearse_on(self._gpu)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        rehearse_on(None)

    def submit(
        self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]
    ) -> _RecordedKernel:
        """Record a kernel; Triton calls this at the first launch of each specialisation."""
        self.kernels.setdefault(key, compile_fn)
        recorded = _RecordedKernel()
        finalize_fn(recorded)  # with which Triton finds it at the next launch
        return recorded


def compile_recorded(compile_fn: Callable[[], Any]) -> list[Path]:
    """Compile a recorded kernel into Triton's cache, unless it is there, and return its files in
    the cache. Raises whatever Triton raises."""
    kernel = compile_fn()
    if hasattr(nvidia, "make_launcher"):  # Triton before 3.7 also compiles what launches a kernel
        nvidia.CudaLauncher(kernel.src, kernel.metadata)
    return [Path(path) for path in kernel.metadata_group.values()]
