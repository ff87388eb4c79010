"""Causal softmax attention with an optional window, by the best engine that is present.

In:  q (B, H, n, D) of the newest n positions; k, v (B, K, m, D) of the newest m >= n, K divides H.
Out: (B, H, n, D). Position t sees key j iff 0 <= t - j <= window (None: all earlier ones).
Law: every engine gives the same numbers up to rounding; an engine asked for and absent is an error.
Why: one masked call costs memory and time of the full n x m square however small the window is.
     Blocks of queries against the keys they can see cost n (block + window): at T 512, window 64 on
     CPU 0.3 of the masked call's time, forward and backward.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.core.errors import UserError

ENGINES = ("auto", "flash", "flex", "blocks", "sdpa")
# Query rows of a block: smaller ones are all overhead, larger ones all mask.
MIN_BLOCK, MAX_BLOCK = 64, 512
HALF = (torch.bfloat16, torch.float16)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, engine: str = "auto"
) -> Tensor:
    """Softmax(scale q k^T) v under the causal window; shapes in the module's head."""
    n, m = q.shape[-2], k.shape[-2]
    if window is not None and window >= m - 1:
        window = None  # nothing is out of reach
    if n == 1:  # decoding: a slice is the window
        keep = m if window is None else window + 1
        return _sdpa(q, k[:, :, -keep:], v[:, :, -keep:], scale)
    if window is None and n == m:
        return _sdpa(q, k, v, scale, causal=True)
    engine = choose_engine(engine, q.device, q.dtype, cached=n != m)
    if engine == "sdpa":
        return _sdpa(q, k, v, scale, mask=visible(n, m, window, q.device))
    if engine == "flash":
        return _flash(q, k, v, window, scale)
    if engine == "flex":
        return _flex(q, k, v, window, scale)
    return _blocks(q, k, v, window, scale)


def continues_one_row(past: Tensor, rows: int) -> bool:
    """Whether `rows` rows continue the same one, by keys that are one row seen many times."""
    return rows > 1 and past.stride(0) == 0 and past.dtype not in HALF


def attend_after_shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor],
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """`causal_attention` over keys cat(past, k), the past being one row's for all: no copies.

    k, v (B, K, m, D) of the rows' own newest positions, the last n of them the queries'; past
    (.., K, s, D), fp32: half precision would round scores before the softmax. The queries of all
    rows meet the past in one product: four rows of 46 ids after 1,308 take 0.68 of the time of
    copies (GPT of 4 layers, width 256, one CPU thread).
    """
    (B, H, n, _), (K, m), s = q.shape, k.shape[1:3], past[0].shape[2]
    q = q.unflatten(1, (K, H // K))  # (B, K, G, n, D): G heads read one key head
    together = lambda x: x.transpose(0, 1).flatten(1, 3)  # noqa: E731  # (K, B G n, .)
    apart = lambda x: x.unflatten(1, (B, H // K, n)).transpose(0, 1)  # noqa: E731  # back
    old = scale * (together(q) @ past[0][0].mT)  # (K, B G n, s)
    new = scale * (q @ k[:, :, None].mT)  # (B, K, G, n, m)
    mask = visible(n, s + m, window, q.device)
    new = new.masked_fill(~mask[:, s:], -torch.inf)
    if window is not None:
        old = together(apart(old).masked_fill(~mask[:, :s], -torch.inf))
    # A query sees itself, so the largest score is finite; one shift for both parts.
    top = torch.maximum(new.amax(-1, keepdim=True), apart(old.amax(-1, keepdim=True)))
    old, new = (old - together(top)).exp_(), (new - top).exp_()
    total = new.sum(-1, keepdim=True) + apart(old.sum(-1, keepdim=True))
    out = (new @ v[:, :, None] + apart(old @ past[1][0])) / total
    return out.flatten(1, 2)


def choose_engine(
    engine: str, device: torch.device, dtype: torch.dtype, *, cached: bool = False
) -> str:
    """The engine of windowed layers: as asked, or flash where it runs, else blocks.

    Rows that continue a cache (fewer queries than keys) go by blocks under flash and flex: those
    engines are for training and whole rows, where the time is. UserError for an engine that is
    absent here.
    """
    if engine not in ENGINES:
        raise UserError(
            "unknown attention engine", value=engine, remedy=f"choose {', '.join(ENGINES)}"
        )
    reasons = {"flash": _no_flash(device, dtype), "flex": _no_flex(device)}
    if engine == "auto":
        engine = "blocks" if reasons["flash"] else "flash"
    elif reason := reasons.get(engine):
        raise UserError(
            "attention engine is absent",
            value=f"{engine} ({reason})",
            remedy="set runtime.attention to auto, blocks or sdpa",
        )
    return "blocks" if cached and engine in reasons else engine


def visible(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """(n, m) bool: may query i, at position m - n + i, see key j."""
    age = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return age >= 0 if window is None else (age >= 0) & (age <= window)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _blocks(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    n, m = q.shape[-2], k.shape[-2]
    block = MAX_BLOCK if window is None else min(max(window, MIN_BLOCK), MAX_BLOCK)
    out = []
    for first in range(0, n, block):
        last = min(first + block, n)
        high = m - n + last  # one past the newest key that the block may see
        low = 0 if window is None else max(0, m - n + first - window)
        mask = visible(last - first, high - low, window, q.device)
        queries, keys, values = q[:, :, first:last], k[:, :, low:high], v[:, :, low:high]
        out.append(_sdpa(queries, keys, values, scale, mask=mask))
    return torch.cat(out, dim=-2)


def _no_flash(device: torch.device, dtype: torch.dtype) -> str:
    """Why the flash kernel with windows cannot run here; empty if it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in HALF:
        return f"needs bf16 or fp16, this is {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "needs torch 2.10 or newer"
    return ""


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    B, _, T, _ = q.shape
    edges = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))  # (B T, H, D)
    reach = (-1 if window is None else window, 0)
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, edges, edges, T, T, scale=scale, window_size=reach, enable_gqa=grouped
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (B, T)).transpose(1, 2)


def _no_flex(device: torch.device) -> str:
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    return "" if importlib.util.find_spec("triton") else "needs triton"


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    mask = _flex_mask(q.shape[-2], window, q.device)
    grouped = q.shape[1] != k.shape[1]
    return _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=16)  # one per window and length; building one takes milliseconds
def _flex_mask(n: int, window: int | None, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    reach = n if window is None else window

    def seen(_b, _h, i, j):
        return (i >= j) & (i - j <= reach)

    return create_block_mask(seen, None, None, n, n, device=str(device))
