"""Stop strings: none of their text leaks, no other text is lost, and it does not matter how the
text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.text.stop import StopMatcher


def run(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    """The text that a matcher lets through, and whether it has stopped."""
    matcher = StopMatcher(stop)
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.stopped:
            return text, True
    return text + matcher.flush(), False


def reference(text: str, stop: list[str]) -> tuple[str, bool]:
    """The same by definition: the first prefix of the text that ends with a stop string decides."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_a_stop_string_across_pieces_does_not_leak() -> None:
    """In FastChat's bug 3883 the beginning of a stop string leaked into the stream."""
    matcher = StopMatcher(["</end>"])
    assert [matcher.push(p) for p in ("a</", "en", "d", ">b")] == ["a", "", "", ""]
    assert matcher.stopped


def test_the_stop_string_may_be_let_through() -> None:
    matcher = StopMatcher(["</end>"], include_stop=True)
    assert [matcher.push(p) for p in ("a</", "en", "d", ">b")] == ["a", "", "", "</end>"]
    assert matcher.stopped


def test_a_stop_string_that_comes_too_early_is_text() -> None:
    """A stop string that ends too early is text, and one that only begins early still ends the
    text."""
    matcher = StopMatcher(["aa"])
    assert matcher.push("xaaa", may_stop=False) == "xaa"
    assert not matcher.stopped
    assert matcher.push("a") == ""
    assert matcher.stopped


def test_what_turns_out_to_be_no_stop_string_is_let_go() -> None:
    matcher = StopMatcher(["</end>"])
    assert [matcher.push(p) for p in ("a</", "en", "x")] == ["a", "", "</enx"]


def test_only_the_suffix_that_may_begin_a_stop_string_is_held() -> None:
    assert StopMatcher(["abcd"]).push("xxabab") == "xxab"


def test_the_end_lets_go_of_everything() -> None:
    assert run(["ab", "c"], ["abcd"]) == ("abc", False)


def test_a_partial_match_that_restarts_inside_itself() -> None:
    assert run(list("aabaabaaa"), ["aabaaa"]) == ("aab", True)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(["cd", "bcd"], "a"), (["bcd", "cd"], "a"), (["bcde", "c"], "ab")],
)
def test_the_first_to_be_complete_wins_and_then_the_longest(stop: list[str], expected: str) -> None:
    assert run(["abcde"], stop) == (expected, True)


@given(
    st.lists(st.text("ab.", max_size=4), max_size=8),
    st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_pieces_do_not_matter(pieces: list[str], stop: list[str]) -> None:
    assert run(pieces, stop) == reference("".join(pieces), stop)


def test_what_follows_a_stop_string_can_be_had() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("a</e") == "a"
    assert matcher.push("nd>bc") == ""
    assert matcher.rest == "bc"
