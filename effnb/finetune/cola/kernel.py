"""The adapted linear map as one autograd function: no temporary of the output's size, skinny products the fast way."""

import torch
import torch.nn.functional as F
from torch import Tensor

# torch.func's transforms need plain operations; without the (private) question they are never assumed.
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``total += scale * left @ right`` in one pass; out of place only where a graph is recorded.

    It is ``addmm`` into its own argument, since counters of operations do not know ``addmm_``.
    """
    return torch.addmm(total, left, right, alpha=scale, out=None if torch.is_grad_enabled() else total)


class _AdaptedLinear(torch.autograd.Function):
    """A product with a short side of ``rank`` runs several times faster with the long side last.

    Everything that has ``rank`` columns is therefore computed as its transpose, and the adapter's part of the input's
    gradient is added inside the second product instead of in a pass of its own.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        flat = x.reshape(-1, x.shape[-1])
        xA = A @ flat.t()
        out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        add_product_(out, xA.t(), B.t(), scale)
        ctx.save_for_backward(x, weight, A, B, xA)
        ctx.scale = scale
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B, xA = ctx.saved_tensors
        x_grad, weight_grad, bias_grad, A_grad, B_grad, _ = ctx.needs_input_grad
        flat, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).contiguous()
        if torch.is_grad_enabled():  # a second derivative is wanted, and the saved product has no history
            xA = A @ flat.t()
        gB = B.t().contiguous().mul_(ctx.scale) @ g.t()
        dx = add_product_(g @ weight, gB.t(), A).view(x.shape) if x_grad else None
        dW = g.t() @ flat if weight_grad else None
        db = g.sum(0) if bias_grad else None
        dA = gB @ flat if A_grad else None
        dB = ((xA * ctx.scale) @ g).t() if B_grad else None
        return dx, dW, db, dA, dB, None


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``x W^T + b + s (x A^T) B^T``, in one node of the graph where dtypes agree and nothing else intervenes."""
    if x.dtype == weight.dtype == A.dtype and not (_transformed() or torch.is_autocast_enabled(x.device.type)):
        return _AdaptedLinear.apply(x, weight, bias, A, B, scale)
    out = F.linear(x, weight, bias)
    return out + adapter_linear(x, A, B, scale).to(out.dtype)


def adapter_linear(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The adapter's part alone, ``s (x A^T) B^T``, in the precision of the factors."""
    return F.linear(F.linear(x.to(A.dtype), A), B * scale)
