"""The chunked softcapped head against its four-line definition: values, gradients, known traps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.kernels.linear_cross_entropy import linear_cross_entropy, reference
from lib.kernels.linear_cross_entropy.reference import chunk_rows, plain

F64 = torch.float64


def draw(n: int, d: int, rows: int, V: int, dtype=F64, ignored: float = 0.1) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n * 1000 + d)
    h = torch.randn(n, d, generator=g, dtype=F64).to(dtype).requires_grad_()
    w = torch.randn(rows, d, generator=g, dtype=F64).to(dtype).requires_grad_()
    y = torch.randint(0, V, (n,), generator=g)
    y[torch.rand(n, generator=g) < ignored] = -1
    return h, w, y


def reduced(losses: Tensor, targets: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / ((targets >= 0).sum().clamp(min=1) if reduction == "mean" else 1)


def both(h, w, y, V, *, softcap, reduction="mean", chunk="auto"):
    """(value, dh, dw) of ours and of the definition, for a loss that weighs rows unevenly."""
    settings = {"vocab_size": V, "softcap": softcap}
    ours = linear_cross_entropy(h, w, y, **settings, reduction=reduction, chunk=chunk)
    want = reduced(plain(h, w, y, **settings), y, reduction)
    weigh = torch.linspace(0.5, 2, ours.numel(), dtype=ours.dtype).view_as(ours)
    return [
        (value.detach(), *torch.autograd.grad((value * weigh).sum(), (h, w)))
        for value in (ours, want)
    ]


def assert_close(ours, want, bound: float) -> None:
    for name, a, b in zip(("loss", "dh", "dw"), ours, want, strict=True):
        error = (a - b).norm() / b.norm().clamp(min=1e-6 * b.numel() ** 0.5)
        assert error < bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", ["auto", 1, 7, 1_000])
def test_equals_the_definition_in_every_reduction_and_chunk(softcap, reduction, chunk):
    h, w, y = draw(33, 12, 40, 37)
    assert_close(*both(h, w, y, 37, softcap=softcap, reduction=reduction, chunk=chunk), 1e-12)


@pytest.mark.parametrize("n", [1, 2, 15, 64, 65])
@pytest.mark.parametrize("V", [2, 31, 97])
def test_odd_shapes_in_fp32(n, V):
    h, w, y = draw(n, 47, V + 3, V, torch.float32, ignored=0.0)
    y[-1] = V - 1  # the last column that counts
    assert_close(*both(h, w, y, V, softcap=15.0, chunk=16), 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_targets_ignored_is_zero_without_nan(reduction):
    h, w, y = draw(9, 8, 11, 11)
    y.fill_(-1)
    loss = linear_cross_entropy(h, w, y, softcap=15.0, reduction=reduction)
    dh, dw = torch.autograd.grad(loss.sum(), (h, w))
    assert loss.abs().sum() == dh.abs().sum() == dw.abs().sum() == 0


def test_huge_logits_stay_finite():
    h, w, y = draw(8, 16, 20, 20, torch.float32)
    big = (h.detach() * 1e4).requires_grad_()
    for softcap in (0.0, 15.0):
        ours, want = both(big, w, y, 20, softcap=softcap)
        assert all(torch.isfinite(t).all() for t in ours)
        assert torch.allclose(ours[0], want[0], rtol=1e-5)


def test_four_micro_batches_equal_one():
    h, w, y = draw(32, 12, 20, 20, ignored=0.0)
    whole = torch.autograd.grad(linear_cross_entropy(h, w, y, softcap=15.0), w)[0]
    parts = [
        torch.autograd.grad(linear_cross_entropy(a, w, b, softcap=15.0) / 4, w)[0]
        for a, b in zip(h.split(8), y.split(8), strict=True)
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-14)  # type: ignore[arg-type]


def test_only_the_gradients_asked_for():
    h, w, y = draw(6, 8, 11, 11)
    want_h = torch.autograd.grad(linear_cross_entropy(h, w.detach(), y), h)[0]
    want_w = torch.autograd.grad(linear_cross_entropy(h.detach(), w, y), w)[0]
    both_grads = torch.autograd.grad(linear_cross_entropy(h, w, y), (h, w))
    assert torch.equal(both_grads[0], want_h)
    assert torch.equal(both_grads[1], want_w)
    with torch.no_grad():
        assert linear_cross_entropy(h, w, y) == pytest.approx(linear_cross_entropy(h, w, y).item())


def test_a_weight_used_twice_collects_both_gradients():
    h, w, y = draw(6, 11, 11, 11)
    tied = linear_cross_entropy(h @ w, w, y)
    plain_loss = reduced(plain(h @ w, w, y, vocab_size=11), y, "mean")
    for a, b in zip(*(torch.autograd.grad(x, (h, w)) for x in (tied, plain_loss)), strict=True):
        assert torch.allclose(a, b, atol=1e-13)


def test_bf16_keeps_an_fp32_sum_over_chunks():
    """dw of 64 chunks of one row: a bf16 accumulator would be off by percents (measured 2e-3)."""
    h, w, y = draw(64, 32, 50, 50, torch.float32, ignored=0.0)
    settings = {"softcap": 15.0, "reduction": "sum"}
    want = torch.autograd.grad(linear_cross_entropy(h, w, y, **settings), (h, w))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, w, y, **settings, chunk=1)
    got = torch.autograd.grad(loss, (h, w))
    assert got[1].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() / b.norm() < 1.2e-2


def test_the_operator_keeps_torchs_rules():
    """Fake shapes, schema and autograd registration; and a compiled graph without a break."""
    h, w, y = draw(10, 8, 12, 12, torch.float32)
    for scale in (None, torch.ones(10)):
        torch.library.opcheck(
            torch.ops.kumiki.lib_kernels_linear_cross_entropy, (h, w, y, scale, 12, 15.0, 4)
        )
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(f(h, w, y, softcap=15.0), h)[0]
        for f in (compiled, linear_cross_entropy)
    ]
    assert torch.allclose(*grads)


def test_second_order_gradients_are_refused():
    h, w, y = draw(4, 8, 9, 9)
    with pytest.raises(RuntimeError, match="first-order"):
        torch.autograd.grad(linear_cross_entropy(h, w, y), h, create_graph=True)


def test_wrong_shapes_are_named():
    h, w, y = draw(4, 8, 9, 9)
    for bad in ((h, w[:, :7], y), (h, w, y[:3])):
        with pytest.raises(ValueError, match=r"\(\d"):
            linear_cross_entropy(*bad)
    with pytest.raises(ValueError, match="vocab_size 10"):
        linear_cross_entropy(h, w, y, vocab_size=10)


def test_the_logits_of_all_rows_never_exist(monkeypatch):
    """Neither in the loss nor in its gradients: blocks of at most `chunk` rows."""
    blocks = []
    exact = reference._logits

    def spy(h, w, softcap):
        blocks.append(len(h))
        return exact(h, w, softcap)

    monkeypatch.setattr(reference, "_logits", spy)
    h, w, y = draw(33, 8, 11, 11)
    linear_cross_entropy(h, w, y, softcap=15.0, reduction="none", chunk=8).sum().backward()
    assert blocks == [8, 8, 8, 8, 1] * 2


def test_chunks_are_bounded():
    """At V 65,536 a chunk is 256 rows on a CPU; on accelerators about as large as h."""
    assert chunk_rows(2_048, 1_280, 65_536) == 256
    assert chunk_rows(2_048, 1_280, 65_536, half=True) == 512
    assert chunk_rows(2_048, 1_280, 65_536, "cuda") == 64
    assert chunk_rows(100, 64, 500, "cuda") == 100
