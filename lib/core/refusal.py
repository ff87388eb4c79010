"""Contradictions within settings: a dataclass gathers and refuses them in `__post_init__`."""

from __future__ import annotations

from operator import attrgetter

# Is wrong, key, remedy; the value is the attribute `key`, dotted where it lies further in. A check
# of something else (one item of a list, a name in a mapping) gives the value before the remedy.
Check = tuple[bool, str, str] | tuple[bool, str, object, str]


class Refused(ValueError):
    """Contradictions found in one dataclass: a list of (key, value, remedy)."""

    def __init__(self, problems: list[tuple[str, object, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{key}: {value}; {remedy}" for key, value, remedy in problems))


def refuse(settings: object, *checks: Check) -> None:
    """Raise `Refused` with every check whose first element is true."""
    problems: list[tuple[str, object, str]] = []
    for check in checks:
        bad, key, remedy = check[0], check[1], check[-1]
        # Read where nothing is wrong too: a misspelt key fails at once, not at a user's first slip.
        value = attrgetter(key)(settings) if len(check) == 3 else check[2]
        if bad:
            problems.append((key, value, remedy))
    if problems:
        raise Refused(problems)
