"""The CPU tape that stands for a CUDA graph: what it records, what it refuses, and where results
lie in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.errors import GraphCaptureError
from minisrv.graph.cpu_tape import CPUTapeBackend, _lay_out, _out_variant, _Storage


def record(backend: CPUTapeBackend, *runs):
    """Capture each callable as one segment of one capture, and return the replays of the
    segments."""
    replays = []
    for run in runs:
        backend.begin()
        run()
        replays.append(backend.end())
    backend.finish()
    return replays


def test_replay_reads_and_writes_the_addresses_of_the_capture():
    x, out = torch.ones(4), torch.zeros(4)

    def run():
        return out.copy_((x * 2).sin() + x.view(2, 2).t().flatten())

    [replay] = record(CPUTapeBackend(), run)
    x.copy_(torch.arange(4.0))
    expected = (x * 2).sin() + x[[0, 2, 1, 3]]
    assert not torch.equal(out, expected)
    replay()
    assert torch.equal(out, expected)


def test_replay_runs_no_python_of_the_captured_code():
    calls, out = [], torch.zeros(1)
    [replay] = record(CPUTapeBackend(), lambda: (calls.append(1), out.add_(1)))
    replay()
    assert calls == [1]
    assert out.item() == 2


def test_views_are_not_replayed():
    """Operations that only make views cost nothing at replay: the tape holds the addition alone."""
    x, out = torch.ones(2, 6), torch.zeros(3, 4)
    [replay] = record(CPUTapeBackend(), lambda: out.add_(x.view(3, 4)[:, :].t().t()))
    assert len(replay.calls) == 1


def test_factories_and_in_place_operations_replay():
    out = torch.zeros(3)

    def run():
        total = torch.zeros(3)
        total += torch.arange(3)
        total.mul_(torch.full((3,), 2.0))
        out.copy_(total)

    [replay] = record(CPUTapeBackend(), run)
    for _ in range(2):
        replay()
        assert out.tolist() == [0, 2, 4]


def test_operations_without_out_variant_replay():
    """Operations replay that have no out= overload or several results: sort with two results, and
    frac and alias_copy."""
    x, out = torch.rand(8), torch.zeros(8)

    def run():
        values, order = torch.sort(x)
        out.copy_(values + order + torch.ops.aten.alias_copy(torch.frac(x)))

    [replay] = record(CPUTapeBackend(), run)
    x.copy_(torch.rand(8))
    replay()
    values, order = torch.sort(x)
    assert torch.equal(out, values + order + torch.frac(x))


def test_segments_of_one_capture_see_each_others_intermediates():
    """A tensor that crosses pieces, such as a residual, keeps its bytes to itself until the last
    piece has read them."""
    x, out = torch.ones(64), torch.zeros(64)
    kept: dict[str, torch.Tensor] = {}

    def first():
        kept["residual"] = x * 3

    def second():
        # This would take the residual's place in memory if that were free.
        noise = torch.full((64,), 100.0) * x
        out.copy_(kept["residual"] + noise)

    backend = CPUTapeBackend()
    pieces = record(backend, first, second)
    kept.clear()
    x.fill_(2)
    backend.arena[: backend.memory_used()].fill_(255)
    for piece in pieces:
        piece()
    assert torch.equal(out, torch.full((64,), 206.0))


def test_graphs_share_one_arena_and_survive_each_other():
    """A larger graph runs in the memory that a smaller one uses and the other way round, and both
    stay right (trap 7)."""
    backend = CPUTapeBackend()

    def graph(n):
        x, out = torch.ones(n), torch.zeros(n)
        [replay] = record(backend, lambda: out.copy_((x + 1) * (x + 2)))
        return x, out, replay

    large = graph(1000)
    arena = backend.arena.data_ptr()
    small = graph(10)
    for x, out, replay in (large, small, large, small):
        x.add_(1)
        replay()
        assert torch.equal(out, (x + 1) * (x + 2))
    assert backend.arena.data_ptr() == arena, "the smaller capture fits the larger one's arena"


def test_results_are_laid_out_by_liveness():
    """Results that are never needed at the same time share memory."""
    storages = [_Storage(nbytes=100, born=n, last_used=n + 1) for n in range(50)]
    assert _lay_out(storages) == 2 * 128


@settings(max_examples=200)
@given(data=st.data())
def test_random_programs_replay_as_they_run(data):
    """Random programs replay as they run: random operations over random earlier results, which are
    freed at random moments."""
    sizes = st.sampled_from([3, 17, 64, 300])
    inputs = [torch.rand(data.draw(sizes)) for _ in range(2)]
    steps = [
        (data.draw(st.integers(0, 4)), data.draw(st.integers(0, 30)), data.draw(st.integers(0, 30)))
        for _ in range(data.draw(st.integers(1, 14)))
    ]
    alive = data.draw(st.integers(1, 5))

    def program():
        results = list(inputs)
        for kind, left, right in steps:
            a, b = results[left % len(results)], results[right % len(results)]
            if kind == 0:
                results.append(a * 1.5 + b.mean())
            elif kind == 1:
                results.append(torch.cat((a, b))[::2])
            elif kind == 2:
                results.append(a.sort(descending=True).values)
            elif kind == 3:
                results.append(a.view(1, -1).t().matmul(b[:1].view(1, 1)).flatten())
            else:
                results.append((a.clone().add_(1).relu_(), b)[0])
            results = results[:2] + results[2:][-alive:]
        return results[-1]

    out = torch.zeros_like(program())
    backend = CPUTapeBackend()
    [replay] = record(backend, lambda: out.copy_(program()))
    for tensor in inputs:
        tensor.copy_(torch.rand_like(tensor))
    backend.arena[: backend.memory_used()].fill_(255)  # Bytes of 255 read as NaN.
    replay()
    assert torch.equal(out, program())


@pytest.mark.parametrize(
    ("what", "run"),
    [
        ("reads a value back", lambda x: x.sum().item()),
        ("reads a value back", lambda x: bool(x[0] > 0)),
        ("shape depends", lambda x: x.nonzero()),
        ("boolean index", lambda x: x[x > 0]),
        ("boolean index", lambda x: x[(x > 0).to(torch.uint8)]),
        ("boolean index", lambda x: x.__setitem__(x > 0, 1.0)),
        ("boolean index", lambda x: x.index_put((x > 0,), torch.tensor(1.0))),
        ("random numbers", lambda x: torch.rand_like(x)),
        ("random numbers", lambda x: x.bernoulli_()),
    ],
)
def test_refuses_what_a_graph_cannot_hold(what, run):
    backend = CPUTapeBackend()
    backend.begin()
    with pytest.raises(GraphCaptureError, match=what):
        run(torch.ones(4))
    backend.abandon()
    # The backend is usable again, and nothing is being recorded.
    x, out = torch.ones(2), torch.zeros(2)
    [replay] = record(backend, lambda: out.add_(x))
    assert len(replay.calls) == 1


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: torch.div(x, 3, rounding_mode="floor"),
        lambda x: torch.div(x, torch.full((8,), 3.0), rounding_mode="trunc"),
        lambda x: torch.round(x, decimals=1),
        lambda x: x.scatter(0, torch.arange(8), x + 1, reduce="multiply"),
        lambda x: x.sum(0, keepdim=True, dtype=torch.float64).float() + x,
        lambda x: torch.cat(torch.split_with_sizes_copy(x, [3, 5])[::-1]),
        lambda x: torch._foreach_add([x, x * 2], 1.0)[1],
        lambda x: x.index_put((torch.tensor([1, 3]),), torch.ones(2)),
    ],
)
def test_every_option_of_an_operation_is_replayed(compute):
    """Every option of an operation is replayed. An out= overload that lacks the option (div.out has
    no rounding_mode) gave other numbers."""
    x, out = torch.rand(8) * 10, torch.zeros(8)
    [replay] = record(CPUTapeBackend(), lambda: out.copy_(compute(x)))
    x.copy_(torch.rand(8) * 10)
    replay()
    assert torch.equal(out, compute(x))


def test_no_out_variant_loses_an_option():
    """Over all operations of aten: the out= variant that is called instead of an operation takes
    every argument that the operation was given."""
    settled = {"dtype", "layout", "device", "pin_memory", "memory_format"}
    found = 0
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in getattr(packet, "overloads", list)():
            op = getattr(packet, overload)
            if op._schema.is_mutable or (variant := _out_variant(op)) is None:
                continue
            found += 1
            given = {a.name for a in op._schema.arguments}
            taken = {a.name for a in variant[0]._schema.arguments}
            assert given - taken <= settled, (op, variant[0])
            required = {a.name for a in variant[0]._schema.arguments if not a.has_default_value()}
            assert required <= given | set(variant[1]), (op, variant[0])
    assert found > 500


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, w: x @ w,
        lambda x, w: w.T @ x,
        lambda x, w: x @ x,
        lambda x, w: x @ w.expand(2, 3, 4, 4),
        lambda x, w: torch.linalg.multi_dot([x, w, w, x]),
        lambda x, w: torch.einsum("i,ij,j->", x, w, x),
        lambda x, w: torch.nn.functional.linear(x, w),
        lambda x, w: torch.nn.functional.scaled_dot_product_attention(x[None], w, w),
    ],
)
def test_products_with_vectors(compute):
    """Products with vectors replay; torch computes them by way of `unsqueeze` and `squeeze_`, which
    change a tensor's view in place."""
    x, w = torch.rand(4), torch.rand(4, 4)
    out = torch.zeros_like(compute(x, w))
    [replay] = record(CPUTapeBackend(), lambda: out.copy_(compute(x, w)))
    for tensor in (x, w):
        tensor.copy_(torch.rand_like(tensor))
    replay()
    assert torch.equal(out, compute(x, w))


BECOMES = {
    "t_": lambda t, rest: t.squeeze_().t_() if t.ndim < 3 else t,
    "transpose_": lambda t, rest: t.transpose_(0, -1),
    "swapaxes_": lambda t, rest: t.swapaxes_(-1, 0),
    "swapdims_": lambda t, rest: t.swapdims_(0, t.ndim - 1),
    "unsqueeze_": lambda t, rest: t.unsqueeze_(1),
    "squeeze_": lambda t, rest: t.squeeze_(),
    "squeeze_.dim": lambda t, rest: t.squeeze_(0),
    "squeeze_.dims": lambda t, rest: t.squeeze_((0, 1)[: t.ndim]),
    "as_strided_": lambda t, rest: t.as_strided_((3, 2), (2, 1), 1),
    "detach_": lambda t, rest: t.detach_(),
    "resize_": lambda t, rest: t.resize_(2, 3),
    "resize_as_": lambda t, rest: t.resize_as_(rest.new_empty(3, 1)),
    "set_": lambda t, rest: t.set_(rest),
    "set_.storage": lambda t, rest: t.set_(rest.untyped_storage(), 1, (2, 3), (1, 2)),
    "data": lambda t, rest: setattr(t, "data", rest),
    "out": lambda t, rest: torch.add(rest[:1].clone(), 1, out=t.resize_(0)),
}
"""Operations that make a tensor another view in place, of its own memory or of other memory; each
can be applied to any tensor."""


@settings(max_examples=200)
@given(steps=st.lists(st.sampled_from([*BECOMES, "read", "write", "look"]), max_size=12))
def test_a_tensor_may_become_another_view(steps):
    """When a tensor becomes another view, operations recorded earlier see it as it was, and
    operations recorded later see it as it is then."""
    x, out = torch.rand(3, 4), torch.zeros(500)

    def program():
        told = [x.sum()]
        tensor, rest = x * 2, x + 1
        views = []
        for index, step in enumerate(steps):
            if step == "read":
                told.append((tensor * (index + 1)).flatten())
            elif step == "write":
                tensor.mul_(index + 0.5)
            elif step == "look":
                views.append(tensor[..., :1])
            else:
                BECOMES[step](tensor, rest)
        told += [part.flatten() for part in (tensor, rest, *views)]
        out.zero_()
        told = torch.cat([part.flatten() for part in told])
        out[: told.numel()].copy_(told)

    backend = CPUTapeBackend()
    [replay] = record(backend, program)
    x.copy_(torch.rand_like(x))
    backend.arena[: backend.memory_used()].fill_(255)  # Bytes of 255 read as NaN.
    replay()
    replayed = out.clone()
    program()
    assert torch.equal(replayed, out)


def test_every_operation_that_only_changes_a_view_is_tested():
    """`BECOMES` holds every operation that torch tags as changing only a view in place; its other
    in-place operations compute."""
    found = set()
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        name, _, overload = name.partition(".")
        if namespace == "aten" and hasattr(packet := getattr(torch.ops.aten, name), "overloads"):
            op = getattr(packet, overload or "default", None)
            if op is not None and torch.Tag.inplace_view in op.tags:
                found.add(name)
    assert found == {name.partition(".")[0] for name in BECOMES} - {"data", "out"}


def test_a_tensor_from_before_keeps_its_address():
    """A graph reads the address that it has read at capture, wherever the tensor's data are
    later."""
    x, out = torch.ones(4), torch.zeros(4)
    seen = x.view(4)
    [replay] = record(CPUTapeBackend(), lambda: out.copy_(x * 2))
    x.data = torch.full((4,), 100.0)
    seen.fill_(3)
    replay()
    assert out.tolist() == [6.0] * 4


@pytest.mark.parametrize(
    "run",
    [
        lambda x: torch.mul(x, 2, out=torch.empty(0)),
        lambda x: (x * 2).resize_(16),
        lambda x: (x * 2).resize_as_(torch.ones(9)),
    ],
)
def test_refuses_what_moves_a_tensor_under_it(run):
    """An operation that gives its argument other memory is refused at capture."""
    backend = CPUTapeBackend()
    backend.begin()
    with pytest.raises(GraphCaptureError, match="changed the size of its argument's memory"):
        run(torch.ones(2, 4))
    backend.abandon()


def affine(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Run an operation without an out variant, on a weight in oneDNN's own layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@pytest.fixture
def doubling() -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(2 * torch.eye(16))


def test_a_result_that_is_only_copied_goes_there_at_once(doubling):
    """A result that is only copied is written to the copy's target directly, also where the
    operation reads that target."""
    x = torch.ones(4, 16)
    [replay] = record(CPUTapeBackend(), lambda: x.copy_(affine(x, doubling)))
    assert len(replay.calls) == 1
    assert x.unique().tolist() == [2]
    replay()
    assert x.unique().tolist() == [4]


@pytest.mark.parametrize("late", [False, True], ids=["same segment", "next segment"])
def test_a_result_that_is_read_again_is_kept(doubling, late):
    x, copied, out = torch.ones(4, 16), torch.zeros(4, 16), torch.zeros(4, 16)
    results = []

    def first():
        results.append(affine(x, doubling))
        copied.copy_(results[0])
        if not late:
            second()

    def second():
        torch.add(results[0], 1, out=out)

    replays = record(CPUTapeBackend(), first, second if late else lambda: None)
    x.fill_(5)
    for replay in replays:
        replay()
    assert copied.unique().tolist() == [10]
    assert out.unique().tolist() == [11]


def test_a_tensor_without_an_address_is_refused_as_a_result():
    """A tensor in oneDNN's own layout has no address. It may be a constant of a graph, but as a
    result of the graph it would be another tensor at each replay, so that is refused."""
    backend = CPUTapeBackend()
    backend.begin()
    with pytest.raises(GraphCaptureError, match="own layout"):
        torch.ops.mkldnn._reorder_linear_weight(torch.eye(16))
    backend.abandon()
