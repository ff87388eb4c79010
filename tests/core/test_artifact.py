"""Manifests: keys from what was asked for, hashes of what is there, damage named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.errors import InputError, UserError


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "a"
    with files.atomic_folder(folder) as part:
        files.write_bytes(part / "x.bin", bytes(range(200)))
        files.write_bytes(part / "sub" / "y.bin", b"y" * 5000)
        manifest = Manifest(
            kind="toy",
            recipe={"stage": "toy", "params": {"b": 1.5, "a": [1, None]}},
            files=artifact.describe(part, {"x.bin": ("|u1", (200,))}),
            counts={"documents": 3},
        )
        manifest.write(part / "manifest.json")
    return folder, manifest


def test_a_manifest_reads_back_equal_and_its_bytes_are_canonical(made):
    folder, manifest = made
    again = Manifest.read(folder / "manifest.json", kind="toy")
    assert again == manifest
    assert [e.path for e in again.files] == ["sub/y.bin", "x.bin"]
    assert again.files[1].shape == (200,)
    assert json.loads(manifest.to_bytes())["key"] == manifest.key


def test_the_key_follows_the_recipe_not_its_order_nor_the_files(made):
    _, manifest = made
    turned = {"params": {"a": [1, None], "b": 1.5}, "stage": "toy"}
    assert artifact.key_of("toy", turned) == manifest.key
    assert artifact.key_of("toy", {**turned, "rev": 2}) != manifest.key
    assert artifact.key_of("other", turned) != manifest.key


def test_every_flipped_bit_and_every_truncation_is_named(made):
    """200 of 200 flips load without complaint elsewhere; only the hash sees them."""
    folder, manifest = made
    artifact.verify(folder, manifest)
    path = folder / "sub" / "y.bin"
    whole = path.read_bytes()
    for position in range(0, 5000, 499):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"sha256 differs in .*y\.bin: expected .*found"):
            artifact.verify(folder, manifest)
    for size in (0, 1, 2500, 4999):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"size differs in .*y\.bin"):
            artifact.verify(folder, manifest)
    path.unlink()
    with pytest.raises(InputError, match=r"missing in .*sub: y\.bin"):
        artifact.verify(folder, manifest)


def test_ensure_rebuilds_only_what_is_damaged_and_refuses_another_truth(made):
    folder, manifest = made
    whole, asked = (folder / "x.bin").read_bytes(), []

    def rebuild(entries):
        asked.extend(e.path for e in entries)
        files.write_bytes(folder / "x.bin", whole)

    artifact.ensure(folder, manifest.files, rebuild)
    assert asked == []
    (folder / "x.bin").write_bytes(b"z" * 200)
    artifact.ensure(folder, manifest.files, rebuild)
    assert asked == ["x.bin"]
    (folder / "x.bin").write_bytes(b"z" * 200)
    with pytest.raises(InputError, match="sha256 differs"):
        artifact.ensure(folder, manifest.files, lambda entries: None)
    with pytest.raises(InputError, match="sha256 differs"):
        artifact.ensure(folder, manifest.files, None)


def test_a_restored_mtime_does_not_hide_a_change(made):
    """ctime cannot be set back, so the stamp of the last hash falls."""
    folder, manifest = made
    artifact.ensure(folder, manifest.files, None)
    path = folder / "x.bin"
    stat = path.stat()
    path.write_bytes(b"q" * 200)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match="sha256 differs"):
        artifact.ensure(folder, manifest.files, None)


def test_two_readers_may_note_their_hashes_at_once(made, monkeypatch):
    """Ranks verify the same files in the same moment; one took the other's `.part` away."""
    folder, manifest = made
    rename = files.rename

    def other_comes_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(files, "rename", rename)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        assert artifact.damaged(folder, manifest.files, full=True) == {}
        rename(source, target)

    monkeypatch.setattr(files, "rename", other_comes_first)
    assert artifact.damaged(folder, manifest.files, full=True) == {}
    assert [p.name for p in folder.glob(".*")] == [artifact.STAMPS]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda raw: raw.update(format="other"), InputError),
        (lambda raw: raw.update(version=1), UserError),
        (lambda raw: raw.update(kind="shards"), UserError),
        (lambda raw: raw.update(key="0" * 16), InputError),
        (lambda raw: raw.pop("files"), InputError),
        (lambda raw: raw["files"][0].update(path="../x"), InputError),
        (lambda raw: raw["files"][0].update(path="/etc/x"), InputError),
        (lambda raw: raw["files"][0].pop("sha256"), InputError),
        (lambda raw: raw["recipe"].update(stage="changed"), InputError),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(made, change, error):
    folder, _ = made
    raw = json.loads((folder / "manifest.json").read_bytes())
    change(raw)
    del raw["check"]
    raw["check"] = artifact._checksum(raw)  # each refusal stands without the checksum's help
    (folder / "manifest.json").write_bytes(files.canonical_json(raw))
    with pytest.raises(error):
        Manifest.read(folder / "manifest.json", kind="toy")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data.replace(b'"counts"', b'"kind":"toy","counts"', 1), "was written"),
        (lambda data: data.replace(b":", b": ", 1), "was written"),
        (lambda data: data[:-1], "was written"),
        (lambda data: data + b"}", "not valid JSON"),
        (lambda data: b"\xff" + data, "not valid JSON"),
        (lambda data: b"[]\n", "not a manifest"),
    ],
)
def test_what_json_does_not_see_is_refused_too(made, spoil, told):
    """A name twice, a blank, no last newline: equal values, other bytes than were hashed."""
    path = made[0] / "manifest.json"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=told):
        Manifest.read(path, kind="toy")
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        Manifest.read(path)


def test_every_flipped_bit_of_a_manifest_is_refused(made):
    """Names, shapes and counts are believed because it says so: nothing else could see a flip.

    White space too: the file's own hash is part of what is made from it.
    """
    path = made[0] / "manifest.json"
    whole = path.read_bytes()
    flipped = []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(damaged))
    for damaged in (*flipped, whole[:-1], whole + b"\n"):
        path.write_bytes(damaged)
        with pytest.raises((InputError, UserError)):
            Manifest.read(path, kind="toy")
