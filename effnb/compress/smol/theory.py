"""The closed form that a separable quadratic loss allows: reverse water-filling over weights."""

import torch
from torch import Tensor

from .digits import LN2
from .noise import NOISE_POWER, check_lam, check_noise


def optimal_limits(curvature: Tensor, lam: float, noise: str = "uniform") -> Tensor:
    r"""Best noise limits for ``L = 1/2 sum(H_i u_i^2)``: ``sigma_i = min(1, sqrt(3 lam / (H_i ln 2)))``.

    Noise of size ``sigma`` adds ``H sigma^2 / 6`` to the expected loss (``H sigma^2 / 2`` if Rademacher, where 3
    becomes 1) and saves ``lam log2(1 / sigma)``. Weights of small curvature drown: their limit is 1, one bit.

    Args:
        curvature: second derivatives ``H`` of the loss in the normalised weights, >= 0, any shape.
        lam: price of a bit, > 0.
        noise: ``"uniform"`` or ``"rademacher"``.

    Returns:
        Limits in (0, 1], shape of ``curvature``.

    Raises:
        ValueError: a negative curvature, ``lam`` not positive, unknown noise.

    Reference: cover2006elements

    >>> optimal_limits(torch.tensor([0.0, 3.0, 12.0]), lam=0.25 * 0.6931472)
    tensor([1.0000, 0.5000, 0.2500])
    """
    check_noise(noise)
    check_lam(lam)
    if lam == 0:
        raise ValueError("lam must be positive: free bits are never enough, got 0")
    if curvature.numel() and not bool((curvature >= 0).all()):
        raise ValueError(f"curvature must be >= 0 everywhere, got {float(curvature.min())}")
    strength = 3.0 / NOISE_POWER[noise]
    return torch.sqrt(strength * lam / (curvature * LN2)).clamp(max=1.0)


def optimal_bits(curvature: Tensor, lam: float, noise: str = "uniform") -> Tensor:
    r"""The bits of :func:`optimal_limits`, ``p_i = max(1, 1 + 1/2 log2(H_i ln 2 / (3 lam)))``.

    Half a bit for every doubling of the curvature.

    Args:
        curvature: second derivatives, >= 0, any shape.
        lam: price of a bit, > 0.
        noise: ``"uniform"`` or ``"rademacher"``.

    Returns:
        Real bits >= 1, shape of ``curvature``.

    Raises:
        ValueError: as :func:`optimal_limits`.

    Reference: cover2006elements

    >>> optimal_bits(torch.tensor([0.0, 3.0, 6.0]), lam=0.25 * 0.6931472)
    tensor([1.0000, 2.0000, 2.5000])
    """
    return 1 - torch.log2(optimal_limits(curvature, lam, noise))


def expected_noise_loss(curvature: Tensor, limits: Tensor, noise: str = "uniform") -> Tensor:
    r"""What noise adds to a quadratic loss on average, ``sum(H_i sigma_i^2) / 6`` (``/ 2`` if Rademacher).

    Args:
        curvature: second derivatives, any shape.
        limits: ``sigma``, same shape.
        noise: ``"uniform"`` or ``"rademacher"``.

    Returns:
        A 0-d tensor, with gradient.

    Raises:
        ValueError: unknown noise.

    Reference: savarese2022bits

    >>> expected_noise_loss(torch.tensor([6.0]), torch.tensor([0.5]))
    tensor(0.2500)
    """
    check_noise(noise)
    return (curvature * limits.square()).sum() * (NOISE_POWER[noise] / 6)


def fisher_diagonal(losses: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Mean squared gradients over examples, the empirical stand-in for curvature.

    Args:
        losses: one loss per example, ``(n,)``, with graph.
        weights: tensors to differentiate.

    Returns:
        Tensors of the weights' shapes.

    Raises:
        ValueError: no example, or not one dimension.

    Reference: savarese2022bits

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> fisher_diagonal(torch.stack([w[0], 3 * w[1]]), [w])
    [tensor([0.5000, 4.5000])]
    """
    if losses.ndim != 1 or len(losses) == 0:
        raise ValueError(f"losses must be one per example, (n,), got {tuple(losses.shape)}")
    total = [torch.zeros_like(w) for w in weights]
    for i, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, weights, retain_graph=i + 1 < len(losses))
        torch._foreach_add_(total, [g.square() / len(losses) for g in grads])
    return total
