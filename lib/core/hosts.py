"""Who may be asked over the network, at which address, and how patiently (reliability.md 7).

Rules: https and a host on the list; a name is resolved once and every address checked: global
       unicast only, seen through IPv6 forms that carry an IPv4 address. The exceptions stand in
       `runtime.allow_private_hosts` (tests on the loopback, a site's mirror); each use is logged.
Note:  `Trouble` is what another attempt may mend; everything else leaves as a KumikiError.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from secrets import SystemRandom
from urllib.parse import SplitResult, quote, urlsplit

from lib.core.errors import UserError

HUB_HOSTS = ("huggingface.co", "*.huggingface.co", "*.hf.co")
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_METADATA = ipaddress.ip_address("168.63.129.16")  # a cloud's host service at a public address
_PRINTABLE = "".join(map(chr, range(33, 127)))

Log = Callable[[str], None]
Stop = Callable[[], bool]


def never() -> bool:
    """The `should_stop` of a caller that never stops."""
    return False


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Every bound of time, in seconds (reliability.md 7.4)."""

    connect_s: float = 10.0
    silence_s: float = 30.0
    window_s: float = 60.0
    min_rate: float = 10_000.0  # bytes per second over `window_s`; less is a stall
    deadline_s: float = 1800.0  # a file with all its attempts and waits; the next run resumes
    attempts: int = 5
    wait_unit_s: float = 1.0  # attempt k is followed by min(60, 2^k) units x U(0.5, 1.5)
    retry_after_s: float = 300.0  # the longest wait that a host may ask for
    poll_s: float = 0.25  # how often a `Watch` looks

    def scaled(self, factor: float) -> Patience:
        """The same rules with every time multiplied, for tests; the rate stays."""
        times = {n: v * factor for n, v in vars(self).items() if n.endswith("_s")}
        return replace(self, **times)


class Clock:
    """Time and chance as the fetcher sees them; tests put their own in its place."""

    def now(self) -> float:
        """Seconds of a clock that never goes back."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since 1970, for dates that a server names."""
        return time.time()

    def jitter(self) -> float:
        """A factor between 0.5 and 1.5: clients that failed together do not return together."""
        return SystemRandom().uniform(0.5, 1.5)  # decides no byte, so it has no seed

    def pause(self, seconds: float, should_stop: Stop = never) -> None:
        """Sleep, in slices short enough to notice a stop."""
        end = self.now() + seconds
        while not should_stop() and (left := end - self.now()) > 0:
            time.sleep(min(left, 0.2))


class Throttle:
    """Shares `bytes_per_s` among all threads: each reserves the next free stretch of time."""

    def __init__(self, bytes_per_s: int | None, clock: Clock) -> None:
        self._rate, self._clock = bytes_per_s, clock
        self._free, self._lock = clock.now(), threading.Lock()

    def reserve(self, count: int) -> float:
        """Seconds to wait after having read `count` bytes."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = self._clock.now()
            self._free = max(now, self._free) + count / self._rate
            return self._free - now


def resolve(host: str, port: int) -> list[str]:
    """Every address of `host`, in the system's order. Its time-out is the system's own."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Who may be asked. allowed_hosts: those written in the sources, beside the hub's own.

    A pattern `*.name` stands for every label in front of `.name`. private_hosts
    (runtime.allow_private_hosts) may resolve to any address and speak plain http. The token goes
    to `token_hosts` alone and stays behind when a redirect leaves the host.
    """

    allowed_hosts: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()
    token: str | None = field(default=None, repr=False)
    token_hosts: tuple[str, ...] = ("huggingface.co",)
    max_rate: int | None = None  # bytes per second of all downloads under this policy together
    patience: Patience = field(default_factory=Patience)
    clock: Clock = field(default_factory=Clock)
    resolve: Callable[[str, int], list[str]] = resolve
    throttle: Throttle = field(init=False)
    said: set[str] = field(init=False, default_factory=set)  # warnings that one line is enough for

    def __post_init__(self) -> None:
        object.__setattr__(self, "throttle", Throttle(self.max_rate, self.clock))

    def check(self, url: str) -> SplitResult:
        """The parts of `url` if it may be asked for, else UserError."""
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise _refused(url, "a URL with blanks, controls or backslashes")
        try:
            parts = urlsplit(quote(url, safe=_PRINTABLE))
            host, _ = parts.hostname or "", parts.port
        except ValueError as error:
            raise _refused(url, str(error)) from error
        if "@" in parts.netloc:
            raise _refused(url, "a URL with a user name")
        if parts.scheme != "https" and not (parts.scheme == "http" and host in self.private_hosts):
            raise _refused(url, f"scheme {parts.scheme or 'missing'}, not https")
        if not self._is_listed(host):
            raise _refused(url, f"host {host or 'missing'} is not on the list")
        return parts

    def _is_listed(self, host: str) -> bool:
        if host in self.private_hosts:
            return True
        if not _NAME.fullmatch(host):
            return False
        return any(
            host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
            for pattern in (*HUB_HOSTS, *self.allowed_hosts)
        )

    def addresses(self, host: str, port: int, log: Log) -> list[str]:
        """Where `host` may be reached: resolved once, every address checked."""
        try:
            found = self.resolve(host, port)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label over 63 characters
            raise Trouble(f"{host} has no address ({error})", reached=False) from error
        if host in self.private_hosts:
            log(f"runtime.allow_private_hosts: asking {host} at {', '.join(found)}")
            return found
        for address in found:
            if not is_public(address):
                raise UserError(
                    f"{host} refused",
                    value=f"it resolves to {address}, not a public address",
                    remedy="name it in runtime.allow_private_hosts if it is yours",
                )
        return found


def _refused(url: str, why: str) -> UserError:
    return UserError(
        f"{show(url)} refused",
        value=why,
        remedy="use https and a host named in the sources or in runtime.allow_private_hosts",
    )


def is_public(address: str) -> bool:
    """Whether `address` is global unicast, looking through addresses that carry an IPv4 one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local or ip.scope_id:
            return False
    special = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback
    return ip.is_global and not (special or ip.is_link_local or ip == _METADATA)


def bare(url: str) -> str:
    """`url` without user, query and fragment: what a manifest or a note may hold."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def show(url: str) -> str:
    """`url` for a message: a signature or token in the query is never shown."""
    try:
        return bare(url) + ("?***" if urlsplit(url).query else "")
    except ValueError:
        return "a malformed URL"


class Trouble(Exception):
    """A failure that another attempt may mend.

    reached: an HTTP answer came, so the host is not unreachable. wait_s: the host asked to wait.
    """

    def __init__(self, reason: str, *, reached: bool, wait_s: float | None = None) -> None:
        self.reason, self.reached, self.wait_s = reason, reached, wait_s
        super().__init__(reason)
