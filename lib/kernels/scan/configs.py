"""Steps BT and channels BR of a tile; none has been tuned on a GPU."""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

ANY = 1 << 40
CANDIDATES: Candidates = {
    "scan": {ANY: [tile(4, BT=64, BR=32), tile(2, BT=64, BR=16), tile(4, BT=128, BR=32)]}
}
TUNED: Tuned = {}
