"""Stage `download_shards`: the sources named in params -> verified shards in scratch, one manifest.

In:    section `download_shards`; local files, packages of the environment, hosts of the sources.
Out:   data/shards.manifest.json; the bytes lie in $KUMIKI_SCRATCH/shards/<key of the source>/.
Note:  the only stage that may use a network, and only for sources that say so.
"""

from __future__ import annotations

from typing import Any

from lib.core import artifact
from lib.core.artifact import Manifest
from lib.core.stage import Run, Stage, main

STAGE = Stage(
    name="download_shards",
    about="Fetch, read or build the shards of every declared source, verified by sha256.",
    sections=("seed", "download_shards"),
    inputs={},
    out="data/shards.manifest.json",
)


def identity(run: Run) -> dict[str, Any]:
    """Sources as written, package versions, and name and sha256 of every local file."""
    from lib.data.raw import sources

    section, seed = run.settings.download_shards, run.settings.seed
    return {
        "seed": seed,
        "sources": artifact.plain(section),
        "shards": sources.identities(section, seed),
    }


def check(run: Run) -> bool:
    """Whether scratch still holds what the finished manifest names."""
    from lib.data.raw import sources

    bad = sources.damaged(Manifest.read(run.result, "shards"), run.runtime.verify == "full")
    for name, found in bad.items():
        run.warn(f"shard {name}: {found}")
    return not bad


def body(run: Run) -> None:
    """Have every shard verified in scratch, then write the manifest."""
    from lib.data.raw import sources

    with run.pool() as pool:
        manifest = sources.collect(
            run.settings.download_shards, run.settings.seed, run.runtime, pool, run.log
        )
    manifest.write(run.result)
    total = sum(entry.bytes for entry in manifest.files) / 1e6
    run.summary = f"{len(manifest.files)} files, {total:,.1f} MB"


if __name__ == "__main__":
    raise SystemExit(main(STAGE, body, identity, check=check))
