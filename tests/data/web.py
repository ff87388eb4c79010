"""A host on the loopback: serves what it is given, and counts what it is asked."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Host:
    """files: path without the leading slash -> bytes. linked: answer as the hub does for LFS."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.linked = False
        self.down: set[str] = set()  # answered with 404
        self.asked: list[tuple[str, str]] = []  # (method, path)
        self.url = ""

    def count(self, method: str) -> int:
        """How many requests of one method came."""
        return sum(m == method for m, _ in self.asked)

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        """One request."""
        path = handler.path.lstrip("/")
        self.asked.append((handler.command, path))
        name = path.replace(f"/{COMMIT}/", "/main/")
        data = None if name in self.down else self.files.get(name)
        handler.send_response(404 if data is None else 200)
        data = b"" if data is None else data
        digest = hashlib.sha256(data).hexdigest()
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("ETag", f'"{digest[:12]}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        if self.linked:
            handler.send_header("X-Linked-Size", str(len(data)))
            handler.send_header("X-Linked-Etag", f'"{digest}"')
        handler.end_headers()
        if body:
            handler.wfile.write(data)


@contextlib.contextmanager
def serving() -> Iterator[Host]:
    """A running host."""
    host = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host.answer(self, body=True)

        def do_HEAD(self) -> None:
            host.answer(self, body=False)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    host.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
