"""The tied tensor-train table against golden numbers and its own full table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lib.nn.tt import LowRank, TensorTrain, embedding_std, tied_table, tt_parameters
from tests import golden

F64 = torch.float64
ORDERS = ("identity", "strided", "random")


def made(
    V: int, d: int, R: int, order="identity", phase: bool = False, seed: int = 0
) -> TensorTrain:
    table = TensorTrain(V, d, R, order, phase).double()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=F64) * 0.5)
    table.init_buffers()
    return table


def test_golden_rows_and_logits(shared):
    for case in golden.read(shared, "htt.json")["cases"]:
        V, d, R = case["V"], case["d"], case["r"]
        table = TensorTrain(V, d, R, phase=True).double()
        with torch.no_grad():
            table.C1.copy_(golden.wide_array(case["k_core1"], table.C1.shape, 0.7))
            table.C2.copy_(golden.wide_array(case["k_core2"], table.C2.shape, 0.7))
            table.theta.copy_(golden.wide_array(case["k_theta"], (R,), 0.8))
        assert sum(p.numel() for p in table.parameters()) == case["parameters"]
        ids, hidden = torch.arange(V), golden.wide_array(case["k_hidden"], (5, d), 1.0)
        want = torch.tensor(case["embedding"], dtype=F64)
        assert torch.allclose(table(ids), want, atol=1e-12)
        wanted = torch.tensor(case["logits"], dtype=F64)
        assert torch.allclose(table.logits(hidden), wanted, atol=1e-12)
        assert torch.allclose(
            table.logits(hidden.repeat(4, 1))[:5], wanted, atol=1e-12
        )  # by blocks
        with torch.no_grad():
            table.theta.zero_()
        want = torch.tensor(case["embedding_theta_zero"], dtype=F64)
        assert torch.allclose(table(ids), want, atol=1e-12)


def test_published_counts(shared):
    import json

    path = shared / "data" / "refs" / "htt_param_counts.json"
    for row in json.loads(path.read_text())["rows"]:
        count = tt_parameters(row["vocab_size"], row["d_model"], row["rank"], phase=True)
        assert count == row["htt_params"], row


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [3, 40])  # by rows, by blocks
def test_rows_logits_and_loss_are_of_one_table(order, rows):
    table = made(31, 11, 3, order)
    E = table(torch.arange(31))
    h = torch.randn(rows, 11, dtype=F64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(rows) % 31
    z = h @ E.mT
    assert torch.allclose(table.logits(h), z, atol=1e-12)
    want = torch.nn.functional.cross_entropy(z, y, reduction="none")
    assert torch.allclose(table.loss(h, y, "none"), want, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_every_id_has_a_cell_of_its_own(order):
    table = made(31, 11, 3, order)
    cells = table.cells(torch.device("cpu"))
    cells = torch.arange(31) if cells is None else cells
    assert len(cells.unique()) == 31
    assert cells.max() < len(table.C1) * len(table.C2)


def test_one_step_changes_embedding_and_head_through_the_same_cores():
    """And cells of no id keep a zero gradient."""
    table = made(31, 11, 3)
    ids, y = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    loss = table.loss(table(ids), y)
    before = table(torch.arange(31)).detach(), table.logits(torch.eye(11, dtype=F64)).detach()
    loss.backward()
    assert table.C1.grad is not None and table.C2.grad is not None
    with torch.no_grad():
        table.C1 -= table.C1.grad
        table.C2 -= table.C2.grad
    after = table(torch.arange(31)), table.logits(torch.eye(11, dtype=F64))
    assert not torch.allclose(before[0], after[0])
    assert torch.allclose(after[0].mT, after[1], atol=1e-12)


def test_phases_are_a_gauge():
    table = made(31, 11, 3, phase=True)
    folded = made(31, 11, 3)
    with torch.no_grad():
        C1, C2 = table.cores()
        folded.C1.copy_(C1)
        folded.C2.copy_(C2)
    assert torch.equal(table(torch.arange(31)), folded(torch.arange(31)))


@pytest.mark.parametrize("kind", ["tt", "lowrank", "dense"])
def test_first_rows_have_their_deviation(kind):
    """Two cores of deviation 0.02 each once gave rows of 0.002."""
    table = tied_table(kind, 1000, 256, 32, "identity", False)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in table.named_parameters():
            parameter.copy_(table.initial(name, parameter.shape, draw))
    assert table(torch.arange(1000)).std().item() == pytest.approx(embedding_std(256), rel=0.1)


def test_lowrank_has_the_tensor_trains_parameters():
    with torch.device("meta"):
        table = LowRank(50_257, 2048, 32)
    assert table.A.shape[1] == 12
    assert sum(p.numel() for p in table.parameters()) <= tt_parameters(50_257, 2048, 32)


def test_tensors_of_a_decoded_row_stay_small():
    """v1 R d2 numbers a row, and no row of the table: at 1.5B 2.6 MB of cores instead of 206 MB."""
    table, seen = made(2500, 64, 4), []
    hooked = torch.einsum

    def spy(spec: str, *x: Tensor) -> Tensor:
        out = hooked(spec, *x)
        seen.append(out.numel())
        return out

    table.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "einsum", spy)
        table.logits(torch.zeros(1, 64, dtype=F64))
    assert seen == [50 * 4 * 8]
    assert math.prod(table.C1.shape) > 0
