"""The errors a user may meet, their exit codes, and the one place that takes secrets out of text.

Form:  `error: <what> in <file>: <value>; <what to do>`, one line, no traceback (reliability.md 3).
Codes: 2 the user's to mend, 3 damaged or missing input, 4 environment, 75 interrupted, resumable.
       Anything that is not a KumikiError is a bug: exit 1, with its traceback.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

MAX_VALUE = 80  # characters of a value that a message shows


class KumikiError(Exception):
    """An expected failure: `what` went wrong in `file`, its `value`, and the `remedy`."""

    code = 1

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        value: object = None,
        remedy: str | None = None,
    ) -> None:
        # As text: errors cross process borders, and exceptions of libraries may not survive that.
        self.value = None if value is None else str(value)
        self.what, self.file, self.remedy = what, file, remedy
        super().__init__(what)

    def __str__(self) -> str:
        line = self.what
        if self.file is not None:
            line += f" in {relative(self.file)}"
        if self.value is not None:
            line += f": {shorten(str(self.value))}"
        if self.remedy is not None:
            line += f"; {self.remedy}"
        return redact(" ".join(line.split()))

    def __reduce__(self) -> tuple:
        # Keyword-only arguments do not survive pickling by default; errors cross process borders.
        return (_rebuild, (type(self), self.what, self.file, self.value, self.remedy))


def _rebuild(kind: type[KumikiError], what, file, value, remedy) -> KumikiError:
    return kind(what, file=file, value=value, remedy=remedy)


class UserError(KumikiError):
    """Parameters, arguments, a wrong artefact, no permission at a host: exit 2."""

    code = 2


class InputError(KumikiError):
    """Damaged or missing input: exit 3."""

    code = 3


class EnvError(KumikiError):
    """Disk, memory, lock, descriptor limit, missing tool, unreachable host: exit 4."""

    code = 4


class Interrupted(KumikiError):
    """Stop asked and state committed; the same command continues: exit 75."""

    code = 75


class SeveralErrors(KumikiError):
    """Several errors found at once; printed one line each, then the count. Code of the first."""

    def __init__(self, errors: Iterable[KumikiError]) -> None:
        self.errors = list(errors)
        assert self.errors, "SeveralErrors needs at least one error"
        super().__init__("\n".join(str(error) for error in self.errors))
        self.code = self.errors[0].code

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)

    def __reduce__(self) -> tuple:
        return (SeveralErrors, (self.errors,))


def raise_all(errors: list[KumikiError]) -> None:
    """Raise nothing, the one error, or all of them together."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SeveralErrors(errors)


def report_lines(error: KumikiError) -> list[str]:
    """The lines that a command prints on stderr for `error`."""
    if isinstance(error, Interrupted):
        return [str(error)]
    if isinstance(error, SeveralErrors):
        return [f"error: {one}" for one in error.errors] + [f"{len(error.errors)} errors"]
    return [f"error: {error}"]


def shorten(text: str, limit: int = MAX_VALUE) -> str:
    """`text` cut to `limit` characters, with an ellipsis where something is missing."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def relative(path: str | Path) -> str:
    """`path` relative to the current folder where it lies below it: messages name no machine."""
    path = Path(path)
    try:
        return path.absolute().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.as_posix()


_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)", re.IGNORECASE)
_SECRET_SHAPE = re.compile(
    r"(?P<hub>\bhf_[A-Za-z0-9]{8,})"
    # Behind the header's name any token; elsewhere one that no prose, nor this very file, has.
    r"|(?P<header>Authorization\W{1,6}Bearer [\w.~+/=\-]+)"
    r"|(?P<bearer>(?<=Bearer )(?=[A-Z_.~+/=\-]*[0-9])[\w.~+/=\-]{16,})"
    r"|(?P<user>(?<=://)[^/\s@]+(?=@))"  # user:password in a URL
    r"|(?P<query>(?<=[?&])[A-Za-z0-9_\-]*(?:token|signature|sig|key|credential|policy|password|secret)"
    r"[A-Za-z0-9_\-]*=[^&\s;]+)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` with every secret replaced by `***`: values of secret-like environment variables,

    hub tokens, bearer tokens, credentials and signatures inside URLs.
    """
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name) and not value.startswith(("/", ".")):
            text = text.replace(value, "***")
    return _SECRET_SHAPE.sub("***", text)
