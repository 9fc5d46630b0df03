"""The end of a request: a request whose end two readers could see in two places is refused, and an
upgrade that is not supported changes nothing."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv.server.http import MAX_PIPELINED
from tests.server.live_server import serve
from tests.waiting import GUARD_SECONDS

pytestmark = pytest.mark.anyio

NEXT = b"GET /next HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
"""A request sent after each other one; a server that has misjudged the end of that one finds this
one elsewhere, or not at all."""

HELLO = b"5\r\nhello\r\n0\r\n\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the request's path and body, in brackets."""
    body = await Request(scope, receive).body()
    await Response(b"[%b %b]" % (scope["path"].encode(), body))(scope, receive, send)


async def answers(address: tuple[str, int], *sent: bytes) -> list[str]:
    """Send the pieces one by one; return for each answer until the server closes the connection its
    echo, or its status if it has none."""
    reader, writer = await asyncio.open_connection(*address)
    for piece in sent:
        writer.write(piece)
        await writer.drain()
        for _ in range(10):  # let the server read this piece before the next one comes
            await asyncio.sleep(0)
    async with asyncio.timeout(GUARD_SECONDS):
        received = (await reader.read()).decode()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return [
        echoed[1] if (echoed := re.search(r"\[(.*)\]", answer, re.DOTALL)) else answer[:3]
        for answer in received.split("HTTP/1.1 ")[1:]
    ]


def post(*headers: bytes, version: bytes = b"1.1") -> bytes:
    return b"\r\n".join((b"POST /a HTTP/" + version, b"host: x", *headers, b"", b""))


LENGTH, CODING = b"content-length: 5", b"transfer-encoding: chunked"
H2C = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"HTTP2-Settings: AAEAAEAA")
"""The headers of an upgrade, as Java's client sends them with the first request of each
connection."""
ANY = (b"connection: upgrade", b"upgrade: whatever")
WEBSOCKET = (b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-key: eA==")
CLOSE = (b"connection: close, upgrade", b"upgrade: whatever")
EXPECT = b"expect: 100-continue"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"

A_NEXT = ["/a hello", "/next "]
UPGRADES: dict[str, tuple[bytes, bytes, list[str]]] = {
    "a length": (post(*H2C, LENGTH), b"hello", A_NEXT),
    "chunks": (post(*H2C, CODING), HELLO, A_NEXT),
    "any protocol": (post(*ANY, LENGTH), b"hello", A_NEXT),
    "a websocket": (post(*WEBSOCKET, LENGTH), b"hello", A_NEXT),
    "no body": (post(*ANY), b"", ["/a ", "/next "]),
    "an empty body": (post(*ANY, b"content-length: 0"), b"", ["/a ", "/next "]),
    "a GET": (post(*WEBSOCKET).replace(b"POST", b"GET"), b"", ["/a ", "/next "]),
    "a GET with a body": (post(*ANY, LENGTH).replace(b"POST", b"GET"), b"hello", A_NEXT),
    "the last request": (post(*CLOSE, LENGTH), b"hello", ["/a hello"]),
    "HTTP/1.0": (post(*ANY, LENGTH, version=b"1.0"), b"hello", ["/a hello"]),
    "two": (post(*H2C, LENGTH), b"hello" + post(*ANY, CODING) + HELLO, ["/a hello", *A_NEXT]),
    "a request as its body": (
        post(*ANY, b"content-length: %d" % len(SMUGGLED)),
        SMUGGLED,
        [f"/a {SMUGGLED.decode()}", "/next "],
    ),
}


async def test_an_upgrade_that_is_not_supported_is_ignored() -> None:
    """The request is read and answered as without the upgrade, however it is cut into pieces."""
    async with serve(echo) as address:
        for name, (head, body, expected) in UPGRADES.items():
            whole = head + body + NEXT
            for sent in ([whole], [head, body + NEXT], [head, *map(bytes, zip(body)), NEXT]):
                assert await answers(address, *filter(None, sent)) == expected, (name, sent)


async def test_the_body_behind_an_upgrade_may_be_waited_for() -> None:
    """A request with an upgrade still gets its 100 Continue before it sends its body."""
    async with serve(echo) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(post(*H2C, EXPECT, LENGTH))
        async with asyncio.timeout(GUARD_SECONDS):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"hello")
            assert b"[/a hello]" in await reader.readuntil(b"]")
        writer.close()


REFUSED: dict[str, bytes] = {
    "a length and a coding": post(LENGTH, CODING) + b"0\r\n\r\n",
    "a coding and a length": post(CODING, LENGTH) + b"0\r\n\r\n",
    "both, and an upgrade": post(*ANY, CODING, LENGTH) + b"0\r\n\r\n",
    "two lengths": post(LENGTH, b"content-length: 6") + b"hello",
    "a length twice": post(LENGTH, LENGTH) + b"hello",
    "two lengths, and an upgrade": post(*ANY, LENGTH, b"content-length: 6") + b"hello",
    "a list of lengths": post(b"content-length: 5, 5") + b"hello",
    "a length with a sign": post(b"content-length: +5") + b"hello",
    "a negative length": post(b"content-length: -5") + b"hello",
    "a hexadecimal length": post(b"content-length: 0x5") + b"hello",
    "a length in two parts": post(b"content-length: 1 5") + b"hello",
    "an empty length": post(b"content-length: "),
    "a length without end": post(b"content-length: " + b"9" * 30) + b"hello",
    "a space before the colon": post(b"content-length : 5") + b"hello",
    "a tab before the colon": post(b"transfer-encoding\t: chunked") + HELLO,
    "a space in a name": post(b"a b: c"),
    "no name": post(b": c"),
    "no colon": post(b"content-length"),
    "a folded header": post(b"a: b", b" content-length: 5"),
    "a folded coding": post(b"transfer-encoding:", b" chunked") + HELLO,
    "a space before the first header": b"POST /a HTTP/1.1\r\n host: x\r\n\r\n",
    "bare LFs": post(LENGTH).replace(b"\r\n", b"\n") + b"hello",
    "a bare LF between headers": post(b"a: b\ncontent-length: 5") + b"hello",
    "a bare LF at the end": post(LENGTH)[:-2] + b"\nhello",
    "a bare CR": post(b"a: b\rcontent-length: 5") + b"hello",
    "a NUL": post(b"a: \0"),
    "another coding": post(b"transfer-encoding: gzip, chunked") + HELLO,
    "the wrong order": post(b"transfer-encoding: chunked, identity") + HELLO,
    "no coding": post(b"transfer-encoding: identity"),
    "an empty coding": post(b"transfer-encoding: "),
    "two codings": post(CODING, CODING) + HELLO,
    "two codings, and an upgrade": post(*ANY, CODING, b"transfer-encoding: identity") + HELLO,
    "nearly chunked": post(b"transfer-encoding: xchunked") + HELLO,
    "chunked with a parameter": post(b"transfer-encoding: chunked;q=1") + HELLO,
    "chunked in quotes": post(b'transfer-encoding: "chunked"') + HELLO,
    "chunked behind a control character": post(b"transfer-encoding: \x0bchunked") + HELLO,
    "chunks in HTTP/1.0": post(b"connection: keep-alive", CODING, version=b"1.0") + HELLO,
    "HTTP/2.0": post(version=b"2.0"),
    "HTTP/0.9": post(version=b"0.9"),
    "no version": b"GET /a\r\n",
    "a size with a prefix": post(CODING) + b"0x5\r\nhello\r\n0\r\n\r\n",
    "a size behind a space": post(CODING) + b" 5\r\nhello\r\n0\r\n\r\n",
    "a size before a space": post(CODING) + b"5 \r\nhello\r\n0\r\n\r\n",
    "a negative size": post(CODING) + b"-5\r\nhello\r\n0\r\n\r\n",
    "a size without end": post(CODING) + b"f" * 17 + b"\r\nhello\r\n0\r\n\r\n",
    "no size": post(CODING) + b"\r\nhello\r\n0\r\n\r\n",
    "a chunk that is longer": post(CODING) + b"5\r\nhello!\r\n0\r\n\r\n",
    "a chunk that is longer, and an upgrade": post(*ANY, CODING) + b"5\r\nhello!\r\n0\r\n\r\n",
    "a bare LF behind a size": post(CODING) + b"5\nhello\r\n0\r\n\r\n",
    "a bare LF behind an extension": post(CODING) + b"5;a\nhello\r\n0\r\n\r\n",
    "a bare CR in an extension": post(CODING) + b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "a bare LF behind a chunk": post(CODING) + b"5\r\nhello\n0\r\n\r\n",
    "a connection header in the trailer": (
        post(CODING) + b"5\r\nhello\r\n0\r\nConnection: close\r\n\r\n"
    ),
    "a length in the trailer": post(CODING) + b"5\r\nhello\r\n0\r\ncontent-length: 5\r\n\r\n",
    "a tunnel": b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
    "a tunnel to a path": b"CONNECT /a HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello",
}


async def test_what_is_ambiguous_gets_one_answer_and_no_more() -> None:
    """An ambiguous request gets 400 and the connection ends, whatever follows and however it is cut
    into pieces."""
    async with serve(echo) as address:
        for name, request in REFUSED.items():
            middle = len(request) // 2
            for sent in ([request + NEXT], [request[:middle], request[middle:], NEXT]):
                assert await answers(address, *sent) == ["400"], (name, sent)


async def test_what_is_odd_but_clear_is_read() -> None:
    """Unusual but unambiguous requests are read right, and so is the request after each."""
    clear = {
        "upper case": post(b"Transfer-Encoding: CHUNKED") + HELLO,
        "an extension": post(CODING) + b"5;a=b\r\nhello\r\n0\r\n\r\n",
        "zeros before a size": post(CODING) + b"0005\r\nhello\r\n000\r\n\r\n",
        "a trailer": post(CODING) + b"5\r\nhello\r\n0\r\na: b\r\n\r\n",
        "blanks behind a coding": post(CODING + b"  ") + HELLO,
        "blanks behind a length": post(LENGTH + b" \t") + b"hello",
        "empty lines before": b"\r\n\r\n" + post(LENGTH) + b"hello",
    }
    async with serve(echo) as address:
        for name, request in clear.items():
            assert await answers(address, request + NEXT) == A_NEXT, name


async def test_a_trailer_adds_nothing_to_the_head() -> None:
    """A proxy in front may let a trailer through after it has checked only the head."""
    seen: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await echo(scope, receive, send)
        seen.append(list(scope["headers"]))

    head = [b"a: b", CODING, b"c: d \t"]
    trailer = b"5\r\nhello\r\n0\r\nHost: y\r\nauthorization: z\r\nexpect: 100-continue\r\n\r\n"
    async with serve(app) as address:
        for upgrade in ((), ANY):
            request = post(*head, *upgrade) + trailer
            for sent in ([request + NEXT], [request[:-30], request[-30:] + NEXT]):
                assert await answers(address, *sent) == A_NEXT
                *_, found, _ = seen
                assert found[:4] == [
                    (b"host", b"x"),
                    (b"a", b"b"),
                    (b"transfer-encoding", b"chunked"),
                    (b"c", b"d"),
                ]
                assert len(found) == 4 + len(upgrade)


async def test_requests_before_one_that_cannot_be_read_are_answered() -> None:
    """Requests that came before one that cannot be read are answered in their order, even those
    that have not begun."""
    slow = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            await slow.wait()
        await echo(scope, receive, send)

    good = post(LENGTH) + b"hello"
    held = post(LENGTH).replace(b"/a", b"/slow") + b"hello"
    bad_chunk = post(CODING) + b"5\r\nhello!\r\n"
    head = post(b"a: " + b"x" * 400_000)
    cases = {
        b"garbage\r\n\r\n": ["/a hello", "/slow hello", "/a hello", "400"],
        bad_chunk: ["/a hello", "/slow hello", "/a hello", "400"],
        post(LENGTH, CODING): ["/a hello", "/slow hello", "/a hello", "400"],
        head: ["/a hello", "/slow hello", "/a hello", "431"],
    }
    async with serve(app) as address:
        for bad, expected in cases.items():
            slow.clear()
            asyncio.get_running_loop().call_later(0.02, slow.set)
            assert await answers(address, good + held + good + bad + NEXT) == expected, bad[:30]


async def test_more_requests_than_may_wait_on_a_connection() -> None:
    """A client may pipeline only so many requests; one more gets a 400."""
    async with serve(echo) as address:
        found = await answers(address, (post(LENGTH) + b"hello") * 1000)
    assert found == ["/a hello"] * (MAX_PIPELINED + 1) + ["400"]


async def test_who_is_answered_early_and_goes_on_with_nonsense_gets_no_second_answer() -> None:
    """If the application answers before the body has come, nonsense in the body gets no second
    answer."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"[early]", 413)(scope, receive, send)

    async with serve(app) as address:
        head = post(CODING)
        assert await answers(address, head + b"5\r\nhello\r\n", b"nonsense\r\n", NEXT) == ["early"]
