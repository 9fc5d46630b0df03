"""The prefix cache: which blocks are found, which are not, and which are evicted. That the blocks
found are the right ones in every interleaving is shown in test_scheduler.py."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minisrv.core import request_state
from minisrv.core.budget import PrefillBudget
from minisrv.core.kv_cache import BlockPool, hash_block
from minisrv.core.scheduler import Scheduler
from minisrv.core.step import SchedulerOutput
from minisrv.request import EngineOutput, EngineRequest, SamplingParams

BLOCK = 4
TEXT = list(range(100, 140))


class Pool(RuleBasedStateMachine):
    """Holders of blocks that come and go, compared with a plain record of the hash that each block
    keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7, BLOCK)
        self.holders: list[tuple[list[int], list[bytes]]] = []
        self.keeps: dict[int, bytes] = {}
        self.freed: list[int] = list(range(1, 7))
        """The free blocks, the least recently used first."""

    @precondition(lambda self: self.pool.num_free >= 3)
    @rule(names=st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=3))
    def begin(self, names: list[bytes]) -> None:
        """Find a cached prefix of a chain of hashes, take new blocks for the rest, and enter those
        into the prefix cache."""
        chain = [b"/".join(names[: i + 1]) for i in range(len(names))]
        found = self.pool.get_cached_blocks(chain)
        assert [self.keeps[block] for block in found] == chain[: len(found)]
        if len(found) < len(chain):
            assert chain[len(found)] not in self.keeps.values()
        for block in found:
            self.pool.touch(block)
            if block in self.freed:
                self.freed.remove(block)
        blocks = list(found)
        for name in chain[len(found) :]:
            blocks.append(self.pool.allocate())
            assert blocks[-1] == self.freed.pop(0), "not the least recently used"
            self.keeps.pop(blocks[-1], None)
            self.pool.cache_full_block(blocks[-1], name)
            if name not in self.keeps.values():
                self.keeps[blocks[-1]] = name
        self.holders.append((blocks, chain))

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def take_one_without_publishing(self) -> None:
        block = self.pool.allocate()
        assert block == self.freed.pop(0)
        self.keeps.pop(block, None)
        self.holders.append(([block], []))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        blocks, _ = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        for block in reversed(blocks):
            self.pool.free(block)
            if not any(block in others for others, _ in self.holders):
                self.freed.append(block)

    @invariant()
    def counts_and_maps_agree(self) -> None:
        self.pool.check_integrity(self.holders)
        assert self.pool.num_free == len(self.freed)
        assert self.pool.num_used == len({block for blocks, _ in self.holders for block in blocks})
        for block, name in self.keeps.items():
            assert self.pool.get_cached_blocks([name]) == [block]


TestPool = Pool.TestCase


def test_what_a_hash_depends_on():
    """A block's hash depends on the cache key, the salt, the hash of the block before it and its
    token ids, and no two different inputs run together."""
    hashes = [
        hash_block((None, None), None, [1, 23]),
        hash_block((None, None), None, [12, 3]),
        hash_block((None, None), None, [1, 2, 3]),
        hash_block((None, ""), None, [1, 23]),
        hash_block((None, "a"), None, [1, 23]),
        hash_block((None, "1"), None, [1, 23]),
        hash_block((1, None), None, [1, 23]),
        hash_block((1, "1"), None, [1, 23]),
        hash_block((11, None), None, [1, 23]),
        hash_block((None, "11"), None, [1, 23]),
        hash_block((None, None), b"a", [1, 23]),
        hash_block((None, "a"), b"", [1, 23]),
    ]
    assert len(set(hashes)) == len(hashes)
    salt = (1, "a")
    assert hash_block(salt, hashes[0], [5]) == hash_block((1, "a"), hashes[0], [5])
    assert all(len(name) == 32 for name in hashes)


# ---- through the scheduler -----------------------------------------------------------------------


class Run:
    """A scheduler for which every sampled token is 2; the test decides step by step how many steps
    are launched ahead."""

    def __init__(self, blocks: int = 40, *, budget: int = 64, **others: int) -> None:
        settings = {"max_num_seqs": 4, "max_model_len": 64, "max_waiting": 100, **others}
        self.scheduler = Scheduler(BlockPool(blocks, BLOCK), PrefillBudget(budget), **settings)

    def add(self, name: str, prompt: list[int], most: int = 3, **others: Any) -> None:
        params = SamplingParams(max_tokens=most)
        request = EngineRequest(request_id=name, prompt_token_ids=prompt, params=params, **others)
        self.scheduler.add(request, seed=0)

    def schedule(self) -> SchedulerOutput:
        step = self.scheduler.schedule()
        assert step is not None
        self.scheduler.check_integrity()
        return step

    def retire(self, step: SchedulerOutput) -> list[EngineOutput]:
        outputs = self.scheduler.update(step.step_id, [[2]] * len(step.rows))
        self.scheduler.check_integrity()
        return outputs

    def finish(self) -> list[EngineOutput]:
        """Run everything that is left, each step retired before the next is scheduled."""
        outputs = []
        while self.scheduler.has_work:
            outputs += self.retire(self.schedule())
        return outputs

    def start(self, name: str, prompt: list[int], **others) -> int:
        """Add a request, run it to its end, and return the position at which its prefill
        started."""
        self.add(name, prompt, **others)
        step = self.schedule()
        [row] = [row for row in step.rows if row.request_id == name]
        assert not row.is_decode
        assert row.token_ids == prompt[row.num_computed_tokens :][: row.num_tokens]
        first, *rest = [*self.retire(step), *self.finish()]
        assert first.num_cached_tokens == row.num_computed_tokens
        assert all(event.num_cached_tokens == 0 for event in rest)
        return row.num_computed_tokens


@pytest.mark.parametrize(
    ("length", "start"),
    [
        pytest.param(3, 0, id="no full block"),
        pytest.param(4, 0, id="one block: its last token is computed, and not into it"),
        pytest.param(5, 4, id="one token behind a block"),
        pytest.param(11, 8, id="some tokens behind a block"),
        pytest.param(12, 8, id="full hit: the last block is computed again"),
    ],
)
def test_the_second_of_two_equal_prompts_computes_its_tail(length, start):
    run = Run()
    assert run.start("a", TEXT[:length]) == 0
    assert run.start("b", TEXT[:length]) == start
    assert run.scheduler.prefix_cache_queries == 2 * length
    assert run.scheduler.prefix_cache_hits == start


def test_a_tail_of_one_token_is_prefill():
    """Trap 6: the tail of a prompt behind a cached prefix may be one token long and so have the
    shape of a decode, but it is prefill."""
    run = Run()
    run.start("a", TEXT[:9])
    run.add("b", TEXT[:9])
    step = run.schedule()
    assert [(row.num_computed_tokens, row.num_tokens) for row in step.rows] == [(8, 1)]
    assert step.query_len is None


def test_a_prompt_goes_on_where_another_differs():
    run = Run()
    run.start("a", TEXT[:16])
    assert run.start("b", [*TEXT[:10], *TEXT[:10]]) == 8
    assert run.start("c", TEXT[4:16]) == 0, "the same tokens at another place are another prefix"


def test_an_answer_is_found_by_the_next_turn():
    """The next turn of a conversation finds the answer in the cache, except for its last token,
    whose cache entry no step has computed."""
    run = Run()
    run.start("a", TEXT[:6], most=7)  # 12 of the 13 tokens have cache entries.
    assert run.start("b", [*TEXT[:6], *[2] * 7, 5, 5, 5, 5]) == 12
    run.start("c", TEXT[20:26], most=6)  # 11 of the 12 tokens have cache entries.
    assert run.start("d", [*TEXT[20:26], *[2] * 6, 5]) == 8


def test_a_running_request_shares_its_blocks():
    run = Run()
    run.add("a", TEXT[:9])
    run.retire(run.schedule())
    used = run.scheduler.block_pool.num_used
    run.add("b", TEXT[:10])
    step = run.schedule()
    assert run.scheduler.block_pool.num_used == used + 1
    a, b = run.scheduler.running
    assert a.blocks[:2] == b.blocks[:2]
    assert [block for index, _, block in step.new_blocks if index == b.req_index] == b.blocks
    run.scheduler.abort("a")
    run.retire(step)
    run.scheduler.abort("b")
    assert run.scheduler.block_pool.num_used == 0


def test_keys_and_salts_keep_requests_apart():
    """Requests share cached blocks only if both their cache key and their cache salt are equal."""
    run = Run()
    salts = [(None, None), (None, "x"), (None, "y"), (0, None), (1, None), (1, "x"), (1, "0")]
    for times, start in enumerate((0, 8)):
        starts = [
            run.start(f"{times} {key} {salt}", TEXT[:9], api_key_index=key, cache_salt=salt)
            for key, salt in salts
        ]
        assert starts == [start] * len(salts)


def test_nothing_is_found_or_hashed_when_it_is_off(monkeypatch):
    monkeypatch.setattr(request_state, "hash_block", None)
    run = Run(enable_prefix_caching=False)
    assert [run.start("a", TEXT[:9]), run.start("b", TEXT[:9])] == [0, 0]
    assert run.scheduler.prefix_cache_queries == run.scheduler.prefix_cache_hits == 0


def starts(step: SchedulerOutput) -> dict[str, int]:
    return {row.request_id: row.num_computed_tokens for row in step.rows}


def test_a_block_is_found_once_its_step_has_retired():
    """A block cannot be found in the step that fills it, whose rows run in no order, nor in the
    next one if that is launched ahead."""
    run = Run(budget=10)
    run.add("a", TEXT[:20])
    first = run.schedule()
    second = run.schedule()
    run.retire(first)
    run.add("b", TEXT[:9])
    assert starts(second) == {"a": 10}
    third = run.schedule()
    assert starts(third) == {"a": 20, "b": 8}
    run.retire(second)
    run.retire(third)
    run.add("c", TEXT[:20])
    assert starts(run.schedule())["c"] == 16


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("target", [float("inf"), 1e6])
def test_choices_of_one_prompt_compute_it_once(steps_ahead, target):
    """Requests with one prompt that come together, as the `n` choices of a request do, share its
    blocks. Each of them once computed the whole prompt, and kept it in blocks of its own."""
    budget = PrefillBudget(200, predict_ms=lambda num_tokens, work: 1.0, itl_target_ms=target)
    run = Run(max_num_seqs=8)
    run.scheduler.budget = budget
    for index in range(6):
        run.add(f"choice {index}", TEXT[:22], most=8)
    run.add("other", TEXT[20:40], most=1)
    steps: list[SchedulerOutput] = []
    in_flight: deque[SchedulerOutput] = deque()
    most = 0
    while run.scheduler.has_work:
        while len(in_flight) <= steps_ahead and (step := run.scheduler.schedule()) is not None:
            in_flight.append(step)
            steps.append(step)
        run.retire(in_flight.popleft())
        most = max(most, run.scheduler.block_pool.num_used)
        run.scheduler.check_integrity()
    computed = sum(step.num_tokens - step.num_decodes for step in steps)
    assert computed == 22 + 5 * 2 + 20, "all of the first, and of the others the last tokens"
    assert most <= 5 + 6 * 3 + 5
    admitted = [new.req_index for step in steps for new in step.new_reqs]
    assert admitted == [1, 2, 3, 4, 5, 6, 7], "first come, first served"


def test_who_waits_for_a_prompt_goes_on_when_it_is_aborted():
    run = Run(budget=8)
    run.add("a", TEXT[:24])
    run.retire(run.schedule())
    run.add("b", TEXT[:24])
    second = run.schedule()
    assert starts(second) == {"a": 8}
    run.scheduler.abort("a")
    assert starts(run.schedule()) == {"b": 8}, "of the step in flight nothing can be found"


def test_an_aborted_request_leaves_what_had_been_computed():
    """Blocks of a chunk in flight at the abort are not found; blocks of chunks that have retired
    are correct and stay in the cache."""
    run = Run(budget=8)
    run.add("a", TEXT[:24])
    first, second = run.schedule(), run.schedule()
    run.retire(first)
    run.scheduler.abort("a")
    run.retire(second)
    assert run.scheduler.block_pool.num_used == 0
    assert run.start("b", TEXT[:24]) == 8


def test_the_tail_is_evicted_before_the_head():
    """The last blocks of a cached prompt are evicted first, so that its beginning can still be
    found."""
    run = Run(blocks=8)
    run.start("a", TEXT[:17], most=1)  # This takes four full blocks and the beginning of a fifth.
    # This takes the two blocks that were left, and that fifth one.
    run.start("b", TEXT[20:32], most=1)
    assert run.start("a", TEXT[:17], most=1) == 16
    run.start("c", [1] * 8, most=1)
    assert run.start("a", TEXT[:17], most=1) == 16, "b was not used since, so it went first"
    run.start("d", [3] * 24, most=1)  # This takes all blocks but one.
    assert run.start("a", TEXT[:17], most=1) == 4


def test_what_is_found_but_held_by_nobody_counts_as_taken():
    """A cached block that no request holds is on the free list, so it must be counted as taken when
    a request finds it: else the newcomer would be admitted to blocks that are not there."""
    run = Run(blocks=7, max_model_len=24)
    run.start("first", TEXT[:17], most=1)
    run.add("old", [1] * 4, most=9)
    run.retire(run.schedule())
    assert run.scheduler.block_pool.num_free == 5
    # It needs five blocks, four of which are found in the cache and are free.
    run.add("new", TEXT[:17], most=1)
    assert starts(run.schedule()) == {"old": 4}


@pytest.mark.parametrize(("blocks", "admitted"), [(7, False), (8, True)])
def test_what_others_hold_is_not_taken(blocks, admitted):
    """A prompt that shares all but its tail with a running request needs one new block, and is
    admitted only if one more is left for each running request."""
    run = Run(blocks=blocks, max_model_len=24)
    run.add("old", TEXT[:17], most=3)
    run.retire(run.schedule())
    assert run.scheduler.block_pool.num_free == blocks - 6
    run.add("new", TEXT[:17], most=3)
    assert ("new" in starts(run.schedule())) is admitted


def test_a_block_is_hashed_once(monkeypatch):
    """A block is not hashed again on every step, nor while its request waits at the head of the
    queue."""
    calls: Counter[tuple[int, ...]] = Counter()

    def counts(salt, parent, token_ids):
        calls[tuple(token_ids)] += 1
        return hash_block(salt, parent, token_ids)

    monkeypatch.setattr(request_state, "hash_block", counts)
    run = Run(max_num_seqs=1)
    run.add("a", TEXT[:21], most=20)
    run.add("b", TEXT[20:40], most=1)
    run.retire(run.schedule())
    assert set(calls) == {tuple(TEXT[i : i + 4]) for i in range(0, 20, 4)}, "b is not looked at"
    run.finish()
    assert sum(calls.values()) == 10 + 5
    assert max(count for ids, count in calls.items() if ids != (2,) * 4) == 1
