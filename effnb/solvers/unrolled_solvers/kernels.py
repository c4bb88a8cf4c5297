"""Inference path of HyperLISTA: two matrix products a layer, buffers made once, no sorting unless needed."""

from __future__ import annotations

import torch
from torch import Tensor

from effnb.solvers.unrolled_solvers.thresholds import kth_largest_by_row

STOP = 1e-12  # an instance whose residual fell this far below its start is done; also what keeps b = 0 at 0


def select_(z: Tensor, theta: Tensor, p: Tensor, size: Tensor, kept: Tensor) -> Tensor:
    """Apply ``support_select`` in place; return the number of nonzeros ``(batch, 1)``.

    Only ``c``, the number of entries at or above the threshold, decides: no entry is spared at ``p = 0`` (soft
    threshold), all of them at ``p >= c`` (hard threshold). The rows between, and only they, are ranked.
    ``theta`` must be positive; ``size`` and ``kept`` are scratch of the shape of ``z``. A comparison that writes
    zeros and ones of ``z``'s own dtype makes mask, count and product three vectorised passes.
    """
    torch.abs(z, out=size)
    torch.ge(size, theta, out=kept)
    count = kept.sum(1, keepdim=True)
    if not p.any():
        z.sub_(torch.clamp(z, -theta, theta, out=size))
        return count
    z.mul_(kept)
    spared = p >= count
    if spared.all():
        return count
    cutoff = torch.where(spared, theta, torch.inf)
    rows = (~spared & (p > 0)).squeeze(1).nonzero().squeeze(1)
    if rows.numel():
        cutoff[rows] = kth_largest_by_row(size[rows], p[rows])
    kept.mul_(size < cutoff).mul_(z.sign())
    z.addcmul_(kept, -theta)
    return count


@torch.no_grad()
def infer(net, b: Tensor, n_layers: int, outputs: list[Tensor] | None = None) -> Tensor:
    """Run ``n_layers`` of a ``HyperLISTA`` on ``b (batch, m)`` without gradients; append each layer to ``outputs``."""
    n, batch = net.A.shape[1], b.shape[0]
    At, W, P, diagonal = net.A.T.contiguous(), net.W, net.pinv, net.pinv_diagonal
    c_theta, c_beta, c_p = (float(v) for v in net.c)
    x, x_old, z = (b.new_zeros(batch, n) for _ in range(3))
    v, size, kept = (b.new_empty(batch, n) for _ in range(3))
    r, start, tiny = torch.neg(b), None, torch.finfo(b.dtype).tiny
    nonzeros = b.new_zeros(batch, 1)
    for k in range(n_layers):
        if k:
            torch.addmm(b, x, At, beta=-1, out=r)
        torch.mm(r, W, out=v)
        if diagonal is not None:  # A^+ r = diagonal * (W^T r): no third product
            residual = torch.mv(torch.abs(v, out=size), diagonal).unsqueeze(1)
        else:
            residual = torch.linalg.vector_norm(torch.mm(r, P, out=size), 1, dim=1, keepdim=True)
        start = residual if start is None else start
        done = residual <= STOP * start
        beta = c_beta * net.mu * nonzeros
        p = (c_p * torch.log(start / residual)).nan_to_num(0.0, n, 0.0).clamp_(0, n).long()
        torch.lerp(x_old, x, 1 + beta, out=z).sub_(v)
        theta = (c_theta * net.mu * residual).clamp_min(tiny)  # positive, so that the count is that of nonzeros
        nonzeros = select_(z, theta, p, size, kept)
        if done.any():
            z = torch.where(done, x, z)
        x_old, x, z = x, z, x_old
        if outputs is not None:
            outputs.append(x.clone())
    return x
