"""`minisrv compile`: compiles a model before it is served, so that its first start finds what was
compiled: the model in pieces, and on a GPU Triton's kernels.

Knows: how to start the engine that would serve, and where what it compiles is kept. Knows nothing
of how a model or a kernel is compiled.
"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from minisrv import threads
from minisrv.cache import cache_directory
from minisrv.compile.modes import CompilationMode
from minisrv.config import EngineConfig
from minisrv.device_kind import CUDA
from minisrv.engine.builder import build_engine
from minisrv.engine.kernels import kept_list, kernel_cache
from minisrv.engine.messages import CompilationState
from minisrv.engine.platforms import platform_of
from minisrv.errors import ConfigError
from minisrv.progress import StartupProgress


def run_compile(config: EngineConfig) -> int:
    """Compile a model in pieces unless that has been done, certify what was compiled as a server
    would, and print the outcome. Returns the exit status: 0 if the compiled code would serve, or
    else 1. On a GPU, code that is served uncompiled unless that is asked for is left so, and only
    its kernels are compiled; the exit status is 1 if not all of them are kept.

    Raises the errors of start-up, and ConfigError for another compilation mode.
    """
    pieces = CompilationMode.MINISRV_COMPILE
    if config.enforce_eager or config.compilation_mode not in (None, pieces):
        raise ConfigError(
            f"what is compiled ahead of time is what compilation_mode={pieces.name} serves; leave "
            "out --compilation-mode and --enforce-eager."
        )
    threads.limit(beside=1)  # as in a server: code is compiled for a number of threads
    on_gpu = platform_of(config).kind is CUDA
    mode = config.compilation_mode if on_gpu else pieces
    kernels = kernel_cache() if on_gpu else None  # before the engine uses another directory
    progress = StartupProgress()
    try:
        whole = replace(config, compilation_mode=mode, compile_wait=True, cudagraph_capture="whole")
        engine = build_engine(whole, progress)
    finally:
        progress.close()
    report = engine.compilation.report
    console = Console(highlight=False, soft_wrap=True)
    if kernels is not None:
        kept = kept_list(engine.kernels, kernels)
        if kept is None:
            text = f"not all kernels are kept in {kernels}; the log says why."
            console.print(text, markup=False)
            return 1
        console.print(
            f"the kernels are kept in {kernels}, and the list of them in {kept.parent}. Both may "
            "be copied to the same places on machines with the same GPU and software.",
            markup=False,
        )
    if engine.config.compilation_mode is CompilationMode.NONE:
        why = engine.info.compilation_reason
        console.print(f"the model's own code is served uncompiled: {why}.", markup=False)
        return 0
    if report.state is not CompilationState.COMPILED:
        console.print(f"compiled code would not serve: {report.reason}", markup=False)
        return 1
    seconds = ", ".join(f"{phase} {took:.2f} s" for phase, took in report.seconds.items())
    console.print(
        f"compiled code would serve ({seconds}). It is kept in {cache_directory('compiled')}, "
        "which may be copied to machines with the same processor, GPU and software.",
        markup=False,
    )
    return 0
