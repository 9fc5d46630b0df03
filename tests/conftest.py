"""Selects the tests that run here, on a GPU or with Triton's kernels in Triton's interpreter.

A verdict must not depend on how busy the machine is, so this file sets torch to compute in one
thread, as several tests run at a time, and Hypothesis to measure no times.

A process that runs tests has imported nearly everything and holds almost a million objects, through
which each full garbage collection would go for half a second, and every engine makes one when it
captures its graphs. So what is there once all tests are collected is frozen: hidden from the
garbage collector. So is what the tests of a file leave, such as modules that they import. FastAPI's
caches, which keep every application of a test, are emptied then; they came to as many objects
again. Compiled modules are kept on disk whatever the environment says, as hundreds of processes
import them.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fastapi.dependencies.models
import pytest
from hypothesis import HealthCheck, settings

from minisrv import threads
from minisrv.device_kind import CPU

gc.disable()  # nothing that is imported for the tests is garbage
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# It is set before torch reads it, and for processes that tests start.
os.environ.setdefault(threads.COUNT, "1")

import torch  # noqa: E402  (after the settings that it reads)

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which an import of some test may do.
    os.environ["TRITON_INTERPRET"] = "1"

# Files that tests keep in the cache stay out of the user's own, and are there for the next run.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "xdg")

settings.register_profile(
    "minisrv", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("minisrv")

MOST_WORKERS = 4
"""Maximum number of processes that run tests at a time. Each holds torch, models and servers, about
2 GiB."""

QUICK = ("core", "graph", "nn", "runner", "server", "text", "tools")
"""Directories whose tests start no servers, run no model for long and interpret no kernels."""

MANY_OBJECTS = 20_000
"""Number of objects through which a full garbage collection goes in about 10 ms."""

NOT_QUICK = (
    *("test_compile.py", "test_transformers_model.py", "test_openapi.py"),
    *("test_certify.py", "test_traps.py", "test_hostile_checkpoints.py", "test_learn.py"),
)
"""Files in these directories that compile models, make one of every architecture, search for bodies
at random for a minute, sweep or break graphs, or try thousands of broken checkpoints. What graphs
are certified for is in test_certification.py, which is quick."""

NOT_QUICK_TESTS = {
    "test_checkpoint.py::test_a_second_start_imports_no_transformers",
    "test_checkpoint.py::test_what_an_engine_will_need_is_imported_meanwhile",
    "test_dispatch.py::test_a_covering_ladder_holds_every_batch",
    "test_dispatch.py::test_a_measured_plan_says_what_each_graph_costs",
    "test_errors.py::test_no_body_makes_a_500",
    "test_grammar_validator.py::test_a_process_is_not_silent_where_nobody_listened",
    "test_grammar_validator.py::test_what_would_stop_an_engine_is_refused",
    "test_json_schema.py::test_an_odd_schema_is_kept_to_the_end_or_refused_at_the_start",
    "test_launch_cost.py::test_the_command",
    "test_layers.py::test_an_mlp_is_traced_as_one_graph",
    "test_log_writer.py::test_a_process_ends_with_its_status_though_nobody_reads",
    "test_structured.py::test_a_random_schema_is_kept",
    "test_threads.py::test_a_thread_that_waits_takes_no_core",
    "test_tool_grammar.py::test_whatever_is_sampled_is_calls_of_the_tools",
    "test_turns.py::test_a_loop_without_turns",
}
"""Tests of quick files that take seconds, as they start processes that import or compute much, or
search far. Others in their files try the same on chosen cases."""


@pytest.fixture
def tape_holds_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the refusal of mode `full` on a CPU, so that the parts of it that need no GPU are
    tested: a CPU tape calls the attention op again at each replay, so the op sees the lengths of
    that moment."""
    monkeypatch.setattr(
        "minisrv.engine.platforms.CPUPlatform.kind", replace(CPU, captures_mixed=True)
    )


@pytest.fixture
def raising_sigint() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt: a shell has its background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Freezer:
    """Hides from the garbage collector what stays as long as the process, and notices when a test
    freezes more: the collector unfreezes all objects or none.

    used: whether anybody has called `gc.freeze` since the objects that stay were frozen.
    """

    def __init__(self) -> None:
        self.used = False
        self._freeze = gc.freeze
        self._num_frozen = 0

    def freeze_what_stays(self) -> None:
        """Freeze every object that there is, in place of what has been frozen so far."""
        gc.unfreeze()
        gc.collect()
        self._freeze()
        self._num_frozen = gc.get_freeze_count()
        self.used = False

    def freeze_what_is_left(self) -> None:
        """Freeze what a file of tests has left beside the objects that are frozen, except for
        applications, which FastAPI would keep in its caches."""
        if len(gc.get_objects()) < MANY_OBJECTS:
            return
        for cached in vars(fastapi.dependencies.models).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
        gc.collect()
        self._num_frozen += len(gc.get_objects())
        self._freeze()

    def num_left_by_a_test(self) -> int:
        """Return how many more objects are frozen than stay. It counts them one by one."""
        return gc.get_freeze_count() - self._num_frozen

    def freeze(self) -> None:
        """Stand in for `gc.freeze`."""
        self.used = True
        self._freeze()


freezer = Freezer()
gc.freeze = freezer.freeze


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin with no frozen object, let captures freeze objects as they do in a server, and leave
    the garbage collector as it was."""
    monkeypatch.setattr("minisrv.certification.startup.gc", gc)
    gc.unfreeze()
    try:
        yield
    finally:
        freezer.freeze_what_stays()
        gc.enable()


@pytest.fixture(autouse=True)
def nothing_stays_frozen() -> Iterator[None]:
    """Where one test leaves objects to which the garbage collector pays no attention any more, the
    engines of all tests after it stay in memory, as each capture adds to those objects."""
    yield
    if freezer.used:
        num_frozen = freezer.num_left_by_a_test()
        freezer.freeze_what_stays()
        assert num_frozen < 10_000  # what an engine leaves is more


@pytest.fixture(autouse=True, scope="session")
def captures_freeze_nothing() -> Iterator[None]:
    """Let captures collect garbage but freeze nothing, as objects that they freeze beside those of
    this process would stay frozen. The fixture `collections` lets them freeze."""
    collector = SimpleNamespace(
        collect=gc.collect,
        freeze=lambda: None,
        unfreeze=lambda: None,
        get_freeze_count=lambda: 0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minisrv.certification.startup.gc", collector)
        yield


@pytest.fixture(autouse=True, scope="session")
def kernels_are_compiled_by_launches() -> Iterator[None]:
    """Let engines in the process of a test compile the few kernels that they launch: a process that
    does it ahead takes longer to start."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available():
            ahead = "minisrv.engine.platforms.cuda.compiled_kernels"
            patch.setattr(ahead, lambda *arguments: nullcontext())
        yield


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of worker processes of pytest-xdist. Tests on a GPU measure its memory, so
    they run alone."""
    return 0 if torch.cuda.is_available() else min(threads.cores(), MOST_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Freeze what was imported and collected."""
    freezer.freeze_what_stays()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Freeze what a file of tests leaves behind its last test, when its fixtures are gone."""
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        freezer.freeze_what_is_left()
    return result


def _may_be_quick(path: Path) -> bool:
    """Whether tests of a file are quick, or those of files in a directory may be."""
    parts = path.relative_to(Path(__file__).parent).parts
    is_there = not parts or parts[0] in QUICK or (len(parts) == 1 and path.suffix == ".py")
    return is_there and path.name not in NOT_QUICK


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file for the quick subset that has nothing of it."""
    tests = Path(__file__).parent
    is_quick_run = config.option.markexpr == "quick" and collection_path.is_relative_to(tests)
    return True if is_quick_run and not _may_be_quick(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        test = f"{item.path.name}::{item.name.partition('[')[0]}"
        if _may_be_quick(item.path) and test not in NOT_QUICK_TESTS:
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
