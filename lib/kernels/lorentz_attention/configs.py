"""Tiles by head width: query rows BM, keys BN. The starts spill nothing on sm_90 (kernels.md 5.4).

None has been tuned on a GPU.
"""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

_BOTH_BACKWARD = {
    32: [tile(4, BM=64, BN=32), tile(4, BM=32, BN=32)],
    64: [tile(8, BM=64, BN=32), tile(4, BM=32, BN=32)],
    128: [tile(4, BM=32, BN=32), tile(8, BM=64, BN=32)],
}
CANDIDATES: Candidates = {
    "forward": {
        32: [tile(4, BM=64, BN=64), tile(4, BM=32, BN=32)],
        64: [tile(8, BM=64, BN=64), tile(8, BM=64, BN=32), tile(4, BM=32, BN=32)],
        128: [tile(8, BM=64, BN=32), tile(4, BM=32, BN=32)],
    },
    "dq": _BOTH_BACKWARD,
    "dkv": _BOTH_BACKWARD,
}
TUNED: Tuned = {}
