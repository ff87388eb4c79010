"""Downloads: bounded, verified, resumable. The final name never carries unverified bytes.

In:    a `Job` (URL, target, what is known of the file), a `Policy` (lib.core.hosts).
Out:   the file under its name and what it turned out to be, or one of our errors and no file.
Rule:  lib.core.transfer brings one file; how often, how long and how many at once stands here. A
       transfer that broke is tried `attempts` times, content that was wrong from start to end
       `CONTENT_ATTEMPTS` times: the second is rarely chance, and costs the whole file each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from lib.core import files
from lib.core.errors import (
    EnvError,
    InputError,
    Interrupted,
    KumikiError,
    raise_all,
    shorten,
)
from lib.core.hosts import Log, Policy, Stop, Trouble, bare, never, show
from lib.core.request import Watch, ask, check_status
from lib.core.transfer import Fetched, Job, Rejected, Transfer, beside

CONTENT_ATTEMPTS = 3
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Remote:
    """What a host says about a file. url is bare: no query, nothing that expires or is secret."""

    url: str
    size: int | None
    etag: str | None
    sha256: str | None  # of an LFS object, from the hub
    commit: str | None  # that a revision such as `main` stands for


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
            linked = answer.linked_size
            return Remote(
                url=bare(url),
                size=linked if linked is not None or not plain else answer.body_bytes,
                etag=answer.headers.get("etag") if plain else None,
                sha256=answer.linked_sha256,
                commit=answer.linked.get("x-repo-commit"),
            )

    return _with_retries(step, show(url), None, policy, log, should_stop)


def fetch(job: Job, policy: Policy, *, log: Log, should_stop: Stop = never) -> Fetched:
    """Bring one file; what lies there already and has the sha256 is not fetched again.

    Raises UserError (refused URL, status 4xx), InputError (wrong content), EnvError (host
    unreachable, disk), Interrupted; an older file under the name stays as it was.
    """
    target = job.target
    if job.sha256 is not None and target.is_file() and files.sha256_file(target) == job.sha256:
        for stale in beside(target):  # a kill came between the name and the end
            stale.unlink(missing_ok=True)
        return Fetched(bytes=target.stat().st_size, sha256=job.sha256, etag=None, origin="pinned")
    policy.check(job.url)  # before anything is written
    transfer = Transfer(job, policy, log, should_stop)
    try:
        return _with_retries(transfer.attempt, show(job.url), target, policy, log, should_stop)
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

    def stop() -> bool:
        return stopping.is_set() or should_stop()

    def one(job: Job) -> Fetched | KumikiError:
        try:
            fetched = fetch(job, policy, log=log, should_stop=stop)
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
        failure: Trouble | Rejected
        try:
            return step(deadline)
        except Trouble as trouble:
            failure, wait_s = trouble, trouble.wait_s or 0.0
        except Rejected as rejected:
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
    failure: Trouble | Rejected, attempts: int, shown: str, target: Path | None
) -> KumikiError:
    if isinstance(failure, Rejected):
        return failure.error
    value = f"{attempts} attempts, the last: {failure.reason}"
    again = "run the same command to continue"
    if failure.reached:
        return InputError(f"download of {shown} failed", file=target, value=value, remedy=again)
    host = urlsplit(shown).hostname
    what = f"host unreachable ({host})"
    return EnvError(what, file=target, value=value, remedy=f"check the network, then {again}")
