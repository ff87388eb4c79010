"""A git worktree that is this tree over again: changes, own files, cache, scratch, state."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from lib.core import files, params
from lib.core.errors import EnvError


def prepare(folder: Path, stage: str) -> None:
    """A worktree like this tree: local changes, own files, cache, scratch, working state."""
    _git("worktree", "prune")
    if not folder.is_dir():
        files.make_folder(folder.parent)
        _git("worktree", "add", "--detach", "--force", str(folder), "HEAD")
    _git("-C", str(folder), "checkout", "--quiet", "--force", "HEAD", "--", ".")
    changes = _git("diff", "--binary", "HEAD")
    if changes:
        subprocess.run(
            ["git", "-C", str(folder), "apply", "--whitespace=nowarn"], input=changes.encode(),
            check=True,
        )  # fmt: skip
    extra = _git("ls-files", "--others", "--exclude-standard", "-z").split("\0")
    local = [p.as_posix() for p in Path("data/local").rglob("*") if p.is_file()]
    for name in [*extra, *local, params.LOCAL]:
        if name and Path(name).is_file() and not (folder / name).exists():
            files.make_folder((folder / name).parent)
            files.link_or_copy(Path(name), folder / name)
    cache = Path(_git("rev-parse", "--show-toplevel").strip() or ".") / ".dvc/cache"
    config = f"[cache]\n    dir = {cache}\n"
    own = Path(".dvc/config.local")
    config = (own.read_text() if own.is_file() else "") + config
    files.write_bytes(folder / ".dvc/config.local", config.encode())
    for run in {stage.partition("@")[2], stage.removeprefix("train_")} - {""}:
        _share(Path("checkpoints") / run / "work", folder)
    _share(Path("data/work"), folder)


def _share(state: Path, folder: Path) -> None:
    """Let the worktree's working state be this tree's: a killed stage resumes from either."""
    files.make_folder(state)
    target = folder / state
    if not target.is_symlink():
        files.make_folder(target.parent)
        if target.is_dir():
            shutil.rmtree(target)
        target.symlink_to(state.absolute(), target_is_directory=True)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or ["git failed"])[-1]
        raise EnvError("git refuses", value=told, remedy="commit, or see git worktree list")
    return done.stdout


def remove(folder: Path) -> None:
    """Forget a worktree; what it has made lies in the cache."""
    _git("worktree", "remove", "--force", str(folder))
