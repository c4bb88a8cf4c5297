"""Proxies with passes of their own: GraSP, SynFlow and the correlation of input Jacobians."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from .common import Loss, check_model, gradients, layers, mean_loss, pure, read_batch, read_images, total, weights

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
OFFSET = 1e-5  # added to eigenvalues by the official code


def grasp(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return GraSP, :math:`\sum -\theta \, (H g)` with the Hessian H and the gradient g of the loss; higher is better.

    g is a constant in the product. The original prunes by the opposite sign; this is the sign of the official code of
    zero-cost proxies, with its temperature 1, and both derivatives on the same batch.

    Args:
        model: network, differentiable twice; it stays as it was.
        batch: ``(x, y)``.
        loss_fn: mean loss of a batch.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.

    Returns:
        The score, over convolution and linear weights.

    Raises:
        ValueError: see `GradientPass`.
        TypeError: see `GradientPass`.

    Reference: wang2020grasp, abdelfattah2021zerocost.

    >>> model, batch = nn.Linear(1, 1, bias=False), (torch.ones(1, 1), torch.zeros(1, 1))
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(3.0)
    >>> grasp(model, batch, loss_fn=nn.functional.mse_loss)  # loss w^2: -w (2 (2 w))
    -36.0
    """
    x, y = read_batch(batch)
    with pure(model, seed) as call:
        theta = list(weights(model).values())
        grads = gradients(mean_loss(loss_fn, call(x), y), theta, create_graph=True)
        curved = gradients(grads, theta, grad_outputs=[grad.detach() for grad in grads])
    return -total([(w.detach() * h).sum(dtype=torch.float64) for w, h in zip(theta, curved, strict=True)])


def synflow(
    model: nn.Module, batch: Any, *, bn: str = "identity", loss_fn: Loss = F.cross_entropy, seed: int | None = 0
) -> float:
    r"""Return SynFlow, :math:`\sum |\theta \, \partial R / \partial \theta|`; higher is better.

    R is the sum of the outputs for one input of ones, with all parameters and buffers replaced by their absolute
    values, in double precision. For a chain without biases it is the number of layers times R.

    Args:
        model: network; it stays as it was.
        batch: ``(x, y)`` or ``x`` alone, of which only the shape is used.
        bn: ``"identity"`` takes normalisation layers out; ``"keep"`` leaves them in, as the code of the survey does by
            oversight, which gives a score of another kind.
        loss_fn: not used.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.

    Returns:
        The score, over convolution and linear weights.

    Raises:
        ValueError: an unknown ``bn``, an empty batch or inputs that are not finite.
        TypeError: complex numbers, or a batch of another kind.

    Reference: tanaka2020synflow, abdelfattah2021zerocost.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(-3.0), model[1].weight.fill_(0.5)
    >>> synflow(model, torch.zeros(1, 2))  # 2 layers, R = 3
    6.0
    """
    if bn not in ("identity", "keep"):
        raise ValueError(f"bn must be 'identity' or 'keep', got {bn!r}")
    check_model(model)
    x = read_images(batch)
    positive = {name: magnitude(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    theta = [positive[name] for name in {names[id(layer.weight)]: None for layer in layers(model).values()}]
    if not theta:
        raise ValueError("model must have a Conv2d or Linear layer, it has none")
    with pure(model, seed, positive) as call, without_norms(model) if bn == "identity" else contextlib.nullcontext():
        for weight in theta:
            weight.requires_grad_()
        flow = call(torch.ones_like(x[:1], dtype=torch.float64)).sum()
        grads = gradients(flow, theta)
    return total([(w.detach() * g).abs().sum() for w, g in zip(theta, grads, strict=True)])


def magnitude(tensor: Tensor) -> Tensor:
    """Return absolute values in memory of their own, floating ones in double precision."""
    tensor = tensor.detach()
    return tensor.to(torch.float64).abs() if tensor.is_floating_point() else tensor.abs().clone()


@contextlib.contextmanager
def without_norms(model: nn.Module) -> Iterator[None]:
    """Let every normalisation layer pass its input through."""
    norms = [(module, module.__dict__.get("forward")) for module in model.modules() if isinstance(module, NORMS)]
    try:
        for module, _ in norms:
            module.forward = lambda x, *args, **kwargs: x
        yield
    finally:
        for module, own in norms:
            del module.forward
            if own is not None:
                module.forward = own


def jacob_cov(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return :math:`-\sum_i \log(v_i + k) + 1/(v_i + k)` of the eigenvalues v of a correlation matrix.

    Higher is better. The matrix correlates the samples' rows of the Jacobian of the summed logits by the input; k is
    1e-5. The maximum :math:`-n (\log(1 + k) + 1 / (1 + k))` is reached by rows without correlation.

    Args:
        model: network; it stays as it was.
        batch: ``(x, y)`` or ``x`` alone, two samples or more.
        loss_fn: not used.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.

    Returns:
        The score; ``-inf``, with a warning, if the Jacobian of a sample is constant.

    Raises:
        ValueError: fewer than two samples, or inputs that are not finite.
        TypeError: complex numbers, or a batch of another kind.

    Reference: mellor2021naswot, abdelfattah2021zerocost.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> jacob_cov(model, torch.randn(3, 4)) < -3 * (1 / (1 + 1e-5))
    True
    """
    x = read_images(batch, 2).clone().requires_grad_()
    with pure(model, seed) as call:
        (jacobian,) = gradients(call(x).sum(), [x])
    rows = jacobian.flatten(1).double()
    centred = rows - rows.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    # A mean is exact up to rounding only, so a constant row may leave a trace of it.
    if (norms <= 1e-12 * torch.linalg.vector_norm(rows, dim=1, keepdim=True)).any():
        warnings.warn("jacob_cov: the Jacobian of a sample is constant, the score is -inf", stacklevel=2)
        return -float("inf")
    centred /= norms
    values = torch.linalg.eigvalsh(centred @ centred.T).clamp(min=0) + OFFSET
    return -float((values.log() + 1 / values).sum())
