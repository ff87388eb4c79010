"""A library that writes by itself (Rust, C++), called as the project calls it.

`python -m tests.faults.native WRITER PATH`; exits as a stage would: 0, or the error's code.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lib.core.errors import KumikiError
from lib.core.stage import by_cause

TEXTS = [f"a line of text number {i} and some words more" for i in range(400)]


def safetensors(path: Path) -> None:
    import torch

    from lib.train.checkpoint import write_tensors

    write_tensors(path, {"a": torch.arange(70_000, dtype=torch.float32)})


def sentencepiece(path: Path) -> None:
    from lib.core.data_settings import SentencePieceTokenizer
    from lib.data.vocab import tokenizer

    settings = SentencePieceTokenizer(kind="sentencepiece", documents="x", vocab_size=330)
    path.mkdir(exist_ok=True)
    tokenizer.build(settings, TEXTS, lambda: TEXTS[:20], path)


def arrow(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lib.core.files import atomic_file

    with atomic_file(path) as out, pq.ParquetWriter(out, pa.schema([("t", pa.string())])) as writer:
        writer.write_table(pa.table({"t": TEXTS}))


WRITERS = {w.__name__: w for w in (safetensors, sentencepiece, arrow)}

if __name__ == "__main__":
    try:
        WRITERS[sys.argv[1]](Path(sys.argv[2]))
    except Exception as error:
        known = error if isinstance(error, KumikiError) else by_cause(error)
        if known is None:
            raise
        sys.stderr.write(f"error: {known}\n")
        raise SystemExit(known.code) from None
