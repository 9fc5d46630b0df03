"""Command-line flags that are made from settings classes, and hints for flags that do not exist.

Each flag stands for a field of a settings class: it has the field's name, type, default and
choices, and its help is the text on that field in the docstring of the class, so that a setting is
described in one place.

Knows: argparse, and how settings classes are documented. Knows nothing of what a command does.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from minisrv.compile.modes import CompilationMode
from minisrv.config import EngineConfig, ServerConfig
from minisrv.modes import CUDAGraphMode
from minisrv.vllm_flags import why_not_here

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_TYPES: dict[str, dict[str, Any]] = {
    "int": {"type": int, "metavar": "N"},
    "float": {"type": float, "metavar": "X"},
    "str": {"metavar": "TEXT"},
    "Path": {"type": Path, "metavar": "FILE"},
    "tuple[str, ...]": {"nargs": "+", "type": lambda text: (text,)},
    "tuple[int, ...]": {"nargs": "+", "type": lambda text: sizes(text), "metavar": "N"},
}
"""Arguments of `add_argument` by the annotated type of a field."""


class CommandParser(argparse.ArgumentParser):
    """The argument parser of a command.

    An unknown argument ends the program with the usage of this command and a hint, also where a
    parent parser hands the arguments on to it. Flags cannot be abbreviated.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.commands: Mapping[str, CommandParser] = {}
        """All commands of the program by name, this one included, so that a hint can name the
        command that has a flag."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Do as `ArgumentParser.parse_known_args`, but end the program for an unknown argument; so
        the second item of the result is empty."""
        found, unknown = super().parse_known_args(args, namespace)
        if flags := [text for text in unknown if re.match(r"--?[A-Za-z]", text)]:
            self.error("\n  ".join(self._hint(flag) for flag in flags))
        if unknown:
            self.error(f"nothing takes {' '.join(unknown)!r}; a value follows its flag.")
        return found, []

    @property
    def flags(self) -> list[str]:
        """The long names of the parser's flags, such as `--model`."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def _hint(self, given: str) -> str:
        flag = given.partition("=")[0]
        spelled = flag.lower().replace("_", "-")
        if spelled in self.flags:
            return f"{flag} is spelled {spelled} here."
        switch = "--" + spelled.removeprefix("--no-")
        if switch in self.flags and self._option_string_actions[switch].nargs == 0:
            return f"there is no {flag}: {switch} is off unless it is given; leave both out."
        if why := why_not_here(given):
            return f"{flag} is vLLM's, and not here: {why}"
        if others := [name for name, parser in self.commands.items() if spelled in parser.flags]:
            return f"{flag} is a flag of {', '.join(others)}, not of this command."
        near = [name for name in self.flags if name.startswith(spelled)]
        near = near or difflib.get_close_matches(spelled, self.flags, n=1)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help."
        return f"there is no {flag}; {hint}"


class SettingsFlags:
    """Adds flags for the fields of a settings class to a parser, group by group.

    A flag that is not given stays None; the class fills in its own default.
    """

    def __init__(self, parser: argparse.ArgumentParser, kind: type[Any]) -> None:
        self._parser = parser
        self._fields: dict[str, Field[Any]] = {field.name: field for field in fields(kind)}
        self._docs = field_docs(kind)
        self._group: argparse._ArgumentGroup

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Begin a titled group in the help, for the flags that are added from here on."""
        self._group = self._parser.add_argument_group(title)
        return self._group

    def add(self, *names: str) -> None:
        """Add the flags of fields whose declarations say all that argparse needs."""
        for name in names:
            self.add_as(name)

    def add_as(self, name: str, *flags: str, **options: Any) -> None:
        """Add the flag of a field.

        name: the name of the field.
        flags: the names of the flag, if it is not named after the field.
        options: arguments of `add_argument`, in place of those that follow from the field's type.
        """
        field = self._fields[name]
        annotation = str(field.type).removesuffix(" | None")
        if annotation == "bool":
            optional = field.default is not False
            action = argparse.BooleanOptionalAction if optional else "store_true"
            options = {"action": action} | options
        elif choices := field.metadata.get("choices"):
            options = {"choices": choices} | options
        else:
            options = _TYPES.get(annotation, {}) | options
        if options.get("nargs") == "+":
            options["action"] = _Flatten
        self._group.add_argument(
            *(flags or (flag_name(name),)), dest=name, default=None, help=self.help(name), **options
        )

    def help(self, name: str) -> str:
        """Return the help of a flag: the text on the field in the class's docstring, in the words
        of a command line."""
        field, text = self._fields[name], self._docs.get(name, "").rstrip(".")
        text = re.sub(  # docstrings name fields, and the help names flags
            r"\b[a-z]+(_[a-z]+)+\b",
            lambda match: flag_name(match[0]) if match[0] in self._fields else match[0],
            text,
        )
        if not isinstance(field.default, bool | tuple | None):
            text += f" (default: {field.default})"
        return text.replace("%", "%%")


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Return the texts on the fields in a class's docstring, by name, which it holds in paragraphs
    such as `name: text`. Empty under `python -OO`, which drops docstrings."""
    doc = inspect.getdoc(kind) or ""
    paragraphs = re.findall(r"^([a-z_]+): (.*(?:\n    .*)*)", doc, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in paragraphs}


def flag_name(name: str) -> str:
    """Return the name of the flag for the field `name`."""
    return "--" + name.replace("_", "-")


# ---- which fields are flags ----------------------------------------------------------------------


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and the flags for the fields of EngineConfig."""
    flags = SettingsFlags(parser, EngineConfig)
    group = flags.group("model")
    # As in vLLM, the model may be an argument or a flag.
    group.add_argument("model", nargs="?", metavar="MODEL", help=flags.help("model"))
    group.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same as a flag")
    flags.add("revision", "tokenizer", "chat_template")
    flags.add("dtype", "device", "model_impl", "load_format", "quantization")
    flags.add_as("max_model_len", type=length, metavar="N|auto")
    flags.add("seed", "enable_sleep_mode")
    flags.group("batching")
    flags.add("max_num_seqs", "max_num_batched_tokens", "itl_target_ms", "max_waiting")
    flags.add("block_size")
    flags.add_as("kv_cache_memory", type=size, metavar="BYTES[K|M|G]")
    flags.add("gpu_memory_utilization", "num_kv_blocks")
    flags.add("async_scheduling", "enable_prefix_caching")
    flags.group("graphs")
    flags.add("enforce_eager")
    flags.add_as("cudagraph_mode", type=CUDAGraphMode.parse, metavar="MODE")
    flags.add("cudagraph_capture_sizes", "cudagraph_capture", "cudagraph_refit")
    flags.add_as("verify_graphs", type=float, metavar="RATE")
    flags.add("step_trace", "simulate_launch_us")
    flags.group("compilation")
    flags.add_as("compilation_mode", type=CompilationMode.parse, metavar="MODE")
    flags.add_as("optimization_level", "-O", "--optimization-level")
    flags.add("compile_wait")


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the fields of ServerConfig."""
    flags = SettingsFlags(parser, ServerConfig)
    flags.group("HTTP")
    flags.add("host", "port", "root_path")
    flags.add_as("served_model_names", "--served-model-name", type=names, metavar="NAME")
    flags.add("api_workers", "shutdown_timeout", "engine_timeout", "request_timeout")
    flags.add("enable_force_include_usage", "pooling", "ui")
    flags.group("access")
    flags.add_as("api_keys", "--api-key", metavar="KEY")
    flags.add("max_requests_per_key", "max_grammar_seconds_per_key", "share_prefix_cache")
    flags.add_as("allowed_hosts", metavar="NAME")
    flags.add_as("allowed_origins", metavar="ORIGIN")
    flags.add("ssl_certfile", "ssl_keyfile")
    flags.group("log and metrics")
    flags.add("disable_log_stats", "disable_uvicorn_access_log", "metrics_names")
    flags.group("events of the prefix cache")
    flags.add("kv_events_endpoint", "kv_events_replay_endpoint", "kv_events_topic")


# ---- how values are parsed -----------------------------------------------------------------------


class _Flatten(argparse.Action):
    """Stores the values of a flag that takes several words, each of which may stand for several
    values, as one tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        groups: Iterable[Iterable[Any]] = values
        setattr(namespace, self.dest, tuple(value for group in groups for value in group))


def length(text: str) -> int | None:
    """Parse a number of tokens as vLLM does: 4096, 4k for 4000, 4K for 4096; None for auto."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)([kK]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; write 4096, 4K or auto")
    return int(float(match[1]) * {"": 1, "k": 1000, "K": 1024}[match[2]])


def sizes(text: str) -> list[int]:
    """Parse integers that are separated by commas."""
    try:
        return [int(size) for size in text.split(",") if size]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 1 2 4,8") from None


def names(text: str) -> list[str]:
    """Parse words that are separated by commas."""
    return [name for name in text.split(",") if name]


def size(text: str) -> int:
    """Parse a number of bytes, such as 500M or 2G; the units are powers of 1024."""
    match = re.fullmatch(r"(\d{1,18})([kmg]?)(i?b)?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500M or 2G")
    return int(match[1]) * _UNITS[match[2]]
