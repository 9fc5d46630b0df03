"""HTTP as servers speak it: framing, connections that are kept alive or closed, and responses that
are not whole."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from loadgen.http import KEEPALIVE_S, Client, ConnectError, Head, HTTPError

OK = b"HTTP/1.1 200 OK\r\n"
PLAIN = OK + b"Content-Length: 2\r\n\r\nab"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\n\r\n"


class Last(bytes):
    """An answer after which the server closes the connection."""


class Peer:
    """A server that answers each request with the next of its answers, byte for byte, and records
    (connection, request); connections are counted from 0."""

    def __init__(self, answers: Sequence[bytes]) -> None:
        self.answers = iter(answers)
        self.requests: list[tuple[int, bytes]] = []
        self.connections = 0
        self.url = ""
        self.gone = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.connections
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split()[0])
                self.requests.append((number, head + await reader.readexactly(length)))
                answer = next(self.answers)
                writer.write(answer)
                if isinstance(answer, Last):
                    break
        except asyncio.IncompleteReadError:
            self.gone.set()
        finally:
            writer.close()


Got = tuple[Head, bytes]
Ask = Callable[[], Coroutine[Any, Any, Got]]


def talk(answers: Sequence[bytes], body: Callable[[Peer, Ask], Coroutine[Any, Any, None]]) -> Peer:
    """Run `body` with a peer and a function that requests /v1/x from it and returns the whole
    response."""

    async def go() -> Peer:
        peer = Peer(answers)
        server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
        peer.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/x"
        with Client("a key") as client:

            async def ask() -> Got:
                parts: list[bytes] = []

                def receive(status: int, data: bytes, now_s: float) -> bool:
                    parts.append(data)
                    return True

                head = await client.exchange("POST", peer.url, b"{}", receive)
                return head, b"".join(parts)

            async with asyncio.timeout(30):
                await body(peer, ask)
        server.close()
        return peer

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("answers", "connections"),
    [
        ([PLAIN, CHUNKED, PLAIN], [0, 0, 0]),
        ([Last(OK + b"\r\nab"), PLAIN], [0, 1]),
        ([OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nab", PLAIN], [0, 1]),
        ([b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab", PLAIN], [0, 1]),
        ([b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN, PLAIN], [0, 0]),
        ([PLAIN + PLAIN, PLAIN], [0, 1]),
        ([PLAIN + OK + b"Content-Length: 4\r\n\r\n", PLAIN], [0, 1]),
    ],
)
def test_every_framing_is_whole_and_a_connection_is_used_again_if_it_may_be(
    answers: Sequence[bytes], connections: list[int]
) -> None:
    async def body(peer: Peer, ask: Ask) -> None:
        for _ in answers:
            assert await ask() == (Head(200, "OK"), b"ab")

    peer = talk(answers, body)
    assert [number for number, _ in peer.requests] == connections
    lines = peer.requests[0][1].split(b"\r\n")
    assert lines[0] == b"POST /v1/x HTTP/1.1"
    assert lines[-1] == b"{}"
    assert b"Authorization: Bearer a key" in lines
    assert b"Host: 127.0.0.1:" in peer.requests[0][1]


@pytest.mark.parametrize(
    "answer",
    [
        Last(),
        b"SSH-2.0-OpenSSH\r\n\r\n",
        Last(OK + b"Content-Length: 3\r\n\r\nab"),
        OK + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
        Last(b"HTTP/1.1 100 Continue\r\n\r\n"),
        Last(b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + b"X: y"),
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_what_is_no_whole_response_is_an_error(answer: bytes) -> None:
    """A response that is not whole is an error, and the next request is sent over another
    connection."""

    async def body(peer: Peer, ask: Ask) -> None:
        with pytest.raises(HTTPError):
            await ask()
        assert (await ask())[1] == b"ab"

    assert [number for number, _ in talk([answer, PLAIN], body).requests] == [0, 1]


def test_a_connection_that_rested_too_long_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr("loadgen.http.clock", lambda: now_s)

    async def body(peer: Peer, ask: Ask) -> None:
        nonlocal now_s
        await ask()
        now_s += KEEPALIVE_S / 2
        await ask()
        now_s += KEEPALIVE_S
        await ask()

    assert [number for number, _ in talk([PLAIN] * 3, body).requests] == [0, 0, 1]


def test_who_wants_no_more_gets_none_and_the_connection_is_closed() -> None:
    parts: list[bytes] = []

    def receive(status: int, data: bytes, now_s: float) -> bool:
        parts.append(data)
        return False

    async def body(peer: Peer, ask: Ask) -> None:
        with Client(None) as client:
            assert (await client.exchange("POST", peer.url, b"", receive)).status == 200
            assert parts == [b"a"]
            await peer.gone.wait()

    talk([CHUNKED], body)


def test_a_cancelled_request_closes_its_connection() -> None:
    async def body(peer: Peer, ask: Ask) -> None:
        task = asyncio.create_task(ask())
        while not peer.requests:
            await asyncio.sleep(0)
        task.cancel()
        await peer.gone.wait()

    talk([OK], body)


def test_what_cannot_be_reached() -> None:
    async def go(url: str) -> None:
        with Client(None) as client:
            await client.exchange("GET", url, b"", lambda status, data, now_s: True)

    for url in ("http://127.0.0.1:9/", f"http://{'a' * 70}.invalid/"):
        with pytest.raises(ConnectError, match="cannot connect to"):
            asyncio.run(go(url))
