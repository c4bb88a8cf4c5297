"""The two losses of the method: values, residuals, and Jacobian rows weighted by the loss's curvature."""

import torch
import torch.nn.functional as F
from torch import Tensor


def targets(y: Tensor, like: Tensor, centred: bool = False) -> Tensor:
    """One-hot targets, minus ``1 / K`` if ``centred``."""
    found = F.one_hot(y, like.shape[1]).to(like)
    return found - 1 / like.shape[1] if centred else found


def loss_per_sample(outputs: Tensor, y: Tensor, loss: str, centred: bool = False) -> Tensor:
    """``0.5 |f - t|^2`` (mse) or cross-entropy (ce) of each sample."""
    if loss == "ce":
        return F.cross_entropy(outputs, y, reduction="none")
    return 0.5 * (outputs - targets(y, outputs, centred)).square().sum(1)


def residual(outputs: Tensor, y: Tensor, loss: str, centred: bool = False) -> Tensor:
    """Gradient of the loss with respect to the outputs, ``(n, K)``."""
    if loss == "ce":
        return outputs.softmax(1) - targets(y, outputs)
    return outputs - targets(y, outputs, centred)


def curvature_rows(jac: Tensor, outputs: Tensor, loss: str, hessian: str) -> Tensor:
    """Rows whose Gram matrix is ``sum_i J_i^T H_i J_i``, ``(n, K, P)``; overwrites ``jac`` where it can.

    For cross-entropy ``H = diag(p) - p p^T``, whose rows are ``sqrt(p_k) (J_k - sum_l p_l J_l)``.
    """
    if hessian == "identity" or loss == "mse":
        return jac
    p = outputs.softmax(1)
    mean = torch.bmm(p.unsqueeze(1), jac)
    return jac.sub_(mean).mul_(p.sqrt().unsqueeze(2))
