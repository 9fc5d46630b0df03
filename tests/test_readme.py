"""The README says what the server does."""

from __future__ import annotations

from docs import field_tables


def test_the_tables_of_fields_are_those_of_the_server() -> None:
    readme = field_tables.README.read_text()
    assert readme == field_tables.with_tables(readme), (
        "README.md lists other fields than the server accepts: run `python docs/field_tables.py`"
    )
