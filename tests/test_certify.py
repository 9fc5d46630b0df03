"""`minisrv certify` finds faults of graphs that start-up does not see, reports them and exits with
status 1."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from minisrv import cli
from minisrv.certification.trial import StepTrial
from minisrv.kernels import AttentionMetadata
from minisrv.runner.input_buffers import InputBuffers
from minisrv.tools import certify
from tests.checkpoints import make_checkpoint
from tests.runner.stepping import graphs_attend_with

FLAGS = ("--max-num-seqs", "3", "--max-num-batched-tokens", "16", "--block-size", "4")
# The faults of these tests are made in the CPU's kernels.
FLAGS += ("--max-model-len", "40", "--device", "cpu")
EPILOGUES = [f"FULL {n} {kind} alone" for n in (3, 2, 1) for kind in ("LOGITS", "TOKENS")]
MIXED = [f"PIECEWISE {n} HIDDEN" for n in (16, 8, 4, 2, 1)]
DECODE = [f"FULL {n} {kind}" for n in (3, 2, 1) for kind in ("HIDDEN", "TOKENS")]
GRAPHS = EPILOGUES + MIXED + DECODE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture
def run(checkpoint, tmp_path, capsys, monkeypatch):
    """A function that runs the command in this process and returns its status, what it printed and
    its JSON report."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*flags: str) -> tuple[int, str, dict[str, Any]]:
        path = tmp_path / "report.json"
        status = cli.main(["certify", checkpoint, *FLAGS, "--json", str(path), *flags])
        report = json.loads(path.read_text()) if path.exists() else {}
        return status, "".join(capsys.readouterr()), report

    return run


def failed(report: dict[str, Any]) -> list[str]:
    return [graph["graph"] for graph in report["graphs"] if graph["failures"]]


def test_right_graphs_pass(run, monkeypatch):
    """Each graph is tried from a clean, a poisoned and a stale state of the buffers."""
    seen = []
    reset = StepTrial.reset
    monkeypatch.setattr(
        StepTrial,
        "reset",
        lambda self, start, graph=None: (seen.append(start.name), reset(self, start, graph)),
    )
    status, printed, report = run()
    assert set(seen) == {"CLEAN", "POISONED", "STALE"}
    assert status == 0
    assert "17 graphs" in printed
    assert "all passed" in printed
    assert [graph["graph"] for graph in report["graphs"]] == GRAPHS
    assert report["passed"]
    assert failed(report) == []
    assert all(graph["trials"] >= 3 for graph in report["graphs"])
    assert all(graph["largest_difference"] == 0 for graph in report["graphs"])
    assert report["config"]["max_num_seqs"] == 3


def breaks_beyond(length: int, how) -> dict[Any, Any]:
    """Return kernels in which the attention that graphs call is wrong for rows longer than
    `length`; eager runs use the right one. Batches at start-up are no longer than two blocks and a
    token."""

    def change(metadata: AttentionMetadata) -> AttentionMetadata:
        if int(metadata.seq_lens.max()) <= length:
            return metadata
        return replace(metadata, seq_lens=how(metadata.seq_lens))

    return graphs_attend_with(change)


def raises(seq_lens: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda seq_lens: seq_lens.clamp(max=9), "hidden states of the replay differs"),
        (raises, "failed: an illegal memory access"),
    ],
)
def test_a_graph_that_is_wrong_at_great_lengths(run, monkeypatch, how, words):
    """A graph that is wrong only at great lengths passes at start-up; the sweep names every such
    graph and the batch with which it failed (trap 5)."""
    monkeypatch.setattr("minisrv.graph.cpu_tape.DIRECT", breaks_beyond(9, how))
    status, printed, report = run()
    assert status == 1
    assert failed(report) == DECODE
    assert "FULL 3 TOKENS on decode at length 40, 1, 39" in printed
    assert words in printed
    assert "17 graphs" in printed
    assert "6 FAILED" in printed
    assert not report["passed"]
    single = report["graphs"][-1]
    assert single["failures"][0]["batch"] == "decode at length 40"
    assert (single["largest_difference"] > 0) == ("differs" in words)


def test_tails_that_are_stale_only_behind_a_full_batch(run, monkeypatch):
    """Padding rows keep request indices of the step before, but only those that look like real ones
    (trap 4)."""
    fill = InputBuffers.prepare_inputs

    def keeps_the_tail(self, output, descriptor, epilogue_rows):
        tail = self.req_indices[len(output.rows) :].clone()
        attn = fill(self, output, descriptor, epilogue_rows)
        # The last request index is left out, because poison holds it.
        self.req_indices[len(output.rows) :] = tail.where(tail < self.sizes.num_req_indices - 1, 0)
        return attn

    monkeypatch.setattr(InputBuffers, "prepare_inputs", keeps_the_tail)
    status, printed, report = run("--max-num-seqs", "5", "--cudagraph-capture-sizes", "5")
    assert status == 1
    assert failed(report) == [
        "FULL 5 TOKENS alone",
        "PIECEWISE 5 HIDDEN",  # It fails by the epilogue that runs behind it.
        "FULL 5 HIDDEN",
        "FULL 5 TOKENS",
    ]
    assert "the replay behind a full batch changed" in printed


def test_rows_that_are_stale_only_behind_a_full_batch(run, monkeypatch, tape_holds_mixed_batches):
    """Where a graph holds mixed batches it pads rows; here padding rows keep their start from the
    step before (trap 4)."""
    flags = ("--cudagraph-mode", "full")
    status, _, report = run(*flags)
    mixed = [f"FULL {n} HIDDEN" for n in (16, 8, 4, 2, 1)]
    assert [graph["graph"] for graph in report["graphs"]] == EPILOGUES + mixed + DECODE
    assert (status, failed(report)) == (0, [])

    fill = InputBuffers._prepare_tokens

    def keeps_the_tail(self, output, *sizes):
        stale = self.query_start_loc[len(output.rows) + 1 :].clone()
        fill(self, output, *sizes)
        right = self.query_start_loc[len(output.rows) + 1 :]
        # Values that a trial has put there are left out.
        right.copy_(stale.where((stale > 0) & (stale < self.sizes.max_num_tokens), right))

    monkeypatch.setattr(InputBuffers, "_prepare_tokens", keeps_the_tail)
    status, printed, report = run(*flags)
    assert status == 1
    # The small batches of these graphs end before the stale rows begin.
    assert failed(report) == ["FULL 8 HIDDEN", "FULL 4 HIDDEN"]
    assert "behind a full batch" in printed


def test_an_address_that_moves(run, monkeypatch):
    """An address moves for lengths beyond a block only; the graph would read the old address (trap
    14)."""
    fill = InputBuffers.prepare_inputs

    def sometimes_fresh(self, output, descriptor, epilogue_rows):
        attn = fill(self, output, descriptor, epilogue_rows)
        if any(row.num_computed_tokens > 9 for row in output.rows):
            return replace(attn, seq_lens=attn.seq_lens.clone())
        return attn

    monkeypatch.setattr(InputBuffers, "prepare_inputs", sometimes_fresh)
    status, printed, _ = run()
    assert status == 1
    assert "attn.seq_lens changed since the capture" in printed


def test_what_does_not_start_is_not_swept(run, monkeypatch):
    """A model whose graphs fail at start-up is refused with that error, and no report is
    written."""
    monkeypatch.setattr("minisrv.graph.cpu_tape.DIRECT", breaks_beyond(1, raises))
    status, printed, report = run()
    assert (status, report) == (1, {})
    assert "minisrv: error: FULL 3 HIDDEN: the replay on a clean batch failed" in printed


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("stale-tail", "changed last_token of a request index"),
        ("live-padding", "the replay on a clean batch changed last_token of a request index"),
        ("address-drift", "hidden states of the replay differs from the eager run's"),
    ],
)
def test_a_graph_that_is_broken_on_purpose_is_found(run, fault, words):
    """One graph is broken behind its start-up; the sweep names it, and no other. That of 4 pads a
    batch of 3."""
    status, printed, report = run("--max-num-seqs", "4", "--break-graph", fault)
    assert status == 1
    assert f"BROKEN ON PURPOSE ({fault}): FULL 4 TOKENS" in printed
    assert failed(report) == ["FULL 4 TOKENS"]
    assert words in printed
    assert (report["broken"], report["passed"]) == (fault, False)


def test_nothing_is_broken_where_nothing_is_padded(run):
    flags = ("--max-num-seqs", "2", "--max-num-batched-tokens", "2")
    status, printed, _ = run(*flags, "--break-graph", "stale-tail")
    assert status == 1
    assert "there is no padding that could be broken" in printed


def test_a_mixed_graph_is_broken_where_decode_has_none(run):
    for fault in ("stale-tail", "live-padding", "address-drift"):
        _, _, report = run("--cudagraph-mode", "piecewise", "--break-graph", fault)
        assert failed(report) == ["PIECEWISE 16 HIDDEN"], fault


def test_interrupted_is_not_certified(run, monkeypatch):
    """An interrupted sweep exits with status 1, says so and writes no report."""

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(certify, "sweep", interrupt)
    status, printed, report = run()
    assert (status, report) == (1, {})
    assert "not every graph has been certified" in printed


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--max-model-len", "100000"], "use at most"),
        (["--kv-cache-memory", "1"], "give at least"),
        (["--device", "cpu", "--cudagraph-mode", "full"], "full-decode-only"),
        (["--max-num-seqs", "9", "--cudagraph-capture-sizes", "8"], "add 9"),
        (["--json", "nowhere/report.json"], "existing directory"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    checkpoint, flags, what, monkeypatch, capsys
):
    monkeypatch.setattr("minisrv.engine.builder.load_model", None)
    assert cli.main(["certify", "--model", checkpoint, *flags]) == 1
    assert what in capsys.readouterr().err


def process(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run `minisrv certify` in a process of its own, with `code` run before it."""
    command = f"import sys\nfrom minisrv.cli import main\n{code}\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", command, "certify", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_status_0_of_the_process(checkpoint, tmp_path):
    path = tmp_path / "report.json"
    done = process("--model", checkpoint, *FLAGS, "--json", str(path))
    assert (done.returncode, "all passed" in done.stdout) == (0, True), done.stderr
    assert json.loads(path.read_text())["passed"]


def test_status_1_of_the_process(checkpoint):
    code = (
        "from minisrv.graph import cpu_tape\n"
        "from tests.test_certify import breaks_beyond, raises\n"
        "cpu_tape.DIRECT = breaks_beyond(9, raises)"
    )
    done = process(checkpoint, *FLAGS, code=code)
    assert (done.returncode, "6 FAILED" in done.stdout) == (1, True), done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--enforce-eager"], "nothing to certify"),
        (["--json", "no/such/directory/report.json"], "not a file in an existing directory"),
        (["--json", "."], "not a file in an existing directory"),
        (["--max-num-seqs", "9", "--cudagraph-capture-sizes", "4"], "add 9 to the sizes"),
    ],
)
def test_wrong_settings_end_before_a_model_is_loaded(run, monkeypatch, flags, words):
    monkeypatch.setattr(certify, "build_engine", None)
    status, printed, _ = run(*flags)
    assert status == 1
    assert words in printed
