"""GPT: published counts, the reference's logits, every switch alone, state, overfitting."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.core.errors import UserError
from lib.core.refusal import Refused
from lib.models import _gpt_block, gpt
from lib.models._gpt_sizes import reference_params, scaling_params
from lib.models._gpt_training import batch_factor
from lib.models.base import Optim, build
from lib.models.gpt import Config, Model
from lib.train.optim import Optimizer
from lib.train.schedule import auto_batch, horizon, make_schedule
from tests import golden

V = 97  # not a multiple of 64
TINY = {"depth": 3, "width": 32, "heads": 2, "context": 20}
SWITCHES = {
    "rope_theta": {"rope_theta": 100_000.0},
    "qk_scale": {"qk_scale": 1.2},
    "softcap": {"softcap": 0.0},
    "windows": {"windows": "SL", "context": 140},
    "resid_mix": {"resid_mix": True},
    "smear": {"smear": True},
    "value_embedding": {"value_embedding": True},
    "backout": {"backout": True},
    "bigram": {"bigram": 31},
    "vocab_pad": {"vocab_pad": 64},
    "init": {"init": "modern"},
    "optim": {"optim": "modern"},
    "loss_chunk": {"loss_chunk": 7},
    "embedding_dtype": {"embedding_dtype": "bfloat16"},
}
CASES = {
    "base": {},
    "modern": {"variant": "modern"},
    **SWITCHES,
    "grouped": {"kv_heads": 1},
    "modern_grouped": {"variant": "modern", "kv_heads": 1},
    "one_layer": {"variant": "modern", "depth": 1},
}
every_case = pytest.mark.parametrize("case", CASES)


def config_of(case: str, **more) -> Config:
    return Config(**(TINY | CASES[case] | more))


def make(config: Config, seed: int = 1, stirred: bool = True) -> Model:
    """A model whose zero weights are not zero, or nothing could be seen to flow through them."""
    model = build(gpt, config, V, seed=seed)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if stirred:
                p.add_(torch.randn(p.shape, generator=draw) * (0.3 / max(1, p.ndim)))
    assert isinstance(model, Model)
    return model


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(rows: int, length: int) -> SimpleNamespace:
    tokens = ids(rows, length + 1)
    return SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:], step=0)


def meta(config: Config, vocab_size: int) -> Model:
    with torch.device("meta"):
        return Model(config, vocab_size)


# ---------------------------------------------------------------- published numbers


def test_published_sizes_and_flops_are_exact_without_allocating():
    for config, vocab, params, flops in (
        (Config(), 65_536, 560_988_160, 3_491_758_080),
        (Config(variant="modern", depth=12), 32_768, 286_261_730, 759_696_048),
        (Config(variant="modern", depth=20), 32_768, 896_533_746, 2_886_212_784),
    ):
        model = meta(config, vocab)
        assert sum(p.numel() for p in model.parameters()) == params
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        assert model.flops_per_token(2_048) == flops
    tables = meta(Config(variant="modern", depth=12), 32_768).value_tables.parameters()
    assert sum(p.numel() for p in tables) == 150_994_944


@every_case
def test_scaling_parameters_are_those_of_the_module(case):
    """The formula stands for depth 12 without building it; it must not drift from the model."""
    model = meta(config_of(case), 1_000)
    counted = [
        p.numel()
        for name, p in model.named_parameters()
        if model.switches.optim == "base" or name.startswith(("blocks.", "head."))
    ]
    assert model.scaling_params() == sum(counted)


def test_base_d20_takes_21400_steps():
    model = meta(Config(), 65_536)
    steps = horizon(
        batch_tokens=2**19,
        params=model.scaling_params(),
        flops_per_token=model.flops_per_token(2_048),
        param_data_ratio=model.defaults().param_data_ratio,
    )
    assert (steps, steps * 2**19) == (21_400, 11_219_763_200)


def test_modern_batch_and_decay_have_the_values_of_their_table():
    """V = 32,768, ratio 12; no clip acts from depth 8 on, and both act for toys."""
    log2 = {2: 17, 4: 18, 6: 18, 8: 18, 10: 19, 12: 19, 16: 19, 18: 20, 22: 20, 26: 20, 32: 21}
    for depth, want in log2.items():
        config = Config(variant="modern", depth=depth)
        P, P_ref = (f(config, 32_768) for f in (scaling_params, reference_params))
        assert auto_batch(12 * P, 12 * P_ref, 2_048) == 2**want, depth
    for depth, want in {8: 0.520, 12: 0.280, 20: 0.100, 24: 0.060, 2: 0.6}.items():
        model = meta(Config(variant="modern", depth=depth), 32_768)
        tokens = 12 * model.scaling_params()
        size = auto_batch(tokens, 12 * model.reference_params(), 2_048)
        groups = model.param_groups(Optim(batch_tokens=size, steps=int(tokens // size)))
        decay = next(g.weight_decay for g in groups if g.name == "matrices")
        assert decay == pytest.approx(want, abs=5e-4), depth
    assert [batch_factor(b) for b in (512, 2**17, 2**19, 2**21, 2**30)] == [0.25, 0.5, 1, 2, 2]


def test_decoding_costs():
    model = meta(Config(variant="modern", depth=4), 32_768)
    assert model.decode_flops(8_000) - model.decode_flops(2_047) == 4 * 256 * (8_000 - 2_047)
    assert model.kv_bytes_per_token(2) == 2 * 4 * 256 * 2


# ---------------------------------------------------------------- reference results


def golden_model(case: dict) -> Model:
    c = case["config"]
    config = Config(
        depth=c["n_layer"], width=c["n_embd"], heads=c["n_head"], kv_heads=c["n_kv_head"],
        context=c["sequence_len"],
    )  # fmt: skip
    model = build(gpt, config, c["vocab_size"], seed=0)
    order = ["wte.weight"]
    for i in range(c["n_layer"]):
        order += [f"blocks.{i}.attn.{n}.weight" for n in "qkvo"]
        order += [f"blocks.{i}.{n}.weight" for n in ("up", "down")]
    weights = {
        name: golden.array(p["k"], p["shape"], p["scale"])
        for name, p in zip([*order, "head.weight"], case["parameters"], strict=True)
    }
    model.load_state_dict(weights)
    assert isinstance(model, Model)
    return model


@pytest.mark.parametrize("index", [0, 1])
def test_base_equals_the_published_model(shared, monkeypatch, index):
    """Logits, losses, gradients, greedy ids; the reference kept its RoPE tables in bf16, always."""
    exact = gpt.rope_tables
    monkeypatch.setattr(
        gpt, "rope_tables", lambda *a: tuple(t.bfloat16().to(t.dtype) for t in exact(*a))
    )
    case = golden.read(shared, "gpt_seed.json")["cases"][index]
    model = golden_model(case)
    tokens, targets = torch.tensor(case["ids"]), torch.tensor(case["targets"])
    with np.load(shared / "golden" / "gpt_seed_logits.npz") as arrays:
        want = torch.from_numpy(arrays[case["logits_key"]])
        want64 = torch.from_numpy(arrays[case["logits_fp64_key"]])
    with torch.no_grad():
        assert (model(tokens)[0] - want).abs().max() < 5e-5
        assert (model.double()(tokens)[0] - want64).abs().max() < 1e-9
    model.float()
    each = model.token_losses(tokens, targets)
    assert torch.allclose(each, torch.tensor(case["loss_per_token"]), rtol=1e-5, atol=1e-5)
    loss = next(iter(model.losses(SimpleNamespace(tokens=tokens, targets=targets, step=0))))
    assert loss.item() == pytest.approx(case["loss_mean"], rel=1e-5)
    loss.backward()
    names = dict(model.named_parameters())
    ordered = [names["wte.weight"], *(p for n, p in names.items() if n.startswith("blocks"))]
    for p, norm in zip([*ordered, names["head.weight"]], case["grad_norm"], strict=True):
        assert p.grad is not None
        assert p.grad.norm().item() == pytest.approx(norm, rel=1e-5)
    assert greedy(model, case["prompt"], 20, cached=True) == case["greedy_20"]
    assert greedy(model, case["prompt"], 20, cached=False) == case["greedy_20"]


@torch.no_grad()
def greedy(model: Model, prompt: list[int], n: int, cached: bool) -> list[int]:
    row, state, out = torch.tensor([prompt]), None, []
    for _ in range(n):
        logits, state = model(row, state if cached else None)
        out.append(int(logits[0, -1].argmax()))
        new = torch.tensor([[out[-1]]])
        row = new if cached else torch.cat((row, new), dim=1)
    return out


def test_base_equals_transformers_nanochat():
    """The published class of the same architecture, weights mapped by name: 0 to 1e-6 apart."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = make(config_of("grouped", width=48, heads=4, kv_heads=2))
    d, H, K = model.config.shape
    their_config = transformers.NanoChatConfig(
        vocab_size=V, hidden_size=d, intermediate_size=4 * d, num_hidden_layers=3,
        num_attention_heads=H, num_key_value_heads=K, max_position_embeddings=20,
        rms_norm_eps=1.1920929e-07, final_logit_softcapping=15.0, attention_bias=False,
        tie_word_embeddings=False, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    their = transformers.NanoChatForCausalLM(their_config)
    own = model.state_dict()
    names = {"lm_head.weight": own["head.weight"], "model.embed_tokens.weight": own["wte.weight"]}
    for i in range(3):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for n in "qkvo":
            names[f"{theirs}.self_attn.{n}_proj.weight"] = own[f"{ours}.attn.{n}.weight"]
        names[f"{theirs}.mlp.fc1.weight"] = own[f"{ours}.up.weight"]
        names[f"{theirs}.mlp.fc2.weight"] = own[f"{ours}.down.weight"]
    their.load_state_dict(names)
    tokens = ids(2, 20)
    with torch.no_grad():
        gap = (their(tokens).logits - model(tokens)[0]).abs().max()
    assert gap < 1e-6


def restated(model: Model, row: Tensor) -> Tensor:
    """The switches' formulas once more, one position and head at a time: (T,) ids, fp64 logits."""
    c, s, w = model.config, model.switches, model.double().state_dict()
    (d, H, K), L, T = c.shape, c.depth, len(row)
    D = d // H

    def N(x: Tensor) -> Tensor:
        return x / (x.square().mean() + 2**-23).sqrt()

    def turned(x: Tensor, t: int) -> Tensor:
        angle = t * s.rope_theta ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
        z = torch.complex(x[: D // 2], x[D // 2 :]) * torch.exp(-1j * angle)
        return s.qk_scale * N(torch.cat((z.real, z.imag)))

    e = [N(w["wte.weight"][i]) for i in row]
    x0 = list(e)
    for t in range(1, T if s.smear else 1):
        gate = torch.sigmoid(w["smear.weight"][0] @ e[t][:24])
        x0[t] = e[t] + w["smear_scale"] * gate * e[t - 1]
    for t in range(T if s.bigram else 0):
        pair = (int(row[t - 1]) * 2_654_435_761) ^ (int(row[t]) * 805_459_861)
        x0[t] = x0[t] + w["pairs.weight"][1 + pair % (s.bigram - 1) if t else 0]
    x, middle = list(x0), []
    for i in range(L):
        if s.resid_mix:
            x = [w["resid"][i] * a + w["skip"][i] * b for a, b in zip(x, x0, strict=True)]
        mats = [w[f"blocks.{i}.attn.{n}.weight"] for n in "qkv"]
        heads = [[(m @ N(a)).view(-1, D) for a in x] for m in mats]  # q, k, v by position
        reach = 128 * -(-c.context // 512) if (s.windows * L)[i] == "S" and i < L - 1 else T
        if f"value_tables.{i}.weight" in w:
            for t in range(T):
                gates = 3 * torch.sigmoid(w[f"blocks.{i}.attn.gate.weight"] @ N(x[t])[:12])
                table = w[f"value_tables.{i}.weight"][row[t]].view(K, D)
                heads[2][t] = heads[2][t] + gates[:, None] * table
        out = []
        for t in range(T):
            joined = []
            for h in range(H):
                j = h * K // H
                seen = range(max(0, t - reach), t + 1)
                q = turned(heads[0][t][h], t)
                p = torch.stack([q @ turned(heads[1][u][j], u) for u in seen]) / math.sqrt(D)
                joined.append(p.softmax(0) @ torch.stack([heads[2][u][j] for u in seen]))
            out.append(x[t] + w[f"blocks.{i}.attn.o.weight"] @ torch.cat(joined))
        up, down = (w[f"blocks.{i}.{n}.weight"] for n in ("up", "down"))
        x = [a + down @ (up @ N(a)).relu() ** 2 for a in out]
        middle = x if i == L // 2 else middle
    if s.backout:
        x = [a - w["backout"] * b for a, b in zip(x, middle, strict=True)]
    z = torch.stack([w["head.weight"][:V] @ N(a) for a in x])
    return s.softcap * torch.tanh(z / s.softcap) if s.softcap else z


@pytest.mark.parametrize("case", ["modern", "modern_grouped", "one_layer", *SWITCHES])
def test_every_switch_follows_its_formula(case):
    """Against a restatement position by position; 133 ids see a window of 128 end."""
    windows = case == "windows"
    sizes = {"width": 8, "depth": 2} if windows else {}
    model = make(config_of(case, embedding_dtype="float32", **sizes))
    tokens = ids(1, 133 if windows else 9)
    want = restated(model, tokens[0])
    with torch.no_grad():
        assert (model(tokens)[0][0] - want).abs().max() < 1e-10


# ---------------------------------------------------------------- every switch alone


@every_case
def test_shapes_causality_and_one_id(case):
    model = make(config_of(case))
    T = model.config.context
    tokens = ids(2, T)
    with torch.no_grad():
        logits, _ = model(tokens)
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % V
        after, _ = model(changed)
        single, _ = model(tokens[:1, :1])
    assert logits.shape == (2, T, V)
    assert logits.dtype == torch.float32
    assert torch.equal(after[:, :-1], logits[:, :-1])
    assert not torch.equal(after[:, -1], logits[:, -1])
    assert torch.allclose(single, logits[:1, :1], atol=1e-5)


@every_case
@pytest.mark.parametrize("size", [1, 2, 7, -1])
def test_any_split_gives_the_full_logits(case, size):
    model = make(config_of(case))
    T = model.config.context
    tokens, size = ids(2, T), size if size > 0 else T - 1
    with torch.no_grad():
        whole, _ = model(tokens)
        parts, state = [], None
        for part in tokens.split(size, dim=1):
            logits, state = model(part, state)
            parts.append(logits)
    gap = (torch.cat(parts, dim=1) - whole).abs().max()
    assert gap < (1e-5 if case != "embedding_dtype" else 1e-4)


@every_case
def test_gradient_reaches_every_parameter(case):
    model = make(config_of(case))
    sum(model.losses(batch(2, model.config.context))).backward()  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        if case == "one_layer" and name == "backout":
            # It scales the whole stream, which the last norm undoes: 0 but for rounding.
            assert p.grad is not None and p.grad.abs().max() < 1e-6
            continue
        assert p.grad is not None and p.grad.abs().max() > 0, name


NEUTRAL = {
    "bigram": {"pairs.weight": 0.0},
    "smear": {"smear_scale": 0.0},
    "backout": {"backout": 0.0},
    "resid_mix": {"resid": 1.0, "skip": 0.0},
    "value_embedding": {"value_tables.0.weight": 0.0, "value_tables.2.weight": 0.0},
}


@pytest.mark.parametrize("switch", [*NEUTRAL, "qk_scale"])
def test_a_neutral_switch_is_off(switch):
    """At its neutral value a switch gives base's logits bit for bit."""
    base = make(config_of("base"))
    config = config_of(switch) if switch != "qk_scale" else config_of("base", qk_scale=1.0)
    model = make(config)
    own = base.state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in NEUTRAL.get(switch, {}):
                p.fill_(NEUTRAL[switch][name])
            elif name in own:
                p.copy_(own[name])
        tokens = ids(2, 20)
        assert torch.equal(model(tokens)[0], base(tokens)[0])


def test_a_new_switch_changes_no_other_tensor():
    """Draws follow the name: an ablation differs by its switch, not by its first weights too."""
    base, modern = (
        build(gpt, config_of(c, init="base", vocab_pad=1), V, seed=5) for c in ("base", "modern")
    )
    own = modern.state_dict()
    assert len(own) > len(base.state_dict())
    pairs = build(gpt, config_of("bigram"), V, seed=5).state_dict()
    assert not pairs["pairs.weight"].any(), "as if it were off"
    for name, value in base.state_dict().items():
        assert torch.equal(value, own[name]), name


def test_reach_grows_by_quarters_and_then_hides_nothing():
    config = config_of("base", context=10, window_warmup=8)
    assert [config.reach(step) for step in range(10)] == [3, 3, 6, 6, 9, 9, 12, 12, None, None]
    assert config_of("base").reach(0) is None


@pytest.mark.parametrize("case", ["base", "windows", "modern_grouped"])
def test_window_warmup_hides_what_is_far_in_training_alone(case):
    """One layer, changed first id: the loss of positions beyond the reach may not move."""
    model = make(config_of(case, depth=1, context=20, smear=False, window_warmup=4))
    tokens, targets = ids(2, 20), ids(2, 20, seed=3)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    by_step = lambda x, step: model._cross_entropy(  # noqa: E731
        x, targets, "none", model.config.reach(step)
    )
    with torch.no_grad():
        for step, reach in enumerate((5, 10, 15, 20)):
            gap = (by_step(tokens, step) - by_step(changed, step)).abs()
            assert (gap[:, : reach + 1] > 0).all() and (gap[:, reach + 1 :] == 0).all()
        one = batch(2, 20)
        losses = []
        for one.step in (0, 3, 4):
            losses.append(next(iter(model.losses(one))))
        whole = model.token_losses(one.tokens, one.targets).mean()
    assert losses[0] != losses[1]
    assert torch.allclose(losses[1], losses[2]) and torch.allclose(losses[2], whole)


def test_reach_and_a_layers_window_both_hold(monkeypatch):
    """The narrower one: a growing reach may not widen a short layer, nor a window spare a full."""
    model = make(config_of("base", windows="SL", context=200, depth=2, window_warmup=4))
    seen, attend = [], _gpt_block.causal_attention
    monkeypatch.setattr(
        _gpt_block, "causal_attention",
        lambda *qkv, window, **rest: seen.append(window) or attend(*qkv, window=window, **rest),
    )  # fmt: skip
    one = batch(1, 200)
    for one.step in range(5):
        next(iter(model.losses(one)))
    assert seen == [50, 50, 100, 100, 128, 150, 128, 200, 128, None]


def test_windows_hide_what_is_out_of_reach():
    """128 ceil(T / 512) keys before its own: 129 back is invisible in one layer of window 128."""
    config = config_of("base", windows="SL", context=200, depth=2)
    assert config.layer_windows() == [128, None]
    model = make(config)
    model.blocks[1].attn.window = 128  # type: ignore[union-attr]  # both layers short
    tokens, n = ids(1, 400), 400
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    with torch.no_grad():
        gap = (model(tokens)[0] - model(changed)[0]).abs().amax(dim=(0, 2))
    assert gap[256] > 0
    assert torch.equal(gap[257:], torch.zeros(n - 257))


# ---------------------------------------------------------------- weights


def test_initial_values_follow_their_table():
    base, modern = (build(gpt, config_of(c, width=64), V, seed=3) for c in ("base", "modern"))
    b, m = base.state_dict(), modern.state_dict()
    for state, names in (
        (b, ("head", "blocks.0.attn.o", "blocks.0.down")),
        (m, ("blocks.0.attn.o",)),
    ):
        assert all(state[f"{n}.weight"].abs().max() == 0 for n in names)
    assert b["wte.weight"].std() == pytest.approx(1.0, rel=0.05)
    assert b["blocks.1.up.weight"].std() == pytest.approx(64**-0.5, rel=0.05)
    assert m["wte.weight"].std() == pytest.approx(0.8, rel=0.05)
    assert m["head.weight"].std() == pytest.approx(0.001, rel=0.05)
    a = math.sqrt(3 / 64)
    for name, high in (("blocks.0.attn.q", a), ("blocks.0.up", 0.4 * a), ("value_tables.2", a)):
        assert 0.95 * high < m[f"{name}.weight"].max() <= high
        assert -high <= m[f"{name}.weight"].min() < -0.95 * high
    assert m["blocks.0.attn.gate.weight"].min() >= 0
    assert m["resid"].tolist() == pytest.approx([1.15, 1.10, 1.05])
    assert m["skip"].tolist() == pytest.approx([0.20, 0.125, 0.05])
    assert (m["smear_scale"].item(), m["backout"].item()) == pytest.approx((0.0, 0.2))


def test_first_loss_is_ln_v():
    losses = {c: next(iter(make(config_of(c), stirred=False).losses(batch(4, 20)))) for c in CASES}
    assert losses["base"].item() == pytest.approx(math.log(V), abs=1e-6)
    for case, loss in losses.items():
        assert loss.item() == pytest.approx(math.log(V), rel=0.01), case


@pytest.mark.parametrize("case", ["base", "modern"])
def test_overfits_one_batch_of_4_by_64(case):
    """With the era's own optimizer and schedule, 60 steps bring 4 x 64 random ids below 0.05."""
    model = build(gpt, config_of(case, context=64, width=64, heads=2), V, seed=1)
    assert isinstance(model, Model)
    steps = 60
    groups = model.param_groups(Optim(batch_tokens=256, steps=steps))
    schedule, optimizer = make_schedule(model.defaults().schedule, steps), Optimizer(groups)
    one = batch(4, 64)
    for step in range(steps):
        for loss in model.losses(one):
            loss.backward()
        optimizer.step(schedule.at(step))
        optimizer.zero_grad()
    assert next(iter(model.losses(one))).item() < 0.05


@every_case
def test_groups_cover_each_parameter_once(case):
    model = make(config_of(case))
    names = [n for g in model.param_groups(Optim()) for n in g.params]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_groups_have_the_rates_of_their_table():
    rows = {
        g.name: (g.lr, g.betas, g.weight_decay)
        for g in meta(Config(variant="modern", depth=12), 32_768).param_groups(Optim(steps=2_520))
    }
    assert rows["head"] == (pytest.approx(0.008), (0.8, 0.96), 0.01)
    assert rows["wte"] == (pytest.approx(0.3), (0.8, 0.995), 0.001)
    assert rows["value_tables"] == (pytest.approx(0.15), (0.8, 0.995), 0.01)
    assert rows["matrices"] == (0.02, (0.0, 0.9), pytest.approx(0.28, abs=1e-3))
    base = meta(Config(depth=12), 32_768).param_groups(Optim())
    assert [(g.name, g.lr) for g in base] == [
        ("head", pytest.approx(0.004)), ("wte", pytest.approx(0.2)), ("matrices", 0.02),
    ]  # fmt: skip
    assert all(g.weight_decay == 0 for g in base)


# ---------------------------------------------------------------- precision, memory, errors


def test_bf16_chunks_and_recomputation_agree_with_plain_fp32():
    one, losses = batch(2, 20), {}
    for chunk in ("auto", 3):
        model = make(config_of("modern", loss_chunk=chunk))
        for recompute in (False, True):
            model.activation_checkpointing = recompute
            loss = next(iter(model.losses(one)))
            (grad,) = torch.autograd.grad(loss, [model.blocks[0].up.weight])  # type: ignore
            losses[chunk, recompute] = (loss.item(), grad.norm().item())
        with torch.autocast("cpu", torch.bfloat16):
            half = next(iter(model.losses(one))).item()
        assert half == pytest.approx(losses[chunk, False][0], abs=1e-2 * losses[chunk, False][0])
    for value in losses.values():
        assert value == pytest.approx(losses["auto", False], rel=1e-5)


def test_compiled_in_one_graph_gives_the_same_losses():
    """Whatever the trainer compiles must trace without a break, windows and all."""
    model = make(config_of("modern", depth=2, context=140))
    one = batch(2, 140)
    plain = next(iter(model.losses(one))).item()
    for name in model.compiled:
        compiled = torch.compile(getattr(model, name), fullgraph=True, backend="aot_eager")
        setattr(model, name, compiled)
    assert next(iter(model.losses(one))).item() == pytest.approx(plain, rel=1e-5)


def test_a_growing_reach_compiles_too():
    """Four lengths of the window and then none: each traces in one graph."""
    model = make(config_of("base", depth=2, window_warmup=4))
    plain = make(config_of("base", depth=2, window_warmup=4))
    for name in model.compiled:
        compiled = torch.compile(getattr(model, name), fullgraph=True, backend="aot_eager")
        setattr(model, name, compiled)
    one = batch(2, 20)
    for one.step in range(5):
        want, found = (next(iter(m.losses(one))).item() for m in (plain, model))
        assert found == pytest.approx(want, rel=1e-5)


def test_bf16_stream_works_with_bf16_tables():
    model = make(config_of("modern", embedding_dtype="bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = next(iter(model.losses(batch(2, 20))))
    loss.backward()
    assert model.wte.weight.grad is not None
    assert model.wte.weight.grad.dtype == torch.bfloat16
    assert torch.isfinite(loss)


def test_repeated_state_continues_as_the_row_it_came_from():
    model = make(config_of("modern"))
    tokens = ids(2, 12)
    with torch.no_grad():
        _, state = model(tokens[:1, :7])
        many, _ = model(tokens[:, 7:], model.repeat_state(state, 2))
        first, _ = model(tokens[:1, 7:], state)
    assert torch.allclose(many[:1], first, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"depth": 5}, "nearest: 4, 6, 7"),
        ({"depth": 13}, "nearest: 12, 14, 15"),
        ({"depth": 4, "kv_heads": 3}, "divide 2 heads: 1, 2"),
        ({"width": 60, "heads": 4}, "even width"),
        ({"width": 64}, "both width and heads"),
        ({"windows": "SXL"}, "not X"),
        ({"context": 1}, "context: 1"),
        ({"bigram": 1}, "0 for off, or 2"),
        ({"window_warmup": -1}, "window_warmup: -1"),
        ({"embedding_dtype": "float16"}, "unscale float16"),
        ({"depth": 0}, "depth: 0"),
        ({"softcap": -1.0}, "softcap: -1.0"),
    ],
)
def test_contradictions_are_refused_with_a_remedy(bad, says):
    with pytest.raises(Refused, match=says):
        Config(**bad)


def test_another_variant_is_named_switch_by_switch():
    """qk_scale and rope_theta have no tensor: equal shapes are no proof."""
    model = make(config_of("base"))
    with pytest.raises(UserError, match=r"qk_scale 1\.2, here 1\.0") as caught:
        model.take_weights(config_of("modern"), lambda shapes: {})
    assert "windows SSSL, here L" in str(caught.value) and "depth" not in str(caught.value)
    its, source = (
        config_of("base", rope_theta=10_000.0, context=40),
        make(config_of("base"), seed=2),
    )
    model.take_weights(its, lambda shapes: source.state_dict())  # said in other words; more context
    assert torch.equal(model(ids(1, 9))[0], source(ids(1, 9))[0])


def test_what_a_device_cannot_do_is_refused():
    with pytest.raises(UserError, match="fp8 needs a GPU"):
        build(gpt, config_of("base", fp8=True), V, seed=0)
    model = make(config_of("base"))
    for engine in ("flash", "flex", "fast"):
        model.attention = engine
        with pytest.raises(UserError, match="attention engine"):
            model.place("cpu", torch.float32)


def test_the_engine_in_use_is_told():
    model = build(gpt, config_of("windows"), V, seed=0)
    assert model.notes() == ["attention: blocks in 1 layers of window 128, sdpa in 2 full layers"]
