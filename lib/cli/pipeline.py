"""What dvc.yaml, dvc.lock and the working folders say of every stage, without asking DVC.

Rule:  reads files only, so it works while `dvc repro` holds its lock. Code and small files are
       hashed; of folders the existence is looked at, unless all of it is to be verified.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.core import artifact, dag, params
from lib.core.artifact import Manifest

SMALL = 16 * 2**20  # files up to this size are hashed


@dataclass(kw_only=True)
class State:
    """One stage: done, stale, running, interrupted or missing, and why."""

    stage: str
    state: str
    reason: str = ""
    pid: int | None = None
    step: int | None = None
    steps: int | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    loss: float | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def states(raw: Mapping[str, Any]) -> list[State]:
    """Every stage in the order of dvc.yaml; raw: params.yaml as a mapping."""
    path = Path("dvc.lock")
    locked = (params.read_yaml(path).get("stages") or {}) if path.is_file() else {}
    found: list[State] = []
    stale_outputs: dict[str, str] = {}
    for name, body in expand(raw):
        outs = outputs(body)
        deps = [d for d in body.get("deps", []) if d not in outs]
        state = _state(name, body, locked.get(name), outs, stale_outputs, deps, raw)
        if state.state != "done":
            stale_outputs |= dict.fromkeys(outs, name)
        found.append(state)
    return found


def expand(raw: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, body) of every stage, `foreach` items written out as DVC does."""
    for name, body in dag.stages_of(Path()).items():
        section = body.get("foreach")
        if section is None:
            yield name, _filled(body, {"profile": raw.get("profile")})
            continue
        items: Any = raw
        for part in str(section).strip("${} ").split("."):
            items = (items or {}).get(part)
        for key, item in (items or {}).items():
            values = {"key": key, "profile": raw.get("profile")}
            values |= {f"item.{k}": v for k, v in (item or {}).items()}
            yield f"{name}@{key}", _filled(body, values)


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return re.sub(r"\$\{([\w.]+)\}", lambda m: str(values.get(m[1], m[0])), value)
    if isinstance(value, Mapping):
        return {_filled(k, values): _filled(v, values) for k, v in value.items() if k != "foreach"}
    return [_filled(v, values) for v in value] if isinstance(value, list) else value


def outputs(body: Mapping[str, Any]) -> list[str]:
    """Paths that a stage makes, metrics and plots among them."""
    every = [*body.get("outs", []), *body.get("metrics", []), *body.get("plots", [])]
    return [one if isinstance(one, str) else next(iter(one)) for one in every]


def _state(
    name: str,
    body: Mapping[str, Any],
    locked: Mapping[str, Any] | None,
    outs: list[str],
    upstream: Mapping[str, str],
    deps: list[str],
    raw: Mapping[str, Any],
) -> State:
    work = newest_work(body["cmd"], name)
    for out in outs:
        if holder := held_by(Path(out)):
            return _progress(State(stage=name, state="running", reason=holder), work, holder)
    absent = [out for out in outs if not Path(out).exists()]
    unfinished = work is not None and not (work / "done.json").is_file()
    if absent and unfinished and (step := last_step(work)) is not None:
        return State(stage=name, state="interrupted", step=step, reason=f"at step {step}")
    if absent and work is not None and unfinished and any(work.glob("units/*")):
        return State(stage=name, state="interrupted", reason="its finished units are kept")
    if locked is None or absent:
        return State(stage=name, state="missing", reason=absent[0] if absent else "never run")
    if reason := _changed(body, locked, deps, raw):
        return State(stage=name, state="stale", reason=reason)
    above = next((upstream[d] for d in deps if d in upstream), None)
    if above:
        return State(stage=name, state="stale", reason=f"after {above}")
    return State(stage=name, state="done")


def _changed(
    body: Mapping[str, Any], locked: Mapping[str, Any], deps: list[str], raw: Mapping[str, Any]
) -> str:
    """The first thing that is not as dvc.lock remembers it; empty where all is."""
    if locked.get("cmd") != body["cmd"]:
        return "its command"
    known = {entry["path"]: entry for entry in locked.get("deps", [])}
    for path in deps:
        if path not in known:
            return f"{path} is new"
        if not Path(path).exists():
            return f"{path} is gone"
        entry = known[path]
        small = Path(path).is_file() and Path(path).stat().st_size <= SMALL
        if small and md5(Path(path)) != entry.get("md5"):
            return path
    kept = (locked.get("params") or {}).get(params.PARAMS, {})
    for key in body.get("params", []):
        if key not in kept or _lookup(raw, key) != kept[key]:
            return key
    return ""


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def md5(path: Path) -> str:
    """As dvc.lock has it."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def held_by(out: Path) -> str | None:
    """What the holder of an output's lock says of itself; None where nobody holds it."""
    path = out.parent / f".{out.name}.lock"
    if not path.is_file():
        return None
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read(400).decode(errors="replace").strip() or "another process"
    return None


def newest_work(cmd: str, name: str) -> Path | None:
    """The newest working folder of a stage."""
    words = cmd.split()
    module = dag.module_of(cmd).removeprefix("stages.")
    item = name.partition("@")[2]
    if "--run" in words:
        item = words[words.index("--run") + 1]
    folders = [Path("data/work") / (f"{module}_{item}" if item else module)]
    folders.append(Path("checkpoints") / item / "work" / f"{module}_{item}")
    found = [p for f in folders for p in f.glob("*") if p.is_dir() and not p.name.startswith(".")]
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.as_posix()), default=None)


def last_step(work: Path | None) -> int | None:
    """The newest checkpoint below a working folder."""
    steps = [int(p.name[5:]) for p in (work.glob("step_*") if work else ()) if p.name[5:].isdigit()]
    return max(steps, default=None)


def _progress(state: State, work: Path | None, holder: str) -> State:
    """Step, rate and loss of a running stage, from the end of its log."""
    found = re.search(r"pid (\d+)", holder)
    state.pid = int(found[1]) if found else None
    log = work / "training_log.jsonl" if work else None
    if log is None or not log.is_file():
        return state
    last: dict[str, Any] = {}
    for line in log.read_bytes()[-20_000:].splitlines():
        try:
            last |= json.loads(line)
        except ValueError:
            continue  # the first piece of the tail, or a line being written
    run = work.parent.name.partition("_")[2] if work else ""
    settings = params.load().train.get(run)
    state.step, state.loss = last.get("step"), last.get("loss")
    state.tokens_per_s, state.steps = last.get("tokens_per_s"), settings and settings.steps
    if state.step is not None and state.steps and last.get("time"):
        state.eta_s = (state.steps - state.step) * last["time"]
    return state


def scratch_problems(full: bool = False, keys: Sequence[str] = ()) -> list[str]:
    """What the manifests name and scratch does not hold; hashed where `full`; of `keys` alone."""
    found = []
    for path in manifests():
        manifest = Manifest.read(path)
        for folder, entries in folders_of(manifest):
            if keys and folder.name not in keys:
                continue
            if full:
                bad = artifact.damaged(folder, entries, full=True)
            else:
                bad = {e.path: "missing" for e in entries if not (folder / e.path).is_file()}
            found += [f"{path}: {folder.name}/{name} {told}" for name, told in bad.items()]
    return found


def manifests() -> list[Path]:
    """The manifests in the workspace whose bytes lie in scratch."""
    return sorted([*Path("data").glob("*.manifest.json"), *Path("data/tokens").glob("*.json")])


def folders_of(manifest: Manifest) -> list[tuple[Path, list[artifact.FileEntry]]]:
    """(folder in scratch, its files) of a manifest; that of shards has a folder for each source."""
    if manifest.kind != "shards":
        return [(artifact.scratch_folder(manifest.kind, manifest.key), list(manifest.files))]
    keys: dict[str, list[artifact.FileEntry]] = {}
    for entry in manifest.files:
        source, _, name = entry.path.partition("/")
        keys.setdefault(source, []).append(
            artifact.FileEntry(path=name, bytes=entry.bytes, sha256=entry.sha256)
        )
    places = {name: source_key(manifest, name) for name in keys}
    return [(artifact.scratch_folder("shards", key), keys[n]) for n, key in places.items() if key]


def source_key(manifest: Manifest, source: str) -> str | None:
    """The key of one source's folder: its identity without the number of shards."""
    identity = manifest.recipe["sources"].get(source)
    return None if identity is None else artifact.key_of("shards", identity)


def total_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def in_use(root: Path) -> int:
    """Bytes of scratch."""
    return total_bytes(root) if root.is_dir() else 0
