"""The documentation agrees with the server, in lines that fit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from docs import field_tables
from minisrv import cli, request
from minisrv.config import EngineConfig, ServerConfig
from minisrv.core import scheduler
from minisrv.model_config import ARCHITECTURES
from minisrv.server import (
    app,
    connections,
    http,
    listening,
    middleware,
    request_schemas,
    value_budget,
)
from minisrv.text import chat_template, grammar_trials, grammar_validator
from tests import architectures

ROOT = Path(__file__).parents[1]
PAGES = [str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/*.md"))]


PLANS = [
    (page, shlex.split(words)[1:], shown)
    for page in ("README.md", "docs/graphs.md", "docs/compile.md")
    for words, shown in re.findall(
        r"^\$ (minisrv (?:plan|ladder --assume)\b.*)\n((?:(?!\$ |```).*\n)*)",
        (ROOT / page).read_text(),
        flags=re.MULTILINE,
    )
]


@pytest.mark.parametrize(("page", "words", "shown"), PLANS)
def test_a_plan_prints_the_lines_that_a_page_shows(
    page: str,
    words: list[str],
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The lines come in this order, with others between them where the page has an ellipsis."""
    monkeypatch.setenv("COLUMNS", "100")
    status = cli.main(words)
    captured = capsys.readouterr()
    printed = iter([line.rstrip() for line in (captured.out + captured.err).splitlines()])
    for line in shown.splitlines():
        assert line == "  ..." or line.rstrip() in printed, line
    assert status == ("error:" in shown)


def test_the_tables_of_fields_are_those_of_the_server() -> None:
    page = field_tables.PAGE.read_text()
    assert page == field_tables.with_tables(page), (
        "docs/api.md lists other fields than the server accepts: run `python docs/field_tables.py`"
    )


def test_the_bounds_of_a_request_are_those_of_the_server() -> None:
    """Each bound of a request has a row with its value, and the flags that are named there
    exist."""
    engine, server = EngineConfig(), ServerConfig()
    text = (ROOT / "docs" / "api.md").read_text()
    section = text.partition("## What a request may take")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| (.+?) \| (.+?) \|", section, flags=re.MULTILINE))
    bounds = {
        "request line": f"{http.MAX_HEAD_BYTES:,} bytes",
        "requests on a connection": f"{http.MAX_PIPELINED}",
        "a body": f"{app.DEFAULT_MAX_BODY_BYTES:,} bytes",
        "large bodies": f"{middleware.MAX_UNREAD_BYTES:,} bytes",
        "objects, lists and members": f"{value_budget.MAX_MEMBERS:,}",
        "values in it": f"{value_budget.MAX_ELEMENTS:,}",
        "a head": f"{connections.HEAD_SECONDS} s",
        "a body, from": f"{connections.BODY_SECONDS} s, and a second for each "
        f"{connections.BODY_BYTES_PER_SECOND:,} bytes of it",
        "a client that takes nothing": f"{listening.STALLED_SECONDS} s",
        "connections of each": f"{connections.MAX_WAITING:,}, or",
        "choices for each prompt": f"{request_schemas.MAX_CHOICES}",
        "inputs of a request": f"{request_schemas.MAX_INPUTS:,}",
        "choices that run": f"{engine.max_num_seqs}",
        "choices that wait": f"{engine.max_waiting:,}",
        "a schema": f"{request.MAX_GRAMMAR_LENGTH:,} characters",
        "a grammar": f"{grammar_validator.CPU_SECONDS:g} s of processor time, "
        f"{grammar_trials.MEMORY_BYTES >> 30} GiB",
        "all new grammars": f"{server.max_grammar_seconds_per_key} s of processor time",
        "the chat template": f"{chat_template.RENDER_SECONDS:g} s of processor time, "
        f"{chat_template.MAX_CHARACTERS:,} characters",
        "requests of a lower": f"{scheduler.MAX_OVERTAKES} for each that was there, and "
        f"{scheduler.MAX_OVERTAKES}",
    }
    for what, bound in bounds.items():
        rows = [told[row] for row in told if row.startswith(what)]
        assert any(row.startswith(bound) for row in rows), f"{what}: {bound}, not {rows}"
    assert (server.max_requests_per_key, server.request_timeout) == (0, 0), "any"
    spelled = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)`", section)}
    assert spelled <= {*vars(engine), *vars(server)}


@pytest.mark.parametrize("page", ["README.md", *PAGES, "benchmarks/README.md"])
def test_lines_fit(page: str) -> None:
    """Lines have at most 100 characters, except in tables, code and pictures."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    long = [line for line in prose.splitlines() if len(line) > 100]
    assert not [line for line in long if not line.startswith(("|", "!["))]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The places in a page that links can name: its headings as GitHub spells them, and its ids."""
    text = prose(page)
    headings = (
        re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", h) for h in re.findall("^#+ (.*)$", text, re.M)
    )
    spelled = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return spelled | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize(
    "page", ["README.md", *PAGES, "benchmarks/README.md", "docs/results/README.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    """A link within the repository names a file or folder that there is, and a place in it."""
    lost = []
    for link in re.findall(r"]\(([^)\s]+)\)", prose(ROOT / page)):
        if link.startswith(("http:", "https:")):
            continue
        file, _, place = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists() or (place and place not in anchors(target)):
            lost.append(link)
    assert not lost


def test_a_promise_names_the_test_that_keeps_it() -> None:
    """Every promise in docs/security.md names a test, and each named test exists."""
    page = (ROOT / "docs/security.md").read_text()
    named = re.findall(r"\[(test_\w+)\]\(\.\./(tests/\S+?\.py)\)", page)
    assert not [
        f"{path}::{test}" for test, path in named if f"def {test}(" not in (ROOT / path).read_text()
    ]
    promises = re.findall(r"^\| (?!promise)[^-].*$", page, re.MULTILINE)
    assert promises
    assert not [line for line in promises if "](../tests/" not in line]


def test_the_table_of_models_is_what_the_tests_prove() -> None:
    page = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| (minisrv's|transformers') \| (.+) \|$", page, re.MULTILINE))
    proved = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in architectures.ARCHITECTURES}
    for code, names in (
        ("minisrv's", ARCHITECTURES.keys()),
        ("transformers'", proved - ARCHITECTURES.keys()),
    ):
        short = {re.sub(r"ForCausalLM$|LMHeadModel$", "", name) for name in names}
        assert rows[code] == ", ".join(sorted(short, key=str.lower))
