"""Slow, obvious forms of the low-rank backward pass: masks broadcast over tiles, and the definition by loops."""

import math

import torch
import torch.nn.functional as F


def margins(size, order):
    """Padding in front and behind, the larger half in front."""
    missing = math.ceil(size / order) * order - size
    return math.ceil(missing / 2), missing - math.ceil(missing / 2)


def tiles_of(image, order, mode):
    """``(batch, channels, h, w)`` to ``(batch, channels, P_h, P_w, o, o)``, padded."""
    (top, bottom), (left, right) = (margins(size, order) for size in image.shape[2:])
    padded = F.pad(image, (left, right, top, bottom), mode=mode)
    b, c, h, w = padded.shape
    return padded.view(b, c, h // order, order, w // order, order).transpose(3, 4)


def masked_backward(x, weight, grad_y, grid, bases, mode="reflect"):
    """The published way: every mask times every tile, a tensor ``(m, B, C, P_h, P_w, o, o)``.

    ``x`` and ``grad_y`` are tokens ``(batch, h * w, channels)``; returns the gradients of x, weight and bias.
    """
    (h, w), order = grid, bases.shape[-1]
    masks = bases[:, None, None, None, None]
    images = [t.transpose(1, 2).reshape(len(t), -1, h, w) for t in (x, grad_y)]
    x_hat = (tiles_of(images[0], order, mode) * masks).sum((-1, -2))
    g_hat = (tiles_of(images[1], order, mode) * masks).mean((-1, -2))
    back = torch.einsum("mbouv,oi->mbiuv", g_hat, weight)
    tiles = (back[..., None, None] * masks).sum(0).transpose(3, 4)
    b, c, tall, _, wide, _ = tiles.shape
    whole = tiles.reshape(b, c, tall * order, wide * order)
    top, left = margins(h, order)[0], margins(w, order)[0]
    grad_x = whole[..., top : top + h, left : left + w].flatten(2).transpose(1, 2)
    grad_weight = torch.einsum("mbouv,mbiuv->oi", g_hat, x_hat)
    return grad_x, grad_weight, grad_y.sum((0, 1))


def cropped_functions(grid, order, positions):
    """Rows over the tokens: each Walsh function of each tile, cropped to the grid; by the definition, cell by cell."""
    (h, w), walsh = grid, sequency_matrix(order)
    top, left = margins(h, order)[0], margins(w, order)[0]
    rows = []
    for p in range(math.ceil(h / order)):
        for q in range(math.ceil(w / order)):
            for i, j in positions:
                row = torch.zeros(h, w, dtype=torch.float64)
                for u in range(order):
                    for v in range(order):
                        y, z = p * order + u - top, q * order + v - left
                        if 0 <= y < h and 0 <= z < w:
                            row[y, z] = walsh[i, u] * walsh[j, v]
                rows.append(row.flatten())
    return torch.stack(rows)


def sequency_matrix(order):
    """Rows of scipy's natural Hadamard matrix sorted by their sign changes."""
    from scipy.linalg import hadamard

    natural = torch.tensor(hadamard(order), dtype=torch.float64)
    changes = (natural[:, 1:] != natural[:, :-1]).sum(1)
    return natural[changes.argsort()]


def projected_backward(x, weight, grad_y, basis):
    """Exact back-propagation with both factors projected onto the span of orthonormal rows ``basis``."""
    projector = basis.T @ basis
    g = projector @ grad_y
    return g @ weight, torch.einsum("blo,bli->oi", g, x), grad_y.sum((0, 1))


def orthonormal_span(rows, tolerance=1e-4):
    """Orthonormal rows of the span, by a singular value decomposition of the whole matrix."""
    _, values, basis = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
    return basis[values > tolerance]
