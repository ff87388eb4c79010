"""Ramps: the sum before a step is the sum of the steps before it, wherever the parts end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lib.core.ramp import Ramp


def test_equal_parts_of_a_run():
    ramp = Ramp(values=(1, 2, 4), steps=7)
    assert [ramp.at(step) for step in range(9)] == [1, 1, 1, 2, 2, 4, 4, 4, 4]
    assert [ramp.before(step) for step in range(9)] == [0, 1, 2, 3, 5, 7, 11, 15, 19]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 60))
def test_before_is_the_sum_of_what_came_before(values, steps, step):
    """More parts than steps, and steps beyond the end, included."""
    ramp = Ramp(values=tuple(values), steps=steps)
    assert ramp.before(step) == sum(ramp.at(earlier) for earlier in range(step))
