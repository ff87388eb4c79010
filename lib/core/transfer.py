"""One file over the network: bytes are appended where they stopped, verified whole, then named.

In:    a `Job`: a URL, a target, what is known of the file. One `attempt` at a time is asked for by
       lib.core.fetch, which knows how often and how long.
Out:   `Fetched`; else Trouble or `Rejected` (another attempt may mend it) or one of our errors.
State: `<name>.part` and `<name>.part.json`, a note of the URL, the strong ETag and the total. Bytes
       are appended only to what that note describes; any doubt starts again from zero.
Rule:  append -> fsync -> size, sha256, the caller's check -> rename (data.md 3.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.core import files, growing
from lib.core.errors import InputError, UserError
from lib.core.hosts import Log, Policy, Stop, Trouble, bare, show
from lib.core.request import SERVER_FAULT, Answer, Watch, ask, check_status

MAX_BYTES = 2 << 30
_BLOCK = 1 << 18  # bytes of one read
_SYNC_BYTES = 32 << 20  # a power loss costs at most this much of a download
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")

Origin = Literal["pinned", "server", "first_use"]
Verify = Callable[[Path], None]  # raises InputError unless the file is what it should be


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file to bring. verify: a last look at the whole file before it gets its name."""

    url: str
    target: Path
    size: int | None = None  # what the file must have, as is sha256: a pin, or a manifest's word
    sha256: str | None = None
    max_bytes: int = MAX_BYTES  # the bound where the size is unknown
    verify: Verify | None = None
    received: Callable[[int], None] = lambda count: None  # the bytes of a block, in some thread


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A file under its final name. origin: who vouches for the sha256 (data.md 3.1)."""

    bytes: int
    sha256: str
    etag: str | None
    origin: Origin


class Rejected(Exception):
    """The content is wrong: start again from zero, and give `error` when that does not help."""

    def __init__(self, error: InputError) -> None:
        self.error = error
        super().__init__(str(error))


@dataclass(frozen=True, kw_only=True)
class _Note:
    """What the bytes in `.part` are: the beginning of these `total` bytes."""

    url: str
    etag: str
    total: int
    linked: str | None  # sha256 that the hub gave


def beside(target: Path) -> tuple[Path, Path]:
    """The part and the note of a file."""
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")


class Transfer:
    """One file over all its attempts."""

    def __init__(self, job: Job, policy: Policy, log: Log, should_stop: Stop) -> None:
        self.job, self.policy, self.log, self.should_stop = job, policy, log, should_stop
        self.cap = job.size if job.size is not None else job.max_bytes
        self.part = growing.ResumableFile(job.target)
        _, self.note_path = beside(job.target)
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
            rest and answer.strong_etag == note.etag and answer.linked_sha256 in (None, note.linked)
        )

    def _open(self, answer: Answer) -> int | None:
        """Begin at zero: cut the part first, then note what it will be. Returns the total."""
        self.part.restart()
        total = answer.body_bytes
        if total is not None and self.job.size not in (None, total):
            raise Rejected(self._wrong_size(total))
        self.linked, self.etag = answer.linked_sha256, answer.strong_etag
        if total is not None and self.etag is not None:
            note = _Note(url=bare(self.job.url), etag=self.etag, total=total, linked=self.linked)
            files.write_json(self.note_path, vars(note))
        else:
            self.note_path.unlink(missing_ok=True)
        return total if total is not None else self.job.size

    def _check_linked(self, answer: Answer) -> None:
        """The hub names another content than the manifest: known before the first byte."""
        found = answer.linked_sha256
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
                raise Rejected(error) if total is not None else error
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
                raise Rejected(self._wrong_size(self.part.size))
            if expected is not None and expected != found:
                raise Rejected(self._wrong_sha256(expected, found))
            self._look(vouched=expected is not None)
        except (Rejected, InputError, UserError):  # not Interrupted: the bytes may be right
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
            raise Rejected(named) from error

    def _wrong_size(self, found: int) -> InputError:
        return self._wrong("size differs", f"expected {self.job.size} bytes, found {found}")

    def _wrong_sha256(self, expected: str, found: str) -> InputError:
        return self._wrong("sha256 differs", f"expected {expected[:8]}…, found {found[:8]}…")

    def _wrong(self, what: str, value: str) -> InputError:
        again = "run the same command to fetch it again"
        return InputError(what, file=self.job.target, value=value, remedy=again)


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
        raise Rejected(
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
