"""Where CORE's bundle may lie: an archive of the shard manifest, or a folder."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.core.data_settings import ArchiveSource, DownloadShards
from lib.core.errors import InputError, UserError
from lib.core.run_settings import Core, Runtime
from lib.data.raw import sources
from lib.eval.bundle import read_bundle
from lib.eval.inputs import bundle_identity, find_bundle
from tests.eval.test_bundle import make

KEEP = ("**/core.yaml", "**/*.csv", "**/eval_data/**/*.jsonl")


@pytest.fixture
def zipped(tmp_path) -> Path:
    """As published: everything below one folder, and more than is wanted."""
    folder = make(tmp_path / "open")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, f"eval_bundle/{path.relative_to(folder)}")
        archive.writestr("eval_bundle/run_me.py", "")
        archive.writestr("__MACOSX/eval_bundle/._core.yaml", "junk")
    return tmp_path / "b.zip"


def make_run(tmp_path: Path, core: Core, section: DownloadShards) -> SimpleNamespace:
    said: list[str] = []
    manifest = sources.collect(section, 1, Runtime(), map, said.append)
    manifest.write(tmp_path / "shards.manifest.json")
    return SimpleNamespace(
        settings=SimpleNamespace(eval=SimpleNamespace(core=core)),
        inputs={"shards": tmp_path / "shards.manifest.json"},
        runtime=Runtime(),
        log=said.append,
        said=said,
    )


def declared(path: Path) -> DownloadShards:
    source = ArchiveSource(kind="archive", path=str(path), keep=KEEP)
    return DownloadShards(sources={"tasks": source})


@pytest.mark.parametrize("packed", [True, False])
def test_an_archive_or_unpacked_folder_of_the_manifest_is_found(
    packed, zipped, tmp_path, monkeypatch
):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path / "scratch"))
    section = declared(zipped if packed else tmp_path / "open")
    run = make_run(tmp_path, Core(bundle="tasks"), section)
    found = find_bundle(run)
    assert found is not None
    assert [task.label for task in read_bundle(found).tasks] == ["t"]
    names = [name.rsplit("/", 1)[-1] for name, _ in bundle_identity(run) or []]
    assert sorted(names) == ["core.yaml", "eval_meta_data.csv", "t.jsonl"]
    assert not list(found.rglob("*.py"))


def test_a_member_that_was_changed_in_scratch_is_not_used(zipped, tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path / "scratch"))
    run = make_run(tmp_path, Core(bundle="tasks"), declared(zipped))
    folder = find_bundle(run)
    assert folder is not None
    victim = folder / "eval_data/a/t.jsonl"
    victim.write_text(json.dumps({"query": "?", "choices": ["x", "y"], "gold": 0}) + "\n\n")
    with pytest.raises(InputError, match=r"t\.jsonl"):
        find_bundle(run)


def test_a_folder_is_identified_by_what_decides_core(tmp_path):
    folder = make(tmp_path / "open")
    run = make_run(tmp_path, Core(bundle=str(folder)), DownloadShards())
    assert find_bundle(run) == folder
    before = bundle_identity(run)
    (folder / "notes.txt").write_text("no part of it")
    assert bundle_identity(run) == before
    (folder / "eval_data/a/t.jsonl").write_text("{}\n")
    assert bundle_identity(run) != before


def test_without_a_bundle_there_is_one_line_or_an_error(tmp_path):
    for core in (Core(), Core(bundle=str(tmp_path / "none"))):
        run = make_run(tmp_path, core, DownloadShards())
        assert find_bundle(run) is None and bundle_identity(run) is None
        assert len(run.said) == 1 and run.said[0].startswith("core: null, no task bundle")
    run = make_run(tmp_path, Core(enabled=True, bundle="none"), DownloadShards())
    with pytest.raises(UserError, match=r"no task bundle: none; name a folder .* or a source"):
        find_bundle(run)
    assert find_bundle(make_run(tmp_path, Core(enabled=False), DownloadShards())) is None


def test_enabled_without_a_name_is_refused_with_the_settings():
    with pytest.raises(ValueError, match=r"name a folder with core\.yaml, or a source"):
        Core(enabled=True)
