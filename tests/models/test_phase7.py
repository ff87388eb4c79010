"""Phase 7 and phase 8: sizes, causality to the bit, states, curvature, ranks, export."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib.core.refusal import Refused
from lib.models import load_family
from lib.models.base import Family, Optim, build
from lib.models.phase7 import Config, Curvature, Rank, staggered
from lib.train.optim import build_optimizer
from lib.train.schedule import make_schedule
from tests.conftest import ROOT

V, T = 61, 40
SMALL = Config(
    width=16, depth=2, heads=2, d_ff=24, context=T, window=5, ssm_rank=6, tt_rank=8,
    curvature=Curvature(warmup=20), rank=Rank(target=0.5),
)  # fmt: skip
PHASE8 = {"width": 16, "depth": 2, "heads": 2, "key_width": 4, "d_ff": 24, "context": T}
PRESETS = {  # profile: V, parameters of phase7, of phase8
    "small": (4096, 500_554, 501_000),
    "phase7_small": (50_257, 4_242_980, 4_242_464),
    "phase7_0p7b": (50_257, 705_114_868, 705_350_368),
    "phase7_1p0b": (50_257, 1_000_026_868, 1_000_262_368),
    "phase7_1p5b": (50_257, 1_499_122_904, 1_499_304_128),
}


def make(config: Any = SMALL, seed: int = 1, name: str = "phase7", dtype=torch.float32) -> Family:
    return build(load_family(name), config, V, seed=seed).to(dtype)


def stirred(config: Any = SMALL, name: str = "phase7", dtype=torch.float32) -> Family:
    """Nothing at zero, where a dependency could hide; curvature in mid-course."""
    model, draw = make(config, name=name), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name == "c_sched":
                buffer.fill_(0.7)
    return model.to(dtype).eval()


def phase8(**changes: Any) -> Any:
    return load_family("phase8").Config(**PHASE8 | changes)


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(rows))


def batch(step: int = 0, rows: int = 2) -> SimpleNamespace:
    tokens = ids(rows, T + 1)
    return SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:], step=step)


def backward(model: Family, one: SimpleNamespace) -> float:
    losses = list(model.losses(one))
    sum(losses).backward()  # type: ignore[union-attr]
    return sum(loss.item() for loss in losses)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("profile", PRESETS)
def test_presets_have_the_parameters_of_their_names(profile):
    """Counted on the meta device; a name off by more than 2 % would be a lie."""
    from lib.core.params import read_yaml, resolve

    vocab, *wanted = PRESETS[profile]
    settings, problems = resolve(read_yaml(ROOT / "params.yaml"), profile)
    assert settings is not None and not problems
    for name, count in zip(("phase7", "phase8"), wanted, strict=True):
        family = load_family(name)
        config = family.Config(
            **{f: getattr(settings.model[name], f) for f in vars(settings.model[name])}
            | _plain(settings.model[name])
        )
        with torch.device("meta"):
            model = family.Model(config, vocab)
        model.vocab_size = vocab
        assert sum(p.numel() for p in model.parameters()) == count
        if named := re.search(r"(\d)p(\d)b", profile):
            assert count == pytest.approx(float(".".join(named.groups())) * 1e9, rel=0.02)
        if profile == "phase7_1p5b" and name == "phase7":
            assert model.flops_per_token(1024) == pytest.approx(9.8e9, rel=0.01)


def _plain(config: Any) -> dict[str, Any]:
    from lib.core import artifact

    return artifact.plain(config)


@pytest.mark.parametrize(
    ("profile", "bound"),
    [
        ("small", 1e-3),
        ("phase7_small", 1e-3),
        ("phase7_1p5b", 1e-3),
        ("phase7_1p0b", 1e-3),
        ("phase7_0p7b", 1e-3),
    ],
)
def test_twins_have_as_many_parameters(profile, bound):
    from lib.core.params import read_yaml, resolve

    settings, _ = resolve(read_yaml(ROOT / "params.yaml"), profile)
    assert settings is not None
    vocab, counts = PRESETS[profile][0], {}
    for run in ("phase7", "phase7_euclid", "phase7_transformer"):
        with torch.device("meta"):
            model = load_family("phase7").Model(Config(**_plain(settings.train[run].model)), vocab)
        counts[run] = sum(p.numel() for p in model.parameters())
    config = settings.model["phase7"]
    assert counts["phase7"] - counts["phase7_euclid"] == config.depth * config.heads
    assert counts["phase7_transformer"] == pytest.approx(counts["phase7"], rel=bound)


def test_contradictions_are_refused_with_the_nearest_value():
    for changes, words in (
        ({"heads": 3}, "12, 18"),
        ({"window": 0}, "1 to 40"),
        ({"window": 41}, "1 to 40"),
        ({"curvature": Curvature(c_min=1e-4)}, "0.001"),
        ({"curvature": Curvature(c_max=1e-4)}, "0.001 or more"),
        ({"r_max": 4.5}, "r_max <= 4"),
        ({"tt_rank": 0}, "1 or more"),
        ({"rank": Rank(target=1.0)}, "target < 1"),
        ({"geometry": "dot", "values": "centroid"}, "only the geometry lorentz"),
    ):
        with pytest.raises(Refused, match=words):
            replace(SMALL, **changes)


# ---------------------------------------------------------------- causality, states

MODES: list[tuple[str, Any]] = [
    ("phase7", SMALL),
    ("phase7", replace(SMALL, depth=1)),
    ("phase7", replace(SMALL, depth=3, geometry="euclid")),
    ("phase7", replace(SMALL, geometry="dot", window=T)),
    ("phase7", replace(SMALL, values="centroid", window=T)),
    ("phase7", replace(SMALL, ssm=False, embedding="dense")),
    ("phase7", replace(SMALL, window=1, embedding="lowrank", tt_order="random")),
    ("phase7", replace(SMALL, tt_phase=True, rank=Rank(target=None))),
    ("phase8", phase8()),
    ("phase8", phase8(depth=1)),
    ("phase8", phase8(depth=3)),
]


@pytest.mark.parametrize(("name", "config"), MODES)
@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_logits_before_an_edited_token_are_bitwise_equal(name, config, half):
    model, tokens = stirred(config, name), ids(2, T)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        before, _ = model(tokens)
        for t in (0, 1, 17, T - 1):
            edited = tokens.clone()
            edited[:, t] = (edited[:, t] + 1) % V
            after, _ = model(edited)
            assert torch.equal(after[:, :t], before[:, :t]), t
            assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize(("name", "config"), MODES)
@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 7, T - 1])  # W - 1, W, W + 1 among them
@torch.no_grad()
def test_decoding_equals_the_full_forward(name, config, size):
    """Any split; seen 3e-15 in fp64."""
    model, tokens = stirred(config, name, torch.float64), ids(2, T)
    whole, _ = model(tokens)
    parts, state = [], None
    for part in tokens.split(size, dim=1):
        logits, state = model(part, state)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["phase7", "phase8"])
@torch.no_grad()
def test_the_states_size_is_constant_and_the_context_a_limit(name):
    config = SMALL if name == "phase7" else phase8()
    model = stirred(config, name)
    _, state = model(ids(1, T))
    with pytest.raises(ValueError, match="beyond_context"):
        model(ids(1, 1), state)
    free = stirred(replace(config, beyond_context=True), name)
    sizes = []
    for n in (10, 50):  # 2 W and 10 W, which is more than the context
        _, state = free(ids(1, n))
        sizes.append(sum(x.numel() for layer in state.layers for x in layer))
    assert sizes[0] == sizes[1]
    assert free(ids(1, 1), state)[0].shape == (1, 1, V)
    assert free.max_context is None


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(("name", "config"), MODES)
def test_every_parameter_has_a_gradient_after_one_step(name, config):
    model = make(config, name=name)
    loss = backward(model, batch())
    assert abs(loss - math.log(V)) < 0.25
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), parameter_name
        assert p.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize(("profile", "rows"), [("small", 2), ("phase7_small", 1)])
@pytest.mark.parametrize("run", ["phase7", "phase7_euclid", "phase7_transformer", "phase8"])
def test_every_parameter_of_presets_and_twins_has_a_gradient(profile, run, rows):
    """As shipped, K, V and U among them; larger presets differ in their numbers alone."""
    from lib.core.params import read_yaml, resolve

    settings, _ = resolve(read_yaml(ROOT / "params.yaml"), profile)
    assert settings is not None
    section, vocab = settings.train[run], PRESETS[profile][0]
    family = load_family(section.family or run)
    config = family.Config(**_plain(section.model))
    model = build(family, config, vocab, seed=1)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (rows, 65), generator=draw)
    one = SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:], step=0)
    assert abs(backward(model, one) - math.log(vocab)) < 0.25
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.abs().sum() > 0, name


def test_groups_have_their_rates():
    model = make()
    groups = {g.name: g for g in model.param_groups(Optim(lr=1e-3, steps=300))}
    for each in (model, make(phase8(), name="phase8")):
        assert each.param_groups(Optim(lr=1e-3))[0].lr == 1e-3  # what the log line shows
    assert groups["table"].lr == pytest.approx(8e-3) and groups["table"].weight_decay == 0
    assert groups["scores"].lr == pytest.approx(0.01) and not groups["scores"].scheduled
    assert groups["matrices"].weight_decay == 0.1
    assert "blocks.0.ssm.conv.weight" in groups["rest"].params
    dense = make(replace(SMALL, embedding="dense"))
    rates = {g.name: g.lr for g in dense.param_groups(Optim(lr=1e-3))}
    assert rates["table"] == rates["rest"]


def test_schedule_and_learned_curvature_never_write_each_other():
    model: Any = make()
    optimizer = build_optimizer(model.param_groups(Optim(lr=1e-2, steps=10)))
    backward(model, batch(step=10))
    sched, eta = model.c_sched.clone(), model.eta.clone()
    assert float(sched) == pytest.approx(0.5005)
    optimizer.step(make_schedule("constant", 10).at(0))
    assert torch.equal(model.c_sched, sched) and not torch.equal(model.eta, eta)
    eta = model.eta.clone()
    list(model.losses(batch(step=20)))
    assert float(model.c_sched) == 1.0 and torch.equal(model.eta, eta)
    c = model._curvatures()
    assert (c >= 0.5).all() and (c <= 2.0).all()
    model.take_weights(SMALL, lambda shapes: model.state_dict())  # fine-tuning keeps the curvature
    list(model.losses(batch(step=0)))
    assert float(model.c_sched) == 1.0


def test_evaluation_and_decoding_use_the_saved_curvature():
    model: Any = make()
    list(model.losses(batch(step=10)))
    again: Any = build(load_family("phase7"), SMALL, V, weights=model.state_dict())
    assert torch.equal(again.c_sched, model.c_sched)
    assert torch.equal(again(ids(1, 9))[0], model(ids(1, 9))[0])


def test_first_scores_are_staggered():
    alpha = staggered(16)
    assert alpha.min() == pytest.approx(0.05) and alpha.max() == pytest.approx(1.0)
    assert len(alpha.unique()) == 16
    assert not torch.equal(alpha.sort().values, alpha)
    assert len(staggered(7).unique()) == 7  # 7 is no stride of 7 channels
    assert staggered(1).tolist() == pytest.approx([0.05])


def test_gates_are_zero_or_one_and_some_always_stay():
    model: Any = make()
    with torch.no_grad():
        model.alpha.copy_(torch.linspace(-1, 0.2, 6).expand(2, 6))
    z = model._channel_gates()
    assert z.detach().tolist() == [[0, 0, 0, 0, 1, 1]] * 2
    with torch.no_grad():
        model.alpha.fill_(-1).sub_(torch.arange(6) * 0.1)
    assert model._channel_gates().detach().tolist() == [[1, 1, 0, 0, 0, 0]] * 2
    z = model._channel_gates()
    z.sum().backward()
    soft = torch.sigmoid(model.alpha.detach() / 0.1)
    assert torch.allclose(model.alpha.grad, soft * (1 - soft) / 0.1)


@pytest.mark.parametrize("target", [0.5, 0.25])
def test_ranks_end_near_their_target_and_export_prunes_them(target):
    """Of 16 channels, in 60 steps; pruned logits are equal, no layer is below the least."""
    config = replace(SMALL, ssm_rank=16, rank=Rank(target=target))
    model: Any = make(config)
    steps = 60
    optimizer = build_optimizer(model.param_groups(Optim(lr=2e-3, steps=steps)))
    schedule = make_schedule("cosine", steps)
    for step in range(steps):
        backward(model, batch(step))
        optimizer.step(schedule.at(step))
        optimizer.zero_grad()
    told = model.log_scalars()
    hard = [told[f"rank/hard/{i}"] for i in range(2)]
    assert target - 0.1 <= sum(hard) / 32 <= target + 0.1, hard
    assert (told["loss/rank"] == 0) == (told["rank/expected"] <= target)
    pruned_config, pruned = model.exported(config)
    assert pruned_config.ssm_rank == tuple(int(x) for x in hard)
    assert pruned_config.rank.target is None
    assert min(hard) >= config.least_rank
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    want, got = model.eval()(ids(2, T))[0], pruned(ids(2, T))[0]
    assert (got - want).norm() / want.norm() < 1e-6


def test_export_at_the_least_rank_and_with_phases():
    config = replace(SMALL, ssm_rank=16, tt_phase=True)
    model: Any = stirred(config)
    with torch.no_grad():
        model.alpha[0].fill_(-1)
    changed, exported = model.exported(config)
    assert changed.ssm_rank[0] == 2 and not changed.tt_phase
    want, got = model(ids(2, T))[0], exported(ids(2, T))[0]
    assert (got - want).norm() / want.norm() < 1e-6
    again = replace(changed)  # a Config with a list of ranks is one that opens
    assert again.ranks == changed.ssm_rank


def test_the_rank_term_has_a_gradient_and_no_value():
    model: Any = make()
    _, second = list(model.losses(batch()))
    assert second.item() == 0.0 and second.requires_grad
    assert model.log_scalars()["loss/rank"] > 0.1
    assert not any("rank" in n for n in make(replace(SMALL, rank=Rank(target=None))).log_scalars())


def test_what_the_log_tells():
    model = make()
    backward(model, batch(step=7))
    told = model.log_scalars()
    for name in (
        "rank/expected",
        "curvature/sched",
        "curvature/mean",
        "beta/mean",
        "gate/0",
        "gate/1",
    ):
        assert math.isfinite(told[name])
    assert told["gate/0"] == pytest.approx(0.5)
    assert 0 < told["radius/max"] <= 4.0
    assert 0 <= told["attention/clamped"] < 0.01
    assert 0 < told["attention/entropy"] < math.log(5)


def test_micro_batches_do_not_change_the_gradient():
    whole, parts = make(), make()
    one = batch(rows=4)
    backward(whole, one)
    for rows in (slice(0, 2), slice(2, 4)):
        part = SimpleNamespace(tokens=one.tokens[rows], targets=one.targets[rows], step=0)
        for loss in parts.losses(part):
            (loss / 2).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_activation_checkpointing_changes_nothing():
    plain, saving = make(), make()
    saving.activation_checkpointing = True
    backward(plain, batch())
    backward(saving, batch())
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", ["phase7", "phase8"])
def test_weights_of_another_model_are_refused_with_what_differs(name):
    from lib.core.errors import UserError

    config: Any = SMALL if name == "phase7" else phase8()
    model = make(config, name=name)
    model.take_weights(config, lambda shapes: model.state_dict())
    with pytest.raises(UserError, match="tt_lr 4") as caught:
        model.take_weights(replace(config, tt_lr=4.0), lambda shapes: {})
    assert caught.value.code == 2
