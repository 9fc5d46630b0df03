"""The documentation says what the server does."""

from __future__ import annotations

from docs import field_tables


def test_the_tables_of_fields_are_those_of_the_server() -> None:
    page = field_tables.PAGE.read_text()
    assert page == field_tables.with_tables(page), (
        "docs/api.md lists other fields than the server accepts: run `python docs/field_tables.py`"
    )
