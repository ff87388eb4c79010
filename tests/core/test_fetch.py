"""The fetcher against a hostile server: reliability.md 5.C, rows C1 to C9 and C11."""

from __future__ import annotations

import email.utils
import errno
import functools
import gzip
import hashlib
import itertools
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lib.core import files, hosts
from lib.core.errors import EnvError, InputError, Interrupted, KumikiError, SeveralErrors, UserError
from lib.core.fetch import fetch, fetch_all, head
from lib.core.hosts import Clock, Patience, Policy, is_public
from lib.core.transfer import Fetched, Job
from tests.core.hostile import (
    HostileServer,
    answer,
    cut,
    drip,
    endless,
    in_turn,
    raw,
    redirect,
    reset,
    serve,
    silent_listener,
    status,
    then_wait,
)
from tests.faults.crash import enumerate_crashes

DATA = bytes(range(256)) * 1200  # 307,200 bytes: more than one block
SHA = hashlib.sha256(DATA).hexdigest()
HALF = len(DATA) // 2
SECRET = "s3cretvalue99"


class SkippingClock(Clock):
    """Waits cost nothing: they are noted, and the clock jumps."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def now(self) -> float:
        return super().now() + sum(self.waits)

    def pause(self, seconds, should_stop=hosts.never) -> None:
        self.waits.append(seconds)


class HeldClock(SkippingClock):
    """Runs while `runs()` holds: a machine that is busy elsewhere makes nothing late or stalled."""

    def __init__(self, runs) -> None:
        super().__init__()
        self._runs, self._lock = runs, threading.Lock()
        self._passed, self._last, self._ran = 0.0, time.monotonic(), False

    def now(self) -> float:
        with self._lock:
            real, runs = time.monotonic(), bool(self._runs(self))
            if self._ran and runs:  # time in which both ends were wanted
                self._passed += real - self._last
            self._last, self._ran = real, runs
            return self._passed + sum(self.waits)


def policy_for(**changes) -> Policy:
    """The shipped patience, but no real waiting; the loopback is private and therefore named."""
    defaults = {"private_hosts": ("127.0.0.1",), "clock": SkippingClock()}
    return Policy(**{**defaults, **changes})


BRIEF = Patience(silence_s=5, window_s=0.3, poll_s=0.02, attempts=2)  # for what really stalls


class Bench:
    """A server, a policy, a target, and everything that was said."""

    def __init__(self, server: HostileServer, folder: Path) -> None:
        self.server, self.folder, self.lines = server, folder, []
        self.policy = policy_for()
        self.target = folder / "shard.bin"
        self.part = folder / "shard.bin.part"
        self.note = folder / "shard.bin.part.json"

    def log(self, line: str) -> None:
        self.lines.append(line)

    def fetch(self, handler=None, path="/shard.bin", **known) -> Fetched:
        if handler is not None:
            self.server.routes[path] = handler
        return self.bring(self.server.url(path), self.target, **known)

    def bring(self, url, target, **known) -> Fetched:
        return fetch(Job(url=url, target=target, **known), self.policy, log=self.log)

    def refused(self, kind: type[KumikiError], *parts: str, handler=None, **known) -> KumikiError:
        """The fetch raises `kind`, its message has the parts, and no file has the final name."""
        with pytest.raises(kind) as caught:
            self.fetch(handler, **known)
        message = str(caught.value)
        assert caught.value.code == kind.code
        assert all(part in message for part in parts), message
        assert not self.target.exists()
        assert SECRET not in message + "".join(self.lines)
        return caught.value

    def half(self, etag='"v1"', data=DATA, total=None) -> None:
        """What a killed run leaves behind."""
        self.part.write_bytes(data[:HALF])
        note = {"url": self.server.url("/shard.bin"), "etag": etag, "linked": None}
        files.write_json(self.note, {**note, "total": total or len(DATA)})

    def whole(self, data=DATA) -> None:
        assert self.target.read_bytes() == data
        assert sorted(p.name for p in self.folder.iterdir()) == ["shard.bin"]
        assert self.target.stat().st_mode & 0o777 == 0o644


@pytest.fixture
def server():
    with HostileServer() as running:
        yield running


@pytest.fixture
def bench(server, tmp_path):
    return Bench(server, tmp_path)


@pytest.fixture
def elsewhere():
    """Another address; its counter proves that it was never contacted."""
    with HostileServer("127.0.0.2") as running:
        running.routes["/shard.bin"] = serve(b"stolen")
        yield running


# ---------------------------------------------------------------- the plain case


def test_a_good_file_arrives_whole_and_says_who_vouches_for_it(bench):
    """origin: a pin, the hub's header, or nobody."""
    assert bench.fetch(serve(DATA), sha256=SHA) == Fetched(
        bytes=len(DATA), sha256=SHA, etag='"v1"', origin="pinned"
    )
    bench.whole()
    linked = serve(DATA, X_Linked_Etag=f'"{SHA}"')
    assert bench.fetch(linked).origin == "server"
    assert bench.fetch(serve(DATA)).origin == "first_use"
    request = bench.server.seen[0].headers
    assert request["accept-encoding"] == "identity" and request["user-agent"].startswith("kumiki/")
    assert any("allow_private_hosts" in line for line in bench.lines)


def test_a_file_that_has_its_sha256_already_is_not_asked_for(bench):
    bench.target.write_bytes(DATA)
    bench.fetch(serve(DATA), sha256=SHA)
    assert bench.server.connections == 0
    bench.target.write_bytes(DATA[:-1])  # existence alone proves nothing
    bench.fetch(sha256=SHA)
    bench.whole()


def test_head_reads_the_hubs_headers_and_asks_no_second_host(bench, elsewhere):
    hub = {"X-Repo-Commit": "c" * 40, "X-Linked-Size": "123", "X-Linked-Etag": f'"{SHA}"'}
    bench.server.routes["/a"] = redirect(elsewhere.url("/shard.bin"), **hub)
    bench.server.routes["/b"] = serve(DATA)
    bench.server.routes["/c"] = status(405)
    found = head(bench.server.url("/a?token=" + SECRET), bench.policy, log=bench.log)
    assert (found.size, found.sha256, found.commit) == (123, SHA, "c" * 40)
    assert found.url == bench.server.url("/a") and elsewhere.connections == 0
    plain = head(bench.server.url("/b"), bench.policy, log=bench.log)
    assert (plain.size, plain.etag, plain.sha256) == (len(DATA), '"v1"', None)
    assert head(bench.server.url("/c"), bench.policy, log=bench.log).size is None
    with pytest.raises(UserError, match="status 404"):
        head(bench.server.url("/none"), bench.policy, log=bench.log)
    assert sum(bench.server.sent.values()) == 0


def test_files_are_served_like_a_hub(bench):
    """The download stage's tests build on this."""
    bench.server.files, bench.server.commit = {"shard.bin": DATA}, "d" * 40
    found = head(bench.server.url("/shard.bin"), bench.policy, log=bench.log)
    assert (found.commit, found.size, found.sha256) == ("d" * 40, len(DATA), SHA)
    assert bench.fetch().origin == "server"


def test_max_rate_is_shared_and_is_no_stall(bench):
    """307,200 bytes at 50,000 a second are 6 s, whatever the number of files."""
    bench.policy = policy_for(max_rate=50_000)
    clock = bench.policy.clock
    began = clock.now()
    bench.fetch(serve(DATA))
    bench.server.routes["/b"] = serve(DATA)
    bench.bring(bench.server.url("/b"), bench.folder / "b")
    # Real time counts towards the rate as well, so a slow machine waits less, never longer.
    assert clock.now() - began > 2 * 6.0 and sum(clock.waits) < 2 * 6.5


# ---------------------------------------------------------------- C1 to C3: answers that fail


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_c01_passing_failures_are_retried(bench, code):
    bench.fetch(in_turn(status(code), status(code), serve(DATA)))
    bench.whole()
    assert len(bench.server.gets("/shard.bin")) == 3


def test_c01_resets_and_dns_failures_are_retried(bench):
    answers = iter((None, ["127.0.0.1"], ["127.0.0.1"]))

    def flaky(host, port):
        if (found := next(answers)) is None:
            raise socket.gaierror(-3, "temporary failure in name resolution")
        return found

    bench.policy = policy_for(resolve=flaky)
    bench.fetch(in_turn(reset, serve(DATA)))
    bench.whole()


def test_c01_a_broken_transfer_continues_by_range(bench):
    """Three connections, each byte once."""
    bench.fetch(cut(DATA, after=120_000))
    bench.whole()
    assert bench.server.sent["/shard.bin"] == len(DATA)
    starts = [s.headers.get("range") for s in bench.server.gets("/shard.bin")]
    assert starts == [None, "bytes=120000-", "bytes=240000-"]
    assert all(s.headers["if-range"] == '"v1"' for s in bench.server.gets("/shard.bin")[1:])


def test_c01_retries_are_bounded_and_jittered(bench):
    bench.refused(InputError, "5 attempts", "status 503", "run the same", handler=status(503))
    assert len(bench.server.seen) == 5
    waits = bench.policy.clock.waits
    assert len(waits) == 4
    assert all(0.5 * 2**k <= w <= 1.5 * 2**k for k, w in enumerate(waits, 1)), waits


def test_c01_the_deadline_holds_over_all_attempts(bench):
    bench.policy = policy_for(patience=Patience(deadline_s=500))
    bench.refused(InputError, "2 attempts", handler=status(503, Retry_After=290))
    assert len(bench.server.seen) == 2


@pytest.mark.parametrize("cause", ["dns", "refused"])
def test_c01_an_unreachable_host_is_an_environment_error(bench, cause):
    def fails(host, port):
        raise socket.gaierror(-2, "name or service not known")

    if cause == "dns":
        bench.policy = policy_for(resolve=fails)
    with socket.socket() as closed:  # bound, not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        bench.server.port = closed.getsockname()[1]
        bench.refused(EnvError, "host unreachable (127.0.0.1)", "5 attempts", "check the network")


@pytest.mark.parametrize(
    ("asked", "waited"),
    [("7", 7), ("+100", 100), ("-5", 2), ("999999999", 300), ("+99999999", 300), ("soon", 2)],
)
def test_c02_retry_after_is_honoured_within_bounds(bench, asked, waited):
    """Seconds, a date, the past, the absurd; without a usable value the own backoff holds."""
    value, moment = asked, time.time()
    bench.policy.clock.wall = lambda: moment
    if asked.startswith("+"):
        value = email.utils.formatdate(moment + int(asked[1:]), usegmt=True)
    bench.fetch(in_turn(status(429, Retry_After=value), serve(DATA)))
    (wait,) = bench.policy.clock.waits
    assert 0.5 * waited <= wait <= 1.5 * waited if waited == 2 else waited - 1 <= wait <= waited
    said = [line for line in bench.lines if "asks to wait" in line]
    assert len(said) == (waited != 2) and all("300 s" in s for s in said if waited == 300)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 451])
def test_c03_refusals_are_not_retried_and_show_no_secret(bench, code, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    bench.policy = policy_for(token=SECRET, token_hosts=("127.0.0.1",))
    url = bench.server.url(f"/shard.bin?X-Amz-Signature=abc&other={SECRET}")
    bench.server.routes["/shard.bin"] = status(code)
    with pytest.raises(UserError) as caught:
        bench.bring(url, bench.target)
    message = str(caught.value)
    assert f"status {code}" in message and bench.server.url("/shard.bin") in message
    assert not any(s in message + "".join(bench.lines) for s in (SECRET, "abc"))
    assert len(bench.server.seen) == 1 and list(bench.folder.iterdir()) == []


# ---------------------------------------------------------------- C4, C5: content and ranges


def chunked(*pieces: bytes):
    return raw(b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n", *pieces)


WHOLE_CHUNK = b"%x\r\n" % len(DATA) + DATA + b"\r\n"


@pytest.mark.parametrize(
    ("handler", "known", "parts", "requests"),
    [
        (answer(200, DATA[:9], Content_Length=20), {}, ["short body, 9 of 20"], 5),
        (answer(200, DATA[:9]), {"size": 20}, ["short body, 9 of 20"], 5),
        (answer(200, DATA), {"size": 20}, ["body too long", "more than 20 bytes"], 3),
        (serve(DATA), {"size": 20}, ["size differs", "expected 20 bytes, found 307200"], 3),
        (answer(200, b"", Content_Length=0), {}, ["empty body"], 5),
        (answer(200, b""), {}, ["empty body"], 5),
        (serve(DATA[1:]), {"sha256": SHA}, ["sha256 differs", f"expected {SHA[:8]}…, found"], 3),
        (serve(b"<html>", Content_Type="text/html"), {}, ["a web page", "found text/html"], 3),
        (chunked(b"zz\r\n", DATA), {}, ["5 attempts"], 5),
        (chunked(b"fffff\r\n", DATA), {}, ["5 attempts"], 5),
        (chunked(WHOLE_CHUNK), {}, ["5 attempts"], 5),
    ],
    ids=[
        "short", "short, no length", "long, no length", "other length", "empty", "empty, no length",
        "other sha256", "web page", "chunk size", "chunk cut", "no last chunk",
    ],
)  # fmt: skip
def test_c04_wrong_content_never_gets_the_name(bench, handler, known, parts, requests):
    bench.refused(InputError, *parts, handler=handler, **known)
    assert len(bench.server.seen) == requests


def test_c04_the_body_beyond_its_stated_length_is_not_read(bench):
    bench.fetch(answer(200, DATA + b"more", Content_Length=len(DATA)))
    bench.whole()


def test_c04_good_chunks_are_accepted(bench):
    bench.fetch(chunked(WHOLE_CHUNK, b"0\r\n\r\n"), size=len(DATA), sha256=SHA)
    bench.whole()


def test_c04_content_that_was_wrong_once_is_fetched_again(bench):
    bench.fetch(in_turn(serve(DATA[:-1] + b"x"), serve(DATA)), sha256=SHA)
    bench.whole()


def test_c04_the_callers_check_comes_before_the_name(bench):
    """The check sees `.part`; where a hash vouches for the bytes, it is asked once."""

    def verify(path: Path) -> None:
        assert path == bench.part and not bench.target.exists()
        raise InputError("no PAR1 at the end", file=path, value="found html")

    bench.refused(InputError, "no PAR1", "shard.bin:", handler=serve(DATA), verify=verify)
    assert len(bench.server.seen) == 3
    bench.refused(InputError, "no PAR1", verify=verify, sha256=SHA)
    assert len(bench.server.seen) == 4
    assert list(bench.folder.iterdir()) == []


def test_c05_a_part_is_continued_when_all_agrees(bench):
    bench.half()
    bench.fetch(serve(DATA), sha256=SHA)
    bench.whole()
    assert bench.server.sent["/shard.bin"] == len(DATA) - HALF
    (request,) = bench.server.gets("/shard.bin")
    assert request.headers["range"] == f"bytes={HALF}-" and request.headers["if-range"] == '"v1"'


def test_c05_a_complete_part_needs_no_request(bench, monkeypatch):
    """Killed after the last byte, before the name: nobody has synced those bytes yet."""
    synced: set[int] = set()
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), real(fd)))
    bench.part.write_bytes(DATA)
    note = {"url": bench.server.url("/shard.bin"), "etag": '"v1"', "linked": None}
    files.write_json(bench.note, {**note, "total": len(DATA)})
    assert bench.fetch(sha256=SHA).etag == '"v1"'
    bench.whole()
    assert bench.target.stat().st_ino in synced
    assert bench.server.connections == 0


NEW = DATA[::-1]  # what the server has now; bytes of the old half in front of it would be damage


def rest(content_range: str, **headers: object):
    """A 206 whatever was asked, then an honest server."""
    lying = answer(206, NEW[HALF:], Content_Length=HALF, Content_Range=content_range, **headers)
    return in_turn(lying, serve(NEW, etag='"v2"'))


RIGHT_RANGE = f"bytes {HALF}-{len(DATA) - 1}/{len(DATA)}"


@pytest.mark.parametrize(
    "handler",
    [
        serve(NEW, ranges=False),
        serve(NEW, etag='"v2"'),
        in_turn(status(416, Content_Length=0), serve(NEW, etag='"v2"')),
        rest(f"bytes 0-{HALF - 1}/{len(DATA)}", ETag='"v1"'),
        rest(f"bytes {HALF + 1}-{len(DATA) - 1}/{len(DATA)}", ETag='"v1"'),
        rest(f"bytes {HALF}-{len(DATA)}/{len(DATA) + 1}", ETag='"v1"'),
        rest("nonsense", ETag='"v1"'),
        rest(RIGHT_RANGE, ETag='"v2"'),
        rest(RIGHT_RANGE, ETag='W/"v1"'),
        rest(RIGHT_RANGE),
        rest(RIGHT_RANGE, ETag='"v1"', X_Linked_Etag=SHA),
    ],
    ids=[
        "200", "changed", "416", "start 0", "start + 1", "total + 1", "no range", "other etag",
        "weak etag", "no etag", "other sha256",
    ],
)  # fmt: skip
def test_c05_any_doubt_starts_from_zero(bench, handler):
    bench.half()
    assert bench.fetch(handler).sha256 == hashlib.sha256(NEW).hexdigest()
    bench.whole(NEW)
    assert bench.server.seen[-1].headers.get("range") is None or len(bench.server.seen) == 1


@pytest.mark.parametrize("etag", ['W/"v1"', None, "v1"])
def test_c05_without_a_strong_etag_nothing_is_continued(bench, etag):
    short = answer(200, DATA[:HALF], Content_Length=len(DATA), **({"ETag": etag} if etag else {}))
    bench.fetch(in_turn(short, serve(NEW, etag=etag)))
    bench.whole(NEW)
    assert [s.headers.get("range") for s in bench.server.seen] == [None, None]


@pytest.mark.parametrize("damage", ["no note", "torn note", "other url", "too long", "other size"])
def test_c05_a_part_that_is_not_described_is_dropped(bench, damage):
    bench.half(data=NEW)
    known = {}
    if damage == "no note":
        bench.note.unlink()
    if damage == "torn note":
        bench.note.write_bytes(bench.note.read_bytes()[:-20])
    if damage == "other url":
        bench.note.write_text(bench.note.read_text().replace("shard.bin", "other.bin"))
    if damage == "too long":
        bench.half(data=NEW, total=HALF - 1)
    if damage == "other size":
        bench.half(data=NEW, total=len(DATA) + 1)
        known = {"size": len(DATA)}
    bench.fetch(serve(DATA), **known)
    bench.whole()


# ---------------------------------------------------------------- C6: who is asked


@pytest.mark.parametrize(
    "location",
    [
        "http://huggingface.co/x", "//127.0.0.2:{port}/shard.bin",
        "http://127.0.0.2:{port}/shard.bin", "https://127.0.0.2:{port}/shard.bin",
        "https://2130706434:{port}/shard.bin", "https://0x7f000002:{port}/shard.bin",
        "https://0177.0.0.2:{port}/shard.bin", "https://127.2:{port}/shard.bin",
        "https://[::1]:{port}/x", "https://[::ffff:127.0.0.2]:{port}/x", "https://10.0.0.1/x",
        "https://192.168.0.1/x", "https://169.254.169.254/latest/meta-data", "https://[fe80::1]/x",
        "https://224.0.0.1/x", "https://evilhuggingface.co/x", "https://huggingface.co.evil.com/x",
        "https://hf.co.evil.com/x", "https://hf.co/x", "https://huggingface.co./x",
        "https://huggingface.co@127.0.0.2:{port}/shard.bin",
        "https://127.0.0.2:{port}\\@huggingface.co/shard.bin", "file:///etc/passwd",
        "ftp://huggingface.co/x", "data:text/plain,x", "https:///x", "https://[::1/x",
        "https://huggingface.co:99999/x",
    ],
)  # fmt: skip
def test_c06_a_redirect_is_checked_like_the_first_url(bench, elsewhere, location):
    location = location.format(port=elsewhere.port)
    bench.refused(UserError, "refused", handler=redirect(location))
    assert elsewhere.connections == 0 and len(bench.server.seen) == 1
    assert list(bench.folder.iterdir()) == []


def test_c06_a_user_name_in_a_url_is_refused(bench):
    """It is a password in a log, or a host in disguise."""
    bench.policy = policy_for(resolve=lambda host, port: ["127.0.0.1"])
    location = f"https://me:{SECRET}@huggingface.co/x"
    bench.refused(UserError, "a URL with a user name", handler=redirect(location))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.2", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "100.100.100.200", "168.63.129.16", "0.0.0.0", "224.0.0.251", "240.0.0.1",
        "255.255.255.255", "198.18.0.1", "192.0.2.1", "::", "::1", "::127.0.0.1",
        "::ffff:127.0.0.2", "::ffff:10.0.0.1", "64:ff9b::7f00:2", "64:ff9b::a00:1",
        "2002:7f00:2::", "2001:0:7f00:2::", "fe80::1", "fe80::1%1", "fec0::1", "fd00:ec2::254",
        "ff02::1", "2001:db8::1", "2606:4700::1%1", "nonsense",
    ],
)  # fmt: skip
def test_c06_an_allowed_name_at_a_private_address_is_refused(bench, elsewhere, address):
    """Whatever DNS answers; a public address beside the private one does not help."""
    assert not is_public(address)

    def resolver(host, port):
        return ["127.0.0.1"] if host == "127.0.0.1" else ["93.184.215.14", address]

    bench.policy = policy_for(resolve=resolver)
    location = f"https://cdn.hf.co:{elsewhere.port}/shard.bin"
    bench.refused(
        UserError, "cdn.hf.co refused", "not a public address", handler=redirect(location)
    )
    assert elsewhere.connections == 0


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1", "64:ff9b::808:808", "2002:808:808::"]
)
def test_c06_public_addresses_are_public(address):
    assert is_public(address)


def test_c06_redirects_are_bounded(bench):
    """Five hops arrive, a sixth does not, a loop ends."""
    for hop in range(6):
        bench.server.routes[f"/{hop}"] = redirect(
            f"/{hop + 1}", code=(301, 302, 303, 307, 308)[hop % 5]
        )
    bench.server.routes["/6"] = serve(DATA)
    bench.fetch(path="/1")
    bench.whole()
    bench.target.unlink()
    bench.refused(InputError, "more than 5 redirects", path="/0")
    seen = len(bench.server.seen)
    bench.refused(InputError, "more than 5 redirects", handler=redirect("/shard.bin"))
    assert len(bench.server.seen) - seen == 6


def test_c06_the_connection_goes_to_the_checked_address(bench, elsewhere, monkeypatch):
    """DNS changes its answer between the check and the connection."""
    real, answers = (
        socket.getaddrinfo,
        itertools.chain(["127.0.0.1"], itertools.repeat("127.0.0.2")),
    )

    def changing(host, *rest, **more):
        return real(next(answers) if host == "mirror.test" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    bench.policy = policy_for(private_hosts=("mirror.test",))
    bench.server.routes["/shard.bin"] = serve(DATA)
    url = bench.server.url("/shard.bin", host="mirror.test")
    bench.bring(url, bench.target)
    bench.whole()
    assert bench.server.seen[0].headers["host"] == f"mirror.test:{bench.server.port}"
    assert elsewhere.connections == 0


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Path:
    """A key and a certificate for huggingface.co that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is absent: no certificate for the TLS tests")
    path = tmp_path_factory.mktemp("tls") / "pair.pem"
    command = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2"
    options = ["-subj", "/CN=x", "-addext", "subjectAltName=DNS:huggingface.co"]
    made = subprocess.run(
        [*command.split(), *options, "-keyout", "-", "-out", "-"],
        check=True,
        capture_output=True,
    )
    path.write_bytes(made.stdout)
    return path


@pytest.fixture
def secure(certificate, monkeypatch):
    """A TLS server that public addresses lead to; `.names` are those that clients asked for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    names: list[str] = []
    context.sni_callback = lambda sock, name, own: names.append(name)
    real = socket.create_connection

    def routed(address, *rest, **more):
        assert address[0] in ("93.184.215.14", "127.0.0.1")
        return real(("127.0.0.1", address[1]), *rest, **more)

    with HostileServer(tls=context) as running:
        running.names = names
        running.routes["/shard.bin"] = serve(DATA)
        monkeypatch.setattr(socket, "create_connection", routed)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        yield running


def public(host: str, port: int) -> list[str]:
    return ["93.184.215.14"]


def test_c06_the_name_serves_tls_and_host(bench, secure):
    bench.policy = policy_for(resolve=public)
    url = secure.url("/shard.bin", host="huggingface.co")
    bench.bring(url, bench.target)
    bench.whole()
    assert secure.names == ["huggingface.co"]
    assert secure.seen[0].headers["host"] == f"huggingface.co:{secure.port}"


@pytest.mark.parametrize("wrong", ["name", "authority"])
def test_c06_a_certificate_is_always_checked(bench, secure, wrong, monkeypatch):
    bench.policy = policy_for(resolve=public)
    host = "huggingface.co" if wrong == "authority" else "cdn.hf.co"
    if wrong == "authority":
        monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(EnvError, match="certificate refused"):
        bench.bring(secure.url("/shard.bin", host=host), bench.target)
    assert secure.seen == [] and secure.connections == 1


def test_c06_a_proxy_is_named_once_and_changes_no_list(bench, secure, monkeypatch):
    def tunnel(x):
        x.wfile.write(b"HTTP/1.1 200 x\r\n\r\n")
        with socket.create_connection(("127.0.0.1", secure.port)) as far:
            back = threading.Thread(target=lambda: pump(far, x.connection))
            back.start()
            pump(x.connection, far)
            back.join()

    def pump(source, sink):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    bench.server.routes[f"huggingface.co:{secure.port}"] = tunnel
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SECRET}@127.0.0.1:{bench.server.port}")
    monkeypatch.delenv("NO_PROXY", raising=False)

    def only_the_proxy(host, port):
        assert host == "127.0.0.1", "under a proxy the name is the proxy's to resolve"
        return ["127.0.0.1"]

    bench.policy = policy_for(resolve=only_the_proxy)
    for name in ("a", "b"):
        url = secure.url("/shard.bin", host="huggingface.co")
        bench.bring(url, bench.folder / name)
    assert (bench.folder / "b").read_bytes() == DATA and len(secure.seen) == 2
    warnings = [line for line in bench.lines if "warning" in line]
    assert len(warnings) == 1 and "proxy" in warnings[0] and SECRET not in warnings[0]
    with pytest.raises(UserError, match="not on the list"):
        bench.bring("https://foreign.test/x", bench.target)
    assert [s.method for s in bench.server.seen] == ["CONNECT", "CONNECT"]


def test_c06_the_token_stays_with_its_host(bench, elsewhere):
    """Neither Authorization nor cookies follow to another host, nor come back from there."""
    bench.policy = policy_for(
        private_hosts=("127.0.0.1", "127.0.0.2"), token=SECRET, token_hosts=("127.0.0.1",)
    )
    back = bench.server.url("/same")
    bench.server.routes["/same"] = serve(DATA)
    bench.server.routes["/hop"] = redirect(elsewhere.url("/away"), Set_Cookie="a=b")
    elsewhere.routes["/away"] = redirect(back)
    bench.fetch(redirect("/hop"))
    bench.whole()
    tokens = [s.headers.get("authorization") for s in bench.server.seen]
    assert tokens == [f"Bearer {SECRET}", f"Bearer {SECRET}", None]
    assert "authorization" not in elsewhere.seen[0].headers
    assert not any("cookie" in s.headers for s in bench.server.seen + elsewhere.seen)
    bench.bring(elsewhere.url("/shard.bin"), bench.folder / "b")
    assert "authorization" not in elsewhere.seen[-1].headers  # allowed, but not the token's host


def test_c06_the_token_does_not_follow_even_to_its_other_host(bench, elsewhere):
    both = ("127.0.0.1", "127.0.0.2")
    bench.policy = policy_for(private_hosts=both, token=SECRET, token_hosts=both)
    bench.fetch(redirect(elsewhere.url("/shard.bin")))
    assert "authorization" in bench.server.seen[0].headers
    assert "authorization" not in elsewhere.seen[0].headers


# ---------------------------------------------------------------- C7, C8: slow and endless

HEAD_200 = b"HTTP/1.1 200 x\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize(
    "handler",
    [
        drip([HEAD_200, *[b"x"] * 90_000], 0.01),
        then_wait(b"", 100_000),
        drip([b"HTTP/1.1 200 x\r\nA: ", *[b"x"] * 60_000], 0.01),
        drip([b"H"] * 60_000, 0.01),
        drip([b"HTTP/1.1 100 Continue\r\n\r\n"] * 40, 0.05),
    ],
    ids=["trickle", "silent body", "slow header", "slow status", "only 100"],
)
def test_c07_a_trickle_is_a_stall(bench, handler):
    """Each byte comes in time for a time-out of one read; the whole would take many minutes."""
    asked = HeldClock(lambda clock: len(bench.server.seen) > len(clock.waits))
    bench.policy = policy_for(patience=BRIEF, clock=asked)
    with pytest.raises((InputError, EnvError), match="2 attempts"):
        bench.fetch(handler)
    assert not bench.target.exists() and len(bench.server.seen) == 2


def test_c07_a_trickle_names_its_rate(bench):
    arrived: set[int] = set()  # attempts that have had bytes of the body
    clock = HeldClock(lambda clock: len(clock.waits) in arrived)
    bench.policy = policy_for(patience=BRIEF, clock=clock)
    trickle = drip([HEAD_200, *[b"x"] * 90_000], 0.01)
    received = lambda count: arrived.add(len(clock.waits))  # noqa: E731
    bench.refused(InputError, "stalled:", "KB/s over 0.3 s", handler=trickle, received=received)


def test_c07_a_silent_handshake_is_a_stall(bench):
    bench.policy = policy_for(patience=BRIEF)
    with silent_listener() as port, pytest.raises(EnvError, match=r"unreachable.*stalled"):
        bench.bring(f"https://127.0.0.1:{port}/x", bench.target)


def test_c07_the_deadline_ends_even_a_fast_transfer(bench):
    arrived = threading.Event()
    clock = HeldClock(lambda clock: arrived.is_set())
    bench.policy = policy_for(patience=Patience(deadline_s=0.2, poll_s=0.02), clock=clock)
    bench.refused(
        InputError, "1 attempts", "not finished after 0.2 s", handler=endless,
        received=lambda count: arrived.set(),
    )  # fmt: skip


def test_c07_what_came_before_a_stall_is_kept(bench):

    def stalls(clock) -> bool:
        return not clock.waits and bench.part.exists() and bench.part.stat().st_size == HALF

    bench.policy = policy_for(patience=BRIEF, clock=HeldClock(stalls))
    bench.fetch(in_turn(then_wait(DATA[:HALF], len(DATA)), serve(DATA)))
    bench.whole()
    assert bench.server.sent["/shard.bin"] == len(DATA)


def test_c08_an_endless_body_meets_the_cap(bench):
    bench.refused(InputError, "body too long", "1000000 bytes", handler=endless, max_bytes=10**6)
    assert list(bench.folder.iterdir()) == [] or bench.part.stat().st_size <= 10**6
    assert len(bench.server.seen) == 1


def test_c08_a_stated_length_beyond_the_cap_is_not_begun(bench):
    bench.refused(InputError, "file too large", handler=serve(DATA), max_bytes=1000)
    assert list(bench.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["Content_Encoding", "Transfer_Encoding"])
def test_c08_a_compressed_body_is_refused(bench, name):
    bomb = gzip.compress(bytes(10**6))
    handler = answer(200, bomb, Content_Length=len(bomb), **{name: "gzip"})
    bench.refused(InputError, "encoded answer", "gzip", handler=handler)
    assert len(bench.server.seen) == 1


@pytest.mark.parametrize(
    "headers",
    [b"A: " + b"x" * 10**6 + b"\r\n", b"A: x\r\n" * 10_000, (b"A: " + b"x" * 9000 + b"\r\n") * 90],
    ids=["1 MB header", "10,000 headers", "90 large headers"],
)
def test_c08_headers_are_bounded(bench, headers):
    handler = raw(b"HTTP/1.1 200 x\r\n", headers, b"\r\n")
    bench.refused(InputError, "65536 bytes or 100 lines of headers", handler=handler)
    assert len(bench.server.seen) == 1


def test_c08_endless_interim_answers_are_bounded(bench):
    handler = drip(itertools.repeat(b"HTTP/1.1 100 Continue\r\nA: x\r\n\r\n"), 0.0)
    bench.refused(InputError, "lines of headers", handler=handler)


# ---------------------------------------------------------------- C9, C11, kills


@pytest.mark.parametrize("says_so", [True, False])
def test_c09_a_shard_that_changed_keeps_the_old_file(bench, says_so):
    """The hub's header is believed before the first byte, other hosts are read first."""
    bench.target.write_bytes(b"old, damaged")
    new = hashlib.sha256(NEW).hexdigest()
    handler = serve(NEW, **({"X_Linked_Etag": f'"{new}"'} if says_so else {}))
    with pytest.raises(InputError, match=rf"sha256 differs.*{SHA[:8]}…, found {new[:8]}…"):
        bench.fetch(handler, sha256=SHA)
    bench.whole(b"old, damaged")
    assert len(bench.server.seen) == (1 if says_so else 3)


def jobs_for(bench, names) -> list[Job]:
    return [Job(url=bench.server.url(f"/{n}"), target=bench.folder / n, sha256=SHA) for n in names]


def test_c11_one_failing_does_not_stop_the_others(bench):
    for name in "acd":
        bench.server.routes[f"/{name}"] = serve(DATA)
    bench.server.routes["/e"] = serve(NEW)
    run = functools.partial(fetch_all, policy=bench.policy, workers=2, log=bench.log)
    done: list[str] = []
    with pytest.raises(SeveralErrors) as caught:
        run(jobs_for(bench, "abcde"), done=lambda job, fetched: done.append(job.target.name))
    assert caught.value.code == InputError.code
    assert "/b refused: status 404" in str(caught.value) and "sha256 differs" in str(caught.value)
    assert sorted(done) == ["a", "c", "d"] == sorted(p.name for p in bench.folder.iterdir())
    before = len(bench.server.seen)
    bench.server.routes["/b"] = bench.server.routes["/e"] = serve(DATA)
    results = run(jobs_for(bench, "abcde"))
    assert [r.sha256 for r in results] == [SHA] * 5
    assert {s.path for s in bench.server.seen[before:]} == {"/b", "/e"}


@pytest.mark.parametrize("cause", ["unreachable", "refused", "one of each"])
def test_c11_the_exit_code_says_what_all_failures_share(bench, cause):
    refused = jobs_for(bench, "ab")  # 404
    bench.policy = policy_for(patience=Patience(attempts=1))
    with socket.socket() as closed:  # bound, not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a"
        gone = [Job(url=url, target=job.target) for job in refused]
        jobs = {"unreachable": gone, "refused": refused, "one of each": [gone[0], refused[1]]}
        with pytest.raises(SeveralErrors) as caught:
            fetch_all(jobs[cause], bench.policy, log=bench.log)
    assert caught.value.code == {"unreachable": 4, "refused": 2, "one of each": 3}[cause]
    assert list(bench.folder.iterdir()) == []


def test_a_stop_keeps_the_part_and_says_interrupted(bench):
    """The socket is silent: only the watch can end this."""
    reached = threading.Event()
    bench.server.routes["/a"] = then_wait(DATA[:HALF], len(DATA), reached)
    bench.policy = policy_for(patience=Patience(poll_s=0.02))
    part = bench.folder / "a.part"

    def stop() -> bool:
        return reached.is_set() and part.exists() and part.stat().st_size == HALF

    jobs = jobs_for(bench, "a")
    with pytest.raises(Interrupted):
        fetch_all(jobs, bench.policy, log=bench.log, should_stop=stop)
    bench.server.routes["/a"] = serve(DATA)
    fetch_all(jobs, bench.policy, log=bench.log)
    assert bench.server.sent["/a"] == len(DATA)


KILLED = """
import sys
from pathlib import Path
from lib.core.fetch import fetch
from lib.core.hosts import Policy
from lib.core.transfer import Job
policy = Policy(private_hosts=("127.0.0.1",))
job = Job(url=sys.argv[1], target=Path(sys.argv[2]))
fetch(job, policy, log=lambda line: None)
"""


def test_a_killed_download_transfers_only_the_rest(bench):
    """SIGKILL in the middle; the byte counter of the server is the proof."""
    bench.server.routes["/shard.bin"] = then_wait(DATA[:HALF], len(DATA))
    url = bench.server.url("/shard.bin")
    child = subprocess.Popen([sys.executable, "-c", KILLED, url, str(bench.target)])
    while not (bench.part.exists() and bench.part.stat().st_size == HALF):
        assert child.poll() is None, "the child ended by itself"
        time.sleep(0.01)  # polls a condition; the test's own time limit is the bound
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert bench.fetch(serve(DATA)).sha256 == SHA
    bench.whole()
    assert bench.server.sent["/shard.bin"] == len(DATA)


def test_a_kill_at_every_write_ends_in_the_same_tree(server, tmp_path):
    server.routes["/a"] = serve(DATA)

    def action(folder: Path) -> None:
        job = Job(url=server.url("/a"), target=folder / "a", sha256=SHA)
        fetch(job, policy_for(), log=lambda line: None)

    def inspect(folder: Path) -> None:
        assert not (folder / "a").exists() or (folder / "a").read_bytes() == DATA

    def fresh(point: int) -> Path:
        path = tmp_path / f"point_{point}"
        path.mkdir()
        return path

    assert enumerate_crashes(action, fresh, inspect) >= 15


def test_a_kill_while_starting_over_never_mixes_two_versions(server, tmp_path):
    """The old half must be gone, durably, before a note speaks of the new file; no hash helps."""
    server.routes["/a"] = serve(NEW, etag='"v2"')

    def action(folder: Path) -> None:
        fetch(Job(url=server.url("/a"), target=folder / "a"), policy_for(), log=lambda line: None)

    def half_of_the_old(point: int) -> Path:
        path = tmp_path / f"point_{point}"
        path.mkdir()
        (path / "a.part").write_bytes(DATA[:HALF])
        note = {"url": server.url("/a"), "etag": '"v1"', "linked": None, "total": len(DATA)}
        files.write_json(path / "a.part.json", note)
        return path

    assert enumerate_crashes(action, half_of_the_old, skip=lambda name: ".part" in name) >= 15
    assert (tmp_path / "point_0" / "a").read_bytes() == NEW


def test_a_full_disk_is_said_and_leaves_nothing(bench, monkeypatch):
    """ENOSPC in the middle: the part is removed, it holds the space that is needed."""
    real = os.write

    def full(fd, data):
        if len(data) > 1000 and bench.part.exists() and bench.part.stat().st_size > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    bench.refused(EnvError, "disk full", "needs 307.20 kB", "free", handler=serve(DATA))
    assert not bench.part.exists()
    monkeypatch.setattr(os, "write", real)
    bench.fetch()
    bench.whole()
