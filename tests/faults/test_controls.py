"""Negative controls: a writer that breaks the protocol is caught (reliability.md 6.10)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib.core import files
from tests.faults.crash import enumerate_crashes

pytestmark = pytest.mark.faults


def maker(tmp_path: Path):
    def make(point: int) -> Path:
        path = tmp_path / f"point_{point}"
        path.mkdir()
        return path

    return make


def test_a_writer_that_skips_existing_files_is_caught(tmp_path):
    """The common `if not exists: write` takes a torn file for a whole one."""

    def naive(folder: Path) -> None:
        if not (folder / "x").exists():
            fd = os.open(folder / "x", os.O_WRONLY | os.O_CREAT)
            os.write(fd, b"0123456789")
            os.close(fd)

    with pytest.raises(AssertionError, match="point"):
        enumerate_crashes(naive, maker(tmp_path))


def test_a_manifest_written_first_is_caught(tmp_path):
    """A marker before its files promises what is not there yet."""

    def action(folder: Path) -> None:
        files.write_json(folder / "manifest.json", ["x"])
        files.write_bytes(folder / "x", b"data")

    def inspect(folder: Path) -> None:
        assert not (folder / "manifest.json").exists() or (folder / "x").exists()

    with pytest.raises(AssertionError):
        enumerate_crashes(action, maker(tmp_path), inspect)
