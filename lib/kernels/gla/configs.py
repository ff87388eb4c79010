"""Value columns BV of a program, by key width; elements BS of a state. None tuned on a GPU."""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

_BY_KEYS = {
    64: [tile(4, BV=64), tile(4, BV=32)],
    128: [tile(8, BV=64), tile(4, BV=32)],
}
CANDIDATES: Candidates = {
    "chunk_state": _BY_KEYS,
    "chunk_out": _BY_KEYS,
    "chunk_dv": _BY_KEYS,
    "chunk_dqk": {
        64: [tile(8, BV=32), tile(4, BV=32)],
        128: [tile(8, BV=32), tile(8, BV=16)],
    },
    "state_scan": {1 << 40: [tile(4, BS=1024), tile(4, BS=512)]},
    "reverse_sum": {1 << 40: [tile(4, BT=1024), tile(2, BT=256)]},
}
TUNED: Tuned = {}
