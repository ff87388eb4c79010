"""Golden numbers through references (layer 1) and through kernels (interpreter or GPU), in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib import kernels
from lib.kernels.cvfp_epilogue import cvfp_epilogue
from lib.kernels.lorentz_attention import lorentz_attention
from lib.kernels.tt_gather import tt_gather
from lib.models import gpt
from lib.models.base import build
from lib.train.job import Batch
from tests import golden
from tests.kernels.harness import DEVICE, F64, layer

both = pytest.mark.parametrize("choice", ["reference", pytest.param("triton", marks=layer)])


def device(choice: str) -> str:
    return "cpu" if choice == "reference" else DEVICE


@both
def test_lorentz_attention(choice, shared):
    """Widths are padded with zeros to one that the kernel has: distances do not change."""
    found = golden.read(shared, "lorentz_attention.json")
    n, d, dv = found["n"], found["d"], found["dv"]
    q, k, v, dout = (
        golden.wide_array(found[f"k_{name}"], (n, width), scale)
        for name, width, scale in (("q", d, 0.8), ("k", d, 0.8), ("v", dv, 1), ("dout", dv, 1))
    )
    k[2] = q[2]
    q[1] = 0
    up = F.pad(dout, (0, 16 - dv)).to(device(choice))
    for case in (c for c in found["cases"] if c["causal"]):
        x = [F.pad(t, (0, 16 - t.shape[1])).to(device(choice)) for t in (q, k, v)]
        x = [t[None, None].requires_grad_() for t in x]
        c, beta = (
            torch.tensor([float(case[s])], dtype=F64, device=device(choice)).requires_grad_()
            for s in ("c", "beta")
        )
        with kernels.forced(choice):
            out = lorentz_attention(*x, c, beta, case["window"] or n)
            out.backward(up[None, None])
        pairs = [("output", out[0, 0, :, :dv]), ("grad_c", c.grad), ("grad_beta", beta.grad)]
        pairs += [
            (f"grad_{s}", t.grad[0, 0, :, :w]) for s, t, w in zip("qkv", x, (d, d, dv), strict=True)
        ]
        for name, ours in pairs:
            want = torch.tensor(case[name], dtype=F64)
            assert torch.allclose(ours.cpu().squeeze(), want, atol=1e-10), (name, case["c"])


@both
@pytest.mark.parametrize("layers", [1, 3, 6])
def test_context_blocks(choice, layers, shared):
    """One Jacobi sweep from `prev`: row t starts at prev[t - 1]."""
    want = torch.from_numpy(np.load(shared / "golden" / "cvfp.npz")[f"sweep_wrap_{layers}"])
    d, n = want.shape[1], want.shape[0]
    e = golden.wide_array(700, (n, d), 1)
    z = golden.wide_array(760 + layers, (n, d), 1).roll(1, 0).to(device(choice))
    for layer_index in range(layers):
        k = 720 + 4 * layer_index
        M, b = golden.wide_array(k, (d, 2 * d), 0.25), golden.wide_array(k + 1, (d,), 0.05)
        gain, offset = golden.wide_array(k + 2, (d,), 0.1, 1), golden.wide_array(k + 3, (d,), 0.05)
        side = (e @ M[:, d:].mT + b).to(device(choice))
        rest = [x.to(device(choice)) for x in (M[:, :d], gain, offset)]
        with kernels.forced(choice):
            z = cvfp_epilogue(torch.addmm(side, z, rest[0].mT), z, rest[1], rest[2])
    assert torch.allclose(z.cpu(), want, atol=1e-10)


@both
def test_tensor_train_rows(choice, shared):
    found = golden.read(shared, "htt.json")
    checked = 0
    for case in found["cases"]:
        V, d, R = case["V"], case["d"], case["r"]
        v1, d1 = int(np.ceil(np.sqrt(V))), int(np.ceil(np.sqrt(d)))
        v2, d2 = -(-V // v1), -(-d // d1)
        C1 = golden.wide_array(case["k_core1"], (v1, R, d1), 0.7)
        C2 = golden.wide_array(case["k_core2"], (v2, R, d2), 0.7)
        theta = golden.wide_array(case["k_theta"], (R,), 0.8)
        hidden = golden.wide_array(case["k_hidden"], (5, d), 1)
        C1 = C1 * theta.cos()[:, None]
        ids = torch.arange(V, device=device(choice))
        with kernels.forced(choice):
            E = tt_gather(ids, C1.to(device(choice)), C2.to(device(choice)), d).cpu()
        want = torch.tensor(case["logits"], dtype=F64)
        assert torch.allclose(hidden @ E.mT, want, atol=1e-11)
        checked += 1
    assert checked


@pytest.mark.parametrize("choice", [pytest.param("triton", marks=layer)])
def test_a_small_gpt_with_kernels_on(choice):
    """Loss, logits and every gradient in fp32 against the references'; seen 1e-6, bound 1e-5.

    Three layers: below that `backout` scales the whole stream, the last norm undoes it, and its
    gradient is rounding alone, which no relative bound can compare.
    """
    config = gpt.Config(depth=3, width=16, heads=2, context=12, variant="modern")
    found = {}
    for name in ("reference", choice):
        model = build(gpt, config, 61, seed=1).to(DEVICE)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.linspace(-0.1, 0.1, p.numel(), device=DEVICE).view_as(p))
        tokens = (torch.arange(26, device=DEVICE).view(2, 13) * 7) % 61
        batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], step=0)
        with kernels.forced(name):
            logits = model(batch.tokens)[0]
            (loss,) = model.losses(batch)
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[name] = {"loss": loss.detach(), "logits": logits.detach(), **grads}
    for name, want in found["reference"].items():
        error = (found[choice][name] - want).norm() / want.norm().clamp(min=1e-6)
        assert error < 1e-5, f"{name}: {error:.1e}"
