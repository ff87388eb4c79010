"""TRM against the published recipe's numbers, and the laws of the recursion, its twins, its state.

Golden values: see the README beside them; padded positions are left out, since packed rows have
none and a causal model's other positions never see them.
"""

from __future__ import annotations

import copy
import gc
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lib.core.errors import UserError
from lib.core.refusal import Refused
from lib.models import trm
from lib.models._trm_sizes import inference_flops, training_flops
from lib.models.base import STEP, Optim, build
from lib.models.trm import Config, Model
from lib.train.ema import Ema
from lib.train.schedule import make_schedule
from tests.golden import array, read

V, T = 29, 10
SMALL = Config(width=16, heads=2, context=T)
RECIPE = Config(
    width=16, heads=2, context=T, depth=1, block="post_ln", join="concat", schedule="every",
    init="input", grad="last", latent_steps=2,
)  # fmt: skip
LOOPED = replace(SMALL, variant="looped", match="trm")
PLAIN = replace(SMALL, variant="plain", match="trm")
EVERY = {"trm": SMALL, "recipe": RECIPE, "looped": LOOPED, "plain": PLAIN}
every_variant = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)


def make(config: Config, seed: int = 1, stir: float = 0.0) -> Model:
    """A model; stirred, so that no zero hides a dependency."""
    model = build(trm, config, V, seed=seed)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * stir)
    assert isinstance(model, Model)
    return model


def ids(rows: int = 2, length: int = T, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 2, seed: int = 0) -> SimpleNamespace:
    tokens = ids(rows, T + 1, seed)
    return SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:], step=0)


def backward(model: Model, one: Any) -> list[float]:
    """Gradients of all losses; their values."""
    found = []
    for loss in model.losses(one):
        if loss is not STEP:
            loss.backward()
            found.append(float(loss.detach()))
    return found


# ---------------------------------------------------------------- golden vectors


def golden_names(tied: bool) -> list[str]:
    """Our parameter names in the order of the golden file."""
    pairs = ["join_z", "join_y", "blocks.0.attn.qkv", "blocks.0.attn.o", "blocks.0.up"]
    pairs += ["blocks.0.down", "blocks.0.norm1", "blocks.0.norm2"]
    halt = [f"{m}.{kind}" for m in ("halting.norm", "halting.head") for kind in ("weight", "bias")]
    names = ["table.weight", "positions.weight"]
    names += [f"{module}.{kind}" for module in pairs for kind in ("weight", "bias")]
    return names + ([] if tied else ["head.weight"]) + halt


@pytest.fixture(params=[0, 1], ids=["tied", "untied"])
def golden(request, shared) -> Any:
    case = read(shared, "trm.json")["cases"][request.param]
    g = SimpleNamespace(**case["config"])
    config = Config(
        width=g.d_model, heads=g.n_heads, depth=1, context=g.max_seq_len, block="post_ln",
        join="concat", schedule="every", init="input", grad="last", latent_steps=g.latent_steps,
        deep_steps=g.deep_steps, supervision_steps=g.supervision_steps, tied=g.tie_embeddings,
        halt="pooled", act_threshold=g.act_threshold, act_weight=g.act_weight,
    )  # fmt: skip
    weights = {
        name: array(p["k"], p["shape"], p["scale"], p["shift"])
        for name, p in zip(golden_names(g.tie_embeddings), case["parameters"], strict=True)
    }
    model = build(trm, config, g.vocab_size, weights=weights)
    tokens, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"]).bool()
    targets = torch.tensor(case["targets"])
    targets = torch.where(targets == g.pad_token_id, -1, targets)
    arrays = np.load(shared / "golden" / "trm_logits.npz")
    logits = torch.from_numpy(arrays[f"logits_{request.param}"])
    return SimpleNamespace(
        case=case, model=model, tokens=tokens, mask=mask, targets=targets, logits=logits,
        steps=g.supervision_steps, weights=weights, config=config,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-5), (torch.float64, 1e-9)])
def test_logits_of_every_supervision_step_are_those_of_the_recipe(golden, dtype, bound):
    model = golden.model.to(dtype).eval()
    exits = list(itertools.islice(model.exit_logits(golden.tokens), golden.steps))
    for s, logits in enumerate(exits):
        assert logits.dtype == dtype
        worst = (logits - golden.logits[s])[golden.mask].abs().max()
        assert worst < bound, f"step {s}: {worst}"
    whole, _ = model(golden.tokens)
    assert torch.equal(whole, exits[-1])


def test_losses_and_gradients_are_those_of_the_recipe(golden):
    """Losses: those of log_scalars, CE + the halting head on its own mask; y is not detached."""
    model, case = golden.model.double(), golden.case
    y, z = None, None
    ce, bce, qs = [], [], []
    for _ in range(golden.steps):
        x = model.embed(golden.tokens)
        if y is None:
            y, z = model.first(x)
        y, z = model.advance(x, y, z, trm.Tape(None))
        ce.append(model._cross_entropy(y, golden.targets, "mean"))
        bce.append(model.halt_loss(y, golden.targets, golden.mask))
        qs.append(torch.sigmoid(model.halting.pooled(y, golden.mask)))
        ((ce[-1] + bce[-1]) / golden.steps).backward()
        y, z = y.detach(), z.detach()
    factor = golden.config.act_weight
    assert torch.stack(ce).tolist() == pytest.approx(case["ce_per_supervision_step"], rel=1e-6)
    halting = [x.item() / factor for x in bce]
    assert halting == pytest.approx(case["halt_bce_per_supervision_step"], rel=1e-6)
    for s, q in enumerate(qs):
        assert q.tolist() == pytest.approx(case["q_hat"][s], rel=1e-6)
    total = sum((a + b).item() for a, b in zip(ce, bce, strict=True)) / golden.steps
    assert total == pytest.approx(case["loss_fp64"], rel=1e-8)
    names = golden_names(golden.config.tied)
    norms = [float(model.get_parameter(name).grad.norm()) for name in names]
    assert norms == pytest.approx(case["grad_norm"], rel=1e-4)


def test_losses_are_the_cross_entropies_of_the_recipe(golden):
    """What the trainer sees: the mean over supervision steps, without the halting head's loss."""
    found = backward(golden.model, golden)
    wanted = golden.case["ce_per_supervision_step"]
    assert found == pytest.approx([x / golden.steps for x in wanted], rel=1e-5)
    told = golden.model.log_scalars()
    assert [told[f"loss_{s + 1}"] for s in range(golden.steps)] == pytest.approx(wanted, rel=1e-5)


def test_greedy_text_is_that_of_the_recipe(golden):
    model, wanted = golden.model.eval(), golden.case["greedy"]
    prompt = golden.case["greedy_prompt_len"]
    row, state, feed = wanted[:prompt], None, wanted[:prompt]
    while len(row) < len(wanted):
        logits, state = model(torch.tensor([feed]), state)
        feed = [int(logits[0, -1].argmax())]
        row = [*row, *feed]
    assert row == wanted


def test_average_and_schedule_are_those_of_the_recipe(shared):
    found = read(shared, "trm.json")
    for case in found["ema"]:
        module = nn.Module()
        module.p = nn.Parameter(torch.tensor(case["initial"]))
        ema = Ema(module, case["decay"])
        for step in case["steps"]:
            with torch.no_grad():
                module.p.copy_(torch.tensor(step["param"]))
            ema.update()
            shadow = ema.state_tensors()["p"].tolist()
            assert shadow == pytest.approx(step["shadow"], rel=1e-6, abs=1e-7)
    lr = found["lr_multiplier"]
    total = lr["total_steps"]
    schedule = make_schedule("triangle", total, warmup=lr["warmup_steps"])
    ours = [schedule.at(step).lr for step in range(total)]
    assert ours == pytest.approx(lr["mult"][1 : total + 1], abs=1e-9)  # its step 0 trains nothing


# ---------------------------------------------------------------- causality and special cases


GRID = [
    replace(
        SMALL, schedule=schedule, join=join, block=block, init=init, latent_steps=n,
        deep_steps=T_d, supervision_steps=N, depth=k, dropout=0.2,
    )
    for schedule, join, block, init in [
        ("last", "add", "pre_norm", "fixed"), ("every", "concat", "post_ln", "input"),
        ("last", "concat", "pre_norm", "input"), ("every", "add", "post_ln", "fixed"),
    ]
    for n, T_d, N, k in [(1, 1, 1, 1), (2, 1, 2, 1), (1, 2, 1, 2), (3, 2, 3, 1)]
]  # fmt: skip
GRID += [replace(SMALL, latent_steps=0, init="input")]
GRID += [replace(LOOPED, dropout=0.2), replace(PLAIN, dropout=0.2)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_token_changes_no_logit_before_it_and_some_from_it_on(training):
    """The puzzle network attends both ways in every call: one such call left in would leak."""
    for config in GRID:
        model = make(config, stir=0.3).train(training)

        def logits(tokens: Tensor, model=model) -> list[Tensor]:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                return [one.double() for one in model.exit_logits(tokens)]

        tokens = ids(1)
        before = logits(tokens)
        for j in (1, T // 2, T - 1):
            changed = tokens.clone()
            changed[:, j] = (changed[:, j] + 1) % V
            for s, (old, new) in enumerate(zip(before, logits(changed), strict=True)):
                gap = (new - old).abs().amax(-1)[0]
                assert gap[:j].max() < 1e-5, f"{config} leaks at exit {s}, token {j}"
                assert gap[j:].max() > 1e-4, f"{config} ignores token {j} at exit {s}"


@pytest.mark.parametrize("block", ["pre_norm", "post_ln"])
def test_a_recursion_of_one_call_is_the_plain_model(block):
    one = replace(
        SMALL, block=block, latent_steps=0, deep_steps=1, supervision_steps=1, init="input"
    )
    plain = Config(variant="plain", width=16, heads=2, context=T, depth=2, block=block)
    looped = replace(plain, variant="looped", loops=1)
    tokens, models = ids(), [make(c, stir=0.1).double() for c in (one, plain, looped)]
    found = [model(tokens)[0] for model in models]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    losses = [backward(model, batch()) for model in models]
    assert losses[0] == losses[1] == losses[2]


def test_truncated_and_whole_gradients_have_the_same_forward():
    models = [make(replace(RECIPE, grad=grad), stir=0.1) for grad in ("all", "last")]
    assert torch.equal(*(model(ids())[0] for model in models))
    losses = [backward(model, batch()) for model in models]
    assert losses[0] == losses[1]
    assert not torch.equal(*(model.blocks[0].up.weight.grad for model in models))


@every_variant
def test_calls_with_a_gradient_are_counted(config):
    """A_g of the accounts is what really is differentiated."""
    for grad in ("all", "last"):
        model = make(replace(config, grad=grad))
        seen = []

        def look(module, inputs, output, seen=seen):
            seen.append(output[0].requires_grad)

        for block in model.blocks:
            block.register_forward_hook(look)
        backward(model, batch())
        assert (len(seen), sum(seen)) == (model.config.applications, model.config.gradients)


def test_first_vectors_follow_the_seed_and_lie_in_the_state_dict():
    """y0 from a batch's statistics, or drawn anew at each start, would be another model."""
    one, same, other = make(SMALL), make(SMALL), make(SMALL, seed=2)
    assert torch.equal(one.y0, same.y0) and not torch.equal(one.y0, other.y0)
    assert not torch.equal(one.y0, one.z0) and float(one.y0.abs().max()) <= 2
    again = build(trm, SMALL, V, weights=one.state_dict())
    assert torch.equal(again.eval()(ids())[0], one.eval()(ids())[0])
    x = one.embed(ids(3))
    assert torch.equal(one.first(x)[0][0], one.first(x[:1])[0][0])


# ---------------------------------------------------------------- losses


def test_weights_of_the_losses_sum_to_one_and_the_log_has_each():
    for kind, wanted in (("uniform", [1 / 3] * 3), ("linear", [1 / 6, 2 / 6, 3 / 6])):
        model = make(replace(SMALL, supervision_steps=3, supervision_weights=kind), stir=0.2)
        assert model.loss_weights() == pytest.approx(wanted)
        found = backward(model, batch())
        told = list(model.log_scalars().values())
        assert found == pytest.approx([w * x for w, x in zip(wanted, told, strict=True)])
        last = model.token_losses(batch().tokens, batch().targets)
        assert float(last.detach().mean()) == pytest.approx(told[-1], rel=1e-5)


@pytest.mark.slow
def test_more_thought_solves_more_of_a_task_that_needs_iteration():
    """Parity of every prefix, one block: seen 0.179, 0.103, 0.091, 0.091 nats at depth 1 to 4.

    `init: input`: where the first y and z are drawn vectors, 600 batches teach nothing of this.
    """
    config = Config(width=32, heads=2, context=8, depth=1, deep_steps=1, supervision_steps=4,
                    init="input")  # fmt: skip
    model, draw = build(trm, config, 2, seed=2), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(600):
        bits = torch.randint(2, (64, 8), generator=draw)
        for loss in model.losses(SimpleNamespace(tokens=bits, targets=bits.cumsum(1) % 2)):
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 50, (600 - step) / 180)
        optimizer.step()
        optimizer.zero_grad()
    every = torch.tensor(list(itertools.product((0, 1), repeat=8)))
    exits = itertools.islice(model.eval().exit_logits(every), 4)
    told = [float(F.cross_entropy(x.mT, every.cumsum(1) % 2)) for x in exits]
    assert all(later < earlier for earlier, later in itertools.pairwise(told)), told
    assert told[-1] < 0.7 * told[0], told


class Held:
    """Bytes that backward passes hold on to: now, and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> Held:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> Any:
        count = self

        class Kept:
            def __init__(self) -> None:
                self.tensor = tensor
                count.now += tensor.nbytes
                count.most = max(count.most, count.now)

            def __del__(self) -> None:
                count.now -= tensor.nbytes

        return Kept()


@pytest.mark.parametrize("config", [SMALL, RECIPE], ids=["trm", "recipe"])
def test_memory_does_not_grow_with_supervision_steps(config):
    """Each loss frees its graph before the next is made; one undetached y would keep them all."""
    most = {}
    for N in (2, 8):
        model = make(replace(config, supervision_steps=N))
        with Held() as held:
            backward(model, batch(4))
            gc.collect()
        assert held.now == 0
        most[N] = held.most
    assert most[8] <= 1.05 * most[2], most


def test_a_family_update_within_a_batch_is_an_update_after_each_loss():
    """sum: one gradient of all losses. step: the second loss sees the first one's update."""
    weights = {}
    for kind in ("sum", "step"):
        model = make(replace(SMALL, supervision_update=kind), stir=0.1)
        by_hand = copy.deepcopy(model)
        marks = [loss is STEP for loss in model.losses(batch())]
        assert marks == ([False, True, False] if kind == "step" else [False, False])
        for m in (model, by_hand):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            if m is model:
                for loss in m.losses(batch()):
                    if loss is not STEP:
                        loss.backward()
                        continue
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                x = m.embed(batch().tokens)
                y, z = m.advance(x, *m.first(x), trm.Tape(m.rope(0, T, x)))
                (m._cross_entropy(y, batch().targets, "mean") / 2).backward()
                if kind == "step":
                    optimizer.step()
                    optimizer.zero_grad()
                x = m.embed(batch().tokens)
                y, z = m.advance(x, y.detach(), z.detach(), trm.Tape(m.rope(0, T, x)))
                (m._cross_entropy(y, batch().targets, "mean") / 2).backward()
            optimizer.step()
        weights[kind] = model.table.weight
        assert torch.equal(model.table.weight, by_hand.table.weight)
    assert not torch.equal(weights["sum"], weights["step"])


def test_decay_is_on_matrices_or_on_everything():
    for decay, wanted in (("matrices", [0.1, 0.0]), ("all", [0.1, 0.1])):
        groups = make(replace(RECIPE, decay=decay)).param_groups(Optim())
        assert [group.weight_decay for group in groups] == wanted


# ---------------------------------------------------------------- halting


def test_the_q_head_leaves_the_language_model_s_gradients_alone():
    off, q = make(SMALL, stir=0.1), make(replace(SMALL, halt="q"), stir=0.1)
    q.load_state_dict(off.state_dict(), strict=False)
    assert backward(off, batch()) == backward(q, batch()), "the log shows the losses alone"
    for name, parameter in off.named_parameters():
        assert torch.equal(q.get_parameter(name).grad, parameter.grad), name
    assert float(q.halting.head.bias.grad) != 0


def test_the_pooled_head_changes_no_logit():
    off, pooled = make(RECIPE, stir=0.1), make(replace(RECIPE, halt="pooled"), stir=0.1)
    pooled.load_state_dict(off.state_dict(), strict=False)
    assert torch.equal(pooled.eval()(ids())[0], off.eval()(ids())[0])


@pytest.mark.parametrize("halt", ["q", "kl"])
@torch.no_grad()
def test_halting_is_the_same_with_and_without_cache_and_off_at_zero(halt):
    """A position that stops keeps y; its last K/V stand in for later steps, in any split."""
    config = replace(SMALL, halt=halt, supervision_steps=3)
    model = make(config, stir=0.3).eval().double()
    tokens = ids(2)
    if halt == "q":
        model.halting.head.bias.zero_()
    exits = list(model.exit_logits(tokens))[:3]
    assert torch.equal(model(tokens)[0], exits[-1]), "tau 0 never stops"
    model.config = replace(config, halt_tau={"q": 0.5, "kl": 0.3}[halt])
    model.set_depth(3)
    whole, _ = model(tokens)
    share = model.log_scalars()["mean_exit"]
    assert 1.1 < share < 2.95, share
    parts, state = [], None
    for token in tokens.split(1, dim=1):
        logits, state = model(token, state)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-9)
    alone = torch.cat([model(row[None])[0] for row in tokens])
    assert torch.allclose(alone, whole, atol=1e-9)
    first = torch.stack([(whole - e)[:, 0].abs().amax(-1) for e in exits]).amin(0)
    assert first.max() < 1e-9, "the first position sees no other: it equals one of the exits"
    assert not torch.allclose(whole, exits[-1], atol=1e-3)
    model.config = replace(config, halt_tau=1e9)
    early = model(tokens)[0]
    assert torch.equal(early, exits[0 if halt == "q" else 1])


def test_a_tau_of_auto_becomes_the_largest_that_costs_a_thousandth():
    """Until then it is 0: an uncalibrated model would stop anywhere."""
    config = replace(SMALL, halt="kl", halt_tau="auto")
    model, off = make(config, stir=0.3).eval(), make(SMALL, stir=0.3).eval()
    assert torch.equal(model(ids())[0], off(ids())[0])
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}

    def bpb(slope: float) -> float:
        def of(asked: Any) -> float:
            assert torch.equal(asked.table.weight, weights["table.weight"]) and not asked.training
            return 2.0 + slope * asked.config.halt_tau

        return model.calibrated(weights, of)["halt_tau"]

    assert bpb(0.004) == pytest.approx(0.5, rel=0.01)  # 0.1 % of 2 bits is 0.002
    model.config = config
    assert bpb(1e6) == 0.0, "even the smallest costs too much"
    model.config = config
    with pytest.raises(UserError, match="lossless"):
        model.calibrated(weights, lambda asked: None)
    assert off.calibrated(weights, lambda asked: None) == {}


# ---------------------------------------------------------------- state and depth


@every_variant
@torch.no_grad()
def test_the_cache_is_exact_at_every_depth(config):
    """K/V belong to a call, not to a block: with any other key splits would disagree."""
    for depth in (None, 1, 3):
        model = make(config, stir=0.2).eval().double()
        if depth is not None:
            if config.variant == "plain":
                continue
            model.set_depth(depth)
        tokens = ids()
        whole, _ = model(tokens)
        for size in (1, 3, 7):
            parts, state = [], None
            for part in tokens.split(size, dim=1):
                logits, state = model(part, state)
                parts.append(logits)
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)
        assert state is not None
        exits = list(model.exit_logits(tokens))
        assert torch.equal(whole, exits[model.depth - 1])
        if depth is None:
            assert len(state.keys) == config.applications
            assert sum(t.numel() for t in (*state.keys, *state.values)) * 2 == (
                4 * config.applications * T * config.width * 2  # 4 A T d bytes a row in bf16
            )


@torch.no_grad()
def test_the_head_runs_on_the_marked_positions_alone(monkeypatch):
    """16,000 words on a width of 256: the head is a fifth of a token, and an answer has few ids."""
    model, seen, whole = make(SMALL, stir=0.3), [], trm.Model.logits
    monkeypatch.setattr(model, "logits", lambda y: seen.append(tuple(y.shape)) or whole(model, y))
    where = torch.zeros(2, T, dtype=torch.bool)
    where[:, -2:] = True
    model.logits_at(ids(), where)
    assert seen == [(4, SMALL.width)]


@torch.no_grad()
def test_a_state_is_of_one_depth():
    model = make(SMALL).eval()
    _, state = model(ids())
    model.set_depth(4)
    with pytest.raises(UserError, match="made at 2, used at 4"):
        model(ids(2, 1), state)
    assert model(ids())[1].depth == 4
    assert model.log_scalars() == {"depth": 4.0, "trained_depth": 2.0}
    with pytest.raises(UserError, match="this model thinks once"):
        make(PLAIN).set_depth(2)
    with pytest.raises(UserError, match="depth is 0"):
        model.set_depth(0)


@torch.no_grad()
def test_nothing_is_repeated_beyond_the_context():
    for config in (SMALL, RECIPE):
        model = make(config).eval()
        _, state = model(ids())
        with pytest.raises(UserError, match=f"{T + 1} positions, {T} fit"):
            model(ids(2, 1), state)
        with pytest.raises(UserError, match=f"{T + 1} positions"):
            list(model.exit_logits(ids(1, T + 1)))


def test_states_keep_their_size_over_many_recursions():
    """Without the norm at the end of f they grow: more depth would meet unseen scales."""
    sizes = {}
    for norm in (True, False):
        model = make(replace(SMALL, width=64, out_norm=norm, supervision_steps=6), stir=0.05)
        x = model.embed(ids())
        y, z = model.first(x)
        for _ in range(6):
            y, z = model.advance(x, y, z, trm.Tape(model.rope(0, T, x)))
        sizes[norm] = y.square().mean().sqrt().item()
    assert sizes[True] == pytest.approx(1, abs=0.01) and sizes[False] > 3, sizes


# ---------------------------------------------------------------- sizes, twins, accounts

GUIDE = Config(
    width=256, heads=4, depth=1, context=512, block="post_ln", join="concat", schedule="every",
    init="input", grad="last", latent_steps=2, deep_steps=2, supervision_steps=2,
)  # fmt: skip
BEST = Config()
VOCAB = 16_000


def sizes_of(config: Config) -> tuple[int, int]:
    """(parameters without tables, all of them)."""
    with torch.device("meta"):
        model = Model(config, VOCAB)
    total = sum(p.numel() for p in model.parameters())
    tables = sum(t.weight.numel() for t in (model.table, model.positions) if t is not None)
    return total - tables, total


def twins(config: Config) -> dict[str, Config]:
    return {
        "plain_params": replace(config, variant="plain", match="trm", equal="params"),
        "plain_flops": replace(config, variant="plain", match="trm"),
        "looped": replace(config, variant="looped", match="trm"),
    }


def test_sizes_are_those_of_the_page():
    assert sizes_of(GUIDE) == (1_117_952, 5_345_024)
    assert sizes_of(replace(BEST, depth=1))[0] == 802_816
    assert sizes_of(BEST)[0] == 1_605_632
    assert (GUIDE.applications, BEST.applications) == (16, 16)
    assert (GUIDE.gradients, BEST.gradients) == (8, 16)


def test_twins_are_as_large_or_as_costly_as_the_recursion():
    """Table 8.2, in millions of FLOPs a token; widths 1,664 and 1,344 make up for the joins."""
    wanted = {
        "trm_ja": (GUIDE, 118, 43), "trm_ja_best": (BEST, 139, 38),
        "plain_params": (twins(BEST)["plain_params"], 36, 12),
        "plain_flops": (twins(BEST)["plain_flops"], 114, 38),
        "looped": (twins(BEST)["looped"], 114, 38),
    }  # fmt: skip
    for name, (config, training, inference) in wanted.items():
        assert round(training_flops(config, 512, VOCAB) / 1e6) == training, name
        assert round(inference_flops(config, 512, VOCAB) / 1e6) == inference, name
    assert sizes_of(twins(BEST)["plain_params"])[0] == sizes_of(BEST)[0]
    assert sizes_of(twins(BEST)["plain_flops"])[0] == 12_845_056
    assert sizes_of(twins(BEST)["looped"])[0] == sizes_of(BEST)[0]
    guide = twins(GUIDE)
    assert [guide[n].inner for n in guide] == [1664, 1344, 1344]
    assert sizes_of(guide["plain_params"])[0] == pytest.approx(sizes_of(GUIDE)[0], rel=0.005)
    for name in ("plain_flops", "looped"):
        ours, its = (inference_flops(c, 512, VOCAB) for c in (guide[name], GUIDE))
        assert ours == pytest.approx(its, rel=0.005)


def test_twins_of_equal_flops_train_longer():
    for config, ratio in ((BEST, 1.215), (GUIDE, None)):
        for name, twin in twins(config).items():
            with torch.device("meta"):
                model = Model(twin, VOCAB)
            steps = model.matched_steps(6250, 512)
            theirs, ours = (training_flops(c, 512, VOCAB) for c in (config, twin))
            exact = 6250 if name == "plain_params" else round(6250 * theirs / ours)
            assert steps == exact
            if ratio and name != "plain_params":
                assert steps / 6250 == pytest.approx(ratio, abs=1e-3)
    with pytest.raises(UserError, match="steps is null"):
        make(LOOPED).matched_steps(None, T)
    assert make(SMALL).matched_steps(None, T) is None


@every_variant
def test_flops_are_those_that_run(config):
    """The page counts the causal half of attention, the counter (where it sees it) all of it."""
    model = make(replace(config, width=64, heads=2))
    c, one = model.config, batch()
    for training, wanted in ((False, inference_flops(c, T, V)), (True, training_flops(c, T, V))):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            if training:
                logits_losses(model, one)
            else:
                model.eval()(one.tokens)
        by_operator = counter.get_flop_counts()["Global"]
        matmuls = sum(n for op, n in by_operator.items() if "attention" not in str(op))
        passes = 1 + 2 * c.gradients / c.applications if training else 1
        attention = passes * c.applications * 2 * T * c.width
        tokens = one.tokens.numel()
        assert matmuls / tokens == pytest.approx(wanted - attention, rel=0.02)


def logits_losses(model: Model, one: Any) -> None:
    """The losses by ordinary logits: the counter does not see into the fused operator."""
    plain = torch.nn.functional.cross_entropy

    def cross_entropy(y: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return plain(model.logits(y).flatten(0, 1), targets.flatten())

    model._cross_entropy = cross_entropy  # type: ignore[method-assign]
    backward(model.train(), one)


# ---------------------------------------------------------------- bad input


REFUSED = [
    (Config, {"supervision_steps": 0}, "supervision_steps", "use 1 or more"),
    (Config, {"deep_steps": 0}, "deep_steps", "use 1 or more"),
    (Config, {"width": 64, "heads": 5}, "heads", "nearest: 4"),
    (Config, {"variant": "plain", "latent_steps": 2}, "latent_steps", "set null"),
    (Config, {"schedule": "every", "latent_steps": 0}, "latent_steps", "with schedule every"),
    (Config, {"latent_steps": 0}, "latent_steps", "use init input"),
    (Config, {"match": "trm"}, "match", "set null"),
    (Config, {"loops": 3}, "loops", "set null"),
    (Config, {"dropout": 1.0}, "dropout", "use 0 <= x < 1"),
    (Config, {"variant": "looped", "halt": "q"}, "halt", "use off"),
    (Config, {"halt_tau": -1.0}, "halt_tau", "or more, or auto"),
    (Config, {"halt_tau": "auto"}, "halt_tau", "set halt: q or kl"),
]


@pytest.mark.parametrize(("kind", "given", "key", "remedy"), REFUSED)
def test_contradictions_are_refused_with_a_way_out(kind, given, key, remedy):
    with pytest.raises(Refused) as error:
        kind(**given)
    assert any(key == k and remedy in r for k, _, r in error.value.problems)


def test_weights_of_another_network_are_refused_with_both_values():
    """last and every have equal shapes: only the keys tell them apart."""
    model = make(SMALL)
    with pytest.raises(UserError, match="schedule every, here last"):
        model.take_weights(replace(SMALL, schedule="every"), lambda shapes: {})
    own = model.state_dict()
    model.take_weights(replace(SMALL, supervision_steps=5, dropout=0.3), lambda shapes: own)
