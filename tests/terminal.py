"""A command at a real pseudo-terminal: what a user sees, and keys pressed while it runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import HANG_S, ROOT

CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CTRL_C, COLUMNS = b"\x03", 100


def drive(
    words: Sequence[str], folder: Path, *, until: str = "", keys: bytes = b"",
    limit_s: float = HANG_S,
    **environment: str,
) -> tuple[int, str]:  # fmt: skip
    """(exit code, all that the terminal got); `keys` are pressed after the line with `until`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", **environment}
    process = subprocess.Popen(
        words, cwd=folder, env={**os.environ, **own}, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    text, end = b"", time.monotonic() + limit_s
    with contextlib.suppress(OSError):  # EIO: the last process has closed the terminal
        while True:
            assert time.monotonic() < end, text.decode(errors="replace")
            if select.select([ours], [], [], 0.2)[0]:
                read = os.read(ours, 65536)
                if not read:
                    break
                text += read
            if keys and until in text.rpartition(b"\n")[0].decode(errors="replace"):
                os.write(ours, keys)
                keys = b""
    code = process.wait(limit_s)
    os.close(ours)
    return code, text.decode(errors="replace")


def lines(text: str) -> list[str]:
    """What is left on the screen: each line as it was written last, without escapes."""
    plain = CONTROLS.sub("", text).replace("\r\n", "\n").replace("^C", "")
    kept = (line.rsplit("\r", 1)[-1].rstrip() for line in plain.split("\n"))
    return [line for line in kept if line]
