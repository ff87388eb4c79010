"""The tensor-train head against the full table: values, gradients, orders of ids, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib.kernels.tt_linear_cross_entropy import reference, tt_linear_cross_entropy
from lib.kernels.tt_linear_cross_entropy.reference import Head

F64 = torch.float64
V, D, SHAPES = 31, 11, ((6, 3, 3), (6, 3, 4))


def orders() -> dict[str, Tensor | None]:
    ids = torch.arange(V)
    random = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    return {"identity": None, "strided": ids % 6 * 6 + ids // 6, "random": random}


def draw(n: int = 17, dtype=F64, ignored: float = 0.2):
    g = torch.Generator().manual_seed(n)
    h, C1, C2 = (
        torch.randn(s, generator=g, dtype=F64).to(dtype).requires_grad_() for s in ((n, D), *SHAPES)
    )
    y = torch.randint(V, (n,), generator=g)
    y[torch.rand(n, generator=g) < ignored] = -1
    return h, C1, C2, y


def full(h, C1, C2, y, cells, softcap, reduction):
    each = reference.plain(h, Head(C1, C2, cells, V, D), y, softcap=softcap)
    if reduction == "none":
        return each
    return each.sum() / ((y >= 0).sum().clamp(min=1) if reduction == "mean" else 1)


def compare(h, C1, C2, y, *, cells=None, softcap=0.0, reduction="mean", block="auto", bound=1e-12):
    ours = tt_linear_cross_entropy(
        h, C1, C2, y, vocab_size=V, cells=cells, softcap=softcap, reduction=reduction, block=block
    )
    results = []
    for value in (ours, full(h, C1, C2, y, cells, softcap, reduction)):
        weigh = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view_as(value)
        results.append((value, *torch.autograd.grad((value * weigh).sum(), (h, C1, C2))))
    for name, a, b in zip(("loss", "dh", "dC1", "dC2"), *results, strict=True):
        error = (a - b).norm() / b.norm().clamp(min=1e-6 * b.numel() ** 0.5)
        assert error < bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("order", ["identity", "strided", "random"])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("block", ["auto", 1, 3, 4])
def test_equals_the_full_head(order, softcap, reduction, block):
    compare(*draw(), cells=orders()[order], softcap=softcap, reduction=reduction, block=block)


@pytest.mark.parametrize("block", ["auto", 1])
def test_fp32(block):
    compare(*draw(dtype=torch.float32), block=block, bound=1e-5)


@pytest.mark.parametrize("block", ["auto", 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_targets_ignored_is_zero_without_nan(block, reduction):
    h, C1, C2, y = draw()
    y.fill_(-1)
    loss = tt_linear_cross_entropy(h, C1, C2, y, vocab_size=V, reduction=reduction, block=block)
    grads = torch.autograd.grad(loss.sum(), (h, C1, C2))
    assert all(x.abs().sum() == 0 for x in (loss, *grads))


@pytest.mark.parametrize("block", ["auto", 2])
def test_gradients_agree_with_differences(block):
    h, C1, C2, y = draw(3)
    cells = orders()["random"]
    assert torch.autograd.gradcheck(
        lambda *x: tt_linear_cross_entropy(
            *x, y, vocab_size=V, cells=cells, block=block, softcap=9.0
        ),
        (h, C1, C2),
    )


def test_bf16_rows_keep_fp32_cores():
    h, C1, C2, y = draw(64, torch.float32, ignored=0)
    want = torch.autograd.grad(full(h, C1, C2, y, None, 0.0, "mean"), (h, C1, C2))
    for block in ("auto", 2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = tt_linear_cross_entropy(h, C1, C2, y, vocab_size=V, block=block)
        got = torch.autograd.grad(loss, (h, C1, C2))
        assert got[1].dtype == torch.float32
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() / b.norm() < 1.2e-2


def test_unused_cells_have_no_gradient():
    h, C1, C2, y = draw()
    cells = torch.arange(V)  # cells 31 .. 35 stand in the last row of first indices
    for block in ("auto", 1):
        loss = tt_linear_cross_entropy(h, C1, C2, y, vocab_size=V, cells=cells, block=block)
        table = reference.expand(C1, C2, D)
        assert torch.isfinite(loss)
        weight = table.detach().requires_grad_()
        z = (h @ weight.mT).masked_fill(torch.arange(36) >= V, -torch.inf)
        want = torch.nn.functional.cross_entropy(z, y, ignore_index=-1)
        assert torch.allclose(loss, want)
        assert torch.autograd.grad(want, weight)[0][V:].abs().sum() == 0


class Largest(TorchDispatchMode):
    """The most elements that one tensor had, and the most bytes alive at once, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.alive, self.peak = 0, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
                    self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_memory_stays_below_150_megabytes_where_the_logits_alone_take_206():
    n, V, d, R = 1024, 50_257, 256, 32
    g = torch.Generator().manual_seed(0)
    h = torch.randn(n, d, generator=g).requires_grad_()
    C1, C2 = (
        torch.randn(s, generator=g).mul_(0.1).requires_grad_() for s in ((225, R, 16), (224, R, 16))
    )
    y = torch.randint(V, (n,), generator=g)
    with Largest() as seen:
        tt_linear_cross_entropy(h, C1, C2, y, vocab_size=V).backward()
    assert seen.elements < 100_000 * n
    assert seen.peak < 150e6, f"{seen.peak / 1e6:.0f} MB"


@pytest.mark.parametrize("block", [2, 6])  # 6: all cells at once, gradients in the first pass
def test_the_operators_keep_torchs_rules(block):
    """Fake shapes, schema, autograd registration; a compiled graph without a break."""
    h, C1, C2, y = draw(10, torch.float32)
    name, sizes = "lib_kernels_tt_linear_cross_entropy", (V, 15.0, block)
    for scale in (None, torch.ones(10)):
        torch.library.opcheck(
            getattr(torch.ops.kumiki, name), (h, C1, C2, y, orders()["random"], scale, *sizes)
        )
    alone = [x.detach() for x in (h, C1, C2)]
    lse, upstream = torch.zeros(10), torch.ones(10)
    torch.library.opcheck(
        getattr(torch.ops.kumiki, f"{name}_gradients"), (*alone, y, None, lse, upstream, *sizes)
    )
    compiled = torch.compile(tt_linear_cross_entropy, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(f(h, C1, C2, y, vocab_size=V, softcap=15.0, block=block), C1)[0]
        for f in (compiled, tt_linear_cross_entropy)
    ]
    assert torch.equal(*grads)


def test_second_order_gradients_are_refused():
    h, C1, C2, y = draw(4)
    for block in (2, 6):
        loss = tt_linear_cross_entropy(h, C1, C2, y, vocab_size=V, block=block)
        with pytest.raises(RuntimeError, match="first-order gradients only"):
            torch.autograd.grad(loss, h, create_graph=True)


def test_wrong_shapes_are_named():
    h, C1, C2, y = draw()
    with pytest.raises(ValueError, match="vocab_size 37"):
        tt_linear_cross_entropy(h, C1, C2, y, vocab_size=37)
    with pytest.raises(ValueError, match=r"targets \(3,\)"):
        tt_linear_cross_entropy(h, C1, C2, y[:3], vocab_size=V)
