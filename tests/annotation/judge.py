"""A judge on localhost that rates by a hash of what it is asked, and misbehaves on purpose.

Everything it does follows from the content of the request and from how often the same content was
asked: the same calls, in any order, get the same answers.
"""

from __future__ import annotations

import collections
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What can go wrong with one attempt.
FAULTS = (
    *("limited", "limited_after", "error", "hang", "closed", "half_body"),
    *("half", "prose", "echo", "range", "missing", "duplicate", "empty"),
)
RATED = ("prose",)  # of these, what still holds an answer
Answer = Callable[[dict[str, Any], int], str | None]


def read_texts(body: dict[str, Any]) -> str:
    """What is asked, without what a retry changes."""
    return body["messages"][-1]["content"]


def draw(text: str, size: int) -> int:
    """A number below ``size`` that follows from a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % size


def find_template(body: dict[str, Any]) -> dict[str, Any]:
    """The JSON template at the end of the instructions."""
    return json.loads(body["messages"][0]["content"].splitlines()[-1])


def fill(template: Any, choose: Callable[[str, int], Any], name: str = "") -> Any:
    """The template with numbers for its placeholders; ``choose`` gets their path and size."""
    if isinstance(template, dict):
        return {key: fill(part, choose, f"{name}/{key}") for key, part in template.items()}
    if template == "<draft>":
        return f"draft of {name.split('/')[-2]}"
    return choose(name, 2 if template == "<0 or 1>" else 4)


def rate(body: dict[str, Any]) -> dict[str, Any]:
    """A good answer, which follows from the texts alone."""
    texts = read_texts(body)
    return fill(find_template(body), lambda name, size: draw(f"{name} {texts}", size))


def all_twos(body: dict[str, Any]) -> dict[str, Any]:
    """The answer with every rating 2 and every flag 0."""
    return fill(find_template(body), lambda name, size: 2 if size == 4 else 0)


class Judge:
    """The server, in threads of this process.

    Args:
      answer: text for a request and the number of times that its texts were asked before; None
        closes the connection. Default: the good answer.
      faults: share of attempts with each of `FAULTS`.
      modes: forms of answer that it takes; others are refused with status 400.
      seconds: how long an answer takes.
      hang: how long "hang" keeps silent.

    Attributes:
      asked: per texts, the bodies of all requests.
      good: per texts, how many answers were good.
    """

    def __init__(
        self,
        answer: Answer | None = None,
        *,
        faults: float = 0.0,
        modes: tuple[str, ...] = ("json_schema", "json_object with schema", "json_object", "none"),
        seconds: float = 0.0,
        hang: float = 2.0,
        status: int = 200,
        error: str = "refused",
        usage: bool | dict[str, Any] = True,
        retry_after: str = "0.02",
    ) -> None:
        self.answer = answer or (lambda body, times: json.dumps(rate(body)))
        self.faults, self.modes, self.seconds, self.hang = faults, modes, seconds, hang
        self.status, self.error = status, error
        self.usage = {"prompt_tokens": 1000, "completion_tokens": 200} if usage is True else usage
        self.retry_after = retry_after
        self.refuse: Callable[[str], tuple[int, dict[str, Any]] | None] = lambda texts: None
        self.asked: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        self.good: collections.Counter[str] = collections.Counter()
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.open = self.most_open = 0
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                judge.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:  # a client that was killed
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Judge:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def requests(self) -> int:
        return sum(len(bodies) for bodies in self.asked.values())

    def bodies(self) -> Iterator[dict[str, Any]]:
        for bodies in self.asked.values():
            yield from bodies

    def fault(self, texts: str, times: int) -> str:
        """What goes wrong with this attempt, if anything."""
        place = draw(f"{texts} fault {times}", 10_000)
        index = int(place / 10_000 / self.faults) if self.faults else len(FAULTS)
        return FAULTS[index] if index < len(FAULTS) else ""

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"])
        body = json.loads(handler.rfile.read(length))
        texts = read_texts(body)
        with self.lock:
            times = len(self.asked[texts])
            self.asked[texts].append(body)
            self.keys.add(handler.headers.get("Authorization"))
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            time.sleep(self.seconds)
            self._respond(handler, body, texts, times)
        except OSError:
            handler.close_connection = True
        finally:
            with self.lock:
                self.open -= 1

    def _respond(
        self, handler: BaseHTTPRequestHandler, body: dict[str, Any], texts: str, times: int
    ) -> None:
        if self.status != 200:
            return _send(handler, self.status, {"error": {"message": self.error}})
        if (refusal := self.refuse(texts)) is not None:
            return _send(handler, *refusal)
        if _mode(body) not in self.modes:
            return _send(handler, 400, {"error": {"message": "response_format is not supported"}})
        fault = self.fault(texts, times)
        if fault == "limited":
            return _send(handler, 429, {"error": {"message": "slow down"}})
        if fault == "limited_after":
            return _send(
                handler, 429, {"error": {"message": "slow"}}, **{"Retry-After": self.retry_after}
            )
        if fault == "error":
            return _send(handler, 500, {"error": {"message": "oops"}})
        if fault == "hang":
            time.sleep(self.hang)
            handler.close_connection = True
            return None
        text = None if fault == "closed" else self._write(fault, body, times)
        if text is None:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return None
        if fault in ("", *RATED):
            with self.lock:
                self.good[texts] += 1
        reply: dict[str, Any] = {"choices": [{"message": {"content": text}}]}
        reply["choices"][0]["finish_reason"] = "stop"
        if self.usage:
            reply["usage"] = self.usage
        return _send(handler, 200, reply, half=fault == "half_body")

    def _write(self, fault: str, body: dict[str, Any], times: int) -> str | None:
        good = json.dumps(rate(body))
        wrong = rate(body)
        ratings = wrong["ratings" if "ratings" in wrong else "ratings_a"]
        name = list(ratings)[draw(good, len(ratings))]
        prompt = "\n".join(message["content"] for message in body["messages"])
        if fault == "half":
            return good[: len(good) // 2]
        if fault == "prose":
            return f"Sure! Here {{is}} what I think:\n```json\n{good}\n```\nI hope {{that}} helps."
        if fault == "echo":
            return prompt
        if fault == "duplicate":
            return good.replace(f'"{name}":', f'"{name}": 1, "{name}":', 1)
        if fault == "empty":
            return ""
        if fault == "range":
            ratings[name] = 7
            return json.dumps(wrong)
        if fault == "missing":
            del ratings[name]
            return json.dumps(wrong)
        return self.answer(body, times)


def _mode(body: dict[str, Any]) -> str:
    wanted = body.get("response_format")
    if wanted is None:
        return "none"
    schema = " with schema" if "schema" in wanted else ""
    return f"{wanted['type']}{schema}"


def _send(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: dict[str, Any] | str,
    half: bool = False,
    **headers: str,
) -> None:
    content = (body if isinstance(body, str) else json.dumps(body)).encode()
    content = content[: len(content) // 2] if half else content
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
