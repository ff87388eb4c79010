"""Optional sinks of a run: trackers (TensorBoard, Weights & Biases) and pushes to the hub.

Rule:  no sink may stop or slow a run. Trackers live in a thread each; one that raises is switched
       off with one warning. A push is a process of its own; a failed one is tried again at the next
       interval. Packages are imported on use, secrets come from the environment or a login only.
Note:  the run id of a tracker follows from the working folder, so a resumed run continues its page.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from lib.core.errors import redact
from lib.core.run_settings import Hub, Wandb

PUSH_WAIT_S = 600.0  # how long the end of a run waits for a push that is under way


class Tracker(Protocol):
    """A sink of numbers by step."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Record `numbers`."""
        ...

    def close(self) -> None:
        """Write what is still held."""
        ...


class TensorBoard:
    """Event files in `<work>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb; WANDB_MODE=offline writes to `<work>/wandb` for `wandb sync`."""

    def __init__(self, folder: Path, run: str, settings: Wandb, config: Mapping[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found]  # an extra

        self._run = wandb.init(
            project=settings.project,
            name=settings.run_name or run,
            id=folder.name,
            resume="allow",
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", settings.mode),
            config=dict(config),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """All of them at `step`."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackers:
    """The trackers that `runtime.trackers` names, each in a thread of its own."""

    def __init__(self, names: Sequence[str], warn: Callable[[str], None]) -> None:
        self._names, self._warn = names, warn
        self._failed: list[str] = []
        self._open: dict[str, tuple[ThreadPoolExecutor, Future]] = {}
        self._made: dict[str, Tracker] = {}

    def open(self, folder: Path, run: str, wandb: Wandb, config: Mapping[str, Any]) -> None:
        """Start them; one whose package is missing is switched off like one that raises."""
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(folder),
            "wandb": lambda: WeightsAndBiases(folder, run, wandb, config),
        }

        def make(name: str) -> None:
            self._made[name] = makers[name]()

        for name in self._names:
            pool = ThreadPoolExecutor(1, thread_name_prefix=name)
            self._open[name] = (pool, pool.submit(make, name))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand `numbers` to every tracker that still works; returns at once."""
        held = dict(numbers)
        for name, (pool, last) in list(self._open.items()):
            if self._works(name, last):
                self._open[name] = (pool, pool.submit(self._log_after, last, name, held, step))

    def _log_after(self, last: Future, name: str, numbers: Mapping[str, float], step: int) -> None:
        last.result()  # an earlier failure comes out of this call too, under its own name
        self._made[name].log(numbers, step)

    def close(self) -> None:
        """Wait for what is under way and end them; those that did not last are named again."""
        for name, (pool, last) in list(self._open.items()):
            if self._works(name, last, wait=True):
                self._works(name, pool.submit(self._made[name].close), wait=True)
                pool.shutdown()
        if self._failed:
            self._warn(f"without a whole record of this run: {', '.join(self._failed)}")

    def _works(self, name: str, last: Future, wait: bool = False) -> bool:
        """Whether the last call went well so far; a failed tracker is dropped, said once."""
        if not wait and not last.done():
            return True
        error = last.exception()
        if error is None:
            return True
        pool, _ = self._open.pop(name)
        pool.shutdown(wait=False, cancel_futures=True)
        self._failed.append(name)
        advice = "; pip install -e '.[trackers]'" if isinstance(error, ImportError) else ""
        self._warn(f"tracker {name} is switched off: {redact(str(error) or repr(error))}{advice}")
        return False


class HubPush:
    """Pushes exported folders to a repository of the hub, in the background, one at a time."""

    def __init__(
        self, settings: Hub, log: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self.settings, self._log, self._warn = settings, log, warn
        self._process: subprocess.Popen[str] | None = None
        self._made = self._failed = 0

    def is_free(self, wait: bool = False) -> bool:
        """Whether the push before has ended, waited for if asked; its failure is said here."""
        if wait:
            self._end()
        return not self._is_running()

    def start(self, folder: Path) -> None:
        """Push `folder` (weights, config, tokenizer, card: never optimizer state)."""
        arguments = [
            str(folder),
            self.settings.repo,
            "private" if self.settings.private else "public",
        ]
        command = [sys.executable, "-m", __name__, *arguments]
        quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # or they would fill the pipe
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quiet)

    def _is_running(self) -> bool:
        if self._process is None:
            return False
        if self._process.poll() is None:
            return True
        self._account(self._process)
        return False

    def _account(self, process: subprocess.Popen[str]) -> None:
        self._process, self._made = None, self._made + 1
        _, text = process.communicate()
        if process.returncode:
            self._failed += 1
            last = text.strip().splitlines()[-1:] or [f"exit {process.returncode}"]
            self._warn(f"push to {self.settings.repo} failed, tried again later: {redact(last[0])}")

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PUSH_WAIT_S)
            self._process.kill()  # nothing happens to one that has ended
            self._account(self._process)

    def close(self) -> None:
        """Wait for a push that is under way, and say how they went."""
        self._end()
        if self._made:
            failed = f", {self._failed} failed" if self._failed else ""
            self._log(f"{self._made} pushes to {self.settings.repo}{failed}")


def push(folder: Path, repo: str, private: bool) -> None:
    """Upload `folder` as one commit; the token comes from HF_TOKEN or the login file."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo, folder_path=str(folder), commit_message=f"weights of {folder.name}"
    )


if __name__ == "__main__":
    from lib.core.process import die_with_parent

    die_with_parent()
    push(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "private")
