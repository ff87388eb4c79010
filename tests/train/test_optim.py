"""Muon and AdamW against goldens and torch; state by name, sharding without a changed bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lib.core.errors import InputError
from lib.models.base import Group
from lib.train.optim import (
    Optimizer,
    build_optimizer,
    deal,
    frobenius,
    muon_direction,
    normuon_direction,
    orthogonalise,
)
from lib.train.schedule import Multipliers
from tests import golden

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def run_golden(want: dict, dtype: torch.dtype, section: str, weights: dict, **group) -> float:
    """Largest |difference| after steps 1 and 3 over the three matrices of a golden file."""
    shapes = want["shapes"]
    params = {
        str(j): nn.Parameter(golden.array(300 + j, s, 0.5).to(dtype)) for j, s in enumerate(shapes)
    }
    settings = want[section] if section else {}
    optimizer = build_optimizer([Group(name="m", params=params, **{"lr": 1.0, **group})])
    worst = 0.0
    for t in range(3):
        for j, shape in enumerate(shapes):
            params[str(j)].grad = golden.array(320 + 10 * t + j, shape, 0.3, 0.02).to(dtype)
        now = {k: settings[s][t] for k, s in (("lr", "lr"), ("momentum", "momentum")) if settings}
        decay = settings.get("weight_decay", [1.0] * 3)[t]
        optimizer.step(Multipliers(**now, weight_decay=decay))
        for j, rows in enumerate(weights.get(f"step{t + 1}", [])):
            gap = params[str(j)].detach().double() - torch.tensor(rows, dtype=F64)
            worst = max(worst, float(gap.abs().max()))
    assert worst > 0, "nothing was compared"
    return worst


@pytest.mark.parametrize(
    ("file", "rule", "key", "iteration", "weights", "bound"),
    [  # measured 5e-13, 1.0e-3, 1.2e-7, 6.5e-3, 5e-13
        ("seed_era", "muon", "weights_fp64_iteration", F64, F64, 1e-10),
        ("seed_era", "muon", "weights_bf16_iteration", BF16, F32, 5e-3),
        ("newest_fp32", "normuon", "weights", F32, F32, 1e-5),
        ("newest_bf16", "normuon", "weights", BF16, F32, 1e-2),
        ("newest_fp32", "normuon", "weights_fp64_restated", F64, F64, 1e-10),
    ],
)
def test_muon_equals_its_goldens(shared, file, rule, key, iteration, weights, bound):
    want = golden.read(shared, f"optim_{file}.json")
    group = {"rule": rule, "iteration_dtype": iteration, "betas": (0.0, 0.9)}
    decay = 1.0 if rule == "normuon" else 0.0
    gap = run_golden(want, weights, "muon", want["muon"][key], weight_decay=decay, **group)
    assert gap < bound


@pytest.mark.parametrize("file", ["seed_era", "newest_fp32"])
def test_adamw_equals_its_goldens(shared, file):
    """Measured 7e-7 at lr 0.3; the goldens are fp64, our state is fp32."""
    want = golden.read(shared, f"optim_{file}.json")
    for case in want["adamw"]:
        rates = case["lr"] if isinstance(case["lr"], list) else [case["lr"]] * 3
        for j, shape in enumerate(want["shapes"]):
            p = nn.Parameter(golden.array(300 + j, shape, 0.5))
            common = {k: case[k] for k in ("eps", "weight_decay")}
            group = Group(
                name="a", params={"p": p}, lr=rates[j], betas=tuple(case["betas"]), **common
            )
            optimizer = Optimizer([group])
            for t in range(3):
                p.grad = golden.array(320 + 10 * t + j, shape, 0.3, 0.02)
                optimizer.step(Multipliers())
                if rows := case["weights"].get(f"step{t + 1}"):
                    assert (
                        p.detach().double() - torch.tensor(rows[j], dtype=F64)
                    ).abs().max() < 3e-5


def test_muon_ends_near_the_orthogonal_matrix():
    """Condition 100: base's singular values in [0.6, 1.3], of tall and wide matrices alike."""
    draw = torch.Generator().manual_seed(3)
    U, _ = torch.linalg.qr(torch.randn(48, 32, generator=draw))
    V, _ = torch.linalg.qr(torch.randn(32, 32, generator=draw))
    X = (U * torch.logspace(0, -2, 32)) @ V.mT
    for matrix in (X, X.mT):
        singular = torch.linalg.svdvals(muon_direction(matrix[None], F32)[0])
        assert 0.6 < singular.min() < singular.max() < 1.3


def test_normuon_keeps_the_norm_of_its_polar_factor():
    """Before and after variance normalisation: Frobenius norm sqrt(min side) to 1e-3."""
    X = torch.randn(2, 24, 60, generator=torch.Generator().manual_seed(1))
    second = torch.zeros(2, 1, 60)
    out = normuon_direction(X, second, 0.9, F32)
    assert frobenius(out).flatten().tolist() == pytest.approx([24**0.5] * 2, rel=1e-3)
    assert second.min() > 0


def test_orthogonalisation_commutes_with_transposition():
    X = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(2)) / 40
    steps = [(3.4445, -4.7750, 2.0315)] * 5
    assert torch.equal(orthogonalise(X.mT, steps), orthogonalise(X, steps).mT)


def test_cautious_decay_never_pushes_against_the_update():
    """With a zero gradient the update is 0, X W = 0 counts as agreement, and the weight decays."""
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.zeros(4, 4)
    group = Group(
        name="m", params={"p": p}, rule="normuon", lr=0.1, weight_decay=0.5, betas=(0, 0.9)
    )
    Optimizer([group]).step(Multipliers(weight_decay=0.5))
    assert torch.allclose(p, torch.full((4, 4), 1 - 0.1 * 0.5 * 0.5))


def test_adamw_equals_torch():
    own, their = nn.Parameter(torch.ones(7, 5)), nn.Parameter(torch.ones(7, 5))
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    ours = Optimizer([Group(name="a", params={"own": own}, **settings)])
    theirs = torch.optim.AdamW([their], **settings)
    draw = torch.Generator().manual_seed(0)
    for step in range(5):
        own.grad = torch.randn(7, 5, generator=draw)
        their.grad = own.grad.clone()
        theirs.param_groups[0]["lr"] = 0.01 * (1 - step / 10)
        theirs.step()
        ours.step(Multipliers(lr=1 - step / 10))
    assert (own - their).abs().max() < 1e-6


def test_half_precision_parameters_keep_fp32_moments():
    """The fp32 update of the same numbers, rounded once; torch's own would round its moments."""
    start = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).to(BF16)
    half, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = Optimizer(
        [Group(name="a", params={"h": half, "f": full}, lr=0.01, weight_decay=0.1)]
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(4):
        with torch.no_grad():  # so that every step starts from the same numbers
            full.copy_(half)
        half.grad = torch.randn(40, 5, generator=draw).to(BF16)
        full.grad = half.grad.float()
        optimizer.step(Multipliers())
        assert ((half.float() - full).abs() <= 2**-8 * full.abs()).all(), "half a bf16 step"
    state = optimizer.state_tensors()
    assert torch.allclose(state["h.exp_avg_sq"], state["f.exp_avg_sq"], rtol=1e-6)


def small_groups(seed: int = 0) -> tuple[list[Group], dict[str, nn.Parameter]]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 4), "b": (8, 4), "c": (4, 8), "d": (6, 6), "v": (5,)}
    params = {n: nn.Parameter(torch.randn(s, generator=draw)) for n, s in shapes.items()}
    matrices = {n: p for n, p in params.items() if n != "v"}
    muon = Group(
        name="m", params=matrices, rule="normuon", lr=0.1, betas=(0, 0.9), weight_decay=0.1
    )
    return [muon, Group(name="v", params={"v": params["v"]}, lr=0.1)], params


def set_grads(params: dict[str, nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=draw)


def run_steps(optimizer: Optimizer, params: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step(Multipliers(lr=1 / (step + 1), momentum=0.9))


def test_resumed_state_continues_bit_for_bit():
    """The state of five steps, loaded into a fresh optimizer, gives the same sixth step."""
    groups, params = small_groups()
    whole = Optimizer(groups)
    run_steps(whole, params, range(5))
    state = {n: t.clone() for n, t in whole.state_tensors().items()}
    weights = {n: p.detach().clone() for n, p in params.items()}
    run_steps(whole, params, range(5, 8))
    groups, fresh = small_groups(seed=9)
    with torch.no_grad():
        for name, p in fresh.items():
            p.copy_(weights[name])
    resumed = Optimizer(groups)
    resumed.load_state_tensors(state)
    run_steps(resumed, fresh, range(5, 8))
    for name, p in params.items():
        assert torch.equal(p, fresh[name]), name


def test_state_has_fixed_names_and_refuses_another_model():
    groups, _ = small_groups()
    optimizer = Optimizer(groups)
    state = {n: t.clone() for n, t in optimizer.state_tensors().items()}
    kinds = {"exp_avg", "exp_avg_sq", "step"}
    want = {f"v.{k}" for k in kinds} | {
        f"{n}.{k}" for n in "abcd" for k in ("momentum", "second_moment")
    }
    assert list(state) == sorted(want)
    for broken in (
        {n: t for n, t in state.items() if n != "a.momentum"},
        state | {"z.momentum": torch.zeros(2)},
        state | {"a.momentum": torch.zeros(4, 8)},
    ):
        with pytest.raises(InputError, match="does not fit"):
            optimizer.load_state_tensors(broken)


def test_a_parameter_without_gradient_stays():
    groups, params = small_groups()
    optimizer = Optimizer(groups)
    run_steps(optimizer, params, range(2))
    before = {n: p.detach().clone() for n, p in params.items()}
    momentum = {n: optimizer.state_tensors()[f"{n}.momentum"].clone() for n in "ab"}
    set_grads(params, 2)
    params["b"].grad = params["v"].grad = None
    optimizer.step(Multipliers())
    for name in "bv":
        assert torch.equal(params[name], before[name])
    assert not torch.equal(params["a"], before["a"])
    after = optimizer.state_tensors()
    assert torch.equal(after["b.momentum"], momentum["b"])
    assert params["a"].grad is not None
    assert torch.allclose(after["a.momentum"], momentum["a"].lerp(params["a"].grad, 0.05))


def test_matrices_are_dealt_largest_first():
    groups, _ = small_groups()
    assert deal(groups[:1], 2) == {"d": 0, "a": 1, "b": 0, "c": 1}


def _sharded(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    groups, params = small_groups()
    optimizer = Optimizer(groups, shard=True)
    run_steps(optimizer, params, range(3))
    state = optimizer.state_tensors()
    optimizer.load_state_tensors(state)
    if rank == 0:
        from safetensors.torch import save_file

        tensors = {n: p.detach() for n, p in params.items()} | state
        save_file({n: t.contiguous() for n, t in tensors.items()}, out)
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_sharded_equals_unsharded_bit_for_bit(tmp_path):
    """Two processes over gloo: parameters and gathered state."""
    from safetensors.torch import load_file

    out = tmp_path / "state.safetensors"
    mp.spawn(_sharded, args=(str(tmp_path / "store"), str(out)), nprocs=2)
    groups, params = small_groups()
    optimizer = Optimizer(groups)
    run_steps(optimizer, params, range(3))
    want: dict[str, Tensor] = {n: p.detach() for n, p in params.items()} | optimizer.state_tensors()
    got = load_file(out)
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
