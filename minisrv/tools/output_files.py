"""The files that a command writes its results to, checked before it measures anything.

Knows: directories, and which formats of plots matplotlib writes. Knows nothing of results.
"""

from __future__ import annotations

from pathlib import Path

from minisrv.errors import ConfigError


def check_output(json: Path | None, plot: Path | None) -> None:
    """Raise ConfigError for a file that could not be written afterwards."""
    for path in (json, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no directory {path.parent}; make it first.")
    if plot is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib; install it with: pip install matplotlib."
        ) from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix.removeprefix(".") not in formats:
        raise ConfigError(f"{plot}: a plot's name ends in one of: {', '.join(formats)}.")
