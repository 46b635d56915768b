"""A stand-in for Google Cloud Storage: the part of its JSON API that its Python library uses here.

Generations, preconditions, hashes, multipart and resumable uploads, paged lists and ranges are as
documented; who asks is not looked at. It fails where a test wants it to.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import google_crc32c
import pytest

PAGE = 7  # objects of a page, so that lists have several

# What becomes of a request (method, name of the object or ""): None: it is answered; a number: this
# status; "cut": the connection breaks off in the middle of the answer; "lost": the request is done
# and its answer never sent.
Fault = Callable[[str, str], "int | str | None"]


class Stored(NamedTuple):
    content: bytes
    generation: int
    updated: float


class Storage:
    """Buckets on localhost; set ``STORAGE_EMULATOR_HOST`` to `address`."""

    def __init__(self, *buckets: str) -> None:
        self.buckets = set(buckets)
        self.objects: dict[tuple[str, str], Stored] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda method, name: None
        self.guard = threading.RLock()
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self._generation = time.time_ns() // 1000
        handler = type("Handler", (_Handler,), {"storage": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, url: str, content: bytes) -> None:
        """As somebody else would write it."""
        bucket, _, name = url.removeprefix("gs://").partition("/")
        self.buckets.add(bucket)
        with self.guard:
            self.store(bucket, name, content)

    def get(self, url: str) -> bytes:
        bucket, _, name = url.removeprefix("gs://").partition("/")
        return self.objects[bucket, name].content

    def names(self, url: str) -> list[str]:
        """What lies below a URL."""
        bucket, _, path = url.removeprefix("gs://").partition("/")
        with self.guard:
            found = [name for at, name in self.objects if at == bucket]
        return sorted(n.removeprefix(f"{path}/") for n in found if n.startswith(f"{path}/"))

    def store(self, bucket: str, name: str, content: bytes) -> Stored:
        self._generation += 1
        stored = Stored(content, self._generation, time.time())
        self.objects[bucket, name] = stored
        return stored


class _Handler(BaseHTTPRequestHandler):
    storage: Storage
    # A connection for each request: `command.call` waits for the threads that began meanwhile.
    protocol_version = "HTTP/1.0"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = {n: v[0] for n, v in urllib.parse.parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            raise AssertionError("a body of unknown length")
        place = re.fullmatch(
            r"/(?:upload/|download/|)storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path
        )
        assert place is not None, self.path
        bucket, name = urllib.parse.unquote(place[1]), urllib.parse.unquote(place[2] or "")
        if not name and self.command == "POST" and query["uploadType"] == "multipart":
            name = self._parts(body)[0]["name"]
        name = name or query.get("name", "")
        if "upload_id" in query:
            name = self.storage.uploads[query["upload_id"]][1]
        storage = self.storage
        with storage.guard:
            storage.requests.append((self.command, name))
            fault = storage.fault(self.command, name)
            if isinstance(fault, int):
                return self._fail(fault)
            self._fault = fault
            if bucket not in storage.buckets:
                return self._fail(404)
            if self.command == "GET":
                return self._get(bucket, name, query)
            if self.command == "DELETE":
                return self._delete(bucket, name, query)
            if self.command == "PUT":
                return self._resume(query["upload_id"], body)
            if query["uploadType"] == "multipart":
                metadata, content = self._parts(body)
                return self._insert(bucket, metadata, query, content)
            return self._begin(bucket, json.loads(body), query)

    def _get(self, bucket: str, name: str, query: dict[str, str]) -> None:
        if not name:
            return self._list(bucket, query)
        stored = self.storage.objects.get((bucket, name))
        wanted = query.get("generation")
        if stored is None or wanted not in (None, str(stored.generation)):
            return self._fail(404)
        if query.get("alt") != "media":
            return self._send(200, self._describe(bucket, name, stored))
        content, status, headers = stored.content, 200, _hashes(stored)
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            content, status = content[begin : end + 1], 206
        self._send(status, content, headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix = query.get("prefix", "")
        names = sorted(n for b, n in self.storage.objects if b == bucket and n.startswith(prefix))
        names = [name for name in names if name > query.get("pageToken", "")]
        objects = self.storage.objects
        answer = {
            "kind": "storage#objects",
            "items": [self._describe(bucket, n, objects[bucket, n]) for n in names[:PAGE]],
        }
        if len(names) > PAGE:
            answer["nextPageToken"] = names[PAGE - 1]
        self._send(200, answer)

    def _delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
        if (bucket, name) not in self.storage.objects:
            return self._fail(404)
        if not self._holds(bucket, name, query):
            return self._fail(412)
        del self.storage.objects[bucket, name]
        self._send(204, b"")

    def _insert(
        self, bucket: str, metadata: dict[str, str], query: dict[str, str], content: bytes
    ) -> None:
        name = metadata.get("name") or query["name"]
        if not self._holds(bucket, name, query):
            return self._fail(412)
        if metadata.get("md5Hash", _md5(content)) != _md5(content):
            return self._fail(400)
        stored = self.storage.store(bucket, name, content)
        self._send(200, self._describe(bucket, name, stored))

    def _begin(self, bucket: str, metadata: dict[str, str], query: dict[str, str]) -> None:
        if not self._holds(bucket, metadata["name"], query):
            return self._fail(412)
        number = str(len(self.storage.uploads))
        self.storage.uploads[number] = bucket, metadata["name"], metadata | query, bytearray()
        address = f"{self.storage.address}/upload/storage/v1/b/{bucket}/o"
        self._send(200, b"", {"Location": f"{address}?uploadType=resumable&upload_id={number}"})

    def _resume(self, number: str, body: bytes) -> None:
        bucket, _, metadata, received = self.storage.uploads[number]
        part = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers["Content-Range"])
        assert part is not None
        if part[1] is not None:
            begin = int(part[1])  # what came twice is the same
            assert begin <= len(received)
            received[begin:] = body
        if part[3] == "*" or len(received) < int(part[3]):
            return self._send(308, b"", {"Range": f"bytes=0-{len(received) - 1}"})
        if "answer" not in metadata:
            self._insert(bucket, metadata, metadata, bytes(received))
            metadata["answer"] = "given"
        else:  # an upload that is done tells so again
            name = metadata["name"]
            self._send(200, self._describe(bucket, name, self.storage.objects[bucket, name]))

    def _holds(self, bucket: str, name: str, query: dict[str, str]) -> bool:
        stored = self.storage.objects.get((bucket, name))
        wanted = query.get("ifGenerationMatch")
        return wanted in (None, str(stored.generation if stored else 0))

    def _parts(self, body: bytes) -> tuple[dict[str, str], bytes]:
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary is not None
        _, first, second, _ = re.split(rb"(?:^|\r\n)--" + re.escape(boundary[1].encode()), body)
        metadata, content = (part.split(b"\r\n\r\n", 1)[1] for part in (first, second))
        return json.loads(metadata), content

    def _describe(self, bucket: str, name: str, stored: Stored) -> dict[str, Any]:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stored.updated))
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "generation": str(stored.generation),
            "metageneration": "1",
            "size": str(len(stored.content)),
            "md5Hash": _md5(stored.content),
            "crc32c": _crc32c(stored.content),
            "timeCreated": f"{moment}.{int(stored.updated % 1 * 1000):03}Z",
            "updated": f"{moment}.{int(stored.updated % 1 * 1000):03}Z",
        }

    def _fail(self, status: int) -> None:
        reasons = {403: "no access for stand-in@example.com", 404: "Not Found", 412: "Precondition"}
        message = reasons.get(status, "the stand-in fails")
        self._send(status, {"error": {"code": status, "message": message}})

    def _send(
        self, status: int, body: bytes | dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self._fault == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self._fault == "cut":
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)

    _fault: int | str | None = None


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()


def _crc32c(content: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def _hashes(stored: Stored) -> dict[str, str]:
    return {
        "X-Goog-Hash": f"crc32c={_crc32c(stored.content)},md5={_md5(stored.content)}",
        "X-Goog-Generation": str(stored.generation),
    }


@contextlib.contextmanager
def standing_in(patch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A server with the bucket "b", which Google's library takes for the real one."""
    storage = Storage("b")
    patch.setenv("STORAGE_EMULATOR_HOST", storage.address)
    yield storage
    storage.close()
