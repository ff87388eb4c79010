"""Kill the download at every change of the file system; the same command ends with equal bytes."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest

from lib.core import artifact, files, hosts
from lib.core.data_settings import (
    DownloadShards,
    EmbeddedSource,
    HubDatasetSource,
    JsonlSource,
    ParquetSource,
)
from lib.core.process import worker_pool
from lib.core.run_settings import Runtime
from lib.data.raw import embedded, hub, remote, sources
from tests.core.hostile import HostileServer
from tests.data.test_sources import NAMES, parquet
from tests.faults.crash import enumerate_crashes
from tests.faults.tally import tally

pytestmark = pytest.mark.faults


def _skip(name: str) -> bool:
    """Stamps save a hash; parts of a killed run are continued or overwritten, never read."""
    return name.endswith((".stamps.json", ".part", ".part.json"))


def _maker(fast_folder: Path):
    def make(point: int) -> Path:
        folder = fast_folder / f"point_{point}"
        folder.mkdir()
        return folder

    return make


def _action(section: DownloadShards, runtime: Runtime):
    def action(folder: Path) -> None:
        os.environ["KUMIKI_SCRATCH"] = str(folder / "scratch")
        with worker_pool(1) as pool:
            manifest = sources.collect(section, 1, runtime, pool, lambda line: None)
        manifest.write(folder / "m.json")

    return action


def _inspect(folder: Path) -> None:
    """A manifest that is there names only shards that are there and right."""
    if (folder / "m.json").exists():
        os.environ["KUMIKI_SCRATCH"] = str(folder / "scratch")
        manifest = artifact.Manifest.read(folder / "m.json", "shards")
        assert sources.damaged(manifest) == {}


@pytest.fixture(autouse=True)
def _scratch(monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", "")  # restored after what the parent sets above


def test_a01_kill_anywhere_in_a_download_of_three_shards(fast_folder, monkeypatch):
    """One worker, so that the mutations come in one order; two sources, one of them local."""
    quick = functools.partial(hosts.Policy, patience=hosts.Patience().scaled(0.02))
    monkeypatch.setattr(remote, "Policy", quick)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    local = fast_folder / "local"
    local.mkdir()
    (local / "a.jsonl").write_text('{"text": "a"}\n')
    (local / "b.jsonl").write_text('{"text": "b"}\n')
    with HostileServer() as host:
        for name in (*NAMES[:2], NAMES[9]):
            host.files[f"d/main/{name}"] = parquet([f"{name} {i}" * 30 for i in range(50)])
        section = DownloadShards(
            sources={
                "en": ParquetSource(
                    kind="parquet",
                    repo="d",
                    pattern=f"{host.url('/')}{{repo}}/{{revision}}/shard_{{i:05d}}.parquet",
                    count=10,
                    shards=2,
                    val_name=NAMES[9],
                ),
                "ja": JsonlSource(
                    kind="jsonl_gz", folder=str(local), train=("a.jsonl",), val=("b.jsonl",)
                ),
            }
        )
        runtime = Runtime(allow_private_hosts=("127.0.0.1",), workers=1, download_workers=1)

        action = _action(section, runtime)
        killed = enumerate_crashes(action, _maker(fast_folder), _inspect, _skip)
    assert killed > 40
    tally("A1", "SIGKILL while shards come over a network", killed, "equal bytes")


def test_a01_kill_anywhere_while_packages_and_samples_become_shards(fast_folder, monkeypatch):
    """The embedded corpus is one unit, a stream is one unit a shard."""
    import datasets  # noqa: F401  # once, before the forks

    package, samples = fast_folder / "package", fast_folder / "own.jsonl"
    for index in range(20):
        text = f'"""Module {index}. {"It says something long. " * 8}"""\n'
        files.write_bytes(package / f"m{index}.py", text.encode())
    samples.write_text("".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(9)))
    monkeypatch.setattr(embedded, "_root", lambda name: package)
    monkeypatch.setattr(embedded, "versions", lambda source: {"p": {"version": "1"}})
    monkeypatch.setattr(hub, "SHARD_ROWS", 4)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    section = DownloadShards(
        sources={
            "docs": EmbeddedSource(kind="embedded", packages=("p",), val_fraction=0.1),
            "own": HubDatasetSource(
                kind="hf_dataset",
                repo=str(samples),
                text_field="text",
                max_train_samples=7,
                max_eval_samples=2,
                eval_from_train=True,
            ),
        }
    )
    action = _action(section, Runtime(workers=1))
    killed = enumerate_crashes(action, _maker(fast_folder), _inspect, _skip, every=3)
    assert killed > 15
    tally("A1", "SIGKILL while packages and samples become shards", killed, "equal bytes")
