"""Data parallel training: every rank has its slice of the same global batch, gradients are summed.

The sum over ranks replaces a longer sum on one, so results follow the number of ranks only in the
order of additions. Gradients are reduced once a step, after all its losses, in flat buckets whose
order is the model's: families that yield several losses need nothing of their own.
FSDP2 (`runtime.shard: fsdp`) cuts the blocks found in module lists; what lies outside them (tables,
head) stays whole on every rank, so that any method of a family may be called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.core import ranks
from lib.core.errors import UserError
from lib.models.base import Group
from lib.train import flops

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

BUCKET_BYTES = 64 * 2**20


def start(device: torch.device) -> None:
    """Join the other ranks, if there are any."""
    if ranks.world_size() > 1 and not dist.is_initialized():
        # Streamed weights have their gradients on the host, beside a GPU that computes.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = ranks.store()
        dist.init_process_group(
            backend, store=store, rank=ranks.rank(), world_size=ranks.world_size()
        )


def stop() -> None:
    """Leave the others; a second start in this process joins anew."""
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of all ranks' devices together; None where the device is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    one = flops.peak_flops(name)
    return None if one is None else ranks.world_size() * one


def is_first() -> bool:
    """Whether this is rank 0, which writes for all."""
    return ranks.rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` added over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest `value` of all ranks."""
    if not dist.is_initialized():
        return value
    held = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return held.item()


def gather_bytes(state: Tensor, device: torch.device) -> list[Tensor]:
    """The uint8 tensors of all ranks (equal lengths), by rank, on the CPU."""
    if not dist.is_initialized():
        return [state]
    mine = state.to(device if device.type == "cuda" else "cpu")
    found = [torch.empty_like(mine) for _ in range(ranks.world_size())]
    dist.all_gather(found, mine)
    return [one.cpu() for one in found]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add the gradients of whole parameters over ranks; FSDP has added those of cut ones."""
    own = [p for p in parameters if not is_sharded(p)]
    if not dist.is_initialized() or not own:
        return
    used = torch.tensor([float(p.grad is not None) for p in own], device=own[0].device)
    dist.all_reduce(used)  # a parameter that no rank used must stay without a gradient
    waiting: list[Tensor] = []
    for parameter, count in zip(own, used.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        same = not waiting or waiting[0].dtype == parameter.grad.dtype
        if not same or sum(g.nbytes for g in waiting) >= BUCKET_BYTES:
            _sum_bucket(waiting)
            waiting = []
        waiting.append(parameter.grad)
    _sum_bucket(waiting)


def _sum_bucket(gradients: list[Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def global_norm(gradients: list[Tensor]) -> Tensor:
    """One Euclidean norm over all parameters and ranks, fp32 scalar; 0 without gradients."""
    cut = [g for g in gradients if is_sharded(g)]
    norms = [nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])]
    if cut:
        norms.append(whole(nn.utils.get_total_norm(cut)))
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def scale_gradients(gradients: list[Tensor], factor: float) -> None:
    """Multiply all in place; nothing is touched for factor 1."""
    for kind in (True, False):  # one fused call takes one kind of tensor
        group = [g for g in gradients if is_sharded(g) is kind]
        if group and factor != 1.0:
            torch._foreach_mul_(group, factor)  # type: ignore[reportPrivateImportUsage]  # no other


def shard_blocks(model: nn.Module) -> None:
    """Cut the parameters of every block in a module list over the ranks (FSDP2)."""
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise UserError(
            "nothing to shard over",
            value="runtime.shard is fsdp on one rank",
            remedy="use torchrun",
        )
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    blocks = [block for one in lists for block in one]
    inner = {id(m) for block in blocks for m in block.modules() if m is not block}
    for block in blocks:
        if id(block) not in inner:
            # Each block is a root of its own: without the flag what validation gathered, averaged
            # weights, would serve the next training step.
            sharded = fully_shard(block, reshard_after_forward=True)
            sharded.set_gradient_divide_factor(1.0)  # the loss is divided already: add
            sharded.set_force_sum_reduction_for_comms(True)


def split_groups(groups: Iterable[Group]) -> list[Group]:
    """Groups whose parameters are all cut or all whole: one fused update takes one kind."""
    result = []
    for group in groups:
        for kind in (False, True):
            params = {n: p for n, p in group.params.items() if is_sharded(p) is kind}
            result += [replace(group, params=params)] if params else []
    return result


def whole(tensor: Tensor) -> Tensor:
    """A cut tensor put together (all ranks must call), any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def cut_like(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole `values` cut as the tensors of the same name in `like` are."""
    result = {}
    for name, value in values.items():
        twin = like.get(name)
        if twin is not None and is_sharded(twin):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(
                value.to(twin.device), twin.device_mesh, twin.placements, src_data_rank=None
            )
        result[name] = value
    return result


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether `tensor` is cut over ranks. Told by its method: the import costs a stage 0.6 s."""
    return hasattr(tensor, "full_tensor")
