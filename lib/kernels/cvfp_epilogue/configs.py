"""Rows of a program by width; none has been tuned on a GPU."""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

CANDIDATES: Candidates = {
    "rows": {
        128: [tile(4, ROWS=8), tile(4, ROWS=16)],
        1024: [tile(4, ROWS=2), tile(4, ROWS=1)],
        8192: [tile(8, ROWS=1), tile(16, ROWS=1)],
    }
}
TUNED: Tuned = {}
