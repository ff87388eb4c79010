"""Model FLOPs utilisation: the rate that was reached over the rate that the device could reach.

Dense bf16 peaks as the makers publish them. A device that is not listed has no MFU, rather than a
wrong one: absent is not 0.
"""

from __future__ import annotations

# The first entry whose words the device's name has wins: PCIe cards are told from SXM first.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device by its name (`torch.cuda.get_device_name`); None: unknown."""
    words = device_name.replace("-", " ").upper().split()
    for name, peak in PEAKS:
        if all(word.upper() in words for word in name.split()):
            return peak
    return None


def mfu(flops_per_token: int, tokens_per_s: float, devices: int, device_name: str) -> float | None:
    """flops_per_token tokens/s / (devices peak) (arXiv 2204.02311 appendix B)."""
    peak = peak_flops(device_name)
    return None if peak is None else flops_per_token * tokens_per_s / (devices * peak)
