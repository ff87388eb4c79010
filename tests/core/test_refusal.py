"""Refusals: the value that is shown is the one the key names, and a misspelt key never waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib.core.refusal import Refused, refuse

SETTINGS = SimpleNamespace(threads=0, inner=SimpleNamespace(width=-3))


def test_the_shown_value_is_read_by_its_key():
    """Dotted keys reach further in; a value that is given stands for itself."""
    with pytest.raises(Refused) as caught:
        refuse(
            SETTINGS,
            (True, "threads", "use 1 or more"),
            (True, "inner.width", "use 1 or more"),
            (False, "inner", "never shown"),
            (True, "kernels.scan", "fast", "choose auto"),
        )
    assert caught.value.problems == [
        ("threads", 0, "use 1 or more"),
        ("inner.width", -3, "use 1 or more"),
        ("kernels.scan", "fast", "choose auto"),
    ]
    assert str(caught.value).startswith("threads: 0; use 1 or more; inner.width: -3; ")


def test_a_misspelt_key_fails_while_nothing_is_wrong():
    """Else it would be a traceback on the day a user's value is wrong."""
    with pytest.raises(AttributeError):
        refuse(SETTINGS, (False, "thread", "use 1 or more"))
