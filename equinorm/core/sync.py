"""Moments across processes: one collective forward, one backward, any split of the batch, empty ranks included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from equinorm.core.moments import Moments

    Group = ProcessGroup | Literal["world"] | None


def gather(x: Moments, group: Group) -> Moments:
    """Pool the moments of all processes of ``group``, weighted by their counts.

    The forward exchanges (count, mean, var) of every rank in one all-gather and merges them exactly: unlike summed squares, this needs no
    common shift. The backward is one all-reduce of the gradients, and is itself differentiable.

    Args:
        x: the moments of this process, ``(1, C)``; a count of 0 means that it holds no data and still takes part.
        group: a process group, or "world" for the default one. Outside of distributed training, and in a group of one, nothing is sent.

    Raises:
        RuntimeError: the ranks hold different numbers of channels.
    """
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return x
    process_group = dist.group.WORLD if group == "world" else group
    if dist.get_world_size(process_group) == 1:
        return x
    count = torch.as_tensor(x.count, dtype=x.mean.dtype, device=x.mean.device).reshape(1, 1)
    mean, var, total = _Gather.apply(x.mean, x.var, count, process_group)
    return type(x)(mean, var, total)


class _Gather(torch.autograd.Function):
    """Pooled mean and variance of all ranks.

    With shares p_r = n_r / n, mean = sum p_r mean_r and var = sum p_r (var_r + (mean_r - mean)^2), so that
    d var / d mean_r = 2 p_r (mean_r - mean): what flows through the pooled mean cancels.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, count: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        channels = mean.shape[1]
        # The channel count travels with the values: a rank with another one is told so, instead of hanging or reading garbage.
        message = torch.cat((count.new_tensor([[channels]]), count, mean, var), 1).reshape(-1)  # (2 + 2C,)
        gathered = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, message, group=group)
        ranks = torch.stack(gathered)  # (R, 2 + 2C)
        counts, means, variances = ranks[:, 1:2], ranks[:, 2 : 2 + channels], ranks[:, 2 + channels :]
        total = counts.sum(0, keepdim=True)  # (1, 1)
        share = counts / total.clamp(min=1)
        pooled_mean = (share * means).sum(0, keepdim=True)
        pooled_var = (share * (variances + (means - pooled_mean).square())).sum(0, keepdim=True)
        ctx.group = group
        ctx.save_for_backward(mean, pooled_mean, count / total.clamp(min=1))
        ctx.mark_non_differentiable(total)
        return pooled_mean, pooled_var, total

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        mean, pooled_mean, share = ctx.saved_tensors
        total_mean, total_var = _Sum.apply(torch.cat((grad_mean, grad_var)), ctx.group)  # each (C,)
        return share * (total_mean + 2 * (mean - pooled_mean) * total_var), share * total_var, None, None


class _Sum(torch.autograd.Function):
    """Sum over the ranks; its gradient is the sum of the gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None
