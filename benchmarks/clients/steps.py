"""Runs the steps of a test of a client, and reports which of them worked, and why others did not.

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
    """The results of the steps that were run, in order.

    packages: the packages whose versions the report has.
    """

    def __init__(self, *packages: str) -> None:
        self._versions = {name: version(name) for name in packages}
        self._steps: list[dict[str, Any]] = []

    def run(self, step: Callable[[], Any]) -> None:
        """Run a step at once, and keep the value that it returns, or the error that it raises.

        A step that is defined in a loop gets the loop's values as its defaults, which become part
        of its name: strings, or the `model` in a dict of settings.
        """
        given = (d["model"] if isinstance(d, dict) else d for d in step.__defaults__ or ())
        name = " ".join([step.__name__, *given])
        try:
            self._steps.append({"step": name, "works": True, "told": step()})
        except Exception as error:  # any error in any layer of the client is a result
            traceback.print_exc()
            self._steps.append({"step": name, "works": False, "told": repr(error)})

    def result(self) -> dict[str, Any]:
        """The versions of the packages, and what each step returned or raised."""
        return {"versions": self._versions, "steps": self._steps}

    def report(self, path: str | None) -> int:
        """Print the result, write it to `path` if there is one, and return the exit status of the
        program."""
        text = json.dumps(self.result(), indent=1) + "\n"
        print(text)
        if path:
            Path(path).write_text(text, encoding="utf-8")
        return 0 if all(step["works"] for step in self._steps) else 1


def run_program(description: str, steps_of: Callable[[str], Steps]) -> int:
    """Run the steps of a client as the command line says, and return the exit status.

    description: the description of the program in its help.
    steps_of: runs the steps for the URL of a server.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("url")
    parser.add_argument("--json")
    args = parser.parse_args()
    return steps_of(args.url).report(args.json)
