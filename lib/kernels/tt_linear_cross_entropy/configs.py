"""Columns BV of a step through a block of cells; none has been tuned on a GPU."""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

ANY = 1 << 40
CANDIDATES: Candidates = {
    "block": {1024: [tile(4, BV=512), tile(4, BV=256)], ANY: [tile(8, BV=2048), tile(8, BV=4096)]}
}
TUNED: Tuned = {}
