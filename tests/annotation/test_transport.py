"""Requests over plain connections: every way to end a body, and every way to break one."""

import asyncio
import gzip

import httpx2
import pytest

from pref_jax.annotation.transport import PlainTransport

OK = b"HTTP/1.1 200 OK\r\n"


def ask(responses: list[bytes], *, times: int = 1) -> tuple[list[httpx2.Response], int, bytes]:
    """Asks a server that answers connections with fixed bytes; an empty answer hangs up."""
    connections = 0
    seen = b""
    left = list(responses)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections, seen
        connections += 1
        while left:
            try:
                seen = await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(4)
            except (EOFError, OSError):
                break
            answer = left.pop(0)
            writer.write(answer)
            await writer.drain()
            if not answer or b"close" in answer:
                break
        writer.close()

    async def run() -> list[httpx2.Response]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with httpx2.AsyncClient(transport=PlainTransport(), timeout=2) as client:
            url = f"http://127.0.0.1:{port}/v1/x?y=1"
            found = [await client.post(url, content=b"body") for _ in range(times)]
        server.close()
        return found

    return asyncio.run(run()), connections, seen


@pytest.mark.parametrize(
    "response",
    [
        OK + b"Content-Length: 5\r\n\r\nhello",
        OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nA: b\r\n\r\n",
        OK + b"Connection: close\r\n\r\nhello",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length:5\r\n\r\nhello",
        OK
        + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(gzip.compress(b"hello"))
        + gzip.compress(b"hello"),
    ],
)
def test_the_body_ends_where_it_ends(response: bytes) -> None:
    (found,), _, seen = ask([response])
    assert found.status_code == 200 and found.content == b"hello"
    assert seen.startswith(b"POST /v1/x?y=1 HTTP/1.1\r\n") and seen.endswith(b"\r\n\r\nbody")
    assert b"Host: 127.0.0.1" in seen and b"Content-Length: 4" in seen


def test_a_connection_is_kept_until_the_server_closes_it() -> None:
    kept = OK + b"Content-Length: 2\r\n\r\nhi"
    closed = OK + b"Content-Length: 2\r\nConnection: close\r\n\r\nhi"
    assert ask([kept] * 3, times=3)[1] == 1
    assert ask([closed] * 3, times=3)[1] == 3


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        OK + b"no colon\r\n\r\n",
        OK + b"Content-Length: 9\r\nConnection: close\r\n\r\nhello",
        OK + b"Content-Length: many\r\n\r\nhello",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        OK + b"A: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
def test_a_broken_response_is_an_error_of_the_library(response: bytes) -> None:
    with pytest.raises(httpx2.RemoteProtocolError):
        ask([response])


def test_nobody_there() -> None:
    async def run() -> None:
        async with httpx2.AsyncClient(transport=PlainTransport(), timeout=2) as client:
            await client.post("http://127.0.0.1:9/", content=b"")

    with pytest.raises(httpx2.ConnectError):
        asyncio.run(run())


def test_a_late_answer_is_not_taken_for_the_next() -> None:
    async def run() -> bytes:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"/slow" in head:
                await asyncio.sleep(0.2)
            body = b"slow" if b"/slow" in head else b"fast"
            writer.write(OK + b"Content-Length: 4\r\n\r\n" + body)
            await writer.drain()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with httpx2.AsyncClient(transport=PlainTransport(), timeout=2) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.get(f"{url}/slow")
            await asyncio.sleep(0.3)
            found = await client.get(f"{url}/fast")
        server.close()
        return found.content

    assert asyncio.run(run()) == b"fast"
