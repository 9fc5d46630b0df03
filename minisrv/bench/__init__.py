"""`minisrv bench`: what a step costs eagerly, by pieces and by one graph.

measure.py runs one engine's steps in every mode; report.py shows and keeps what came of it.
"""

from __future__ import annotations

from minisrv.bench.measure import run_bench
from minisrv.bench.report import check_output, print_report, save_json, save_plot
from minisrv.config import BenchConfig, EngineConfig
from minisrv.progress import StartupProgress


def bench(engine: EngineConfig, settings: BenchConfig) -> None:
    """Measure, print, and write the files that were asked for.

    Raises the start-up branches of `minisrv.errors`; ConfigError for sizes that do not fit, and
    before anything runs for files that could not be written.
    """
    check_output(settings)
    progress = StartupProgress()
    try:
        report = run_bench(engine, settings, progress)
    finally:
        progress.close()
    print_report(report)
    if settings.json is not None:
        save_json(report, settings.json)
    if settings.plot is not None:
        save_plot(report, settings.plot)
