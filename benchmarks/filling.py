"""Measures how streams feel that the ladders fill while a server serves.

    python benchmarks/filling.py --json filling.json

Two servers run one after the other under the same load, from ready on: one that is ready when the
whole ladder is captured, for comparison, and one that is ready when the covering ladder is and
captures the rest meanwhile. The load, the phases and what is written are those of `swap.py`: a
stream sends its next request when the last one has ended, ITL is the time between two chunks of it
at the client, and answers are greedy. Exits with status 1 if a request fails, or the ladder does
not become whole.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.swap import Story, add_load, compare

WHOLE, FILLING, FILLED = "whole", "filling", "filled"


def phase(body: dict[str, Any]) -> str:
    """Return the phase from the body of `/ready`."""
    return FILLING if body["graphs"]["missing"] else FILLED


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="minisrv serve")
    add_load(parser, streams=8, output_tokens=300)
    options = parser.parse_args()
    story = Story(phase, (WHOLE, FILLED))
    commands = {
        WHOLE: (f"{options.server} --cudagraph-capture whole", story),
        FILLING: (options.server, story),
    }
    compare(commands, options)


if __name__ == "__main__":
    main()
