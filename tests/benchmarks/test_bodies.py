"""benchmarks/bodies.py: the bodies that it sends are as large as a server may read, and not so
large that they get a 413."""

from __future__ import annotations

import pytest

from benchmarks import bodies
from minisrv.server.app import DEFAULT_MAX_BODY_BYTES

LARGEST = [
    *("2 million ids", "a text to ids", "escapes", "escaped quotes", "590,000 floats"),
    *("300,000 unknown fields", "arguments of a million lists"),
]


@pytest.mark.parametrize("name", LARGEST)
def test_a_body_is_as_large_as_is_allowed_at_most(name: str) -> None:
    _, make = bodies.BODIES[name]
    assert 3_500_000 < len(make()) <= DEFAULT_MAX_BODY_BYTES


def test_a_body_that_is_not_known_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bodies.py", "--body", "none such", "minisrv serve"])
    with pytest.raises(SystemExit):
        bodies.main()
    assert "no body is called 'none such'; there are: a text of 3 MiB" in capsys.readouterr().err
