"""One request to an OpenAI-style chat server, and what can become of it.

The key is read from the environment, goes into one header, and is struck out of whatever the server
sends back, so that no message, file or traceback can hold it.
"""

import email.utils
import json
import math
import os
import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from pref_jax.errors import InputError

KEY_VARIABLE = "OPENAI_API_KEY"
_CONNECT_SECONDS = 10.0
_SHORTEST_SECRET = 8  # characters: "none" or "EMPTY" is no secret, and is a word in answers
_STRIDE = 4  # characters of a key that may be shown of a part that was cut off
_LONGEST_MESSAGE = 200
_LONGEST_RESPONSE = 8_000_000  # bytes
_MOST_COUNTED = 1e9  # tokens, or money, of one answer: more is a mistake of the server


class TransientError(Exception):
    """No answer this time; it may come later.

    Attributes:
      limited: a rate limit turned the request away.
      retry_after: seconds that the server asks for, None where it does not.
      reached: the request reached a server, which may have worked on it.
      listening: somebody accepted the connection.
    """

    def __init__(
        self,
        reason: str,
        *,
        limited: bool = False,
        retry_after: float | None = None,
        reached: bool = True,
        listening: bool = True,
    ) -> None:
        super().__init__(reason)
        self.limited, self.retry_after = limited, retry_after
        self.reached, self.listening = reached, listening


class RefusedError(Exception):
    """The server will not answer this request, however often it is sent.

    Attributes:
      status: HTTP status.
      code: the server's own word for it, may be empty.
    """

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(f"HTTP {status}: {message}" if message else f"HTTP {status}")
        self.status, self.code = status, code

    @property
    def ends_run(self) -> bool:
        """Whether all other requests would be refused as well."""
        return self.status in (401, 402, 403, 404) or self.code == "insufficient_quota"


@dataclass(frozen=True)
class Reply:
    """What the model wrote.

    Attributes:
      text: its answer.
      finish: why it stopped, "length" where there was no more room.
      tokens: of the question and of the answer by the server's count, None where it does not say.
      charged: what it says that this costs, None where it does not.
    """

    text: str
    finish: str
    tokens: tuple[int, int] | None
    charged: float | None


class Client:
    """Connections to one server.

    Args:
      base_url: up to and with the version, as in http://localhost:8000/v1.
      timeout: most seconds from sending a request to its whole answer.
      concurrency: most requests at a time; each has a connection of its own that is kept open.

    Raises:
      InputError: the address or the key in the environment cannot be one.
    """

    def __init__(self, base_url: str, *, timeout: float, concurrency: int) -> None:
        self._url = _read_url(base_url)
        self._key = _read_key()
        self._secret = _find_secret(self._key)
        self._proxy = _find_proxy(self._url)
        self._timeout, self._concurrency = timeout, concurrency
        self._session: aiohttp.ClientSession | None = None
        self.last_heard = -math.inf  # time.monotonic() of the last response of any kind
        self._paused_until = -math.inf

    @staticmethod
    def check(base_url: str) -> None:
        """Raises what the constructor would, before any work is done."""
        _read_url(base_url)
        _read_key()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        """The connections; made by the first request, since they belong to its event loop."""
        if self._session is None:
            headers = {"Content-Type": "application/json"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            connect = min(self._timeout, _CONNECT_SECONDS)
            self._session = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(limit=self._concurrency),
                # The total counts from sending to the last byte: a server that drips must end.
                timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=connect),
            )
        return self._session

    def pause(self, seconds: float) -> None:
        """Nothing is sent for so long: a rate limit holds for all workers."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    @property
    def pause_left(self) -> float:
        """Seconds until something may be sent."""
        return self._paused_until - time.monotonic()

    async def ask(self, payload: str) -> Reply:
        """Sends one request, a JSON object.

        Raises:
          TransientError: rate limit, server error, time-out, broken connection or half an answer.
          RefusedError: any other status.
        """
        try:
            async with self._open().post(
                self._url, data=payload.encode(), allow_redirects=False, proxy=self._proxy
            ) as response:
                status, headers = response.status, response.headers
                received = bytearray()
                async for chunk in response.content.iter_any():
                    received += chunk
                    if len(received) > _LONGEST_RESPONSE:
                        raise TransientError("broken response: too long")
                content = bytes(received)
        except TimeoutError as error:
            unheard = isinstance(error, aiohttp.ConnectionTimeoutError)
            raise TransientError("time-out", reached=not unheard, listening=not unheard) from None
        except aiohttp.ClientConnectorError as error:
            reason = f"cannot connect: {_shorten(error.strerror or str(error.os_error))}"
            raise TransientError(reason, reached=False, listening=False) from None
        except (aiohttp.ClientError, OSError) as error:
            self.last_heard = time.monotonic()
            raise TransientError(f"broken connection: {type(error).__name__}") from None
        self.last_heard = time.monotonic()
        if self._secret is not None:
            content = self._secret.sub(b"[key]", content)
        return _read_response(status, headers, content)


def _read_response(status: int, headers: Mapping[str, str], content: bytes) -> Reply:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if status == 200:
        if not isinstance(body, dict):
            raise TransientError("broken response: not a JSON object")
        if not body.get("error"):
            return _read_reply(body)
        # Some hosts send errors of the model behind them as if all were well.
        message, code = _read_error(body, content)
        if not (code.isdecimal() and 400 <= int(code) <= 599):
            raise TransientError(f"error: {message}")
        status = int(code)
    message, code = _read_error(body, content)
    if status == 429 and code != "insufficient_quota":
        after = _read_retry_after(headers.get("Retry-After"))
        raise TransientError("HTTP 429", limited=True, retry_after=after, reached=False)
    if status in (408, 409, 425) or status >= 500:
        after = _read_retry_after(headers.get("Retry-After"))
        raise TransientError(f"HTTP {status}", retry_after=after, reached=False)
    raise RefusedError(status, message, code)


def _read_reply(body: dict[str, Any]) -> Reply:
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    finish = choice.get("finish_reason")
    return Reply(
        text if isinstance(text, str) else "",
        finish if isinstance(finish, str) else "",
        *_read_usage(body.get("usage")),
    )


def _read_usage(usage: Any) -> tuple[tuple[int, int] | None, float | None]:
    usage = usage if isinstance(usage, dict) else {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    counted = all(
        type(count) is int and 0 <= count < _MOST_COUNTED for count in (prompt, completion)
    )
    cost = usage.get("cost")  # some hosts say what they charge
    charged = type(cost) in (int, float) and 0 <= cost < _MOST_COUNTED
    return (prompt, completion) if counted else None, float(cost) if charged else None


def _read_error(body: Any, content: bytes) -> tuple[str, str]:
    """Message and code of an error, in whichever of the usual places they are."""
    error = body.get("error", body) if isinstance(body, dict) else None
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or ""
        return _shorten(str(message)), str(error.get("code") or "")
    return _shorten(error if isinstance(error, str) else content.decode(errors="replace")), ""


def _read_retry_after(value: str | None) -> float | None:
    """Seconds in a Retry-After header, a number or a date; None where it says nothing or "now"."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
            seconds = date.timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if 0.0 < seconds < math.inf else None


def _read_url(base_url: str) -> URL:
    remedy = "name the server as in http://localhost:8000/v1"
    try:
        url = URL(base_url)
    except ValueError as error:
        raise InputError("--base_url", f"is not an address ({error})", remedy) from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError("--base_url", "is not an address that begins with http", remedy)
    if url.user or url.password:
        raise InputError(
            "--base_url", "holds a password", f"put the key into the variable {KEY_VARIABLE}"
        )
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.with_path(f"{path}/chat/completions", keep_query=True)


def _find_proxy(url: URL) -> str | None:
    """The proxy that the surroundings name; none of them knows this machine.

    The session's own way of finding it would also take passwords from a file for other programs.
    """
    host = url.host or ""
    if host in ("localhost", "127.0.0.1", "::1") or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(url.scheme)


def _find_secret(key: str) -> re.Pattern[bytes] | None:
    """Finds a key, or its beginning, in what a server sends, also as JSON and URLs escape it."""
    if len(key) < _SHORTEST_SECRET:
        return None
    characters = [
        rf"(?:\\{{0,8}}{re.escape(character)}"
        rf"|\\{{1,8}}u(?i:{ord(character):04x})|%(?i:{ord(character):02x}))"
        for character in key
    ]
    start = max(_SHORTEST_SECRET, len(key) // 4)
    pattern = "".join(characters[:start])
    for at in range(start, len(characters), _STRIDE):
        pattern += f"(?:{''.join(characters[at : at + _STRIDE])})?"
    return re.compile(pattern.encode())


def _read_key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(KEY_VARIABLE, "holds what no key can hold", "set it again")
    return key


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[: _LONGEST_MESSAGE - 1]}…"
