"""A server on the loopback that misbehaves on request, and remembers what it was asked.

`routes` maps a path to a handler, `files` are served with ranges and ETags, like a hub where
`commit` is set. `seen` lists the requests, `sent` counts body bytes by path, `connections` counts
what was accepted: a second server on 127.0.0.2 proves by its zero what was not contacted.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case


class HostileServer(ThreadingHTTPServer):
    """Use as a context manager; `url(path)` gives the address of a path."""

    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        super().__init__((host, 0), Exchange)
        self.host, self.port, self.scheme = host, self.server_port, "https" if tls else "http"
        self.routes: dict[str, Handler] = {}
        self.files: dict[str, bytes] = {}  # path without its leading slash -> body
        self.commit: str | None = None  # what `main` stands for
        self.linked = True  # with a commit: sizes and hashes are told as for LFS objects
        self.seen: list[Seen] = []
        self.sent: Counter[str] = Counter()
        self.connections = 0
        self.closing = threading.Event()
        if tls is not None:  # the handshake happens in the thread of the connection
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def url(self, path: str, host: str | None = None) -> str:
        return f"{self.scheme}://{host or self.host}:{self.port}{path}"

    def count(self, method: str) -> int:
        return sum(s.method == method for s in self.seen)

    def gets(self, path: str) -> list[Seen]:
        return [s for s in list(self.seen) if s.method == "GET" and s.path == path]

    def get_request(self):
        accepted = super().get_request()
        self.connections += 1
        return accepted

    def handle_error(self, request, client_address) -> None:
        """A client that leaves early is the point of many tests."""

    def __enter__(self) -> HostileServer:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Exchange(BaseHTTPRequestHandler):
    """One request; handlers speak through `head` and `body`, or write raw bytes to `wfile`."""

    protocol_version = "HTTP/1.1"
    server: HostileServer

    def do_GET(self) -> None:
        self.close_connection = True
        path = self.path if self.command == "CONNECT" else urlsplit(self.path).path
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append(Seen(self.command, path, headers))
        handler = self.server.routes.get(path) or self._stored(path) or status(404)
        handler(self)

    do_HEAD = do_CONNECT = do_GET

    def _stored(self, path: str) -> Handler | None:
        commit = self.server.commit
        name = unquote(path).lstrip("/").replace(f"/{commit}/", "/main/")
        data = self.server.files.get(name)
        if data is None:
            return None
        digest = hashlib.sha256(data).hexdigest()
        more = {"X-Repo-Commit": commit} if commit else {}
        if commit and self.server.linked:
            more |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        return serve(data, etag=f'"{digest[:16]}"', **more)

    def head(self, code: int, **headers: object) -> None:
        self.wfile.write(f"HTTP/1.1 {code} x\r\n".encode())
        for name, value in headers.items():
            self.wfile.write(f"{name.replace('_', '-')}: {value}\r\n".encode("latin-1"))
        self.wfile.write(b"Connection: close\r\n\r\n")

    def body(self, data: bytes) -> None:
        if self.command == "HEAD":
            return
        for start in range(0, len(data), 1 << 16):
            block = data[start : start + (1 << 16)]
            # Before the write: a client that has the last byte asks for the sum at once.
            self.server.sent[urlsplit(self.path).path] += len(block)
            self.wfile.write(block)

    def wait(self, seconds: float | None = None) -> bool:
        """Do nothing until the server closes (True) or the time is over."""
        self.wfile.flush()
        return self.server.closing.wait(seconds)

    def reset(self) -> None:
        """Drop the connection with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


Handler = Callable[[Exchange], None]


def serve(data: bytes, etag: str | None = '"v1"', ranges: bool = True, **more: object) -> Handler:
    """A good server: 206 for a range whose If-Range agrees, else the whole."""

    def handler(x: Exchange) -> None:
        headers = {**more, **({"ETag": etag} if etag else {})}
        wanted = re.fullmatch(r"bytes=(\d+)-", x.headers.get("Range", ""))
        fresh = x.headers.get("If-Range") in (None, etag)
        if not (ranges and wanted and fresh):
            x.head(200, Content_Length=len(data), **headers)
            return x.body(data)
        start = int(wanted[1])
        if start >= len(data):
            return x.head(416, Content_Range=f"bytes */{len(data)}", Content_Length=0)
        rest, span = data[start:], f"bytes {start}-{len(data) - 1}/{len(data)}"
        x.head(206, Content_Range=span, Content_Length=len(rest), **headers)
        return x.body(rest)

    return handler


def in_turn(*handlers: Handler) -> Handler:
    """The first for the first request, and so on; the last one for all that follow."""
    left = list(handlers)
    return lambda x: (left.pop(0) if len(left) > 1 else left[0])(x)


def status(code: int, **headers: object) -> Handler:
    return answer(code, b"", **headers)


def answer(code: int, body: bytes, **headers: object) -> Handler:
    """Exactly this; a Content-Length only if it is given."""

    def handler(x: Exchange) -> None:
        x.head(code, **headers)
        x.body(body)

    return handler


def redirect(location: str, code: int = 302, **headers: object) -> Handler:
    return status(code, Location=location, Content_Length=0, **headers)


def reset(x: Exchange) -> None:
    x.reset()


def cut(data: bytes, after: int, **headers: object) -> Handler:
    """States the whole length, from the asked start on, and ends after `after` bytes."""

    def handler(x: Exchange) -> None:
        start = int((re.findall(r"\d+", x.headers.get("Range", "")) or ["0"])[0])
        rest = data[start:]
        span = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        x.head(206 if start else 200, Content_Length=len(rest), ETag='"v1"', **span, **headers)
        x.body(rest[:after])

    return handler


def then_wait(data: bytes, stated: int, reached: threading.Event | None = None) -> Handler:
    """Sends `data` of `stated` bytes, then nothing, with the connection open."""

    def handler(x: Exchange) -> None:
        x.head(200, Content_Length=stated, ETag='"v1"')
        x.body(data)
        if reached is not None:
            reached.set()
        x.wait()

    return handler


def drip(pieces: Iterable[bytes], every_s: float) -> Handler:
    """Writes raw pieces one at a time: a slow status line, header section or body."""

    def handler(x: Exchange) -> None:
        for piece in pieces:
            x.wfile.write(piece)
            if x.wait(every_s):
                return

    return handler


def raw(*pieces: bytes) -> Handler:
    return drip(pieces, 0.0)


def endless(x: Exchange) -> None:
    x.head(200)
    while not x.server.closing.is_set():
        x.body(bytes(1 << 16))


@contextlib.contextmanager
def silent_listener(host: str = "127.0.0.1") -> Iterator[int]:
    """A port that completes connections (in its backlog) and never says a word: a TLS stall."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen(16)
        yield listener.getsockname()[1]
