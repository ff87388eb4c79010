"""The data half against its peers, in one run: python -m benchmarks.data [--data FOLDER] [--big].

jsonl:   JSONL.GZ -> documents, one core, against `gzip` + `json` line by line with text lines out.
encode:  Parquet -> packed rows, against bare `tiktoken.encode_ordinary_batch` with equal threads.
workers: two worker processes against one, for both.
memory:  peak resident memory of extraction and encoding at 50 MB and (--big) 500 MB of text.
Each pair is interleaved `--repeat` times; the ratio of the best times is printed (a shared machine
only ever slows a run down), beside the ratio of medians.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from benchmarks._work import work_folder
from lib.core import files
from lib.core.artifact import Manifest
from lib.core.data_settings import Dedup, Encoding, Gpt2Tokenizer, Recipe
from lib.core.process import worker_pool
from lib.data.encode import encode, plan_encoding
from lib.data.extract import Shard, extract_texts
from lib.data.vocab.tokenizer import build, load_tokenizer

RECIPE = Recipe(sources={"s": 1.0}, dedup=Dedup(exact=True, near=False))


def main() -> None:
    """Run every comparison and print one line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--big", action="store_true", help="also 500 MB for memory")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory_of(arguments.memory_of)
        return
    bpe = arguments.data / "gpt2_bpe"
    with work_folder() as name:
        folder = Path(name)
        jsonl = sorted((arguments.data / "ja_jsonl").glob("train_*.jsonl.gz"))
        parquet = sorted((arguments.data / "en_shards").glob("shard_*.parquet"))
        compare_jsonl(jsonl, folder, arguments.repeat)
        compare_encode(parquet, bpe, folder, arguments.repeat)
        compare_memory(parquet, bpe, folder, arguments.big)


def interleaved(calls: dict[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """Seconds of each callable; the first round warms caches and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeat + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def tell(title: str, seconds: dict[str, list[float]], megabytes: float) -> None:
    """One line: the speed of peer and ours, the ratio of best and of median times."""
    peer, ours = seconds.values()
    best, middle = min(peer) / min(ours), statistics.median(peer) / statistics.median(ours)
    rates = ", ".join(f"{name} {megabytes / min(t):.1f} MB/s" for name, t in seconds.items())
    print(f"{title}: {rates}; ratio {best:.2f} best, {middle:.2f} median", flush=True)


def megabytes_of(manifest: Manifest) -> float:
    """Text in all splits and sources."""
    splits = manifest.counts["splits"].values()
    return sum(source["bytes"] for split in splits for source in split.values()) / 1e6


# ---------------------------------------------------------------- JSONL.GZ -> documents


def guide_extract(paths: list[Path], out: Path) -> None:
    """The published way: a line at a time through gzip and json, a text line out."""
    with out.open("w", encoding="utf-8") as sink:
        for path in paths:
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    text = json.loads(line)["text"].replace("\n", " ").strip()
                    if text:
                        sink.write(text + "\n")


def our_extract(
    paths: list[Path], kind: Literal["jsonl", "parquet"], folder: Path, workers: int = 1
) -> Manifest:
    """The same files through the whole of extract_texts; the last is validation."""
    shards = [
        Shard(
            source="s",
            split="val" if path == paths[-1] else "train",
            index=index,
            path=path,
            kind=kind,
        )
        for index, path in enumerate(paths)
    ]
    for name in ("work", "documents"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "documents").mkdir(parents=True)
    with worker_pool(workers) as pool_map:
        return extract_texts(shards, RECIPE, folder / "work", folder / "documents", pool_map)


def compare_jsonl(paths: list[Path], folder: Path, repeat: int) -> None:
    """One core against one core, then two workers against one."""
    megabytes = megabytes_of(our_extract(paths, "jsonl", folder))
    calls: dict[str, Callable[[], object]] = {
        "gzip+json": lambda: guide_extract(paths, folder / "guide.txt"),
        "kumiki": lambda: our_extract(paths, "jsonl", folder),
    }
    tell("jsonl.gz -> documents, 1 core", interleaved(calls, repeat), megabytes)
    calls = {f"{n} workers": lambda n=n: our_extract(paths, "jsonl", folder, n) for n in (1, 2)}
    tell("jsonl.gz -> documents", interleaved(calls, repeat), megabytes)


# ---------------------------------------------------------------- Parquet -> packed rows


def gpt2(bpe: Path, folder: Path) -> Path:
    """GPT-2's tokenizer as a folder of ours."""
    section = Gpt2Tokenizer(kind="gpt2", documents="r", folder=str(bpe))
    out = folder / "tokenizer"
    if not out.exists():
        with files.atomic_folder(out) as part:
            build(section, [], lambda: ["a text"], part)
    return out


def bare_encoding(bpe: Path) -> tiktoken.Encoding:
    """GPT-2 in tiktoken, from its rank file."""
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(bpe / "other" / "r50k_base.tiktoken"))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return tiktoken.Encoding("r50k", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def bare_tiktoken(paths: list[Path], encoding: tiktoken.Encoding, threads: int) -> int:
    """Read and encode, nothing kept: the bound that a Python pipeline can hope for."""
    total = 0
    for path in paths:
        texts = pq.read_table(path, columns=["text"]).column("text").to_pylist()
        total += sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=threads)))
    return total


def our_encode(tokenizer: Path, folder: Path, workers: int, threads: int) -> Manifest:
    """Encode, verify, write, pack the documents below `folder`, from nothing."""
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    section = Encoding(documents="r", tokenizer="gpt2", context=2048)
    plan = plan_encoding(
        section,
        folder / "documents",
        tokenizer,
        scratch,
        threads=threads,
        open_tokenizer=load_tokenizer,
    )
    with worker_pool(workers) as pool_map:
        manifest = encode(plan, pool_map, lambda line: None)
    assert manifest is not None
    return manifest


def compare_encode(paths: list[Path], bpe: Path, folder: Path, repeat: int) -> None:
    """Equal threads in both, one process; then two workers against one."""
    megabytes = megabytes_of(our_extract(paths, "parquet", folder))
    parts = sorted((folder / "documents").glob("*.parquet"))
    tokenizer, encoding = gpt2(bpe, folder), bare_encoding(bpe)
    for threads in (1, 2):
        calls: dict[str, Callable[[], object]] = {
            "tiktoken": lambda t=threads: bare_tiktoken(parts, encoding, t),
            "kumiki": lambda t=threads: our_encode(tokenizer, folder, 1, t),
        }
        tell(f"Parquet -> rows, {threads} threads", interleaved(calls, repeat), megabytes)
    calls = {f"{n} workers": lambda n=n: our_encode(tokenizer, folder, n, 1) for n in (1, 2)}
    tell("Parquet -> rows", interleaved(calls, repeat), megabytes)


# ---------------------------------------------------------------- memory


def compare_memory(paths: list[Path], bpe: Path, folder: Path, big: bool) -> None:
    """A fresh process for each size, so that its peak is its own."""
    gpt2(bpe, folder)
    for megabytes in (50, 500) if big else (50,):
        inputs = folder / f"input_{megabytes}"
        inputs.mkdir()
        write_corpus(paths, inputs, megabytes)
        shutil.copytree(folder / "tokenizer", inputs / "tokenizer")
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.data", "--memory-of", str(inputs)],
            capture_output=True,
            text=True,
            check=True,
        )
        print(f"peak memory at {megabytes} MB of text: {run.stdout.strip()}", flush=True)
        shutil.rmtree(inputs)


def write_corpus(paths: list[Path], folder: Path, megabytes: int) -> None:
    """Shards of about 5 MB; a number in front of each text keeps copies from being duplicates."""
    written, number = 0, 0
    while written < megabytes * 1e6:
        table = pq.read_table(paths[number % len(paths)], columns=["text"])
        texts = [f"{number} {text}" for text in table.column("text").to_pylist()]
        pq.write_table(
            pa.table({"text": texts}),
            folder / f"shard_{number:05d}.parquet",
            row_group_size=1024,
            compression="zstd",
        )
        written, number = written + sum(len(t.encode()) for t in texts), number + 1


def memory_of(folder: Path) -> None:
    """Extract and encode what lies in `folder` with two workers; print the peaks."""
    our_extract(sorted(folder.glob("*.parquet")), "parquet", folder, 2)
    extract = peak_megabytes()
    our_encode(folder / "tokenizer", folder, 2, 1)
    print(f"extract {extract:.0f} MB, extract and encode {peak_megabytes():.0f} MB")


def peak_megabytes() -> float:
    """Peak resident memory of this process plus twice that of its largest worker (two of them)."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + 2 * worker) * 1024 / 1e6


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(75) from None
