"""Tiles of the two products by their inner dimension; none has been tuned on a GPU."""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

ANY = 1 << 40
CANDIDATES: Candidates = {
    "product": {
        ANY: [
            tile(4, 3, BM=64, BN=64, BK=32),
            tile(8, 3, BM=128, BN=128, BK=32),
            tile(8, 3, BM=128, BN=64, BK=64),
        ]
    }
}
TUNED: Tuned = {}
