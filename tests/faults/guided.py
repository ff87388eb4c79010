"""Coverage-guided fuzzing of our own parsers: `python -m tests.faults.guided READER -runs=N`.

libFuzzer changes a good input so as to reach new branches of the instrumented modules; it fails
on a traceback, over 5 s for one input and over 1 GB. READER is a name in `test_fuzz.READERS`.
Needs `pip install -e '.[fuzz]'`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]  # an extra

OURS = [
    "lib.data.raw.strict_json",
    "lib.data.vocab.spm_file",
    "lib.core.artifact",
    "lib.core.archive",
]
LIMITS = ["-timeout=5", "-rss_limit_mb=1024", "-max_len=4096", "-verbosity=0"]

with atheris.instrument_imports(include=OURS):
    from lib.core.errors import KumikiError
    from tests.faults.test_fuzz import READERS, SUFFIXES


def main() -> None:
    """Fuzz one reader; leaves through libFuzzer's exit code."""
    name = sys.argv[1]
    make, read, allowed = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        corpus, path = Path(folder) / "corpus", Path(folder) / f"input{SUFFIXES.get(name, '')}"
        corpus.mkdir()
        (corpus / "good").write_bytes(make())

        def one(data: bytes) -> None:
            path.write_bytes(data)
            try:
                read(path)
            except (KumikiError, *allowed):
                pass

        atheris.Setup([sys.argv[0], *LIMITS, *sys.argv[2:], str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
