"""Owners take turns in a queue, and a budget that is used up refills with time."""

from __future__ import annotations

from minisrv.text.fairness import FairQueue, TokenBucket


def test_owners_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a0", "a1", "a2", "b0", "c0", "b1"):
        queue.push(item[0], item)
    assert [queue.pop()[1] for _ in range(4)] == ["a0", "b0", "c0", "a1"]
    queue.push("d", "d0")
    queue.push("c", "c1")
    found = []
    while queue:
        found.append(queue.pop())
    assert found == [("b", "b1"), ("a", "a2"), ("d", "d0"), ("c", "c1")]


def test_what_is_used_up_comes_back_with_time() -> None:
    bucket = TokenBucket(30, 60)
    assert bucket.left(100) == 30
    bucket.consume(20, 100)
    bucket.consume(12, 104)
    assert bucket.left(104) == 0
    bucket.consume(3, 104)
    assert (bucket.left(104), bucket.left(108)) == (-3, -1)
    assert bucket.seconds_until(1, 104) == 8
    assert bucket.left(10_000) == 30, "no more is saved"
    assert bucket.seconds_until(1, 10_000) == 0
