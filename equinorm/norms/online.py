"""Online normalization: statistics of the past stream of samples, and a backward control process."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from equinorm.core import Moments, normalize
from equinorm.core.base import ChannelNorm, check_channels, check_eps, check_fraction
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.controlled import controlled_norm
from equinorm.core.measure import measure
from equinorm.core.running import RunningState, recomputing, some
from equinorm.core.sync import gather
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import small_dtype, wide
from equinorm.norms.layer_scaling import layer_scaling

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def recurrence(a: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """``s_t = a_t s_{t-1} + b_t`` for all t at once: the states before each step, (N, C), and after the last, (C,).

    A step is the map (a_t, b_t), and maps compose associatively: after k rounds every state holds the last 2^k steps.
    """
    a, b = torch.cat((torch.ones_like(start).unsqueeze(0), a)), torch.cat((start.unsqueeze(0), b))  # (N + 1, C)
    distance = 1
    while distance < b.shape[0]:
        b = torch.cat((b[:distance], b[distance:] + a[distance:] * b[:-distance]))
        a = torch.cat((a[:distance], a[distance:] * a[:-distance]))
        distance *= 2
    return b[:-1], b[-1]


class OnlineNorm(RunningState, ChannelNorm):
    r"""Normalize each sample by the statistics of those before it; correct the gradient by a control process.

    Formula:
        Samples t in order, m_t and s_t the mean and variance of a channel over the positions of sample t, f = alpha_fwd, b = alpha_bkw:
        y_t = (x_t - mu_{t-1}) / sigma_{t-1}, sigma^2 = var + eps; z_t = weight y_t + bias;
        mu_t = f mu_{t-1} + (1 - f) m_t;  var_t = f var_{t-1} + (1 - f) s_t + f (1 - f) (m_t - mu_{t-1})^2.
        Backward, in the same order, g_t the gradient to y_t:
        h_t = g_t - (1 - b) v_{t-1} y_t;  v_t = v_{t-1} + mean(h_t y_t);
        dx_t = h_t / sigma_{t-1} - (1 - b) u_{t-1};  u_t = u_{t-1} + mean(dx_t).
        Guard: "ls" (layer scaling) z / sqrt(mean(z^2) + ls_eps), the mean over (C, *S) of one sample; "ac" (activation clamping) keeps z in
        [-clamp_val, clamp_val]. Evaluation uses the last mu and var without moving them, and keeps the guard.

    Use it when: batches are of one or a few samples, or data streams, and a norm with batch norm's statistics is wanted.
    Not when: the order of samples carries meaning, or anything needs the true derivative: second derivatives, ``torch.func``, gradient
        checks. The backward pass is not the derivative of the forward pass, by design.
    Known trouble: training moves state in forward (mu, var) and in backward (u, v). The order of samples in a batch matters; of two
        forwards, the backward passes should come in the same order. ``retain_graph`` with two backward passes moves u and v twice.
        v runs away when (1 - b) mean(y^2) > 2 for long, that is mean(y^2) > 200 at the default; ``clip_control`` prevents it. Layer
        scaling does not, since it acts after y. Each process streams its own samples: under DistributedDataParallel pass
        ``broadcast_buffers=False`` and call :meth:`average_over` now and then. Activation checkpointing repeats a forward with the state of
        its first run, if the module runs once in it.

    Args:
        num_features: C.
        alpha_fwd: weight of the old value in mu and var; 1 - 1/1000 by default.
        alpha_bkw: the same of the control process; 1 - 1/100 by default.
        eps: added to the variance inside the root.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        ecm: the guard ("error compensation mechanism"): "ls", "ac" or None.
        ls_eps: eps of layer scaling.
        clamp_val: bound of activation clamping.
        clip_control: keep the factor 1 - (1 - b) mean(y^2) of the control process within [0, 1]; not in the paper.
        device, dtype: of the parameters. The state is float32, or float64 in a float64 module.

    Shape:
        x: (N, C, *S), N being time, to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes
        out as 0, and a sample without data is no step.

    Raises:
        TypeError: the input is not floating point.
        ValueError: unknown guard, wrong number of channels, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.OnlineNorm(1, alpha_fwd=0.5, eps=0.0, affine=False, ecm=None)
        >>> norm(torch.tensor([[1.0], [3.0], [2.0]])).flatten()
        tensor([1.0000, 2.8868, 0.1796])

    Source: Chiley et al. 2019, Algorithms 1 and 2. The paper guards by layer scaling; the authors' later layer clamps by default (its
    docstring still says layer scaling). Here layer scaling is the default. The authors' checkpoints load (``norm.m``, ``norm.var``,
    ``norm.u``, ``norm.v``).
    """

    facts: ClassVar[Facts] = Facts(
        name="online",
        title="Online Normalization",
        paper=Paper(
            authors="Chiley et al.",
            title="Online Normalization for Training Neural Networks",
            year=2019,
            venue="NeurIPS",
            arxiv="1905.05894",
            equation="Algorithms 1 and 2",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        batch_of_one="works: one step of the stream",
        one_position="works: the variance within a sample is 0",
        reads_writes="2R+1W, with layer scaling 4R+2W",
    )

    kept_wide = ("running_mean", "running_var", "u", "v")
    running_mean: Tensor
    running_var: Tensor
    u: Tensor
    v: Tensor

    def __init__(
        self,
        num_features: int,
        alpha_fwd: float = 0.999,
        alpha_bkw: float = 0.99,
        eps: float = 1e-5,
        affine: bool = True,
        ecm: Literal["ls", "ac"] | None = "ls",
        ls_eps: float = 1e-5,
        clamp_val: float = 5.0,
        clip_control: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_fraction(self, alpha_fwd=alpha_fwd, alpha_bkw=alpha_bkw)
        check_eps(self, ls_eps, "ls_eps")
        if ecm not in ("ls", "ac", None):
            raise ValueError(f'OnlineNorm: ecm must be "ls" (layer scaling), "ac" (activation clamping) or None, got {ecm!r}')
        if not clamp_val > 0:
            raise ValueError(f"OnlineNorm: clamp_val must be positive, got {clamp_val}")
        self.alpha_fwd, self.alpha_bkw = alpha_fwd, alpha_bkw
        self.ecm, self.ls_eps, self.clamp_val, self.clip_control = ecm, ls_eps, clamp_val, clip_control
        for name in self.kept_wide:
            self.register_state(name, (num_features,), device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0; a stream that begins at mean 0 and variance 1, and a control process at rest."""
        super().reset_parameters()
        for zero in (self.running_mean, self.u, self.v):
            nn.init.zeros_(zero)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        data = wide(x) if self.ecm == "ls" else x  # layer scaling comes before the one rounding
        z = self._stream(data, mask, impl) if self.learning else self._rest(data, mask, impl)
        if self.ecm == "ls":
            z = channel_norm(z, lambda m: layer_scaling(m, 1, self.ls_eps), mask=mask, impl=impl)[0].to(x.dtype)
        elif self.ecm == "ac":
            z = z.clamp(-self.clamp_val, self.clamp_val)
        return z

    def _rest(self, x: Tensor, mask: Tensor | None, impl: Impl) -> Tensor:
        mean, var = (b.to(small_dtype(b), copy=True).unsqueeze(0) for b in (self.running_mean, self.running_var))
        estimate = Moments(mean, var, 1)
        return channel_norm(x, lambda _, w, b: normalize(estimate, w, b, self.eps), self.weight, self.bias, per=None, mask=mask, impl=impl)[
            0
        ]

    def _stream(self, x: Tensor, mask: Tensor | None, impl: Impl) -> Tensor:
        f = self.alpha_fwd
        with torch.no_grad():
            mean, var = self.before_step("running_mean", "running_var")
            m = measure(x.detach(), mask=mask, impl=impl)  # (N, C)
            # A sample that is not finite, or holds no data, is no step: a = 1, b = 0.
            step = m.mean.isfinite() & m.var.isfinite() & some(m.count, x)
            keep = torch.where(step, torch.full_like(m.mean, f), 1.0)
            means, mean = recurrence(keep, torch.where(step, (1 - f) * m.mean, 0.0), mean)
            apart = m.mean - means
            variances, var = recurrence(keep, torch.where(step, (1 - f) * m.var + f * (1 - f) * apart.square(), 0.0), var)
            rstd = (variances + self.eps).rsqrt()
            if not recomputing():
                self.move("running_mean", mean)
                self.move("running_var", var)
        control = partial(self._control, step, rstd, apart * rstd, (m.var + apart.square()) * rstd.square())
        return controlled_norm(x, means, rstd, self.weight, self.bias, control, per="sample", mask=mask, impl=impl)

    @torch.no_grad()
    def _control(
        self, step: Tensor, rstd: Tensor, mean_y: Tensor, mean_yy: Tensor, mean_g: Tensor, mean_gy: Tensor, _: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """One backward step per sample: v takes out what of the gradient lies along y, u what lies along 1."""
        b = self.alpha_bkw
        u, v = (state.to(rstd.dtype, copy=True) for state in (self.u, self.v))
        step = step & mean_g.isfinite() & mean_gy.isfinite()
        factor = 1 - (1 - b) * mean_yy
        if self.clip_control:
            factor = factor.clamp(0, 1)
        vs, v = recurrence(torch.where(step, factor, 1.0), torch.where(step, mean_gy, 0.0), v)
        mean_h = (mean_g - (1 - b) * vs * mean_y) * rstd
        us, u = recurrence(torch.where(step, torch.full_like(mean_h, b), 1.0), torch.where(step, mean_h, 0.0), u)
        self.move("u", u)
        self.move("v", v)
        return -(1 - b) * vs, -(1 - b) * us

    @torch.no_grad()
    def average_over(self, group: Group = "world") -> None:
        """Average the state over the processes of ``group``, each of which streams samples of its own.

        mu and u and v become their averages; var also counts how far the processes' means lie apart. Every process must call it.
        """
        zeros = torch.zeros_like(self.u)
        mean = torch.cat((self.running_mean, self.u, self.v)).double().unsqueeze(0)
        var = torch.cat((self.running_var, zeros, zeros)).double().unsqueeze(0)
        pooled = gather(Moments(mean, var, 1), group)
        self.running_var.copy_(pooled.var[0].chunk(3)[0])
        for state, value in zip((self.running_mean, self.u, self.v), pooled.mean[0].chunk(3), strict=True):
            state.copy_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for theirs, mine in {"m": "running_mean", "var": "running_var", "u": "u", "v": "v"}.items():
            if (value := state_dict.pop(f"{prefix}norm.{theirs}", None)) is not None:
                state_dict[prefix + mine] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}, ecm={self.ecm!r}"
