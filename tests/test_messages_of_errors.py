"""Messages of errors repeat only a little of what somebody else has written, whatever it is."""

from __future__ import annotations

from typing import Any

import pytest

from minisrv.errors import MAX_SHOWN, RequestError, shown, truncated
from minisrv.request import SamplingParams

NESTED: Any = None
for _ in range(500):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        10**4000,
        NESTED,
        [["y" * 10**5] * 1000] * 1000,
        {str(i): i for i in range(10**5)},
    ],
)
def test_a_value_is_shown_briefly(value: Any) -> None:
    assert len(shown(value)) <= 2 * MAX_SHOWN + len("...")
    assert "..." in shown(value)


def test_a_value_that_is_short_is_shown_whole() -> None:
    value = {"a": "x" * (MAX_SHOWN - 2), "b": [1, 2.5, None]}
    assert shown(value) == repr(value)


def test_a_text_is_shown_to_its_limit() -> None:
    assert truncated("x" * MAX_SHOWN) == "x" * MAX_SHOWN
    assert truncated("x" * (MAX_SHOWN + 1)) == "x" * MAX_SHOWN + "..."
    assert truncated("abc", 2) == "ab..."


def test_a_text_steers_no_terminal() -> None:
    assert truncated("né\x1b[2J\r\u202e\nÜ") == "né\\x1b[2J\\r\\u202e\nÜ"


def test_a_parameter_of_any_length_makes_a_short_message() -> None:
    with pytest.raises(RequestError) as raised:
        SamplingParams(temperature="x" * 10**6)  # type: ignore[arg-type]
    assert len(raised.value.message) < 10 * MAX_SHOWN
