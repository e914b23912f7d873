"""The R1 penalty: the squared gradient of a discriminator at real images."""

from __future__ import annotations

import torch
from torch import Tensor

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.units import wide


@describes(
    Facts(
        name="r1_penalty",
        title="R1 Gradient Penalty",
        paper=Paper(
            authors="Mescheder, Geiger and Nowozin",
            title="Which Training Methods for GANs do actually Converge?",
            year=2018,
            venue="ICML",
            arxiv="1801.04406",
            equation="Eq. 9",
        ),
        family="gan",
        pools="",
        reads_writes="1R+1W",
    )
)
def r1_penalty(logits: Tensor, real_images: Tensor, gamma: float = 10.0) -> Tensor:
    r"""Half of gamma times the mean squared length of the discriminator's gradient at real images.

    Formula:
        gamma / 2 * mean_n || d D(x_n) / d x_n ||^2, the square summed over channels and pixels

    Use it when: a GAN is to converge instead of orbiting; on every discriminator step, or every 16th times 16 (:class:`LazyRegularizer`).
    Not when: a layer of the discriminator couples samples and the penalty must be exact: with minibatch standard deviation or batch norm in
        training mode the gradient of the summed logits mixes samples.
    Known trouble: take raw logits, and images before augmentation. Under mixed precision scale the logits up front and divide the gradient
        by the scale, as torch's recipe for gradient penalties does. gamma must grow with resolution and shrink with batch size; StyleGAN2
        uses 0.0002 * resolution^2 / batch size.

    Args:
        logits: the discriminator's output for ``real_images``, any shape with N first.
        real_images: ``(N, ...)``, with ``requires_grad`` set before the discriminator ran.
        gamma: weight. Calling it with fakes gives R2.

    Returns:
        A scalar, in at least float32, that can be differentiated once more.

    Raises:
        ValueError: the images do not require a gradient, or the logits do not depend on them.

    Example:
        >>> import torch, equinorm
        >>> x = torch.randn(4, 3).requires_grad_()
        >>> equinorm.r1_penalty(x @ torch.tensor([1.0, 2.0, 2.0]), x, gamma=2.0).item()
        9.0

    Source: Mescheder, Geiger and Nowozin, 2018, arXiv:1801.04406, Eq. 9. A widespread copy leaves out gamma / 2 and takes the root before
        the square, which has no derivative at 0.
    """
    if not real_images.requires_grad:
        raise ValueError("r1_penalty: real_images must require a gradient; call real_images.requires_grad_() before the discriminator")
    gradient = None
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad(logits.sum(), real_images, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("r1_penalty: logits must depend on real_images; pass the tensor that went into the discriminator")
    return wide(gradient).square().flatten(1).sum(1).mean() * (gamma / 2)
