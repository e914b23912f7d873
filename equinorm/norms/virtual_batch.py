"""Virtual batch normalization, and the pass of a reference batch through a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks as top_saved_tensors_default_hooks  # pyright: ignore[reportMissingImports]

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_channels
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.measure import measure
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def virtual(x: Moments, reference: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
    """Normalize each sample as one more sample of the reference batch: of weight 1 among ``reference.count`` others."""
    return normalize(reference.merge(Moments(x.mean, x.var, 1)), weight, bias, eps)  # (N, C)


@contextmanager
def virtual_batch(model: nn.Module, *reference: Any, **options: Any) -> Iterator[Any]:
    """Pass a reference batch through ``model`` once; within the context, every :class:`VirtualBatchNorm` in it normalizes by it.

    One context serves one training step: the statistics of the reference depend on the weights, and carry their gradients. After
    ``optimizer.step()`` open a new one. For evaluation one context under ``torch.no_grad()`` serves as many batches as there are. Keep the
    reference batch itself with the model, ``model.register_buffer("reference", ref)``: it is part of what was learned, and is then saved,
    moved, and sent to all processes by DistributedDataParallel. A step that calls backward more than once needs ``retain_graph=True``.

    Args:
        model: holds at least one VirtualBatchNorm, and calls each at most once per forward pass.
        reference, options: what ``model`` is called with; the first dimension of each norm's input counts the reference samples.

    Yields:
        what the model returned for the reference.

    Raises:
        ValueError: there is no VirtualBatchNorm in ``model``.
        RuntimeError: the model is called after its parameters changed, a norm was called twice or within activation checkpointing.

    Example:
        >>> import torch, equinorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), equinorm.VirtualBatchNorm(3))
        >>> with equinorm.virtual_batch(model, torch.randn(8, 2)) as y_reference:
        ...     y = model(torch.randn(4, 2))
        >>> y_reference.shape, y.shape
        (torch.Size([8, 3]), torch.Size([4, 3]))
    """
    norms = [module for module in model.modules() if isinstance(module, VirtualBatchNorm)]
    if not norms:
        raise ValueError(f"virtual_batch: {type(model).__name__} must hold at least one VirtualBatchNorm, found none")
    watched = _versions(model.parameters())

    def check(*_: Any) -> None:
        if any(tensor._version != version for tensor, version in watched):
            raise RuntimeError(
                f"virtual_batch: parameters of {type(model).__name__} changed after its reference pass, which is stale now; open a new "
                "`with virtual_batch(...)` after every optimizer step"
            )

    try:
        for norm in norms:
            norm.clear_reference()
            norm._collecting = torch.is_grad_enabled()
        try:
            result = model(*reference, **options)
        finally:
            for norm in norms:
                norm._collecting = None
        handle = model.register_forward_pre_hook(check)
        try:
            yield result
        finally:
            handle.remove()
    finally:
        for norm in norms:
            norm.clear_reference()


def _versions(tensors: Iterable[Tensor]) -> tuple[tuple[Tensor, int], ...]:
    return tuple((tensor, tensor._version) for tensor in tensors if not tensor.is_inference())


class _Reference(NamedTuple):
    moments: Moments  # (1, C), the count that of the samples
    clock: tuple[tuple[Tensor, int], ...]  # the layer's parameters when it was measured


class VirtualBatchNorm(ChannelNorm):
    r"""Batch norm of each sample together with a fixed reference batch: samples of a batch do not see each other.

    Formula:
        y = (x - m) / sqrt(v + eps) * weight + bias. With the reference batch of B samples, mean m_R and mean square q_R over (B, *S), and
        the sample's own m_x, q_x over its positions: m = (m_x + B m_R) / (B + 1), q likewise, v = q - m^2. The reference itself is
        normalized by m_R and q_R. Training and evaluation are the same.

    Use it when: a generator or discriminator needs batch norm's statistics, and its samples must not be coupled.
    Not when: the second pass, of the reference batch through the whole model in every step, costs too much.
    Known trouble: call the model within ``virtual_batch(model, reference)``, or each layer's ``set_reference`` first; a reference measured
        before the layer's parameters changed is refused. All processes must use the same reference. Other layers see the reference pass
        too: dropout draws, batch norm counts it. The pass cannot be checkpointed.

    Args:
        num_features: C.
        eps: added to the variance inside the root.
        affine: learn ``weight`` and ``bias`` (0), both (C,).
        init_std: ``weight`` starts as 1 plus noise of this standard deviation; the authors' code uses 0.02.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype; S may differ from the reference's. mask: boolean (N, *S) or (N, 1, *S), True where data
        is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, an empty reference, a mask of another shape, or settings out of range.
        RuntimeError: there is no reference, or it is stale.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.VirtualBatchNorm(1, eps=0.0)
        >>> _ = norm.set_reference(torch.tensor([[0.0], [2.0], [4.0]]))
        >>> norm(torch.tensor([[6.0]])).detach()
        tensor([[1.3416]])

    Source: Salimans et al. 2016, section 3.4, which gives no formula; the formula is that of the authors' code, with the variance merged
    from variances instead of as q - m^2, which cancels. A sample counts 1 / (B + 1) whatever its number of positions.
    """

    facts: ClassVar[Facts] = Facts(
        name="virtual_batch",
        title="Virtual Batch Normalization",
        paper=Paper(
            authors="Salimans et al.",
            title="Improved Techniques for Training GANs",
            year=2016,
            venue="NeurIPS",
            arxiv="1606.03498",
            equation="section 3.4",
        ),
        family="batch",
        pools="S",
        invariances=frozenset({"per-sample", "per-channel"}),
        batch_of_one="works as with any batch; the reference batch makes up for it",
        one_position="works; the sample then has no variance of its own",
        reads_writes="2R+1W, and the same for the reference",
    )

    _reference: _Reference | None = None
    _collecting: bool | None = None  # during a reference pass, whether it started with gradients

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        init_std: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        if not 0 <= init_std < float("inf"):
            raise ValueError(f"VirtualBatchNorm: init_std must be a finite number of at least 0, got {init_std}")
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1 plus noise, bias 0; forget the reference."""
        super().reset_parameters()
        if self.weight is not None and self.init_std:
            nn.init.normal_(self.weight, 1.0, self.init_std)
        self.clear_reference()

    def clear_reference(self) -> None:
        """Forget the reference; a call without a new one is then an error."""
        self._reference = None

    def set_reference(self, r: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        """Measure a reference batch, with its gradients, for the calls to come.

        Args:
            r: (B, C, *S), B at least 1.
            mask: as for ``forward``.
            impl: as for ``forward``.

        Returns:
            ``r`` normalized by its own statistics.
        """
        check_channels(self, r, self.num_features)
        if r.numel() == 0:
            raise ValueError(f"VirtualBatchNorm: the reference batch must not be empty, got shape {tuple(r.shape)}")
        if self._collecting is not None and self._reference is not None:
            raise RuntimeError(
                "VirtualBatchNorm: a layer has one reference, but was called twice in the reference pass; give every place its own layer"
            )
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if (self._collecting and not torch.is_grad_enabled()) or (recorded and top_saved_tensors_default_hooks(True) is not None):
            # The repeated forward would come after the reference pass, and be taken for an ordinary one.
            raise RuntimeError(
                "VirtualBatchNorm: the reference pass cannot run within activation checkpointing, or other hooks on saved tensors; leave "
                "it out of the checkpointed part"
            )
        mask = None if mask is None else canonical_mask(r, mask)
        mean, var, _ = measure(r, per="batch", mask=mask, impl=impl)
        self._reference = _Reference(Moments(mean, var, r.shape[0]), self._clock())

        def rule(_: None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
            return normalize(Moments(mean, var, 1), weight, bias, self.eps)

        return channel_norm(r, rule, mean, var, self.weight, self.bias, per=None, mask=mask, impl=impl)[0]

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        if self._collecting is not None:
            return self.set_reference(x, mask, impl=impl)
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        mean, var, samples = self._current().moments

        def rule(moments: Moments, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
            return virtual(moments, Moments(mean, var, samples), weight, bias, self.eps)

        return channel_norm(x, rule, mean, var, self.weight, self.bias, mask=mask, impl=impl)[0]

    def _clock(self) -> tuple[tuple[Tensor, int], ...]:
        return () if torch.compiler.is_compiling() else _versions(p for p in (self.weight, self.bias) if p is not None)

    def _current(self) -> _Reference:
        if self._reference is None:
            raise RuntimeError(
                "VirtualBatchNorm: there is no reference batch; call the model within `with equinorm.virtual_batch(model, reference):`, or "
                "set_reference(r) first"
            )
        if not torch.compiler.is_compiling() and self._is_stale():
            raise RuntimeError(
                "VirtualBatchNorm: the layer's parameters changed after its reference was measured, which is stale now; measure it again "
                "after every optimizer step"
            )
        return self._reference

    def _is_stale(self) -> bool:
        return self._reference is not None and any(tensor._version != version for tensor, version in self._reference.clock)

    def _carry(self, move: Callable[[Tensor], Tensor]) -> None:
        """Keep the reference, without its graph, as that of a module which is equal to this one but made of other tensors."""
        if self._reference is not None:
            mean, var, samples = self._reference.moments
            self._reference = _Reference(Moments(move(mean.detach()), move(var.detach()), samples), self._clock())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._is_stale():
            self.clear_reference()
        super()._apply(fn, recurse)
        self._carry(lambda moment: moment.to(fn(moment[:0]).device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._reference is not None:  # a graph cannot be copied
            mean, var, samples = self._reference.moments
            state["_reference"] = None if self._is_stale() else _Reference(Moments(mean.detach(), var.detach(), samples), ())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._carry(lambda moment: moment)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init_std={self.init_std}"
