"""Every engine gives the masked softmax; windows save memory, not only mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.core.errors import UserError
from lib.nn import attention
from lib.nn.attention import (
    attend_after_shared,
    causal_attention,
    choose_engine,
    continues_one_row,
)
from lib.nn.norm import rms_norm
from lib.nn.rope import rope_tables, rotate

CPU = torch.device("cpu")


def draw(B: int, H: int, K: int, n: int, m: int, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n * 100 + m)
    shapes = ((B, H, n, D), (B, K, m, D), (B, K, m, D))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)  # type: ignore


def definition(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Softmax over the visible keys, one query at a time."""
    n, m, share = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    rows = []
    for i in range(n):
        t = m - n + i
        low = 0 if window is None else max(0, t - window)
        scores = scale * (q[:, :, i : i + 1] @ k[:, :, low : t + 1].mT)
        rows.append(scores.softmax(-1) @ v[:, :, low : t + 1])
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("engine", ["auto", "blocks", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 5, 70, 1_000])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 30), (7, 30), (150, 150), (65, 200)])
def test_engines_equal_the_definition(engine, window, n, m):
    q, k, v = draw(2, 4, 2, n, m)
    out = causal_attention(q, k, v, window=window, scale=0.3, engine=engine)
    assert torch.allclose(out, definition(q, k, v, window, 0.3), atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 5, 20, 1_000])
@pytest.mark.parametrize(("n", "m", "s"), [(1, 1, 9), (4, 6, 30), (12, 12, 1)])
def test_rows_that_continue_one_row_see_it_without_copies(window, n, m, s):
    """Three rows after s keys of one; wrong shifts, masks or heads would each show."""
    q, k, v = draw(3, 4, 2, n, m)
    _, *past = draw(1, 4, 2, 1, s)
    past = [x.expand(3, -1, -1, -1) for x in past]
    assert continues_one_row(past[0], 3) and not continues_one_row(k, 3)
    out = attend_after_shared(q, k, v, (past[0], past[1]), window=window, scale=0.3)
    whole = [torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True)]
    assert torch.allclose(out, definition(q, *whole, window, 0.3), atol=1e-12)


def test_blocks_see_only_keys_in_reach(monkeypatch):
    """No call may be given the whole square: window 16 of 512 keys takes at most 80 at once."""
    seen = []
    exact = attention._sdpa

    def spy(q, k, v, scale, **more):
        seen.append((q.shape[2], k.shape[2]))
        return exact(q, k, v, scale, **more)

    monkeypatch.setattr(attention, "_sdpa", spy)
    q, k, v = draw(1, 2, 2, 512, 512)
    causal_attention(q, k, v, window=16, scale=1.0)
    assert len(seen) == 8
    assert max(keys for _, keys in seen) == 64 + 16


def test_an_absent_engine_is_an_error_never_a_fallback():
    for engine in ("flash", "flex"):
        with pytest.raises(UserError, match="absent"):
            choose_engine(engine, CPU, torch.float32)
    with pytest.raises(UserError, match="unknown"):
        choose_engine("xformers", CPU, torch.float32)
    assert choose_engine("auto", CPU, torch.float32) == "blocks"


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["flash", "flex", "blocks"])
def test_engines_agree_on_a_gpu(engine):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    q, k, v = (t.cuda().bfloat16().requires_grad_() for t in draw(2, 4, 4, 512, 512, D=64))
    out = causal_attention(q, k, v, window=128, scale=0.125, engine=engine)
    want = causal_attention(q, k, v, window=128, scale=0.125, engine="sdpa")
    for a, b in zip(
        (out, *torch.autograd.grad(out.sum(), (q, k, v))),
        (want, *torch.autograd.grad(want.sum(), (q, k, v))),
        strict=True,
    ):
        assert (a - b).float().norm() / b.float().norm() < 2e-2


def test_rotation_is_relative_and_keeps_lengths():
    """Scores depend on the distance only: shifting both positions by 5 changes nothing."""
    q, k, _ = draw(1, 1, 1, 1, 1, D=16)

    def score(t: int, j: int) -> Tensor:
        at_t, at_j = (rope_tables(x, 1, 16, 100.0, CPU, torch.float64) for x in (t, j))
        return (rotate(q, at_t) * rotate(k, at_j)).sum()

    assert torch.allclose(score(9, 2), score(14, 7))
    assert not torch.allclose(score(9, 2), score(9, 3))
    tables = rope_tables(3, 1, 16, 100.0, CPU, torch.float64)
    assert torch.allclose(rotate(q, tables).norm(), q.norm())


def test_rope_tables_start_anywhere():
    whole = rope_tables(0, 20, 8, 10_000.0, CPU, torch.float32)
    part = rope_tables(7, 3, 8, 10_000.0, CPU, torch.float32)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[7:10], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_is_its_formula_with_wide_statistics(dtype):
    x = (torch.randn(5, 33, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    wide = x.double()
    want = (wide / (wide.square().mean(-1, keepdim=True) + 2**-23).sqrt()).to(dtype)
    out = rms_norm(x)
    assert out.dtype == dtype
    assert torch.allclose(out, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(rms_norm(torch.zeros(2, 4, dtype=dtype)), torch.zeros(2, 4, dtype=dtype))
