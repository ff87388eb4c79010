"""Warps by the wider side of a row's (d1, d2); none has been tuned on a GPU."""

from __future__ import annotations

from lib.kernels.configs import Candidates, Tuned, tile

CANDIDATES: Candidates = {
    "gather": {64: [tile(4), tile(8)], 128: [tile(8), tile(4)]},
    "scatter": {64: [tile(4), tile(8)], 128: [tile(8), tile(4)]},
}
TUNED: Tuned = {}
