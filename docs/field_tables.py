"""Writes the tables of request fields in docs/api.md from the models that check requests.

    python docs/field_tables.py

A test (tests/test_readme.py) fails if the tables in the page are not up to date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minisrv.server.anthropic_requests import CountTokensRequest, MessagesRequest
from minisrv.server.request_schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from minisrv.server.responses_requests import ResponsesRequest
from minisrv.server.strict import RequestBody

PAGE = Path(__file__).with_name("api.md")
SECTIONS: dict[str, dict[str, type[RequestBody]]] = {
    "fields": {"completions": CompletionRequest, "chat": ChatCompletionRequest},
    "fields of embeddings": {"embeddings": EmbeddingRequest},
    "fields of messages": {"messages": MessagesRequest, "count_tokens": CountTokensRequest},
    "fields of responses": {"responses": ResponsesRequest},
}
"""The endpoints whose fields share their tables, by the marker around the tables."""


def tables(endpoints: dict[str, type[RequestBody]]) -> str:
    """Return both tables of some endpoints: of the supported fields, and of those that are known
    but refused."""
    documents = {name: kind.model_json_schema() for name, kind in endpoints.items()}
    supported: dict[str, dict[str, str]] = {}
    refused: dict[str, dict[str, str]] = {}
    about: dict[str, dict[str, str]] = {}
    for endpoint, kind in endpoints.items():
        document = documents[endpoint]
        for name, field in document["properties"].items():
            if name in kind.unsupported:
                neutral = [value for value in field["enum"] if value is not None]
                shown = ", ".join(f"`{json.dumps(value)}`" for value in neutral)
                refused.setdefault(name, {})[endpoint] = shown
            else:
                told = values(field, document.get("$defs", {}))
                supported.setdefault(name, {})[endpoint] = told
                said = " ".join(field["description"].split()).replace("|", "\\|")
                about.setdefault(name, {})[endpoint] = said
    lines = ["| field | values | what it does |", "|---|---|---|"]
    for name, by_endpoint in supported.items():
        only = "" if len(by_endpoint) == len(endpoints) else f" ({next(iter(by_endpoint))} only)"
        lines.append(f"| `{name}`{only} | {_both(by_endpoint)} | {_both(about[name])} |")
    lines += ["", "These fields are known but not supported. They accept null and the values here,"]
    lines += ["which ask for nothing; others are refused with an error that names the field:", ""]
    lines += ["| field | values that are accepted |", "|---|---|"]
    for name, by_endpoint in sorted(refused.items()):
        only = "" if len(by_endpoint) == len(endpoints) else f" ({next(iter(by_endpoint))})"
        lines.append(f"| `{name}`{only} | {_both(by_endpoint) or 'none'} |")
    return "\n".join(lines)


def _both(by_endpoint: dict[str, str]) -> str:
    """Return the text of all endpoints: once if it is the same, otherwise each with its name."""
    if len(set(by_endpoint.values())) == 1:
        return next(iter(by_endpoint.values()))
    return "; ".join(f"{name}: {told.rstrip('.') or 'none'}" for name, told in by_endpoint.items())


def values(field: dict[str, Any], defs: dict[str, Any]) -> str:
    """Return a short description of the values that a field may have. Null, which every optional
    field may be, is left out.

    field: the JSON schema of the field.
    defs: the schemas that it may refer to, by name.
    """
    if "anyOf" in field:
        found = [values(one, defs) for one in field["anyOf"] if one != {"type": "null"}]
        return " or ".join(dict.fromkeys(found))
    if "$ref" in field:
        return values(defs[field["$ref"].rpartition("/")[2]], defs)
    if "const" in field or "enum" in field:
        return ", ".join(f"`{json.dumps(v)}`" for v in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "anything"))
    if kind == "array":
        of = field["items"].get("type", "object")
        if of == "array":
            of = f"lists of {field['items']['items']['type']}s"
        return f"list of {of if of.startswith('list') else f'{of}s'}" + (
            f" (at most {field['maxItems']})" if "maxItems" in field else ""
        )
    low, high = field.get("minimum"), field.get("maximum")
    if "exclusiveMinimum" in field:
        return f"{kind} above {field['exclusiveMinimum']:g}, up to {high:g}"
    if low is not None:
        return f"{kind} from {_number(low)}" + (f" to {_number(high)}" if high is not None else "")
    return kind


def _number(value: float) -> str:
    """Return a bound as text. 2^31 and 2^63, and what is one less, are written as powers."""
    size = abs(value)
    for power in (31, 63):
        if size in (2**power, 2**power - 1):
            less = "" if size == 2**power else " - 1"
            return f"{'-' if value < 0 else ''}2^{power}{less}"
    return f"{value:g}"


def with_tables(page: str) -> str:
    """Return the page with its tables replaced by the current ones."""
    for name, endpoints in SECTIONS.items():
        begin, end = f"<!-- {name}: python docs/field_tables.py -->", f"<!-- /{name} -->"
        assert page.count(begin) == page.count(end) == 1, f"the page needs one {begin} and {end}"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{tables(endpoints)}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
