"""Datasets of the hub, or of local files, streamed by `datasets` into Parquet shards.

In:   an `hf_dataset` source. Out: shards of 8,192 rows, one column `text`, in stream order; a
      sample without text is a null, which the reader counts as a rejected record.
Law:  each shard's note stores the stream's state after it, so a kill costs at most one shard and
      the bytes are those of an undisturbed run. A last, shorter shard bears its rows in its name.
Note: `datasets` brings its own client: revisions are pinned and no script is run, but the address
      and rate rules of lib.core.fetch do not reach it; the log says so.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.core import files
from lib.core.artifact import FileEntry
from lib.core.data_settings import HubDatasetSource
from lib.core.errors import EnvError, InputError, UserError
from lib.core.progress import watched
from lib.data.raw.shards import ShardFolder, is_utf8, write_parquet
from lib.data.vocab import chat

SHARD_ROWS, ROW_GROUP = 8192, 1024
_LOCAL = {"parquet": (".parquet",), "json": (".jsonl", ".jsonl.gz", ".json")}  # builder -> suffixes
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a source gave: entries by split, and splits that ended before the asked number."""

    entries: dict[str, list[FileEntry]] = field(default_factory=dict)
    short: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> {asked, found}


def local_files(source: HubDatasetSource) -> tuple[str, dict[str, list[Path]]] | None:
    """Builder and files by split when `repo` is a folder or a file on this machine, else None.

    In a folder a split's files begin with `<split>-` or `<split>.`; Parquet goes first.
    """
    root = Path(source.repo)
    if not root.exists():
        return None
    wanted = (
        [source.train_split] if source.eval_from_train else [source.train_split, source.eval_split]
    )
    for builder, suffixes in _LOCAL.items():
        if root.is_file():
            if root.name.endswith(suffixes):
                return builder, {source.train_split: [root]}
            continue
        names = sorted(p for p in root.iterdir() if p.name.endswith(suffixes))
        found = {s: [p for p in names if _belongs(p.name, s)] for s in wanted}
        if found[source.train_split]:
            return builder, {s: paths for s, paths in found.items() if paths}
    raise UserError(
        "no Parquet or JSON lines of this split",
        file=root,
        value=source.train_split,
        remedy="name the files <split>-*.parquet or <split>.jsonl",
    )


def _belongs(name: str, split: str) -> bool:
    rest = name.removeprefix(split)
    return rest != name and rest[0] in ".-"


def materialise(
    source: HubDatasetSource,
    folder: ShardFolder,
    log: Callable[[str], None],
    token: str | None = None,
) -> Samples:
    """Make every shard that `source` asks for and that is not right already.

    token: for gated datasets; None lets the library take HF_TOKEN from the environment. Raises
    UserError (no such dataset, split or field), InputError (no sample, damaged data), EnvError
    (host out of reach). The caller holds the folder's lock.
    """
    samples = Samples()
    head = source.max_eval_samples if source.eval_from_train else 0
    plan = [
        ("val", source.train_split if head else source.eval_split, 0, source.max_eval_samples),
        ("train", source.train_split, head, source.max_train_samples),
    ]
    for split, origin, offset, wanted in plan:
        shuffled = source.shuffle is not None and origin == source.train_split
        stream = _Stream(
            lambda o=origin, n=offset: _open(source, folder, o, n, token, log), shuffled
        )
        entries = _take_split(source, folder, split, stream, wanted)
        found = sum(_rows(e) for e in entries)
        if not found:
            raise InputError(
                f"no sample in split {origin}",
                file=source.repo,
                value=f"{wanted} wanted",
                remedy="name a split that holds samples",
            )
        if found < wanted:
            log(f"warning: {source.repo} {origin} has {found} samples, {wanted} were asked for")
            samples.short[split] = {"asked": wanted, "found": found}
        samples.entries[split] = entries
    return samples


def _rows(entry: FileEntry) -> int:
    assert entry.extra is not None
    return entry.extra["rows"]


def _take_split(
    source: HubDatasetSource, folder: ShardFolder, split: str, stream: _Stream, wanted: int
) -> list[FileEntry]:
    ended = folder.path / "notes" / f"{split}.end.json"
    if note := files.read_note(ended):
        wanted = min(wanted, note["samples"])
    entries: list[FileEntry] = []
    starts = range(0, wanted, SHARD_ROWS)
    for start in watched(starts, len(starts), "shards", f"{source.repo} {split}"):
        rows = min(SHARD_ROWS, wanted - start)
        name = _shard_name(split, start, rows)
        if entry := folder.good(name):
            entries.append(entry)
            continue
        whole = folder.good(_shard_name(split, start, SHARD_ROWS))
        if whole is not None:  # a smaller number was asked for: nothing is streamed again
            texts, state = _head(folder.path / whole.path, rows), None
        else:
            before = folder.note(_shard_name(split, start - SHARD_ROWS, SHARD_ROWS))
            stream.seek(start, before["state"] if before else None)
            texts, state = stream.take(rows, lambda sample: text_of(sample, source)), stream.state()
        if len(texts) < rows:
            files.write_note(ended, {"samples": start + len(texts)})
        if texts:
            name = _shard_name(split, start, len(texts))
            entry, _ = write_parquet(folder.path / name, {"text": texts}, ROW_GROUP)
            entries.append(folder.remember(entry, state=state))
        if len(texts) < rows:
            break
    return entries


def _shard_name(split: str, start: int, rows: int) -> str:
    part = "" if rows == SHARD_ROWS else f"-{rows}"
    return f"{split}_{start // SHARD_ROWS:05d}{part}.parquet"


def _head(path: Path, rows: int) -> list[str | None]:
    import pyarrow.parquet as pq

    return pq.read_table(path).column("text").slice(0, rows).to_pylist()


# ---------------------------------------------------------------- one sample


def text_of(sample: dict[str, Any], source: HubDatasetSource) -> str | None:
    """The document of a sample; None when there is no text in it.

    A list of fields is joined by a blank line, empty ones left out; messages are written one after
    the other as `join` says, the last newline dropped. UserError when the field is not there.
    """
    fields = source.messages_field or source.text_field
    names = [fields] if isinstance(fields, str) else list(fields or ())
    for name in names:
        if name not in sample:
            raise UserError(
                "no such field",
                file=source.repo,
                value=name,
                remedy=f"choose one of {', '.join(sorted(sample))}",
            )
    if source.messages_field is not None:
        text = _join_messages(sample[source.messages_field], source.join)
    elif isinstance(source.text_field, str):
        text = sample[source.text_field]
    else:
        parts = [sample[n] for n in names]
        text = "\n\n".join(p for p in parts if isinstance(p, str) and p) or None
    return text if isinstance(text, str) and is_utf8(text) else None


def _join_messages(messages: Any, join: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        return None
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return None
        turns.append((str(message.get("role", "")), message["content"]))
    if join == chat.JOIN:
        return chat.frame(turns)
    written = []
    for role, content in turns:
        fields = {"content": content, "role": role}
        # one pass: a brace inside a message is text
        written.append(re.sub(r"\{(content|role)\}", lambda m, f=fields: f[m[1]], join))
    return "".join(written).removesuffix("\n")


# ---------------------------------------------------------------- the stream


class _Stream:
    """A position in a stream that is opened when it is first needed."""

    def __init__(self, reopen: Callable[[], Any], shuffled: bool) -> None:
        self._reopen, self._shuffled = reopen, shuffled
        self._data: Any = None
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._position = 0

    def seek(self, position: int, state: dict | None) -> None:
        """Go to sample `position`, whose state may be known; else by reading from the start."""
        if self._data is not None and self._position == position:
            return
        self._data = self._reopen()
        if state is not None:
            self._data.load_state_dict(state)
            self._position = position
        else:
            self._position = 0
        self._rows = iter(self._data)
        with _stream_errors("stream"):
            for _ in range(position - self._position):
                if next(self._rows, None) is None:
                    break
        self._position = position

    def take(self, count: int, text: Callable[[dict], str | None]) -> list[str | None]:
        """The texts of the next samples, fewer when the stream ends."""
        texts: list[str | None] = []
        with _stream_errors("stream"):
            while len(texts) < count and (sample := next(self._rows, None)) is not None:
                texts.append(text(sample))
        self._position += len(texts)
        return texts

    def state(self) -> dict[str, Any] | None:
        """Where the stream stands, as JSON; None under a shuffle.

        A shuffle's buffer is no part of the state: only a replay gives the same order again.
        """
        return None if self._shuffled else self._data.state_dict()


def _open(
    source: HubDatasetSource,
    folder: ShardFolder,
    split: str,
    offset: int,
    token: str | None,
    log: Callable[[str], None],
) -> Any:
    import datasets
    import pyarrow as pa

    datasets.config.TORCH_AVAILABLE = False  # type: ignore[attr-defined]  # never import torch here
    datasets.disable_progress_bars()
    with _stream_errors(source.repo):
        if local := local_files(source):
            builder, by_split = local
            names = {s: [str(p) for p in paths] for s, paths in by_split.items()}
            found = datasets.load_dataset(builder, data_files=names, streaming=True)
        else:
            revision = revision_of(source, folder, token)
            log(f"streaming {source.repo} at {revision[:12]} through the client of `datasets`")
            try:
                found = datasets.load_dataset(
                    source.repo, source.config, revision=revision, token=token, streaming=True
                )
            except (ValueError, RuntimeError) as error:  # unknown config; a script, never run
                if isinstance(error, pa.ArrowException):
                    raise
                raise UserError(
                    "cannot read dataset", file=source.repo, value=error, remedy="check config"
                ) from error
    if split not in found:
        names = ", ".join(sorted(map(str, found)))
        raise UserError(
            "no such split",
            file=source.repo,
            value=split,
            remedy=f"choose one of {names}, or set eval_from_train: true",
        )
    data = found[split]
    if source.shuffle is not None and split == source.train_split:
        data = data.shuffle(seed=source.shuffle.seed, buffer_size=source.shuffle.buffer)
    return data.skip(offset) if offset else data


def revision_of(source: HubDatasetSource, folder: ShardFolder, token: str | None = None) -> str:
    """The commit that `revision` means, found once and written down in the folder."""
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    path = folder.path / "notes" / "revision.json"
    note = files.read_note(path)
    if note is None:
        from huggingface_hub import HfApi

        with _stream_errors(source.repo):
            commit = HfApi(token=token).dataset_info(source.repo, revision=source.revision).sha
        assert commit, "the hub names a commit"
        note = {"commit": commit}
        files.write_note(path, note)
    return note["commit"]


@contextlib.contextmanager
def _stream_errors(repo: str) -> Iterator[None]:
    """The library's exceptions by cause: unreachable, refused or unknown, damaged."""
    import datasets.exceptions
    import pyarrow as pa
    from huggingface_hub.errors import HfHubHTTPError

    # the base class of the HTTP client's own errors, whichever client it is
    transport: type[Exception] = HfHubHTTPError.__bases__[0]  # type: ignore[assignment]
    try:
        yield
    except datasets.exceptions.DatasetsError as error:
        kind = UserError if isinstance(error, FileNotFoundError) else InputError
        raise kind("cannot read dataset", file=repo, value=error, remedy="check repo") from error
    except pa.ArrowException as error:
        raise InputError("damaged data", file=repo, value=error, remedy="get it again") from error
    except (ConnectionError, TimeoutError, transport) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (400, 401, 403, 404, 410, 451):
            raise UserError(
                "refused", file=repo, value=status, remedy="check repo, revision and HF_TOKEN"
            ) from error
        raise EnvError(
            "host unreachable",
            file=repo,
            value=error,
            remedy="run the same command when it is back",
        ) from error
