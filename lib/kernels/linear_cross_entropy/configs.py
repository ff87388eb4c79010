"""Columns of a block by vocabulary; none has been tuned on a GPU."""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

ANY = 1 << 40
CANDIDATES: Candidates = {
    "rows": {
        1024: [tile(4, BV=1024), tile(2, BV=256)],
        ANY: [tile(8, BV=4096), tile(8, BV=2048), tile(16, BV=8192)],
    }
}
TUNED: Tuned = {}
