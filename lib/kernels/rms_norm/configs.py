"""Rows of a program by width; none has been tuned on a GPU."""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

CANDIDATES: Candidates = {
    "rms_norm": {
        128: [tile(4, ROWS=16), tile(4, ROWS=32)],
        1024: [tile(4, ROWS=4), tile(8, ROWS=8)],
        4096: [tile(8, ROWS=1), tile(8, ROWS=2)],
        16384: [tile(16, ROWS=1), tile(32, ROWS=1)],
    }
}
TUNED: Tuned = {}
