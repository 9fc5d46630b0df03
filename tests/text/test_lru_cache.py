"""The entries that a cache with bounded room keeps."""

from __future__ import annotations

from minisrv.text.lru_cache import LRUCache


def test_what_was_asked_for_longest_ago_makes_room() -> None:
    memory: LRUCache[str, int] = LRUCache(max_weight=3, min_weight=0)
    for number, key in enumerate("abc"):
        memory.add(key, number, 1)
    assert memory.get("a") == 0
    memory.add("d", 3, 2)
    assert [memory.get(key) for key in "abcd"] == [0, None, None, 3]


def test_as_many_as_weigh_the_least() -> None:
    """Each entry counts with at least `min_weight`, so that even empty ones are bounded."""
    memory: LRUCache[int, int] = LRUCache(max_weight=10, min_weight=1)
    for number in range(100):
        memory.add(number, number, 0)
    assert [number for number in range(100) if memory.get(number) is not None] == [*range(90, 100)]


def test_what_comes_again_counts_once() -> None:
    memory: LRUCache[str, int] = LRUCache(max_weight=2, min_weight=0)
    memory.add("a", 0, 1)
    for number in range(100):
        memory.add("b", number, 1)
    assert (memory.get("a"), memory.get("b")) == (0, 99)


def test_what_there_is_no_room_for_moves_nothing_out() -> None:
    memory: LRUCache[str, int] = LRUCache(max_weight=2, min_weight=0)
    memory.add("a", 0, 1)
    memory.add("b", 1, 3)
    assert (memory.get("a"), memory.get("b")) == (0, None)


def test_what_is_forgotten_makes_room_and_what_has_replaced_it_stays() -> None:
    memory: LRUCache[str, object] = LRUCache(max_weight=2, min_weight=0)
    old, new, other = object(), object(), object()
    memory.add("a", old, 2)
    memory.remove("a", old)
    memory.remove("a", old)
    assert memory.get("a") is None
    memory.add("a", new, 1)
    memory.remove("a", old)
    memory.add("b", other, 1)
    assert (memory.get("a"), memory.get("b")) == (new, other)
