"""Tiles of the symmetric product by its inner dimension; none has been tuned on a GPU."""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

ANY = 1 << 40
CANDIDATES: Candidates = {
    "xxt": {ANY: [tile(4, 3, BN=64, BK=32), tile(8, 3, BN=128, BK=32), tile(4, 3, BN=64, BK=64)]}
}
TUNED: Tuned = {}
