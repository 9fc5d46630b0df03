"""`minisrv compile`: compiles a model in pieces before it is served, so that its first start finds
what was compiled.

Knows: how to start the engine that would serve, and where compiled programs are kept. Knows nothing
of how a model is compiled.
"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from minisrv import threads
from minisrv.cache import cache_directory
from minisrv.compile.modes import CompilationMode
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.messages import CompilationState
from minisrv.errors import ConfigError
from minisrv.progress import StartupProgress


def run_compile(config: EngineConfig) -> int:
    """Compile a model in pieces unless that has been done, certify what was compiled as a server
    would, and print the outcome. Returns the exit status: 0 if the compiled code would serve, or
    else 1.

    Raises the errors of start-up, and ConfigError for another compilation mode.
    """
    pieces = CompilationMode.MINISRV_COMPILE
    if config.enforce_eager or config.compilation_mode not in (None, pieces):
        raise ConfigError(
            f"what is compiled ahead of time is what compilation_mode={pieces.name} serves; leave "
            "out --compilation-mode and --enforce-eager."
        )
    threads.limit(beside=1)  # as in a server: code is compiled for a number of threads
    progress = StartupProgress()
    try:
        engine = build_engine(replace(config, compilation_mode=pieces, compile_wait=True), progress)
    finally:
        progress.close()
    report = engine.compilation.report
    console = Console(highlight=False, soft_wrap=True)
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
