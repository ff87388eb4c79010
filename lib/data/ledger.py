"""The ledger of extract_texts: nothing disappears uncounted (data.md 6.3).

Per source and split: lines, records, documents and bytes, in, out, rejected and dropped by reason.
Law:   L1 lines = records + blank.   L2 records = documents in + rejected.
       L3 documents in + split = documents out + dropped.
       L4 bytes in + added = bytes out + dropped + removed.
       Each side is counted in another place (reader, cleaner, writer), so a lost document shows.
A violation is a bug, never a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lib.core.errors import InputError
from lib.data.clean import CleanCounts
from lib.data.raw.lines import POSITIONS, ReadCounts

DUPLICATES = ("dup_exact", "dup_near", "dup_of_val")


class LedgerError(AssertionError):
    """A law of the ledger does not hold: a bug of ours (exit 1)."""


@dataclass
class Entry:
    """The counts of one source and split, or of one shard of it."""

    read: ReadCounts = field(default_factory=ReadCounts)
    clean: CleanCounts = field(default_factory=CleanCounts)
    shards: int = 0
    documents_out: int = 0
    bytes_out: int = 0

    def add(self, other: Entry) -> None:
        """Count `other` in; positions of rejected records stay in shard order."""
        for name in ("lines", "records", "blank", "bom"):
            _bump(self.read, other.read, name)
        for reason, count in other.read.rejected.items():
            self.read.rejected[reason] = self.read.rejected.get(reason, 0) + count
        for reason, positions in other.read.positions.items():
            kept = self.read.positions.setdefault(reason, [])
            kept += positions[: POSITIONS - len(kept)]
        for name in ("documents_in", "bytes_in", "split"):
            _bump(self.clean, other.clean, name)
        _add_lists(self.clean.repairs, other.clean.repairs)
        _add_lists(self.clean.dropped, other.clean.dropped)
        for name in ("shards", "documents_out", "bytes_out"):
            _bump(self, other, name)

    def check(self, where: str) -> None:
        """Raise LedgerError unless L1 to L4 hold."""
        read, clean = self.read, self.clean
        repairs, dropped = clean.repairs.values(), clean.dropped.values()
        for law, left, right in (
            ("L1 lines", read.lines, read.records + read.blank),
            ("L2 records", read.records, clean.documents_in + sum(read.rejected.values())),
            (
                "L3 documents",
                clean.documents_in + clean.split,
                self.documents_out + sum(d[0] for d in dropped),
            ),
            (
                "L4 bytes",
                clean.bytes_in + sum(r[1] for r in repairs),
                self.bytes_out + sum(d[1] for d in dropped) + sum(r[2] for r in repairs),
            ),
        ):
            if left != right:
                raise LedgerError(f"{law} of {where}: {left} in, {right} accounted for")

    def check_share(self, where: str, max_drop_fraction: float) -> None:
        """InputError when rejected and dropped records, duplicates apart, are too many."""
        reasons = dict(self.read.rejected) | {
            reason: d[0] for reason, d in self.clean.dropped.items() if reason not in DUPLICATES
        }
        lost = sum(reasons.values())
        if lost > max_drop_fraction * self.read.records:
            ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
            table = ", ".join(f"{reason} {count}" for reason, count in ranked)
            raise InputError(
                f"more than {max_drop_fraction:.4g} of the records are lost",
                file=where,
                value=f"{lost} of {self.read.records}: {table}",
                remedy="mend the source, or raise max_drop_fraction of the recipe",
            )

    def to_json(self) -> dict[str, Any]:
        """One flat table for the ledger file."""
        read, clean = self.read, self.clean
        return {
            "shards": self.shards,
            "lines": read.lines,
            "blank": read.blank,
            "bom": read.bom,
            "records": read.records,
            "rejected": {
                reason: {"records": count, "first": read.positions.get(reason, [])}
                for reason, count in read.rejected.items()
            },
            "documents_in": clean.documents_in,
            "bytes_in": clean.bytes_in,
            "split": clean.split,
            "repairs": {
                name: {"documents": r[0], "bytes_added": r[1], "bytes_removed": r[2]}
                for name, r in clean.repairs.items()
            },
            "dropped": {
                reason: {"documents": d[0], "bytes": d[1]} for reason, d in clean.dropped.items()
            },
            "documents_out": self.documents_out,
            "bytes_out": self.bytes_out,
        }

    def to_counts(self) -> dict[str, Any]:
        """Everything, for a unit's manifest; `from_counts` gives it back."""
        return asdict(self)

    @classmethod
    def from_counts(cls, raw: Mapping[str, Any]) -> Entry:
        """An entry as `to_counts` wrote it."""
        rest = {k: v for k, v in raw.items() if k not in ("read", "clean")}
        return cls(read=ReadCounts(**raw["read"]), clean=CleanCounts(**raw["clean"]), **rest)


class Ledger:
    """Entries by source and split."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}

    def add(self, source: str, split: str, entry: Entry) -> None:
        """Count one shard."""
        self.entries.setdefault((source, split), Entry()).add(entry)

    def check(self, max_drop_fraction: float, recipe: str = "") -> None:
        """Every law, then the user's limits; LedgerError, or InputError with the reason table."""
        for (source, split), entry in self.entries.items():
            entry.check(f"{source}, {split}")
        for (source, split), entry in self.entries.items():
            entry.check_share(f"{source}, {split}", max_drop_fraction)
        for split in ("val", "train"):
            if not self.total(split).documents_out:
                raise InputError(
                    f"no {split} documents",
                    file=recipe or None,
                    value=f"{self.total(split).read.records} records in its shards",
                    remedy="name shards of that split in the recipe's sources",
                )

    def total(self, split: str) -> Entry:
        """The sum over the sources of one split."""
        total = Entry()
        for (_, mine), entry in self.entries.items():
            if mine == split:
                total.add(entry)
        return total

    def to_json(self) -> dict[str, Any]:
        """source -> split -> counts."""
        table: dict[str, Any] = {}
        for (source, split), entry in self.entries.items():
            table.setdefault(source, {})[split] = entry.to_json()
        return table


def _bump(mine: object, other: object, name: str) -> None:
    setattr(mine, name, getattr(mine, name) + getattr(other, name))


def _add_lists(mine: dict[str, list[int]], other: Mapping[str, list[int]]) -> None:
    for name, numbers in other.items():
        held = mine.setdefault(name, [0] * len(numbers))
        mine[name] = [a + b for a, b in zip(held, numbers, strict=True)]
