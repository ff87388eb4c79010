"""One HTTP request: redirects, bounds and deadlines; the connection goes where the check said.

In:    a URL and a `Policy` (lib.core.hosts).   Out: an `Answer` with its body unread.
Rules: every hop passes the full check; the name serves TLS and Host only, the connection is made
       to a checked address, so a DNS answer that changes gains nothing. The header section is
       bounded. TLS verification has no switch.
Time:  a `Watch` shuts the socket down when the request is stalled, late or no longer wanted: one
       time-out a read would let a trickle run for hours.
"""

from __future__ import annotations

import collections
import contextlib
import email.utils
import functools
import http.client
import importlib.metadata
import os
import re
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from lib.core.errors import EnvError, InputError, Interrupted, UserError
from lib.core.hosts import Log, Policy, Stop, Trouble, bare, show

MAX_REDIRECTS = 5
MAX_HEADER_BYTES, MAX_HEADER_LINES = 64 << 10, 100
LINKED = ("x-repo-commit", "x-linked-size", "x-linked-etag")  # data.md 3.9; the first hop has them
SERVER_FAULT = "this host does not serve the file properly"
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)


class Watch:
    """Ends one request that stalls, passes its deadline or is no longer wanted.

    A thread of its own looks every `poll_s` and shuts the socket down: the reader, wherever it
    waits (TLS handshake, headers, chunk sizes, body), comes back at once and finds `reason`.
    """

    def __init__(self, policy: Policy, deadline: float, should_stop: Stop) -> None:
        self._policy, self._deadline, self._should_stop = policy, deadline, should_stop
        self._done, self._lock = threading.Event(), threading.Lock()
        self._socket: socket.socket | None = None
        self._received, self._samples = 0, collections.deque[tuple[float, int]]()
        self.reason: str | None = None
        self.stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._done.set()
        self._thread.join()
        if self._socket is not None:
            self._socket.close()

    def attach(self, connected: socket.socket) -> None:
        """Watch this socket from now on; each hop of a redirect brings its own.

        A duplicate is kept: TLS detaches the object it wraps, and the handshake is watched too.
        """
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = connected.dup()
            self._samples.clear()

    def received(self, count: int) -> None:
        """Count bytes of the body, and wait if `max_rate` says so (which is no stall)."""
        with self._lock:
            self._received += count
        wait_s = self._policy.throttle.reserve(count)
        if wait_s > 0:
            self._policy.clock.pause(wait_s, lambda: self.reason is not None)
            with self._lock:
                self._samples.clear()

    def raise_reason(self, reached: bool) -> None:
        """Raise what ended the request, if this watch did."""
        if self.stopped:
            raise Interrupted("interrupted; run the same command to continue")
        if self.reason is not None:
            raise Trouble(self.reason, reached=reached)

    def _run(self) -> None:
        while not self._done.wait(self._policy.patience.poll_s):
            self.reason = self._verdict()
            if self.reason is not None:
                with self._lock, contextlib.suppress(OSError):
                    if self._socket is not None:
                        self._socket.shutdown(socket.SHUT_RDWR)
                return

    def _verdict(self) -> str | None:
        patience, now = self._policy.patience, self._policy.clock.now()
        if self._should_stop():
            self.stopped = True
            return "stopped"
        if now > self._deadline:
            return f"not finished after {patience.deadline_s:g} s"
        with self._lock:
            if self._socket is None:  # resolving or connecting has its own time-out
                return None
            samples = self._samples
            samples.append((now, self._received))
            while len(samples) > 1 and samples[1][0] <= now - patience.window_s:
                samples.popleft()
            start, before = samples[0]
            least = patience.min_rate * patience.window_s
            if now - start >= patience.window_s and self._received - before < least:
                rate = (self._received - before) / (now - start) / 1000
                return f"stalled: {rate:.1f} KB/s over {patience.window_s:g} s"
        return None


class _BoundedLines:
    """The header section of an answer, read line by line under one bound for all of it."""

    def __init__(self, stream) -> None:  # type: ignore[no-untyped-def]  # a BufferedReader
        self.stream, self._bytes, self._lines = stream, 0, 0

    def readline(self, limit: int) -> bytes:
        line = self.stream.readline(min(limit, MAX_HEADER_BYTES - self._bytes + 1))
        self._bytes += len(line)
        self._lines += 1
        if self._bytes > MAX_HEADER_BYTES or self._lines > MAX_HEADER_LINES:
            raise InputError(
                "answer refused",
                value=f"more than {MAX_HEADER_BYTES} bytes or {MAX_HEADER_LINES} lines of headers",
                remedy=SERVER_FAULT,
            )
        return line

    def close(self) -> None:
        self.stream.close()

    def flush(self) -> None:
        self.stream.flush()


class _BoundedResponse(http.client.HTTPResponse):
    def begin(self) -> None:
        bounded = _BoundedLines(self.fp)
        self.fp = bounded  # type: ignore[assignment]  # begin() needs readline and close only
        super().begin()
        if self.fp is bounded:  # None when the answer has no body
            self.fp = bounded.stream


class _Pinned:
    """Makes a urllib3 connection go to addresses that were checked, not to what DNS says now."""

    response_class = _BoundedResponse
    addresses: list[str]
    watch: Watch

    def _new_conn(self) -> socket.socket:  # urllib3's own hook, as its SOCKS support uses it
        failure: OSError | None = None
        for address in self.addresses:
            try:
                made = socket.create_connection((address, self.port), self.timeout)  # type: ignore[attr-defined]
            except OSError as error:
                failure = error
                continue
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.watch.attach(made)  # before TLS: a silent handshake is a stall as well
            return made
        raise failure or OSError("no address")


class _Http(_Pinned, HTTPConnection):
    pass


class _Https(_Pinned, HTTPSConnection):
    pass


@dataclass(frozen=True)
class Answer:
    """An answer whose body is unread. linked: headers of LINKED seen on the way, lower case."""

    url: str
    status: int
    headers: urllib3.HTTPHeaderDict
    linked: dict[str, str]
    read: Callable[[int], bytes]  # up to so many bytes, b"" at the end; raises Trouble

    @property
    def body_bytes(self) -> int | None:
        """The body's length, if it is stated; chunks end by themselves."""
        chunked = "transfer-encoding" in self.headers
        return None if chunked else _count(self.headers.get("content-length"))

    @property
    def strong_etag(self) -> str | None:
        """The ETag if it promises equal bytes (RFC 9110 8.8.3); a weak or unquoted one does not."""
        tag = self.headers.get("etag", "")
        return tag if len(tag) > 2 and tag[0] == tag[-1] == '"' else None

    @property
    def linked_size(self) -> int | None:
        """Bytes of the file, as the hub says on the way to it."""
        return _count(self.linked.get("x-linked-size"))

    @property
    def linked_sha256(self) -> str | None:
        """The file's hash, as the hub says on the way to it."""
        digest = self.linked.get("x-linked-etag", "").strip('"')
        return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,19}", text.strip()) else None


@contextlib.contextmanager
def ask(
    method: str,
    url: str,
    policy: Policy,
    watch: Watch,
    log: Log,
    *,
    headers: dict[str, str] | None = None,
    enough: Callable[[dict[str, str]], bool] = lambda linked: False,
) -> Iterator[Answer]:
    """Send one request and follow its redirects, each hop under the full check.

    enough: given the LINKED headers so far, whether a redirect need not be followed.
    """
    first, linked, token = url, {}, policy.token
    for _ in range(MAX_REDIRECTS + 1):
        parts = policy.check(url)
        if parts.hostname not in policy.token_hosts:
            token = None  # and stays None: a later hop back does not get it again
        with contextlib.ExitStack() as opened:
            connection = opened.enter_context(
                contextlib.closing(_connect(parts, policy, watch, log))
            )
            with _troubles(watch, reached=False):
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                wanted = _headers(token, headers or {})
                connection.request(
                    method,
                    path,
                    headers=wanted,
                    preload_content=False,
                    decode_content=False,
                    enforce_content_length=False,  # fetch compares, and says it in a sentence
                )
                response = opened.enter_context(contextlib.closing(connection.getresponse()))
            for name in LINKED:
                if name in response.headers:
                    linked.setdefault(name, response.headers[name])
            target = response.headers.get("location") if response.status in _REDIRECTS else None
            if target is None or enough(linked):

                def read(limit: int, response: urllib3.HTTPResponse = response) -> bytes:
                    with _troubles(watch, reached=True):
                        block = response.read1(limit)
                    watch.raise_reason(reached=True)  # a socket shut down looks like an end
                    return block

                yield Answer(url, response.status, response.headers, linked, read)
                return
        url = _join(url, target)
        if _origin(url) != _origin(parts.geturl()):
            token = None
    raise InputError(
        f"{show(first)} not fetched",
        value=f"more than {MAX_REDIRECTS} redirects",
        remedy=SERVER_FAULT,
    )


def check_status(answer: Answer, policy: Policy, good: tuple[int, ...]) -> None:
    """Return if the status is one of `good`; else Trouble, UserError (4xx) or InputError."""
    status = answer.status
    if status in good:
        return
    if status in _RETRIED:
        wait_s = _retry_after(answer.headers.get("retry-after"), policy)
        raise Trouble(f"status {status}", reached=True, wait_s=wait_s)
    if 400 <= status < 500:
        remedy = "check the repository, the revision and the name"
        if status in (401, 403, 451):
            remedy = "ask the host for access; HF_TOKEN holds the hub's token"
        raise UserError(f"{show(answer.url)} refused", value=f"status {status}", remedy=remedy)
    raise InputError(
        f"{show(answer.url)} not fetched",
        value=f"unexpected status {status}",
        remedy=SERVER_FAULT,
    )


def _retry_after(text: str | None, policy: Policy) -> float | None:
    """Seconds that `Retry-After` asks for (RFC 9110 10.2.3); None for the past or nonsense."""
    if text is None:
        return None
    if re.fullmatch(r"\d{1,15}", text.strip()):
        return float(text)
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - policy.clock.wall()
    except (ValueError, OverflowError):
        return None
    return seconds if seconds > 0 else None


def _join(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:  # brackets that hold no address
        return "malformed:"  # which the check of the next hop refuses


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _headers(token: str | None, more: dict[str, str]) -> dict[str, str]:
    fixed = {"User-Agent": f"kumiki/{_version()}", "Accept": "*/*", "Accept-Encoding": "identity"}
    if token:
        fixed["Authorization"] = f"Bearer {token}"
    return {**fixed, "Connection": "close", **more}


def _version() -> str:
    try:
        return importlib.metadata.version("kumiki")
    except importlib.metadata.PackageNotFoundError:
        return "0"  # run from a source tree that is not installed


def _connect(parts: SplitResult, policy: Policy, watch: Watch, log: Log) -> _Http | _Https:
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    proxy = _proxy(host) if secure and host not in policy.private_hosts else None
    timeout = policy.patience.connect_s
    if proxy is not None:
        if "proxy" not in policy.said:
            policy.said.add("proxy")
            log(f"warning: a proxy is in use: {bare(proxy.geturl())}; it checks addresses, not we")
        connection = _Https(proxy.hostname or "", proxy.port or 80, timeout=timeout)
        connection.set_tunnel(host, port, _proxy_headers(proxy), scheme="http")
        with _troubles(watch, reached=False):
            connection.addresses = policy.resolve(connection.host, connection.port)
    else:
        connection = (_Https if secure else _Http)(host, port, timeout=timeout)
        connection.addresses = policy.addresses(host, port, log)
    if isinstance(connection, _Https):
        # A site with an authority of its own sets SSL_CERT_FILE; there is no way to check nothing.
        connection.ssl_context = _tls(os.environ.get("SSL_CERT_FILE") or certifi.where())
        connection.cert_reqs = ssl.CERT_REQUIRED
    connection.watch = watch
    try:
        with _troubles(watch, reached=False):
            connection.connect()
    except BaseException:
        connection.close()
        raise
    connection.timeout = policy.patience.silence_s  # from here on, for each read
    return connection


@functools.cache  # reading the bundle takes 20 ms
def _tls(authorities: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authorities)


def _proxy(host: str) -> SplitResult | None:
    """The proxy that the environment sets for https to `host`, if any."""
    url = urllib.request.getproxies().get("https")
    if not url or urllib.request.proxy_bypass(host):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise UserError("proxy not usable", value=bare(parts.geturl()), remedy="use an http:// one")
    return parts


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return urllib3.make_headers(proxy_basic_auth=user)


@contextlib.contextmanager
def _troubles(watch: Watch, reached: bool) -> Iterator[None]:
    """What the network raises within the block, as Trouble; a bad certificate is an EnvError."""
    try:
        yield
    except (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError) as error:
        watch.raise_reason(reached)
        if isinstance(error, ssl.SSLCertVerificationError | ssl.CertificateError):
            raise EnvError(
                "certificate refused",
                value=error.verify_message,
                remedy="check the clock; a CA of your site goes into SSL_CERT_FILE",
            ) from error
        raise Trouble(f"{type(error).__name__}: {error}", reached=reached) from error
