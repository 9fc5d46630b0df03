"""The ladders of captured sizes and the dispatcher, over every batch up to the limits."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.cli import main
from minisrv.config import EngineConfig
from minisrv.core.coverage import coverage
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.graph_times import StepTime
from minisrv.core.ladder import (
    Ladders,
    build_ladders,
    decode_descriptor,
    ladders_of,
    pad_to_capture_size,
)
from minisrv.device_kind import CPU
from minisrv.errors import CoverageError
from minisrv.modes import (
    BatchDescriptor,
    BudgetReason,
    CUDAGraphMode,
    GraphKey,
    Reason,
    Stage,
    StageOutput,
)
from minisrv.tools.batch_answers import REASONS
from minisrv.tools.costs import BUDGET_REASONS
from minisrv.tools.plan import print_plan

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
limits = st.tuples(st.integers(1, 80), st.integers(0, 120)).map(lambda p: (p[0], p[0] + p[1]))
sizes = st.none() | st.lists(st.integers(1, 150), min_size=1, max_size=6).map(tuple)


def every_batch(ladders: Ladders) -> list[tuple[int, int, bool]]:
    """Return (tokens, requests, whether all are decodes) for every batch up to the limits."""
    decodes = [(n, n, True) for n in range(1, ladders.max_num_seqs + 1)]
    most = ladders.max_num_batched_tokens
    mixed = [
        (tokens, requests, False)
        for tokens in range(1, most + 1)
        for requests in {1, min(tokens, ladders.max_num_seqs)}
    ]
    return decodes + mixed


def holds_any(key: BatchDescriptor) -> bool:
    """Whether the graph of `key` can hold any batch: prefill, decodes or both."""
    return key.stage is Stage.MODEL and not key.uniform_decode


@given(
    mode=st.sampled_from(CUDAGraphMode),
    limits=limits,
    sizes=sizes,
    logits=st.booleans(),
    masked=st.booleans(),
)
def test_every_batch_gets_the_smallest_graph_that_holds_it(mode, limits, sizes, logits, masked):
    """Every batch up to the limits runs by the smallest captured graph that can hold it, and a
    batch without one runs eagerly without padding."""
    ladders = build_ladders(mode, *limits, sizes)
    dispatcher = Dispatcher(ladders)
    epilogues = {key for key in ladders.keys() if key[1].stage is Stage.EPILOGUE}  # noqa: SIM118
    keys = set(ladders.keys()) - epilogues
    for tokens, requests, decode in every_batch(ladders):
        found = dispatcher.dispatch(
            tokens,
            requests,
            query_len=1 if decode else None,
            needs_logits=logits,
            has_structured_output_requests=masked,
        )
        key = found.descriptor
        ends = key.output is not StageOutput.HIDDEN
        assert ends == (key.uniform_decode and not logits and not masked)
        if ends:
            assert found.epilogue is None, "the graph holds it"
        else:
            end, behind = found.epilogue
            assert behind.output is (StageOutput.LOGITS if logits else StageOutput.TOKENS)
            if end is NONE:
                assert not any(d.num_reqs >= requests for _, d in epilogues)
                assert behind.num_reqs == requests, "NONE never pads"
            else:
                assert found.epilogue in epilogues, "what is dispatched was captured"
                capture_sizes = [d.num_reqs for _, d in epilogues]
                assert behind.num_reqs == min(n for n in capture_sizes if n >= requests)
        if found.mode is NONE:
            assert key.num_tokens == tokens, "NONE never pads"
            # No captured graph could have held the batch.
            assert not any(d.num_tokens >= tokens for _, d in keys if decode or holds_any(d))
            continue
        assert (found.mode, key) in keys, "what is dispatched was captured"
        assert key.num_tokens >= tokens
        assert key.num_reqs is None or key.num_reqs >= requests
        alike = [d for _, d in keys if d.uniform_decode == key.uniform_decode]
        assert key.num_tokens == min(d.num_tokens for d in alike if tokens <= d.num_tokens)
        if key.uniform_decode:
            assert decode, "the requests say so"
            assert found.mode is FULL
            continue
        assert holds_any(key)
        assert found.mode is mode.mixed_mode
        assert (key.num_reqs is None) == (found.mode is PIECEWISE)
        if decode:
            assert found.reason is Reason.NO_FULL_GRAPH
            assert not any(d.uniform_decode for _, d in keys)


@given(
    mode=st.sampled_from(CUDAGraphMode),
    limits=limits,
    sizes=sizes,
    logits=st.booleans(),
    draw=st.randoms(use_true_random=False),
)
def test_a_graph_measured_to_be_cheaper_takes_the_place_of_the_smallest(
    mode, limits, sizes, logits, draw
):
    """Another graph is chosen only if its measured median time is more than 5% below the least time
    of the smallest graph that holds the batch."""
    ladders = build_ladders(mode, *limits, sizes)
    keys = [key for key in ladders.keys() if key[1].stage is Stage.MODEL]  # noqa: SIM118
    least = {key: draw.uniform(1, 2) for key in keys}
    times = {key: StepTime(ms, ms * draw.uniform(1, 1.1)) for key, ms in least.items()}
    # Epilogues take no time at all here: they are not steps, so the dispatcher may not choose one.
    times |= dict.fromkeys(set(ladders.keys()) - set(keys), StepTime(0.0, 0.0))
    plain, timed = Dispatcher(ladders), Dispatcher(ladders, times)
    output = StageOutput.HIDDEN if logits else StageOutput.TOKENS
    for tokens, requests, decode in every_batch(ladders):
        batch = {"query_len": 1 if decode else None, "needs_logits": logits}
        first = plain.dispatch(tokens, requests, **batch)
        found = timed.dispatch(tokens, requests, **batch)
        if first.mode is NONE:
            assert found == first, "nothing else holds it"
            continue
        before = least[first.mode, first.descriptor]
        others = [
            times[m, d].median_ms
            for m, d in keys
            if d.num_tokens >= first.descriptor.num_tokens
            and (holds_any(d) or (first.descriptor.uniform_decode and d.output is output))
        ]
        if min(others) >= 0.95 * before:
            assert found == first, "a difference of 5% is noise"
            continue
        assert found.reason is Reason.CHEAPER
        assert times[found.mode, found.descriptor].median_ms == min(others)
        assert found.descriptor.num_tokens >= tokens
        assert found.descriptor.num_reqs is None or found.descriptor.num_reqs >= requests
        if not holds_any(found.descriptor):
            assert decode
            assert found.descriptor.output is output


def test_the_coverage_of_a_timed_ladder_names_what_is_cheaper():
    """The coverage table names the batches that run by another graph because it was measured to be
    cheaper."""
    ladders = build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, 4, 4)
    times = dict.fromkeys(ladders.keys(), StepTime(1.0, 1.1))
    times[FULL, decode_descriptor(2, StageOutput.TOKENS)] = StepTime(1.2, 1.3)
    rows = [r for r in coverage(Dispatcher(ladders, times)) if r.reason is Reason.CHEAPER]
    assert [(r.kind, r.first, r.last, r.mode, r.padded_size) for r in rows] == [
        ("decode", 2, 2, PIECEWISE, 4)
    ]


def test_a_full_graph_of_a_mixed_rung_may_be_cheaper_for_decodes():
    ladders = build_ladders(FULL, 4, 4)
    times = dict.fromkeys(ladders.keys(), StepTime(1.0, 1.1))
    times[FULL, decode_descriptor(2, StageOutput.HIDDEN)] = StepTime(1.2, 1.3)
    times[FULL, BatchDescriptor(2, 2)] = StepTime(0.8, 0.9)
    batch = {"query_len": 1, "needs_logits": True}
    found = Dispatcher(ladders, times).dispatch(2, 2, **batch)
    assert (found.mode, found.descriptor) == (FULL, BatchDescriptor(2, 2))
    assert found.reason is Reason.CHEAPER


@given(mode=st.sampled_from(CUDAGraphMode), limits=limits, sizes=sizes)
def test_coverage_check_accepts_exactly_what_dispatch_covers(mode, limits, sizes):
    """`check_coverage` fails exactly if some decode batch would not run in the configured mode, and
    its error names those sizes and the size to add."""
    ladders = build_ladders(mode, *limits, sizes)
    dispatcher = Dispatcher(ladders)
    promised = ladders.mode.decode_mode
    gaps = [
        n
        for n in range(1, ladders.max_num_seqs + 1)
        if dispatcher.dispatch(n, n, query_len=1).mode is not promised
    ]
    if not gaps:
        ladders.check_coverage()
        return
    with pytest.raises(CoverageError) as caught:
        ladders.check_coverage()
    assert f"add {ladders.max_num_seqs} " in caught.value.message
    assert f"of {gaps[0]} to {gaps[-1]} requests" in caught.value.message


@given(mode=st.sampled_from(CUDAGraphMode), limits=limits)
def test_default_ladders_leave_no_gap_and_hold_their_exact_top(mode, limits):
    """The default captured sizes cover every decode batch, and the largest is exactly the limit
    (2048 tokens at most for mixed batches)."""
    ladders = build_ladders(mode, *limits)
    ladders.check_coverage()
    if ladders.decode:
        assert ladders.decode[-1] == ladders.max_num_seqs
    if ladders.mixed:
        assert ladders.mixed[-1] == min(2048, ladders.max_num_batched_tokens)


@pytest.mark.parametrize("mode", [FULL, CUDAGraphMode.FULL_AND_PIECEWISE])
@pytest.mark.parametrize("sizes", [None, (1, 5, 7, 40), (64,)])
def test_every_captured_size_is_reached_and_every_step_that_can_be_has_one(mode, sizes):
    """Over all small limits: a step has at most one row of each request, and a row at most the
    context, so larger sizes would be captured for nobody. Each size that is left is the smallest
    for some batch, and the default sizes hold the largest step exactly."""
    for seqs, context, extra in product(range(1, 7), range(1, 14), (0, 1, 9, 60)):
        ladders = build_ladders(mode, seqs, seqs + extra, sizes, max_model_len=context)
        most = min(seqs + extra, seqs * context)
        assert ladders.max_num_batched_tokens == most
        dispatcher = Dispatcher(ladders)
        mixed = [dispatcher.dispatch(n, 1, query_len=None) for n in range(1, most + 1)]
        used = {found.descriptor.num_tokens for found in mixed if found.mode is not NONE}
        assert used == set(ladders.mixed)
        if sizes is None:
            assert ladders.mixed[-1] == most
            ladders.check_coverage()
        decodes = [dispatcher.dispatch(n, n, query_len=1) for n in range(1, seqs + 1)]
        used = {d.descriptor.num_tokens for d in decodes if d.descriptor.uniform_decode}
        assert used == set(ladders.decode)


def test_the_context_changes_nothing_about_gaps():
    """So the launcher may look for them before it knows the model."""
    for seqs, context, top in product(range(1, 9), range(1, 9), range(1, 9)):
        for mode in CUDAGraphMode:
            known, unknown = (
                build_ladders(mode, seqs, 8, (top,), max_model_len=bound)
                for bound in (context, None)
            )
            assert covers(known) == covers(unknown)


def covers(ladders: Ladders) -> bool:
    try:
        ladders.check_coverage()
    except CoverageError:
        return False
    return True


@given(mode=st.sampled_from(CUDAGraphMode), limits=limits, sizes=sizes)
def test_coverage_table_says_what_dispatch_does(mode, limits, sizes):
    """The coverage table leaves out no batch size, and dispatch gives the mode and the reason that
    the table says."""
    ladders = build_ladders(mode, *limits, sizes)
    dispatcher = Dispatcher(ladders)
    seen = {"decode": 0, "mixed": 0}
    for row in coverage(dispatcher):
        assert row.first == seen[row.kind] + 1, "no batch is left out"
        seen[row.kind] = row.last
        for size in (row.first, row.last):
            decode = row.kind == "decode"
            query_len = 1 if decode else None
            found = dispatcher.dispatch(size, size if decode else 1, query_len=query_len)
            assert (found.mode, found.reason) == (row.mode, row.reason)
    assert seen == {"decode": ladders.max_num_seqs, "mixed": ladders.max_num_batched_tokens}


@pytest.mark.parametrize(
    ("mode", "decode", "tokens", "mode_found", "reason"),
    [
        ("full-and-piecewise", True, 5, FULL, Reason.PURE_DECODE),
        ("full-and-piecewise", False, 5, PIECEWISE, Reason.HAS_PREFILL),
        ("full-and-piecewise", False, 2050, NONE, Reason.ABOVE_LADDER),
        ("full-decode-only", True, 5, FULL, Reason.PURE_DECODE),
        ("full-decode-only", False, 5, NONE, Reason.NO_MIXED_GRAPH),
        ("piecewise", True, 5, PIECEWISE, Reason.NO_FULL_GRAPH),
        ("piecewise", False, 2050, NONE, Reason.ABOVE_LADDER),
        ("full", True, 5, FULL, Reason.PURE_DECODE),
        ("full", False, 5, FULL, Reason.HAS_PREFILL),
        ("full", False, 2050, NONE, Reason.ABOVE_LADDER),
        ("full-decode-only", True, 99, NONE, Reason.ABOVE_LADDER),
        ("none", True, 5, NONE, Reason.GRAPHS_OFF),
        ("none", False, 5, NONE, Reason.GRAPHS_OFF),
    ],
)
def test_reasons(mode, decode, tokens, mode_found, reason):
    dispatcher = Dispatcher(build_ladders(CUDAGraphMode(mode), 64, 4096))
    requests = tokens if decode else 1
    found = dispatcher.dispatch(tokens, requests, query_len=1 if decode else None)
    assert (found.mode, found.reason) == (mode_found, reason)


@given(limits=limits, mode=st.sampled_from(list(CUDAGraphMode)), sizes=sizes)
def test_a_covering_ladder_holds_every_batch(limits, mode, sizes):
    """Every batch that a graph of the whole ladder holds is held by one of the covering ladder, of
    the same kind. It is padded to at most four times its size where the ladder is as dense, and the
    largest and the smallest size are there exactly."""
    ladders = build_ladders(mode, *limits, sizes)
    covering = ladders.covering()
    assert set(covering.keys()) <= set(ladders.keys())
    assert covering.eager_sizes == ladders.eager_sizes
    for few, all_ in (
        (covering.decode, ladders.decode),
        (covering.mixed, ladders.mixed),
        (covering.epilogues, ladders.epilogues),
    ):
        assert (few[:1], few[-1:]) == (all_[:1], all_[-1:])
        for size in range(1, all_[-1] + 1 if all_ else 1):
            padded, least = pad_to_capture_size(few, size), pad_to_capture_size(all_, size)
            assert padded is not None
            assert padded == least or padded <= 4 * size
    whole, first = Dispatcher(ladders), Dispatcher(ladders, in_service=covering.keys())
    assert not _missing(whole, ladders)
    missing = _missing(first, ladders)
    assert missing <= set(ladders.keys()) - set(covering.keys())
    # It does not matter in which order the others come.
    ahead = Dispatcher(ladders, in_service={*covering.keys(), *missing})
    assert not _missing(ahead, ladders)


def _missing(dispatcher: Dispatcher, ladders: Ladders) -> set[GraphKey]:
    """Dispatch every batch, check that each runs by a graph in service wherever the ladders have
    one for it, and return the keys that are missed."""
    whole, missing = Dispatcher(ladders), set()
    for tokens, requests, decode in every_batch(ladders):
        for logits in (False, True):
            query_len = 1 if decode else None
            found = dispatcher.dispatch(tokens, requests, query_len=query_len, needs_logits=logits)
            best = whole.dispatch(tokens, requests, query_len=query_len, needs_logits=logits)
            assert found.mode is best.mode
            stages = list(zip(found.stages, best.stages, strict=True))
            for (runtime, key), (_, least) in stages:
                assert runtime is NONE or (runtime, key) in dispatcher.in_service
                assert key.num_tokens >= least.num_tokens
                assert replace(key, num_tokens=0, num_reqs=0) == replace(
                    least, num_tokens=0, num_reqs=0
                )
            assert found.missing == tuple(key for was, key in stages if was != key)
            is_missing = best.key in found.missing
            assert found.reason is (Reason.SIZE_MISSING if is_missing else best.reason)
            missing |= set(found.missing)
    return missing


@pytest.mark.parametrize("mode", [m for m in CUDAGraphMode if m is not NONE])
def test_batches_run_whichever_graphs_are_taken_out_of_service(mode: CUDAGraphMode) -> None:
    """Whatever is left in service, a batch runs by a graph that holds it, or eagerly and then
    without padding; a graph of its kind goes before one for mixed batches."""
    ladders = build_ladders(mode, 12, 24)
    keys, draw = ladders.keys(), random.Random(mode.value)
    for _ in range(60):
        left = set(draw.sample(keys, draw.randint(0, len(keys))))
        dispatcher = Dispatcher(ladders, in_service=left)
        for count in range(1, 13):
            for query_len, logits in ((1, False), (1, True), (None, False)):
                tokens = count if query_len else 2 * count
                found = dispatcher.dispatch(tokens, count, query_len=query_len, needs_logits=logits)
                for runtime, key in found.stages:
                    size = count if key.stage is Stage.EPILOGUE else tokens
                    if runtime is NONE:
                        assert key.num_tokens == size
                    else:
                        assert (runtime, key) in left
                        assert key.num_tokens >= size
                assert (found.reason is Reason.SIZE_MISSING) <= bool(found.missing)
                own = [k for m, k in left if k.stage is Stage.MODEL and k.uniform_decode]
                output = StageOutput.HIDDEN if logits else StageOutput.TOKENS
                if query_len and any(k.num_tokens >= count and k.output is output for k in own):
                    assert found.descriptor.uniform_decode
                if found.mode is NONE and ladders.mixed and tokens <= ladders.mixed[-1]:
                    assert not any(
                        k.num_tokens >= tokens
                        for _, k in left
                        if k.stage is Stage.MODEL and not k.uniform_decode
                    )


def test_the_covering_ladders_of_the_defaults():
    """The sizes with which a server with default settings is ready, on a CPU and on a GPU."""
    for most, tokens, decode, mixed in (
        (64, 512, (1, 8, 32, 64), (1, 8, 32, 128, 512)),
        (256, 8192, (1, 8, 32, 128, 256), (1, 8, 32, 128, 512, 2048, 8192)),
        (1, 512, (1,), (1, 8, 32, 128, 512)),
    ):
        covering = build_ladders(FULL, most, tokens, max_default_mixed=8192).covering()
        assert (covering.decode, covering.mixed) == (decode, mixed)
        assert covering.epilogues == decode


@given(limits=limits, mode=st.sampled_from(list(CUDAGraphMode)), sizes=sizes)
def test_eager_sizes_continue_the_mixed_ladder(limits, mode, sizes):
    """Together with the mixed sizes they ascend to the largest step, and there are few of them."""
    ladders = build_ladders(mode, *limits, sizes)
    filled = [*ladders.mixed, *ladders.eager_sizes]
    assert filled == sorted(set(filled))
    assert filled[-1] >= ladders.max_num_batched_tokens
    assert len(ladders.eager_sizes) <= 24
    for size in ladders.eager_sizes:
        assert Dispatcher(ladders).dispatch(size, 1, query_len=None).mode is NONE


def test_one_token_prompt_is_no_decode():
    """A one-token prompt has the shape of a decode (vllm#26892); the dispatcher goes by what the
    request says it is and not by its shape."""
    dispatcher = Dispatcher(build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, 8, 64))
    assert dispatcher.dispatch(1, 1, query_len=None).mode is PIECEWISE


def test_enforce_eager_captures_nothing():
    config = EngineConfig(enforce_eager=True, cudagraph_capture_sizes=(1,))
    assert ladders_of(CPU.resolve(config)).keys() == []


def test_a_full_graph_of_a_mixed_rung_holds_as_many_rows_as_its_tokens_can_have():
    keys = build_ladders(FULL, 12, 64).keys()
    assert {mode for mode, _ in keys} == {FULL}
    rows = {key.num_tokens: key.num_reqs for _, key in keys if holds_any(key)}
    assert rows == {64: 12, 48: 12, 32: 12, 16: 12, 8: 8, 4: 4, 2: 2, 1: 1}


def test_largest_graphs_are_captured_first():
    for configured in (CUDAGraphMode.FULL_AND_PIECEWISE, FULL):
        keys = build_ladders(configured, 64, 512).keys()
        kinds = {(d.uniform_decode, d.stage) for _, d in keys}
        assert len(kinds) == 3
        for kind in kinds:
            tokens = [d.num_tokens for _, d in keys if (d.uniform_decode, d.stage) == kind]
            assert tokens == sorted(tokens, reverse=True)
        first = [d.stage is Stage.MODEL for _, d in keys]
        assert first == sorted(first), "epilogues before the steps that they end"


def run_plan(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minisrv.cli", "plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_plan_prints_the_table():
    done = run_plan("--max-num-seqs", "12", "--cudagraph-capture-sizes", "1", "4,12", "64")
    assert done.returncode == 0
    assert "5-12 requests" in done.stdout
    assert "513" not in done.stdout
    assert "above_ladder" in done.stdout


def test_plan_needs_no_device_to_say_what_full_would_capture():
    done = run_plan("--cudagraph-mode", "full", "--max-num-seqs", "12")
    assert done.returncode == 0, done.stderr
    assert "\n46 graphs: decode 10 FULL, mixed 26 FULL, epilogue 10 FULL.\n" in done.stdout
    assert "\nA step has at most 8192 tokens; ITL target 32 decode steps, as " in done.stdout
    assert "PIECEWISE" not in done.stdout


@pytest.mark.parametrize("measure", [(), ("--measure",)])
@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--max-model-len", "100000"), "use at most 2048"),
        (("--device", "cpu", "--cudagraph-mode", "full"), "full-decode-only"),
    ],
)
def test_plan_refuses_what_serve_does(flags, what, measure, monkeypatch, capsys):
    """`plan` refuses settings that `serve` refuses, before any weights are read."""
    monkeypatch.setattr("minisrv.engine.builder.load_model", None)
    assert main(["plan", *measure, *flags]) == 1
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("mode", list(CUDAGraphMode))
def test_plan_explains_each_of_its_words_and_no_other(
    mode: CUDAGraphMode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    print_plan(EngineConfig(cudagraph_mode=mode, max_num_seqs=8, max_num_batched_tokens=4096))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    legend = printed.split("┘\n")[-1].partition("\nCompilation ")[0]
    explained = {re.split(r"\s{2,}", line)[0] for line in legend.splitlines()} - {""}
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    said = {word for row in rows if row for word in (row[0], row[2], row[5])} | {"runs as"}
    assert explained == said | ({"epilogue"} if ", epilogue " in printed else set())
    assert REASONS.keys() == set(Reason)


def test_a_measured_plan_says_what_each_graph_costs():
    """And, with a target, what steps are predicted to cost, and the budgets that follow."""
    limits = ("--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--itl-target-ms", "50")
    done = run_plan("--measure", *limits)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "A step has at most 32 tokens; ITL target 50.0 ms." in lines
    ends = ("│ tokens ", "│ logits ", "│ hidden states ")
    costs = [line for line in lines if any(end in line for end in ends)]
    assert len(costs) == 14
    for line in costs:
        *_, milliseconds, mebibytes, _ = (cell.strip() for cell in line.split("│"))
        assert float(milliseconds) > 0
        assert float(mebibytes) >= 0
    assert any(float(line.split("│")[-2]) > 0 for line in costs)
    predicted = [
        line for line in lines if line.startswith(("│ mixed ", "│ decode ")) and "%" in line
    ]
    assert {line.split("│")[3].strip() for line in predicted} == {"PIECEWISE", "FULL"}
    assert all(float(line.split("│")[8]) > 0 for line in predicted)
    assert any("predictions differ from the measured times by" in line for line in lines)
    assert BUDGET_REASONS.keys() == set(BudgetReason)
    assert "14 graphs take" in lines[-1]


def test_plan_exits_1_and_names_the_missing_size():
    """`plan` exits with 1 if a decode batch has no full graph: with max_num_seqs=100, batches of 97
    to 100 requests ran PIECEWISE without a word (vllm#57355)."""
    done = run_plan("--max-num-seqs", "100", "--cudagraph-capture-sizes", "1,2,4,8,96")
    assert done.returncode == 1
    assert "97 to 100 requests" in done.stderr
    assert "add 100" in done.stderr
