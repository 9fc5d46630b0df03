"""The index of the benchmarks names every script, and a script says which package it lacks."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import attention_bandwidth, mixed_load, prompt_attention, step_kernels, tiles
from benchmarks.clients.needs import needs

FOLDER = Path(__file__).parents[2] / "benchmarks"
INDEX = (FOLDER / "README.md").read_text()
SHARED = {
    *("layers.py", "memory.py", "questions.py", "hostile_cases.py"),
    *("steps.py", "needs.py", "recording.py", "streams.py"),
    *("simulation.py", "arrivals.py", "routers.py"),
}
SCRIPTS = [
    path for path in (*FOLDER.glob("*.py"), *FOLDER.glob("clients/*.py")) if path.name not in SHARED
]


def commands() -> list[list[str]]:
    """Return the commands of the index that run a script, split into words as a shell does."""
    blocks = re.findall(r"^```\n(.*?)^```", INDEX, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [words for line in lines if (words := shlex.split(line))[0] == "python"]


def test_every_script_is_listed_and_every_link_leads_somewhere() -> None:
    links = set(re.findall(r"\]\(([^)]+)\)", INDEX))
    assert {str(path.relative_to(FOLDER)) for path in SCRIPTS} <= links
    assert not [link for link in links if not (FOLDER / link).exists()]


def test_every_script_has_a_command() -> None:
    ran = {
        words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1] for words in commands()
    }
    by_others = {"clients/lm_eval_cases.py"}
    listed = {str(path.relative_to(FOLDER)) for path in SCRIPTS} - by_others
    assert ran == {f"benchmarks/{name}" for name in listed}


CLIENTS = {
    "use_agents": ("autogen_agentchat", "langgraph"),
    "use_anthropic": ("anthropic", "anthropic"),
    "use_frameworks": ("instructor", "'outlines[openai]'"),
    "use_openai_agents": ("agents", "openai-agents"),
    "use_langchain": ("langchain_core", "langchain-openai"),
    "use_litellm": ("litellm", "litellm"),
    "vllm_bench": ("aiohttp", "aiohttp regex tqdm"),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_that_is_not_installed_is_named_with_its_command(name: str) -> None:
    missing, install = CLIENTS[name]
    code = (
        f"import runpy, sys; sys.modules[{missing!r}] = None; sys.path.insert(0, 'clients'); "
        f"runpy.run_path('clients/{name}.py', run_name='__main__')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"{missing} is not installed; this script needs: pip install ")
    assert line.endswith(install)


def test_only_what_is_missing_is_said_to_be() -> None:
    with pytest.raises(ZeroDivisionError), needs("pip install x"):
        _ = 1 // 0


@pytest.mark.parametrize("script", [attention_bandwidth, prompt_attention, step_kernels, tiles])
def test_what_needs_a_gpu_says_so(script, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["script", str(FOLDER / "configs/qwen3-0.6b")])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith("needs a GPU, and torch finds none")


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        mixed_load.main(["nowhere", "--plot", "x.svg"])
