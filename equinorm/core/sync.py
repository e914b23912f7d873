"""Moments across processes: one collective forward, one backward, any split of the batch, empty ranks included."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import ProcessGroup

    from equinorm.core.moments import Moments

    Group = ProcessGroup | Literal["world"] | None

BLOCK = 1056  # numbers in the first message of an exchange: 8 KiB in float64, one collective for up to 525 channels
HEADER = ("refused inputs", "channels", "sets", "gradient")  # what an exchange says of itself: the same on all ranks, or an error on all
LEAST = 1e-30  # divisor in place of a sum of weights that is 0; its inverse times any activation is finite in every type


def gather(x: Moments, group: Group) -> Moments:
    """Pool the moments of all processes of ``group``, weighted by their counts.

    The forward exchanges (count, mean, var) of every rank in one all-gather and merges them exactly: unlike summed squares, this needs no
    common shift. The backward is one all-reduce of the gradients, and is itself differentiable.

    Args:
        x: the moments of this process, ``(1, C)``; a count of 0 means that it holds no data and still takes part. Moments of K weighted
            sets at once are ``(K, C)`` with counts ``(K, 1)``, sums of weights through which gradients flow too.
        group: a process group, or "world" for the default one. Outside of distributed training, and in a group of one, nothing is sent.

    Raises:
        RuntimeError: on every process, when they hold different numbers of channels or sets, or when only some of them need a gradient.
    """
    process_group = partners(group)
    if process_group is None:
        return x
    count = torch.as_tensor(x.count, dtype=x.mean.dtype, device=x.mean.device).reshape(-1, 1)  # (1 | K, 1)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x.mean, x.var, count))
    mean, var, total = _Gather.apply(x.mean, x.var, count, gradient, process_group)
    return type(x)(mean, var, total)


def gather_covariance(mean: Tensor, cov: Tensor, count: int | Tensor, group: Group) -> tuple[Tensor, Tensor, int | Tensor]:
    """Pool the means (G, d) and covariances (G, d, d) of all processes of ``group``, weighted by their counts; as :func:`gather`.

    Raises:
        RuntimeError: on every process, when they hold different numbers of channels or groups, or when only some of them need a gradient.
    """
    process_group = partners(group)
    if process_group is None:
        return mean, cov, count
    count = torch.as_tensor(count, dtype=mean.dtype, device=mean.device).reshape(1)
    gradient = torch.is_grad_enabled() and (mean.requires_grad or cov.requires_grad)
    return _GatherCovariance.apply(mean, cov, count, gradient, process_group)


def partners(group: Group) -> ProcessGroup | None:
    """The process group that ``group`` stands for, or None where there is nobody else in it: nothing is sent then."""
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    process_group = dist.group.WORLD if group == "world" else group
    return process_group if dist.get_world_size(process_group) > 1 else None


@contextmanager
def refusing_together(group: Group, device: torch.device) -> Iterator[None]:
    """Within this context an error is reported to the other processes, which raise too instead of waiting for this one.

    For checks that come right before an exchange, and for nothing else: what the others receive takes the place of that exchange.

    Args:
        group: with whom the exchange would be.
        device: where its tensors would be.
    """
    try:
        yield
    except Exception:
        if (process_group := partners(group)) is not None:
            with suppress(RuntimeError):  # this process has its own error to raise
                _exchange((1, 0, 0, 0), torch.empty(0, dtype=torch.float64, device=device), process_group)
        raise


def agree(value: Tensor, present: bool, group: Group) -> Tensor:
    """The ``value`` of the first process of ``group`` where it is ``present``; without gradient. If it is nowhere, the first's.

    Args:
        value: of the same shape on every process, small floating.
        present: whether this process has one to offer.
        group: as for :func:`gather`.

    Raises:
        RuntimeError: on every process, when the shapes differ.
    """
    process_group = partners(group)
    if process_group is None:
        return value
    rows, channels = value.shape
    ranks = _exchange((0, channels, rows, 0), torch.cat((value.new_tensor([present]), value.detach().reshape(-1))), process_group)
    return ranks[ranks[:, 0].argmax(), 1:].reshape(value.shape)


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: reading a value of ``x`` would end it."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


_memory = threading.local()


class Remembering:
    """A context that keeps what the ranks send, as a list in the order of sending. A class, since it is on the way of every forward."""

    def __enter__(self) -> list[Tensor]:
        self.before = getattr(_memory, "kept", None)
        _memory.kept = []
        return _memory.kept

    def __exit__(self, *_: object) -> None:
        _memory.kept = self.before


@contextmanager
def recalling(exchanges: list[Tensor]) -> Iterator[None]:
    """Take the answers of the ranks from ``exchanges``, in order, instead of asking again.

    A rule that is run again for a second derivative would otherwise communicate once more, and hang where another rank has no reason to
    run it again: one with an empty batch, or on the plain path.
    """
    before = getattr(_memory, "recalled", None)
    _memory.recalled = list(exchanges)
    try:
        yield
    finally:
        _memory.recalled = before


def _exchange(header: tuple[int, int, int, int], message: Tensor, group: ProcessGroup) -> Tensor:
    """The messages of all ranks, stacked: (R, length). The header (:data:`HEADER`) must be the same on all of them.

    Messages of different lengths end in a hang, in garbage or in the death of a process, depending on the backend. So the first message has
    a fixed length and carries the header; what does not fit follows in a second one, once all have seen that the others agree.
    """
    if (recalled := getattr(_memory, "recalled", None)) is not None:
        return recalled.pop(0)
    front = BLOCK - len(header)
    block = torch.cat((message.new_tensor(header), message[:front], message.new_zeros(max(front - message.numel(), 0))))
    ranks = _all_gather(block, group)
    _check(ranks[:, : len(header)])
    ranks = ranks[:, len(header) : len(header) + message.numel()]
    if message.numel() > front:
        ranks = torch.cat((ranks, _all_gather(message[front:].contiguous(), group)), 1)
    if (kept := getattr(_memory, "kept", None)) is not None:
        kept.append(ranks)
    return ranks


def _all_gather(message: Tensor, group: ProcessGroup) -> Tensor:
    gathered = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, message, group=group)
    return torch.stack(gathered)


def _check(headers: Tensor) -> None:
    """Raises RuntimeError, on every rank alike, unless all rows of ``headers`` (R, 4) are equal."""
    if capturing(headers):
        return  # the warm-up before a capture has checked
    for name, values in zip(HEADER, headers.T.long().tolist(), strict=True):
        if len(set(values)) > 1:
            raise RuntimeError(
                "synchronised statistics: all processes of a group must normalize the same layer at the same time, but this call has "
                f"{name} {values} on ranks 0 to {len(values) - 1}. Build the same model on every process, let no process skip or reorder "
                "a norm (one without data passes an empty batch), and let the input need a gradient on all of them or on none"
            )


class _Gather(torch.autograd.Function):
    """Pooled mean and variance of all ranks, row by row.

    With shares p_r = n_r / n, mean = sum p_r mean_r and var = sum p_r (var_r + (mean_r - mean)^2), so that
    d var / d mean_r = 2 p_r (mean_r - mean): what flows through the pooled mean cancels. Likewise
    d mean / d n_r = (mean_r - mean) / n and d var / d n_r = (var_r + (mean_r - mean)^2 - var) / n.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, count: Tensor, gradient: bool, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        rows, channels = mean.shape
        ranks = _exchange(
            (0, channels, rows, gradient), torch.cat((count.reshape(-1), mean.reshape(-1), var.reshape(-1))), group
        )  # (R, K + 2KC)
        counts, means, variances = ranks.split((rows, rows * channels, rows * channels), 1)
        counts, means, variances = counts.reshape(-1, rows, 1), means.reshape(-1, rows, channels), variances.reshape(-1, rows, channels)
        total = counts.sum(0)  # (K, 1)
        share = counts / total.clamp(min=LEAST)
        pooled_mean = (share * means).sum(0)
        pooled_var = (share * (variances + (means - pooled_mean).square())).sum(0)
        ctx.group = group
        ctx.save_for_backward(mean, var, count, pooled_mean, pooled_var, total)
        if not ctx.needs_input_grad[2]:
            ctx.mark_non_differentiable(total)
        return pooled_mean, pooled_var, total

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, count, pooled_mean, pooled_var, total = ctx.saved_tensors
        sizes = (mean.shape[1], mean.shape[1], 1)
        to_mean, to_var, to_total = _Sum.apply(torch.cat((grad_mean, grad_var, grad_total), 1), ctx.group).split(sizes, 1)
        n = total.clamp(min=LEAST)
        share, apart = count / n, mean - pooled_mean
        to_count = None
        if ctx.needs_input_grad[2]:
            to_count = (to_mean * apart + to_var * (var + apart.square() - pooled_var)).sum(1, keepdim=True) / n + to_total
        return share * (to_mean + 2 * apart * to_var), share * to_var, to_count, None, None


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


class _GatherCovariance(torch.autograd.Function):
    """Pooled mean and covariance of all ranks.

    With shares p_r and a_r = mean_r - mean, cov = sum p_r (cov_r + a_r a_r^T), so that a gradient H of cov gives p_r (H + H^T) a_r to
    mean_r: what flows through the pooled mean cancels, as in :class:`_Gather`.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, cov: Tensor, count: Tensor, gradient: bool, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        groups, d = mean.shape
        ranks = _exchange((0, groups * d, groups, gradient), torch.cat((count, mean.reshape(-1), cov.reshape(-1))), group)
        counts, means, covs = ranks.split((1, groups * d, groups * d * d), 1)
        total = counts.sum()
        share = (counts / total.clamp(min=1)).reshape(-1, 1, 1)  # (R, 1, 1)
        means = means.reshape(-1, groups, d)
        pooled_mean = (share * means).sum(0)
        apart = (means - pooled_mean).unsqueeze(-1)  # (R, G, d, 1)
        pooled_cov = (share.unsqueeze(-1) * (covs.reshape(-1, groups, d, d) + apart * apart.mT)).sum(0)
        ctx.group = group
        ctx.save_for_backward(mean, pooled_mean, count / total.clamp(min=1))
        ctx.mark_non_differentiable(total)
        return pooled_mean, pooled_cov, total

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_cov: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        mean, pooled_mean, share = ctx.saved_tensors
        total = _Sum.apply(torch.cat((grad_mean.unsqueeze(-1), grad_cov), 2), ctx.group)  # (G, d, 1 + d)
        to_mean, to_cov = total[..., 0], total[..., 1:]
        apart = (mean - pooled_mean).unsqueeze(-1)
        return share * (to_mean + ((to_cov + to_cov.mT) @ apart).squeeze(-1)), share * to_cov, None, None, None
