"""Imports point to the same floor or a lower one (docs/architecture.md), and API workers start
without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "config": 0,
    "device_kind": 0,
    "model_config": 0,
    "cache": 0,
    "import_path": 0,
    "errors": 0,
    "interrupts": 0,
    "request": 0,
    "validation": 0,
    "modes": 0,
    "compile/modes": 0,
    "core": 1,
    "text": 1,
    "arena": 1,
    "kernels": 1,
    "metrics": 1,
    "request_metrics": 1,
    "vllm_metrics": 1,
    "checkpoint": 1,
    "machine": 1,
    "logs": 0,
    "log_writer": 0,
    "outputs": 1,
    "progress": 1,
    "threads": 1,
    "turns": 1,
    "processes": 1,
    "graph": 2,
    "compile": 3,
    "nn": 3,
    "runner": 4,
    "certification": 5,
    "engine": 6,
    "server": 7,
    "llm": 8,
    "chat": 8,
    "flags": 8,
    "vllm_flags": 8,
    "__init__": 8,
    "tools": 9,
    "cli": 9,
    "deploy": 9,
}
"""The floor of each part: a module or package of the package, or a module with a floor apart from
that of the package that it is in."""
VERSION = "__version__"
"""The only name of the package itself that every floor may import."""

HEAVY = {
    *("torch", "transformers", "triton", "sympy", "numpy", "tokenizers", "llguidance", "jinja2"),
    *("fastapi", "pydantic", "uvicorn", "openai"),
}
"""Packages that take long to import, each from a fiftieth of a second to several seconds."""

MODULES = sorted((ROOT / "minisrv").rglob("*.py"))


def imports(path: Path) -> list[tuple[str, int]]:
    """Return (module, line) of every import in the file, also of those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "minisrv":
                names = [alias.name for alias in node.names if alias.name != VERSION]
                found += [(f"minisrv.{name}", node.lineno) for name in names]
            else:
                found.append((node.module or "", node.lineno))
    return found


def part_of(module: str) -> str:
    """Return the part to which a module belongs: that with the longest name, if there are two."""
    _, *names = module.split(".")
    parts = ["/".join(names[:length]) for length in range(len(names), 0, -1)]
    return next((part for part in parts if part in FLOORS), "/".join(names[:1]) or "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    part = part_of(_name(path))
    wrong = [
        f"line {line}: {part} (floor {FLOORS[part]}) imports {module} "
        f"(floor {FLOORS[part_of(module)]})"
        for module, line in imports(path)
        if module.split(".")[0] == "minisrv" and FLOORS[part_of(module)] > FLOORS[part]
    ]
    assert not wrong


def test_no_modules_import_each_other():
    """The imports of the package have no circle, those inside functions included."""
    names = {_name(path): path for path in MODULES}
    imported = {name: modules_imported(path, names.keys()) - {name} for name, path in names.items()}
    while leaves := {name for name, others in imported.items() if not others}:
        imported = {
            name: others - leaves for name, others in imported.items() if name not in leaves
        }
    assert not imported, "these modules import each other, or modules that do"


def modules_imported(path: Path, names: Collection[str]) -> set[str]:
    """Return those of the modules `names` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in names else node.module)
    return found & set(names)


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_module_has_a_floor():
    parts = {part_of(_name(path)) for path in MODULES}
    assert parts == set(FLOORS)


def test_the_table_of_the_house_names_every_part():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", page, flags=re.MULTILINE)
    told = {
        name.strip("/"): int(floor)
        for floor, parts in rows
        for name in re.findall("`(.+?)`", parts)
    }
    assert told == {part: floor for part, floor in FLOORS.items() if part != "__init__"}


def test_the_spine_can_be_read_in_an_afternoon():
    """docs/architecture.md names the modules of the spine with their numbers of lines, at most
    3,000 together. The numbers may be a little old."""
    text = (ROOT / "docs/architecture.md").read_text().split("## The spine")[1].split("##")[0]
    told = {name: int(lines) for name, lines in re.findall(r"^\| `(.+)` \| (\d+) \|", text, re.M)}
    lines = {name: len((ROOT / "minisrv" / name).read_text().splitlines()) for name in told}
    assert len(told) > 10
    assert sum(lines.values()) <= 3000
    assert {name: told[name] == pytest.approx(lines[name], rel=0.1, abs=5) for name in told} == (
        dict.fromkeys(told, True)
    )


@pytest.mark.parametrize(
    "part",
    [
        *("config", "device_kind", "errors", "request", "validation", "modes", "compile/modes"),
        *("core", "text"),
    ],
)
def test_floors_0_and_1_name_no_torch(part: str):
    """The modules that do bookkeeping on the host import no torch, not even inside functions."""
    for path in MODULES:
        if part_of(_name(path)) == part:
            assert not [m for m, _ in imports(path) if m.split(".")[0] == "torch"], path


def test_only_what_deploys_on_ray_imports_ray():
    found = {
        path.relative_to(ROOT / "minisrv").parts[0]
        for path in MODULES
        if any(module.split(".")[0] == "ray" for module, _ in imports(path))
    }
    assert found == {"deploy"}


def test_loadgen_knows_nothing_of_minisrv():
    for path in (ROOT / "loadgen").rglob("*.py"):
        used = {module.split(".")[0] for module, _ in imports(path)}
        assert not used & {"minisrv", "torch"}, path


@pytest.mark.parametrize(
    "module",
    [
        "minisrv.cli",
        "minisrv.tools.plan",
        "minisrv.server.worker",
        "minisrv.engine.client",
        "minisrv.text.grammar_validator",
        "loadgen",
    ],
)
def test_starts_without_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        # What the engine's process imports beside this is told in tests/engine/test_start.py.
        ("minisrv.server.launcher", set()),
        ("minisrv.engine.process", set()),
        ("minisrv.server.worker", HEAVY - {"torch", "transformers", "triton", "sympy"}),
    ],
)
def test_a_process_imports_nothing_that_would_hold_its_start_up(module: str, allowed: set[str]):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert HEAVY & set(done.stdout.decode().split()) <= allowed
