"""AdamW and Muon for every family, behind one object: step, state as plain tensors, load.

In:  groups of parameters (lib.models.base.Group) whose gradients are there.   Out: updated
     parameters.
Names: state is `<parameter>.<kind>`, whatever was stacked, batched or sharded for the update.
Law:  sharding changes no bit; a step depends on (parameters, gradients, state, multipliers) alone.
Note: matrices of one shape and rule are stacked, and updated by one batched sequence of products.
      Muon rules, in the order given here: `muon` is Newton-Schulz of October 2025, `normuon` adds
      row equilibration (2603.28254), Polar Express (2505.16932), norm control (2602.21545),
      variance normalisation (2510.05491) and cautious decay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lib.core.errors import InputError, UserError
from lib.kernels.xxt import xxt
from lib.models.base import Family, Group
from lib.train.eight_bit import EightBitAdamW
from lib.train.rounding import Rounding
from lib.train.schedule import Multipliers

# Quintic x -> a x + b x^3 + c x^5 on singular values; they end in [0.67, 1.21], by design.
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [  # arXiv 2505.16932, five steps, a different polynomial each
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


Update = tuple[Sequence[str], Callable[[], None]]  # names of parameters, and what changes them
Member = tuple[str, nn.Parameter, Tensor]  # name, parameter, its gradient

# -------------------------------------------------------------- mathematics of stacks (s, out, in)


def orthogonalise(X: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T for each (a, b, c); X (s, out, in), norm at most 1.

    Works on the short side: A is (short, short) and symmetric, and so is b A + c A^2.
    """
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    for a, b, c in steps:
        A = xxt(X)
        B = xxt(A, alpha=c, beta=b, A=A)  # c A A^T + b A
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


def frobenius(X: Tensor) -> Tensor:
    """(s, 1, 1) norms in fp32 or better."""
    wide = X if X.dtype == torch.float64 else X.float()
    return wide.square().sum((-2, -1), keepdim=True).sqrt()


def nesterov(momentum: Tensor, grad: Tensor, mu: float) -> Tensor:
    """momentum <- mu momentum + (1 - mu) grad; returns (1 - mu) grad + mu momentum."""
    momentum.lerp_(grad, 1 - mu)
    return grad.lerp(momentum, mu)


def muon_direction(u: Tensor, dtype: torch.dtype) -> Tensor:
    """October 2025: u / (||u|| + 1e-7), then five Newton-Schulz steps in dtype."""
    X = u.to(dtype)
    return orthogonalise(X / (frobenius(X) + 1e-7).to(dtype), NEWTON_SCHULZ)


def normuon_direction(u: Tensor, second_moment: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """July 2026: steps after the momentum; second_moment (s, out, 1) or (s, 1, in) is updated."""
    X = u.to(dtype)
    rows, columns = X.shape[-2:]
    wide = torch.promote_types(dtype, torch.float32)
    row_norms = X.to(wide).norm(dim=-1, keepdim=True).clamp(min=1e-6)
    X = X * (frobenius(X) / rows**0.5 / row_norms).to(dtype)
    X = orthogonalise(X / (1.01 * frobenius(X) + 1e-6).to(dtype), POLAR_EXPRESS).to(wide)
    X = X * (min(rows, columns) ** 0.5 / frobenius(X).clamp(min=1e-6))
    axis = -1 if rows >= columns else -2  # one value per row of tall matrices, per column of wide
    second_moment.lerp_(X.square().mean(axis, keepdim=True).to(second_moment.dtype), 1 - beta)
    even = X * second_moment.clamp(min=1e-10).rsqrt().to(wide)
    return even * (frobenius(X) / frobenius(even).clamp(min=1e-10))


def cautious_decay(update: Tensor, weights: Tensor, decay: float) -> Tensor:
    """update + decay W where the update moves the weight towards 0 (same sign), else update."""
    return update + decay * weights * (update * weights >= 0)


# ---------------------------------------------------------------- one object for the trainer


class Optimizer:
    """Every parameter of `groups` under its rule; without a gradient it stays as it is.

    shard: matrices of Muon are dealt to ranks, largest first; an owner keeps their state and
    updates them, then all ranks receive the result. `step` and `state_tensors` are then collective
    calls. parts: names of parameters that AdamW updates by one call each, in this order; `run`
    makes the updates, now or beside other work (they hold their gradients). rounding: what AdamW
    keeps in bf16. gathers: AdamW may pass steps over, whose gradients it then adds up.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        shard: bool = False,
        parts: Sequence[Sequence[str]] = (),
        run: Callable[[Sequence[Update]], None] | None = None,
        rounding: Rounding | None = None,
        gathers: bool = False,
    ) -> None:
        """UserError where a rule cannot keep its weights in bf16."""
        self.groups, self._run = list(groups), run or _run_in_order
        names = [name for group in self.groups for name in group.params]
        assert len(names) == len(set(names)), "a parameter stands in two groups"
        plain = [group for group in self.groups if group.rule == "adamw"]
        coded = [group for group in self.groups if group.rule == "adamw8bit"]
        muon = [group for group in self.groups if group.rule in ("muon", "normuon")]
        ranks = dist.get_world_size() if shard and dist.is_initialized() else 1
        self._rank = dist.get_rank() if ranks > 1 else 0
        self._owners = deal(muon, ranks)
        rounding = rounding or Rounding(0)
        _refuse_narrow(muon, rounding.weights)
        self._plain = _AdamW(plain, parts, rounding)
        self._gathered = _Gathered(plain if gathers else ())
        self._coded = EightBitAdamW(coded, bool(rounding.weights)) if coded else None
        rules = (self._plain, self._gathered, self._coded)
        self._adamw = [rule for rule in rules if rule is not None]
        self._stacks = [s for group in muon for s in _stacks(group, self._owners, self._rank)]
        self._matrices = {n: p for group in muon for n, p in group.params.items()}

    @torch.no_grad()
    def step(self, multipliers: Multipliers) -> None:
        """One update from the gradients that are there."""
        if self._gathered.released(multipliers.adamw):
            self._run(self._plain.updates(multipliers))
        if self._coded is not None:
            self._coded.step(multipliers)
            names = [name for group in self._coded.groups for name in group.params]
            self._run([(names, lambda: None)])  # whoever keeps copies learns that they changed
        for stack in self._stacks:
            stack.step(multipliers)
        self._share(self._matrices)

    def rate(self, multipliers: Multipliers) -> float:
        """The learning rate that stands in the log: the first group's."""
        return self.groups[0].lr * multipliers.lr

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.groups:
            for parameter in group.params.values():
                parameter.grad = None

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """All state by name, sorted: exp_avg, exp_avg_sq, step; momentum, second_moment. Views."""
        state = {n: t for rule in self._adamw for n, t in rule.state_tensors().items()}
        for stack in self._stacks:
            state.update(stack.state_tensors())
        if len(set(self._owners.values())) > 1:
            for group in self.groups:
                missing = _empty_state(group) if group.rule in ("muon", "normuon") else {}
                state = missing | state
            self._share({n: t for n, t in state.items() if _parameter(n) in self._owners})
        return dict(sorted(state.items()))

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`, under any sharding. InputError if it does not fit."""
        own = {n: t for rule in self._adamw for n, t in rule.state_tensors().items()}
        for stack in self._stacks:
            own.update(stack.state_tensors())
        wanted = set(own)
        for group in self.groups:
            wanted |= (
                set(_empty_state(group, meta=True)) if group.rule in ("muon", "normuon") else set()
            )
        for name in sorted(wanted ^ set(tensors)):
            _misfit(name, "missing" if name in wanted else "surplus")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                _misfit(name, f"{tuple(tensors[name].shape)} for {tuple(tensor.shape)}")
            tensor.copy_(tensors[name])

    def _share(self, tensors: Mapping[str, Tensor]) -> None:
        """Each tensor from the rank that owns its parameter to all others."""
        if len(set(self._owners.values())) < 2:
            return
        for name in sorted(tensors):
            dist.broadcast(tensors[name], src=self._owners[_parameter(name)])


def build_optimizer(
    groups: Sequence[Group], *, shard: bool = False, model: Family | None = None,
    rounding: Rounding | None = None, gathers: bool = False,
) -> Optimizer:  # fmt: skip
    """The optimizer of a model's `param_groups`; `model` may say in which parts, and when."""
    if model is None:
        return Optimizer(groups, shard=shard, rounding=rounding, gathers=gathers)
    return Optimizer(
        groups, shard=shard, parts=model.update_parts(), run=model.run_updates, rounding=rounding,
        gathers=gathers,
    )  # fmt: skip


def _refuse_narrow(muon: Iterable[Group], narrow: Collection[str]) -> None:
    found = [name for group in muon for name in group.params if name in narrow]
    if found:
        raise UserError(
            "weights of two bytes need AdamW",
            value=f"weights: bf16_sr, and {found[0]} is Muon's",
            remedy="set weights: fp32, or optimizer: adamw where the family takes it",
        )


def _run_in_order(updates: Sequence[Update]) -> None:
    for _, update in updates:
        update()


def deal(groups: Iterable[Group], ranks: int) -> dict[str, int]:
    """Owner of each matrix: largest first, round robin; equal sizes by name."""
    sizes = {name: p.numel() for group in groups for name, p in group.params.items()}
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    return {name: i % ranks for i, name in enumerate(order)}


def _parameter(state_name: str) -> str:
    """`a.b.momentum` -> `a.b`; a parameter's own name stays (kinds are no parameter names)."""
    stem, _, kind = state_name.rpartition(".")
    return stem if kind in ("momentum", "second_moment") else state_name


def _misfit(name: str, value: str) -> None:
    raise InputError(
        "optimizer state does not fit the model",
        value=f"{name}: {value}",
        remedy="resume with the parameters that the checkpoint was made with, or start afresh",
    )


def _second_shape(shape: torch.Size) -> tuple[int, int]:
    rows, columns = shape
    return (rows, 1) if rows >= columns else (1, columns)


def _empty_state(group: Group, meta: bool = False) -> dict[str, Tensor]:
    state = {}
    for name, p in group.params.items():
        like = p.detach().to("meta") if meta else p
        state[f"{name}.momentum"] = torch.empty_like(like)
        if group.rule == "normuon":
            state[f"{name}.second_moment"] = like.new_empty(_second_shape(p.shape))
    return state


def _stacks(group: Group, owners: Mapping[str, int], rank: int) -> list[_MuonStack]:
    shapes: dict[torch.Size, dict[str, nn.Parameter]] = {}
    for name, parameter in group.params.items():
        assert parameter.ndim == 2, f"Muon updates matrices, {name} is {tuple(parameter.shape)}"
        if owners[name] == rank:
            shapes.setdefault(parameter.shape, {})[name] = parameter
    return [_MuonStack(group, members) for members in shapes.values()]


class _MuonStack:
    """Matrices of one shape under one rule: state stacked (s, out, in), one batched update."""

    def __init__(self, group: Group, members: Mapping[str, nn.Parameter]) -> None:
        self.group, self.members = group, members
        first = next(iter(members.values()))
        rows, columns = first.shape
        self.factor = max(1.0, rows / columns) ** 0.5  # of the rate: tall matrices move more
        self.momentum = first.new_zeros(len(members), rows, columns)
        self.second_moment = first.new_zeros(len(members), *_second_shape(first.shape))

    def step(self, multipliers: Multipliers) -> None:
        here = [i for i, p in enumerate(self.members.values()) if p.grad is not None]
        if not here:
            return
        params = [p for p in self.members.values() if p.grad is not None]
        grads = torch.stack([p.grad for p in params if p.grad is not None])
        whole = len(here) == len(self.members)
        momentum = self.momentum if whole else self.momentum[here]
        second = self.second_moment if whole else self.second_moment[here]
        group = self.group
        u = nesterov(momentum, grads, multipliers.momentum)
        if group.rule == "muon":
            update = muon_direction(u, group.iteration_dtype).to(grads.dtype)
            decay = group.weight_decay
            update = update + decay * torch.stack(list[Tensor](params)) if decay else update
        else:
            update = normuon_direction(u, second, group.betas[1], group.iteration_dtype)
            decay = group.weight_decay * multipliers.weight_decay
            update = cautious_decay(
                update.to(grads.dtype), torch.stack(list[Tensor](params)), decay
            )
        if not whole:
            self.momentum[here], self.second_moment[here] = momentum, second
        rate = group.lr * multipliers.lr * self.factor
        for parameter, change in zip(params, update, strict=True):
            parameter.sub_(change, alpha=rate)

    def state_tensors(self) -> dict[str, Tensor]:
        state = {}
        for i, name in enumerate(self.members):
            state[f"{name}.momentum"] = self.momentum[i]
            if self.group.rule == "normuon":
                state[f"{name}.second_moment"] = self.second_moment[i]
        return state


class _Gathered:
    """Gradients of steps that AdamW passed over; part of the state, or a resume would lose them."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._params = {name: p for group in groups for name, p in group.params.items()}
        self._sums = {n: torch.zeros_like(p, dtype=_wide(p)) for n, p in self._params.items()}

    def released(self, due: bool) -> bool:
        """Whether AdamW steps now, with all that was gathered; else these gradients join it."""
        for name, parameter in self._params.items():
            if parameter.grad is not None and due:
                parameter.grad.add_(self._sums[name].to(parameter.grad.dtype))
                self._sums[name].zero_()
            elif parameter.grad is not None:
                self._sums[name].add_(parameter.grad)
        return due

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.gathered": total for name, total in self._sums.items()}


class _AdamW:
    """p <- p (1 - lr wd); p <- p - lr m1' / (sqrt(m2') + eps), m' bias-corrected, state in fp32.

    torch's fused `adamw` is this formula (arXiv 1711.05101, epsilon after the correction);
    parameters in half precision go by `_step_half`, for torch would keep their moments in half
    precision too. Where moments are bf16 between updates, those go tensor by tensor.
    """

    def __init__(
        self, groups: Sequence[Group], parts: Sequence[Sequence[str]] = (),
        rounding: Rounding | None = None,
    ) -> None:  # fmt: skip
        self._state: dict[str, dict[str, Tensor]] = {}
        self._rounding = rounding = rounding or Rounding(0)
        of = {name: number for number, names in enumerate(parts) for name in names}
        # (part, group, its members in that part), those of no part together at the end
        self._calls: list[tuple[Group, list[str]]] = []
        found: dict[tuple[int, int], list[str]] = {}
        for number, group in enumerate(groups):
            for name, p in group.params.items():
                dtype = torch.bfloat16 if rounding.moments else _wide(p)
                moments = {k: torch.zeros_like(p, dtype=dtype) for k in ("exp_avg", "exp_avg_sq")}
                self._state[name] = {"step": torch.zeros((), device=p.device), **moments}
                found.setdefault((of.get(name, len(parts)), number), []).append(name)
        self._calls = [(groups[number], names) for (_, number), names in sorted(found.items())]

    def updates(self, multipliers: Multipliers) -> list[Update]:
        """One update a part and group; each holds the gradients of now."""
        made: list[Update] = []
        for group, names in self._calls:
            members = [(n, group.params[n], grad) for n in names
                       if (grad := group.params[n].grad) is not None]  # fmt: skip
            factor = multipliers.lr if group.scheduled else 1.0
            made.append((names, partial(self._update, group, members, factor)))
        return made

    def _update(self, group: Group, members: Sequence[Member], multiplier: float) -> None:
        if not self._rounding.moments:
            states = [self._state[name] for name, _, _ in members]
            return _step_adamw(group, members, states, multiplier, self._rounding.put)
        for member in members:
            name = member[0]
            with self._rounding.widened(name, self._state[name]) as state:
                _step_adamw(group, [member], [state], multiplier, self._rounding.put)

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"{n}.{kind}": t for n, state in self._state.items() for kind, t in state.items()}


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _step_adamw(
    group: Group, members: Sequence[Member], states: Sequence[dict[str, Tensor]],
    multiplier: float, put: Callable[[str, Tensor, Tensor, int], None],
) -> None:  # fmt: skip
    pairs = list(zip(members, states, strict=True))
    whole = [(p, grad, s) for (_, p, grad), s in pairs if p.dtype == _wide(p)]
    if whole:
        adamw(
            [p for p, _, _ in whole], [grad for _, grad, _ in whole],
            [s["exp_avg"] for *_, s in whole], [s["exp_avg_sq"] for *_, s in whole], [],
            [s["step"] for *_, s in whole], fused=True, amsgrad=False, beta1=group.betas[0],
            beta2=group.betas[1], lr=group.lr * multiplier, weight_decay=group.weight_decay,
            eps=group.eps, maximize=False,
        )  # fmt: skip
    for (name, parameter, grad), state in pairs:
        if parameter.dtype != _wide(parameter):
            value = _step_half(group, parameter, grad, state, multiplier)
            put(name, parameter, value, int(state["step"]))


def _step_half(
    group: Group, p: nn.Parameter, grad: Tensor, state: Mapping[str, Tensor], multiplier: float
) -> Tensor:
    """AdamW in fp32 for a half-precision parameter: its new value, to be rounded once."""
    (beta1, beta2), lr = group.betas, group.lr * multiplier
    state["step"].add_(1)
    t, g, wide = float(state["step"]), grad.float(), p.float()
    m1 = state["exp_avg"].lerp_(g, 1 - beta1)
    m2 = state["exp_avg_sq"].lerp_(g.square(), 1 - beta2)
    denominator = (m2 / (1 - beta2**t)).sqrt_().add_(group.eps)
    wide.mul_(1 - lr * group.weight_decay)
    return wide.addcdiv_(m1, denominator, value=-lr / (1 - beta1**t))
