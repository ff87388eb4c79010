"""Downloads: bounded, verified, resumable. The final name never carries unverified bytes.

In:    a URL, a target, what is known of the file (size, sha256), a `Policy` (lib.core.hosts).
Out:   the file under its name and what it turned out to be, or one of our errors and no file.
State: `<name>.part` and `<name>.part.json`, a note of the URL, the strong ETag and the total. Bytes
       are appended only to what that note describes; any doubt starts again from zero.
Order: append -> fsync -> size, sha256, the caller's check -> rename (data.md 3.4).
Note:  a transfer that broke is tried `attempts` times, content that was wrong from start to end
       `CONTENT_ATTEMPTS` times: the second is rarely chance, and costs the whole file each time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from lib.core import files, growing
from lib.core.errors import (
    EnvError,
    InputError,
    Interrupted,
    KumikiError,
    UserError,
    raise_all,
    shorten,
)
from lib.core.hosts import Log, Policy, Stop, Trouble, bare, never, show
from lib.core.request import SERVER_FAULT, Answer, Watch, ask, check_status

MAX_BYTES = 2 << 30
CONTENT_ATTEMPTS = 3
AGAIN = "run the same command to fetch it again"
_BLOCK = 1 << 18  # bytes of one read
_SYNC_BYTES = 32 << 20  # a power loss costs at most this much of a download
_HEX64 = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")

Origin = Literal["pinned", "server", "first_use"]
Verify = Callable[[Path], None]  # raises InputError unless the file is what it should be
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Remote:
    """What a host says about a file. url is bare: no query, nothing that expires or is secret."""

    url: str
    size: int | None
    etag: str | None
    sha256: str | None  # of an LFS object, from the hub
    commit: str | None  # that a revision such as `main` stands for


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A file under its final name. origin: who vouches for the sha256 (data.md 3.1)."""

    bytes: int
    sha256: str
    etag: str | None
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file that `fetch_all` brings; the fields are the arguments of `fetch`."""

    url: str
    target: Path
    size: int | None = None
    sha256: str | None = None
    max_bytes: int = MAX_BYTES
    verify: Verify | None = None
    received: Callable[[int], None] = lambda count: None  # the bytes of a block, in some thread


def head(url: str, policy: Policy, *, log: Log, should_stop: Stop = never) -> Remote:
    """Ask for a file's size, ETag, sha256 and commit; unknown ones are None.

    The hub answers with a redirect that already says it all: the second host is then not asked.
    """

    def step(deadline: float) -> Remote:
        with (
            Watch(policy, deadline, should_stop) as watch,
            ask("HEAD", url, policy, watch, log, enough=lambda n: "x-linked-size" in n) as answer,
        ):
            if "x-linked-size" not in answer.linked or answer.status >= 400:
                check_status(answer, policy, (200, 204, 405, 501))  # some hosts know no HEAD
            plain = answer.status == 200
            linked_size = _count(answer.linked.get("x-linked-size"))
            return Remote(
                url=bare(url),
                size=linked_size if linked_size is not None or not plain else _length(answer),
                etag=answer.headers.get("etag") if plain else None,
                sha256=_linked_sha256(answer),
                commit=answer.linked.get("x-repo-commit"),
            )

    return _with_retries(step, show(url), None, policy, log, should_stop)


def fetch(
    url: str,
    target: Path,
    policy: Policy,
    *,
    size: int | None = None,
    sha256: str | None = None,
    max_bytes: int = MAX_BYTES,
    verify: Verify | None = None,
    received: Callable[[int], None] = lambda count: None,
    log: Log,
    should_stop: Stop = never,
) -> Fetched:
    """Bring `url` to `target`; what lies there already and has the sha256 is not fetched again.

    size, sha256: what the file must have (a pin, or a manifest's word). max_bytes: the bound where
    the size is unknown. verify: a last look at the whole file before it gets its name.
    Raises UserError (refused URL, status 4xx), InputError (wrong content), EnvError (host
    unreachable, disk), Interrupted; an older file under the name stays as it was.
    """
    if sha256 is not None and target.is_file() and files.sha256_file(target) == sha256:
        for stale in _beside(target):  # a kill came between the name and the end
            stale.unlink(missing_ok=True)
        return Fetched(bytes=target.stat().st_size, sha256=sha256, etag=None, origin="pinned")
    job = Job(
        url=url, target=target, size=size, sha256=sha256, max_bytes=max_bytes, verify=verify,
        received=received,
    )  # fmt: skip
    policy.check(url)  # before anything is written
    transfer = _Transfer(job, policy, log, should_stop)
    try:
        return _with_retries(transfer.attempt, show(url), target, policy, log, should_stop)
    except Interrupted:
        transfer.part.sync()
        raise
    finally:
        transfer.close()


def fetch_all(
    jobs: Sequence[Job],
    policy: Policy,
    *,
    workers: int = 4,
    log: Log,
    should_stop: Stop = never,
    done: Callable[[Job, Fetched], None] = lambda job, fetched: None,
) -> list[Fetched]:
    """Fetch all jobs in threads; the results are in the order of the jobs.

    One failing does not stop the others, and what was verified stays. At the end every failure is
    listed: exit 3, but 4 if no host could be reached, 2 if every one was refused. done: called
    after each file, in some thread.
    """
    stopping = threading.Event()

    def one(job: Job) -> Fetched | KumikiError:
        try:
            fetched = fetch(
                job.url,
                job.target,
                policy,
                size=job.size,
                sha256=job.sha256,
                max_bytes=job.max_bytes,
                verify=job.verify,
                received=job.received,
                log=log,
                should_stop=lambda: stopping.is_set() or should_stop(),
            )
        except Interrupted:
            raise
        except KumikiError as error:
            log(f"failed, the others go on: {error}")
            return error
        done(job, fetched)
        return fetched

    with ThreadPoolExecutor(workers, thread_name_prefix="fetch") as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            results = [future.result() for future in futures]
        finally:  # a signal or a bug: the threads flush what they have and leave
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
    failures = [result for result in results if isinstance(result, KumikiError)]
    raise_all(_of_one_class(failures))
    return [result for result in results if isinstance(result, Fetched)]


def _of_one_class(failures: list[KumikiError]) -> list[KumikiError]:
    """The failures, all as InputError unless they agree on another class: one exit code."""
    if len({type(error) for error in failures}) <= 1:
        return failures
    return [InputError(e.what, file=e.file, value=e.value, remedy=e.remedy) for e in failures]


# ---------------------------------------------------------------- attempts


class _Rejected(Exception):
    """The content is wrong: start again from zero, and give `error` when that does not help."""

    def __init__(self, error: InputError) -> None:
        self.error = error
        super().__init__(str(error))


def _with_retries(
    step: Callable[[float], T],
    shown: str,
    target: Path | None,
    policy: Policy,
    log: Log,
    should_stop: Stop,
) -> T:
    """Call `step(deadline)` until it succeeds, within the attempts and the deadline of a file."""
    patience, clock = policy.patience, policy.clock
    deadline, rejections = clock.now() + patience.deadline_s, 0
    for attempt in range(1, patience.attempts + 1):
        if should_stop():
            break
        failure: Trouble | _Rejected
        try:
            return step(deadline)
        except Trouble as trouble:
            failure, wait_s = trouble, trouble.wait_s or 0.0
        except _Rejected as rejected:
            failure, wait_s = rejected, 0.0
            rejections += 1
        if wait_s > patience.retry_after_s:
            log(f"{shown} asks to wait {wait_s:g} s; waiting {patience.retry_after_s:g} s at most")
            wait_s = patience.retry_after_s
        elif wait_s:
            log(f"{shown} asks to wait {wait_s:g} s; waiting")
        backoff_s = min(60.0, 2.0**attempt) * patience.wait_unit_s * clock.jitter()
        wait_s = max(wait_s, backoff_s)
        late = clock.now() + wait_s >= deadline
        if attempt == patience.attempts or rejections == CONTENT_ATTEMPTS or late:
            raise _final(failure, attempt, shown, target)
        why = shorten(str(failure))
        log(f"attempt {attempt} at {shown} failed ({why}); again in {wait_s:.1f} s")
        clock.pause(wait_s, should_stop)
    raise Interrupted("interrupted; run the same command to continue")


def _final(
    failure: Trouble | _Rejected, attempts: int, shown: str, target: Path | None
) -> KumikiError:
    if isinstance(failure, _Rejected):
        return failure.error
    value = f"{attempts} attempts, the last: {failure.reason}"
    again = "run the same command to continue"
    if failure.reached:
        return InputError(f"download of {shown} failed", file=target, value=value, remedy=again)
    host = urlsplit(shown).hostname
    what = f"host unreachable ({host})"
    return EnvError(what, file=target, value=value, remedy=f"check the network, then {again}")


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,19}", text.strip()) else None


def _length(answer: Answer) -> int | None:
    """The body's length, if it is stated; chunks end by themselves."""
    return (
        None
        if "transfer-encoding" in answer.headers
        else _count(answer.headers.get("content-length"))
    )


def _linked_sha256(answer: Answer) -> str | None:
    digest = answer.linked.get("x-linked-etag", "").strip('"')
    return digest if _HEX64.fullmatch(digest) else None


def _strong_etag(answer: Answer) -> str | None:
    """The ETag if it promises equal bytes (RFC 9110 8.8.3); a weak or unquoted one does not."""
    tag = answer.headers.get("etag", "")
    return tag if len(tag) > 2 and tag[0] == tag[-1] == '"' else None


# ---------------------------------------------------------------- one file


@dataclass(frozen=True, kw_only=True)
class _Note:
    """What the bytes in `.part` are: the beginning of these `total` bytes."""

    url: str
    etag: str
    total: int
    linked: str | None  # sha256 that the hub gave


def _beside(target: Path) -> tuple[Path, Path]:
    """The part and the note of a file."""
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")


class _Transfer:
    """One file over all its attempts."""

    def __init__(self, job: Job, policy: Policy, log: Log, should_stop: Stop) -> None:
        self.job, self.policy, self.log, self.should_stop = job, policy, log, should_stop
        self.cap = job.size if job.size is not None else job.max_bytes
        self.part = growing.ResumableFile(job.target)
        _, self.note_path = _beside(job.target)
        self.linked: str | None = None
        self.etag: str | None = None

    def close(self) -> None:
        """Keep what the next run can continue, and nothing else."""
        if self.part.size == 0:
            self.part.remove()
            self.note_path.unlink(missing_ok=True)
        self.part.close()

    def attempt(self, deadline: float) -> Fetched:
        """Bring what is missing, verify, name."""
        note = self._continued()
        if note is None or self.part.size < note.total:
            with Watch(self.policy, deadline, self.should_stop) as watch:
                while not self._receive(note, watch):
                    self.log(f"{show(self.job.url)} cannot be continued, it starts from zero")
                    note = None
        else:
            self.etag, self.linked = note.etag, note.linked
        return self._finish()

    def _continued(self) -> _Note | None:
        """The note, if it describes the bytes in `.part` and the file that is wanted."""
        note = _read_note(self.note_path)
        wanted = (
            note is not None and 0 < self.part.size <= note.total and note.url == bare(self.job.url)
        )
        if not wanted and self.part.size:
            self.part.restart()
        return note if wanted else None

    def _receive(self, note: _Note | None, watch: Watch) -> bool:
        """Send the request and append its body; False if it must be sent again without a range."""
        headers = {}
        if note is not None:
            headers = {"Range": f"bytes={self.part.size}-", "If-Range": note.etag}
        with ask("GET", self.job.url, self.policy, watch, self.log, headers=headers) as answer:
            if note is not None and (
                answer.status == 416 or (answer.status == 206 and not self._fits(answer, note))
            ):
                self.part.restart()
                return False
            check_status(answer, self.policy, (200, 206) if note is not None else (200,))
            _check_encoding(answer, self.job.target)
            self._check_linked(answer)
            total = note.total if note is not None and answer.status == 206 else self._open(answer)
            self._append(answer, total, watch)
        return True

    def _fits(self, answer: Answer, note: _Note) -> bool:
        """Whether a 206 carries exactly the missing rest of the same bytes."""
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", "").strip())
        expected = (self.part.size, note.total - 1, note.total)
        rest = found is not None and tuple(map(int, found.groups())) == expected
        self.etag, self.linked = note.etag, note.linked
        return (
            rest
            and _strong_etag(answer) == note.etag
            and _linked_sha256(answer) in (None, note.linked)
        )

    def _open(self, answer: Answer) -> int | None:
        """Begin at zero: cut the part first, then note what it will be. Returns the total."""
        self.part.restart()
        total = _length(answer)
        if total is not None and self.job.size not in (None, total):
            raise _Rejected(self._wrong_size(total))
        self.linked, self.etag = _linked_sha256(answer), _strong_etag(answer)
        if total is not None and self.etag is not None:
            note = _Note(url=bare(self.job.url), etag=self.etag, total=total, linked=self.linked)
            files.write_json(self.note_path, vars(note))
        else:
            self.note_path.unlink(missing_ok=True)
        return total if total is not None else self.job.size

    def _check_linked(self, answer: Answer) -> None:
        """The hub names another content than the manifest: known before the first byte."""
        found = _linked_sha256(answer)
        if self.job.sha256 is not None and found is not None and found != self.job.sha256:
            self.part.restart()
            raise self._wrong_sha256(self.job.sha256, found)

    def _append(self, answer: Answer, total: int | None, watch: Watch) -> None:
        cap = self.cap if total is None else min(self.cap, total)
        if total is not None and total > self.cap:
            raise self._wrong("file too large", f"{total} bytes, at most {self.cap}")
        files.check_space(self.job.target.parent, (total or self.part.size) - self.part.size)
        synced = self.part.size
        while block := answer.read(_BLOCK):
            if self.part.size + len(block) > cap:
                error = self._wrong("body too long", f"more than {cap} bytes")
                raise _Rejected(error) if total is not None else error
            self.part.append(block, total or 0)
            watch.received(len(block))
            self.job.received(len(block))
            if self.part.size - synced >= _SYNC_BYTES:
                self.part.sync()
                synced = self.part.size
        if total is not None and self.part.size < total:
            raise Trouble(f"short body, {self.part.size} of {total} bytes", reached=True)
        if self.part.size == 0 and self.job.size != 0:
            raise Trouble("empty body", reached=True)

    def _finish(self) -> Fetched:
        """Verify the whole file, then give it its name."""
        self.part.sync()
        found = files.sha256_file(self.part.part)
        expected = self.job.sha256 or self.linked
        try:
            if self.job.size not in (None, self.part.size):
                raise _Rejected(self._wrong_size(self.part.size))
            if expected is not None and expected != found:
                raise _Rejected(self._wrong_sha256(expected, found))
            self._look(vouched=expected is not None)
        except (_Rejected, InputError, UserError):  # not Interrupted: the bytes may be right
            self.part.restart()
            raise
        origin: Origin = "first_use"
        if expected is not None:
            origin = "pinned" if self.job.sha256 is not None else "server"
        done = Fetched(bytes=self.part.size, sha256=found, etag=self.etag, origin=origin)
        self.part.commit()
        self.note_path.unlink(missing_ok=True)
        return done

    def _look(self, vouched: bool) -> None:
        """The caller's check. Where a sha256 vouches for the bytes, fetching again is no help."""
        if self.job.verify is None:
            return
        try:
            self.job.verify(self.part.part)
        except InputError as error:
            named = InputError(
                error.what, file=self.job.target, value=error.value, remedy=error.remedy
            )
            if vouched:
                raise named from error
            raise _Rejected(named) from error

    def _wrong_size(self, found: int) -> InputError:
        return self._wrong("size differs", f"expected {self.job.size} bytes, found {found}")

    def _wrong_sha256(self, expected: str, found: str) -> InputError:
        return self._wrong("sha256 differs", f"expected {expected[:8]}…, found {found[:8]}…")

    def _wrong(self, what: str, value: str) -> InputError:
        return InputError(what, file=self.job.target, value=value, remedy=AGAIN)


def _check_encoding(answer: Answer, target: Path) -> None:
    headers = answer.headers
    for name, plain in (("content-encoding", "identity"), ("transfer-encoding", "chunked")):
        value = headers.get(name, "").strip().lower()
        if value not in ("", plain):
            raise InputError(
                f"encoded answer from {show(answer.url)}",
                file=target,
                value=f"{name} {value}, identity was asked for",
                remedy=SERVER_FAULT,
            )
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "text/html" and target.suffix not in (".html", ".htm"):
        raise _Rejected(
            InputError(
                f"a web page came from {show(answer.url)}",
                file=target,
                value=f"expected the file, found {kind}",
                remedy="check the URL, and whether the host asks for a login",
            )
        )


def _read_note(path: Path) -> _Note | None:
    """The note beside a part; a damaged one describes nothing."""
    try:
        raw = files.read_json(path)
        note = _Note(**raw)
    except (UserError, InputError, TypeError):
        return None
    ok = isinstance(note.etag, str) and isinstance(note.total, int) and isinstance(note.url, str)
    return note if ok else None
