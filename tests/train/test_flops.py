"""Peaks by device name; no MFU where the peak is unknown."""

from __future__ import annotations

import pytest

from lib.train.flops import mfu, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peaks_are_told_by_name(name, peak):
    assert peak_flops(name) == peak


def test_utilisation_is_a_share_or_absent():
    """d20 base at 127k tokens/s on one H200 is 45 %."""
    assert mfu(3_491_758_080, 127_000, 1, "NVIDIA H200") == pytest.approx(0.448, abs=1e-3)
    assert mfu(3_491_758_080, 254_000, 2, "NVIDIA H200") == pytest.approx(0.448, abs=1e-3)
    assert mfu(3_491_758_080, 1_000, 1, "cpu") is None
