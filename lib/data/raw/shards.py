"""The shards of one source in scratch, and the checks that a Parquet shard must pass.

In:    a source's identity (its parameters without counts). Out: a folder named by its key, where
       each verified shard has a note of its bytes and sha256 (`notes/<name>.json`).
Law:   a note is written after its shard is whole; a shard without one, or unlike it, does not
       count.
Note:  DVC removes a manifest before its stage runs; the notes are what a rerun remembers instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.core import artifact, files
from lib.core.artifact import FileEntry
from lib.core.errors import EnvError, InputError

MAX_GROUP_BYTES = 10**9  # decoded bytes of one row group; more is an attack or a mistake
_TEXT_TYPES = ("string", "large_string", "string_view")


class ShardFolder:
    """`$KUMIKI_SCRATCH/shards/<key>/` of one source identity."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = identity
        self.key = artifact.key_of("shards", identity)
        self.path = artifact.scratch_folder("shards", self.key)

    def note(self, name: str) -> dict[str, Any] | None:
        """What was written down about a shard; None when it never became whole."""
        return files.read_note(self._note_path(name))

    def remembered(self, name: str) -> FileEntry | None:
        """The entry of a shard that was whole once; its bytes are not looked at."""
        note = self.note(name)
        return artifact.entry_from(note["entry"]) if note else None

    def damaged(self, entries: Iterable[FileEntry], full: bool = False) -> dict[str, str]:
        """Name -> `missing` or what differs, for every entry whose bytes are not right."""
        return artifact.damaged(self.path, entries, full=full)

    def good(self, name: str) -> FileEntry | None:
        """The entry of a shard whose bytes are right; None when it has to be made."""
        entry = self.remembered(name)
        return entry if entry and not self.damaged([entry]) else None

    def remember(self, entry: FileEntry, **more: Any) -> FileEntry:
        """Write the note of a verified shard; `more` is kept for the next run (stream state)."""
        self.write_note(entry.path, {"entry": artifact.entry_plain(entry), **more})
        return entry

    def write_note(self, name: str, value: dict[str, Any]) -> None:
        """Keep `value` under `name` for the next run."""
        files.write_note(self._note_path(name), value)

    def _note_path(self, name: str) -> Path:
        return self.path / "notes" / f"{name}.json"


@dataclass(frozen=True, kw_only=True)
class ParquetFacts:
    """Rows and row groups of a Parquet file."""

    rows: int
    row_groups: int


def is_utf8(text: str) -> bool:
    """Whether a shard can hold `text`: a lone surrogate has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_parquet(
    path: Path, columns: Mapping[str, Sequence[str | None]], row_group: int
) -> tuple[FileEntry, ParquetFacts]:
    """Write columns of text as the FineWeb layout: zstd 3, no dictionary, no statistics.

    Equal columns give equal bytes (with the same pyarrow). Returns the entry named `path.name`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    with (
        files.atomic_file(path, table.nbytes) as out,
        pq.ParquetWriter(
            out,
            table.schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            write_statistics=False,
        ) as writer,
    ):
        writer.write_table(table, row_group_size=row_group)
    facts = ParquetFacts(rows=table.num_rows, row_groups=-(-table.num_rows // row_group))
    entry = FileEntry(
        path=path.name, bytes=out.total_bytes, sha256=out.sha256, extra={**vars(facts)}
    )
    return entry, facts


def check_parquet(
    path: Path, column: str, *, decode: bool, name: str | None = None
) -> ParquetFacts:
    """Refuse what is no Parquet file with rows of text in `column`; InputError says why.

    decode: read every row group once, for a file whose sha256 nobody vouched for.
    name: what the messages call it, where `path` is a temporary name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shown = path if name is None else path.with_name(name)

    def bad(what: str, value: object) -> InputError:
        return InputError(what, file=shown, value=value, remedy="get the file again")

    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(4)
        stream.seek(max(0, size - 4))
        tail = stream.read(4)
    if head != b"PAR1" or tail != b"PAR1":
        raise bad("not a Parquet file", f"begins {head!r}, ends {tail!r}, {size} bytes")
    try:
        with pq.ParquetFile(path) as file:
            schema, meta = file.schema_arrow, file.metadata
            if column not in schema.names:
                raise bad(f"no column {column}", f"it has {', '.join(schema.names)}")
            kind = str(schema.field(column).type)
            if kind not in _TEXT_TYPES:
                raise bad(f"column {column} is no text", f"type {kind}")
            if meta.num_rows == 0:
                raise bad("no rows", meta.num_rows)
            for group in range(meta.num_row_groups):
                if meta.row_group(group).total_byte_size > MAX_GROUP_BYTES:
                    raise bad("row group too large", f"group {group}, over {MAX_GROUP_BYTES} bytes")
                if decode:
                    file.read_row_group(group, columns=[column]).validate(full=True)
            return ParquetFacts(rows=meta.num_rows, row_groups=meta.num_row_groups)
    except pa.ArrowMemoryError as error:
        raise EnvError("out of memory", file=shown, value=error) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise bad("damaged Parquet file", error) from error
