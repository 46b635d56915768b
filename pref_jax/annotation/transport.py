"""Plain HTTP/1.1 for a judge near by, over asyncio's streams.

httpx2's own transport takes about 1 ms of processor time per request, so that one core cannot keep
64 quick answers under way; this one takes a fifth of it. It is for plain http without a proxy:
TLS and proxies are left to the library.
"""

import asyncio

import httpx2

_LONGEST_HEAD = 1 << 16


class PlainTransport(httpx2.AsyncBaseTransport):
    """One connection that is kept open; one request at a time."""

    def __init__(self) -> None:
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Sends a request and reads the whole response.

        Raises:
          httpx2.ConnectError, httpx2.ConnectTimeout: nobody answers at the address.
          httpx2.RemoteProtocolError: the connection broke, or what came is no HTTP.
        """
        body = await request.aread()
        reader, writer = await self._connect(request)
        try:
            target = request.url.raw_path
            head = [request.method.encode() + b" " + target + b" HTTP/1.1"]
            head += [name + b": " + value for name, value in request.headers.raw]
            writer.write(b"\r\n".join([*head, b"", body]))
            await writer.drain()
            status, headers = await _read_head(reader)
            content, keep = await _read_body(reader, status, headers)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            await self.aclose()
            raise httpx2.RemoteProtocolError(str(error), request=request) from error
        except BaseException:  # a time-out: what comes later is no answer to the next request
            await self.aclose()
            raise
        if not keep:
            await self.aclose()
        return httpx2.Response(status, headers=headers, content=content, request=request)

    async def aclose(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _connect(
        self, request: httpx2.Request
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is not None and self._writer is not None:
            if not self._reader.at_eof() and not self._writer.is_closing():
                return self._reader, self._writer
            await self.aclose()
        host, port = request.url.host, request.url.port or 80
        seconds = request.extensions.get("timeout", {}).get("connect")
        try:
            async with asyncio.timeout(seconds):
                self._reader, self._writer = await asyncio.open_connection(
                    host, port, limit=_LONGEST_HEAD
                )
        except TimeoutError as error:
            raise httpx2.ConnectTimeout("time-out", request=request) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise httpx2.ConnectError(reason, request=request) from error
        return self._reader, self._writer


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Status and headers; an interim response (100 Continue and the like) is passed over."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        version, code, *_ = first.split(b" ", 2)
        if not version.startswith(b"HTTP/1.") or len(code) != 3:
            raise ValueError("not HTTP/1.1")
        headers = []
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon:
                raise ValueError("broken header")
            headers.append((name.strip().lower(), value.strip()))
        if int(code) >= 200:
            return int(code), headers


async def _read_body(
    reader: asyncio.StreamReader, status: int, headers: list[tuple[bytes, bytes]]
) -> tuple[bytes, bool]:
    """The body, and whether the connection may be used again."""
    values = dict(headers)
    keep = b"close" not in values.get(b"connection", b"").lower()
    if status in (204, 304):
        return b"", keep
    if b"chunked" in values.get(b"transfer-encoding", b"").lower():
        parts = []
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
        return b"".join(parts), keep
    if (length := values.get(b"content-length")) is not None:
        return await reader.readexactly(int(length)), keep
    return await reader.read(), False
