"""A model hub on localhost whose network goes away in the middle of a file."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _describe(name: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": digest}


class Hub:
    """The server, in threads of this process.

    Args:
      name: of the one repository.
      files: its content.

    Attributes:
      lost: of which file half is sent, whereupon nothing is answered any more; None: none.
    """

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        self.lost: str | None = None
        self.gone = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                if hub.gone:
                    self.connection.close()
                    return
                path = self.path.partition("?")[0]
                if path.startswith(f"/api/models/{name}/tree/"):
                    self._send(json.dumps([_describe(*item) for item in files.items()]))
                elif path.startswith(f"/api/models/{name}"):
                    siblings = [{"rfilename": file} for file in files]
                    self._send(json.dumps({"id": name, "sha": _COMMIT, "siblings": siblings}))
                elif (file := path.rpartition("/")[2]) in files and path.startswith(f"/{name}/"):
                    self._send(files[file], file)
                else:
                    self._send("{}", status=404)

            def _send(self, body: bytes | str, file: str = "", status: int = 200) -> None:
                content = body.encode() if isinstance(body, str) else body
                start = 0
                if asked := self.headers.get("Range"):
                    start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) - start))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", _COMMIT)
                self.send_header("Accept-Ranges", "bytes")
                if start:
                    size = len(content)
                    self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                self.end_headers()
                if self.command == "HEAD":
                    return
                if file and file == hub.lost:
                    self.wfile.write(content[start : start + len(content) // 2])
                    hub.gone = True
                    self.close_connection = True
                    return
                self.wfile.write(content[start:])

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
