"""`minisrv bench`: measures steps of an engine eagerly, by PIECEWISE graphs and by FULL graphs.

measure.py runs the steps of one engine in every mode; report.py prints and saves the results.
"""

from __future__ import annotations

from minisrv.config import BenchConfig, EngineConfig
from minisrv.progress import StartupProgress
from minisrv.tools.bench.measure import run_bench
from minisrv.tools.bench.report import print_report, save_json, save_plot
from minisrv.tools.output_files import check_output


def bench(engine: EngineConfig, settings: BenchConfig) -> None:
    """Measure, print, and write the files that were asked for.

    Raises the errors of start-up (ConfigError, ModelError, GraphError), and ConfigError for sizes
    that do not fit and, before anything runs, for files that could not be written.
    """
    check_output(settings.json, settings.plot)
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
