"""The empirical neural tangent kernel."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .jacobian import MEMORY_BUDGET, iter_jacobian


def empirical_ntk(
    model: nn.Module,
    params: str | Iterable[str],
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    trace: bool = False,
    method: str = "auto",
    chunk_size: int | str = "auto",
    memory_budget: int = MEMORY_BUDGET,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Kernel blocks :math:`\Theta_{ij} = J(x_i) J(x_j)^\top`, each ``K x K``.

    ``theta.transpose(1, 2).reshape(N1 * K, N2 * K)`` is the Gram matrix of the Jacobian's rows.

    Args:
        model: see :func:`per_sample_jacobian`.
        params: names of parameters, or a subset for :func:`peft_parameters`.
        x1: inputs ``(N1, ...)``.
        x2: inputs ``(N2, ...)``; ``x1`` if not given.
        trace: return the trace of each block instead of the block.
        method: see :func:`per_sample_jacobian`.
        chunk_size: samples at once, or ``"auto"``.
        memory_budget: bytes that ``"auto"`` may use.
        dtype: of the products; float32 Jacobians are cast before they are multiplied.

    Returns:
        ``(N1, N2, K, K)``, or ``(N1, N2)`` with ``trace``.

    Raises:
        TypeError: see :func:`per_sample_jacobian`.
        ValueError: see :func:`per_sample_jacobian`.

    Reference: jacot2018neural, novak2022fast

    >>> empirical_ntk(nn.Linear(2, 1).eval(), "all", torch.tensor([[1.0, 2.0]])).flatten()  # |x|^2 + 1
    tensor([6.], dtype=torch.float64)
    """
    options = {"method": method, "chunk_size": chunk_size, "memory_budget": memory_budget}
    second = torch.cat([jac.to(dtype) for jac in iter_jacobian(model, params, x1 if x2 is None else x2, **options)])
    if x2 is None:
        first: Iterable[Tensor] = [second]
    else:
        first = (jac.to(dtype) for jac in iter_jacobian(model, params, x1, **options))
    if trace:
        return torch.cat([jac.flatten(1) @ second.flatten(1).T for jac in first])
    outputs = second.shape[1]
    grams = [jac.flatten(0, 1) @ second.flatten(0, 1).T for jac in first]
    return torch.cat(grams).view(-1, outputs, len(second), outputs).transpose(1, 2).contiguous()
