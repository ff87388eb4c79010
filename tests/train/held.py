"""The training stage, held after its first step until a signal has come."""

from __future__ import annotations

import threading
from typing import Any

from lib.core import stage
from lib.core.process import StopRequest
from lib.train.observe import Observer
from stages import pretrain


def hold() -> None:
    """Patch this process."""
    came, handle, step = threading.Event(), StopRequest._handle, Observer.step

    def handled(self: StopRequest, number: int, frame: object) -> None:
        came.set()
        handle(self, number, frame)

    def held(self: Observer, *words: Any, **named: Any) -> None:
        step(self, *words, **named)
        came.wait()

    StopRequest._handle, Observer.step = handled, held  # type: ignore[method-assign]


if __name__ == "__main__":
    hold()
    raise SystemExit(
        stage.main(pretrain.STAGE, pretrain.body, pretrain.identity, modules=pretrain.modules)
    )
