"""A list of things that a client does, each of which works or not, and why not.

Knows: functions that assert. Knows nothing of clients.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Steps:
    """What was run, in order. packages: whose versions the report has."""

    def __init__(self, *packages: str) -> None:
        self._versions = {name: version(name) for name in packages}
        self._steps: list[dict[str, Any]] = []

    def run(self, step: Callable[[], Any]) -> None:
        """Run a step now, and keep what it returns, or the error that it raises.

        What a step gets from a loop is its defaults, which are part of its name: strings, or the
        `model` of settings.
        """
        given = (d["model"] if isinstance(d, dict) else d for d in step.__defaults__ or ())
        name = " ".join([step.__name__, *given])
        try:
            self._steps.append({"step": name, "works": True, "told": step()})
        except Exception as error:  # of any client's any layer: it is what is to be found out
            traceback.print_exc()
            self._steps.append({"step": name, "works": False, "told": repr(error)})

    def report(self, path: str | None) -> int:
        """Print and write the report; returns the program's exit status."""
        report = {"versions": self._versions, "steps": self._steps}
        text = json.dumps(report, indent=1) + "\n"
        print(text)
        if path:
            Path(path).write_text(text, encoding="utf-8")
        return 0 if all(step["works"] for step in self._steps) else 1


def run_program(description: str, steps_of: Callable[..., Steps]) -> int:
    """Run a client's steps as the command line says; returns the exit status.

    steps_of: makes them for a server's URL and whether its model knows `tools`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("url")
    parser.add_argument("--tools", action="store_true", help="the chat template knows tools")
    parser.add_argument("--json")
    args = parser.parse_args()
    return steps_of(args.url, tools=args.tools).report(args.json)
