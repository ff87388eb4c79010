"""Contradictions within settings: a dataclass gathers and refuses them in `__post_init__`."""

from __future__ import annotations

Check = tuple[bool, str, object, str]  # is wrong, key, value, remedy


class Refused(ValueError):
    """Contradictions found in one dataclass: a list of (key, value, remedy)."""

    def __init__(self, problems: list[tuple[str, object, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{key}: {value}; {remedy}" for key, value, remedy in problems))


def refuse(*checks: Check) -> None:
    """Raise `Refused` with every check whose first element is true."""
    problems = [(key, value, remedy) for bad, key, value, remedy in checks if bad]
    if problems:
        raise Refused(problems)
