"""`kumiki push`: an exported model and its card to the hub, as one commit (pipeline.md 17.3).

Rule:  weights, config, tokenizer and card only; nothing that names this machine or holds a secret
       leaves it. The token comes from HF_TOKEN or the login, and is never shown.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.cli import tables
from lib.cli.console import note
from lib.core import artifact, files, params
from lib.core.artifact import Manifest
from lib.core.errors import EnvError, KumikiError, UserError, redact
from lib.export import amounts

TEXT = (".json", ".md", ".py", ".txt", ".jinja", ".model.txt")
# a path on a machine, as it would stand in a config: not a URL, not a relative name
ABSOLUTE = re.compile(r"(?<![\w./:-])(/(?:home|root|Users|mnt|media|tmp|var|opt)/[\w./-]+)")
CARD = "README.md"
LARGE_STATE = ("optimizer", "step_", "moments")


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Check, list, ask, upload."""
    folder = folder_of(arguments.model, root)
    repo = arguments.repo or repo_of(root)
    if repo is None or repo.count("/") != 1:
        raise UserError("no repository", value=repo, remedy="--repo USER/NAME, or runtime.hub.repo")
    manifest = Manifest.read(folder / files.MANIFEST, "export")
    artifact.verify(folder, manifest)
    card = card_of(folder, root).encode()
    changed = {CARD: card, files.MANIFEST: with_card(manifest, card).to_bytes()}
    found = [
        (p.relative_to(folder).as_posix(), p) for p in sorted(folder.rglob("*")) if p.is_file()
    ]
    for name, path in found:
        refuse_private(name, path)
    refuse_text(CARD, card.decode())
    listed = [
        {"path": name, "bytes": len(changed[name]) if name in changed else path.stat().st_size}
        for name, path in found
    ]
    total = sum(one["bytes"] for one in listed)
    state = "public" if arguments.public else "private"
    shown = {"repo": repo, "revision": arguments.revision or "main", "visibility": state}
    if not arguments.json:
        tables.put(tables.lines([(o["path"], amounts.size(o["bytes"])) for o in listed],
                                ("file", "bytes")))  # fmt: skip
        tables.put(["", f"{len(listed)} files, {amounts.size(total)} to {repo}, {state}"])
    url = None
    if not arguments.dry_run and tables.ask(f"upload to {repo}?", arguments.yes):
        url = upload(repo, found, changed, arguments.revision, private=not arguments.public)
        note(f"pushed: {url}")
    if arguments.json:
        tables.put_json({**shown, "files": listed, "bytes": total, "pushed": url})


def folder_of(name: str, root: Path | None) -> Path:
    """The export of a run, or the folder itself."""
    if (Path(name) / "kumiki.json").is_file():
        return Path(name)
    if root is None:
        raise UserError("not an export", value=name, remedy="name a folder that export@ has made")
    folder = root / "checkpoints" / name / "export"
    if not (folder / "kumiki.json").is_file():
        raise UserError("not exported", value=name, remedy=f"dvc repro export@{name}")
    return folder


def repo_of(root: Path | None) -> str | None:
    """runtime.hub.repo, inside a project."""
    hub = params.load(root).runtime.hub if root is not None else None
    return hub.repo if hub else None


def refuse_private(name: str, path: Path) -> None:
    """UserError where a file holds what must not leave: state, absolute paths, secrets."""
    if any(word in name for word in LARGE_STATE):
        raise UserError("optimizer state in an export", file=path, remedy="export the model again")
    if path.suffix in TEXT and not name.startswith("tokenizer"):
        refuse_text(name, path.read_text(encoding="utf-8", errors="replace"))


def refuse_text(name: str, text: str) -> None:
    """UserError for an absolute path or a secret in `text`."""
    if found := ABSOLUTE.search(text):
        raise UserError("absolute path in the export", file=name, value=found[1],
                        remedy="remove it; it names this machine")  # fmt: skip
    if redact(text) != text:
        raise UserError("secret in the export", file=name, remedy="remove it and revoke it")


# ---------------------------------------------------------------- card


def card_of(folder: Path, root: Path | None) -> str:
    """The export's own card with numbers, data and hashes of the project, where it lies in one."""
    base = (folder / CARD).read_text(encoding="utf-8")
    run = folder.parent.name
    if root is None or folder.parent.parent != root / "checkpoints":
        return base
    return base.rstrip() + "\n" + "".join(f"{line}\n" for line in _sections(root, run))


def with_card(manifest: Manifest, card: bytes) -> Manifest:
    """The manifest of what is sent: its card is longer than the folder's."""
    made = {"bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    entries = (replace(e, **made) if e.path == CARD else e for e in manifest.files)
    return replace(manifest, files=tuple(entries))


def _sections(root: Path, run: str) -> Iterator[str]:
    metrics = root / "metrics" / run / "eval.json"
    if metrics.is_file():
        yield "\n## Measured\n\n| metric | value |\n|---|---|"
        for name, value in sorted(files.read_json(metrics).items()):
            if value is not None:
                yield f"| {name} | {value} |"
    shards = root / "data/shards.manifest.json"
    if shards.is_file():
        yield "\n## Data\n\n| source | kind | licence |\n|---|---|---|"
        for name, source in files.read_json(shards)["recipe"]["sources"].items():
            yield f"| {name} | {source.get('kind')} | {licence(source)} |"
    yield "\n## Provenance\n"
    final = root / "checkpoints" / run / "final"
    if (final / "provenance.json").is_file():
        known = files.read_json(final / "provenance.json")
        yield f"- fingerprint {known.get('fingerprint')}, seed {known.get('seed')}"
        yield f"- manifest of the model: sha256 {files.sha256_file(final / files.MANIFEST)}"
    lock = root / "dvc.lock"
    if lock.is_file():
        yield f"- dvc.lock: sha256 {files.sha256_file(lock)}"
    if commit := git_commit(root):
        yield f"- commit {commit}"


def licence(source: dict[str, Any]) -> str:
    """What the shard manifest knows of a source's licence."""
    about = source.get("about") or {}
    found = sorted({str(one.get("licence")) for one in about.values() if one.get("licence")})
    return ", ".join(found) or str(source.get("licence") or "see the source")


def git_commit(root: Path) -> str | None:
    """HEAD, where there is one."""
    import subprocess

    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True,
                          text=True, check=False)  # fmt: skip
    return done.stdout.strip() or None if done.returncode == 0 else None


# ---------------------------------------------------------------- hub


def upload(
    repo: str, found: list[tuple[str, Path]], changed: dict[str, bytes], revision: str | None,
    *, private: bool,
) -> str:  # fmt: skip
    """One commit; files that the hub has already are not sent again, so a rerun resumes."""
    from httpx2 import TransportError  # what the hub's client speaks HTTP with
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not get_token():
        raise UserError("no token", value="HF_TOKEN", remedy="export HF_TOKEN, or `hf auth login`")
    operations = [CommitOperationAdd(name, changed.get(name, str(path))) for name, path in found]
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo, operations, commit_message="weights, tokenizer and card",
            revision=revision,
        )  # fmt: skip
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise refusal(repo, status, error) from None
    except (TransportError, OSError) as error:
        raise EnvError(
            "hub is out of reach", value=redact(str(error)) or type(error).__name__,
            remedy="run the same command again; what arrived is not sent twice",
        ) from None  # fmt: skip
    return str(done.commit_url)


def refusal(repo: str, status: int, error: Exception) -> KumikiError:
    """What an answer of the hub means for the user."""
    if status in (401, 403):
        return UserError("hub refuses", value=f"{repo}, status {status}",
                         remedy="use a token that may write there")  # fmt: skip
    text = redact(str(error).splitlines()[0]) if str(error) else f"status {status}"
    return EnvError("hub failed", value=text, remedy="run the same command again")
