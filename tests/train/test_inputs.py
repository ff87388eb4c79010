"""The length of a run given in passes over its rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lib.core.refusal import Refused
from lib.core.run_settings import Train
from lib.train.inputs import sized


def test_epochs_become_whole_steps():
    store: Any = SimpleNamespace(context=256, rows=1000)
    settings = Train(epochs=2.5, batch_tokens=2048)
    assert sized(settings, store).steps == 312  # 2,500 rows, 8 a step
    assert sized(Train(steps=7), store) == Train(steps=7)
    assert sized(Train(epochs=0.001, batch_tokens=2048), store).steps == 1
    ramped = replace(settings, batch_ramp=(0.5, 1.0))
    assert sized(ramped, store).steps == 416  # 6 rows a step on the average


@pytest.mark.parametrize("changes", [{"steps": 5, "batch_tokens": 2048}, {"batch_tokens": "auto"}])
def test_epochs_and_steps_exclude_each_other(changes):
    with pytest.raises(Refused, match="without steps"):
        Train(epochs=1.0, **changes)
